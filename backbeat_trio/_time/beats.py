"""The async iterators that give a session's beats, and how they wait precisely."""

from __future__ import annotations

from typing import Final, final

import trio
from msgspec import Struct

from .._grid.timeline import NEVER
from .._wire import BeatPhase, beat_phase, window_id
from .clock import BeatClock
from .local import local_ns, seconds_of

# Trio's timers are late by a millisecond or so: what must not be is waited for in checkpoints.
_NEAR_NS: Final = 2_000_000
# Whatever else falls due on a beat runs in the same turn of Trio's loop, and at times first: so the
# last part of the wait is no checkpoint at all.
_SPIN_NS: Final = 100_000
# Nor is it for ever, where Trio's clock is slow: on a real one this many looks take longer.
_SPINS: Final = 2000


class Beat(Struct, frozen=True):
    """One beat, as the iterators of a session give it."""

    index: int
    """The beat's index: sequential over the life of the cluster."""
    downbeat: bool
    """Whether it is the first of its bar."""
    phase: BeatPhase
    """``"downbeat"`` or ``"upbeat"``."""
    tempo_bpm: float
    """Beats per minute in force."""
    window_id: str
    """The name of its bar."""
    skipped: int
    """How many the consumer missed since the last one it got, because it was busy."""


@final
class Beats:
    """An async iterator of beats, or of downbeats, with no queue behind it.

    However slow its consumer is, it costs the others nothing: the next `Beat` is the newest, and
    its ``skipped`` tells how many were missed. Each step is a checkpoint.

    Raises:
      SessionClosed: when the session is closed.

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
    # Of that beat, also where the next one has begun by now.
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
    # Waits for a beat that is still to come, or for part of the way to it; at its end, without
    # sleeping.
    now, edge_ns = local_ns(), clock.grid.local_at(index)
    until_ns = edge_ns - _NEAR_NS if edge_ns < NEVER else NEVER
    if until_ns <= now:
        await trio.lowlevel.checkpoint()
        if local_ns() != now:
            _spin(edge_ns)
            return
        # Virtual time, which stands still until everybody sleeps: so this sleeps, too. The instant
        # must be later than now, whatever is rounded, or time never moves.
        until_ns = max(edge_ns, now + 1)
    # Every beat ends the wait, as the grid may be another one by then.
    with trio.move_on_at(seconds_of(until_ns)):
        await clock.wait_beat()


def _spin(edge_ns: int) -> None:
    if 0 < edge_ns - local_ns() <= _SPIN_NS:
        for _ in range(_SPINS):
            if local_ns() >= edge_ns:
                break
