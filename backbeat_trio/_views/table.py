"""The agents and operations that a model knows, as their claims report them.

*Order.* A claim is ignored if it is older than the newest one of its operation. There is one
exception: that newest one lies in the future of the present grid, and the claim does not. Then the
agent has moved to another grid. A claim that comes after the end of an operation belongs to a later
operation of the same id if its beat is later, or if on the same beat its operation began later. The
same goes for a claim of a later beat and an earlier phase, if the end was missed.

*Bounds.* If there are too many operations, those that have ended make room first, oldest first.
Then the oldest live one makes room for one that has started later. If none has, the new one is left
out. So operations that were left out do not come back with their next claims. Together they may
have 600 bytes of text for each that is allowed. If there are too many agents, those that are silent
make room, and a new agent is left out if there are none.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from typing import Final, final

from msgspec import UNSET, UnsetType

from .._wire import HEALTH_TASK_ID, MAX_INDEX, StatusClaim
from .ages import Ages
from .entries import HEALTH_BEATS, Agent, Entry, Facts, Kind, Reader
from .shown import BUCKETS, OTHER_TYPES, clean

# The bytes of text for each operation that is allowed.
_BYTES: Final = 600
# The most characters of the notes of an agent.
_MAX_HEALTH: Final = 120
# How many types are told apart.
_KINDS: Final = 4096
# How many operations and agents that were left out are remembered, so that each is counted once.
_LEFT_OUT: Final = 100_000
# By how much the beat of a claim may be ahead of this process: in beats, and in seconds.
_AHEAD_BEATS: Final = 8
_AHEAD: Final = 5.0
# By how much a claim may be late, in seconds. A beat that differs by more is on another grid.
_DELAY: Final = 60.0


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
        self._reader = Reader()
        self._max_agents = max_agents
        self._max_operations = max_operations
        self._max_history = max_history
        # Live operations in the order in which they were first seen, and those that have ended in
        # the order of their ends. Each has some that are there no longer.
        self._begun: deque[Entry] = deque()
        self._ended: deque[Entry] = deque()
        self._count = self._size = 0
        self._left_out: set[int] = set()
        # Agents that were silent when that was last looked at, oldest last.
        self._idle: list[Agent] = []
        self._looked = -math.inf
        # The grid, as `locate` gave it.
        self._wanted: tuple[str | UnsetType, ...] | None = None
        self._pace = 0.0
        self._future = math.inf
        self._slack = math.inf

    # The grid.

    def locate(self, cluster_id: str, position: float, tempo_bpm: float) -> None:
        """Report where this process is on the grid.

        Args:
          cluster_id: the cluster whose claims count.
          position: the position.
          tempo_bpm: the tempo; 0.0 in a pause.

        """
        self._wanted = (cluster_id, UNSET)
        # In a pause, claims of the time before it may still be on their way.
        self._pace = pace = tempo_bpm / 60 or self._pace
        self._future = position + max(_AHEAD_BEATS, _AHEAD * pace)
        self._slack = max(_AHEAD_BEATS, _DELAY * pace)

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
                # Most claims only repeat the one before, a beat later.
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
                    and (claim.estimated_beats == entry.estimated or claim.estimated_beats is UNSET)
                    and claim.soft is entry.soft
                    and (wanted is None or claim.cluster_id in wanted)
                ):
                    entry.last = accepted = beat
                    entry.heard = heard
                    continue
            self._take_other(claim, heard)
            if agent is None and (agent := agents.get(agent_id)) is not None:
                operations = agent.operations
        if agent is not None and accepted >= 0:
            agent.heard, agent.last = heard, accepted

    def _take_other(self, claim: StatusClaim, heard: float) -> None:
        beat = claim.beat_index
        is_own = self._wanted is None or claim.cluster_id in self._wanted
        if not (is_own and 0 <= beat <= MAX_INDEX):
            self.ignored += 1
            return
        name = self._reader.name(claim.agent_id)
        agent = self.agents.get(name) or self._add_agent(name, heard)
        if agent is None:
            return
        if claim.task_id == HEALTH_TASK_ID:
            if self._is_before(beat, agent.reported):
                self.ignored += 1
                return
            self._take_health(agent, claim, heard)
        else:
            id, facts = self._reader.name(claim.task_id), self._reader.facts(claim)
            entry = agent.operations.get(id)
            if entry is None or self._is_later(entry, beat, facts):
                self._start(agent, id, claim, facts, heard)
            elif not entry.live or self._is_older(entry, beat, facts):
                self.ignored += 1
                return
            else:
                self._update(entry, claim, facts, heard)
        agent.heard, agent.last = heard, beat

    def _take_health(self, agent: Agent, claim: StatusClaim, heard: float) -> None:
        beat = claim.beat_index
        # Between two grids there is no interval.
        if agent.reported >= 0 and beat - agent.reported <= heard - agent.reported_at + 1:
            agent.interval = max(HEALTH_BEATS, beat - agent.reported)
        agent.state = "executing" if claim.state == "done" else claim.state
        agent.notes = clean(claim.notes, _MAX_HEALTH)
        agent.reported, agent.reported_at = beat, heard

    def _is_before(self, beat: int, last: int) -> bool:
        # A beat in the future is on a grid that the agent has left.
        return beat < last and not last > self._future >= beat

    def _is_older(self, entry: Entry, beat: int, facts: Facts) -> bool:
        if beat != entry.last:
            return self._is_before(beat, entry.last)
        return not facts.is_end and facts.goes_back_from(entry.phase)

    def _is_later(self, entry: Entry, beat: int, facts: Facts) -> bool:
        # Whether a claim belongs to an operation that began after the one of the same id.
        if self._is_before(beat, entry.last):
            return False
        if beat != entry.last:
            # Phases do not go back. So the end of a live one was missed.
            return not entry.live or (not facts.is_end and facts.goes_back_from(entry.phase))
        start = beat + facts.left - facts.estimated
        return not entry.live and facts.left > 0 and start > entry.start

    def _start(self, agent: Agent, id: str, claim: StatusClaim, facts: Facts, heard: float) -> None:
        share = self._reader.share
        type, phase, peers, is_end, left, estimated = facts
        if type not in self.kinds and len(self.kinds) >= _KINDS:
            type = OTHER_TYPES
        beat: int = share(claim.beat_index)
        parent = self._reader.kin(claim.parent)
        entry = Entry(
            agent_id=agent.id,
            id=id,
            type=type,
            phase=phase,
            state=claim.state,
            # If the budget has run out already, it had started by then, at the latest. An end alone
            # does not tell when it started.
            due=share(beat + (estimated if is_end else left)),
            last=beat,
            heard=heard,
            estimated=share(estimated),
            peers=peers,
            soft=claim.soft,
            notes=share(clean(claim.notes)),
            parent=parent,
            correlation_id=self._reader.kin(claim.correlation_id),
            history=share((phase, beat)),
            at_least=not left,
            size=0,
        )
        entry.size = share(entry.measure())
        former = agent.operations.get(id)
        if former is not None and former.live:
            self._forget(former)
        if not self._make_room(entry):
            return
        self._count += 1
        self._size += entry.size
        self.live += 1
        agent.live += 1
        agent.operations[id] = entry
        kind = self.kinds.get(type)
        if kind is None:
            kind = self.kinds[type] = Kind()
        kind.live += 1
        if is_end:
            self._end(entry)
        else:
            self._begun.append(entry)
            if len(self._begun) > 2 * self.live + 1024:
                self._begun = deque(each for each in self._begun if each.live)

    def _update(self, entry: Entry, claim: StatusClaim, facts: Facts, heard: float) -> None:
        share = self._reader.share
        beat: int = share(claim.beat_index)
        if facts.left:
            start = entry.start
            if claim.estimated_beats is not UNSET or facts.left > entry.estimated:
                entry.estimated = share(facts.estimated)
            entry.due = share(beat + facts.left)
            if not entry.at_least:
                self._move(entry, entry.start - start)
            entry.at_least = False
        else:
            # A budget that has run out does not tell when it began. So this is a guess: a claim may
            # come late, and then it is not on another grid.
            moved = round(beat - entry.last - (heard - entry.heard))
            if beat < entry.last or moved > self._slack:
                entry.due = share(entry.due + moved)
                self._move(entry, moved)
            if entry.due > beat and not facts.is_end:
                entry.due = beat
        if facts.phase != entry.phase:
            entry.phase = facts.phase
            history = (*entry.history, facts.phase, beat)
            entry.history = share(history[-2 * self._max_history :])
        if facts.peers >= 0:
            entry.peers = facts.peers
        if claim.notes != entry.notes:
            entry.notes = share(clean(claim.notes))
        entry.soft = claim.soft
        entry.last, entry.heard, entry.state = beat, heard, claim.state
        size: int = share(entry.measure())
        self._size += size - entry.size
        entry.size = size
        if facts.is_end:
            self._end(entry)

    def _move(self, entry: Entry, beats: int) -> None:
        # The agent has moved to another grid, on which all its beats have other indexes.
        if beats:
            pairs = zip(entry.history[::2], entry.history[1::2], strict=True)
            moved = tuple(part for phase, at in pairs for part in (phase, at + beats))
            entry.history = self._reader.share(moved)

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
        if entry.last > entry.due:
            kind.late += by
        if entry.used is not None:
            kind.used[bisect_left(BUCKETS, entry.used)] += by

    # Looking up.

    def find(self, agent_id: str, id: str) -> Entry | None:
        """Return an operation by its ids, as claims or views have them, or None."""
        agent = self.agents.get(self._reader.name(agent_id))
        return None if agent is None else agent.operations.get(self._reader.name(id))

    # Counting.

    def survey(self) -> None:
        """Count the live operations of each agent and type by their timing.

        It also finds out which agents are silent: those from which claims were due, and none came.
        """
        silent_before = self._ages.silent_before()
        mute_before: dict[int, float] = {}
        for kind in self.kinds.values():
            kind.live_late = 0
        for agent in self.agents.values():
            slow = late = silent = 0
            if agent.live:
                for entry in agent.operations.values():
                    if entry.state not in ("executing", "waiting"):
                        continue
                    if entry.heard <= silent_before:
                        silent += 1
                    elif entry.last > entry.due:
                        late += 1
                        self.kinds[entry.type].live_late += 1
                    elif entry.soft is True:
                        slow += 1
            agent.slow, agent.late, agent.silent = slow, late, silent
            interval = agent.due_every
            if interval not in mute_before:
                mute_before[interval] = self._ages.silent_before(interval)
            agent.mute = agent.heard <= mute_before[interval]

    def _is_mute(self, agent: Agent) -> bool:
        return agent.heard <= self._ages.silent_before(agent.due_every)

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
        self._count -= 1
        self._size -= entry.size

    def _make_room(self, entry: Entry) -> bool:
        most = self._max_operations
        while self._count >= most or self._size + entry.size > most * _BYTES:
            oldest = self._oldest(entry.start)
            if oldest is None:
                self.dropped_operations += self._leave_out(entry.key)
                return False
            if oldest.live:
                self._leave_out(oldest.key)
            self._forget(oldest)
            self.dropped_operations += 1
        return True

    def _leave_out(self, name: str) -> bool:
        # Whether that is new.
        mark = hash(name)
        if mark in self._left_out or len(self._left_out) >= _LEFT_OUT:
            return False
        self._left_out.add(mark)
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
                idle = [each for each in self.agents.values() if self._is_mute(each)]
                self._idle = sorted(idle, key=lambda each: each.heard, reverse=True)
            while self._idle:
                oldest = self._idle.pop()
                if self.agents.get(oldest.id) is oldest and self._is_mute(oldest):
                    for entry in list(oldest.operations.values()):
                        self._forget(entry)
                        self.dropped_operations += 1
                    del self.agents[oldest.id]
                    self.dropped_agents += 1
                    break
            else:
                self.dropped_agents += self._leave_out(name)
                return None
        agent = self.agents[name] = Agent(name, heard)
        return agent
