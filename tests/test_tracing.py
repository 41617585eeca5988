"""Traces: the spans of operations and calls, how they nest, and how they travel."""

from __future__ import annotations

import contextvars
import logging
from typing import Any

import httpx
import pytest
import trio
import trio.testing
from helpers import guarded
from opentelemetry import propagate, trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from backbeat_trio import NoResponders, Phase, Request, ServiceError, Session
from backbeat_trio.http import BackbeatMiddleware, BackbeatTransport
from backbeat_trio.testing import NatsServer, open_session
from backbeat_trio.tracing import Tracing

Clock = trio.testing.MockClock


class Collected:
    """The spans that have ended."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))

    def make(self) -> Tracing:
        return Tracing(self.provider)

    @property
    def spans(self) -> list[ReadableSpan]:
        return list(self._exporter.get_finished_spans())

    def one(self, name: str, kind: SpanKind = SpanKind.INTERNAL) -> ReadableSpan:
        (found,) = [span for span in self.spans if (span.name, span.kind) == (name, kind)]
        return found

    def parents(self) -> dict[str, str | None]:
        """Return the name of each span's parent; 'another' if it has not ended."""
        names = {span.context.span_id: span.name for span in self.spans if span.context}
        return {
            span.name: None if span.parent is None else names.get(span.parent.span_id, "another")
            for span in self.spans
        }


@pytest.fixture
def collected() -> Collected:
    return Collected()


def attributes_of(span: ReadableSpan, prefix: str) -> dict[str, Any]:
    return {
        name.removeprefix(prefix): value
        for name, value in (span.attributes or {}).items()
        if name.startswith(prefix)
    }


def current() -> str:
    """Return the name of the current span."""
    return getattr(trace.get_current_span(), "name", "")


async def test_operations_are_spans_with_an_event_for_each_phase(
    collected: Collected, autojump_clock: Clock
) -> None:
    async with open_session(tempo_bpm=60.0, instruments=[collected.make()]) as bb:
        begin = bb.current_beat()
        async with bb.operation("outer", id="o-1", beats=4) as outer:
            assert current() == "outer"
            outer.advance(Phase.CONNECTING, peers=3)
            await bb.sleep(6)
            async with bb.operation("inner", id="i-1"):
                assert current() == "inner"
                with collected.provider.get_tracer("own").start_as_current_span("own"):
                    loose = bb.start_operation("loose")
                    assert current() == "own"
            loose.complete()
            assert current() == "outer"
            async with trio.open_nursery() as nursery:
                nursery.start_soon(in_a_task, bb)
        with pytest.raises(ValueError, match="no luck"):
            async with bb.operation("failing"):
                raise ValueError("no luck")
        assert current() == ""
        bb.start_operation("left open")
    parents = {"outer": None, "inner": "outer", "own": "inner", "loose": "own", "task": "outer"}
    assert collected.parents() == parents | {"failing": None, "left open": None}
    span = collected.one("outer")
    assert [(event.name, dict(event.attributes or {})) for event in span.events] == [
        ("started", {"backbeat.beat": begin, "backbeat.operation.peers": 0}),
        ("connecting", {"backbeat.beat": begin, "backbeat.operation.peers": 3}),
        ("completed", {"backbeat.beat": begin + 7, "backbeat.operation.peers": 3}),
    ]
    assert attributes_of(span, "backbeat.operation.") == {
        "id": "o-1",
        "type": "outer",
        "correlation_id": "test-agent/o-1",
        "estimated_beats": 4,
        "start_beat": begin,
        "passed_beats": 7,
        "used_ratio": 1.75,
    }
    assert attributes_of(span, "backbeat.agent.") == {"id": "test-agent"}
    assert span.status.status_code is StatusCode.UNSET
    inner = attributes_of(collected.one("inner"), "backbeat.operation.")
    assert inner["parent"] == inner["correlation_id"] == "test-agent/o-1"
    for name, reason in (
        ("failing", "ValueError: no luck"),
        ("left open", "the session was closed"),
    ):
        status = collected.one(name).status
        assert (status.status_code, status.description) == (StatusCode.ERROR, reason)


async def in_a_task(bb: Session) -> None:
    async with bb.operation("task"):
        await bb.sleep(1)


