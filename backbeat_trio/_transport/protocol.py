"""What carries messages: the protocol that sessions and metronomes speak, and the in-process bus.

A transport is run by a service of its user (`Transport.run`), delivers in order, promises nothing
about what was sent while no connection stood, and never makes a subscriber wait for another one.
"""

from __future__ import annotations

import abc
import contextlib
import enum
import itertools
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Final, NamedTuple, Protocol, final

import trio
from trio_util import AsyncValue

from .._errors import NoResponders, TransportBroken, TransportClosed
from .._grid.timeline import Timeline
from .._time.clock import local_ns

# Enough for a beat's claims of a large cluster; beyond it the newest are dropped and counted.
SUBSCRIPTION_MESSAGES: Final = 4096


class Message(NamedTuple):
    """One message as it arrived."""

    subject: str
    data: bytes
    reply: str
    """The subject on which an answer is expected, or an empty string."""
    received_ns: int
    """When it arrived at the socket, in local nanoseconds."""


class Reply(NamedTuple):
    """The answer to a request, with the instants at which both passed the socket, in local ns."""

    data: bytes
    sent_ns: int
    received_ns: int


class TransportStatistics(NamedTuple):
    """Counters of a transport since it was made."""

    connects: int
    """How many times a connection was made, the first included."""
    received: int
    dropped: int
    """Messages that came faster than they were taken in, and were dropped."""
    permission_errors: int
    last_error: str | None
    """Why there is no connection; None while one stands."""
    recent_errors: tuple[tuple[int, str], ...]
    """The newest things that went wrong, each with when it did, in local ns."""


class Transport(Protocol):
    """Publish, subscribe and request over subjects.

    Subjects are those of NATS: tokens between dots; in a subscription ``*`` stands for one token
    and ``>`` for all that follow.
    """

    @property
    def connected(self) -> bool:
        """Whether a connection stands."""
        ...

    async def wait_connected(self, connected: bool = True, /) -> None:
        """Wait until a connection stands, or until none does. A checkpoint.

        Raises:
          TransportClosed: where it will never stand again, as the transport was closed.
        """
        ...

    @property
    def generation(self) -> int:
        """A number that grows with every connection made."""
        ...

    @property
    def max_payload(self) -> int:
        """The largest message that the server takes, in bytes."""
        ...

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Connect, and keep connecting, until cancelled or closed."""
        ...

    async def first_attempt(self) -> None:
        """Wait for the outcome of the first attempt to connect. A checkpoint.

        Raises:
          TransportBroken: where it failed, or a subclass of it that tells why.

        """
        ...

    def publish_nowait(self, subject: str, data: bytes, *, reply: str = "") -> None:
        """Hand over a message for sending. Not a checkpoint.

        Raises:
          TransportBroken: where no connection stands.
          TransportClosed: where the transport was closed.
          ValueError: where the message is larger than `max_payload`.

        """
        ...

    async def publish(self, subject: str, data: bytes, *, reply: str = "") -> None:
        """Hand over a message for sending, after waiting while too much is under way. A checkpoint.

        Raises as `publish_nowait` does.
        """
        ...

    async def flush(self) -> None:
        """Wait until the server has taken in all that was published before. A checkpoint.

        Raises:
          TransportBroken: where the connection goes away meanwhile.

        """
        ...

    async def request(self, subject: str, data: bytes, *, timeout: float) -> Reply:
        """Send a message and wait for its first answer. A checkpoint.

        Args:
          timeout: seconds.

        Raises:
          NoResponders: where nobody is subscribed to the subject.
          TransportBroken: where no answer comes in time, or the connection goes away.

        """
        ...

    def open_subscription(
        self, subject: str, *, capacity: int = SUBSCRIPTION_MESSAGES
    ) -> AbstractAsyncContextManager[AsyncIterator[Message]]:
        """Subscribe for the length of a block.

        Where a connection stands, the server knows of the subscription once the block is entered.
        The subscription outlives reconnects; its iterator raises `TransportClosed` when the
        transport is closed. Entering and each step of the iterator are checkpoints.

        Args:
          capacity: how many messages may wait to be taken; later ones are dropped and counted.

        """
        ...

    async def aclose(self) -> None:
        """Close the transport; doing it again changes nothing. Releases even when cancelled."""
        ...

    def statistics(self) -> TransportStatistics:
        """Return the counters."""
        ...


def matches(pattern: str, subject: str) -> bool:
    """Tell whether a subject falls under a pattern of NATS's."""
    if pattern == subject:
        return True
    wanted, tokens = pattern.split("."), subject.split(".")
    for index, token in enumerate(wanted):
        if token == ">":
            return len(tokens) > index
        if index >= len(tokens) or (token != "*" and token != tokens[index]):
            return False
    return len(wanted) == len(tokens)


def check_subject(subject: str) -> None:
    """Refuse what no message can be published on."""
    if not all(map(_is_plain, subject.split("."))):
        raise ValueError(f"not a subject to publish on: {subject!r}")


def check_pattern(pattern: str) -> None:
    """Refuse what no subscription can be made to."""
    *tokens, last = pattern.split(".")
    plain = all(token == "*" or _is_plain(token) for token in tokens)
    if not plain or not (last in ("*", ">") or _is_plain(last)):
        raise ValueError(f"not a subject to subscribe to: {pattern!r}")


def _is_plain(token: str) -> bool:
    return bool(token) and token.isprintable() and not set(token) & set(" *>")


class State(enum.Enum):
    """What can be said of a transport's connection."""

    UP = enum.auto()
    DOWN = enum.auto()
    CLOSED = enum.auto()


