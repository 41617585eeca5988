"""A simulated nats-server, and the network to it.

A machine has one `Link` to the server, with a `Way` in each direction. Messages on one way keep
their order and are delayed. A client has a `Connection` over a link, until it is lost or replaced.
Each end of a connection may know only later than the other that it was lost. As in TCP, a message
to an end that has given up the connection is answered by a reset.

Core messages are sent once: a message that a `Way` loses is lost. `JetStream` answers requests to
JetStream. It can be silent, refuse, answer late, or lose its answer after it has done what was
asked.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, Final, Literal, NamedTuple, Protocol, TypeAlias, final

from processes import MS, SECOND, Process, World

from backbeat_trio._transport.protocol import matches
from backbeat_trio._transport.store import Entry

INBOX: Final = "_INBOX."
# When a client gives up a connection that is silent: it pings every second, and two may be out.
_SILENT_NS: Final = (2 * SECOND, 3 * SECOND)
# When what was swallowed is sent again, once there is a way again.
_AGAIN_NS: Final = 200 * MS
# For how long the stream of claims knows an id again.
_DUPLICATES_NS: Final = 600 * SECOND

Trouble: TypeAlias = Literal["silent", "refusing", "losing answers", "late"]


@final
class Way:
    """One direction of a link. Messages keep their order and take their time; some are lost."""

    def __init__(self, world: World, chance: random.Random, base_ns: int, jitter_ns: int) -> None:
        self.extra_ns: int = 0
        """What a fault adds to the time that messages take."""
        self.holes: int = 0
        """How many faults swallow what is sent."""
        self.lost = self.doubled = self.late = 0.0
        """What share of core messages a fault loses, doubles and delays."""
        self._world, self._chance = world, chance
        self._base_ns, self._jitter_ns = base_ns, jitter_ns
        self._last_ns = 0
        self._swallowed: list[tuple[Callable[..., None], tuple[Any, ...]]] = []

    def send(self, function: Callable[..., None], *args: Any, core: bool = False) -> None:
        """Have a function called at the other end."""
        if self.holes:
            self._swallowed.append((function, args))
            return
        times = 1
        late = 0
        if core and (self.lost or self.doubled or self.late):
            lot = self._chance.random()
            if lot < self.lost:
                return
            if lot < self.lost + self.doubled:
                times = 2
            elif lot < self.lost + self.doubled + self.late:
                late = round(self._chance.uniform(0, 0.5) * SECOND)
        spread = self._jitter_ns and round(
            min(self._chance.expovariate(1.0), 5.0) * self._jitter_ns
        )
        when = self._world.now + self._base_ns + self.extra_ns + spread + late
        self._last_ns = when = max(when, self._last_ns)
        for _ in range(times):
            self._world.at(when, function, *args)

    def mend(self) -> None:
        """End one of the faults that swallow; what was swallowed is sent again after the last."""
        self.holes -= 1
        if self.holes:
            return
        swallowed, self._swallowed = self._swallowed, []
        self._last_ns = max(
            self._last_ns, self._world.now + round(self._chance.random() * _AGAIN_NS)
        )
        for function, args in swallowed:
            self.send(function, *args)


@final
class Link:
    """What leads from a machine to the server."""

    def __init__(
        self, world: World, name: str, *, up_ns: int, down_ns: int, jitter_ns: int
    ) -> None:
        self.world: World = world
        self.up: Way = Way(world, world.chance(name, "up"), up_ns, jitter_ns)
        self.down: Way = Way(world, world.chance(name, "down"), down_ns, jitter_ns)
        self.cuts: int = 0
        """How many faults cut it, so that nobody can connect."""
        self.troubles: int = 0
        """How many faults of any kind there are at present."""
        self.changed_ns: int = 0
        """When a fault began or ended last."""
        self.way_ns: int = up_ns + down_ns
        """What a message takes there and back, at the least."""
        self.connection: Connection | None = None
        self._chance = world.chance(name, "silence")
        self._holes = 0

    def note_trouble(self, by: int) -> None:
        """Take note that faults have begun, or ended."""
        self.troubles += by
        self.changed_ns = self.world.now

    def cut(self) -> None:
        """Cut it: both ends learn of it at once."""
        self.cuts += 1
        self.note_trouble(1)
        connection = self.connection
        if connection is not None:
            connection.close_server()
            connection.lose("the connection was reset")

    def join(self) -> None:
        """End a cut."""
        self.cuts -= 1
        self.note_trouble(-1)

    def tear(self, *, up: bool, down: bool) -> None:
        """Swallow what is sent up, or down, or both. Nobody is told of it."""
        self.note_trouble(1)
        self.up.holes += up
        self.down.holes += down
        self._holes += 1
        self._expect_silence(self._holes)

    def mend(self, *, up: bool, down: bool) -> None:
        """End that."""
        self.note_trouble(-1)
        self._holes += 1
        if up:
            self.up.mend()
        if down:
            self.down.mend()
        if self.up.holes or self.down.holes:
            self._expect_silence(self._holes)

    def _expect_silence(self, holes: int) -> None:
        wait = round(self._chance.uniform(*_SILENT_NS))
        self.world.at(self.world.now + wait, self._notice, holes)

    def _notice(self, holes: int) -> None:
        if holes != self._holes or self.connection is None:
            return
        if self.connection.process.stopped:
            # Nobody waits for the answers to pings meanwhile.
            self._expect_silence(holes)
        else:
            self.connection.lose("no answer to pings")


class Client(Protocol):
    """The client's side of a connection."""

    def opened(self, connection: Connection) -> None:
        """Use a connection that stands."""

    def failed(self, connection: Connection, error: str) -> None:
        """Learn that a connection could not be made, or is lost."""

    def delivered(self, number: int, subject: str, data: bytes, reply: str) -> None:
        """Take a message for a subscription."""

    def answered(self, token: int, answer: object) -> None:
        """Take the answer to a request."""


