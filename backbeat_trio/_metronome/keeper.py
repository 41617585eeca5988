"""A leader's side of the record: it writes the term, and learns from it that another one leads.

Frames never wait for the record. If it cannot be written, the leader goes on beating and refuses
changes of the tempo.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, final

import trio
from trio_util import AsyncBool

from .._errors import Logger, MetronomeUnavailable, TempoRefused, TransportBroken
from .._grid.timeline import Timeline
from .._transport.protocol import Transport
from .._transport.store import Conflict
from .._wire import Record
from .ledger import Ledger
from .term import MetronomeCounts

# The time limit for writing the record, and the wait before another attempt, in seconds.
_PATIENCE: Final = 2.0
_RETRY: Final = 1.0
# The least time between two writes of the record, in seconds.
_PAUSE: Final = 0.02


@final
class RecordKeeper:
    """The task and the methods that keep the record of one term.

    Args:
      ledger: the record.
      transport: the transport; its `run` is called elsewhere.
      make_record: returns the record of the term as it is now, with another timeline in it if one
        is given.
      step_down: called if the record says that another metronome leads; this metronome has to end
        its term then.
      counts: the counters to increase.
      logger: the logger.

    """

    def __init__(
        self,
        ledger: Ledger,
        transport: Transport,
        *,
        make_record: Callable[[Timeline | None], Record],
        step_down: Callable[[str], None],
        counts: MetronomeCounts,
        logger: Logger,
    ) -> None:
        self._ledger = ledger
        self._transport = transport
        self._make_record = make_record
        self._step_down = step_down
        self._counts = counts
        self._logger = logger
        self._committing = trio.Lock()
        self._wanted = AsyncBool(False)
        self._is_over = False
        # The reasons of all failures since the last successful write; each is logged once.
        self._failures: set[str] = set()
        # The connections on which the record was read, and on which it was also found that this
        # metronome still leads.
        self._read = self._looked = transport.generation

    @property
    def has_looked(self) -> bool:
        """Whether it was found on the present connection that this metronome still leads."""
        return self._looked == self._transport.generation

    def write_soon(self) -> None:
        """Have the task write the record, which also tells whether another metronome leads."""
        self._wanted.value = True

    @trio.lowlevel.enable_ki_protection
    async def run(self) -> None:
        """Write the record whenever `write_soon` was called, until cancelled."""
        while True:
            await self._wanted.wait_value(True)
            self._wanted.value = False
            try:
                with trio.fail_after(_PATIENCE):
                    await self._save()
            except (TransportBroken, trio.TooSlowError) as error:
                self._note_failure(error)
                await trio.sleep(_RETRY)
                self._wanted.value = True
            else:
                await trio.sleep(_PAUSE)

    async def look(self, must_wait: Callable[[], bool]) -> None:
        """Write the record, and so find out whether this metronome still leads. A checkpoint.

        If the record cannot be written, try again for as long as ``must_wait`` returns true.
        """
        while True:
            generation = self._transport.generation
            try:
                with trio.fail_after(_PATIENCE):
                    await self._save()
            except (TransportBroken, trio.TooSlowError) as error:
                self._note_failure(error)
                if not must_wait():
                    break
                await trio.sleep(_PAUSE)
            else:
                break
        self._looked = generation

    async def commit(self, timeline: Timeline, seconds: float) -> None:
        """Write the record with a change in it, within some seconds. A checkpoint.

        Raises:
          TempoRefused: if that was not possible. The record is then written without the change.
        """
        try:
            with trio.fail_after(min(_PATIENCE, max(0.0, seconds))):
                await self._save(timeline)
        except (TransportBroken, trio.TooSlowError) as error:
            why = self._note_failure(error)
            # The change may have been written after all. Overwrite it with the present timeline.
            self._wanted.value = True
            raise TempoRefused(f"the change could not be committed: {why}") from None

    def _note_failure(self, error: Exception) -> str:
        """Count a failed write of the record, log a new reason, and return the reason."""
        self._counts.commits_failed += 1
        why = "no answer in time" if isinstance(error, trio.TooSlowError) else str(error)
        if why not in self._failures:
            self._logger.warning("beating on without the record, tempo changes refused: %s", why)
            self._failures.add(why)
        return why

    async def _save(self, proposed: Timeline | None = None) -> None:
        async with self._committing:
            # Take the term only now: the task that held the lock may have committed a change.
            record = self._make_record(proposed)
            while True:
                if self._is_over:
                    await trio.lowlevel.checkpoint_if_cancelled()
                    # The caller is outside the scope that was cancelled.
                    raise MetronomeUnavailable("another metronome leads")
                try:
                    await self._read_anew(record)
                    await self._ledger.write(record)
                except Conflict:
                    self._end_if_deposed(record)
                else:
                    break
        self._counts.commits += 1
        if self._failures:
            self._failures.clear()
            self._logger.info("the record can be written again")

    async def _read_anew(self, ours: Record) -> None:
        # The server may have come back with another store, in which the numbers of revisions mean
        # other records.
        generation = self._transport.generation
        if self._read != generation:
            await self._ledger.read()
            self._read = generation
            if _is_deposed(ours, self._ledger.record):
                raise Conflict("another metronome leads")

    def _end_if_deposed(self, ours: Record) -> None:
        if _is_deposed(ours, self._ledger.record):
            self._is_over = True
            self._step_down("another metronome leads")


def _is_deposed(ours: Record, other: Record | None) -> bool:
    # Any other record is overwritten: one of this term, whose write seemed to fail; one that is
    # unreadable or missing; and one of a lower epoch.
    if other is None:
        return False
    if other.epoch == ours.epoch:
        return other.nonce != ours.nonce
    return other.epoch > ours.epoch
