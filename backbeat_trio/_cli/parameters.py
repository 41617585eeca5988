"""What arguments and options take: tempos, beats, names, durations and signals.

Each function here is the type of a parameter: click calls it with the text of the parameter.
"""

from __future__ import annotations

import math
import re
import signal
from typing import Final

import click
from click.shell_completion import CompletionItem

from .._grid.timeline import milli_bpm
from .._runtime.operations import check_name
from .._wire import MAX_INDEX, is_token

_MAX_PORT: Final = 65_535
_UNITS: Final = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}


def duration(text: str) -> float:
    """Return the seconds that a text such as ``500ms``, ``5s``, ``2m``, ``1h`` or ``7d`` means.

    Raises:
      click.BadParameter: unless it is a duration of more than 0.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)?", text, re.ASCII)
    seconds = 0.0
    if match is not None:
        seconds = float(match[1]) * _UNITS[match[2] or "s"]
    if not 0 < seconds < math.inf:
        raise click.BadParameter(f"{text!r} is not a duration such as 5s or 500ms")
    return seconds


def tempo(text: str) -> float:
    """Return a tempo in beats a minute.

    Raises:
      click.BadParameter: unless it is from 0.1 to 6,000.
    """
    try:
        bpm = float(text)
        milli_bpm("BPM", bpm)
    except ValueError:
        raise click.BadParameter(f"{text!r} is not from 0.1 to 6000 beats a minute") from None
    return bpm


def beats(text: str) -> float:
    """Return a number of beats; fractions are fine.

    Raises:
      click.BadParameter: unless it is from 0 to 2**53.
    """
    number = float(click.FloatRange(0, MAX_INDEX)(text))
    if math.isnan(number):
        # It is neither below nor above a bound.
        raise click.BadParameter(f"{text!r} is not a number of beats")
    return number


def index(text: str) -> int:
    """Return the index of a beat, or a whole number of beats.

    Raises:
      click.BadParameter: unless it is from 0 to 2**53.
    """
    return int(click.IntRange(0, MAX_INDEX)(text))


def address(text: str) -> tuple[str, int]:
    """Return the host and the port of ``HOST:PORT``, or of ``PORT`` on the loopback interface.

    Raises:
      click.BadParameter: unless it is an address.
    """
    host, colon, port = text.rpartition(":")
    if (
        not re.fullmatch(r"\d{1,5}", port, re.ASCII)
        or int(port) > _MAX_PORT
        or (colon and not host)
    ):
        raise click.BadParameter(f"{text!r} is no address such as 8080 or 0.0.0.0:8080")
    return host.removeprefix("[").removesuffix("]") or "127.0.0.1", int(port)


def name(text: str) -> str:
    """Return what can be a single token of a subject.

    Raises:
      click.BadParameter: unless it is.
    """
    if not is_token(text):
        raise click.BadParameter(f"{text!r} is not 1 to 128 of A-Z a-z 0-9 _ -")
    return text


def agent(text: str) -> str:
    """Return an agent's id, or ``*``, which is all agents.

    Raises:
      click.BadParameter: unless it is one of these.
    """
    return text if text == "*" else name(text)


def operation_id(text: str) -> str:
    """Return the id of an operation.

    Raises:
      click.BadParameter: unless it can be one.
    """
    try:
        return check_name("id", text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def reason(text: str) -> str:
    """Return the reason for which an operation is cancelled.

    Raises:
      click.BadParameter: unless it has 1 to 1,000 characters.
    """
    try:
        return check_name("reason", text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def signal_number(text: str) -> int:
    """Return a signal, named with or without ``SIG``, or by its number.

    Raises:
      click.BadParameter: if there is no such signal.
    """
    try:
        if text.isdecimal():
            number = int(text)
        else:
            number = signal.Signals[f"SIG{text.upper().removeprefix('SIG')}"]
    except (KeyError, ValueError):
        number = 0
    if number not in signal.valid_signals():
        raise click.BadParameter(f"{text!r} is not a signal such as INT or 2")
    return number


def complete_signal(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Return the names of signals that begin so."""
    names = (name.removeprefix("SIG") for name in signal.Signals.__members__)
    return [CompletionItem(name) for name in names if name.startswith(incomplete.upper())]
