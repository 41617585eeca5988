"""What a session's nursery runs: the beat listener, the claim emitter and the health ticker."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Final, Literal, Protocol, TypeAlias, final

import msgspec
import trio
from trio_util import AsyncBool

from ._clock import BeatClock, Beats, local_ns
from ._errors import TransportBroken
from ._operations import Operations
from ._timeline import MIN_STEP_NS, Ping, Timeline, beat_ns, best_ping
from ._transport import Transport
from ._wire import (
    BeatFrame,
    ClaimArrays,
    StatusClaim,
    SyncReply,
    SyncRequest,
    beat_subject,
    decode_frame,
    decode_sync_reply,
    encode,
    encode_claim,
    format_bpm,
    status_subject,
    sync_subject,
)

TempoDrift: TypeAlias = Literal["unknown", "acceptable", "elevated", "severe"]

_JOINING_PINGS: Final = 16
_STEADY_PINGS: Final = 4
_PING_TIMEOUT: Final = 0.5
# Bursts come once a beat, but neither more nor less often than this, in seconds.
_BURST_MIN: Final = 0.25
_BURST_MAX: Final = 5.0
# Frames by which the tempo is measured, and how few are too few for a verdict.
_MEASURED: Final = 64
_VERDICT: Final = 8
_ACCEPTABLE: Final = 0.001
# How many claims are encoded in one go: about half a millisecond of the loop.
_SLICE: Final = 512
# Transition claims that may wait before those of live operations are left to the next beat's.
_WAITING_CLAIMS: Final = 10_000


class Logger(Protocol):
    """What a session logs to; `logging.Logger` is one."""

    def debug(self, msg: object, /, *args: object) -> Any: ...
    def info(self, msg: object, /, *args: object) -> Any: ...
    def warning(self, msg: object, /, *args: object) -> Any: ...
    def error(self, msg: object, /, *args: object) -> Any: ...


@final
class Counters:
    """What a session counts; made an immutable snapshot by `Session.statistics`."""

    def __init__(self) -> None:
        self.frames = 0
        self.frames_undecodable = 0
        self.frames_foreign = 0
        self.frames_stale_epoch = 0
        self.frames_repeated = 0
        self.frames_unexplained = 0
        self.pings = 0
        self.pings_failed = 0
        self.locks = 0
        self.claims_sent = 0
        self.claims_coalesced = 0
        self.claims_undecodable = 0


@final
class BeatListener:
    """Hears frames, measures the offset to cluster time, and steers the clock by both."""

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
        self.epoch = -1
        self.leader_id = ""
        self._clock = clock
        self._transport = transport
        self._cluster_id = cluster_id
        self._request = encode(SyncRequest(cluster_id, agent_id))
        self._logger = logger
        self._counters = counters
        self._last_index = -1
        self._last_frame_ns = 0
        # A frame that the present grid does not explain, until the leader has been asked about it.
        self._unexplained: tuple[BeatFrame, int] | None = None
        self._ask = AsyncBool(False)
        self._answered = False
        self._arrivals: deque[tuple[int, int]] = deque(maxlen=_MEASURED)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen and steer until cancelled."""
        async with (
            self._transport.open_subscription(beat_subject(self._cluster_id)) as messages,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(self._sync)
            task_status.started()
            async for message in messages:
                try:
                    frame = decode_frame(message.data)
                except msgspec.DecodeError:
                    self._counters.frames_undecodable += 1
                    continue
                self._hear(frame, message.received_ns)

    @property
    def in_holdover(self) -> bool:
        """Whether two frames in a row are missing."""
        if not self.locked.is_set():
            return False
        clock = self._clock
        beat = beat_ns(clock.segment().milli_bpm)
        # As an age and not by index: a frame may be the first of another grid.
        return local_ns() - self._last_frame_ns > 2 * beat + max(MIN_STEP_NS, beat // 4)

    @property
    def measured_bpm(self) -> float | None:
        """The tempo of the frames' arrivals; None before there are two."""
        if len(self._arrivals) < 2:
            return None
        (first_index, first_ns), (last_index, last_ns) = self._arrivals[0], self._arrivals[-1]
        if last_ns <= first_ns:
            return None
        return (last_index - first_index) * 60e9 / (last_ns - first_ns)

    @property
    def tempo_drift(self) -> TempoDrift:
        """How far the measured tempo is from the announced one."""
        measured = self.measured_bpm
        if measured is None or len(self._arrivals) < _VERDICT:
            return "unknown"
        error = abs(measured * 1000 / self._clock.segment().milli_bpm - 1)
        if error <= _ACCEPTABLE:
            return "acceptable"
        return "elevated" if error <= 10 * _ACCEPTABLE else "severe"

    def _hear(self, frame: BeatFrame, received_ns: int) -> None:
        counters = self._counters
        if frame.cluster_id != self._cluster_id:
            counters.frames_foreign += 1
            return
        if frame.epoch < self.epoch and not self.in_holdover:
            counters.frames_stale_epoch += 1
            return
        if frame.epoch == self.epoch and frame.beat_index <= self._last_index:
            counters.frames_repeated += 1
            return
        if not self._explains(frame, received_ns):
            self._unexplained = frame, received_ns
            self._ask.value = True
            return
        self._accept(frame, received_ns)

    def _explains(self, frame: BeatFrame, received_ns: int) -> bool:
        # Whether a frame fits the time base that this clock is on. A new leader goes on in the same
        # one; a new incarnation of the grid begins another. A frame of the present leader may be
        # late, but not early.
        if not self.locked.is_set() or frame.epoch < self.epoch:
            return False
        sent_ns = Timeline.of(frame.segment, frame.next_segment).time_of(frame.beat_index)
        late = self._clock.steering.cluster_at(received_ns) - sent_ns
        most = max(MIN_STEP_NS, beat_ns(frame.segment.milli_bpm) // 4)
        return late >= -most and (late <= most or frame.epoch == self.epoch)

    def _accept(self, frame: BeatFrame, received_ns: int) -> None:
        self._counters.frames += 1
        self._last_frame_ns = received_ns
        self._last_index = frame.beat_index
        self._follow(frame)
        if not self._answered:
            self._clock.steer(self._offset_of(frame, received_ns))
        self._arrivals.append((frame.beat_index, received_ns))

    def _offset_of(self, frame: BeatFrame, received_ns: int) -> int:
        # What a frame alone tells, wrong by its way.
        timeline = Timeline.of(frame.segment, frame.next_segment)
        return timeline.time_of(frame.beat_index) - received_ns

    def _follow(self, told: BeatFrame | SyncReply) -> None:
        timeline = Timeline.of(told.segment, told.next_segment)
        if told.epoch != self.epoch:
            self.epoch, self.leader_id = told.epoch, told.leader_id
        present = self._clock.timeline.segments
        if timeline.segments == present:
            return
        if timeline.segments[0] != present[0]:
            # Another tempo: what was measured of the last one says nothing of it.
            self._arrivals.clear()
        self._clock.adopt(timeline)

    async def _sync(self) -> None:
        while True:
            await self._transport.wait_connected()
            self._ask.value = False
            joining = not self.locked.is_set() or self._unexplained is not None
            replies = await self._burst(_JOINING_PINGS if joining else _STEADY_PINGS)
            self._steer(replies)
            seconds = beat_ns(self._clock.segment().milli_bpm) / 1e9
            with trio.move_on_after(min(max(seconds, _BURST_MIN), _BURST_MAX)):
                await self._ask.wait_value(True)

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

    def _steer(self, replies: list[tuple[Ping, SyncReply]]) -> None:
        unexplained, self._unexplained = self._unexplained, None
        best = best_ping(ping for ping, _ in replies)
        self._answered = best is not None
        if best is None:
            # A leader that beats and answers no pings: its frames tell the time, if less well. One
            # that contradicts what it said before is not believed as long as others are heard.
            if unexplained is not None and (
                not self.locked.is_set() or unexplained[0].epoch > self.epoch or self.in_holdover
            ):
                self._lock(unexplained[0], self._offset_of(*unexplained))
                self._accept(*unexplained)
            return
        reply = next(reply for ping, reply in replies if ping is best)
        if not self.locked.is_set():
            self._lock(reply, best.offset_ns)
        elif reply.epoch < self.epoch:
            if not self.in_holdover:
                self._counters.frames_stale_epoch += 1
                return
            self._lock(reply, best.offset_ns)
        else:
            error = abs(best.offset_ns - self._clock.steering.offset_ns)
            beat = beat_ns(reply.segment.milli_bpm)
            if reply.epoch > self.epoch and error > max(MIN_STEP_NS, beat // 4):
                self._lock(reply, best.offset_ns)
            else:
                self._follow(reply)
                self._clock.steer(best.offset_ns)
        if unexplained is not None:
            # Now that the clock is right it may be plain.
            frame, received_ns = unexplained
            if frame.epoch != self.epoch or not self._explains(frame, received_ns):
                self._counters.frames_unexplained += 1
            elif frame.beat_index > self._last_index:
                self._accept(frame, received_ns)

    def _lock(self, told: BeatFrame | SyncReply, offset_ns: int) -> None:
        self.epoch, self.leader_id = told.epoch, told.leader_id
        self._last_index = -1
        self._last_frame_ns = local_ns()
        self._arrivals.clear()
        self._clock.rebase(
            Timeline.of(told.segment, told.next_segment), offset_ns, told.beats_per_bar
        )
        self._counters.locks += 1
        self._logger.info(
            "locked to the grid - leader=%s epoch=%d beat=%d",
            self.leader_id,
            self.epoch,
            self._clock.index(),
        )
        self.locked.set()


@final
class ClaimEmitter:
    """Sends claims, and blocks nobody with it.

    Transition claims are queued, and sent one by one. A beat's claims are made while they are
    sent, so of a slow transport's only the newest ever exist. Terminal claims are kept until the
    server has confirmed that it took them in, and sent again where a connection was lost first.
    """

    def __init__(
        self,
        clock: BeatClock,
        transport: Transport,
        operations: Operations,
        *,
        agent_id: str,
        counters: Counters,
    ) -> None:
        self._clock = clock
        self._transport = transport
        self._operations = operations
        self._subject = status_subject(agent_id)
        self._counters = counters
        self._queue: deque[tuple[StatusClaim, bool]] = deque()
        # Terminal claims that were sent, each with the connection it was sent over.
        self._unconfirmed: deque[tuple[int, StatusClaim]] = deque()
        self._beat_due = False
        self._work = AsyncBool(False)
        self._sent_terminal = AsyncBool(False)

    @property
    def pending(self) -> int:
        """How many terminal claims the server has not confirmed yet."""
        return len(self._unconfirmed) + sum(terminal for _, terminal in self._queue)

    def emit(self, claim: StatusClaim, *, terminal: bool = False) -> None:
        """Queue a claim."""
        if terminal or (self._transport.connected and len(self._queue) < _WAITING_CLAIMS):
            self._queue.append((claim, terminal))
        else:
            self._counters.claims_coalesced += 1
            self._beat_due = True
        self._work.value = True

    def beat(self) -> None:
        """Have the claims of all live operations sent."""
        self._beat_due = True
        self._work.value = True

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Send until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._confirm_forever)
            task_status.started()
            while True:
                await self._work.wait_value(True)
                await self._transport.wait_connected()
                self._work.value = False
                try:
                    await self._send_queue()
                    if self._beat_due:
                        await self._send_beat()
                except TransportBroken:
                    # What was not sent is still queued; the newest beat claims follow it.
                    self._work.value = self._beat_due = True

    async def drain(self) -> None:
        """Send what is queued, and wait until the server has all terminal claims."""
        while self._queue or self._unconfirmed:
            await self._transport.wait_connected()
            try:
                await self._send_queue()
                await self._confirm()
            except TransportBroken:
                continue

    async def _send_queue(self) -> None:
        transport, queue = self._transport, self._queue
        # What went over a connection that was lost since may be lost with it.
        lost = [claim for number, claim in self._unconfirmed if number != transport.generation]
        if lost:
            kept = [entry for entry in self._unconfirmed if entry[0] == transport.generation]
            self._unconfirmed = deque(kept)
            queue.extendleft((claim, True) for claim in reversed(lost))
        while queue:
            claim, terminal = queue[0]
            await transport.publish(self._subject, encode_claim(claim, transport.max_payload))
            # Nothing was awaited since it was handed over.
            queue.popleft()
            self._counters.claims_sent += 1
            if terminal:
                self._unconfirmed.append((transport.generation, claim))
                self._sent_terminal.value = True

    async def _send_beat(self) -> None:
        transport, operations = self._transport, self._operations
        self._beat_due = False
        live, beat = operations.live(), self._clock.index()
        arrays = ClaimArrays(transport.max_payload)
        for start in range(0, len(live), _SLICE):
            claims = operations.claims(live[start : start + _SLICE], beat)
            if claims:
                for array in arrays.add(claims):
                    await transport.publish(self._subject, array)
                self._counters.claims_sent += len(claims)
            await trio.lowlevel.checkpoint()
        last = arrays.take()
        if last:
            await transport.publish(self._subject, last)

    async def _confirm(self) -> None:
        number, count = self._transport.generation, len(self._unconfirmed)
        await self._transport.flush()
        if number == self._transport.generation:
            for _ in range(count):
                self._unconfirmed.popleft()

    async def _confirm_forever(self) -> None:
        while True:
            await self._sent_terminal.wait_value(True)
            self._sent_terminal.value = False
            try:
                await self._confirm()
            except TransportBroken:
                self._work.value = True


async def tick(
    clock: BeatClock,
    logger: Logger,
    on_beat: Callable[[int, int], None],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Log every beat, and call ``on_beat`` with its index and how many were skipped before it."""
    beats = Beats(clock, bars=False)
    task_status.started()
    async for beat in beats:
        tempo = format_bpm(round(beat.tempo_bpm * 1000))
        logger.debug(
            "🥁 BACKBEAT beat received - beat=%d phase=%s tempo=%s window=%s",
            beat.index,
            beat.phase,
            tempo,
            beat.window_id,
        )
        if beat.downbeat:
            logger.debug(
                "🎼 BACKBEAT downbeat - new bar started - beat=%d window=%s",
                beat.index,
                beat.window_id,
            )
        on_beat(beat.index, beat.skipped)


async def watch_connection(
    transport: Transport,
    logger: Logger,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Log when the connection comes and goes."""
    task_status.started()
    while True:
        await transport.wait_connected()
        logger.info("connected")
        await transport.wait_connected(False)
        # Not the error of the present: by now there may be a connection again.
        errors = transport.statistics().recent_errors
        logger.warning("connection lost: %s", errors[-1][1] if errors else "closed")
