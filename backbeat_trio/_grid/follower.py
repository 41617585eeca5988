"""Whom an agent believes about the grid, and what it makes of what it is told.

A frame of the leader that is followed, and that its grid explains, is taken as it is. What cannot
be known from a frame alone is asked for first: a higher epoch, a beat that should not have come
yet. The answers to pings decide, and those of a lower epoch never count while the leader that is
followed is heard. Where nobody answers, frames are believed once the leader before them has fallen
silent. Whoever may publish both frames and answers is believed: that is for the server's
permissions to decide, and what looks odd is counted and told.

Pure: local time is passed in, as `now_ns`. Frames and bursts of pings go in; what comes out is a
grid that is steered, a wish to ask the leader, and when to do so next.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, TypeAlias, final

from msgspec import Struct

from .._wire import BeatFrame, SyncReply
from .estimate import REST_NS, Estimate, Ping, Verdict, best_ping
from .grid import Grid
from .punctuality import Drift, is_late, tolerance_ns
from .steering import MIN_STEP_NS
from .timeline import NEVER, Timeline, beat_ns

JOINING_PINGS: Final = 16
STEADY_PINGS: Final = 4
# Bursts come once a beat, but neither more nor less often than this; before the first lock, at
# least once a second.
BURST_MIN_NS: Final = 250_000_000
_BURST_MAX_NS: Final = 5_000_000_000
_JOINING_NS: Final = 1_000_000_000
# Agents that began together do not ping in step: each interval is longer by up to this part of it.
# Once the estimate is good the interval doubles from burst to burst, up to `REST_NS` with it.
_JITTER: Final = 0.25
# Within so long whoever has heard of a change by a frame asks the leader about it.
_CHECK_NS: Final = 4_000_000_000
# So many frames in a row that are early or late mean that a clock has jumped, and so does a loop
# that did not get round to a frame for so long.
_SURPRISING: Final = 3
_STALLED_NS: Final = 1_000_000_000
# Pings that err by more than their way and this, having been long ago, are worse than the arrival
# of frames, which errs by its own way.
_PINGS_WORSE_NS: Final = 10_000_000
# How many bursts in a row must contradict what frames have told.
_CONTRADICTED: Final = 3
# How far behind the position another incarnation of the grid may lie for the position to be held
# there, in bars of that grid.
_HELD_BARS: Final = 2

Answer: TypeAlias = tuple[Ping, SyncReply]


class Heard(NamedTuple):
    """A frame, the timeline that it tells of, and when it came, in local time."""

    frame: BeatFrame
    timeline: Timeline
    received_ns: int


class FollowCounts(Struct):
    """What a follower counts, and who feeds it."""

    frames: int = 0
    frames_undecodable: int = 0
    frames_foreign: int = 0
    frames_stale_epoch: int = 0
    frames_repeated: int = 0
    frames_unexplained: int = 0
    pings: int = 0
    pings_failed: int = 0
    pings_outlying: int = 0
    locks: int = 0


class FollowerObserver:
    """Whom a follower calls. Each method does nothing unless it is overridden."""

    def on_followed(self) -> None:
        """Take note that a frame was followed, or that the grid was locked to."""

    def on_lock(self) -> None:
        """Take note of a lock: the first one, or one to another grid. `on_followed` comes next."""

    def on_leader(self) -> None:
        """Take note that somebody else leads on the same grid."""

    def on_stale(self, epoch: int) -> None:
        """Take note of a frame of an epoch that is over."""

    def on_odd(self, text: str) -> None:
        """Take note of what somebody ought to look at."""


@final
class Follower:
    """Follows a leader, and steers a grid by it.

    Args:
      grid: moved and steered from here only, but for what its owner does.
      cluster_id: frames and answers of other clusters are none.
      observer: is called when something has happened.
      chance: draws a number from 0 to 1, by which agents that began together come out of step.

    """

    def __init__(
        self,
        grid: Grid,
        *,
        cluster_id: str,
        observer: FollowerObserver | None = None,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.grid: Grid = grid
        self.locked: bool = False
        """Whether the grid is the cluster's."""
        self.epoch: int = -1
        self.leader_id: str = ""
        self.incarnation: str = ""
        """The identity of the grid; empty where nobody has said it."""
        self.is_alone: bool = False
        """Whether the leader has no record."""
        self.last_due_ns: int = 0
        """The instant, in cluster time, at which the last frame that was followed was due."""
        self.question: Heard | None = None
        """A frame that is not believed before the leader was asked about it."""
        self.drift: Drift = Drift()
        self.counts: FollowCounts = FollowCounts()
        self._observer = observer or FollowerObserver()
        self._cluster_id = cluster_id
        self._estimate = Estimate()
        # When that frame came, in local time; or when the grid was locked to.
        self._last_heard_ns = 0
        self._next_index = 0
        self._judged_epoch = -1
        self._behind = 0
        self._answered = False
        self._chance = chance
        # When the next burst is planned for, and when it comes sooner as a frame is missing.
        self._planned_ns, self._missing_ns = 0, NEVER
        # How far bursts are apart once all is well, when the leader may be asked again, and how
        # many frames in a row have surprised.
        self._interval_ns = self._not_before_ns = 0
        self._surprising = 0

    # What is to be told.

    def due_ns(self) -> int:
        """Return the cluster time at which the next frame is due."""
        return self.grid.timeline.next_beat(self.last_due_ns)

    def in_holdover(self, now_ns: int) -> bool:
        """Tell whether two frames in a row are missing."""
        if not self.locked:
            return False
        patience = max(MIN_STEP_NS, beat_ns(self.grid.segment_at(now_ns).milli_bpm) // 4)
        # By when the last one came, and not by cluster time: that may be far off, and on its way
        # back, while every frame is heard.
        silence = self.grid.timeline.next_beat(self.due_ns()) - self.last_due_ns
        return now_ns - self._last_heard_ns > silence + patience

    def measured_bpm(self, now_ns: int) -> float | None:
        """Return the tempo of the frames' arrivals; None before there are two."""
        rate = self.drift.rate
        return None if rate is None else rate * self.grid.segment_at(now_ns).milli_bpm / 1000

    def uncertainty_ns(self, now_ns: int) -> int | None:
        """Return what cluster time may be wrong by; None where it was never measured."""
        if not self.locked or not self._estimate.known:
            return None
        steering = self.grid.steering
        slewing = abs(now_ns + steering.target_at(now_ns) - steering.cluster_at(now_ns))
        return self._estimate.uncertainty_at(now_ns) + slewing

    def error_text(self, now_ns: int) -> str | None:
        """Say by how much the position is off; None while it is off by no more than it may be."""
        grid = self.grid
        beat, error = beat_ns(grid.segment_at(now_ns).milli_bpm), grid.error_ns(now_ns)
        if not self.locked or abs(error) <= tolerance_ns(beat):
            return None
        where = "ahead of" if error > 0 else "behind"
        how = (
            "the position holds until the grid reaches it"
            if grid.hold_ns(now_ns)
            else "the position is steered to it"
        )
        return f"{where} the cluster by {abs(error) / beat:.3g} beats; {how}"

    # Frames.

    def hear(self, frame: BeatFrame, timeline: Timeline, received_ns: int, now_ns: int) -> bool:
        """Take in a frame; return whether the leader is to be asked about it at once.

        Args:
          frame: what came.
          timeline: what it tells of the grid.
          received_ns: when it came.
          now_ns: when this process got round to it.

        """
        counts = self.counts
        if frame.cluster_id != self._cluster_id:
            counts.frames_foreign += 1
            return False
        if self._is_outranked(frame) and not self.in_holdover(now_ns):
            counts.frames_stale_epoch += 1
            self._observer.on_odd(f"a frame of epoch {frame.epoch} while epoch {self.epoch} leads")
            self._observer.on_stale(frame.epoch)
            return False
        # A grid that stands still is told of again and again.
        first = self._next_index - (not frame.segment.milli_bpm)
        if frame.epoch == self.epoch and frame.beat_index < first:
            counts.frames_repeated += 1
            return False
        heard = Heard(frame, timeline, received_ns)
        if not self._explains(heard):
            self.question = heard
            return True
        self._accept(heard, now_ns)
        return False

    def _is_outranked(self, message: BeatFrame | SyncReply) -> bool:
        # Whoever has a record outranks whoever has none, whatever their epochs.
        return self.epoch >= 0 and _rank(message) < (not self.is_alone, self.epoch)

    def _explains(self, heard: Heard) -> bool:
        # A frame of the present leader may be late, but not early; and it tells of what is known of
        # the grid, or of something newer.
        frame, timeline, received_ns = heard
        if not self.locked or frame.epoch != self.epoch or self._is_another(frame):
            return False
        present = self.grid.timeline
        if not timeline.shares(present) and timeline.segments[-1].seq <= present.segments[-1].seq:
            return False
        late = self.grid.cluster_at(received_ns) - timeline.time_of(frame.beat_index)
        return late >= -max(MIN_STEP_NS, beat_ns(frame.segment.milli_bpm) // 4)

    def _accept(self, heard: Heard, now_ns: int) -> None:
        frame, timeline, received_ns = heard
        self.counts.frames += 1
        self._next_index = frame.beat_index + 1
        if self.question is not None and self.question.frame.epoch != frame.epoch:
            # Who leads goes on leading.
            self._disbelieve()
        self._follow(frame, timeline, now_ns)
        due, moves = timeline.time_of(frame.beat_index), bool(frame.segment.milli_bpm)
        if moves and self._is_better_than_pings(received_ns):
            # What a frame alone tells, wrong by its way.
            self.grid.steer(due - received_ns, now_ns)
        late = self.grid.cluster_at(received_ns)
        if not moves:
            # It says the same at every instant that it comes, give or take its way.
            due = timeline.last_beat(late + MIN_STEP_NS)
        self.last_due_ns, self._last_heard_ns = due, received_ns
        beat = beat_ns(frame.segment.milli_bpm)
        # A change that a lost frame told of may be in force before the next one comes.
        missing = self.grid.steering.local_at(self.due_ns()) + max(beat // 2, MIN_STEP_NS)
        self._missing_ns = missing + round(self._chance() * beat / 2)
        # One that had to wait for this loop says nothing of the leader, and neither does one of a
        # grid that stands still, nor the first one of a leader that had to take over: it is late
        # for a reason.
        waited = is_late(now_ns - received_ns, beat)
        if now_ns - received_ns > _STALLED_NS:
            self.hurry(now_ns)
        taken_over = self._judged_epoch not in (-1, frame.epoch)
        self._judged_epoch = frame.epoch
        if moves and not waited and not taken_over:
            self.drift.add(due, received_ns, late - due, beat)
            self._watch_arrival(late - due, beat, now_ns)
        self._observer.on_followed()

    def _watch_arrival(self, late_ns: int, beat: int, now_ns: int) -> None:
        # It may have been on its way for as long as a ping there and back.
        tolerance = tolerance_ns(beat)
        if -tolerance <= late_ns <= tolerance + self._estimate.way_ns:
            self._surprising = 0
            return
        self._surprising += 1
        if self._surprising == _SURPRISING:
            self.hurry(now_ns)

    def _is_better_than_pings(self, received_ns: int) -> bool:
        estimate = self._estimate
        return not self._answered and (
            not estimate.known
            or estimate.uncertainty_at(received_ns) > estimate.way_ns + _PINGS_WORSE_NS
        )

    def _disbelieve(self) -> None:
        if self.question is None:
            return
        frame, self.question = self.question.frame, None
        self.counts.frames_unexplained += 1
        self._observer.on_odd(
            f"a frame of epoch {frame.epoch} that the leader of epoch {self.epoch} "
            "does not bear out"
        )

    def _follow(self, message: BeatFrame | SyncReply, timeline: Timeline, now_ns: int) -> None:
        present = self.grid.timeline
        newer = timeline.segments[-1].seq >= present.segments[-1].seq
        if message.epoch != self.epoch:
            self._note_leader(message)
            self._observer.on_leader()
            newer = True
        # A reply may have been on its way for longer than the frame that told of a change.
        if newer and timeline.segments != present.segments:
            if isinstance(message, BeatFrame) and timeline.segments[-1] != present.segments[-1]:
                # What a frame alone has told is to be borne out.
                self._ping_within(_CHECK_NS, now_ns)
            self.grid.adopt(timeline, now_ns)

    def _note_leader(self, message: BeatFrame | SyncReply) -> None:
        self.epoch, self.leader_id = message.epoch, message.leader_id
        self._interval_ns = 0
        self.is_alone = message.alone is True
        self.incarnation = message.incarnation or ""

    def _is_another(self, message: BeatFrame | SyncReply) -> bool:
        # Only two names tell two grids apart; somebody may not know its own.
        named = message.incarnation or ""
        return bool(self.incarnation and named and named != self.incarnation)

    # Pings.

    @property
    def pings(self) -> int:
        """How many pings the next burst is of, at most."""
        return STEADY_PINGS if self.locked else JOINING_PINGS

    def is_enough(self, answers: Sequence[Answer]) -> bool:
        """Tell whether a burst is to end after these answers: the leader is asked too often."""
        if not answers[-1][1].wait_ns:
            return False
        return self.locked or len(answers) >= STEADY_PINGS

    @property
    def next_burst_ns(self) -> int:
        """When to ping the leader again, in local time, where nothing is asked sooner."""
        return min(self._planned_ns, max(self._missing_ns, self._not_before_ns))

    def hurry(self, now_ns: int) -> None:
        """Ping the leader once a beat again, as there was a surprise."""
        self._interval_ns = 0
        self._ping_within(self._beat_ns(now_ns), now_ns)

    def _ping_within(self, within_ns: int, now_ns: int) -> None:
        soon = max(now_ns + round(self._chance() * within_ns), self._not_before_ns)
        self._planned_ns = min(self._planned_ns, soon)

    def _beat_ns(self, now_ns: int) -> int:
        beat = beat_ns(self.grid.segment_at(now_ns).milli_bpm)
        return min(max(beat, BURST_MIN_NS), _BURST_MAX_NS)

    def _plan(self, answers: Sequence[Answer], now_ns: int, *, well: bool, expected: bool) -> None:
        beat = self._beat_ns(now_ns)
        if not well:
            self._interval_ns, pause = 0, BURST_MIN_NS
        elif not self.locked:
            pause = min(beat, _JOINING_NS)
        elif not self._answered or self._behind or self.question is not None:
            pause = beat
        else:
            interval = max(beat, self._interval_ns)
            interval = self._next_interval(interval, now_ns) if expected else interval // 2
            pause = self._interval_ns = max(beat, interval)
        wait = max((reply.wait_ns or 0 for _, reply in answers), default=0)
        wait = max(self._jittered(min(wait, REST_NS)), BURST_MIN_NS)
        self._not_before_ns = now_ns + wait
        if well:
            pause = self._jittered(pause)
        self._planned_ns = max(now_ns + pause, self._not_before_ns)
        self._missing_ns = NEVER

    def _next_interval(self, interval: int, now_ns: int) -> int:
        # Twice as long where the estimate stays good for it, and shorter where it does not.
        estimate = self._estimate
        longer = min(2 * interval, round(REST_NS / (1 + _JITTER)))
        for pause in (longer, interval):
            if estimate.is_good_at(now_ns + round((1 + _JITTER) * pause)):
                return pause
        return interval // 2

    def _jittered(self, pause_ns: int) -> int:
        return pause_ns + round(_JITTER * self._chance() * pause_ns)

    def answer(self, answers: Sequence[Answer], asked: Heard | None, now_ns: int) -> bool:
        """Take in the answers to a burst, and plan the next one (see `next_burst_ns`).

        Args:
          answers: in the order in which they came.
          asked: the `question` there was when the burst began. One that came since is another
            question: the leader may have died with its last answer.
          now_ns: now.

        Returns:
          Whether all is well, so that the next burst has time.

        """
        best = best_ping([ping for ping, _ in answers])
        expected = best is None or not self._estimate.known or self._estimate.expects(best)
        well = self._take(answers, asked, now_ns)
        self._plan(answers, now_ns, well=well, expected=expected)
        return well

    def _take(self, answers: Sequence[Answer], asked: Heard | None, now_ns: int) -> bool:
        rank = max((_rank(reply) for _, reply in answers), default=(False, -1))
        if any(_rank(reply) != rank for _, reply in answers):
            self._observer.on_odd(f"pings are answered in several epochs, up to {rank[1]}")
            answers = [(ping, reply) for ping, reply in answers if _rank(reply) == rank]
        burst = [ping for ping, _ in answers]
        best = best_ping(burst)
        self._answered = best is not None
        if best is None:
            self._decide_unanswered(now_ns)
            return True
        # The newest one: of a burst, it may be the first that tells of a change.
        reply = answers[-1][1]
        if self.locked and self._is_outranked(reply) and not self.in_holdover(now_ns):
            self.counts.frames_stale_epoch += 1
            self._observer.on_odd(
                f"a ping is answered in epoch {reply.epoch} while epoch {self.epoch} leads"
            )
            return True
        try:
            timeline = Timeline.of(reply)
        except ValueError:
            self.counts.pings_failed += 1
            return True
        verdict = self._measure(reply, timeline, best, burst, now_ns)
        if asked is not None and asked is self.question:
            # Now that the clock is right it may be plain.
            if not self._explains(asked):
                self._disbelieve()
            else:
                self.question = None
                if asked.frame.beat_index >= self._next_index:
                    self._accept(asked, now_ns)
        return verdict is not Verdict.OUTLYING

    def _measure(
        self, reply: SyncReply, timeline: Timeline, best: Ping, burst: list[Ping], now_ns: int
    ) -> Verdict:
        grid, estimate = self.grid, self._estimate
        apart = best.local_ns + best.offset_ns - grid.cluster_at(best.local_ns)
        same = timeline.continues(grid.timeline, apart) and not self._is_another(reply)
        if not self.locked or (reply.epoch != self.epoch and not same):
            self._estimate = estimate = Estimate()
            verdict = estimate.add(burst)
            self._lock(reply, timeline, estimate.offset_at(now_ns), now_ns, estimate.frequency)
            return verdict
        if reply.epoch != self.epoch and estimate.known:
            # The next leader has an idea of its own of the same cluster time.
            estimate.begin_anew(best)
        verdict = estimate.add(burst)
        if verdict is Verdict.OVERRULED:
            # Cluster time has jumped: frames from before and after it make no line.
            self.drift.clear()
            self._interval_ns = 0
        if self._is_mistaken(timeline, same=same, epoch=reply.epoch):
            self.counts.frames_unexplained += 1
            self._observer.on_odd("the leader knows nothing of what frames in its name have told")
            if same:
                grid.adopt(timeline, now_ns)
                self._next_index = min(self._next_index, self._index_at(now_ns) + 1)
            else:
                self._lock(reply, timeline, estimate.offset_at(now_ns), now_ns, estimate.frequency)
        if verdict is Verdict.OUTLYING or not timeline.continues(grid.timeline, apart):
            self.counts.pings_outlying += 1
            self._observer.on_odd("a ping's answer contradicts what is known of cluster time")
            return Verdict.OUTLYING
        self._follow(reply, timeline, now_ns)
        grid.steer(estimate.offset_at(now_ns), now_ns, estimate.frequency)
        return verdict

    def _is_mistaken(self, timeline: Timeline, *, same: bool, epoch: int) -> bool:
        # Once, an answer may have been on its way for longer than the frame that told of a change.
        # Where the leader goes on not to know of it, the frame was not the leader's.
        known = self.grid.timeline.segments[-1].seq
        behind = epoch == self.epoch and (not same or timeline.segments[-1].seq < known)
        self._behind = self._behind + 1 if behind else 0
        if self._behind < _CONTRADICTED:
            return False
        self._behind = 0
        return True

    def _decide_unanswered(self, now_ns: int) -> None:
        # A leader that beats and answers no pings: its frames tell the time, if less well. Another
        # one is believed when the one before it is not heard any more.
        if self.question is None or (self.locked and not self.in_holdover(now_ns)):
            return
        heard, self.question = self.question, None
        frame, timeline, received_ns = heard
        due = timeline.time_of(frame.beat_index)
        apart = due - self.grid.cluster_at(received_ns)
        same = timeline.continues(self.grid.timeline, apart) and not self._is_another(frame)
        if not self.locked or not same:
            self._estimate = Estimate()
            offset = due - received_ns
            self._lock(frame, timeline, offset, now_ns)
        self._accept(heard, now_ns)

    def _lock(
        self,
        message: BeatFrame | SyncReply,
        timeline: Timeline,
        offset_ns: int,
        now_ns: int,
        frequency: int = 0,
    ) -> None:
        grid, hold_beats = self.grid, 0.0
        if self.locked:
            # On one incarnation no beat comes twice, however far off the position was.
            same = self.incarnation and message.incarnation == self.incarnation
            hold_beats = math.inf if same else _HELD_BARS * message.beats_per_bar
        self._note_leader(message)
        self.locked = True
        self.drift.clear()
        self._judged_epoch = -1
        grid.rebase(
            timeline,
            offset_ns,
            now_ns,
            beats_per_bar=message.beats_per_bar,
            frequency=frequency,
            hold_beats=hold_beats,
        )
        self._next_index = self._index_at(now_ns)
        self.last_due_ns, self._last_heard_ns = timeline.last_beat(grid.cluster_at(now_ns)), now_ns
        self.counts.locks += 1
        self._observer.on_lock()
        self._observer.on_followed()

    def _index_at(self, now_ns: int) -> int:
        # Of the leader's beat, which lies behind the position while that is held.
        return self.grid.timeline.index_at(self.grid.cluster_at(now_ns))


def _rank(message: BeatFrame | SyncReply) -> tuple[bool, int]:
    return message.alone is not True, message.epoch
