"""How a session begins and ends: the nursery around the body, and what leaves it.

Policy on exceptions. The services run in a nursery around the body of ``async with session()``,
and Trio reports whatever leaves a nursery in an exception group. Which tasks there are in it is a
detail of this package. So what the body raised never enters the nursery, and leaves as itself. A
service that crashes cancels the body, and its exception is taken out of the nursery's group again.
Only where the body answers that with an exception of its own, the two leave together in a group.

Policy on Ctrl-C. Entering and leaving are protected from it as `trio.open_nursery` is: Trio raises
it at a checkpoint and never between two lines, so no service is left behind that nobody releases.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from types import TracebackType
from typing import Unpack, final

import trio

from .._config import BackbeatConfig, ConfigFields, check_fields
from .._errors import Logger
from .._metronome.metronome import Metronome
from .._runtime.runtime import Runtime
from .._runtime.services import ServiceGroup, sole
from .._transport.memory import MemoryTransport, open_memory_bus
from .._transport.protocol import Transport
from .session import Session, make_session, session_var


def session(
    config: BackbeatConfig | None = None,
    /,
    *,
    transport: Transport | None = None,
    logger: Logger | None = None,
    **overrides: Unpack[ConfigFields],
) -> AbstractAsyncContextManager[Session]:
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
      ConfigError: on entering, where a setting cannot work.
      TransportBroken: on entering, with ``require_connection``, where the first connection cannot
        be made; or its subclasses `AuthenticationFailed` and `TLSFailed`.
      TypeError: for an override that names no field.
      RuntimeError: on entering, where ``transport`` stops running before it has started.

    """
    check_fields("session", overrides)
    return _SessionManager(_open(config, transport, logger, overrides))


@final
class _SessionManager(AbstractAsyncContextManager[Session]):
    # Ctrl-C between two lines of `contextlib` would leave a generator that nobody resumes, and with
    # it the services. Protection reaches what is called from a protected function.

    def __init__(self, manager: AbstractAsyncContextManager[Session]) -> None:
        self._manager = manager

    @trio.lowlevel.enable_ki_protection
    async def __aenter__(self) -> Session:
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
    overrides: ConfigFields,
) -> AsyncGenerator[Session, None]:
    if config is None:
        config = BackbeatConfig.from_env(logger=logger, **overrides)
    elif overrides:
        config = config.__replace__(**overrides)
    failure: BaseException | None = None
    async with AsyncExitStack() as stack:
        runtime = await _make_runtime(config, transport, logger, stack)
        try:
            async with trio.open_nursery() as nursery:
                services = ServiceGroup(nursery)
                try:
                    await runtime.start(services)
                    bb = make_session(runtime)
                    token = session_var.set(bb)
                    try:
                        yield bb
                    finally:
                        session_var.reset(token)
                except BaseException as error:  # noqa: BLE001 - it is raised again, further down
                    failure = error
                await runtime.stop(services)
                # All are told to end by now, and none takes long to.
                nursery.cancel_scope.shield = True
                if failure is not None and services.crashed:
                    # It may be the cancellation by which the nursery answers a crash.
                    raise failure
        except BaseExceptionGroup as group:
            left = sole(group)
            if not services.crashed and left.__context__ is None:
                # Leaving was interrupted: what the body raised is not to be lost.
                left.__context__ = failure
            failure = left
    # Outside of the handler, so that the exception does not get the group for its context.
    if failure is not None:
        try:
            raise failure
        finally:
            # Its traceback holds this frame, and this frame would hold it.
            del failure
    await trio.lowlevel.checkpoint()


async def _make_runtime(
    config: BackbeatConfig,
    transport: Transport | None,
    logger: Logger | None,
    stack: AsyncExitStack,
) -> Runtime:
    if logger is None:
        logger = logging.getLogger("backbeat_trio")
    if not config.enabled:
        if transport is not None:
            stack.push_async_callback(transport.aclose)
        return Runtime(config, logger)
    if transport is not None:
        return Runtime(config, logger, transport)
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
        )
        return Runtime(config, logger, transport, metronome=metronome)
    # Imported on use: asyncio, anyio and nats-py cost more than all the rest.
    from .._transport.nats import NatsTransport

    transport = nats = NatsTransport(config)
    if not config.store_claims:
        return Runtime(config, logger, transport)
    from .._transport.jetstream import ClaimStream

    return Runtime(config, logger, transport, journal=ClaimStream(nats, config))
