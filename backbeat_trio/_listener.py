"""The beat listener: hears frames, measures cluster time by pings, and steers the clock by both.

Whom it believes. A frame of the leader that is followed, and that its grid explains, is taken as it
is. What cannot be known from a frame alone is asked for first: a higher epoch, a beat that should
not have come yet. The answers to pings decide, and those of a lower epoch never count while the
leader that is followed is heard. Where nobody answers, frames are believed once the leader before
them has fallen silent. Whoever may publish both frames and answers is believed: that is for the
server's permissions to decide, and what looks odd is counted and told.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final, TypeAlias, final

import msgspec
import trio
from trio_util import AsyncBool

from ._clock import BeatClock, local_ns
from ._drift import Drift
from ._errors import TransportBroken
from ._services import Counters, Logger
from ._steering import MIN_STEP_NS, Estimate, Ping, Verdict, best_ping
from ._timeline import NEVER, Timeline, beat_ns
from ._transport import Transport
from ._wire import (
    BeatFrame,
    SyncReply,
    SyncRequest,
    beat_subject,
    decode_frame,
    decode_sync_reply,
    encode,
    sync_subject,
)

_JOINING_PINGS: Final = 16
_STEADY_PINGS: Final = 4
_PING_TIMEOUT: Final = 0.5
# Bursts come once a beat, but neither more nor less often than this, in seconds.
_BURST_MIN: Final = 0.25
_BURST_MAX: Final = 5.0
_JOINING: Final = 1.0
_ASK_EVERY: Final = 0.02
# Pings that err by more than their way and this, having been long ago, are worse than the arrival
# of frames, which errs by its own way.
_PINGS_WORSE_NS: Final = 10_000_000
_LOG_EVERY_NS: Final = 100_000_000
# How many bursts in a row must contradict what frames have told.
_CONTRADICTED: Final = 3

# A frame, the timeline that it tells of, and when it came, in local ns.
_Unexplained: TypeAlias = tuple[BeatFrame, Timeline, int]


@final
class BeatListener:
    """Follows a leader, for a clock."""

    def __init__(
        self,
        clock: BeatClock,
        transport: Transport,
        *,
        cluster_id: str,
        agent_id: str,
        logger: Logger,
        counters: Counters,
    ) -> None:
        self.locked = trio.Event()
        self.epoch: int = -1
        self.leader_id: str = ""
        self.drift: Drift = Drift()
        self.heard: trio.lowlevel.ParkingLot = trio.lowlevel.ParkingLot()
        """Where to wait for a frame that is followed, or a lock."""
        self.told_ns: int = 0
        """The instant, in cluster time, at which the last frame that was heard was due."""
        self.recent_errors: deque[tuple[int, str]] = deque(maxlen=8)
        """What looked odd, each with when it did, in local ns."""
        self.on_stale: Callable[[int], None] = lambda epoch: None
        """Called with the epoch of frames that come too late for it."""
        self._clock = clock
        self._transport = transport
        self._cluster_id = cluster_id
        self._request = encode(SyncRequest(cluster_id, agent_id))
        self._logger = logger
        self._counters = counters
        self._estimate = Estimate()
        self._next_index = 0
        self._judged_epoch = -1
        self._behind = 0
        self._logged_ns = -_LOG_EVERY_NS
        # A frame that was not believed yet, until the leader has been asked about it.
        self._unexplained: _Unexplained | None = None
        self._ask = AsyncBool(False)
        self._answered = False

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen and steer until cancelled."""
        async with (
            self._transport.open_subscription(beat_subject(self._cluster_id)) as messages,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(self._sync)
            nursery.start_soon(self._ask_again)
            task_status.started()
            async for message in messages:
                try:
                    frame = decode_frame(message.data)
                    timeline = Timeline.of(frame)
                    if abs(timeline.time_of(frame.beat_index)) > NEVER // 2:
                        raise ValueError("a frame of a beat that does not come")
                except (msgspec.DecodeError, ValueError):
                    self._counters.frames_undecodable += 1
                    continue
                self._hear(frame, timeline, message.received_ns)

    @property
    def in_holdover(self) -> bool:
        """Whether two frames in a row are missing."""
        if not self.locked.is_set():
            return False
        patience = max(MIN_STEP_NS, beat_ns(self._clock.segment().milli_bpm) // 4)
        missing = self._clock.timeline.next_beat(self.due_ns())
        return self._clock.cluster_ns() > missing + patience

    def due_ns(self) -> int:
        """Return the cluster time at which the next frame is due."""
        return self._clock.timeline.next_beat(self.told_ns)

    @property
    def measured_bpm(self) -> float | None:
        """The tempo of the frames' arrivals; None before there are two."""
        rate = self.drift.rate
        return None if rate is None else rate * self._clock.segment().milli_bpm / 1000

    def uncertainty_ns(self) -> int | None:
        """Return what cluster time may be wrong by; None where it was never measured."""
        if not self.locked.is_set() or not self._estimate.known:
            return None
        now, steering = local_ns(), self._clock.steering
        slewing = abs(now + steering.target_at(now) - steering.cluster_at(now))
        return self._estimate.uncertainty_at(now) + slewing

    def _note(self, text: str) -> None:
        # Once, and not every time that it is seen; and not as often as somebody else likes.
        now = local_ns()
        if self.recent_errors and self.recent_errors[-1][1] == text:
            self.recent_errors.pop()
        elif now - self._logged_ns >= _LOG_EVERY_NS:
            self._logged_ns = now
            self._logger.warning("%s", text)
        self.recent_errors.append((now, text))

    def _hear(self, frame: BeatFrame, timeline: Timeline, received_ns: int) -> None:
        counters = self._counters
        if frame.cluster_id != self._cluster_id:
            counters.frames_foreign += 1
            return
        if frame.epoch < self.epoch and not self.in_holdover:
            counters.frames_stale_epoch += 1
            self._note(f"a frame of epoch {frame.epoch} while epoch {self.epoch} leads")
            self.on_stale(frame.epoch)
            return
        # A grid that stands still is told of again and again.
        first = self._next_index - (not frame.segment.milli_bpm)
        if frame.epoch == self.epoch and frame.beat_index < first:
            counters.frames_repeated += 1
            return
        if not self._explains(frame, timeline, received_ns):
            self._unexplained = frame, timeline, received_ns
            self._ask.value = True
            return
        self._accept(frame, timeline, received_ns)

    def _explains(self, frame: BeatFrame, timeline: Timeline, received_ns: int) -> bool:
        # A frame of the present leader may be late, but not early.
        if not self.locked.is_set() or frame.epoch != self.epoch:
            return False
        late = self._clock.steering.cluster_at(received_ns) - timeline.time_of(frame.beat_index)
        return late >= -max(MIN_STEP_NS, beat_ns(frame.segment.milli_bpm) // 4)

    def _accept(self, frame: BeatFrame, timeline: Timeline, received_ns: int) -> None:
        self._counters.frames += 1
        self._next_index = frame.beat_index + 1
        if self._unexplained is not None and self._unexplained[0].epoch != frame.epoch:
            # Who leads goes on leading.
            self._disbelieve(self._unexplained[0])
        self._follow(frame, timeline)
        clock, estimate = self._clock, self._estimate
        if (
            frame.segment.milli_bpm
            and not self._answered
            and (
                not estimate.known
                or estimate.uncertainty_at(received_ns) > estimate.way_ns + _PINGS_WORSE_NS
            )
        ):
            # What a frame alone tells, wrong by its way.
            clock.steer(timeline.time_of(frame.beat_index) - received_ns)
        beat, due = beat_ns(frame.segment.milli_bpm), timeline.time_of(frame.beat_index)
        if not frame.segment.milli_bpm:
            # It says the same at every instant that it comes, give or take its way.
            due = timeline.last_beat(clock.steering.cluster_at(received_ns) + MIN_STEP_NS)
        self.told_ns = due
        # One that had to wait for this loop says nothing of the leader, and neither does one of a
        # grid that stands still.
        waited = clock.punctuality.is_late(local_ns() - received_ns, beat)
        # Nor does the first one of a leader that had to take over: it is late for a reason.
        taken_over = self._judged_epoch not in (-1, frame.epoch)
        self._judged_epoch = frame.epoch
        if frame.segment.milli_bpm and not waited and not taken_over:
            self.drift.add(due, received_ns, clock.steering.cluster_at(received_ns) - due, beat)
        self.heard.unpark_all()

    def _disbelieve(self, frame: BeatFrame) -> None:
        self._unexplained = None
        self._counters.frames_unexplained += 1
        self._note(
            f"a frame of epoch {frame.epoch} and beat {frame.beat_index} that epoch {self.epoch} "
            "does not bear out"
        )

    def _follow(self, told: BeatFrame | SyncReply, timeline: Timeline) -> None:
        present = self._clock.timeline
        newer = timeline.segments[-1].seq >= present.segments[-1].seq
        if told.epoch != self.epoch:
            self.epoch, self.leader_id = told.epoch, told.leader_id
            self._logger.info("another leader - leader=%s epoch=%d", told.leader_id, told.epoch)
            newer = True
        # A reply may have been on its way for longer than the frame that told of a change.
        if newer and timeline.segments != present.segments:
            self._clock.adopt(timeline)

    async def _sync(self) -> None:
        while True:
            await self._transport.wait_connected()
            self._ask.value = False
            begun = trio.current_time()
            locked, asked = self.locked.is_set(), self._unexplained
            replies = await self._burst(_STEADY_PINGS if locked else _JOINING_PINGS)
            seconds = beat_ns(self._clock.segment().milli_bpm) / 1e9
            if not self.locked.is_set():
                seconds = min(seconds, _JOINING)
            if not self._steer(replies, asked):
                seconds = _BURST_MIN
            with trio.move_on_after(min(max(seconds, _BURST_MIN), _BURST_MAX)):
                await self._ask.wait_value(True)
            # However much there is to ask about, there is a limit to asking.
            await trio.sleep_until(begun + _ASK_EVERY)

    async def _ask_again(self) -> None:
        # Whatever has happened meanwhile, it is known a moment after the connection is back.
        while True:
            await self._transport.wait_connected(False)
            await self._transport.wait_connected()
            self._ask.value = True

    async def _burst(self, pings: int) -> list[tuple[Ping, SyncReply]]:
        replies: list[tuple[Ping, SyncReply]] = []
        for _ in range(pings):
            self._counters.pings += 1
            try:
                answer = await self._transport.request(
                    sync_subject(self._cluster_id), self._request, timeout=_PING_TIMEOUT
                )
                reply = decode_sync_reply(answer.data)
            except TransportBroken:
                # Whoever does not answer one ping will hardly answer the next ones of the burst.
                self._counters.pings_failed += 1
                break
            except msgspec.DecodeError:
                self._counters.pings_failed += 1
                continue
            if reply.cluster_id == self._cluster_id:
                ping = Ping(answer.sent_ns, reply.received_ns, reply.sent_ns, answer.received_ns)
                replies.append((ping, reply))
        return replies

    def _steer(self, replies: list[tuple[Ping, SyncReply]], asked: _Unexplained | None) -> bool:
        # Returns whether all is well, so that the next burst has time.
        epoch = max((reply.epoch for _, reply in replies), default=-1)
        if any(reply.epoch != epoch for _, reply in replies):
            self._note(f"pings are answered in several epochs, up to {epoch}")
            replies = [(ping, reply) for ping, reply in replies if reply.epoch == epoch]
        burst = [ping for ping, _ in replies]
        best = best_ping(burst)
        self._answered = best is not None
        if best is None:
            self._decide_unanswered()
            return True
        # The newest one: of a burst, it may be the first that tells of a change.
        reply = replies[-1][1]
        if self.locked.is_set() and reply.epoch < self.epoch and not self.in_holdover:
            self._counters.frames_stale_epoch += 1
            self._note(f"a ping is answered in epoch {reply.epoch} while epoch {self.epoch} leads")
            return True
        try:
            timeline = Timeline.of(reply)
        except ValueError:
            self._counters.pings_failed += 1
            return True
        verdict = self._measure(reply, timeline, best, burst)
        if asked is not None and asked is self._unexplained:
            # Now that the clock is right it may be plain. One that came while the leader was being
            # asked is another question: the leader may have died with its last answer.
            frame, told, received_ns = asked
            if not self._explains(frame, told, received_ns):
                self._disbelieve(frame)
            else:
                self._unexplained = None
                if frame.beat_index >= self._next_index:
                    self._accept(frame, told, received_ns)
        return verdict is not Verdict.OUTLYING

    def _measure(
        self, reply: SyncReply, timeline: Timeline, best: Ping, burst: list[Ping]
    ) -> Verdict:
        clock, estimate = self._clock, self._estimate
        same = timeline.continues(clock.timeline)
        if not self.locked.is_set() or (reply.epoch != self.epoch and not same):
            self._estimate = estimate = Estimate()
            verdict = estimate.add(burst)
            now = local_ns()
            self._lock(reply, timeline, estimate.offset_at(now), estimate.frequency)
            return verdict
        if reply.epoch != self.epoch and estimate.known:
            # The next leader has an idea of its own of the same cluster time.
            estimate.begin_anew(best)
        verdict = estimate.add(burst)
        if verdict is Verdict.OVERRULED:
            # Cluster time has jumped: frames from before and after it make no line.
            self.drift.clear()
        if self._is_mistaken(timeline, same=same, epoch=reply.epoch):
            self._counters.frames_unexplained += 1
            self._note("the leader knows nothing of what frames in its name have told")
            if same:
                clock.adopt(timeline)
            else:
                now = local_ns()
                self._lock(reply, timeline, estimate.offset_at(now), estimate.frequency)
        if verdict is Verdict.OUTLYING or not timeline.continues(clock.timeline):
            self._counters.pings_outlying += 1
            self._note("a ping's answer contradicts what is known of cluster time")
            return Verdict.OUTLYING
        self._follow(reply, timeline)
        now = local_ns()
        clock.steer(estimate.offset_at(now), estimate.frequency)
        return verdict

    def _is_mistaken(self, timeline: Timeline, *, same: bool, epoch: int) -> bool:
        # Once, an answer may have been on its way for longer than the frame that told of a change.
        # Where the leader goes on not to know of it, the frame was not the leader's.
        known = self._clock.timeline.segments[-1].seq
        behind = epoch == self.epoch and (not same or timeline.segments[-1].seq < known)
        self._behind = self._behind + 1 if behind else 0
        if self._behind < _CONTRADICTED:
            return False
        self._behind = 0
        return True

    def _decide_unanswered(self) -> None:
        # A leader that beats and answers no pings: its frames tell the time, if less well. Another
        # one is believed when the one before it is not heard any more.
        if self._unexplained is None or not (not self.locked.is_set() or self.in_holdover):
            return
        (frame, timeline, received_ns), self._unexplained = self._unexplained, None
        if not self.locked.is_set() or not timeline.continues(self._clock.timeline):
            self._estimate = Estimate()
            self._lock(frame, timeline, timeline.time_of(frame.beat_index) - received_ns, 0)
        self._accept(frame, timeline, received_ns)

    def _lock(
        self, told: BeatFrame | SyncReply, timeline: Timeline, offset_ns: int, frequency: int
    ) -> None:
        self.epoch, self.leader_id = told.epoch, told.leader_id
        self.drift.clear()
        self._judged_epoch = -1
        self._clock.rebase(timeline, offset_ns, told.beats_per_bar, frequency)
        self._next_index = self._clock.index()
        self.told_ns = timeline.last_beat(self._clock.cluster_ns())
        self._counters.locks += 1
        self._logger.info(
            "locked to the grid - leader=%s epoch=%d beat=%d",
            self.leader_id,
            self.epoch,
            self._clock.index(),
        )
        self.locked.set()
        self.heard.unpark_all()
