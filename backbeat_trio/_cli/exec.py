"""``backbeat exec``: run a command with a budget of beats, as ``timeout`` does with seconds."""

from __future__ import annotations

import errno
import math
import os
import shutil
import signal
from collections.abc import Sequence
from typing import Final, NamedTuple, final

import click
import trio

from .._config import BackbeatConfig
from .._errors import BackbeatError
from .._runtime.operations import Phase
from .._session.lifecycle import session
from .._session.session import Session
from .connection import ConnectedCommand, Connection, settings, takes_connection
from .main import SIGNALLED
from .parameters import beats as number_of_beats, complete_signal, operation_id, signal_number

_TIMED_OUT: Final = 124
_FAILED: Final = 125
_NOT_RUNNABLE: Final = 126
_NOT_FOUND: Final = 127
_PASSED_ON: Final = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT})
# No program can handle these two.
_UNHANDLED: Final = frozenset({signal.SIGKILL, signal.SIGSTOP})
_TERMINAL: Final = (signal.SIGTTIN, signal.SIGTTOU)


class _Limits(NamedTuple):
    """How long the command may run, and how it is ended."""

    beats: float
    """The budget; 0 is no limit."""
    signal: int
    """The signal that it gets when the budget has run out."""
    kill_after: float | None
    """How many beats after the signal it is killed; 0 and None are never."""
    preserve_status: bool
    """Whether the exit status is the command's own, even if the budget ran out."""


@click.command(
    "exec",
    cls=ConnectedCommand,
    # What comes after the command's name is the command's.
    context_settings={"allow_interspersed_args": False},
    options_metavar="--beats N [OPTIONS]",
)
@click.option(
    "--beats", type=number_of_beats, required=True, metavar="N", help="The budget; 0 is no limit."
)
@click.option(
    *("-k", "--kill-after"),
    type=number_of_beats,
    metavar="BEATS",
    help="Send KILL so many beats after the first signal, if it still runs; 0 is never.",
)
@click.option(
    *("-s", "--signal", "number"),
    type=signal_number,
    shell_complete=complete_signal,
    default="TERM",
    metavar="SIGNAL",
    help="The signal to send when the budget has run out; by default TERM.",
)
@click.option("--preserve-status", is_flag=True, help="Exit as the command did, also then.")
@click.option("--foreground", is_flag=True, help="Let the command read from the terminal.")
@click.option(
    *("--id", "operation_id"), type=operation_id, metavar="ID", help="The id of the operation."
)
@click.argument("argv", nargs=-1, type=click.UNPROCESSED, metavar="-- COMMAND [ARGS]...")
@takes_connection(short=False)
async def exec_command(
    connection: Connection,
    beats: float,
    kill_after: float | None,
    number: int,
    preserve_status: bool,
    foreground: bool,
    operation_id: str | None,
    argv: tuple[str, ...],
) -> int:
    """Run a command with a budget of beats, as 'timeout' runs one with a budget of seconds.

    Exits as the command does, and 124 if the budget ran out first.
    """
    if not argv:
        _tell("there is no command to run")
        return _FAILED
    # The kernel keeps no exit status for a program that ignores this signal, and a parent may have
    # started this one so.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    command = _Command(argv, foreground=foreground)
    limits = _Limits(beats, number, kill_after, preserve_status)
    try:
        config = settings(connection)
        # The command does not wait for a metronome: its budget counts on the local grid, and moves
        # to the cluster's when the session locks.
        async with session(config, lock_timeout=0.0) as bb:
            status = await _run(bb, config, command, limits, operation_id)
    except BackbeatError as error:
        _tell(str(error))
        status = _FAILED
    command.kill_shared_group()
    return status


def _tell(text: str) -> None:
    click.echo(f"backbeat exec: {text}", err=True)


