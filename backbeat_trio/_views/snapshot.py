"""What the dashboard tells beyond the model's own structs, and what it can be asked for.

All of it is pure: structs, the ring of figures over time, and the operations along the bars.
"""

from __future__ import annotations

from collections import deque
from typing import Annotated, Final, TypeAlias

from msgspec import Meta, Struct
from msgspec.structs import replace

from .model import (
    AgentView,
    ClusterModel,
    GridView,
    OperationView,
    Page,
    PhaseChange,
    Query,
    Timing,
    Totals,
    TypeView,
)

MAX_LIMIT: Final = 1000
MAX_STREAMED: Final = 200
SERIES: Final = 512

# So many figures over time are in each snapshot; the others are asked for by themselves.
_SHOWN: Final = 32
_MAX_BARS: Final = 64
_LOOKED: Final = 2000

Limit: TypeAlias = Annotated[int, Meta(ge=0, le=MAX_LIMIT)]
Offset: TypeAlias = Annotated[int, Meta(ge=0, le=1_000_000)]


class SeriesPoint(Struct, frozen=True):
    """Figures of one beat.

    Attributes:
      beat: the index of the beat.
      tempo_bpm: the tempo, in beats per minute; 0.0 while the grid is paused.
      skew: how much the position may differ from that of the metronome, in seconds; None if
        unknown.
      drift: by how much the beat frames arrive faster than announced, as a ratio: 0.001 is 0.1 %;
        None if unknown.
      lateness: how late this process's own beat was, in seconds; None if unknown.

    """

    beat: int
    tempo_bpm: float
    skew: float | None
    drift: float | None
    lateness: float | None


class Snapshot(Struct, frozen=True):
    """What the page shows, at one instant.

    Attributes:
      version: grows with every change.
      grid: the grid; None before it is known.
      totals: counts over all agents and operations.
      agents: the agents that match, page by page.
      operations: the operations that match, page by page.
      types: counts by type of operation.
      skew: the figures of the newest beats, oldest first.

    """

    version: int
    grid: GridView | None
    totals: Totals
    agents: Page[AgentView]
    operations: Page[OperationView]
    types: tuple[TypeView, ...]
    skew: tuple[SeriesPoint, ...]


class SnapshotQuery(Query, frozen=True):
    """What a snapshot contains: a query of operations, and which agents.

    Attributes:
      agents_text: only agents whose id or notes contain this.
      agents_limit: the most agents.
      agents_offset: how many agents are passed over.

    """

    agents_text: str = ""
    agents_limit: Annotated[int, Meta(ge=0, le=MAX_LIMIT)] = 50
    agents_offset: Offset = 0


class TimelineQuery(Query, frozen=True):
    """Which operations the timeline shows.

    Attributes:
      bars: how many bars back from the present one, which counts.

    """

    bars: Annotated[int, Meta(ge=1, le=_MAX_BARS)] = 4


class TimelineItem(Struct, frozen=True):
    """An operation along the bars.

    Attributes:
      agent_id: the agent that runs it.
      id: its id.
      type: its type.
      start_beat: the beat on which it started.
      last_beat: the beat of its newest claim; the beat on which it ended if it is not live.
      budget_beat: the beat on which its budget ends; None if it has none.
      outcome: ``"live"``, ``"done"`` or ``"failed"``.
      timing: whether it is or was late.
      phases: when it changed its phase.

    """

    agent_id: str
    id: str
    type: str
    start_beat: int
    last_beat: int
    budget_beat: int | None
    outcome: str
    timing: Timing
    phases: tuple[PhaseChange, ...]


class Timeline(Struct, frozen=True):
    """Operations along the bars.

    Attributes:
      first_beat: the first beat of the first bar.
      last_beat: the last beat of the present bar.
      beat: the present beat.
      beats_per_bar: the beats of a bar.
      total: how many operations were found, of which `items` may be only some.
      omitted: how many more pass the filters, which were not looked at because they are too many.
      items: the operations that were live in these bars, newest start first.

    """

    first_beat: int
    last_beat: int
    beat: int
    beats_per_bar: int
    total: int
    omitted: int
    items: tuple[TimelineItem, ...]


class Series:
    """Figures of the newest beats."""

    def __init__(self, size: int = SERIES) -> None:
        self._points: deque[SeriesPoint] = deque(maxlen=size)

    def take(self, grid: GridView) -> None:
        """Take the figures of the present beat, unless that was done before. Not a checkpoint."""
        points = self._points
        if points and points[-1].beat >= grid.beat:
            if points[-1].beat == grid.beat:
                return
            # Another grid, which counts from another beat.
            points.clear()
        drift = None
        if grid.measured_bpm is not None and grid.tempo_bpm:
            drift = grid.measured_bpm / grid.tempo_bpm - 1
        points.append(
            SeriesPoint(grid.beat, grid.tempo_bpm, grid.uncertainty, drift, grid.lateness)
        )

    def newest(self, count: int = SERIES) -> tuple[SeriesPoint, ...]:
        """Return the figures of the newest beats, oldest first. Not a checkpoint."""
        return tuple(self._points)[-count:] if count else ()


def take_snapshot(model: ClusterModel, series: Series, query: SnapshotQuery) -> Snapshot:
    """Return what the page shows. Not a checkpoint.

    Args:
      model: the cluster.
      series: the figures over time.
      query: which operations and agents.

    """
    agents = Query(text=query.agents_text, limit=query.agents_limit, offset=query.agents_offset)
    return Snapshot(
        model.version,
        model.grid,
        model.totals(),
        model.agents(agents),
        model.operations(query),
        model.types(),
        series.newest(_SHOWN),
    )


def gist(snapshot: Snapshot) -> Snapshot:
    """Return a snapshot without the figures that move on all the time. Not a checkpoint."""
    grid = snapshot.grid
    if grid is not None:
        grid = replace(
            grid,
            position=0.0,
            measured_bpm=None,
            uncertainty=None,
            last_frame_age=None,
            lateness=None,
        )
    return replace(snapshot, version=0, grid=grid)


def take_timeline(model: ClusterModel, query: TimelineQuery) -> Timeline:
    """Return the operations along the bars. Not a checkpoint.

    At most 2,000 operations that pass the filters are looked at, in the order of the query.

    Args:
      model: the cluster.
      query: which operations, and how many bars.

    """
    grid = model.grid
    if grid is None:
        return Timeline(0, 0, 0, 1, 0, 0, ())
    size = grid.beats_per_bar
    last = (grid.bar + 1) * size - 1
    first = max(0, (grid.bar + 1 - query.bars) * size)
    page = model.operations(replace(query, limit=_LOOKED, offset=0))
    found = [each for each in page.items if each.live or each.last_beat >= first]
    found.sort(key=lambda each: each.start_beat, reverse=True)
    items = tuple(
        TimelineItem(
            each.agent_id,
            each.id,
            each.type,
            each.start_beat,
            each.last_beat,
            None if each.estimated is None else each.start_beat + each.estimated,
            each.outcome,
            each.timing,
            each.history,
        )
        for each in found[query.offset : query.offset + query.limit]
    )
    omitted = page.total - len(page.items)
    return Timeline(first, last, grid.beat, size, len(found), omitted, items)
