"""The command line: its arguments, and how a command is run."""

from __future__ import annotations

import argparse
import functools
import logging
import math
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, final

import trio

from .._config import MAX_REPLICAS, PREFIX
from .._errors import BackbeatError
from .._grid.timeline import milli_bpm
from .._runtime.operations import check_name
from .._wire import MAX_BEATS_PER_BAR, MAX_INDEX, is_token
from .claims import show_claims
from .connection import add_connection
from .exec import SIGNALLED, exec_command
from .pulse import run_pulse
from .status import show_status
from .tempo import change_tempo, pause_grid, resume_grid

# More than any number has that is taken; Python refuses to read thousands of them.
_DIGITS: Final = 20


def _bpm(text: str) -> float:
    try:
        value = float(text)
        milli_bpm("BPM", value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"not from 0.1 to 6000 beats a minute: {text!r}") from None
    return value


def _beats(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= MAX_INDEX:
        raise argparse.ArgumentTypeError(f"not a number of beats from 0 to {MAX_INDEX}: {text!r}")
    return value


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"not a whole number: {text!r}")
    return int(text)


def _within(least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or len(text) > _DIGITS or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"not a whole number from {least} to {most}: {text!r}")
        return int(text)

    return parse


_index = _within(0, MAX_INDEX)


def _token(text: str) -> str:
    if not is_token(text):
        raise argparse.ArgumentTypeError(f"not 1 to 128 of A-Z a-z 0-9 _ -: {text!r}")
    return text


def _agent(text: str) -> str:
    return text if text == "*" else _token(text)


