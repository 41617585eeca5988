"""What ``backbeat watch`` draws and what its keys do, in virtual time and without a terminal."""

from __future__ import annotations

import itertools
from typing import Any

import picture
from msgspec import UNSET
from rich.cells import cell_len
from rich.text import Text

from backbeat_trio import StatusClaim
from backbeat_trio._runtime.health import PendingChange
from backbeat_trio._views.browse import EMPTY, PANES, Browser
from backbeat_trio._views.cells import ASCII, UNICODE, Glyphs, bar, fit, sparkline, track
from backbeat_trio._views.model import ClusterModel, GridView, Query
from backbeat_trio._views.reader import Reader, Source
from backbeat_trio._views.summary import summarize
from backbeat_trio._views.terminal import Painter
from backbeat_trio._views.watch import draw
from backbeat_trio._wire import HEALTH_TASK_ID

PICTURE = picture.ROOT / "docs" / "watch.svg"
BEGIN = 12336
HOSTILE = (
    "[red]x[/] \x1b[2J\x1b]0;t\x07\u202egnp\u0007 \N{CJK UNIFIED IDEOGRAPH-4E2D}\u200b"
    + "z" * 1_000
)

# ruff: noqa: E501 - screens are as wide as they are
WIDE = """\
beat 12343  ────●───  60 BPM  bar 1542  ■■■■■■■■  chorus-production
connected  grid locked  leader pulse-a  epoch 7  2 standbys  next: 120 BPM from beat 12352  then: pause from beat 12400
lateness ▂▄▅▇▂▄▅▇ 1.6 ms, at most 1.6 ms  drift acceptable  ▂▂▂▂▂▂▂▂ 0.01%  uncertainty 0.12 ms  last frame 0.2 s ago
operations  4 live  1 late  1 silent  1 slow  1 on time  1 done  0 failed
agents  3 known  1 unhealthy  1 silent  35 claims heard
error: the server does not answer
[1 operations]  2 agents  3 types  1-4 of 4  live  by used
  timing    budget      used  left     beats type               phase       agent                operation
» late      ██████████  140%     0       7/5 election           executing   agent-a              late-1
  slow      ███████░░░   70%     3      7/10 election           executing   agent-b              slow-1
  on time   ████░░░░░░   35%    13      7/20 dht_store          executing   agent-a              fine-1
  silent    ██░░░░░░░░   22%     7       2/9 election           executing   agent-c              silent-1"""
KEYS_LINE = (
    "? help  / find  t timing  s sort  p pause  enter history  tab pane  o outcome  a"
    " agent  y type  r reverse  q quit"
)
NARROW = """\
beat 12343  ────●───  60 BPM  locked
connected  leader pulse-a  2 standbys
1 late 1 silent 2 agents not ok 1 slow
operations  1-4 of 4  live  by used
  timing     used agent      operation
» late       140% agent-a    late-1
  slow        70% agent-b    slow-1
  on time     35% agent-a    fine-1
  silent      22% agent-c    silent-1
? help  / find  t timing  s sort"""
HISTORY = """\
beat 12343  ────●───  60 BPM  bar 1542  ■■■■■■■■  chorus-production
history of done-1
operation  done-1
agent      agent-a
type       election
timing     done
phase      completed
budget     ████████████░░░░░░░░ 62%
           5 beats passed of 8 beats, 3 left
began      beat 12336
last claim beat 12341
soft edge  not passed
peers      3
parent     none
whole      itself
notes      P2P election: completed (peers: 3, node: n)

beat        beats  phase
12336           1  started
12337           1  connecting
12338           3  executing
12341           0  completed"""


def grid_at(position: float, **changes: Any) -> GridView:
    fields: dict[str, Any] = {
        "cluster_id": "chorus-production",
        "position": position,
        "beat": int(position),
        "bar": int(position) // 8,
        "beats_per_bar": 8,
        "tempo_bpm": 60.0,
        "paused": False,
        "grid": "locked",
        "connected": True,
        "leader_id": "pulse-a",
        "epoch": 7,
        "standbys": 2,
        "pending": (PendingChange(12352, 120.0), PendingChange(12400, 0.0)),
        "tempo_drift": "acceptable",
        "measured_bpm": 60.006,
        "uncertainty": 0.00012,
        "last_frame_age": 0.25,
        "lateness": 0.0004 * (1 + int(position) % 4),
        "errors": ("the server does not answer",),
    }
    return GridView(**fields | changes)


