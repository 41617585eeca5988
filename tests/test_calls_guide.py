"""The blocks of code in ``docs/calls.md``: each runs as it stands."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
import trio
import trio.testing
from blocks import ROOT, blocks
from helpers import guarded
from hypercorn.config import Config
from hypercorn.trio import serve

from backbeat_trio import BeatBudgetExceeded, ServiceError, Session, session
from backbeat_trio._calls import endpoint, requests
from backbeat_trio._runtime.health import CallCounts

MESSAGES, PAGES, APP, CLIENT, PLAN, SOFT, RETRY = blocks(
    (ROOT / "docs/calls.md").read_text(), "python"
)


def names(*code: str) -> dict[str, Any]:
    namespace: dict[str, Any] = {}
    for block in code:
        exec(compile(block, "docs/calls.md", "exec"), namespace)
    return namespace


async def test_messages(backbeat_session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    bb, guide = backbeat_session, names(MESSAGES)
    sender, receiver = trio.open_memory_channel[Any](4)
    ended: list[tuple[str, float]] = []

    async def do(job: str) -> None:
        try:
            await bb.sleep(3 if job == "short" else 100)
        finally:
            ended.append((job, bb.current_position()))

    await guide["send_job"](bb, sender, "short")
    await guide["send_job"](bb, sender, "long")
    await sender.aclose()
    await guide["work"](bb, receiver, do)
    assert ended == [("short", 3), ("long", 10)]
    assert capsys.readouterr().out == "the caller has given up\n"


async def test_requests_and_services(backbeat_session: Session) -> None:
    bb, guide = backbeat_session, names(PAGES)
    ended: list[float] = []

    async def fetch(address: bytes) -> bytes:
        try:
            await bb.sleep(100 if address == b"slow" else 3)
        finally:
            ended.append(bb.current_position())
        return b"<html>" + address

    async with trio.open_nursery() as nursery:
        nursery.start_soon(guide["serve_pages"], bb, fetch)
        await trio.testing.wait_all_tasks_blocked()
        assert await guide["page"](bb, b"quick") == b"<html>quick"
        with pytest.raises(BeatBudgetExceeded):
            await guide["page"](bb, b"slow")
        with pytest.raises(ServiceError, match="names no page") as info:
            await guide["page"](bb, b"")
        assert info.value.code == 400
        with pytest.raises(ServiceError, match=r"at least 0\.5") as info:
            await bb.request("pages.fetch", b"quick", beats=0.4)
        assert info.value.code == 408
        nursery.cancel_scope.cancel()
    assert ended == [3, 13]


def test_the_codes_of_services_are_all_in_tables() -> None:
    codes = {endpoint.CANCELLED, endpoint.CRASHED, endpoint.UNAVAILABLE, endpoint.TOO_LARGE}
    codes |= {requests.SPENT, requests.OUT_OF_TIME}
    services, _, http = (ROOT / "docs/calls.md").read_text().partition("## HTTP")
    assert http
    for text in (services, (ROOT / "README.md").read_text()):
        assert {int(code) for code in re.findall(r"^\| (\d{3}) \|", text, re.MULTILINE)} == codes
    counters = set(re.findall(r"`(calls_\w+)`", services))
    assert counters <= set(CallCounts.__struct_fields__)


@guarded(60)
async def test_http(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHORUS_BACKBEAT_NATS_URL", "memory://calls-guide")
    monkeypatch.setenv("CHORUS_BACKBEAT_TEMPO_BPM", "60")
    guide = names(APP, CLIENT)
    config = Config()
    config.bind = ["127.0.0.1:0"]
    stop = trio.Event()
    async with session() as bb, trio.open_nursery() as nursery:
        server: Any = functools.partial(serve, guide["app"], config, shutdown_trigger=stop.wait)
        (url,) = await nursery.start(server)
        text = await guide["fetch"](bb, url)
        assert re.fullmatch(r"[1-9](\.\d)? beats? left, about \d seconds? at 60 BPM\n", text)
        stop.set()


async def test_what_is_left(backbeat_session: Session) -> None:
    async def ask_model(prompt: str) -> str:
        return prompt

    prompt = await names(PLAN)["plan"](backbeat_session, ask_model)
    assert prompt == "Plan the search. 12 beats left, about 12 seconds at 60 BPM."


@pytest.mark.parametrize(("count", "complete"), [(2, True), (5, False)])
async def test_soft_edges(backbeat_session: Session, count: int, complete: bool) -> None:
    async def source() -> float:
        await backbeat_session.sleep(3)
        return backbeat_session.current_position()

    guide = names(SOFT)
    guide["summary"] = lambda found, complete: (found, complete)
    result = await guide["search"](backbeat_session, [source] * count)
    assert result == ([3, 6], complete)
    assert backbeat_session.current_position() == (6 if complete else 8)


async def test_retries(backbeat_session: Session) -> None:
    bb, retry = backbeat_session, names(RETRY)["retry"]
    calls: list[float] = []

    async def call() -> str:
        calls.append(bb.current_position())
        if len(calls) < 5:
            raise OSError("refused")
        return "done"

    with bb.fail_after(20):
        assert await retry(bb, call) == "done"
    assert calls == [0, 0.25, 0.75, 1.75, 3.75]
    # The last wait is trimmed, and after it the error comes before the deadline.
    calls.clear()
    await bb.sleep_until(10)
    with pytest.raises(OSError, match="refused"):
        with bb.fail_after(2):
            await retry(bb, call)
    assert calls == [10, 10.25, 10.75, 11]
    with pytest.raises(BeatBudgetExceeded):
        with bb.fail_after(2):
            await retry(bb, trio.sleep_forever)
