"""The model: the rule of timing, order, bounds, hostile input, pages and trees."""

from __future__ import annotations

import re
from typing import Any

import pytest
from msgspec import UNSET

from backbeat_trio._views import model as model_module
from backbeat_trio._views.model import ClusterModel, GridView, OperationView, Query
from backbeat_trio._wire import HEALTH_TASK_ID, StatusClaim

BAR = 8


def grid(position: float, **fields: Any) -> GridView:
    """A grid of one beat a second."""
    beat = int(position)
    given: dict[str, Any] = {
        "cluster_id": "c",
        "tempo_bpm": 60.0,
        "paused": False,
        "grid": "locked",
        "connected": True,
    }
    return GridView(
        position=position, beat=beat, bar=beat // BAR, beats_per_bar=BAR, **given | fields
    )


def claim(
    beat: int,
    *,
    agent: str = "a",
    id: str = "x",
    start: int | None = None,
    estimated: int = 4,
    state: str = "executing",
    phase: str = "executing",
    **fields: Any,
) -> StatusClaim:
    """A claim as an agent publishes it for an operation."""
    passed = beat - (beat if start is None else start)
    live = state == "executing"
    fields = {
        "cluster_id": "c",
        "operation_type": "search",
        "phase": phase if live else "completed" if state == "done" else "failed",
        "peers": 2,
        "estimated_beats": estimated,
        "notes": f"P2P search: {phase} (peers: 2, node: n)",
        "beats_left": max(0, estimated - passed) if live else 0,
        "progress": min(1.0, passed / estimated) if live else float(state == "done"),
    } | fields
    return StatusClaim(agent_id=agent, task_id=id, beat_index=beat, state=state, **fields)  # type: ignore[arg-type]


def health(beat: int, *, agent: str = "a", state: str = "waiting") -> StatusClaim:
    return StatusClaim(agent, HEALTH_TASK_ID, beat, state, 0, 1.0, "CHORUS P2P", "c")  # type: ignore[arg-type]


class Watched:
    """A model with a grid of one beat a second, and instants that are beats."""

    def __init__(self, position: float = 100.0, **bounds: int) -> None:
        self.model = ClusterModel(**bounds)
        self.now = 1000.0
        self.position = position
        self.look()

    def look(self, **fields: Any) -> None:
        self.model.set_grid(grid(self.position, **fields), self.now)

    def go(self, beats: float, **fields: Any) -> None:
        self.now += beats
        if not fields.get("paused"):
            self.position += beats
        self.look(**fields)

    def take(self, *claims: StatusClaim) -> None:
        self.model.take(claims, self.now)

    def seen(self, id: str = "x", agent: str = "a") -> OperationView:
        found = self.model.operation(agent, id)
        assert found is not None
        return found


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
