"""``backbeat tempo``, ``pause`` and ``resume``: the tempo, and changes of it."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, Final

import click
import msgspec

from .._errors import MetronomeUnavailable
from .._runtime.health import Health, PendingChange
from .._session.lifecycle import session
from .._wire import encode
from .connection import ConnectedCommand, Connection, settings, takes_connection
from .parameters import index, tempo

_DAY: Final = 86400.0

_as_json = click.option("-j", "--json", "as_json", is_flag=True, help="As JSON.")
_yes = click.option("--yes", is_flag=True, help="Also if the beat is more than a day ahead.")


@click.command("tempo", cls=ConnectedCommand)
@click.argument("bpm", type=tempo, required=False, metavar="[BPM]")
@click.option(
    "--at-beat",
    type=index,
    metavar="N",
    help="The beat on which it changes. By default the next downbeat that leaves time to announce "
    "it.",
)
@click.option(
    "--over",
    type=index,
    default=0,
    metavar="BEATS",
    help="Change it step by step over so many beats, in up to 64 steps; by default at once.",
)
@_yes
@_as_json
@takes_connection()
def change_tempo(
    connection: Connection,
    bpm: float | None,
    at_beat: int | None,
    over: int,
    yes: bool,
    as_json: bool,
) -> Coroutine[Any, Any, int]:
    """Change the tempo of the cluster to BPM beats a minute; without BPM, show the tempo.

    It changes on the same beat for all agents. Without BPM it shows the present tempo, and the
    changes that are to come.
    """
    if bpm is not None:
        return _change_tempo(connection, bpm, at_beat, over, yes, as_json)
    if at_beat is not None or over:
        raise click.UsageError(
            "Options --at-beat and --over need the BPM to change to.", click.get_current_context()
        )
    return _show_tempo(connection, as_json)


async def _change_tempo(
    connection: Connection, bpm: float, at_beat: int | None, over: int, yes: bool, as_json: bool
) -> int:
    async with session(settings(connection), require_connection=True) as bb:
        _check_beat(bb.health(), at_beat, yes)
        beat = await bb.set_tempo(bpm, at_beat=at_beat, over=over)
    values: dict[str, Any] = {"tempo_bpm": bpm, "effective_beat": beat}
    text = f"{bpm:g} BPM from beat {beat}"
    if over:
        values["over_beats"] = over
        text += f" on, over {over} beats"
    click.echo(encode(values) if as_json else text)
    return 0


async def _show_tempo(connection: Connection, as_json: bool) -> int:
    async with session(settings(connection), require_connection=True) as bb:
        health = bb.health()
    if health.leader_id is None:
        raise MetronomeUnavailable(f"no metronome in cluster {bb.config.cluster_id}")
    if as_json:
        values = {
            "tempo_bpm": health.current_tempo,
            "current_beat": health.current_beat,
            "paused": health.paused,
            "pending": msgspec.to_builtins(health.pending),
        }
        click.echo(encode(values))
        return 0
    click.echo(f"{format_tempo(health)} on beat {health.current_beat}")
    for change in health.pending:
        click.echo(format_change(change, health))
    return 0


@click.command("pause", cls=ConnectedCommand)
@click.option(
    "--at-beat",
    type=index,
    metavar="N",
    help="The beat on which it pauses. By default the next one that leaves time to announce it.",
)
@_yes
@_as_json
@takes_connection()
async def pause_grid(connection: Connection, at_beat: int | None, yes: bool, as_json: bool) -> int:
    """Pause the cluster: no beat passes, and every budget waits, until 'backbeat resume'."""
    async with session(settings(connection), require_connection=True) as bb:
        _check_beat(bb.health(), at_beat, yes)
        beat = await bb.pause(at_beat=at_beat)
    values = {"paused": True, "effective_beat": beat}
    click.echo(encode(values) if as_json else f"paused from beat {beat} on")
    return 0


@click.command("resume", cls=ConnectedCommand)
@_as_json
@takes_connection()
async def resume_grid(connection: Connection, as_json: bool) -> int:
    """End a pause: the cluster goes on at the tempo that it had before."""
    async with session(settings(connection), require_connection=True) as bb:
        beat = await bb.resume()
    values = {"paused": False, "effective_beat": beat}
    click.echo(encode(values) if as_json else f"resumed from beat {beat} on")
    return 0


def format_tempo(health: Health) -> str:
    """Write the tempo for people."""
    return "paused" if health.paused else f"{health.current_tempo:g} BPM"


def format_change(change: PendingChange, health: Health) -> str:
    """Write a change that is to come for people."""
    what = f"{change.tempo_bpm:g} BPM" if change.tempo_bpm else "a pause"
    seconds = seconds_until(health, change.beat)
    when = "" if seconds is None else f", in {format_seconds(seconds)}"
    return f"{what} from beat {change.beat}{when}"


def seconds_until(health: Health, beat: int) -> float | None:
    """Return about how many seconds it takes until a beat; None if a pause comes before it."""
    seconds, position, tempo = 0.0, health.current_beat, health.current_tempo
    for change in health.pending:
        if change.beat >= beat:
            break
        if not tempo:
            return None
        seconds += (change.beat - position) * 60 / tempo
        position, tempo = change.beat, change.tempo_bpm
    return seconds + (beat - position) * 60 / tempo if tempo else None


def format_seconds(seconds: float) -> str:
    """Write a length of time in the unit that suits it."""
    for name, size in (("days", _DAY), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {name}"
    return f"{seconds:.3g} s"


def _check_beat(health: Health, beat: int | None, yes: bool) -> None:
    # If a beat was typed with a digit too many, its change would come when nobody expects it any
    # more. The leader itself refuses beats that are past, because it knows the present beat.
    if beat is None or yes or health.leader_id is None:
        return
    seconds = seconds_until(health, beat)
    if seconds is not None and seconds > _DAY:
        raise click.ClickException(
            f"beat {beat} is {format_seconds(seconds)} ahead, as the cluster is on beat "
            f"{health.current_beat}: say --yes if that is what you mean"
        )
