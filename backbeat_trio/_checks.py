"""Checks of arguments. The error that a check raises names the parameter."""

from __future__ import annotations

import math
import operator
from typing import SupportsFloat, SupportsIndex

from ._wire import MAX_INDEX


def check_beats(name: str, value: SupportsFloat | SupportsIndex) -> float:
    """Return a value as a float; raise unless it is a valid number of beats.

    Args:
      name: the name of the parameter, for the error's text.
      value: a real number, 0 or more, for example an int, a float, a `decimal.Decimal` or a
        `fractions.Fraction`. ``inf`` is valid.

    Raises:
      TypeError: if the value is not a real number. A bool and a str are not.
      ValueError: if it is negative or NaN, or finite but too large for a float.

    """
    return _non_negative(name, value, "a number of beats")


def check_seconds(name: str, value: SupportsFloat | SupportsIndex) -> float:
    """Return a number of seconds as a float; raise unless it is one of 0 or more, or ``inf``."""
    return _non_negative(name, value, "a number of seconds")


def check_position(name: str, value: SupportsFloat | SupportsIndex) -> float:
    """Return a value as a float; raise unless it is a valid position in beats.

    Args:
      name: the name of the parameter, for the error's text.
      value: a real number, for example an int, a float, a `decimal.Decimal` or a
        `fractions.Fraction`. ``inf`` and ``-inf`` are valid.

    Raises:
      TypeError: if the value is not a real number. A bool and a str are not.
      ValueError: if it is NaN, or finite but too large for a float.

    """
    return _real(name, value, "a position in beats")


def _non_negative(name: str, value: SupportsFloat | SupportsIndex, what: str) -> float:
    number = _real(name, value, what)
    if number < 0:
        raise ValueError(f"`{name}` must be non-negative")
    return number


def _real(name: str, value: SupportsFloat | SupportsIndex, what: str) -> float:
    if not isinstance(value, (float, int)):
        # `float` also accepts strings and bytes, which are refused here.
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
        # `decimal` has a signaling NaN, which `float` refuses.
        number = math.nan
    if math.isnan(number):
        raise ValueError(f"`{name}` must not be NaN")
    if math.isinf(number) and value != number:
        # The text leaves out the digits: Python refuses to print an int with too many of them.
        raise ValueError(f"`{name}` must be {what} that a float can hold")
    return number


def check_integer(name: str, value: SupportsIndex, minimum: int) -> int:
    """Return a value as an int; raise unless it is an integer from ``minimum`` to 2**53.

    Args:
      name: the name of the parameter, for the error's text.
      value: an int, or an integer of another library, such as NumPy's.
      minimum: the least valid value.

    Raises:
      TypeError: if the value is not an integer. A bool and a float are not.
      ValueError: if it is NaN or out of range.

    """
    if value != value:  # noqa: PLR0124 - only NaN differs from itself
        raise ValueError(f"`{name}` must not be NaN")
    if isinstance(value, bool):
        raise TypeError(f"`{name}` must be an integer, not {value!r}")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"`{name}` must be an integer, not {value!r}") from None
    # Neither text has the digits of a huge number: Python refuses to print too many of them. A
    # message with a larger number than the maximum might not be readable for others.
    if number < minimum:
        raise ValueError(f"`{name}` must be at least {minimum}")
    if number > MAX_INDEX:
        raise ValueError(f"`{name}` must be at most {MAX_INDEX}")
    return number
