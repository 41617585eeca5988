"""Pictures of what a terminal shows, and that of the demonstration in README: ``docs/demo.svg``.

``python tests/helpers/picture.py`` makes it anew, after a change of what ``backbeat demo`` shows.
"""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Final
from xml.etree import ElementTree as ET

from rich.console import Console
from rich.text import Text

ROOT: Final = Path(__file__).parent.parent.parent
PICTURE: Final = ROOT / "docs" / "demo.svg"
COLUMNS: Final = 108
ROWS: Final = 30

# How rich goes back to the first line of a table before it shows the next one.
_REDRAWN: Final = re.compile(r"(?:\x1b\[1A\x1b\[2K)+")
_CONTROL: Final = re.compile(r"\x1b\[\?25[lh]|\r|\x1b\[2K")
# The picture must look the same without a network, so it loads no fonts.
_FONTS: Final = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)
# What differs from one run to the next: the frame of a table and the figures.
_FRAME: Final = re.compile("[\u2500-\u257f]")
_FIGURE: Final = re.compile(r"\d+(?:\.\d+)?")
# The second line of a row of a table, as of long notes.
_WRAPPED: Final = re.compile(r"\s*\u2502\s\s")
_AGENT: Final = re.compile(r"(alice|bob|carol)\b.*")


def watch(*command: str) -> str:
    """Run a command at a terminal, and return what the terminal shows in the end."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("CHORUS_BACKBEAT_", "NATS_", "COLUMNS", "LINES", "NO_COLOR"))
    } | {"TERM": "xterm-256color"}
    process = subprocess.Popen(
        list(command), stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    chunks: list[bytes] = []
    try:
        while chunk := os.read(ours, 65536):
            chunks.append(chunk)
    except OSError:
        # On Linux this is how a terminal ends whose programs have all gone.
        pass
    finally:
        os.close(ours)
        if process.wait() != 0:
            raise RuntimeError(b"".join(chunks).decode())
    return _CONTROL.sub("", _REDRAWN.split(b"".join(chunks).decode())[-1])


def draw(shown: Text, title: str, columns: int = COLUMNS) -> str:
    """Return an SVG of what a terminal shows."""
    console = Console(
        record=True,
        width=columns,
        file=io.StringIO(),
        force_terminal=True,
        color_system="truecolor",
        _environ={},
    )
    console.print(shown)
    return _FONTS.sub("", console.export_svg(title=title, unique_id="demo"))


def lines(picture: str) -> list[str]:
    """Return the lines of text in an SVG that `draw` made."""
    found: dict[float, list[tuple[float, str]]] = {}
    for element in ET.fromstring(picture).iter("{http://www.w3.org/2000/svg}text"):
        if element.text is not None and "textLength" in element.attrib:
            place = float(element.attrib["x"]), element.text.replace("\xa0", " ")
            found.setdefault(float(element.attrib["y"]), []).append(place)
    return ["".join(text for _, text in sorted(line)) for _, line in sorted(found.items())]


def outline(picture: str) -> list[str]:
    """Return what an SVG of the demonstration says on every run: its words without its figures.

    Of the line of an agent only the name is left, as it may be in the midst of any operation.
    """
    words = [_FRAME.sub(" ", line) for line in lines(picture) if not _WRAPPED.match(line)]
    bare = [" ".join(_FIGURE.sub("N", line).split()) for line in words]
    return [_AGENT.sub(r"\1", line) for line in bare if line]


def make_picture() -> str:
    """Run the demonstration, and return the picture of it."""
    shown = watch(sys.executable, "-m", "backbeat_trio", "demo")
    return draw(Text.from_ansi(f"$ backbeat demo\n{shown.rstrip()}"), "backbeat demo")


if __name__ == "__main__":
    PICTURE.write_text(make_picture())
