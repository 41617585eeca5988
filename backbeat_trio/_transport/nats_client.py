"""One connection to NATS: a nats-py client, its event loop and its thread.

nats-py needs asyncio. So a client runs in a thread of its own, which anyio's blocking portal makes.
Once its connection is lost, it is never used again. If it hangs, for example in a half-open socket
with full buffers, it is abandoned. Only this module, `nats_wire`, `nats_loop` and `jetstream`
(whose functions run in that thread) use nats-py and asyncio, and only this one uses anyio.

Messages are passed on in both directions without waiting. To the thread they go through a deque,
with one wake-up for all that is in it; from the thread through another deque, with one
`run_sync_soon` for all messages that arrived together. The wake-up itself writes messages while the
socket takes them. The thread notes when a message arrived or was sent. These times are passed on as
ages, because the clocks of the two threads differ.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any, Final, NamedTuple, Protocol, TypeVar, final

import nats.aio.client
import nats.errors
import nats.js.errors
import trio
from anyio.from_thread import BlockingPortal, start_blocking_portal

from .._config import Server
from .._errors import AuthenticationFailed, BackbeatError, TLSFailed, TransportBroken
from .._time.local import local_ns
from .headers import decode_headers
from .nats_loop import THREAD, ConnectionLoop
from .nats_wire import Wire, encode_publish

# The server is sent a ping this often. A connection is given up when the answer is late by the
# patience, or by this many times the patience while a queue explains that it is late.
_PING_EVERY: Final = 0.4
_PING_PATIENCE: Final = 1.0
_PING_MOST_LOOKS: Final = 5
# If fewer bytes than this arrive in a second, the answer does not wait in a queue.
_TRICKLE: Final = 16 * 1024
# About how many bytes a message has besides its payload.
_OVERHEAD: Final = 32
# More bytes than can be sent to a peer that reads nothing: the kernels of both sides hold fewer.
_SOCKET_BUFFERS: Final = 16 * 1024 * 1024
# Publishers wait from so many bytes on their way to the thread until there are only so many.
_HIGH_WATER: Final = 2 * 1024 * 1024
_LOW_WATER: Final = 1024 * 1024
# How much may be on its way from the thread; more messages are dropped.
_INCOMING_MESSAGES: Final = 65_536
_INCOMING_BYTES: Final = 64 * 1024 * 1024
# How many messages are passed on before other tasks get a turn.
_AT_ONCE: Final = 1024
# How long closing a client may take, in seconds, before it is abandoned.
_CLOSE_PATIENCE: Final = 1.0
# How much is joined into one piece of memory and written at once, in bytes of payload.
_PIECE: Final = 64 * 1024
# Errors after which nats-py gives the connection up.
_LOSSES: Final = (nats.errors.UnexpectedEOF, nats.errors.StaleConnectionError, OSError)

INBOX: Final = 0


T = TypeVar("T")


class Departure:
    """When a message passed the socket."""

    __slots__ = ("stamp",)

    def __init__(self) -> None:
        self.stamp = 0
        """By the clock of the thread; 0 until then."""


class Publish(NamedTuple):
    subject: str
    data: bytes
    reply: str
    block: bytes
    """The encoded headers."""
    departure: Departure | None
    """Where the instant is kept at which it is written."""


class Subscribe(NamedTuple):
    number: int
    subject: str
    queue: str


class Unsubscribe(NamedTuple):
    number: int
    keep: bool
    """Whether what still arrives is passed on."""


class Flush(NamedTuple):
    number: int


class Call(NamedTuple):
    function: Callable[[nats.aio.client.Client], Awaitable[Any]]
    outcome: Outcome


class Outcome:
    """The result of a call, on Trio's side."""

    def __init__(self) -> None:
        self.event = trio.Event()
        self.value: Any = None
        self.error: Exception | None = None

    def settle(self, value: Any, error: Exception | None) -> None:
        """Keep what the call returned or raised."""
        self.value, self.error = value, error
        self.event.set()


