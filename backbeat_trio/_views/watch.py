"""What ``backbeat watch`` draws: a screen, as a function of the model, the view, size and time.

A screen is a list of lines, none of them wider than the screen. Everything that came from another
process goes through `clean` and becomes a `Text`, so that markup and escape sequences in it are
shown and never interpreted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple, final

import msgspec
from rich.cells import cell_len
from rich.text import Text

from .browse import KEYS, Browser, Selected, Window
from .cells import Glyphs, Piece, bar, join, sparkline, track, wrap
from .lists import AGENTS, OPERATIONS, TYPES, draw_table, used, verdict
from .reader import Source
from .shown import GridView, OperationView, Query, Totals, TypeView, clean

# A screen of at least so many rows has all lines of the header.
_TALL: Final = 16
# From so many columns on, there is room for the names of all panes.
_WIDE: Final = 80
_BEAT_CELLS: Final = 8
_BAR_CELLS: Final = 16
_SPARK_CELLS: Final = 16
_BUDGET_CELLS: Final = 20
_NAME_CELLS: Final = 10
_LONG_TEXT: Final = 2000
# A sparkline of what is less than this is flat: nobody needs to see noise.
_LEAST_LATENESS: Final = 0.002
_LEAST_DRIFT: Final = 0.001

_GOOD: Final = "green"
_BAD: Final = "bold red"
_WARN: Final = "yellow"
_DIM: Final = "dim"
_BOLD: Final = "bold"
_DRIFTS: Final = {"acceptable": _GOOD, "elevated": _WARN, "severe": _BAD}
_GRIDS: Final = {"locked": _GOOD, "holdover": _WARN, "local": _BAD}

_RULES: Final = (
    ("on time", "within its budget, and before its soft edge"),
    ("slow", "past its soft edge: it should wind down"),
    ("late", "past its budget: it has taken more beats than estimated"),
    ("silent", "no claim for three beats, and the cluster was not paused"),
)
_HINTS: Final = (
    ("? help", _BOLD),
    ("/ find", ""),
    ("t timing", ""),
    ("s sort", ""),
    ("p pause", ""),
    ("enter history", ""),
    ("tab pane", ""),
    ("o outcome", ""),
    ("a agent", ""),
    ("y type", ""),
    ("r reverse", ""),
    ("q quit", ""),
)


class Screen(NamedTuple):
    """What is drawn."""

    lines: list[Text]
    """A line for each row of the screen."""
    window: Window
    """Which rows of the list are among them."""


def draw(
    source: Source,
    browser: Browser,
    size: tuple[int, int],
    position: float,
    *,
    cluster_id: str,
    glyphs: Glyphs,
) -> Screen:
    """Draw a screen.

    Args:
      source: what is known of the cluster.
      browser: what the operator looks at.
      size: the columns and the rows of the screen, each 1 or more.
      position: the present position on the grid, in beats.
      cluster_id: the id of the cluster.
      glyphs: the characters to draw with.

    Returns:
      A line for each row of the screen, and the rows of the list that are among them.

    """
    width, height = size
    pen = _Pen(source, browser, width, height, position, cluster_id, glyphs)
    if browser.showing == "list":
        lines, window = pen.listed()
    elif browser.showing == "history":
        lines, window = pen.scrolled(*pen.history())
    else:
        lines, window = pen.scrolled(*pen.help())
    del lines[height:]
    lines += [Text(end="")] * (height - len(lines))
    for line in lines:
        # Some columns and lines have a least width, which a tiny screen does not have.
        if cell_len(line.plain) > width:
            line.truncate(width)
    return Screen(lines, window)


@final
class _Pen:
    # All that `draw` has been given, for the functions that draw a part each.

    def __init__(
        self,
        source: Source,
        browser: Browser,
        width: int,
        height: int,
        position: float,
        cluster_id: str,
        glyphs: Glyphs,
    ) -> None:
        self.source = source
        self.browser = browser
        self.width = width
        self.height = height
        self.position = position
        self.cluster_id = cluster_id
        self.glyphs = glyphs
        self.tall = height >= _TALL

    def _join(self, *pieces: Piece, gap: int = 2) -> Text:
        return join(self.width, pieces, gap)

    # The header.

    def header(self) -> list[Text]:
        grid, totals = self.source.grid, self.source.totals()
        if grid is None:
            return [self._join(("waiting for the grid", _WARN), (self.cluster_id, ""))]
        lines = [self._beat(grid), self._leader(grid)]
        refused = self._join(("permissions keep all claims from this user", _BAD))
        if not self.tall:
            operations = self._operations(totals, short=True)
            return [*lines, refused if grid.claims_refused else operations]
        lines += [self._clock(grid), self._operations(totals), self._agents(totals)]
        if grid.claims_refused:
            lines.append(refused)
        if grid.errors:
            lines.append(self._join((f"error: {clean(grid.errors[-1])}", _BAD)))
        return lines

    def _beat(self, grid: GridView) -> Text:
        beat = math.floor(self.position)
        length = max(1, grid.beats_per_bar)
        in_bar = self.position % length
        cells = min(length, _BAR_CELLS)
        begun = int(in_bar / length * cells) + 1
        past, future = self.glyphs.past * begun, self.glyphs.future * (cells - begun)
        pulse = track(self.position - beat, _BEAT_CELLS, self.glyphs)
        tempo = ("paused", _WARN) if grid.paused else (f"{grid.tempo_bpm:g} BPM", _BOLD)
        # The downbeat stands out.
        style = f"{_BOLD} cyan" if int(in_bar) == 0 else "cyan"
        return self._join(
            (f"beat {beat}", _BOLD),
            (pulse, style),
            tempo,
            *(() if self.tall else ((grid.grid, _GRIDS[grid.grid]),)),
            (f"bar {beat // length}", ""),
            (past + future, "cyan"),
            (self.cluster_id, _DIM),
        )

    def _leader(self, grid: GridView) -> Text:
        leader: Piece = ("no leader", _BAD)
        if grid.leader_id is not None:
            leader = (f"leader {clean(grid.leader_id)}", _BOLD)
        standbys: Piece = ("", "")
        if grid.standbys is not None:
            word = "standby" if grid.standbys == 1 else "standbys"
            standbys = (f"{grid.standbys} {word}", "" if grid.standbys else _WARN)
        connected: Piece = ("connected", _GOOD) if grid.connected else ("not connected", _BAD)
        pending = [
            (
                f"{'next' if number == 0 else 'then'}: "
                + (f"{change.tempo_bpm:g} BPM" if change.tempo_bpm else "pause")
                + f" from beat {change.beat}",
                _WARN,
            )
            for number, change in enumerate(grid.pending)
        ]
        if not self.tall:
            return self._join(connected, leader, standbys, *pending)
        epoch = "" if grid.epoch is None else f"epoch {grid.epoch}"
        return self._join(
            connected,
            (f"grid {grid.grid}", _GRIDS[grid.grid]),
            leader,
            (epoch, ""),
            standbys,
            *pending,
        )

    def _clock(self, grid: GridView) -> Text:
        samples = list(self.browser.samples)[-_SPARK_CELLS:]
        pieces: list[Piece] = []
        late = [sample.lateness for sample in samples]
        if known := [value for value in late if value is not None]:
            line = sparkline(late, max(_LEAST_LATENESS, *known), self.glyphs)
            text = f"lateness {line} {_seconds(known[-1])}, at most {_seconds(max(known))}"
            pieces.append((text, ""))
        pieces.append((f"drift {grid.tempo_drift}", _DRIFTS.get(grid.tempo_drift, _DIM)))
        drifts = [None if sample.drift is None else abs(sample.drift) for sample in samples]
        if known := [value for value in drifts if value is not None]:
            line = sparkline(drifts, max(_LEAST_DRIFT, *known), self.glyphs)
            pieces.append((f"{line} {known[-1]:.2%}", ""))
        if grid.uncertainty is not None:
            pieces.append((f"uncertainty {_seconds(grid.uncertainty)}", ""))
        if grid.last_frame_age is not None:
            pieces.append((f"last frame {grid.last_frame_age:.1f} s ago", ""))
        return self._join(*pieces)

    def _operations(self, totals: Totals, *, short: bool = False) -> Text:
        counts: list[Piece] = [
            (f"{number:,} {word}", style if number else _DIM)
            for number, word, style in (
                (totals.late, "late", _BAD),
                (totals.silent, "silent", "magenta"),
                (totals.slow, "slow", _WARN),
                (totals.on_time, "on time", _GOOD),
                (totals.done, "done", ""),
                (totals.failed, "failed", "red"),
            )
        ]
        live: Piece = (f"{totals.live:,} live", _BOLD)
        if not short:
            return self._join(("operations", _BOLD), live, *counts)
        # There is little room, so what is not well comes first.
        bad = totals.agents_unhealthy + totals.agents_silent
        agents: Piece = (f"{bad:,} agents not ok", _BAD) if bad else ("", "")
        late, silent, slow, *others = counts
        left_out = self._left_out(totals)
        return self._join(late, silent, agents, slow, live, *left_out, *others, gap=1)

    def _agents(self, totals: Totals) -> Text:
        return self._join(
            ("agents", _BOLD),
            (f"{totals.agents:,} known", _BOLD),
            (f"{totals.agents_unhealthy:,} unhealthy", _BAD if totals.agents_unhealthy else _DIM),
            (f"{totals.agents_silent:,} silent", "magenta" if totals.agents_silent else _DIM),
            *self._left_out(totals),
            (f"{totals.claims:,} claims heard", _DIM),
        )

    def _left_out(self, totals: Totals) -> list[Piece]:
        if not totals.dropped_agents and not totals.dropped_operations:
            return []
        operations, agents = totals.dropped_operations, totals.dropped_agents
        return [(f"left out: {operations:,} operations, {agents:,} agents", _WARN)]

    # The list.

    def listed(self) -> tuple[list[Text], Window]:
        lines = self.header()
        # A line for the panes, one for the titles of columns and one for the keys.
        rows = max(1, self.height - len(lines) - 3)
        pane, browser = self.browser.pane, self.browser
        query, cursor, top = browser.query, browser.cursor[pane], browser.top[pane]
        top = max(min(top, cursor), cursor - rows + 1)
        while True:
            wanted = msgspec.structs.replace(query, offset=top, limit=rows)
            total, table, keys, kind = self._table(wanted, cursor - top)
            lowest = max(0, total - rows)
            if cursor < max(1, total) and top <= lowest:
                break
            # There are fewer rows than when the cursor was moved.
            cursor, top = min(cursor, max(0, total - 1)), min(top, lowest)
        window = Window(total, top, cursor, rows, keys, kind)
        lines.append(self._status(query, window))
        lines += table
        lines += [Text(end="")] * (self.height - 1 - len(lines))
        del lines[max(1, self.height - 1) :]
        lines.append(self._footer())
        return lines, window

    def _table(self, query: Query, selected: int) -> tuple[int, list[Text], Selected | None, str]:
        width, glyphs = self.width, self.glyphs
        if self.browser.pane == "operations":
            page = self.source.operations(query)
            table = draw_table(OPERATIONS, page.items, selected, width, glyphs)
            if selected < len(page.items):
                row = page.items[selected]
                return page.total, table, (row.agent_id, row.id), row.type
            return page.total, table, None, ""
        if self.browser.pane == "agents":
            agents = self.source.agents(query)
            table = draw_table(AGENTS, agents.items, selected, width, glyphs)
            found = agents.items[selected].agent_id if selected < len(agents.items) else ""
            return agents.total, table, (found, "") if found else None, ""
        types = _types(self.source.types(), query)
        shown = types[query.offset : query.offset + query.limit]
        table = draw_table(TYPES, shown, selected, width, glyphs)
        kind = shown[selected].type if selected < len(shown) else ""
        return len(types), table, (kind, "") if shown else None, kind

    def _status(self, query: Query, window: Window) -> Text:
        browser, wide = self.browser, self.width >= _WIDE
        panes: list[Piece] = []
        for number, pane in enumerate(browser.queries, 1):
            if pane == browser.pane:
                panes.append((f"[{number} {pane}]" if wide else pane, f"{_BOLD} reverse"))
            elif wide:
                panes.append((f"{number} {pane}", ""))
        last = min(window.top + window.height, window.total)
        shown = f"{window.top + 1}-{last} of {window.total:,}" if window.total else "none"
        filters = [
            clean(text)
            for text in (
                query.outcome or "",
                (query.timing or "").replace("_", " "),
                f"type {query.type}" if query.type else "",
                f"agent {query.agent}" if query.agent else "",
                f"phase {query.phase}" if query.phase else "",
                f'"{query.text}"' if query.text else "",
            )
            if text
        ]
        by_trouble = browser.pane == "agents" and query.sort == "used"
        order = f"by {'trouble' if by_trouble else query.sort}"
        return self._join(
            *panes,
            ("PAUSED" if browser.paused else "", f"{_WARN} reverse"),
            (shown, _BOLD),
            (" + ".join(filters), "cyan"),
            (f"{order}, reversed" if query.reverse else order, _DIM),
        )

    def _footer(self) -> Text:
        browser = self.browser
        if browser.typed is not None:
            return self._join(
                (f"find: {browser.typed}_", _BOLD), ("enter keeps it, esc drops it", _DIM)
            )
        if browser.notice:
            return self._join((clean(browser.notice), _WARN))
        return self._join(*_HINTS)

    # What is read and not chosen from.

    def history(self) -> tuple[str, list[Text]]:
        subject = self.browser.subject
        assert subject is not None
        row = self.source.operation(*subject)
        title = f"history of {clean(subject[1])}"
        if row is None:
            return title, [self._join(("This operation is no longer kept.", _WARN))]
        word, style = verdict(row)
        estimated = "unknown" if row.estimated is None else f"{row.estimated} beats"
        passed = f"{row.passed}{'+' if row.at_least else ''}"
        budget = bar(row.used or 0.0, _BUDGET_CELLS, self.glyphs)
        facts = [
            ("operation", clean(row.id, _LONG_TEXT), _BOLD),
            ("agent", clean(row.agent_id), ""),
            ("type", clean(row.type, _LONG_TEXT), ""),
            ("timing", word, style),
            ("phase", clean(row.phase), ""),
            ("budget", f"{budget} {used(row)}", style),
            ("", f"{passed} beats passed of {estimated}, {row.beats_left} left", ""),
            ("began", f"beat {row.start_beat}{' or before' if row.at_least else ''}", ""),
            ("last claim", f"beat {row.last_beat}{self._ago(row)}", ""),
            ("soft edge", "passed" if row.soft else "not passed", _WARN if row.soft else ""),
            ("peers", "unknown" if row.peers is None else f"{row.peers}", ""),
            ("parent", clean(row.parent) if row.parent else "none", ""),
            ("whole", clean(row.correlation_id) if row.correlation_id else "itself", ""),
            ("notes", clean(row.notes, _LONG_TEXT), ""),
        ]
        lines = [line for fact in facts for line in self._fact(*fact)]
        lines.append(Text(end=""))
        lines.append(Text("beat        beats  phase", style=_BOLD, end=""))
        history = row.history
        for number, change in enumerate(history):
            later = history[number + 1].beat if number + 1 < len(history) else row.last_beat
            stay = f"{later - change.beat}"
            line = Text(f"{change.beat:<10} {stay:>6}  ", end="")
            line.append(clean(change.phase), _BOLD if number + 1 == len(history) else "")
            lines.append(line)
        return title, lines

    def _ago(self, row: OperationView) -> str:
        beats = math.floor(self.position) - row.last_beat
        return f", {beats} beats ago" if row.live and beats > 1 else ""

    def _fact(self, name: str, text: str, style: str = "") -> list[Text]:
        lines = []
        for part in wrap(text, max(8, self.width - _NAME_CELLS - 1)) or [""]:
            line = Text(f"{name:<{_NAME_CELLS}} ", style=_DIM, end="")
            line.append(part, style or "not dim")
            lines.append(line)
            name = ""
        return lines

    def help(self) -> tuple[str, list[Text]]:
        lines = [line for keys, text in KEYS for line in self._fact(keys, text)]
        lines += [Text(end=""), Text("What the words mean", style=_BOLD, end="")]
        lines += [line for word, text in _RULES for line in self._fact(word, text)]
        return "help", lines

    def scrolled(self, title: str, lines: Sequence[Text]) -> tuple[list[Text], Window]:
        head = [] if self.source.grid is None else [self._beat(self.source.grid)]
        head.append(self._join((title, f"{_BOLD} reverse")))
        rows = max(1, self.height - len(head) - 1)
        # The last line stays at the bottom.
        top = max(0, min(self.browser.scroll, len(lines) - rows))
        shown = [*head, *lines[top : top + rows]]
        shown += [Text(end="")] * (self.height - 1 - len(shown))
        more = f"{len(lines) - top - rows} more lines below" if top + rows < len(lines) else ""
        shown.append(self._join(("esc back", _BOLD), (more, _WARN), ("q quit", "")))
        return shown, Window(max(1, len(lines) - rows + 1), top, top, rows, None, "")


def _types(types: Sequence[TypeView], query: Query) -> list[TypeView]:
    found = [row for row in types if query.text.casefold() in row.type.casefold()]
    found.sort(key=lambda row: row.type, reverse=query.reverse)
    return found


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 0.9995 else f"{seconds * 1e3:.3g} ms"
