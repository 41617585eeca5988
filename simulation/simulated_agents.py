"""Simulated agents: wrong clocks, late and lost messages, and real followers.

Nothing here waits: time is a number, and the same seed gives the same result. Each agent has a real
`Follower` and a real `Grid`. Its clock, its network and its loop are simulated, and so is what
`BeatListener` and `BeatClock` do.
"""

from __future__ import annotations

import copy
import math
import random
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Final, NamedTuple

from backbeat_trio._grid.estimate import Ping
from backbeat_trio._grid.follower import Answer, Follower, FollowerObserver, Heard
from backbeat_trio._grid.grid import Grid
from backbeat_trio._grid.punctuality import TempoDrift
from backbeat_trio._grid.steering import PARTS, Steering
from backbeat_trio._grid.timeline import NEVER, Timeline
from backbeat_trio._wire import BeatFrame, Segment, SyncReply

US: Final = 1_000
MS: Final = 1_000_000
SECOND: Final = 1_000_000_000
FOREVER: Final = 1 << 62
# Where no number is.
NONE: Final = math.nan

# As the listener has them; a test compares them.
PING_TIMEOUT_NS: Final = 500 * MS
ASK_EVERY_NS: Final = 20 * MS

CLUSTER_ID: Final = "simulated"
BEATS_PER_BAR: Final = 4
# The tempo that a simulation begins with, in thousandths of a beat a minute.
MILLI: Final = 60_000
# How often the agents' clocks are looked at.
SAMPLE_NS: Final = SECOND
# Agents join within so long of the beginning, and what they do from then on is measured later.
JOIN_NS: Final = 5 * SECOND
SETTLED_NS: Final = 10 * SECOND
CHUNK: Final = 20


# Clocks that are off, and messages that take their time or are lost.


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
    frame: BeatFrame
    timeline: Timeline

    @classmethod
    def of(cls, true_ns: int, timeline: Timeline, index: int, epoch: int) -> Frame:
        """Make the frame of a beat, as it comes off the wire, but once for all who hear it."""
        frame = BeatFrame(
            cluster_id=CLUSTER_ID,
            beat_index=index,
            downbeat=index % BEATS_PER_BAR == 0,
            phase="upbeat",
            tempo_bpm=timeline.segments[0].milli_bpm / 1000,
            beats_per_bar=BEATS_PER_BAR,
            window_id="",
            epoch=epoch,
            leader_id="",
            **timeline.wire_fields(),
        )
        return cls(true_ns, frame, Timeline.of(frame))


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

    def reply(self, came_ns: int, left_ns: int) -> SyncReply:
        """Return its answer to a ping that came at one instant, and left at another one."""
        sent = self.cluster_at(left_ns)
        return SyncReply(
            cluster_id=CLUSTER_ID,
            epoch=self.epoch,
            leader_id="",
            received_ns=self.cluster_at(came_ns),
            sent_ns=sent,
            beats_per_bar=BEATS_PER_BAR,
            **self.timelines[self._at(left_ns)].since(sent).wire_fields(),
        )


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


