"""The lists of operations, agents and types: their columns, and which of them fit.

Each column has a rank. The columns of the lowest ranks come first where a terminal is too narrow
for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Generic, NamedTuple, TypeVar

from rich.text import Text

from .cells import Glyphs, Piece, bar, fit, sparkline
from .shown import AgentView, OperationView, TypeView, clean

T = TypeVar("T")

_BAR_CELLS: Final = 10
# What is above it has no room in its column, and is as bad.
_MOST_USED: Final = 9.99
# More of a text is never worth showing in a list.
_WIDEST: Final = 400

_STYLES: Final = {"on_time": "green", "slow": "yellow", "late": "bold red", "silent": "magenta"}
_DIM: Final = "dim"


class Column(NamedTuple, Generic[T]):
    """A column of a list."""

    title: str
    rank: int
    """Columns of a lower rank are kept longer."""
    width: int
    """Its width in cells; if it is flexible, the least width."""
    cell: Callable[[T, Glyphs], Piece]
    """Gives the text of a cell and its style."""
    right: bool = False
    """Whether its texts are at the right end."""
    widest: int = 0
    """Up to which width it takes what other columns leave; 0 if it is not flexible."""
    last: bool = False
    """Whether it is shown only if all other columns have their greatest width."""


def verdict(operation: OperationView) -> Piece:
    """Return how an operation is doing, in a word or two and a style."""
    timing = operation.timing.replace("_", " ")
    if operation.outcome == "failed":
        return "failed", "red"
    if operation.outcome == "done":
        return ("done" if timing == "on time" else f"done {timing}"), _DIM
    return timing, _STYLES[operation.timing]


def used(operation: OperationView) -> str:
    """Return how much of its budget an operation has used, in percent, with + for "or more"."""
    if operation.used is None:
        return "-"
    return f"{min(operation.used, _MOST_USED):.0%}{'+' if operation.at_least else ''}"


def _bar(operation: OperationView, glyphs: Glyphs) -> Piece:
    style = _STYLES[operation.timing]
    return bar(operation.used or 0.0, _BAR_CELLS, glyphs), style if operation.live else _DIM


def _beats(operation: OperationView, glyphs: Glyphs) -> Piece:
    estimated = "?" if operation.estimated is None else f"{operation.estimated}"
    return f"{operation.passed}{'+' if operation.at_least else ''}/{estimated}", ""


def health(agent: AgentView) -> Piece:
    """Return how an agent is doing, in a word and a style."""
    if agent.silent:
        return "silent", _STYLES["silent"]
    if agent.healthy is None:
        return "unknown", _STYLES["slow"]
    return ("healthy", _STYLES["on_time"]) if agent.healthy else ("unhealthy", _STYLES["late"])


def _count(number: int, style: str = "") -> Piece:
    return (f"{number:,}", style) if number else ("-", _DIM)


OPERATIONS: Final[tuple[Column[OperationView], ...]] = (
    Column("timing", 0, 9, lambda row, _: verdict(row)),
    Column("budget", 6, _BAR_CELLS, _bar),
    Column("used", 2, 5, lambda row, _: (used(row), ""), right=True),
    Column("left", 4, 5, lambda row, _: (f"{row.beats_left}", ""), right=True),
    Column("beats", 8, 9, _beats, right=True),
    Column("type", 5, 12, lambda row, _: (clean(row.type), ""), widest=18),
    Column("phase", 7, 11, lambda row, _: (clean(row.phase), "")),
    Column("agent", 3, 9, lambda row, _: (clean(row.agent_id), ""), widest=20),
    Column("operation", 1, 11, lambda row, _: (clean(row.id), ""), widest=32),
    Column("notes", 9, 16, lambda row, _: (clean(row.notes), _DIM), widest=_WIDEST, last=True),
)

AGENTS: Final[tuple[Column[AgentView], ...]] = (
    Column("health", 0, 9, lambda row, _: health(row)),
    Column("agent", 1, 10, lambda row, _: (clean(row.agent_id), ""), widest=32),
    Column("live", 2, 6, lambda row, _: _count(row.live), right=True),
    Column("late", 3, 5, lambda row, _: _count(row.late, _STYLES["late"]), right=True),
    Column("slow", 4, 5, lambda row, _: _count(row.slow, _STYLES["slow"]), right=True),
    Column(
        *("silent", 5, 6, lambda row, _: _count(row.silent_operations, _STYLES["silent"]), True)
    ),
    Column("beat", 6, 10, lambda row, _: (f"{row.last_beat}", ""), right=True),
    Column("state", 8, 9, lambda row, _: (clean(row.state), "")),
    Column("notes", 7, 16, lambda row, _: (clean(row.notes), _DIM), widest=_WIDEST, last=True),
)


def _spread(row: TypeView, glyphs: Glyphs) -> Piece:
    return sparkline(row.used, max(1, *row.used), glyphs) if any(row.used) else "-", ""


TYPES: Final[tuple[Column[TypeView], ...]] = (
    Column("type", 0, 12, lambda row, _: (clean(row.type), ""), widest=40),
    Column("live", 1, 7, lambda row, _: _count(row.live), right=True),
    Column("late", 2, 7, lambda row, _: _count(row.late, _STYLES["late"]), right=True),
    Column("done", 3, 9, lambda row, _: _count(row.done), right=True),
    Column("failed", 4, 7, lambda row, _: _count(row.failed, "red"), right=True),
    Column("budget used", 5, 11, _spread),
)


def _choose(columns: Sequence[Column[T]], width: int) -> list[tuple[Column[T], int]]:
    """Return the columns that fit, in their order, with the width of each."""
    kept: list[Column[T]] = []
    widths: dict[str, int] = {}
    left = width + 1
    for column in sorted(columns, key=lambda column: (column.last, column.rank)):
        if column.last:
            left = _widen(kept, widths, left)
        if column.width + 1 > left and kept:
            break
        kept.append(column)
        widths[column.title] = column.width
        left -= column.width + 1
    _widen(kept, widths, left)
    return [(column, widths[column.title]) for column in columns if column in kept]


def _widen(columns: Sequence[Column[T]], widths: dict[str, int], left: int) -> int:
    """Share what is left among the flexible columns, and return what none of them wants."""
    flexible = [column for column in columns if column.widest]
    for number, column in enumerate(flexible):
        # What one does not need is for those that come later.
        share = max(0, left // (len(flexible) - number))
        more = min(share, column.widest - widths[column.title])
        widths[column.title] += more
        left -= more
    return left


def draw_table(
    columns: Sequence[Column[T]], rows: Sequence[T], selected: int, width: int, glyphs: Glyphs
) -> list[Text]:
    """Draw the titles of the columns, and the rows below them.

    Args:
      columns: the columns, in their order.
      rows: the rows on the screen.
      selected: the number of the selected one of them.
      width: the width of the screen in cells.
      glyphs: the characters to draw with.

    """
    chosen = _choose(columns, max(0, width - 2))
    titles = " ".join(
        fit(column.title, size, glyphs, right=column.right) for column, size in chosen
    )
    lines = [Text(f"  {titles}", style="bold", end="", no_wrap=True)]
    for number, row in enumerate(rows):
        here = number == selected
        line = Text(f"{glyphs.mark} " if here else "  ", end="", no_wrap=True)
        for place, (column, size) in enumerate(chosen):
            text, style = column.cell(row, glyphs)
            line.append(" " if place else "")
            line.append(fit(text, size, glyphs, right=column.right), style)
        if here:
            line.stylize("reverse")
        lines.append(line)
    return lines
