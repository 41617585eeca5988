"""The arithmetic of the grid, in exact integers: segments of one tempo each, and changes of them.

Nothing here reads a clock. Times are integers of nanoseconds of cluster time; positions are beats.
A beat's edge is the first whole nanosecond at or after the point where the segment's line crosses
the beat, so that every node computes the same edges; any other position is reached at the nearest
nanosecond. In a segment of tempo 0 the grid stands still on the beat that it begins with.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, Final, Protocol, final

from msgspec import UNSET, Struct, UnsetType

from .._wire import MAX_MILLI_BPM, MIN_MILLI_BPM, Segment

MINUTE_NS: Final = 60_000_000_000
# Nanoseconds a beat, times milli-BPM: the line's slope is `milli_bpm / BEAT_UNITS` beats a ns.
BEAT_UNITS: Final = MINUTE_NS * 1000

# A grid that stands still is told of this often, and counts as having beats of this length where
# a length is needed.
STILL_NS: Final = 1_000_000_000
# The time of what will not come: later than all that the wire can tell.
NEVER: Final = 1 << 63

# Each grid begins at an instant of its own, somewhere in eighteen years: so no segment of one is a
# segment of another, and what is told of two grids differs by more than clocks ever do. Only those
# that stop while their machine sleeps differ by minutes.
ORIGINS_NS: Final = 1 << 59
_APART_NS: Final = 3600 * 1_000_000_000

# By how much another implementation may round an edge differently.
_ROUNDING_NS: Final = 1000

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
    return -(-BEAT_UNITS // milli) if milli else STILL_NS


def _edge(segment: Segment, position: float) -> int:
    if not segment.milli_bpm:
        return segment.t0_ns if position <= segment.beat0 else NEVER
    if isinstance(position, float):
        nearest = round(position)
        if abs(position - nearest) > SNAP:
            numerator, denominator = position.as_integer_ratio()
            distance = (numerator - segment.beat0 * denominator) * BEAT_UNITS
            slope = denominator * segment.milli_bpm
            return segment.t0_ns + (2 * distance + slope) // (2 * slope)
        position = nearest
    return segment.t0_ns - ((segment.beat0 - position) * BEAT_UNITS // segment.milli_bpm)


class Description(Protocol):
    """The fields by which a frame and a sync reply describe the grid."""

    @property
    def segment(self) -> Segment: ...
    @property
    def next_segment(self) -> Segment | None: ...
    @property
    def later_segments(self) -> tuple[Segment, ...] | UnsetType: ...


@final
class Timeline(Struct, frozen=True):
    """The committed segments that matter from now on: the present one and those to come."""

    segments: tuple[Segment, ...]

    @classmethod
    def of(cls, message: Description) -> Timeline:
        """Make the timeline that a frame or a reply describes.

        Raises:
          ValueError: where its segments do not join.

        """
        following = () if message.next_segment is None else (message.next_segment,)
        segments = (message.segment, *following, *(message.later_segments or ()))
        for before, segment in itertools.pairwise(segments):
            still = not before.milli_bpm
            if (segment.beat0 != before.beat0) if still else (segment.beat0 <= before.beat0):
                raise ValueError("the segments are not in the order of their beats")
            gap = segment.t0_ns - _edge(before, segment.beat0)
            if not (gap >= 0 if still else abs(gap) <= _ROUNDING_NS):
                raise ValueError("a segment does not begin where the one before it ends")
        return cls(segments)

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
        """Return the cluster time at which a position is first reached; `NEVER` where it is not."""
        for before, segment in reversed(list(itertools.pairwise(self.segments))):
            # A grid that stood still reached the beat where it stopped, not where it went on.
            if position > segment.beat0 or (position == segment.beat0 and before.milli_bpm):
                return _edge(segment, position)
        return _edge(self.segments[0], position)

    def after(self, cluster_ns: int) -> int:
        """Return the first beat that begins at an instant of cluster time or later."""
        index = self.index_at(cluster_ns)
        return index if self.time_of(index) >= cluster_ns else index + 1

    def last_beat(self, cluster_ns: int) -> int:
        """Return when the present beat began, or a grid that stands still was told of last."""
        segment = self.segment_at(cluster_ns)
        if segment.milli_bpm:
            return self.time_of(self.index_at(cluster_ns))
        return cluster_ns - (cluster_ns - segment.t0_ns) % STILL_NS

    def next_beat(self, cluster_ns: int) -> int:
        """Return when the next beat begins, or a grid that stands still is told of once more."""
        segment = self.segment_at(cluster_ns)
        if segment.milli_bpm:
            return self.time_of(self.index_at(cluster_ns) + 1)
        repeated = self.last_beat(cluster_ns) + STILL_NS
        # Where it goes on before that, the beat on which it stood is over, but not told again.
        return repeated if self.segment_at(repeated) is segment else self.time_of(segment.beat0 + 1)

    def change(self, milli: int, at_beat: int, *, epoch: int, after_seq: int = -1) -> Timeline:
        """Return the timeline with another tempo from ``at_beat`` on; 0 stands still there.

        It replaces what was to come there. The new segment begins on the very edge that the old
        one gives to the beat, and its number is greater than all here and ``after_seq``.
        """
        kept = [segment for segment in self.segments if segment.beat0 < at_beat]
        last = kept[-1] if kept else self.segments[0]
        t0_ns = _edge(last, at_beat)
        return self._added(tuple(kept), at_beat, t0_ns, milli, epoch, after_seq)

    def resume(self, milli: int, cluster_ns: int, *, epoch: int, after_seq: int = -1) -> Timeline:
        """Return the timeline of a grid that comes to stand still, going on at an instant then."""
        still = self.segments[-1]
        return self._added(self.segments, still.beat0, cluster_ns, milli, epoch, after_seq)

    def _added(
        self,
        kept: tuple[Segment, ...],
        beat0: int,
        t0_ns: int,
        milli: int,
        epoch: int,
        after_seq: int = -1,
    ) -> Timeline:
        seq = max(after_seq, *(segment.seq for segment in self.segments)) + 1
        return Timeline((*kept, Segment(epoch, seq, beat0, t0_ns, milli)))

    def wire_fields(self) -> dict[str, Any]:
        """Return the fields by which a frame or a reply describes it."""
        segment, *later = self.segments
        return {
            "segment": segment,
            "next_segment": later[0] if later else None,
            "later_segments": tuple(later[1:]) or UNSET,
        }

    def since(self, cluster_ns: int) -> Timeline:
        """Return the timeline without the segments that are over."""
        present = self.segment_at(cluster_ns)
        return Timeline(self.segments[self.segments.index(present) :])

    def shares(self, other: Timeline) -> bool:
        """Tell whether both know one segment, which no two grids have in common."""
        return not set(self.segments).isdisjoint(other.segments)

    def continues(self, other: Timeline, apart_ns: int) -> bool:
        """Tell whether both are of one grid: this one knows the other's segments or later ones.

        Args:
          other: what is known.
          apart_ns: by how much the cluster times differ that the two are read by, at one instant.

        """
        mine, theirs = self.segments[0], other.segments[0]
        return self.shares(other) or (
            abs(apart_ns) < _APART_NS
            and mine.seq > theirs.seq
            and mine.beat0 >= theirs.beat0
            and mine.t0_ns > theirs.t0_ns
        )
