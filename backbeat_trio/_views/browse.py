"""What an operator is looking at: the pane, the filters, the selected row, and what keys do.

Nothing here knows a terminal. A key changes the state, and the next drawing shows the change.
"""

from __future__ import annotations

from collections import deque
from typing import Final, Literal, NamedTuple, TypeAlias, final

import msgspec

from .shown import GridView, Outcome, Query, Sort, Timing

Pane: TypeAlias = Literal["operations", "agents", "types"]
Showing: TypeAlias = Literal["list", "history", "help"]
Selected: TypeAlias = tuple[str, str]
"""An agent's id and an operation's id; in the panes of agents and types, an id and nothing."""

PANES: Final[tuple[Pane, ...]] = ("operations", "agents", "types")
_SORTS: Final[dict[Pane, tuple[Sort, ...]]] = {
    "operations": ("used", "left", "age", "agent", "type", "phase", "id"),
    "agents": ("used", "agent", "age"),
    "types": ("type",),
}
_TIMINGS: Final[tuple[Timing | None, ...]] = (None, "late", "slow", "silent", "on_time")
_OUTCOMES: Final[tuple[Outcome | None, ...]] = ("live", "done", "failed", None)
# So many beats are drawn in a sparkline at most.
_SAMPLES: Final = 64
_LONGEST_TEXT: Final = 200

KEYS: Final = (
    ("up down", "select a row; also k and j"),
    ("PgUp PgDn", "a page up or down; Home and End go to the first and the last row"),
    ("Enter", "history of an operation; operations of an agent or a type"),
    ("Esc", "go back, or remove all filters"),
    ("Tab 1 2 3", "operations, agents, types"),
    ("/", "find a text: only rows that contain it are shown"),
    ("t", "only late, slow, silent or on-time operations, or agents with such"),
    ("o", "only live, done or failed operations, or all of them"),
    ("a", "only operations of the selected one's agent, or of all agents"),
    ("y", "only operations of the selected one's type, or of all types"),
    ("s S", "sort by the next column, or by the one before"),
    ("r", "reverse the order"),
    ("p", "pause: the list stays as it is, until p is pressed again"),
    ("Ctrl-L", "draw all of the screen again"),
    ("q Ctrl-C", "quit"),
)
"""The keys, and what each of them does."""

CHOOSING: Final = frozenset({"enter", "a", "y"})
"""The keys that concern the selected row, which is known when it has been drawn."""


class Sample(NamedTuple):
    """What was measured of one beat."""

    lateness: float | None
    """By how many seconds this process was late for it."""
    drift: float | None
    """By which share the tempo of the frames differs from that of the grid."""


class Window(NamedTuple):
    """Which rows of a list the last drawing showed."""

    total: int
    """How many rows the list has."""
    top: int
    """The number of the first row on the screen."""
    cursor: int
    """The number of the selected row."""
    height: int
    """How many rows fit on the screen."""
    selected: Selected | None
    """What the selected row stands for; None if there is no row."""
    kind: str
    """The type of the selected operation; empty if there is none."""


EMPTY: Final = Window(0, 0, 0, 1, None, "")


