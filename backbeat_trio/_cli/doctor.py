"""``backbeat doctor``: find out, step by step, what is wrong, and say what to do about it."""

from __future__ import annotations

import os
import time
from typing import Final, NamedTuple

import click
import msgspec
import trio

from .._config import PREFIX, BackbeatConfig
from .._errors import BackbeatError, ConfigError, TransportBroken
from .._grid.punctuality import tolerance_ns
from .._grid.timeline import Timeline
from .._runtime.health import Health
from .._session.lifecycle import session
from .._session.session import Session
from .._transport.adr32 import Info
from .._transport.discovery import find_services
from .._transport.nats import NatsTransport
from .._version import __version__
from .._views.shown import clean
from .._wire import SyncReply, SyncRequest, decode_sync_reply, encode, sync_subject
from .connection import ConnectedCommand, Connection, settings, takes_connection
from .findings import Diagnosis, Finding, Printer, Say, Verdict
from .parameters import name
from .permissions import ROLES, Role, try_permissions
from .reach import open_connection, reach, text_of
from .storage import Stores, try_stores

# How many pings are sent. The best one of them counts.
_PINGS: Final = 16
_PING_PATIENCE: Final = 2.0
# How often, and for how long each time, it is tried how late Trio wakes a task of this process.
_NAPS: Final = 40
_NAP: Final = 0.01
# Trio itself is late by about a millisecond.
_LATE: Final = 0.005
# A wall clock may be off by so many seconds. Beyond the second figure a metronome that has to begin
# again would not believe what agents remember of the grid.
_CLOCK: Final = (1.0, 60.0)
_FAR: Final = 0.1


class _Measured(NamedTuple):
    """The best of some pings."""

    reply: SyncReply
    round_trip: float
    """In seconds."""
    skew: float
    """By how many beats the session is ahead of the metronome."""
    cluster_ns: int
    """The cluster time at ``wall``."""
    wall: float
    """This machine's wall clock, in seconds since 1970."""


@click.command("doctor", cls=ConnectedCommand)
@click.option(
    "--role",
    type=click.Choice(ROLES),
    metavar="ROLE",
    help=f"The role that this user should have, one of: {', '.join(ROLES)}; by default the one "
    "that its permissions come nearest to.",
)
@click.option(
    "--agent-id",
    "agent_id",
    type=name,
    metavar="NAME",
    help=f"The agent whose claims this user should publish; by default {PREFIX}AGENT_ID.",
)
@click.option("-j", "--json", "as_json", is_flag=True, help="As JSON.")
@takes_connection()
async def diagnose(
    connection: Connection, role: Role | None, agent_id: str | None, as_json: bool
) -> int:
    """Find out step by step what is wrong between here and the cluster, and how to mend it.

    It goes from the name of the server to the login, the permissions of this user, JetStream, the
    clock and the metronomes. It changes nothing in the cluster. What could not be tried without
    changing something is listed as 'not tried'.

    Exits 0 if nothing failed, also with warnings, and 1 if something did.
    """
    findings: list[Finding] = []
    printer = None if as_json else Printer()

    def say(finding: Finding) -> None:
        findings.append(finding)
        if printer is not None:
            printer.say(finding)

    cluster_id = ""
    try:
        config = settings(connection)
    except ConfigError as error:
        say(Finding("settings", "settings", "failed", str(error), "Correct this setting."))
    else:
        cluster_id = config.cluster_id
        if config.memory_name is not None:
            raise ConfigError("on memory:// there is no server to look at")
        await _examine(config, role, agent_id or os.environ.get(f"{PREFIX}AGENT_ID") or None, say)
    ok = all(finding.verdict != "failed" for finding in findings)
    if as_json:
        click.echo(msgspec.json.encode(Diagnosis(ok, cluster_id, tuple(findings))))
    else:
        failed = sum(finding.verdict == "failed" for finding in findings)
        warnings = sum(finding.verdict == "warning" for finding in findings)
        click.echo(f"\n{failed} failed, {warnings} {'warning' if warnings == 1 else 'warnings'}")
    return 0 if ok else 1


