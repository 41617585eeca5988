"""The frames and answers of the leaders of a simulated cluster, computed before the agents run.

`propose` and `reschedule` are real, and standbys are agents with real followers. What `Leader` and
`Standby` do with them is simulated, by the same rules.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Final, NamedTuple

from simulated_agents import (
    BEATS_PER_BAR,
    MILLI,
    MS,
    SECOND,
    SETTLED_NS,
    US,
    Agent,
    Frame,
    History,
    LocalClock,
    Reign,
    near,
)

from backbeat_trio._errors import TempoRefused
from backbeat_trio._grid.changes import propose, reschedule
from backbeat_trio._grid.presence import JITTERS, LATE_NS
from backbeat_trio._grid.steering import Steering
from backbeat_trio._grid.timeline import Timeline, beat_ns
from backbeat_trio._wire import Segment

STANDBYS: Final = 4
# As the leader has them; a test compares them.
LEASE_BEATS: Final = 2
LEASE_NS: Final = SECOND


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
        announced_seq = committed.segments[-1].seq
        if change.untold is not None:
            committed = leader.proposed(change.untold._replace(true_ns=now))
        successor, now = take_turns(waiting, now, change.gone, chance)
        waiting.remove(successor)
        was = history.cluster_at(now)
        reign = Reign(reign.epoch + 1, successor.clock, now)
        steering = copy.copy(successor.grid.steering)
        cluster = steering.cluster_at(successor.clock.local(now))
        story.takeovers.append(((now - change.true_ns) / SECOND, cluster - was))
        timeline = reschedule(
            successor.grid.timeline.since(cluster),
            committed,
            cluster,
            announced_seq=announced_seq,
            beats_per_bar=BEATS_PER_BAR,
            epoch=reign.epoch,
        )
        sent = successor.grid.timeline.index_at(successor.follower.last_due_ns)
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
        follower, grid = agent.follower, agent.grid
        due, patience = (
            follower.last_due_ns,
            round(max(LATE_NS, JITTERS * follower.drift.jitter_ns)),
        )
        while True:
            due = grid.timeline.next_beat(due)
            deadline = agent.clock.true(grid.steering.local_at(due) + patience)
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
    milli = successor.grid.timeline.segment_at(successor.follower.last_due_ns).milli_bpm
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
            out = now + round(self.chance.expovariate(1 / (150 * US)))
            self.history.frames.append(Frame.of(out, self.timeline, index, self.reign.epoch))

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
