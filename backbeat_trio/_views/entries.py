"""What is kept of an agent, of an operation and of a type, and how claims are read.

There may be 200,000 operations. So an entry is small, what many of them have in common is kept
once, and what a view shows is worked out when it is asked for.
"""

from __future__ import annotations

import hashlib
import re
from sys import getsizeof
from typing import Any, Final, NamedTuple, final

from msgspec import UNSET, Struct, UnsetType

from .._wire import MAX_INDEX, StatusClaim
from .shown import BUCKETS, MAX_TEXT, AgentState, Timing, clean

RANKS: Final = {
    phase: rank
    for rank, phase in enumerate(
        ("started", "connecting", "negotiating", "executing", "completed", "failed")
    )
}
"""The known phases, in their order."""

HEALTH_BEATS: Final = 8
"""How often an agent claims its health, in beats, unless it was seen to do so less often."""

# The most characters of a type, and of a phase.
_MAX_TYPE: Final = 100
_MAX_PHASE: Final = 32
# How many different phases are told apart. There are six, and later versions may add some.
_PHASES: Final = 64
_OTHER_PHASE: Final = "other"
# How many objects are remembered, so that equal ones are kept once.
_SHARED: Final = 8192

# Agents of the first version report the type, the phase and the peers in the notes only.
_NOTES: Final = re.compile(r"P2P (.{1,100}): ([a-z]{1,32}) \(peers: (\d{1,9}), node: ", re.DOTALL)
_FAILED: Final = re.compile(r"\(type: ([^()]{1,100})\)\Z")


class Entry(Struct, gc=False):
    """What is kept of an operation. It refers to nothing that could refer to it."""

    agent_id: str
    id: str
    type: str
    phase: str
    state: str
    """As in its claims, or ``"gone"`` once it is no longer known."""
    due: int
    """The beat on which its budget runs out, or on which it had run out at the latest. If only its
    end was seen, the estimate later than that."""
    last: int
    """The beat of its newest claim."""
    heard: float
    """When that came, in elapsed beats."""
    estimated: int
    """0 if it is not known."""
    peers: int
    """-1 if it is not known."""
    soft: bool | UnsetType
    notes: str
    parent: str | None
    correlation_id: str | None
    history: tuple[Any, ...]
    """Phases and beats by turns."""
    at_least: bool
    size: int
    """The bytes of its text."""

    @property
    def start(self) -> int:
        """The beat on which it started, or at the latest."""
        return self.due - self.estimated

    @property
    def live(self) -> bool:
        """Whether it has not ended and is known."""
        return self.state in ("executing", "waiting")

    @property
    def passed(self) -> int:
        """How many beats had passed by its newest claim."""
        return self.last - self.start

    @property
    def used(self) -> float | None:
        """How much of the estimate had passed by then; None if that is not known."""
        if not self.estimated or (self.at_least and self.due > self.last):
            return None
        return self.passed / self.estimated

    @property
    def key(self) -> str:
        """Its name among the operations of all agents, as others name their parents."""
        return f"{self.agent_id}/{self.id}"

    def timing(self, silent_before: float) -> Timing:
        """Return its timing, by the rule of `backbeat_trio._views.model`.

        Args:
          silent_before: as of `Ages.silent_before`.

        """
        if self.heard <= silent_before and self.live:
            return "silent"
        if self.last > self.due:
            return "late"
        return "slow" if self.soft is True else "on_time"

    def measure(self) -> int:
        """Return the bytes of its text. The type and the phases are kept elsewhere."""
        size = getsizeof(self.id) + getsizeof(self.notes) + getsizeof(self.history)
        if self.parent is not None:
            size += getsizeof(self.parent)
        if self.correlation_id is not self.parent:
            size += getsizeof(self.correlation_id)
        return size


@final
class Agent:
    """What is kept of an agent, and its operations by their ids."""

    __slots__ = (
        *("heard", "id", "interval", "last", "live", "notes", "operations", "reported"),
        *("reported_at", "state", "late", "mute", "silent", "slow"),
    )

    def __init__(self, id: str, heard: float) -> None:
        self.id = id
        self.operations: dict[str, Entry] = {}
        self.live = 0
        # When it was heard, in elapsed beats, and the beat of its newest claim.
        self.heard = heard
        self.last = 0
        self.state: AgentState = "unknown"
        self.notes = ""
        # The beat of its newest claim of health, when that came, and the interval between these.
        self.reported = -1
        self.reported_at = 0.0
        self.interval = HEALTH_BEATS
        # By the last `Table.survey`.
        self.slow = self.late = self.silent = 0
        self.mute = False

    @property
    def due_every(self) -> int:
        """How often a claim is due from it, in beats."""
        return 1 if self.live else self.interval