async def _examine(
    config: BackbeatConfig, role: Role | None, agent_id: str | None, say: Say
) -> None:
    if not config.enabled:
        text = f"{PREFIX}ENABLED is false, so sessions enforce no budget and publish nothing"
        say(Finding("settings", "enabled", "warning", text, f"Set {PREFIX}ENABLED to true."))
    reached = await reach(config, say)
    if reached is None:
        for step in ("permissions", "JetStream", "clock", "cluster"):
            say(Finding(step, "all", "not tried", "there is no connection"))
        return
    alone = reached.config.__replace__(enabled=True)
    step = "permissions"
    try:
        async with open_connection(alone) as transport:
            await try_permissions(transport, alone, say, role=role, agent_id=agent_id)
        step = "JetStream"
        async with open_connection(alone) as transport:
            stores = await try_stores(transport, alone, reached.greeting, say)
            step = "clock"
            async with session(alone, require_connection=True) as bb:
                await _try_clock(bb, transport, stores, say)
                step = "cluster"
                _say_metronomes(bb.health(), alone, say)
            await _try_versions(transport, alone, say)
    except* BackbeatError as group:
        text = f"this step could not be finished: {text_of(group)}"
        say(Finding(step, "all", "failed", text, "Look at the server's log, and try again."))


async def _try_clock(bb: Session, transport: NatsTransport, stores: Stores, say: Say) -> None:
    health, late = bb.health(), await _lateness()
    text = f"Trio woke this process {_seconds(late)} late at the median"
    if late > _LATE:
        mend = "Give this machine more time: it is too busy, or other processes come before."
        say(Finding("clock", "lateness", "warning", text, mend))
    else:
        say(Finding("clock", "lateness", "ok", text))
    measured = await _ping(bb, transport) if health.grid != "local" else None
    if measured is None:
        say(Finding("clock", "pings", "not tried", "no metronome answers pings"))
    else:
        _say_pings(bb.health(), measured, say)
    _say_wall_clock(stores, measured, say)


