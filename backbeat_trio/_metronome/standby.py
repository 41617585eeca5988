"""Standing by, joining and coming back: following the grid, and taking over when nobody leads.

A frame that is late, where this process itself is punctual, makes a standby ask. Where nobody is
subscribed to the leader's probes any more its process is gone, and the standby takes over at once.
Where there is no answer it may be paused or cut off, and keeps its lease. What decides among
several standbys is the record: only one of them writes over the revision that all have seen.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Final, final

import msgspec
import trio
from msgspec.structs import replace

from .._errors import Logger, NoResponders, TransportBroken
from .._grid.changes import reschedule
from .._grid.estimate import Ping
from .._grid.presence import JITTERS, LATE_NS, PROBE_EVERY_NS, Action, Decision, Presence
from .._grid.recall import Agreement, Memory, agree
from .._grid.steering import Steering
from .._grid.timeline import NEVER, Timeline
from .._time.clock import BeatClock
from .._time.local import local_ns, seconds_of
from .._time.timer import Alarm
from .._transport.protocol import Message, Reply, Transport
from .._transport.store import Conflict
from .._wire import (
    MAX_INDEX,
    MAX_NS,
    Probe,
    RecallRequest,
    Record,
    Role,
    Segment,
    decode_probe,
    decode_recall_reply,
    encode,
    lead_subject,
    recall_subject,
)
from .ledger import Ledger
from .listener import BeatListener, ListenerObserver
from .term import MetronomeCounts, Term, lease_ns

# What somebody else who has just taken over is given to be heard, and how soon the store is asked
# again that did not answer.
_GRACE: Final = 0.05
_RETRY: Final = 0.2
# How long a probe is waited for, at least and at most, beside what the way takes; a recall that
# nobody has answered yet, and one that somebody has.
_PROBE_MIN: Final = 0.005
_PROBE_MAX: Final = 0.1
_RECALL_WAIT: Final = 1.0
_RECALL_MORE: Final = 0.1
_WAYS: Final = 3
# For how long an answer to a recall counts.
_MEMORY_NS: Final = 10_000_000_000
# What the wall clocks of two machines may differ by.
_WALL_NS: Final = 2_000_000_000


@final
class Standby(ListenerObserver):
    """A metronome that does not lead: what `Presence` decides, carried out.

    Args:
      transport: run by somebody else.
      ledger: the record that metronomes share; None where there is none.
      cluster_id: the cluster.
      leader_id: the name of this metronome.
      milli_bpm: the tempo of a grid that begins here, in thousandths of a beat a minute.
      beats_per_bar: the bar length of such a grid.
      counts: counted up.
      logger: where it says what it does.
      seen: the highest epoch that was heard of in an earlier life; -1 for none.
      former: the term that ended for this standby to begin; it may be all that is left of the grid.

    """

    def __init__(
        self,
        transport: Transport,
        ledger: Ledger | None,
        *,
        cluster_id: str,
        leader_id: str,
        milli_bpm: int,
        beats_per_bar: int,
        counts: MetronomeCounts,
        logger: Logger,
        seen: int,
        former: Term | None = None,
    ) -> None:
        self._clock = BeatClock.local(milli_bpm, beats_per_bar)
        self._listener = BeatListener(
            self._clock,
            transport,
            cluster_id=cluster_id,
            agent_id=leader_id,
            logger=logger,
            role="standby",
            observer=self,
        )
        self._follower = self._listener.follower
        self._transport = transport
        self._ledger = ledger
        self._cluster_id = cluster_id
        self._leader_id = leader_id
        self._counts = counts
        self._logger = logger
        self._seen = seen
        self._former = former
        self._presence = Presence(
            local_ns(),
            connected=transport.connected,
            remembers=former is not None,
            has_record=ledger is not None,
        )
        # Where to wait for whatever may change a decision.
        self._news = trio.lowlevel.ParkingLot()
        self._alarm = Alarm()
        self._stands_by = False
        self._troubled = False
        # The beat that a leader which lives owes a frame of, and when the next one is late.
        self._excused_ns = self._due_ns = self._late_ns = 0
        # The epoch that was asked for last, and what a probe and an answer take.
        self._probed = -1
        self._patience = _PROBE_MIN
        self._way_ns = 0
        self._memories: dict[str, Memory] = {}
        self._recalling = trio.CancelScope()

    async def follow(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Follow the grid as an agent does, until cancelled. To be run beside `wait_for_turn`."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._clock.run)
            await nursery.start(self._listener.run)
            nursery.start_soon(self._alarm.run)
            nursery.start_soon(self._watch_connection)
            task_status.started()

    async def _watch_connection(self) -> None:
        while True:
            await self._transport.wait_connected()
            self._presence.connection(local_ns(), connected=True)
            self._news.unpark_all()
            await self._transport.wait_connected(False)
            self._presence.connection(local_ns(), connected=False)
            self._news.unpark_all()

    # What the listener calls.

    def on_stale(self, epoch: int) -> None:
        """Tell a leader that was replaced without knowing, as it stood still or was cut off."""
        with contextlib.suppress(TransportBroken):
            self._transport.publish_nowait(
                lead_subject(self._cluster_id, epoch), self._make_probe(self._follower.epoch)
            )

    def on_sign(self, *, alone: bool) -> None:
        """Take note that somebody leads; one without a record is outranked by one who has it."""
        if not self._follower.locked and not (alone and self._ledger is not None):
            self._presence.led(local_ns())
            self._recalling.cancel("somebody leads")
        self._news.unpark_all()

    def on_recall(self) -> None:
        """Look after the leader at once, as somebody does not find it."""
        self._presence.asked()
        self._news.unpark_all()

    # Watching.

    async def wait_for_turn(
        self, stack: AsyncExitStack, fresh: Term
    ) -> tuple[Term, AsyncIterator[Message]]:
        """Stand by until the record says that this metronome leads.

        Args:
          stack: gets the subscription to the probes of the term.
          fresh: the term with which a grid begins, where there never was one.

        Returns:
          The term, and its probes.
        """
        while True:
            self._look_around()
            decision = self._presence.decide(local_ns())
            try:
                if decision.action is Action.WAIT:
                    await self._wait(decision.until_ns)
                elif decision.action is Action.PROBE:
                    await self._probe()
                elif decision.action is Action.RECALL:
                    await self._recall()
                else:
                    won = await self._ask_for_lead(decision, stack, fresh)
                    if won is not None:
                        return won
                    await trio.sleep(_GRACE)
            except TransportBroken as error:
                if not self._troubled:
                    self._logger.warning("standing by without the record: %s", error)
                self._troubled = True
                await trio.sleep(_RETRY)
            else:
                self._troubled = False

    def _look_around(self) -> None:
        follower, grid, presence = self._follower, self._clock.grid, self._presence
        presence.measured(max(self._way_ns, self._listener.way_ns))
        record = None if self._ledger is None else self._ledger.record
        milli = self._clock.segment().milli_bpm if record is None else record.milli_bpm
        held = record is not None and record.epoch > self._seen
        if not follower.locked:
            presence.holds(lease_ns(milli), held=held)
            return
        if not self._stands_by:
            self._stands_by = True
            self._logger.info("stands by - leader=%s epoch=%d", follower.leader_id, follower.epoch)
        lease = lease_ns(self._clock.segment().milli_bpm)
        presence.holds(lease, held=held)
        self._due_ns = grid.timeline.next_beat(max(follower.last_due_ns, self._excused_ns))
        patience = max(LATE_NS, round(JITTERS * follower.drift.jitter_ns))
        self._late_ns = grid.steering.local_at(self._due_ns) + patience
        presence.follows(follower.last_due_ns, self._late_ns, lease, alone=follower.is_alone)

    async def _wait(self, until_ns: int) -> None:
        deadline = math.inf if until_ns == NEVER else seconds_of(until_ns)
        self._alarm.wake_at(deadline)
        with trio.move_on_at(deadline) as scope:
            await self._news.park()
        if scope.cancelled_caught:
            self._patience = _PROBE_MIN
            lost = local_ns() - until_ns
            if lost > LATE_NS:
                # It was here that time was lost.
                self._presence.lost_time(local_ns(), lost)

    @property
    def _followed_epoch(self) -> int:
        # One without a record counts its epochs by itself: they say nothing to who has one.
        outranked = self._follower.is_alone and self._ledger is not None
        return -1 if outranked else self._follower.epoch

    def _make_probe(self, epoch: int) -> bytes:
        return encode(Probe(self._cluster_id, epoch, self._leader_id))

    async def _probe(self) -> None:
        """Ask whoever leads, or did last as far as is known, whether it lives."""
        record = None if self._ledger is None else self._ledger.record
        epoch = max(self._followed_epoch, self._epoch_of(record))
        begun = trio.current_time()
        self._probed = epoch
        self._counts.probes += 1
        try:
            answer = await self._transport.request(
                lead_subject(self._cluster_id, epoch),
                self._make_probe(epoch),
                timeout=max(self._patience, _WAYS * self._way_ns / 1e9),
            )
            # What answers otherwise, such as a stream of these subjects, is no leader.
            decode_probe(answer.data)
        except NoResponders:
            self._presence.refused()
            return
        except (TransportBroken, msgspec.DecodeError):
            self._check_connected()
            # Where the way is long an answer is, too, and so is the news that nobody is there.
            self._patience = min(2 * self._patience, _PROBE_MAX)
        else:
            self._note_way(answer)
            self._presence.led(local_ns())
            if local_ns() >= self._late_ns:
                self._excused_ns = self._due_ns
        await self._alarm.sleep_until(begun + PROBE_EVERY_NS / 1e9)

    def _note_way(self, answer: Reply) -> None:
        self._way_ns = max(0, answer.received_ns - answer.sent_ns)

    async def _recall(self) -> None:
        """Ask everybody who remembers the grid, and hear the answers for a while."""
        if self._ledger is not None:
            # It proves that the connection works, too.
            await self._ledger.read()
        # What was answered long ago may be of another grid.
        since = local_ns() - _MEMORY_NS
        self._memories = {
            name: memory
            for name, memory in self._memories.items()
            if memory.ping.answered_ns >= since
        }
        request = encode(RecallRequest(self._cluster_id, self._leader_id))
        way = _WAYS * self._way_ns / 1e9
        self._recalling = trio.move_on_after(max(_RECALL_WAIT, way))
        async with self._transport.open_request(
            recall_subject(self._cluster_id), request
        ) as replies:
            with self._recalling as scope, contextlib.suppress(NoResponders):
                async for answer in replies:
                    self._hear_memory(answer)
                    # Where one has answered the others are not far.
                    soon = trio.current_time() + max(_RECALL_MORE, _WAYS * self._way_ns / 1e9)
                    scope.deadline = min(scope.deadline, soon)

    def _hear_memory(self, answer: Reply) -> None:
        try:
            reply = decode_recall_reply(answer.data)
            timeline = Timeline.of(reply)
        except (msgspec.DecodeError, ValueError):
            return
        if reply.cluster_id != self._cluster_id:
            return
        self._note_way(answer)
        ping = Ping(answer.sent_ns, reply.received_ns, reply.sent_ns, answer.received_ns)
        self._memories[reply.agent_id] = Memory(ping, reply, timeline)
        # One that leads without a record remembers, to one who has a record.
        role: Role = reply.role
        if role != "agent" and reply.alone is True and self._ledger is not None:
            role = "agent"
        self._presence.answered(role, local_ns())

    def _check_connected(self) -> None:
        if not self._transport.connected:
            raise TransportBroken("the connection is gone")

    @staticmethod
    def _epoch_of(record: Record | None) -> int:
        return -1 if record is None else record.epoch

    # Taking over.

    async def _ask_for_lead(
        self, decision: Decision, stack: AsyncExitStack, fresh: Term
    ) -> tuple[Term, AsyncIterator[Message]] | None:
        ledger, presence = self._ledger, self._presence
        record = None if ledger is None else await ledger.read()
        self._seen = max(self._seen, self._probed, self._followed_epoch)
        if self._epoch_of(record) > self._seen:
            # Somebody else has, meanwhile.
            presence.led(local_ns())
            return None
        term = self._make_term(decision, record, fresh)
        if term is None:
            return None
        async with AsyncExitStack() as held:
            # Before it is known who leads, so that whoever learns of it finds somebody to probe.
            probes = await held.enter_async_context(
                self._transport.open_subscription(lead_subject(self._cluster_id, term.epoch))
            )
            if ledger is not None:
                try:
                    await ledger.write(term.record(self._cluster_id, self._leader_id))
                except Conflict:
                    presence.led(local_ns())
                    return None
            stack.push_async_exit(held.pop_all())
        self._counts.takeovers += 1
        cluster_ns = term.steering.cluster_at(local_ns())
        self._logger.info(
            "takes over from %s: %s - epoch=%d beat=%d, %.1f ms after it",
            self._follower.leader_id or "nobody",
            decision.reason,
            term.epoch,
            term.timeline.index_at(cluster_ns),
            (cluster_ns - term.timeline.last_beat(cluster_ns)) / 1e6,
        )
        return term, probes

    def _next_epoch(self, record: Record | None, agreed: int = -1) -> int:
        revision = 0 if self._ledger is None else self._ledger.revision
        known = (revision, self._epoch_of(record), self._seen, self._followed_epoch, agreed)
        # One that somebody made up must not be the last that there can be.
        epoch = max(epoch for epoch in known if epoch < MAX_INDEX) + 1
        # Without a record nothing remembers earlier terms: the milliseconds of the wall clock make
        # a later one greater.
        return epoch if self._ledger is not None else max(epoch, time.time_ns() // 1_000_000)

    def _make_term(self, decision: Decision, record: Record | None, fresh: Term) -> Term | None:
        """Return the term to ask the record for; None where it cannot be told yet which."""
        if self._follower.locked:
            return self._follow_on(record, fresh)
        if decision.action is Action.BEGIN:
            return self._begin_again(record, replace(fresh, epoch=self._next_epoch(record)))
        agreement = agree(
            list(self._memories.values()),
            local_ns(),
            incarnation=None if record is None else record.incarnation,
            expected_ns=None if record is None else _expected_ns(record),
        )
        if agreement is not None:
            return self._remember(agreement, record, fresh)
        if self._memories:
            self._logger.warning(
                "%d answers to a recall are not believed: they disagree, or are of another grid, or"
                " differ by more than a minute from the wall clock of this machine",
                len(self._memories),
            )
            self._memories.clear()
            self._presence.disbelieved()
            return None
        if self._former is not None:
            epoch = self._next_epoch(record)
            former = replace(self._former, epoch=epoch, nonce=fresh.nonce)
            term = self._go_on(former, record, epoch)
            if term is not None or record is None:
                return term or former
        return self._begin_again(record, replace(fresh, epoch=self._next_epoch(record)))

    def _follow_on(self, record: Record | None, fresh: Term) -> Term:
        """Return the term that goes on with the grid that is followed."""
        follower, grid = self._follower, self._clock.grid
        epoch, timeline = self._next_epoch(record), grid.timeline.since(self._clock.cluster_ns())
        present = Term(
            epoch=epoch,
            timeline=timeline,
            steering=grid.steering,
            beats_per_bar=grid.beats_per_bar,
            sent=grid.timeline.index_at(follower.last_due_ns),
            milli_bpm=timeline.segments[0].milli_bpm or fresh.milli_bpm,
            incarnation=follower.incarnation or fresh.incarnation,
            nonce=fresh.nonce,
            announced_seq=grid.timeline.segments[-1].seq,
            uncertainty_ns=follower.uncertainty_ns(local_ns()) or 0,
        )
        return self._go_on(present, record, epoch) or present

    def _remember(self, agreement: Agreement, record: Record | None, fresh: Term) -> Term:
        """Return the term that goes on with the grid that agents remember."""
        now, epoch = local_ns(), self._next_epoch(record, agreement.epoch)
        steering = Steering()
        steering.step(agreement.offset_ns, at_ns=now)
        timeline = agreement.timeline.since(now + agreement.offset_ns)
        known = Term(
            epoch=epoch,
            timeline=timeline,
            steering=steering,
            beats_per_bar=agreement.beats_per_bar,
            sent=agreement.last_beat,
            milli_bpm=timeline.segments[0].milli_bpm or fresh.milli_bpm,
            incarnation=agreement.incarnation or fresh.incarnation,
            nonce=fresh.nonce,
            announced_seq=timeline.segments[-1].seq,
            uncertainty_ns=agreement.uncertainty_ns,
        )
        return self._go_on(known, record, epoch) or known

    def _go_on(self, known: Term, record: Record | None, epoch: int) -> Term | None:
        """Return the term with which the grid of the record goes on; None where it is another."""
        if record is None:
            return None
        committed, now = Timeline(record.segments), known.steering.cluster_at(local_ns())
        apart = committed.time_of(record.high_water) - now
        if not (
            committed.continues(known.timeline, apart) or known.timeline.continues(committed, apart)
        ):
            return None
        bar = known.beats_per_bar
        # What was beaten was told of, too.
        beaten = [s.seq for s in record.segments if s.beat0 <= record.high_water]
        announced_seq = max([min(record.announced_seq, record.segments[-1].seq), *beaten])
        timeline = reschedule(
            known.timeline,
            committed,
            now,
            announced_seq=announced_seq,
            beats_per_bar=bar,
            epoch=epoch,
        )
        return replace(
            known,
            timeline=timeline,
            # What somebody else has beaten, unheard here, is not to come again.
            sent=max(known.sent, min(record.high_water, timeline.index_at(now) + bar)),
            milli_bpm=timeline.segments[0].milli_bpm or record.milli_bpm,
            incarnation=record.incarnation,
            announced_seq=max(known.announced_seq, announced_seq),
        )

    def _begin_again(self, record: Record | None, fresh: Term) -> Term:
        """Return the term of another grid, where all who knew the time of the last one are gone."""
        epoch, origin = fresh.epoch, fresh.timeline.segments[0].t0_ns
        fresh = replace(fresh, steering=Steering(origin - local_ns()))
        if record is None:
            segment = Segment(epoch, 0, 0, origin, self._clock.segment().milli_bpm)
            return replace(fresh, timeline=Timeline((segment,)))
        committed, bar = Timeline(record.segments), record.beats_per_bar
        # No beat comes twice: neither those that were beaten since the record was written last, nor
        # those that agents have counted by themselves. Only wall clocks tell how many these are.
        expected = _expected_ns(record) or committed.time_of(record.high_water)
        passed = committed.index_at(expected + _WALL_NS)
        beat0 = (max(record.high_water, passed) // bar + 2) * bar
        self._logger.warning(
            "nobody is left of epoch %d: the grid begins again with beat %d", record.epoch, beat0
        )
        begun = [segment for segment in record.segments if segment.beat0 <= beat0]
        milli = (begun or record.segments)[-1].milli_bpm
        timeline = Timeline((Segment(epoch, 0, beat0, origin, milli),))
        for segment in record.segments:
            if segment.beat0 > beat0:
                changed = timeline.change(segment.milli_bpm, segment.beat0, epoch=epoch)
                if changed.segments[-1].t0_ns > MAX_NS:
                    break
                timeline = changed
        return replace(
            fresh,
            timeline=timeline,
            sent=beat0 - 1,
            beats_per_bar=bar,
            milli_bpm=milli or record.milli_bpm,
        )


def _expected_ns(record: Record) -> int | None:
    """Return the present cluster time, as the record and the wall clock let expect."""
    if record.written_ms is None:
        return None
    written_ns = record.written_ns
    if written_ns is None:
        written_ns = Timeline(record.segments).time_of(record.high_water)
    return written_ns + max(0, time.time_ns() - record.written_ms * 1_000_000)
