"""``backbeat pulse``: a metronome of the cluster."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import trio

from .._config import PREFIX, BackbeatConfig
from .._errors import BackbeatError, ConfigError, TransportBroken
from .._metronome.metronome import Metronome, find_leader
from .._transport.store import RecordRefused
from .._wire import bucket_of
from .connection import settings

if TYPE_CHECKING:
    from .._transport.jetstream import KeyValueStore
    from .._transport.nats import NatsTransport

_JETSTREAM_RETRY: Final = 1.0
# Limits of the stream of terminal claims: field of the settings, name on the server, unit.
_LIMITS: Final = (
    ("claims_max_age", "max_age", " s"),
    ("claims_max_bytes", "max_bytes", ""),
    ("claims_replicas", "num_replicas", ""),
)


async def run_pulse(options: argparse.Namespace) -> int:
    """Run a metronome, until it is terminated."""
    from .._transport.nats import NatsTransport

    config = settings(options)
    if config.memory_name is not None:
        raise ConfigError("a metronome of its own has nobody to lead on memory://")
    leader_id = options.id or config.agent_id
    transport = NatsTransport(config, name=f"backbeat pulse {leader_id}")
    logger = logging.getLogger("backbeat_trio")
    async with trio.open_nursery() as nursery:
        await nursery.start(transport.run)
        try:
            await transport.first_attempt()
        except BackbeatError as error:
            logger.warning("%s; trying on", error)
        store = await _open_store(transport, config, options.replicas, logger)
        if store is not None and config.store_claims:
            # The beats need it for nothing.
            nursery.start_soon(_make_stream, transport, config, logger)
        metronome = Metronome(
            transport,
            cluster_id=config.cluster_id,
            leader_id=leader_id,
            tempo_bpm=config.tempo_bpm if options.bpm is None else options.bpm,
            beats_per_bar=(
                config.beats_per_bar if options.beats_per_bar is None else options.beats_per_bar
            ),
            store=store,
        )
        if store is None:
            leader = await find_leader(transport, config.cluster_id, config.agent_id)
            if leader is not None:
                raise BackbeatError(
                    f"cluster {config.cluster_id} has a metronome already: {leader.leader_id}"
                )
            logger.warning("alone: the server has no JetStream, so nobody takes over from this one")
        await metronome.run()
    return 0


async def _open_store(
    transport: NatsTransport, config: BackbeatConfig, replicas: int | None, logger: logging.Logger
) -> KeyValueStore | None:
    from .._transport.jetstream import KeyValueStore

    bucket = bucket_of(config.cluster_id)
    store = KeyValueStore(transport, bucket, replicas=replicas)
    told = ""
    while True:
        await transport.wait_connected()
        try:
            if not await store.open():
                # It may be that the server has not found the rest of its cluster yet.
                await trio.sleep(_JETSTREAM_RETRY)
                if not await store.open():
                    return None
        except RecordRefused as error:
            raise BackbeatError(f"the record of the grid cannot be kept: {error}") from error
        except TransportBroken as error:
            if str(error) != told:
                told = str(error)
                logger.warning("the record of the grid cannot be kept yet; trying on: %s", error)
            await trio.sleep(_JETSTREAM_RETRY)
            continue
        if store.short:
            _tell_short(f"KV_{bucket}", store.replicas, logger)
        elif replicas not in (None, store.replicas):
            logger.warning(
                "stream KV_%s exists with num_replicas %s, not %s: it is left as it is",
                *(bucket, store.replicas, replicas),
            )
        return store


async def _make_stream(
    transport: NatsTransport, config: BackbeatConfig, logger: logging.Logger
) -> None:
    from .._transport.jetstream import ClaimStream

    # Agents make it where they may, which is not everywhere.
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
    # Of what nobody has set, the defaults are no wish.
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
