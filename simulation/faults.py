"""Schedules of faults: plain data, drawn from a seed.

A `Schedule` lists the processes of a cluster, their machines with their clocks and network delays,
and the faults with their times. It can be printed, stored as JSON, changed and run again.
"""

from __future__ import annotations

import math
import random
from typing import Final, Literal, TypeAlias

import msgspec
from msgspec import Struct

# How long faults go on, in seconds of true time, and the least that follows them.
SECONDS: Final = 60.0
QUIET: Final = 20.0
# Standing by takes a lease of two beats, and coming back into line takes some three.
QUIET_BEATS: Final = 4.5
SLOWEST_TO_PAUSE: Final = 20.0


class Node(Struct, frozen=True, omit_defaults=True):
    """A machine with one process: a metronome or an agent, by its name."""

    name: str
    """``pulse-N`` for a metronome, ``agent-N`` for an agent."""
    at: float = 0.0
    """When its process begins."""
    up_ms: float = 0.2
    """How long messages take to the server."""
    down_ms: float = 0.2
    """How long they take from the server."""
    jitter_ms: float = 0.05
    """The mean of what comes on top, each way."""
    ppm: float = 0.0
    """By how many millionths its clock is too fast."""
    wall_s: float = 0.0
    """By how much its wall clock is wrong."""

    @property
    def leads(self) -> bool:
        """Whether it is a metronome."""
        return self.name.startswith("pulse")


class Kill(Struct, frozen=True, tag=True):
    """Kill a process, and start another one on its machine after some seconds."""

    at: float
    node: str
    seconds: float
    renamed: bool = False
    """Whether the next process there has another name."""


class Stop(Struct, frozen=True, tag=True):
    """Stop a process, and have it go on after some seconds."""

    at: float
    node: str
    seconds: float


class Suspend(Struct, frozen=True, tag=True):
    """Suspend a machine: its process stops, and its monotonic clock as well."""

    at: float
    node: str
    seconds: float


class ClockJump(Struct, frozen=True, tag=True):
    """Have a machine's monotonic clock jump ahead by some seconds."""

    at: float
    node: str
    seconds: float


class WallJump(Struct, frozen=True, tag=True):
    """Set a machine's wall clock ahead, or back, by some seconds."""

    at: float
    node: str
    seconds: float


class Cut(Struct, frozen=True, tag=True):
    """Cut a machine off: both ends see its connection end, and it can make no other one."""

    at: float
    node: str
    seconds: float


class HalfOpen(Struct, frozen=True, tag=True):
    """Swallow what goes over a connection that both ends believe in."""

    at: float
    node: str
    seconds: float
    way: Literal["both", "up", "down"]


class Slow(Struct, frozen=True, tag=True):
    """Have messages take longer."""

    at: float
    node: str
    seconds: float
    up_ms: float
    down_ms: float


class Lossy(Struct, frozen=True, tag=True):
    """Lose, double and delay some core messages of a machine, both ways."""

    at: float
    node: str
    seconds: float
    lost: float
    doubled: float
    late: float


class ServerRestart(Struct, frozen=True, tag=True):
    """Take the server down for some seconds."""

    at: float
    seconds: float
    wiped: bool = False
    """Whether it comes back with an empty store."""


class StoreTrouble(Struct, frozen=True, tag=True):
    """Have JetStream misbehave while core messages pass."""

    at: float
    seconds: float
    kind: Literal["silent", "refusing", "losing answers", "late"]
    late_s: float = 0.0
    """By how much its answers to writes are late."""


class Change(Struct, frozen=True, tag=True):
    """Have an agent ask for another tempo."""

    at: float
    node: str
    bpm: float
    over: int = 0


class Pause(Struct, frozen=True, tag=True):
    """Have an agent ask for a pause."""

    at: float
    node: str


class Resume(Struct, frozen=True, tag=True):
    """Have an agent ask that the grid goes on."""

    at: float
    node: str


Fault: TypeAlias = (
    Kill
    | Stop
    | Suspend
    | ClockJump
    | WallJump
    | Cut
    | HalfOpen
    | Slow
    | Lossy
    | ServerRestart
    | StoreTrouble
    | Change
    | Pause
    | Resume
)
Command: TypeAlias = Change | Pause | Resume
KINDS: Final[tuple[type[Fault], ...]] = (
    *(Kill, Stop, Suspend, ClockJump, WallJump, Cut, HalfOpen, Slow, Lossy),
    *(ServerRestart, StoreTrouble, Change, Pause, Resume),
)


class Schedule(Struct, frozen=True):
    """A cluster, and what happens to it."""

    seed: int
    bpm: float
    """The tempo with which the metronomes are started."""
    beats_per_bar: int
    nodes: tuple[Node, ...]
    faults: tuple[Fault, ...]
    seconds: float = SECONDS
    """When all faults have healed at the latest."""

    @property
    def quiet(self) -> float:
        """How many seconds follow in which nothing goes wrong."""
        changes = [fault.bpm for fault in self.faults if isinstance(fault, Change)]
        return QUIET + QUIET_BEATS * 60 / min(self.bpm, *changes, 60.0)

    def node(self, name: str) -> Node | None:
        """Return a node by its name."""
        return next((node for node in self.nodes if node.name == name), None)


def end_of(fault: Fault, schedule: Schedule) -> float:
    """Return when a fault is over."""
    return min(fault.at + getattr(fault, "seconds", 0.0), schedule.seconds)


