"""What is seen of a cluster: agents, operations, types of operations, and the grid.

`ClusterModel` takes in claims and the state of the grid. All views ask it for totals, pages and
trees. It reads no clock: instants are passed in, in seconds of any clock.

*The rule.* Each operation has a timing. The first row that applies gives it. The number of beats
that have passed is that of its newest claim, or at its end.

==============================================================  ==========
an operation                                                    timing
==============================================================  ==========
is live, and no claim of it has come for three beats            `silent`
has taken more beats than its estimate                          `late`
has passed its soft edge                                        `slow`
else                                                            `on_time`
==============================================================  ==========

Three beats are counted by this process, and last a second at least. Nothing is silent while the
grid is paused, while this process has no connection, and in the three beats after that. An
operation that takes just as many beats as its estimate is not late. The same rule in cases, for an
estimate of 4 beats:

=======  =======  =======  ======  ====  ==========
outcome  unheard  paused   passed  soft  timing
=======  =======  =======  ======  ====  ==========
live     0        no       0       no    on_time
live     2        no       4       no    on_time
live     0        no       4       yes   slow
live     0        no       5       no    late
live     0        no       5       yes   late
live     3        no       0       no    silent
live     3        no       9       yes   silent
live     3        yes      0       no    on_time
live     3        yes      5       no    late
done     0        no       3       no    on_time
done     9        no       4       no    on_time
done     9        no       4       yes   slow
done     0        no       5       no    late
failed   9        no       2       no    on_time
failed   9        no       7       yes   late
=======  =======  =======  ======  ====  ==========

An operation that was first seen when its budget had run out already has passed at least as many
beats as its estimate. It is late on its next beat. Until it ends, and then, its figures are lower
bounds, and `OperationView.at_least` says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final, final

from .._wire import StatusClaim
from .ages import Ages
from .entries import Agent, Entry
from .pages import choose, keys_of, make_page, mentions
from .shown import (
    BUCKETS as BUCKETS,
    MAX_TEXT as MAX_TEXT,
    OTHER_TYPES as OTHER_TYPES,
    AgentView as AgentView,
    GridView as GridView,
    OperationNode as OperationNode,
    OperationView as OperationView,
    Outcome as Outcome,
    Page as Page,
    PhaseChange as PhaseChange,
    Query as Query,
    Sort as Sort,
    Timing as Timing,
    Totals as Totals,
    TypeView as TypeView,
    clean as clean,
)
from .table import Table
from .tree import grow

# For how many bars agents and live operations that are silent are kept.
_SILENT_BARS: Final = 64
# How many types are told apart. The others are summed up.
_TYPES: Final = 200


@final
class ClusterModel:
    """What is seen of a cluster, within bounds.

    Operations that have ended are forgotten after some bars. Live ones that are silent are
    forgotten after 64 bars, or as many if that is more, and so are agents without operations.

    Args:
      max_agents: the most agents that are kept.
      max_operations: the most operations that are kept.
      keep_bars: for how many bars an operation is kept after its end.
      max_history: the most changes of phase that are kept of an operation.

    """

    def __init__(
        self,
        *,
        max_agents: int = 50_000,
        max_operations: int = 200_000,
        keep_bars: int = 8,
        max_history: int = 16,
    ) -> None:
        self.grid: GridView | None = None
        """The grid; None before the first `set_grid`."""
        self.version: int = 0
        """A number that grows with every change."""
        self._ages = Ages()
        self._table = Table(
            self._ages,
            max_agents=max_agents,
            max_operations=max_operations,
            max_history=max_history,
        )
        self._keep_bars = keep_bars
        self._surveyed = -1
        self._swept = 0.0

    # What comes in.

    def take(self, claims: Sequence[StatusClaim], now: float) -> None:
        """Take in claims, in the order in which they came.

        Claims of other clusters than that of the grid are ignored.

        Args:
          claims: the claims.
          now: when they came, in seconds.

        """
        if claims:
            self._table.take(claims, self._ages.at(now))
            self.version += 1

    def set_grid(self, grid: GridView, now: float) -> None:
        """Set the grid, and forget what ended long ago. Call it several times a second.

        Args:
          grid: the grid at that instant.
          now: the instant, in seconds.

        """
        self._ages.set_grid(grid, now)
        self.grid = grid
        self._table.locate(grid.cluster_id, grid.position, grid.tempo_bpm)
        elapsed, bar = self._ages.elapsed, grid.beats_per_bar
        self._table.expire(elapsed - self._keep_bars * bar)
        # All are looked at for this, so not each time.
        if elapsed >= self._swept + self._keep_bars * bar:
            self._swept = elapsed
            self._table.sweep(elapsed - max(self._keep_bars, _SILENT_BARS) * bar)
        self.version += 1

    # What is seen.

    def totals(self) -> Totals:
        """Return how many agents and operations there are."""
        table = self._survey()
        agents = table.agents.values()
        slow = late = silent = unhealthy = mute = 0
        for agent in agents:
            slow += agent.slow
            late += agent.late
            silent += agent.silent
            unhealthy += agent.state == "failed"
            mute += agent.mute
        return Totals(
            agents=len(agents),
            agents_unhealthy=unhealthy,
            agents_silent=mute,
            live=table.live,
            on_time=table.live - slow - late - silent,
            slow=slow,
            late=late,
            silent=silent,
            done=table.done,
            failed=table.failed,
            claims=table.claims,
            ignored=table.ignored,
            dropped_agents=table.dropped_agents,
            dropped_operations=table.dropped_operations,
        )

    def agents(self, query: Query = Query()) -> Page[AgentView]:  # noqa: B008 - it is frozen
        """Return a page of the agents that pass the filters of a query."""
        table = self._survey()
        found: Iterable[Agent] = table.agents.values()
        if query.agent:
            found = [agent for agent in found if agent.id == query.agent]
        if query.text:
            text = query.text.casefold()
            found = [agent for agent in found if mentions(agent, text)]
        if query.timing == "silent":
            found = [agent for agent in found if agent.silent or agent.mute]
        elif query.timing is not None:
            found = [agent for agent in found if self._has(agent, query.timing)]
        chosen = list(found)
        if query.sort in ("agent", "id"):
            keys: list[Any] = [agent.id for agent in chosen]
        elif query.sort == "age":
            keys = [agent.heard for agent in chosen]
        else:
            keys = [
                (-(agent.state == "failed"), -agent.mute, *(-each for each in _troubles(agent)))
                for agent in chosen
            ]
        return make_page(chosen, keys, query, self._view_agent)

    def operations(self, query: Query = Query()) -> Page[OperationView]:  # noqa: B008 - as above
        """Return a page of the operations that pass the filters of a query."""
        table = self._table
        agents: Iterable[Agent | None] = table.agents.values()
        if query.agent:
            agents = [table.agents.get(query.agent)]
        chosen = choose(
            [each for agent in agents if agent for each in agent.operations.values()],
            query,
            agents=table.agents.values(),
            types=table.kinds,
            silent_before=self._ages.silent_before(),
        )
        return make_page(chosen, keys_of(chosen, query.sort), query, self._view)

    def operation(self, agent_id: str, id: str) -> OperationView | None:
        """Return an operation, or None if the model does not have it.

        Args:
          agent_id: the agent that runs it.
          id: its id, or what is shown of it.

        """
        entry = self._table.find(agent_id, id)
        return None if entry is None else self._view(entry)

    def types(self) -> tuple[TypeView, ...]:
        """Return the types of operations, the most frequent ones first.

        Those after the 200 most frequent ones are summed up as `OTHER_TYPES`.
        """
        kinds = self._survey().kinds
        ordered = sorted(
            kinds.items(), key=lambda each: (-each[1].live - each[1].done - each[1].failed, each[0])
        )
        views = [
            TypeView(
                type=type,
                live=kind.live,
                done=kind.done,
                failed=kind.failed,
                late=kind.late + kind.live_late,
                used=tuple(kind.used),
            )
            for type, kind in ordered
        ]
        rest = views[_TYPES:]
        if rest:
            views[_TYPES:] = [
                TypeView(
                    type=OTHER_TYPES,
                    live=sum(each.live for each in rest),
                    done=sum(each.done for each in rest),
                    failed=sum(each.failed for each in rest),
                    late=sum(each.late for each in rest),
                    used=tuple(map(sum, zip(*(each.used for each in rest), strict=True))),
                )
            ]
        return tuple(views)

    def tree(self, agent_id: str, id: str) -> OperationNode | None:
        """Return the whole of which an operation is a part, from its outermost operation.

        Operations whose parents are not known are children of the outermost one. The tree has at
        most about 1,000 operations on 32 levels. It counts what is left out, and always has the
        operation itself.

        Args:
          agent_id: the agent that runs the operation.
          id: the operation.

        Returns:
          The outermost operation, or None if the model does not have the operation.

        """
        entry = self._table.find(agent_id, id)
        if entry is None:
            return None
        agents = self._table.agents.values()
        entries = (each for agent in agents for each in agent.operations.values())
        return grow(entry, entries, lambda key: self._table.find(*_split(key)), self._view)

    # Inside.

    def _survey(self) -> Table:
        if self._surveyed != self.version:
            self._table.survey()
            self._surveyed = self.version
        return self._table

    def _has(self, agent: Agent, timing: Timing) -> int:
        if timing == "on_time":
            return agent.live - agent.slow - agent.late - agent.silent
        return agent.slow if timing == "slow" else agent.late

    def _view(self, entry: Entry) -> OperationView:
        history = entry.history
        return OperationView(
            agent_id=entry.agent_id,
            id=entry.id,
            type=entry.type,
            phase=entry.phase,
            state=entry.state,
            live=entry.live,
            timing=entry.timing(self._ages.silent_before()),
            start_beat=entry.start,
            last_beat=entry.last,
            passed=entry.passed,
            estimated=entry.estimated or None,
            used=entry.used,
            beats_left=max(0, entry.due - entry.last) if entry.estimated else 0,
            peers=None if entry.peers < 0 else entry.peers,
            parent=entry.parent,
            correlation_id=entry.correlation_id,
            soft=entry.soft is True,
            notes=entry.notes,
            history=tuple(map(PhaseChange, history[::2], history[1::2])),
            outcome="live" if entry.live else "done" if entry.state == "done" else "failed",
            at_least=entry.at_least,
        )

    def _view_agent(self, agent: Agent) -> AgentView:
        return AgentView(
            agent_id=agent.id,
            state=agent.state,
            healthy=None if agent.state == "unknown" else agent.state != "failed",
            silent=agent.mute,
            notes=agent.notes,
            last_beat=agent.last,
            live=agent.live,
            slow=agent.slow,
            late=agent.late,
            silent_operations=agent.silent,
        )


def _troubles(agent: Agent) -> tuple[int, ...]:
    return agent.silent, agent.late, agent.slow, agent.live


def _split(key: str) -> tuple[str, str]:
    agent_id, _, id = key.partition("/")
    return agent_id, id
