"""Measure how far apart the positions of a cluster's processes are, and how late a beat is.

Run it as ``python benchmarks/skew.py [--quick] [--json PATH] [--only NAME ...]``. It prints a
table, and writes it as JSON with the values behind the figures. A missed target is printed, but
does not make the program fail. Other programs on the machine change these figures, so run none.
"""

from __future__ import annotations

import bisect
import importlib.metadata
import importlib.util
import os
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Generator, Iterable, Sequence
from contextlib import AsyncExitStack, contextmanager
from statistics import median
from typing import Final, NamedTuple

import trio
from agents import PAUSE, QUANTUM, Began, Heard, Positions, open_role
from peers import Peer
from report import Figure, Outcome, Rounds, Target, percentile, run

from backbeat_trio.nats_server import NatsServer
from backbeat_trio.testing import open_session

AGENTS: Final = 8
PPM: Final = 200.0
BPM: Final = 120.0
BEAT_NS: Final = round(60e9 / BPM)
# Beats come at a faster tempo, so that there are enough of them in half a minute.
FAST_BPM: Final = 240.0
FOLLOWERS: Final = 4

TARGETS: Final = {
    "clock": Target("skew of the clock estimate of 8 agents, ±200 ppm, p99", "≤", 0.1, "ms"),
    "delivery_p50": Target("skew of a beat between 4 processes on 2 cores, p50", "≤", 0.3, "ms"),
    "delivery_p99": Target("the same, p99", "≤", 2.0, "ms"),
    "precise": Target("lateness of a precise beat, idle process, p50", "≤", 0.1, "ms"),
}


class Sizes(NamedTuple):
    """How much is measured."""

    settle: float
    """Seconds that agents have after all have joined."""
    seconds: float
    """How long to look at clocks and beats."""
    rounds: int
    """How many times precise beats and others take turns."""


FULL: Final = Sizes(10.0, 30.0, 3)
QUICK: Final = Sizes(1.0, 2.0, 1)


@contextmanager
def two_cores() -> Generator[str, None, None]:
    """Keep this process, and those that it starts, to two cores."""
    cores = os.sched_getaffinity(0) if sys.platform == "linux" else set()
    if cores:
        os.sched_setaffinity(0, sorted(cores)[:2])
    try:
        yield f"{min(2, len(cores))} cores" if cores else f"{os.cpu_count()} cores"
    finally:
        if cores:
            os.sched_setaffinity(0, cores)


async def go_all(peers: Iterable[Peer], settle: float) -> None:
    """Let processes begin at the same time, once they had time to settle."""
    await trio.sleep(settle)
    for peer in peers:
        await peer.go()


def offset_at(seen: Positions, instants: Sequence[int]) -> list[float]:
    """Return how far a position was ahead of the common clock, in ns, at some instants of it."""
    offsets = [p - c for p, c in zip(seen.position_ns, seen.common_ns, strict=True)]
    found = []
    for instant in instants:
        after = bisect.bisect_left(seen.common_ns, instant)
        begin, end = seen.common_ns[after - 1], seen.common_ns[after]
        share = (instant - begin) / (end - begin)
        found.append(offsets[after - 1] + share * (offsets[after] - offsets[after - 1]))
    return found


def line_up(seen: Sequence[Positions]) -> list[list[float]]:
    """Return the offsets of all to the common clock, in ns, at instants that all have seen."""
    begin = max(one.common_ns[0] for one in seen) + 1
    end = min(one.common_ns[-1] for one in seen)
    instants = range(begin, end, round(PAUSE * 1e9))
    return [offset_at(one, instants) for one in seen]


def spreads_ms(lines: Sequence[Sequence[float]]) -> list[float]:
    """Return by how much those who are furthest apart differ, at each instant."""
    return [(max(ones) - min(ones)) / 1e6 for ones in zip(*lines, strict=True)]


