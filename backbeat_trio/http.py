"""HTTP requests that carry the deadline of their caller; it needs the extra ``http``.

`BackbeatTransport` is for clients that use httpx. It writes into each request what bounds the task
that sends it. `BackbeatMiddleware` is for ASGI servers that run on Trio, such as Hypercorn with its
Trio worker. It lets each request run within what its headers say. Both use the headers of
`Session.inject`, so a deadline goes on by whatever other messages a service sends::

    # the client
    async with httpx.AsyncClient(transport=BackbeatTransport()) as client:
        with bb.fail_after(10):
            response = await client.get("http://pages:8000/")

    # the server, with the session that its lifespan yields as ``{"backbeat": bb}``
    app = Starlette(middleware=[Middleware(BackbeatMiddleware)], lifespan=lifespan, ...)
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, MutableMapping
from types import TracebackType
from typing import Any, Final, TypeAlias, final

import httpx

from ._calls.headers import DEADLINE, SOFT_DEADLINE, normalized
from ._calls.instrument import make_call, observing, outcome_of_code
from ._session.session import Session, current_session, use_session
from ._time.scopes import BeatScope

# The types of ASGI, as the frameworks define them.
ASGIScope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
ASGIApp: TypeAlias = Callable[[ASGIScope, Receive, Send], Awaitable[None]]

SESSION_KEY: Final = "backbeat"
"""The name under which the lifespan yields the session in its state."""

_SPENT: Final = 408, "the caller's budget was spent when the request arrived"
_RAN_OUT: Final = 504, "the caller's budget ran out before there was an answer"
_DEADLINES: Final = frozenset(name.lower().encode() for name in (DEADLINE, SOFT_DEADLINE))
# What httpx uses if neither the client nor the request was given a timeout.
_HTTPX_DEFAULT: Final = httpx.Timeout(5.0).as_dict()
_NO_TIMEOUT: Final = httpx.Timeout(None).as_dict()


@final
class BackbeatMiddleware:
    """Let each request of an ASGI application use a session, within its caller's deadline.

    During a request, `current_session` returns the session, and the request runs in a block of
    `Session.extract` with its headers. So it is cancelled on the beat on which its caller gives up,
    and its operations are parts of the caller's operation.

    - If the budget was spent when the request arrived, the answer is ``408 Request Timeout``, and
      the application is not called. It is safe to send such a request again.
    - If it runs out before the response has begun, the answer is ``504 Gateway Timeout``. A
      response begins with the first part of its body. Until then its status is held back.
    - If it runs out later, the response ends early, and the server closes the connection. A client
      sees that the response is not complete.
    - Once the response is complete, the deadline does not count any more. What the application
      does after it, such as Starlette's background tasks, has the time that it takes.

    A web socket uses the session and is a part of its caller's operation, but it has no deadline: a
    deadline bounds the request that opens a connection, and not what follows on it. The lifespan
    is passed on as it is. If a client disconnects, the server does what it does without this.

    Args:
      app: the application.
      bb: the session. None takes the one that the application's lifespan yields as
        ``{"backbeat": bb}``, and otherwise the one of `current_session`.

    """

    def __init__(self, app: ASGIApp, bb: Session | None = None) -> None:
        self._app = app
        self._bb = bb

    async def __call__(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        """Serve one connection of ASGI. It is a checkpoint if the application is one.

        Raises:
          RuntimeError: if there is no session, or one of another run of Trio.
          SessionClosed: if the session was left.
          TypeError: if the state of the lifespan has something else in the place of a session.

        """
        kind = scope["type"]
        if kind == "http":
            await self._serve(scope, receive, send)
        elif kind == "websocket":
            bb = self._find_session(scope)
            headers = [pair for pair in scope["headers"] if pair[0].lower() not in _DEADLINES]
            with use_session(bb), bb.extract(headers):
                await self._app(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _serve(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        with use_session(self._find_session(scope)) as bb:
            with bb.extract(scope["headers"]) as budget:
                spent = budget.cancel_called
                response = _Response(send, budget)
                instruments = bb._runtime.instruments
                if instruments.call_started or instruments.call_finished:
                    await self._observe(bb, scope, receive, response, spent=spent)
                elif not spent:
                    await self._app(scope, receive, response.send)
            if spent:
                await _refuse(send, *_SPENT)
            elif budget.cancelled_caught and not response.begun:
                await _refuse(send, *_RAN_OUT)

    async def _observe(
        self, bb: Session, scope: ASGIScope, receive: Receive, response: _Response, *, spent: bool
    ) -> None:
        # The same as without instruments, which hear of it.
        headers = normalized(scope["headers"])
        left = 0.0 if spent else bb.remaining().beats
        call = make_call("server", "http", scope["method"], scope["path"], left, headers)
        with observing(bb._runtime.instruments, call):
            if spent:
                call.outcome, call.code = "expired_on_arrival", _SPENT[0]
                return
            await self._app(scope, receive, response.send)
            if response.status is not None:
                call.outcome, call.code = outcome_of_code(response.status), response.status

    def _find_session(self, scope: ASGIScope) -> Session:
        if self._bb is not None:
            return self._bb
        state = scope.get("state")
        if state and SESSION_KEY in state:
            bb: Session = state[SESSION_KEY]  # `use_session` checks what it is.
            return bb
        try:
            return current_session()
        except RuntimeError as error:
            error.add_note(
                "`BackbeatMiddleware` uses the session that it was given as `bb`, or the one that "
                f'the lifespan yields as `{{"{SESSION_KEY}": bb}}`'
            )
            raise


@final
class _Response:
    # What the application sends, and whether a client has seen any of it.

    def __init__(self, send: Send, budget: BeatScope) -> None:
        self.begun = False
        self.status: int | None = None
        self._send = send
        self._budget = budget
        # The status, until it is clear that the application has time for more.
        self._start: Message | None = None

    async def send(self, message: Message) -> None:
        kind = message["type"]
        if kind == "http.response.start" and self._start is None and not self.begun:
            self._start, self.status = message, message["status"]
            return
        if self._start is not None:
            # Before it is sent, as a cancellation may come when some of it is on the way.
            start, self._start, self.begun = self._start, None, True
            await self._send(start)
        await self._send(message)
        if kind == "http.response.body" and not message.get("more_body", False):
            # Nobody waits any more, so what is still to be done is not the caller's.
            self._budget.deadline = math.inf


async def _refuse(send: Send, status: int, text: str) -> None:
    body = f"{text}\n".encode()
    headers = [
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"content-length", str(len(body)).encode()),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@final
class BackbeatTransport(httpx.AsyncBaseTransport):
    """Write into each request of an httpx client what bounds the task that sends it.

    Give it to a client as ``httpx.AsyncClient(transport=BackbeatTransport())``. For each request,
    also for one that follows a redirection, it sends the headers of `Session.inject`. The request
    itself is not changed. If the deadline passes, the request is cancelled as every other one: the
    connection is released, and `Session.fail_after` raises `BeatBudgetExceeded`.

    httpx gives up after five seconds without any activity by default. That would end a request
    whose budget has been stretched, or is paused. So while the task has a deadline that travels
    with the request, these default timeouts do not count. A timeout of your own always counts. So
    does the default in a task without a deadline.

    The headers contain ids of the cluster, the agent and the operation. If a client also calls
    servers of others, use ``mounts={"http://pages": BackbeatTransport()}`` so that only servers of
    your own get them.

    Args:
      wrapped: the transport that sends the requests; by default a new `httpx.AsyncHTTPTransport`.
        It is closed with this one.
      bb: the session; by default the one of `current_session` at each request.

    """

    def __init__(
        self, wrapped: httpx.AsyncBaseTransport | None = None, bb: Session | None = None
    ) -> None:
        self._wrapped = httpx.AsyncHTTPTransport() if wrapped is None else wrapped
        self._bb = bb

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request with the headers of the current task. A checkpoint.

        Raises:
          RuntimeError: if no session was given and there is no current one.
          SessionClosed: if the session was left.
          httpx.TransportError: as the wrapped transport does.

        """
        bb = current_session() if self._bb is None else self._bb
        # httpx makes the request of a redirection from this one, and it may be for another host.
        sent = httpx.Request(
            request.method,
            request.url,
            headers=request.headers,
            stream=request.stream,
            extensions=request.extensions,
        )
        instruments = bb._runtime.instruments
        if instruments.call_started or instruments.call_finished:
            return await self._observe(bb, sent)
        return await self._send(bb, sent)

    async def _send(self, bb: Session, sent: httpx.Request) -> httpx.Response:
        bb.inject(sent.headers)
        if DEADLINE in sent.headers and sent.extensions.get("timeout") == _HTTPX_DEFAULT:
            sent.extensions = {**sent.extensions, "timeout": _NO_TIMEOUT}
        return await self._wrapped.handle_async_request(sent)

    async def _observe(self, bb: Session, sent: httpx.Request) -> httpx.Response:
        target = str(sent.url.copy_with(query=None, fragment=None, username=None, password=None))
        call = make_call("client", "http", sent.method, target, bb.remaining().beats)
        with observing(bb._runtime.instruments, call):
            response = await self._send(bb, sent)
            call.outcome, call.code = outcome_of_code(response.status_code), response.status_code
        return response

    async def __aenter__(self) -> BackbeatTransport:
        """Open the wrapped transport."""
        await self._wrapped.__aenter__()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None = None,
        exc_value: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        """Close the wrapped transport."""
        await self._wrapped.__aexit__(exc_type, exc_value, traceback)

    async def aclose(self) -> None:
        """Close the wrapped transport."""
        await self._wrapped.aclose()
