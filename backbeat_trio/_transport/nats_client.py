"""One connection to NATS: a nats-py client, its event loop and its thread.

nats-py needs asyncio. So a client runs in a thread of its own, which anyio's blocking portal makes.
Once its connection is lost, it is never used again. If it hangs, for example in a half-open socket
with full buffers, it is abandoned. Only this module, `nats_outgoing`, `nats_wire`, `nats_loop` and
`jetstream` (whose functions run in that thread) use nats-py or asyncio, and only this one uses
anyio.

Messages are passed on in both directions without waiting; see `nats_outgoing` and `nats_incoming`.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Final, Protocol, TypeVar, final

import nats.aio.client
import nats.errors
import nats.js.errors
import trio
from anyio.from_thread import BlockingPortal, start_blocking_portal

from .._config import Server
from .._errors import AuthenticationFailed, BackbeatError, TLSFailed, TransportBroken
from .nats_incoming import INBOX, Arrival, Incoming
from .nats_loop import THREAD, ConnectionLoop
from .nats_outgoing import Call, Flush, Outcome, Outgoing
from .nats_wire import Wire

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
# How long closing a client may take, in seconds, before it is abandoned.
_CLOSE_PATIENCE: Final = 1.0
# Errors after which nats-py gives the connection up.
_LOSSES: Final = (nats.errors.UnexpectedEOF, nats.errors.StaleConnectionError, OSError)

T = TypeVar("T")


class Owner(Protocol):
    """What a client calls of its transport, always on Trio's side."""

    @property
    def connect_timeout(self) -> float: ...
    @property
    def limiter(self) -> trio.CapacityLimiter: ...
    def client_lost(self, client: Client, /) -> None: ...
    def dispatch(self, item: Arrival, behind_ns: int, /) -> None: ...
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
        self.outgoing = Outgoing(self.fail, self._to_trio)
        self.incoming = Incoming(owner.dispatch, owner.count_dropped, self._to_trio)
        self._options = options
        self._token = trio.lowlevel.current_trio_token()
        self._calls: set[Outcome] = set()
        self._flushes: dict[int, trio.Event] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
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
        self.outgoing.lose()
        for event in self._flushes.values():
            event.set()
        for outcome in self._calls:
            outcome.event.set()
        self.owner.client_lost(self)

    async def flush(self, number: int) -> None:
        """Wait until the server has received everything that was passed to the thread before."""
        event = self._flushes[number] = trio.Event()
        try:
            self.outgoing.send(Flush(number))
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
            self.outgoing.send(Call(function, outcome))
            await outcome.event.wait()
        finally:
            self._calls.discard(outcome)
        if outcome.error is not None:
            raise outcome.error
        if self.lost.is_set():
            raise TransportBroken(str(self.error))
        value: T = outcome.value
        return value

    # The thread's side.

    def _to_trio(self, function: Callable[..., object], *args: Any) -> None:
        # The function must not raise, because Trio would take that for an internal error.
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(function, *args)

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        incoming, outgoing = self.incoming, self.outgoing
        client = Wire(lambda: self._check_tls(client), incoming.take, incoming.tell)
        outgoing.start(client)
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
            pump = self._keep(outgoing.pump(client, partial(self._start, client)))
            ended = self._keep(outgoing.ended.wait())
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
        self.outgoing.end()

    def _on_ended(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled():
            # Otherwise asyncio logs that the exception was never retrieved.
            task.exception()
        self.outgoing.end()

    def _stop(self) -> None:
        # First write what has been passed to the thread, unless that takes too long.
        self.outgoing.stop()
        asyncio.get_running_loop().call_later(_CLOSE_PATIENCE / 2, self.outgoing.ended.set)

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
                self.outgoing.end()
                return

    def _progress(self, client: nats.aio.client.Client) -> tuple[int, int]:
        taken = client.stats["in_bytes"] + _OVERHEAD * client.stats["in_msgs"]
        return taken // _TRICKLE, self.outgoing.written // _SOCKET_BUFFERS

    def _start(self, client: nats.aio.client.Client, item: Flush | Call) -> None:
        if isinstance(item, Flush):
            self._keep(self._flush(client, item.number))
        else:
            self._keep(self._call(client, item))

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


def _leave(portal_cm: AbstractContextManager[BlockingPortal]) -> None:
    portal_cm.__exit__(None, None, None)