def told(values: Sequence[float]) -> str:
    p50, p99 = percentile(values, 0.5), percentile(values, 0.99)
    return f"p50 {p50:.3f}, p99 {p99:.3f}, max {max(values):.3f} ms"


async def observe_agents(sizes: Sizes) -> tuple[Began, list[Positions]]:
    """Let agents with clocks that are off follow a metronome, and return what they believed."""
    async with NatsServer() as server, AsyncExitStack() as stack:
        leader = await stack.enter_async_context(open_role("lead", server.url, BPM))
        began = await leader.read(Began)
        # Processes, not threads: one GIL for all would delay the stamps of each.
        agents = [
            await stack.enter_async_context(
                open_role(
                    *("estimate", server.url, number, sizes.seconds),
                    ppm=PPM * (2 * number / (AGENTS - 1) - 1),
                    seconds=1.7 * number,
                )
            )
            for number in range(AGENTS)
        ]
        await go_all(agents, sizes.settle)
        return began, [await agent.read(Positions) for agent in agents]


async def observe_link(sizes: Sizes) -> list[Positions]:
    """Let two Link peers follow one another, and return what they believed."""
    async with AsyncExitStack() as stack:
        peers = [
            await stack.enter_async_context(open_role("link", BPM, sizes.seconds)) for _ in range(2)
        ]
        await go_all(peers, sizes.settle)
        return [await peer.read(Positions) for peer in peers]


def compare_link(seen: Sequence[Positions]) -> tuple[str, list[float]]:
    """Return what is to be said of two Link peers, and how far apart they were."""
    if any(one.peers != 1 for one in seen):
        others = [one.peers for one in seen]
        return f"Link's peers saw {others} others and not one each: no comparison", []
    bar = BEAT_NS * QUANTUM
    spreads = []
    for one, other in zip(*line_up(seen), strict=True):
        apart = abs(one - other) % bar
        spreads.append(min(apart, bar - apart) / 1e6)
    version = importlib.metadata.version("LinkPython-extern")
    return f"two peers of Link {version}, clocks right: {told(spreads)}", spreads


async def bench_clock(sizes: Sizes) -> Outcome:
    began, seen = await observe_agents(sizes)
    lines = line_up(seen)
    spreads = spreads_ms(lines)
    extremes = spreads_ms([lines[0], lines[-1]])
    # By the metronome's own process, which alone knows: a leader's delay shifts all agents alike.
    errors, excess = [], 0
    for one in seen:
        mine = [
            position - (common - began.common_ns)
            for position, common in zip(one.position_ns, one.common_ns, strict=True)
        ]
        errors.append(median(mine) / 1e6)
        excess += sum(
            abs(error) > uncertainty
            for error, uncertainty in zip(mine, one.uncertainty_ns, strict=True)
        )
    count = sum(len(one.common_ns) for one in seen)
    uncertainty = median(median(one.uncertainty_ns) for one in seen) / 1e6
    rounds: Rounds = {
        "skew_ms": spreads,
        "skew_of_two_ms": extremes,
        "error_ms": errors,
        "uncertainty_ms": [median(one.uncertainty_ns) / 1e6 for one in seen],
        "processor": [one.processor for one in seen],
    }
    if importlib.util.find_spec("link") is None:
        link = "no Link: LinkPython-extern is not installed"
    else:
        link, rounds["link_ms"] = compare_link(await observe_link(sizes))
    note = (
        f"{told(spreads)}; the two at ±{PPM:g} ppm: {told(extremes)}; {link}; "
        f"errors of {min(errors):+.3f} to {max(errors):+.3f} ms, reported uncertainty "
        f"{uncertainty:.3f} ms, exceeded {excess} times in {count:,}; "
        f"{sum(one.left_out for one in seen)} slow readings left out"
    )
    return [Figure("clock", percentile(spreads, 0.99), note)], rounds


