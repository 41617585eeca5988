"""The base class of the transports: mailboxes, counters, errors, and the end of a transport."""

from __future__ import annotations

import abc
import contextlib
import enum
import itertools
from collections import Counter, deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Final, final

import trio
from trio_util import AsyncValue

from .._errors import TransportBroken, TransportClosed
from .._time.local import local_ns
from .protocol import (
    SUBSCRIPTION_MESSAGES,
    Answers,
    Message,
    Reply,
    Subscription,
    TransportStatistics,
    check_pattern,
    check_queue,
    check_subject,
    is_subject,
)

# How many different errors are kept.
_ERRORS: Final = 16


class State(enum.Enum):
    """The state of a transport's connection."""

    UP = enum.auto()
    DOWN = enum.auto()
    CLOSED = enum.auto()


# Python looks members of an enum up in a slow way.
_UP: Final = State.UP
_CLOSED: Final = State.CLOSED


@final
class Mailbox:
    """The bounded queue of one subscription; see `Subscription`.

    Args:
      subject: the subject of the subscription.
      capacity: how many messages may wait.
      queue: its queue group, or an empty string.
      stop: has the server send no more messages, and waits until it sends none.
      optional: whether it is no error if permissions refuse the subscription.

    """

    def __init__(
        self,
        subject: str,
        capacity: int,
        queue: str = "",
        stop: Callable[[Mailbox], Awaitable[None]] | None = None,
        *,
        optional: bool = False,
    ) -> None:
        self.subject = subject
        self.queue = queue
        self.optional = optional
        self.refusal: str | None = None
        self._capacity = capacity
        self._stop = stop
        self._messages: deque[Message] = deque()
        self._lot = trio.lowlevel.ParkingLot()
        self._closed = False

    def deliver(self, message: Message) -> bool:
        """Queue a message, and return whether there was room for it."""
        if len(self._messages) >= self._capacity:
            return False
        self._messages.append(message)
        if self._lot:
            self._lot.unpark()
        return True

    @property
    def depth(self) -> int:
        """How many messages wait."""
        return len(self._messages)

    def close(self) -> None:
        """End the iteration after the messages that are queued."""
        self._closed = True
        self._lot.unpark_all()

    def __aiter__(self) -> Mailbox:
        return self

    async def __anext__(self) -> Message:
        await self._wait()
        return self._messages.popleft()

    async def batch(self) -> list[Message]:
        """See `Subscription.batch`."""
        await self._wait()
        return self.waiting()

    def waiting(self) -> list[Message]:
        """See `Subscription.waiting`."""
        messages = list(self._messages)
        self._messages.clear()
        return messages

    async def drain(self) -> None:
        """See `Subscription.drain`."""
        await trio.lowlevel.checkpoint()
        if self._stop is not None:
            await self._stop(self)

    async def _wait(self) -> None:
        if self._messages:
            await trio.lowlevel.checkpoint()
        # Another task may have taken what this one was woken for.
        while not self._messages:
            if self._closed:
                await trio.lowlevel.checkpoint()
                raise TransportClosed("the transport has been closed")
            await self._lot.park()


class BaseTransport(abc.ABC):
    """The part that both transports share: mailboxes, counters, and the state."""

    def __init__(self, *, inbox_prefix: str = "_INBOX") -> None:
        self._state: AsyncValue[State] = AsyncValue(State.DOWN)
        self.generation = 0
        self.max_payload = 1024 * 1024
        self._inbox_prefix = inbox_prefix
        self._mailboxes: dict[int, Mailbox] = {}
        # What is called if one of the requests is given up, by the subject of its answer.
        self._abandoned: dict[str, Callable[[str, BaseException], object]] = {}
        self._numbers = itertools.count(1)
        self._received = self._dropped = self._permission_errors = self._late_replies = 0
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
        self, subject: str, data: bytes, *, headers: Mapping[str, str] | None = None
    ) -> AbstractAsyncContextManager[Answers]:
        """See `Transport.open_request`."""

    async def request(
        self,
        subject: str,
        data: bytes,
        *,
        timeout: float,
        headers: Mapping[str, str] | None = None,
        abandoned: Callable[[str, BaseException], object] | None = None,
    ) -> Reply:
        """See `Transport.request`."""
        async with self.open_request(subject, data, headers=headers) as answers:
            if abandoned is not None:
                self._abandoned[answers.reply] = abandoned
            try:
                with trio.move_on_after(timeout):
                    return await anext(answers)
            except BaseException as error:
                if not isinstance(error, Exception):
                    self._abandon(answers.reply, error)
                raise
            finally:
                self._abandoned.pop(answers.reply, None)
        self._check_open()
        raise TransportBroken(f"no answer on {subject} within {timeout:g} s")

    def _abandon(self, reply: str, error: BaseException) -> None:
        abandoned = self._abandoned.pop(reply, None)
        if abandoned is not None:
            abandoned(reply, error)

    @abc.abstractmethod
    def _subscribe(self, number: int, mailbox: Mailbox) -> None: ...

    @abc.abstractmethod
    def _unsubscribe(self, number: int, mailbox: Mailbox, *, keep: bool) -> None: ...

    @asynccontextmanager
    async def open_subscription(
        self,
        subject: str,
        *,
        capacity: int = SUBSCRIPTION_MESSAGES,
        queue: str = "",
        optional: bool = False,
        confirmed: bool = True,
    ) -> AsyncGenerator[Subscription, None]:
        """See `Transport.open_subscription`."""
        self._check_open()
        check_pattern(subject)
        check_queue(queue)
        number = next(self._numbers)

        async def stop(mailbox: Mailbox) -> None:
            if number in self._mailboxes:
                self._unsubscribe(number, mailbox, keep=True)
                with contextlib.suppress(TransportBroken):
                    await self.flush()

        mailbox = Mailbox(subject, capacity, queue, stop, optional=optional)
        self._mailboxes[number] = mailbox
        self._subscribe(number, mailbox)
        try:
            if confirmed:
                with contextlib.suppress(TransportBroken):
                    await self.flush()
            else:
                await trio.lowlevel.checkpoint()
            yield mailbox
        finally:
            del self._mailboxes[number]
            mailbox.close()
            self._unsubscribe(number, mailbox, keep=False)

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
        if self._state.value is _CLOSED:
            raise TransportClosed("the transport has been closed")

    def _check_message(
        self, subject: str, data: bytes, reply: str = "", block: bytes = b""
    ) -> None:
        state = self._state.value
        if state is _CLOSED:
            self._check_open()
        check_subject(subject)
        # Replies of a connection are all different, so the cache would not help.
        if reply and not is_subject(reply):
            raise ValueError(f"not a subject to reply to: {reply!r}")
        size = len(data) + len(block)
        if size > self.max_payload:
            raise ValueError(f"a message of {size} bytes is over the {self.max_payload} allowed")
        if state is not _UP:
            self._check_connected()

    def _check_connected(self) -> None:
        self._check_open()
        if not self.connected:
            raise TransportBroken(self._last_error or "there is no connection yet")

    def _close(self) -> None:
        # While something can still be sent.
        for reply in list(self._abandoned):
            self._abandon(reply, TransportClosed("the transport has been closed"))
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
            late_replies=self._late_replies,
            waiting=sum(mailbox.depth for mailbox in self._mailboxes.values()),
            unsent_bytes=self._unsent_bytes(),
        )

    def _unsent_bytes(self) -> int:
        return 0