async def answer(request: Request) -> bytes:
    if request.data == b"wait":
        await trio.sleep_forever()
    if request.data:
        raise ServiceError(404, "nothing here")
    return current().encode()


async def serve(bb: Session, task_status: trio.TaskStatus[None]) -> None:
    async def handle(request: Request) -> bytes:
        async with bb.operation("work"):
            return await answer(request)

    async with bb.open_service("s", version="1.0.0") as service:
        await service.serve("pages.*", handle, task_status=task_status)


@guarded(120)
async def test_the_span_of_a_service_is_the_child_of_its_callers(collected: Collected) -> None:
    # Each has spans of its own, as in two processes: only the headers connect them.
    theirs = Collected()
    async with NatsServer() as server, trio.open_nursery() as nursery:
        settings: Any = {"nats_url": server.url, "lock_timeout": 0.0, "require_connection": True}
        async with (
            open_session(agent_id="server", instruments=[theirs.make()], **settings) as other,
            open_session(agent_id="client", instruments=[collected.make()], **settings) as bb,
        ):
            await nursery.start(serve, other)
            async with bb.operation("search"):
                assert (await bb.request("pages.1", beats=100)).data == b"work"
                assert current() == "search"
            with pytest.raises(ServiceError):
                await bb.request("pages.2", b"error")
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as calls:
                    calls.start_soon(bb.request, "pages.3", b"wait")
                    while other.statistics().live_calls < 1:
                        await trio.sleep(0.01)
                    scope.cancel()
            while other.statistics().live_calls:
                await trio.sleep(0.01)
            with pytest.raises(NoResponders):
                await bb.request("nobody")
            nursery.cancel_scope.cancel()
    assert collected.parents()["request pages.1"] == "search"
    assert theirs.parents()["work"] == "serve pages.*"
    for name, ours, their in (
        ("request pages.1", "ok", "ok"),
        ("request pages.2", "error", "error"),
        ("request pages.3", "cancelled_by_caller", "cancelled_by_caller"),
    ):
        client = collected.one(name, SpanKind.CLIENT)
        assert client.context is not None
        (served,) = [
            span
            for span in theirs.spans
            if span.parent is not None and span.parent.span_id == client.context.span_id
        ]
        assert served.kind is SpanKind.SERVER
        assert served.context is not None
        assert served.context.trace_id == client.context.trace_id
        assert attributes_of(client, "backbeat.call.")["outcome"] == ours
        assert attributes_of(served, "backbeat.call.")["outcome"] == their
        assert attributes_of(served, "messaging.") == {
            "system": "nats",
            "destination.name": "pages.*",
        }
        wanted = StatusCode.ERROR if ours == "error" else StatusCode.UNSET
        assert client.status.status_code is served.status.status_code is wanted
    first = attributes_of(collected.one("request pages.1", SpanKind.CLIENT), "backbeat.call.")
    # The time limit of this test is a deadline, too.
    assert 0 < first["beats_left"] <= 100
    error = collected.one("request pages.2", SpanKind.CLIENT)
    assert attributes_of(error, "error.") == {"type": "404"}
    nobody = collected.one("request nobody", SpanKind.CLIENT)
    assert nobody.status.description == "no_responders"


async def test_calls_over_http(collected: Collected, autojump_clock: Clock) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        async with bb.operation("page"):
            status = {"/missing": 404, "/broken": 500}.get(scope["path"], 200)
            await send({"type": "http.response.start", "status": status, "headers": []})
            await send({"type": "http.response.body", "body": b""})

    async with open_session(tempo_bpm=60.0, instruments=[collected.make()]) as bb:
        served = httpx.ASGITransport(BackbeatMiddleware(app, bb))
        # In its own context, as a server has it.
        async with httpx.AsyncClient(transport=BackbeatTransport(served, bb)) as http:
            for path in ("/", "/missing", "/broken"):
                await http.get(f"http://pages{path}?token=secret")
    seen = [
        (
            attributes_of(span, "url."),
            attributes_of(span, "http.")["response.status_code"],
            span.status.status_code is StatusCode.ERROR,
        )
        for span in collected.spans
        if span.name == "GET"
    ]
    assert seen == [
        ({"path": "/"}, 200, False),
        ({"full": "http://pages/"}, 200, False),
        ({"path": "/missing"}, 404, False),
        ({"full": "http://pages/missing"}, 404, True),
        ({"path": "/broken"}, 500, True),
        ({"full": "http://pages/broken"}, 500, True),
    ]
    clients = {span.context.span_id for span in collected.spans if span.kind is SpanKind.CLIENT}
    for span in collected.spans:
        if span.kind is SpanKind.SERVER:
            assert span.parent is not None
            assert span.parent.span_id in clients


