"""The base class of the transports: mailboxes, counters, errors, and the end of a transport."""

from __future__ import annotations

import abc
import contextlib
import enum
import itertools
from collections import Counter, deque
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Final, final

import trio
from trio_util import AsyncValue

from .._errors import TransportBroken, TransportClosed
from .._time.local import local_ns
from .protocol import (
    SUBSCRIPTION_MESSAGES,
    Message,
    Reply,
    TransportStatistics,
    check_pattern,
    check_subject,
)

# How many different errors are kept.
_ERRORS: Final = 16


class State(enum.Enum):
    """The state of a transport's connection."""

    UP = enum.auto()
    DOWN = enum.auto()
    CLOSED = enum.auto()


@final
class Mailbox:
    """The bounded queue of one subscription, and an async iterator of its messages."""

    def __init__(self, subject: str, capacity: int) -> None:
        self.subject = subject
        self._send, self._receive = trio.open_memory_channel[Message](capacity)

    def deliver(self, message: Message) -> bool:
        """Queue a message, and return whether there was room for it."""
        try:
            self._send.send_nowait(message)
        except trio.WouldBlock:
            return False
        return True

    def close(self) -> None:
        """End the iteration after the messages that are queued."""
        self._send.close()

    def __aiter__(self) -> Mailbox:
        return self

    async def __anext__(self) -> Message:
        try:
            return await self._receive.receive()
        except trio.EndOfChannel:
            raise TransportClosed("the transport has been closed") from None


class BaseTransport(abc.ABC):
    """The part that both transports share: mailboxes, counters, and the state."""

    def __init__(self, *, inbox_prefix: str = "_INBOX") -> None:
        self._state: AsyncValue[State] = AsyncValue(State.DOWN)
        self.generation = 0
        self.max_payload = 1024 * 1024
        self._inbox_prefix = inbox_prefix
        self._mailboxes: dict[int, Mailbox] = {}
        self._numbers = itertools.count(1)
        self._received = self._dropped = self._permission_errors = 0
        self._refused: Counter[str] = Counter()
        self._last_error: str | None = None
        self._errors: deque[tuple[int, str]] = deque(maxlen=_ERRORS)
        self.complaints: deque[str] = deque(maxlen=_ERRORS)
        """The newest errors that left the connection as it was, each once."""
        self.failure: TransportBroken | None = None
        """Why there is no connection, as in `TransportStatistics.last_error`."""
        self.noted: trio.lowlevel.ParkingLot = trio.lowlevel.ParkingLot()
        """Where to wait for the next error."""

    @property
    def connected(self) -> bool:
        """See `Transport.connected`."""
        return bool(self._state.value is State.UP)

    async def wait_connected(self, connected: bool = True, /) -> None:
        """See `Transport.wait_connected`."""
        wanted = (State.UP,) if connected else (State.DOWN, State.CLOSED)
        await self._state.wait_value(lambda state: state in wanted or state is State.CLOSED)
        if connected:
            self._check_open()

    @abc.abstractmethod
    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """See `Transport.run`."""

    @abc.abstractmethod
    async def flush(self) -> None:
        """See `Transport.flush`."""

    @abc.abstractmethod
    def open_request(
        self, subject: str, data: bytes
    ) -> AbstractAsyncContextManager[AsyncIterator[Reply]]:
        """See `Transport.open_request`."""

    async def request(self, subject: str, data: bytes, *, timeout: float) -> Reply:
        """See `Transport.request`."""
        async with self.open_request(subject, data) as answers:
            with trio.move_on_after(timeout):
                return await anext(answers)
        self._check_open()
        raise TransportBroken(f"no answer on {subject} within {timeout:g} s")

    @abc.abstractmethod
    def _subscribe(self, number: int, mailbox: Mailbox) -> None: ...

    @abc.abstractmethod
    def _unsubscribe(self, number: int, mailbox: Mailbox) -> None: ...

    @asynccontextmanager
    async def open_subscription(
        self, subject: str, *, capacity: int = SUBSCRIPTION_MESSAGES
    ) -> AsyncGenerator[AsyncIterator[Message], None]:
        """See `Transport.open_subscription`."""
        self._check_open()
        check_pattern(subject)
        number, mailbox = next(self._numbers), Mailbox(subject, capacity)
        self._mailboxes[number] = mailbox
        self._subscribe(number, mailbox)
        try:
            with contextlib.suppress(TransportBroken):
                await self.flush()
            yield mailbox
        finally:
            del self._mailboxes[number]
            mailbox.close()
            self._unsubscribe(number, mailbox)

    def _deliver(self, mailbox: Mailbox, message: Message) -> None:
        if self._state.value is State.CLOSED:
            # A closed mailbox raises, and the caller may be a callback that must not raise.
            return
        self._received += 1
        if not mailbox.deliver(message):
            self._dropped += 1

    def note_error(self, error: str) -> None:
        """Keep an error that did not end the connection."""
        if error in self.complaints:
            self.complaints.remove(error)
        self.complaints.append(error)
        self._note(error)

    def _note_up(self) -> None:
        self._last_error = self.failure = None

    def _note_down(self, failure: TransportBroken) -> None:
        """Keep the reason why there is no connection."""
        error = str(failure)
        # The same failure over and over is one error to report.
        if error != self._last_error:
            self._note(error)
        self._last_error, self.failure = error, failure

    def _note(self, error: str) -> None:
        # One that comes again and again must not push the others out.
        others = (entry for entry in self._errors if entry[1] != error)
        self._errors = deque((*others, (local_ns(), error)), maxlen=_ERRORS)
        self.noted.unpark_all()

    def _check_open(self) -> None:
        if self._state.value is State.CLOSED:
            raise TransportClosed("the transport has been closed")

    def _check_message(self, subject: str, data: bytes, reply: str = "") -> None:
        self._check_open()
        check_subject(subject)
        if reply:
            check_subject(reply)
        if len(data) > self.max_payload:
            raise ValueError(
                f"a message of {len(data)} bytes is over the {self.max_payload} allowed"
            )
        self._check_connected()

    def _check_connected(self) -> None:
        self._check_open()
        if not self.connected:
            raise TransportBroken(self._last_error or "there is no connection yet")

    def _close(self) -> None:
        self._state.value = State.CLOSED
        for mailbox in self._mailboxes.values():
            mailbox.close()

    def statistics(self) -> TransportStatistics:
        """See `Transport.statistics`."""
        return TransportStatistics(
            connects=self.generation,
            received=self._received,
            dropped=self._dropped,
            permission_errors=self._permission_errors,
            last_error=self._last_error,
            recent_errors=tuple(self._errors),
            refused=tuple(self._refused.items()),
        )
