"""Standing by: a metronome follows the grid, and takes over when there is no leader.

If a frame is late and this process itself was punctual, the standby sends a probe to the leader. If
the server says that no process is subscribed to the leader's probes, that process is gone and the
standby takes over at once. If there is just no answer, the leader may be suspended or cut off, and
the standby waits for the end of its lease. The record decides among several standbys: only one of
them can replace the revision that all have seen.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from functools import partial
from typing import Final, final

import msgspec
import trio
from msgspec.structs import replace

from .._errors import Logger, NoResponders, TransportBroken, TransportError
from .._grid.estimate import Ping
from .._grid.presence import JITTERS, LATE_NS, PROBE_EVERY_NS, Action, Decision, Presence
from .._grid.recall import Memory, agree
from .._grid.steering import MIN_STEP_NS, Steering
from .._grid.timeline import NEVER, Timeline
from .._time.clock import BeatClock
from .._time.local import local_ns, seconds_of
from .._time.timer import Alarm
from .._transport.protocol import Message, Reply, Transport
from .._transport.store import Conflict
from .._wire import (
    MAX_INDEX,
    Probe,
    RecallRequest,
    Record,
    Role,
    decode_probe,
    decode_recall_reply,
    encode,
    lead_subject,
    recall_subject,
)
from .ledger import Ledger
from .listener import BeatListener, ListenerObserver
from .succession import begin, begin_beyond, continue_remembered, expected_ns, join_record
from .term import MetronomeCounts, Term, lease_ns

# All in seconds: the wait after another metronome got the lead, in which its frames should arrive,
# and the wait before another attempt after the connection or the store failed.
_GRACE: Final = 0.05
_RETRY: Final = 0.2
# The least and the greatest time limit for an answer to a probe; that for the first answer to a
# recall; and that for each further one. All are at least this many round trips.
_PROBE_MIN: Final = 0.005
_PROBE_MAX: Final = 0.1
_RECALL_WAIT: Final = 1.0
_RECALL_MORE: Final = 0.1
_WAYS: Final = 3
# How long before a missing frame counts as late the record is read, in case the leader is gone.
_AHEAD_NS: Final = 5_000_000
# For how long that need not be done again.
_FRESH_NS: Final = 100_000_000
# While no answer comes, everybody is asked again at this interval.
_RECALL_EVERY: Final = 0.2
# For how long an answer to a recall is used.
_MEMORY_NS: Final = 10_000_000_000
# The agents' time is awaited only if it is behind that of the record by less than this.
_EARLY_NS: Final = 10_000_000_000


@final
class Standby(ListenerObserver):
    """A metronome that does not lead. It carries out what `Presence` decides.

    Args:
      transport: the transport; its `run` is called elsewhere.
      ledger: the record that metronomes share; None if there is none.
      cluster_id: the cluster.
      leader_id: the name of this metronome.
      milli_bpm: the tempo of a grid that begins here, in thousandths of a beat per minute.
      beats_per_bar: the bar length of such a grid, in beats.
      counts: the counters to increase.
      logger: the logger.
      seen: the highest epoch that this metronome led or saw in the record before; -1 for none.
      former: this metronome's last term as leader, from which the grid can be continued if no other
        process remembers it; None if it has not led.

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
        # Woken by everything that may change a decision.
        self._news = trio.lowlevel.ParkingLot()
        self._alarm = Alarm()
        self._stands_by = False
        self._troubled = False
        # When the next frame is due, in cluster time, and when it is late, in local time. A missing
        # frame of a leader that is alive is excused: it was lost on the way.
        self._excused_ns = self._due_ns = self._late_ns = 0
        # The epoch of the last probe, the time limit for its answer, and the round trip of the last
        # answer to a probe or a recall.
        self._probed = -1
        self._patience = _PROBE_MIN
        self._asked_way_ns = 0
        # The due time of the frame for which the record was last read ahead, in cluster time, and
        # the local time of that reading.
        self._ahead_of_ns: int | None = None
        self._read_ns = -_FRESH_NS
        self._memories: dict[str, Memory] = {}
        self._recalling = trio.CancelScope()
        self._must_join_anew = False

    async def follow(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Follow the grid as an agent does, until cancelled. Run it beside `wait_for_turn`."""
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

    @property
    def hears_leader(self) -> bool:
        """Whether it is locked to the grid, and not two frames in a row are missing."""
        return self._follower.locked and not self._follower.in_holdover(local_ns())

    # What the listener calls.

    def on_stale(self, epoch: int) -> None:
        """Tell a leader of a lower epoch that it was replaced, by a probe of the present epoch."""
        with contextlib.suppress(TransportBroken):
            self._transport.publish_nowait(
                lead_subject(self._cluster_id, epoch), self._make_probe(self._follower.epoch)
            )

    def on_sign(self, *, alone: bool) -> None:
        """Report a sign of a leader, unless it has no record and this metronome has one."""
        if not self._follower.locked and not (alone and self._ledger is not None):
            self._presence.led(local_ns())
            self._recalling.cancel("a leader was heard")
        self._news.unpark_all()

    def on_recall(self) -> None:
        """Probe the leader at once, because another metronome has not found it."""
        self._presence.asked()
        self._news.unpark_all()

    # Watching.

    async def wait_for_turn(
        self, stack: AsyncExitStack, fresh: Term
    ) -> tuple[Term, AsyncIterator[Message]] | None:
        """Stand by until this metronome has the lead, or must join the grid anew.

        Args:
          stack: the subscription to the probes of the term is entered into it.
          fresh: the term with which a new grid begins, if there is none to continue.

        Returns:
          The term, and the subscription to its probes; None if the clock of this machine stopped
          for some time, so that this metronome does not know the cluster time any more.
        """
        while not self._must_join_anew:
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
        return None

    def _look_around(self) -> None:
        follower, grid, presence = self._follower, self._clock.grid, self._presence
        presence.measured(self._way_ns)
        record = None if self._ledger is None else self._ledger.record
        milli = self._clock.segment().milli_bpm if record is None else record.milli_bpm
        held = record is not None and record.epoch > self._seen
        if not follower.locked:
            presence.holds(lease_ns(milli), held=held)
            return
        if not self._stands_by:
            self._stands_by = True
            self._logger.info(
                "stands by - leader=%s epoch=%d tempo=%g",
                follower.leader_id,
                follower.epoch,
                self._clock.segment().milli_bpm / 1000,
            )
        lease = lease_ns(self._clock.segment().milli_bpm)
        presence.holds(lease, held=held)
        self._due_ns = grid.timeline.next_beat(max(follower.last_due_ns, self._excused_ns))
        patience = max(LATE_NS, round(JITTERS * follower.drift.jitter_ns))
        self._late_ns = grid.steering.local_at(self._due_ns) + patience
        presence.follows(follower.last_due_ns, self._late_ns, lease, alone=follower.is_alone)

    async def _wait(self, until_ns: int) -> None:
        ledger = self._ledger if until_ns == self._late_ns and self._may_read_ahead else None
        wake_ns = until_ns if ledger is None else until_ns - _AHEAD_NS
        deadline = math.inf if until_ns == NEVER else seconds_of(wake_ns)
        self._alarm.wake_at(deadline)
        with trio.move_on_at(deadline) as scope:
            await self._news.park()
        if scope.cancelled_caught:
            if ledger is not None:
                with trio.move_on_at(seconds_of(until_ns)):
                    await self._read_ahead(ledger)
            self._patience = _PROBE_MIN
            lost = local_ns() - until_ns
            if lost > LATE_NS:
                # This process itself was late.
                self._presence.lost_time(local_ns(), lost)

    @property
    def _may_read_ahead(self) -> bool:
        # Once for each missing frame, and only if the answer can come before the frame is late.
        return self._way_ns < _AHEAD_NS and self._ahead_of_ns != self._due_ns

    async def _read_ahead(self, ledger: Ledger) -> None:
        # If the leader turns out to be gone, this has saved a round trip.
        self._ahead_of_ns, begun = self._due_ns, local_ns()
        with contextlib.suppress(TransportBroken):
            await ledger.read()
            self._read_ns = begun

    @property
    def _followed_epoch(self) -> int:
        # Leaders without a record count their epochs independently of those with one.
        outranked = self._follower.is_alone and self._ledger is not None
        return -1 if outranked else self._follower.epoch

    def _make_probe(self, epoch: int) -> bytes:
        return encode(Probe(self._cluster_id, epoch, self._leader_id))

    async def _probe(self) -> None:
        """Ask the present leader, or the last one that is known, whether it is alive."""
        record = None if self._ledger is None else self._ledger.record
        epoch = max(self._followed_epoch, self._epoch_of(record))
        begun = trio.current_time()
        self._probed = epoch
        self._counts.probes += 1
        patience = max(self._patience, _WAYS * self._way_ns / 1e9)
        try:
            answer = await self._transport.request(
                lead_subject(self._cluster_id, epoch), self._make_probe(epoch), timeout=patience
            )
            # Any other answer, such as that of a stream with these subjects, is not a leader's.
            decode_probe(answer.data)
        except NoResponders:
            self._presence.refused()
            return
        except (TransportBroken, msgspec.DecodeError):
            self._check_connected()
            # The round trip may be longer than the time limit.
            self._patience = min(2 * self._patience, _PROBE_MAX)
            lost = local_ns() - round((begun + patience) * 1e9)
            if lost > LATE_NS:
                # This process was late, so it is not the leader who was silent for so long.
                self._presence.lost_time(local_ns(), lost)
        else:
            self._note_way(answer)
            self._presence.led(local_ns())
            if local_ns() >= self._late_ns:
                self._excused_ns = self._due_ns
        await self._alarm.sleep_until(begun + PROBE_EVERY_NS / 1e9)

    @property
    def _way_ns(self) -> int:
        return max(self._asked_way_ns, self._listener.way_ns)

    def _note_way(self, answer: Reply) -> None:
        self._asked_way_ns = max(0, answer.received_ns - answer.sent_ns)

    async def _recall(self) -> None:
        """Send a recall, and collect the answers of the processes that know the grid."""
        begun = local_ns()
        waited = 0
        try:
            waited = await self._collect_memories()
        finally:
            # While this process was late, or the record was read, nobody could answer.
            lost = local_ns() - begun - waited
            if lost > LATE_NS:
                self._presence.lost_time(local_ns(), lost)

    async def _collect_memories(self) -> int:
        # Returns how long answers were certainly awaited, in nanoseconds.
        if self._ledger is not None:
            # This also shows that the connection works.
            await self._ledger.read()
        # Old answers may be of another grid.
        since = local_ns() - _MEMORY_NS
        self._memories = {
            name: memory
            for name, memory in self._memories.items()
            if memory.ping.answered_ns >= since
        }
        limit = max(_RECALL_WAIT, _WAYS * self._way_ns / 1e9)
        sent = local_ns()
        self._recalling = trio.move_on_after(limit)
        failures: list[TransportError] = []

        async def ask(*, is_first: bool = False) -> None:
            try:
                await self._ask_for_memories()
            except TransportError as error:
                if not isinstance(error, NoResponders):
                    failures.append(error)
                elif not is_first:
                    # Somebody may still answer the first one.
                    return
            scope.cancel()

        with self._recalling as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(ask, is_first=True))
                while True:
                    await trio.sleep(_RECALL_EVERY)
                    # Somebody may have come back who knows the grid.
                    nursery.start_soon(ask)
        if failures:
            # Outside of the nursery, so that it is not in an exception group.
            raise failures[0]
        waited = local_ns() - sent
        # A process that was late may have slept all the while, or its clock may have jumped.
        return waited if waited <= round(limit * 1e9) + LATE_NS else 0

    async def _ask_for_memories(self) -> None:
        """Ask everybody once, and take in answers until `_recalling` is over."""
        request = encode(RecallRequest(self._cluster_id, self._leader_id))
        async with self._transport.open_request(
            recall_subject(self._cluster_id), request
        ) as replies:
            async for answer in replies:
                self._hear_memory(answer)
                # The other answers should arrive soon after this one.
                soon = trio.current_time() + max(_RECALL_MORE, _WAYS * self._way_ns / 1e9)
                self._recalling.deadline = min(self._recalling.deadline, soon)

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
        # To a metronome with a record, a leader without one is just an agent that knows the grid.
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
        if ledger is not None and local_ns() - self._read_ns > _FRESH_NS:
            await ledger.read()
        record = None if ledger is None else ledger.record
        self._seen = max(self._seen, self._probed, self._followed_epoch)
        if self._epoch_of(record) > self._seen:
            # Another metronome has taken the lead meanwhile.
            presence.led(local_ns())
            return None
        term = self._make_term(decision, record, fresh)
        if term is None:
            return None
        async with AsyncExitStack() as held:
            # Subscribe before the record or a frame names this leader, so that nobody finds it
            # without probes. The server takes the subscription first, so do not wait for that.
            probes = await held.enter_async_context(
                self._transport.open_subscription(
                    lead_subject(self._cluster_id, term.epoch), confirmed=False
                )
            )
            if ledger is not None:
                try:
                    await ledger.write(term.record(self._cluster_id, self._leader_id))
                except Conflict:
                    presence.led(local_ns())
                    return None
            stack.push_async_exit(held.pop_all())
        self._counts.takeovers += 1
        if decision.action is Action.BEGIN and not self._follower.leader_id:
            # There was nobody to take over from.
            return term, probes
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
        # Ignore a made-up epoch that is the highest possible one: there must be a next one.
        epoch = max(epoch for epoch in known if epoch < MAX_INDEX) + 1
        # Without a record nothing remembers earlier terms. The wall clock's milliseconds make the
        # epoch of each later term greater.
        return epoch if self._ledger is not None else max(epoch, time.time_ns() // 1_000_000)

    def _make_term(self, decision: Decision, record: Record | None, fresh: Term) -> Term | None:
        """Return the term with which to take the lead; None if more must be found out first."""
        if self._follower.locked:
            followed = self._continue_followed(record, fresh)
            if not followed.is_behind(record):
                return followed
            self._logger.warning(
                "joins the grid anew: the record is of a later time, so this clock stopped"
            )
            self._must_join_anew = True
            return None
        if decision.action is Action.BEGIN:
            return self._begin_again(record, fresh)
        now = local_ns()
        written = None if record is None else record.written_ns
        consult = partial(
            agree,
            list(self._memories.values()),
            now,
            incarnation=None if record is None else record.incarnation,
            expected_ns=None if record is None else expected_ns(record, time.time_ns()),
        )
        agreement = consult(written_ns=written)
        if agreement is not None:
            epoch = self._next_epoch(record, agreement.epoch)
            return continue_remembered(
                agreement, record, replace(fresh, epoch=epoch), now, former=self._former
            )
        if written is not None and (early := consult()) is not None:
            wait = written - now - early.offset_ns
            if 0 < wait < _EARLY_NS and self._presence.early(now + wait):
                self._logger.warning(
                    "the record is of a later time than that of the agents: waits %.3g s for it",
                    wait / 1e9,
                )
                return None
        if self._memories:
            self._logger.warning(
                "%d answers to a recall were dropped: they disagree, or are of another grid, or"
                " give a time before that of the record, or one that differs by more than a minute"
                " from the wall clock of this machine",
                len(self._memories),
            )
            self._memories.clear()
            self._presence.disbelieved()
            return None
        if self._former is not None:
            former = replace(self._former, epoch=self._next_epoch(record), nonce=fresh.nonce)
            term = join_record(former, record, now)
            if record is None or (term is not None and not term.is_behind(record)):
                return term or former
        return self._begin_again(record, fresh)

    def _begin_again(self, record: Record | None, fresh: Term) -> Term:
        """Return the term of a new grid, because no process knows the time of the last one."""
        fresh = replace(fresh, epoch=self._next_epoch(record))
        if record is None:
            return begin(fresh, self._clock.segment().milli_bpm, local_ns())
        term = begin_beyond(record, fresh, local_ns(), time.time_ns())
        self._logger.warning(
            "no process knows the time of the grid of epoch %d: a new grid begins with beat %d",
            record.epoch,
            term.timeline.segments[0].beat0,
        )
        return term

    def _continue_followed(self, record: Record | None, fresh: Term) -> Term:
        """Return a term that continues the grid that is followed."""
        follower, grid, now = self._follower, self._clock.grid, local_ns()
        # A correction that is not complete must not go on in the term: every agent would measure a
        # cluster time that runs up to 8 % too fast or too slow.
        steering, offset = Steering(), grid.steering.target_at(now)
        steering.step(offset, at_ns=now, frequency=grid.steering.frequency)
        corrected = abs(now + offset - grid.cluster_at(now))
        timeline = grid.timeline.since(now + offset)
        uncertainty = follower.uncertainty_ns(now)
        present = Term(
            epoch=self._next_epoch(record),
            timeline=timeline,
            steering=steering,
            beats_per_bar=grid.beats_per_bar,
            sent=grid.timeline.index_at(follower.last_due_ns),
            milli_bpm=timeline.segments[0].milli_bpm or fresh.milli_bpm,
            incarnation=follower.incarnation or fresh.incarnation,
            nonce=fresh.nonce,
            announced_seq=grid.timeline.segments[-1].seq,
            # A cluster time that only frames have measured is wrong by their time on the way.
            uncertainty_ns=MIN_STEP_NS if uncertainty is None else max(0, uncertainty - corrected),
        )
        return join_record(present, record, now) or present
