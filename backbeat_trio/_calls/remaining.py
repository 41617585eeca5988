"""What is left of the running task's budget, as numbers and as a sentence."""

from __future__ import annotations

import math
from typing import Final

from msgspec import Struct

from .._wire import format_bpm

# A unit of time, how many seconds it has, and up to how many seconds it is the one to use.
_UNITS: Final = (
    ("second", 1, 90),
    ("minute", 60, 90 * 60),
    ("hour", 3600, 36 * 3600),
    ("day", 86_400, math.inf),
)


class Remaining(Struct, frozen=True):
    """What is left of a task's budget; ``str`` makes a sentence of it, to put into a prompt.

    It is what was left when it was made, and does not change.

    Attributes:
      beats: the number of beats until the nearest deadline; 0.0 if it is past, ``inf`` if there is
        none. A deadline in seconds counts at the present tempo. While the grid is paused, it does
        not count.
      seconds: the number of seconds until the nearest deadline, at the present tempo; ``inf`` if
        there is none. While the grid is paused, only a deadline in seconds counts, because beats do
        not pass.
      paused: whether the grid is paused.
      soft_beats: the number of beats until the nearest soft edge; 0.0 if it has passed, ``inf`` if
        there is none before the deadline.
      tempo_bpm: the present tempo in beats per minute; 0 while the grid is paused.

    """

    beats: float
    seconds: float
    paused: bool
    soft_beats: float
    tempo_bpm: float

    def __str__(self) -> str:
        if not self.beats or not self.seconds:
            return "no time left"
        if self.beats == self.seconds == math.inf:
            text = "no limit"
        elif self.beats == math.inf:
            text = f"{_about(self.seconds)} left"
        else:
            text = f"{_beats(self.beats)} left"
            if not self.paused:
                text += f", {_about(self.seconds)} at {_tempo(self.tempo_bpm)}"
        if self.paused and self.beats != math.inf:
            text += "; the grid is paused, and no beats pass until it resumes"
            if self.seconds != math.inf:
                text += f"; {_about(self.seconds)} left in any case"
        if not self.soft_beats:
            text += "; it is time to finish"
        elif self.soft_beats != math.inf:
            text += f"; finish within {_beats(self.soft_beats)}"
            if not self.paused:
                text += f", {_about(self.soft_beats * 60 / self.tempo_bpm)}"
        return text


def _beats(beats: float) -> str:
    tenths = round(beats, 1) if beats < 100 else round(beats)
    if not tenths:
        return "less than 0.1 beats"
    return f"{tenths:g} beat{'' if tenths == 1 else 's'}" if tenths < 1e6 else f"{beats:.0f} beats"


def _about(seconds: float) -> str:
    name, unit = next((name, unit) for name, unit, limit in _UNITS if seconds < limit)
    count = round(seconds / unit)
    if not count:
        return "less than a second"
    return f"about {count} {name}{'' if count == 1 else 's'}"


def _tempo(bpm: float) -> str:
    return f"{format_bpm(round(bpm * 1000))} BPM"
