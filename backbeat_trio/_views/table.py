"""The agents and operations that a model knows, as their claims report them.

It is made to take in many claims and to keep many operations. A claim that only repeats the one
before, a beat later, is two stores. Everything else about an operation is worked out when a view
asks for it. Strings that many operations share are kept once.

*Order.* A claim is ignored if it is older than the newest one of its operation. There is one
exception: that newest one lies in the future of the present grid, and the claim does not. Then the
agent has moved to another grid. A claim that comes after the end of an operation belongs to a later
operation of the same id if its beat is later, or if its operation began later.

*Bounds.* If there are too many operations, those that have ended make room first, oldest first.
Then the oldest live one makes room for one that has started later. If none has, the new one is left
out. An operation with more than 512 bytes of text counts as several. If there are too many agents,
those that are silent make room, and a new agent is left out if there are none.
"""

from __future__ import annotations

import hashlib
import math
import re
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from sys import getsizeof
from typing import Any, Final, final

from msgspec import UNSET, Struct, UnsetType

from .._wire import HEALTH_TASK_ID, MAX_INDEX, StatusClaim
from .ages import Ages
from .shown import BUCKETS, MAX_TEXT, AgentState, Timing, clean

RANKS: Final = {
    phase: rank
    for rank, phase in enumerate(
        ("started", "connecting", "negotiating", "executing", "completed", "failed")
    )
}
"""The known phases, in their order."""

# The most characters of a type, and of a phase.
_MAX_TYPE: Final = 100
_MAX_PHASE: Final = 32
# How many different phases are told apart. There are six, and later versions may add some.
_PHASES: Final = 64
# How many strings and numbers are remembered, so that equal ones are kept once.
_SHARED: Final = 8192
# The text of an operation for which it counts as one more, in bytes.
_BYTES: Final = 512
# How many operations that were left out are remembered, so that each is counted once.
_LEFT_OUT: Final = 100_000
# How often an agent without operations claims its health, in beats, unless it was seen to do so
# less often.
_HEALTH_BEATS: Final = 8
# By how much the beat of a claim may be ahead of this process: in beats, and in seconds.
_AHEAD_BEATS: Final = 8
_AHEAD: Final = 5.0
# By how much a claim may be late, in seconds. A beat that differs by more is on another grid.
_DELAY: Final = 60.0

# Agents of the first version report the type, the phase and the peers in the notes only.
_NOTES: Final = re.compile(r"P2P (.{1,100}): ([a-z]{1,32}) \(peers: (\d{1,9}), node: ", re.DOTALL)
_FAILED: Final = re.compile(r"\(type: (.{1,100})\)\Z", re.DOTALL)


class Entry(Struct, gc=False):
    """What is kept of an operation. It refers to nothing that could refer to it."""

    agent_id: str
    id: str
    type: str
    phase: str
    state: str
    """As in its claims, or ``"gone"`` once it is no longer known."""
    due: int
    """The beat on which its budget runs out, or on which it had run out at the latest."""
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
    cost: int
    """As how many operations it counts."""

    @property
    def start(self) -> int:
        """The beat on which it started, or on which it was first seen if that is not known."""
        return self.due - self.estimated

    @property
    def live(self) -> bool:
        """Whether it has not ended and is known."""
        return self.state in ("executing", "waiting")

    @property
    def passed(self) -> int:
        """How many beats had passed by its newest claim."""
        return max(0, self.last - self.start)

    @property
    def used(self) -> float | None:
        """How much of the estimate had passed by its newest claim."""
        # Of one whose end alone was seen, the budget seems to run out later.
        if not self.estimated or (self.at_least and self.due > self.last):
            return None
        return self.passed / self.estimated


@final
class Agent:
    """What is kept of an agent, and its operations by their ids."""

    __slots__ = (
        *("heard", "id", "interval", "last", "notes", "operations", "reported", "state"),
        *("late", "live", "silent", "slow"),
    )

    def __init__(self, id: str, heard: float) -> None:
        self.id = id
        self.operations: dict[str, Entry] = {}
        self.heard = heard
        self.last = 0
        self.state: AgentState = "unknown"
        self.notes = ""
        # When it last claimed its health, in its beats, and the interval between these claims.
        self.reported = -1
        self.interval = _HEALTH_BEATS
        self.live = 0
        # Counted by `Table.survey`.
        self.slow = self.late = self.silent = 0


