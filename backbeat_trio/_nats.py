"""NATS behind the transport protocol: nats-py in a thread of its own, under a supervisor.

nats-py is asyncio. Each connection is a client, an event loop and a thread of its own, made through
anyio's blocking portal and never used again once it is lost: reconnecting is making another one.
So a client that hangs (a half-open socket with full buffers, a close that never ends) is abandoned
and not waited for.

Both directions are a hand-over, not an await. To the thread: a deque, and one wake-up for all that
is in it. From the thread: a deque, and one idempotent `run_sync_soon`. Arrival and departure are
stamped in the thread; the stamps cross as ages, since the clocks of the two sides differ.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import ssl
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any, Final, NamedTuple, final

import nats.aio.client
import nats.errors
import trio
from anyio.from_thread import BlockingPortal, start_blocking_portal
from nats.aio.msg import Msg

from ._clock import local_ns
from ._config import BackbeatConfig, Server
from ._errors import (
    AuthenticationFailed,
    ConfigError,
    NoResponders,
    TLSFailed,
    TransportBroken,
)
from ._transport import BaseTransport, Mailbox, Message, Reply, State

# A first retry soon, as a restarted server is back within 20 ms; later ones leave room for others.
_BACKOFF_MIN: Final = 0.01
_BACKOFF_MAX: Final = 1.0
# The server is asked for a sign of life this often, and given up after this long without one.
_PING_EVERY: Final = 0.4
_PING_PATIENCE: Final = 1.0
# What may be under way to the thread before publishers wait, and until when they do.
_HIGH_WATER: Final = 2 * 1024 * 1024
_LOW_WATER: Final = 1024 * 1024
# What may be under way from the thread before the newest is dropped.
_INCOMING_MESSAGES: Final = 65_536
_INCOMING_BYTES: Final = 64 * 1024 * 1024
# For letting go of a client: then it is abandoned.
_CLOSE_PATIENCE: Final = 1.0
# nats-py's flush must never be cut short, as that ends its read loop; so it gets for ever.
_FOREVER: Final = 10**9

_INBOX: Final = 0


class _Publish(NamedTuple):
    subject: str
    data: bytes
    reply: str
    token: str
    """The request that this message is, or an empty string."""


class _Subscribe(NamedTuple):
    number: int
    subject: str


class _Unsubscribe(NamedTuple):
    number: int


class _Flush(NamedTuple):
    number: int


class _Incoming(NamedTuple):
    number: int
    """The subscription that it came for; `_INBOX` for answers to requests."""
    subject: str
    data: bytes
    reply: str
    stamp: int
    sent: int
    status: str


@final
class _Client:
    """One connection and its thread. Its methods say on which side they run."""

    def __init__(self, owner: NatsTransport, server: Server, options: dict[str, Any]) -> None:
        self.owner = owner
        self.server = server
        self.outcome = trio.Event()
        self.lost = trio.Event()
        self.error: Exception | None = None
        self.info: dict[str, Any] = {}
        self.max_payload = 0
        self.inbox = ""
        self.room = trio.Event()
        self.waiting = False
        self._options = options
        self._token = trio.lowlevel.current_trio_token()
        self._outgoing: deque[_Publish | _Subscribe | _Unsubscribe | _Flush] = deque()
        self._queued = self._written = 0
        self._woken = False
        self._incoming: deque[_Incoming] = deque()
        # One side counts up the one and the other the other: no sum is changed from two threads.
        self._taken_bytes = self._passed_bytes = 0
        self._dropped = self._dropped_told = 0
        self._sent: dict[str, int] = {}
        self._flushes: dict[int, trio.Event] = {}
        self._subscriptions: dict[int, Any] = {}
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
        """Start the thread, and wait for the connection or the reason for its absence."""
        self._portal_cm = start_blocking_portal("asyncio", name=f"backbeat-nats-{self.server.host}")
        # Starting a thread takes well under a millisecond and cannot be undone half-way: so it is
        # not cancelled, and the portal is never lost between its making and its being kept.
        with trio.CancelScope(shield=True):
            portal = await trio.to_thread.run_sync(self._portal_cm.__enter__)
        self._life = portal.start_task_soon(self._main)
        with trio.move_on_after(self.owner.connect_timeout):
            await self.outcome.wait()
        if not self.outcome.is_set():
            self.error = TransportBroken(f"no answer from {self.server.url} in time")
        if self.error is not None:
            raise self.error

    async def close(self) -> None:
        """Let go of the client and its thread; one that hangs is left behind."""
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
        """Take note that the connection is gone, the first time it is told."""
        if self.error is None:
            self.error = error
        self.outcome.set()
        self.lost.set()
        self.room.set()
        for event in self._flushes.values():
            event.set()
        self.owner.client_lost(self)

    @property
    def backlog(self) -> int:
        """Bytes handed over and not yet written."""
        return self._queued - self._written

    def send(self, item: _Publish | _Subscribe | _Unsubscribe | _Flush) -> None:
        """Hand something to the thread."""
        if isinstance(item, _Publish):
            self._queued += len(item.data)
        self._outgoing.append(item)
        self._wake_thread()

    async def flush(self, number: int) -> None:
        """Wait until the server has taken in all that was handed over before."""
        event = self._flushes[number] = trio.Event()
        try:
            self.send(_Flush(number))
            await event.wait()
        finally:
            del self._flushes[number]
        if self.lost.is_set():
            raise TransportBroken(str(self.error))

    def _wake_thread(self) -> None:
        if self._woken or self._loop is None or self._wake is None:
            return
        self._woken = True
        try:
            self._loop.call_soon_threadsafe(self._wake.set)
        except RuntimeError:
            # The loop has ended, by itself or with its process; the supervisor learns it elsewhere.
            self.fail(TransportBroken("the connection's thread has ended"))

    def _drain_incoming(self) -> None:
        incoming, owner = self._incoming, self.owner
        behind = _behind_ns()
        dropped = self._dropped
        owner.count_dropped(dropped - self._dropped_told)
        self._dropped_told = dropped
        for _ in range(len(incoming)):
            item = incoming.popleft()
            self._passed_bytes += len(item.data)
            owner.dispatch(item, behind)

    async def wait_room(self) -> None:
        """Wait while more is under way to the thread than it should be."""
        while self.backlog > _HIGH_WATER and not self.lost.is_set():
            if self.room.is_set():
                self.room = trio.Event()
            self.waiting = True
            # The thread may have caught up before it saw the flag.
            if self.backlog > _LOW_WATER:
                await self.room.wait()

    def forget(self, token: str) -> None:
        """Drop the stamp of a request that nobody waits for any more."""
        self._sent.pop(token, None)

    def _made_room(self) -> None:
        self.room.set()

    # The thread's side.

    def _tell(self, function: Callable[..., object], *args: Any) -> None:
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(function, *args)

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._wake, self._ended = asyncio.Event(), asyncio.Event()
        client = nats.aio.client.Client()
        error: Exception = TransportBroken(f"the connection to {self.server.url} was lost")
        try:
            await client.connect(
                self.server.url,
                error_cb=self._on_error,
                disconnected_cb=self._on_lost,
                closed_cb=self._on_lost,
                **self._secured(client),
            )
            info: dict[str, Any] = getattr(client, "_server_info", {})
            if self.server.scheme == "tls" and not self._has_tls(client):
                raise TLSFailed(f"{self.server.url} does not offer TLS")
            self.inbox = client.new_inbox()
            self._up = True
            await client.subscribe(f"{self.inbox}.*", cb=self._receiver(_INBOX))
            self._tell(self._on_connected, client.max_payload, info)
            self._keep(self._watch(client))
            pump, ended = self._keep(self._pump(client)), self._keep(self._ended.wait())
            await asyncio.wait({pump, ended}, return_when=asyncio.FIRST_COMPLETED)
            if pump.done():
                pump.result()
            else:
                # It waits for a peer that takes nothing any more.
                self._hung = True
        except asyncio.CancelledError:
            error = TransportBroken("the connection's thread was stopped")
        except Exception as failure:  # noqa: BLE001 - the edge: whatever it was becomes one of ours
            error = self._translate(failure)
        finally:
            self._tell(self.fail, error)
            for task in list(self._tasks):
                task.cancel()
            # Its errors say nothing that the loss has not said.
            with contextlib.suppress(Exception, asyncio.CancelledError):
                if self._hung:
                    _abort(client)
                await asyncio.wait_for(client.close(), _CLOSE_PATIENCE)
            _abort(client)

    def _secured(self, client: nats.aio.client.Client) -> dict[str, Any]:
        # nats-py sends secrets in the clear to a server that does not ask for TLS, even when the
        # URL says tls://. It asks for callables at the last moment, which can look first.
        options = dict(self._options)

        def guarded(secret: str) -> Callable[[], str]:
            def reveal() -> str:
                if self.server.scheme == "tls" and not self._has_tls(client):
                    raise TLSFailed(f"{self.server.url} does not offer TLS")
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

    def _has_tls(self, client: nats.aio.client.Client) -> bool:
        info: dict[str, Any] = getattr(client, "_server_info", {})
        return bool(info.get("tls_required") or self._options.get("tls_handshake_first"))

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
        return TransportBroken(f"no connection to {where}: {text}")

    def _keep(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _on_error(self, error: Exception) -> None:
        if not self._up:
            # Otherwise the first connect is tried again for minutes.
            raise error
        self._tell(self.owner.note_error, str(error))

    async def _on_lost(self) -> None:
        self._stopping = True
        if self._ended is not None:
            self._ended.set()

    def _stop(self) -> None:
        # What was handed over is written first, unless that takes too long.
        self._stopping = True
        if self._loop is not None and self._wake is not None and self._ended is not None:
            self._wake.set()
            self._loop.call_later(_CLOSE_PATIENCE / 2, self._ended.set)

    def _on_connected(self, max_payload: int, info: dict[str, Any]) -> None:
        self.max_payload = max_payload
        self.info = info
        self.outcome.set()

    async def _watch(self, client: nats.aio.client.Client) -> None:
        # A half-open connection looks well until something is asked of it.
        while True:
            await asyncio.sleep(_PING_EVERY)
            pong = self._keep(client.flush(timeout=_FOREVER))
            heard = -1
            # The answer queues behind whatever else has arrived: that is a sign of life, too.
            while not pong.done() and heard != client.stats["in_msgs"]:
                heard = client.stats["in_msgs"]
                await asyncio.wait({pong}, timeout=_PING_PATIENCE)
            if not pong.done():
                # Where it was this process that stood still, the answer is about to be read.
                await asyncio.wait({pong}, timeout=_PING_EVERY / 2)
            if not pong.done() or pong.exception() is not None:
                self._hung = True
                await self._on_lost()
                return

    async def _pump(self, client: nats.aio.client.Client) -> None:
        assert self._wake is not None
        assert self._ended is not None
        while True:
            while self._outgoing and not self._ended.is_set():
                item = self._outgoing.popleft()
                if isinstance(item, _Publish):
                    if item.token:
                        self._sent[item.token] = time.perf_counter_ns()
                    await client.publish(item.subject, item.data, reply=item.reply)
                    self._written += len(item.data)
                    if self.waiting and self.backlog < _LOW_WATER:
                        self.waiting = False
                        self._tell(self._made_room)
                elif isinstance(item, _Flush):
                    self._keep(self._flush(client, item.number))
                elif isinstance(item, _Subscribe):
                    self._subscriptions[item.number] = await client.subscribe(
                        item.subject, cb=self._receiver(item.number)
                    )
                elif (subscription := self._subscriptions.pop(item.number, None)) is not None:
                    await subscription.unsubscribe()
            if self._stopping:
                return
            self._woken = False
            # What was handed over before the flag fell woke nobody.
            if not self._outgoing:
                await self._wake.wait()
            self._wake.clear()

    async def _flush(self, client: nats.aio.client.Client, number: int) -> None:
        with contextlib.suppress(nats.errors.Error):
            await client.flush(timeout=_FOREVER)
            self._tell(self._flushed, number)

    def _flushed(self, number: int) -> None:
        event = self._flushes.get(number)
        if event is not None and not self.lost.is_set():
            event.set()

    def _receiver(self, number: int) -> Callable[[Msg], Awaitable[None]]:
        incoming = self._incoming

        async def receive(message: Msg) -> None:
            stamp = time.perf_counter_ns()
            if (
                len(incoming) >= _INCOMING_MESSAGES
                or self._taken_bytes - self._passed_bytes > _INCOMING_BYTES
            ):
                self._dropped += 1
                return
            sent, status = 0, ""
            if number == _INBOX:
                sent = self._sent.pop(message.subject.rpartition(".")[2], 0)
                status = (message.headers or {}).get("Status", "")
            self._taken_bytes += len(message.data)
            incoming.append(
                _Incoming(number, message.subject, message.data, message.reply, stamp, sent, status)
            )
            with contextlib.suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._drain_incoming, idempotent=True)

        return receive


def _behind_ns() -> int:
    # Ages cross between the clocks, not readings: this is what takes the one to the other. Where
    # this thread is preempted between its looks at the two the answer is wrong by as much; so the
    # best of a few counts, as it does with pings.
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


def _abort(client: nats.aio.client.Client) -> None:
    # nats-py closes politely or not at all: it waits for a peer that reads no more, and leaves the
    # socket of a connection that was refused to the garbage collector.
    transport = getattr(client, "_transport", None)
    for name in ("_io_writer", "_bare_io_writer"):
        writer = getattr(transport, name, None)
        if writer is not None:
            writer.transport.abort()


def _leave(portal_cm: AbstractContextManager[BlockingPortal]) -> None:
    portal_cm.__exit__(None, None, None)


@final
class _Waiter:
    __slots__ = ("answer", "event")

    def __init__(self) -> None:
        self.event = trio.Event()
        self.answer: _Incoming | None = None


@final
class NatsTransport(BaseTransport):
    """The transport over NATS: a supervisor, and the client that it has at present.

    Raises:
      ConfigError: where certificates or credentials cannot be loaded.

    """

    def __init__(self, config: BackbeatConfig, *, name: str | None = None) -> None:
        super().__init__(inbox_prefix=config.inbox_prefix)
        self.connect_timeout = config.connect_timeout
        self.limiter = trio.CapacityLimiter(16)
        self._servers = config.servers
        self._options = _options(config, name or f"backbeat {config.agent_id}")
        self._client: _Client | None = None
        self._waiters: dict[str, _Waiter] = {}
        self._behind_ns = 0
        self._attempted = trio.Event()
        self._first_error: TransportBroken | None = None
        self._stop = trio.CancelScope()
        self._pid = os.getpid()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """See `Transport.run`."""
        self._check_open()
        task_status.started()
        try:
            with self._stop:
                async with trio.open_nursery() as nursery:
                    await self._supervise(nursery)
        finally:
            self._close()
            self._attempted.set()

    async def _supervise(self, nursery: trio.Nursery) -> None:
        delay = _BACKOFF_MIN
        for attempt, server in enumerate(itertools.cycle(self._servers), 1):
            client = _Client(self, server, self._options)
            try:
                await client.open()
            except TransportBroken as error:
                self._note_down(str(error))
                if attempt == len(self._servers) and not self.generation:
                    self._first_error = error
                    self._attempted.set()
            else:
                delay = _BACKOFF_MIN
                self._use(client)
                await client.lost.wait()
                self._note_down(str(client.error))
            finally:
                # In the background: what hangs there must not hold up the next attempt.
                nursery.start_soon(client.close)
            await trio.sleep(random.uniform(delay / 2, delay))
            delay = min(2 * delay, _BACKOFF_MAX)

    def _note_down(self, error: str) -> None:
        # The same failure over and over is one error to report.
        if error != self._last_error:
            self.note_error(error)
        self._last_error = error

    def _use(self, client: _Client) -> None:
        self._client = client
        self.max_payload = client.max_payload
        self.generation += 1
        for number, mailbox in self._mailboxes.items():
            client.send(_Subscribe(number, mailbox.subject))
        self._last_error = None
        self._attempted.set()
        self._state.value = State.UP

    def client_lost(self, client: _Client) -> None:
        """Take note that a client is of no more use."""
        if client is not self._client:
            return
        self._client = None
        if self.connected:
            self._state.value = State.DOWN
        self._wake_waiters()

    def _wake_waiters(self) -> None:
        waiters = list(self._waiters.values())
        self._waiters.clear()
        for waiter in waiters:
            waiter.event.set()

    def _close(self) -> None:
        super()._close()
        self._wake_waiters()

    async def first_attempt(self) -> None:
        """See `Transport.first_attempt`."""
        await self._attempted.wait()
        if self._first_error is not None:
            raise self._first_error
        self._check_open()

    def _current(self) -> _Client:
        self._check_open()
        if os.getpid() != self._pid:
            raise TransportBroken(
                "the connection belongs to the process that this one was forked from"
            )
        if self._client is None:
            raise TransportBroken(self._last_error or "there is no connection yet")
        return self._client

    def publish_nowait(self, subject: str, data: bytes, *, reply: str = "") -> None:
        """See `Transport.publish_nowait`."""
        self._check_message(subject, data, reply)
        self._current().send(_Publish(subject, data, reply, ""))

    async def publish(self, subject: str, data: bytes, *, reply: str = "") -> None:
        """See `Transport.publish`."""
        await trio.lowlevel.checkpoint()
        self._check_message(subject, data, reply)
        client = self._current()
        await client.wait_room()
        self._check_open()
        if client.lost.is_set():
            raise TransportBroken(str(client.error))
        client.send(_Publish(subject, data, reply, ""))

    async def flush(self) -> None:
        """See `Transport.flush`."""
        await trio.lowlevel.checkpoint()
        await self._current().flush(next(self._numbers))

    async def request(self, subject: str, data: bytes, *, timeout: float) -> Reply:
        """See `Transport.request`."""
        self._check_message(subject, data)
        client, token, waiter = self._current(), f"{next(self._numbers):x}", _Waiter()
        self._waiters[token] = waiter
        try:
            client.send(_Publish(subject, data, f"{client.inbox}.{token}", token))
            with trio.move_on_after(timeout):
                await waiter.event.wait()
        finally:
            self._waiters.pop(token, None)
            client.forget(token)
        answer = waiter.answer
        if answer is None:
            self._check_open()
            if client.lost.is_set():
                raise TransportBroken(str(client.error))
            raise TransportBroken(f"no answer on {subject} within {timeout:g} s")
        if answer.status == "503":
            raise NoResponders(f"nobody answers on {subject}")
        return Reply(answer.data, answer.sent + self._behind_ns, answer.stamp + self._behind_ns)

    async def aclose(self) -> None:
        """See `Transport.aclose`."""
        self._stop.cancel()
        self._close()
        await trio.lowlevel.checkpoint()

    def _subscribe(self, number: int, mailbox: Mailbox) -> None:
        if self._client is not None:
            self._client.send(_Subscribe(number, mailbox.subject))

    def _unsubscribe(self, number: int, mailbox: Mailbox) -> None:
        if self._client is not None:
            self._client.send(_Unsubscribe(number))

    # For the client.

    def dispatch(self, item: _Incoming, behind_ns: int) -> None:
        """Pass on what arrived; ``behind_ns`` takes its stamps to local time."""
        if item.number == _INBOX:
            self._received += 1
            waiter = self._waiters.pop(item.subject.rpartition(".")[2], None)
            if waiter is not None:
                self._behind_ns = behind_ns
                waiter.answer = item
                waiter.event.set()
            return
        mailbox = self._mailboxes.get(item.number)
        if mailbox is not None:
            self._deliver(
                mailbox, Message(item.subject, item.data, item.reply, item.stamp + behind_ns)
            )

    def count_dropped(self, messages: int) -> None:
        """Count messages that came faster than the thread could hand them over."""
        self._dropped += messages

    def note_error(self, error: str) -> None:
        """Keep an error that did not end the connection."""
        if "permissions violation" in error.lower():
            self._permission_errors += 1
        super().note_error(error)


def _options(config: BackbeatConfig, name: str) -> dict[str, Any]:
    options: dict[str, Any] = {
        "name": name,
        "allow_reconnect": False,
        # What nats-py gathers before it writes. By default it joins megabytes into one piece of
        # memory, and holds the GIL for as long.
        "pending_size": 128 * 1024,
        "connect_timeout": config.connect_timeout,
        "inbox_prefix": config.inbox_prefix,
        "user": config.user,
        "password": config.password,
        "token": config.token,
        "tls_handshake_first": config.tls_first,
    }
    if config.creds is not None or config.nkey is not None:
        try:
            import nkeys  # noqa: F401
        except ImportError:
            raise ConfigError(
                "`creds` and `nkey` need the nkeys extra: backbeat-trio[nkeys]"
            ) from None
    for field, option in (("creds", "user_credentials"), ("nkey", "nkeys_seed")):
        path = getattr(config, field)
        if path is None:
            continue
        if not os.access(path, os.R_OK):
            raise ConfigError(f"{field}={path!r}: cannot be read")
        options[option] = path
    if config.tls_ca or config.tls_cert or config.tls_first or "tls:" in config.nats_url:
        options["tls"] = _tls_context(config)
    return options


def _tls_context(config: BackbeatConfig) -> ssl.SSLContext:
    field, path = "tls_ca", config.tls_ca
    try:
        context = ssl.create_default_context(cafile=path)
        if config.tls_cert is not None:
            field, path = "tls_cert", config.tls_cert
            context.load_cert_chain(config.tls_cert, config.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"{field}={path!r}: {error.strerror or error}") from None
    return context
