"""Running a program so that SIGTERM ends it in order.

Supervisors such as systemd, Docker and Kubernetes end a program by SIGTERM, and by SIGKILL some
seconds later. Python has no handler for SIGTERM: the process ends at once, and its operations are
never reported as failed.
"""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Final, TypeVar, TypeVarTuple

import trio

RetT = TypeVar("RetT")
PosArgs = TypeVarTuple("PosArgs")

# The status that a shell reports for a program that a signal has ended.
_TERMINATED: Final = 128 + signal.SIGTERM
_REASON: Final = "the process received SIGTERM"


def run(
    async_fn: Callable[[*PosArgs], Awaitable[RetT]],
    *args: *PosArgs,
    clock: trio.abc.Clock | None = None,
    instruments: Sequence[trio.abc.Instrument] = (),
    restrict_keyboard_interrupt_to_checkpoints: bool = False,
    strict_exception_groups: bool = True,
) -> RetT:
    """Run an async function as `trio.run` does, and cancel it when the process receives SIGTERM.

    The cancelled program leaves its sessions as it always does: operations in progress fail, with
    the reason "cancelled: the process received SIGTERM", and their terminal claims are sent within
    `BackbeatConfig.grace_period`. Then `run` raises ``SystemExit(143)``, which is the exit status
    that shells and Kubernetes report for a program that SIGTERM has ended.

    The function is cancelled at its next checkpoint, even if SIGTERM came before it began. More
    SIGTERMs change nothing, because supervisors may send it twice: to a process, and to its group.
    SIGKILL ends a clean-up that takes too long, and so does Ctrl-C, which is left to Trio.

    As Trio does for Ctrl-C, `run` handles SIGTERM in the main thread only, and only if nobody else
    does: a handler that is already installed stays, and an ignored SIGTERM stays ignored. In all
    other respects this is `trio.run`.

    Args:
      async_fn: the program.
      *args: passed to it.
      clock: as for `trio.run`; None is the real one.
      instruments: as for `trio.run`.
      restrict_keyboard_interrupt_to_checkpoints: as for `trio.run`.
      strict_exception_groups: as for `trio.run`.

    Returns:
      What ``async_fn`` returns.

    Raises:
      SystemExit: with the code 143, if SIGTERM came, even if ``async_fn`` returned before it was
        cancelled. An exception that ``async_fn`` raises takes precedence.
      RuntimeError: if Trio already runs in this thread.

    """
    scope = trio.CancelScope()
    token: trio.lowlevel.TrioToken | None = None
    terminated = False

    def terminate(*_: object) -> None:
        nonlocal terminated
        terminated = True
        if token is not None:
            # A handler runs between any two lines, also of Trio's own, where only this is safe.
            with suppress(trio.RunFinishedError):
                token.run_sync_soon(scope.cancel, _REASON, idempotent=True)

    async def main() -> RetT:
        nonlocal token
        token = trio.lowlevel.current_trio_token()
        if terminated:
            scope.cancel(_REASON)
        with scope:
            return await async_fn(*args)
        # Nothing else cancels the scope.
        raise SystemExit(_TERMINATED)

    handles = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if handles:
        try:
            signal.signal(signal.SIGTERM, terminate)
        except ValueError:
            # Only the main thread may install handlers.
            handles = False
    try:
        result = trio.run(
            main,
            clock=clock,
            instruments=instruments,
            restrict_keyboard_interrupt_to_checkpoints=restrict_keyboard_interrupt_to_checkpoints,
            strict_exception_groups=strict_exception_groups,
        )
    finally:
        if handles:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if terminated:
        raise SystemExit(_TERMINATED)
    return result
