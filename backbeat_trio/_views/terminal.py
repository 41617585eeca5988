"""The terminal: its modes while a view fills the screen, its signals, and what is sent to it.

The terminal is opened once more by its name. So that it does not block is a property of this
file description alone, and neither the shell nor another program notices it. A terminal that does
not take what is sent to it then delays the drawing, but not the event loop.

The keys that send signals stay what they are: Ctrl-C and Ctrl-Z also work for whoever started the
program from a script. All of these signals are received by a task, so none of them interrupts the
code that restores the terminal.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import termios
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, suppress
from types import TracebackType
from typing import Final, final

import trio
from rich.color import ColorSystem
from rich.console import Console
from rich.text import Text

from .keys import ESCAPE_SECONDS, KeyDecoder

# The other screen, without a cursor; what is too long for a line is cut and not wrapped.
_ENTER: Final = "\x1b[?1049h\x1b[?25l\x1b[?7l\x1b[0m\x1b[2J"
# A terminal that has no other screen is cleared.
_LEAVE: Final = "\x1b[0m\x1b[H\x1b[J\x1b[?7h\x1b[?25h\x1b[?1049l"
# How long a terminal may take to accept the last bytes before it is given up.
_PATIENCE: Final = 1.0
# A shell that kills a suspended program continues it, too. It takes this long at most until the
# program learns that it is to end.
_AFTERWARDS: Final = 0.05
_FALLBACK: Final = (80, 24)
_ENDING: Final = (signal.SIGINT, signal.SIGHUP)
_CHUNK: Final = 256


def open_tty(fd: int) -> int:
    """Open the terminal of a file descriptor once more, for reading and writing without blocking.

    Args:
      fd: a file descriptor of the terminal, such as that of standard output.

    Returns:
      The new file descriptor.

    Raises:
      OSError: if it is not a terminal, or the terminal cannot be opened by its name.

    """
    flags = os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK
    try:
        return os.open(os.ttyname(fd), flags)
    except OSError:
        # In a container the name may not exist, but the process still has its terminal.
        if not os.isatty(fd):
            raise
        return os.open("/dev/tty", flags)


@final
class Terminal:
    """A terminal that a view fills for the length of a block.

    Use it as ``async with Terminal(...) as terminal:``. Entering sets the modes of the
    terminal and shows the other screen. Leaving restores both, whatever ended the block. Both are
    checkpoints. The block must run `follow_signals` in a task.

    Args:
      tty: the file descriptor that `open_tty` returned; the block closes it.
      encoding: the encoding of what the terminal shows.
      changed: called when all of the screen has to be drawn again, as its size has changed or
        another program has written to it.

    Attributes:
      ended_by: the signal that asked the program to end: SIGINT or SIGHUP; also SIGHUP if the
        terminal is gone, and None if there was none.

    """

    def __init__(self, tty: int, encoding: str, changed: Callable[[], None]) -> None:
        self._tty = tty
        self._encoding = encoding
        self._changed = changed
        self._lock = trio.Lock()
        self._stack = AsyncExitStack()
        self._saved: list[object] | None = None
        self._inside = False
        self.ended_by: signal.Signals | None = None

    @trio.lowlevel.enable_ki_protection
    async def __aenter__(self) -> Terminal:
        async with AsyncExitStack() as stack:
            self._stream = await stack.enter_async_context(trio.lowlevel.FdStream(self._tty))
            # Who ignores a signal, as `nohup` does, is to go on doing so.
            numbers = [
                number
                for number in (*_ENDING, signal.SIGTSTP, signal.SIGCONT, signal.SIGWINCH)
                if signal.getsignal(number) is not signal.SIG_IGN
            ]
            self._signals = stack.enter_context(trio.open_signal_receiver(*numbers))
            stack.push_async_callback(self._leave)
            await self._enter()
            self._stack = stack.pop_all()
        return self

    @trio.lowlevel.enable_ki_protection
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._stack.aclose()

    @property
    def size(self) -> tuple[int, int]:
        """The columns and the rows of the terminal."""
        with suppress(termios.error):
            rows, columns = termios.tcgetwinsize(self._tty)
            if rows and columns:
                return columns, rows
        columns, rows = shutil.get_terminal_size(_FALLBACK)
        return columns, rows

    async def follow_signals(self) -> None:
        """Do what signals ask for, until one of them asks the program to end.

        SIGTSTP restores the terminal and suspends the program. SIGCONT takes the terminal again,
        and SIGWINCH says that all has to be drawn again. SIGINT and SIGHUP end this; then
        `ended_by` says which of them came.
        """
        async for number in self._signals:
            if number in _ENDING:
                self.ended_by = signal.Signals(number)
                return
            if number == signal.SIGTSTP:
                await self._suspend()
            elif number == signal.SIGCONT:
                await self._enter()
            self._changed()

    async def read_keys(self) -> AsyncIterator[list[str]]:
        """Iterate over the keys that are pressed, in lists of those that came together.

        It ends when the terminal is gone, as by SIGHUP.
        """
        decoder = KeyDecoder()
        while True:
            keys: list[str] = []
            data = b""
            with trio.move_on_after(ESCAPE_SECONDS if decoder.waiting else math.inf) as scope:
                with suppress(trio.BrokenResourceError):
                    data = await self._stream.receive_some(_CHUNK)
                if not data:
                    self.ended_by = signal.SIGHUP
                    return
                keys = decoder.feed(data)
            if scope.cancelled_caught:
                keys = decoder.flush()
            if keys:
                yield keys

    async def write(self, text: str) -> None:
        """Send text and control sequences; nothing is sent while the program is suspended."""
        async with self._lock:
            if self._inside:
                with suppress(trio.BrokenResourceError):
                    await self._stream.send_all(text.encode(self._encoding, "replace"))

    async def _enter(self) -> None:
        if not self._inside:
            # After a suspension it may be another mode that whoever comes next expects.
            self._saved = termios.tcgetattr(self._tty)
        assert self._saved is not None
        self._set(_cbreak(self._saved))
        self._inside = True
        await self.write(_ENTER)

    async def _leave(self) -> None:
        if not self._inside:
            return
        assert self._saved is not None
        # Also if the program is being cancelled.
        with trio.move_on_after(_PATIENCE, shield=True):
            await self.write(_LEAVE)
        self._inside = False
        self._set(self._saved)

    def _set(self, mode: list[object]) -> None:
        # It is gone if its window was closed. What was typed for the view is not for the shell.
        with suppress(termios.error):
            termios.tcsetattr(self._tty, termios.TCSANOW, mode)  # type: ignore[arg-type]
            termios.tcflush(self._tty, termios.TCIFLUSH)

    async def _suspend(self) -> None:
        await self._leave()
        received = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        try:
            # The program stops in this call, and goes on from here.
            signal.raise_signal(signal.SIGTSTP)
        finally:
            signal.signal(signal.SIGTSTP, received)
        await trio.sleep(_AFTERWARDS)
        await self._enter()


def _cbreak(saved: list[object]) -> list[object]:
    """Return the mode in which keys come at once, are not shown, and do not stop the output."""
    iflag, oflag, cflag, lflag, ispeed, ospeed, cc = saved
    assert isinstance(iflag, int)
    assert isinstance(lflag, int)
    assert isinstance(cc, list)
    keys = cc[:]
    keys[termios.VMIN], keys[termios.VTIME] = 1, 0
    iflag &= ~termios.IXON
    lflag &= ~(termios.ECHO | termios.ICANON | termios.IEXTEN)
    return [iflag, oflag, cflag, lflag, ispeed, ospeed, keys]


@final
class Painter:
    """Turns lines of text into what a terminal is sent, and sends only lines that have changed.

    Only the eight colours that all terminals have are sent.

    Args:
      colors: whether any colours are wanted; bold and reversed text is sent in any case.

    """

    def __init__(self, *, colors: bool) -> None:
        self._colors = colors
        # It only knows the names of styles, and writes nothing.
        self._styles = Console(color_system="standard")
        self._shown: list[Text] = []

    def forget(self) -> None:
        """Draw all lines the next time, as the screen may show anything by then."""
        self._shown = []

    def paint(self, lines: Sequence[Text]) -> str:
        """Return what makes the screen show some lines; the empty string if it does so already.

        Args:
          lines: a line for each row of the screen, not longer than the row. They must not be
            changed afterwards.

        """
        parts: list[str] = []
        if len(lines) != len(self._shown):
            self._shown = []
            parts.append("\x1b[0m\x1b[2J")
        for row, line in enumerate(lines):
            if not self._shown or self._shown[row] != line:
                parts.append(f"\x1b[{row + 1};1H{self._encode(line)}\x1b[K")
        self._shown = list(lines)
        return "".join(parts)

    def _encode(self, line: Text) -> str:
        parts: list[str] = []
        for text, style, _ in line.render(self._styles):
            if style is not None:
                shown = style if self._colors else style.without_color
                text = shown.render(text, color_system=ColorSystem.STANDARD)
            parts.append(text)
        return "".join(parts)
