"""Several simulated regions on one grid: with one leader for all, or with a metronome in each."""

from __future__ import annotations

import itertools
import math
import random
from array import array
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from report import Figure, Target
from rich.console import Console
from rich.table import Table
from simulated_agents import (
    FOREVER,
    HERE,
    MS,
    SAMPLE_NS,
    SECOND,
    SETTLED_NS,
    Agent,
    History,
    Link,
    LocalClock,
    Outcome,
    Reign,
    World,
    differences,
    far,
    numbers,
    percentile,
    populate,
)
from simulated_leaders import Change, Failure, Story, tell

from backbeat_trio._grid.timeline import beat_ns

TARGETS: Final = {
    "within": Target("agents of one region at one instant, p99", "≤", 1.0, "ms"),
    "honest": Target("errors within both uncertainties together", "≥", 99.9, "%"),
    "lead": Target("on the same index, with a lead of 3 beats or more", "≥", 100.0, "%"),
}


class Way(NamedTuple):
    """What came of one way to have several regions on one grid."""

    what: str
    within: list[float]
    """How far two agents of one region are apart, in ns."""
    between: list[float]
    """How far two agents of different regions are apart."""
    errors: list[float]
    honest: float
    """Of the errors, how many are within the uncertainty that the agent tells; in %."""
    honest_together: float
    """The same with what the metronome of its region tells added to it."""
    right: dict[int, tuple[int, int]]
    """By the least beats between a change and its effect: agents on its index, and all agents."""
    far_pings: float
    """Pings between regions, a second, in the last quarter of the time."""


class Metronome(NamedTuple):
    """A region's own metronome: it follows the first region, and leads its own one."""

    history: History
    errors: dict[int, float]
    told: dict[int, int]
    pings_a_second: float


