"""Simulate a cluster of many agents on the pure core, and print how well they agree.

Run as ``python benchmarks/simulate.py [--agents N] [--seconds S] [--seed N] [--quick] [--jobs N]
[--regions N] [--json PATH] [--plot PATH]``. Nothing here waits: time is a number, and the same seed
gives the same figures, with any number of jobs. It exits with 1 where a target is missed.

What is real: `Estimate`, `Steering`, `Timeline`, `propose`, `reschedule`, `Drift`, `Punctuality`.
What is simulated: clocks, the network, the loops of agents, and what `BeatListener`, `BeatClock`,
`Standby` and `Leader` do with the above, by the same rules. What is left out: leaders that are
asked more than they can answer, and servers that have more to pass on than they can.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import os
import random
import sys
import time
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
from report import Figure, Target
from rich.console import Console
from rich.table import Table

from backbeat_trio._drift import Drift, Punctuality, TempoDrift
from backbeat_trio._errors import TempoRefused
from backbeat_trio._steering import (
    MIN_STEP_NS,
    PARTS,
    Estimate,
    Ping,
    Steering,
    Verdict,
    best_ping,
)
from backbeat_trio._tempo import propose, reschedule
from backbeat_trio._timeline import NEVER, Timeline, beat_ns
from backbeat_trio._wire import BeatFrame, Segment

US: Final = 1_000
MS: Final = 1_000_000
SECOND: Final = 1_000_000_000
FOREVER: Final = 1 << 62
# Where no number is.
NONE: Final = math.nan

# As the listener, the standby and the leader have them; a test compares them.
JOINING_PINGS: Final = 16
STEADY_PINGS: Final = 4
PING_TIMEOUT_NS: Final = 500 * MS
BURST_MIN_NS: Final = 250 * MS
BURST_MAX_NS: Final = 5 * SECOND
JOINING_NS: Final = SECOND
PINGS_WORSE_NS: Final = 10 * MS
LATE_NS: Final = 8 * MS
JITTERS: Final = 4
LEASE_BEATS: Final = 2
LEASE_NS: Final = SECOND

BEATS_PER_BAR: Final = 4
# The tempo that a simulation begins with, in thousandths of a beat a minute.
MILLI: Final = 60_000
STANDBYS: Final = 4
# How often the agents' clocks are looked at.
SAMPLE_NS: Final = SECOND
# Agents join within so long of the beginning, and what they do from then on is measured later.
JOIN_NS: Final = 5 * SECOND
SETTLED_NS: Final = 10 * SECOND
HOLDOVER_NS: Final = 60 * SECOND
CHUNK: Final = 20


TARGETS: Final = {
    "same_index": Target("agents that had every beat at its tempo", "≥", 100.0, "%"),
    "lost": Target("beats skipped by agents whose loop never stalls", "≤", 0, ""),
    "stalled_lost": Target("beats skipped beyond what a stall covers", "≤", 0, ""),
    "back": Target("times that a position ran back", "≤", 0, ""),
    "relocks": Target("moves to another grid after the first lock", "≤", 0, ""),
    "error": Target("cluster time of an agent, p99 of its error", "≤", 1.0, "ms"),
    "skew": Target("two agents at one instant, p99 of the difference", "≤", 1.0, "ms"),
    "beats": Target("one beat at two agents, p99 of the difference", "≤", 2.0, "ms"),
    "honest": Target("errors within the uncertainty told", "≥", 99.9, "%"),
    "holdover": Target("60 s without a leader, at ±200 ppm, largest error", "≤", 5.0, "ms"),
    "drift": Target("verdicts on the tempo that are acceptable", "≥", 99.0, "%"),
}
REGION_TARGETS: Final = {
    "within": Target("agents of one region at one instant, p99", "≤", 1.0, "ms"),
    "honest": Target("errors within both uncertainties together", "≥", 99.9, "%"),
    "lead": Target("on the same index, with a lead of 3 beats or more", "≥", 100.0, "%"),
}


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value of an ordered sequence that so large a share of it does not exceed."""
    return values[max(0, math.ceil(share * len(values)) - 1)] if values else 0.0


# The world: clocks that are off, and messages that take their time or are lost.