@final
class Connection:
    """A connection of a client, and its subscriptions on the server."""

    def __init__(self, server: Server, link: Link, process: Process, client: Client) -> None:
        self.process: Process = process
        self.number: int = 0
        """Tells connections apart in inboxes."""
        self.opened_ns: int = 0
        self.subjects: dict[int, str] = {}
        self._server, self._link, self._client = server, link, client
        self._client_open = True
        self._server_open = False

    def connect(self) -> None:
        """Begin: TCP's handshake, and then that of NATS."""
        self._link.up.send(self._greet, 2)

    def _greet(self, rounds: int) -> None:
        if self._link.cuts or not self._server.up:
            self._link.down.send(self._lost, "connection refused")
        elif rounds:
            self._link.down.send(self._link.up.send, self._greet, rounds - 1)
        elif self._client_open:
            self._server.add(self)
            self._server_open = True
            self._link.down.send(self._opened)

    def _opened(self) -> None:
        if self._client_open:
            self._link.connection = self
            self.opened_ns = self._link.world.now
            self.process.call(self._client.opened, self)

    # The client's end.

    def send(self, function: Callable[..., None], *args: Any, core: bool = False) -> None:
        """Have the server do something with this connection."""
        if self._client_open:
            self._link.up.send(self._at_server, function, args, core=core)

    def abandon(self) -> None:
        """Close it from the client's end, as the end of a process does, too."""
        if self._client_open:
            self._client_open = False
            self._link.up.send(self.close_server)

    def lose(self, why: str) -> None:
        """Give it up at the client's end, and tell the client."""
        if self._client_open:
            self.abandon()
            self.process.call(self._client.failed, self, why)

    def _lost(self, why: str) -> None:
        if self._client_open:
            self._client_open = False
            self.process.call(self._client.failed, self, why)

    def _at_client(self, function: Callable[..., None], args: tuple[Any, ...]) -> None:
        if self._client_open:
            self.process.call(function, *args)
        else:
            self._link.up.send(self.close_server)

    # The server's end.

    def _at_server(self, function: Callable[..., None], args: tuple[Any, ...]) -> None:
        if self._server_open:
            function(self, *args)
        else:
            self._link.down.send(self._lost, "the connection was reset")

    def close_server(self) -> None:
        """Close it at the server's end: its subscriptions are gone."""
        if self._server_open:
            self._server_open = False
            self._server.remove(self)

    def shut(self) -> None:
        """Close it from the server's end."""
        self.close_server()
        self._link.down.send(self._lost, "the server has closed the connection")

    def deliver(self, number: int, subject: str, data: bytes, reply: str) -> None:
        """Send a message to a subscription."""
        self._link.down.send(
            self._at_client, self._client.delivered, (number, subject, data, reply), core=True
        )

    def answer(self, token: int, answer: object, *, core: bool = False) -> None:
        """Send an answer to a request; None says that nobody is there to answer."""
        self._link.down.send(self._at_client, self._client.answered, (token, answer), core=core)


class Stored(NamedTuple):
    """A claim as the stream has stored it."""

    life: int
    """How often the server had lost its store by then."""
    number: str
    subject: str
    data: bytes


