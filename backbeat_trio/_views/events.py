"""The dashboard's event stream: the newest state for each client, encoded once for all alike.

A stream never queues. A client that is slow misses states and gets the newest one next. One that
does not read at all, or is gone, is cut off.

A state is mostly small enough for the system to take it at once. So, if there is a `Direct` way to
the client, states are sent from a single task, and the client's own task only finishes what did not
fit. That takes a fraction of what it costs to wake a task for each client and send through all
layers of the web server.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Generator, Hashable, MutableMapping
from contextlib import contextmanager, suppress
from typing import Any, Final, Generic, Protocol, TypeVar, final

import trio

from .access import Problem

MAX_STREAMS: Final = 500

# How many clients are woken at a time, so that other tasks get their turn in between.
_WAKE: Final = 8
_RETRY_AFTER: Final = "5"
_RETRY_MS: Final = 2000
_COMMENT: Final = b":\n\n"
_HEADERS: Final = (
    (b"content-type", b"text/event-stream"),
    (b"cache-control", b"no-store"),
    # A proxy such as nginx would hold events back.
    (b"x-accel-buffering", b"no"),
)
# The rest of the time belongs to other tasks, however many different queries there are.
_SHARE: Final = 0.25

QueryT = TypeVar("QueryT", bound=Hashable)
_Message = MutableMapping[str, Any]


class Direct(Protocol):
    """A connection over which the body of a response is sent without the web server's help."""

    def send_now(self, data: bytes) -> int:
        """Send as much as can be sent without waiting, and return how many bytes that was."""

    async def send_all(self, data: bytes | memoryview) -> None:
        """Send all of some data."""


class Feed:
    """What all clients with the same query get."""

    def __init__(self) -> None:
        self.clients = 0
        self.number = 0
        self.event = b""
        self.gist: object = None
        self.encoded = -math.inf
        self.woken = trio.current_time()
        self.waiting = trio.lowlevel.ParkingLot()
        self.direct: set[_DirectClient] = set()


class _DirectClient:
    """A client to which states are sent directly, while `idle`."""

    def __init__(self, connection: Direct, number: int) -> None:
        self.idle = trio.lowlevel.ParkingLot()
        self.number = number
        self.rest: bytes | memoryview = b""
        self._connection = connection

    def send_now(self, chunk: bytes, number: int) -> None:
        self.number = number
        sent = self._connection.send_now(chunk)
        if sent < len(chunk):
            self.rest = memoryview(chunk)[sent:]
            self.idle.unpark()

    async def follow(self, feed: Feed, limit: trio.CancelScope, timeout: float) -> None:
        while True:
            limit.deadline = math.inf
            if not self.rest and self.number == feed.number:
                await self.idle.park()
            if not self.rest:
                # A newer state came while the last one was being sent.
                self.number, self.rest = feed.number, _chunk(feed.event)
            limit.deadline = trio.current_time() + timeout
            await self._connection.send_all(self.rest)
            self.rest = b""


