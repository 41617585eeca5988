"""What instruments are told, in which task, and what happens to one that raises."""

from __future__ import annotations

import contextlib
import contextvars
import logging
import math
from collections.abc import Mapping, MutableMapping
from typing import Any

import httpx
import pytest
import trio
import trio.testing
from helpers import guarded

from backbeat_trio import (
    BeatBudgetExceeded,
    Call,
    Instrument,
    NoResponders,
    Observed,
    Operation,
    Phase,
    Request,
    ServiceError,
    Session,
)
from backbeat_trio._runtime.instruments import EVENTS
from backbeat_trio._time.beats import Beat
from backbeat_trio._time.scopes import BeatScope
from backbeat_trio.http import BackbeatMiddleware, BackbeatTransport
from backbeat_trio.testing import open_session

Clock = trio.testing.MockClock

inside: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("inside", default=())


class Recorder(Instrument):
    """Writes down all events, and keeps in a context variable what the task is inside of."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.calls: list[Call] = []
        self.former: dict[object, tuple[str, ...]] = {}

    def enter(self, key: object, name: str) -> None:
        self.former[key] = inside.get()
        inside.set((*inside.get(), name))

    def leave(self, key: object) -> None:
        inside.set(self.former.pop(key))

    def session_opened(self, session: Observed) -> None:
        self.events.append(("opened", session.config.agent_id, session.health().started))

    def session_closed(self) -> None:
        self.events.append(("closed",))

    def beat(self, beat: Beat, lateness: float) -> None:
        assert 0 <= lateness < 60
        self.events.append(("beat", beat.index))

    def operation_started(self, operation: Operation) -> None:
        self.events.append(("started", operation.id, operation.phase))

    def operation_advanced(self, operation: Operation, former: Phase, beat: int) -> None:
        self.events.append(("advanced", operation.id, former, operation.phase, beat))

    def operation_finished(
        self, operation: Operation, former: Phase, beat: int, reason: str | None
    ) -> None:
        self.events.append(("finished", operation.id, former, operation.phase, beat, reason))

    def operation_entered(self, operation: Operation) -> None:
        self.enter(operation, operation.id)

    def operation_left(self, operation: Operation) -> None:
        self.leave(operation)

    def call_started(self, call: Call) -> None:
        assert call.outcome is None
        self.enter(call, call.side)

    def call_finished(self, call: Call) -> None:
        self.leave(call)
        self.calls.append(call)

    def extract_entered(self, scope: BeatScope, headers: Mapping[str, str] | None) -> None:
        self.enter(scope, "detached" if headers is None else headers.get("x", "extract"))

    def extract_left(self, scope: BeatScope) -> None:
        self.leave(scope)

    def inject(self, headers: MutableMapping[str, str]) -> None:
        headers["x"] = "/".join(inside.get())

    def named(self, *names: str) -> list[tuple[Any, ...]]:
        return [event for event in self.events if event[0] in names]

    def outcomes(self) -> list[tuple[Any, ...]]:
        return [(call.side, call.outcome, call.code) for call in self.calls]


async def test_session_beats_and_operations(autojump_clock: Clock) -> None:
    recorder = Recorder()
    async with open_session(tempo_bpm=60.0, instruments=[recorder]) as bb:
        assert bb.instruments == (recorder,)
        assert recorder.events[0] == ("opened", bb.config.agent_id, False)
        begin = bb.current_beat()
        async with bb.operation("t", id="a") as outer:
            assert inside.get() == ("a",)
            outer.advance(Phase.EXECUTING)
            await bb.sleep(1)
            async with bb.operation("t", id="b"):
                assert inside.get() == ("a", "b")
                headers: dict[str, str] = {}
                bb.inject(headers)
                assert headers["x"] == "a/b"
            with bb.detached():
                assert inside.get() == ("a", "detached")
            assert inside.get() == ("a",)
        assert inside.get() == ()
        with pytest.raises(ValueError, match="no luck"):
            async with bb.operation("t", id="c"):
                raise ValueError("no luck")
        assert inside.get() == ()
        bb.start_operation("t", id="d")
        assert inside.get() == ()
        with bb.extract([(b"X", b"1"), (b"x", b"2")]):
            assert inside.get() == ("1, 2",)
        traced = {"Traceparent": "00-1"}
        bb.inject(traced)
        assert "x" not in traced
        beat = bb.current_beat()
        await bb.sleep(2.5)
    started, live = Phase.STARTED, Phase.EXECUTING
    assert [event for event in recorder.events if event[0] not in ("beat", "opened", "closed")] == [
        ("started", "a", started),
        ("advanced", "a", started, live, begin),
        ("started", "b", started),
        ("finished", "b", started, Phase.COMPLETED, beat, None),
        ("finished", "a", live, Phase.COMPLETED, beat, None),
        ("started", "c", started),
        ("finished", "c", started, Phase.FAILED, beat, "ValueError: no luck"),
        ("started", "d", started),
        ("finished", "d", started, Phase.FAILED, beat + 2, "the session was closed"),
    ]
    assert ("beat", beat + 1) in recorder.events
    assert recorder.events[-1] == ("closed",)
    assert not recorder.former


async def serve(bb: Session, task_status: trio.TaskStatus[None]) -> None:
    async def handle(request: Request) -> bytes:
        assert inside.get()[-1:] == ("server",)
        match request.data:
            case b"crash":
                raise RuntimeError("on purpose")
            case b"error":
                raise ServiceError(404, "nothing here")
            case b"wait":
                await trio.sleep_forever()
        return "/".join(inside.get()).encode()

    async with bb.open_service("s", version="1.0.0") as service:
        await service.serve("s", handle, concurrency=2, task_status=task_status)


async def test_calls_on_both_sides(autojump_clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    client, server = Recorder(), Recorder()
    settings: Any = {"nats_url": "memory://instruments", "tempo_bpm": 60.0}
    async with (
        open_session(agent_id="server", instruments=[server], **settings) as other,
        open_session(agent_id="client", instruments=[client], **settings) as bb,
        trio.open_nursery() as nursery,
    ):
        await nursery.start(serve, other)
        answer = await bb.request("s", b"", beats=5)
        # The handler's context is one of its own, whatever the task of the service is in.
        assert answer.data == b"server"
        assert server.calls[-1].headers["x"] == "client"
        assert 4.9 < server.calls[-1].beats_left <= 5
        assert (client.calls[-1].target, client.calls[-1].method) == ("s", "request")
        assert math.isinf((await ask(bb, client, b"")).beats_left)
        assert (await ask(bb, client, b"crash")).code == 500
        assert (await ask(bb, client, b"error")).code == 404
        with pytest.raises(BeatBudgetExceeded):
            await bb.request("s", b"wait", beats=2)
        with trio.move_on_after(1):
            await bb.request("s", b"wait")
        with pytest.raises(NoResponders):
            await bb.request("nobody")
        await trio.testing.wait_all_tasks_blocked()
        # Two handlers run, so others wait for their turn.
        async with trio.open_nursery() as waiting:
            for payload in (b"wait", b"wait"):
                waiting.start_soon(ask, bb, client, payload)
            await trio.testing.wait_all_tasks_blocked()
            headers: dict[str, str] = {}
            with bb.move_on_after(1):
                bb.inject(headers)
            await bb.sleep(2)
            # If the two are cancelled before it, its handler may begin, which must not answer then.
            with bb.detached():
                waiting.start_soon(ask, bb, client, b"wait")
            await trio.testing.wait_all_tasks_blocked()
            transport = bb._runtime.transport
            assert transport is not None
            await transport.publish("s", b"too late", headers=headers)
            await trio.testing.wait_all_tasks_blocked()
            waiting.cancel_scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert client.outcomes() == [
        ("client", "ok", None),
        ("client", "ok", None),
        ("client", "failed", 500),
        ("client", "error", 404),
        ("client", "expired", None),
        ("client", "expired", None),
        ("client", "no_responders", None),
        *[("client", "cancelled_by_caller", None)] * 3,
    ]
    assert server.outcomes()[:4] == [
        ("server", "ok", None),
        ("server", "ok", None),
        ("server", "failed", 500),
        ("server", "error", 404),
    ]
    # A deadline in seconds travels, too.
    assert server.outcomes()[4:6] == [("server", "expired", 504)] * 2
    rest = sorted(server.outcomes()[6:], key=str)
    assert rest == [
        *[("server", "cancelled_by_caller", 499)] * 3,
        ("server", "expired_on_arrival", 408),
    ]
    assert not client.former
    assert not server.former
    assert "the instrument" not in caplog.text


async def ask(bb: Session, recorder: Recorder, payload: bytes) -> Call:
    with contextlib.suppress(ServiceError):
        await bb.request("s", payload)
    return recorder.calls[-1]


async def test_calls_over_http(autojump_clock: Clock) -> None:
    recorder = Recorder()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert inside.get()[-1] == "server"
        if scope["path"] == "/wait":
            await trio.sleep_forever()
        if scope["path"] == "/crash":
            raise RuntimeError("on purpose")
        status = 404 if scope["path"] == "/missing" else 200
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async with open_session(tempo_bpm=60.0, instruments=[recorder]) as bb:
        served = httpx.ASGITransport(BackbeatMiddleware(app, bb), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=BackbeatTransport(served, bb)) as http:
            for path in ("/", "/missing", "/crash"):
                await http.get(f"http://user:secret@pages{path}?token=secret")
            with bb.move_on_after(3):
                await http.get("http://pages/wait")
            spent = {"backbeat-deadline": f"{bb._calls.incarnation}; 0.0; 0.0"}
            await httpx.AsyncClient(transport=served).get("http://pages/", headers=spent)
    assert recorder.outcomes() == [
        *[("server", "ok", 200), ("client", "ok", 200)],
        *[("server", "error", 404), ("client", "error", 404)],
        *[("server", "failed", None), ("client", "failed", 500)],
        *[("server", "expired", None), ("client", "expired", None)],
        ("server", "expired_on_arrival", 408),
    ]
    assert recorder.calls[0].target == "/"
    assert recorder.calls[1].target == "http://pages/"
    assert recorder.calls[0].method == "GET"
    assert not recorder.former


def raise_error(*args: object) -> None:
    raise RuntimeError("a fault of the instrument")


@pytest.mark.parametrize("event", EVENTS)
async def test_one_that_raises_is_logged_and_removed(
    event: str, autojump_clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    broken, recorder = type("Broken", (Recorder,), {event: raise_error})(), Recorder()
    async with open_session(tempo_bpm=60.0, instruments=[broken, recorder]) as bb:
        async with trio.open_nursery() as nursery:
            await nursery.start(serve, bb)
            async with bb.operation("t") as operation:
                operation.advance(Phase.EXECUTING)
                with bb.extract({"a": "b"}):
                    assert (await bb.request("s")).data
            await bb.sleep(1.5)
            nursery.cancel_scope.cancel()
        assert bb.instruments == ((broken, recorder) if event == "session_closed" else (recorder,))
    logged = [record for record in caplog.records if "a fault of the instrument" in record.message]
    assert [record.levelno for record in logged] == [logging.ERROR]
    assert [call.outcome for call in recorder.calls] == ["ok", "ok"]
    assert len(recorder.named("started", "finished", "closed")) == 3


async def test_what_cannot_be_an_instrument() -> None:
    class Waiting(Instrument):
        async def beat(self, beat: Beat, lateness: float) -> None:  # type: ignore[override]
            pass

    for wrong, text in ((object(), "must be of the class Instrument"), (Waiting(), "async")):
        with pytest.raises(TypeError, match=text):
            async with open_session(instruments=[wrong]):  # type: ignore[list-item]
                raise AssertionError("unreachable")


def test_every_method_is_an_event() -> None:
    assert sorted(EVENTS) == sorted(name for name in vars(Instrument) if not name.startswith("_"))
    with pytest.raises(TypeError, match="made by the session"):
        Call()


@guarded(60)
async def test_a_disabled_session_has_instruments_too() -> None:
    recorder = Recorder()
    async with open_session(enabled=False, instruments=[recorder]) as bb:
        async with bb.operation("t"):
            headers: dict[str, str] = {}
            bb.inject(headers)
            assert headers == {}
    assert [event[0] for event in recorder.named("opened", "started", "finished", "closed")] == [
        *("opened", "started", "finished", "closed")
    ]
