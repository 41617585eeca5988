"""The tasks that a session runs beside its body, each shielded until it is released."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from typing import Any, final

import trio


@final
class ServiceTask(trio.TaskStatus[None]):
    """One service: the scope that shields it, and whether it has started and ended."""

    def __init__(self) -> None:
        self.scope = trio.CancelScope(shield=True)
        self.has_started = trio.Event()
        self.has_ended = trio.Event()
        self.is_ready = False

    def started(self, value: None = None) -> None:
        """Report that the service has started."""
        self.is_ready = True
        self.has_started.set()


@final
class ServiceGroup:
    """The services of a session, each known by the function that it runs.

    Ctrl-C is never raised inside one of them: Trio raises it in the main task instead.
    """

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self.crashed: set[object] = set()
        """The services that have raised an exception."""
        self._running: dict[object, ServiceTask] = {}

    @trio.lowlevel.enable_ki_protection
    async def start(self, async_fn: Callable[..., Awaitable[None]], *args: Any) -> None:
        """Start a service, and wait until it says that it has started. A checkpoint.

        Raises:
          RuntimeError: if it returns before it has said so.

        """
        # This does not use `trio.Nursery.start`. If that is cancelled, it waits until the task has
        # ended, and a shielded task would not end.
        service = ServiceTask()
        self._nursery.start_soon(self._run, service, async_fn, args, name=async_fn)
        self._running[async_fn] = service
        await service.has_started.wait()
        if not service.is_ready and not self.crashed:
            raise RuntimeError(f"{async_fn!r} returned before it called `task_status.started()`")

    @trio.lowlevel.enable_ki_protection
    async def _run(
        self,
        service: ServiceTask,
        async_fn: Callable[..., Awaitable[None]],
        args: tuple[Any, ...],
    ) -> None:
        crash: BaseException | None = None
        try:
            with service.scope:
                # A service that is released before its first step never begins.
                if not service.scope.cancel_called:
                    await async_fn(*args, task_status=service)
        except BaseException as error:  # noqa: BLE001 - it is raised again, further down
            self.crashed.add(async_fn)
            crash = sole(error)
        finally:
            service.has_started.set()
            service.has_ended.set()
        # Outside of the handler, so that the group does not become the exception's context.
        if crash is not None:
            try:
                raise crash
            finally:
                del crash

    def cancel(self, *names: object) -> list[trio.Event]:
        """Cancel the named services, or all; return the events that are set when they end."""
        chosen = [self._running[name] for name in names or self._running if name in self._running]
        for service in chosen:
            service.scope.cancel()
        return [service.has_ended for service in chosen]

    async def release(self, *names: object, keep: Collection[object] = ()) -> None:
        """Cancel the named services, or all except some, and wait until they have ended."""
        chosen = names or [name for name in self._running if name not in keep]
        with trio.CancelScope(shield=True):
            for ended in self.cancel(*chosen) if chosen else ():
                await ended.wait()


def sole(error: BaseException) -> BaseException:
    """Return the exception in an exception group, if it holds only one."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
