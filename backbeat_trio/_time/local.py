"""Local time: Trio's clock in whole nanoseconds."""

from __future__ import annotations

import math

import trio

from .._grid.timeline import NEVER


def seconds_of(ns: int) -> float:
    """Convert an instant of local time to seconds of Trio's clock, rounded up.

    The result is ``inf`` from `NEVER` on.
    """
    if ns >= NEVER:
        return math.inf
    seconds = ns / 1e9
    # Far from the clock's origin a float cannot hold nanoseconds. A task that woke too early would
    # find nothing to do, and would sleep until the same instant again, without end.
    while round(seconds * 1e9) < ns:
        seconds = math.nextafter(seconds, math.inf)
    return seconds


def local_ns() -> int:
    """Return the time of Trio's clock in whole nanoseconds, which is the local time of a grid."""
    return round(trio.current_time() * 1e9)