async def _lateness() -> float:
    late: list[float] = []
    for _ in range(_NAPS):
        due = trio.current_time() + _NAP
        await trio.sleep_until(due)
        late.append(trio.current_time() - due)
    return sorted(late)[_NAPS // 2]


async def _ping(bb: Session, transport: NatsTransport) -> _Measured | None:
    config, best = bb.config, None
    request = encode(SyncRequest(config.cluster_id, config.agent_id))
    for _ in range(_PINGS):
        try:
            answer = await transport.request(
                sync_subject(config.cluster_id), request, timeout=_PING_PATIENCE
            )
            reply = decode_sync_reply(answer.data)
            timeline = Timeline.of(reply)
        except (TransportBroken, ValueError):
            # `msgspec.DecodeError` is a `ValueError`, too.
            break
        now, wall, position = trio.current_time(), time.time(), bb.current_position()
        round_trip = (answer.received_ns - answer.sent_ns) - (reply.sent_ns - reply.received_ns)
        middle = (answer.received_ns + answer.sent_ns) / 2e9
        cluster_ns = (reply.sent_ns + reply.received_ns) // 2 + int((now - middle) * 1e9)
        skew = position - timeline.position_at(cluster_ns)
        if best is None or round_trip / 1e9 < best.round_trip:
            best = _Measured(reply, round_trip / 1e9, skew, cluster_ns, wall)
    return best


def _say_pings(health: Health, measured: _Measured, say: Say) -> None:
    way = measured.round_trip
    text = f"the best of {_PINGS} pings took {_seconds(way)}"
    if way > _FAR:
        mend = "Run a metronome and a server nearer to this machine; see docs/regions.md."
        say(Finding("clock", "round trip", "warning", text, mend))
    else:
        say(Finding("clock", "round trip", "ok", text))
    beat = 60 / health.current_tempo if health.current_tempo else 0.0
    allowed = tolerance_ns(int(beat * 1e9)) / 1e9
    if health.uncertainty is not None:
        text = f"the position may be wrong by {_seconds(health.uncertainty)}"
        text += f"; up to {_seconds(allowed)} is fine"
        say(_off("uncertainty", health.uncertainty > allowed, text))
    skew = abs(measured.skew) * beat
    side = "ahead of" if measured.skew > 0 else "behind"
    text = f"this process is {_seconds(skew)} {side} {clean(measured.reply.leader_id)}"
    say(_off("skew", skew > allowed + way / 2, text))


def _off(name: str, bad: bool, text: str) -> Finding:
    if not bad:
        return Finding("clock", name, "ok", text)
    mend = "Look at the network between here and the metronome, and at the load of both machines."
    return Finding("clock", name, "warning", text, mend)


def _say_wall_clock(stores: Stores, measured: _Measured | None, say: Say) -> None:
    record, found = stores.record, False
    if stores.server_ahead is not None:
        found = True
        _say_difference(-stores.server_ahead, "the server's", say)
    if (
        record is not None
        and measured is not None
        and record.written_ms is not None
        and record.written_ns is not None
        and record.incarnation == measured.reply.incarnation
    ):
        found = True
        since = (measured.cluster_ns - record.written_ns) / 1e9
        _say_difference(
            measured.wall - (record.written_ms / 1000 + since),
            f"that of {clean(record.leader_id)}, by the record",
            say,
        )
    if not found:
        text = "this user may read nothing that says what time it is elsewhere"
        say(Finding("clock", "wall clock", "not tried", text))


def _say_difference(ahead: float, whose: str, say: Say) -> None:
    warn, fail = _CLOCK
    side = "ahead of" if ahead > 0 else "behind"
    text = f"this machine's is {_seconds(abs(ahead))} {side} {whose}"
    mend = "Set both clocks by NTP: the wall clock counts if nobody knows the grid any more."
    if abs(ahead) <= warn:
        say(Finding("clock", "wall clock", "ok", text))
    else:
        verdict: Verdict = "warning" if abs(ahead) <= fail else "failed"
        say(Finding("clock", "wall clock", verdict, text, mend))


def _say_metronomes(health: Health, config: BackbeatConfig, say: Say) -> None:
    if health.leader_id is None:
        text = f"no metronome is heard in cluster {config.cluster_id}"
        mend = (
            f"Start `backbeat pulse --cluster-id {config.cluster_id}` on these servers; if one "
            "runs, look at its log."
        )
        say(Finding("cluster", "metronome", "failed", text, mend))
        return
    tempo = "paused" if health.paused else f"{health.current_tempo:g} BPM"
    text = f"{clean(health.leader_id)} leads in epoch {health.epoch}, {tempo}"
    say(Finding("cluster", "metronome", "ok", text))
    if health.standbys is None:
        say(Finding("cluster", "standbys", "not tried", "the leader has not said how many"))
    elif health.standbys:
        word = "stands" if health.standbys == 1 else "stand"
        say(Finding("cluster", "standbys", "ok", f"{health.standbys} {word} by"))
    else:
        text = "none stands by, so nobody would take over"
        mend = "Start a second `backbeat pulse` on another machine."
        say(Finding("cluster", "standbys", "warning", text, mend))


async def _try_versions(transport: NatsTransport, config: BackbeatConfig, say: Say) -> None:
    before = transport.statistics().permission_errors
    try:
        found = await find_services(transport)
    except TransportBroken:
        if transport.statistics().permission_errors == before:
            raise
        text = "this user may not find services; an operator may"
        say(Finding("cluster", "versions", "not tried", text))
        return
    own = __version__
    versions = {_version_of(info) for info in found if _is_ours(info, config)}
    others = sorted(clean(version, 50) for version in versions if version != own)
    if not others:
        text = f"this is {own}, and so is every agent and metronome that answers"
        say(Finding("cluster", "versions", "ok", text))
        return
    text = f"this is {own}, and others are {', '.join(others[:10])}"
    mend = "Upgrade all to one version, the standbys first."
    say(Finding("cluster", "versions", "warning", text, mend))


def _is_ours(info: Info, config: BackbeatConfig) -> bool:
    ours = info.name in ("backbeat-agent", "backbeat-metronome")
    return ours and info.metadata.get("cluster") == config.cluster_id


def _version_of(info: Info) -> str:
    return info.metadata.get("version", info.version)


def _seconds(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
