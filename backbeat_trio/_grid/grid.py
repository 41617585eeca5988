"""Where one agent is on the grid: the segments that it knows, under its own idea of cluster time.

Pure: local time is passed in. Whatever an agent learns of the grid or of its clock, and whenever it
does, its position never runs back.
"""

from __future__ import annotations

import math
from typing import Protocol, final

from .._wire import Segment
from .steering import Steering
from .timeline import NEVER, Timeline, beat_ns


class GridObserver(Protocol):
    """What a grid tells when something about it changes."""

    def changed(self) -> None:
        """React to a change of when beats will come. It is called after each of them."""

    def rebased(self, beats: float, index: int) -> None:
        """React to a move of the position to another grid. It is called before `changed`.

        Args:
          beats: by how many beats the position has moved.
          index: by how many beats the index of the present beat has moved.

        """


@final
class Grid:
    """A timeline, and the steered clock by which it is read.

    Args:
      timeline: the segments.
      steering: how local time becomes cluster time.
      beats_per_bar: the length of a bar.
      observer: what is told of changes; None is nobody.

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
        """Where the grid turned out to stand still behind this agent, the agent stands still, too:
        on this position."""
        self._observer = observer

    def cluster_at(self, local_ns: int) -> int:
        """Return the cluster time at an instant of local time."""
        return self.steering.cluster_at(local_ns)

    def index_at(self, local_ns: int) -> int:
        """Return the index of the beat that an instant of local time lies in."""
        index = self.timeline.index_at(self.steering.cluster_at(local_ns))
        return index if index >= self.floor else int(self.floor)

    def position_at(self, local_ns: int) -> float:
        """Return the position, in beats, at an instant of local time."""
        return max(self.floor, self.timeline.position_at(self.steering.cluster_at(local_ns)))

    def segment_at(self, local_ns: int) -> Segment:
        """Return the segment in force at an instant of local time."""
        return self.timeline.segment_at(self.steering.cluster_at(local_ns))

    def local_at(self, position: float) -> int:
        """Return when a position will be reached, in local time; `NEVER` where it will not be."""
        cluster_ns = self.timeline.time_of(position)
        return NEVER if cluster_ns == NEVER else self.steering.local_at(cluster_ns)

    def adopt(self, timeline: Timeline, local_ns: int) -> None:
        """Follow another course of the same grid, without a jump of the position.

        A change that was announced ahead leaves no difference. Where the difference is found
        afterwards, cluster time starts from the present position and is steered to where it
        belongs: it never runs back.
        """
        cluster = self.steering.cluster_at(local_ns)
        before, after = self.position_at(local_ns), timeline.position_at(cluster)
        present = timeline.segment_at(cluster)
        self.timeline = timeline
        self.floor = -math.inf
        if abs(after - before) * beat_ns(present.milli_bpm) <= 1:
            self._changed()
        elif present.milli_bpm and (reached := timeline.time_of(before)) != NEVER:
            target, frequency = self.steering.target_at(local_ns), self.steering.frequency
            self.steering.step(reached - local_ns, at_ns=local_ns)
            self.steer(target, local_ns, frequency)
        else:
            # Cluster time cannot be moved to where this grid has another position: it stands still,
            # or will before it gets there.
            self.floor = max(before, after)
            self._changed()

    def steer(self, offset_ns: int, local_ns: int, frequency: int = 0) -> None:
        """Move cluster time towards a measured offset and frequency (see `Steering.correct`)."""
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
    ) -> None:
        """Move to another grid, with what is known of its time."""
        position, index = self.position_at(local_ns), self.index_at(local_ns)
        self.timeline = timeline
        self.floor = -math.inf
        self.steering.step(offset_ns, at_ns=local_ns, frequency=frequency)
        self.beats_per_bar = beats_per_bar
        if self._observer is not None:
            beats = self.position_at(local_ns) - position
            self._observer.rebased(beats, self.index_at(local_ns) - index)
        self._changed()

    def _changed(self) -> None:
        if self._observer is not None:
            self._observer.changed()