async def test_extract_continues_a_trace_and_detached_leaves_it(
    collected: Collected, autojump_clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    number = "1" * 32
    sent = {"traceparent": f"00-{number}-{'2' * 16}-01", "tracestate": "a=b"}

    def injected() -> dict[str, str]:
        headers: dict[str, str] = {}
        bb.inject(headers)
        return headers

    async with open_session(tempo_bpm=60.0, instruments=[collected.make()]) as bb:
        assert "traceparent" not in injected()
        # Names in any case of letters, as bytes, as HTTP has them.
        with bb.extract([(name.upper().encode(), value.encode()) for name, value in sent.items()]):
            # It travels on although there is no span of this process.
            assert injected().items() >= sent.items()
            async with bb.operation("inside"):
                own = injected()["traceparent"]
                assert own.split("-")[1] == number
                assert own != sent["traceparent"]
                # The application's own header is the nearer one.
                headers = {"traceparent": sent["traceparent"]}
                bb.inject(headers)
                assert headers["traceparent"] == sent["traceparent"]
                with bb.detached():
                    assert "traceparent" not in injected()
                    async with bb.operation("detached"):
                        pass
                with bb.extract({"traceparent": "00-garbled"}):
                    assert injected()["traceparent"] == own
        assert "traceparent" not in injected()
        # Other instrumentation, which has continued the trace already.
        around = propagate.extract(sent)
        with collected.provider.get_tracer("web").start_as_current_span("web", around):
            with bb.extract(sent):
                async with bb.operation("behind"):
                    pass
        # Entered and left in different contexts.
        block = bb.extract(sent)
        contextvars.copy_context().run(block.__enter__)
        block.__exit__(None, None, None)
        assert "traceparent" not in injected()
    inside, detached = collected.one("inside"), collected.one("detached")
    assert inside.parent is not None
    assert f"{inside.parent.trace_id:032x}-{inside.parent.span_id:016x}" == f"{number}-{'2' * 16}"
    assert detached.parent is None
    parents = collected.parents()
    assert (parents["web"], parents["behind"]) == ("another", "web")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_refused_calls_have_a_span(collected: Collected, autojump_clock: Clock) -> None:
    async with open_session(tempo_bpm=60.0, instruments=[collected.make()]) as bb:
        async with trio.open_nursery() as nursery:
            await nursery.start(serve, bb)
            headers: dict[str, str] = {}
            with bb.move_on_after(1):
                bb.inject(headers)
            await bb.sleep(2)
            transport = bb._runtime.transport
            assert transport is not None
            await transport.publish("pages.1", b"", headers=headers)
            await trio.testing.wait_all_tasks_blocked()
            assert current() == ""
            nursery.cancel_scope.cancel()
    span = collected.one("serve pages.*", SpanKind.SERVER)
    assert span.status.description == "expired_on_arrival"
    assert attributes_of(span, "backbeat.call.") == {
        "beats_left": 0.0,
        "outcome": "expired_on_arrival",
        "code": 408,
    }


async def test_nothing_is_kept_of_what_has_ended(
    collected: Collected, autojump_clock: Clock
) -> None:
    tracing = collected.make()
    async with open_session(instruments=[tracing]) as bb, trio.open_nursery() as nursery:
        await nursery.start(serve, bb)
        for _ in range(50):
            async with bb.operation("a"):
                with bb.extract({}), bb.detached():
                    await bb.request("pages.1")
        assert len(collected.spans) >= 4 * 50
        assert not tracing._spans
        assert not tracing._former
        nursery.cancel_scope.cancel()


async def test_each_session_needs_tracing_of_its_own(
    collected: Collected, caplog: pytest.LogCaptureFixture
) -> None:
    tracing = collected.make()
    async with open_session(instruments=[tracing]) as first:
        async with open_session(instruments=[tracing]) as second:
            assert (first.instruments, second.instruments) == ((tracing,), ())
    assert "each session needs a `Tracing` of its own" in caplog.text
