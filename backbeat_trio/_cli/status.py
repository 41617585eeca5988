"""``backbeat status``: the health of a connection to the cluster."""

from __future__ import annotations

import sys
from typing import Final, NamedTuple

import click
import msgspec
import trio

from .._config import BackbeatConfig, redact_url
from .._runtime.health import Health
from .._session.lifecycle import session
from .._wire import encode
from .connection import ConnectedCommand, Connection, settings, takes_connection
from .listening import seconds_to_listen
from .parameters import beats
from .tempo import format_change, format_seconds, format_tempo

# A width at which no line is broken.
_UNLIMITED: Final = 1_000_000


class Verdict(NamedTuple):
    """The first line of the status."""

    word: str
    """``"healthy"``, ``"paused"``, ``"degraded"`` or ``"disabled"``."""
    reason: str
    """Why, for people."""


@click.command("status", cls=ConnectedCommand)
@click.option("-j", "--json", "as_json", is_flag=True, help="As JSON: all fields of health().")
@click.option(
    "--wait", type=beats, default=0.0, metavar="BEATS", help="Listen for so many beats first."
)
@takes_connection()
async def show_status(connection: Connection, as_json: bool, wait: float) -> int:
    """Show whether the cluster's beats arrive here, and how well.

    Exits 0 if all is well or the cluster is paused, and 1 if this session is degraded: it has no
    server or no metronome, or this process is late itself.
    """
    async with session(settings(connection)) as bb:
        await trio.sleep(seconds_to_listen(bb.health(), wait))
        health = bb.health()
    if as_json:
        click.echo(encode(msgspec.to_builtins(health)))
    else:
        verdict = judge(health, bb.config)
        color = {"healthy": "green", "paused": "yellow"}.get(verdict.word, "red")
        click.echo(f"{click.style(verdict.word, fg=color, bold=True)}: {verdict.reason}\n")
        click.echo(_format(health, bb.config), nl=False)
    return 1 if health.local_degradation else 0


def judge(health: Health, config: BackbeatConfig) -> Verdict:
    """Sum up the health of a session in a word and its reason."""
    if not health.enabled:
        return Verdict("disabled", "CHORUS_BACKBEAT_ENABLED is false, so no budget is enforced")
    if health.local_degradation:
        return Verdict("degraded", _why_degraded(health, config))
    if health.paused:
        return Verdict("paused", f"{health.leader_id} leads, and every budget waits on this beat")
    return Verdict("healthy", f"this session follows the beats of {health.leader_id}")


def _why_degraded(health: Health, config: BackbeatConfig) -> str:
    newest = health.errors[-1] if health.errors else ""
    if not health.connected:
        return newest or f"no connection to {redact_url(config.nats_url)}"
    if health.grid == "local":
        return f"no metronome in cluster {config.cluster_id}"
    if health.grid == "holdover":
        return f"no metronome is heard any more in cluster {config.cluster_id}"
    return newest or "frames are missing, or this process was late for a beat"


def _format(health: Health, config: BackbeatConfig) -> str:
    terminal = sys.stdout is not None and sys.stdout.isatty()
    width = click.get_current_context().terminal_width if terminal else _UNLIMITED
    formatter = click.HelpFormatter(width=width)
    for title, rows in _groups(health, config).items():
        with formatter.section(title):
            formatter.write_dl(rows)
    return formatter.getvalue()


def _groups(health: Health, config: BackbeatConfig) -> dict[str, list[tuple[str, str]]]:
    cluster = [("name", config.cluster_id)]
    if health.leader_id is None:
        cluster.append(("metronome", "no metronome"))
    else:
        cluster += [
            ("metronome", f"{health.leader_id}, epoch {health.epoch}"),
            ("standing by", "unknown" if health.standbys is None else str(health.standbys)),
            ("beat", str(health.current_beat)),
            ("tempo", format_tempo(health)),
            *(("to come", format_change(change, health)) for change in health.pending),
        ]
    clock = [("grid", _format_grid(health))]
    if health.last_frame_age is not None:
        clock.append(("last frame", f"{format_seconds(health.last_frame_age)} ago"))
    if health.grid == "locked":
        if health.measured_bpm is not None:
            clock.append(("frames arrive at", f"{health.measured_bpm:.6g} BPM"))
        clock.append(("tempo drift", health.tempo_drift))
    if health.uncertainty is not None:
        clock.append(("uncertainty", f"{health.uncertainty * 1e3:.3g} ms"))
    return {
        "Cluster": cluster,
        "Clock": clock,
        "Connection": [
            ("server", redact_url(config.nats_url)),
            ("connected", "yes" if health.connected else "no"),
            ("reconnects", str(health.reconnect_count)),
            *(("error", error) for error in health.errors),
        ],
        "This process": [
            ("agent", config.agent_id),
            ("node", health.node_id),
            ("operations", str(health.active_operations)),
        ],
    }


def _format_grid(health: Health) -> str:
    if health.grid == "locked":
        return "locked to the cluster's"
    # No tempo of the cluster's is known at present.
    beat = f"{60 / health.current_tempo:.6g} s a beat" if health.current_tempo else "paused"
    if health.grid == "holdover":
        return f"holdover: continued here as it was last heard, {beat}"
    return f"local: only this process counts it, {beat}"
