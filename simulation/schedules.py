"""Run random schedules of faults, and print how many of them break no rule.

Run it as ``python simulation/schedules.py [--count N] [--seed N] [--jobs N] [--quick]
[--keep-going] [--json PATH]``, or with ``--replay FILE`` for a stored schedule. If a schedule
breaks a rule, it exits with 1 and prints the first such schedule twice as JSON that can be
replayed: as it was drawn, and shrunk to the faults without which the rule is not broken.
``--trace`` prints every event of one schedule.

Whole metronomes and sessions run in virtual time, each in its own Trio run:

- ``processes.py``: processes, their clocks, and the loop that steps them;
- ``server.py`` and ``clients.py``: a server, the network to it, and the clients of a process;
- ``faults.py``: schedules, and how one is drawn from a seed;
- ``clusters.py``: the function that runs a schedule;
- ``invariants.py``: the rules that must hold.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final, NamedTuple

# The benchmarks have the code that prints the table.
sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import clusters
import faults
from faults import Schedule
from invariants import Violation
from msgspec.structs import asdict, replace
from processes import fix_hashing
from report import RESULTS, Figure, Target, make_console, make_table, results_of, write_json

COUNT: Final = 10_000
QUICK: Final = 200
# The most runs for shrinking one schedule.
SHRINKING: Final = 300
A_MINUTE: Final = 100.0


class Outcome(NamedTuple):
    """The result of one schedule."""

    seed: int
    violations: tuple[Violation, ...]
    seconds: float
    """The processor time that it took."""


def try_seed(seed: int) -> Outcome:
    """Run the schedule of a seed."""
    begun = time.process_time()
    result = clusters.run(faults.draw(seed))
    gc.collect()
    return Outcome(seed, result.violations, time.process_time() - begun)


def run_many(seeds: Sequence[int], jobs: int) -> Iterator[Outcome]:
    """Run the schedules of many seeds, and yield each result when it is there."""
    if jobs == 1:
        gc.freeze()
        yield from map(try_seed, seeds)
        return
    # Garbage collection need not look at the imported modules after each schedule.
    with get_context("spawn").Pool(jobs, initializer=gc.freeze) as pool:
        yield from pool.imap_unordered(try_seed, seeds, chunksize=4)


# Shrinking.


def shrink(
    schedule: Schedule, breaks: Callable[[Schedule], bool], *, runs: int = SHRINKING
) -> Schedule:
    """Return a simpler schedule that breaks, too.

    Args:
      schedule: one that breaks.
      breaks: runs a schedule.
      runs: how often to call that at most.

    """
    left = runs

    def still(candidate: Schedule) -> bool:
        nonlocal left
        if left <= 0:
            return False
        left -= 1
        return breaks(candidate)

    while True:
        before = schedule
        for simpler in (_fewer_faults, _fewer_nodes, _plainer_nodes, _plainer_faults, _shorter):
            schedule = simpler(schedule, still)
        if schedule == before or left <= 0:
            return schedule


def _fewer_faults(schedule: Schedule, still: Callable[[Schedule], bool]) -> Schedule:
    size = len(schedule.faults)
    while size:
        start = 0
        while start < len(schedule.faults):
            kept = schedule.faults[:start] + schedule.faults[start + size :]
            candidate = replace(schedule, faults=kept)
            if still(candidate):
                schedule = candidate
            else:
                start += size
        size //= 2
    return schedule


def _fewer_nodes(schedule: Schedule, still: Callable[[Schedule], bool]) -> Schedule:
    for node in schedule.nodes:
        candidate = replace(
            schedule,
            nodes=tuple(other for other in schedule.nodes if other != node),
            faults=tuple(f for f in schedule.faults if getattr(f, "node", None) != node.name),
        )
        # A schedule without metronomes or without agents breaks other rules.
        kinds = {node.leads for node in candidate.nodes}
        if len(kinds) == 2 and still(candidate):
            schedule = candidate
    return schedule


def _plainer_nodes(schedule: Schedule, still: Callable[[Schedule], bool]) -> Schedule:
    plain = asdict(faults.Node(""))
    for index in range(len(schedule.nodes)):
        for names in (tuple(plain)[1:], ("up_ms", "down_ms"), *((name,) for name in plain)):
            node = schedule.nodes[index]
            changed = replace(node, **{name: plain[name] for name in names if name != "name"})
            if changed == node:
                continue
            nodes = (*schedule.nodes[:index], changed, *schedule.nodes[index + 1 :])
            candidate = replace(schedule, nodes=nodes)
            if still(candidate):
                schedule = candidate
    return schedule


def _plainer_faults(schedule: Schedule, still: Callable[[Schedule], bool]) -> Schedule:
    for index in range(len(schedule.faults)):
        fault = schedule.faults[index]
        changes: list[dict[str, Any]] = []
        if getattr(fault, "seconds", 0.0) > 0.1:
            changes.append({"seconds": round(fault.seconds / 2, 3)})  # type: ignore[union-attr]
        changes += [{name: False} for name in ("renamed", "wiped") if getattr(fault, name, False)]
        changes += [
            {name: 0} for name in ("over", "lost", "doubled", "late") if hasattr(fault, name)
        ]
        for change in changes:
            changed = replace(schedule.faults[index], **change)
            kept = (*schedule.faults[:index], changed, *schedule.faults[index + 1 :])
            candidate = replace(schedule, faults=kept)
            if candidate != schedule and still(candidate):
                schedule = candidate
    return schedule


def _shorter(schedule: Schedule, still: Callable[[Schedule], bool]) -> Schedule:
    last = max((faults.end_of(fault, schedule) for fault in schedule.faults), default=0.0)
    for seconds in (round(last + 0.1, 3), round(schedule.seconds / 2, 3)):
        candidate = replace(schedule, seconds=seconds)
        if seconds < schedule.seconds and still(candidate):
            schedule = candidate
    return schedule


def breaks(rule: str) -> Callable[[Schedule], bool]:
    """Return a function that runs a schedule and returns whether it breaks a rule."""

    def run(schedule: Schedule) -> bool:
        return any(found.rule == rule for found in clusters.run(schedule).violations)

    return run


# The program.


def explain(schedule: Schedule, violations: Sequence[Violation], *, shrunk: bool) -> None:
    """Print a schedule that breaks a rule, and also a shrunk one if that is wanted."""
    print(f"seed {schedule.seed}:", *violations, sep="\n  ")
    print(faults.encode(schedule).decode())
    if shrunk:
        rule = violations[0].rule
        smaller = shrink(schedule, breaks(rule))
        found = [found for found in clusters.run(smaller).violations if found.rule == rule]
        print(f"shrunk, still breaking the rule {rule!r}:", *found, sep="\n  ")
        print(faults.encode(smaller).decode())


def targets(count: int) -> dict[str, Target]:
    """Return the targets for a number of schedules."""
    return {
        "kept": Target("random schedules without a violation", "≥", count, ""),
        "a minute": Target("schedules a minute, on one core", "≥", A_MINUTE, ""),
    }


def main() -> int:
    """Run the program with the options of the command line."""
    parser = argparse.ArgumentParser(description="Run random schedules of faults.")
    parser.add_argument("--count", type=int, default=COUNT, help="default %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="the first seed, default %(default)s")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="default %(default)s")
    parser.add_argument("--quick", action="store_true", help=f"run only the first {QUICK}")
    parser.add_argument(
        "--keep-going", action="store_true", help="do not stop at the first violation"
    )
    parser.add_argument("--replay", type=Path, metavar="FILE", help="run a stored schedule")
    parser.add_argument("--trace", action="store_true", help="print every event of one schedule")
    parser.add_argument(
        "--no-shrink", dest="shrink", action="store_false", help="do not shrink a schedule"
    )
    parser.add_argument(
        "--json", type=Path, default=RESULTS / "schedules.json", help="default %(default)s"
    )
    options = parser.parse_args()
    fix_hashing()
    count = min(options.count, QUICK) if options.quick else options.count
    if options.replay is not None or options.trace:
        return _run_one(options)
    begun = time.perf_counter()
    outcomes, rules = [], Counter[str]()
    for outcome in run_many(range(options.seed, options.seed + count), options.jobs):
        outcomes.append(outcome)
        rules.update({found.rule for found in outcome.violations})
        if not outcome.violations:
            continue
        if not options.keep_going:
            explain(faults.draw(outcome.seed), outcome.violations, shrunk=options.shrink)
            break
        print(f"seed {outcome.seed}:", *outcome.violations, sep="\n  ", flush=True)
    kept = sum(not outcome.violations for outcome in outcomes)
    pace = 60 * len(outcomes) / max(1e-9, sum(outcome.seconds for outcome in outcomes))
    broken = ", ".join(f"{rule} {times}" for rule, times in rules.most_common())
    figures = [
        Figure("kept", kept, f"of {len(outcomes):,} run{broken and '; broken rules: '}{broken}"),
        Figure("a minute", pace, f"{time.perf_counter() - begun:.0f} s with {options.jobs} jobs"),
    ]
    wanted = targets(count)
    make_console().print(make_table(figures, wanted))
    failed = sorted(outcome.seed for outcome in outcomes if outcome.violations)
    results = {"figures": results_of(figures, wanted), "broken": dict(rules), "seeds": failed}
    write_json(options.json, results)
    return int(bool(failed))


def _run_one(options: argparse.Namespace) -> int:
    if options.replay is None:
        schedule = faults.draw(options.seed)
    else:
        schedule = faults.decode(options.replay.read_bytes())
    result = clusters.run(schedule, keep=options.trace)
    print(*result.trace, sep="\n")
    if result.violations:
        explain(schedule, result.violations, shrunk=options.shrink)
    else:
        print(f"seed {schedule.seed}: nothing was violated")
    return int(bool(result.violations))


if __name__ == "__main__":
    sys.exit(main())
