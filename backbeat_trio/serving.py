"""Probes and metrics over HTTP, inside of an application; it needs the extra ``health``.

`serve_health` is for Kubernetes, load balancers and Prometheus, in a program that has no web server
of its own. A program that has one answers by `Session.health` and `backbeat_trio.metrics.render`.
"""

from __future__ import annotations

import traceback
from collections.abc import Awaitable, Callable
from typing import Any, Final, NamedTuple, NoReturn, TypeAlias, final

import h11
import msgspec
import trio

from ._checks import check_integer, check_seconds
from ._errors import Logger
from ._runtime.probes import ALIVE_WITHIN, LoopTicks, Ready, judge_alive, judge_ready
from ._session.session import Session

# Who opens more connections than this loses the oldest one. An answer takes milliseconds, so that
# one is of a client that is slow or idle.
_CONNECTIONS: Final = 64
# For how many seconds a request may be on the way, its answer may be made, and may be on the way.
_REQUEST_WITHIN: Final = 5.0
_ANSWER_WITHIN: Final = 10.0
_SEND_WITHIN: Final = 5.0
# The most bytes of the head of a request.
_MAX_HEAD: Final = 16 * 1024
_READ: Final = 4096
_MAX_PORT: Final = 65_535

_JSON: Final = "application/json"
_TEXT: Final = "text/plain; charset=utf-8"
_NO_METRICS: Final = (
    b"the session was opened without metrics: use session(instruments=[SessionMetrics()]), with "
    b"backbeat_trio.metrics.SessionMetrics\n"
)


class _Answer(NamedTuple):
    status: int
    body: bytes
    content_type: str = _TEXT


Metrics: TypeAlias = Callable[[str], Awaitable[tuple[bytes, str]]]


async def serve_health(
    bb: Session,
    *,
    host: str | None = "127.0.0.1",
    port: int,
    alive_within: float = ALIVE_WITHIN,
    task_status: trio.TaskStatus[list[trio.SocketListener]] = trio.TASK_STATUS_IGNORED,
) -> NoReturn:
    """Answer ``GET`` requests of probes and of Prometheus, until cancelled. A checkpoint.

    Start it in a nursery of the application, by ``nursery.start_soon(serve_health, ...)``, or by
    ``await nursery.start(...)``, which returns once it listens::

        await nursery.start(functools.partial(serve_health, bb, host="0.0.0.0", port=8080))

    - ``/healthz`` is for liveness probes. The answer is 200 while Trio's loop turns: its last tick
      must not be older than ``alive_within``. Nothing else counts, because a new process would not
      bring back a server or a metronome. If the loop is blocked, there is no answer, and the probe
      runs into its own time limit.
    - ``/readyz`` is for readiness probes. The answer is 200 while there is a connection and a
      metronome is heard, and 503 otherwise, with the reason. A pause of the grid, and a session
      that is disabled, are ready.
    - ``/metrics`` is for Prometheus, if the session was opened with a
      `backbeat_trio.metrics.SessionMetrics`, and 404 otherwise.

    Each connection is closed after one answer, and after some seconds in any case. A cancellation
    closes all of them at once. A failure is logged and answered by 500, and ends nothing.

    Args:
      bb: the session.
      host: the address to listen on. By default only this machine can connect. In a pod, use
        ``"0.0.0.0"``, so that the kubelet can; None is all addresses of IPv4 and IPv6.
      port: the port; 0 takes a free one.
      alive_within: for how many seconds the loop may be without a tick, more than 0.
      task_status: gets the listeners, once they listen.

    Raises:
      OSError: if it cannot listen there.
      TypeError, ValueError: if an argument is not valid; the text names it.

    """
    if not isinstance(bb, Session):
        raise TypeError(f"`bb` must be a session, not {bb!r}")
    await serve_probes(
        lambda: judge_ready(bb.health()),
        host=host,
        port=port,
        alive_within=alive_within,
        metrics=_find_metrics(bb),
        logger=bb._runtime.logger,
        task_status=task_status,
    )


async def serve_probes(
    is_ready: Callable[[], Ready],
    *,
    host: str | None,
    port: int,
    alive_within: float = ALIVE_WITHIN,
    metrics: Metrics | None = None,
    logger: Logger,
    task_status: trio.TaskStatus[list[trio.SocketListener]] = trio.TASK_STATUS_IGNORED,
) -> NoReturn:
    """Answer as `serve_health` does, for something else than a session.

    Args:
      is_ready: returns the answer to a readiness probe.
      host: as of `serve_health`.
      port: as of `serve_health`.
      alive_within: as of `serve_health`.
      metrics: gets an ``Accept`` header, and returns metrics and their content type.
      logger: where failures are logged.
      task_status: as of `serve_health`.

    """
    if check_integer("port", port, 0) > _MAX_PORT:
        raise ValueError(f"`port` must be at most {_MAX_PORT}, not {port}")
    if not check_seconds("alive_within", alive_within):
        raise ValueError("`alive_within` must be more than 0")
    server = _Server(is_ready, alive_within, metrics, logger)
    listeners = await trio.open_tcp_listeners(port, host=host)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.ticks.run)
        task_status.started(listeners)
        await trio.serve_listeners(server.serve, listeners, handler_nursery=nursery)
    raise AssertionError("unreachable")