def claim(
    agent: str,
    id: str,
    beat: int,
    passed: int,
    estimated: int,
    *,
    phase: str = "executing",
    **more: Any,
) -> StatusClaim:
    state = {"completed": "done", "failed": "failed"}.get(phase, "executing")
    kind = more.setdefault("operation_type", "election")
    more.setdefault("notes", f"P2P {kind}: {phase} (peers: 3, node: n)")
    return StatusClaim(
        agent,
        id,
        beat,
        state,  # type: ignore[arg-type]
        max(0, estimated - passed) if state == "executing" else 0,
        min(1.0, passed / estimated),
        phase=phase,
        peers=3,
        estimated_beats=estimated,
        cluster_id="chorus-production",
        **more,
    )


def health(agent: str, beat: int, state: Any, notes: str) -> StatusClaim:
    return StatusClaim(
        agent, HEALTH_TASK_ID, beat, state, 0, 1.0, notes, cluster_id="chorus-production"
    )


def scene() -> tuple[ClusterModel, Browser]:
    """Return eight beats of a small cluster in which something of everything happens."""
    model, browser = ClusterModel(), Browser()
    for passed in range(8):
        beat = BEGIN + passed
        grid = grid_at(beat + 0.25)
        model.set_grid(grid, float(passed))
        browser.sample(grid)
        claims = [
            claim("agent-a", "late-1", beat, passed, 5),
            claim("agent-a", "fine-1", beat, passed, 20, operation_type="dht_store"),
            claim("agent-b", "slow-1", beat, passed, 10, soft=passed > 4 or UNSET),
        ]
        if passed < 3:
            claims.append(claim("agent-c", "silent-1", beat, passed, 9))
        if passed == 0:
            claims.append(health("agent-a", beat, "executing", "CHORUS P2P healthy"))
            claims.append(health("agent-b", beat, "failed", "CHORUS P2P unhealthy: no peers"))
        if passed < 6:
            phase = ("started", "connecting", "executing", "executing", "executing", "completed")[
                passed
            ]
            claims.append(claim("agent-a", "done-1", beat, passed, 8, phase=phase))
        model.take(claims, float(passed))
    return model, browser


def shown(
    source: Source,
    browser: Browser,
    size: tuple[int, int],
    *,
    glyphs: Glyphs = UNICODE,
    position: float = 12343.6,
) -> list[Text]:
    screen = draw(source, browser, size, position, cluster_id="chorus-production", glyphs=glyphs)
    browser.window = screen.window
    assert len(screen.lines) == size[1]
    assert all(cell_len(line.plain) <= size[0] for line in screen.lines)
    return screen.lines


def make_picture() -> str:
    """Return an SVG of the whole screen of `scene`, with which the guide begins."""
    lines = shown(*scene(), (120, 18))
    return picture.draw(Text("\n").join(lines), "backbeat watch", 120)


def plain(source: Source, browser: Browser, *size: int, **more: Any) -> str:
    columns, rows = size
    lines = shown(source, browser, (columns, rows), **more)
    return "\n".join(line.plain.rstrip() for line in lines)


def pressed(browser: Browser, source: Source, *keys: str) -> str:
    """Press keys one after the other, each after a drawing, and return the last screen."""
    for key in keys:
        plain(source, browser, 120, 40)
        assert browser.press(key)
    return plain(source, browser, 120, 40)


def rows(screen: str) -> list[str]:
    """Return the last words of the rows of a list: the ids of its operations."""
    lines = screen.splitlines()
    begin = next(number for number, line in enumerate(lines) if line.startswith("  timing"))
    return [line.split()[-1] for line in lines[begin + 1 : -1] if line]


def test_a_screen_of_120_by_40() -> None:
    top, bottom = plain(*scene(), 120, 40).split("\n\n", 1)
    assert top == WIDE
    assert bottom.strip("\n") == KEYS_LINE


def test_a_screen_of_40_by_10() -> None:
    assert plain(*scene(), 40, 10) == NARROW


def test_a_history() -> None:
    model, browser = scene()
    screen = pressed(browser, model, "o", "o", "o", "down", "down", "enter")
    assert screen.split("\n\n\n")[0] == HISTORY
    # Back to the same row.
    screen = pressed(browser, model, "escape")
    assert "\n» done  " in screen


def test_the_history_of_an_operation_that_was_first_seen_with_its_budget_spent() -> None:
    model, browser = scene()
    model.take([claim("agent-d", "spent", BEGIN + 7, 9, 5)], 7.0)
    browser.subject, browser.showing = ("agent-d", "spent"), "history"
    screen = plain(model, browser, 120, 40)
    assert "5+ beats passed of 5 beats, 0 left" in screen
    assert f"began      beat {BEGIN + 2} or before\n" in screen


