"""The health and the counters of a session, and the claim that publishes its health."""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from .._grid.punctuality import TempoDrift
from .._transport.protocol import TransportStatistics
from .._wire import HEALTH_TASK_ID, StatusClaim, format_bpm

GridState: TypeAlias = Literal["locked", "holdover", "local"]


class PendingChange(msgspec.Struct, frozen=True):
    """A change of the tempo that is stored and has not taken effect yet.

    Attributes:
      beat: the index of the beat on which it takes effect.
      tempo_bpm: the tempo from then on, in beats per minute; 0.0 if the grid is paused then.

    """

    beat: int
    tempo_bpm: float


class Health(msgspec.Struct, frozen=True):
    """How a session is doing, as `Session.health` returns it.

    Attributes:
      enabled: whether the session does anything; False if ``enabled`` is off in its settings.
      started: whether the session is open.
      connected: whether there is a connection to the server.
      current_beat: the index of the present beat.
      current_tempo: the present tempo, in beats per minute; 0.0 while the grid is paused.
      measured_bpm: the tempo at which beat frames arrive, in beats per minute; None before two have
        arrived.
      tempo_drift: how far the beat frames are from the grid that they announce. ``"acceptable"``:
        their tempo is within 0.1 %, and each is within 2 ms or 1 % of a beat, whichever is more.
        ``"elevated"``: more than that. ``"severe"``: more than ten times that. ``"unknown"``: eight
        frames have not arrived yet. Three bad frames in a row make it worse, and eight good ones
        make it acceptable again.
      reconnect_count: how many times the connection was made again after a loss.
      active_operations: the number of live operations.
      local_degradation: whether the beats may differ from those of the cluster. So it is if the
        grid is not ``"locked"``; if the position is wrong by more than 2 ms and more than 1 % of a
        beat; or if Trio's loop in this process was late for one of the last eight beats, by more
        than a tenth of a beat.
      errors: the recent errors, the newest one last. While the position is wrong by more than
        allowed, the last one says by how much. They do not contain secrets.
      node_id: the node's id, from the settings.
      paused: whether the grid is paused.
      uncertainty: how much the position may differ from that of the metronome that leads, in
        seconds. It grows in holdover. None on a local grid, and before a ping was answered.
      epoch: the number of the present term of leadership; None on a local grid.
      leader_id: the id of the metronome that leads; None unless ``grid`` is ``"locked"``.
      standbys: how many metronomes stand by, according to the leader; None on a local grid, or if
        the leader has not said it. One that has died is counted for up to 150 s.
      pending: the changes of tempo that are still to come, in the order of their beats. Each step
        of a gradual change is one. A paused grid resumes by a change on the beat on which it is
        paused.
      grid: the grid on which the session counts. ``"locked"`` is the cluster's, and a metronome is
        heard. ``"holdover"`` is the cluster's, continued by the local clock, because there is no
        connection, or two beat frames in a row are missing. ``"local"`` is the session's own, which
        began with beat 0 at the tempo of the settings, because no metronome has been heard since
        the session began.
      last_frame_age: how long ago the last valid beat frame arrived, in seconds; None before the
        first one.
      skew: how far the position is behind the best estimate of the cluster's, in seconds, which is
        being corrected; negative if it is ahead. None on a local grid.

    """

    enabled: bool
    started: bool
    connected: bool
    current_beat: int
    current_tempo: float
    measured_bpm: float | None
    tempo_drift: TempoDrift
    reconnect_count: int
    active_operations: int
    local_degradation: bool
    errors: tuple[str, ...]
    node_id: str
    paused: bool
    uncertainty: float | None
    epoch: int | None
    leader_id: str | None
    standbys: int | None
    pending: tuple[PendingChange, ...]
    grid: GridState
    last_frame_age: float | None
    skew: float | None = None


class CallCounts(msgspec.Struct):
    """What a session counts of calls while it runs.

    `Session.statistics` copies it into `SessionStatistics`, which has the same fields and says what
    each of them counts.
    """

    operations_soft: int = 0
    operations_cancelled: int = 0
    controls_undecodable: int = 0
    headers_garbled: int = 0
    headers_absurd: int = 0
    headers_expired: int = 0
    requests: int = 0
    requests_abandoned: int = 0
    calls: int = 0
    calls_refused: int = 0
    calls_cancelled: int = 0
    calls_expired: int = 0
    calls_failed: int = 0
    calls_stubborn: int = 0
    calls_unanswered: int = 0
    live_calls: int = 0
    waiting_calls: int = 0


