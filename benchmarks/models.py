"""Measure the model of the views: how many claims it takes in, its memory, and its pages.

Run it as ``python benchmarks/models.py [--quick] [--json PATH] [--only NAME ...]``. It prints a
table as ``bench.py`` does. Claims are decoded beforehand, in batches of 1,000. Seconds are those of
this thread on the processor, so that other processes count less.
"""

from __future__ import annotations

import gc
import resource
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Final, NamedTuple

import trio
from report import Figure, Outcome, Rounds, Target, run

from backbeat_trio._views.model import ClusterModel, GridView, Query, Sort
from backbeat_trio._wire import StatusClaim, decode_claims, encode

CLUSTER: Final = "chorus-production"
PHASES: Final = ("started", "connecting", "negotiating", "executing")
BATCH: Final = 1000
SORTS: Final[tuple[Sort, ...]] = ("used", "left", "age", "agent", "type", "phase", "id")

TARGETS: Final = {
    "take": Target("claims of live operations taken in by the model", "≥", 600_000, "/s"),
    "changes": Target("the same where each changes its phase", "≥", 60_000, "/s"),
    "few_pages": Target("longest page of 10,000 operations", "≤", 10.0, "ms"),
    "pages": Target("longest page of 200,000 operations", "≤", 150.0, "ms"),
    "totals": Target("totals of 200,000 operations", "≤", 150.0, "ms"),
    "memory": Target("memory of a model of 200,000 live operations", "≤", 150.0, "MB"),
    "spread": Target("the same, four of each agent", "≤", 150.0, "MB"),
}


class Sizes(NamedTuple):
    """How much to measure."""

    rounds: int
    few: int
    many: int
    agents: int


FULL: Final = Sizes(7, 10_000, 200_000, 200)
QUICK: Final = Sizes(2, 1_000, 10_000, 20)