async def observe_beats(sizes: Sizes, kind: str) -> tuple[Began, list[Heard]]:
    """Let processes follow the beats of a metronome, and return when these came."""
    async with NatsServer() as server, AsyncExitStack() as stack:
        leader = await stack.enter_async_context(open_role("lead", server.url, FAST_BPM))
        began = await leader.read(Began)
        followers = [
            await stack.enter_async_context(
                open_role("follow", server.url, number, sizes.seconds, kind)
            )
            for number in range(FOLLOWERS)
        ]
        await go_all(followers, sizes.settle)
        return began, [await follower.read(Heard) for follower in followers]


def compare_beats(began: Began, seen: Sequence[Heard]) -> tuple[list[float], list[float]]:
    """Return how far apart beats came that all have heard, and how late each came, in ms."""
    beats = [dict(zip(one.indexes, one.common_ns, strict=True)) for one in seen]
    heard = Counter(index for one in beats for index in one)
    everywhere = [[one[index] for one in beats] for index in heard if heard[index] == len(beats)]
    beat_ns = 60e9 / FAST_BPM
    late = [
        (instant - began.common_ns - index * beat_ns) / 1e6
        for one in beats
        for index, instant in one.items()
    ]
    return [(max(instants) - min(instants)) / 1e6 for instants in everywhere], late


async def bench_delivery(sizes: Sizes) -> Outcome:
    rounds: Rounds = {}
    with two_cores() as where:
        for kind in ("plain", "precise"):
            found = compare_beats(*await observe_beats(sizes, kind))
            rounds[f"{kind}_skew_ms"], rounds[f"{kind}_late_ms"] = found
    skews = rounds["plain_skew_ms"]
    note = (
        f"{told(skews)} over {len(skews)} beats at {FAST_BPM:g} BPM, {where}; late by "
        f"{told(rounds['plain_late_ms'])}; all precise: {told(rounds['precise_skew_ms'])}"
    )
    return [
        Figure("delivery_p50", percentile(skews, 0.5), note),
        Figure("delivery_p99", percentile(skews, 0.99), ""),
    ], rounds


async def bench_precise(sizes: Sizes) -> Outcome:
    rounds: Rounds = {}
    for kind in ("plain", "precise"):
        rounds |= {f"{kind}_late_ms": [], f"{kind}_processor": [], f"{kind}_beat_ms": []}
    async with open_session(tempo_bpm=FAST_BPM) as bb:
        clock = bb._clock
        await trio.sleep(sizes.settle / 5)
        for _ in range(sizes.rounds):
            for kind in ("plain", "precise"):
                late = []
                begin, processor = time.perf_counter(), time.process_time()
                with trio.move_on_after(sizes.seconds / 5):
                    async for beat in bb.beats(precise=kind == "precise"):
                        now = trio.current_time()
                        late.append(1e3 * (now - clock.deadline_of(beat.index)))
                used = time.process_time() - processor
                rounds[f"{kind}_late_ms"] += late
                rounds[f"{kind}_processor"].append(used / (time.perf_counter() - begin))
                rounds[f"{kind}_beat_ms"].append(1e3 * used / len(late))

    def cost(kind: str) -> str:
        share, beat = median(rounds[f"{kind}_processor"]), median(rounds[f"{kind}_beat_ms"])
        return f"{told(rounds[f'{kind}_late_ms'])}, {beat:.2f} ms of processor a beat, {share:.2%}"

    note = f"{cost('precise')}; others: {cost('plain')} at {FAST_BPM:g} BPM"
    return [Figure("precise", percentile(rounds["precise_late_ms"], 0.5), note)], rounds


BENCHMARKS: Final[dict[str, Callable[[Sizes], Awaitable[Outcome]]]] = {
    "clock": bench_clock,
    "delivery": bench_delivery,
    "precise": bench_precise,
}


if __name__ == "__main__":
    run(
        *("skew", "Measure how far apart the processes of a cluster are.", BENCHMARKS, TARGETS),
        full=FULL,
        quick=QUICK,
    )