class LocalClock:
    """A node's clock: it begins anywhere, runs at a rate of its own, and that rate wanders."""

    _STEP: Final = 5 * SECOND

    def __init__(self, chance: random.Random, ppm: float, seconds: float) -> None:
        local = round(chance.uniform(-5, 5) * SECOND)
        self._locals, self._rates = [local], list[int]()
        for _ in range(math.ceil(seconds * SECOND / self._STEP) + 3):
            self._rates.append(PARTS + round(ppm * PARTS / 1e6))
            local += self._STEP * self._rates[-1] // PARTS
            self._locals.append(local)
            ppm += chance.gauss(0, 0.1)

    def local(self, true_ns: int) -> int:
        """Return what the clock shows at an instant."""
        step = max(0, min(true_ns // self._STEP, len(self._rates) - 1))
        return self._locals[step] + (true_ns - step * self._STEP) * self._rates[step] // PARTS

    def true(self, local_ns: int) -> int:
        """Return the first instant at which it shows so much."""
        step = max(0, min(bisect_right(self._locals, local_ns) - 1, len(self._rates) - 1))
        rate = self._rates[step]
        return step * self._STEP - ((self._locals[step] - local_ns) * PARTS // rate)


class Link(NamedTuple):
    """How long messages take from one place to another, one way."""

    base_ns: int
    spread_ns: int
    """The median of what comes on top of it, which is lognormal."""
    sigma: float
    tail: float
    """How many meet with a delay of another kind."""
    tail_ns: int
    """The least of that delay; how much more it is has a Pareto distribution."""

    def draw(self, chance: random.Random) -> int:
        """Return how long a message takes."""
        delay = self.base_ns + self.spread_ns * chance.lognormvariate(0, self.sigma)
        if chance.random() < self.tail:
            delay += min(self.tail_ns * chance.paretovariate(1.3), 0.4 * SECOND)
        return round(delay)


def near(chance: random.Random) -> Link:
    """Return one way of an agent to a server in the same place."""
    return Link(round(chance.uniform(50, 250) * US), 60 * US, 0.8, 0.02, MS)


def far(chance: random.Random) -> Link:
    """Return one way between regions: each of the two is another 20 to 40 ms."""
    return Link(round(chance.uniform(20, 40) * MS), MS, 1.0, 0.02, 5 * MS)


HERE: Final = Link(0, 0, 0, 0, 0)
# Of all messages.
LOSS: Final = 0.01


class Frame(NamedTuple):
    """A frame as it goes out."""

    true_ns: int
    epoch: int
    beat: int
    timeline: Timeline


class Reign:
    """Who tells the time from one instant to another: a leader, or a region's own metronome."""

    def __init__(self, epoch: int, clock: LocalClock, begin_ns: int) -> None:
        self.epoch, self.clock = epoch, clock
        self.begin_ns, self.end_ns = begin_ns, FOREVER
        self.gone = True
        """Whether everybody can tell when it is over, as its process is gone."""
        self.times: list[int] = []
        self.steerings: list[Steering] = []
        self.timelines: list[Timeline] = []

    def record(self, true_ns: int, steering: Steering, timeline: Timeline) -> None:
        """Tell how it knows the time from an instant on."""
        self.times.append(true_ns)
        self.steerings.append(copy.copy(steering))
        self.timelines.append(timeline)

    def _at(self, true_ns: int) -> int:
        return max(0, bisect_right(self.times, true_ns) - 1)

    def cluster_at(self, true_ns: int) -> int:
        """Return the cluster time that it tells at an instant."""
        return self.steerings[self._at(true_ns)].cluster_at(self.clock.local(true_ns))

    def timeline_at(self, true_ns: int) -> Timeline:
        """Return the timeline that it tells at an instant."""
        return self.timelines[self._at(true_ns)]


class History:
    """All that was told of one grid in one place."""

    def __init__(self) -> None:
        self.reigns: list[Reign] = []
        self.frames: list[Frame] = []
        self.tempos: dict[int, int] = {}
        """The tempo of each beat, as it came to be."""

    def reign_at(self, true_ns: int) -> Reign | None:
        """Return who answers at an instant; None where nobody does."""
        for reign in reversed(self.reigns):
            if true_ns >= reign.begin_ns:
                return reign if true_ns < reign.end_ns else None
        return None

    def cluster_at(self, true_ns: int) -> int:
        """Return cluster time, by whoever leads or did so last."""
        for reign in reversed(self.reigns):
            if true_ns >= reign.begin_ns:
                return reign.cluster_at(true_ns)
        return self.reigns[0].cluster_at(true_ns)


class Agent:
    """An agent, as its listener and its clock have it behave; also a standby or a metronome."""

    def __init__(
        self,
        history: History,
        chance: random.Random,
        clock: LocalClock,
        *,
        up: Link,
        down: Link,
        seconds: float,
        join_ns: int = 0,
        stalls: bool = False,
        cut_ns: int = FOREVER,
    ) -> None:
        self.history, self.chance, self.clock = history, chance, clock
        self.up, self.down, self.cut_ns = up, down, cut_ns
        self.join_ns = join_ns
        self.locked_ns = FOREVER
        self.stalls = self._make_stalls(seconds) if stalls else []
        # What the listener keeps.
        self.epoch, self.told_ns, self.next_frame = -1, 0, 0
        self.estimate = Estimate()
        self.drift, self.punctuality = Drift(), Punctuality()
        self.unexplained: Frame | None = None
        self.asked: Frame | None = None
        self.unexplained_local = 0
        self.ask = self.answered = False
        # What the clock keeps.
        local = clock.local(join_ns)
        self.timeline = Timeline((Segment(0, 0, 0, 0, MILLI),))
        self.steering = Steering(-local)
        self.floor = -math.inf
        self.next_index = 1
        # A metronome that follows leads its own region with what it knows.
        self.leads: tuple[Reign, History] | None = None
        # When what happens next happens, in true time.
        self.pointer = 0
        self.frame: Frame | None = None
        self.arrival_ns = self.frame_ns = self.beat_ns = FOREVER
        self.last_arrival_ns = 0
        self.burst_ns = join_ns
        self.burst: list[tuple[Ping, Reign, Timeline]] | None = None
        self.sample_ns = -(-join_ns // SAMPLE_NS) * SAMPLE_NS
        # What is measured.
        self.errors: dict[int, float] = {}
        self.told: dict[int, int] = {}
        self.beats: dict[int, int] = {}
        self.tempos: dict[int, int] = {}
        self.skips: list[tuple[int, int]] = []
        self.verdicts: Counter[TempoDrift] = Counter()
        self.burst_verdicts: Counter[Verdict] = Counter()
        self.flaps = self.back = self.locks = 0
        self.position = -math.inf

    def _make_stalls(self, seconds: float) -> list[tuple[int, int]]:
        stalls, at = [], float(SETTLED_NS)
        while (at := at + self.chance.expovariate(1 / 15) * SECOND) < seconds * SECOND:
            length = min(0.1 * self.chance.lognormvariate(0, 1), 0.8) * SECOND
            stalls.append((round(at), round(at + length)))
            at += length
        return stalls

    def _awake(self, true_ns: int) -> int:
        for begin, end in self.stalls:
            if begin <= true_ns < end:
                return end
        return true_ns

    # What happens, in the order of true time.

    def run(self, until_ns: int) -> None:
        """Live until an instant."""
        if self.frame is None:
            self._await_frame()
        while True:
            now = min(self.frame_ns, self.burst_ns, self.beat_ns, self.sample_ns)
            if now >= until_ns:
                return
            if now == self.sample_ns:
                self._sample(now)
                self.sample_ns += SAMPLE_NS
            elif now == self.beat_ns:
                self._strike(now)
            elif now == self.frame_ns:
                frame, arrival = self.frame, self.arrival_ns
                assert frame is not None
                self._hear(now, frame, self.clock.local(arrival))
                self._await_frame()
            else:
                self._sync(now)

    def _await_frame(self) -> None:
        frames, chance = self.history.frames, self.chance
        self.frame, self.frame_ns = None, FOREVER
        while self.pointer < len(frames):
            frame = frames[self.pointer]
            self.pointer += 1
            if frame.true_ns < self.join_ns or chance.random() < LOSS:
                continue
            if frame.true_ns >= self.cut_ns:
                continue
            # A connection keeps the order.
            arrival = max(self.last_arrival_ns, frame.true_ns + self.down.draw(chance))
            self.frame, self.arrival_ns = frame, arrival
            self.last_arrival_ns, self.frame_ns = arrival, self._awake(arrival)
            return

    def _sync(self, now: int) -> None:
        if self.burst is None:
            self.ask, self.asked = False, self.unexplained
            joining = self.locked_ns == FOREVER
            self.burst, end = self._ping(now, JOINING_PINGS if joining else STEADY_PINGS)
            self.burst_ns = self._awake(end)
            return
        replies, self.burst = self.burst, None
        well = self._steer(now, replies)
        wait = beat_ns(self._segment(now).milli_bpm)
        if self.locked_ns == FOREVER:
            wait = min(wait, JOINING_NS)
        wait = min(max(wait, BURST_MIN_NS), BURST_MAX_NS) if well else BURST_MIN_NS
        self.burst_ns = now if self.ask else self._awake(now + wait)

    def _ping(self, now: int, pings: int) -> tuple[list[tuple[Ping, Reign, Timeline]], int]:
        replies: list[tuple[Ping, Reign, Timeline]] = []
        chance, local = self.chance, self.clock.local
        for _ in range(pings):
            came = now + self.up.draw(chance)
            reign = self.history.reign_at(came)
            if chance.random() < 2 * LOSS or came >= self.cut_ns:
                return replies, now + PING_TIMEOUT_NS
            if reign is None:
                last = [other for other in self.history.reigns if other.end_ns <= came]
                gone = bool(last) and last[-1].gone
                return replies, now + (2 * self.up.draw(chance) if gone else PING_TIMEOUT_NS)
            left = came + round(chance.expovariate(1 / (50 * US)))
            back = left + self.down.draw(chance)
            if back - now > PING_TIMEOUT_NS:
                return replies, now + PING_TIMEOUT_NS
            ping = Ping(local(now), reign.cluster_at(came), reign.cluster_at(left), local(back))
            replies.append((ping, reign, reign.timeline_at(left).since(ping.replied_ns)))
            now = self._awake(back)
        return replies, now

    def _sample(self, now: int) -> None:
        if self.locked_ns == FOREVER:
            return
        local = self.clock.local(now)
        cluster = self.steering.cluster_at(local)
        number = now // SAMPLE_NS
        self.errors[number] = cluster - self.history.cluster_at(now)
        if self.estimate.known:
            slewing = abs(local + self.steering.target_at(local) - cluster)
            self.told[number] = self.estimate.uncertainty_at(local) + slewing
        self._watch(now)

    def _watch(self, now: int) -> None:
        position = self._position_at(self._cluster(now))
        self.back += position < self.position
        self.position = position

    # The listener.

    @property
    def _locked(self) -> bool:
        return self.locked_ns != FOREVER

    def _in_holdover(self, now: int) -> bool:
        if not self._locked:
            return False
        timeline = self.timeline
        patience = max(MIN_STEP_NS, beat_ns(self._segment(now).milli_bpm) // 4)
        missing = timeline.next_beat(timeline.next_beat(self.told_ns))
        return self._cluster(now) > missing + patience

    def _hear(self, now: int, frame: Frame, local: int) -> None:
        if frame.epoch < self.epoch and not self._in_holdover(now):
            return
        segment = frame.timeline.segments[0]
        still = not segment.milli_bpm and frame.beat == segment.beat0
        if frame.epoch == self.epoch and frame.beat < self.next_frame - still:
            return
        if not self._explains(frame, local):
            self.unexplained, self.unexplained_local = frame, local
            self.ask = True
            if self.burst is None:
                self.burst_ns = now
            return
        self._accept(now, frame, local)

    def _explains(self, frame: Frame, local: int) -> bool:
        if not self._locked or frame.epoch != self.epoch:
            return False
        late = self.steering.cluster_at(local) - frame.timeline.time_of(frame.beat)
        return late >= -max(MIN_STEP_NS, beat_ns(frame.timeline.segments[0].milli_bpm) // 4)

    def _accept(self, now: int, frame: Frame, local: int) -> None:
        self.next_frame = frame.beat + 1
        if self.unexplained is not None and self.unexplained.epoch != frame.epoch:
            self.unexplained = None
        self._follow(now, frame.epoch, frame.timeline)
        estimate, timeline = self.estimate, frame.timeline
        if not self.answered and (
            not estimate.known or estimate.uncertainty_at(local) > estimate.way_ns + PINGS_WORSE_NS
        ):
            self._correct(now, timeline.time_of(frame.beat) - local, 0)
        milli = timeline.segments[0].milli_bpm
        beat, due = beat_ns(milli), timeline.time_of(frame.beat)
        cluster = self.steering.cluster_at(local)
        if not milli:
            due = timeline.last_beat(cluster + MIN_STEP_NS)
        self.told_ns = due
        if milli and not self.punctuality.is_late(self.clock.local(now) - local, beat):
            before = self.drift.verdict
            self.drift.add(due, local, cluster - due, beat)
            verdict = self.drift.verdict
            self.verdicts[verdict] += 1
            self.flaps += before == "acceptable" != verdict

    def _follow(self, now: int, epoch: int, timeline: Timeline) -> None:
        present = self.timeline
        newer = timeline.segments[-1].seq >= present.segments[-1].seq
        if epoch != self.epoch:
            self.epoch, newer = epoch, True
        if newer and timeline.segments != present.segments:
            self._adopt(now, timeline)

    def _steer(self, now: int, replies: list[tuple[Ping, Reign, Timeline]]) -> bool:
        epoch = max((reign.epoch for _, reign, _ in replies), default=-1)
        replies = [reply for reply in replies if reply[1].epoch == epoch]
        burst = [ping for ping, _, _ in replies]
        best = best_ping(burst)
        self.answered = best is not None
        if best is None:
            self._decide_unanswered(now)
            return True
        if self._locked and epoch < self.epoch and not self._in_holdover(now):
            return True
        verdict = self._measure(now, epoch, replies[-1][2], best, burst)
        self.burst_verdicts[verdict] += 1
        if self.asked is not None and self.asked is self.unexplained:
            frame, local = self.asked, self.unexplained_local
            self.unexplained = None
            if self._explains(frame, local) and frame.beat >= self.next_frame:
                self._accept(now, frame, local)
        return verdict is not Verdict.OUTLYING

    def _measure(
        self, now: int, epoch: int, timeline: Timeline, best: Ping, burst: list[Ping]
    ) -> Verdict:
        local, estimate = self.clock.local(now), self.estimate
        same = timeline.continues(self.timeline)
        if not self._locked or (epoch != self.epoch and not same):
            self.estimate = estimate = Estimate()
            verdict = estimate.add(burst)
            self._lock(now, epoch, timeline, estimate.offset_at(local), estimate.frequency)
            return verdict
        if epoch != self.epoch and estimate.known:
            estimate.begin_anew(best)
        verdict = estimate.add(burst)
        if verdict is Verdict.OUTLYING or not same:
            return Verdict.OUTLYING
        self._follow(now, epoch, timeline)
        self._correct(now, estimate.offset_at(local), estimate.frequency)
        return verdict

    def _decide_unanswered(self, now: int) -> None:
        if self.unexplained is None or not (not self._locked or self._in_holdover(now)):
            return
        frame, local = self.unexplained, self.unexplained_local
        self.unexplained = None
        if not self._locked or not frame.timeline.continues(self.timeline):
            self.estimate = Estimate()
            offset = frame.timeline.time_of(frame.beat) - local
            self._lock(now, frame.epoch, frame.timeline, offset, 0)
        self._accept(now, frame, local)

    def _lock(
        self, now: int, epoch: int, timeline: Timeline, offset_ns: int, frequency: int
    ) -> None:
        self.epoch = epoch
        self.drift.clear()
        self.timeline, self.floor = timeline, -math.inf
        self.steering.step(offset_ns, at_ns=self.clock.local(now), frequency=frequency)
        self.next_index = self._index(now) + 1
        self.position = -math.inf
        self._changed(now)
        self.next_frame = self._index(now)
        self.told_ns = timeline.last_beat(self._cluster(now))
        self.locks += 1
        self.locked_ns = min(self.locked_ns, now)

    # The clock.

    def _cluster(self, now: int) -> int:
        return self.steering.cluster_at(self.clock.local(now))

    def _position_at(self, cluster_ns: int) -> float:
        return max(self.floor, self.timeline.position_at(cluster_ns))

    def _index(self, now: int) -> int:
        index = self.timeline.index_at(self._cluster(now))
        return index if index >= self.floor else int(self.floor)

    def _segment(self, now: int) -> Segment:
        return self.timeline.segment_at(self._cluster(now))

    def _adopt(self, now: int, timeline: Timeline) -> None:
        local = self.clock.local(now)
        cluster = self.steering.cluster_at(local)
        before, after = self._position_at(cluster), timeline.position_at(cluster)
        present = timeline.segment_at(cluster)
        self.timeline, self.floor = timeline, -math.inf
        if abs(after - before) * beat_ns(present.milli_bpm) <= 1:
            self._changed(now)
        elif present.milli_bpm:
            target, frequency = self.steering.target_at(local), self.steering.frequency
            self.steering.step(timeline.time_of(before) - local, at_ns=local)
            self._correct(now, target, frequency)
        else:
            self.floor = max(before, after)
            self._changed(now)

    def _correct(self, now: int, offset_ns: int, frequency: int) -> None:
        beat = beat_ns(self._segment(now).milli_bpm)
        self.steering.correct(self.clock.local(now), offset_ns, beat_ns=beat, frequency=frequency)
        self._changed(now)

    def _changed(self, now: int) -> None:
        if self._locked:
            self._watch(now)
        if self.leads is not None:
            self.leads[0].record(now, self.steering, self.timeline)
        self._arm(now)

    def _arm(self, now: int) -> None:
        cluster = self.timeline.time_of(self.next_index)
        if self.leads is not None and self._locked:
            # A grid that stands still is told of all the same.
            cluster = min(cluster, self.timeline.next_beat(self._cluster(now)))
        if cluster == NEVER:
            self.beat_ns = FOREVER
        else:
            self.beat_ns = self._awake(max(now, self.clock.true(self.steering.local_at(cluster))))

    def _strike(self, now: int) -> None:
        index = self._index(now)
        segment = self._segment(now)
        if index >= self.next_index:
            due = self.steering.local_at(self.timeline.time_of(self.next_index))
            self.punctuality.add(self.clock.local(now) - due, beat_ns(segment.milli_bpm))
            if self._locked:
                if index > self.next_index:
                    self.skips.append((now, index - self.next_index))
                self.beats[index] = now + round(self.chance.expovariate(1 / (100 * US)))
                self.tempos[index] = segment.milli_bpm
            self.next_index = index + 1
        if self.leads is not None and self._locked:
            reign, history = self.leads
            timeline = self.timeline.since(self._cluster(now))
            history.frames.append(Frame(now + 50 * US, reign.epoch, index, timeline))
            reign.begin_ns = min(reign.begin_ns, now)
        self._arm(now)


# What the leaders do. It is worked out first, and handed to all who simulate agents.


class Change(NamedTuple):
    """A change that an operator asks for."""

    true_ns: int
    what: str
    milli: int | None
    over: int = 0
    extra: int | None = None
    """So many beats later than the soonest that there is; None leaves the beat to the leader."""


class Failure(NamedTuple):
    """The end of a leader."""

    true_ns: int
    gone: bool
    """Whether its process ends; otherwise it only stands still."""
    untold: Change | None = None
    """What it commits just before, and does not live to tell."""


def schedule(seconds: float) -> list[Change | Failure]:
    """Return what happens in a simulation, spread over its length."""

    def at(share: float) -> int:
        return round(SETTLED_NS + share * (seconds * SECOND - SETTLED_NS))

    return [
        Change(at(0.04), "tempo", 75_000),
        Failure(at(0.16), gone=True),
        Change(at(0.24), "ramp", 100_000, over=16),
        Failure(at(0.33), gone=True),
        Change(at(0.46), "pause", 0),
        Change(at(0.56), "resume", None),
        Failure(at(0.66), gone=False),
        Change(at(0.78), "tempo", 60_000, extra=0),
        Failure(at(0.88), gone=True, untold=Change(0, "untold", 80_000)),
    ]


class Story(NamedTuple):
    """A history, and what to mark in it."""

    history: History
    marks: list[tuple[float, str]]
    """Each with its instant in seconds."""
    takeovers: list[tuple[float, float]]
    """After how many seconds of silence somebody led, and how wrong that one was then, in ns."""
    kept: list[tuple[Change, int]]
    """The changes, each with the beat from which on it was in force."""


def tell(
    changes: Iterable[Change | Failure],
    seconds: float,
    chance: random.Random,
    *,
    standbys: int = STANDBYS,
    milli: int = MILLI,
) -> Story:
    """Work out what all the leaders of a cluster say."""
    history = History()
    story = Story(history, [], [], [])
    end_ns = round(seconds * SECOND)
    clock = LocalClock(chance, chance.gauss(0, 50), seconds)
    reign = Reign(1, clock, 0)
    history.reigns.append(reign)
    waiting = [
        Agent(
            history,
            chance,
            LocalClock(chance, chance.gauss(0, 50), seconds),
            up=near(chance),
            down=near(chance),
            seconds=seconds,
        )
        for _ in range(standbys)
    ]
    leader = Leading(history, reign, Timeline((Segment(1, 0, 0, 0, milli),)), chance, sent=-1)
    leader.steering = Steering(-clock.local(0))
    leader.begin(0)
    for change in changes:
        leader.run(change.true_ns)
        if isinstance(change, Change):
            story.marks.append((change.true_ns / SECOND, change.what))
            story.kept.append((change, leader.change(change)))
            continue
        story.marks.append((change.true_ns / SECOND, "failover"))
        now = change.true_ns
        reign.end_ns, reign.gone = now, change.gone
        committed = leader.timeline
        if change.untold is not None:
            committed = leader.proposed(change.untold._replace(true_ns=now))
        successor, now = take_turns(waiting, now, change.gone, chance)
        waiting.remove(successor)
        was = history.cluster_at(now)
        reign = Reign(reign.epoch + 1, successor.clock, now)
        steering = copy.copy(successor.steering)
        cluster = steering.cluster_at(successor.clock.local(now))
        story.takeovers.append(((now - change.true_ns) / SECOND, cluster - was))
        timeline = reschedule(
            successor.timeline.since(cluster),
            committed,
            cluster,
            beats_per_bar=BEATS_PER_BAR,
            epoch=reign.epoch,
        )
        sent = successor.timeline.index_at(successor.told_ns)
        milli = leader.milli
        leader = Leading(history, reign, timeline, chance, sent=sent)
        leader.steering, leader.milli = steering, milli
        history.reigns.append(reign)
        leader.begin(now)
    leader.run(end_ns)
    return story


def take_turns(
    standbys: Sequence[Agent], now: int, gone: bool, chance: random.Random
) -> tuple[Agent, int]:
    """Return which standby leads next, and from when on."""

    def gives_up(agent: Agent) -> int:
        # A leader that still lived when it was late was asked, and said so.
        due, patience = agent.told_ns, round(max(LATE_NS, JITTERS * agent.drift.jitter_ns))
        while True:
            due = agent.timeline.next_beat(due)
            deadline = agent.clock.true(agent.steering.local_at(due) + patience)
            if deadline >= now:
                return deadline

    ran = now
    for agent in standbys:
        agent.run(ran)
    while True:
        successor = min(standbys, key=gives_up)
        if gives_up(successor) <= ran:
            break
        ran = gives_up(successor)
        for agent in standbys:
            agent.run(ran)
    milli = successor.timeline.segment_at(successor.told_ns).milli_bpm
    lease = 0 if gone else max(LEASE_BEATS * beat_ns(milli), LEASE_NS)
    # A probe, reading the record, and writing it.
    begin = ran + lease + round(chance.uniform(2, 10) * MS)
    for agent in standbys:
        agent.run(begin)
    return successor, begin


class Leading:
    """A leader at work."""

    def __init__(
        self,
        history: History,
        reign: Reign,
        timeline: Timeline,
        chance: random.Random,
        *,
        sent: int,
    ) -> None:
        self.history, self.reign, self.chance = history, reign, chance
        self.timeline, self.sent = timeline, sent
        self.steering = Steering()
        self.milli = MILLI
        self.now = 0

    def begin(self, now: int) -> None:
        """Take over."""
        self.now = now
        self.reign.record(now, self.steering, self.timeline)
        self._strike(now)

    def _cluster(self, now: int) -> int:
        return self.steering.cluster_at(self.reign.clock.local(now))

    def run(self, until_ns: int) -> None:
        """Beat until an instant."""
        while True:
            due = self.timeline.next_beat(self._cluster(self.now))
            now = self.reign.clock.true(self.steering.local_at(due))
            if now >= until_ns:
                self.now = until_ns
                return
            self.now = now
            self._strike(now)

    def _strike(self, now: int) -> None:
        cluster = self._cluster(now)
        self.timeline = self.timeline.since(cluster)
        present, index = self.timeline.segments[0], self.timeline.index_at(cluster)
        self.milli = present.milli_bpm or self.milli
        for beat in range(self.sent + 1, index + 1):
            beaten = self.timeline.segment_at(self.timeline.time_of(beat))
            self.history.tempos[beat] = beaten.milli_bpm
        if index > self.sent or not present.milli_bpm:
            self.sent = max(self.sent, index)
            frame = BeatFrame(
                cluster_id="simulated",
                beat_index=index,
                downbeat=index % BEATS_PER_BAR == 0,
                phase="upbeat",
                tempo_bpm=present.milli_bpm / 1000,
                beats_per_bar=BEATS_PER_BAR,
                window_id="",
                epoch=self.reign.epoch,
                leader_id="",
                **self.timeline.told(),
            )
            # As it comes off the wire, but once for all who hear it.
            told = Timeline.of(frame)
            out = now + round(self.chance.expovariate(1 / (150 * US)))
            self.history.frames.append(Frame(out, self.reign.epoch, index, told))

    def proposed(self, change: Change) -> Timeline:
        """Return the timeline with a change in it."""
        cluster = self._cluster(change.true_ns)
        ask = partial(
            propose,
            self.timeline,
            cluster,
            change.milli,
            over=change.over,
            former=self.milli,
            beats_per_bar=BEATS_PER_BAR,
            epoch=self.reign.epoch,
        )
        if change.extra is None:
            return ask()
        beat = self.timeline.after(cluster)
        for soonest in range(beat, beat + 100):
            with suppress(TempoRefused):
                ask(at_beat=soonest)
                return ask(at_beat=soonest + change.extra)
        raise TempoRefused(f"{change} cannot be made on beat {beat} or soon after")

    def change(self, change: Change) -> int:
        """Commit a change, which takes some milliseconds, tell of it, and return its beat."""
        still = not self.timeline.segment_at(self._cluster(self.now)).milli_bpm
        known = {*self.timeline.segments}
        timeline = self.proposed(change)
        done = change.true_ns + round(self.chance.uniform(1, 5) * MS)
        self.run(done)
        self.timeline = timeline.since(self._cluster(done))
        self.reign.record(done, self.steering, self.timeline)
        if still:
            self._strike(done)
        return next(other.beat0 for other in timeline.segments if other not in known)


# Many agents, each on its own.


class World(NamedTuple):
    """What all agents of a simulation have in common."""

    history: History
    seconds: float
    seed: str
    rates: tuple[float, ...] = ()
    """What their clocks are off by, in ppm, in turns; by chance where there is nothing."""
    cut_ns: int = FOREVER
    """From when on nothing comes through."""
    links: tuple[tuple[Link, Link], ...] = ()
    """What lies between them and the leader besides, there and back, in turns."""
    stalls: bool = True


class Outcome(NamedTuple):
    """What became of an agent."""

    stalls: bool
    errors: array[float]
    """Its cluster time less the leader's, in ns, at every sample."""
    told: array[float]
    """The uncertainty that it told then."""
    beats: array[float]
    """The true instant of each beat, in ns."""
    tempos: array[float]
    """The tempo that it had each beat at."""
    struck: int
    """How many beats it had."""
    lost: int
    lost_to_stalls: int
    back: int
    locks: int
    verdicts: Counter[TempoDrift]
    bursts: Counter[Verdict]
    flaps: int
    lock_s: float


def behind(link: Link, other: Link) -> Link:
    """Return two links in a row, of which the second one has the greater chances."""
    return other._replace(base_ns=link.base_ns + other.base_ns) if other.base_ns else link


def make_agent(world: World, number: int) -> Agent:
    chance = random.Random(f"{world.seed}:{number}")
    if world.rates:
        ppm = world.rates[number % len(world.rates)]
    else:
        # One in twenty has a bad clock.
        ppm = chance.choice((-200.0, 200.0)) if chance.random() < 0.05 else chance.gauss(0, 50)
    up, down = near(chance), near(chance)
    if world.links:
        there, back = world.links[number % len(world.links)]
        up, down = behind(up, there), behind(down, back)
    return Agent(
        world.history,
        chance,
        LocalClock(chance, ppm, world.seconds),
        up=up,
        down=down,
        seconds=world.seconds,
        join_ns=round(chance.uniform(0.1, 1) * JOIN_NS),
        stalls=world.stalls and chance.random() < 0.05,
        cut_ns=world.cut_ns,
    )


def live(world: World, number: int) -> Outcome:
    """Have an agent live, and return what became of it."""
    agent = make_agent(world, number)
    agent.run(round(world.seconds * SECOND))
    samples = range(int(world.seconds))
    last = max(world.history.tempos, default=0)
    ends = {end for _, end in agent.stalls}
    lost = sum(count for at, count in agent.skips if at not in ends)
    return Outcome(
        stalls=bool(agent.stalls),
        errors=array("d", (agent.errors.get(sample, NONE) for sample in samples)),
        told=array("d", (agent.told.get(sample, NONE) for sample in samples)),
        beats=array("d", (agent.beats.get(beat, NONE) for beat in range(last + 1))),
        tempos=array("d", (agent.tempos.get(beat, NONE) for beat in range(last + 1))),
        struck=len(agent.beats),
        lost=lost,
        lost_to_stalls=sum(count for _, count in agent.skips) - lost,
        back=agent.back,
        locks=agent.locks,
        verdicts=agent.verdicts,
        bursts=agent.burst_verdicts,
        flaps=agent.flaps,
        lock_s=(agent.locked_ns - agent.join_ns) / SECOND,
    )


_world: World


def _enter(world: World) -> None:
    global _world
    _world = world


def _live(number: int) -> Outcome:
    return live(_world, number)


def populate(world: World, agents: int, jobs: int) -> list[Outcome]:
    """Have many agents live, and return what became of each."""
    if jobs == 1:
        return [live(world, number) for number in range(agents)]
    with ProcessPoolExecutor(
        jobs, mp_context=get_context("spawn"), initializer=_enter, initargs=(world,)
    ) as pool:
        return list(pool.map(_live, range(agents), chunksize=CHUNK))


# What is made of it.


def numbers(values: Iterable[float]) -> list[float]:
    """Return those that are there, in order."""
    return sorted(value for value in values if not math.isnan(value))


def differences(rows: Sequence[array[float]], first: int = 0) -> list[float]:
    """Return how far agents are apart, two by two, at all samples or beats from one on."""
    return numbers(
        abs(a - b)
        for one, two in zip(rows[::2], rows[1::2], strict=False)
        for a, b in zip(one[first:], two[first:], strict=True)
    )


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
    right = sum(in_tempo(outcome, history.tempos) for outcome in outcomes)
    verdicts = sum((outcome.verdicts for outcome in outcomes), Counter[TempoDrift]())
    judged = sum(count for verdict, count in verdicts.items() if verdict != "unknown")
    bursts = sum((outcome.bursts for outcome in outcomes), Counter[Verdict]())
    found = spreads(outcomes)
    wholes = sorted(spread.whole for spread in found if spread.second >= SETTLED_NS / SECOND)
    lost = sum(outcome.lost for outcome in steady)
    stalling = [outcome for outcome in outcomes if outcome.stalls]
    stalled = sum(outcome.lost for outcome in stalling)
    held = hold_over(max(40, agents // 20), seed, jobs)
    locks = sorted(outcome.lock_s for outcome in outcomes)
    changes = sum(a != b for a, b in itertools.pairwise(history.tempos.values()))
    figures = [
        Figure("same_index", 100 * right / agents, f"{right:,} of {agents:,}; {changes} changes"),
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
            f"{honest.count(False):,} of {len(honest):,} were not",
        ),
        Figure("holdover", held[-1] / MS, in_ms(held)),
        Figure(
            "drift",
            100 * verdicts["acceptable"] / max(1, judged),
            f"{sum(outcome.flaps for outcome in outcomes):,} times lost",
        ),
    ]
    return Report(
        figures,
        {
            "skew of two agents": [value / MS for value in skews],
            "skew of a beat at two agents": [value / MS for value in delivery],
        },
        found,
        story.marks,
        {
            "bursts": {verdict.name: bursts[verdict] for verdict in Verdict},
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


# Regions.


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
    """Pings between regions, a second."""


class Metronome(NamedTuple):
    """A region's own metronome: it follows the first region, and leads its own one."""

    history: History
    errors: dict[int, float]
    told: dict[int, int]


def region_changes(seconds: float, milli: int) -> list[Change | Failure]:
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
    metronome.run(round(seconds * SECOND))
    history.tempos = root.tempos
    return Metronome(history, metronome.errors, metronome.told)


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


def simulate_regions(
    regions: int, agents: int, seconds: float, seed: int, jobs: int, milli: int
) -> list[Way]:
    """Simulate some regions on one grid, in both ways."""
    chance = random.Random(f"{seed}:regions:{milli}")
    story = tell(region_changes(seconds, milli), seconds, chance, milli=milli)
    root, each, beat_s = story.history, agents // regions, beat_ns(milli) / SECOND
    links = ((HERE, HERE), *((far(chance), far(chance)) for _ in range(1, regions)))
    world = World(root, seconds, f"{seed}:one", links=links, stalls=False)
    outcomes = populate(world, each * regions, jobs)
    pings = STEADY_PINGS / max(beat_s, BURST_MIN_NS / SECOND) * (regions - 1)
    nobody = [None] * regions
    apart = [outcomes[region::regions] for region in range(regions)]
    one = weigh("one leader for all", apart, nobody, story, pings * each)
    home = World(root, seconds, f"{seed}:strata:0", stalls=False)
    metronomes: list[Metronome | None] = [None]
    apart = [populate(home, each, jobs)]
    for region in range(1, regions):
        chance = random.Random(f"{seed}:metronome:{milli}:{region}")
        metronome = follow(root, seconds, chance, links[region])
        metronomes.append(metronome)
        there = home._replace(history=metronome.history, seed=f"{seed}:strata:{region}")
        apart.append(populate(there, each, jobs))
    return [one, weigh("a metronome to each region", apart, metronomes, story, pings)]


# What is shown.


def amount(value: float, unit: str) -> str:
    text = f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:.4g}"
    return f"{text} {unit}".rstrip()


def show(figures: Iterable[Figure], targets: dict[str, Target], console: Console) -> None:
    table = Table("what", "measured", "target", "met", "note")
    for figure in figures:
        target = targets[figure.name]
        table.add_row(
            target.what,
            amount(figure.measured, target.unit),
            f"{target.bound} {amount(target.target, target.unit)}",
            "yes" if target.met(figure.measured) else "no",
            figure.note,
        )
    console.print(table)


def show_bars(title: str, values: Sequence[float], unit: str, console: Console) -> None:
    """Print a histogram, of steps that double."""
    table = Table(title, "share", "", box=None)
    counts = Counter(max(-7, math.ceil(math.log2(max(value, 1e-9)))) for value in values)
    for power in range(min(counts, default=0), max(counts, default=-1) + 1):
        share = counts[power] / len(values)
        bar = "█" * max(share > 0, round(60 * share))
        table.add_row(f"to {2.0**power:g} {unit}", f"{100 * share:.3f} %", bar)
    console.print(table)


def show_ways(tempo: int, ways: Sequence[Way], console: Console) -> None:
    table = Table(f"regions, at {tempo / 1000:g} BPM", *(way.what for way in ways))
    rows: dict[str, Callable[[Way], str]] = {
        "two agents of one region, p99": lambda w: f"{percentile(w.within, 0.99) / MS:.3f} ms",
        "two agents of two regions, p50": lambda w: f"{percentile(w.between, 0.5) / MS:.2f} ms",
        "two agents of two regions, p99": lambda w: f"{percentile(w.between, 0.99) / MS:.2f} ms",
        "largest error": lambda w: f"{w.errors[-1] / MS:.2f} ms",
        "within the uncertainty told": lambda w: f"{w.honest:.2f} %",
        "with the metronome's added": lambda w: f"{w.honest_together:.2f} %",
        "pings between regions": lambda w: f"{w.far_pings:,.0f} /s",
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


def region_figures(ways: dict[int, list[Way]]) -> list[Figure]:
    strata = [way for found in ways.values() for way in found if way.what != "one leader for all"]
    both = [way for found in ways.values() for way in found]
    leads = [way.right[lead] for way in both for lead in way.right if lead >= 3]
    good, of = (sum(column) for column in zip(*leads, strict=True))
    return [
        Figure("within", max(percentile(way.within, 0.99) for way in strata) / MS, ""),
        Figure("honest", min(way.honest_together for way in both), ""),
        Figure("lead", 100 * good / of, f"{of - good:,} of {of:,} late"),
    ]


def plot(path: Path, report: Report, title: str) -> None:
    """Draw how far the agents are apart, and when."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5), layout="constrained")
    for name, values in report.bars.items():
        # So many points are enough of a line.
        shown = values[:: max(1, len(values) // 5000)] + values[-1:]
        ranks = [(number + 1) / len(shown) for number in range(len(shown))]
        left.plot(shown, ranks, label=name)
    left.set(xscale="log", xlabel="ms", ylabel="share of pairs", title="how far two are apart")
    left.set_xlim(1e-3)
    left.grid(alpha=0.3)
    left.legend()
    seconds = [spread.second for spread in report.spreads]
    right.plot(seconds, [s.whole / MS for s in report.spreads], label="outermost two agents")
    right.plot(seconds, [s.p99 / MS for s in report.spreads], label="99 % about the median")
    right.plot(seconds, [abs(s.median) / MS for s in report.spreads], label="error of the median")
    colours = {"failover": "C3", "ramp": "C4", "pause": "C7", "resume": "C7", "tempo": "C5"}
    for second, what in report.marks:
        right.axvline(second, color=colours.get(what, "C7"), linestyle=":")
        right.annotate(what, (second, 1), xycoords=("data", "axes fraction"), rotation=90, va="top")
    right.set(yscale="log", xlabel="s", ylabel="ms", title="spread of cluster time")
    right.grid(alpha=0.3)
    right.legend(loc="lower left")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


class Verdicts(NamedTuple):
    """Figures, beside what is promised of them."""

    figures: list[Figure]
    targets: dict[str, Target]

    @property
    def met(self) -> bool:
        """Whether all promises are kept."""
        return all(self.targets[figure.name].met(figure.measured) for figure in self.figures)

    def results(self) -> list[dict[str, Any]]:
        """Return them as they go into a file."""
        return [
            self.targets[figure.name]._asdict()
            | figure._asdict()
            | {"met": self.targets[figure.name].met(figure.measured)}
            for figure in self.figures
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


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Simulate many agents on the pure core.")
    parser.add_argument("--agents", type=int, help="default 10000; with --regions 300")
    parser.add_argument("--seconds", type=float, help="default 120; at least 40")
    parser.add_argument("--seed", type=int, default=1, help="default %(default)s")
    parser.add_argument("--quick", action="store_true", help="fewer agents, and for a shorter time")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="default %(default)s")
    parser.add_argument("--regions", type=int, default=0, help="so many regions on one grid")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--plot", type=Path, help="where to draw them, with matplotlib")
    arguments = parser.parse_args(argv)
    if arguments.regions == 1 or arguments.regions < 0:
        parser.error("--regions takes 2 or more")
    if arguments.regions and arguments.plot:
        parser.error("there is no plot of regions")
    usual = (200, 60.0) if arguments.quick else (300 if arguments.regions else 10_000, 120.0)
    agents, seconds = arguments.agents or usual[0], arguments.seconds or usual[1]
    if seconds < 40 or agents < max(2, 2 * arguments.regions):
        parser.error("too little to simulate")
    console = Console()
    console.width = max(console.width, 150)
    begun = time.perf_counter()
    results: dict[str, Any] = {"agents": agents, "seconds": seconds, "seed": arguments.seed}
    if arguments.regions:
        ways = {
            milli: simulate_regions(
                arguments.regions, agents, seconds, arguments.seed, arguments.jobs, milli
            )
            for milli in (120_000, 300_000)
        }
        for milli, found in ways.items():
            show_ways(milli, found, console)
        verdicts = Verdicts(region_figures(ways), REGION_TARGETS)
        results["regions"] = {str(m): [results_of(way) for way in w] for m, w in ways.items()}
    else:
        report = simulate(agents, seconds, arguments.seed, arguments.jobs)
        for name, values in report.bars.items():
            show_bars(name, values, "ms", console)
        verdicts = Verdicts(report.figures, TARGETS)
        results |= report.numbers | {
            "marks": report.marks,
            "spreads": [spread._asdict() for spread in report.spreads],
        }
        if arguments.plot:
            plot(arguments.plot, report, f"{agents:,} agents, seed {arguments.seed}")
    results["figures"] = verdicts.results()
    show(verdicts.figures, verdicts.targets, console)
    console.print(
        f"{agents:,} agents for {seconds:g} s, seed {arguments.seed}, "
        f"simulated in {time.perf_counter() - begun:.0f} s by {arguments.jobs} jobs"
    )
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_bytes(
            msgspec.json.format(msgspec.json.encode(results), indent=2) + b"\n"
        )
    return not verdicts.met


if __name__ == "__main__":
    sys.exit(main())
