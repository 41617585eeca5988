"""The operations of an agent, their six phases, and the claims that say so.

Nothing here reads a clock or sends a message; the session's `Host` does both.
"""

from __future__ import annotations

import enum
import secrets
from collections.abc import Iterable
from typing import Any, Final, Protocol, TypeAlias, final

import trio
from msgspec import UNSET, Raw, UnsetType

from .._checks import check_integer
from .._errors import InvalidTransition, OperationExists, OperationNotFound
from .._wire import MAX_NAME, ClaimState, LiveClaim, StatusClaim, encode_details
from .instruments import NONE, Instruments


class Phase(enum.IntEnum):
    """The phases of an operation, in their order.

    An operation may skip phases, and cannot go back. It can fail in any phase before it has
    completed.

    Attributes:
      STARTED: the operation was started. This is the first phase.
      CONNECTING: it connects to its peers.
      NEGOTIATING: it agrees with them on what to do.
      EXECUTING: it does its work.
      COMPLETED: it has ended well.
      FAILED: it has failed.

    """

    STARTED = 0
    CONNECTING = 1
    NEGOTIATING = 2
    EXECUTING = 3
    COMPLETED = 4
    FAILED = 5

    @property
    def final(self) -> bool:
        """Whether the operation has ended: `COMPLETED` or `FAILED`."""
        return self >= Phase.COMPLETED


ESTIMATES: Final = {
    "peer_discovery": (2, 5),
    "dht_store": (2, 4),
    "dht_retrieve": (1, 3),
    "pubsub_sync": (1, 2),
    "election": (3, 10),
    "task_coordination": (5, 20),
}
"""The least and the most beats that operations of the known types take; the most is the default."""

DEFAULT_ESTIMATE: Final = 8
"""The default estimate of operations of all other types, in beats."""

# How many descriptions are kept, to be shared by operations that are alike.
_DESCRIPTIONS: Final = 1024
# An id that was not given begins with the type, of which it has at most this many characters.
_TYPE_IN_ID: Final = 100
# A name of its own, because each operation is compared with it on each beat.
_COMPLETED: Final = Phase.COMPLETED


class Host(Protocol):
    """What the operations call of the session that they belong to."""

    def current_beat(self) -> int:
        """Return the index of the present beat."""
        ...

    def check_open(self) -> None:
        """Raise `SessionClosed` if the session was left."""
        ...

    def emit(self, claim: StatusClaim, *, terminal: bool = False) -> None:
        """Queue a claim."""
        ...


def check_name(name: str, value: str) -> str:
    """Return a type, an id or a reason; raise unless a message can carry it."""
    # It must fit into any message, and unlike notes it cannot be shortened.
    if len(_text(name, value)) > MAX_NAME:
        raise ValueError(f"`{name}` must have at most {MAX_NAME} characters")
    return value


def check_estimate(type: str, beats: int | None) -> int:
    """Return the estimate of an operation of a type; raise unless both arguments are valid."""
    check_name("type", type)
    if beats is None:
        return ESTIMATES.get(type, (0, DEFAULT_ESTIMATE))[1]
    return check_integer("beats", beats, 1)


