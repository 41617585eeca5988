"""The dashboard's server: the page, its JSON API, its event streams, and probes.

It runs in the nursery of a session: starlette finds what answers a request, and hypercorn speaks
HTTP. Every request passes the checks of `Access` first.
"""

from __future__ import annotations

import socket
from functools import partial
from http import HTTPStatus
from importlib import import_module
from typing import Final, final

import msgspec
import trio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from .._runtime.probes import Alive, LoopTicks, Ready, judge_alive, judge_ready
from .._session.session import Session
from .access import Access, Problem
from .api import Api
from .endpoints import JSON, PROBLEM, problem
from .events import EventStreams
from .feed import follow
from .files import Files
from .model import ClusterModel
from .server import CONNECTION, serve
from .snapshot import Series, SnapshotQuery

CONTENT_SECURITY_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
_HEADERS: Final = (
    (b"content-security-policy", CONTENT_SECURITY_POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
_NOT_STORED: Final = (b"cache-control", b"no-store")

# How long a request's body is read on after the answer, so that its sender sees the answer.
_LINGER: Final = 1.0
SEND_TIMEOUT: Final = 5.0
_PROBES: Final = ("/healthz", "/readyz")


@final
class Dashboard:
    """The dashboard of a session's cluster, as an ASGI application.

    `run` keeps it up to date; without it, what it shows stays as it is.

    Args:
      bb: the session.
      access: who may use it.
      interval: seconds between two updates of the page.
      send_timeout: seconds after which a client that does not read is cut off.
      heartbeat: seconds without an update, after which an event stream sends a comment.
      model: the cluster; None makes an empty one, which `run` fills.
      files: the static files; None are the package's own.

    """

    def __init__(
        self,
        bb: Session,
        access: Access,
        *,
        interval: float = 0.25,
        send_timeout: float = SEND_TIMEOUT,
        heartbeat: float = 15.0,
        model: ClusterModel | None = None,
        files: Files | None = None,
    ) -> None:
        self._bb = bb
        self._interval = interval
        self.model = model or ClusterModel()
        self.series = Series()
        self.access = access
        self.streams: EventStreams[SnapshotQuery] = EventStreams(
            lambda query: api.encode(query),
            interval=interval,
            send_timeout=send_timeout,
            heartbeat=heartbeat,
        )
        self.api = api = Api(bb, self.model, self.series, self.access, self.streams)
        files = files or Files()
        self._ticks = LoopTicks()
        self.routes = [
            Route("/", files.index),
            Route("/static/{name:path}", files.static),
            Route("/healthz", self._healthz),
            Route("/readyz", self._readyz),
            Route("/metrics", self._metrics),
            *api.routes(),
        ]
        self._app = Starlette(
            routes=self.routes,
            exception_handlers={Problem: _explain, HTTPException: _explain, Exception: _explain},
        )

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Follow the cluster, and send what changes to the event streams, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._ticks.run)
            nursery.start_soon(self._take_series)
            await nursery.start(self._follow)
            nursery.start_soon(self.streams.run)
            task_status.started()

    async def _follow(self, *, task_status: trio.TaskStatus[None]) -> None:
        await follow(self._bb, self.model, interval=self._interval, task_status=task_status)

    async def _take_series(self) -> None:
        while True:
            if self.model.grid is not None:
                self.series.take(self.model.grid)
            await trio.sleep(self._interval)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = _Unread(scope, receive)
        send = _with_headers(send)
        try:
            if scope["http_version"] not in ("1.0", "1.1"):
                raise Problem(505, "only HTTP/1.1 is spoken here")
            # A probe is sent to an address, and tells nothing of the cluster.
            if scope["path"] not in _PROBES:
                self.access.check_site(scope)
            if scope["path"] == "/metrics":
                self.access.check_reader(scope)
        except Problem as error:
            response = await _explain(Request(scope), error)
            await response(scope, request.receive, send)
        else:
            await self._app(scope, request.receive, send)
        await request.give_up()

    # Probes.

    async def _healthz(self, request: Request) -> Response:
        return _probe(judge_alive(self._ticks.age))

    async def _readyz(self, request: Request) -> Response:
        return _probe(judge_ready(self._bb.health()))

    async def _metrics(self, request: Request) -> Response:
        try:
            metrics = import_module("backbeat_trio.metrics")
        except ImportError:
            raise Problem(
                404, "metrics need the extra: pip install 'backbeat-trio[metrics]'"
            ) from None
        found = metrics.metrics_of(self._bb)
        if found is None:
            raise Problem(404, "this session was opened without `SessionMetrics`")
        body, media = await metrics.render(found.registry, request.headers.get("accept"))
        return Response(body, headers={"Content-Type": media})


async def serve_dashboard(
    bb: Session,
    access: Access,
    listener: socket.socket,
    *,
    interval: float = 0.25,
    task_status: trio.TaskStatus[Dashboard] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve the dashboard of a session's cluster until cancelled. A checkpoint.

    Cancelling it closes all connections at once.

    Args:
      bb: the session.
      access: who may use it.
      listener: the socket of `server.bind`.
      interval: seconds between two updates of the page.
      task_status: gets the dashboard when it accepts connections.

    """
    dashboard = Dashboard(bb, access, interval=interval)
    async with trio.open_nursery() as nursery:
        await nursery.start(dashboard.run)
        await nursery.start(partial(serve, dashboard, listener, send_timeout=SEND_TIMEOUT))
        task_status.started(dashboard)


class _Unread:
    """Keeps track of whether a request's body was read, and reads on after the answer.

    hypercorn hands on the body by a short queue. If nobody reads from it, the connection stays for
    ever.
    """

    def __init__(self, scope: Scope, receive: Receive) -> None:
        names = {name for name, _ in scope["headers"]}
        self._ended = not names & {b"content-length", b"transfer-encoding"}
        self._receive = receive
        self._connection = scope.get("state", {}).get(CONNECTION)

    async def receive(self) -> Message:
        message = await self._receive()
        self._ended = message["type"] == "http.disconnect" or not message.get("more_body", False)
        return message

    async def give_up(self) -> None:
        if self._ended:
            return
        with trio.move_on_after(_LINGER) as limit:
            while not self._ended:
                await self.receive()
        if limit.cancelled_caught and self._connection is not None:
            self._connection.cut()


def _with_headers(send: Send) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [*message.get("headers", ()), *_HEADERS]
            if all(name.lower() != b"cache-control" for name, _ in headers):
                headers.append(_NOT_STORED)
            message = {**message, "headers": headers}
        await send(message)

    return send_with_headers


async def _explain(request: Request, error: Exception) -> Response:
    status, detail, headers = 500, "this is a fault of the dashboard: see its log", {}
    if isinstance(error, Problem):
        status, detail, headers = error.status, error.detail, error.headers
    elif isinstance(error, HTTPException):
        status, detail = error.status_code, f"{HTTPStatus(error.status_code).phrase}"
        headers = dict(error.headers or {})
    body = msgspec.json.encode(problem(status, detail))
    return Response(body, status, headers, PROBLEM)


def _probe(answer: Alive | Ready) -> Response:
    return Response(msgspec.json.encode(answer), 200 if answer.ok else 503, media_type=JSON)
