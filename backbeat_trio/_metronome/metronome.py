"""The metronome of a cluster: alone, one of several with a shared store, or on the in-process bus.

If metronomes share a store, one of them leads and the others stand by. On the in-process bus, the
next leader continues where the last one stopped. Without either, a metronome runs alone.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Final, NamedTuple, final

import trio

from .._checks import check_integer
from .._errors import Logger, MetronomeUnavailable, TransportBroken
from .._grid.steering import Steering
from .._grid.timeline import ORIGINS_NS, Timeline, milli_bpm
from .._time.local import local_ns
from .._transport.discovery import Discovery, discover_own
from .._transport.memory import MemoryBus
from .._transport.protocol import Message, Transport
from .._transport.store import MemoryStore, Store
from .._wire import (
    MAX_BEATS_PER_BAR,
    Record,
    Segment,
    decode_record,
    encode,
    is_token,
)
from .leader import Leader
from .ledger import Ledger
from .standby import Standby
from .term import MetronomeCounts, Term, wait_for_record

# The seconds between two attempts to open the record.
_RETRY: Final = 1.0
# How long a new leader waits after its first frame, in seconds. The thread that writes the frame
# needs the interpreter for it, and everything that follows would keep it from that thread for
# milliseconds.
_HEAD_START: Final = 0.001


class MetronomeStatistics(NamedTuple):
    """What a metronome has counted since it was made, over all its terms of leadership.

    Attributes:
      frames: beat frames that were published.
      frames_unsent: beat frames that could not be published: there was no connection, or the frame
        was too large.
      syncs: pings of agents that were answered.
      tempo_changes: changes that were committed: of the tempo, and pauses and their ends.
      refused: changes that were refused.
      undecodable: requests that were dropped: they were not valid, were for another cluster, or
        named a reply subject that is not an inbox.
      takeovers: terms of leadership that it began by taking over from another metronome.
      deposed: terms that ended before the metronome was stopped: another metronome led, or a record
        became possible.
      probes: probes that were sent to a leader whose frame was late.
      commits: successful writes of the record.
      commits_failed: writes of the record that failed, or that the store did not answer in time.
      frames_foreign: frames of a leader of a higher rank or epoch that were heard while leading.
      records_unreadable: values in the store that were not a valid record of this cluster.

    """

    frames: int
    frames_unsent: int
    syncs: int
    tempo_changes: int
    refused: int
    undecodable: int
    takeovers: int
    deposed: int
    probes: int
    commits: int
    commits_failed: int
    frames_foreign: int
    records_unreadable: int


@final
class Metronome:
    """A metronome of a cluster. It leads, or stands by for the metronome that does.

    The program ``backbeat pulse`` runs one, and a session with a ``nats_url`` of ``memory://`` runs
    its own. So an application needs this class only to run a metronome in another way: make one,
    and start the `run` of its transport and its own `run` as tasks.

    Args:
      transport: the connection. It has a `run` of its own, which must be running.
      cluster_id: the cluster to lead, 1 to 128 of ``A-Z a-z 0-9 _ -``.
      leader_id: the name of this metronome in frames and answers.
      tempo_bpm: the tempo of a grid that begins here, 0.1 to 6,000 beats per minute.
      beats_per_bar: the bar length of such a grid, 1 to 1,000,000 beats.
      bus: the bus of ``transport`` if that is a `MemoryTransport`; None otherwise. Metronomes on a
        bus take turns, and the next one continues the grid.
      store: where metronomes of the cluster share the record of the grid, such as a key in
        JetStream. With None there is no record: if this metronome ends, so does its grid.
      logger: where to log; by default ``logging.getLogger("backbeat_trio")``.
      serve_info: whether it answers what service tools ask, such as ``nats service ls``, so that
        they show it as an instance of ``backbeat-metronome``.

    Raises:
      TypeError, ValueError: if an argument is not valid; the text names it.

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
        store: Store | None = None,
        logger: Logger | None = None,
        serve_info: bool = True,
    ) -> None:
        if not is_token(cluster_id):
            raise ValueError(
                f"`cluster_id` must be 1 to 128 of A-Z a-z 0-9 _ -, not {cluster_id!r}"
            )
        if not isinstance(leader_id, str):
            raise TypeError(f"`leader_id` must be a str, not {leader_id!r}")
        self._transport = transport
        self._cluster_id = cluster_id
        self._leader_id = leader_id
        self._milli = milli_bpm("tempo_bpm", tempo_bpm)
        self._beats_per_bar = check_integer("beats_per_bar", beats_per_bar, 1)
        if beats_per_bar > MAX_BEATS_PER_BAR:
            raise ValueError(f"`beats_per_bar` must be at most {MAX_BEATS_PER_BAR:,}")
        self._bus = bus
        self._ledger = None if store is None else Ledger(store, cluster_id)
        self._logger: Logger = logger or logging.getLogger("backbeat_trio")
        self._counts = MetronomeCounts()
        self._leader: Leader | None = None
        self._standby: Standby | None = None
        # Whether it was logged that there is no record.
        self._is_recordless = False
        # The epoch of the present or the last term, and the highest one that a record has named.
        self._epoch = 0
        self._seen = -1
        self._discovery: Discovery | None = None
        if serve_info:
            self._discovery = discover_own(
                "backbeat-metronome", "The metronome of a BACKBEAT cluster", self._describe
            )

    def _describe(self) -> dict[str, str]:
        return {
            "cluster": self._cluster_id,
            "role": "leader" if self.leads else "standby",
            "epoch": str(self._epoch),
            "leader_id": self._leader_id,
        }

    @property
    def leads(self) -> bool:
        """Whether this metronome leads at present."""
        return self._leader is not None

    @property
    def stands_by(self) -> bool:
        """Whether this metronome follows another one that leads, and hears its beats."""
        return self._standby is not None and self._standby.hears_leader

    @property
    def epoch(self) -> int:
        """The number of the present or the last term of leadership; 0 before the first one."""
        return self._epoch

    def statistics(self) -> MetronomeStatistics:
        """Return what the metronome has counted since it was made. Not a checkpoint."""
        counts = self._counts
        return MetronomeStatistics(
            frames=counts.frames,
            frames_unsent=counts.frames_unsent,
            syncs=counts.syncs,
            tempo_changes=counts.tempo_changes,
            refused=counts.refused,
            undecodable=counts.undecodable,
            takeovers=counts.takeovers,
            deposed=counts.deposed,
            probes=counts.probes,
            commits=counts.commits,
            commits_failed=counts.commits_failed,
            frames_foreign=counts.frames_foreign,
            records_unreadable=0 if self._ledger is None else self._ledger.unreadable,
        )

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Lead or stand by until cancelled. A checkpoint.

        The metronome counts as started as soon as it leads or has begun to wait. If the server or
        the store does not answer, it tries again. Call this once.

        Raises:
          TransportClosed: if the transport is closed.
          RecordRefused: if the store refuses to keep the record, whatever is tried.

        """
        if self._discovery is None:
            await self._run(task_status)
            return
        # What it raises leaves as itself, and not in a nursery's group.
        failure: Exception | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._discovery.run, self._transport, self._logger)
            try:
                await self._run(task_status)
            except Exception as error:  # noqa: BLE001 - it is raised again, further down
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            try:
                raise failure
            finally:
                del failure

    async def _run(self, task_status: trio.TaskStatus[None]) -> None:
        if self._bus is not None:
            await self._run_on_bus(self._bus._store_of(self._cluster_id), task_status)
        else:
            await self._run_by_turns(task_status)

    async def _run_on_bus(self, store: MemoryStore, task_status: trio.TaskStatus[None]) -> None:
        try:
            store.turn.acquire_nowait()
        except trio.WouldBlock:
            task_status.started()
            task_status = trio.TASK_STATUS_IGNORED
            await store.turn.acquire()
        try:
            term = self._next_term(store)
            store.offset_ns = term.steering.target_at(0)

            def keep(record: Record) -> None:
                store.write_nowait(encode(record), store.read_nowait().revision)

            def count_standbys() -> int:
                return store.turn.statistics().tasks_waiting

            leader = self._make_leader(term, keep=keep, count_standbys=count_standbys)
            await self._lead(leader, task_status=task_status)
        finally:
            store.turn.release()

    def _next_term(self, store: MemoryStore) -> Term:
        data = store.read_nowait().data
        if not data:
            return self._first_term(1, nonce=secrets.token_hex(8))
        record = decode_record(data)
        return Term(
            epoch=record.epoch + 1,
            timeline=Timeline(record.segments),
            steering=Steering(store.offset_ns),
            beats_per_bar=record.beats_per_bar,
            sent=record.high_water,
            milli_bpm=record.milli_bpm,
            incarnation=record.incarnation,
        )

    async def _run_by_turns(self, task_status: trio.TaskStatus[None]) -> None:
        former: Term | None = None
        if self._ledger is None:
            # Without a store nothing remembers earlier terms. The wall clock's milliseconds, which
            # are used for nothing else, make the epoch of each later term greater.
            term = self._first_term(time.time_ns() // 1_000_000, nonce=secrets.token_hex(8))
            former = await self._lead(self._make_leader(term), task_status=task_status)
        else:
            task_status.started()
        while True:
            ledger = await self._find_ledger()
            async with AsyncExitStack() as stack:
                won = await self._stand_by(ledger, former, stack)
                if won is not None:
                    former = await self._lead(*won)
                    if ledger is not None and ledger.record is not None:
                        self._seen = max(self._seen, ledger.record.epoch)

    async def _stand_by(
        self, ledger: Ledger | None, former: Term | None, stack: AsyncExitStack
    ) -> tuple[Leader, AsyncIterator[Message]] | None:
        """Stand by until this metronome leads; return None to begin to stand by again.

        That is so if a record has become possible, or the grid must be joined anew.
        """
        async with trio.open_nursery() as nursery:
            self._standby = standby = Standby(
                self._transport,
                ledger,
                cluster_id=self._cluster_id,
                leader_id=self._leader_id,
                milli_bpm=self._milli,
                beats_per_bar=self._beats_per_bar,
                counts=self._counts,
                logger=self._logger,
                seen=self._seen,
                former=former,
            )
            await nursery.start(standby.follow)
            if ledger is None and self._ledger is not None:
                nursery.start_soon(self._until_record, self._ledger, nursery.cancel_scope)
            won = await standby.wait_for_turn(
                stack, self._first_term(0, nonce=secrets.token_hex(8))
            )
            if won is None:
                nursery.cancel_scope.cancel()
                return None
            term, probes = won
            leader = self._make_leader(term, ledger)
            # The frame may be overdue, so publish it before anything else is awaited.
            leader.strike()
            await trio.sleep(_HEAD_START)
            nursery.cancel_scope.cancel()
            return leader, probes
        return None

    async def _until_record(self, ledger: Ledger, scope: trio.CancelScope) -> None:
        await wait_for_record(self._transport, ledger.open, self._logger)
        scope.cancel("a record can be kept now")

    async def _find_ledger(self) -> Ledger | None:
        """Return the ledger of the record; None if the server says that it has no JetStream."""
        told = ""
        while self._ledger is not None:
            await self._transport.wait_connected()
            try:
                found = await self._ledger.open()
            except TransportBroken as error:
                if str(error) != told and self._transport.connected:
                    told = str(error)
                    self._logger.warning("waiting for the record of the grid: %s", error)
                await trio.sleep(_RETRY)
                continue
            if found:
                if told:
                    self._logger.info("the record of the grid answers")
                self._is_recordless = False
                return self._ledger
            if not self._is_recordless:
                self._logger.warning(
                    "the grid has no record, as there is no JetStream; it is asked for again. "
                    "Start nats-server with -js, so that the next metronome can go on with the grid"
                )
            self._is_recordless = True
            break
        return None

    def _first_term(self, epoch: int, *, nonce: str = "") -> Term:
        origin = secrets.randbelow(ORIGINS_NS)
        return Term(
            epoch=epoch,
            timeline=Timeline((Segment(epoch, 0, 0, origin, self._milli),)),
            steering=Steering(origin - local_ns()),
            beats_per_bar=self._beats_per_bar,
            sent=-1,
            milli_bpm=self._milli,
            incarnation=nonce,
            nonce=nonce,
        )

    def _make_leader(
        self,
        term: Term,
        ledger: Ledger | None = None,
        *,
        keep: Callable[[Record], None] | None = None,
        count_standbys: Callable[[], int] | None = None,
    ) -> Leader:
        return Leader(
            self._transport,
            term,
            cluster_id=self._cluster_id,
            leader_id=self._leader_id,
            counts=self._counts,
            logger=self._logger,
            ledger=ledger,
            keep=keep,
            find_record=None if ledger or self._ledger is None else self._ledger.open,
            count_standbys=count_standbys,
        )

    async def _lead(
        self,
        leader: Leader,
        probes: AsyncIterator[Message] | None = None,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> Term:
        self._leader, self._standby, self._epoch = leader, None, leader.epoch
        # Epochs with and without a record are counted independently.
        if leader.has_record:
            self._seen = max(self._seen, leader.epoch)
        try:
            await leader.run(probes, task_status=task_status)
        finally:
            self._leader = None
        return leader.present_term()

    def _present(self) -> Leader:
        if self._leader is None:
            raise MetronomeUnavailable("this metronome does not lead")
        return self._leader

    def current_beat(self) -> int:
        """Return the index of the present beat. Not a checkpoint.

        Raises:
          MetronomeUnavailable: if this metronome does not lead.

        """
        return self._present().current_beat()

    def next_beat_time(self) -> float:
        """Return when the next frame is due, in seconds of Trio's clock. Not a checkpoint.

        Raises:
          MetronomeUnavailable: if this metronome does not lead.

        """
        return self._present().next_beat_time()

    async def change_tempo(
        self, bpm: float | None, *, at_beat: int | None = None, over: int = 0
    ) -> int:
        """Commit a change of the tempo, a pause, or its end. A checkpoint.

        Every frame announces the change until it takes effect.

        Args:
          bpm: beats per minute, 0.1 to 6,000; 0 pauses the grid, and None resumes it.
          at_beat: the index of the beat at which the change begins. None stands for the next
            downbeat that is at least max(2 beats, 250 ms) ahead; for a pause, for the next such
            beat. It has no effect on the end of a pause.
          over: the number of beats over which the tempo changes, in steps; 0 for at once.

        Returns:
          The index of the beat at which the change begins.

        Raises:
          MetronomeUnavailable: if this metronome does not lead.
          TempoRefused: if ``at_beat`` is past, too soon or too far ahead; if the grid is paused, or
            ``bpm`` is None and it is not; or if the change could not be committed.
          TypeError: if an argument is of the wrong type.
          ValueError: if ``bpm`` is out of range or NaN, or another argument is negative or more
            than 2**53.

        """
        return await self._present().change(bpm, at_beat=at_beat, over=over)
