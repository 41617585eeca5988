"""Keys: what the bytes mean that a terminal sends.

Ordinary keys send their text. Arrows and other function keys send escape sequences, which may
arrive in pieces. A decoder keeps the pieces until the sequence is complete.
"""

from __future__ import annotations

import codecs
import re
from typing import Final, final

ESCAPE_SECONDS: Final = 0.05
"""How long after the key Escape a sequence may still follow, in seconds."""

# A sequence that is longer is noise, such as a file that somebody pastes.
_LONGEST: Final = 32
_SEQUENCE: Final = re.compile(r"\x1b(?:\[([0-?]*)[ -/]*([@-~])|O([ -~]))")
_PARTIAL: Final = re.compile(r"\x1b(?:\[[0-?]*[ -/]*|O)?")

_FINALS: Final = {
    "A": "up",
    "B": "down",
    "C": "right",
    "D": "left",
    "F": "end",
    "H": "home",
    "M": "enter",
    "P": "f1",
    "Z": "backtab",
}
_NUMBERS: Final = {
    "1": "home",
    "3": "delete",
    "4": "end",
    "5": "pageup",
    "6": "pagedown",
    "7": "home",
    "8": "end",
    "11": "f1",
}
_CONTROLS: Final = {
    "\x03": "ctrl-c",
    "\x08": "backspace",
    "\t": "tab",
    "\n": "enter",
    "\x0c": "ctrl-l",
    "\r": "enter",
    "\x15": "ctrl-u",
    "\x7f": "backspace",
}


@final
class KeyDecoder:
    """Decodes what a terminal sends into the names of keys.

    The name of a key that types a character is that character. The other names are ``up``,
    ``down``, ``left``, ``right``, ``home``, ``end``, ``pageup``, ``pagedown``, ``enter``, ``tab``,
    ``backtab``, ``backspace``, ``delete``, ``escape``, ``f1``, ``ctrl-c``, ``ctrl-l`` and
    ``ctrl-u``. Shift, Alt and Control beside an arrow are ignored. So are sequences and control
    characters that are unknown, and bytes that are not UTF-8.
    """

    def __init__(self) -> None:
        self._text = codecs.getincrementaldecoder("utf-8")("ignore")
        self._rest = ""

    @property
    def waiting(self) -> bool:
        """Whether the bytes so far end in what may be the beginning of a sequence."""
        return bool(self._rest)

    def feed(self, data: bytes) -> list[str]:
        """Return the keys that are complete with some more bytes."""
        text = self._rest + self._text.decode(data)
        self._rest = ""
        keys: list[str] = []
        position = 0
        while position < len(text):
            char = text[position]
            if char != "\x1b":
                key = _CONTROLS.get(char, char if char.isprintable() else "")
                position += 1
            elif found := _SEQUENCE.match(text, position):
                parameters, final, single = found.groups()
                if final == "~":
                    key = _NUMBERS.get(parameters.partition(";")[0], "")
                else:
                    key = _FINALS.get(final or single, "")
                position = found.end()
            elif len(text) - position <= _LONGEST and _PARTIAL.fullmatch(text, position):
                self._rest = text[position:]
                break
            else:
                key = "escape"
                position += 1
            if key:
                keys.append(key)
        return keys

    def flush(self) -> list[str]:
        """Return the key Escape if a sequence has begun that nothing follows, and forget it."""
        begun, self._rest = self._rest, ""
        return ["escape"] if begun else []
