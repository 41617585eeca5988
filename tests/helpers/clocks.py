"""A beat clock of one beat a second for tests in virtual time, and a move to another grid."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import trio

from backbeat_trio._grid.timeline import Timeline
from backbeat_trio._time.clock import BeatClock
from backbeat_trio._time.local import local_ns
from backbeat_trio._wire import Segment


@asynccontextmanager
async def running_clock(enforcing: bool = True) -> AsyncGenerator[BeatClock, None]:
    """Run a clock of one beat a second."""
    clock = BeatClock.local(60_000, 8, enforcing=enforcing)
    async with trio.open_nursery() as nursery:
        await nursery.start(clock.run)
        yield clock
        nursery.cancel_scope.cancel()
    clock.close()


def move(clock: BeatClock, position: float) -> None:
    """Move to another grid of one beat a second, on which the position differs."""
    whole, now = math.floor(position), local_ns()
    segment = Segment(clock.grid.timeline.segments[0].epoch + 1, 0, whole, 0, 60_000)
    offset = round((position - whole) * 1e9) - now
    clock.grid.rebase(Timeline((segment,)), offset, now, beats_per_bar=8)
    assert clock.position() == position
