"""The leader's side: the grid, its frames, and the answers to sync and tempo requests.

One metronome leads a cluster. On the in-process bus the next one takes over where the last one
stopped; over NATS it runs alone, and says so.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Final, NamedTuple, final

import msgspec
import trio

from ._clock import local_ns
from ._errors import TempoRefused, TransportBroken
from ._timeline import Timeline, milli_bpm
from ._transport import MemoryBus, Message, Transport
from ._wire import (
    BeatFrame,
    Segment,
    SyncReply,
    SyncRequest,
    TempoReply,
    beat_phase,
    beat_subject,
    decode_sync_reply,
    decode_sync_request,
    decode_tempo_request,
    encode,
    sync_subject,
    tempo_subject,
    window_id,
)

# A change must reach everybody before it takes effect.
_LEAD_BEATS: Final = 2
_LEAD_NS: Final = 250_000_000


class MetronomeStatistics(NamedTuple):
    """Counters of a metronome since it was made."""

    frames: int
    """Frames published."""
    frames_unsent: int
    """Frames that could not be published, because there was no connection."""
    syncs: int
    """Sync requests answered."""
    tempo_changes: int
    refused: int
    """Tempo changes refused."""
    undecodable: int
    """Requests dropped because they could not be decoded, or were for another cluster."""


def propose(
    timeline: Timeline,
    cluster_ns: int,
    milli: int,
    at_beat: int | None,
    *,
    beats_per_bar: int,
    epoch: int,
) -> Timeline:
    """Return the timeline with a change of tempo in it. Pure.

    The change takes effect at ``at_beat``, or else at the next downbeat, and never sooner than
    max(2 beats, 250 ms) from now. It replaces one that is pending, unless that one is sooner than
    this too.

    Raises:
      TempoRefused: where ``at_beat`` is past or too soon.

    """
    after = cluster_ns + _LEAD_NS
    index = timeline.index_at(cluster_ns)
    earliest = max(
        index + _LEAD_BEATS + (timeline.time_of(index) < cluster_ns),
        timeline.index_at(after) + (timeline.time_of(timeline.index_at(after)) < after),
    )
    if at_beat is None:
        at_beat = -(-earliest // beats_per_bar) * beats_per_bar
    elif at_beat <= index:
        raise TempoRefused(f"beat {at_beat} is past: the cluster is on beat {index}")
    elif at_beat < earliest:
        raise TempoRefused(f"beat {at_beat} is too soon: the first that can be kept is {earliest}")
    settled = Timeline(
        (
            timeline.segments[0],
            *(segment for segment in timeline.segments[1:] if segment.beat0 < earliest),
        )
    )
    return settled.change(milli, at_beat, epoch=epoch)


@final
class Metronome:
    """A metronome that leads a cluster while it runs.

    Args:
      transport: run by somebody else.
      cluster_id: the cluster to lead.
      leader_id: the name that goes into the frames.
      tempo_bpm: tempo of a grid that begins here, 0.1 to 6,000 beats per minute.
      beats_per_bar: bar length of such a grid.
      bus: the in-process bus whose grid it takes over and keeps; None where there is none.
      logger: where it says what it does.

    """

    def __init__(
        self,
        transport: Transport,
        *,
        cluster_id: str,
        leader_id: str,
        tempo_bpm: float = 2.0,
        beats_per_bar: int = 8,
        bus: MemoryBus | None = None,
        logger: logging.Logger | None = None,
    ) -> None:
        self._transport = transport
        self._cluster_id = cluster_id
        self._leader_id = leader_id
        self._milli = milli_bpm("tempo_bpm", tempo_bpm)
        self._beats_per_bar = beats_per_bar
        self._bus = bus
        self._logger = logger or logging.getLogger("backbeat_trio")
        self._timeline = Timeline(())
        self._origin_ns = 0
        self._epoch = 0
        self._sent = -1
        self._frames = self._unsent = self._syncs = 0
        self._changes = self._refused = self._undecodable = 0

    @property
    def epoch(self) -> int:
        """The number of this term of leadership; 0 before it began."""
        return self._epoch

    def statistics(self) -> MetronomeStatistics:
        """Return the counters."""
        return MetronomeStatistics(
            frames=self._frames,
            frames_unsent=self._unsent,
            syncs=self._syncs,
            tempo_changes=self._changes,
            refused=self._refused,
            undecodable=self._undecodable,
        )

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Lead until cancelled; on the in-process bus, after waiting for one's turn.

        Reports itself started as soon as it leads, or has to wait.
        """
        if self._bus is None:
            # Alone there is nothing that remembers earlier terms: the milliseconds of the wall
            # clock make a later one greater, and are used for nothing else.
            epoch = time.time_ns() // 1_000_000
            self._begin(Timeline(()), epoch=epoch, sent=-1, origin_ns=local_ns())
            await self._lead(task_status)
            return
        bus = self._bus
        try:
            bus.leadership.acquire_nowait()
        except trio.WouldBlock:
            task_status.started()
            task_status = trio.TASK_STATUS_IGNORED
            await bus.leadership.acquire()
        try:
            origin_ns = local_ns() if bus.grid is None else bus.origin_ns
            self._begin(
                bus.grid or Timeline(()),
                epoch=bus.epoch + 1,
                sent=bus.high_water,
                origin_ns=origin_ns,
                beats_per_bar=bus.beats_per_bar,
            )
            await self._lead(task_status)
        finally:
            bus.leadership.release()

    def _begin(
        self, timeline: Timeline, *, epoch: int, sent: int, origin_ns: int, beats_per_bar: int = 0
    ) -> None:
        self._epoch, self._sent, self._origin_ns = epoch, sent, origin_ns
        self._beats_per_bar = beats_per_bar or self._beats_per_bar
        if timeline.segments:
            self._timeline = timeline
        else:
            self._timeline = Timeline.of(Segment(epoch, 0, 0, 0, self._milli))
        self._keep()

    def _keep(self) -> None:
        if self._bus is not None:
            bus = self._bus
            bus.grid, bus.epoch, bus.high_water = self._timeline, self._epoch, self._sent
            bus.origin_ns, bus.beats_per_bar = self._origin_ns, self._beats_per_bar

    def _cluster_ns(self, local: int | None = None) -> int:
        return (local_ns() if local is None else local) - self._origin_ns

    async def _lead(self, task_status: trio.TaskStatus[None]) -> None:
        async with (
            self._transport.open_subscription(sync_subject(self._cluster_id)) as syncs,
            self._transport.open_subscription(tempo_subject(self._cluster_id)) as tempos,
            trio.open_nursery() as nursery,
        ):
            self._logger.info(
                "metronome leads - cluster=%s leader=%s epoch=%d",
                self._cluster_id,
                self._leader_id,
                self._epoch,
            )
            nursery.start_soon(self._answer, syncs, self._answer_sync)
            nursery.start_soon(self._answer, tempos, self._answer_tempo)
            nursery.start_soon(self._beat)
            task_status.started()

    async def _beat(self) -> None:
        while True:
            now = self._cluster_ns()
            index = self._timeline.index_at(now)
            self._timeline = self._timeline.since(now)
            if index > self._sent:
                self._sent = index
                self._keep()
                self._publish(self.frame(index))
            await trio.sleep_until(self.next_beat_time())

    def frame(self, index: int) -> BeatFrame:
        """Make the frame of a beat of the present segments."""
        segment, *later = self._timeline.segments
        bar = self._beats_per_bar
        return BeatFrame(
            cluster_id=self._cluster_id,
            beat_index=index,
            downbeat=index % bar == 0,
            phase=beat_phase(index, bar),
            tempo_bpm=segment.milli_bpm / 1000,
            beats_per_bar=bar,
            window_id=window_id(index, bar),
            epoch=self._epoch,
            leader_id=self._leader_id,
            segment=segment,
            next_segment=later[0] if later else None,
        )

    def _publish(self, frame: BeatFrame) -> None:
        try:
            self._transport.publish_nowait(beat_subject(self._cluster_id), encode(frame))
        except TransportBroken:
            self._unsent += 1
        else:
            self._frames += 1

    async def _answer(
        self, requests: AsyncIterator[Message], answer: Callable[[Message], msgspec.Struct]
    ) -> None:
        async for request in requests:
            try:
                reply = answer(request)
            except msgspec.DecodeError:
                self._undecodable += 1
                continue
            if request.reply:
                with contextlib.suppress(TransportBroken, ValueError):
                    self._transport.publish_nowait(request.reply, encode(reply))

    def current_beat(self) -> int:
        """Return the index of the present beat."""
        return self._timeline.index_at(self._cluster_ns())

    def next_beat_time(self) -> float:
        """Return when the next beat begins, in seconds of Trio's clock."""
        edge_ns = self._timeline.time_of(self.current_beat() + 1)
        return (edge_ns + self._origin_ns) / 1e9

    def change_tempo(self, bpm: float, *, at_beat: int | None = None) -> int:
        """Commit a change of tempo; it rides in every frame until it takes effect.

        Args:
          bpm: beats per minute, 0.1 to 6,000.
          at_beat: the beat at which to change; None is the next downbeat that is at least
            max(2 beats, 250 ms) ahead.

        Returns:
          The index of the beat at which it takes effect.

        Raises:
          TempoRefused: where ``at_beat`` is past or too soon.
          ValueError: where ``bpm`` is out of range or NaN.
        """
        try:
            milli = milli_bpm("tempo_bpm", bpm)
            timeline = propose(
                self._timeline,
                self._cluster_ns(),
                milli,
                at_beat,
                beats_per_bar=self._beats_per_bar,
                epoch=self._epoch,
            )
        except (TempoRefused, ValueError):
            self._refused += 1
            raise
        self._timeline = timeline
        self._keep()
        self._changes += 1
        beat = timeline.segments[-1].beat0
        self._logger.info("metronome changes tempo - tempo=%g from beat=%d", milli / 1000, beat)
        return beat

    def _own(self, cluster_id: str) -> None:
        if cluster_id != self._cluster_id:
            raise msgspec.ValidationError("a request for another cluster")

    def _answer_sync(self, request: Message) -> SyncReply:
        self._own(decode_sync_request(request.data).cluster_id)
        self._syncs += 1
        self._timeline = self._timeline.since(self._cluster_ns())
        segment, *later = self._timeline.segments
        return SyncReply(
            cluster_id=self._cluster_id,
            epoch=self._epoch,
            leader_id=self._leader_id,
            received_ns=self._cluster_ns(request.received_ns),
            sent_ns=self._cluster_ns(),
            beats_per_bar=self._beats_per_bar,
            segment=segment,
            next_segment=later[0] if later else None,
        )

    def _answer_tempo(self, request: Message) -> TempoReply:
        wanted = decode_tempo_request(request.data)
        self._own(wanted.cluster_id)
        try:
            beat = self.change_tempo(wanted.tempo_bpm, at_beat=wanted.at_beat)
        except (TempoRefused, ValueError) as error:
            return TempoReply(self._cluster_id, ok=False, error=str(error), epoch=self._epoch)
        return TempoReply(
            self._cluster_id,
            ok=True,
            epoch=self._epoch,
            effective_beat=beat,
            segment=self._timeline.segments[-1],
        )


async def find_leader(transport: Transport, cluster_id: str, agent_id: str) -> SyncReply | None:
    """Ask who leads the cluster; None where nobody answers. A checkpoint."""
    request = encode(SyncRequest(cluster_id, agent_id))
    try:
        reply = await transport.request(sync_subject(cluster_id), request, timeout=1.0)
        return decode_sync_reply(reply.data)
    except (TransportBroken, msgspec.DecodeError):
        return None