def changes_of(seconds: float, milli: int) -> list[Change | Failure]:
    """Return changes with leads of different lengths, and one failover."""
    changes: list[Change | Failure] = []
    # A pause is over when everybody has been told, which takes up to two seconds.
    step = max(12 * beat_ns(milli), 6 * SECOND)
    chance = random.Random(milli)
    failed = False
    for number in range(round((seconds - 5) * SECOND - SETTLED_NS) // step):
        at = SETTLED_NS + number * step + round(chance.random() * beat_ns(milli))
        if not failed and at > seconds * SECOND / 2:
            failed = True
            changes.append(Failure(at, gone=True))
            continue
        extra = number % 4
        if number % 5 == 4:
            changes.append(Change(at, "pause", 0, extra=extra))
            changes.append(Change(at + step // 2, "resume", None))
        else:
            tempo = milli * 5 // 4 if number % 2 else milli
            changes.append(Change(at, "tempo", tempo, extra=extra))
    return changes


def follow(
    root: History, seconds: float, chance: random.Random, link: tuple[Link, Link]
) -> Metronome:
    """Have the metronome of a region follow the first region's grid."""
    clock, history = LocalClock(chance, chance.gauss(0, 50), seconds), History()
    metronome = Agent(root, chance, clock, up=link[0], down=link[1], seconds=seconds)
    reign = Reign(1, clock, FOREVER)
    metronome.leads = reign, history
    history.reigns.append(reign)
    pings_a_second = metronome.run_and_count(seconds)
    history.tempos = root.tempos
    return Metronome(history, metronome.errors, metronome.told, pings_a_second)


def weigh(
    what: str,
    regions: Sequence[Sequence[Outcome]],
    metronomes: Sequence[Metronome | None],
    story: Story,
    far_pings: float,
) -> Way:
    """Return what came of one way, given the agents of each region and whom they follow."""
    settled = SETTLED_NS // SAMPLE_NS
    within: list[float] = []
    errors: list[list[array[float]]] = []
    honest = together = samples = 0
    for outcomes, metronome in zip(regions, metronomes, strict=True):
        within += differences([outcome.errors for outcome in outcomes], settled)
        rows = []
        for outcome in outcomes:
            row = outcome.errors[:]
            for sample in range(settled, len(row)):
                told = outcome.told[sample]
                if math.isnan(told):
                    continue
                also = 0
                if metronome is not None:
                    row[sample] += metronome.errors[sample]
                    also = metronome.told[sample]
                samples += 1
                honest += abs(row[sample]) <= told
                together += abs(row[sample]) <= told + also
            rows.append(row[settled:])
        errors.append(rows)
    between = [
        abs(a - b)
        for mine, theirs in itertools.combinations(errors, 2)
        for row, other in zip(mine, theirs, strict=False)
        for a, b in zip(row, other, strict=True)
    ]
    right: dict[int, tuple[int, int]] = {}
    for change, beat in story.kept:
        if change.extra is not None:
            lead = 2 + change.extra
            tempos = [outcome.tempos[beat] for outcomes in regions[1:] for outcome in outcomes]
            good, of = right.get(lead, (0, 0))
            right[lead] = good + tempos.count(change.milli or 0), of + len(tempos)
    return Way(
        what,
        sorted(within),
        numbers(between),
        numbers(abs(error) for rows in errors for row in rows for error in row),
        100 * honest / samples,
        100 * together / samples,
        dict(sorted(right.items())),
        far_pings,
    )


def simulate(
    regions: int, agents: int, seconds: float, seed: int, jobs: int, milli: int
) -> list[Way]:
    """Simulate some regions on one grid, in both ways."""
    chance = random.Random(f"{seed}:regions:{milli}")
    story = tell(changes_of(seconds, milli), seconds, chance, milli=milli)
    root, each = story.history, agents // regions
    links = ((HERE, HERE), *((far(chance), far(chance)) for _ in range(1, regions)))
    world = World(root, seconds, f"{seed}:one", links=links, stalls=False)
    outcomes = populate(world, each * regions, jobs)
    nobody = [None] * regions
    apart = [outcomes[region::regions] for region in range(regions)]
    pings = sum(outcome.pings_a_second for away in apart[1:] for outcome in away)
    one = weigh("one leader for all", apart, nobody, story, pings)
    home = World(root, seconds, f"{seed}:strata:0", stalls=False)
    metronomes: list[Metronome | None] = [None]
    apart = [populate(home, each, jobs)]
    for region in range(1, regions):
        chance = random.Random(f"{seed}:metronome:{milli}:{region}")
        metronome = follow(root, seconds, chance, links[region])
        metronomes.append(metronome)
        there = home._replace(history=metronome.history, seed=f"{seed}:strata:{region}")
        apart.append(populate(there, each, jobs))
    pings = sum(metronome.pings_a_second for metronome in metronomes if metronome is not None)
    return [one, weigh("a metronome to each region", apart, metronomes, story, pings)]


def show(tempo: int, ways: Sequence[Way], console: Console) -> None:
    table = Table(f"regions, at {tempo / 1000:g} BPM", *(way.what for way in ways))
    rows: dict[str, Callable[[Way], str]] = {
        "two agents of one region, p99": lambda w: f"{percentile(w.within, 0.99) / MS:.3f} ms",
        "two agents of two regions, p50": lambda w: f"{percentile(w.between, 0.5) / MS:.2f} ms",
        "two agents of two regions, p99": lambda w: f"{percentile(w.between, 0.99) / MS:.2f} ms",
        "largest error": lambda w: f"{w.errors[-1] / MS:.2f} ms",
        "within the uncertainty told": lambda w: f"{w.honest:.2f} %",
        "with the metronome's added": lambda w: f"{w.honest_together:.2f} %",
        "pings between regions": lambda w: f"{w.far_pings:,.1f} /s",
    }
    for what, text in rows.items():
        table.add_row(what, *map(text, ways))
    for lead in ways[0].right:
        shares = [way.right[lead] for way in ways]
        table.add_row(
            f"on the same index, told {lead} beats ahead",
            *(f"{100 * good / of:.3f} % ({of - good:,} of {of:,} late)" for good, of in shares),
        )
    console.print(table)


def figures_of(ways: dict[int, list[Way]]) -> list[Figure]:
    strata = [way for found in ways.values() for way in found if way.what != "one leader for all"]
    both = [way for found in ways.values() for way in found]
    leads = [way.right[lead] for way in both for lead in way.right if lead >= 3]
    good, of = (sum(column) for column in zip(*leads, strict=True))
    return [
        Figure("within", max(percentile(way.within, 0.99) for way in strata) / MS, ""),
        Figure("honest", min(way.honest_together for way in both), ""),
        Figure("lead", 100 * good / of, f"{of - good:,} of {of:,} late"),
    ]


def results_of(way: Way) -> dict[str, Any]:
    shares = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    ordered = {"within": way.within, "between": way.between, "error": way.errors}
    return way._asdict() | {
        "errors": None,
        **{
            name: {share: percentile(values, part) / MS for share, part in shares.items()}
            for name, values in ordered.items()
        },
        "right": {str(lead): counts for lead, counts in way.right.items()},
    }
