"""What a session tells of itself: its health, its counters, and the health claim."""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from .._grid.punctuality import TempoDrift
from .._transport.protocol import TransportStatistics
from .._wire import HEALTH_TASK_ID, StatusClaim, format_bpm

GridState: TypeAlias = Literal["locked", "holdover", "local"]


class PendingChange(msgspec.Struct, frozen=True):
    """A change of the tempo that was committed and is not in force yet."""

    beat: int
    """The index of the beat on which it takes effect."""
    tempo_bpm: float
    """Beats per minute from then on; 0 has the grid stand still on that beat."""


class Health(msgspec.Struct, frozen=True):
    """What `Session.health` tells."""

    enabled: bool
    """Whether anything is emitted and enforced."""
    started: bool
    """Whether the session is open."""
    connected: bool
    """Whether a connection to the server stands."""
    current_beat: int
    """The index of the present beat."""
    current_tempo: float
    """Beats per minute in force."""
    measured_bpm: float | None
    """The tempo at which frames arrive; None before two have."""
    tempo_drift: TempoDrift
    """How far the frames are from the grid that they announce: ``"acceptable"`` within 0.1 % of its
    tempo and max(2 ms, 1 % of a beat) of its beats, ``"severe"`` beyond ten times that; left after
    three bad frames, regained after eight good ones, ``"unknown"`` before there were eight."""
    reconnect_count: int
    """How many times the connection was made again."""
    active_operations: int
    """How many operations live."""
    local_degradation: bool
    """Whether the grid is a local one or in holdover (no connection, no lock, two frames missing),
    or the position is off the cluster's by more than max(2 ms, 1 % of a beat), or this process's
    own loop was late for one of its last eight beats by more than a tenth."""
    errors: tuple[str, ...]
    """What went wrong recently, newest last; at the end, by how much the position is off, while it
    is off by more than it may be. It never holds a secret."""
    node_id: str
    """The name of the node."""
    paused: bool
    """Whether the grid stands still."""
    uncertainty: float | None
    """Seconds by which the position may differ from the leader's; it grows in holdover, and is None
    where no ping was ever answered."""
    epoch: int | None
    """The term of leadership that is followed; None on a local grid."""
    leader_id: str | None
    """The metronome that leads; None unless `grid` is ``"locked"``."""
    standbys: int | None
    """How many metronomes stand by, as the leader told last; None on a local grid, and where it has
    not told. One that died counts for up to 150 s more."""
    pending: tuple[PendingChange, ...]
    """The changes to come, in the order of their beats; each step of a ramp is one. A grid that
    stands still goes on with a change on the beat on which it stands."""
    grid: GridState
    """Which grid the session counts on. ``"locked"``: the cluster's, and a metronome is heard.
    ``"holdover"``: the cluster's, continued by the local clock, because there is no connection or
    two beat frames in a row are missing. ``"local"``: a grid of its own from beat 0, at the tempo
    of the settings, because no metronome has been heard since the session began."""
    last_frame_age: float | None
    """Seconds since the last beat frame of the cluster arrived that the session followed; None
    before the first one."""


class CallCounts(msgspec.Struct):
    """What a session counts of calls while it runs.

    `Session.statistics` copies it into `SessionStatistics`, which has the same fields and says what
    each of them counts.
    """

    operations_soft: int = 0
    headers_garbled: int = 0
    headers_absurd: int = 0
    headers_expired: int = 0


class SessionStatistics(msgspec.Struct, frozen=True):
    """What `Session.statistics` tells: counters since the session began."""

    frames: int
    """Beat frames that were followed."""
    frames_undecodable: int
    """Messages on the frames' subject that are no frames."""
    frames_foreign: int
    """Frames of another cluster."""
    frames_stale_epoch: int
    """Frames and replies of an earlier term of leadership."""
    frames_repeated: int
    """Frames whose index was not new."""
    frames_unexplained: int
    """Frames that the leader's own answers did not bear out."""
    pings: int
    """Pings sent."""
    pings_failed: int
    """Pings that brought no answer, or none that could be decoded."""
    pings_outlying: int
    """Bursts of pings that contradicted what was known of cluster time, and were left out."""
    locks: int
    """How many times the position moved to the cluster's grid."""
    claims_sent: int
    """Claims handed to the server, or acknowledged by the stream."""
    claims_stored: int
    """Terminal claims that the stream in JetStream has acknowledged."""
    claims_coalesced: int
    """Claims of live operations that a newer one took the place of."""
    claims_pending: int
    """Terminal claims that neither the server nor the stream has confirmed yet."""
    claims_dropped: int
    """Claims that the server has no message large enough for, not even without their notes."""
    claims_undecodable: int
    """Messages to `Session.open_claims` that were no claims, or were of another agent."""
    operations_soft: int
    """Operations that a soft edge has passed."""
    headers_garbled: int
    """Headers of messages that were not valid, and counted as missing."""
    headers_absurd: int
    """Headers with a deadline that was too far away, and counted as missing."""
    headers_expired: int
    """Messages whose deadline had passed when `Session.extract` was entered."""
    live_scopes: int
    """Budgets that are running."""
    transport: TransportStatistics | None
    """The transport's counters; None where there is no transport."""


def health_claim(
    health: Health, agent_id: str, cluster_id: str, index: int, milli_bpm: int
) -> StatusClaim:
    """Make the claim that tells of an agent's health."""
    return StatusClaim(
        agent_id,
        HEALTH_TASK_ID,
        index,
        "failed" if health.errors else "executing" if health.active_operations else "waiting",
        0,
        1.0,
        f"CHORUS P2P {'unhealthy' if health.errors else 'healthy'}: "
        f"connected={str(health.connected).lower()}, operations={health.active_operations}, "
        f"tempo={format_bpm(milli_bpm)} BPM, node={health.node_id}",
        cluster_id,
    )
