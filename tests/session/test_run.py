"""A program that receives SIGTERM reports its operations as failed, and exits with 143."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import trio
import trio.testing
from helpers import CLEAN

import backbeat_trio as backbeat
from backbeat_trio.testing import NatsServer, open_recorder, open_session

REASON = "cancelled: the process received SIGTERM"


@pytest.fixture(autouse=True)
def _sigterm_is_left_as_it_was() -> Iterator[None]:
    # Whatever runs the tests may handle or ignore it.
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    left = signal.signal(signal.SIGTERM, before)
    assert left is signal.SIG_DFL


def virtual() -> trio.testing.MockClock:
    return trio.testing.MockClock(autojump_threshold=0)


async def terminate(*_: object) -> None:
    signal.raise_signal(signal.SIGTERM)
    await trio.sleep_forever()


def exit_code(async_fn: Any, *args: Any, **options: Any) -> object:
    with pytest.raises(SystemExit) as caught:
        backbeat.run(async_fn, *args, **options)
    return caught.value.code


# As with `trio.run`.


def test_it_runs_as_trio_does() -> None:
    class Instrument(trio.abc.Instrument):
        ended = 0

        def after_run(self) -> None:
            self.ended += 1

    async def main(number: int, text: str) -> tuple[int, str, float]:
        start = trio.current_time()
        await trio.sleep(1000)
        return number, text, trio.current_time() - start

    instrument = Instrument()
    clock = virtual()
    assert backbeat.run(main, 1, "x", clock=clock, instruments=[instrument]) == (1, "x", 1000.0)
    assert instrument.ended == 1


def test_exceptions_leave_as_themselves() -> None:
    async def fail(error: BaseException) -> NoReturn:
        await trio.lowlevel.checkpoint()
        raise error

    with pytest.raises(KeyError, match="wrong"):
        backbeat.run(fail, KeyError("wrong"))
    assert exit_code(fail, SystemExit(3)) == 3


def test_ctrl_c_is_left_to_trio() -> None:
    async def main() -> None:
        signal.raise_signal(signal.SIGINT)
        await trio.sleep_forever()

    for restrict in (False, True):
        with pytest.raises(KeyboardInterrupt):
            backbeat.run(main, restrict_keyboard_interrupt_to_checkpoints=restrict)


def test_it_is_refused_inside_a_run_and_the_outer_one_still_ends_on_sigterm() -> None:
    async def main() -> None:
        with pytest.raises(RuntimeError, match="from inside"):
            backbeat.run(trio.sleep, 0)
        await terminate()

    assert exit_code(main) == 143


# SIGTERM.


def test_sigterm_cancels_and_exits_with_143() -> None:
    seen: list[object] = []

    async def main() -> None:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep_forever)
                await terminate()
        except* trio.Cancelled as group:
            seen.extend(error.reason for error in group.exceptions if hasattr(error, "reason"))
            raise

    assert exit_code(main) == 143
    assert set(seen) == {"the process received SIGTERM"}


def test_sigterm_before_the_first_checkpoint_cancels_there() -> None:
    reached = []

    async def main() -> None:
        reached.append("begins")
        await trio.lowlevel.checkpoint()
        reached.append("goes on")  # pragma: no cover

    class Early(trio.abc.Instrument):
        def before_run(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    assert exit_code(main, instruments=[Early()]) == 143
    assert reached == ["begins"]


def test_sigterm_is_not_lost_when_the_function_returns_before_it_is_cancelled() -> None:
    async def main() -> str:
        signal.raise_signal(signal.SIGTERM)
        return "done"

    class Late(trio.abc.Instrument):
        def after_run(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    assert exit_code(main) == 143
    assert exit_code(trio.sleep, 0, instruments=[Late()]) == 143


def test_an_error_of_the_clean_up_takes_precedence() -> None:
    async def main() -> None:
        try:
            await terminate()
        finally:
            raise ValueError("while cleaning up")

    with pytest.raises(ValueError, match="while cleaning up"):
        backbeat.run(main)


def test_a_clean_up_is_not_cut_short_by_more_sigterms() -> None:
    cleaned_up = []

    async def main() -> None:
        try:
            await terminate()
        finally:
            with trio.CancelScope(shield=True):
                signal.raise_signal(signal.SIGTERM)
                await trio.sleep(5)
                cleaned_up.append(True)

    assert exit_code(main, clock=virtual()) == 143
    assert cleaned_up


def test_a_clean_up_is_cut_short_by_ctrl_c() -> None:
    async def main() -> None:
        try:
            await terminate()
        finally:
            with trio.CancelScope(shield=True):
                signal.raise_signal(signal.SIGINT)
                await trio.sleep_forever()

    with pytest.raises(KeyboardInterrupt):
        backbeat.run(main)


def test_a_handler_that_is_there_already_stays() -> None:
    received = []

    async def main() -> str:
        signal.raise_signal(signal.SIGTERM)
        await trio.lowlevel.checkpoint()
        return "done"

    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        assert backbeat.run(main) == "done"
        assert received == [signal.SIGTERM]
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert backbeat.run(main) == "done"
    finally:
        signal.signal(signal.SIGTERM, before)


def test_in_another_thread_it_is_trios_run() -> None:
    results: list[object] = []

    async def main() -> str:
        await trio.lowlevel.checkpoint()
        return "done"

    thread = threading.Thread(target=lambda: results.append(backbeat.run(main)))
    thread.start()
    thread.join()
    assert results == ["done"]


def test_operations_fail_with_the_reason_in_virtual_time() -> None:
    notes: list[str] = []
    bus = backbeat.MemoryBus()

    async def watch(*, task_status: trio.TaskStatus[None]) -> None:
        with trio.CancelScope(shield=True), trio.fail_after(60):
            async with (
                open_session(bus, agent_id="watcher", lock_timeout=0) as watcher,
                open_recorder(watcher, "test-agent") as claims,
            ):
                task_status.started()
                for name in ("cut", "other"):
                    notes.append((await claims.wait_for(name, "failed")).notes)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(watch)
            async with open_session(bus, lock_timeout=0) as bb:
                bb.start_operation("election", id="other")
                async with bb.operation("election", id="cut"):
                    await terminate()

    assert exit_code(main, clock=virtual()) == 143
    assert notes == [
        f"P2P operation failed: {REASON} (type: election)",
        "P2P operation failed: the session was closed (type: election)",
    ]


# Real processes.

AGENT = """
import sys
import trio
import backbeat_trio as backbeat

