"""The slewed clock: how local time becomes cluster time.

Pure: times are passed in, as integers of nanoseconds; frequencies are integers of parts in 10**12.
"""

from __future__ import annotations

import math
from typing import Final, final

# The unit of frequencies: parts in so many.
PARTS: Final = 10**12

MAX_SLEW: Final = 0.08
MIN_STEP_NS: Final = 50_000_000


@final
class Steering:
    """The mapping from local time to cluster time, which corrects small errors gradually.

    The mapping is a line through the measured offset with the measured frequency as its slope. A
    correction does not jump to that line: cluster time is slewed, which means that it runs up to
    8 % faster or slower until it meets the line. Only a large error is stepped, that is, corrected
    at once. Cluster time goes back only in such a step. `Grid` holds its position meanwhile.
    """

    __slots__ = ("_base_ns", "_base_offset", "_from_cluster", "_from_ns", "frequency", "settled_ns")

    def __init__(self, offset_ns: int = 0) -> None:
        self.frequency: int = 0
        """How much faster cluster time runs than local time, in parts in 10**12."""
        self.settled_ns: int = 0
        """The local time, in ns, at which the last correction is complete."""
        self._base_ns = self._from_ns = 0
        self._base_offset = self._from_cluster = offset_ns

    @property
    def corrected_ns(self) -> int:
        """The local time, in ns, of the last correction; the mapping is not valid before it."""
        return self._from_ns

    def target_at(self, local_ns: int) -> int:
        """Return the measured offset, cluster time minus local time in ns, at a local time."""
        return self._base_offset + (local_ns - self._base_ns) * self.frequency // PARTS

    def cluster_at(self, local_ns: int) -> int:
        """Return the cluster time at an instant of local time."""
        if local_ns >= self.settled_ns:
            return local_ns + self.target_at(local_ns)
        start = self._from_ns
        if local_ns <= start:
            return self._from_cluster + local_ns - start
        end = self.settled_ns
        way = end + self.target_at(end) - self._from_cluster
        return self._from_cluster + way * (local_ns - start) // (end - start)

    def local_at(self, cluster_ns: int) -> int:
        """Return the first instant of local time at which the cluster time has been reached."""
        end, start = self.settled_ns, self._from_ns
        if cluster_ns <= self._from_cluster:
            return start + cluster_ns - self._from_cluster
        if cluster_ns > end + self.target_at(end):
            way = cluster_ns - self._base_ns - self._base_offset
            local_ns = self._base_ns + way * PARTS // (PARTS + self.frequency)
        else:
            way = end + self.target_at(end) - self._from_cluster
            local_ns = start + (cluster_ns - self._from_cluster) * (end - start) // way
        # The divisions round down, so the result may be a few nanoseconds off.
        while self.cluster_at(local_ns - 1) >= cluster_ns:
            local_ns -= 1
        while self.cluster_at(local_ns) < cluster_ns:
            local_ns += 1
        return local_ns

    def rate_at(self, local_ns: int) -> float:
        """Return how many seconds of cluster time pass in one second of local time."""
        start, end = self._from_ns, self.settled_ns
        if local_ns >= end:
            return 1 + self.frequency / PARTS
        if local_ns < start:
            return 1.0
        return (end + self.target_at(end) - self._from_cluster) / (end - start)

    def step(self, offset_ns: int, *, at_ns: int = 0, frequency: int = 0) -> None:
        """Set the offset at once.

        Args:
          offset_ns: cluster time minus local time.
          at_ns: the local time at which the offset was measured.
          frequency: how much faster cluster time runs than local time, in parts in 10**12.

        """
        self._base_ns, self._base_offset, self.frequency = at_ns, offset_ns, frequency
        self._from_ns = self.settled_ns = at_ns
        self._from_cluster = at_ns + offset_ns

    def correct(self, local_ns: int, offset_ns: int, *, beat_ns: int, frequency: int = 0) -> None:
        """Correct cluster time to a measured offset.

        An error of more than max(50 ms, 1/4 beat), forward or back, is stepped. A smaller one is
        slewed over an eighth of a beat, or longer if that would take more than 8 % of rate.

        Args:
          local_ns: now, in local time.
          offset_ns: the measured offset, cluster time minus local time.
          beat_ns: the length of a beat.
          frequency: the measured frequency of cluster time, in parts in 10**12.

        """
        cluster_ns = self.cluster_at(local_ns)
        error = local_ns + offset_ns - cluster_ns
        self.step(offset_ns, at_ns=local_ns, frequency=frequency)
        if abs(error) > max(MIN_STEP_NS, beat_ns // 4):
            return
        self._from_cluster = cluster_ns
        self.settled_ns += max(beat_ns // 8, math.ceil(abs(error) / MAX_SLEW))
