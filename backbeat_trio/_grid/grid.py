"""The position of one agent on the grid: the segments it knows, and its estimate of cluster time.

Pure: local time is passed in. Whatever an agent learns about the grid or about its clock, its
position on one grid never goes back.
"""

from __future__ import annotations

import math
from typing import Protocol, final

from .._wire import Segment
from .steering import Steering
from .timeline import NEVER, Timeline, beat_ns


class GridObserver(Protocol):
    """The methods that a `Grid` calls when it changes."""

    def changed(self) -> None:
        """React to a change of the times of future beats. It is called after the change."""

    def rebased(self, beats: float, index: int) -> None:
        """React to the move to another grid. It is called after the move and before `changed`.

        Args:
          beats: by how many beats the position has moved.
          index: by how many beats the index of the present beat has moved.

        """


@final
class Grid:
    """A timeline, and the steered clock by which it is read.

    Args:
      timeline: the segments.
      steering: the mapping from local time to cluster time.
      beats_per_bar: the length of a bar, in beats.
      observer: its methods are called when the grid changes; None for no calls.

    """

    def __init__(
        self,
        timeline: Timeline,
        steering: Steering,
        beats_per_bar: int,
        observer: GridObserver | None = None,
    ) -> None:
        self.timeline: Timeline = timeline
        self.steering: Steering = steering
        self.beats_per_bar: int = beats_per_bar
        self.floor: float = -math.inf
        """The position, in beats, at the last correction of the grid. If the corrected grid is
        behind it, the agent holds this position until the grid reaches it."""
        self._floor_ns = 0
        self._observer = observer

    def cluster_at(self, local_ns: int) -> int:
        """Return the cluster time at an instant of local time."""
        return self.steering.cluster_at(local_ns)

    def index_at(self, local_ns: int) -> int:
        """Return the index of the beat at an instant of local time."""
        index = self.timeline.index_at(self.steering.cluster_at(local_ns))
        return index if index >= self.floor or local_ns < self._floor_ns else int(self.floor)

    def position_at(self, local_ns: int) -> float:
        """Return the position, in beats, at an instant of local time."""
        position = self.timeline.position_at(self.steering.cluster_at(local_ns))
        # The floor does not apply to instants before the last correction.
        return position if local_ns < self._floor_ns else max(self.floor, position)

    def segment_at(self, local_ns: int) -> Segment:
        """Return the segment in force at an instant of local time."""
        return self.timeline.segment_at(self.steering.cluster_at(local_ns))

    def local_at(self, position: float) -> int:
        """Return the local time at which a position is reached, or `NEVER`."""
        local_ns = self._local_at(position)
        return min(self._floor_ns, local_ns) if position <= self.floor else local_ns

    def _local_at(self, position: float) -> int:
        cluster_ns = self.timeline.time_of(position)
        return NEVER if cluster_ns == NEVER else self.steering.local_at(cluster_ns)

    def held_until(self) -> int:
        """Return the local time at which the grid reaches the position that is held, or `NEVER`.

        Call it only after a correction.
        """
        return self._local_at(self.floor)

    def hold_ns(self, local_ns: int) -> int:
        """Return how far the grid is behind the held position, in ns at the present tempo.

        It is 0 while no position is held.
        """
        cluster = self.steering.cluster_at(local_ns)
        behind = max(0.0, self.floor - self.timeline.position_at(cluster))
        return round(behind * beat_ns(self.timeline.segment_at(cluster).milli_bpm))

    def error_ns(self, local_ns: int) -> int:
        """Return how far the position is ahead of the measured one, in ns at the present tempo.

        It is negative if the position is behind.
        """
        steering = self.steering
        slew = steering.cluster_at(local_ns) - local_ns - steering.target_at(local_ns)
        return slew + self.hold_ns(local_ns)

    def adopt(self, timeline: Timeline, local_ns: int) -> None:
        """Replace the timeline by another one of the same grid, without a jump of the position.

        A change that was announced in time makes no difference to the present position. If a change
        becomes known only after it took effect, the position continues from where it is, and is
        corrected as `steer` does it.
        """
        cluster, former = self.steering.cluster_at(local_ns), self.timeline
        self._hold(local_ns)
        self.timeline = timeline
        milli, reached = timeline.segment_at(cluster).milli_bpm, timeline.time_of(self.floor)
        before, after = former.position_at(cluster), timeline.position_at(cluster)
        same = abs(after - before) * beat_ns(milli) <= 1
        # A position that is held already stays so while the grid is behind it.
        holds = before < self.floor and after < self.floor
        if same or holds or not milli or reached == NEVER:
            self._changed()
        else:
            target, frequency = self.steering.target_at(local_ns), self.steering.frequency
            self.steering.step(reached - local_ns, at_ns=local_ns)
            self.steer(target, local_ns, frequency)

    def steer(self, offset_ns: int, local_ns: int, frequency: int = 0) -> None:
        """Correct cluster time to a measured offset and frequency (see `Steering.correct`).

        If the correction steps back, the position does not: it is held until the grid reaches it.
        """
        self._hold(local_ns)
        beat = beat_ns(self.segment_at(local_ns).milli_bpm)
        self.steering.correct(local_ns, offset_ns, beat_ns=beat, frequency=frequency)
        self._changed()

    def rebase(
        self,
        timeline: Timeline,
        offset_ns: int,
        local_ns: int,
        *,
        beats_per_bar: int,
        frequency: int = 0,
        hold_beats: float = 0.0,
    ) -> None:
        """Move to another grid.

        Args:
          timeline: the segments of the other grid.
          offset_ns: the cluster time of the other grid minus local time, now.
          local_ns: now, in local time.
          beats_per_bar: the length of a bar of the other grid, in beats.
          frequency: how much faster its cluster time runs than local time, in parts in 10**12.
          hold_beats: if the other grid is behind the position by at most this many beats, the
            position is held until that grid reaches it. Otherwise the position moves.

        """
        position, index = self.position_at(local_ns), self.index_at(local_ns)
        self.timeline = timeline
        self.floor = -math.inf
        self.steering.step(offset_ns, at_ns=local_ns, frequency=frequency)
        self.beats_per_bar = beats_per_bar
        if 0 < position - self.position_at(local_ns) <= hold_beats:
            self.floor, self._floor_ns = position, local_ns
        if self._observer is not None:
            beats = self.position_at(local_ns) - position
            self._observer.rebased(beats, self.index_at(local_ns) - index)
        self._changed()

    def _hold(self, local_ns: int) -> None:
        self.floor, self._floor_ns = self.position_at(local_ns), local_ns

    def _changed(self) -> None:
        if self._observer is not None:
            self._observer.changed()