def _operation_id(text: str) -> str:
    try:
        return check_name("id", text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _signal(text: str) -> int:
    names = signal.Signals.__members__
    try:
        number = int(text) if text.isdecimal() else names[f"SIG{text.upper().removeprefix('SIG')}"]
    except (KeyError, ValueError):
        number = 0
    if number not in signal.valid_signals():
        raise argparse.ArgumentTypeError(f"not a signal: {text!r}")
    return number


@final
class _Parser(argparse.ArgumentParser):
    # What a command does not know would be refused by the whole, with the usage of that.
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return options, unknown


def _parser() -> argparse.ArgumentParser:
    connection = _Parser(add_help=False)
    add_connection(connection)
    group = connection.add_argument_group("cluster")
    group.add_argument(
        "--cluster-id",
        type=_token,
        metavar="C",
        help=f"the cluster (default chorus-production) [{PREFIX}CLUSTER_ID]",
    )
    group.add_argument("-v", "--verbose", action="count", default=0, help="log more")

    parser = argparse.ArgumentParser(
        prog="backbeat",
        description="One metronome for a cluster, and budgets counted in its beats.",
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=_Parser
    )

    def command(
        name: str, function: Callable[..., Awaitable[int]], text: str, epilog: str | None = None
    ) -> Any:
        added = commands.add_parser(
            name, help=text, description=text, epilog=epilog, parents=[connection]
        )
        added.set_defaults(function=function)
        return added

    demo = commands.add_parser("demo", help="see a small cluster at work, and end by itself")
    demo.set_defaults(function=_demo, verbose=0)
    demo.add_argument("--memory", action="store_true", help="in one process, without a server")
    demo.add_argument("--beats", type=_whole, default=32, help="beats to run (default %(default)s)")
    demo.add_argument("--bpm", type=_bpm, default=180.0, help="tempo (default %(default)g)")
    demo.add_argument("--agent", nargs=3, help=argparse.SUPPRESS)

    pulse = command("pulse", run_pulse, "run a metronome of a cluster: it leads, or stands by")
    pulse.add_argument(
        "--bpm",
        type=_bpm,
        metavar="N",
        help=f"tempo of a grid that it begins (default 2) [{PREFIX}TEMPO_BPM]",
    )
    pulse.add_argument(
        "--beats-per-bar",
        type=_within(1, MAX_BEATS_PER_BAR),
        metavar="N",
        help=f"length of a bar (default 8) [{PREFIX}BEATS_PER_BAR]",
    )
    pulse.add_argument(
        "--replicas",
        type=_within(1, MAX_REPLICAS),
        metavar="N",
        help="copies of the record in JetStream, 1 to 5, where it is made (default: 3 in a cluster "
        "of servers, or as many as it has servers; else 1)",
    )
    pulse.add_argument("--id", type=_token, metavar="NAME", help="the frames' leader_id")

    status = command(
        "status",
        show_status,
        "show the health of a connection to the cluster",
        "Exits 0 where all is well, and 1 where the session is degraded: without a server or a "
        "metronome, or late itself.",
    )
    status.add_argument("-j", "--json", action="store_true", help="as JSON")
    status.add_argument("--wait", type=_beats, default=0.0, metavar="BEATS", help="listen so long")

    claims = command("claims", show_claims, "show the claims of agents as they come, a line each")
    claims.add_argument("agent_id", nargs="?", type=_agent, default="*", metavar="AGENT")
    claims.add_argument("-j", "--json", action="store_true", help="as JSON, one object a line")
    claims.add_argument("--count", type=_whole, metavar="N", help="end after so many")

    tempo = command("tempo", change_tempo, "change the tempo of the cluster")
    tempo.add_argument("bpm", type=_bpm, metavar="BPM")
    tempo.add_argument("--at-beat", type=_index, metavar="N", help="default: a downbeat soon")
    tempo.add_argument(
        "--over",
        type=_index,
        default=0,
        metavar="BEATS",
        help="as a ramp over so many beats, in up to 64 steps (default 0: at once)",
    )
    tempo.add_argument("-j", "--json", action="store_true", help="as JSON")

    pause = command("pause", pause_grid, "have the grid stand still, and every budget wait")
    pause.add_argument("--at-beat", type=_index, metavar="N", help="default: a beat soon")
    pause.add_argument("-j", "--json", action="store_true", help="as JSON")

    resume = command("resume", resume_grid, "have a grid go on that stands still")
    resume.add_argument("-j", "--json", action="store_true", help="as JSON")

    run = command(
        "exec", exec_command, "run a command with a budget of beats, as timeout does in seconds"
    )
    run.add_argument("--beats", type=_beats, required=True, metavar="N", help="0 is no limit")
    run.add_argument(
        "--kill-after",
        type=_beats,
        metavar="BEATS",
        help="SIGKILL so much later than the first signal; 0 is never",
    )
    run.add_argument("--signal", type=_signal, default=signal.SIGTERM, help="in place of SIGTERM")
    run.add_argument("--preserve-status", action="store_true", help="exit as the command did")
    run.add_argument("--foreground", action="store_true", help="leave it the terminal")
    run.add_argument("--id", type=_operation_id, metavar="ID", help="the operation's id")
    run.add_argument("argv", nargs=argparse.REMAINDER, metavar="-- COMMAND ...")
    return parser


async def _demo(options: argparse.Namespace) -> int:
    from .demo import show_demo

    return await show_demo(options)


async def _until_terminated(function: Callable[[], Awaitable[int]]) -> int:
    # SIGTERM unwinds as Ctrl-C does, so that claims are flushed and children stopped.
    async def wait_for_signal() -> None:
        with trio.open_signal_receiver(signal.SIGTERM) as signals:
            async for _ in signals:
                nursery.cancel_scope.cancel("SIGTERM")

    status = SIGNALLED + signal.SIGTERM
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait_for_signal)
        status = await function()
        nursery.cancel_scope.cancel()
    return status


def run(arguments: Sequence[str]) -> int:
    """Run the command line, and return its exit status."""
    options = _parser().parse_args(arguments)
    verbosity = options.verbose + (options.command == "pulse")
    logging.basicConfig(
        level=(logging.WARNING, logging.INFO, logging.DEBUG)[min(verbosity, 2)],
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(message)s",
    )
    command: Callable[[], Awaitable[int]] = functools.partial(options.function, options)
    # `exec` takes the signals itself, to pass them on.
    main = command if options.command == "exec" else functools.partial(_until_terminated, command)
    try:
        return trio.run(main)
    except BaseException as raised:
        error = _sole(raised)
        if isinstance(error, KeyboardInterrupt):
            return SIGNALLED + signal.SIGINT
        if isinstance(error, BrokenPipeError):
            # Whoever read this has gone; the interpreter must not try to flush it once more.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return SIGNALLED + signal.SIGPIPE
        if not isinstance(error, (BackbeatError, FileNotFoundError)):
            raise
        print(f"backbeat: {error}", file=sys.stderr)
        return 1


def _sole(error: BaseException) -> BaseException:
    # The nurseries here each have one task that may raise: what is in a group is all there is.
    while isinstance(error, BaseExceptionGroup):
        error = (error.subgroup(KeyboardInterrupt) or error).exceptions[0]
    return error