def _text(name: str, value: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"`{name}` must be a str, not {value!r}")
    if not value:
        raise ValueError(f"`{name}` must not be empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        # Encoding the claim would raise later, where the caller does not see it.
        raise ValueError(f"`{name}` has no encoding in UTF-8: {error.reason}") from None
    return value


_Fields: TypeAlias = tuple[str, Phase, int, int, str | UnsetType, str | UnsetType, bool | UnsetType]


@final
class _Description:
    # The part of an operation's claims that stays the same between its changes. Operations for
    # which it is equal share one object, because there may be a hundred thousand of them.

    __slots__ = ("encoded", "notes", "phase")

    def __init__(self, notes: str, phase: str, encoded: Raw) -> None:
        self.notes = notes
        self.phase = phase
        self.encoded = encoded


@final
class Operation:
    """A piece of distributed work, whose progress the session publishes as claims.

    `Session.operation` and `Session.start_operation` make it. You cannot call the class. Its
    methods change its state and queue a claim, without waiting for the server. Once the operation
    has ended they raise `InvalidTransition`.

    Attributes:
      id: the name of the operation.
      type: what kind of work it is, such as ``"election"``.
      beats: the estimate: how many beats it will probably take, 1 or more.
      data: the object that was given when it was started. It stays in this process.
      phase: the present `Phase`.
      peers: how many peers take part, 0 or more.
      soft: whether it should wind down, because a soft edge around it has passed.

    """

    __slots__ = (
        "_correlation_id",
        "_description",
        "_parent",
        "_start",
        "_table",
        "beats",
        "data",
        "id",
        "peers",
        "phase",
        "soft",
        "type",
    )

    id: str
    type: str
    beats: int
    data: Any
    phase: Phase
    peers: int
    soft: bool
    _parent: str | UnsetType
    _correlation_id: str | UnsetType
    _description: _Description
    _start: int
    _table: Operations

    def __init__(self) -> None:
        raise TypeError("operations are made by `Session.operation` and `Session.start_operation`")

    def advance(self, phase: Phase, *, peers: int | None = None) -> None:
        """Go on to a later phase, and queue a claim that says so. Not a checkpoint.

        To stay in the present phase is allowed, and queues a claim, too. So work that is tried
        again must not begin with an earlier phase: stay in the phase that was reached, or use a new
        operation for each attempt.

        Args:
          phase: the phase, up to `Phase.EXECUTING`. It may skip some.
          peers: how many peers take part, 0 or more; None leaves the count as it was.

        Raises:
          InvalidTransition: if the phase is an earlier one, `Phase.COMPLETED` or `Phase.FAILED`, or
            if the operation has ended.
          TypeError, ValueError: if ``phase`` is not a phase, or ``peers`` is not a number of peers.
          SessionClosed: if the session was left.

        """
        self._table.advance(self, phase, peers)

    def complete(self, *, peers: int | None = None) -> None:
        """End the operation as completed, and queue its terminal claim. Not a checkpoint.

        Args:
          peers: how many peers took part, 0 or more; None leaves the count as it was.

        Raises:
          InvalidTransition: if the operation has ended.
          TypeError, ValueError: if ``peers`` is not a number of peers.
          SessionClosed: if the session was left.

        """
        self._table.complete(self, peers)

    def fail(self, reason: str) -> None:
        """End the operation as failed, and queue its terminal claim. Not a checkpoint.

        Args:
          reason: why, for people to read. It becomes a part of the claim's notes.

        Raises:
          InvalidTransition: if the operation has ended.
          TypeError, ValueError: if ``reason`` is not a string, or is empty.
          SessionClosed: if the session was left.

        """
        self._table.fail(self, reason)

    @property
    def parent(self) -> str | None:
        """The operation that this one is a part of, as ``<agent id>/<operation id>``, or None."""
        return self._parent or None

    @property
    def correlation_id(self) -> str:
        """The outermost of the operations around this one; itself if it has no parent."""
        return self._correlation_id or f"{self._table.agent_id}/{self.id}"

    @property
    def beats_left(self) -> int:
        """How many beats of the estimate are left; 0 if none are, or the operation has ended."""
        if self.phase.final:
            return 0
        return max(0, self.beats - (self._table.current_beat() - self.start_beat))

    @property
    def start_beat(self) -> int:
        """The index of the beat on which it was started, counted on the present grid."""
        return self._start + self._table._shift

    def __repr__(self) -> str:
        return (
            f"<Operation {self.id!r} type={self.type!r} phase={self.phase.name} beats={self.beats}>"
        )


@final
class Operations:
    """The live operations of an agent. It changes their phases, and queues their claims.

    Args:
      agent_id: the agent that the claims name.
      node_id: the node that their notes name.
      host: gives the present beat, and takes the claims.
      cluster_id: the cluster that the claims name.
      instruments: are told of all operations.

    """

    def __init__(
        self,
        agent_id: str,
        node_id: str,
        host: Host,
        cluster_id: str,
        instruments: Instruments = NONE,
    ) -> None:
        self.agent_id: str = agent_id
        self.cluster_id: str = cluster_id
        self._node_id = node_id
        self._host = host
        self._instruments = instruments
        self._live: dict[str, Operation] = {}
        self._descriptions: dict[_Fields, _Description] = {}
        # Start beats are stored minus this. So a move to another grid is a single addition, however
        # many operations live.
        self._shift = 0

    def __len__(self) -> int:
        return len(self._live)

    def current_beat(self) -> int:
        """Return the index of the present beat."""
        return self._host.current_beat()

    def rebase(self, beats: int) -> None:
        """Add a number of beats to all start beats, when the position moves to another grid."""
        self._shift += beats

    def live(self) -> list[Operation]:
        """Return the operations that live now, oldest first."""
        return list(self._live.values())

    def find(self, id: str) -> Operation:
        """Return the live operation that has an id.

        Raises:
          OperationNotFound: if no live operation has it.
          SessionClosed: if the session was left.

        """
        self._host.check_open()
        try:
            return self._live[id]
        except KeyError:
            raise OperationNotFound(f"no live operation {id!r}") from None

    # Ctrl-C must not end one of the next four methods half-way. A beat's claims would fail on an
    # operation that is half made, and an operation that has ended would never have said so.

    @trio.lowlevel.enable_ki_protection
    def start(
        self,
        type: str,
        *,
        id: str | None = None,
        beats: int | None = None,
        data: object = None,
        parent: str | UnsetType = UNSET,
        correlation_id: str | UnsetType = UNSET,
    ) -> Operation:
        """Start an operation; see `Session.start_operation`.

        Args:
          type: as there.
          id: as there.
          beats: as there.
          data: as there.
          parent: the operation that it is a part of, as ``<agent id>/<operation id>``.
          correlation_id: the outermost of the operations around it, in the same form.

        """
        self._host.check_open()
        operation = Operation.__new__(Operation)
        estimate = check_estimate(type, beats)
        operation.type = type
        if id is None:
            id = f"{type[:_TYPE_IN_ID]}-{secrets.token_hex(6)}"
        operation.id = check_name("id", id)
        operation.beats = estimate
        if id in self._live:
            raise OperationExists(f"operation {id!r} is live already")
        beat = self.current_beat()
        operation.data = data
        operation.phase = Phase.STARTED
        operation.peers = 0
        operation.soft = False
        operation._parent = parent
        operation._correlation_id = correlation_id
        operation._table = self
        operation._start = beat - self._shift
        self._describe(operation)
        self._live[id] = operation
        self._host.emit(self._claim(operation, beat))
        if self._instruments.operation_started:
            self._instruments.tell(self._instruments.operation_started, operation)
        return operation

    @trio.lowlevel.enable_ki_protection
    def advance(self, operation: Operation, phase: Phase, peers: int | None) -> None:
        """Move an operation to a later phase; see `Operation.advance`."""
        self._check(operation)
        phase = Phase(phase)
        if phase.final:
            verb = "complete" if phase is Phase.COMPLETED else "fail"
            raise InvalidTransition(f"operation {operation.id!r} gets to {phase.name} by `{verb}`")
        if phase < operation.phase:
            raise InvalidTransition(
                f"operation {operation.id!r} cannot go back "
                f"from {operation.phase.name} to {phase.name}"
            )
        count = operation.peers if peers is None else check_integer("peers", peers, 0)
        former, beat = operation.phase, self.current_beat()
        operation.phase, operation.peers = phase, count
        self._describe(operation)
        self._host.emit(self._claim(operation, beat))
        if self._instruments.operation_advanced:
            self._instruments.tell(self._instruments.operation_advanced, operation, former, beat)

    @trio.lowlevel.enable_ki_protection
    def complete(self, operation: Operation, peers: int | None) -> None:
        """End an operation as completed; see `Operation.complete`."""
        self._check(operation)
        count = operation.peers if peers is None else check_integer("peers", peers, 0)
        former, beat = operation.phase, self.current_beat()
        operation.phase, operation.peers = Phase.COMPLETED, count
        self._end(operation, former, beat, "done", 1.0)

    @trio.lowlevel.enable_ki_protection
    def fail(self, operation: Operation, reason: str) -> None:
        """End an operation as failed; see `Operation.fail`."""
        self._check(operation)
        _text("reason", reason)
        self._fail(operation, reason)

    def fail_all(self, reason: str) -> None:
        """End all live operations as failed. This is possible while the session is being left."""
        for operation in self.live():
            self._fail(operation, reason)

    def _fail(self, operation: Operation, reason: str) -> None:
        former, beat = operation.phase, self.current_beat()
        operation.phase = Phase.FAILED
        self._end(operation, former, beat, "failed", 0.0, reason)

    def claims(self, operations: Iterable[Operation], beat: int) -> list[LiveClaim]:
        """Return the claims of a beat, of those among ``operations`` that still live."""
        # The same as `_claim`, without a call for each, because most of a beat's time goes here.
        agent_id, since = self.agent_id, beat - self._shift
        return [
            LiveClaim(
                agent_id,
                operation.id,
                beat,
                "executing",
                left,
                (since - operation._start) / operation.beats,
                operation._description.encoded,
            )
            if (left := operation.beats - since + operation._start) > 0
            else LiveClaim(
                agent_id,
                operation.id,
                beat,
                "executing",
                0,
                1.0,
                operation._description.encoded,
            )
            for operation in operations
            if operation.phase < _COMPLETED
        ]

    def soften(self, operation: Operation) -> bool:
        """Have an operation's claims say that it should wind down; return whether that is new."""
        if operation.soft or operation.phase.final:
            return False
        operation.soft = True
        self._describe(operation)
        return True

    def _check(self, operation: Operation) -> None:
        # It does not look the id up, because that may belong to a later operation by now.
        if operation.phase.final:
            ended = operation.phase.name.lower()
            raise InvalidTransition(f"operation {operation.id!r} has ended: {ended}")
        self._host.check_open()

    def _describe(self, operation: Operation) -> None:
        fields = (
            *(operation.type, operation.phase, operation.peers, operation.beats),
            *(operation._parent, operation._correlation_id, operation.soft or UNSET),
        )
        found = self._descriptions.get(fields)
        if found is None:
            if len(self._descriptions) >= _DESCRIPTIONS:
                self._descriptions.clear()
            found = self._descriptions[fields] = self._description_of(*fields)
        operation._description = found

    def _description_of(
        self,
        type: str,
        phase: Phase,
        peers: int,
        beats: int,
        parent: str | UnsetType,
        correlation_id: str | UnsetType,
        soft: bool | UnsetType,
    ) -> _Description:
        name = phase.name.lower()
        notes = f"P2P {type}: {name} (peers: {peers}, node: {self._node_id})"
        encoded = encode_details(
            *(notes, self.cluster_id, type, name, peers, beats), parent, correlation_id, soft
        )
        return _Description(notes, name, encoded)

    def _claim(self, operation: Operation, beat: int) -> StatusClaim:
        passed = beat - operation._start - self._shift
        left = operation.beats - passed
        progress = passed / operation.beats if left > 0 else 1.0
        notes = operation._description.notes
        return self._full_claim(operation, beat, "executing", max(0, left), progress, notes)

    def _end(
        self,
        operation: Operation,
        former: Phase,
        beat: int,
        state: ClaimState,
        progress: float,
        reason: str | None = None,
    ) -> None:
        del self._live[operation.id]
        self._describe(operation)
        notes = operation._description.notes
        if reason is not None:
            notes = f"P2P operation failed: {reason} (type: {operation.type})"
        claim = self._full_claim(operation, beat, state, 0, progress, notes)
        self._host.emit(claim, terminal=True)
        finished = self._instruments.operation_finished
        if finished:
            self._instruments.tell(finished, operation, former, beat, reason)

    def _full_claim(
        self,
        operation: Operation,
        beat: int,
        state: ClaimState,
        left: int,
        progress: float,
        notes: str,
    ) -> StatusClaim:
        return StatusClaim(
            self.agent_id,
            operation.id,
            beat,
            state,
            left,
            progress,
            notes,
            self.cluster_id,
            operation.type,
            operation._description.phase,
            operation.peers,
            operation.beats,
            operation._parent,
            operation._correlation_id,
            operation.soft or UNSET,
        )
