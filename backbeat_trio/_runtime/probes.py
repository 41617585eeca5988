"""Whether a process is alive and ready, in the way that Kubernetes and load balancers ask.

The two questions are kept apart, because the answers have different consequences. A process that is
not alive is killed and started again, so only its own event loop counts: a new process would not
bring back a server or a metronome. A process that is not ready gets no new work until it is.
"""

from __future__ import annotations

from typing import Final, final

import trio
from msgspec import Struct

from .._metronome.metronome import Metronome
from .._transport.protocol import Transport
from .health import Health

ALIVE_WITHIN: Final = 10.0
"""How old the last tick of a loop may be, in seconds, by default."""

# How many seconds pass between two ticks.
_EVERY: Final = 0.5


class Alive(Struct, frozen=True):
    """The answer to a liveness probe.

    Attributes:
      ok: whether the event loop turns.
      tick_age: how long ago it last ticked, in seconds.

    """

    ok: bool
    tick_age: float


class Ready(Struct, frozen=True):
    """The answer to a readiness probe.

    Attributes:
      ok: whether the process should get work.
      reason: why not, for people to read; empty if it is ready.
      connected: whether there is a connection to the server.
      grid: as in `Health`.
      last_frame_age: how long ago the last valid beat frame arrived, in seconds; None before the
        first one.

    """

    ok: bool
    reason: str
    connected: bool
    grid: str
    last_frame_age: float | None


def judge_alive(tick_age: float, limit: float = ALIVE_WITHIN) -> Alive:
    """Return whether a loop is alive, by the age of its last tick and nothing else.

    Args:
      tick_age: the age, in seconds.
      limit: how old the last tick may be, in seconds.

    """
    return Alive(tick_age <= limit, round(tick_age, 3))


def judge_ready(health: Health) -> Ready:
    """Return whether a session is ready: it has a connection, and a fresh beat of a metronome.

    A beat is fresh if not two beat frames in a row are missing. So a pause of the grid, in which
    there are no frames, does not make a session unready. A disabled session needs neither
    connection nor beats, and is ready while it is open.
    """
    if not health.started:
        reason = "the session is not open"
    elif not health.enabled or (health.connected and health.grid == "locked"):
        reason = ""
    elif not health.connected:
        reason = "there is no connection to the server"
    elif health.grid == "local":
        reason = "no metronome has been heard yet"
    else:
        reason = "no metronome is heard any more"
    return Ready(not reason, reason, health.connected, health.grid, health.last_frame_age)


def judge_metronome(metronome: Metronome, transport: Transport) -> Ready:
    """Return whether a metronome is ready: it has a connection, and leads or hears the leader.

    A standby is ready as soon as it could take over. So a rolling update waits until the next
    metronome has locked to the grid, before it ends the one after.
    """
    if not transport.connected:
        reason = "there is no connection to the server"
    elif metronome.leads or metronome.stands_by:
        reason = ""
    else:
        reason = "it neither leads nor hears a leader"
    return Ready(not reason, reason, transport.connected, "" if reason else "locked", None)


@final
class LoopTicks:
    """Ticks in Trio's loop, and knows how long ago the last tick was.

    Beats cannot serve for this: they may be minutes apart, and a paused grid has none.
    """

    def __init__(self) -> None:
        self._last = trio.current_time()

    @property
    def age(self) -> float:
        """How long ago the last tick was, in seconds."""
        return max(0.0, trio.current_time() - self._last)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Tick twice a second until cancelled. A checkpoint."""
        self._last = trio.current_time()
        task_status.started()
        while True:
            await trio.sleep(_EVERY)
            self._last = trio.current_time()
