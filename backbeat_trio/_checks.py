"""Checks of arguments. Each names the parameter in the error that it raises."""

from __future__ import annotations

import math
import operator
from typing import SupportsIndex

from ._wire import MAX_INDEX


def check_beats(name: str, value: float) -> float:
    """Return a number of beats; raise unless it is 0 or more."""
    try:
        good = value >= 0
    except TypeError:
        good = None
    if good is None or isinstance(value, str):
        raise TypeError(f"`{name}` must be a number of beats, not {value!r}")
    if not good:
        nan = value != value  # noqa: PLR0124 - NaN is what differs from itself
        raise ValueError(f"`{name}` must {'not be NaN' if nan else 'be non-negative'}")
    return value


def check_position(name: str, value: float) -> float:
    """Return a position in beats; raise unless it is a number other than NaN."""
    try:
        nan = math.isnan(value)
    except TypeError:
        raise TypeError(f"`{name}` must be a position in beats, not {value!r}") from None
    if nan:
        raise ValueError(f"`{name}` must not be NaN")
    return value


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
