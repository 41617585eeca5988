"""Services: named groups of endpoints that answer requests, as ADR-32 of NATS describes them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from typing import final

import trio

from .._checks import check_beats, check_integer
from .._errors import PermissionDenied, SessionClosed, TransportClosed
from .._runtime.services import sole
from .._transport.adr32 import (
    check_metadata,
    check_name,
    check_text,
    check_version,
    endpoint_name,
)
from .._transport.discovery import Discovery
from .._transport.protocol import Subscription, Transport, check_pattern, check_queue
from .._wire import cancel_subject
from .context import Calls
from .endpoint import WAITING, Endpoint, Handler


@final
class Service:
    """What ``async with bb.open_service(...)`` gives: one instance of a service."""

    _calls: Calls
    _discovery: Discovery
    _metadata: dict[str, str]
    # Where handlers run.
    _nursery: trio.Nursery
    # The endpoints that take requests, each with the scope that ends when it should stop.
    _endpoints: dict[Endpoint, trio.CancelScope]
    _closed: trio.Event
    _ended: trio.Event
    # When handlers are cancelled that still run, once the block is being left.
    _deadline: float | None

    def __init__(self) -> None:
        raise TypeError("services are made by `Session.open_service`")

    @property
    def name(self) -> str:
        """The name, which all instances share."""
        return self._discovery.name

    @property
    def id(self) -> str:
        """The id, which tells this instance from the others."""
        return self._discovery.id

    @property
    def version(self) -> str:
        """The version."""
        return self._discovery.version

    @property
    def description(self) -> str:
        """The description."""
        return self._discovery.description

    @property
    def metadata(self) -> Mapping[str, str]:
        """The metadata, as a copy."""
        return dict(self._metadata)

    async def serve(
        self,
        subject: str,
        handler: Handler,
        *,
        name: str | None = None,
        concurrency: int = 64,
        queue: str = "q",
        min_beats: float = 0,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Answer requests on a subject, until cancelled or the service's block is left.

        A service may have several endpoints: start this once for each in a nursery, by
        ``nursery.start_soon(service.serve, ...)``, or by ``await nursery.start(...)``, which
        returns once the server knows of the endpoint. ``await service.serve(...)`` alone serves
        without end.

        Handlers run side by side, each in what is left of its caller's budget, as a part of its
        caller's operation, and in its trace, as in a block of `Session.extract`. What a handler
        returns is the answer. If it raises `ServiceError`, that is the answer. Any other exception
        is logged and answered with code 500, and the service goes on. When the budget runs out, or
        the caller stops waiting, the handler is cancelled.

        A request whose budget is spent, or is less than ``min_beats``, is refused before any work,
        with code 408. More requests than ``concurrency`` wait for their turn, and are refused then
        if their budget is spent; up to 4,096 wait, and more are refused with code 503.

        When this is cancelled, or the service's block is left, it takes no more requests. Handlers
        that are running go on for at most `BackbeatConfig.grace_period`, are cancelled then, and
        this waits for their end. A checkpoint.

        Args:
          subject: the subject, which may contain ``*`` and ``>``.
          handler: an async function that takes a `Request` and returns bytes.
          name: the endpoint's name: letters, digits, ``-`` and ``_``. By default it is made of the
            subject.
          concurrency: how many handlers run at the same time, 1 or more.
          queue: the queue group: of all instances with the same one, each request goes to one. An
            empty string has every instance get every request.
          min_beats: how many beats of a budget must be left for a handler to start, 0 or more. A
            request without a deadline always has enough.

        Raises:
          TypeError, ValueError: for an argument that is not valid; the text names it.
          PermissionDenied: if the server's permissions refuse the subscription.
          SessionClosed: if the service's block has been left, or the session ends meanwhile.

        """
        check_pattern(check_text("subject", subject))
        check_queue(check_text("queue", queue))
        if not callable(handler):
            raise TypeError(f"`handler` must be an async function, and not {handler!r}")
        name = endpoint_name(subject) if name is None else check_name("name", name)
        concurrency = check_integer("concurrency", concurrency, 1)
        min_beats = check_beats("min_beats", min_beats)
        await trio.lowlevel.checkpoint()
        if self._closed.is_set():
            raise SessionClosed("the service has been closed")
        transport = self._calls.runtime.transport
        if transport is None:
            # A disabled session hears of no requests.
            task_status.started()
            await self._closed.wait()
            return
        endpoint = Endpoint(
            self._calls,
            transport,
            self._nursery,
            name=name,
            subject=subject,
            queue=queue,
            handler=handler,
            concurrency=concurrency,
            min_beats=min_beats,
        )
        try:
            # The notices come first, so that no request can be cancelled unheard.
            async with (
                transport.open_subscription(cancel_subject(subject), optional=True) as notices,
                transport.open_subscription(subject, queue=queue, capacity=WAITING) as messages,
            ):
                if messages.refusal is not None:
                    raise PermissionDenied(messages.refusal)
                if notices.refusal is not None:
                    self._calls.runtime.logger.warning(
                        "handlers of %s go on after their callers have stopped waiting: %s",
                        subject,
                        notices.refusal,
                    )
                await self._serve(endpoint, messages, notices, task_status)
        except TransportClosed:
            raise SessionClosed("the session has been closed") from None

    async def _serve(
        self,
        endpoint: Endpoint,
        messages: Subscription,
        notices: Subscription,
        task_status: trio.TaskStatus[None],
    ) -> None:
        if self._closed.is_set():
            # The block was left while the subscriptions were being made.
            raise SessionClosed("the service has been closed")
        listening = trio.CancelScope(shield=True)
        receiving = self._endpoints[endpoint] = trio.CancelScope()
        self._nursery.start_soon(_listen, endpoint, notices, listening)
        try:
            with receiving:
                task_status.started()
                await endpoint.receive(messages)
        finally:
            try:
                with trio.CancelScope(shield=True):
                    await endpoint.drain(messages, self._grace_ends())
            finally:
                endpoint.abort()
                listening.cancel()
                del self._endpoints[endpoint]
                if not self._endpoints:
                    self._ended.set()

    def _grace_ends(self) -> float:
        if self._deadline is not None:
            return self._deadline
        return trio.current_time() + self._calls.runtime.config.grace_period

    async def _close(self) -> None:
        # The tasks that serve may be in any nursery: they stop, and this waits until they have.
        self._deadline = self._grace_ends()
        self._closed.set()
        self._ended = trio.Event()
        for receiving in self._endpoints.values():
            receiving.cancel()
        if self._endpoints:
            await self._ended.wait()

    def _abort(self) -> None:
        self._closed.set()
        for endpoint, receiving in self._endpoints.items():
            receiving.cancel()
            endpoint.abort()


