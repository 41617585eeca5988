"""What a session logs about its own condition.

Each trouble is logged at WARNING once, with what to do about it, and at INFO when it is over. A
trouble must last for a moment before it is logged, and must be gone for a moment before it counts
as over. So a healthy session logs nothing, and one that changes to and fro logs no line each time.
"""

from __future__ import annotations

import math
import os
import secrets
from typing import Final, final

import trio

from .._config import PREFIX, BackbeatConfig
from .._errors import AuthenticationFailed, Logger, TLSFailed, TransportBroken
from .._grid.timeline import beat_ns
from .._metronome.listener import BeatListener
from .._time.clock import BeatClock
from .._time.local import local_ns
from .._transport.base import BaseTransport
from .._transport.protocol import Transport
from .._wire import format_bpm
from .emitter import ClaimEmitter

# For how many seconds there must be no connection before that is logged: as long as a server takes
# to start; and longer if there is no reason to name yet.
_DOWN: Final = 1.0
_DOWN_SILENTLY: Final = 2.5
# For how many seconds no metronome must be heard after a connection was made. One that is running
# answers within a round trip.
_UNHEARD: Final = 2.5
# A frame of a running metronome arrives within the first number of beats. At times frames are late
# or lost for the second number of beats.
_FRAME_BEATS: Final = 2.25
_QUIET_BEATS: Final = 4
# A trouble counts as over once it has been gone for some time. If it is back within that time,
# multiplied by the first number, it comes and goes. Then that time is doubled, again and again up
# to the second number of times.
_SOON: Final = 8
_TIMES: Final = 64
# For how many seconds other troubles must last.
_LASTING: Final = 1.0
_CLAIMS_WAIT: Final = 3.0
# Beats of a fast grid are handled together. A paused grid has no beats.
_LOOK_EVERY: Final = 0.1
_LOOK_WHILE_PAUSED: Final = 5.0
# How many reasons, and how many errors, are told apart.
_REASONS: Final = 16
_ERRORS: Final = 256
# After so many losses within so many seconds, no further ones are logged.
_LOSSES: Final = 5
_LOSSES_WITHIN: Final = 60.0


# Processes on two hosts may have the same number.
_RANDOM_NAME: Final = secrets.token_hex(6)


@final
class Spell:
    """A condition that comes and goes, and counts only once it has lasted."""

    def __init__(self) -> None:
        self.holds = False
        """Whether the condition has held for long enough, and has not been gone for long."""
        self._since: float | None = None
        self._ended = -math.inf
        self._times = 1

    def look(
        self, present: bool | None, now: float, *, patience: float, quiet: float
    ) -> tuple[bool, float]:
        """Note how it is now; return whether `holds` has changed, and when to look again.

        Args:
          present: whether the condition is there; None if that is not known at the moment.
          now: the time, in seconds, as all the others.
          patience: how long it must last before it holds.
          quiet: how long it must be gone before it does not hold any more; longer and longer if
            it comes back soon after that each time.

        """
        if present is None or present is self.holds:
            self._since = None
            return False, math.inf
        if self._since is None:
            self._since = now
        due = self._since + (patience if present else quiet * self._times)
        if now < due:
            return False, due
        if present:
            soon = now - self._ended < _SOON * quiet * self._times
            self._times = min(2 * self._times, _TIMES) if soon else 1
        else:
            self._ended = now
        self.holds, self._since = present, None
        return True, math.inf


