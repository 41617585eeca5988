"""The async iterators of a session's beats, and their precise wait."""

from __future__ import annotations

from typing import Final, final

import trio
from msgspec import Struct

from .._grid.timeline import NEVER
from .._wire import BeatPhase, beat_phase, window_id
from .clock import BeatClock
from .local import local_ns, seconds_of

# Trio's timers are late by about a millisecond. So a precise wait sleeps until this long before the
# beat, and then polls the clock at checkpoints.
_NEAR_NS: Final = 2_000_000
# Other tasks that are due on the beat run in the same turn of Trio's loop, sometimes first. So for
# the last part of the wait there are no checkpoints.
_SPIN_NS: Final = 100_000
# The most readings of the clock in that part, in case the clock is slow. Of a real clock, so many
# readings take longer.
_SPINS: Final = 2000


class Beat(Struct, frozen=True):
    """One beat, as the iterators of `Session.beats` and `Session.downbeats` give it.

    Attributes:
      index: the beat's index: 0 or more, and sequential over the life of the cluster.
      downbeat: whether it is the first beat of its bar.
      phase: ``"downbeat"`` on the first beat of a bar, ``"upbeat"`` on the others.
      tempo_bpm: the tempo of this beat, in beats per minute; 0.0 in a pause.
      window_id: the name of its bar, for example ``"w-1543"``.
      skipped: how many beats (or downbeats) the consumer missed before this one, because it was
        busy.

    """

    index: int
    downbeat: bool
    phase: BeatPhase
    tempo_bpm: float
    window_id: str
    skipped: int


@final
class Beats:
    """An async iterator of beats or downbeats: ``async for beat in bb.beats():``.

    `Session.beats` and `Session.downbeats` make it. Do not call the class: its arguments are not
    public.

    Each step waits for the next `Beat`, and is a checkpoint. A consumer that was busy gets the
    newest one, whose ``skipped`` is the number of those it missed. Consumers do not slow down one
    another.

    Raises:
      SessionClosed: if the session is closed.

    """

    __slots__ = ("_bars", "_clock", "_comes_last", "_last", "_precise")

    def __init__(
        self, clock: BeatClock, *, bars: bool, precise: bool = False, comes_last: bool = False
    ) -> None:
        self._clock = clock
        self._bars = bars
        self._precise = precise
        self._comes_last = comes_last
        self._last = clock.index() - clock.index_shift

    def __aiter__(self) -> Beats:
        return self

    async def __anext__(self) -> Beat:
        clock = self._clock
        await trio.lowlevel.checkpoint_if_cancelled()
        waited = False
        while True:
            if clock.closed:
                clock.raise_closed()
            index = clock.index()
            step = clock.grid.beats_per_bar if self._bars else 1
            newest = index - index % step
            if newest - clock.index_shift > self._last:
                break
            waited = True
            if self._precise:
                await _wait_precisely(clock, newest + step)
            else:
                await clock.wait_beat(last=self._comes_last)
        if not waited:
            await trio.lowlevel.cancel_shielded_checkpoint()
        last = self._last + clock.index_shift
        self._last = newest - clock.index_shift
        return _beat(clock, newest, skipped=newest // step - last // step - 1)


def _beat(clock: BeatClock, index: int, *, skipped: int) -> Beat:
    bar, timeline = clock.grid.beats_per_bar, clock.grid.timeline
    # The tempo of that beat, even if the next one has begun meanwhile.
    begun = min(timeline.time_of(index), clock.cluster_ns())
    return Beat(
        index=index,
        downbeat=index % bar == 0,
        phase=beat_phase(index, bar),
        tempo_bpm=timeline.segment_at(begun).milli_bpm / 1000,
        window_id=window_id(index, bar),
        skipped=skipped,
    )


async def _wait_precisely(clock: BeatClock, index: int) -> None:
    # Sleep until shortly before a beat; or, if that is now, poll the clock once. The caller repeats
    # this until the beat has begun.
    now, edge_ns = local_ns(), clock.grid.local_at(index)
    until_ns = edge_ns - _NEAR_NS if edge_ns < NEVER else NEVER
    if until_ns <= now:
        await trio.lowlevel.checkpoint()
        if local_ns() != now:
            _spin(edge_ns)
            return
        # Time is virtual, and stops until every task sleeps. So sleep here, too, until an instant
        # that is later than now after any rounding. Otherwise time would never go on.
        until_ns = max(edge_ns, now + 1)
    # Any beat ends the wait, because the grid may have changed by then.
    with trio.move_on_at(seconds_of(until_ns)):
        await clock.wait_beat()


def _spin(edge_ns: int) -> None:
    if 0 < edge_ns - local_ns() <= _SPIN_NS:
        for _ in range(_SPINS):
            if local_ns() >= edge_ns:
                break
