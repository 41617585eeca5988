"""Simulate a cluster of many agents, and print how well they agree, with the targets.

Run it as ``python simulation/simulate.py [--agents N] [--seconds S] [--seed N] [--quick] [--jobs N]
[--regions N] [--json PATH] [--plot PATH]``. It exits with 1 if a target is missed.

There is no process, socket or clock. Time is a number that the programs in this folder set, so the
same seed gives the same figures, with any number of jobs.

The pure core in the folder ``_grid`` is the real code of ``backbeat_trio``: how an agent judges the
pings and frames that it receives (`Follower`), how it steers its clock (`Steering`), what it
reports about itself, and how a leader changes the grid (`propose` and `reschedule`).

All parts around that core are simulated, by the rules of the real parts:

- ``simulated_agents.py``: clocks that are wrong, a network that delays and loses messages, loops
  that stall, and what `BeatListener` and `BeatClock` do;
- ``simulated_leaders.py``: what `Leader` and `Standby` do, failovers included;
- ``simulated_regions.py``: the ways between regions, and a metronome for each region.

Two things are left out: a leader that receives more requests than it can answer, and an overloaded
server.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from rich.console import Console
from rich.table import Table

from backbeat_trio._grid.punctuality import TempoDrift

# The benchmarks have the code that prints the table.
sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import simulated_regions
from report import Figure, Target, make_console, make_table, results_of, write_json
from simulated_agents import (
    MILLI,
    MS,
    SAMPLE_NS,
    SECOND,
    SETTLED_NS,
    US,
    Outcome,
    World,
    differences,
    numbers,
    percentile,
    populate,
)
from simulated_leaders import schedule, tell

HOLDOVER_NS: Final = 60 * SECOND

TARGETS: Final = {
    "same_index": Target(
        "agents that never stall and had every beat at its tempo", "≥", 100.0, "%"
    ),
    "lost": Target("beats skipped by agents whose loop never stalls", "≤", 0, ""),
    "stalled_lost": Target("beats skipped that no stall explains", "≤", 0, ""),
    "back": Target("times that a position went back", "≤", 0, ""),
    "relocks": Target("moves to another grid after the first lock", "≤", 0, ""),
    "error": Target("cluster time of an agent, p99 of its error", "≤", 1.0, "ms"),
    "skew": Target("two agents at one instant, p99 of the difference", "≤", 0.2, "ms"),
    "beats": Target("one beat at two agents, p99 of the difference", "≤", 2.0, "ms"),
    "honest": Target("errors within the reported uncertainty", "≥", 99.9, "%"),
    "holdover": Target("60 s without a leader, at ±200 ppm, largest error", "≤", 5.0, "ms"),
    "drift": Target("verdicts on the tempo that are acceptable", "≥", 99.0, "%"),
    "pings": Target("pings a second of 10,000 settled agents at 120 BPM", "≤", 4000, "/s"),
}
# After this many seconds, the estimates of undisturbed agents do not get better any more.
REST_S: Final = 400.0


def in_tempo(outcome: Outcome, tempos: dict[int, int]) -> bool:
    """Tell whether an agent had every beat at the tempo that the leader gave it."""
    return all(
        math.isnan(tempo) or tempo == tempos[beat]
        for beat, tempo in enumerate(outcome.tempos)
        if beat in tempos
    )


class Spread(NamedTuple):
    """How the agents lay at one instant, in ns."""

    second: float
    median: float
    p99: float
    """How far 99 % of them are from the median at most."""
    whole: float
    """How far the two outermost ones are apart."""


def spreads(outcomes: Sequence[Outcome]) -> list[Spread]:
    """Return how the agents lay at every sample."""
    found = []
    for sample in range(len(outcomes[0].errors)):
        values = numbers(outcome.errors[sample] for outcome in outcomes)
        if values:
            median = percentile(values, 0.5)
            away = sorted(abs(value - median) for value in values)
            whole = values[-1] - values[0]
            found.append(Spread(sample * SAMPLE_NS / 1e9, median, percentile(away, 0.99), whole))
    return found


class Report(NamedTuple):
    """What came of a simulation."""

    figures: list[Figure]
    bars: dict[str, list[float]]
    """What there are distributions of, in ms."""
    missed: dict[str, Counter[int]]
    """How many agents have missed so many beats: by whether their loop ever stalls."""
    spreads: list[Spread]
    marks: list[tuple[float, str]]
    numbers: dict[str, Any]


def in_ms(ordered: Sequence[float]) -> str:
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999, "max": 1.0}
    return ", ".join(f"{name} {percentile(ordered, s) / MS:.3f}" for name, s in shares.items())


def simulate(agents: int, seconds: float, seed: int, jobs: int) -> Report:
    """Simulate a cluster."""
    story = tell(schedule(seconds), seconds, random.Random(f"{seed}:leaders"))
    history = story.history
    outcomes = populate(World(history, seconds, f"{seed}:agents"), agents, jobs)
    settled = SETTLED_NS // SAMPLE_NS
    errors = numbers(abs(e) for outcome in outcomes for e in outcome.errors[settled:])
    skews = differences([outcome.errors for outcome in outcomes], settled)
    steady = [outcome for outcome in outcomes if not outcome.stalls]
    beat0 = settled * MILLI // 60_000
    delivery = differences([outcome.beats for outcome in steady], beat0)
    honest = [
        abs(error) <= told
        for outcome in outcomes
        for error, told in zip(outcome.errors, outcome.told, strict=True)
        if not math.isnan(told)
    ]
    # An agent that is stalled from the announcement of a change until it takes effect learns of it
    # late.
    right, woken = (
        sum(in_tempo(outcome, history.tempos) for outcome in some)
        for some in (steady, [outcome for outcome in outcomes if outcome.stalls])
    )
    verdicts = sum((outcome.verdicts for outcome in outcomes), Counter[TempoDrift]())
    judged = sum(count for verdict, count in verdicts.items() if verdict != "unknown")
    found = spreads(outcomes)
    wholes = sorted(spread.whole for spread in found if spread.second >= SETTLED_NS / SECOND)
    lost = sum(outcome.lost for outcome in steady)
    stalling = [outcome for outcome in outcomes if outcome.stalls]
    stalled = sum(outcome.lost for outcome in stalling)
    held = hold_over(max(40, agents // 20), seed, jobs)
    resting = rest(max(40, agents // 100), seed, jobs)
    pings = [outcome.pings_a_second for outcome in resting]
    rested = differences([outcome.errors for outcome in resting], round(0.75 * REST_S))
    locks = sorted(outcome.lock_s for outcome in outcomes)
    changes = sum(a != b for a, b in itertools.pairwise(history.tempos.values()))
    figures = [
        Figure(
            "same_index",
            100 * right / max(1, len(steady)),
            f"{right:,} of {len(steady):,}, and {woken:,} of {agents - len(steady):,} that stall; "
            f"{changes} changes",
        ),
        Figure("lost", lost, f"{sum(outcome.struck for outcome in steady):,} beats"),
        Figure(
            "stalled_lost",
            stalled,
            f"{len(stalling):,} agents that stall; {sum(o.lost_to_stalls for o in stalling):,} "
            "skipped in stalls",
        ),
        Figure("back", sum(outcome.back for outcome in outcomes), ""),
        Figure(
            "relocks",
            sum(outcome.locks - 1 for outcome in outcomes),
            f"first lock after p50 {percentile(locks, 0.5):.3f} s, max {locks[-1]:.3f} s",
        ),
        Figure("error", percentile(errors, 0.99) / MS, in_ms(errors)),
        Figure(
            "skew",
            percentile(skews, 0.99) / MS,
            f"{in_ms(skews)}; outermost two at one instant: {in_ms(wholes)}",
        ),
        Figure("beats", percentile(delivery, 0.99) / MS, in_ms(delivery)),
        Figure(
            "honest",
            100 * sum(honest) / len(honest),
            f"{honest.count(False):,} of {len(honest):,} were wrong by more than they said",
        ),
        Figure("holdover", held[-1] / MS, in_ms(held)),
        Figure(
            "drift",
            100 * verdicts["acceptable"] / max(1, judged),
            f"the verdict was lost {sum(outcome.flaps for outcome in outcomes):,} times",
        ),
        Figure(
            "pings",
            10_000 * sum(pings) / len(pings),
            f"by {len(resting):,} agents of ±200 ppm after {0.75 * REST_S:g} s; two of them at "
            f"one instant: {in_ms(rested)}",
        ),
    ]
    return Report(
        figures,
        {
            "skew of two agents": [value / MS for value in skews],
            "skew of a beat at two agents": [value / MS for value in delivery],
        },
        {
            "never stalls": Counter(outcome.missed for outcome in steady),
            "stalls": Counter(outcome.missed for outcome in stalling),
        },
        found,
        story.marks,
        {
            "outlying": sum(outcome.outlying for outcome in outcomes),
            "takeovers": [
                {"silent_s": silence, "error_us": error / US} for silence, error in story.takeovers
            ],
        },
    )


def hold_over(agents: int, seed: int, jobs: int) -> list[float]:
    """Return the errors of bad clocks that had the leader for a minute, and not for another."""
    cut, seconds = 65 * SECOND, 65 + HOLDOVER_NS / SECOND + 2
    story = tell((), seconds, random.Random(f"{seed}:holdover"), standbys=0)
    world = World(
        story.history, seconds, f"{seed}:held", rates=(-200, 200), cut_ns=cut, stalls=False
    )
    outcomes = populate(world, agents, jobs)
    sample = (cut + HOLDOVER_NS) // SAMPLE_NS
    return numbers(abs(outcome.errors[sample]) for outcome in outcomes)


def rest(agents: int, seed: int, jobs: int) -> list[Outcome]:
    """Return what became of agents with bad clocks that nothing disturbed for long."""
    story = tell((), REST_S, random.Random(f"{seed}:rest"), standbys=0, milli=120_000)
    world = World(story.history, REST_S, f"{seed}:rested", rates=(-200, 200), stalls=False)
    return populate(world, agents, jobs)


# What is shown.


def show_bars(title: str, values: Sequence[float], unit: str, console: Console) -> None:
    """Print a histogram, of steps that double."""
    table = Table(title, "share", "", box=None)
    counts = Counter(max(-7, math.ceil(math.log2(max(value, 1e-9)))) for value in values)
    for power in range(min(counts, default=0), max(counts, default=-1) + 1):
        share = counts[power] / len(values)
        bar = "█" * max(share > 0, round(60 * share))
        table.add_row(f"to {2.0**power:g} {unit}", f"{100 * share:.3f} %", bar)
    console.print(table)


def show_missed(missed: Mapping[str, Counter[int]], console: Console) -> None:
    """Print how many agents have missed how many beats."""
    for group, counts in missed.items():
        table = Table(f"missed beats of an agent whose loop {group}", "agents", "", box=None)
        for beats in range(max(counts, default=-1) + 1):
            share = counts[beats] / counts.total()
            bar = "█" * max(share > 0, round(60 * share))
            table.add_row(f"{beats}", f"{counts[beats]:,}", bar)
        console.print(table)


def plot(path: Path, report: Report, title: str) -> None:
    """Draw how far the agents are apart, when, and how many beats they miss."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, (apart, spread, missed) = plt.subplots(
        1, 3, figsize=(18, 6), width_ratios=(5, 7, 4), layout="constrained"
    )
    # Room for the labels of the marks.
    above = 60
    # Below, where a legend covers nothing.
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.12), "frameon": False}
    for name, values in report.bars.items():
        # So many points are enough of a line.
        shown = values[:: max(1, len(values) // 5000)] + values[-1:]
        ranks = [(number + 1) / len(shown) for number in range(len(shown))]
        apart.plot(shown, ranks, label=name)
    apart.set(xscale="log", xlabel="ms", ylabel="share of pairs")
    apart.set_title("how far two are apart", pad=above)
    apart.set_xlim(1e-3)
    apart.grid(alpha=0.3)
    apart.legend(**below)
    seconds = [each.second for each in report.spreads]
    spread.plot(seconds, [s.whole / MS for s in report.spreads], label="outermost two agents")
    spread.plot(seconds, [s.p99 / MS for s in report.spreads], label="99 % about the median")
    spread.plot(seconds, [abs(s.median) / MS for s in report.spreads], label="error of the median")
    colours = {"failover": "C3", "ramp": "C4", "pause": "C7", "resume": "C7", "tempo": "C5"}
    for second, what in report.marks:
        colour = colours.get(what, "C7")
        spread.axvline(second, color=colour, linestyle=":")
        # Above the axes, as whatever is in them may be as high.
        spread.annotate(
            what,
            (second, 1.01),
            xycoords=("data", "axes fraction"),
            rotation=60,
            color=colour,
            ha="left",
            va="bottom",
            rotation_mode="anchor",
        )
    spread.set(yscale="log", xlabel="s", ylabel="ms")
    spread.set_title("spread of cluster time", pad=above)
    spread.grid(alpha=0.3)
    spread.legend(**below, ncols=3)
    most = max((max(counts, default=0) for counts in report.missed.values()), default=0)
    for side, (group, counts) in enumerate(report.missed.items()):
        shares = [100 * counts[beats] / max(1, counts.total()) for beats in range(most + 1)]
        places = [beats + 0.4 * (side - 0.5) for beats in range(most + 1)]
        label = f"loop {group}: {counts.total():,} agents"
        missed.bar(places, shares, 0.4, label=label, color=f"C{2 * side}")
    missed.set(xlabel="beats missed", ylabel="% of agents")
    missed.set_title("beats that an agent missed", pad=above)
    # A few of many agents are to be seen beside all the others.
    missed.set_yscale("symlog", linthresh=0.1)
    missed.set_xticks(range(0, most + 1, -(-(most + 1) // 12)))
    missed.grid(alpha=0.3, axis="y")
    missed.legend(**below)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Simulate many agents on the pure core.")
    parser.add_argument("--agents", type=int, help="default 10000; with --regions 300")
    parser.add_argument("--seconds", type=float, help="default 120; at least 40")
    parser.add_argument("--seed", type=int, default=1, help="default %(default)s")
    parser.add_argument("--quick", action="store_true", help="fewer agents and a shorter time")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="default %(default)s")
    parser.add_argument("--regions", type=int, default=0, help="number of regions on one grid")
    parser.add_argument("--json", type=Path, help="file for the figures, as JSON")
    parser.add_argument("--plot", type=Path, help="file for a picture of them, by matplotlib")
    arguments = parser.parse_args(argv)
    if arguments.regions == 1 or arguments.regions < 0:
        parser.error("--regions takes 2 or more")
    if arguments.regions and arguments.plot:
        parser.error("there is no plot of regions")
    usual = (200, 60.0) if arguments.quick else (300 if arguments.regions else 10_000, 120.0)
    agents, seconds = arguments.agents or usual[0], arguments.seconds or usual[1]
    if seconds < 40 or agents < max(2, 2 * arguments.regions):
        parser.error("too little to simulate")
    console = make_console()
    begun = time.perf_counter()
    results: dict[str, Any] = {"agents": agents, "seconds": seconds, "seed": arguments.seed}
    if arguments.regions:
        ways = {
            milli: simulated_regions.simulate(
                arguments.regions, agents, seconds, arguments.seed, arguments.jobs, milli
            )
            for milli in (120_000, 300_000)
        }
        for milli, found in ways.items():
            simulated_regions.show(milli, found, console)
        figures, targets = simulated_regions.figures_of(ways), simulated_regions.TARGETS
        results["regions"] = {
            str(m): [simulated_regions.results_of(way) for way in w] for m, w in ways.items()
        }
    else:
        report = simulate(agents, seconds, arguments.seed, arguments.jobs)
        for name, values in report.bars.items():
            show_bars(name, values, "ms", console)
        show_missed(report.missed, console)
        figures, targets = report.figures, TARGETS
        results |= report.numbers | {
            "marks": report.marks,
            "missed": report.missed,
            "spreads": [spread._asdict() for spread in report.spreads],
        }
        if arguments.plot:
            plot(arguments.plot, report, f"{agents:,} agents, seed {arguments.seed}")
    results["figures"] = results_of(figures, targets)
    console.print(make_table(figures, targets))
    console.print(
        f"{agents:,} agents for {seconds:g} s, seed {arguments.seed}, "
        f"simulated in {time.perf_counter() - begun:.0f} s by {arguments.jobs} jobs"
    )
    if arguments.json:
        write_json(arguments.json, results)
    return not all(targets[figure.name].met(figure.measured) for figure in figures)


if __name__ == "__main__":
    sys.exit(main())