@final
class Kind:
    """What is counted of the operations of one type."""

    __slots__ = ("done", "failed", "late", "live", "live_late", "used")

    def __init__(self) -> None:
        self.live = self.done = self.failed = 0
        # Of those that have ended.
        self.late = 0
        self.used = [0] * len(BUCKETS)
        # Counted by `Table.survey`.
        self.live_late = 0


class Facts(NamedTuple):
    """What a claim says of an operation, within bounds."""

    type: str
    phase: str
    peers: int
    """-1 if it is not said."""
    is_end: bool
    left: int
    """How many beats of the estimate are left; 0 at the end."""
    estimated: int
    """Not less than what is left; 0 if it is not said."""

    def goes_back_from(self, phase: str) -> bool:
        """Tell whether the phase is earlier than another one, as far as both are known."""
        return RANKS.get(self.phase, len(RANKS)) < RANKS.get(phase, -1)


@final
class Reader:
    """Reads claims, cuts and cleans their text, and keeps once what is equal."""

    def __init__(self) -> None:
        self._shared: dict[Any, Any] = {}
        self._phases = {phase: phase for phase in RANKS}

    def share(self, value: Any) -> Any:
        """Return an object that is equal to one of the same type, and may be in use already."""
        shared = self._shared
        if len(shared) >= _SHARED:
            shared.clear()
        return shared.setdefault(value, value)

    def name(self, id: str) -> str:
        """Return an id as it is kept. Different ids stay different, also if they are cut."""
        if len(id) <= MAX_TEXT and id.isprintable():
            return id
        digest = hashlib.blake2b(id.encode(errors="surrogatepass"), digest_size=6).hexdigest()
        return f"{clean(id, MAX_TEXT - 1 - len(digest))}~{digest}"

    def kin(self, name: str | UnsetType) -> str | None:
        """Return the name of another operation as it is kept."""
        if not name:
            return None
        agent_id, _, id = name.partition("/")
        kin: str = self.share(f"{self.name(agent_id)}/{self.name(id)}")
        return kin

    def facts(self, claim: StatusClaim) -> Facts:
        """Return what a claim says of an operation."""
        type, phase, peers = claim.operation_type, claim.phase, claim.peers
        if not type or not phase:
            type, phase, peers = _facts_in_notes(claim)
        is_end = claim.state in ("done", "failed")
        left, estimated = claim.beats_left, claim.estimated_beats
        if not 0 <= left <= MAX_INDEX:
            left = min(max(0, left), MAX_INDEX)
        if estimated is UNSET:
            estimated = round(left / (1 - claim.progress)) if 0 < claim.progress < 1 else left
        return Facts(
            self.share(clean(type, _MAX_TYPE)),
            self._phases.get(phase) or self._new_phase(phase),
            -1 if peers is UNSET else min(max(0, peers), MAX_INDEX),
            is_end,
            0 if is_end else left,
            min(max(left, estimated), MAX_INDEX),
        )

    def _new_phase(self, phase: str) -> str:
        known = clean(phase, _MAX_PHASE)
        if known not in self._phases:
            if len(self._phases) >= _PHASES:
                return _OTHER_PHASE
            self._phases[known] = known
        return self._phases[known]


def _facts_in_notes(claim: StatusClaim) -> tuple[str, str, int | UnsetType]:
    type, phase, peers = claim.operation_type or "", claim.phase or "", claim.peers
    if found := _NOTES.match(claim.notes):
        type, phase = type or found[1], phase or found[2]
        peers = int(found[3]) if peers is UNSET else peers
    elif claim.state == "failed" and (tail := _FAILED.search(claim.notes[-MAX_TEXT:])):
        type = type or tail[1]
    usual = {"done": "completed", "failed": "failed"}
    return type, phase or usual.get(claim.state, "executing"), peers
