"""Finding services: how long answers are waited for, and what counts as one."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
import trio

from backbeat_trio import MemoryBus, MemoryTransport
from backbeat_trio._transport.discovery import find_services


def info(id: str, name: str = "pages") -> bytes:
    told = {"type": "io.nats.micro.v1.info_response", "name": name, "id": id, "version": "1.0.0"}
    return json.dumps(told | {"metadata": {}, "description": "", "endpoints": []}).encode()


async def asked(
    answers: Sequence[tuple[float, bytes]], *, name: str = "", subject: str = "$SRV.INFO"
) -> tuple[list[str], float]:
    """Return which instances are found, and how long it takes, if answers come after pauses."""
    bus = MemoryBus()
    transport, other = MemoryTransport(bus), MemoryTransport(bus)
    async with trio.open_nursery() as nursery:
        await nursery.start(transport.run)
        await nursery.start(other.run)

        async def answer() -> None:
            async with other.open_subscription(subject) as questions:
                listening.set()
                question = await anext(aiter(questions))
                for pause, data in answers:
                    await trio.sleep(pause)
                    other.publish_nowait(question.reply, data)

        listening = trio.Event()
        nursery.start_soon(answer)
        await listening.wait()
        begun = trio.current_time()
        found = await find_services(transport, name)
        lasted = trio.current_time() - begun
        nursery.cancel_scope.cancel()
    return [each.id for each in found], lasted


async def test_answers_are_waited_for_until_the_last_one_was_a_while_ago(
    autojump_clock: trio.testing.MockClock,
) -> None:
    answers = [(1.9, info("b")), (0.29, info("a")), (0.29, info("a")), (0.31, info("c"))]
    found, lasted = await asked(answers)
    assert found == ["a", "b"]
    assert lasted == pytest.approx(1.9 + 0.29 + 0.29 + 0.3)


async def test_nobody_answers(autojump_clock: trio.testing.MockClock) -> None:
    found, lasted = await asked([])
    assert (found, lasted) == ([], 2.0)
    # No process is subscribed at all.
    found, lasted = await asked([], subject="elsewhere")
    assert (found, lasted) == ([], 0.0)


async def test_answers_that_never_end_are_cut(autojump_clock: trio.testing.MockClock) -> None:
    answers = [(0.2, info(f"{number:03}")) for number in range(1000)]
    found, lasted = await asked(answers)
    assert lasted == pytest.approx(10.0)
    assert 45 <= len(found) <= 50


async def test_answers_that_are_not_valid_are_left_out(
    autojump_clock: trio.testing.MockClock,
) -> None:
    odd = [b"", b"\xff", b"{}", b"[" * 5000, info("a").replace(b"info_response", b"ping_response")]
    found, _ = await asked([(0.1, data) for data in [*odd, info("b"), info("x", name="")]])
    assert found == ["x", "b"]


async def test_only_services_of_one_name_are_asked(
    autojump_clock: trio.testing.MockClock,
) -> None:
    found, _ = await asked([(0.1, info("a"))], name="pages", subject="$SRV.INFO.pages")
    assert found == ["a"]