async def main():
    async with backbeat.session(nats_url=sys.argv[1], agent_id="agent", require_connection=True,
                                cluster_id="test-cluster", lock_timeout=0) as bb:
        async with bb.operation("election", id="cut", beats=5):
            print("working", flush=True)
            await trio.sleep_forever()

try:
    backbeat.run(main)
finally:
    print("after run", flush=True)
"""


async def lines_of(process: trio.Process, text: str) -> str:
    assert process.stdout is not None
    heard = ""
    with trio.fail_after(60):
        while text not in heard:
            data = await process.stdout.receive_some()
            assert data, heard
            heard += data.decode()
    return heard


@pytest.mark.parametrize("times", [1, 2])
async def test_a_terminated_agent_tells_its_terminal_claims(times: int) -> None:
    async with (
        NatsServer() as server,
        open_session(
            nats_url=server.url, agent_id="watcher", require_connection=True, lock_timeout=0
        ) as watcher,
        open_recorder(watcher, "agent") as claims,
    ):
        process = await trio.lowlevel.open_process(
            [sys.executable, "-W", "error", "-c", AGENT, server.url],
            stdout=subprocess.PIPE,
            env=CLEAN,
        )
        try:
            await lines_of(process, "working")
            with trio.fail_after(60):
                await claims.wait_for("cut", "executing")
                for _ in range(times):
                    os.kill(process.pid, signal.SIGTERM)
                failed = await claims.wait_for("cut", "failed")
                assert failed.notes == f"P2P operation failed: {REASON} (type: election)"
                await lines_of(process, "after run")
                assert await process.wait() == 143
        finally:
            with trio.CancelScope(shield=True):
                process.kill()
                await process.wait()


async def test_the_agent_of_the_operating_guide_exits_with_143() -> None:
    guide = Path(__file__).parent.parent.parent / "docs" / "operating.md"
    (code,) = re.findall(r"^```python\n(.*?)^```", guide.read_text(), re.DOTALL | re.MULTILINE)
    working = code.replace("await bb.sleep(10)", "print('working', flush=True); await bb.sleep(10)")
    process = await trio.lowlevel.open_process(
        [sys.executable, "-W", "error", "-c", working],
        stdout=subprocess.PIPE,
        env=CLEAN | {"CHORUS_BACKBEAT_NATS_URL": "memory://guide"},
    )
    try:
        await lines_of(process, "working")
        process.terminate()
        with trio.fail_after(60):
            assert await process.wait() == 143
    finally:
        with trio.CancelScope(shield=True):
            process.kill()
            await process.wait()