async def _listen(endpoint: Endpoint, notices: Subscription, scope: trio.CancelScope) -> None:
    with scope, contextlib.suppress(TransportClosed):
        await endpoint.hear_cancellations(notices)


async def _discover(
    discovery: Discovery,
    transport: Transport,
    scope: trio.CancelScope,
    *,
    task_status: trio.TaskStatus[None],
) -> None:
    with scope:
        await discovery.run(transport, task_status=task_status)


@asynccontextmanager
async def open_service(
    calls: Calls,
    name: str,
    *,
    version: str,
    description: str,
    metadata: Mapping[str, str] | None,
) -> AsyncGenerator[Service, None]:
    """Run a service for the length of a block; see `Session.open_service`."""
    service: Service = object.__new__(Service)
    service._calls = calls
    service._metadata = check_metadata(metadata)
    service._discovery = Discovery(
        check_name("name", name),
        check_version(version),
        check_text("description", description),
        lambda: service._metadata,
        lambda: [endpoint.info() for endpoint in service._endpoints],
        lambda: [endpoint.stats() for endpoint in service._endpoints],
    )
    service._endpoints = {}
    service._closed, service._ended = trio.Event(), trio.Event()
    service._deadline = None
    calls.runtime.check_open()
    # As in a session, what the block raises leaves as itself, and not in a nursery's group.
    failure: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            service._nursery = nursery
            discovering = trio.CancelScope()
            try:
                await _announce(service, nursery, discovering)
                yield service
            except BaseException as error:  # noqa: BLE001 - it is raised again, further down
                failure = error
            try:
                with trio.CancelScope(shield=True):
                    await service._close()
            finally:
                service._abort()
                discovering.cancel()
            if failure is not None and nursery.cancel_scope.cancel_called:
                # It may be the cancellation by which the nursery answers a handler's exception.
                raise failure
    except BaseExceptionGroup as group:
        left = sole(group)
        if left.__context__ is None:
            left.__context__ = failure
        failure = left
    # Outside of the handler, so that the exception does not get the group for its context.
    if failure is not None:
        try:
            raise failure
        finally:
            # Its traceback holds this frame, and this frame would hold it.
            del failure


async def _announce(service: Service, nursery: trio.Nursery, scope: trio.CancelScope) -> None:
    transport = service._calls.runtime.transport
    if transport is not None:
        await nursery.start(_discover, service._discovery, transport, scope)
        # From now on only leaving the block ends it: a service is there until it has drained.
        scope.shield = True
    else:
        await trio.lowlevel.checkpoint()
