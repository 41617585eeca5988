"""Checks of arguments. Each names the parameter in the error that it raises."""

from __future__ import annotations

import math
import operator
from typing import SupportsFloat, SupportsIndex

from ._wire import MAX_INDEX


def check_beats(name: str, value: SupportsFloat | SupportsIndex) -> float:
    """Return a number of beats as a float.

    Args:
      name: what the value is called, for the error's text.
      value: a number of 0 or more, for example an int, a `decimal.Decimal` or a
        `fractions.Fraction`; ``inf`` is fine.

    Raises:
      TypeError: where the value is no real number; a bool and a str are none.
      ValueError: where it is negative, NaN, or finite and too large for a float.

    """
    beats = _real(name, value, "a number of beats")
    if beats < 0:
        raise ValueError(f"`{name}` must be non-negative")
    return beats


def check_position(name: str, value: SupportsFloat | SupportsIndex) -> float:
    """Return a position in beats as a float.

    Args:
      name: what the value is called, for the error's text.
      value: any number, for example an int, a `decimal.Decimal` or a `fractions.Fraction`; ``inf``
        and ``-inf`` are fine.

    Raises:
      TypeError: where the value is no real number; a bool and a str are none.
      ValueError: where it is NaN, or finite and too large for a float.

    """
    return _real(name, value, "a position in beats")


def _real(name: str, value: SupportsFloat | SupportsIndex, what: str) -> float:
    if not isinstance(value, (float, int)):
        # `float` reads strings and bytes as well, which are no numbers.
        convertible = isinstance(value, (SupportsFloat, SupportsIndex))
    else:
        convertible = not isinstance(value, bool)
    if not convertible:
        raise TypeError(f"`{name}` must be {what}, not {value!r}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    except ValueError:
        # The signaling NaN of `decimal`.
        number = math.nan
    if number != number:  # noqa: PLR0124 - NaN is what differs from itself
        raise ValueError(f"`{name}` must not be NaN")
    if math.isinf(number) and value != number:
        # Not its digits in the text: there may be more than Python is willing to print.
        raise ValueError(f"`{name}` must be {what} that a float can hold")
    return number


def check_integer(name: str, value: SupportsIndex, minimum: int) -> int:
    """Return an integer; raise unless it is one of at least ``minimum``."""
    if value != value:  # noqa: PLR0124 - NaN is what differs from itself
        raise ValueError(f"`{name}` must not be NaN")
    if isinstance(value, bool):
        raise TypeError(f"`{name}` must be an integer, not {value!r}")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"`{name}` must be an integer, not {value!r}") from None
    if number < minimum:
        raise ValueError(f"`{name}` must be at least {minimum}, not {number}")
    return number


def check_index(name: str, value: SupportsIndex) -> int:
    """Return a beat index; raise unless it is an integer from 0 to 2**53."""
    # What no message can carry would be dropped by the leader, and look as if there were none.
    index = check_integer(name, value, 0)
    if index > MAX_INDEX:
        raise ValueError(f"`{name}` must be at most {MAX_INDEX}, not {index}")
    return index
