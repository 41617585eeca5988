"""The clients of the simulated server that a process uses: a transport, a store and a journal.

They behave like those over NATS. Publishing without a connection raises `TransportBroken`. A
request fails when its connection is lost. Messages that are sent meanwhile are lost. After a
back-off, the client connects again.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, final

import trio
from processes import Process
from server import INBOX, Connection, Link, Server

from backbeat_trio._errors import NoResponders, TransportBroken
from backbeat_trio._time.local import local_ns
from backbeat_trio._transport.base import BaseTransport, Mailbox, State
from backbeat_trio._transport.protocol import Answers, Message, Reply
from backbeat_trio._transport.store import Conflict, Entry

# As `NatsTransport` and `jetstream` have them; a test compares them.
BACKOFF_MIN: Final = 0.01
BACKOFF_MAX: Final = 1.0
CONNECT_TIMEOUT: Final = 2.0
PATIENCE: Final = 1.0


class _Waiter:
    __slots__ = ("answer", "connection", "event", "received_ns")

    def __init__(self, connection: Connection) -> None:
        self.event = trio.Event()
        self.connection = connection
        self.answer: object = None
        self.received_ns = 0


@final
class _Answers:
    """An async iterator of the answers to one request."""

    def __init__(
        self, owner: SimulatedTransport, connection: Connection, subject: str, reply: str
    ) -> None:
        self.reply: str = reply
        self._owner, self._connection, self._subject = owner, connection, subject
        self._sent_ns = local_ns()
        self._answers: deque[tuple[object, int]] = deque()
        self._lot = trio.lowlevel.ParkingLot()

    def take(self, answer: object) -> None:
        """Take in an answer; None says that nobody is subscribed."""
        self._answers.append((answer, local_ns()))
        self._lot.unpark_all()

    def wake(self) -> None:
        """Have whoever waits look whether the connection still stands."""
        self._lot.unpark_all()

    def __aiter__(self) -> _Answers:
        return self

    async def __anext__(self) -> Reply:
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._answers:
            self._owner.check_connection(self._connection)
            await self._lot.park()
        answer, received_ns = self._answers.popleft()
        if answer is None:
            raise NoResponders(f"no process is subscribed to {self._subject}")
        assert isinstance(answer, bytes)
        return Reply(answer, self._sent_ns, received_ns)


@final
class SimulatedTransport(BaseTransport):
    """A transport to the simulated server, as `NatsTransport` is one to a real server.

    The simulated server knows neither headers nor queue groups, which no metronome and no claim
    uses.
    """

    def __init__(self, process: Process, server: Server, link: Link) -> None:
        super().__init__()
        self._process, self._server, self._link = process, server, link
        self._chance: random.Random = process.chance
        self._connection: Connection | None = None
        self._waiters: dict[int, _Waiter] = {}
        self._requests: dict[int, _Answers] = {}
        self._changed = trio.Event()
        self._stop = trio.CancelScope()
        self._attempted = trio.Event()
        self._first_error: TransportBroken | None = None
        self._error = ""

    async def first_attempt(self) -> None:
        """See `Transport.first_attempt`."""
        await self._attempted.wait()
        if self._first_error is not None:
            raise self._first_error
        self._check_open()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """See `Transport.run`."""
        self._check_open()
        task_status.started()
        try:
            with self._stop:
                await self._supervise()
        finally:
            self._close()
            self._attempted.set()

    async def _supervise(self) -> None:
        delay = BACKOFF_MIN
        while True:
            connection = Connection(self._server, self._link, self._process, self)
            self._changed, self._error = trio.Event(), ""
            try:
                if not self._process.dead:
                    connection.connect()
                with trio.move_on_after(CONNECT_TIMEOUT):
                    await self._changed.wait()
                if self._connection is connection:
                    delay = BACKOFF_MIN
                    self._changed = trio.Event()
                    while self._connection is connection:
                        await self._changed.wait()
                error = self._error or "the server does not answer"
                if error != self._last_error:
                    self.note_error(error)
                self._last_error = error
                if not self.generation and not self._attempted.is_set():
                    self._first_error = TransportBroken(error)
                    self._attempted.set()
            finally:
                connection.abandon()
                if self._connection is connection:
                    self._connection = None
            await trio.sleep(self._chance.uniform(delay / 2, delay))
            delay = min(2 * delay, BACKOFF_MAX)

    # What the connection calls.

    def opened(self, connection: Connection) -> None:
        """See `Client.opened`."""
        if self._state.value is State.CLOSED:
            connection.abandon()
            return
        self._connection = connection
        self.generation += 1
        for number, mailbox in self._mailboxes.items():
            connection.send(self._server.subscribe, number, mailbox.subject)
        self._last_error = None
        self._attempted.set()
        self._changed.set()
        self._state.value = State.UP

    def failed(self, connection: Connection, error: str) -> None:
        """See `Client.failed`."""
        self._error = error
        if self._connection is connection:
            self._connection = None
            if self.connected:
                self._state.value = State.DOWN
            for waiter in self._waiters.values():
                waiter.event.set()
            self._waiters.clear()
            for answers in self._requests.values():
                answers.wake()
        self._changed.set()

    def delivered(self, number: int, subject: str, data: bytes, reply: str) -> None:
        """See `Client.delivered`."""
        mailbox = self._mailboxes.get(number)
        if mailbox is not None:
            self._deliver(mailbox, Message(subject, data, reply, local_ns()))

    def answered(self, token: int, answer: object) -> None:
        """See `Client.answered`."""
        self._received += 1
        if token in self._requests:
            self._requests[token].take(answer)
            return
        waiter = self._waiters.pop(token, None)
        if waiter is not None:
            waiter.answer, waiter.received_ns = (answer,), local_ns()
            waiter.event.set()

    def check_connection(self, connection: Connection) -> None:
        """Raise where a connection does not stand any more."""
        self._check_open()
        if self._connection is not connection:
            raise TransportBroken(self._error or "the connection is gone")

    # Sending.

    def _current(self) -> Connection:
        self._check_open()
        if self._connection is None or self._process.dead:
            raise TransportBroken(self._last_error or "there is no connection yet")
        return self._connection

    def publish_nowait(
        self,
        subject: str,
        data: bytes,
        *,
        reply: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """See `Transport.publish_nowait`."""
        assert not headers
        self._check_message(subject, data, reply)
        self._current().send(self._server.publish, subject, data, reply, core=True)

    async def publish(
        self,
        subject: str,
        data: bytes,
        *,
        reply: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """See `Transport.publish`."""
        await trio.lowlevel.checkpoint()
        self.publish_nowait(subject, data, reply=reply, headers=headers)

    async def flush(self) -> None:
        """See `Transport.flush`."""
        await trio.lowlevel.checkpoint()
        connection = self._current()
        token, waiter = self._expect(connection)
        connection.send(self._server.ping, token)
        try:
            await waiter.event.wait()
        finally:
            self._waiters.pop(token, None)
        if waiter.answer is None:
            self._check_open()
            raise TransportBroken(self._error or "the connection is gone")

    @asynccontextmanager
    async def open_request(
        self, subject: str, data: bytes, *, headers: Mapping[str, str] | None = None
    ) -> AsyncGenerator[Answers, None]:
        """See `Transport.open_request`."""
        assert not headers
        self._check_message(subject, data)
        connection, token = self._current(), next(self._numbers)
        reply = f"{INBOX}{connection.number}.{token}"
        answers = self._requests[token] = _Answers(self, connection, subject, reply)
        try:
            connection.send(self._server.publish, subject, data, reply, core=True)
            yield answers
        finally:
            del self._requests[token]

    async def ask(self, what: str, *args: Any) -> Any:
        """Ask JetStream for something. A checkpoint.

        Raises:
          TransportBroken: where no answer comes, or JetStream refuses; it may have been done.

        """
        await trio.lowlevel.checkpoint()
        connection = self._current()
        token, waiter = self._expect(connection)
        connection.send(self._server.ask, token, what, *args)
        answer = await self._wait(token, waiter, "JetStream", PATIENCE)
        if answer == "refused":
            raise TransportBroken("JetStream refuses: insufficient resources")
        return answer

    def _expect(self, connection: Connection) -> tuple[int, _Waiter]:
        token, waiter = next(self._numbers), _Waiter(connection)
        self._waiters[token] = waiter
        return token, waiter

    async def _wait(self, token: int, waiter: _Waiter, whom: str, timeout: float) -> object:
        try:
            with trio.move_on_after(timeout):
                await waiter.event.wait()
        finally:
            self._waiters.pop(token, None)
        if isinstance(waiter.answer, tuple):
            return waiter.answer[0]
        self._check_open()
        if self._connection is not waiter.connection:
            raise TransportBroken(self._error or "the connection is gone")
        raise TransportBroken(f"no answer on {whom} within {timeout:g} s")

    async def aclose(self) -> None:
        """See `Transport.aclose`."""
        self._stop.cancel()
        self._close()
        await trio.lowlevel.checkpoint()

    def _close(self) -> None:
        super()._close()
        for waiter in self._waiters.values():
            waiter.event.set()
        for answers in self._requests.values():
            answers.wake()

    def _subscribe(self, number: int, mailbox: Mailbox) -> None:
        if self._connection is not None:
            self._connection.send(self._server.subscribe, number, mailbox.subject)

    def _unsubscribe(self, number: int, mailbox: Mailbox, *, keep: bool) -> None:
        if self._connection is not None:
            self._connection.send(self._server.unsubscribe, number)


@final
class SimulatedStore:
    """The metronomes' key; see `Store`."""

    def __init__(self, transport: SimulatedTransport) -> None:
        self._transport = transport

    async def open(self) -> bool:
        """See `Store.open`."""
        return bool(await self._transport.ask("open"))

    async def read(self) -> Entry:
        """See `Store.read`."""
        entry = await self._transport.ask("read")
        assert isinstance(entry, Entry)
        return entry

    async def write(self, data: bytes, revision: int) -> int:
        """See `Store.write`."""
        written = await self._transport.ask("write", data, revision)
        if written < 0:
            raise Conflict("another process has written the record")
        return int(written)


@final
class SimulatedJournal:
    """The stream of terminal claims; see `Journal`."""

    def __init__(self, transport: SimulatedTransport, config: object = None) -> None:
        self.reason = ""
        self._transport = transport

    def room(self, max_payload: int, *, stored: bool) -> int:
        """See `Journal.room`."""
        return max_payload - 128

    async def open(self) -> bool:
        """See `Journal.open`."""
        return bool(await self._transport.ask("open"))

    async def store(self, subject: str, claims: Sequence[tuple[str, bytes]]) -> list[bool]:
        """See `Journal.store`."""
        stored = [False] * len(claims)

        async def store(index: int, number: str, data: bytes) -> None:
            try:
                await self._transport.ask("store", subject, number, data)
            except TransportBroken:
                return
            stored[index] = True

        async with trio.open_nursery() as nursery:
            for index, (number, data) in enumerate(claims):
                nursery.start_soon(store, index, number, data)
        return stored

    async def publish_unstored(self, subject: str, data: bytes) -> None:
        """See `Journal.publish_unstored`."""
        await self._transport.publish(subject, data)