@final
class Mailbox:
    """The receiving end of one subscription: bounded, and an async iterator of messages."""

    def __init__(self, subject: str, capacity: int) -> None:
        self.subject = subject
        self._send, self._receive = trio.open_memory_channel[Message](capacity)

    def deliver(self, message: Message) -> bool:
        """Take in a message; return whether there was room for it."""
        try:
            self._send.send_nowait(message)
        except trio.WouldBlock:
            return False
        return True

    def close(self) -> None:
        """End the iteration once what is there has been taken."""
        self._send.close()

    def __aiter__(self) -> Mailbox:
        return self

    async def __anext__(self) -> Message:
        try:
            return await self._receive.receive()
        except trio.EndOfChannel:
            raise TransportClosed("the transport has been closed") from None


class BaseTransport(abc.ABC):
    """What both transports share: mailboxes, counters, requests, and being closed."""

    def __init__(self, *, inbox_prefix: str = "_INBOX") -> None:
        self._state: AsyncValue[State] = AsyncValue(State.DOWN)
        self.generation = 0
        self.max_payload = 1024 * 1024
        self._inbox_prefix = inbox_prefix
        self._mailboxes: dict[int, Mailbox] = {}
        self._numbers = itertools.count(1)
        self._received = self._dropped = self._permission_errors = 0
        self._last_error: str | None = None
        self._errors: deque[tuple[int, str]] = deque(maxlen=16)

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
        self._received += 1
        if not mailbox.deliver(message):
            self._dropped += 1

    def note_error(self, error: str) -> None:
        """Keep an error for whoever looks at the statistics."""
        self._errors.append((local_ns(), error))

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
        )


@final
class MemoryBus:
    """An in-process bus: what is published on it reaches every transport on it at once.

    It also keeps the grid of the metronome that leads on it, so that the next one takes it over.
    """

    def __init__(self) -> None:
        self.leadership: trio.Lock = trio.Lock()
        self.grid: Timeline | None = None
        self.origin_ns = 0
        self.beats_per_bar = 0
        self.milli_bpm = 0
        self.epoch = 0
        self.high_water = -1
        self.users = 0
        self._mailboxes: dict[Mailbox, MemoryTransport] = {}

    def _publish(self, message: Message) -> bool:
        # Returns whether anybody is subscribed.
        reached = False
        for mailbox, owner in self._mailboxes.items():
            if owner.connected and matches(mailbox.subject, message.subject):
                owner._deliver(mailbox, message)
                reached = True
        return reached


_buses: Final[trio.lowlevel.RunVar[dict[str, MemoryBus]]] = trio.lowlevel.RunVar("backbeat buses")


@asynccontextmanager
async def open_memory_bus(name: str) -> AsyncGenerator[MemoryBus, None]:
    """Share the bus of this name with whoever else has it open in this Trio run."""
    try:
        buses = _buses.get()
    except LookupError:
        buses = {}
        _buses.set(buses)
    bus = buses.setdefault(name, MemoryBus())
    bus.users += 1
    try:
        yield bus
    finally:
        bus.users -= 1
        if not bus.users:
            del buses[name]


@final
class MemoryTransport(BaseTransport):
    """A transport over a `MemoryBus`; pure Trio, so it works in virtual time."""

    def __init__(self, bus: MemoryBus, *, inbox_prefix: str = "_INBOX") -> None:
        super().__init__(inbox_prefix=inbox_prefix)
        self.bus = bus

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """See `Transport.run`."""
        self.restore()
        task_status.started()
        try:
            await self._state.wait_value(State.CLOSED)
        finally:
            self._close()

    async def first_attempt(self) -> None:
        """See `Transport.first_attempt`."""
        await trio.lowlevel.checkpoint()

    def sever(self) -> None:
        """Cut the connection, as an outage would; for tests."""
        self._check_open()
        self._last_error = "the connection was severed"
        self.note_error(self._last_error)
        self._state.value = State.DOWN

    def restore(self) -> None:
        """Connect, or connect again after `sever`."""
        self._check_open()
        self.generation += 1
        self._last_error = None
        self._state.value = State.UP

    def publish_nowait(self, subject: str, data: bytes, *, reply: str = "") -> None:
        """See `Transport.publish_nowait`."""
        self._check_message(subject, data, reply)
        self.bus._publish(Message(subject, data, reply, local_ns()))

    async def publish(self, subject: str, data: bytes, *, reply: str = "") -> None:
        """See `Transport.publish`."""
        await trio.lowlevel.checkpoint()
        self.publish_nowait(subject, data, reply=reply)

    async def flush(self) -> None:
        """See `Transport.flush`."""
        await trio.lowlevel.checkpoint()
        self._check_connected()

    async def request(self, subject: str, data: bytes, *, timeout: float) -> Reply:
        """See `Transport.request`."""
        self._check_message(subject, data)
        inbox = f"{self._inbox_prefix}.{id(self):x}.{next(self._numbers)}"
        sent_ns = local_ns()
        async with self.open_subscription(inbox, capacity=1) as answers:
            if not self.bus._publish(Message(subject, data, inbox, sent_ns)):
                raise NoResponders(f"nobody answers on {subject}")
            with trio.move_on_after(timeout):
                answer = await anext(answers)
                return Reply(answer.data, sent_ns, answer.received_ns)
        raise TransportBroken(f"no answer on {subject} within {timeout:g} s")

    async def aclose(self) -> None:
        """See `Transport.aclose`."""
        self._close()
        await trio.lowlevel.checkpoint()

    def _subscribe(self, number: int, mailbox: Mailbox) -> None:
        self.bus._mailboxes[mailbox] = self

    def _unsubscribe(self, number: int, mailbox: Mailbox) -> None:
        del self.bus._mailboxes[mailbox]
