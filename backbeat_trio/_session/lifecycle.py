"""How a session begins and ends: the nursery around the body, and the exceptions that leave it.

Policy on exceptions. The services run in a nursery around the body of ``async with session()``,
and Trio puts whatever leaves a nursery into an exception group. Which tasks run in the nursery is a
detail of this package. So what the body raises never enters the nursery, and leaves as itself. A
service that crashes cancels the body, and its exception is taken out of the nursery's group again.
Only if the body then raises an exception of its own, the two leave together in a group.

Policy on Ctrl-C. Entering and leaving are protected from it as `trio.open_nursery` is: Trio raises
it at a checkpoint and never between two lines. So no service is left running without an owner.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Iterable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from types import TracebackType
from typing import Unpack, final

import trio

from .._calls.instrument import Instrument
from .._config import BackbeatConfig, ConfigFields, check_fields
from .._errors import Logger
from .._metronome.metronome import Metronome
from .._runtime.instruments import Instruments
from .._runtime.runtime import Runtime
from .._runtime.services import ServiceGroup, sole
from .._transport.memory import MemoryTransport, open_memory_bus
from .._transport.protocol import Transport
from .logs import SessionLogger, stamped
from .session import Session, make_session, session_var


def session(
    config: BackbeatConfig | None = None,
    /,
    *,
    transport: Transport | None = None,
    logger: Logger | None = None,
    instruments: Iterable[Instrument] = (),
    **overrides: Unpack[ConfigFields],
) -> AbstractAsyncContextManager[Session]:
    """Open a session, by which this process takes part in a cluster for the length of the block.

    Use it as ``async with backbeat_trio.session() as bb:``. While the block runs, background tasks
    hold the connection to the NATS server, follow the cluster's metronome, cancel budgets that have
    run out, and publish claims: those of the operations, and one of the agent's health every
    `BackbeatConfig.health_beats` beats. With a ``nats_url`` of ``memory://`` they also run the
    metronome.

    Entering waits until a metronome is heard, for `BackbeatConfig.lock_timeout` at most. If there
    is none, or no server, the session starts all the same, on a local grid. It moves to the
    cluster's grid as soon as it hears of it, and logs both. Leaving waits until the terminal claims
    have reached the server, for `BackbeatConfig.grace_period` at most. Entering and leaving are
    checkpoints.

    What the block raises leaves the session as itself, and not in an exception group. If one of the
    background tasks crashes, the block is cancelled, and the session raises the exception.

    Args:
      config: the settings. None reads them from the environment by `BackbeatConfig.from_env`.
      transport: the connection to use instead of the one that ``nats_url`` names. The session runs
        it, and closes it.
      logger: where the session logs; by default ``logging.getLogger("backbeat_trio")``. The records
        of a `logging.Logger` have the attributes that `BeatFilter` describes.
      instruments: what observes the session, such as `backbeat_trio.metrics.SessionMetrics` and
        `backbeat_trio.tracing.Tracing`; see `Instrument`.
      **overrides: fields of `BackbeatConfig`, which take precedence over ``config`` and the
        environment.

    Returns:
      An async context manager, which gives the `Session`.

    Raises:
      ConfigError: on entering, if a setting is not valid.
      TransportBroken: on entering, with ``require_connection``, if the first connection cannot be
        made. It may be one of the subclasses `AuthenticationFailed` and `TLSFailed`.
      TypeError: if ``config`` is not a `BackbeatConfig`, or an override is not one of its fields;
        on entering, if one of the instruments is not an `Instrument`.
      RuntimeError: on entering, if it was entered before, or if ``transport`` stops running before
        it has started.

    """
    check_fields("session", overrides)
    if config is not None and not isinstance(config, BackbeatConfig):
        # The text leaves out the value: it may be a URL with a password.
        raise TypeError(f"`config` must be a BackbeatConfig, not of type {type(config).__name__}")
    return _SessionManager(_open(config, transport, logger, instruments, overrides))


@final
class _SessionManager(AbstractAsyncContextManager[Session]):
    # Ctrl-C between two lines of `contextlib` would leave a suspended generator, and with it the
    # services. Protection extends to what a protected function calls.

    def __init__(self, manager: AbstractAsyncContextManager[Session]) -> None:
        self._manager = manager
        self._was_entered = False

    @trio.lowlevel.enable_ki_protection
    async def __aenter__(self) -> Session:
        if self._was_entered:
            raise RuntimeError("a session can be entered only once; call `session` for another one")
        self._was_entered = True
        return await self._manager.__aenter__()

    @trio.lowlevel.enable_ki_protection
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        return await self._manager.__aexit__(exc_type, exc, traceback)


@asynccontextmanager
@trio.lowlevel.enable_ki_protection
async def _open(
    config: BackbeatConfig | None,
    transport: Transport | None,
    logger: Logger | None,
    instruments: Iterable[Instrument],
    overrides: ConfigFields,
) -> AsyncGenerator[Session, None]:
    if config is None:
        config = BackbeatConfig.from_env(logger=logger, **overrides)
    elif overrides:
        config = config.__replace__(**overrides)
    failure: BaseException | None = None
    async with AsyncExitStack() as stack:
        if logger is None:
            logger = logging.getLogger("backbeat_trio")
        logger = stamped(logger, config)
        runtime = await _make_runtime(config, transport, logger, instruments, stack)
        if isinstance(logger, SessionLogger):
            logger.runtime = runtime
        bb, told = make_session(runtime), runtime.instruments
        stack.callback(lambda: told.tell(told.session_closed))
        told.tell(told.session_opened, bb)
        try:
            async with trio.open_nursery() as nursery:
                services = ServiceGroup(nursery)
                try:
                    await runtime.start(services)
                    await services.start(bb._control.run)
                    token = session_var.set(bb)
                    try:
                        yield bb
                    finally:
                        session_var.reset(token)
                except BaseException as error:  # noqa: BLE001 - it is raised again, further down
                    failure = error
                await runtime.stop(services)
                # All services are cancelled by now, and none of them takes long to end.
                nursery.cancel_scope.shield = True
                if failure is not None and services.crashed:
                    # It may be the cancellation that the nursery sent because of the crash.
                    raise failure
        except BaseExceptionGroup as group:
            left = sole(group)
            if not services.crashed and left.__context__ is None:
                # Leaving was interrupted, and what the body raised must not be lost.
                left.__context__ = failure
            failure = left
    # Outside of the handler, so that the group does not become the exception's context.
    if failure is not None:
        try:
            raise failure
        finally:
            # Its traceback refers to this frame, so a reference from here would be a cycle.
            del failure
    await trio.lowlevel.checkpoint()


async def _make_runtime(
    config: BackbeatConfig,
    transport: Transport | None,
    logger: Logger,
    instruments: Iterable[Instrument],
    stack: AsyncExitStack,
) -> Runtime:
    told = Instruments(instruments, Instrument, logger)
    if not config.enabled:
        if transport is not None:
            stack.push_async_callback(transport.aclose)
        return Runtime(config, logger, instruments=told)
    if transport is not None:
        return Runtime(config, logger, transport, instruments=told)
    if config.memory_name is not None:
        bus = await stack.enter_async_context(open_memory_bus(config.memory_name))
        transport = MemoryTransport(bus)
        metronome = Metronome(
            transport,
            cluster_id=config.cluster_id,
            leader_id=config.agent_id,
            tempo_bpm=config.tempo_bpm,
            beats_per_bar=config.beats_per_bar,
            bus=bus,
            logger=logger,
            serve_info=config.serve_info,
        )
        return Runtime(config, logger, transport, metronome=metronome, instruments=told)
    # Imported on use, because asyncio, anyio and nats-py take longer to import than all the rest.
    from .._transport.nats import NatsTransport

    transport = nats = NatsTransport(config)
    if not config.store_claims:
        return Runtime(config, logger, transport, instruments=told)
    from .._transport.jetstream import ClaimStream

    return Runtime(config, logger, transport, journal=ClaimStream(nats, config), instruments=told)
