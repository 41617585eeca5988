"""How punctual the frames and an agent's own loop are. Pure: times are passed in."""

from __future__ import annotations

import statistics
from collections import deque
from typing import Final, Literal, TypeAlias, final

TempoDrift: TypeAlias = Literal["unknown", "acceptable", "elevated", "severe"]

# Frames without which there is no verdict, bad ones by which it is lost, good ones to regain it.
_VERDICT: Final = 8
_LOST: Final = 3
_REGAINED: Final = 8
_SEVERE: Final = 10

_TEMPO: Final = 0.001
_PHASE: Final = 0.01
_PHASE_NS: Final = 2_000_000
# How many frames are looked back on, and no fewer than come in so many nanoseconds.
_FRAMES: Final = 64
_LEAST_NS: Final = 4_000_000_000

_LATE: Final = 0.1
# Trio's own timers are good for a millisecond: at fast tempos a tenth of a beat is less than that.
_LATE_NS: Final = 5_000_000


def is_late(late_ns: int, beat_ns: int) -> bool:
    """Tell whether what waited for an agent's own loop waited for longer than it may."""
    return late_ns > max(_LATE_NS, _LATE * beat_ns)


def tolerance_ns(beat_ns: int) -> float:
    """Return what a frame, or a position, may be off by: max(2 ms, 1 % of a beat)."""
    return max(_PHASE_NS, _PHASE * beat_ns)


@final
class Drift:
    """How far the frames are from the grid that they announce.

    A frame is good while tempo and phase are: the tempo of the last frames within 0.1 % of the
    announced one, and its own arrival within max(2 ms, 1 % of a beat) of its beat. A tempo error is
    none while it amounts to less than that over all the frames it was measured by. Three bad frames
    in a row end what is acceptable, eight good ones restore it; over ten times too much is severe.
    """

    __slots__ = ("_bad", "_good", "_heard", "_level", "_levels", "_points", "jitter_ns")

    def __init__(self) -> None:
        self.jitter_ns: float = 0.0
        """How irregularly frames come (RFC 3550, section 6.4.1)."""
        self.clear()

    def clear(self) -> None:
        """Forget the frames, as another grid is followed."""
        self._points: deque[tuple[int, int, int]] = deque(maxlen=_FRAMES)
        self._levels: deque[int] = deque(maxlen=_LOST)
        self._heard = self._good = self._bad = self._level = 0

    @property
    def rate(self) -> float | None:
        """How fast the frames come, as a part of what they announce; None before there are two."""
        if len(self._points) < 2:
            return None
        due, arrived, _ = zip(*self._points, strict=True)
        if arrived[-1] <= arrived[0]:
            return None
        # Differences, as floats cannot hold the instants themselves.
        return statistics.linear_regression(
            [instant - arrived[0] for instant in arrived], [instant - due[0] for instant in due]
        ).slope

    @property
    def verdict(self) -> TempoDrift:
        """What is to be said of the frames."""
        if self._heard < _VERDICT:
            return "unknown"
        return ("acceptable", "elevated", "severe")[self._level]

    def add(self, due_ns: int, received_ns: int, late_ns: int, beat_ns: int) -> None:
        """Take in a frame.

        Args:
          due_ns: when its beat begins, in cluster time.
          received_ns: when it came, in local time.
          late_ns: by how much that was after the beat, as far as this agent knows; 0 or more.
          beat_ns: the length of a beat.

        """
        self._heard += 1
        points = self._points
        if points:
            self.jitter_ns += (abs(late_ns - points[-1][2]) - self.jitter_ns) / 16
        # Frames that come quickly are thinned out, so that few span a time that is long enough.
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
    """Whether an agent's own loop gets round to its beats in time.

    A beat is late when more than a tenth of it has passed, and 5 ms; eight punctual ones in a row
    are needed to be believed again.
    """

    __slots__ = ("_good",)

    def __init__(self) -> None:
        self._good = _REGAINED

    @property
    def late(self) -> bool:
        """Whether one of the last beats was late."""
        return self._good < _REGAINED

    def add(self, late_ns: int, beat_ns: int) -> None:
        """Take in how late a beat was."""
        self._good = 0 if is_late(late_ns, beat_ns) else self._good + 1