def make_claims(count: int, agents: int, beat: int, phase: str) -> Iterator[list[StatusClaim]]:
    """Make the claims of a beat as they come: decoded, in batches of one agent each."""
    for number in range(agents):
        agent = f"chorus-agent-{number:05}"
        claims = [
            StatusClaim(
                agent_id=agent,
                task_id=f"task_coordination-{each:012x}",
                beat_index=beat,
                state="executing",
                beats_left=1000 - beat,
                progress=beat / 1000,
                # As long as those of a node whose id is a peer's. No two are equal.
                notes=f"P2P task_coordination: {phase} (peers: 3, node: 12D3KooW{each:060x})",
                cluster_id=CLUSTER,
                operation_type="task_coordination",
                phase=phase,
                peers=3,
                estimated_beats=1000,
                parent=f"{agent}/election-{each // 50:012x}",
                correlation_id=f"{agent}/election-{each // 50:012x}",
            )
            for each in range(number * count // agents, (number + 1) * count // agents)
        ]
        for begin in range(0, len(claims), BATCH):
            yield decode_claims(encode(claims[begin : begin + BATCH]))


def look(model: ClusterModel, beat: int) -> None:
    """Set the grid of a model, of which a beat lasts a second."""
    grid = GridView(CLUSTER, beat, beat, beat // 8, 8, 60.0, False, "locked", True)
    model.set_grid(grid, float(beat))


def seconds_of(call: Callable[[], object]) -> float:
    """Return the seconds of the processor that a call takes."""
    begin = time.thread_time()
    call()
    return time.thread_time() - begin


def fill(model: ClusterModel, count: int, agents: int) -> list[float]:
    """Let operations pass through their phases, and return the claims taken in a second."""
    rates = []
    for beat, phase in enumerate(PHASES):
        look(model, beat)
        seconds = 0.0
        for claims in make_claims(count, agents, beat, phase):
            seconds += seconds_of(partial(model.take, claims, beat))
        rates.append(count / seconds)
    return rates


def repeat(model: ClusterModel, count: int, agents: int, beat: int) -> float:
    """Let all operations claim on a beat, and return the claims taken in a second."""
    look(model, beat)
    batches = list(make_claims(count, agents, beat, PHASES[-1]))

    def take() -> None:
        for claims in batches:
            model.take(claims, beat)

    return count / seconds_of(take)


def page_times(model: ClusterModel, turns: int) -> dict[str, float]:
    """Return how long a page takes in each order, plain and with filters, in milliseconds."""
    times = {}
    for sort in SORTS:
        for filtered in (False, True):
            query = Query(sort=sort)
            if filtered:
                query = Query(
                    text="a5", type="task_coordination", timing="on_time", sort=sort, reverse=True
                )
            taken = [seconds_of(partial(model.operations, query)) for _ in range(turns)]
            times[f"{sort}{', filtered' * filtered}"] = 1e3 * median(taken)
    return times


async def bench_take(sizes: Sizes) -> Outcome:
    rounds: Rounds = {}
    model = ClusterModel()
    rounds["changes_per_s"] = fill(model, sizes.few, sizes.agents)
    beats = range(len(PHASES), len(PHASES) + 5 * sizes.rounds)
    rounds["take_per_s"] = [repeat(model, sizes.few, sizes.agents, beat) for beat in beats]
    large = ClusterModel()
    rounds["many_changes_per_s"] = fill(large, sizes.many, sizes.agents)
    beats = beats[: sizes.rounds]
    rounds["many_take_per_s"] = [repeat(large, sizes.many, sizes.agents, beat) for beat in beats]
    totals = []
    for _ in range(sizes.rounds):
        look(large, beats.stop)
        totals.append(1e3 * seconds_of(large.totals))
    rounds["totals_ms"] = totals
    assert large.totals().live == sizes.many
    few, many = page_times(model, sizes.rounds), page_times(large, sizes.rounds)
    rounds |= {f"page {name}, ms": [few[name], many[name]] for name in few}
    longest_few, longest = (max(times, key=lambda name: times[name]) for times in (few, many))
    of_few = f"{median(rounds['take_per_s']):,.0f} /s of {sizes.few:,}"
    return [
        Figure("take", median(rounds["many_take_per_s"]), f"of {sizes.many:,}; {of_few}"),
        Figure("changes", median(rounds["many_changes_per_s"]), "its start, too"),
        Figure("few_pages", few[longest_few], f"by {longest_few}"),
        Figure("pages", many[longest], f"by {longest}; plainly by used {many['used']:.1f} ms"),
        Figure("totals", median(totals), "with all agents and types"),
    ], rounds


def peak() -> float:
    """Return the most memory that was resident in this process so far, in MB."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e3
    except OSError:
        # In bytes there. Elsewhere it would be that of the parent, too.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def measure_memory(count: int, agents: int) -> None:
    """Print by how much a model makes this process grow, and its size then, in MB."""
    # What the first claims need once is there already.
    fill(ClusterModel(), BATCH, 1)
    gc.collect()
    before = peak()
    model = ClusterModel()
    fill(model, count, agents)
    assert model.totals().live == count
    print(peak() - before, peak())


async def measure_apart(name: str, count: int, agents: int) -> Outcome:
    """Measure memory in a process of its own."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); "
        f"import models; models.measure_memory({count}, {agents})"
    )
    done = await trio.run_process([sys.executable, "-c", code], capture_stdout=True)
    grown, whole = map(float, done.stdout.split())
    note = f"of {agents:,} agents; the peak of the process is {whole:.0f} MB"
    return [Figure(name, grown, note)], {"grown_mb": [grown], "peak_mb": [whole]}


async def bench_memory(sizes: Sizes) -> Outcome:
    return await measure_apart("memory", sizes.many, sizes.agents)


async def bench_spread(sizes: Sizes) -> Outcome:
    return await measure_apart("spread", sizes.many, sizes.many // 4)


BENCHMARKS: Final = {"take": bench_take, "memory": bench_memory, "spread": bench_spread}


if __name__ == "__main__":
    run(
        *("views", "Measure the model of the views.", BENCHMARKS, TARGETS),
        full=FULL,
        quick=QUICK,
    )
