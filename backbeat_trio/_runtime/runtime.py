"""What one session runs: its clock, transport, listener, emitter and operations.

Order of leaving. Each service runs in a shielded scope of its own. So neither Ctrl-C nor a
cancellation from outside stops it before the body has ended. Then the session refuses new
operations, queues the terminal claims of those that live, sends them within the grace period, ends
the services, and closes the transport.
"""

from __future__ import annotations

import math
from typing import Any, Final, final

import msgspec
import trio

from .._config import BackbeatConfig
from .._errors import Logger, SessionClosed
from .._grid.follower import FollowCounts
from .._grid.timeline import beat_ns, milli_bpm
from .._metronome.listener import BeatListener, ListenerObserver
from .._metronome.metronome import Metronome
from .._time.beats import Beats
from .._time.clock import BeatClock
from .._time.local import local_ns
from .._transport.archive import Archive, StreamArchive
from .._transport.discovery import discover_own
from .._transport.memory import MemoryTransport
from .._transport.protocol import Transport, TransportStatistics
from .._wire import StatusClaim, format_bpm
from .claims import ClaimCounts
from .emitter import ClaimEmitter, Journal
from .health import CallCounts, GridState, Health, PendingChange, SessionStatistics, health_claim
from .instruments import NONE, Instruments
from .notices import Notices, process_name, shared_id_text
from .operations import Operations
from .services import ServiceGroup

# Errors are reported for the time between three health claims, and for at least this long.
_ERRORS_NS: Final = 10_000_000_000


