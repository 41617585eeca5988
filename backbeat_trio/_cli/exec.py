"""``backbeat exec``: a command under a budget of beats, as ``timeout`` has it in seconds."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import signal
import sys
from collections.abc import Sequence
from typing import Final

import trio

from .._errors import BackbeatError
from .._runtime.operations import Phase
from .._session.lifecycle import session
from .._session.session import Session
from .connection import settings

_TIMED_OUT: Final = 124
_FAILED: Final = 125
_NOT_RUNNABLE: Final = 126
_NOT_FOUND: Final = 127
SIGNALLED: Final = 128


async def exec_command(options: argparse.Namespace) -> int:
    """Run a command, and return the exit status that `timeout` would have."""
    argv = options.argv[1:] if options.argv[:1] == ["--"] else options.argv
    if not argv:
        print("backbeat exec: there is no command", file=sys.stderr)
        return _FAILED
    try:
        config = settings(options)
        async with session(config) as bb:
            if config.enabled and options.beats and not bb.statistics().locks:
                print(
                    "backbeat exec: no metronome: budgets are counted on a local grid, "
                    f"{60 / bb.tempo_bpm:.6g} s a beat",
                    file=sys.stderr,
                    flush=True,
                )
            return await _run_command(bb, options, argv)
    except BackbeatError as error:
        print(f"backbeat exec: {error}", file=sys.stderr)
        return _FAILED


async def _run_command(bb: Session, options: argparse.Namespace, argv: Sequence[str]) -> int:
    beats = options.beats or math.inf
    with trio.open_signal_receiver(
        signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT
    ) as signals:
        try:
            # A group of its own, so that the signal reaches what the command has started, too.
            process = await trio.lowlevel.open_process(
                argv, process_group=None if options.foreground else 0
            )
        except FileNotFoundError:
            print(f"backbeat exec: no such command: {argv[0]}", file=sys.stderr)
            return _NOT_FOUND
        except OSError as error:
            print(f"backbeat exec: {argv[0]}: {error.strerror}", file=sys.stderr)
            return _NOT_RUNNABLE

        def send(number: int) -> None:
            with contextlib.suppress(ProcessLookupError):
                if options.foreground:
                    process.send_signal(number)
                else:
                    os.killpg(process.pid, number)

        async def forward() -> None:
            async for number in signals:
                send(number)

        try:
            estimate = max(1, math.ceil(options.beats)) if options.beats else None
            operation = bb.start_operation("exec", id=options.id, beats=estimate, data=list(argv))
            operation.advance(Phase.EXECUTING)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(forward)
                with bb.move_on_after(beats):
                    await process.wait()
                timed_out = process.returncode is None
                killed = False
                if timed_out:
                    send(options.signal)
                    send(signal.SIGCONT)
                    after = math.inf if options.kill_after is None else options.kill_after
                    with bb.move_on_after(after):
                        await process.wait()
                    if process.returncode is None:
                        killed = True
                        send(signal.SIGKILL)
                        await process.wait()
                nursery.cancel_scope.cancel()
        finally:
            if process.returncode is None:
                send(signal.SIGKILL)
                with trio.CancelScope(shield=True):
                    await process.wait()
        code = await process.wait()
        status: int = SIGNALLED - code if code < 0 else code
        if timed_out:
            operation.fail(f"the budget of {options.beats:g} beats ran out")
        elif code:
            operation.fail(f"exit status {status}")
        else:
            operation.complete()
        if not timed_out or options.preserve_status:
            return status
        return SIGNALLED + signal.SIGKILL if killed else _TIMED_OUT