@final
class Kind:
    """What is counted of the operations of one type."""

    __slots__ = ("done", "failed", "late", "live", "live_late", "used")

    def __init__(self) -> None:
        self.live = self.done = self.failed = self.late = 0
        self.used = [0] * len(BUCKETS)
        # Counted by `Table.survey`.
        self.live_late = 0


@final
class Table:
    """The agents and operations, within bounds.

    Args:
      ages: tells how long ago something was heard.
      max_agents: the most agents that are kept.
      max_operations: the most operations that are kept.
      max_history: the most changes of phase that are kept of an operation.

    """

    def __init__(
        self, ages: Ages, *, max_agents: int, max_operations: int, max_history: int
    ) -> None:
        self.agents: dict[str, Agent] = {}
        self.kinds: dict[str, Kind] = {}
        self.claims = self.ignored = 0
        self.dropped_agents = self.dropped_operations = 0
        self.live = self.done = self.failed = 0
        self._ages = ages
        self._max_agents = max_agents
        self._max_operations = max_operations
        self._max_history = max_history
        # Live operations in the order in which they were first seen, and those that have ended in
        # the order of their ends. Each has some that are there no longer.
        self._begun: deque[Entry] = deque()
        self._ended: deque[Entry] = deque()
        self._cost = 0
        self._left_out: set[int] = set()
        self._shared: dict[Any, Any] = {}
        self._phases = {phase: phase for phase in RANKS}
        self._idle: list[Agent] = []
        self._looked = -math.inf
        # The grid, as `locate` gave it.
        self._wanted: tuple[str | UnsetType, ...] | None = None
        self._future = math.inf
        self._slack = math.inf

    # The grid.

    def locate(self, cluster_id: str, position: float, tempo_bpm: float, *, local: bool) -> None:
        """Report where this process is on the grid.

        Args:
          cluster_id: the cluster whose claims count.
          position: the position.
          tempo_bpm: the tempo; 0.0 in a pause.
          local: whether the grid is this process's own, which says nothing of others' beats.

        """
        self._wanted = (cluster_id, UNSET)
        second = tempo_bpm / 60
        self._future = math.inf if local else position + max(_AHEAD_BEATS, _AHEAD * second)
        self._slack = max(_AHEAD_BEATS, _DELAY * second)

    # Claims.

    def take(self, claims: Sequence[StatusClaim], heard: float) -> None:
        """Take in claims that came at ``heard``, in elapsed beats."""
        self.claims += len(claims)
        agents, wanted = self.agents, self._wanted
        agent_id = agent = None
        operations: dict[str, Entry] = {}
        accepted = beat = -1
        for claim in claims:
            if claim.agent_id != agent_id:
                if agent is not None and accepted >= 0:
                    agent.heard, agent.last = heard, accepted
                agent_id, accepted = claim.agent_id, -1
                agent = agents.get(agent_id)
                operations = {} if agent is None else agent.operations
            entry = operations.get(claim.task_id)
            if entry is not None:
                left = claim.beats_left
                # An equal number that is there already takes no memory of its own.
                if claim.beat_index != beat:
                    beat = claim.beat_index
                if (
                    (
                        beat + left == entry.due and beat >= entry.last
                        if left > 0
                        else entry.due <= beat and 0 <= beat - entry.last <= 1
                    )
                    and claim.notes == entry.notes
                    and claim.state == entry.state == "executing"
                    and (claim.phase == entry.phase or claim.phase is UNSET)
                    and (claim.peers == entry.peers or claim.peers is UNSET)
                    and claim.soft is entry.soft
                    and (wanted is None or claim.cluster_id in wanted)
                ):
                    entry.last = accepted = beat
                    entry.heard = heard
                    continue
            if self._take_other(claim, heard):
                agent = agents.get(agent_id)
                if agent is not None:
                    operations = agent.operations
        if agent is not None and accepted >= 0:
            agent.heard, agent.last = heard, accepted

    def _take_other(self, claim: StatusClaim, heard: float) -> bool:
        # Any claim but the most frequent kind.
        beat = claim.beat_index
        is_own = self._wanted is None or claim.cluster_id in self._wanted
        if not (is_own and 0 <= beat <= MAX_INDEX):
            self.ignored += 1
            return False
        name = self._name(claim.agent_id)
        agent = self.agents.get(name)
        if agent is None:
            agent = self._add_agent(name, heard)
            if agent is None:
                return False
        if claim.task_id == HEALTH_TASK_ID:
            return self._take_health(agent, claim, heard)
        id = self._name(claim.task_id)
        entry = agent.operations.get(id)
        if entry is None or self._is_later(entry, claim):
            if not self._start(agent, id, claim, heard, entry):
                return False
        elif not entry.live or self._is_older(entry, claim):
            self.ignored += 1
            return False
        else:
            self._update(entry, claim, heard)
        agent.heard, agent.last = heard, beat
        return True

    def _take_health(self, agent: Agent, claim: StatusClaim, heard: float) -> bool:
        beat, reported = claim.beat_index, agent.reported
        if beat < reported and not reported > self._future >= beat:
            self.ignored += 1
            return False
        # An interval that was missed, or lies between two grids, is no measure.
        if reported >= 0 and _HEALTH_BEATS < beat - reported <= heard - agent.heard + 1:
            agent.interval = max(agent.interval, beat - reported)
        agent.state = "executing" if claim.state == "done" else claim.state
        agent.notes = clean(claim.notes)
        agent.reported, agent.heard, agent.last = beat, heard, beat
        return True

    def _is_older(self, entry: Entry, claim: StatusClaim) -> bool:
        beat, last = claim.beat_index, entry.last
        if beat != last:
            return beat < last and not last > self._future >= beat
        return not _is_end(claim) and _goes_back(entry.phase, self._facts(claim)[1])

    def _is_later(self, entry: Entry, claim: StatusClaim) -> bool:
        # Whether a claim belongs to an operation that began after the one of the same id.
        beat, last, left = claim.beat_index, entry.last, claim.beats_left
        if beat != last and not (beat > last or last > self._future >= beat):
            return False
        if entry.live:
            # Phases do not go back. So the end of the earlier one was missed.
            return (
                beat != last
                and not _is_end(claim)
                and _goes_back(entry.phase, self._facts(claim)[1])
            )
        if beat != last:
            return True
        return not _is_end(claim) and left > 0 and beat + left - _estimate(claim) > entry.start

    def _start(
        self, agent: Agent, id: str, claim: StatusClaim, heard: float, former: Entry | None
    ) -> bool:
        type, phase, peers = self._facts(claim)
        beat, left, is_end = claim.beat_index, _left(claim), _is_end(claim)
        estimated = _estimate(claim)
        # If the budget has run out already, it had started by then, at the latest. An end alone
        # does not tell when it started.
        due = beat + (estimated if is_end else left)
        entry = Entry(
            agent_id=agent.id,
            id=id,
            type=type,
            phase=phase,
            state=claim.state,
            due=self._share(due),
            last=self._share(beat),
            heard=heard,
            estimated=self._share(estimated),
            peers=peers,
            soft=claim.soft,
            notes=self._share(clean(claim.notes)),
            parent=self._relative(claim.parent),
            correlation_id=self._relative(claim.correlation_id),
            history=self._share((phase, self._share(beat))),
            at_least=is_end or left == 0,
            cost=0,
        )
        entry.cost = _cost_of(entry)
        if former is not None and former.live:
            self._forget(former)
        if not self._make_room(entry):
            return False
        self._cost += entry.cost
        agent.operations[id] = entry
        kind = self.kinds.get(type)
        if kind is None:
            kind = self.kinds[type] = Kind()
        self.live += 1
        kind.live += 1
        agent.live += 1
        if is_end:
            self._end(entry)
        else:
            self._begun.append(entry)
            if len(self._begun) > 2 * self.live + 1024:
                self._begun = deque(each for each in self._begun if each.live)
        return True

    def _update(self, entry: Entry, claim: StatusClaim, heard: float) -> None:
        _, phase, peers = self._facts(claim)
        beat, left, is_end = claim.beat_index, _left(claim), _is_end(claim)
        if left > 0 and not is_end:
            if claim.estimated_beats is not UNSET or left > entry.estimated:
                entry.estimated = self._share(_estimate(claim))
            moved = beat + left - entry.estimated - entry.start
            entry.at_least = False
        else:
            # A budget that has run out does not tell when it began. So this is a guess: a claim may
            # come late, and then it is not on another grid.
            moved = round(beat - entry.last - (heard - entry.heard))
            if beat >= entry.last and moved <= self._slack:
                moved = 0
        if moved:
            self._move(entry, moved)
        if left == 0 and not is_end and entry.due > beat:
            entry.due = self._share(beat)
        if phase != entry.phase:
            entry.phase = phase
            changes = (*entry.history, phase, self._share(beat))
            entry.history = self._share(changes[-2 * self._max_history :])
        if peers >= 0:
            entry.peers = peers
        entry.soft = claim.soft
        entry.notes = self._share(clean(claim.notes))
        entry.last, entry.heard, entry.state = self._share(beat), heard, claim.state
        self._cost -= entry.cost
        entry.cost = _cost_of(entry)
        self._cost += entry.cost
        if is_end:
            self._end(entry)

    def _move(self, entry: Entry, beats: int) -> None:
        # The agent has moved to another grid, on which all its beats have other indexes.
        entry.due = self._share(entry.due + beats)
        pairs = zip(entry.history[::2], entry.history[1::2], strict=True)
        entry.history = self._share(
            tuple(part for phase, at in pairs for part in (phase, self._share(at + beats)))
        )

    def _end(self, entry: Entry) -> None:
        # Its state says already how it ended.
        kind = self.kinds[entry.type]
        self.live -= 1
        kind.live -= 1
        self.agents[entry.agent_id].live -= 1
        self._count_end(entry, kind, 1)
        self._ended.append(entry)

    def _count_end(self, entry: Entry, kind: Kind, by: int) -> None:
        if entry.state == "done":
            self.done += by
            kind.done += by
        else:
            self.failed += by
            kind.failed += by
        if timing(entry, -math.inf) == "late":
            kind.late += by
        if entry.used is not None:
            kind.used[bisect_left(BUCKETS, entry.used)] += by

    # Counting.

    def survey(self) -> None:
        """Count the live operations of each agent and type by their timing."""
        silent_before = self._ages.silent_before()
        for kind in self.kinds.values():
            kind.live_late = 0
        for agent in self.agents.values():
            slow = late = silent = 0
            if agent.live:
                for entry in agent.operations.values():
                    if not entry.live:
                        continue
                    if entry.heard <= silent_before:
                        silent += 1
                    elif entry.last > entry.due:
                        late += 1
                        self.kinds[entry.type].live_late += 1
                    elif entry.soft is True:
                        slow += 1
            agent.slow, agent.late, agent.silent = slow, late, silent

    def is_silent(self, agent: Agent) -> bool:
        """Tell whether claims were due from an agent and none came."""
        return agent.heard <= self._ages.silent_before(1 if agent.live else agent.interval)

    # Leaving out.

    def expire(self, before: float) -> None:
        """Forget operations that ended before an instant, in elapsed beats."""
        queue = self._ended
        while queue and (queue[0].state == "gone" or queue[0].heard <= before):
            self._forget(queue.popleft())

    def sweep(self, before: float) -> None:
        """Forget live operations and agents that were not heard after an instant."""
        for entry in self._begun:
            if entry.heard <= before and entry.live:
                self._forget(entry)
        for agent in list(self.agents.values()):
            if agent.heard <= before and not agent.operations:
                del self.agents[agent.id]

    def _forget(self, entry: Entry) -> None:
        if entry.state == "gone":
            return
        kind, agent = self.kinds[entry.type], self.agents.get(entry.agent_id)
        if entry.live:
            self.live -= 1
            kind.live -= 1
        else:
            self._count_end(entry, kind, -1)
        if not (kind.live or kind.done or kind.failed):
            del self.kinds[entry.type]
        if agent is not None:
            agent.live -= entry.live
            if agent.operations.get(entry.id) is entry:
                del agent.operations[entry.id]
        entry.state = "gone"
        self._cost -= entry.cost

    def _make_room(self, entry: Entry) -> bool:
        while self._cost + entry.cost > self._max_operations:
            oldest = self._oldest(entry.start)
            if oldest is None:
                mark = hash((entry.agent_id, entry.id))
                if mark not in self._left_out and len(self._left_out) < _LEFT_OUT:
                    self._left_out.add(mark)
                    self.dropped_operations += 1
                return False
            if oldest.live and len(self._left_out) < _LEFT_OUT:
                self._left_out.add(hash((oldest.agent_id, oldest.id)))
            self._forget(oldest)
            self.dropped_operations += 1
        return True

    def _oldest(self, start: int) -> Entry | None:
        # The one that makes room for an operation that started on some beat.
        while self._ended:
            entry = self._ended.popleft()
            if entry.state != "gone":
                return entry
        while self._begun:
            if self._begun[0].live:
                return self._begun.popleft() if self._begun[0].start < start else None
            self._begun.popleft()
        return None

    def _add_agent(self, name: str, heard: float) -> Agent | None:
        if len(self.agents) >= self._max_agents:
            if not self._idle and heard >= self._looked + 1:
                # Not for each claim of an agent that is left out.
                self._looked = heard
                idle = [each for each in self.agents.values() if self.is_silent(each)]
                self._idle = sorted(idle, key=lambda each: each.heard, reverse=True)
            while self._idle:
                oldest = self._idle.pop()
                if self.agents.get(oldest.id) is oldest and self.is_silent(oldest):
                    for entry in list(oldest.operations.values()):
                        self._forget(entry)
                        self.dropped_operations += 1
                    del self.agents[oldest.id]
                    self.dropped_agents += 1
                    break
            else:
                mark = hash(name)
                if mark not in self._left_out and len(self._left_out) < _LEFT_OUT:
                    self._left_out.add(mark)
                    self.dropped_agents += 1
                return None
        agent = self.agents[name] = Agent(name, heard)
        return agent

    # Text.

    def _share(self, value: Any) -> Any:
        """Return an object that is equal and may be in use already."""
        shared = self._shared
        if len(shared) >= _SHARED:
            shared.clear()
        return shared.setdefault(value, value)

    def _name(self, text: str) -> str:
        """Return an id as it is kept. Different ids stay different, also if they are cut."""
        if len(text) <= MAX_TEXT and text.isprintable():
            return text
        digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=6).hexdigest()
        return f"{clean(text, MAX_TEXT - 1 - len(digest))}~{digest}"

    def _relative(self, text: str | UnsetType) -> str | None:
        if not text:
            return None
        agent_id, _, id = text.partition("/")
        return str(self._share(f"{self._name(agent_id)}/{self._name(id)}"))

    def _facts(self, claim: StatusClaim) -> tuple[str, str, int]:
        """Return the type, the phase and the peers (or -1) of a claim of an operation."""
        type, phase, peers = claim.operation_type or "", claim.phase or "", claim.peers
        if not type or not phase:
            found = _NOTES.match(claim.notes)
            if found is not None:
                type, phase = type or found[1], phase or found[2]
                if peers is UNSET:
                    peers = int(found[3])
            elif claim.state == "failed":
                tail = _FAILED.search(claim.notes[-200:])
                type, phase = type or (tail[1] if tail else ""), phase or "failed"
        return (
            self._share(clean(type, _MAX_TYPE)),
            self._phase(phase or ("completed" if claim.state == "done" else "executing")),
            -1 if peers is UNSET else max(0, min(peers, MAX_INDEX)),
        )

    def _phase(self, phase: str) -> str:
        known = self._phases.get(phase)
        if known is None:
            known = clean(phase, _MAX_PHASE)
            if len(self._phases) >= _PHASES:
                return self._phases.get(known, "other")
            self._phases[known] = known
        return known


