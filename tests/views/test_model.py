"""The model: the rule of timing, order, bounds, hostile input, pages and trees."""

from __future__ import annotations

import re
from typing import Any

import pytest
from msgspec import UNSET
from watched import Watched, claim

from backbeat_trio._views import model as model_module
from backbeat_trio._views.model import Query


def cases() -> list[tuple[str, ...]]:
    """Return the rows of the table in the docstring of the module."""
    rows = re.findall(r"^(live|done|failed) +(.*)$", model_module.__doc__ or "", re.MULTILINE)
    return [(outcome, *rest.split()) for outcome, rest in rows]


@pytest.mark.parametrize(
    ("outcome", "unheard", "paused", "passed", "soft", "timing"), cases(), ids=" ".join
)
def test_timing_is_that_of_the_table(
    outcome: str, unheard: str, paused: str, passed: str, soft: str, timing: str
) -> None:
    watched = Watched()
    state = "executing" if outcome == "live" else outcome
    fields: dict[str, Any] = {"start": 100, "soft": soft == "yes" or UNSET}
    watched.take(claim(100, start=100))
    watched.go(int(passed))
    watched.take(claim(100 + int(passed), state=state, **fields))
    watched.go(int(unheard))
    if paused == "yes":
        watched.go(5, paused=True, tempo_bpm=0.0)
    seen = watched.seen()
    assert (seen.outcome, seen.timing) == (outcome, timing)
    assert seen.passed == int(passed)
    assert watched.model.operations(Query(timing=seen.timing)).items == (seen,)


def test_the_table_has_cases_of_each_timing() -> None:
    assert {case[-1] for case in cases()} == {"on_time", "slow", "late", "silent"}
