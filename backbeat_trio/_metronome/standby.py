"""Standing by: following the grid as any agent does, and taking over when its leader is gone.

A frame that is late, where this process itself is punctual, makes a standby ask. Where nobody is
subscribed to the leader's probes any more its process is gone, and the standby takes over at once.
Where there is no answer it may be paused or cut off, and keeps its lease. What decides among
several standbys is the record: only one of them writes over the revision that all have seen.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Final, final

import msgspec
import trio
from msgspec.structs import replace

from .._errors import Logger, NoResponders, TransportBroken
from .._grid.changes import reschedule
from .._grid.timeline import Timeline
from .._time.clock import BeatClock
from .._time.local import local_ns
from .._transport.protocol import Message, Transport
from .._transport.store import Conflict
from .._wire import (
    MAX_INDEX,
    MAX_NS,
    Probe,
    Record,
    Segment,
    SyncRequest,
    decode_probe,
    decode_sync_reply,
    encode,
    lead_subject,
    sync_subject,
)
from .leader import MetronomeCounts, Term, lease_ns
from .ledger import Ledger
from .listener import BeatListener

# How late a frame may be, and how often a leader that owes one is asked.
_LATE_NS: Final = 8_000_000
_JITTERS: Final = 4
_PROBE_EVERY: Final = 0.005
# What somebody else who has just taken over, or come back to the server, is given to be heard.
_GRACE: Final = 0.05
_RECONNECT_GRACE: Final = 0.5
_RETRY: Final = 0.2
# How long nobody must be there before a grid begins again, and how long an answer may take.
_ABSENT_NS: Final = 1_000_000_000
# What the wall clocks of two machines may differ by.
_WALL_NS: Final = 2_000_000_000
_ASK: Final = 0.1


@final
class Standby:
    """A metronome that does not lead.

    Args:
      transport: run by somebody else.
      ledger: the record that metronomes share.
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
        ledger: Ledger,
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
            on_stale=self._depose,
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
        self._why = ""
        self._stands_by = False
        self._troubled = False
        self._generation = transport.generation

    async def follow(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Follow the grid as an agent does, until cancelled. To be run beside `wait_for_turn`."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._clock.run)
            await nursery.start(self._listener.run)
            task_status.started()

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
            await self._transport.wait_connected()
            try:
                await self._until_gone()
                won = await self._take_over(stack, fresh)
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

    def _depose(self, epoch: int) -> None:
        # A leader that was replaced without knowing, as it stood still or was cut off.
        with contextlib.suppress(TransportBroken):
            self._transport.publish_nowait(
                lead_subject(self._cluster_id, epoch), self._probe(self._follower.epoch)
            )

    def _probe(self, epoch: int) -> bytes:
        return encode(Probe(self._cluster_id, epoch, self._leader_id))

    # Watching.

    async def _until_gone(self) -> None:
        """Wait until nobody leads any more, as far as can be told from here."""
        follower, grid, transport = self._follower, self._clock.grid, self._transport
        excused_ns = 0
        await self._join()
        if follower.locked and not self._stands_by:
            self._stands_by = True
            self._logger.info("stands by - leader=%s epoch=%d", follower.leader_id, follower.epoch)
        while follower.locked:
            due_before = follower.last_due_ns
            due = grid.timeline.next_beat(max(due_before, excused_ns))
            patience = max(_LATE_NS, _JITTERS * follower.drift.jitter_ns)
            deadline = (grid.steering.local_at(due) + patience) / 1e9
            deadline = max(deadline, trio.current_time())
            if await self._is_heard(due_before, deadline):
                continue
            late = trio.current_time() - deadline
            if transport.generation != self._generation:
                # Who leads may not have come back yet.
                self._generation = transport.generation
                if await self._is_heard(due_before, trio.current_time() + _RECONNECT_GRACE):
                    continue
            if late > patience / 1e9 and await self._is_heard(
                due_before, trio.current_time() + late
            ):
                # It was here that time was lost.
                continue
            epoch = max(follower.epoch, self._epoch_of(self._ledger.record))
            if await self._is_gone(epoch, due_before):
                self._seen = max(self._seen, epoch)
                return
            excused_ns = due

    async def _is_heard(self, due_before: int, deadline: float) -> bool:
        with trio.move_on_at(deadline):
            while self._follower.last_due_ns == due_before:
                await self._listener.followed.park()
        return self._follower.last_due_ns != due_before

    async def _is_gone(self, epoch: int, due_before: int) -> bool:
        """Ask the leader of an epoch whether it lives, until it is clear or it is heard."""
        subject, probe = lead_subject(self._cluster_id, epoch), self._probe(epoch)
        silent_since, patience = local_ns(), _PROBE_EVERY
        while self._follower.last_due_ns == due_before:
            begun = trio.current_time()
            self._counts.probes += 1
            try:
                answer = await self._transport.request(subject, probe, timeout=patience)
                # What answers otherwise, such as a stream of these subjects, is no leader.
                decode_probe(answer.data)
            except NoResponders:
                self._why = "its process is gone"
                return True
            except (TransportBroken, msgspec.DecodeError):
                self._check_connected()
                # Where the way is long an answer is, too, and so is the news that nobody is there.
                patience = min(2 * patience, _ASK)
                if local_ns() - silent_since >= lease_ns(self._clock.segment().milli_bpm):
                    self._why = "it is silent"
                    return True
            else:
                return False
            await trio.sleep_until(begun + _PROBE_EVERY)
        return False

    async def _join(self) -> None:
        """Wait for the lock to a grid that is kept, or until it is clear that nobody keeps one."""
        locked, absent_since = self._listener.locked, local_ns()
        while not locked.is_set():
            record = await self._ledger.read()
            epoch = self._epoch_of(record)
            if record is None:
                # Nobody has led, or the record is lost: then the leader itself answers.
                subject = sync_subject(self._cluster_id)
                request = encode(SyncRequest(self._cluster_id, self._leader_id))
                absence = 0
            else:
                subject, request = lead_subject(self._cluster_id, epoch), self._probe(epoch)
                # It may be on its way back to the server; another grid is the last resort.
                absence = _ABSENT_NS
            milli = self._clock.segment().milli_bpm if record is None else record.milli_bpm
            now = local_ns()
            try:
                answer = await self._transport.request(subject, request, timeout=_ASK)
                (decode_sync_reply if record is None else decode_probe)(answer.data)
            except NoResponders:
                if now - absent_since >= absence:
                    self._seen = max(self._seen, epoch)
                    self._why = "nobody leads"
                    return
            except (TransportBroken, msgspec.DecodeError):
                self._check_connected()
                if now - absent_since >= lease_ns(milli):
                    self._seen = max(self._seen, epoch)
                    self._why = "nobody leads"
                    return
            else:
                absent_since = local_ns()
            with trio.move_on_after(_ASK):
                await locked.wait()

    def _check_connected(self) -> None:
        if not self._transport.connected:
            raise TransportBroken("the connection is gone")

    @staticmethod
    def _epoch_of(record: Record | None) -> int:
        return -1 if record is None else record.epoch

    # Taking over.

    async def _take_over(
        self, stack: AsyncExitStack, fresh: Term
    ) -> tuple[Term, AsyncIterator[Message]] | None:
        ledger = self._ledger
        record = await ledger.read()
        if self._epoch_of(record) > self._seen:
            # Somebody else has, meanwhile.
            return None
        epoch = self._next_epoch(record)
        term = self._make_term(record, epoch, fresh)
        async with AsyncExitStack() as held:
            # Before it is known who leads, so that whoever learns of it finds somebody to probe.
            probes = await held.enter_async_context(
                self._transport.open_subscription(lead_subject(self._cluster_id, epoch))
            )
            try:
                await ledger.write(term.record(self._cluster_id, self._leader_id))
            except Conflict:
                return None
            stack.push_async_exit(held.pop_all())
        self._counts.takeovers += 1
        cluster_ns = term.steering.cluster_at(local_ns())
        self._logger.info(
            "takes over from %s: %s - epoch=%d beat=%d, %.1f ms after it",
            self._follower.leader_id or "nobody",
            self._why,
            epoch,
            term.timeline.index_at(cluster_ns),
            (cluster_ns - term.timeline.last_beat(cluster_ns)) / 1e6,
        )
        return term, probes

    def _next_epoch(self, record: Record | None) -> int:
        known = (self._ledger.revision, self._epoch_of(record), self._seen, self._follower.epoch)
        # One that somebody made up must not be the last that there can be.
        return max(epoch for epoch in known if epoch < MAX_INDEX) + 1

    def _make_term(self, record: Record | None, epoch: int, fresh: Term) -> Term:
        follower, grid = self._follower, self._clock.grid
        if follower.locked:
            timeline = grid.timeline.since(self._clock.cluster_ns())
            present = Term(
                epoch=epoch,
                timeline=timeline,
                steering=grid.steering,
                beats_per_bar=grid.beats_per_bar,
                sent=grid.timeline.index_at(follower.last_due_ns),
                milli_bpm=timeline.segments[0].milli_bpm or fresh.milli_bpm,
                incarnation=fresh.incarnation,
                nonce=fresh.nonce,
                announced_seq=grid.timeline.segments[-1].seq,
            )
            return self._go_on(present, record, epoch) or present
        # It may have led before, and be all that is left of the grid.
        if self._former is not None:
            former = replace(self._former, epoch=epoch, nonce=fresh.nonce)
            term = self._go_on(former, record, epoch)
            if term is not None:
                return term
        return self._begin_again(record, replace(fresh, epoch=epoch))

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
        if record is None:
            segment = Segment(epoch, 0, 0, origin, self._clock.segment().milli_bpm)
            return replace(fresh, timeline=Timeline((segment,)))
        committed, bar = Timeline(record.segments), record.beats_per_bar
        # No beat comes twice: neither those that were beaten since the record was written last, nor
        # those that agents have counted by themselves. Only wall clocks tell how many these are.
        elapsed = 0 if record.written_ms is None else time.time_ns() - record.written_ms * 1_000_000
        passed = committed.index_at(
            committed.time_of(record.high_water) + max(0, elapsed) + _WALL_NS
        )
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