def timing(entry: Entry, silent_before: float) -> Timing:
    """Return the timing of an operation, by the rule of `backbeat_trio._views.model`.

    Args:
      entry: the operation.
      silent_before: as of `Ages.silent_before`.

    """
    if entry.heard <= silent_before and entry.live:
        return "silent"
    if entry.last > entry.due:
        return "late"
    return "slow" if entry.soft is True else "on_time"


def _is_end(claim: StatusClaim) -> bool:
    return claim.state in ("done", "failed")


def _goes_back(former: str, phase: str) -> bool:
    # Nothing is known of the order of other phases.
    return former in RANKS and phase in RANKS and RANKS[phase] < RANKS[former]


def _left(claim: StatusClaim) -> int:
    return max(0, min(claim.beats_left, MAX_INDEX))


def _estimate(claim: StatusClaim) -> int:
    # 0 if it is not known. It is never less than what is left of it.
    left, progress = _left(claim), claim.progress
    if claim.estimated_beats is not UNSET:
        return max(left, min(claim.estimated_beats, MAX_INDEX))
    if left > 0 and 0 < progress < 1:
        return min(round(left / (1 - progress)), MAX_INDEX)
    return left


def _cost_of(entry: Entry) -> int:
    texts = (entry.id, entry.type, entry.notes, entry.parent, entry.correlation_id)
    return 1 + sum(map(getsizeof, (*texts, entry.history))) // _BYTES
