"""A plain summary of a cluster, for pipes, logs and terminals that cannot be drawn on.

It needs no library of terminals, and has neither colours nor characters beyond ASCII of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

from .reader import Source
from .shown import GridView, Query, Timing, Totals, clean

# So many operations of each timing are named, and so many agents.
_NAMED: Final = 10
_TIMINGS: Final[tuple[Timing, ...]] = ("late", "silent", "slow")


def summarize(source: Source, position: float) -> str:
    """Return a summary in lines: the grid, how many of everything, and what is not well.

    Args:
      source: what is known of the cluster.
      position: the present position on the grid, in beats.

    """
    grid = source.grid
    lines = ["the grid is not known"] if grid is None else list(_grid(grid, position))
    lines += _totals(source.totals())
    for timing in _TIMINGS:
        lines += _operations(source, timing)
    lines += _agents(source)
    return "".join(f"{line}\n" for line in lines)


def _grid(grid: GridView, position: float) -> Iterator[str]:
    beat = math.floor(position)
    tempo = "paused" if grid.paused else f"{grid.tempo_bpm:g} BPM"
    yield f"cluster {grid.cluster_id}: beat {beat}, bar {beat // grid.beats_per_bar}, {tempo}"
    leader = "no leader"
    if grid.leader_id is not None:
        leader = f"leader {clean(grid.leader_id)}, epoch {grid.epoch}"
        if grid.standbys is not None:
            leader += f", {grid.standbys} standing by"
    connected = "connected" if grid.connected else "not connected"
    yield f"{connected}, grid {grid.grid}, {leader}"
    for change in grid.pending:
        tempo = f"{change.tempo_bpm:g} BPM" if change.tempo_bpm else "pause"
        yield f"to come: {tempo} from beat {change.beat}"
    figures = [f"drift {grid.tempo_drift}"]
    for name, seconds in (("lateness", grid.lateness), ("uncertainty", grid.uncertainty)):
        if seconds is not None:
            figures.append(f"{name} {seconds * 1e3:.3g} ms")
    yield ", ".join(figures)
    if grid.claims_refused:
        yield "permissions keep all claims from this user: agents and operations are not known"
    for error in grid.errors[-1:]:
        yield f"error: {clean(error)}"


def _totals(totals: Totals) -> Iterator[str]:
    yield (
        f"operations: {totals.live:,} live ({totals.on_time:,} on time, {totals.slow:,} slow, "
        f"{totals.late:,} late, {totals.silent:,} silent), {totals.done:,} done, "
        f"{totals.failed:,} failed"
    )
    yield (
        f"agents: {totals.agents:,} known, {totals.agents_unhealthy:,} unhealthy, "
        f"{totals.agents_silent:,} silent"
    )
    if totals.dropped_operations or totals.dropped_agents:
        yield (
            f"left out: {totals.dropped_operations:,} operations, {totals.dropped_agents:,} agents"
        )


def _operations(source: Source, timing: Timing) -> Iterator[str]:
    page = source.operations(Query(timing=timing, outcome="live", limit=_NAMED))
    for row in page.items:
        used = "" if row.used is None else f", {row.used:.0%} of its budget used"
        yield (
            f"{timing}: {clean(row.id)} of {clean(row.agent_id)}, {clean(row.type)}, "
            f"{clean(row.phase)}{used}"
        )
    if page.total > len(page.items):
        yield f"{timing}: {page.total - len(page.items):,} more"


def _agents(source: Source) -> Iterator[str]:
    # Those with the most trouble come first.
    for row in source.agents(Query(limit=_NAMED)).items:
        if row.silent or row.healthy is False:
            word = "silent" if row.silent else "unhealthy"
            yield f"{word}: agent {clean(row.agent_id)}: {clean(row.notes)}"
