"""How long ago something was heard, in beats.

Indexes of beats do not tell it: the position may move to another grid, and an agent may count on a
grid of its own. So ages count *elapsed beats*, which go on with the position of this process. They
stand still in a pause, and pass over a move to another grid.
"""

from __future__ import annotations

import math
from typing import Final, final

from .shown import GridView

SILENT_BEATS: Final = 3
"""How many claims must be missing before something is silent, in intervals between claims."""

# Less than this is no silence at a fast tempo either: messages take some time, and so do views.
_SILENT_SECONDS: Final = 1.0
# More than what sums of fractions of beats are wrong by.
_ROUNDING: Final = 1e-6


@final
class Ages:
    """The elapsed beats of this process, and since when it can hear claims."""

    __slots__ = ("_grid", "_heard_since", "_now", "elapsed")

    def __init__(self) -> None:
        self.elapsed: float = 0.0
        """The elapsed beats at the last `set_grid`."""
        self._grid: GridView | None = None
        self._now = 0.0
        self._heard_since = 0.0

    def set_grid(self, grid: GridView, now: float) -> None:
        """Report the grid at an instant, in seconds of any clock."""
        former = self._grid
        if former is not None:
            # What exceeds the tempo is a move to another grid.
            longest = max(0.0, now - self._now) * max(former.tempo_bpm, grid.tempo_bpm) / 60
            self.elapsed += min(max(0.0, grid.position - former.position), longest)
            if not former.connected:
                self._heard_since = self.elapsed
        self._grid, self._now = grid, now

    def at(self, now: float) -> float:
        """Return the elapsed beats at an instant after the last `set_grid`."""
        if self._grid is None or self._grid.paused:
            return self.elapsed
        return self.elapsed + max(0.0, now - self._now) * self._grid.tempo_bpm / 60

    def silent_before(self, interval: int = 1) -> float:
        """Return the instant that makes silent what was not heard after it, in elapsed beats.

        Nothing is silent in a pause, while there is no connection, and until it could have been
        heard for long enough since then.

        Args:
          interval: how often claims are due, in beats.

        """
        grid = self._grid
        if grid is None or grid.paused or not grid.connected:
            return -math.inf
        patience = max(SILENT_BEATS * interval, _SILENT_SECONDS * grid.tempo_bpm / 60)
        before = self.elapsed - patience + _ROUNDING
        return -math.inf if self._heard_since > before else before
