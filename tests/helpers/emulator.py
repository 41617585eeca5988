"""A terminal for tests: a shell at a pseudo-terminal, and an emulator of what it shows."""

from __future__ import annotations

import fcntl
import os
import pty
import shlex
import sys
import termios
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pyte
import trio
from helpers import CLEAN, until

_ENVIRONMENT: Final = {
    name: value for name, value in CLEAN.items() if name not in {"COLUMNS", "LINES", "NO_COLOR"}
} | {"TERM": "xterm-256color", "LC_ALL": "C.UTF-8", "PS1": "$ ", "HISTFILE": ""}


class Emulator:
    """What a terminal shows, and what is typed there."""

    def __init__(
        self, stream: trio.lowlevel.FdStream, fd: int, size: tuple[int, int], folder: Path
    ) -> None:
        self.received = b""
        self._pid = folder / "pid"
        self._stream = stream
        self._fd = fd
        self._screen = pyte.Screen(*size)
        self._feed = pyte.ByteStream(self._screen)

    @property
    def lines(self) -> list[str]:
        """What each row shows."""
        return [line.rstrip() for line in self._screen.display]

    @property
    def modes(self) -> list[Any]:
        """The modes of the terminal."""
        return termios.tcgetattr(self._fd)

    @property
    def pid(self) -> int:
        """The process id of the last ``backbeat`` that was started."""
        return int(self._pid.read_text())

    @property
    def cursor_hidden(self) -> bool:
        return self._screen.cursor.hidden

    def colors(self, row: int) -> set[str]:
        """Return the colours of the texts in a row."""
        return {cell.fg for cell in self._screen.buffer[row].values() if cell.data.strip()}

    async def run(self, command: str) -> None:
        """Type a command, whose status the shell shows when it has ended."""
        # It must not be found in the line that is typed.
        await self.type(f"{command}; echo sta''tus-$?\n")

    async def type(self, text: str) -> None:
        await self._stream.send_all(text.encode())

    def resize(self, columns: int, rows: int) -> None:
        self._screen.resize(rows, columns)
        termios.tcsetwinsize(self._fd, (rows, columns))

    async def shows(self, *texts: str) -> None:
        """Wait until some texts are shown."""
        await self.until(lambda: all(text in "\n".join(self.lines) for text in texts))

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait for a condition; if it does not come true, fail with what is shown."""
        try:
            await until(condition)
        except trio.TooSlowError:
            raise AssertionError("\n".join(self.lines)) from None

    async def _read(self) -> None:
        while True:
            data = await self._stream.receive_some()
            self.received += data
            self._feed.feed(data)


@asynccontextmanager
async def emulated_shell(
    columns: int, rows: int, folder: Path, env: Mapping[str, str] | None = None
) -> AsyncGenerator[Emulator, None]:
    """Run an interactive shell at a terminal, in which ``backbeat`` is a command."""
    program = folder / "backbeat"
    program.write_text(
        f"#!/bin/sh\necho $$ > {shlex.quote(str(folder))}/pid\n"
        f'exec {shlex.quote(sys.executable)} -m backbeat_trio "$@"\n'
    )
    program.chmod(0o755)
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (rows, columns))
    variables = _ENVIRONMENT | {"PATH": f"{folder}:{CLEAN['PATH']}"} | dict(env or {})
    async with trio.lowlevel.FdStream(ours) as stream, trio.open_nursery() as nursery:
        emulator = Emulator(stream, theirs, (columns, rows), folder)
        nursery.start_soon(emulator._read)
        process = await trio.lowlevel.open_process(
            ["bash", "--norc", "--noprofile", "--noediting", "-i"],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=variables,
            start_new_session=True,
            # So the shell is in control of the jobs at this terminal.
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        try:
            await emulator.shows("$")
            yield emulator
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()
            nursery.cancel_scope.cancel()
            os.close(theirs)