@final
class _Server:
    def __init__(
        self,
        is_ready: Callable[[], Ready],
        alive_within: float,
        metrics: Metrics | None,
        logger: Logger,
    ) -> None:
        self.ticks = LoopTicks()
        self._is_ready = is_ready
        self._alive_within = alive_within
        self._metrics = metrics
        self._logger = logger
        # In the order in which they were opened.
        self._connections: dict[trio.CancelScope, None] = {}

    async def serve(self, stream: trio.SocketStream) -> None:
        """Answer one request, and close the connection."""
        if len(self._connections) >= _CONNECTIONS:
            next(iter(self._connections)).cancel()
        with trio.CancelScope() as scope:
            self._connections[scope] = None
            try:
                await self._converse(stream)
            except trio.BrokenResourceError:
                # The client has hung up.
                pass
            finally:
                del self._connections[scope]
                # Not graceful: a client that does not read would keep it open.
                await trio.aclose_forcefully(stream)

    async def _converse(self, stream: trio.SocketStream) -> None:
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=_MAX_HEAD)
        request: h11.Request | None = None
        try:
            with trio.fail_after(_REQUEST_WITHIN):
                request = await _receive(stream, connection)
        except trio.TooSlowError:
            answer = _Answer(408, b"the request took too long\n")
        except h11.RemoteProtocolError as error:
            answer = _Answer(error.error_status_hint, b"the request is not valid\n")
        else:
            if request is None:
                return
            answer = await self._answer_safely(request)
        with trio.move_on_after(_SEND_WITHIN):
            await stream.send_all(_encode(connection, request, answer))
            await stream.send_eof()

    async def _answer_safely(self, request: h11.Request) -> _Answer:
        try:
            with trio.fail_after(_ANSWER_WITHIN):
                return await self._answer(request)
        except Exception as error:  # noqa: BLE001 - such as that of a collector; it ends nothing
            text = "".join(traceback.format_exception(error))
        self._logger.error("the request of %r failed:\n%s", request.target, text)
        return _Answer(500, b"this failed, and the log says why\n")

    async def _answer(self, request: h11.Request) -> _Answer:
        path = request.target.partition(b"?")[0]
        if path not in (b"/healthz", b"/readyz", b"/metrics"):
            return _Answer(404, b"there are /healthz, /readyz and /metrics\n")
        if request.method not in (b"GET", b"HEAD"):
            return _Answer(405, b"use GET\n")
        if path == b"/healthz":
            return _judged(judge_alive(self.ticks.age, self._alive_within))
        if path == b"/readyz":
            return _judged(self._is_ready())
        if self._metrics is None:
            return _Answer(404, _NO_METRICS)
        accept = b",".join(value for name, value in request.headers if name == b"accept")
        return _Answer(200, *await self._metrics(accept.decode("latin-1")))


def _judged(verdict: Any) -> _Answer:
    return _Answer(200 if verdict.ok else 503, msgspec.json.encode(verdict) + b"\n", _JSON)


def _find_metrics(bb: Session) -> Metrics | None:
    if not bb.instruments:
        # Without importing it: prometheus-client may be missing, and takes some time.
        return None
    try:
        from .metrics import metrics_of, render
    except ImportError:
        return None
    metrics = metrics_of(bb)
    return None if metrics is None else lambda accept: render(metrics.registry, accept)


async def _receive(stream: trio.SocketStream, connection: h11.Connection) -> h11.Request | None:
    # Returns None if the client closes the connection without a request.
    while True:
        event = connection.next_event()
        if isinstance(event, h11.Request):
            return event
        if event is not h11.NEED_DATA:
            return None
        connection.receive_data(await stream.receive_some(_READ))


def _encode(connection: h11.Connection, request: h11.Request | None, answer: _Answer) -> bytes:
    headers = [
        ("content-type", answer.content_type),
        ("content-length", str(len(answer.body))),
        ("cache-control", "no-store"),
        ("x-content-type-options", "nosniff"),
        ("connection", "close"),
    ]
    if answer.status == 405:
        headers.append(("allow", "GET, HEAD"))
    response = h11.Response(status_code=answer.status, headers=headers)
    body = b"" if request is not None and request.method == b"HEAD" else answer.body
    parts = [connection.send(response), connection.send(h11.Data(data=body))]
    parts.append(connection.send(h11.EndOfMessage()))
    return b"".join(part or b"" for part in parts)
