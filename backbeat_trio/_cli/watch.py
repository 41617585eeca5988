"""``backbeat watch``: the cluster on a full screen, or in a few lines if there is no terminal."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, final

import click
import trio

from .._session.lifecycle import session
from .._session.session import Session
from .._views.feed import follow
from .._views.model import ClusterModel
from .connection import ConnectedCommand, Connection, settings, takes_connection
from .listening import seconds_to_listen
from .main import SIGNALLED
from .parameters import beats, duration

if TYPE_CHECKING:
    from rich.text import Text

# Claims of a beat take a moment to arrive, also at a high tempo.
_ARRIVAL: Final = 0.5
_LOG_LINES: Final = 100


@click.command("watch", cls=ConnectedCommand)
@click.option(
    "--interval",
    type=duration,
    default="250ms",
    metavar="250ms",
    help="How often the screen may change; by default four times a second.",
)
@click.option(
    "--wait",
    type=beats,
    default=1.25,
    metavar="BEATS",
    help="Without a terminal: listen for so many beats first; by default 1.25.",
)
@takes_connection()
async def watch_cluster(connection: Connection, interval: float, wait: float) -> int:
    """Watch the beat, the agents and the operations of the cluster on a full screen.

    The key '?' shows what the other keys do, and 'q' quits. If standard output is not a terminal,
    or TERM is 'dumb', it prints a summary and ends. It exits 1 then if permissions keep all claims
    from this user.
    """
    config = settings(connection)
    model = ClusterModel()
    async with session(config, require_connection=True) as bb, trio.open_nursery() as nursery:
        await nursery.start(follow, bb, model)
        tty = _open_terminal()
        if tty is not None:
            result = await _Show(bb, model, tty, interval).run()
        else:
            from .._views.summary import summarize

            # Each live operation reports on every beat.
            seconds = seconds_to_listen(bb.health(), wait)
            await trio.sleep(seconds + (_ARRIVAL if wait else 0))
            click.echo(summarize(model, bb.current_position()), nl=False)
            result = int(model.grid is not None and model.grid.claims_refused)
        nursery.cancel_scope.cancel()
    return result


def _open_terminal() -> int | None:
    if sys.stdout is None or not sys.stdout.isatty():
        return None
    if os.environ.get("TERM", "dumb") in ("", "dumb"):
        return None
    from .._views.terminal import open_tty

    try:
        return open_tty(sys.stdout.fileno())
    except OSError:
        # It has no name here, as in some containers.
        return None


@final
class _Show:
    # The screen, from the first drawing to the end of the view.

    def __init__(self, bb: Session, model: ClusterModel, tty: int, interval: float) -> None:
        from .._views.browse import CHOOSING, Browser
        from .._views.cells import ASCII, UNICODE
        from .._views.reader import Reader
        from .._views.terminal import Painter, Terminal

        self._bb = bb
        self._interval = interval
        self._browser = Browser()
        self._reader = Reader(model)
        encoding = sys.stdout.encoding
        self._glyphs = UNICODE if encoding.lower().replace("-", "") == "utf8" else ASCII
        self._painter = Painter(colors=not os.environ.get("NO_COLOR"))
        self._terminal = Terminal(tty, encoding, self._redraw)
        self._choosing = CHOOSING
        self._woken = trio.Event()

    async def run(self) -> int:
        """Show the cluster until the operator quits, and return the exit status."""
        with _log_kept(self._log):
            async with self._terminal, trio.open_nursery() as nursery:
                nursery.start_soon(self._follow_signals, nursery.cancel_scope)
                nursery.start_soon(self._follow_keys, nursery.cancel_scope)
                due = trio.current_time()
                while True:
                    if trio.current_time() >= due:
                        self._reader.renew()
                        due = trio.current_time() + self._interval
                    # Who wakes it while it draws wants the next drawing.
                    self._woken = trio.Event()
                    text = self._painter.paint(self._draw())
                    if text:
                        await self._terminal.write(text)
                    with trio.move_on_at(due):
                        await self._woken.wait()
        ended_by = self._terminal.ended_by
        return 0 if ended_by is None else SIGNALLED + ended_by

    def _redraw(self) -> None:
        self._painter.forget()
        self._woken.set()

    def _log(self, line: str) -> None:
        self._browser.notice = line

    def _draw(self) -> list[Text]:
        from .._views.watch import draw

        browser, reader, grid = self._browser, self._reader, self._reader.grid
        if grid is not None:
            browser.sample(grid)
        reader.paused = browser.paused
        screen = draw(
            *(reader, browser, self._terminal.size, self._bb.current_position()),
            cluster_id=self._bb.config.cluster_id,
            glyphs=self._glyphs,
        )
        browser.window = screen.window
        return screen.lines

    async def _follow_keys(self, scope: trio.CancelScope) -> None:
        async for keys in self._terminal.read_keys():
            for number, key in enumerate(keys):
                if number and key in self._choosing:
                    # Keys before it may have moved to another row.
                    self._draw()
                if key == "ctrl-l":
                    self._painter.forget()
                elif not self._browser.press(key):
                    scope.cancel()
                    return
            self._woken.set()
        # The terminal is gone.
        scope.cancel()

    async def _follow_signals(self, scope: trio.CancelScope) -> None:
        await self._terminal.follow_signals()
        scope.cancel()


@final
class _Log(io.TextIOBase):
    # What is logged while the view has the terminal, which any thread may do.

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show
        self.lines: deque[str] = deque(maxlen=_LOG_LINES)

    def write(self, text: str) -> int:
        self.lines.append(text)
        if text.strip():
            self._show(text.strip())
        return len(text)


@contextmanager
def _log_kept(show: Callable[[str], None]) -> Generator[None, None, None]:
    """Keep what is logged to the terminal for the end of the block, and show the newest line."""
    handlers = [
        handler
        for handler in logging.getLogger().handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stderr
    ]
    if sys.stderr is None or not sys.stderr.isatty():
        handlers = []
    log = _Log(show)
    for handler in handlers:
        handler.setStream(log)
    try:
        yield
    finally:
        for handler in handlers:
            handler.setStream(sys.stderr)
        for text in log.lines:
            sys.stderr.write(text)
