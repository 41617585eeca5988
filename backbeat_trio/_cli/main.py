"""The program: its commands, what it does with a mistake, and how a command is run."""

from __future__ import annotations

import errno
import io
import os
import shutil
import signal
import sys
from collections.abc import Coroutine, Sequence
from importlib import import_module
from typing import Any, Final, final

import click
from click.exceptions import Exit
from click.shell_completion import CompletionItem, shell_complete

from .._version import __version__

_PROGRAM: Final = "backbeat"
_COMPLETE: Final = "_BACKBEAT_COMPLETE"
_WIDTH: Final = 80
_REFUSED: Final = 2
SIGNALLED: Final = 128
# The errors of writing to a full or a broken disk.
_DISK: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

# Name of a command: its module, the function there, and its line in the list of commands.
_COMMANDS: Final = {
    "demo": ("demo", "show_demo", "Show a small cluster at work."),
    "pulse": ("pulse", "run_pulse", "Run a metronome of a cluster."),
    "status": ("status", "show_status", "Show whether the cluster's beats arrive here."),
    "watch": ("watch", "watch_cluster", "Watch the cluster on a full screen."),
    "ls": ("ls", "list_what", "List agents, operations, metronomes or services."),
    "get": ("get", "get_one", "Show an agent, or one of its operations."),
    "tree": ("get", "show_tree", "Draw an operation with all of its parts."),
    "check": ("check", "check_cluster", "Check the cluster, for monitoring systems."),
    "doctor": ("doctor", "diagnose", "Find out what is wrong, and how to mend it."),
    "claims": ("claims", "show_claims", "Show what agents report, a line each."),
    "tempo": ("tempo", "change_tempo", "Show the tempo of the cluster, or change it."),
    "pause": ("tempo", "pause_grid", "Pause the cluster: every budget waits."),
    "resume": ("tempo", "resume_grid", "End a pause."),
    "cancel": ("cancel", "cancel_operation", "Cancel an operation of an agent."),
    "dashboard": ("dashboard", "run_dashboard", "Show the cluster in a browser."),
    "exec": ("exec", "exec_command", "Run a program with a budget of beats."),
}


@final
class _Commands(click.Group):
    # The modules of the commands import all of the package, and take ten times as long as this
    # one. So the commands in the group are only their names, until one of them is called.
    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        if name in _COMMANDS:
            module, function, _ = _COMMANDS[name]
            command = getattr(import_module(f".{module}", __package__), function)
        return name, command, rest


@click.group(
    cls=_Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    commands=[click.Command(name, short_help=text) for name, (_, _, text) in _COMMANDS.items()],
)
@click.version_option(__version__, message="%(prog)s %(version)s")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """One metronome for a cluster, and time limits that are counted in its beats.

    'backbeat demo' shows all of it at work. 'backbeat help COMMAND' explains a command.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help(), err=True)
        ctx.exit(_REFUSED)


def _complete_command(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    return [CompletionItem(name) for name in cli.commands if name.startswith(incomplete)]


@cli.command("help", short_help="Explain a command.")
@click.argument("command", nargs=-1, shell_complete=_complete_command)
@click.pass_context
def show_help(ctx: click.Context, command: tuple[str, ...]) -> None:
    """Explain a command, as its option --help does; without one, list the commands."""
    parent = ctx.find_root()
    if not command:
        click.echo(parent.get_help())
        return
    name, found, rest = cli.resolve_command(parent, list(command))
    if rest:
        raise click.UsageError(f"Got more than one command: {' '.join(command)}", ctx)
    assert found is not None
    with click.Context(found, info_name=name, parent=parent) as child:
        click.echo(found.get_help(child))


def run(arguments: Sequence[str]) -> int:
    """Run the command line, and return its exit status."""
    instruction = os.environ.get(_COMPLETE)
    if instruction:
        return shell_complete(cli, {}, _PROGRAM, _COMPLETE, instruction)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Ids and notes may have characters that another encoding than UTF-8 lacks.
        sys.stdout.reconfigure(errors="replace")
    try:
        with cli.make_context(
            _PROGRAM,
            list(arguments),
            # Without it click writes lines of 50 characters at least.
            terminal_width=min(shutil.get_terminal_size().columns, _WIDTH),
            color=False if os.environ.get("NO_COLOR") else None,
        ) as ctx:
            command = cli.invoke(ctx)
            # A command returns the coroutine to run; None if only help was shown.
            return 0 if command is None else _run(command, ctx.invoked_subcommand or "")
    except Exit as error:
        return error.exit_code
    except click.ClickException as error:
        _explain(error)
        return error.exit_code
    except OSError as error:
        if error.errno == errno.EPIPE:
            _give_up_output()
            return SIGNALLED + signal.SIGPIPE
        if error.errno not in _DISK:
            raise
        _give_up_output()
        click.echo(f"backbeat: cannot write the output: {error.strerror}", err=True)
        return 1


def _explain(error: click.ClickException) -> None:
    message = f"{_PROGRAM}: {error.format_message()}"
    if isinstance(error, click.UsageError):
        ctx = error.ctx or click.Context(cli, info_name=_PROGRAM)
        # One line, also on a narrow terminal.
        click.echo(" ".join(ctx.get_usage().split()), err=True)
        # What it says of the choices of an argument is a line for each.
        text = " ".join(error.format_message().split()).rstrip(".")
        message = f"{ctx.command_path}: {text}. Try '{ctx.command_path} --help'."
    click.echo(message, err=True)


def _give_up_output() -> None:
    # The interpreter must not try to write the rest when it ends.
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(command: Coroutine[Any, Any, int], name: str) -> int:
    import trio

    from .._errors import BackbeatError
    from .._session.run import run as run_until_terminated

    async def main() -> int:
        return await command

    try:
        # `exec` takes the signals itself, to pass them on. SIGTERM cancels any other command, so
        # that claims are sent, and programs that were started are stopped.
        if name == "exec":
            return trio.run(main)
        # The web server of `dashboard` logs and drops what is raised in the task of a request. If
        # that were Ctrl-C, the program would not end.
        restrict = name == "dashboard"
        return run_until_terminated(main, restrict_keyboard_interrupt_to_checkpoints=restrict)
    except SystemExit:
        return SIGNALLED + signal.SIGTERM
    except BaseException as raised:
        error = _sole(raised)
        if isinstance(error, KeyboardInterrupt):
            return SIGNALLED + signal.SIGINT
        if isinstance(error, (BackbeatError, FileNotFoundError)):
            click.echo(f"backbeat: {error}", err=True)
            return 1
        if isinstance(error, (OSError, click.ClickException)):
            raise error from None
        raise


def _sole(error: BaseException) -> BaseException:
    # Only one task of each nursery here may raise, so a group holds a single exception.
    while isinstance(error, BaseExceptionGroup):
        error = (error.subgroup(KeyboardInterrupt) or error).exceptions[0]
    return error
