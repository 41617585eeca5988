"""A term of leadership: what it begins with, how long it outlives silence, and what is counted."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Final

import trio
from msgspec import Struct

from .._errors import Logger, TransportBroken
from .._grid.steering import Steering
from .._grid.timeline import Timeline, beat_ns
from .._time.local import local_ns
from .._transport.protocol import Transport
from .._transport.store import RecordRefused
from .._wire import Record

# How long standbys wait for a leader that does not answer and is not known to be gone.
_LEASE_BEATS: Final = 2
_LEASE_NS: Final = 1_000_000_000
# How often a leader without a record asks whether there can be one by now.
_FIND_EVERY: Final = 5.0


def lease_ns(milli: int) -> int:
    """Return how long a leader may be silent before another one takes its place."""
    return max(_LEASE_BEATS * beat_ns(milli), _LEASE_NS)


async def wait_for_record(
    transport: Transport, find_record: Callable[[], Awaitable[bool]], logger: Logger
) -> None:
    """Wait until there can be a record: ask on each connection, and every few seconds."""
    reported = ""
    while True:
        try:
            if await find_record():
                return
        except (TransportBroken, RecordRefused) as error:
            # Whoever leads goes on, however the record is refused; that the connection went away is
            # reported elsewhere.
            if str(error) != reported and transport.connected:
                reported = str(error)
                logger.warning("still without a record: %s", error)
        with trio.move_on_after(_FIND_EVERY):
            await transport.wait_connected(False)
        await transport.wait_connected()


class Term(Struct, frozen=True):
    """What a term of leadership begins with."""

    epoch: int
    timeline: Timeline
    steering: Steering
    """How local time becomes cluster time, for the length of the term."""
    beats_per_bar: int
    sent: int
    """The last beat whose frame was published."""
    milli_bpm: int
    """The tempo at which a grid that stands still goes on."""
    incarnation: str = ""
    nonce: str = ""
    announced_seq: int = -1
    """The last segment that a frame or an answer has announced."""
    uncertainty_ns: int = 0
    """What its cluster time may differ by from that of the grid's first leader."""

    def record(self, cluster_id: str, leader_id: str) -> Record:
        """Return what is to be kept of the grid as the term begins."""
        return Record(
            cluster_id=cluster_id,
            incarnation=self.incarnation,
            epoch=self.epoch,
            nonce=self.nonce,
            leader_id=leader_id,
            beats_per_bar=self.beats_per_bar,
            segments=self.timeline.segments,
            high_water=self.sent,
            milli_bpm=self.milli_bpm,
            announced_seq=self.announced_seq,
            written_ms=time.time_ns() // 1_000_000,
            written_ns=self.steering.cluster_at(local_ns()),
        )


class MetronomeCounts(Struct):
    """What a metronome counts over its terms; `Metronome.statistics` makes a snapshot of it."""

    frames: int = 0
    frames_unsent: int = 0
    syncs: int = 0
    tempo_changes: int = 0
    refused: int = 0
    undecodable: int = 0
    takeovers: int = 0
    deposed: int = 0
    probes: int = 0
    commits: int = 0
    commits_failed: int = 0
    frames_foreign: int = 0