@final
class EventStreams(Generic[QueryT]):
    """All event streams of the dashboard.

    Args:
      encode: returns the present state for a query: what differs if it has changed, and all of it
        as JSON on one line.
      interval: seconds between two states, if something changed.
      refresh: seconds after which a state is sent although nothing changed. It has figures that
        move on all the time, such as the position.
      send_timeout: seconds that a client may take to read a state before it is cut off.
      heartbeat: seconds without a new state, after which a comment is sent.
      limit: the most streams at a time.

    """

    def __init__(
        self,
        encode: Callable[[QueryT], tuple[object, bytes]],
        *,
        interval: float = 0.25,
        refresh: float = 1.0,
        send_timeout: float = 5.0,
        heartbeat: float = 15.0,
        limit: int = MAX_STREAMS,
    ) -> None:
        self._encode = encode
        self._interval = interval
        self._refresh_after = refresh
        self._send_timeout = send_timeout
        self._heartbeat = heartbeat
        self._limit = limit
        self._feeds: dict[QueryT, Feed] = {}
        self._first_client = trio.Event()
        self.streams = 0

    async def run(self) -> None:
        """Send new states until cancelled. A checkpoint."""
        while True:
            if not self._feeds:
                self._first_client = trio.Event()
                await self._first_client.wait()
            began = trio.current_time()
            busy = await self._refresh()
            await trio.sleep_until(began + max(self._interval, busy / _SHARE))

    async def _refresh(self) -> float:
        busy = 0.0
        for query, feed in list(self._feeds.items()):
            began = trio.current_time()
            changed = self._update(query, feed)
            now = trio.current_time()
            busy += now - began
            await trio.lowlevel.checkpoint()
            if changed or now - feed.woken >= self._heartbeat:
                feed.woken = now
                await _send_out(feed, feed.event if changed else _COMMENT)
        return busy

    def _update(self, query: QueryT, feed: Feed) -> bool:
        now = trio.current_time()
        gist, data = self._encode(query)
        if gist == feed.gist and now - feed.encoded < self._refresh_after:
            return False
        feed.gist, feed.encoded = gist, now
        feed.number += 1
        feed.event = b"id: %d\ndata: %b\n\n" % (feed.number, data)
        return True

    @contextmanager
    def _client(self, query: QueryT) -> Generator[Feed, None, None]:
        if self.streams >= self._limit:
            raise Problem(
                503, f"there are {self._limit} event streams already", {"Retry-After": _RETRY_AFTER}
            )
        feed = self._feeds.get(query)
        if feed is None:
            feed = Feed()
            self._update(query, feed)
            self._feeds[query] = feed
        feed.clients += 1
        self.streams += 1
        self._first_client.set()
        try:
            yield feed
        finally:
            feed.clients -= 1
            self.streams -= 1
            if not feed.clients:
                del self._feeds[query]

    async def stream(
        self,
        query: QueryT,
        receive: Callable[[], Awaitable[_Message]],
        send: Callable[[_Message], Awaitable[None]],
        direct: Direct | None = None,
        wait_ended: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Answer a request by a stream, which ends when the client is gone or does not read.

        Args:
          query: what the client asked for.
          receive: ASGI's.
          send: ASGI's.
          direct: the connection, if the body of the response goes over it in chunks of HTTP/1.1.
          wait_ended: returns when the client may read no more; None if it may read for ever.

        Raises:
          Problem: if there are too many streams.

        """
        with self._client(query) as feed:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_wait_until_gone, receive, nursery.cancel_scope)
                if wait_ended is not None:
                    nursery.start_soon(_cancel_after, wait_ended, nursery.cancel_scope)
                with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    await self._send_states(feed, send, direct)
                nursery.cancel_scope.cancel()

    async def _send_states(
        self,
        feed: Feed,
        send: Callable[[_Message], Awaitable[None]],
        direct: Direct | None,
    ) -> None:
        number, body = feed.number, b"retry: %d\n" % _RETRY_MS + feed.event
        with trio.CancelScope(deadline=trio.current_time() + self._send_timeout) as limit:
            await send_start(send)
            await send({"type": "http.response.body", "body": body, "more_body": True})
            if direct is not None:
                client = _DirectClient(direct, number)
                feed.direct.add(client)
                try:
                    await client.follow(feed, limit, self._send_timeout)
                finally:
                    feed.direct.discard(client)
            while True:
                limit.deadline = math.inf
                if feed.number == number:
                    await feed.waiting.park()
                body = _COMMENT if feed.number == number else feed.event
                number = feed.number
                limit.deadline = trio.current_time() + self._send_timeout
                await send({"type": "http.response.body", "body": body, "more_body": True})


async def send_start(send: Callable[[_Message], Awaitable[None]]) -> None:
    """Send the status and the headers of a stream.

    Args:
      send: ASGI's.

    """
    await send({"type": "http.response.start", "status": 200, "headers": list(_HEADERS)})


async def _send_out(feed: Feed, event: bytes) -> None:
    # Those that were woken wait again at the end of the line.
    for _ in range(0, len(feed.waiting), _WAKE):
        feed.waiting.unpark(count=_WAKE)
        await trio.lowlevel.checkpoint()
    chunk, number = _chunk(event), feed.number
    for count, client in enumerate(tuple(feed.direct), 1):
        # A client that was behind may have taken this state itself meanwhile.
        if client.idle and (event is _COMMENT or client.number != number):
            client.send_now(chunk, number)
        if count % _WAKE == 0:
            await trio.lowlevel.checkpoint()


def _chunk(event: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(event), event)


async def _cancel_after(wait: Callable[[], Awaitable[None]], scope: trio.CancelScope) -> None:
    await wait()
    scope.cancel()


async def _wait_until_gone(
    receive: Callable[[], Awaitable[_Message]], scope: trio.CancelScope
) -> None:
    while (await receive())["type"] != "http.disconnect":
        # A body that nobody asked for.
        pass
    scope.cancel()
