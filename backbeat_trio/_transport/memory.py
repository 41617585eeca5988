"""The in-process bus, and the transport over it."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Final, final

import msgspec
import trio

from .._errors import NoResponders, TransportBroken
from .._time.local import local_ns
from .._wire import decode_claims, is_terminal, status_subject
from .archive import Stored
from .base import BaseTransport, Mailbox, State
from .headers import decode_headers, encode_headers
from .protocol import Answers, Message, Reply, matches
from .store import MemoryStore

# How many terminal claims a bus keeps.
_STORED: Final = 10_000
# How many of them are read at once.
_AT_ONCE: Final = 64
_CLAIMS: Final = status_subject("")
_NONE: Final[dict[Mailbox, MemoryTransport]] = {}


@final
class MemoryArchive:
    """The newest terminal claims on a bus; see `Archive`."""

    lag: Final = 0.0

    def __init__(self) -> None:
        # Each with when it was stored, in local nanoseconds.
        self._stored: dict[int, tuple[int, Message]] = {}
        self._last = 0

    def keep(self, message: Message) -> Message:
        """Store a message if it is a terminal claim; return it, with an id if it was stored."""
        # Arrays hold claims of live operations only.
        if not message.data.startswith(b"{"):
            return message
        try:
            (claim,) = decode_claims(message.data)
        except msgspec.DecodeError:
            return message
        if not is_terminal(claim):
            return message
        self._last += 1
        message = message._replace(id=str(self._last))
        self._stored[self._last] = local_ns(), message
        if len(self._stored) > _STORED:
            del self._stored[next(iter(self._stored))]
        return message

    async def first_since(self, seconds: float) -> int:
        """See `Archive.first_since`."""
        await trio.lowlevel.checkpoint()
        since = local_ns() - seconds * 1e9
        recent = (number for number, (when, _) in self._stored.items() if when >= since)
        return next(recent, self._last + 1)

    async def last(self) -> int:
        """See `Archive.last`."""
        await trio.lowlevel.checkpoint()
        return self._last

    async def read(self, subject: str, number: int) -> Sequence[Stored]:
        """See `Archive.read`."""
        await trio.lowlevel.checkpoint()
        found: list[Stored] = []
        for each in range(max(number, next(iter(self._stored), 1)), self._last + 1):
            message = self._stored[each][1]
            if matches(subject, message.subject):
                found.append(Stored(each, message))
                if len(found) == _AT_ONCE:
                    break
        return found


@final
class MemoryBus:
    """A bus inside of a process: a message on it reaches all transports on the bus at once.

    A session whose ``nats_url`` is ``memory://<name>`` opens the bus of that name. A program that
    makes its own bus gives it to each `MemoryTransport` on it. The bus keeps the grid of each
    cluster, which the next metronome continues, and the newest 10,000 terminal claims.

    Attributes:
      users: how many sessions have opened the bus by its name.
      archive: the newest terminal claims, for `Session.open_claims`.

    """

    users: int
    archive: MemoryArchive

    def __init__(self) -> None:
        self.users = 0
        self.archive = MemoryArchive()
        self._stores: dict[str, MemoryStore] = {}
        # By the first token of their subjects, as most of a message's subject then match.
        self._mailboxes: defaultdict[str, dict[Mailbox, MemoryTransport]] = defaultdict(dict)
        self._requests: dict[str, _Replies] = {}
        # How many messages each queue group has had, for its members to take turns.
        self._turns: Counter[str] = Counter()

    def _store_of(self, cluster_id: str) -> MemoryStore:
        # The metronomes of a cluster share it.
        return self._stores.setdefault(cluster_id, MemoryStore())

    @property
    def subjects(self) -> list[str]:
        """The subjects of all subscriptions."""
        return [mailbox.subject for same in self._mailboxes.values() for mailbox in same]

    def _publish(self, message: Message) -> bool:
        # Return whether there is a subscription to the subject.
        subject = message.subject
        if subject.startswith(_CLAIMS):
            message = self.archive.keep(message)
        answered = self._requests.get(subject)
        reached = answered is not None
        if answered is not None:
            answered.take(message)
        groups: dict[str, list[tuple[Mailbox, MemoryTransport]]] = {}
        for first in (_first(subject), "*", ">"):
            for mailbox, owner in self._mailboxes.get(first, _NONE).items():
                if owner.connected and matches(mailbox.subject, subject):
                    if mailbox.queue:
                        groups.setdefault(mailbox.queue, []).append((mailbox, owner))
                    else:
                        owner._deliver(mailbox, message)
                        reached = True
        for queue, members in groups.items():
            mailbox, owner = members[self._turns[queue] % len(members)]
            self._turns[queue] += 1
            owner._deliver(mailbox, message)
        return reached or bool(groups)


def _first(subject: str) -> str:
    return subject.partition(".")[0]


_buses: Final[trio.lowlevel.RunVar[dict[str, MemoryBus]]] = trio.lowlevel.RunVar("backbeat buses")


@asynccontextmanager
async def open_memory_bus(name: str) -> AsyncGenerator[MemoryBus, None]:
    """Open the bus of this name, which all sessions in this Trio run share by that name."""
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
    """A `Transport` on a `MemoryBus`. It works in virtual time.

    Args:
      bus: the bus.
      inbox_prefix: the beginning of the subjects on which answers arrive.

    """

    def __init__(self, bus: MemoryBus, *, inbox_prefix: str = "_INBOX") -> None:
        super().__init__(inbox_prefix=inbox_prefix)
        self.bus = bus
        self._requests: dict[str, _Replies] = {}

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
        """Cut the connection, as an outage does, until `restore` is called. Not a checkpoint.

        It is for tests.

        Raises:
          TransportClosed: if the transport was closed.

        """
        self._check_open()
        self._note_down(TransportBroken("the connection was severed"))
        self._state.value = State.DOWN
        self._wake_requests()

    def restore(self) -> None:
        """Connect, or connect again after `sever`. Not a checkpoint.

        Raises:
          TransportClosed: if the transport was closed.

        """
        self._check_open()
        self.generation += 1
        self._note_up()
        self._state.value = State.UP

    def publish_nowait(
        self,
        subject: str,
        data: bytes,
        *,
        reply: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """See `Transport.publish_nowait`."""
        self._publish(subject, data, reply, headers)

    def _publish(
        self, subject: str, data: bytes, reply: str, headers: Mapping[str, str] | None
    ) -> bool:
        block = encode_headers(headers) if headers else b""
        self._check_message(subject, data, reply, block)
        # Others get the headers as they would read them.
        read = decode_headers(block)[1] if block else None
        return self.bus._publish(Message(subject, data, reply, local_ns(), "", read))

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
        self._check_connected()

    @asynccontextmanager
    async def open_request(
        self, subject: str, data: bytes, *, headers: Mapping[str, str] | None = None
    ) -> AsyncGenerator[Answers, None]:
        """See `Transport.open_request`."""
        inbox = f"{self._inbox_prefix}.{id(self):x}.{next(self._numbers)}"
        # As over a network, others have their turn before anybody can answer.
        await trio.lowlevel.checkpoint()
        replies = _Replies(self, inbox, subject)
        self.bus._requests[inbox] = self._requests[inbox] = replies
        try:
            replies.reached = self._publish(subject, data, inbox, headers)
            yield replies
        finally:
            del self.bus._requests[inbox], self._requests[inbox]

    async def aclose(self) -> None:
        """See `Transport.aclose`."""
        self._close()
        await trio.lowlevel.checkpoint()

    def _subscribe(self, number: int, mailbox: Mailbox) -> None:
        self.bus._mailboxes[_first(mailbox.subject)][mailbox] = self

    def _unsubscribe(self, number: int, mailbox: Mailbox, *, keep: bool) -> None:
        same = self.bus._mailboxes[_first(mailbox.subject)]
        same.pop(mailbox, None)
        if not same:
            del self.bus._mailboxes[_first(mailbox.subject)]

    def _close(self) -> None:
        super()._close()
        self._wake_requests()

    def _wake_requests(self) -> None:
        for replies in self._requests.values():
            replies.wake()


@final
class _Replies:
    """The answers to one request; see `Answers`."""

    def __init__(self, transport: MemoryTransport, reply: str, subject: str) -> None:
        self.reply: str = reply
        self.reached = True
        self._transport = transport
        self._generation = transport.generation
        self._subject = subject
        self._sent_ns = local_ns()
        self._answers: deque[Message] = deque()
        self._lot = trio.lowlevel.ParkingLot()

    def take(self, answer: Message) -> None:
        """Take an answer, unless the connection was lost since the request."""
        if self._transport.connected and self._transport.generation == self._generation:
            self._transport._received += 1
            self._answers.append(answer)
            self._lot.unpark_all()

    def wake(self) -> None:
        """Have whoever waits look whether an answer can still come."""
        self._lot.unpark_all()

    def __aiter__(self) -> _Replies:
        return self

    async def __anext__(self) -> Reply:
        if self._answers or not self.reached:
            await trio.lowlevel.checkpoint()
        while not self._answers:
            if not self.reached:
                raise NoResponders(f"no process is subscribed to {self._subject}")
            self._transport._check_connected()
            if self._transport.generation != self._generation:
                raise TransportBroken("the connection was lost")
            await self._lot.park()
        answer = self._answers.popleft()
        return Reply(answer.data, self._sent_ns, answer.received_ns, answer.headers)