def test_any_size_is_drawn_with_any_pane() -> None:
    model, browser = scene()
    for columns, lines in itertools.product(
        (1, 2, 5, 13, 30, 41, 79, 80, 133, 300), (1, 2, 3, 4, 9, 17)
    ):
        for showing, pane in itertools.product(("list", "history", "help"), PANES):
            browser.showing, browser.pane, browser.subject = showing, pane, ("agent-a", "late-1")  # type: ignore[assignment]
            shown(model, browser, (columns, lines))


def test_before_anything_is_known() -> None:
    assert plain(ClusterModel(), Browser(), 40, 10).startswith(
        "waiting for the grid  chorus-production\n"
    )


def test_columns_go_in_the_order_of_what_matters_least() -> None:
    model, browser = scene()
    kept: list[set[str]] = []
    for columns in range(30, 140):
        titles = plain(model, browser, columns, 12).splitlines()[4].split()
        kept.append(set(titles))
    # A column that a terminal has, a wider one has, too.
    assert all(narrow <= wide for narrow, wide in itertools.pairwise(kept))
    assert kept[0] == {"timing", "used", "operation"}
    assert {"used", "agent"} <= kept[10] < kept[-1]


def test_the_pulse_moves_and_the_downbeat_stands_out() -> None:
    model, browser = scene()
    beats = [
        shown(model, browser, (120, 40), position=12344 + eighth / 8)[0] for eighth in range(17)
    ]
    pulses = [line.plain[12:20] for line in beats]
    assert pulses[:3] == ["●───────", "─●──────", "──●─────"]
    assert pulses[:8] == pulses[8:16]
    assert "bar 1543  ■□□□□□□□" in beats[0].plain
    assert "bar 1543  ■■■□□□□□" in beats[16].plain
    styles = [{str(span.style) for span in line.spans} for line in beats]
    assert "bold cyan" in styles[0]
    assert "bold cyan" not in styles[8]


def test_colours_are_never_all_that_tells_something() -> None:
    model, browser = scene()
    lines = shown(model, browser, (120, 40))
    by_word = {line.plain[2:11].strip(): line for line in lines[7:12]}
    for word, style in (("late", "bold red"), ("slow", "yellow"), ("silent", "magenta")):
        assert any(str(span.style) == style for span in by_word[word].spans)
    assert "paused" in plain(_with_grid(paused=True, tempo_bpm=0.0), browser, 120, 40)
    screen = plain(_with_grid(connected=False, grid="holdover", leader_id=None), browser, 120, 40)
    assert "not connected  grid holdover  no leader" in screen


def _with_grid(**changes: Any) -> ClusterModel:
    model = ClusterModel()
    model.set_grid(grid_at(12343.25, **changes), 0.0)
    return model


def test_what_was_left_out_is_shown() -> None:
    model = ClusterModel(max_agents=2, max_operations=3)
    model.set_grid(grid_at(12343.25), 0.0)
    model.take([claim("agent-a", f"id-{n}", 12343, 0, 5) for n in range(7)], 0.0)
    assert "left out: 4 operations, 0 agents" in plain(model, Browser(), 120, 40)
    assert "left out: 4 operations, 0 agents" in plain(model, Browser(), 80, 10)
    assert "left out: 4 operations, 0 agents" in summarize(model, 12343.5)


def test_refused_claims_are_told_from_an_empty_cluster() -> None:
    text = "permissions keep all claims from this user"
    for refused in (True, False):
        model = _with_grid(claims_refused=refused)
        assert (text in plain(model, Browser(), 120, 40)) is refused
        assert (text in plain(model, Browser(), 60, 10)) is refused
        assert (text in summarize(model, 12343.5)) is refused


def test_filters_combine() -> None:
    model, browser = scene()
    assert rows(pressed(browser, model)) == ["late-1", "slow-1", "fine-1", "silent-1"]
    assert rows(pressed(browser, model, "t")) == ["late-1"]
    assert rows(pressed(browser, model, "t")) == ["slow-1"]
    screen = pressed(browser, model, "escape", "/", *"ELECTION", "enter")
    assert rows(screen) == ["late-1", "slow-1", "silent-1"]
    # The agent and the type of the selected one.
    screen = pressed(browser, model, "o", "o", "o", "a")
    assert rows(screen) == ["late-1", "done-1"]
    assert 'agent agent-a + "ELECTION"' in screen
    assert rows(pressed(browser, model, "a", "y", "t")) == ["late-1"]
    assert rows(pressed(browser, model, "t", "t", "t")) == ["done-1"]
    screen = pressed(browser, model, "escape")
    assert len(rows(screen)) == 5
    assert "ELECTION" not in screen