def encode(schedule: Schedule) -> bytes:
    """Return a schedule as JSON."""
    return msgspec.json.format(msgspec.json.encode(schedule))


def decode(data: bytes) -> Schedule:
    """Return the schedule that `encode` has written."""
    return msgspec.json.decode(data, type=Schedule)


def _way(chance: random.Random) -> tuple[float, float, float]:
    # In one place, in one country, or across the world.
    kind = chance.random()
    if kind < 0.6:
        return chance.uniform(0.1, 1), chance.uniform(0.1, 1), chance.uniform(0, 0.2)
    if kind < 0.85:
        base = chance.uniform(2, 40)
        return base, base * chance.uniform(0.8, 1.25), base * 0.05
    return chance.uniform(20, 300), chance.uniform(20, 300), chance.uniform(0, 5)


def _node(chance: random.Random, name: str, at: float) -> Node:
    up, down, jitter = _way(chance)
    return Node(
        name,
        at=round(at, 3),
        up_ms=round(up, 3),
        down_ms=round(down, 3),
        jitter_ms=round(jitter, 3),
        ppm=round(chance.uniform(-200, 200), 1),
        wall_s=round(chance.gauss(0, 0.3), 3),
    )


def _tempo(chance: random.Random) -> float:
    return round(math.exp(chance.uniform(math.log(2), math.log(600))), 3)


def draw(seed: int) -> Schedule:
    """Draw a schedule; all chance comes from the seed."""
    chance = random.Random(f"{seed}/schedule")
    pulses, agents = chance.choice((1, 2, 2, 2, 3)), chance.choice((1, 2, 2, 3, 4))
    names = [f"pulse-{n}" for n in range(pulses)] + [f"agent-{n}" for n in range(agents)]
    nodes = []
    for name in names:
        first = name.endswith("-0")
        late = not first and chance.random() < 0.15
        at = chance.uniform(3, 50) if late else chance.random()
        nodes.append(_node(chance, name, at))
    bpm = _tempo(chance)
    agent_names = [node.name for node in nodes if not node.leads and node.at <= 1]
    faults = [
        fault
        for _ in range(chance.randint(3, 12))
        for fault in _faults(chance, chance.choice(KINDS), names, agent_names, bpm)
    ]
    return Schedule(
        seed=seed,
        bpm=bpm,
        beats_per_bar=chance.choice((1, 3, 4, 4, 8, 8)),
        nodes=tuple(nodes),
        faults=tuple(sorted(faults, key=lambda fault: fault.at)),
    )


def _faults(
    chance: random.Random, kind: type[Fault], names: list[str], agents: list[str], bpm: float
) -> list[Fault]:
    # Metronomes are what most of it is about.
    pulses = [name for name in names if name.startswith("pulse")]
    at = round(chance.uniform(1, SECONDS - 2), 3)
    node = chance.choice(pulses if chance.random() < 0.65 else names)
    agent = chance.choice(agents)
    # Most are shorter than a lease, some are longer than a beat.
    seconds = round(min(chance.lognormvariate(0.3, 1.1), 20.0), 3)
    if kind is Kill:
        return [Kill(at, node, round(chance.uniform(0, 5), 3), chance.random() < 0.3)]
    if kind is Stop:
        return [Stop(at, node, seconds)]
    if kind is Suspend:
        return [Suspend(at, node, seconds)]
    if kind is ClockJump:
        return [ClockJump(at, node, round(chance.uniform(0.01, 5), 3))]
    if kind is WallJump:
        return [WallJump(at, node, round(chance.gauss(0, 600), 3))]
    if kind is Cut:
        return [Cut(at, node, seconds)]
    if kind is HalfOpen:
        ways: tuple[Literal["both", "up", "down"], ...] = ("both", "up", "down")
        return [HalfOpen(at, node, seconds, chance.choice(ways))]
    if kind is Slow:
        up, down = (round(chance.uniform(0, 300), 3) for _ in range(2))
        return [Slow(at, node, seconds, up, down)]
    if kind is Lossy:
        lost, doubled, late = (round(chance.uniform(0, 0.3), 3) for _ in range(3))
        return [Lossy(at, node, seconds, lost, doubled, late)]
    if kind is ServerRestart:
        return [ServerRestart(at, round(chance.uniform(0.02, 4), 3), chance.random() < 0.3)]
    if kind is StoreTrouble:
        troubles: tuple[Literal["silent", "refusing", "losing answers", "late"], ...]
        troubles = ("silent", "refusing", "losing answers", "late")
        trouble = chance.choice(troubles)
        longer = round(chance.uniform(0.5, 8), 3)
        return [StoreTrouble(at, longer, trouble, round(chance.uniform(0.1, 3), 3))]
    if kind is Change:
        # Not far from the present tempo: others make beats that last minutes.
        wanted = round(min(600.0, max(2.0, bpm * math.exp(chance.gauss(0, 0.7)))), 3)
        over = chance.choice((0, 0, 0, 8, 32))
        return [Change(at, agent, wanted, over)]
    if bpm < SLOWEST_TO_PAUSE:
        return []
    if kind is Pause:
        after = round(min(SECONDS - 1, at + chance.uniform(0.5, 10)), 3)
        return [Pause(at, agent), Resume(after, agent)]
    return [Resume(at, agent)]
