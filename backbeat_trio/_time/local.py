"""Local time: Trio's clock in whole nanoseconds."""

from __future__ import annotations

import math

import trio

from .._grid.timeline import NEVER


def seconds_of(ns: int) -> float:
    """Return an instant of local time in seconds of Trio's clock, and never one before it.

    It is ``inf`` from `NEVER` on.
    """
    if ns >= NEVER:
        return math.inf
    seconds = ns / 1e9
    # Far from a clock's origin floats are coarser than a nanosecond. What sleeps until too early an
    # instant finds nothing to do, and sleeps until it again.
    while round(seconds * 1e9) < ns:
        seconds = math.nextafter(seconds, math.inf)
    return seconds


def local_ns() -> int:
    """Return Trio's clock in whole nanoseconds: the local time of everything here."""
    return round(trio.current_time() * 1e9)
