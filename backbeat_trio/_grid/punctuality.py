"""How punctual the leader's frames and an agent's own event loop are. Pure: times are passed in."""

from __future__ import annotations

import statistics
from collections import deque
from typing import Final, Literal, TypeAlias, final

TempoDrift: TypeAlias = Literal["unknown", "acceptable", "elevated", "severe"]

# There is a verdict after this many frames. So many bad frames in a row make it worse, and so many
# good frames in a row make it acceptable again.
_VERDICT: Final = 8
_LOST: Final = 3
_REGAINED: Final = 8
# A frame that exceeds the tolerance by this factor is severe.
_SEVERE: Final = 10

_TEMPO: Final = 0.001
_PHASE: Final = 0.01
_PHASE_NS: Final = 2_000_000
# How many frames are kept, and how many nanoseconds they span at least.
_FRAMES: Final = 64
_LEAST_NS: Final = 4_000_000_000

_LATE: Final = 0.1
# Trio's timers are exact to a millisecond. At a fast tempo a tenth of a beat is less than that.
_LATE_NS: Final = 5_000_000


def is_late(late_ns: int, beat_ns: int) -> bool:
    """Tell whether a delay in an agent's own event loop is more than max(5 ms, 1/10 beat)."""
    return late_ns > max(_LATE_NS, _LATE * beat_ns)


def tolerance_ns(beat_ns: int) -> float:
    """Return by how much a frame or a position may be off, in ns: max(2 ms, 1 % of a beat)."""
    return max(_PHASE_NS, _PHASE * beat_ns)


@final
class Drift:
    """How far the arrival of frames differs from the grid that they announce.

    A frame is good if its phase and its tempo are. Its phase is good if it arrived within max(2 ms,
    1 % of a beat) of its beat. Its tempo is good if the rate of the last frames is within 0.1 % of
    the announced one, or if the error adds up to less than that tolerance over these frames. After
    three bad frames in a row the verdict is elevated, or severe if most of them exceed a tolerance
    more than tenfold. After eight good frames in a row it is acceptable again.
    """

    __slots__ = ("_bad", "_good", "_heard", "_level", "_levels", "_points", "jitter_ns")

    def __init__(self) -> None:
        self.jitter_ns: float = 0.0
        """How irregularly frames arrive, in ns: the interarrival jitter of RFC 3550, 6.4.1."""
        self.clear()

    def clear(self) -> None:
        """Forget the frames so far, because they belong to another grid or another time."""
        self._points: deque[tuple[int, int, int]] = deque(maxlen=_FRAMES)
        self._levels: deque[int] = deque(maxlen=_LOST)
        self._heard = self._good = self._bad = self._level = 0

    @property
    def rate(self) -> float | None:
        """The rate of the frames relative to the announced one; None before there are two."""
        if len(self._points) < 2:
            return None
        due, arrived, _ = zip(*self._points, strict=True)
        if arrived[-1] <= arrived[0]:
            return None
        # A float cannot hold the instants exactly, but their differences.
        return statistics.linear_regression(
            [instant - arrived[0] for instant in arrived], [instant - due[0] for instant in due]
        ).slope

    @property
    def verdict(self) -> TempoDrift:
        """The verdict on the last frames; 'unknown' before there are eight."""
        if self._heard < _VERDICT:
            return "unknown"
        return ("acceptable", "elevated", "severe")[self._level]

    def add(self, due_ns: int, received_ns: int, late_ns: int, beat_ns: int) -> None:
        """Add a frame.

        Args:
          due_ns: the cluster time at which its beat begins.
          received_ns: the local time at which the frame arrived.
          late_ns: how long after its beat the frame arrived, by this agent's estimate of cluster
            time; negative if it was early.
          beat_ns: the length of a beat.

        """
        self._heard += 1
        points = self._points
        if points:
            self.jitter_ns += (abs(late_ns - points[-1][2]) - self.jitter_ns) / 16
        # At a fast tempo some frames are left out, so that those that are kept span enough time.
        if len(points) >= 2 and received_ns - points[-2][1] < _LEAST_NS / _FRAMES:
            points.pop()
        points.append((due_ns, received_ns, late_ns))
        tolerance = tolerance_ns(beat_ns)
        excess = abs(late_ns) / tolerance
        rate = self.rate
        if rate is not None:
            error, span = abs(rate - 1), received_ns - points[0][1]
            if error * span > tolerance:
                excess = max(excess, error / _TEMPO)
        self._judge(0 if excess <= 1 else 1 if excess <= _SEVERE else 2)

    def _judge(self, level: int) -> None:
        if not level:
            self._bad = 0
            self._good += 1
            if self._good >= _REGAINED:
                self._level = 0
            return
        self._good = 0
        self._bad += 1
        self._levels.append(level)
        if self._bad >= _LOST:
            self._level = sorted(self._levels)[_LOST // 2]


@final
class Punctuality:
    """Whether an agent's own event loop handles beats in time.

    A beat is late if the loop handles it more than max(5 ms, 1/10 beat) after it began. After a
    late beat the agent counts as late until eight beats in a row were punctual.
    """

    __slots__ = ("_good", "late_ns")

    def __init__(self) -> None:
        self.late_ns: int | None = None
        """How late the last beat was handled, in ns; None before the first one."""
        self._good = _REGAINED

    @property
    def late(self) -> bool:
        """Whether one of the last eight beats was late."""
        return self._good < _REGAINED

    def add(self, late_ns: int, beat_ns: int) -> None:
        """Add a beat that was handled ``late_ns`` after it began."""
        self.late_ns = late_ns
        self._good = 0 if is_late(late_ns, beat_ns) else self._good + 1
