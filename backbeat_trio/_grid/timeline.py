"""The arithmetic of the grid in exact integers: which beat it is at which instant.

A grid is a list of segments, each with one tempo. Nothing here reads a clock. Times are integers,
in nanoseconds of cluster time. Positions are in beats. A beat begins at its edge: the first whole
nanosecond at or after the point at which the segment's line crosses the beat. So every node
computes the same edges. Any other position is reached at the nearest nanosecond. In a segment of
tempo 0 the grid is paused on the segment's first beat.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, Final, Protocol, final

from msgspec import UNSET, Struct, UnsetType

from .._wire import MAX_MILLI_BPM, MIN_MILLI_BPM, Segment

MINUTE_NS: Final = 60_000_000_000
# A beat of a segment lasts `BEAT_UNITS / milli_bpm` nanoseconds.
BEAT_UNITS: Final = MINUTE_NS * 1000

# While the grid is paused, the leader publishes a frame this often. Calculations that need the
# length of a beat use it, too.
PAUSED_BEAT_NS: Final = 1_000_000_000
# The time of a position that is never reached. It is later than any time that a message can carry.
NEVER: Final = 1 << 63

# The cluster time of a new grid begins at a random value within these eighteen years. So two grids
# have no segment in common, and their cluster times are further apart than two clocks of one grid
# ever are: a clock that stops while its machine sleeps is off by minutes.
ORIGINS_NS: Final = 1 << 59
_APART_NS: Final = 3600 * 1_000_000_000

# By how much another implementation may round an edge differently.
_ROUNDING_NS: Final = 1000

# A position that moves to another grid is rounded as a float. If it is this close to a beat, it
# counts as that beat.
SNAP: Final = 1e-9


def milli_bpm(name: str, bpm: float) -> int:
    """Convert a tempo from beats per minute to thousandths of a beat per minute.

    Args:
      name: the name of the parameter, for the error's text.
      bpm: beats per minute, 0.1 to 6,000.

    Raises:
      TypeError: if ``bpm`` is not an int or a float.
      ValueError: if ``bpm`` is NaN or out of range.

    """
    if isinstance(bpm, bool) or not isinstance(bpm, (int, float)):
        raise TypeError(f"`{name}` must be a number of beats per minute, not {bpm!r}")
    # NaN fails every comparison.
    if not MIN_MILLI_BPM / 1000 <= bpm <= MAX_MILLI_BPM / 1000:
        raise ValueError(f"`{name}` must be from 0.1 to 6000 beats per minute")
    return round(bpm * 1000)


def beat_ns(milli: int) -> int:
    """Return the length of a beat in nanoseconds, rounded up.

    ``milli`` is the tempo in thousandths of a beat per minute. For 0, a paused grid, it is
    `PAUSED_BEAT_NS`.
    """
    return -(-BEAT_UNITS // milli) if milli else PAUSED_BEAT_NS


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
    """The segments of a grid that still matter: the present one and those announced for later."""

    segments: tuple[Segment, ...]

    @classmethod
    def of(cls, message: Description) -> Timeline:
        """Make the timeline that a frame or a sync reply describes.

        Raises:
          ValueError: if a segment does not begin where the one before it ends.

        """
        following = () if message.next_segment is None else (message.next_segment,)
        segments = (message.segment, *following, *(message.later_segments or ()))
        for before, segment in itertools.pairwise(segments):
            paused = not before.milli_bpm
            if (segment.beat0 != before.beat0) if paused else (segment.beat0 <= before.beat0):
                raise ValueError("the segments are not in the order of their beats")
            gap = segment.t0_ns - _edge(before, segment.beat0)
            if not (gap >= 0 if paused else abs(gap) <= _ROUNDING_NS):
                raise ValueError("a segment does not begin where the one before it ends")
        return cls(segments)

    def segment_at(self, cluster_ns: int) -> Segment:
        """Return the segment in force at an instant of cluster time."""
        for segment in reversed(self.segments):
            if cluster_ns >= segment.t0_ns:
                return segment
        return self.segments[0]

    def index_at(self, cluster_ns: int) -> int:
        """Return the index of the beat at an instant of cluster time."""
        segment = self.segment_at(cluster_ns)
        return segment.beat0 + (cluster_ns - segment.t0_ns) * segment.milli_bpm // BEAT_UNITS

    def position_at(self, cluster_ns: int) -> float:
        """Return the position, in beats, at an instant; its integer part is `index_at`."""
        segment = self.segment_at(cluster_ns)
        beats, rest = divmod((cluster_ns - segment.t0_ns) * segment.milli_bpm, BEAT_UNITS)
        index = segment.beat0 + beats
        position = index + rest / BEAT_UNITS
        # The sum may be so close below the next beat that it is rounded up to it.
        return position if position < index + 1 else math.nextafter(index + 1, 0.0)

    def time_of(self, position: float) -> int:
        """Return the cluster time at which a position is first reached, or `NEVER`."""
        for before, segment in reversed(list(itertools.pairwise(self.segments))):
            # A grid that was paused on this beat reached it when the pause began, not when it
            # ended.
            if position > segment.beat0 or (position == segment.beat0 and before.milli_bpm):
                return _edge(segment, position)
        return _edge(self.segments[0], position)

    def after(self, cluster_ns: int) -> int:
        """Return the index of the first beat that begins at an instant of cluster time or later."""
        index = self.index_at(cluster_ns)
        return index if self.time_of(index) >= cluster_ns else index + 1

    def last_beat(self, cluster_ns: int) -> int:
        """Return when the last frame was due: when the present beat began.

        In a paused grid a frame is due once a second, counted from the beginning of the pause.
        """
        segment = self.segment_at(cluster_ns)
        if segment.milli_bpm:
            return self.time_of(self.index_at(cluster_ns))
        return cluster_ns - (cluster_ns - segment.t0_ns) % PAUSED_BEAT_NS

    def next_beat(self, cluster_ns: int) -> int:
        """Return when the next frame is due: when the next beat begins.

        In a paused grid a frame is due once a second, as long as the pause lasts.
        """
        segment = self.segment_at(cluster_ns)
        if segment.milli_bpm:
            return self.time_of(self.index_at(cluster_ns) + 1)
        repeated = self.last_beat(cluster_ns) + PAUSED_BEAT_NS
        # If the grid resumes before that, the next frame is that of the next beat.
        return repeated if self.segment_at(repeated) is segment else self.time_of(segment.beat0 + 1)

    def change(self, milli: int, at_beat: int, *, epoch: int, after_seq: int = -1) -> Timeline:
        """Return the timeline with another tempo from ``at_beat`` on.

        Segments that begin at that beat or later are left out. The new segment begins exactly on
        the edge that the one before it gives to the beat.

        Args:
          milli: the tempo in thousandths of a beat per minute; 0 pauses the grid on that beat.
          at_beat: the index of the first beat at that tempo.
          epoch: the term of leadership in which the change is made.
          after_seq: the new segment's number is greater than this, and than all numbers here.

        """
        kept = [segment for segment in self.segments if segment.beat0 < at_beat]
        last = kept[-1] if kept else self.segments[0]
        t0_ns = _edge(last, at_beat)
        return self._added(tuple(kept), at_beat, t0_ns, milli, epoch, after_seq)

    def resume(self, milli: int, cluster_ns: int, *, epoch: int, after_seq: int = -1) -> Timeline:
        """Return the timeline with the end of the pause that is its last segment.

        Args:
          milli: the tempo after the pause, in thousandths of a beat per minute.
          cluster_ns: the instant at which the grid resumes, in cluster time.
          epoch: the term of leadership in which the change is made.
          after_seq: the new segment's number is greater than this, and than all numbers here.

        """
        pause = self.segments[-1]
        return self._added(self.segments, pause.beat0, cluster_ns, milli, epoch, after_seq)

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
        """Return the fields by which a frame or a sync reply describes this timeline."""
        segment, *later = self.segments
        return {
            "segment": segment,
            "next_segment": later[0] if later else None,
            "later_segments": tuple(later[1:]) or UNSET,
        }

    def since(self, cluster_ns: int) -> Timeline:
        """Return the timeline without the segments that are over at an instant of cluster time."""
        present = self.segment_at(cluster_ns)
        return Timeline(self.segments[self.segments.index(present) :])

    def shares(self, other: Timeline) -> bool:
        """Tell whether both timelines contain one segment; no two grids have any in common."""
        return not set(self.segments).isdisjoint(other.segments)

    def continues(self, other: Timeline, apart_ns: int) -> bool:
        """Tell whether both timelines are of one grid.

        They are if they share a segment, or if this one consists of later segments of a grid whose
        cluster time is nearly the same.

        Args:
          other: the timeline that is known already.
          apart_ns: the difference, at one instant, of the cluster times to which the two belong.

        """
        mine, theirs = self.segments[0], other.segments[0]
        return self.shares(other) or (
            abs(apart_ns) < _APART_NS
            and mine.seq > theirs.seq
            and mine.beat0 >= theirs.beat0
            and mine.t0_ns > theirs.t0_ns
        )
