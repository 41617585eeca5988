"""How a session begins and ends: the nursery that owns the services, and their order.

Policy on exceptions. The services run in a nursery around the body of ``async with session()``,
and Trio reports whatever leaves a nursery in an exception group. Which tasks there are in it is a
detail of this module. So what the body raised never enters the nursery, and leaves as itself. A
service that crashes cancels the body, and its exception is taken out of the nursery's group again.
Only where the body answers that with an exception of its own, the two leave together in a group.

Order of leaving. Each service runs in a shielded scope of its own, so that neither Ctrl-C nor a
cancellation from outside stops it before the body has unwound: no new operations, terminal claims
queued, flushed within the grace period, services released, transport closed.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, final

import msgspec
import trio

from .._config import BackbeatConfig
from .._errors import Logger
from .._metronome.metronome import Metronome
from .._runtime.emitter import ClaimEmitter, Journal
from .._runtime.services import tick, watch_connection
from .._transport.memory import MemoryTransport, open_memory_bus
from .._transport.protocol import Transport
from .session import MAKER, Session, current


@final
class _Service(trio.TaskStatus[None]):
    """One task of a session: the scope that shields it, and what has become of it."""

    def __init__(self) -> None:
        self.scope = trio.CancelScope(shield=True)
        self.has_started = trio.Event()
        self.has_ended = trio.Event()

    def started(self, value: None = None) -> None:
        """Let whoever started the service go on."""
        self.has_started.set()


@final
class _Services:
    """The tasks of a session, each shielded until it is released."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self.crashed = False
        self._running: dict[object, _Service] = {}

    async def start(self, async_fn: Callable[..., Awaitable[None]], *args: Any) -> None:
        """Start a service, and wait until it says that it has started. A checkpoint."""
        # Not by `trio.Nursery.start`: where that is cancelled it waits for the task to end, which
        # a shielded one does not do.
        service = self._running[async_fn] = _Service()
        self._nursery.start_soon(self._run, service, async_fn, args, name=async_fn)
        await service.has_started.wait()

    @trio.lowlevel.enable_ki_protection
    async def _run(
        self,
        service: _Service,
        async_fn: Callable[..., Awaitable[None]],
        args: tuple[Any, ...],
    ) -> None:
        try:
            with service.scope:
                await async_fn(*args, task_status=service)
        except BaseException:
            self.crashed = True
            raise
        finally:
            service.has_ended.set()

    def cancel(self, *names: object) -> list[trio.Event]:
        """Cancel the named services, or all of them; return what tells that they have ended."""
        chosen = [self._running[name] for name in names or self._running if name in self._running]
        for service in chosen:
            service.scope.cancel()
        return [service.has_ended for service in chosen]

    async def release(self, *names: object, keep: Collection[object] = ()) -> None:
        """Cancel the named services, or all but some, and wait until they have unwound."""
        chosen = names or [name for name in self._running if name not in keep]
        with trio.CancelScope(shield=True):
            for ended in self.cancel(*chosen) if chosen else ():
                await ended.wait()


async def _start(bb: Session, services: _Services, metronome: Metronome | None) -> None:
    clock, logger, transport = bb._clock, bb._logger, bb._transport
    await services.start(clock.run)
    if transport is not None and bb._listener is not None and bb._emitter is not None:
        await services.start(transport.run)
        if bb._config.require_connection:
            await transport.first_attempt()
        await services.start(watch_connection, transport, logger)
        await services.start(bb._listener.run)
        if metronome is not None:
            await services.start(metronome.run)
        with trio.move_on_after(bb._config.lock_timeout):
            await bb._listener.locked.wait()
        await services.start(bb._emitter.run)
    await services.start(tick, clock, logger, bb._on_beat)
    bb._started = True
    logger.info(
        "🎵 CHORUS BACKBEAT integration started - cluster=%s agent=%s",
        bb._config.cluster_id,
        bb._config.agent_id,
    )


@trio.lowlevel.enable_ki_protection
async def _stop(bb: Session, services: _Services) -> None:
    bb._closing = True
    try:
        for operation in bb._operations.live():
            claim = bb._operations.fail(
                operation.id, "the session was closed", beat=bb._clock.index()
            )
            bb._emit(claim, terminal=True)
        if bb._emitter is not None:
            await _flush(bb, services, bb._emitter)
    finally:
        # What uses the transport is released before it, and the clock last.
        try:
            await services.release(keep=_foundations(bb))
        finally:
            bb._clock.close()
            services.cancel()
            if bb._started:
                bb._started = False
                bb._logger.info("🎵 CHORUS BACKBEAT integration stopped")


