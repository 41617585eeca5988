"""The six-phase machine of operations, and the claims of its transitions.

Nothing here reads a clock or sends anything: both is the business of the session's `Host`.
"""

from __future__ import annotations

import enum
import secrets
from collections.abc import Iterable
from typing import Any, Final, Protocol, final

from msgspec import Raw

from .._checks import check_integer
from .._errors import InvalidTransition, OperationExists, OperationNotFound
from .._wire import ClaimState, LiveClaim, StatusClaim, encode_details


class Phase(enum.IntEnum):
    """The phases of an operation, in order; going forward may skip some, and `FAILED` ends any."""

    STARTED = 0
    CONNECTING = 1
    NEGOTIATING = 2
    EXECUTING = 3
    COMPLETED = 4
    FAILED = 5

    @property
    def final(self) -> bool:
        """Whether nothing comes after it."""
        return self >= Phase.COMPLETED


ESTIMATES: Final = {
    "peer_discovery": (2, 5),
    "dht_store": (2, 4),
    "dht_retrieve": (1, 3),
    "pubsub_sync": (1, 2),
    "election": (3, 10),
    "task_coordination": (5, 20),
}
"""Minimum and maximum of beats of the operation types known by name; the maximum is the default."""

DEFAULT_ESTIMATE: Final = 8
"""Estimate, in beats, of an operation of another type that names none: a bar by default."""

# The most characters of a type or an id.
_MAX_NAME: Final = 1000
# How many descriptions are kept for operations that are alike.
_DESCRIPTIONS: Final = 1024
# How many characters of its type an id that is made up begins with.
_TYPE_IN_ID: Final = 100
# A name of its own, as the comparison with it is made for each operation on each beat.
_COMPLETED: Final = Phase.COMPLETED


class Host(Protocol):
    """What operations need of the session that they belong to."""

    def current_beat(self) -> int:
        """Return the index of the present beat."""
        ...

    def check_open(self) -> None:
        """Raise `SessionClosed` where the session was left."""
        ...

    def emit(self, claim: StatusClaim, *, terminal: bool = False) -> None:
        """Queue a claim."""
        ...


def check_name(name: str, value: str) -> str:
    """Return a type or an id of an operation; raise unless a message can carry it."""
    # It must fit into any message, and unlike notes it cannot be shortened.
    if len(_text(name, value)) > _MAX_NAME:
        raise ValueError(f"`{name}` must have at most {_MAX_NAME} characters")
    return value


def _text(name: str, value: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"`{name}` must be a str, not {value!r}")
    if not value:
        raise ValueError(f"`{name}` must not be empty")
    # Lone surrogates have no UTF-8: refused here, where the caller can see it, and not when the
    # claim is encoded.
    value.encode()
    return value


@final
class _Description:
    # What the claims of operations say as long as nothing about the operations changes. Operations
    # of which the same is to be said share one, as there may be a hundred thousand of them.

    __slots__ = ("encoded", "notes", "phase")

    def __init__(self, notes: str, phase: str, encoded: Raw) -> None:
        self.notes = notes
        self.phase = phase
        self.encoded = encoded


@final
class Operation:
    """A tracked piece of distributed work, made by `Session.operation` and `start_operation`.

    Its verbs are synchronous: they change its state and queue the claim. Using one after the
    operation has ended raises `InvalidTransition`.
    """

    __slots__ = (
        "_description",
        "_start",
        "_table",
        "beats",
        "data",
        "id",
        "peers",
        "phase",
        "type",
    )

    id: str
    type: str
    beats: int
    """The estimate, in beats."""
    data: Any
    """Whatever was given when the operation was started; it stays in this process."""
    phase: Phase
    peers: int
    """How many peers take part."""
    _description: _Description
    _start: int
    _table: Operations

    def __init__(self) -> None:
        raise TypeError("operations are made by `Session.operation` and `Session.start_operation`")

    def advance(self, phase: Phase, *, peers: int | None = None) -> None:
        """Go on to a later phase, and queue a claim that says so.

        Not a checkpoint.

        Args:
          phase: the phase to go to; the present one again is fine, an earlier one is not.
          peers: how many peers take part; None leaves the count as it was.

        Raises:
          InvalidTransition: for an earlier phase, for the two final ones, or where the operation
            has ended.
          SessionClosed: where the session was left.

        """
        self._table.advance(self, phase, peers)

    def complete(self, *, peers: int | None = None) -> None:
        """End the operation well, and queue its terminal claim. Not a checkpoint.

        Args:
          peers: how many peers took part; None leaves the count as it was.

        Raises:
          InvalidTransition: where the operation has ended.
          SessionClosed: where the session was left.

        """
        self._table.complete(self, peers)

    def fail(self, reason: str) -> None:
        """End the operation as failed for a reason, and queue its terminal claim. Not a checkpoint.

        Args:
          reason: goes into the claim's notes.

        Raises:
          InvalidTransition: where the operation has ended.
          SessionClosed: where the session was left.

        """
        self._table.fail(self, reason)

    @property
    def beats_left(self) -> int:
        """What remains of the estimate, in beats; 0 when it is used up or the operation ended."""
        if self.phase.final:
            return 0
        return max(0, self.beats - (self._table.current_beat() - self.start_beat))

    @property
    def start_beat(self) -> int:
        """The index of the beat in which it started, on the present grid."""
        return self._start + self._table._shift

    def __repr__(self) -> str:
        return (
            f"<Operation {self.id!r} type={self.type!r} phase={self.phase.name} beats={self.beats}>"
        )