@final
class Notices:
    """Logs what is wrong with a session, once each, and that it is over.

    Args:
      config: the settings of the session.
      logger: where to log.
      clock: the session's clock.
      transport: its connection. The session runs it.
      listener: follows the metronomes.
      emitter: sends the claims.

    """

    def __init__(
        self,
        config: BackbeatConfig,
        logger: Logger,
        clock: BeatClock,
        transport: Transport,
        listener: BeatListener,
        emitter: ClaimEmitter,
    ) -> None:
        self._config = config
        self._logger = logger
        self._clock = clock
        self._transport = transport
        self._listener = listener
        self._emitter = emitter
        self._lot = trio.lowlevel.ParkingLot()
        self._complaints: dict[str, None] = {}
        if isinstance(transport, BaseTransport):
            self._lot = transport.noted
        # When the connection was lost, and when it was made. One of them is None.
        self._down_since: float | None = None
        self._up_since: float | None = None
        self._has_connected = False
        self._reasons: set[str] = set()
        self._losses: list[float] = []
        self._unheard = Spell()
        self._was_locked = False
        self._off = Spell()
        self._waiting = Spell()
        self._shared = Spell()
        self._confirmed = 0
        self._looked = -math.inf

    def wake(self) -> None:
        """Look again, as something has happened."""
        self._lot.unpark_all()

    def beat(self) -> None:
        """Look again, as another beat has begun."""
        if trio.current_time() - self._looked >= _LOOK_EVERY:
            self._lot.unpark_all()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Watch and log until cancelled."""
        if not self._transport.connected:
            self._down_since = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_connection)
            task_status.started()
            while True:
                with trio.CancelScope(deadline=self._look()):
                    await self._lot.park()

    def _look(self) -> float:
        # Returns when to look again, if nothing happens before.
        now = self._looked = trio.current_time()
        self._say_complaints()
        due = min(
            self._look_at_connection(now),
            self._look_at_metronome(now),
            self._look_at_position(now),
            self._look_at_claims(now),
            self._look_at_id(now),
        )
        return due if self._clock.segment().milli_bpm else min(due, now + _LOOK_WHILE_PAUSED)

    # The connection.

    @trio.lowlevel.enable_ki_protection
    async def _watch_connection(self) -> None:
        transport = self._transport
        while True:
            await transport.wait_connected()
            self._note_connected(trio.current_time())
            self._lot.unpark_all()
            await transport.wait_connected(False)
            self._note_lost(trio.current_time())
            self._lot.unpark_all()

    def _note_connected(self, now: float) -> None:
        if not self._has_connected:
            self._logger.info("connected")
        elif self._reasons and self._down_since is not None:
            self._logger.info("connected again after %.3g s", now - self._down_since)
        self._has_connected = True
        self._reasons.clear()
        self._down_since, self._up_since = None, now

    def _note_lost(self, now: float) -> None:
        self._down_since, self._up_since = now, None
        self._losses = [when for when in self._losses if now - when < _LOSSES_WITHIN]
        self._losses.append(now)
        if len(self._losses) > _LOSSES:
            return
        # `last_error` may be None, because by now there may be a connection again.
        errors = self._transport.statistics().recent_errors
        reason = errors[-1][1] if errors else "closed"
        self._reasons.add(reason)
        self._logger.warning("connection lost: %s", reason)
        if len(self._losses) == _LOSSES:
            self._logger.warning(
                "the connection was lost %d times within %g s: further losses are not logged "
                "until it lasts longer",
                _LOSSES,
                _LOSSES_WITHIN,
            )

    def _look_at_connection(self, now: float) -> float:
        if self._down_since is None:
            return math.inf
        reason = self._transport.statistics().last_error
        due = self._down_since + (_DOWN if reason else _DOWN_SILENTLY)
        if now < due:
            return due
        reason = reason or f"no answer from {', '.join(self._servers())} yet"
        if reason not in self._reasons and len(self._reasons) < _REASONS:
            self._reasons.add(reason)
            self._logger.warning(
                "not connected: %s; %s. %s; the session goes on trying",
                reason,
                self._meanwhile(),
                self._advice(),
            )
        return math.inf

    def _servers(self) -> list[str]:
        if self._config.memory_name is not None:
            return [self._config.nats_url]
        return [server.url for server in self._config.servers]

    def _meanwhile(self) -> str:
        milli_bpm = self._clock.segment().milli_bpm
        if not self._listener.follower.locked:
            return f"counting on a local grid, where a beat lasts {beat_ns(milli_bpm) / 1e9:g} s"
        if not milli_bpm:
            return "the grid stays paused until a metronome is heard"
        return f"the grid goes on by the local clock, at {format_bpm(milli_bpm)} BPM"

    def _advice(self) -> str:
        transport = self._transport
        failure = transport.failure if isinstance(transport, BaseTransport) else None
        return _advice_on(failure)

    # The metronome.

    def _look_at_metronome(self, now: float) -> float:
        follower, cluster_id = self._listener.follower, self._config.cluster_id
        local, tempo = local_ns(), self._clock.segment().milli_bpm
        beat = beat_ns(tempo) / 1e9 if tempo else _LASTING
        patience, quiet = _LASTING, max(_LASTING, _QUIET_BEATS * beat)
        present: bool | None
        if self._up_since is None:
            # The trouble is the connection, and not the metronome.
            present = None
        elif not follower.locked:
            present, patience = True, max(_UNHEARD, self._config.lock_timeout)
        else:
            if not self._was_locked:
                # A lock shows that the metronome answers, which a single frame does not.
                self._was_locked, quiet = True, 0.0
            present = follower.in_holdover(local)
            # After an outage the next frame is still to come.
            soonest = self._up_since + _FRAME_BEATS * beat
            if present and now < soonest:
                return soonest
        silent = 0.0 if self._up_since is None else now - self._up_since
        if follower.locked:
            silent = (local - follower.last_heard_ns) / 1e9
        changed, due = self._unheard.look(present, now, patience=patience, quiet=quiet)
        if changed and self._unheard.holds:
            check = f"that its metronome still runs: the last one was {follower.leader_id!r}"
            if not follower.locked:
                check = (
                    f"`cluster_id` ({PREFIX}CLUSTER_ID), and that a metronome runs for this "
                    f"cluster on these servers: backbeat pulse --cluster-id {cluster_id}"
                )
            self._logger.warning(
                "no metronome has been heard in cluster %r for %.3g beats (%.3g s); %s. Check %s",
                *(cluster_id, silent / beat, silent, self._meanwhile(), check),
            )
        elif changed:
            self._logger.info(
                "a metronome is heard again in cluster %r - leader=%s",
                cluster_id,
                follower.leader_id,
            )
        return due

    def _look_at_position(self, now: float) -> float:
        tempo = self._clock.segment().milli_bpm
        lasting = max(_LASTING, beat_ns(tempo) / 1e9 if tempo else 0.0)
        text = self._listener.follower.error_text(local_ns())
        changed, due = self._off.look(
            text is not None, now, patience=lasting, quiet=_QUIET_BEATS * lasting
        )
        if changed and self._off.holds:
            self._logger.warning("%s", text)
        elif changed:
            self._logger.info("the position agrees with the cluster's again")
        return due

    def _look_at_id(self, now: float) -> float:
        changed, due = self._shared.look(
            self._listener.shares_id, now, patience=0.0, quiet=_LASTING
        )
        if changed and self._shared.holds:
            self._logger.warning("%s", shared_id_text(self._config))
        elif changed:
            self._logger.info("no other process uses the id %r any more", self._config.agent_id)
        return due

    # Claims, and errors.

    def _look_at_claims(self, now: float) -> float:
        emitter, waiting = self._emitter, self._emitter.pending
        # Claims that follow one another quickly are waiting at each look, which is not a trouble.
        moves, self._confirmed = emitter.confirmed != self._confirmed, emitter.confirmed
        changed, due = self._waiting.look(
            bool(waiting) and not moves, now, patience=_CLAIMS_WAIT, quiet=0.0
        )
        if changed and self._waiting.holds:
            why = "there is no connection" if self._down_since is not None else emitter.trouble
            self._logger.warning(
                "%d terminal claims wait: %s. They are kept, and sent again until the session ends",
                *(waiting, why or "the server does not confirm them"),
            )
        elif changed:
            self._logger.info("terminal claims are delivered again")
        return due

    def _say_complaints(self) -> None:
        if not isinstance(self._transport, BaseTransport):
            return
        for text in self._transport.complaints:
            if text not in self._complaints:
                self._logger.warning("%s", text)
                self._complaints[text] = None
                if len(self._complaints) > _ERRORS:
                    del self._complaints[next(iter(self._complaints))]


def shared_id_text(config: BackbeatConfig) -> str:
    """Return the text that says that another process has the agent's id, and what to do."""
    return (
        f"another live process uses the agent id {config.agent_id!r} in cluster "
        f"{config.cluster_id!r}, and each takes the other's claims for its own; give each agent an "
        f"`agent_id` ({PREFIX}AGENT_ID) of its own"
    )


def process_name() -> str:
    """Return a name that no other process has, not even a fork of this one."""
    return f"{_RANDOM_NAME}-{os.getpid()}"


def _advice_on(failure: TransportBroken | None) -> str:
    if isinstance(failure, AuthenticationFailed):
        return (
            f"Check the login: `user` and `password` ({PREFIX}USER, {PREFIX}PASSWORD), or `token`, "
            "`nkey` or `creds`"
        )
    if isinstance(failure, TLSFailed):
        return (
            f"Check `tls_ca` ({PREFIX}TLS_CA), and that the server has TLS and a certificate for "
            f"the host in `nats_url` ({PREFIX}NATS_URL)"
        )
    return f"Check `nats_url` ({PREFIX}NATS_URL), and that a NATS server listens there"