@final
class Browser:
    """The state of a view.

    Attributes:
      pane: the list that is shown, or lies below the help or a history.
      showing: what fills the screen.
      queries: for each pane, its filters and its order.
      window: which rows the last drawing showed; whoever draws sets it.
      cursor: for each pane, the number of the selected row.
      top: for each pane, the number of the first row on the screen.
      subject: the operation whose history is shown.
      scroll: the number of the first line of the help, or of a history.
      typed: the text that is being typed to find it; None while nothing is typed.
      paused: whether the lists are to stay as they are.
      samples: what was measured of the newest beats.
      notice: a line that is shown instead of the keys; empty if there is none.

    """

    def __init__(self) -> None:
        self.pane: Pane = "operations"
        self.showing: Showing = "list"
        self.queries: dict[Pane, Query] = {
            "operations": Query(sort="used", outcome="live"),
            "agents": Query(),
            "types": Query(sort="type"),
        }
        self.window = EMPTY
        self.cursor: dict[Pane, int] = dict.fromkeys(PANES, 0)
        self.top: dict[Pane, int] = dict.fromkeys(PANES, 0)
        self.subject: Selected | None = None
        self.scroll = 0
        self.typed: str | None = None
        self._text_before = ""
        self.paused = False
        self.samples: deque[Sample] = deque(maxlen=_SAMPLES)
        self.notice = ""
        self._sampled = -1

    @property
    def query(self) -> Query:
        """The filters and the order of the pane that is shown."""
        return self.queries[self.pane]

    def sample(self, grid: GridView) -> None:
        """Take what was measured of the present beat, in place of what was measured before."""
        drift = None
        if grid.measured_bpm and grid.tempo_bpm:
            drift = grid.measured_bpm / grid.tempo_bpm - 1
        if grid.beat == self._sampled:
            self.samples.pop()
        self._sampled = grid.beat
        self.samples.append(Sample(grid.lateness, drift))

    def press(self, key: str) -> bool:
        """Do what a key stands for.

        Args:
          key: the name of the key, as `KeyDecoder` gives it.

        Returns:
          Whether to go on; False if the key ends the view.

        """
        if key == "ctrl-c":
            return False
        self.notice = ""
        if self.typed is not None:
            self._type(key)
        elif key == "q":
            return False
        elif key in ("?", "f1"):
            self._show("list" if self.showing == "help" else "help")
        elif self.showing == "list":
            self._press_in_list(key)
        else:
            self._press_in_text(key)
        return True

    def _show(self, showing: Showing) -> None:
        self.showing = showing
        self.scroll = 0

    def _type(self, key: str) -> None:
        assert self.typed is not None
        if key == "enter":
            self.typed = None
            return
        if key == "escape":
            self.typed, text = None, self._text_before
        elif key == "backspace":
            self.typed = text = self.typed[:-1]
        elif key == "ctrl-u":
            self.typed = text = ""
        elif len(key) == 1 and len(self.typed) < _LONGEST_TEXT:
            self.typed = text = self.typed + key
        else:
            return
        self._filter(text=text)

    def _press_in_text(self, key: str) -> None:
        if key in ("escape", "enter", "backspace", "left"):
            self._show("list")
        else:
            self.scroll = self._moved(self.scroll, key)

    def _moved(self, row: int, key: str) -> int:
        window = self.window
        steps = {
            "up": -1,
            "k": -1,
            "down": 1,
            "j": 1,
            "pageup": -window.height,
            "pagedown": window.height,
            "home": -window.total,
            "end": window.total,
        }
        return max(0, min(row + steps.get(key, 0), window.total - 1))

    def _press_in_list(self, key: str) -> None:
        query = self.query
        if key in ("tab", "backtab"):
            step = 1 if key == "tab" else -1
            self._open(PANES[(PANES.index(self.pane) + step) % len(PANES)])
        elif key in ("1", "2", "3"):
            self._open(PANES[int(key) - 1])
        elif key == "enter":
            self._enter()
        elif key == "p":
            self.paused = not self.paused
        elif key == "/":
            self.typed = self._text_before = query.text
        elif key == "escape":
            self._filter(text="", agent="", type="", phase="", timing=None)
        elif key == "r":
            self._filter(reverse=not query.reverse)
        elif key in ("s", "S"):
            sorts = _SORTS[self.pane]
            self._filter(sort=_after(sorts, query.sort, 1 if key == "s" else -1))
        elif key == "t" and self.pane != "types":
            self._filter(timing=_after(_TIMINGS, query.timing))
        elif key in ("o", "a", "y") and self.pane == "operations":
            self._press_in_operations(key)
        else:
            cursor = self._moved(self.window.cursor, key)
            self.cursor[self.pane] = cursor
            self.top[self.pane] = self.window.top
            self.window = self.window._replace(cursor=cursor)

    def _press_in_operations(self, key: str) -> None:
        query, selected = self.query, self.window.selected
        if key == "o":
            self._filter(outcome=_after(_OUTCOMES, query.outcome))
        elif key == "a" and (query.agent or selected):
            self._filter(agent="" if query.agent or not selected else selected[0])
        elif key == "y" and (query.type or self.window.kind):
            self._filter(type="" if query.type else self.window.kind)

    def _open(self, pane: Pane) -> None:
        self.pane = pane
        self.window = EMPTY

    def _filter(self, **changes: object) -> None:
        # The rows are others now, so none of them is still the selected one.
        self.queries[self.pane] = msgspec.structs.replace(self.query, **changes)
        self.cursor[self.pane] = self.top[self.pane] = 0

    def _enter(self) -> None:
        selected = self.window.selected
        if selected is None:
            return
        if self.pane == "operations":
            self.subject = selected
            self._show("history")
            return
        which = "agent" if self.pane == "agents" else "type"
        self._open("operations")
        self._filter(**{which: selected[0]})


def _after(values: tuple[object, ...], value: object, step: int = 1) -> object:
    return values[(values.index(value) + step) % len(values)]
