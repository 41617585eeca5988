"""Pieces of a line: cells of a fixed width, bars, tracks and sparklines.

Widths are cells of the terminal. A wide character takes two of them, so `len` is not a width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text


class Glyphs(NamedTuple):
    """The characters to draw with."""

    full: str
    """A full cell of a bar."""
    empty: str
    """An empty one."""
    spark: str
    """The heights of a sparkline, from the lowest to the highest."""
    point: str
    """What moves along a track."""
    rail: str
    """The rest of the track."""
    past: str
    """A beat of the bar that has begun."""
    future: str
    """A beat of the bar that is to come."""
    mark: str
    """What stands before the selected row."""
    cut: str
    """What stands for the rest of a text that is too long."""


UNICODE: Final = Glyphs("█", "░", "▁▂▃▄▅▆▇█", "●", "─", "■", "□", "»", "…")
ASCII: Final = Glyphs("#", ".", "_.,-=+*#", "O", "-", "#", ".", ">", "~")

# What wraps lines wants to have one.
_CONSOLE: Final = Console()

Piece = tuple[str, str]
"""A text and its style."""


def fit(text: str, width: int, glyphs: Glyphs, *, right: bool = False) -> str:
    """Return a text cut or padded to a width.

    Args:
      text: the text, without control characters.
      width: the width in cells, 0 or more.
      glyphs: the characters to draw with.
      right: whether the text is at the right end.

    """
    length = cell_len(text)
    if length > width:
        return set_cell_size(text, width - 1) + glyphs.cut if width > 0 else ""
    padding = " " * (width - length)
    return padding + text if right else text + padding


def join(width: int, pieces: Iterable[Piece], gap: int = 2) -> Text:
    """Return a line of as many pieces as fit into a width.

    The first one that does not fit ends the line. If not even the first one fits, it is cut.
    """
    line, length = Text(end="", no_wrap=True), 0
    for text, style in pieces:
        if not text:
            continue
        needed = cell_len(text) + (gap if length else 0)
        if length and length + needed > width:
            break
        line.append(" " * gap if length else "")
        line.append(text, style)
        length += needed
    if length > width:
        line.truncate(width)
    return line


def bar(share: float, width: int, glyphs: Glyphs) -> str:
    """Return a bar of which a share is full.

    Args:
      share: the share, 0 or more; a bar of more than 1 is full.
      width: the width in cells.
      glyphs: the characters to draw with.

    """
    # A share that is less than 1 leaves a cell empty: only what is full looks full.
    full = width if share >= 1 else min(round(share * width), width - 1)
    return glyphs.full * full + glyphs.empty * (width - full)


def track(share: float, width: int, glyphs: Glyphs) -> str:
    """Return a track with a point that has gone a share of the way, from 0 to below 1."""
    place = max(0, min(int(share * width), width - 1))
    return glyphs.rail * place + glyphs.point + glyphs.rail * (width - place - 1)


def sparkline(values: Sequence[float | None], top: float, glyphs: Glyphs) -> str:
    """Return a character for each value, whose height is its share of a top value.

    Args:
      values: the values; None leaves a gap.
      top: what is drawn with the full height, more than 0.
      glyphs: the characters to draw with.

    """
    levels = glyphs.spark
    highest = len(levels) - 1
    return "".join(
        " " if value is None else levels[max(0, min(round(value / top * highest), highest))]
        for value in values
    )


def wrap(text: str, width: int) -> list[str]:
    """Return a text in lines of a width, 2 or more, which end between words if possible."""
    return [line.plain.rstrip() for line in Text(text).wrap(_CONSOLE, width)]