class Agent(FollowerObserver):
    """An agent: a real follower, and its surroundings; also a standby or a region's metronome."""

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
        self.stalls = self._make_stalls(seconds) if stalls else []
        timeline = Timeline((Segment(0, 0, 0, 0, MILLI),))
        self.grid = Grid(timeline, Steering(-clock.local(join_ns)), BEATS_PER_BAR, self)
        self.follower = Follower(
            self.grid, cluster_id=CLUSTER_ID, observer=self, chance=chance.random
        )
        # A metronome that follows leads its own region with what it knows.
        self.leads: tuple[Reign, History] | None = None
        # When what happens next happens, in true time.
        self.now = 0
        self.pointer = 0
        self.frame: Frame | None = None
        self.arrival_ns = self.frame_ns = self.beat_ns = FOREVER
        self.last_arrival_ns = 0
        self.burst_ns = self.begun_ns = join_ns
        self.burst: list[Answer] | None = None
        self.asked: Heard | None = None
        self.ask = False
        self.sample_ns = -(-join_ns // SAMPLE_NS) * SAMPLE_NS
        self.next_index = 1
        # What is measured.
        self.locked_ns = FOREVER
        self.errors: dict[int, float] = {}
        self.told: dict[int, int] = {}
        self.beats: dict[int, int] = {}
        self.tempos: dict[int, int] = {}
        self.skips: list[tuple[int, int]] = []
        self.verdicts: Counter[TempoDrift] = Counter()
        self.verdict: TempoDrift = "unknown"
        self.flaps = self.back = 0
        self.position = -math.inf

    def _make_stalls(self, seconds: float) -> list[tuple[int, int]]:
        stalls, at = [], float(SETTLED_NS)
        while (at := at + self.chance.expovariate(1 / 15) * SECOND) < seconds * SECOND:
            # Most of them are shorter than a beat, and some cover several.
            length = min(0.1 * self.chance.lognormvariate(0, 1.3), 3) * SECOND
            stalls.append((round(at), round(at + length)))
            at += length
        return stalls

    def _awake(self, true_ns: int) -> int:
        for begin, end in self.stalls:
            if begin <= true_ns < end:
                return end
        return true_ns

    @property
    def local_ns(self) -> int:
        """What its clock shows now."""
        return self.clock.local(self.now)

    # What happens, in the order of true time.

    def run(self, until_ns: int) -> None:
        """Live until an instant."""
        if self.frame is None:
            self._await_frame()
        while True:
            now = min(self.frame_ns, self.burst_ns, self.beat_ns, self.sample_ns)
            if now >= until_ns:
                return
            self.now = now
            if now == self.sample_ns:
                self._sample()
                self.sample_ns += SAMPLE_NS
            elif now == self.beat_ns:
                self._strike()
            elif now == self.frame_ns:
                self._hear()
                self._await_frame()
            else:
                self._sync()

    def run_and_count(self, seconds: float) -> float:
        """Live for so long, and return how often it pinged the leader in the last quarter of it."""
        counts = self.follower.counts
        self.run(round(0.75 * seconds * SECOND))
        before = counts.pings
        self.run(round(seconds * SECOND))
        return (counts.pings - before) / (0.25 * seconds)

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

    def _hear(self) -> None:
        assert self.frame is not None
        _, frame, timeline = self.frame
        received = self.clock.local(self.arrival_ns)
        if self.follower.hear(frame, timeline, received, self.local_ns):
            self.ask = True
        if self.burst is None:
            self.burst_ns = self._next_burst()

    def _sync(self) -> None:
        follower = self.follower
        if self.burst is None:
            self.ask, self.asked, self.begun_ns = False, follower.question, self.now
            self.burst, end = self._ping(follower.pings)
            self.burst_ns = self._awake(end)
            return
        answers, self.burst = self.burst, None
        follower.answer(answers, self.asked, self.local_ns)
        self.burst_ns = self._next_burst()

    def _next_burst(self) -> int:
        planned = self.now if self.ask else self.clock.true(self.follower.next_burst_ns)
        return self._awake(max(self.now, planned, self.begun_ns + ASK_EVERY_NS))

    def _ping(self, pings: int) -> tuple[list[Answer], int]:
        answers: list[Answer] = []
        now, chance, local = self.now, self.chance, self.clock.local
        for _ in range(pings):
            self.follower.counts.pings += 1
            came = now + self.up.draw(chance)
            reign = self.history.reign_at(came)
            if chance.random() < 2 * LOSS or came >= self.cut_ns:
                return answers, now + PING_TIMEOUT_NS
            if reign is None:
                last = [other for other in self.history.reigns if other.end_ns <= came]
                gone = bool(last) and last[-1].gone
                return answers, now + (2 * self.up.draw(chance) if gone else PING_TIMEOUT_NS)
            left = came + round(chance.expovariate(1 / (50 * US)))
            back = left + self.down.draw(chance)
            if back - now > PING_TIMEOUT_NS:
                return answers, now + PING_TIMEOUT_NS
            reply = reign.reply(came, left)
            ping = Ping(local(now), reply.received_ns, reply.sent_ns, local(back))
            answers.append((ping, reply))
            now = self._awake(back)
        return answers, now

    def _sample(self) -> None:
        if not self.follower.locked:
            return
        local, number = self.local_ns, self.now // SAMPLE_NS
        self.errors[number] = self.grid.cluster_at(local) - self.history.cluster_at(self.now)
        uncertainty = self.follower.uncertainty_ns(local)
        if uncertainty is not None:
            self.told[number] = uncertainty
        self._watch()

    def _watch(self) -> None:
        position = self.grid.position_at(self.local_ns)
        self.back += position < self.position
        self.position = position

    # What its follower and its grid tell.

    def on_lock(self) -> None:
        """Note when it has locked."""
        self.locked_ns = min(self.locked_ns, self.now)

    def on_followed(self) -> None:
        """Count what it says of the frames."""
        before, self.verdict = self.verdict, self.follower.drift.verdict
        self.verdicts[self.verdict] += 1
        self.flaps += before == "acceptable" != self.verdict

    def rebased(self, beats: float, index: int) -> None:
        """Take in that the position has moved to another grid."""
        self.next_index = self.grid.index_at(self.local_ns) + 1
        self.position = -math.inf

    def changed(self) -> None:
        """Take in that the grid has another future."""
        if self.follower.locked:
            self._watch()
        if self.leads is not None:
            self.leads[0].record(self.now, self.grid.steering, self.grid.timeline)
        self._arm()

    # Beats.

    def _arm(self) -> None:
        local = self.grid.local_at(self.next_index)
        if self.leads is not None and self.follower.locked:
            # A grid that stands still is told of all the same.
            told = self.grid.timeline.next_beat(self.grid.cluster_at(self.local_ns))
            local = min(local, self.grid.steering.local_at(told))
        if local == NEVER:
            self.beat_ns = FOREVER
        else:
            self.beat_ns = self._awake(max(self.now, self.clock.true(local)))

    def _strike(self) -> None:
        local, now = self.local_ns, self.now
        index = self.grid.index_at(local)
        if index >= self.next_index:
            if self.follower.locked:
                if index > self.next_index:
                    self.skips.append((now, index - self.next_index))
                self.beats[index] = now + round(self.chance.expovariate(1 / (100 * US)))
                self.tempos[index] = self.grid.segment_at(local).milli_bpm
            self.next_index = index + 1
        if self.leads is not None and self.follower.locked:
            reign, history = self.leads
            timeline = self.grid.timeline.since(self.grid.cluster_at(local))
            history.frames.append(Frame.of(now + 50 * US, timeline, index, reign.epoch))
            reign.begin_ns = min(reign.begin_ns, now)
        self._arm()


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
    outlying: int
    """Bursts of pings that contradicted what it knew."""
    pings_a_second: float
    """How often it pinged the leader in the last quarter of the time."""
    verdicts: Counter[TempoDrift]
    flaps: int
    lock_s: float

    @property
    def missed(self) -> int:
        """How many beats it did not have, for whatever reason."""
        return self.lost + self.lost_to_stalls


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
    pings_a_second = agent.run_and_count(world.seconds)
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
        locks=agent.follower.counts.locks,
        outlying=agent.follower.counts.pings_outlying,
        pings_a_second=pings_a_second,
        verdicts=agent.verdicts,
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


# What is made of the figures.


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value of an ordered sequence that so large a share of it does not exceed."""
    return values[max(0, math.ceil(share * len(values)) - 1)] if values else 0.0


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
