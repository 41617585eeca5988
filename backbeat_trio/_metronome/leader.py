"""One term of leadership: frames, answers to sync and tempo requests, and changes of the tempo.

Only the record tells a leader that it was replaced. It looks at the record after a frame of a
higher epoch, on each new connection, and after it was suspended for long.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final, TypeAlias, final

import msgspec
import trio
from msgspec import UNSET
from msgspec.structs import replace

from .._checks import check_integer
from .._errors import Logger, TempoRefused, TransportBroken
from .._grid.changes import ASKED_NS, LEAD_BEATS, LEAD_NS, propose
from .._grid.estimate import PingRate
from .._grid.namesakes import Namesakes
from .._grid.steering import Steering
from .._grid.timeline import Timeline, beat_ns, milli_bpm
from .._time.local import local_ns, seconds_of
from .._time.timer import Alarm
from .._transport.protocol import Message, Transport
from .._wire import (
    BeatFrame,
    Probe,
    RecallReply,
    Record,
    Segment,
    SyncReply,
    SyncRequest,
    TempoReply,
    beat_phase,
    beat_subject,
    decode_frame,
    decode_probe,
    decode_recall_request,
    decode_sync_request,
    decode_tempo_request,
    encode,
    is_inbox,
    lead_subject,
    recall_subject,
    sync_subject,
    tempo_subject,
    window_id,
)
from .keeper import RecordKeeper
from .ledger import Ledger
from .term import MetronomeCounts, Term, lease_ns, wait_for_record

# How often a change is tried if its commit comes back too late for its beat.
_CHANGE_TRIES: Final = 3
# A standby counts for this long after its last ping; pings are 64 s apart at most. Any process that
# may ping can say that it stands by, so their number is limited.
_STANDBY_NS: Final = 150_000_000_000
_STANDBYS: Final = 256
# The commit of a change is given up this long before the change would take effect.
_MARGIN_NS: Final = 50_000_000
# How long before it takes effect a frame must announce a change, unless beats are so short that
# this is not possible, and by how much less because edges are rounded.
_ANNOUNCED_NS: Final = 200_000_000
_ROUNDING_NS: Final = 1_000_000


_Answering: TypeAlias = Callable[[Message], Awaitable[msgspec.Struct | None]]


@final
class Leader:
    """The leader of a cluster, for one term.

    Args:
      transport: the transport; its `run` is called elsewhere.
      term: the term at its beginning.
      cluster_id: the cluster to lead.
      leader_id: the name of this metronome in frames and answers.
      counts: the counters to increase.
      logger: the logger.
      ledger: the record; None if there is none.
      keep: called with the record whenever the term has changed, to keep it in this process; None
        for no calls.
      find_record: opens the record and returns whether it can be kept. A leader without a record
        calls it on each new connection and every few seconds. None if there never is a record.
      count_standbys: returns the number of standbys; None to count those that say so in pings.

    """

    def __init__(
        self,
        transport: Transport,
        term: Term,
        *,
        cluster_id: str,
        leader_id: str,
        counts: MetronomeCounts,
        logger: Logger,
        ledger: Ledger | None = None,
        keep: Callable[[Record], None] | None = None,
        find_record: Callable[[], Awaitable[bool]] | None = None,
        count_standbys: Callable[[], int] | None = None,
    ) -> None:
        self.timeline: Timeline = term.timeline
        self.epoch: int = term.epoch
        self.sent: int = term.sent
        self.milli_bpm: int = term.milli_bpm
        self.announced_seq: int = term.announced_seq
        self.beats_per_bar: int = term.beats_per_bar
        self.steering: Steering = term.steering
        self._term = term
        self._transport = transport
        self._cluster_id = cluster_id
        self._leader_id = leader_id
        self._counts = counts
        self._logger = logger
        self._keeper: RecordKeeper | None = None
        if ledger is not None:
            self._keeper = RecordKeeper(
                ledger,
                transport,
                make_record=self._record,
                step_down=self._step_down,
                counts=counts,
                logger=logger,
            )
        self._keep_now = keep
        self._find_record = find_record
        self._count_standbys = count_standbys or self._count_heard
        self._standbys: dict[str, int] = {}
        self._is_alone = ledger is None and keep is None
        self._changing = trio.Lock()
        self._ping_rate = PingRate()
        self._namesakes = Namesakes()
        self._last_ns = self.cluster_ns()
        # When another leader was heard last.
        self._others_ns: int | None = None
        self._why = "another metronome leads"
        self._scope = trio.CancelScope()
        self._alarm = Alarm()

    # The grid.

    def cluster_ns(self, local: int | None = None) -> int:
        """Return the cluster time, now or at an instant of local time."""
        return self.steering.cluster_at(local_ns() if local is None else local)

    def current_beat(self) -> int:
        """Return the index of the present beat."""
        return self.timeline.index_at(self.cluster_ns())

    def next_beat_time(self) -> float:
        """Return when the next frame is due, in seconds of Trio's clock."""
        return seconds_of(self.steering.local_at(self.timeline.next_beat(self.cluster_ns())))

    @property
    def has_record(self) -> bool:
        """Whether it keeps a record that other metronomes can read."""
        return self._keeper is not None

    def present_term(self) -> Term:
        """Return the term as it is now."""
        return replace(
            self._term,
            timeline=self.timeline,
            sent=self.sent,
            milli_bpm=self.milli_bpm,
            announced_seq=self.announced_seq,
        )

    def _record(self, proposed: Timeline | None = None) -> Record:
        term = self.present_term()
        if proposed is not None:
            term = replace(term, timeline=proposed)
        return term.record(self._cluster_id, self._leader_id)

    def _changed(self) -> None:
        if self._keep_now is not None:
            self._keep_now(self._record())

    def _write_soon(self) -> None:
        if self._keeper is not None:
            self._keeper.write_soon()

    # Beating.

    async def run(
        self,
        probes: AsyncIterator[Message] | None = None,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Lead until cancelled, or until another metronome leads or a record can be kept.

        Args:
          probes: a subscription to the probes of this epoch; None to subscribe here.
          task_status: reports that the leader has subscribed to all requests.
        """
        self._logger.info(
            "metronome leads - cluster=%s leader=%s epoch=%d tempo=%g",
            self._cluster_id,
            self._leader_id,
            self.epoch,
            self.timeline.segment_at(self.cluster_ns()).milli_bpm / 1000,
        )
        self._changed()
        try:
            with self._scope:
                # The first frame may be overdue, so publish it before anything else is awaited.
                self.strike()
                await self._run(probes, task_status)
        finally:
            if not self._scope.cancelled_caught:
                self._logger.info("metronome stops - epoch=%d beat=%d", self.epoch, self.sent)
        self._counts.deposed += 1
        self._logger.warning("metronome leads no longer - epoch=%d: %s", self.epoch, self._why)

    async def _run(
        self, probes: AsyncIterator[Message] | None, task_status: trio.TaskStatus[None]
    ) -> None:
        cluster_id = self._cluster_id
        services: list[tuple[str, _Answering]] = [
            (sync_subject(cluster_id), self._answer_sync),
            (tempo_subject(cluster_id), self._answer_tempo),
            (beat_subject(cluster_id), self._hear),
            (recall_subject(cluster_id), self._answer_recall),
        ]
        if probes is None:
            services.append((lead_subject(cluster_id, self.epoch), self._answer_probe))
        async with trio.open_nursery() as nursery:
            # Each subscription takes a round trip, and frames must not wait for that.
            nursery.start_soon(self._alarm.run)
            nursery.start_soon(self._beat)
            if probes is not None:
                nursery.start_soon(self._answer, probes, self._answer_probe)
            async with trio.open_nursery() as starting:
                for service in services:
                    starting.start_soon(nursery.start, self._serve, *service)
            if self._keeper is not None:
                nursery.start_soon(self._keeper.run)
                nursery.start_soon(self._look_after_outages)
            elif self._find_record is not None:
                nursery.start_soon(self._look_for_record, self._find_record)
            task_status.started()

    @trio.lowlevel.enable_ki_protection
    async def _serve(
        self, subject: str, answer: _Answering, *, task_status: trio.TaskStatus[None]
    ) -> None:
        async with self._transport.open_subscription(subject) as requests:
            task_status.started()
            await self._answer(requests, answer)

    @trio.lowlevel.enable_ki_protection
    async def _beat(self) -> None:
        while True:
            await self._alarm.sleep_until(self.next_beat_time())
            if not self._may_speak():
                await self._look_before_speaking()
            self.strike()

    async def _look_for_record(self, find_record: Callable[[], Awaitable[bool]]) -> None:
        await wait_for_record(self._transport, find_record, self._logger)
        self._step_down("a record can be kept now")

    def _step_down(self, why: str) -> None:
        self._why = why
        self._scope.cancel(why)

    # Looking at the record before anything is published.

    def _was_suspended(self) -> bool:
        # Whether this process was suspended for so long that a standby may have taken over.
        overdue = local_ns() - self.steering.local_at(self.timeline.next_beat(self._last_ns))
        return overdue > lease_ns(self.timeline.segments[0].milli_bpm) // 2

    def _may_speak(self) -> bool:
        # After an outage or a suspension another metronome may lead, so look at the record first.
        return self._keeper is None or (self._keeper.has_looked and not self._was_suspended())

    async def _look_before_speaking(self) -> None:
        """Look at the record, and wait for it while another leader's frames are heard."""
        assert self._keeper is not None
        await self._keeper.look(self._hears_others)
        self._last_ns = self.cluster_ns()

    def _hears_others(self) -> bool:
        lease = lease_ns(self.timeline.segments[0].milli_bpm)
        return self._others_ns is not None and local_ns() - self._others_ns < lease

    @trio.lowlevel.enable_ki_protection
    async def _look_after_outages(self) -> None:
        while True:
            await self._transport.wait_connected(False)
            await self._transport.wait_connected()
            # Do it now and not when the next frame is due, because no ping is answered before.
            await self._look_before_speaking()

    # Frames.

    def strike(self) -> None:
        """Publish the frame that is due, if there is one."""
        if not self._may_speak():
            return
        now = self.cluster_ns()
        self.timeline = self.timeline.since(now)
        self._last_ns = now
        present, index = self.timeline.segments[0], self.timeline.index_at(now)
        if present.milli_bpm:
            self.milli_bpm = present.milli_bpm
        if index > self.sent or not present.milli_bpm:
            self.sent = max(self.sent, index)
            self._changed()
            self._publish(self.frame(index))
            if index % self.beats_per_bar == 0:
                self._write_soon()

    def frame(self, index: int, timeline: Timeline | None = None) -> BeatFrame:
        """Make the frame of a beat. ``timeline`` replaces the present segments in it."""
        bar, timeline = self.beats_per_bar, timeline or self.timeline
        return BeatFrame(
            cluster_id=self._cluster_id,
            beat_index=index,
            downbeat=index % bar == 0,
            phase=beat_phase(index, bar),
            tempo_bpm=timeline.segments[0].milli_bpm / 1000,
            beats_per_bar=bar,
            window_id=window_id(index, bar),
            epoch=self.epoch,
            leader_id=self._leader_id,
            incarnation=self._term.incarnation or UNSET,
            alone=self._is_alone or UNSET,
            contested=self._namesakes.contested(local_ns(), self._beat_ns) or UNSET,
            **timeline.wire_fields(),
        )

    def _publish(self, frame: BeatFrame) -> None:
        try:
            self._transport.publish_nowait(beat_subject(self._cluster_id), encode(frame))
        except (TransportBroken, ValueError):
            # The leader goes on even if the server does not accept messages of this size.
            self._counts.frames_unsent += 1
        else:
            self._counts.frames += 1
            self._note_announced()

    def _note_announced(self) -> None:
        # Record the announcement soon: the next leader postpones a change that was not announced.
        seq = self.timeline.segments[-1].seq
        if seq > self.announced_seq:
            self.announced_seq = seq
            self._write_soon()

    # Answering.

    @trio.lowlevel.enable_ki_protection
    async def _answer(
        self,
        requests: AsyncIterator[Message],
        answer: _Answering,
    ) -> None:
        async for request in requests:
            try:
                if request.reply and not is_inbox(request.reply):
                    raise msgspec.ValidationError("the reply subject is not an inbox")
                reply = await answer(request)
            except msgspec.DecodeError:
                self._counts.undecodable += 1
                continue
            if reply is not None and request.reply:
                with contextlib.suppress(TransportBroken, ValueError):
                    self._transport.publish_nowait(request.reply, encode(reply))

    def _check_cluster(self, cluster_id: str) -> None:
        if cluster_id != self._cluster_id:
            raise msgspec.ValidationError("the request is for another cluster")

    async def _hear(self, message: Message) -> None:
        frame = decode_frame(message.data)
        self._check_cluster(frame.cluster_id)
        if frame.leader_id == self._leader_id and frame.epoch == self.epoch:
            return
        self._others_ns = local_ns()
        outranked = frame.alone is not True if self._is_alone else frame.epoch > self.epoch
        if frame.epoch > self.epoch or outranked:
            self._counts.frames_foreign += 1
            self._write_soon()
        if self._is_alone and (outranked or frame.epoch > self.epoch):
            # A leader with a record outranks one without. Of two without, the later one leads.
            self._step_down(f"another metronome leads: {frame.leader_id}")

    async def _answer_probe(self, request: Message) -> Probe | None:
        probe = decode_probe(request.data)
        self._check_cluster(probe.cluster_id)
        if probe.epoch > self.epoch:
            self._write_soon()
        if not self._may_speak():
            return None
        return Probe(self._cluster_id, self.epoch, self._leader_id)

    def _note_standby(self, agent_id: str) -> None:
        # Keep the names in the order in which they were last heard.
        self._standbys.pop(agent_id, None)
        if self._count_heard() < _STANDBYS:
            self._standbys[agent_id] = local_ns()

    def _count_heard(self) -> int:
        since = local_ns() - _STANDBY_NS
        while self._standbys:
            first = next(iter(self._standbys))
            if self._standbys[first] >= since:
                break
            del self._standbys[first]
        return len(self._standbys)

    async def _answer_sync(self, request: Message) -> SyncReply | None:
        ping = decode_sync_request(request.data)
        self._check_cluster(ping.cluster_id)
        if ping.role == "standby":
            self._note_standby(ping.agent_id)
        if not self._may_speak():
            return None
        self._counts.syncs += 1
        self._note_announced()
        return SyncReply(
            cluster_id=self._cluster_id,
            epoch=self.epoch,
            leader_id=self._leader_id,
            received_ns=self.cluster_ns(request.received_ns),
            sent_ns=self.cluster_ns(),
            beats_per_bar=self.beats_per_bar,
            incarnation=self._term.incarnation or UNSET,
            alone=self._is_alone or UNSET,
            uncertainty_ns=self._term.uncertainty_ns,
            standbys=self._count_standbys(),
            wait_ns=self._ping_rate.add(local_ns()) or UNSET,
            shared_id=self._is_shared(ping, request) or UNSET,
            **self.timeline.since(self.cluster_ns()).wire_fields(),
        )

    def _is_shared(self, ping: SyncRequest, request: Message) -> bool:
        if ping.process is UNSET:
            return False
        return self._namesakes.hear(ping.agent_id, ping.process, request.received_ns, self._beat_ns)

    @property
    def _beat_ns(self) -> int:
        return beat_ns(self.milli_bpm)

    async def _answer_recall(self, request: Message) -> RecallReply | None:
        recall = decode_recall_request(request.data)
        self._check_cluster(recall.cluster_id)
        if not self._may_speak():
            return None
        self._note_announced()
        return RecallReply(
            cluster_id=self._cluster_id,
            agent_id=self._leader_id,
            role="leader",
            epoch=self.epoch,
            received_ns=self.cluster_ns(request.received_ns),
            sent_ns=self.cluster_ns(),
            uncertainty_ns=self._term.uncertainty_ns,
            last_beat=self.sent,
            beats_per_bar=self.beats_per_bar,
            incarnation=self._term.incarnation or UNSET,
            alone=self._is_alone or UNSET,
            **self.timeline.since(self.cluster_ns()).wire_fields(),
        )

    async def _answer_tempo(self, request: Message) -> TempoReply:
        try:
            wanted = decode_tempo_request(request.data)
        except msgspec.DecodeError as error:
            self._counts.undecodable += 1
            return self._refuse(f"the request cannot be read: {error}")
        self._check_cluster(wanted.cluster_id)
        if local_ns() - request.received_ns > ASKED_NS:
            # The sender has stopped waiting, and believes that the change was not made.
            self._counts.refused += 1
            return self._refuse("the leader came to the request too late")
        try:
            beat = await self.change(
                wanted.tempo_bpm, at_beat=wanted.at_beat, over=wanted.over_beats or 0
            )
        except (TempoRefused, ValueError) as error:
            return self._refuse(str(error))
        return TempoReply(
            self._cluster_id,
            ok=True,
            epoch=self.epoch,
            effective_beat=beat,
            segment=self.timeline.segments[-1],
        )

    def _refuse(self, why: str) -> TempoReply:
        return TempoReply(self._cluster_id, ok=False, error=why, epoch=self.epoch)

    # Changes.

    async def change(self, bpm: float | None, *, at_beat: int | None = None, over: int = 0) -> int:
        """Commit a change of the grid (see `Metronome.change_tempo`)."""
        over = check_integer("over", over, 0)
        if at_beat is not None:
            at_beat = check_integer("at_beat", at_beat, 0)
        async with self._changing:
            try:
                timeline, beat = await self._change(bpm, at_beat, over)
            except (TempoRefused, ValueError):
                self._counts.refused += 1
                raise
        paused = not self.timeline.segments[0].milli_bpm
        replaced = [s for s in self.timeline.segments[1:] if s not in timeline.segments]
        self.timeline = timeline
        self._changed()
        self._counts.tempo_changes += 1
        tempo = timeline.segments[-1].milli_bpm / 1000
        if not tempo:
            self._logger.info("metronome pauses - on beat=%d", beat)
        elif paused:
            self._logger.info("metronome resumes - tempo=%g from beat=%d", tempo, beat)
        else:
            self._logger.info("metronome changes tempo - tempo=%g from beat=%d", tempo, beat)
        for segment in replaced:
            tempo, beat0 = segment.milli_bpm / 1000, segment.beat0
            self._logger.info("pending change replaced - tempo=%g from beat=%d", tempo, beat0)
        if paused:
            # While the grid is paused a frame may be published at any time, so announce it now.
            self.strike()
        return beat

    async def _change(
        self, bpm: float | None, at_beat: int | None, over: int
    ) -> tuple[Timeline, int]:
        milli: int | None
        if bpm is None:
            milli = None
        elif bpm == 0 and not isinstance(bpm, bool):
            milli = 0
        else:
            milli = milli_bpm("bpm", bpm)
        took = 0
        for _ in range(_CHANGE_TRIES):
            now, known = self.cluster_ns(), {*self.timeline.segments}
            timeline = propose(
                self.timeline,
                now,
                milli,
                at_beat,
                over=over,
                former=self.milli_bpm,
                beats_per_bar=self.beats_per_bar,
                epoch=self.epoch,
                spare_ns=took,
            )
            first = next(segment for segment in timeline.segments if segment not in known)
            present = timeline.segments[0]
            # While the grid is paused each frame has the beat of the pause, also after a takeover
            # beyond beats that agents counted without knowing of the pause.
            beat = max(self.sent, present.beat0) if present.milli_bpm else present.beat0
            frame = self.frame(beat, timeline)
            if len(encode(frame)) > self._transport.max_payload:
                raise TempoRefused("frames with this change would be larger than the server takes")
            if self._keeper is None:
                return timeline, first.beat0
            await self._keeper.commit(timeline, (first.t0_ns - now - _MARGIN_NS) / 1e9)
            if self._is_announced_in_time(first):
                return timeline, first.beat0
            # Allow for as much time in the next attempt.
            took = self.cluster_ns() - now
            # Overwrite the change in the record with the present timeline.
            self._write_soon()
            if at_beat is not None:
                break
        raise TempoRefused("the change was committed too late for its beat")

    def _is_announced_in_time(self, change: Segment) -> bool:
        # The commit took time, and a frame must still announce the change before it takes effect.
        now = self.cluster_ns()
        milli = self.timeline.segment_at(now).milli_bpm
        if not milli:
            # The resumption of a paused grid is announced at once.
            return change.t0_ns - now >= LEAD_NS // 2
        index, beat = max(self.sent + 1, self.timeline.index_at(now)), beat_ns(milli)
        # A change is announced by so much at the latest if the commit takes no time.
        usual = max(LEAD_BEATS * beat, LEAD_NS - beat) - _ROUNDING_NS
        ahead = change.t0_ns - self.timeline.time_of(index)
        return index < change.beat0 and ahead >= min(_ANNOUNCED_NS, usual)
