"""``backbeat pulse``: a metronome of the cluster."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Final

import click
import trio

from .._config import MAX_REPLICAS, PREFIX, BackbeatConfig
from .._errors import BackbeatError, ConfigError, TransportBroken
from .._metronome.metronome import Metronome
from .._runtime.probes import judge_metronome
from .._transport.store import RecordRefused
from .._wire import (
    MAX_BEATS_PER_BAR,
    beat_subject,
    bucket_of,
    lead_subject,
    recall_subject,
    sync_subject,
    tempo_subject,
)
from .connection import ConnectedCommand, Connection, SettingOption, settings, takes_connection
from .parameters import address, name, tempo

if TYPE_CHECKING:
    from .._transport.jetstream import KeyValueStore
    from .._transport.nats import NatsTransport

_JETSTREAM_RETRY: Final = 1.0
# How often it checks what permissions have refused, in seconds.
_REFUSALS_EVERY: Final = 0.5
# Limits of the stream of terminal claims: field of the settings, name on the server, unit.
_LIMITS: Final = (
    ("claims_max_age", "max_age", " s"),
    ("claims_max_bytes", "max_bytes", ""),
    ("claims_replicas", "num_replicas", ""),
)


@click.command("pulse", cls=ConnectedCommand)
@click.option(
    "--bpm",
    cls=SettingOption,
    type=tempo,
    metavar="N",
    help="Tempo of a grid that it begins, 0.1 to 6000 beats a minute; by default 2.",
    envvar=f"{PREFIX}TEMPO_BPM",
    show_envvar=True,
)
@click.option(
    "--beats-per-bar",
    cls=SettingOption,
    type=click.IntRange(1, MAX_BEATS_PER_BAR),
    metavar="N",
    help="Beats of a bar of such a grid; by default 8.",
    envvar=f"{PREFIX}BEATS_PER_BAR",
    show_envvar=True,
)
@click.option(
    "--replicas",
    type=click.IntRange(1, MAX_REPLICAS),
    metavar="N",
    help="Copies of the record in JetStream when it is made. By default 3 in a cluster of servers, "
    "or as many as it has servers; 1 on a lone server.",
)
@click.option("--id", "leader_id", type=name, metavar="NAME", help="Its name in logs and health.")
@click.option(
    "--probes",
    type=address,
    metavar="[HOST:]PORT",
    help="Answer /healthz and /readyz over HTTP there; HOST is 127.0.0.1 by default. It needs the "
    "extra 'health'.",
)
@takes_connection()
async def run_pulse(
    connection: Connection,
    bpm: float | None,
    beats_per_bar: int | None,
    replicas: int | None,
    leader_id: str | None,
    probes: tuple[str, int] | None,
) -> int:
    """Run a metronome of a cluster, until it is terminated.

    The first one begins a grid and leads. Any further one stands by, and takes over when the leader
    is gone.
    """
    from .._transport.jetstream import KeyValueStore
    from .._transport.nats import NatsTransport

    config = settings(connection)
    if config.memory_name is not None:
        raise ConfigError("on memory:// the sessions run the metronome themselves")
    leader_id = leader_id or config.agent_id
    transport = NatsTransport(config, name=f"backbeat pulse {leader_id}")
    logger = logging.getLogger("backbeat_trio")
    async with trio.open_nursery() as nursery:
        await nursery.start(transport.run)
        try:
            await transport.first_attempt()
        except BackbeatError as error:
            logger.warning("%s; trying on", error)
        store = KeyValueStore(transport, bucket_of(config.cluster_id), replicas=replicas)
        metronome = Metronome(
            transport,
            cluster_id=config.cluster_id,
            leader_id=leader_id,
            tempo_bpm=config.tempo_bpm if bpm is None else bpm,
            beats_per_bar=(config.beats_per_bar if beats_per_bar is None else beats_per_bar),
            store=store,
            serve_info=config.serve_info,
        )
        if probes is not None:
            await _serve_probes(nursery, probes, metronome, transport, logger)
        nursery.start_soon(_tell_outages, transport, metronome, logger)
        nursery.start_soon(_tell_copies, store, replicas, config, logger)
        if config.store_claims:
            # The metronome itself does not need the stream.
            nursery.start_soon(_make_stream, transport, store, config, logger)
        nursery.start_soon(_tell_refusals, transport, metronome, config.cluster_id, logger)
        try:
            await metronome.run()
        except RecordRefused as error:
            raise BackbeatError(f"the record of the grid cannot be kept: {error}") from error
    return 0


async def _serve_probes(
    nursery: trio.Nursery,
    address: tuple[str, int],
    metronome: Metronome,
    transport: NatsTransport,
    logger: logging.Logger,
) -> None:
    try:
        from ..serving import serve_probes
    except ImportError as error:
        raise BackbeatError(
            f"--probes needs {error.name}: pip install 'backbeat-trio[health]'"
        ) from error
    host, port = address
    serve = partial(
        serve_probes,
        partial(judge_metronome, metronome, transport),
        host=host,
        port=port,
        logger=logger,
    )
    try:
        await nursery.start(serve)
    except OSError as error:
        raise BackbeatError(f"cannot listen on {host}:{port}: {error.strerror}") from error


async def _tell_copies(
    store: KeyValueStore, replicas: int | None, config: BackbeatConfig, logger: logging.Logger
) -> None:
    await store.opened.wait()
    stream = f"KV_{bucket_of(config.cluster_id)}"
    if store.short:
        _tell_short(stream, store.replicas, logger)
    elif replicas not in (None, store.replicas):
        logger.warning(
            "stream %s exists with num_replicas %s, not %s: it is left as it is",
            *(stream, store.replicas, replicas),
        )


async def _tell_outages(
    transport: NatsTransport, metronome: Metronome, logger: logging.Logger
) -> None:
    while True:
        await transport.wait_connected()
        await transport.wait_connected(False)
        lost, unsent = trio.current_time(), metronome.statistics().frames_unsent
        errors = transport.statistics().recent_errors
        logger.warning("connection lost: %s", errors[-1][1] if errors else "closed")
        await transport.wait_connected()
        seconds, unsent = trio.current_time() - lost, metronome.statistics().frames_unsent - unsent
        logger.info("connected again after %.1f s; %d frames were not sent", seconds, unsent)


async def _tell_refusals(
    transport: NatsTransport, metronome: Metronome, cluster_id: str, logger: logging.Logger
) -> None:
    """Log once each what permissions refuse, and when they accept frames again."""
    own = [
        f"{verb} to {subject}".lower()
        for subject, verbs in _subjects_of(cluster_id).items()
        for verb in verbs
    ]
    beats = f"publish to {beat_subject(cluster_id)}".lower()
    # Each epoch has a subject of its own; all are one to whoever reads the log.
    probes = lead_subject(cluster_id, 0)[:-1].lower()
    told: set[str] = set()
    refused = sent = 0
    while True:
        await trio.sleep(_REFUSALS_EVERY)
        counts: Counter[str] = Counter()
        for what, times in transport.statistics().refused:
            before, found, _ = what.partition(probes)
            counts[f"{before}{probes}*" if found else what] += times
        frames = metronome.statistics().frames
        for what in own:
            if what in counts and what not in told:
                told.add(what)
                logger.warning(
                    "%s: permissions refuse to %s",
                    "nobody hears this metronome"
                    if what == beats
                    else "this metronome is hampered",
                    what.replace("subscription to", "subscribe to"),
                )
        if counts[beats] > refused:
            refused, sent = counts[beats], frames
        elif beats in told and frames > sent + 1:
            # Two frames were not refused: by now the refusal of the first one would have come.
            told.discard(beats)
            logger.info("frames are taken again")


def _subjects_of(cluster_id: str) -> dict[str, tuple[str, ...]]:
    publish, subscribe = ("publish",), ("subscription",)
    bucket = bucket_of(cluster_id)
    return {
        beat_subject(cluster_id): publish + subscribe,
        sync_subject(cluster_id): publish + subscribe,
        recall_subject(cluster_id): publish + subscribe,
        tempo_subject(cluster_id): subscribe,
        f"{lead_subject(cluster_id, 0)[:-1]}*": publish + subscribe,
        f"$KV.{bucket}.metronome": publish,
        # A bucket that somebody else made may be one that is read without its leader.
        f"$JS.API.STREAM.MSG.GET.KV_{bucket}": publish,
        f"$JS.API.DIRECT.GET.KV_{bucket}.$KV.{bucket}.metronome": publish,
    }


async def _make_stream(
    transport: NatsTransport, store: KeyValueStore, config: BackbeatConfig, logger: logging.Logger
) -> None:
    from .._transport.jetstream import ClaimStream

    # Without JetStream there can be no stream.
    await store.opened.wait()
    # Agents create the stream, too, but their permissions may not allow it.
    stream, told = ClaimStream(transport, config), ""
    while True:
        await transport.wait_connected()
        try:
            found = await stream.open()
        except TransportBroken as error:
            if str(error) != told:
                told = str(error)
                logger.warning("no stream of terminal claims yet; trying on: %s", error)
            await trio.sleep(_JETSTREAM_RETRY)
            continue
        if not found:
            logger.warning("no stream of terminal claims: %s", stream.reason)
        elif stream.limits is not None:
            if stream.short:
                _tell_short(stream.name, stream.limits["claims_replicas"], logger)
            _tell_difference(stream.name, stream.limits, config, logger)
        return


def _tell_short(stream: str, copies: float | None, logger: logging.Logger) -> None:
    logger.warning(
        "stream %s has %s copies, as the cluster has no more servers with JetStream; "
        "once it has: nats stream edit %s --replicas 3",
        *(stream, copies, stream),
    )


def _tell_difference(
    stream: str, limits: Mapping[str, float], config: BackbeatConfig, logger: logging.Logger
) -> None:
    # Only limits that were configured count. A default may differ from the stream's limit.
    wanted = {
        field: getattr(config, field)
        for field in limits
        if os.environ.get(f"{PREFIX}{field.upper()}")
    }
    differing = ", ".join(
        f"{name} {limits[field]:.12g}{unit}, not {wanted[field]:.12g}{unit}"
        for field, name, unit in _LIMITS
        if field in wanted and wanted[field] != limits[field]
    )
    if differing:
        logger.warning("stream %s exists with %s: it is left as it is", stream, differing)