@final
class Runtime(ListenerObserver):
    """The inside of a session.

    Args:
      config: the settings.
      logger: where to log.
      transport: the connection, which it runs and closes; None if the session is disabled.
      journal: the stream that stores terminal claims; None if there is none.
      metronome: a metronome to run; None if the session does not run one.
      instruments: are told of what happens.

    """

    def __init__(
        self,
        config: BackbeatConfig,
        logger: Logger,
        transport: Transport | None = None,
        *,
        journal: Journal | None = None,
        metronome: Metronome | None = None,
        instruments: Instruments = NONE,
    ) -> None:
        self.config: BackbeatConfig = config
        self.logger: Logger = logger
        self.instruments: Instruments = instruments
        self.transport: Transport | None = transport
        self.archive: Archive | None = None
        """Where stored claims are read; None if the session is disabled."""
        if isinstance(transport, MemoryTransport):
            self.archive = transport.bus.archive
        elif transport is not None:
            self.archive = StreamArchive(transport, config.claims_stream)
        self._run_token = trio.lowlevel.current_trio_token()
        self.operations: Operations = Operations(
            config.agent_id, config.node_id, self, config.cluster_id, instruments
        )
        self.clock: BeatClock = BeatClock.local(
            milli_bpm("tempo_bpm", config.tempo_bpm),
            config.beats_per_bar,
            enforcing=config.enabled,
            on_rebase=self.operations.rebase,
        )
        self.claim_counts: ClaimCounts = ClaimCounts()
        self.call_counts: CallCounts = CallCounts()
        self._last_index = self.clock.index()
        self.started: bool = False
        self.closing: bool = False
        self._last_health: Health | None = None
        self._metronome = metronome
        self.listener: BeatListener | None = None
        self.emitter: ClaimEmitter | None = None
        self.notices: Notices | None = None
        if transport is not None:
            self.listener = BeatListener(
                self.clock,
                transport,
                cluster_id=config.cluster_id,
                agent_id=config.agent_id,
                logger=logger,
                answers_recalls=config.answer_recalls,
                # An observer publishes no claims, so it may have the id of another process.
                process=process_name() if config.health_beats else "",
                observer=self,
            )
            self.emitter = ClaimEmitter(
                self.clock,
                transport,
                self.operations,
                agent_id=config.agent_id,
                counts=self.claim_counts,
                logger=logger,
                journal=journal,
            )
            self.notices = Notices(
                config, logger, self.clock, transport, self.listener, self.emitter
            )

    @property
    def is_elsewhere(self) -> bool:
        """Whether this is asked in another run of Trio than the session's."""
        if not trio.lowlevel.in_trio_run():
            return False
        return trio.lowlevel.current_trio_token() is not self._run_token

    # What operations need.

    def current_beat(self) -> int:
        """Return the index of the present beat."""
        return self.clock.index()

    def check_open(self) -> None:
        """Raise `SessionClosed` if the session was left, or is being left."""
        if self.closing:
            raise SessionClosed("the session has been closed")

    def emit(self, claim: StatusClaim, *, terminal: bool = False) -> None:
        """Queue a claim. This has no effect if the session is disabled."""
        if self.emitter is not None:
            self.emitter.emit(claim, terminal=terminal)

    # Beginning and ending.

    async def start(self, services: ServiceGroup) -> None:
        """Start all services, beginning with those that others use. A checkpoint.

        Raises:
          TransportBroken: with ``require_connection``, if the first attempt to connect fails.
          RuntimeError: if a service returns before it has started.

        """
        config, transport = self.config, self.transport
        await services.start(self.clock.run)
        if transport is not None and self.listener is not None and self.emitter is not None:
            await services.start(transport.run)
            if config.require_connection:
                await transport.first_attempt()
            if self.notices is not None:
                await services.start(self.notices.run)
            await services.start(self.listener.run)
            if self._metronome is not None:
                await services.start(self._metronome.run)
            with trio.move_on_after(config.lock_timeout):
                await self.listener.locked.wait()
            await services.start(self.emitter.run)
            if config.serve_info:
                await services.start(self._be_found)
        await services.start(self._tick)
        self.started = True
        if self.emitter is not None and self.emitter.has_journal and config.health_beats:
            # Over NATS permissions may refuse this agent's subject. The first claim shows that, so
            # publish it now and not after eight beats.
            self._emit_health(self.clock.index())
        self.logger.info(
            "🎵 CHORUS BACKBEAT integration started - cluster=%s agent=%s",
            config.cluster_id,
            config.agent_id,
        )

    async def stop(self, services: ServiceGroup) -> None:
        """End all services in the order of leaving. A checkpoint; it goes on if it is cancelled."""
        self.closing = True
        try:
            self.operations.fail_all("the session was closed")
            # An emitter that has crashed would crash again.
            if self.emitter is not None and self.emitter.run not in services.crashed:
                await self._flush(services, self.emitter)
        finally:
            # Services that use the transport end before it does, and the clock ends last.
            try:
                await services.release(keep=self._foundations())
            finally:
                self.clock.close()
                services.cancel()
                if self.started:
                    self.started = False
                    self.logger.info("🎵 CHORUS BACKBEAT integration stopped")
                try:
                    if self.transport is not None:
                        with trio.move_on_after(self.config.grace_period, shield=True):
                            await self.transport.aclose()
                finally:
                    self._last_health = self.health()

    def _foundations(self) -> set[object]:
        foundations: set[object] = {self.clock.run}
        if self.transport is not None:
            foundations.add(self.transport.run)
        return foundations

    async def _flush(self, services: ServiceGroup, emitter: ClaimEmitter) -> None:
        with trio.move_on_after(self.config.grace_period, shield=True) as grace:
            await services.release(emitter.run)
            await emitter.drain()
        if grace.cancelled_caught and emitter.pending:
            self.logger.warning(
                "%d terminal claims were not delivered within %g s",
                emitter.pending,
                self.config.grace_period,
            )

    # What the listener calls.

    def on_shared(self) -> None:
        """Log that another process has this agent's id."""
        if self.notices is not None:
            self.notices.wake()

    # Services.

    async def _be_found(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        # Nobody waits for this: the server may not answer, and may refuse it.
        task_status.started()
        assert self.transport is not None
        own = discover_own("backbeat-agent", "An agent of a BACKBEAT cluster", self._describe)
        await own.run(self.transport, self.logger)

    def _describe(self) -> dict[str, str]:
        config, listener = self.config, self.listener
        locked = listener is not None and listener.follower.locked
        return {
            "cluster": config.cluster_id,
            "role": "agent",
            "epoch": str(listener.follower.epoch) if listener is not None and locked else "",
            "agent_id": config.agent_id,
        }

    async def _tick(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        # The application's own tasks that wait for a beat run before this one.
        beats = Beats(self.clock, bars=False, comes_last=True)
        task_status.started()
        async for beat in beats:
            self.logger.debug(
                "🥁 BACKBEAT beat received - beat=%d phase=%s tempo=%s window=%s",
                beat.index,
                beat.phase,
                format_bpm(round(beat.tempo_bpm * 1000)),
                beat.window_id,
            )
            if beat.downbeat:
                self.logger.debug(
                    "🎼 BACKBEAT downbeat - new bar started - beat=%d window=%s",
                    beat.index,
                    beat.window_id,
                )
            self._last_index = beat.index
            self._emit_on_beat(beat.index, beat.skipped)
            if self.notices is not None:
                self.notices.beat()
            if self.instruments.beat:
                lateness = max(0, self.clock.punctuality.late_ns or 0) / 1e9
                self.instruments.tell(self.instruments.beat, beat, lateness)

    def _emit_on_beat(self, index: int, skipped: int) -> None:
        if self.emitter is None:
            return
        if len(self.operations):
            self.emitter.beat()
        every = self.config.health_beats
        if every and index // every != (index - skipped - 1) // every:
            self._emit_health(index)

    def _emit_health(self, index: int) -> None:
        config, tempo = self.config, self.clock.segment().milli_bpm
        self.emit(health_claim(self.health(), config.agent_id, config.cluster_id, index, tempo))

    # Observation.

    def stamp(self) -> dict[str, Any]:
        """Return the attributes that log records of this moment have; see `BeatFilter`."""
        beat, position = self._last_index, None
        # The clock can be read in its own run only, and not in another thread.
        if trio.lowlevel.in_trio_run() and not self.is_elsewhere:
            position = self.clock.position()
            beat = math.floor(position)
            position = round(position, 3)
        return {
            "backbeat_beat": beat,
            "backbeat_position": position,
            "backbeat_cluster": self.config.cluster_id,
            "backbeat_agent": self.config.agent_id,
        }

    def health(self) -> Health:
        """Return how the session is doing, or how it was when it was left."""
        if self._last_health is not None:
            return self._last_health
        config, clock, transport, now = self.config, self.clock, self.transport, local_ns()
        follower = None if self.listener is None else self.listener.follower
        connected = transport is not None and transport.connected and not clock.closed
        off = None if follower is None else follower.error_text(now)
        degraded = config.enabled and (
            not connected
            or follower is None
            or not follower.locked
            or follower.in_holdover(now)
            or off is not None
            or clock.loop_late
        )
        followed = follower if follower is not None and follower.locked else None
        uncertainty = None if followed is None else followed.uncertainty_ns(now)
        if uncertainty is not None:
            uncertainty += clock.grid.hold_ns(now)
        counters = None if transport is None else transport.statistics()
        segment = clock.segment()
        grid = self._grid_state(now, connected=connected)
        heard = None if follower is None else follower.last_frame_ns
        return Health(
            enabled=config.enabled,
            started=self.started,
            connected=connected,
            current_beat=clock.index(),
            current_tempo=segment.milli_bpm / 1000,
            measured_bpm=None if follower is None else follower.measured_bpm(now),
            tempo_drift="unknown" if follower is None else follower.drift.verdict,
            reconnect_count=0 if counters is None else max(0, counters.connects - 1),
            active_operations=len(self.operations),
            local_degradation=degraded,
            errors=() if counters is None else self._recent_errors(counters, off),
            node_id=config.node_id,
            paused=not segment.milli_bpm,
            uncertainty=None if uncertainty is None else uncertainty / 1e9,
            epoch=None if followed is None else followed.epoch,
            leader_id=followed.leader_id if followed is not None and grid == "locked" else None,
            standbys=None if followed is None or self.listener is None else self.listener.standbys,
            pending=tuple(
                PendingChange(segment.beat0, segment.milli_bpm / 1000)
                for segment in clock.grid.timeline.since(clock.cluster_ns()).segments[1:]
            ),
            grid=grid,
            last_frame_age=None if heard is None else max(0, now - heard) / 1e9,
            skew=None if followed is None else followed.skew_ns(now) / 1e9,
        )

    def _grid_state(self, now: int, *, connected: bool) -> GridState:
        follower = None if self.listener is None else self.listener.follower
        if follower is None or not follower.locked:
            return "local"
        return "locked" if connected and not follower.in_holdover(now) else "holdover"

    def _recent_errors(self, counters: TransportStatistics, off: str | None) -> tuple[str, ...]:
        beats = 2 * self.config.health_beats
        since = local_ns() - max(_ERRORS_NS, beats * beat_ns(self.clock.segment().milli_bpm))
        errors = counters.recent_errors
        if self.listener is not None:
            errors = tuple(sorted((*errors, *self.listener.recent_errors)))
        if self.emitter is not None:
            errors = tuple(sorted((*errors, *self.emitter.recent_errors)))
        recent = [text for when, text in errors if when >= since]
        if counters.last_error is not None and counters.last_error not in recent:
            recent.append(counters.last_error)
        if self.listener is not None and self.listener.shares_id:
            recent.append(shared_id_text(self.config))
        if off is not None:
            recent.append(off)
        return tuple(recent)

    def statistics(self) -> SessionStatistics:
        """Return the counters."""
        followed = FollowCounts() if self.listener is None else self.listener.follower.counts
        claims, emitter, transport = self.claim_counts, self.emitter, self.transport
        return SessionStatistics(
            frames=followed.frames,
            frames_undecodable=followed.frames_undecodable,
            frames_foreign=followed.frames_foreign,
            frames_stale_epoch=followed.frames_stale_epoch,
            frames_repeated=followed.frames_repeated,
            frames_unexplained=followed.frames_unexplained,
            pings=followed.pings,
            pings_failed=followed.pings_failed,
            pings_outlying=followed.pings_outlying,
            locks=followed.locks,
            leader_changes=followed.leader_changes,
            claims_sent=claims.claims_sent,
            claims_stored=claims.claims_stored,
            claims_coalesced=claims.claims_coalesced,
            claims_pending=0 if emitter is None else emitter.pending,
            claims_queued=0 if emitter is None else emitter.queued,
            claims_undecodable=claims.claims_undecodable,
            claims_dropped=claims.claims_dropped,
            **msgspec.structs.asdict(self.call_counts),
            late_replies=0 if transport is None else transport.statistics().late_replies,
            live_scopes=self.clock.live_scopes,
            transport=None if transport is None else transport.statistics(),
        )
