"""One term of leadership: frames, answers to sync and tempo requests, and the record.

Frames never wait for the record. If it cannot be written, the leader goes on beating and refuses
changes of the tempo. Only the record tells a leader that it was replaced. It looks at the record
after a frame of a higher epoch, and after it was suspended for long.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final, TypeAlias, final

import msgspec
import trio
from msgspec import UNSET
from msgspec.structs import replace
from trio_util import AsyncBool

from .._checks import check_integer
from .._errors import Logger, MetronomeUnavailable, TempoRefused, TransportBroken
from .._grid.changes import ASKED_NS, LEAD_BEATS, LEAD_NS, propose
from .._grid.estimate import PingRate
from .._grid.namesakes import Namesakes
from .._grid.steering import Steering
from .._grid.timeline import Timeline, beat_ns, milli_bpm
from .._time.local import local_ns, seconds_of
from .._time.timer import Alarm
from .._transport.protocol import Message, Transport
from .._transport.store import Conflict
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
from .ledger import Ledger
from .term import MetronomeCounts, Term, lease_ns, wait_for_record

# The time limit for writing the record, and the wait before another attempt, in seconds.
_COMMIT_PATIENCE: Final = 2.0
_RETRY: Final = 1.0
# The least time between two writes of the record, in seconds.
_PAUSE: Final = 0.02
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
        self._ledger = ledger
        self._keep_now = keep
        self._find_record = find_record
        self._count_standbys = count_standbys or self._count_heard
        self._standbys: dict[str, int] = {}
        self._is_alone = ledger is None and keep is None
        self._committing = trio.Lock()
        self._changing = trio.Lock()
        self._look = AsyncBool(False)
        # The reasons of all failures since the last successful write; each is logged once.
        self._uncommitted: set[str] = set()
        self._ping_rate = PingRate()
        self._namesakes = Namesakes()
        self._last_ns = self.cluster_ns()
        # The connections on which the record was read, and on which it was also found that this
        # metronome still leads; and when another leader was last heard.
        self._read = self._looked = transport.generation
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
        return self._ledger is not None

    def present_term(self) -> Term:
        """Return the term as it is now."""
        return replace(
            self._term,
            timeline=self.timeline,
            sent=self.sent,
            milli_bpm=self.milli_bpm,
            announced_seq=self.announced_seq,
        )

    def _changed(self) -> None:
        if self._keep_now is not None:
            self._keep_now(self.present_term().record(self._cluster_id, self._leader_id))

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
            if self._ledger is not None:
                nursery.start_soon(self._keep_record)
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

    # Looking at the record before anything is published.

    def _was_suspended(self) -> bool:
        # Whether this process was suspended for so long that a standby may have taken over.
        overdue = local_ns() - self.steering.local_at(self.timeline.next_beat(self._last_ns))
        return overdue > lease_ns(self.timeline.segments[0].milli_bpm) // 2

    def _may_speak(self) -> bool:
        # After an outage or a suspension another metronome may lead, so look at the record first.
        if self._ledger is None:
            return True
        return self._looked == self._transport.generation and not self._was_suspended()

    async def _look_before_speaking(self) -> None:
        """Write the record, and wait for that while another leader's frames are heard."""
        while True:
            generation = self._transport.generation
            try:
                with trio.fail_after(_COMMIT_PATIENCE):
                    await self._save()
            except (TransportBroken, trio.TooSlowError) as error:
                self._cannot_commit(error)
                if not self._hears_others():
                    break
                await trio.sleep(_PAUSE)
            else:
                break
        self._looked, self._last_ns = generation, self.cluster_ns()

    def _hears_others(self) -> bool:
        lease = lease_ns(self.timeline.segments[0].milli_bpm)
        return self._others_ns is not None and local_ns() - self._others_ns < lease

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
                self._look.value = True

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
            self._look.value = True

    # The record.

    @trio.lowlevel.enable_ki_protection
    async def _keep_record(self) -> None:
        # Write the record once a bar, and whenever another metronome might lead.
        while True:
            await self._look.wait_value(True)
            self._look.value = False
            try:
                with trio.fail_after(_COMMIT_PATIENCE):
                    await self._save()
            except (TransportBroken, trio.TooSlowError) as error:
                self._cannot_commit(error)
                await trio.sleep(_RETRY)
                self._look.value = True
            else:
                await trio.sleep(_PAUSE)

    @trio.lowlevel.enable_ki_protection
    async def _look_after_outages(self) -> None:
        while True:
            await self._transport.wait_connected(False)
            await self._transport.wait_connected()
            # Do it now and not when the next frame is due, because no ping is answered before.
            await self._look_before_speaking()

    async def _look_for_record(self, find_record: Callable[[], Awaitable[bool]]) -> None:
        await wait_for_record(self._transport, find_record, self._logger)
        self._step_down("a record can be kept now")

    def _step_down(self, why: str) -> None:
        self._why = why
        self._scope.cancel(why)

    def _cannot_commit(self, error: Exception) -> str:
        """Count a failed write of the record, log a new reason, and return the reason."""
        self._counts.commits_failed += 1
        why = "no answer in time" if isinstance(error, trio.TooSlowError) else str(error)
        if why not in self._uncommitted:
            self._logger.warning("beating on without the record, tempo changes refused: %s", why)
            self._uncommitted.add(why)
        return why

    async def _save(self, proposed: Timeline | None = None) -> None:
        ledger = self._ledger
        assert ledger is not None
        async with self._committing:
            # Take the term only now: the task that held the lock may have committed a change.
            present = replace(self.present_term(), timeline=proposed or self.timeline)
            record = present.record(self._cluster_id, self._leader_id)
            while True:
                if self._scope.cancel_called:
                    await trio.lowlevel.checkpoint_if_cancelled()
                    # The caller is outside the scope that was cancelled.
                    raise MetronomeUnavailable("another metronome leads")
                try:
                    await self._read_anew(ledger)
                    await ledger.write(record)
                except Conflict:
                    if self._is_deposed(ledger.record):
                        self._step_down("another metronome leads")
                else:
                    break
        self._counts.commits += 1
        if self._uncommitted:
            self._uncommitted.clear()
            self._logger.info("the record can be written again")

    async def _read_anew(self, ledger: Ledger) -> None:
        # The server may have come back with another store, in which the numbers of revisions mean
        # other records.
        generation = self._transport.generation
        if self._read != generation:
            await ledger.read()
            self._read = generation
            if self._is_deposed(ledger.record):
                raise Conflict("another metronome leads")

    def _is_deposed(self, other: Record | None) -> bool:
        # Any other record is overwritten: one of this term, whose write seemed to fail; one that is
        # unreadable or missing; and one of a lower epoch.
        if other is None:
            return False
        if other.epoch == self.epoch:
            return other.nonce != self._term.nonce
        return other.epoch > self.epoch

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
            self._look.value = True
        if self._is_alone and (outranked or frame.epoch > self.epoch):
            # A leader with a record outranks one without. Of two without, the later one leads.
            self._step_down(f"another metronome leads: {frame.leader_id}")

    async def _answer_probe(self, request: Message) -> Probe | None:
        probe = decode_probe(request.data)
        self._check_cluster(probe.cluster_id)
        if probe.epoch > self.epoch:
            self._look.value = True
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

    async def change(self, bpm: float | None, *, at_beat: int | None = None, over: int = 0) -> int:
        """Commit a change of the grid (see `Metronome.change_tempo`)."""
        over = check_integer("over", over, 0)
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
        milli = bpm if not bpm else milli_bpm("tempo_bpm", bpm)
        took = 0
        for _ in range(_CHANGE_TRIES):
            now, known = self.cluster_ns(), {*self.timeline.segments}
            timeline = propose(
                self.timeline,
                now,
                None if milli is None else int(milli),
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
            if self._ledger is None:
                return timeline, first.beat0
            await self._commit(timeline, (first.t0_ns - now - _MARGIN_NS) / 1e9)
            if self._is_announced_in_time(first):
                return timeline, first.beat0
            # Allow for as much time in the next attempt.
            took = self.cluster_ns() - now
            # Overwrite the change in the record with the present timeline.
            self._look.value = True
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

    async def _commit(self, timeline: Timeline, seconds: float) -> None:
        try:
            with trio.fail_after(min(_COMMIT_PATIENCE, max(0.0, seconds))):
                await self._save(timeline)
        except (TransportBroken, trio.TooSlowError) as error:
            why = self._cannot_commit(error)
            # The change may have been written after all. Overwrite it with the present timeline.
            self._look.value = True
            raise TempoRefused(f"the change could not be committed: {why}") from None
