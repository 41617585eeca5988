"""How a session fills a model: claims as they come, and the grid several times a second."""

from __future__ import annotations

from typing import Final

import trio

from .._runtime.claims import ClaimBatches
from .._session.session import Session
from .model import ClusterModel, GridView

INTERVAL: Final = 0.25
"""How often the grid of a model is set, in seconds."""


def grid_view(bb: Session, *, claims_refused: bool = False) -> GridView:
    """Return the grid as a session knows it. Not a checkpoint.

    Args:
      bb: the session.
      claims_refused: as in `GridView`.

    """
    health, clock = bb.health(), bb._runtime.clock
    position, beats_per_bar = clock.position(), clock.grid.beats_per_bar
    late_ns = clock.punctuality.late_ns
    return GridView(
        cluster_id=bb.config.cluster_id,
        position=position,
        beat=int(position),
        bar=int(position) // beats_per_bar,
        beats_per_bar=beats_per_bar,
        tempo_bpm=health.current_tempo,
        paused=health.paused,
        grid=health.grid,
        connected=health.connected,
        leader_id=health.leader_id,
        epoch=health.epoch,
        standbys=health.standbys,
        pending=health.pending,
        tempo_drift=health.tempo_drift,
        measured_bpm=health.measured_bpm,
        uncertainty=health.uncertainty,
        last_frame_age=health.last_frame_age,
        lateness=None if late_ns is None else late_ns / 1e9,
        errors=health.errors,
        claims_refused=claims_refused,
    )


async def follow(
    bb: Session,
    model: ClusterModel,
    *,
    interval: float = INTERVAL,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Fill a model from a session, until cancelled.

    While there is no connection, the grid goes on being set, and claims come again once there is
    one. Use it as ``await nursery.start(follow, bb, model)``, which returns when the model has its
    first grid and claims are listened to.

    Args:
      bb: an open session.
      model: the model, which nothing else should fill.
      interval: how often the grid is set, in seconds.
      task_status: as `trio.Nursery.start` passes it.

    Raises:
      BackbeatError: if the session is disabled.
      TransportClosed: if the session is left meanwhile.
      SessionClosed: if the session was left.

    """
    async with bb.open_claims(batched=True) as batches, trio.open_nursery() as nursery:

        def set_grid() -> None:
            assert isinstance(batches, ClaimBatches)
            grid = grid_view(bb, claims_refused=batches.refusal is not None)
            model.set_grid(grid, trio.current_time())

        async def look() -> None:
            while True:
                set_grid()
                await trio.sleep(interval)

        set_grid()
        nursery.start_soon(look)
        task_status.started()
        async for claims in batches:
            model.take(claims, trio.current_time())