def test_typing_can_be_taken_back() -> None:
    model, browser = scene()
    screen = pressed(browser, model, "/", *"slowq?", "backspace", "backspace")
    assert "find: slow_" in screen
    assert rows(screen) == ["slow-1"]
    assert len(rows(pressed(browser, model, "escape"))) == 4
    assert rows(pressed(browser, model, "/", *"xx", "ctrl-u", *"fine", "enter")) == ["fine-1"]


def test_rows_are_sorted_and_reversed() -> None:
    model, browser = scene()
    orders = {}
    for _ in range(7):
        screen = pressed(browser, model)
        orders[browser.query.sort] = rows(screen)
        assert f"by {browser.query.sort}" in screen
        pressed(browser, model, "s")
    assert orders["left"] == ["late-1", "slow-1", "silent-1", "fine-1"]
    assert orders["id"] == ["fine-1", "late-1", "silent-1", "slow-1"]
    assert len(orders) == 7
    screen = pressed(browser, model, "S", "r")
    assert rows(screen) == orders["id"][::-1]
    assert "by id, reversed" in screen


def test_agents_and_types_lead_to_their_operations() -> None:
    model, browser = scene()
    assert rows(pressed(browser, model, "tab", "down", "down", "enter")) == ["late-1", "fine-1"]
    # Agents with silent operations only.
    screen = pressed(browser, model, "tab", "t", "t", "t")
    assert "1-1 of 1" in screen
    assert "» silent    agent-c" in screen
    pressed(browser, model, "1", "escape", "3")
    assert rows(pressed(browser, model, "enter")) == ["fine-1"]
    assert "type dht_store" in pressed(browser, model)


def test_only_visible_rows_are_read_and_moving_scrolls() -> None:
    model, browser = ClusterModel(), Browser()
    model.set_grid(grid_at(12343.25), 0.0)
    model.take([claim("agent-a", f"id-{n:03}", 12343, 0, 5) for n in range(100)], 0.0)
    browser.queries["operations"] = Query(sort="id")
    read: list[Query] = []

    class Spy:
        def __getattr__(self, name: str) -> Any:
            return getattr(model, name)

        def operations(self, query: Query) -> Any:
            read.append(query)
            return model.operations(query)

    def look(*keys: str) -> list[str]:
        for key in keys:
            assert browser.press(key)
        return [
            line.split()[-1]
            for line in plain(Spy(), browser, 80, 10).splitlines()
            if " id-" in line
        ]

    assert look() == ["id-000", "id-001", "id-002", "id-003"]
    # Several keys between two drawings.
    assert look("down", "down", "down", "j") == ["id-001", "id-002", "id-003", "id-004"]
    assert look("pagedown") == ["id-005", "id-006", "id-007", "id-008"]
    assert look("end") == ["id-096", "id-097", "id-098", "id-099"]
    assert look("up", "up", "up") == ["id-096", "id-097", "id-098", "id-099"]
    assert look("pageup", "home") == ["id-000", "id-001", "id-002", "id-003"]
    assert {query.limit for query in read} == {4}
    # Fewer rows than before.
    look("end")
    model.take(
        [claim("agent-a", f"id-{n:03}", 12344, 1, 5, phase="completed") for n in range(98)], 1.0
    )
    assert look("o") == ["id-098", "id-099"]


def test_help_lists_all_keys_and_says_what_the_words_mean() -> None:
    model, browser = scene()
    screen = pressed(browser, model, "?")
    for text in ("history of an operation", "q Ctrl-C", "late       past its budget"):
        assert text in screen
    browser.window = EMPTY
    plain(model, browser, 40, 10)
    seen = set()
    for _ in range(40):
        browser.press("down")
        seen.update(plain(model, browser, 40, 10).splitlines())
    assert any("paused" in line for line in seen)
    assert "[1 operations]" in pressed(browser, model, "?")


