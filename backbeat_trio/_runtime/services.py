"""What a session logs and counts, and the small services: ticking, and watching the connection."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import trio

from .._errors import Logger
from .._time.clock import BeatClock, Beats
from .._transport.protocol import Transport
from .._wire import format_bpm


@final
class Counters:
    """What a session counts of claims; made an immutable snapshot by `Session.statistics`."""

    def __init__(self) -> None:
        self.claims_sent = 0
        self.claims_stored = 0
        self.claims_coalesced = 0
        self.claims_undecodable = 0


async def tick(
    clock: BeatClock,
    logger: Logger,
    on_beat: Callable[[int, int], None],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Log every beat, and call ``on_beat`` with its index and how many were skipped before it."""
    beats = Beats(clock, bars=False)
    task_status.started()
    async for beat in beats:
        tempo = format_bpm(round(beat.tempo_bpm * 1000))
        logger.debug(
            "🥁 BACKBEAT beat received - beat=%d phase=%s tempo=%s window=%s",
            beat.index,
            beat.phase,
            tempo,
            beat.window_id,
        )
        if beat.downbeat:
            logger.debug(
                "🎼 BACKBEAT downbeat - new bar started - beat=%d window=%s",
                beat.index,
                beat.window_id,
            )
        on_beat(beat.index, beat.skipped)


async def watch_connection(
    transport: Transport,
    logger: Logger,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Log when the connection comes and goes."""
    task_status.started()
    while True:
        await transport.wait_connected()
        logger.info("connected")
        await transport.wait_connected(False)
        # Not the error of the present: by now there may be a connection again.
        errors = transport.statistics().recent_errors
        logger.warning("connection lost: %s", errors[-1][1] if errors else "closed")