class SessionStatistics(msgspec.Struct, frozen=True):
    """What a session has counted since it began, as `Session.statistics` returns it.

    Attributes:
      frames: beat frames that the session followed.
      frames_undecodable: messages on the subject of beat frames that are not beat frames.
      frames_foreign: beat frames of another cluster.
      frames_stale_epoch: beat frames and answers of an earlier term of leadership.
      frames_repeated: beat frames whose beat had come before.
      frames_unexplained: beat frames that disagree with what the metronome answers to pings.
      pings: pings that were sent, by which the session measures its offset to the metronome.
      pings_failed: pings without an answer, or with one that is not valid.
      pings_outlying: groups of pings that were ignored, because they disagree with earlier ones.
      locks: how many times the session has moved to a grid of the cluster.
      leader_changes: how many times another metronome has begun to lead, or the same one in another
        term, after the first one that the session followed.
      claims_sent: claims that were given to the connection, or that the stream has stored.
      claims_stored: terminal claims that the stream in JetStream has stored.
      claims_coalesced: claims of live operations that were replaced by newer ones before they were
        sent.
      claims_pending: terminal claims that neither the server nor the stream has confirmed yet.
      claims_queued: claims that wait to be sent.
      claims_dropped: claims that were too large for the server, even without their notes.
      claims_undecodable: messages, and claims in them, that `Session.open_claims` ignored: they are
        not valid, or name another agent than the one that published them.
      operations_soft: operations that a soft edge has passed.
      operations_cancelled: operations of this session that `Session.cancel_remote` has cancelled.
      controls_undecodable: messages on this agent's control subject that were no requests, or could
        not be answered.
      headers_garbled: headers of messages that were not valid, and counted as missing.
      headers_absurd: headers with a deadline that was too far away, and counted as missing.
      headers_expired: messages whose deadline had passed when `Session.extract` was entered, or
        when a service was about to handle them.
      requests: requests of `Session.request`.
      requests_abandoned: requests whose callers stopped waiting before an answer came.
      late_replies: answers that came when nobody waited for them any more.
      calls: requests that services of this session have received.
      calls_refused: those that were refused before any work: their budget was spent, less was left
        than the service asks for, the service was closing, or too many were waiting.
      calls_cancelled: those that their callers cancelled.
      calls_expired: those whose budget ran out while their handlers were running.
      calls_failed: those that were answered with an error, because a handler crashed, returned
        something that is not an answer, raised `ServiceError`, exceeded a budget of its own, or had
        not finished when its service was closed.
      calls_stubborn: handlers that returned although they had been cancelled.
      calls_unanswered: answers that could not be sent, because there was no connection, the
        subject for them was not an inbox or too long, or an error did not fit into a message.
      live_calls: handlers that are running now.
      waiting_calls: requests that wait for a handler now.
      live_scopes: budgets whose blocks are running now.
      transport: the counters of the connection; None if the session is disabled.

    """

    frames: int
    frames_undecodable: int
    frames_foreign: int
    frames_stale_epoch: int
    frames_repeated: int
    frames_unexplained: int
    pings: int
    pings_failed: int
    pings_outlying: int
    locks: int
    leader_changes: int
    claims_sent: int
    claims_stored: int
    claims_coalesced: int
    claims_pending: int
    claims_queued: int
    claims_dropped: int
    claims_undecodable: int
    operations_soft: int
    operations_cancelled: int
    controls_undecodable: int
    headers_garbled: int
    headers_absurd: int
    headers_expired: int
    requests: int
    requests_abandoned: int
    late_replies: int
    calls: int
    calls_refused: int
    calls_cancelled: int
    calls_expired: int
    calls_failed: int
    calls_stubborn: int
    calls_unanswered: int
    live_calls: int
    waiting_calls: int
    live_scopes: int
    transport: TransportStatistics | None


def health_claim(
    health: Health, agent_id: str, cluster_id: str, index: int, milli_bpm: int
) -> StatusClaim:
    """Make the claim of an agent's health.

    Args:
      health: the health.
      agent_id: the agent.
      cluster_id: its cluster.
      index: the index of the present beat.
      milli_bpm: the present tempo, in thousandths of a beat per minute.

    """
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