@final
class Operations:
    """The live operations of an agent: it takes them from phase to phase, and emits their claims.

    Args:
      agent_id: who the claims are of.
      node_id: the node that their notes name.
      host: tells the present beat, and takes the claims.
      cluster_id: the cluster that the claims name.

    """

    def __init__(self, agent_id: str, node_id: str, host: Host, cluster_id: str) -> None:
        self._agent_id = agent_id
        self._cluster_id = cluster_id
        self._node_id = node_id
        self._host = host
        self._live: dict[str, Operation] = {}
        self._descriptions: dict[tuple[str, Phase, int, int], _Description] = {}
        # Start beats are kept less this, so that changing grid is a single addition however many
        # operations live.
        self._shift = 0

    def __len__(self) -> int:
        return len(self._live)

    def current_beat(self) -> int:
        """Return the index of the present beat."""
        return self._host.current_beat()

    def rebase(self, beats: int) -> None:
        """Move all start beats along when the position changes grid."""
        self._shift += beats

    def live(self) -> list[Operation]:
        """Return those that live now, oldest first."""
        return list(self._live.values())

    def find(self, id: str) -> Operation:
        """Return the live operation of an id.

        Raises:
          OperationNotFound: where there is none.
          SessionClosed: where the session was left.
        """
        self._host.check_open()
        try:
            return self._live[id]
        except KeyError:
            raise OperationNotFound(f"no live operation {id!r}") from None

    def start(
        self, type: str, *, id: str | None = None, beats: int | None = None, data: object = None
    ) -> Operation:
        """Start an operation; see `Session.start_operation`."""
        self._host.check_open()
        operation = Operation.__new__(Operation)
        operation.type = check_name("type", type)
        if id is None:
            id = f"{type[:_TYPE_IN_ID]}-{secrets.token_hex(6)}"
        operation.id = check_name("id", id)
        if beats is None:
            operation.beats = ESTIMATES.get(type, (0, DEFAULT_ESTIMATE))[1]
        else:
            operation.beats = check_integer("beats", beats, 1)
        if id in self._live:
            raise OperationExists(f"operation {id!r} is live already")
        beat = self.current_beat()
        operation.data = data
        operation.phase = Phase.STARTED
        operation.peers = 0
        operation._table = self
        operation._start = beat - self._shift
        self._live[id] = operation
        self._describe(operation)
        self._host.emit(self._claim(operation, beat))
        return operation

    def advance(self, operation: Operation, phase: Phase, peers: int | None) -> None:
        """Take an operation forward; `COMPLETED` and `FAILED` are reached by their own verbs."""
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
        if peers is not None:
            operation.peers = check_integer("peers", peers, 0)
        operation.phase = phase
        self._describe(operation)
        self._host.emit(self._claim(operation, self.current_beat()))

    def complete(self, operation: Operation, peers: int | None) -> None:
        """End an operation well."""
        self._check(operation)
        if peers is not None:
            operation.peers = check_integer("peers", peers, 0)
        operation.phase = Phase.COMPLETED
        self._end(operation, "done", 1.0)

    def fail(self, operation: Operation, reason: str) -> None:
        """End an operation for a reason."""
        self._check(operation)
        _text("reason", reason)
        self._fail(operation, reason)

    def fail_all(self, reason: str) -> None:
        """End all live operations for a reason, also where the session is being left."""
        for operation in self.live():
            self._fail(operation, reason)

    def _fail(self, operation: Operation, reason: str) -> None:
        operation.phase = Phase.FAILED
        notes = f"P2P operation failed: {reason} (type: {operation.type})"
        self._end(operation, "failed", 0.0, notes)

    def claims(self, operations: Iterable[Operation], beat: int) -> list[LiveClaim]:
        """Return the beat's claims of those among ``operations`` that still live."""
        # As `_claim` does, without a call for each: this is where a beat's time goes.
        agent_id, since = self._agent_id, beat - self._shift
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

    def _check(self, operation: Operation) -> None:
        # By object and not by id: the id may belong to a later operation by now.
        if operation.phase.final:
            ended = operation.phase.name.lower()
            raise InvalidTransition(f"operation {operation.id!r} has ended: {ended}")
        self._host.check_open()

    def _describe(self, operation: Operation) -> None:
        fields = operation.type, operation.phase, operation.peers, operation.beats
        found = self._descriptions.get(fields)
        if found is None:
            if len(self._descriptions) >= _DESCRIPTIONS:
                self._descriptions.clear()
            found = self._descriptions[fields] = self._description_of(*fields)
        operation._description = found

    def _description_of(self, type: str, phase: Phase, peers: int, beats: int) -> _Description:
        name = phase.name.lower()
        notes = f"P2P {type}: {name} (peers: {peers}, node: {self._node_id})"
        encoded = encode_details(notes, self._cluster_id, type, name, peers, beats)
        return _Description(notes, name, encoded)

    def _claim(self, operation: Operation, beat: int) -> StatusClaim:
        passed = beat - operation._start - self._shift
        left = operation.beats - passed
        progress = passed / operation.beats if left > 0 else 1.0
        notes = operation._description.notes
        return self._full_claim(operation, beat, "executing", max(0, left), progress, notes)

    def _end(
        self, operation: Operation, state: ClaimState, progress: float, notes: str | None = None
    ) -> None:
        del self._live[operation.id]
        self._describe(operation)
        notes = operation._description.notes if notes is None else notes
        claim = self._full_claim(operation, self.current_beat(), state, 0, progress, notes)
        self._host.emit(claim, terminal=True)

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
            self._agent_id,
            operation.id,
            beat,
            state,
            left,
            progress,
            notes,
            self._cluster_id,
            operation.type,
            operation._description.phase,
            operation.peers,
            operation.beats,
        )
