"""Traces of operations and calls by OpenTelemetry; it needs the extra ``otel``.

Each operation is a span, with an event for each of its phases. Each call is a span of its caller
and a span of its service, which is a child of the former, also in another process::

    async with backbeat.session(instruments=[Tracing()]) as bb:
        async with bb.operation("search", beats=4):  # a span
            await bb.request("pages", b"...")  # a child of it

The program sets up OpenTelemetry as usual, for example with the packages ``opentelemetry-sdk`` and
``opentelemetry-exporter-otlp``. A span reaches a backend when it has ended. What runs at this
moment, claims show.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping
from typing import Final, final

from opentelemetry import context, propagate, trace
from opentelemetry.context import Context
from opentelemetry.propagators.textmap import TextMapPropagator
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, TracerProvider
from opentelemetry.util.types import AttributeValue

import backbeat_trio

from ._calls.instrument import Call, Instrument, Observed
from ._runtime.operations import Operation, Phase
from ._time.scopes import BeatScope

# These are no faults of whoever serves the call, or nobody's.
_NO_ERROR: Final = ("ok", "cancelled_by_caller")
# From this status of HTTP on, it is the server that is at fault.
_SERVER_ERROR: Final = 500
# A text longer than this is cut, as a backend may refuse it.
_LONGEST: Final = 1000


@final
class Tracing(Instrument):
    """Makes spans of the operations and the calls of one session.

    Give it to the session by ``session(instruments=[Tracing()])``. Each session needs one of its
    own. Its methods are for the session.

    The span of an operation is the current one in the block of the operation, and the span of a
    call in its handler. So spans that the program makes there are their children. Spans of calls
    are named ``request <subject>`` and ``serve <subject>`` on NATS, and by their method on HTTP.
    Their attributes begin with ``backbeat.``, or are those of OpenTelemetry's conventions.

    A message that is sent by the session carries the current span, by the propagator. A block of
    `Session.extract` continues the trace of its message; a block of `Session.detached` is in none.

    Args:
      tracer_provider: makes the tracer; None is OpenTelemetry's global one.
      propagator: reads and writes the headers of messages; None is OpenTelemetry's global one,
        which uses ``traceparent``, ``tracestate`` and ``baggage`` by default.

    """

    def __init__(
        self,
        tracer_provider: TracerProvider | None = None,
        propagator: TextMapPropagator | None = None,
    ) -> None:
        self._tracer = trace.get_tracer(
            "backbeat_trio", backbeat_trio.__version__, tracer_provider=tracer_provider
        )
        self._propagator = propagate.get_global_textmap() if propagator is None else propagator
        self._own: dict[str, AttributeValue] | None = None
        self._spans: dict[Operation | Call, Span] = {}
        # The context that is in force again after a block. Context variables are not reset by a
        # token, because a block may be left in another context than it was entered in.
        self._former: dict[Operation | Call | BeatScope, Context] = {}

    def session_opened(self, session: Observed) -> None:
        """See `Instrument`."""
        if self._own is not None:
            raise RuntimeError("each session needs a `Tracing` of its own")
        config = session.config
        self._own = {
            "backbeat.cluster.id": config.cluster_id,
            "backbeat.agent.id": config.agent_id,
        }

    def session_closed(self) -> None:
        """See `Instrument`."""
        self._own = None

    # Operations.

    def operation_started(self, operation: Operation) -> None:
        """See `Instrument`."""
        attributes: dict[str, AttributeValue] = {
            **(self._own or {}),
            "backbeat.operation.id": operation.id,
            "backbeat.operation.type": operation.type,
            "backbeat.operation.correlation_id": operation.correlation_id,
            "backbeat.operation.estimated_beats": operation.beats,
            "backbeat.operation.start_beat": operation.start_beat,
        }
        if operation.parent is not None:
            attributes["backbeat.operation.parent"] = operation.parent
        span = self._spans[operation] = self._tracer.start_span(
            operation.type, attributes=attributes
        )
        _note_phase(span, operation, operation.start_beat)

    def operation_advanced(self, operation: Operation, former: Phase, beat: int) -> None:
        """See `Instrument`."""
        _note_phase(self._spans[operation], operation, beat)

    def operation_finished(
        self, operation: Operation, former: Phase, beat: int, reason: str | None
    ) -> None:
        """See `Instrument`."""
        span, passed = self._spans.pop(operation), max(0, beat - operation.start_beat)
        _note_phase(span, operation, beat)
        span.set_attribute("backbeat.operation.passed_beats", passed)
        span.set_attribute("backbeat.operation.used_ratio", passed / operation.beats)
        if reason is not None:
            span.set_status(Status(StatusCode.ERROR, reason[:_LONGEST]))
        span.end()

    def operation_entered(self, operation: Operation) -> None:
        """See `Instrument`."""
        self._enter(operation, trace.set_span_in_context(self._spans[operation]))

    def operation_left(self, operation: Operation) -> None:
        """See `Instrument`."""
        self._leave(operation)

    # Calls.

    def call_started(self, call: Call) -> None:
        """See `Instrument`."""
        is_client, is_http = call.side == "client", call.protocol == "http"
        attributes: dict[str, AttributeValue] = dict(self._own or {})
        if math.isfinite(call.beats_left):
            attributes["backbeat.call.beats_left"] = call.beats_left
        if is_http:
            name = call.method
            attributes["http.request.method"] = call.method
            attributes["url.full" if is_client else "url.path"] = call.target
        else:
            name = f"{'request' if is_client else 'serve'} {call.target}"
            attributes["messaging.system"] = "nats"
            attributes["messaging.destination.name"] = call.target
        around = context.get_current() if is_client else self._continued(call.headers)
        kind = SpanKind.CLIENT if is_client else SpanKind.SERVER
        span = self._tracer.start_span(name, around, kind, attributes)
        self._spans[call] = span
        self._enter(call, trace.set_span_in_context(span, around))

    def call_finished(self, call: Call) -> None:
        """See `Instrument`."""
        self._leave(call)
        span, outcome, code = self._spans.pop(call), str(call.outcome), call.code
        span.set_attribute("backbeat.call.outcome", outcome)
        is_http = call.protocol == "http"
        if code is not None:
            key = "http.response.status_code" if is_http else "backbeat.call.code"
            span.set_attribute(key, code)
        is_callers = is_http and call.side == "server" and (code or 0) < _SERVER_ERROR
        if outcome not in _NO_ERROR and not (outcome == "error" and is_callers):
            span.set_attribute("error.type", outcome if code is None else str(code))
            span.set_status(Status(StatusCode.ERROR, outcome))
        span.end()

    # Messages.

    def extract_entered(self, scope: BeatScope, headers: Mapping[str, str] | None) -> None:
        """See `Instrument`."""
        self._enter(scope, Context() if headers is None else self._continued(headers))

    def extract_left(self, scope: BeatScope) -> None:
        """See `Instrument`."""
        self._leave(scope)

    def inject(self, headers: MutableMapping[str, str]) -> None:
        """See `Instrument`."""
        self._propagator.inject(headers)

    def _continued(self, headers: Mapping[str, str]) -> Context:
        # If a message says nothing, the present context goes on.
        around = context.get_current()
        found = self._propagator.extract(headers, context=around)
        sender = trace.get_current_span(found).get_span_context()
        # Other instrumentation, such as that of a web server, may have continued the trace already.
        # Then its span is the nearer one.
        parent = getattr(trace.get_current_span(around), "parent", None)
        return around if parent is not None and parent.span_id == sender.span_id else found

    # The current span.

    def _enter(self, key: Operation | Call | BeatScope, inner: Context) -> None:
        self._former[key] = context.get_current()
        context.attach(inner)

    def _leave(self, key: Operation | Call | BeatScope) -> None:
        context.attach(self._former.pop(key))


def _note_phase(span: Span, operation: Operation, beat: int) -> None:
    attributes = {"backbeat.beat": beat, "backbeat.operation.peers": operation.peers}
    span.add_event(operation.phase.name.lower(), attributes)
