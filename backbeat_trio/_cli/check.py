"""``backbeat check``: a verdict on the cluster for monitoring systems."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, Final, final

import click
import msgspec
from click.shell_completion import CompletionItem

from .._config import PREFIX, BackbeatConfig
from .._errors import BackbeatError
from .._runtime.health import Health
from .._session.lifecycle import session
from .._session.session import Session
from .._views.model import Query
from .._views.shown import clean
from .._wire import beat_subject, sync_subject
from .connection import Command, ConnectedCommand, Connection, settings, takes_connection
from .listening import AGENT, Heard, listen
from .measures import (
    KINDS,
    Found,
    Limits,
    Report,
    Status,
    default_limits,
    format_nagios,
    format_prometheus,
    judge,
    unknown,
)
from .parameters import beats, duration
from .reach import text_of

# For so many beats it must listen before an operation can be silent for three.
_SILENCE: Final = 4
_DRIFTS: Final = {
    "acceptable": Status.OK,
    "elevated": Status.WARNING,
    "severe": Status.CRITICAL,
}
_COLOURS: Final = {"ok": "green", "warning": "yellow", "critical": "red", "unknown": "magenta"}
_NAMES: Final = ", ".join(KINDS)


class _Mistake(click.UsageError):
    # Monitoring systems take the usual exit status of 2 for a verdict.
    exit_code = int(Status.UNKNOWN)


@final
class _Check(ConnectedCommand):
    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        try:
            return super().make_context(*args, **kwargs)
        except click.UsageError as error:
            raise _Mistake(error.format_message(), error.ctx) from None


def threshold(text: str) -> tuple[str, float]:
    """Return the name of a measure and its limit, from a text such as ``late=3``.

    Raises:
      click.BadParameter: unless there is such a measure, and the limit is one of it.
    """
    name, _, value = text.partition("=")
    if name not in KINDS:
        raise click.BadParameter(f"{name!r} is not one of {_NAMES}")
    unit, number = KINDS[name].unit, -1.0
    try:
        if unit == "s" and value != "0":
            number = duration(value)
        elif unit == "ratio":
            number = float(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
        else:
            number = int(value)
    except (ValueError, click.BadParameter):
        pass
    # NaN fails every comparison.
    if not 0 <= number < 2**53:
        example = {"s": "5ms", "ratio": "0.1%", "": "3"}[unit]
        raise click.BadParameter(f"{text!r} has no limit such as {name}={example}")
    return name, number


def _complete_threshold(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    return [CompletionItem(f"{name}=") for name in KINDS if name.startswith(incomplete)]


def _limit(flag: str, field: str, what: str) -> Callable[[Command], Command]:
    return click.option(
        flag,
        field,
        type=threshold,
        multiple=True,
        metavar="NAME=VALUE",
        shell_complete=_complete_threshold,
        help=f"{what} beyond this value, such as late=3, uncertainty=5ms or drift=0.1%; may be "
        f"repeated. NAME is one of: {_NAMES}.",
    )


@click.command("check", cls=_Check)
@_limit("--warn", "warn", "A warning")
@_limit("--critical", "critical", "Critical")
@click.option(
    "--agents",
    type=click.IntRange(0),
    metavar="N",
    help="Critical with fewer agents, as --critical agents=N.",
)
@click.option(
    "--standbys",
    type=click.IntRange(0),
    metavar="N",
    help="A warning with fewer metronomes that stand by, as --warn standbys=N; by default 1.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "json", "nagios", "prometheus"]),
    default="text",
    metavar="FORMAT",
    help="How to write the verdict: as text, json, nagios (with performance data) or prometheus "
    "(a file for the node exporter).",
)
@click.option(
    "--wait",
    type=beats,
    metavar="BEATS",
    help="Listen for so many beats; by default two and a margin, and at most 50 s. 0 does not look "
    "at operations.",
)
@takes_connection()
async def check_cluster(
    connection: Connection,
    warn: tuple[tuple[str, float], ...],
    critical: tuple[tuple[str, float], ...],
    agents: int | None,
    standbys: int | None,
    form: str,
    wait: float | None,
) -> int:
    """Check the cluster as a plug-in of a monitoring system does.

    Exits 0 if all is well, 1 for a warning, 2 if something is critical, and 3 if that could not be
    found out: there is no connection, permissions refuse it, or the arguments are wrong.
    """
    asked = Limits(
        ({} if standbys is None else {"standbys": float(standbys)}) | dict(warn),
        ({} if agents is None else {"agents": float(agents)}) | dict(critical),
    )
    report = await _report(connection, asked, wait)
    if form == "json":
        click.echo(msgspec.json.encode(report))
    elif form == "text":
        click.echo(_format(report), nl=False)
    else:
        formatted = format_nagios(report) if form == "nagios" else format_prometheus(report)
        click.echo(formatted, nl=False)
    return report.exit_code


async def _report(connection: Connection, asked: Limits, wait: float | None) -> Report:
    cluster_id, reports = "", list[Report]()
    try:
        config = settings(connection)
        cluster_id = config.cluster_id
        if not config.enabled:
            return unknown(cluster_id, f"{PREFIX}ENABLED is false, so nothing is measured")
        async with session(config, require_connection=True) as bb:
            # Without a metronome there is a verdict already, and nobody knows how long beats are.
            wait = 0.0 if bb.health().grid == "local" else wait
            heard = await listen(bb, wait=wait, claims=2, services=True)
            reports.append(_judge(bb, heard, asked))
    except* BackbeatError as group:
        reports.append(unknown(cluster_id, text_of(group)))
    return reports[-1]


def _judge(bb: Session, heard: Heard, asked: Limits) -> Report:
    health, config = bb.health(), bb.config
    if not health.connected:
        reason = clean(health.errors[-1]) if health.errors else "the connection was lost"
        return unknown(config.cluster_id, reason)
    refusal = _refusal_of_grid(bb)
    if refusal is not None:
        return unknown(config.cluster_id, refusal)
    beat = 60 / health.current_tempo if health.current_tempo else 0.0
    found = _found_grid(health, config)
    found["lateness"] = (
        Found(None, "no beat began meanwhile")
        if heard.lateness is None
        else Found(
            heard.lateness, f"this process was {heard.lateness * 1e3:.3g} ms late for a beat"
        )
    )
    found |= _found_operations(heard, config)
    return judge(config.cluster_id, found, default_limits(beat), asked, _summary(health, heard))


def _refusal_of_grid(bb: Session) -> str | None:
    counters = bb.statistics().transport
    refused = [] if counters is None else [what for what, _ in counters.refused]
    cluster_id, inbox = bb.config.cluster_id, f"subscription to {bb.config.inbox_prefix}."
    needed = (
        f"subscription to {beat_subject(cluster_id)}",
        f"publish to {sync_subject(cluster_id)}",
    )
    for what in refused:
        if what in map(str.lower, needed) or what.startswith(inbox.lower()):
            return (
                f"permission denied: {what}; `backbeat doctor` says what this user may do, and "
                "docs/security.md what it needs"
            )
    return None


def _found_grid(health: Health, config: BackbeatConfig) -> dict[str, Found]:
    found: dict[str, Found] = {}
    if health.leader_id is None:
        text = f"no metronome is heard in cluster {config.cluster_id}"
        return {"leader": Found(0.0, text)}
    found["leader"] = Found(1.0, f"{clean(health.leader_id)} leads in epoch {health.epoch}")
    if health.standbys is None:
        found["standbys"] = Found(None, "the leader has not said how many metronomes stand by")
    else:
        number = health.standbys
        text = f"{number} {'metronome stands' if number == 1 else 'metronomes stand'} by"
        found["standbys"] = Found(float(number), text)
    if health.uncertainty is None:
        found["uncertainty"] = Found(None, "the metronome answers no pings", denied=True)
    else:
        text = f"the position may be wrong by {health.uncertainty * 1e3:.3g} ms"
        found["uncertainty"] = Found(health.uncertainty, text)
    found["drift"] = _found_drift(health)
    return found


def _found_drift(health: Health) -> Found:
    measured, tempo = health.measured_bpm, health.current_tempo
    if measured is None or not tempo or health.tempo_drift == "unknown":
        return Found(None, "it takes eight beats to tell the drift of the tempo; see --wait")
    error = abs(measured / tempo - 1)
    text = f"drift is {health.tempo_drift}: frames arrive at {measured:.6g} BPM, {error:.2%} off"
    return Found(error, text, verdict=_DRIFTS[health.tempo_drift])


def _found_operations(heard: Heard, config: BackbeatConfig) -> Mapping[str, Found]:
    totals = heard.model.totals()
    ids = {agent.agent_id for agent in heard.model.agents(Query(limit=sys.maxsize)).items}
    services = heard.metadata(AGENT, config.cluster_id)
    ids |= {clean(info.metadata.get("agent_id", "")) for info in services} - {""}
    agents = f"{len(ids)} {'agent' if len(ids) == 1 else 'agents'}"
    if heard.services is None:
        # Without operations an agent claims its health every eight beats.
        agents += " heard; those at rest may be missing, as this user may not find services"
    if heard.refusal is not None:
        found = {
            name: Found(None, heard.refusal, denied=True) for name in ("late", "slow", "silent")
        }
        return found | {"agents": Found(float(len(ids)) if heard.services else None, agents)}
    found = {"agents": Found(float(len(ids)), agents)}
    if heard.beats < 1:
        text = "it takes a beat to hear of operations; see --wait"
        return found | {name: Found(None, text) for name in ("late", "slow", "silent")}
    for name, number in (("late", totals.late), ("slow", totals.slow), ("silent", totals.silent)):
        text = f"{number} of {totals.live} live operations {'is' if number == 1 else 'are'} {name}"
        found[name] = Found(float(number), text)
    if heard.beats < _SILENCE:
        found["silent"] = Found(None, f"silent operations show after {_SILENCE} beats; see --wait")
    return found


def _summary(health: Health, heard: Heard) -> str:
    tempo = "paused" if health.paused else f"at {health.current_tempo:g} BPM"
    live = heard.model.totals().live
    return (
        f"{clean(health.leader_id or '')} leads, {tempo}, on beat {health.current_beat}; "
        f"{live} live {'operation' if live == 1 else 'operations'}"
    )


def _format(report: Report) -> str:
    word = click.style(report.status, fg=_COLOURS[report.status], bold=True)
    lines = [f"{word}: {report.text}"]
    if report.measures:
        lines.append("")
    for each in report.measures:
        status = click.style(each.status.ljust(8), fg=_COLOURS[each.status])
        lines.append(f"  {status}  {each.name:<11}  {each.text}")
    return "\n".join(lines) + "\n"
