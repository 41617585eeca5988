"""A model of a cluster with a grid of one beat a second, and claims as agents publish them."""

from __future__ import annotations

from typing import Any

from backbeat_trio._views.model import ClusterModel, GridView, OperationView
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
