"""The arithmetic of the grid, in exact integers: segments, and the steering of cluster time.

Nothing here reads a clock. Times are integers of nanoseconds, cluster time or an agent's local time
as each name says; positions are beats. A beat's edge is the first whole nanosecond at or after the
point where the segment's line crosses the beat, so that every node computes the same edges; any
other position is reached at the nearest nanosecond.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final, NamedTuple, final

from msgspec import Struct

from ._wire import MAX_MILLI_BPM, MIN_MILLI_BPM, Segment

MINUTE_NS: Final = 60_000_000_000
# Nanoseconds a beat, times milli-BPM: the line's slope is `milli_bpm / BEAT_UNITS` beats a ns.
BEAT_UNITS: Final = MINUTE_NS * 1000

MAX_SLEW: Final = 0.08
MIN_STEP_NS: Final = 50_000_000

# Moving a position to another grid costs it a rounding of a float; within this many beats of a
# beat's edge it is taken as the edge itself.
SNAP: Final = 1e-9


def milli_bpm(name: str, bpm: float) -> int:
    """Return a tempo in thousandths of a beat a minute.

    Args:
      name: what the value is called, for the error's text.
      bpm: beats per minute, 0.1 to 6,000.

    Raises:
      TypeError: where it is no number.
      ValueError: where it is NaN or out of range.

    """
    if isinstance(bpm, bool) or not isinstance(bpm, (int, float)):
        raise TypeError(f"`{name}` must be a number of beats per minute, not {bpm!r}")
    # NaN fails every comparison.
    if not MIN_MILLI_BPM / 1000 <= bpm <= MAX_MILLI_BPM / 1000:
        raise ValueError(f"`{name}` must be from 0.1 to 6000 beats per minute, not {bpm!r}")
    return round(bpm * 1000)


def beat_ns(milli: int) -> int:
    """Return the length of a beat in nanoseconds, rounded up."""
    return -(-BEAT_UNITS // milli)


def _edge(segment: Segment, position: float) -> int:
    if isinstance(position, float):
        nearest = round(position)
        if abs(position - nearest) > SNAP:
            numerator, denominator = position.as_integer_ratio()
            distance = (numerator - segment.beat0 * denominator) * BEAT_UNITS
            slope = denominator * segment.milli_bpm
            return segment.t0_ns + (2 * distance + slope) // (2 * slope)
        position = nearest
    return segment.t0_ns - ((segment.beat0 - position) * BEAT_UNITS // segment.milli_bpm)


@final
class Timeline(Struct, frozen=True):
    """The committed segments that matter from now on: the present one and those to come."""

    segments: tuple[Segment, ...]

    @classmethod
    def of(cls, segment: Segment, following: Segment | None = None) -> Timeline:
        """Make the timeline that a frame or a reply describes."""
        return cls((segment,) if following is None else (segment, following))

    def segment_at(self, cluster_ns: int) -> Segment:
        """Return the segment in force at an instant of cluster time."""
        for segment in reversed(self.segments):
            if cluster_ns >= segment.t0_ns:
                return segment
        return self.segments[0]

    def index_at(self, cluster_ns: int) -> int:
        """Return the index of the beat that an instant lies in."""
        segment = self.segment_at(cluster_ns)
        return segment.beat0 + (cluster_ns - segment.t0_ns) * segment.milli_bpm // BEAT_UNITS

    def position_at(self, cluster_ns: int) -> float:
        """Return the position, in beats, of an instant; its integer part is `index_at`."""
        segment = self.segment_at(cluster_ns)
        beats, rest = divmod((cluster_ns - segment.t0_ns) * segment.milli_bpm, BEAT_UNITS)
        index = segment.beat0 + beats
        position = index + rest / BEAT_UNITS
        # A sum so close below the next beat that the float rounds up to it.
        return position if position < index + 1 else math.nextafter(index + 1, 0.0)

    def time_of(self, position: float) -> int:
        """Return the cluster time at which a position is reached."""
        for segment in reversed(self.segments):
            if position >= segment.beat0:
                return _edge(segment, position)
        return _edge(self.segments[0], position)

    def change(self, milli: int, at_beat: int, *, epoch: int) -> Timeline:
        """Return the timeline with another tempo from ``at_beat`` on.

        It replaces what was to come there. The new segment begins on the very edge that the old
        one gives to the beat.
        """
        kept = [segment for segment in self.segments if segment.beat0 < at_beat]
        last = kept[-1] if kept else self.segments[0]
        seq = max(segment.seq for segment in self.segments) + 1
        added = Segment(epoch, seq, at_beat, _edge(last, at_beat), milli)
        return Timeline((*kept, added))

    def since(self, cluster_ns: int) -> Timeline:
        """Return the timeline without the segments that are over."""
        present = self.segment_at(cluster_ns)
        return Timeline(self.segments[self.segments.index(present) :])


class Ping(NamedTuple):
    """One request-reply exchange.

    Sent and answered are local time, received and replied cluster time, all in nanoseconds.
    """

    sent_ns: int
    received_ns: int
    replied_ns: int
    answered_ns: int

    @property
    def delay_ns(self) -> int:
        """The time on the way, there and back (RFC 5905, section 8: delta)."""
        return (self.answered_ns - self.sent_ns) - (self.replied_ns - self.received_ns)

    @property
    def offset_ns(self) -> int:
        """Cluster time minus local time (RFC 5905, section 8: theta), to half the delay."""
        return ((self.received_ns - self.sent_ns) + (self.replied_ns - self.answered_ns)) // 2


def best_ping(pings: Iterable[Ping]) -> Ping | None:
    """Return the ping of a burst that was shortest on its way.

    What claims to have left before it came, or to have been on its way for less than nothing, is
    passed over.
    """
    honest = [ping for ping in pings if ping.delay_ns >= 0 and ping.replied_ns >= ping.received_ns]
    return min(honest, key=lambda ping: ping.delay_ns, default=None)


@final
class Steering:
    """The mapping of local time to cluster time, corrected by slewing so that it never runs back.

    The offset goes in a straight line from what it was to what was measured, at no more than 8 %
    of the rate of time; afterwards it stays.
    """

    __slots__ = ("_from_ns", "_from_offset", "offset_ns", "settled_ns")

    def __init__(self, offset_ns: int = 0) -> None:
        self.offset_ns: int = offset_ns
        self.settled_ns: int = 0
        self._from_ns = 0
        self._from_offset = offset_ns

    def cluster_at(self, local_ns: int) -> int:
        """Return the cluster time at an instant of local time."""
        if local_ns >= self.settled_ns:
            return local_ns + self.offset_ns
        if local_ns <= self._from_ns:
            return local_ns + self._from_offset
        way = self.offset_ns - self._from_offset
        return (
            local_ns
            + self._from_offset
            + way * (local_ns - self._from_ns) // (self.settled_ns - self._from_ns)
        )

    def local_at(self, cluster_ns: int) -> int:
        """Return the first instant of local time at which the cluster time has been reached."""
        local_ns = cluster_ns - self.offset_ns
        if local_ns >= self.settled_ns:
            return local_ns
        local_ns = cluster_ns - self._from_offset
        if local_ns <= self._from_ns:
            return local_ns
        way, duration = self.offset_ns - self._from_offset, self.settled_ns - self._from_ns
        local_ns = self._from_ns + (local_ns - self._from_ns) * duration // (duration + way) - 1
        while self.cluster_at(local_ns) < cluster_ns:
            local_ns += 1
        return local_ns

    def rate_at(self, local_ns: int) -> float:
        """Return how fast cluster time runs, in terms of local time."""
        if local_ns >= self.settled_ns or local_ns < self._from_ns:
            return 1.0
        return 1.0 + (self.offset_ns - self._from_offset) / (self.settled_ns - self._from_ns)

    def step(self, offset_ns: int) -> None:
        """Take an offset at once."""
        self.offset_ns = self._from_offset = offset_ns
        self._from_ns = self.settled_ns = 0

    def correct(self, local_ns: int, offset_ns: int, *, beat_ns: int) -> None:
        """Move towards a measured offset: slewed, or stepped where far behind.

        Args:
          local_ns: now.
          offset_ns: what was measured, cluster time minus local time.
          beat_ns: the length of a beat. An error forward of more than max(50 ms, 1/4 beat) is
            stepped; others are slewed, over an eighth of a beat or as long as 8 % of rate takes.
        """
        present = self.cluster_at(local_ns) - local_ns
        error = offset_ns - present
        if error > max(MIN_STEP_NS, beat_ns // 4):
            self.step(offset_ns)
            return
        self._from_ns, self._from_offset = local_ns, present
        self.settled_ns = local_ns + max(beat_ns // 8, math.ceil(abs(error) / MAX_SLEW))
        self.offset_ns = offset_ns