@final
class _Command:
    """A command, and the process group that its signals go to.

    A shell at a terminal makes a group for each job, and lets only one of them read from the
    terminal. If this program leads such a group, the command stays in it, as it does under
    `timeout`. Otherwise the command gets a group of its own.
    """

    def __init__(self, argv: Sequence[str], *, foreground: bool) -> None:
        self._argv = argv
        self._new_group = not foreground and os.getpgrp() != os.getpid()
        self._group = None if foreground or self._new_group else os.getpgrp()
        self._kill_shared_group = False
        self._process: trio.Process | None = None
        self.may_be_signalled = True
        """False once a signal was refused, because the command runs as another user."""

    async def start(self) -> None:
        """Start it. A checkpoint.

        Raises:
          OSError: if it cannot be started. It has a `filename` if that is because of the command.

        """
        if not self._argv[0]:
            # An empty name would find the directories of the path.
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self._argv[0])
        # A program inherits what its parent ignores, but not what its parent handles.
        for number in _TERMINAL:
            signal.signal(number, lambda *_: None)
        try:
            try:
                self._process = await self._open(self._argv)
            except OSError as error:
                if error.errno != errno.ENOEXEC:
                    raise
                # By POSIX, the shell runs a script that does not name its interpreter.
                path = shutil.which(self._argv[0]) or self._argv[0]
                self._process = await self._open(["/bin/sh", path, *self._argv[1:]])
        finally:
            # The terminal may stop the command, but not the program that counts its budget.
            for number in _TERMINAL:
                signal.signal(number, signal.SIG_IGN)
        if self._new_group:
            self._group = self._process.pid

    async def _open(self, argv: Sequence[str]) -> trio.Process:
        group = 0 if self._new_group else None
        return await trio.lowlevel.open_process(argv, process_group=group, close_fds=False)

    @property
    def returncode(self) -> int | None:
        """How it has ended, as in `subprocess.Popen.returncode`; None while it runs."""
        return None if self._process is None else self._process.returncode

    async def wait(self) -> int:
        """Wait until it has ended, and return its `returncode`. A checkpoint."""
        assert self._process is not None
        return await self._process.wait()

    def send(self, number: int) -> None:
        """Send a signal to the command and its group, and continue processes that were stopped.

        It prints an error if this user may not signal the command. Not a checkpoint.
        """
        if self._process is None or self._process.returncode is not None:
            return
        self._signal(self._process.pid, number)
        if number not in _UNHANDLED and number != signal.SIGCONT:
            self._signal(self._process.pid, signal.SIGCONT)

    def _signal(self, pid: int, number: int) -> None:
        group = self._group
        spared = group == os.getpgrp() and number in _UNHANDLED
        if spared:
            # It would end this program, too, which has a claim to send first.
            group = None
        try:
            alone = group is None or os.getpgid(pid) != group
            # Signalling a group succeeds if one of its members may be signalled. So signal 0 shows
            # whether the command may be.
            os.kill(pid, number if alone else 0)
            if group is not None:
                _signal_group(group, number)
            self._kill_shared_group = spared and number == signal.SIGKILL
        except ProcessLookupError:
            pass
        except PermissionError as error:
            if self.may_be_signalled:
                _tell(
                    f"cannot signal {self._argv[0]} (process {pid}), so waits for it to end: "
                    f"{error.strerror}"
                )
            self.may_be_signalled = False

    def kill_shared_group(self) -> None:
        """Kill the group of this program, if the command was killed in it."""
        if self._kill_shared_group:
            os.killpg(0, signal.SIGKILL)


def _signal_group(group: int, number: int) -> None:
    if group != os.getpgrp():
        os.killpg(group, number)
        return
    # This program would take the signal for one that it is to pass on.
    handler = signal.signal(number, signal.SIG_IGN)
    try:
        os.killpg(group, number)
    finally:
        signal.signal(number, signal.SIG_DFL if handler is None else handler)


async def _run(
    bb: Session,
    config: BackbeatConfig,
    command: _Command,
    limits: _Limits,
    operation_id: str | None,
) -> int:
    with trio.open_signal_receiver(*_PASSED_ON | {limits.signal} - _UNHANDLED) as signals:
        try:
            await command.start()
        except FileNotFoundError as error:
            _tell(f"no such command: {error.filename}")
            return _NOT_FOUND
        except OSError as error:
            _tell(": ".join(filter(None, (error.filename, error.strerror))))
            return _FAILED if error.filename is None else _NOT_RUNNABLE

        beats = limits.beats or math.inf
        number, kill_after = limits.signal, limits.kill_after
        timed_out = told = kill_early = False

        async def pass_on() -> None:
            nonlocal kill_early
            async for received in signals:
                command.send(received)
                if kill_after:
                    kill_early = True
                    scope.cancel()

        def tell_whose_beats() -> None:
            nonlocal told
            if config.enabled and limits.beats and not told and not bb.statistics().locks:
                told = True
                _tell(
                    "no metronome: budgets are counted on a local grid, "
                    f"{60 / bb.tempo_bpm:.6g} s a beat"
                )

        async def wait_for_lock() -> None:
            await trio.sleep(config.lock_timeout)
            tell_whose_beats()

        try:
            estimate = max(1, math.ceil(limits.beats)) if limits.beats else None
            operation = bb.start_operation("exec", id=operation_id, beats=estimate)
            operation.advance(Phase.EXECUTING)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pass_on)
                nursery.start_soon(wait_for_lock)
                while True:
                    with bb.move_on_after(beats) as scope:
                        await command.wait()
                    if command.returncode is not None:
                        break
                    if not kill_early:
                        timed_out = True
                        tell_whose_beats()
                        command.send(number)
                    kill_early = False
                    beats, number, kill_after = kill_after or math.inf, signal.SIGKILL, None
                nursery.cancel_scope.cancel()
        finally:
            if command.returncode is None:
                command.send(signal.SIGKILL)
                with trio.CancelScope(shield=True):
                    await command.wait()
        code = await command.wait()
    status = SIGNALLED - code if code < 0 else code
    if timed_out and not command.may_be_signalled:
        operation.fail(f"the budget of {limits.beats:g} beats ran out, and nobody could end it")
        return _FAILED
    if timed_out:
        operation.fail(f"the budget of {limits.beats:g} beats ran out")
    elif code:
        operation.fail(f"exit status {status}")
    else:
        operation.complete()
    if timed_out and not limits.preserve_status and code != -signal.SIGKILL:
        return _TIMED_OUT
    return status
