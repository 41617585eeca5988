"""The dashboard's JSON API: how a request is read, answered and refused.

Routes and the OpenAPI document come from the same list of endpoints, so neither can lack what the
other has.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Hashable
from contextlib import aclosing
from functools import partial
from typing import Any, Final, TypeVar
from urllib.parse import parse_qsl

import msgspec
import trio
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send
from trio_util import periodic

from .._errors import (
    BackbeatError,
    CancelRefused,
    NoResponders,
    OperationNotFound,
    PermissionDenied,
    TempoRefused,
)
from .._session.session import Session
from .access import Access, Problem
from .endpoints import (
    BASE,
    EVENTS,
    JSON,
    AccessView,
    CancelBody,
    ChangeView,
    Done,
    EmptyBody,
    Endpoint,
    LoginBody,
    PauseBody,
    SeriesView,
    TempoBody,
    describe,
)
from .events import EventStreams, send_start
from .model import (
    AgentView,
    ClusterModel,
    GridView,
    OperationNode,
    OperationView,
    Page,
    Query,
    TypeView,
    clean,
)
from .server import CONNECTION
from .snapshot import (
    MAX_LIMIT,
    MAX_STREAMED,
    Series,
    Snapshot,
    SnapshotQuery,
    Timeline,
    TimelineQuery,
    gist,
    take_snapshot,
    take_timeline,
)

_MAX_BODY: Final = 64 * 1024
_BODY_WITHIN: Final = 10.0
_MAX_PARAMETERS: Final = 32
_MAX_VALUE: Final = 1000
# An answer that took longer than this, in seconds, is followed by a pause. It is shared for so many
# times as long, and of those that are shared there are so many.
_LONG: Final = 0.02
_SHARED_FOR: Final = 4.0
_MAX_SHARED: Final = 32
# How often it is looked whether the login of an event stream has ended, in seconds.
_LOGIN_EVERY: Final = 1.0
_ONE: Final = "/{agent}/{id:path}"

_logger = logging.getLogger("backbeat_trio")
_encoder = msgspec.json.Encoder()
StructT = TypeVar("StructT", bound=msgspec.Struct)
ResultT = TypeVar("ResultT")


class Api:
    """The JSON API of a cluster.

    Args:
      bb: the session, which changes the cluster.
      model: what is seen of the cluster.
      series: the figures over time.
      access: who may use it.
      streams: the event streams.

    """

    def __init__(
        self,
        bb: Session,
        model: ClusterModel,
        series: Series,
        access: Access,
        streams: EventStreams[SnapshotQuery],
    ) -> None:
        self._bb = bb
        self._model = model
        self._series = series
        self._access = access
        self._streams = streams
        self._shared = _Shared()
        self.endpoints = self._list()
        self._document = describe(self.endpoints)

    def _list(self) -> tuple[Endpoint, ...]:
        def get(path: str, summary: str, *rest: Any, **more: Any) -> Endpoint:
            return Endpoint("GET", path, summary, *rest, **more)

        def post(path: str, summary: str, *rest: Any, **more: Any) -> Endpoint:
            more.setdefault("access", "act")
            return Endpoint("POST", path, summary, *rest, **more)

        operations = Page[OperationView]
        return (
            get("/snapshot", "All that the page shows", self._snapshot, Snapshot, SnapshotQuery),
            get(
                "/events",
                "Snapshots as server-sent events, whenever something changed",
                self._events,
                Snapshot,
                SnapshotQuery,
                media=EVENTS,
            ),
            get("/grid", "The grid", self._grid, GridView),
            get("/agents", "Agents", self._agents, Page[AgentView], Query),
            get("/operations", "Operations", self._operations, operations, Query),
            get(f"/operations{_ONE}", "An operation", self._operation, OperationView),
            get(f"/tree{_ONE}", "The whole that it is a part of", self._tree, OperationNode),
            get("/types", "Counts by type of operation", self._types, tuple[TypeView, ...]),
            get("/timeline", "Operations along bars", self._timeline, Timeline, TimelineQuery),
            get("/series", "Skew, drift and lateness over time", self._over_time, SeriesView),
            get("/access", "What this client may do", self._may, AccessView, access="all"),
            get("/openapi.json", "This description", self._describe, dict[str, Any]),
            post(
                "/login",
                "Log in by the token, which sets a cookie",
                self._log_in,
                Done,
                LoginBody,
                access="all",
            ),
            post("/logout", "Log out", self._log_out, Done, EmptyBody, access="all"),
            post("/tempo", "Change the tempo", self._tempo, ChangeView, TempoBody),
            post("/pause", "Pause the grid", self._pause, ChangeView, PauseBody),
            post("/resume", "End a pause", self._resume, ChangeView, EmptyBody),
            post(
                f"/operations{_ONE}/cancel", "Cancel an operation", self._cancel, Done, CancelBody
            ),
        )

    def routes(self) -> list[Route]:
        """Return the routes for Starlette."""
        return [
            Route(BASE + one.path, self._handler(one), methods=[one.method])
            for one in self.endpoints
        ]

    def encode(self, query: SnapshotQuery) -> tuple[object, bytes]:
        """Return what differs if a snapshot has changed, and its JSON. Not a checkpoint."""
        snapshot = take_snapshot(self._model, self._series, query)
        return hash(_encoder.encode(gist(snapshot))), _encoder.encode(snapshot)

    def _handler(self, one: Endpoint) -> Callable[[Request], Awaitable[Response]]:
        async def handle(request: Request) -> Response:
            if one.access == "read":
                self._access.check_reader(request.scope)
            elif one.access == "act":
                self._access.check_actor(request.scope)
            if one.method == "POST" and one.takes is not None:
                answer = await one.call(request, await read_body(request, one.takes))
            else:
                query = read_query(request, one.takes or _NoQuery)
                call = partial(one.call, request, query)
                if one.access == "read" and one.media == JSON:
                    body = await self._shared.get((request.scope["path"], query), call)
                    return Response(body, media_type=JSON)
                answer = await call()
            if isinstance(answer, Response):
                return answer
            return Response(_encoder.encode(answer), media_type=JSON)

        return handle

    # Reading.

    async def _snapshot(self, request: Request, query: SnapshotQuery) -> Snapshot:
        return take_snapshot(self._model, self._series, query)

    async def _events(self, request: Request, query: SnapshotQuery) -> Response:
        if query.limit > MAX_STREAMED or query.agents_limit > MAX_STREAMED:
            raise Problem(400, f"a stream shows {MAX_STREAMED} agents and operations at most")
        wait_ended = None
        if self._access.requires_token and self._access.has_login(request.scope):
            wait_ended = partial(self._wait_logged_out, request.scope)
        return _StreamResponse(self._streams, query, wait_ended)

    async def _wait_logged_out(self, scope: Scope) -> None:
        # A stream that is open uses the login, so that it lasts.
        async with aclosing(periodic(_LOGIN_EVERY)) as looks:
            async for _ in looks:
                if not self._access.has_login(scope):
                    break

    async def _grid(self, request: Request, _: object) -> GridView:
        if self._model.grid is None:
            raise Problem(503, "the grid is not known yet")
        return self._model.grid

    async def _agents(self, request: Request, query: Query) -> Page[AgentView]:
        return self._model.agents(query)

    async def _operations(self, request: Request, query: Query) -> Page[OperationView]:
        return self._model.operations(query)

    async def _operation(self, request: Request, _: object) -> OperationView:
        agent, id = _names(request)
        found = self._model.operation(agent, id)
        if found is None:
            raise _unknown(agent, id)
        return found

    async def _tree(self, request: Request, _: object) -> OperationNode:
        agent, id = _names(request)
        found = self._model.tree(agent, id)
        if found is None:
            raise _unknown(agent, id)
        return found

    async def _types(self, request: Request, _: object) -> tuple[TypeView, ...]:
        return self._model.types()

    async def _timeline(self, request: Request, query: TimelineQuery) -> Timeline:
        return take_timeline(self._model, query)

    async def _over_time(self, request: Request, _: object) -> SeriesView:
        return SeriesView(self._series.newest())

    async def _may(self, request: Request, _: object) -> AccessView:
        access = self._access
        return AccessView(access.has_token, access.requires_token, access.has_login(request.scope))

    async def _describe(self, request: Request, _: object) -> dict[str, Any]:
        return self._document

    # Acting.

    async def _log_in(self, request: Request, body: LoginBody) -> Response:
        cookie = self._access.log_in(body.token, request.scope)
        _record(request, "logged in")
        return _done({"Set-Cookie": cookie})

    async def _log_out(self, request: Request, body: EmptyBody) -> Response:
        return _done({"Set-Cookie": self._access.log_out(request.scope)})

    async def _tempo(self, request: Request, body: TempoBody) -> ChangeView:
        beat = await _act(self._bb.set_tempo(body.bpm, at_beat=body.at_beat, over=body.over_beats))
        _record(request, f"set the tempo to {body.bpm:g} BPM from beat {beat} on")
        return ChangeView(beat)

    async def _pause(self, request: Request, body: PauseBody) -> ChangeView:
        beat = await _act(self._bb.pause(at_beat=body.at_beat))
        _record(request, f"paused the grid from beat {beat} on")
        return ChangeView(beat)

    async def _resume(self, request: Request, body: EmptyBody) -> ChangeView:
        beat = await _act(self._bb.resume())
        _record(request, f"resumed the grid from beat {beat} on")
        return ChangeView(beat)

    async def _cancel(self, request: Request, body: CancelBody) -> Done:
        agent, id = _names(request)
        await _act(self._bb.cancel_remote(agent, id, body.reason))
        _record(request, f"cancelled {clean(id)} of {agent}: {clean(body.reason)}")
        return Done()


class _NoQuery(msgspec.Struct, frozen=True):
    pass


class _Shared:
    """Answers that took long, shared by those who ask for the same thing soon after.

    In a cluster of very many operations an answer takes so long that other tasks have to wait. So
    each of these answers is followed by a pause for the others, however many clients ask.
    """

    def __init__(self) -> None:
        self._lock = trio.Lock()
        self._answers: dict[Hashable, tuple[float, bytes]] = {}

    async def get(self, key: Hashable, call: Callable[[], Awaitable[Any]]) -> bytes:
        async with self._lock:
            begun = trio.current_time()
            until, body = self._answers.pop(key, (begun, b""))
            if until <= begun:
                body = _encoder.encode(await call())
                cost = trio.current_time() - begun
                until = begun + _SHARED_FOR * cost
                if cost > _LONG:
                    await trio.sleep(cost)
            if until > trio.current_time():
                self._answers[key] = until, body
            while len(self._answers) > _MAX_SHARED:
                del self._answers[next(iter(self._answers))]
        return body


class _StreamResponse(Response):
    def __init__(
        self,
        streams: EventStreams[SnapshotQuery],
        query: SnapshotQuery,
        wait_ended: Callable[[], Awaitable[None]] | None,
    ) -> None:
        super().__init__()
        self._streams = streams
        self._query = query
        self._wait_ended = wait_ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "HEAD":
            await send_start(send)
            await send({"type": "http.response.body"})
            return
        # Only HTTP/1.1 has chunks.
        direct = scope.get("state", {}).get(CONNECTION) if scope["http_version"] == "1.1" else None
        await self._streams.stream(self._query, receive, send, direct, self._wait_ended)


def read_query(request: Request, type: type[StructT]) -> StructT:
    """Return the parameters of a request. Not a checkpoint.

    Raises:
      Problem: if they are not valid; the text names the first one that is not.

    """
    try:
        pairs = parse_qsl(
            request.scope["query_string"].decode("ascii"),
            keep_blank_values=True,
            strict_parsing=bool(request.scope["query_string"]),
            errors="strict",
            max_num_fields=_MAX_PARAMETERS,
        )
    except ValueError:
        raise Problem(400, "the parameters of the URL are not valid") from None
    values: dict[str, str] = {}
    for name, value in pairs:
        if name not in type.__struct_encode_fields__:
            raise Problem(400, f"there is no parameter {clean(name, 40)!r}")
        if name in values:
            raise Problem(400, f"the parameter {name!r} is given twice")
        if len(value) > _MAX_VALUE:
            raise Problem(400, f"the parameter {name!r} is longer than {_MAX_VALUE} characters")
        values[name] = value
    try:
        query = msgspec.convert(values, type, strict=False)
    except msgspec.ValidationError as error:
        raise Problem(400, f"a parameter is not valid: {clean(str(error))}") from None
    _check_page(query)
    return query


def _check_page(query: object) -> None:
    if isinstance(query, Query) and not (
        0 <= query.limit <= MAX_LIMIT and 0 <= query.offset <= 2**31
    ):
        raise Problem(400, f"`limit` must be from 0 to {MAX_LIMIT}, and `offset` 0 or more")


async def read_body(request: Request, type: type[StructT]) -> StructT:
    """Return the body of a request. A checkpoint.

    Raises:
      Problem: if it is too large, too slow or not valid.

    """
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != JSON:
        raise Problem(415, f"the Content-Type must be {JSON}")
    body = bytearray()
    with trio.move_on_after(_BODY_WITHIN) as limit:
        try:
            async with aclosing(request.stream()) as chunks:
                async for chunk in chunks:
                    body += chunk
                    if len(body) > _MAX_BODY:
                        raise Problem(413, f"the body is larger than {_MAX_BODY} bytes")
        except ClientDisconnect:
            raise Problem(400, "the body is not complete") from None
    if limit.cancelled_caught:
        raise Problem(408, "the body did not arrive in time")
    try:
        return msgspec.json.decode(bytes(body), type=type)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Problem(400, f"the body is not valid: {clean(str(error))}") from None


def _names(request: Request) -> tuple[str, str]:
    return request.path_params["agent"], request.path_params["id"]


def _unknown(agent: str, id: str) -> Problem:
    return Problem(404, f"no operation {clean(id)!r} of {clean(agent)!r} is known here")


def _done(headers: dict[str, str]) -> Response:
    return Response(_encoder.encode(Done()), headers=headers, media_type=JSON)


def _record(request: Request, what: str) -> None:
    _logger.info("dashboard: %s %s", request.client.host if request.client else "?", what)


async def _act(action: Awaitable[ResultT]) -> ResultT:
    try:
        return await action
    except (OperationNotFound, NoResponders) as error:
        raise Problem(404, clean(str(error), 1000)) from None
    except (TempoRefused, CancelRefused) as error:
        raise Problem(409, clean(str(error), 1000)) from None
    except PermissionDenied as error:
        raise Problem(403, clean(str(error), 1000)) from None
    except BackbeatError as error:
        raise Problem(503, clean(str(error), 1000)) from None
    except ValueError as error:
        raise Problem(400, clean(str(error), 1000)) from None
