"""Listening to a cluster for a while: its claims, its services, and how late this process is."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncIterator, Callable
from typing import Final

import click
import trio

from .._errors import BackbeatError, PermissionDenied, TransportBroken
from .._runtime.claims import StoredThenLive
from .._runtime.health import Health
from .._session.session import Session
from .._transport.adr32 import Info
from .._transport.discovery import find_services
from .._views.feed import grid_view
from .._views.model import ClusterModel, clean
from .._wire import StatusClaim, status_subject

# Live operations claim on each beat, so one beat and a margin brings them all. A second one shows
# which of those whose budget has run out are late. The margin is in parts of a beat and in seconds.
_PART: Final = 0.25
_MARGIN: Final = 0.25
# The longest that is listened if nobody has said how long, in seconds: a little less than
# monitoring systems wait for a plug-in.
_LONGEST: Final = 50.0
# How long is listened while the grid is paused, when no claims come, and if no metronome is heard,
# when nobody knows how long the beats of agents are. In seconds.
_PAUSED: Final = 1.0
_ALONE: Final = 3.0
# How much the model keeps of operations that have ended. Listening is short, so it is all of them.
_KEEP_BARS: Final = 2**40
# From how many seconds on it is said that it takes some time.
_WORTH_A_WORD: Final = 2.0

METRONOME: Final = "backbeat-metronome"
AGENT: Final = "backbeat-agent"


class Heard:
    """What was heard of a cluster.

    Attributes:
      model: the claims.
      refusal: why no claims could be heard; None if they could.
      services: the services that answered; None if nobody asked for them, or permissions refuse it.
      lateness: how late this process handled a beat at most, in seconds; None if there was none.
      beats: for how many beats claims were heard.

    """

    def __init__(self) -> None:
        self.model: ClusterModel = ClusterModel(keep_bars=_KEEP_BARS)
        self.refusal: str | None = None
        self.services: list[Info] | None = None
        self.lateness: float | None = None
        self.beats: float = 0.0

    def metadata(self, name: str, cluster_id: str) -> list[Info]:
        """Return the instances of one of our own services in a cluster."""
        return [
            info
            for info in self.services or ()
            if info.name == name and info.metadata.get("cluster") == cluster_id
        ]


def seconds_to_listen(health: Health, wait: float | None, claims: int = 1) -> float:
    """Return for how many seconds to listen, at the present tempo.

    In a pause no beat comes, and it is one second.

    Args:
      health: the health of the session that listens.
      wait: for how many beats; None is until so many claims of each live operation have come, with
        a margin, and 50 s at most.
      claims: how many.

    """
    if not health.current_tempo:
        return _PAUSED if wait is None or wait else 0.0
    beat = 60 / health.current_tempo
    if wait is not None:
        return wait * beat
    if health.grid == "local":
        return _ALONE
    return min((claims + _PART) * beat + _MARGIN, _LONGEST)


async def listen(
    bb: Session,
    *,
    wait: float | None,
    claims: int = 1,
    agent_id: str = "*",
    since: float | None = None,
    services: bool = False,
    until: Callable[[ClusterModel], bool] | None = None,
) -> Heard:
    """Listen to the claims of a cluster for some beats. A checkpoint.

    Args:
      bb: the session.
      wait: for how many beats, as for `seconds_to_listen`.
      claims: as for `seconds_to_listen`.
      agent_id: the agent to listen to; ``"*"`` is all of them.
      since: for how many seconds claims that were stored are read first; None reads none.
      services: whether services are asked for, too.
      until: ends it as soon as this is true of what was heard.

    Raises:
      ClaimsUnavailable: with ``since``, if nothing stores claims.
      PermissionDenied: with ``since``, if the server's permissions refuse to read them.
      TransportBroken: with ``since``, if JetStream does not answer.

    """
    heard = Heard()
    seconds = seconds_to_listen(bb.health(), wait, claims)
    async with (
        bb.open_claims(agent_id, batched=True, since=since) as batches,
        trio.open_nursery() as nursery,
    ):
        if services:
            nursery.start_soon(_find, bb, heard)
        async with trio.open_nursery() as listening:
            listening.start_soon(_take, bb, heard, batches, until, listening.cancel_scope)
            listening.start_soon(_watch_lateness, bb, heard)
            if isinstance(batches, StoredThenLive):
                await batches.went_live.wait()
            begun = bb.current_position()
            await trio.sleep(seconds)
            heard.beats = bb.current_position() - begun
            listening.cancel_scope.cancel()
    heard.model.set_grid(grid_view(bb), trio.current_time())
    heard.refusal = _refusal_of(bb, status_subject(agent_id))
    return heard


def announce(bb: Session, wait: float | None, claims: int = 1) -> None:
    """Say at a terminal for how long it is listened.

    Args:
      bb: the session.
      wait: as for `seconds_to_listen`.
      claims: as for `seconds_to_listen`.

    """
    seconds = seconds_to_listen(bb.health(), wait, claims)
    if sys.stdout is not None and sys.stdout.isatty() and seconds >= _WORTH_A_WORD:
        click.echo(f"backbeat: listening for {seconds:.3g} s; Ctrl-C ends it", err=True)


def complain(heard: Heard) -> None:
    """Say what may be missing, and why.

    Args:
      heard: what was heard.

    Raises:
      PermissionDenied: if permissions refuse the claims.
      TransportBroken: if the connection was lost.

    """
    grid = heard.model.grid
    if heard.refusal is not None:
        raise PermissionDenied(heard.refusal)
    if grid is None:
        return
    if not grid.connected:
        # What was heard before that may be anything from all to nothing.
        why = f": {clean(grid.errors[-1])}" if grid.errors else ""
        raise TransportBroken(f"the connection was lost meanwhile{why}")
    if grid.paused:
        click.echo("backbeat: the cluster is paused, so operations publish no claims", err=True)
    elif grid.leader_id is None:
        text = f"no metronome is heard in cluster {grid.cluster_id}, so claims may be missing"
        click.echo(f"backbeat: {text}", err=True)
    totals = heard.model.totals()
    if totals.dropped_agents or totals.dropped_operations:
        text = f"{totals.dropped_agents} agents and {totals.dropped_operations} operations"
        click.echo(f"backbeat: too many were heard: {text} are left out", err=True)


async def services_of(bb: Session, name: str = "") -> list[Info]:
    """Ask over a session which services there are. A checkpoint.

    Args:
      bb: the session.
      name: the name of the services; an empty string is all of them.

    Raises:
      BackbeatError: if the session is disabled.
      PermissionDenied: if the server's permissions refuse it.
      TransportBroken: if there is no connection.

    """
    transport = bb._runtime.transport
    if transport is None:
        raise BackbeatError("the session is disabled, so it finds no services")
    return await find_services(transport, name)


async def _take(
    bb: Session,
    heard: Heard,
    batches: AsyncIterator[list[StatusClaim]],
    until: Callable[[ClusterModel], bool] | None,
    listening: trio.CancelScope,
) -> None:
    model = heard.model
    model.set_grid(grid_view(bb), trio.current_time())
    async for batch in batches:
        model.take(batch, trio.current_time())
        if until is not None and until(model):
            listening.cancel()


async def _watch_lateness(bb: Session, heard: Heard) -> None:
    async for beat in bb.beats():
        if beat.tempo_bpm:
            late = (bb.current_position() - beat.index) * 60 / beat.tempo_bpm
            heard.lateness = max(heard.lateness or 0.0, late)


async def _find(bb: Session, heard: Heard) -> None:
    # Without this permission, or without a connection, agents and metronomes are not found.
    with contextlib.suppress(TransportBroken):
        heard.services = await services_of(bb)


def _refusal_of(bb: Session, subject: str) -> str | None:
    counters = bb.statistics().transport
    refused = () if counters is None else counters.refused
    if any(what == f"subscription to {subject}".lower() for what, _ in refused):
        return (
            f"permission denied: this user may not subscribe to {subject}; docs/security.md says "
            "what each role may do"
        )
    return None
