"""Which frames and answers an agent believes, and how they steer its grid.

A frame is believed at once if it comes from the leader that is followed and fits the grid that is
known. Any other frame, for example one of a higher epoch or of a beat that is not due yet, is first
checked by a burst of pings. The answers decide. Answers of a lower epoch do not count while the
leader that is followed is heard. If there are no answers, the frame is believed once the leader
before it is silent.

A process that may publish both frames and answers is believed. The server's permissions decide
which processes may. Whatever looks wrong is counted and reported to the observer.

Pure: local time is passed in, as `now_ns`. Frames and bursts of pings go in. A steered grid comes
out, and when to ping the leader next.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, TypeAlias, final

from msgspec import Struct

from .._wire import BeatFrame, SyncReply
from .estimate import REST_NS, Arrivals, Estimate, Ping, Verdict, best_ping
from .grid import Grid
from .punctuality import Drift, is_late, tolerance_ns
from .steering import MIN_STEP_NS
from .timeline import NEVER, Timeline, beat_ns

JOINING_PINGS: Final = 16
STEADY_PINGS: Final = 4
# A burst of pings is sent once a beat, but neither more nor less often than this. Before the first
# lock it is sent at least once a second.
BURST_MIN_NS: Final = 250_000_000
_BURST_MAX_NS: Final = 5_000_000_000
_JOINING_NS: Final = 1_000_000_000
# Each interval is longer by a random part, up to this one, so that agents that started together do
# not ping together. While the estimate is good the interval doubles after each burst, up to
# `REST_NS` including this part.
_JITTER: Final = 0.25
# An agent that hears of a change from a frame asks the leader about it within this time.
_CHECK_NS: Final = 4_000_000_000
# A clock may have jumped if this many frames in a row were early or late, or if the event loop did
# not handle a frame for this long.
_SURPRISING: Final = 3
_STALLED_NS: Final = 1_000_000_000
# If the error of the last pings may exceed their round trip by more than this, because they were
# long ago, the arrival of frames is a better measure of cluster time.
_PINGS_WORSE_NS: Final = 10_000_000
# A frame is believed without an answer only if a burst that began so much later has none. A leader
# publishes its first frame before its subscriptions have reached the server, which says until then
# that nobody answers. If the way is long, the first ping is not waited for long enough.
_UNANSWERED_NS: Final = 500_000_000
# How many bursts in a row must contradict a change that only frames announced.
_CONTRADICTED: Final = 3
# If another incarnation of the grid is at most this many of its bars behind the position, the
# position is held.
_HELD_BARS: Final = 2

Answer: TypeAlias = tuple[Ping, SyncReply]


class Heard(NamedTuple):
    """A frame, the timeline that it describes, and the local time at which it arrived."""

    frame: BeatFrame
    timeline: Timeline
    received_ns: int


class FollowCounts(Struct):
    """The counters of a follower and of the listener that passes frames to it."""

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
    leader_changes: int = 0


class FollowerObserver:
    """The methods that a follower calls. Each does nothing unless it is overridden."""

    def on_followed(self) -> None:
        """React to a frame that was believed, or to a lock."""

    def on_lock(self) -> None:
        """React to the first lock, or to a lock to another grid. `on_followed` is called next."""

    def on_leader(self) -> None:
        """React to another leader of the same grid."""

    def on_stale(self, epoch: int) -> None:
        """React to a frame of a lower epoch than that of the leader."""

    def on_odd(self, text: str) -> None:
        """React to something that looks wrong; ``text`` describes it for the log."""


@final
class Follower:
    """Follow a leader's frames and answers, and steer a grid by them.

    Args:
      grid: the grid that is steered.
      cluster_id: frames of other clusters are counted and dropped.
      observer: its methods are called on each event.
      chance: draws a number from 0 to 1, by which intervals vary.

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
        """Whether the grid is that of the cluster, and not a local one."""
        self.epoch: int = -1
        self.leader_id: str = ""
        self.incarnation: str = ""
        """The identity of the grid; empty if the leader does not send one."""
        self.is_alone: bool = False
        """Whether the leader has no record."""
        self.last_due_ns: int = 0
        """The instant, in cluster time, at which the last frame that was followed was due."""
        self.last_frame_ns: int | None = None
        """When that frame came, in local time; None before there was one."""
        self.question: Heard | None = None
        """A frame that waits for the answers to a burst of pings before it is believed."""
        self.drift: Drift = Drift()
        self.counts: FollowCounts = FollowCounts()
        self._observer = observer or FollowerObserver()
        self._cluster_id = cluster_id
        self._estimate = Estimate()
        self._arrivals = Arrivals()
        # The epoch of the leader that answered the last pings in the estimate.
        self._measured_epoch = -1
        # The local time at which that frame arrived, or of the lock if that was later.
        self._last_heard_ns = 0
        self._next_index = 0
        self._judged_epoch = -1
        self._behind = 0
        self._answered = False
        # Since when there has been a question.
        self._asking_ns = 0
        self._chance = chance
        # The time of the next burst, and an earlier one that applies if the next frame is missing.
        self._planned_ns, self._missing_ns = 0, NEVER
        # The interval between bursts while all is well; the earliest time at which the leader may
        # be pinged again; and how many frames in a row were early or late.
        self._interval_ns = self._not_before_ns = 0
        self._surprising = 0

    # What is known.

    def due_ns(self) -> int:
        """Return the cluster time at which the next frame is due."""
        return self.grid.timeline.next_beat(self.last_due_ns)

    @property
    def last_heard_ns(self) -> int:
        """When a frame was followed last, or the grid was locked to, in local time."""
        return self._last_heard_ns

    def in_holdover(self, now_ns: int) -> bool:
        """Tell whether the last two frames are missing."""
        if not self.locked:
            return False
        patience = max(MIN_STEP_NS, beat_ns(self.grid.segment_at(now_ns).milli_bpm) // 4)
        # Measured from the arrival of the last frame and not in cluster time, of which the estimate
        # may be far off although every frame arrives.
        silence = self.grid.timeline.next_beat(self.due_ns()) - self.last_due_ns
        return now_ns - self._last_heard_ns > silence + patience

    def measured_bpm(self, now_ns: int) -> float | None:
        """Return the tempo at which frames arrive, in BPM; None before there are two."""
        rate = self.drift.rate
        return None if rate is None else rate * self.grid.segment_at(now_ns).milli_bpm / 1000

    def uncertainty_ns(self, now_ns: int) -> int | None:
        """Return by how much cluster time may be wrong, in ns; None if it was never measured."""
        if not self.locked or not self._estimate.known:
            return None
        return self._estimate.uncertainty_at(now_ns) + abs(self.skew_ns(now_ns))

    def skew_ns(self, now_ns: int) -> int:
        """Return how far cluster time is behind its best estimate, in ns, which is corrected."""
        steering = self.grid.steering
        return now_ns + steering.target_at(now_ns) - steering.cluster_at(now_ns)

    def error_text(self, now_ns: int) -> str | None:
        """Describe by how much the position is off; None while that is within the tolerance."""
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
        """Process a frame, and return whether to ping the leader about it at once.

        Args:
          frame: the frame.
          timeline: the timeline that it describes.
          received_ns: the local time at which it arrived.
          now_ns: now, in local time.

        """
        counts = self.counts
        if frame.cluster_id != self._cluster_id:
            counts.frames_foreign += 1
            return False
        if self._is_outranked(frame) and not self.in_holdover(now_ns):
            counts.frames_stale_epoch += 1
            self._observer.on_odd(
                f"a frame of epoch {frame.epoch} was dropped: epoch {self.epoch} leads"
            )
            self._observer.on_stale(frame.epoch)
            return False
        # While the grid is paused, every frame has the same index.
        first = self._next_index - (not frame.segment.milli_bpm)
        if frame.epoch == self.epoch and frame.beat_index < first:
            counts.frames_repeated += 1
            return False
        heard = Heard(frame, timeline, received_ns)
        if not self._explains(heard):
            if self.question is None:
                self._asking_ns = received_ns
            self.question = heard
            return True
        self._accept(heard, now_ns)
        return False

    def _is_outranked(self, message: BeatFrame | SyncReply) -> bool:
        # A leader with a record outranks one without, whatever their epochs.
        return self.epoch >= 0 and _rank(message) < (not self.is_alone, self.epoch)

    def _explains(self, heard: Heard) -> bool:
        # A frame of the present leader may be late, but not early. It must describe the grid that
        # is known, or one with newer segments.
        frame, timeline, received_ns = heard
        if not self.locked or frame.epoch != self.epoch or self._is_other_grid(frame):
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
            # The present leader is still there, so the frame of another epoch is not its
            # successor's.
            self._drop_question()
        self._follow(frame, timeline, now_ns)
        due, moves = timeline.time_of(frame.beat_index), bool(frame.segment.milli_bpm)
        beat = beat_ns(frame.segment.milli_bpm)
        if moves and self._is_better_than_pings(received_ns):
            # This offset is wrong by the time that the frame took.
            late = self.grid.cluster_at(received_ns) - due
            offset = self._arrivals.add(due - received_ns, late, received_ns, beat)
            if offset is not None:
                self.grid.steer(offset, now_ns)
        late = self.grid.cluster_at(received_ns)
        if not moves:
            # Frames of a paused grid are all alike. So its arrival tells which of them this is.
            due = timeline.last_beat(late + MIN_STEP_NS)
        self.last_due_ns, self._last_heard_ns = due, received_ns
        self.last_frame_ns = received_ns
        # A missing frame may have announced a change that takes effect before the next frame.
        missing = self.grid.steering.local_at(self.due_ns()) + max(beat // 2, MIN_STEP_NS)
        self._missing_ns = missing + round(self._chance() * beat / 2)
        # The arrival of some frames says nothing about drift: of those that waited for this event
        # loop, of those of a paused grid, and of the first one after a takeover.
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
        # A frame may take as long as a ping there and back.
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

    def _drop_question(self) -> None:
        if self.question is None:
            return
        frame, self.question = self.question.frame, None
        self.counts.frames_unexplained += 1
        self._observer.on_odd(
            f"a frame of epoch {frame.epoch} was dropped: "
            f"the leader of epoch {self.epoch} did not confirm it"
        )

    def _follow(self, message: BeatFrame | SyncReply, timeline: Timeline, now_ns: int) -> None:
        present = self.grid.timeline
        newer = timeline.segments[-1].seq >= present.segments[-1].seq
        if message.epoch != self.epoch:
            self._note_leader(message)
            self._observer.on_leader()
            newer = True
        # A reply that was sent before a change may arrive after the frame that announced it.
        if newer and timeline.segments != present.segments:
            if isinstance(message, BeatFrame) and timeline.segments[-1] != present.segments[-1]:
                # A change that only a frame has announced must be confirmed by an answer.
                self._ping_within(_CHECK_NS, now_ns)
            self.grid.adopt(timeline, now_ns)

    def _note_leader(self, message: BeatFrame | SyncReply) -> None:
        if self.epoch >= 0 and (message.epoch, message.leader_id) != (self.epoch, self.leader_id):
            self.counts.leader_changes += 1
        self.epoch, self.leader_id = message.epoch, message.leader_id
        self._interval_ns = 0
        self.is_alone = message.alone is True
        self.incarnation = message.incarnation or ""

    def _is_other_grid(self, message: BeatFrame | SyncReply) -> bool:
        # A process may not know the identity of its grid. So grids differ only if both are named.
        named = message.incarnation or ""
        return bool(self.incarnation and named and named != self.incarnation)

    # Pings.

    @property
    def pings(self) -> int:
        """The largest number of pings in the next burst."""
        return STEADY_PINGS if self.locked else JOINING_PINGS

    def is_enough(self, answers: Sequence[Answer]) -> bool:
        """Tell whether to end a burst after these answers.

        The leader may have asked for a pause. An agent that joins from far away locks after a
        second, with fewer pings than there could be.
        """
        first, last = answers[0][0], answers[-1][0]
        if not self.locked and last.answered_ns - first.sent_ns >= _JOINING_NS:
            return True
        if not answers[-1][1].wait_ns:
            return False
        return self.locked or len(answers) >= STEADY_PINGS

    @property
    def next_burst_ns(self) -> int:
        """The local time, in ns, at which to ping the leader again at the latest."""
        return min(self._planned_ns, max(self._missing_ns, self._not_before_ns))

    def hurry(self, now_ns: int) -> None:
        """Ping the leader within a beat and then once a beat, after something unexpected."""
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
        # Double the interval if the estimate stays good for so long; halve it if it does not even
        # stay good for the present one.
        estimate = self._estimate
        longer = min(2 * interval, round(REST_NS / (1 + _JITTER)))
        for pause in (longer, interval):
            if estimate.is_good_at(now_ns + round((1 + _JITTER) * pause)):
                return pause
        return interval // 2

    def _jittered(self, pause_ns: int) -> int:
        return pause_ns + round(_JITTER * self._chance() * pause_ns)

    def answer(
        self,
        answers: Sequence[Answer],
        asked: Heard | None,
        now_ns: int,
        *,
        begun_ns: int | None = None,
    ) -> bool:
        """Process the answers to a burst, and plan the next one (see `next_burst_ns`).

        Args:
          answers: in the order in which they arrived.
          asked: the `question` at the beginning of the burst. A question that arrived later is not
            decided by these answers, because the leader may have died after the last of them.
          now_ns: now, in local time.
          begun_ns: when the burst began, in local time; None for now.

        Returns:
          False if another burst is needed soon, because the answers contradict the estimate, or
          because a frame still waits for an answer.

        """
        best = best_ping([ping for ping, _ in answers])
        expected = best is None or not self._estimate.known or self._estimate.expects(best)
        well = self._take(answers, asked, now_ns, now_ns if begun_ns is None else begun_ns)
        self._plan(answers, now_ns, well=well, expected=expected)
        return well

    def _take(
        self, answers: Sequence[Answer], asked: Heard | None, now_ns: int, begun_ns: int
    ) -> bool:
        rank = max((_rank(reply) for _, reply in answers), default=(False, -1))
        if any(_rank(reply) != rank for _, reply in answers):
            self._observer.on_odd(f"pings were answered in several epochs; the last is {rank[1]}")
            answers = [(ping, reply) for ping, reply in answers if _rank(reply) == rank]
        burst = [ping for ping, _ in answers]
        best = best_ping(burst)
        self._answered = best is not None
        if best is None:
            return self._decide_unanswered(now_ns, begun_ns)
        # Only the newest answer of a burst is sure to know the newest change.
        reply = answers[-1][1]
        if self.locked and self._is_outranked(reply) and not self.in_holdover(now_ns):
            self.counts.frames_stale_epoch += 1
            self._observer.on_odd(
                f"a ping's answer of epoch {reply.epoch} was dropped: epoch {self.epoch} leads"
            )
            return True
        try:
            timeline = Timeline.of(reply)
        except ValueError:
            self.counts.pings_failed += 1
            return True
        verdict = self._measure(reply, timeline, best, burst, now_ns)
        if asked is not None and asked is self.question:
            # With the corrected clock the frame may fit.
            if not self._explains(asked):
                self._drop_question()
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
        same = timeline.continues(grid.timeline, apart) and not self._is_other_grid(reply)
        if not self.locked or (reply.epoch != self.epoch and not same):
            self._estimate = estimate = Estimate()
            self._measured_epoch = reply.epoch
            verdict = estimate.add(burst)
            self._lock(reply, timeline, estimate.offset_at(now_ns), now_ns, estimate.frequency)
            return verdict
        if reply.epoch != self._measured_epoch and estimate.known:
            # The cluster time of the next leader differs slightly. Its frames may have been
            # believed before this first answer.
            estimate.begin_anew(best)
        self._measured_epoch = reply.epoch
        verdict = estimate.add(burst)
        if verdict is Verdict.OVERRULED:
            # Cluster time has jumped: frames from before and after it are not on one line.
            self.drift.clear()
            self._interval_ns = 0
        if self._is_disproved(timeline, same=same, epoch=reply.epoch):
            self.counts.frames_unexplained += 1
            self._observer.on_odd("the leader does not know the grid that frames describe")
            if same:
                grid.adopt(timeline, now_ns)
                self._next_index = min(self._next_index, self._index_at(now_ns) + 1)
            else:
                if verdict is Verdict.OUTLYING:
                    # The estimate is of the cluster time of the other grid.
                    self._estimate = estimate = Estimate()
                    verdict = estimate.add(burst)
                self._lock(reply, timeline, estimate.offset_at(now_ns), now_ns, estimate.frequency)
                return verdict
        if verdict is Verdict.OUTLYING or not timeline.continues(grid.timeline, apart):
            self.counts.pings_outlying += 1
            self._observer.on_odd("a ping's answer contradicts what is known of cluster time")
            return Verdict.OUTLYING
        self._follow(reply, timeline, now_ns)
        grid.steer(estimate.offset_at(now_ns), now_ns, estimate.frequency)
        return verdict

    def _is_disproved(self, timeline: Timeline, *, same: bool, epoch: int) -> bool:
        # A single answer that was sent before a change may arrive after the frame that announced
        # it. If several answers in a row do not know the change, the frame was not the leader's.
        known = self.grid.timeline.segments[-1].seq
        behind = epoch == self.epoch and (not same or timeline.segments[-1].seq < known)
        self._behind = self._behind + 1 if behind else 0
        if self._behind < _CONTRADICTED:
            return False
        self._behind = 0
        return True

    def _decide_unanswered(self, now_ns: int, begun_ns: int) -> bool:
        # The leader may publish frames and not answer pings. Then the frames measure the time, less
        # exactly. A new leader's frames are believed once the leader before it is silent.
        if self.question is None or (self.locked and not self.in_holdover(now_ns)):
            return True
        if begun_ns - self._asking_ns < _UNANSWERED_NS:
            return False
        heard, self.question = self.question, None
        frame, timeline, received_ns = heard
        due = timeline.time_of(frame.beat_index)
        apart = due - self.grid.cluster_at(received_ns)
        same = timeline.continues(self.grid.timeline, apart) and not self._is_other_grid(frame)
        if not self.locked or not same:
            self._estimate = Estimate()
            offset = due - received_ns
            self._lock(frame, timeline, offset, now_ns)
        self._accept(heard, now_ns)
        return True

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
            # Within one incarnation no beat comes twice, however far off the position was.
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
        # The index of the leader's beat, which is behind the position while that is held.
        return self.grid.timeline.index_at(self.grid.cluster_at(now_ns))


def _rank(message: BeatFrame | SyncReply) -> tuple[bool, int]:
    return message.alone is not True, message.epoch