class Incoming(NamedTuple):
    number: int
    """The subscription that it came for; `INBOX` for answers to requests."""
    subject: str
    data: bytes
    reply: str
    stamp: int
    status: str
    headers: dict[str, str] | None
    size: int
    """Of the payload and the headers, in bytes."""


class Owner(Protocol):
    """What a client calls of its transport, always on Trio's side."""

    @property
    def connect_timeout(self) -> float: ...
    @property
    def limiter(self) -> trio.CapacityLimiter: ...
    def client_lost(self, client: Client, /) -> None: ...
    def dispatch(self, item: Incoming, behind_ns: int, /) -> None: ...
    def count_dropped(self, messages: int, /) -> None: ...
    def client_complained(self, client: Client, error: str, /) -> None: ...


@final
class Client:
    """One connection and its thread. Its methods say on which side they run."""

    def __init__(self, owner: Owner, server: Server, options: dict[str, Any]) -> None:
        self.owner = owner
        self.server = server
        self.outcome = trio.Event()
        self.lost = trio.Event()
        self.error: Exception | None = None
        self.closing = False
        """Whether the client is being closed, and was not lost before."""
        self.max_payload = 0
        self.inbox = ""
        self.no_answers: TransportBroken | None = None
        """Why no answer can arrive, if permissions refuse the subscription to the inbox."""
        self.room = trio.Event()
        self.waiting = False
        self._options = options
        self._token = trio.lowlevel.current_trio_token()
        self._outgoing: deque[Publish | Subscribe | Unsubscribe | Flush | Call] = deque()
        self._calls: set[Outcome] = set()
        self._queued = self._written = 0
        self._woken = False
        self._incoming: deque[Incoming] = deque()
        # Each thread changes only one of the two, so no sum is changed by two threads.
        self._taken_bytes = self._passed_bytes = 0
        self._dropped = self._dropped_reported = 0
        self._told = False
        self._flushes: dict[int, trio.Event] = {}
        self._pusher: trio.lowlevel.Task | None = None
        self._wire: Wire | None = None
        self._idle = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake: asyncio.Event | None = None
        self._ended: asyncio.Event | None = None
        self._stopping = False
        self._up = False
        self._hung = False
        self._portal_cm: AbstractContextManager[BlockingPortal] | None = None
        self._life: Future[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    # Trio's side.

    async def open(self) -> None:
        """Start the thread, and wait for the connection, or raise why there is none."""
        portal_cm = start_blocking_portal(
            "asyncio", {"loop_factory": ConnectionLoop}, name=THREAD + self.server.host
        )
        # This can be cancelled only while it waits for the threads of other clients to end, and not
        # once its own thread is being started. So no portal is lost.
        portal = await trio.to_thread.run_sync(portal_cm.__enter__, limiter=self.owner.limiter)
        self._portal_cm = portal_cm
        self._life = portal.start_task_soon(self._main)
        with trio.move_on_after(self.owner.connect_timeout):
            await self.outcome.wait()
        if not self.outcome.is_set():
            self.error = TransportBroken(f"no answer from {self.server.url} in time")
        if self.error is not None:
            raise self.error

    async def close(self) -> None:
        """Close the client and end its thread, or abandon it if it hangs."""
        self.closing = True
        self.fail(TransportBroken("the connection was closed"))
        if self._up and self._loop is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._stop)
        elif self._life is not None:
            self._life.cancel()
        portal_cm = self._portal_cm
        if portal_cm is None:
            return
        self._portal_cm = None
        with trio.move_on_after(_CLOSE_PATIENCE, shield=True):
            await trio.to_thread.run_sync(
                _leave, portal_cm, abandon_on_cancel=True, limiter=self.owner.limiter
            )

    def fail(self, error: Exception) -> None:
        """Note that the connection is lost. Only the first error is kept."""
        if self.error is None:
            self.error = error
        self.outcome.set()
        self.lost.set()
        self._wake_pusher()
        self.room.set()
        for event in self._flushes.values():
            event.set()
        for outcome in self._calls:
            outcome.event.set()
        self.owner.client_lost(self)

    @property
    def backlog(self) -> int:
        """How many bytes have been passed to the thread, and not been written yet."""
        return self._queued - self._written

    def send(
        self, item: Publish | Subscribe | Unsubscribe | Flush | Call, *, at_once: bool = False
    ) -> None:
        """Hand an item to the thread.

        Args:
          item: the item.
          at_once: whether the thread is woken without waiting for what other tasks may hand over.

        """
        if isinstance(item, Publish):
            self._queued += len(item.data) + len(item.block)
        self._outgoing.append(item)
        if at_once and not self._woken:
            self._woken = True
            self._push()
        else:
            self._wake_thread()

    async def flush(self, number: int) -> None:
        """Wait until the server has received everything that was passed to the thread before."""
        event = self._flushes[number] = trio.Event()
        try:
            self.send(Flush(number))
            await event.wait()
        finally:
            del self._flushes[number]
        if self.lost.is_set():
            raise TransportBroken(str(self.error))

    async def call(self, function: Callable[[nats.aio.client.Client], Awaitable[T]]) -> T:
        """Call a function with nats-py's client in the thread, after all that was sent before.

        The function must end by itself. If this is cancelled, the function goes on in the thread.
        """
        outcome = Outcome()
        self._calls.add(outcome)
        try:
            self.send(Call(function, outcome))
            await outcome.event.wait()
        finally:
            self._calls.discard(outcome)
        if outcome.error is not None:
            raise outcome.error
        if self.lost.is_set():
            raise TransportBroken(str(self.error))
        value: T = outcome.value
        return value

    async def push(self) -> None:
        """Wake the thread for what is handed over, until the connection is gone.

        It does so once all tasks have run that Trio runs in the same turn. The thread takes the GIL
        when it wakes: if it woke for the first message, the tasks that are about to send others
        would wait for it, each for each.
        """
        task = trio.lowlevel.current_task()

        def abort(_: object) -> trio.lowlevel.Abort:
            self._pusher = None
            return trio.lowlevel.Abort.SUCCEEDED

        try:
            while not self.lost.is_set():
                self._pusher = task
                await trio.lowlevel.wait_task_rescheduled(abort)
                self._push()
        finally:
            # Whatever was handed over since is pushed by this, and what follows at once.
            self._push()

    def _wake_thread(self) -> None:
        if self._woken or self._loop is None:
            return
        self._woken = True
        if not self._wake_pusher():
            self._push()

    def _wake_pusher(self) -> bool:
        pusher, self._pusher = self._pusher, None
        if pusher is not None:
            trio.lowlevel.reschedule(pusher)
        return pusher is not None

    def _push(self) -> None:
        if self._loop is None:
            return
        try:
            self._loop.call_soon_threadsafe(self._on_wake)
        except RuntimeError:
            # The loop has ended by itself, or it belongs to the process that this is a fork of.
            self.fail(TransportBroken("the connection's thread has ended"))

    def _drain_incoming(self) -> None:
        incoming, owner = self._incoming, self.owner
        # First: what is appended from now on tells of itself.
        self._told = False
        behind = _behind_ns()
        dropped = self._dropped
        owner.count_dropped(dropped - self._dropped_reported)
        self._dropped_reported = dropped
        for _ in range(min(len(incoming), _AT_ONCE)):
            item = incoming.popleft()
            self._passed_bytes += item.size
            owner.dispatch(item, behind)
        if incoming:
            self._tell()

    async def wait_room(self) -> None:
        """Wait while too much is on its way to the thread."""
        while self.backlog > _HIGH_WATER and not self.lost.is_set():
            if self.room.is_set():
                self.room = trio.Event()
            self.waiting = True
            # The thread may have caught up before it saw the flag.
            if self.backlog > _LOW_WATER:
                await self.room.wait()

    def _made_room(self) -> None:
        self.room.set()

    # The thread's side.

    def _to_trio(self, function: Callable[..., object], *args: Any) -> None:
        # The function must not raise, because Trio would take that for an internal error.
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(function, *args)

    def _tell(self) -> None:
        # Each call writes to a socket pair, so that one for a batch is much cheaper than one for
        # each message.
        self._told = True
        self._to_trio(self._drain_incoming)

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._wake, self._ended = asyncio.Event(), asyncio.Event()
        self._wire = client = Wire(lambda: self._check_tls(client), self._take, self._taken)
        error: Exception = TransportBroken(f"the connection to {self.server.url} was lost")
        try:
            await client.connect(
                self.server.url,
                error_cb=self._on_error,
                disconnected_cb=self._on_lost,
                closed_cb=self._on_lost,
                **self._secured(client),
            )
            self._check_tls(client)
            # nats-py does not report when they end.
            for task in client.working:
                task.add_done_callback(self._on_ended)
            self.inbox = client.new_inbox()
            self._up = True
            await client.subscribe_as(INBOX, f"{self.inbox}.*", "")
            self._to_trio(self._on_connected, client.max_payload)
            self._keep(self._watch(client))
            pump, ended = self._keep(self._pump(client)), self._keep(self._ended.wait())
            await asyncio.wait({pump, ended}, return_when=asyncio.FIRST_COMPLETED)
            if pump.done():
                pump.result()
            else:
                # The pump waits for a peer that does not read any more.
                self._hung = True
        except asyncio.CancelledError:
            error = TransportBroken("the connection's thread was stopped")
        except Exception as failure:  # noqa: BLE001 - the edge: whatever it was becomes one of ours
            error = self._translate(failure)
        finally:
            self._to_trio(self.fail, error)
            for task in list(self._tasks):
                task.cancel()
            # Errors of closing are of no interest, because the loss has been reported.
            with contextlib.suppress(Exception, asyncio.CancelledError):
                if self._hung:
                    client.abort()
                await asyncio.wait_for(client.close(), _CLOSE_PATIENCE)
            client.abort()

    def _secured(self, client: nats.aio.client.Client) -> dict[str, Any]:
        # nats-py sends secrets in the clear to a server that does not ask for TLS, even if the URL
        # is a tls:// one. It accepts callables, which it calls just before. They check it first.
        options = dict(self._options)

        def guarded(secret: str) -> Callable[[], str]:
            def reveal() -> str:
                self._check_tls(client)
                return secret

            return reveal

        user, password = self.server.user, self.server.password
        if user is not None and password is not None:
            options.update(user=user, password=password, token=None)
        elif user is not None:
            options.update(user=None, password=None, token=user)
        for name in ("user", "password", "token"):
            if options.get(name) is not None:
                options[name] = guarded(options[name])
        return options

    def _check_tls(self, client: nats.aio.client.Client) -> None:
        info: dict[str, Any] = getattr(client, "_server_info", {})
        has_tls = info.get("tls_required") or self._options.get("tls_handshake_first")
        if self.server.scheme == "tls" and not has_tls:
            raise TLSFailed(f"{self.server.url} does not offer TLS")

    def _translate(self, error: Exception) -> Exception:
        where = self.server.url
        text = str(error).removeprefix("nats: ").strip("'\"") or type(error).__name__
        if isinstance(error, TransportBroken):
            return error
        if isinstance(error, nats.errors.AuthorizationError) or any(
            word in text.lower()
            for word in ("authorization", "authentication", "user authentication")
        ):
            return AuthenticationFailed(f"{where} refused the credentials: {text}")
        if isinstance(error, ssl.SSLError):
            return TLSFailed(f"no trusted TLS connection to {where}: {text}")
        if isinstance(error, TimeoutError) and not str(error):
            return TransportBroken(f"no answer from {where} in time")
        return TransportBroken(f"no connection to {where}: {text}")

    def _translate_call(self, error: Exception) -> Exception:
        # There is a connection, and a request over it was refused or not answered. The text must
        # say that, and not that there is no connection.
        where = self.server.url
        if isinstance(error, nats.js.errors.APIError) and error.description:
            return TransportBroken(f"JetStream on {where}: {error.description}")
        if isinstance(error, nats.js.errors.ServiceUnavailableError):
            return TransportBroken(f"JetStream on {where}: it does not answer")
        if isinstance(error, (nats.errors.TimeoutError, TimeoutError)):
            return TransportBroken(f"JetStream on {where}: no answer in time")
        return self._translate(error)

    def _keep(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._drop)
        return task

    def _drop(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            # Otherwise asyncio logs that the exception was never retrieved.
            task.exception()

    async def _on_error(self, error: Exception) -> None:
        if not self._up:
            # Otherwise nats-py would try to connect again for minutes.
            raise error
        # The loss of the connection is reported in another way.
        if not isinstance(error, _LOSSES):
            text = str(error).removeprefix("nats: ")
            self._to_trio(self.owner.client_complained, self, text)

    async def _on_lost(self) -> None:
        self._end()

    def _on_ended(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled():
            # Otherwise asyncio logs that the exception was never retrieved.
            task.exception()
        self._end()

    def _end(self) -> None:
        self._stopping = True
        if self._ended is not None:
            self._ended.set()

    def _stop(self) -> None:
        # First write what has been passed to the thread, unless that takes too long.
        self._stopping = True
        if self._loop is not None and self._wake is not None and self._ended is not None:
            self._wake.set()
            self._loop.call_later(_CLOSE_PATIENCE / 2, self._ended.set)

    def _on_connected(self, max_payload: int) -> None:
        self.max_payload = max_payload
        self.outcome.set()

    async def _watch(self, client: nats.aio.client.Client) -> None:
        # A half-open connection shows only by a request without an answer.
        while True:
            await asyncio.sleep(_PING_EVERY)
            pong = self._keep(client.flush())
            # The ping waits behind what is being sent, and its answer behind what has arrived.
            # Progress with these explains a late answer. But if there is progress in one direction
            # only, the answer may never come, so the number of looks is limited.
            for _ in range(_PING_MOST_LOOKS):
                before = self._progress(client)
                await asyncio.wait({pong}, timeout=_PING_PATIENCE)
                if pong.done() or self._progress(client) == before:
                    break
            if not pong.done():
                # If this process itself was stopped for a while, the answer is about to be read.
                await asyncio.wait({pong}, timeout=_PING_EVERY / 2)
            if not pong.done() or pong.exception() is not None:
                self._hung = True
                self._end()
                return

    def _progress(self, client: nats.aio.client.Client) -> tuple[int, int]:
        taken = client.stats["in_bytes"] + _OVERHEAD * client.stats["in_msgs"]
        return taken // _TRICKLE, self._written // _SOCKET_BUFFERS

    def _on_wake(self) -> None:
        assert self._wake is not None
        if self._idle:
            # First: what is handed over from now on wakes the thread again.
            self._woken = False
            self._write_piece()
            if not self._outgoing and not self._stopping:
                return
        self._wake.set()

    def _write_piece(self) -> bool:
        # Write messages at once, and return whether there were any and the socket takes them.
        wire, outgoing = self._wire, self._outgoing
        if wire is None or not wire.is_ready:
            return False
        parts: list[bytes] = []
        departures: list[Departure] = []
        size = 0
        while outgoing and size < _PIECE:
            item = outgoing[0]
            if not isinstance(item, Publish):
                break
            outgoing.popleft()
            if item.departure is not None:
                departures.append(item.departure)
            size += len(item.data) + len(item.block)
            parts.append(encode_publish(item.subject, item.reply, item.block, item.data))
        if not parts:
            return False
        data = b"".join(parts)
        stamp = time.perf_counter_ns()
        for departure in departures:
            departure.stamp = stamp
        wire.write_now(data)
        self._count_written(size)
        return True

    def _count_written(self, size: int) -> None:
        self._written += size
        if self.waiting and self.backlog < _LOW_WATER:
            self.waiting = False
            self._to_trio(self._made_room)

    async def _pump(self, wire: Wire) -> None:
        assert self._wake is not None
        assert self._ended is not None
        while True:
            while self._outgoing and not self._ended.is_set():
                if self._write_piece():
                    # So that what arrives gets its turn.
                    await asyncio.sleep(0)
                    continue
                item = self._outgoing.popleft()
                if isinstance(item, Publish):
                    if item.departure is not None:
                        item.departure.stamp = time.perf_counter_ns()
                    await wire.write(
                        encode_publish(item.subject, item.reply, item.block, item.data)
                    )
                    self._count_written(len(item.data) + len(item.block))
                elif isinstance(item, Flush):
                    self._keep(self._flush(wire, item.number))
                elif isinstance(item, Call):
                    self._keep(self._call(wire, item))
                elif isinstance(item, Subscribe):
                    await wire.subscribe_as(item.number, item.subject, item.queue)
                else:
                    await wire.unsubscribe_as(item.number, keep=item.keep)
            if self._stopping:
                return
            self._woken = False
            # Something that was passed on before the flag was cleared has not woken this task.
            if not self._outgoing:
                self._idle = True
                await self._wake.wait()
                self._idle = False
            self._wake.clear()

    async def _flush(self, client: nats.aio.client.Client, number: int) -> None:
        with contextlib.suppress(nats.errors.Error):
            await client.flush()
            self._to_trio(self._flushed, number)

    async def _call(self, client: nats.aio.client.Client, item: Call) -> None:
        try:
            value = await item.function(client)
        except BackbeatError as error:
            self._to_trio(item.outcome.settle, None, error)
        except Exception as error:  # noqa: BLE001 - the edge: whatever it was becomes one of ours
            self._to_trio(item.outcome.settle, None, self._translate_call(error))
        else:
            self._to_trio(item.outcome.settle, value, None)

    def _flushed(self, number: int) -> None:
        event = self._flushes.get(number)
        if event is not None and not self.lost.is_set():
            event.set()

    def _take(
        self, number: int, subject: bytes, reply: bytes, data: bytes, block: bytes | None
    ) -> None:
        stamp = time.perf_counter_ns()
        incoming = self._incoming
        if (
            len(incoming) >= _INCOMING_MESSAGES
            or self._taken_bytes - self._passed_bytes > _INCOMING_BYTES
        ):
            self._dropped += 1
            return
        status, headers, size = "", None, len(data)
        if block:
            status, headers = decode_headers(block)
            size += len(block)
        self._taken_bytes += size
        incoming.append(
            Incoming(
                number,
                # Whatever these are, they must not end the task that reads.
                subject.decode(errors="replace"),
                data,
                reply.decode(errors="replace"),
                stamp,
                status,
                headers,
                size,
            )
        )

    def _taken(self) -> None:
        # Once for all messages that arrived together. Trio's thread would take the GIL for the
        # first of them, and hold up the parsing of the others.
        if self._incoming and not self._told:
            self._tell()


def _behind_ns() -> int:
    # Return what to add to a time of the other thread's clock to get local time. If this thread is
    # interrupted between reading the two clocks, the result is wrong by as much. So the best of a
    # few results counts, as with pings.
    best, behind = 1 << 62, 0
    for _ in range(3):
        before = time.perf_counter_ns()
        local = local_ns()
        after = time.perf_counter_ns()
        if after - before < best:
            best, behind = after - before, local - (before + after) // 2
        if best < 20_000:
            break
    return behind


def _leave(portal_cm: AbstractContextManager[BlockingPortal]) -> None:
    portal_cm.__exit__(None, None, None)
