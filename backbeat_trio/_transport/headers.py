"""The headers of a message as NATS writes them: a first line, one line for each header, an end.

Pure. Reading never raises: a line that is not a header is passed over.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Final

_FIRST: Final = "NATS/1.0"
# Printable ASCII, except the colon.
_NAME: Final = re.compile(r"[!-9;-~]+", re.ASCII)


def encode_headers(headers: Mapping[str, str]) -> bytes:
    """Return the block of headers of a message; it is empty if there are none.

    Raises:
      TypeError: if a name or a value is not a string.
      ValueError: if a name is not printable ASCII without spaces and colons, or a value contains a
        line break or is not Unicode text.

    """
    if not headers:
        return b""
    block = f"{_FIRST}\r\n"
    for name, value in headers.items():
        if type(name) is not str or type(value) is not str:
            _check_texts(name, value)
        _check_name(name)
        if "\n" in value or "\r" in value:
            raise ValueError(f"the header {name} contains a line break")
        block += f"{name}: {value.strip()}\r\n"
    try:
        return f"{block}\r\n".encode()
    except UnicodeEncodeError:
        raise ValueError("a header contains a character that has no UTF-8") from None


def _check_texts(name: object, value: object) -> None:
    if not isinstance(name, str) or not isinstance(value, str):
        raise TypeError(f"a header must be a string with a string, and {name!r} is not")


# Names are few, and messages many.
@lru_cache(maxsize=1024)
def _check_name(name: str) -> None:
    if _NAME.fullmatch(name) is None:
        raise ValueError(f"not the name of a header: {name!r}")


def decode_headers(block: bytes) -> tuple[str, dict[str, str]]:
    """Read a block of headers.

    A name that comes more than once with different values has them all, separated by commas. Bytes
    that are not UTF-8 are replaced.

    Returns:
      The status in the first line, such as ``"503"``, or an empty string; and the headers.

    """
    first, *lines = block.decode(errors="replace").split("\r\n")
    headers: dict[str, str] = {}
    # They are joined at the end, as a hostile message may have a hundred thousand of one name.
    repeated: dict[str, list[str]] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon:
            continue
        name, value = name.strip(), value.strip()
        before = headers.setdefault(name, value)
        if name in repeated:
            repeated[name].append(value)
        elif before != value:
            repeated[name] = [before, value]
    for name, values in repeated.items():
        headers[name] = ", ".join(values)
    words = first[len(_FIRST) :].split(maxsplit=1)
    return words[0] if words else "", headers


def find_header(headers: Mapping[str, str], name: str) -> str | None:
    """Return the value of a header, by its name in any case of letters; None if there is none."""
    value = headers.get(name)
    if value is not None:
        return value
    name = name.lower()
    return next((value for other, value in headers.items() if other.lower() == name), None)
