"""The headers by which a message carries its sender's deadline, operation and trace.

Pure: nothing here reads a clock. A header that is missing or not valid is as good as none, and
nothing here raises because of what a header says.

=========================  ================================================================
`Backbeat-Deadline`        ``<incarnation>; <beat>; <beats that were left>``
`Backbeat-Soft-Deadline`   the same for the soft edge
`Backbeat-Operation`       ``<cluster id>; <agent id>; <operation id>; <correlation id>``
`traceparent`              as W3C Trace Context defines it; it is passed on as it came
=========================  ================================================================

The incarnation is the identity of the grid that the sender counts on. Ids are percent-encoded, so
that they may contain any character. Names are read in any case of letters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Final, Literal, NamedTuple, TypeAlias, TypeVar
from urllib.parse import quote, unquote

from msgspec import Struct

from .._wire import MAX_INDEX, MAX_TOKEN, is_token

DEADLINE: Final = "Backbeat-Deadline"
SOFT_DEADLINE: Final = "Backbeat-Soft-Deadline"
OPERATION: Final = "Backbeat-Operation"
TRACEPARENT: Final = "traceparent"

MAX_LEFT: Final = 1e9
"""A deadline that is more beats ahead than this is absurd, and counts as none."""

_NAMES: Final = (DEADLINE, SOFT_DEADLINE, OPERATION, TRACEPARENT)
_KNOWN: Final[dict[str | bytes, str]] = {
    spelling: name for name in _NAMES for spelling in (name, name.lower())
}
# The most characters of the value of each header. No sender writes more.
_MAX_VALUE: Final = {DEADLINE: 512, SOFT_DEADLINE: 512, OPERATION: 32_768, TRACEPARENT: 512}
_MAX_INCARNATION: Final = 128
# An operation's id has at most 1,000 characters; a correlation id has an agent's id before it.
_MAX_ID: Final = 1000
_MAX_CORRELATION: Final = MAX_TOKEN + 1 + _MAX_ID
# What `float` accepts beyond this, such as "nan", "1_0" or a sign, is not a number of beats.
_NUMBER: Final = r"[0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?"
_DEADLINE: Final = re.compile(rf"([^;]+);\s*({_NUMBER})\s*;\s*({_NUMBER})", re.ASCII)
_TRACE: Final = re.compile(
    r"(?!ff)([0-9a-f]{2})-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-[!-~]*)?",
    re.ASCII,
)
# Not among these are ";" and ",", which separate, and "%", which escapes.
_SAFE: Final = "!#$&()*+/:<=>?@[]^`{|}"

Headers: TypeAlias = (
    Mapping[str, str] | Mapping[str, Sequence[str]] | Iterable[tuple[str | bytes, str | bytes]]
)


class Deadline(Struct, frozen=True):
    """A deadline, or a soft edge, as a message carries it."""

    incarnation: str
    """The identity of the grid that the sender counts on."""
    beat: float
    """The position on that grid, in beats."""
    left: float
    """How many beats were left when the message was sent, 0 or more."""


class ParentOperation(Struct, frozen=True):
    """The operation that a message was sent in."""

    cluster_id: str
    agent_id: str
    id: str
    correlation_id: str
    """The root of the tree of operations that it belongs to, as ``<agent id>/<operation id>``."""

    @property
    def path(self) -> str:
        """What a claim calls it: ``<agent id>/<operation id>``."""
        return f"{self.agent_id}/{self.id}"


class Carried(Struct, frozen=True):
    """What the headers of a message say; None for what they do not say."""

    deadline: Deadline | None = None
    soft: Deadline | None = None
    operation: ParentOperation | None = None
    traceparent: str | None = None


class Problem(NamedTuple):
    """A header that counts as missing, because its value is not valid."""

    kind: Literal["garbled", "absurd"]
    """``"absurd"`` if it names a deadline that is too far away, ``"garbled"`` otherwise."""
    header: str
    text: str
    """What is wrong with the value. The text does not contain it."""


T = TypeVar("T")


class _Invalid(Exception):
    def __init__(self, kind: Literal["garbled", "absurd"], text: str) -> None:
        self.kind: Literal["garbled", "absurd"] = kind
        self.text = text


def parse(headers: Headers) -> tuple[Carried, list[Problem]]:
    """Read the headers of a message. It never raises because of a value.

    Args:
      headers: a mapping from names to a value or a list of values, or pairs of a name and a value.
        Bytes are read as Latin-1.

    Returns:
      What the headers say, and a list of those that are not valid and so count as missing.

    """
    # None is a header that is there with different values.
    found: dict[str, str | None] = {}
    for name, value in headers.items() if isinstance(headers, Mapping) else headers:
        # Most senders write them as this package does.
        known = _KNOWN.get(name) or _KNOWN.get(_text(name).lower())
        if known is None:
            continue
        if known not in found and isinstance(value, str):
            found[known] = value.strip()
            continue
        for one in (value,) if isinstance(value, (str, bytes)) else value:
            text = _text(one).strip()
            if found.setdefault(known, text) != text:
                found[known] = None
    problems: list[Problem] = []
    deadline = soft = operation = trace = None
    # Most messages have few of these headers, so a reader is called only if there is a value.
    if DEADLINE in found:
        deadline = _read(DEADLINE, found[DEADLINE], _deadline, problems)
    if SOFT_DEADLINE in found:
        soft = _read(SOFT_DEADLINE, found[SOFT_DEADLINE], _deadline, problems)
    if OPERATION in found:
        operation = _read(OPERATION, found[OPERATION], _operation, problems)
    if TRACEPARENT in found:
        trace = _read(TRACEPARENT, found[TRACEPARENT], _traceparent, problems)
    return Carried(deadline, soft, operation, trace), problems


def write(carried: Carried) -> dict[str, str]:
    """Return the headers that say what ``carried`` says.

    A beat is written so that every reader gets the same number, and what is left to a thousandth of
    a beat. A deadline that readers would find absurd is left out.
    """
    headers: dict[str, str] = {}
    if carried.deadline is not None:
        _write(headers, DEADLINE, carried.deadline)
    if carried.soft is not None:
        _write(headers, SOFT_DEADLINE, carried.soft)
    operation = carried.operation
    if operation is not None:
        headers[OPERATION] = (
            f"{operation.cluster_id}; {operation.agent_id}; "
            f"{_escaped(operation.id)}; {_escaped(operation.correlation_id)}"
        )
    if carried.traceparent is not None:
        headers[TRACEPARENT] = carried.traceparent
    return headers


def resolve(deadline: Deadline, incarnation: str, position: float) -> float:
    """Return the position at which a deadline ends on the grid of whoever received it.

    Args:
      deadline: the deadline that was received.
      incarnation: the identity of the receiver's grid.
      position: the present position on that grid, in beats.

    Returns:
      The beat that the deadline names if both grids are the same. Otherwise as many beats after
      ``position`` as were left when the message was sent.

    """
    if deadline.incarnation == incarnation:
        return deadline.beat
    return position + deadline.left


# Reading.


def normalized(headers: Headers) -> dict[str, str]:
    """Return all headers of a message, with names in lower case and repeated values joined."""
    found: dict[str, list[str]] = {}
    for name, value in headers.items() if isinstance(headers, Mapping) else headers:
        values = found.setdefault(_text(name).lower(), [])
        for one in (value,) if isinstance(value, (str, bytes)) else value:
            values.append(_text(one).strip())
    return {name: ", ".join(values) for name, values in found.items() if values}


def _text(value: str | bytes) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else value


def _read(
    name: str, value: str | None, reader: Callable[[str], T], problems: list[Problem]
) -> T | None:
    try:
        if value is None:
            raise _Invalid("garbled", "it is there more than once, with different values")
        if len(value) > _MAX_VALUE[name]:
            raise _Invalid("garbled", f"it is longer than {_MAX_VALUE[name]:,} characters")
        return reader(value)
    except _Invalid as error:
        problems.append(Problem(error.kind, name, error.text))
        return None


def _deadline(value: str) -> Deadline:
    match = _DEADLINE.fullmatch(value)
    if match is None:
        raise _Invalid("garbled", "it does not name a grid and two numbers of beats")
    incarnation, beat, left = match.groups()
    deadline = Deadline(_unescaped(incarnation, _MAX_INCARNATION), float(beat), float(left))
    if deadline.beat > MAX_INDEX or deadline.left > MAX_LEFT:
        raise _Invalid("absurd", "it is too far away")
    return deadline


# Messages that are sent in one operation have the same header.
@lru_cache(maxsize=256)
def _operation(value: str) -> ParentOperation:
    parts = value.split(";")
    if len(parts) != 4:
        raise _Invalid("garbled", "it does not have four parts")
    cluster_id, agent_id = parts[0].strip(), parts[1].strip()
    if not (is_token(cluster_id) and is_token(agent_id)):
        raise _Invalid("garbled", "it names a cluster or an agent by an id that is not valid")
    return ParentOperation(
        cluster_id,
        agent_id,
        _unescaped(parts[2], _MAX_ID),
        _unescaped(parts[3], _MAX_CORRELATION),
    )


def _traceparent(value: str) -> str:
    match = _TRACE.fullmatch(value)
    # Version 00 has four fields. A later version may have more.
    if match is None or (match[1] == "00" and match[2] is not None):
        raise _Invalid("garbled", "it is not valid by W3C Trace Context")
    return value


# Most messages are from the same grid.
@lru_cache(maxsize=64)
def _unescaped(part: str, longest: int) -> str:
    text = part.strip()
    if "%" in text or not text.isascii():
        try:
            text = unquote(text, errors="strict")
            # A lone surrogate has no UTF-8, so no claim could contain it.
            text.encode()
        except UnicodeError:
            raise _Invalid("garbled", "it contains an id that is not UTF-8") from None
    if not 0 < len(text) <= longest:
        raise _Invalid("garbled", "it contains an id that is empty or too long")
    return text


# Writing.


def _write(headers: dict[str, str], name: str, deadline: Deadline) -> None:
    beat, left = deadline.beat, deadline.left
    if beat <= MAX_INDEX and left <= MAX_LEFT:
        headers[name] = f"{_instant(deadline.incarnation, beat)}{left if left > 0 else 0.0:.3f}"


# Messages that are sent within one deadline name the same beat of the same grid.
@lru_cache(maxsize=1024)
def _instant(incarnation: str, beat: float) -> str:
    text = f"{beat:.3f}"
    if float(text) != beat and beat > 0.001:
        # Positions are at most 2**53, so only one near 0 would have an exponent.
        text = repr(beat)
    return f"{_escaped(incarnation)}; {text}; "


@lru_cache(maxsize=1024)
def _escaped(text: str) -> str:
    return quote(text, safe=_SAFE)