def test_foreign_text_is_shown_and_not_interpreted() -> None:
    model = ClusterModel()
    model.set_grid(grid_at(12343.25, leader_id=HOSTILE, errors=(HOSTILE,)), 0.0)
    model.take(
        [
            claim("agent-a", HOSTILE, 12343, 0, 5, operation_type=HOSTILE, notes=HOSTILE),
            health("agent-a", 12343, "failed", HOSTILE),
        ],
        0.0,
    )
    browser = Browser()
    painter = Painter(colors=True)
    for keys in ([], ["enter"], ["escape", "2"], ["3"]):
        for key in keys:
            browser.press(key)
        for size in ((40, 10), (200, 50)):
            lines = shown(model, browser, size)
            assert all(line.plain.isprintable() for line in lines)
            sent = painter.paint(lines)
            assert not set(sent) & set("\x07\u202e\u200b\n")
            assert "\x1b]" not in sent
            assert "\x1b[2Jzz" not in sent
        assert any("[red]x[/]" in line.plain for line in lines)
    assert all(line.isprintable() for line in summarize(model, 12343.5).splitlines())


def test_a_terminal_without_utf_8_gets_ascii() -> None:
    model, browser = scene()
    for key in ("", "enter", "?"):
        browser.press(key)
        assert plain(model, browser, 120, 40, glyphs=ASCII).isascii()


def test_only_lines_that_changed_are_sent() -> None:
    model, browser = scene()
    painter = Painter(colors=True)
    first = painter.paint(shown(model, browser, (120, 40)))
    assert first.count("\x1b[K") == 40
    assert painter.paint(shown(model, browser, (120, 40))) == ""
    moved = painter.paint(shown(model, browser, (120, 40), position=12343.8))
    assert moved.startswith("\x1b[1;1H")
    assert moved.count("\x1b[K") == 1
    painter.forget()
    assert painter.paint(shown(model, browser, (120, 40))) == first
    # Without colours other attributes stay.
    sent = Painter(colors=False).paint(shown(model, browser, (120, 40)))
    assert "\x1b[1m" in sent
    assert "31m" not in sent
    assert "32m" not in sent


def test_a_pause_keeps_the_lists_and_not_the_grid() -> None:
    model, browser = scene()
    reader = Reader(model)

    def look(*keys: str) -> str:
        for key in keys:
            browser.press(key)
        reader.paused = browser.paused
        reader.renew()
        return plain(reader, browser, 120, 40)

    look()
    paused = look("p")
    assert "PAUSED" in paused
    model.take([claim("agent-a", "new-1", 12344, 0, 5)], 8.0)
    model.set_grid(grid_at(12344.25, leader_id="pulse-b"), 8.0)
    still = look()
    assert rows(still) == rows(paused) == ["late-1", "slow-1", "fine-1", "silent-1"]
    assert "leader pulse-b" in still
    assert "4 live" in still
    # The rows can be looked at, too.
    assert rows(look("down", "down")) == rows(paused)
    assert "history of fine-1" in look("enter")
    assert "new-1" in rows(look("escape", "p"))


def test_reading_takes_a_small_share_of_the_time() -> None:
    model, _ = scene()
    now, reads = 0.0, 0

    class Slow:
        def __getattr__(self, name: str) -> Any:
            return getattr(model, name)

        def operations(self, query: Query) -> Any:
            nonlocal now, reads
            now += 0.3
            reads += 1
            return model.operations(query)

    reader = Reader(Slow(), lambda: now)
    end = now + 60
    while now < end:
        reader.renew()
        reader.operations(Query())
        now += 0.25
    # Each takes 0.3 s, and at most a quarter of the time.
    assert 40 < reads < 50


def test_pieces_of_a_line() -> None:
    wide = "\N{CJK UNIFIED IDEOGRAPH-4E2D}" * 4
    for width in range(10):
        assert cell_len(fit(wide, width, UNICODE)) == width
        assert cell_len(fit("abc", width, UNICODE, right=True)) == width
    assert fit("abcdef", 4, UNICODE) == "abc…"
    assert fit("ab", 4, UNICODE, right=True) == "  ab"
    # Only what has run out looks full, and only then.
    assert bar(0.999, 4, ASCII) == "###."
    assert [bar(share, 4, ASCII) for share in (0, 0.5, 1, 7.5)] == ["....", "##..", "####", "####"]
    assert [track(share, 4, ASCII) for share in (0, 0.5, 0.999)] == ["O---", "--O-", "---O"]
    assert sparkline([0, None, 1, 2], 2.0, UNICODE) == "▁ ▅█"


def test_the_picture_in_the_guide_is_current() -> None:
    # `python tests/views/test_watch.py` makes it anew.
    assert picture.lines(PICTURE.read_text()) == picture.lines(make_picture())


if __name__ == "__main__":
    PICTURE.write_text(make_picture())
