"""A term of leadership: its data, its lease, the wait for a record, and a metronome's counters."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Final

import trio
from msgspec import Struct

from .._errors import Logger, TransportBroken
from .._grid.recall import BEHIND_NS
from .._grid.steering import Steering
from .._grid.timeline import Timeline, beat_ns
from .._time.local import local_ns
from .._transport.protocol import Transport
from .._transport.store import RecordRefused
from .._wire import Record

# How long standbys wait for a silent leader whose process may still be running.
_LEASE_BEATS: Final = 2
_LEASE_NS: Final = 1_000_000_000
# The interval, in seconds, at which a metronome without a record tries to open one.
_FIND_EVERY: Final = 5.0


def lease_ns(milli: int) -> int:
    """Return how long a leader may be silent before a standby replaces it, in nanoseconds.

    ``milli`` is the tempo in thousandths of a beat per minute.
    """
    return max(_LEASE_BEATS * beat_ns(milli), _LEASE_NS)


async def wait_for_record(
    transport: Transport, find_record: Callable[[], Awaitable[bool]], logger: Logger
) -> None:
    """Wait until a record can be kept; try on each new connection, and every few seconds."""
    reported = ""
    while True:
        try:
            if await find_record():
                return
        except (TransportBroken, RecordRefused) as error:
            # The caller goes on without a record, so nothing is raised. The loss of a connection is
            # logged by the transport.
            if str(error) != reported and transport.connected:
                reported = str(error)
                logger.warning("still without a record: %s", error)
        with trio.move_on_after(_FIND_EVERY):
            await transport.wait_connected(False)
        await transport.wait_connected()


class Term(Struct, frozen=True):
    """A term of leadership, as it is at one instant."""

    epoch: int
    timeline: Timeline
    steering: Steering
    """The mapping from local time to cluster time, which stays the same during the term."""
    beats_per_bar: int
    sent: int
    """The index of the last beat whose frame was published."""
    milli_bpm: int
    """The tempo at which a paused grid resumes, in thousandths of a beat per minute."""
    incarnation: str = ""
    """The identity of the grid."""
    nonce: str = ""
    """A random name of the term, by which its own writes are told from those of other terms."""
    announced_seq: int = -1
    """The number of the last segment that a frame or an answer has announced."""
    uncertainty_ns: int = 0
    """By how much its cluster time may differ from that of the grid's first leader."""

    def record(self, cluster_id: str, leader_id: str) -> Record:
        """Return the record of the term, with the present time in it."""
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

    def is_behind(self, record: Record | None) -> bool:
        """Tell whether the term's cluster time is before that at which the record was written."""
        if record is None or record.written_ns is None or record.incarnation != self.incarnation:
            return False
        latest_ns = self.steering.cluster_at(local_ns()) + self.uncertainty_ns + BEHIND_NS
        return latest_ns < record.written_ns


class MetronomeCounts(Struct):
    """The counters of a metronome over all its terms (see `MetronomeStatistics`)."""

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