@final
class JetStream:
    """The record's key under compare-and-set, and the stream of terminal claims."""

    def __init__(self, world: World, chance: random.Random) -> None:
        self.entry: Entry = Entry(b"", 0)
        self.life: int = 0
        """How often all of it was lost."""
        self.stored: list[Stored] = []
        """Every claim that was ever stored."""
        self.on_write: Callable[[Process, bytes, int], None] = lambda process, data, life: None
        self.troubles: list[tuple[Trouble, float]] = []
        """The faults at present, each with its seconds where it has some."""
        self.changed_ns: int = 0
        """When one of them began or ended last."""
        self._world, self._chance = world, chance
        self._ids: dict[str, int] = {}

    @property
    def well(self) -> bool:
        """Whether it answers as it should."""
        return not self.troubles

    def begin(self, trouble: Trouble, seconds: float) -> None:
        """Begin to misbehave."""
        self.troubles.append((trouble, seconds))
        self.changed_ns = self._world.now

    def end(self, trouble: Trouble, seconds: float) -> None:
        """End that."""
        self.troubles.remove((trouble, seconds))
        self.changed_ns = self._world.now

    def wipe(self) -> None:
        """Lose all that is stored."""
        self.entry, self.life = Entry(b"", 0), self.life + 1
        self._ids.clear()

    def ask(self, connection: Connection, token: int, what: str, *args: Any) -> None:
        """Do what a client asks for, and answer."""
        troubles = dict(self.troubles)
        if "silent" in troubles:
            return
        after = round(self._chance.uniform(0.2, 0.6) * MS)
        answer: object
        if "refusing" in troubles and what != "read":
            answer = "refused"
        else:
            answer = getattr(self, f"_{what}")(connection, *args)
        if "losing answers" in troubles and what in ("write", "store"):
            return
        if what != "read":
            after += round(troubles.get("late", 0) * SECOND)
        self._world.at(self._world.now + after, connection.answer, token, answer)

    def _read(self, connection: Connection) -> Entry:
        return self.entry

    def _write(self, connection: Connection, data: bytes, revision: int) -> int | None:
        if revision != self.entry.revision:
            return -1
        self.entry = Entry(data, revision + 1)
        self.on_write(connection.process, data, self.life)
        return revision + 1

    def _open(self, connection: Connection) -> bool:
        return True

    def _store(self, connection: Connection, subject: str, number: str, data: bytes) -> bool:
        if self._world.now - self._ids.get(number, -_DUPLICATES_NS) < _DUPLICATES_NS:
            return True
        self._ids[number] = self._world.now
        self.stored.append(Stored(self.life, number, subject, data))
        return True


@final
class Server:
    """The server: connections, subscriptions, and what it passes on."""

    def __init__(self, world: World) -> None:
        self.up: bool = True
        self.jetstream: JetStream = JetStream(world, world.chance("jetstream"))
        self.on_publish: Callable[[Connection, str, bytes], None] = lambda *args: None
        """Told of every message on a subject that is no inbox, as it passes the server."""
        self._world = world
        self._connections: dict[int, Connection] = {}
        self._numbers = 0
        self._interest: dict[str, dict[tuple[int, int], Connection]] = {}
        self._patterns: set[str] = set()

    def add(self, connection: Connection) -> None:
        """Take in a connection."""
        self._numbers += 1
        connection.number = self._numbers
        self._connections[connection.number] = connection

    def remove(self, connection: Connection) -> None:
        """Forget a connection and its subscriptions."""
        del self._connections[connection.number]
        for number in list(connection.subjects):
            self.unsubscribe(connection, number)

    def stop(self) -> None:
        """Go down: all connections are closed."""
        self.up = False
        for connection in list(self._connections.values()):
            connection.shut()

    def start(self, *, wiped: bool) -> None:
        """Come back, with what was stored or without it."""
        if wiped:
            self.jetstream.wipe()
        self.up = True

    def subscribe(self, connection: Connection, number: int, subject: str) -> None:
        """Take in a subscription."""
        connection.subjects[number] = subject
        self._interest.setdefault(subject, {})[connection.number, number] = connection
        if "*" in subject or ">" in subject:
            self._patterns.add(subject)

    def unsubscribe(self, connection: Connection, number: int) -> None:
        """End a subscription."""
        subject = connection.subjects.pop(number, None)
        if subject is not None:
            interest = self._interest[subject]
            del interest[connection.number, number]
            if not interest:
                del self._interest[subject]
                self._patterns.discard(subject)

    def publish(self, connection: Connection, subject: str, data: bytes, reply: str) -> None:
        """Pass on a message; where nobody is there for a request, say so."""
        if subject.startswith(INBOX):
            _, asking, token = subject.split(".")
            asker = self._connections.get(int(asking))
            if asker is not None:
                asker.answer(int(token), data, core=True)
            return
        self.on_publish(connection, subject, data)
        reached = list(self._interest.get(subject, {}).items())
        for pattern in sorted(self._patterns):
            if pattern != subject and matches(pattern, subject):
                reached += self._interest[pattern].items()
        for (_, number), other in reached:
            other.deliver(number, subject, data, reply)
        if not reached and reply:
            connection.answer(int(reply.rpartition(".")[2]), None)

    def ping(self, connection: Connection, token: int) -> None:
        """Answer a ping."""
        connection.answer(token, b"")

    def ask(self, connection: Connection, token: int, what: str, *args: Any) -> None:
        """Pass a request on to JetStream; a claim to be stored reaches listeners as well."""
        if what == "store" and self.jetstream.well:
            subject, _, data = args
            self.publish(connection, subject, data, "")
        self.jetstream.ask(connection, token, what, *args)