def _foundations(bb: Session) -> set[object]:
    foundations: set[object] = {bb._clock.run}
    if bb._transport is not None:
        foundations.add(bb._transport.run)
    return foundations


async def _flush(bb: Session, services: _Services, emitter: ClaimEmitter) -> None:
    with trio.move_on_after(bb._config.grace_period, shield=True) as grace:
        await services.release(emitter.run)
        await emitter.drain()
    if grace.cancelled_caught and emitter.pending:
        bb._logger.warning(
            "%d terminal claims were not delivered within %g s",
            emitter.pending,
            bb._config.grace_period,
        )


def _only(group: BaseExceptionGroup[BaseException]) -> BaseException:
    # The nursery's group, taken apart as the module's text says.
    if len(group.exceptions) == 1:
        return group.exceptions[0]
    return group


@asynccontextmanager
async def session(
    config: BackbeatConfig | None = None,
    /,
    *,
    transport: Transport | None = None,
    logger: Logger | None = None,
    **overrides: Any,
) -> AsyncGenerator[Session, None]:
    """Open a session: this task is part of the cluster for the length of the block.

    Without a server the session starts all the same, on a local grid, and locks to the cluster's
    when it can. Entering waits for the lock for `BackbeatConfig.lock_timeout` at most. Leaving
    waits for the terminal claims to reach the server, for `BackbeatConfig.grace_period` at most.
    What the body raises leaves as itself. Entering and leaving are checkpoints.

    Args:
      config: the settings; by default those of the environment, `BackbeatConfig.from_env`.
      transport: used in place of the one that ``nats_url`` names; the session runs and closes it.
      logger: by default ``logging.getLogger("backbeat_trio")``.
      **overrides: fields of `BackbeatConfig` that take precedence.

    Raises:
      ConfigError: where a setting cannot work.
      TransportBroken: with ``require_connection``, where the first connection cannot be made; or
        its subclasses `AuthenticationFailed` and `TLSFailed`.

    """
    if config is None:
        config = BackbeatConfig.from_env(**overrides)
    elif overrides:
        config = msgspec.structs.replace(config, **overrides)
    if logger is None:
        logger = logging.getLogger("backbeat_trio")
    failure: BaseException | None = None
    async with AsyncExitStack() as stack:
        metronome = None
        journal: Journal | None = None
        if not config.enabled:
            transport = None
        elif transport is None and config.memory_name is not None:
            bus = await stack.enter_async_context(open_memory_bus(config.memory_name))
            transport = MemoryTransport(bus)
            metronome = Metronome(
                transport,
                cluster_id=config.cluster_id,
                leader_id=config.agent_id,
                tempo_bpm=config.tempo_bpm,
                beats_per_bar=config.beats_per_bar,
                bus=bus,
            )
        elif transport is None:
            # Imported on use: asyncio, anyio and nats-py cost more than all the rest.
            from .._transport.nats import NatsTransport

            transport = nats = NatsTransport(config)
            if config.store_claims:
                from .._transport.jetstream import ClaimStream

                journal = ClaimStream(nats, config)
        bb = Session(MAKER, config, transport, logger, journal)
        try:
            async with trio.open_nursery() as nursery:
                services = _Services(nursery)
                try:
                    await _start(bb, services, metronome)
                    token = current.set(bb)
                    try:
                        yield bb
                    finally:
                        current.reset(token)
                except BaseException as error:  # noqa: BLE001 - it is raised again, further down
                    failure = error
                await _stop(bb, services)
                # All are told to end by now, and none takes long to.
                nursery.cancel_scope.shield = True
                if failure is not None and services.crashed:
                    # It may be the cancellation by which the nursery answers a crash.
                    raise failure
        except BaseExceptionGroup as group:
            failure = _only(group)
    # Outside of the handler, so that the exception does not get the group for its context.
    if failure is not None:
        try:
            raise failure
        finally:
            # Its traceback holds this frame, and this frame would hold it.
            del failure
