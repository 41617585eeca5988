"""Numbers become floats, and what is no number is refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, strategies as st

from backbeat_trio._checks import check_beats, check_position

CHECKS = pytest.mark.parametrize("check", [check_beats, check_position])


class Measured:
    """A number of another library."""

    def __float__(self) -> float:
        return 2.5


@CHECKS
@pytest.mark.parametrize(
    ("value", "number"),
    [
        (2, 2.0),
        (0, 0.0),
        (2.5, 2.5),
        (math.inf, math.inf),
        (Decimal("2.5"), 2.5),
        (Decimal("Infinity"), math.inf),
        (Fraction(5, 2), 2.5),
        (Measured(), 2.5),
        pytest.param(2**1023, 2.0**1023, id="large"),
    ],
)
def test_numbers_become_floats(check: Callable[..., float], value: Any, number: float) -> None:
    checked = check("beats", value)
    assert type(checked) is float
    assert checked == number


@CHECKS
@pytest.mark.parametrize("value", ["5", b"5", bytearray(b"5"), None, True, False, 1j, [1], object])
def test_what_is_no_number_is_refused(check: Callable[..., float], value: Any) -> None:
    with pytest.raises(TypeError, match="`beats` must be a "):
        check("beats", value)


@CHECKS
@pytest.mark.parametrize("value", [math.nan, Decimal("NaN"), Decimal("sNaN")])
def test_nan_is_refused(check: Callable[..., float], value: Any) -> None:
    with pytest.raises(ValueError, match="`beats` must not be NaN"):
        check("beats", value)


@CHECKS
@pytest.mark.parametrize(
    "value",
    [10**400, -(10**400), 10**5000, Decimal("1e400"), Fraction(10**400)],
    ids=["int", "negative int", "longer than Python prints", "Decimal", "Fraction"],
)
def test_what_no_float_can_hold_is_refused(check: Callable[..., float], value: Any) -> None:
    with pytest.raises(ValueError, match="`beats` must be a .* that a float can hold"):
        check("beats", value)


@pytest.mark.parametrize("value", [-1, -0.5, Decimal(-1), Fraction(-1, 3), -math.inf])
def test_only_positions_are_negative(value: Any) -> None:
    assert check_position("beat", value) == float(value)
    with pytest.raises(ValueError, match="`beats` must be non-negative"):
        check_beats("beats", value)


@given(st.one_of(st.integers(), st.floats(allow_nan=False), st.fractions()))
def test_a_checked_number_is_the_nearest_float(value: Any) -> None:
    assert check_position("beat", value) == float(value)
