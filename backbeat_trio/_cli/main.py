"""The command line: its arguments, its connection settings, and one function a command."""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import math
import os
import re
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

import msgspec
import trio

from .._config import MAX_REPLICAS, PREFIX, BackbeatConfig
from .._errors import BackbeatError, ConfigError, TransportBroken
from .._grid.timeline import milli_bpm
from .._metronome.metronome import Metronome, find_leader
from .._runtime.operations import Phase
from .._session.lifecycle import session
from .._session.session import Session
from .._wire import MAX_BEATS_PER_BAR, MAX_INDEX, StatusClaim, bucket_of, encode, is_token

if TYPE_CHECKING:
    from .._transport.jetstream import KeyValueStore
    from .._transport.nats import NatsTransport

_TIMED_OUT: Final = 124
_FAILED: Final = 125
_NOT_RUNNABLE: Final = 126
_NOT_FOUND: Final = 127
_SIGNALLED: Final = 128
_JETSTREAM_RETRY: Final = 1.0
# More than any number has that is taken; Python refuses to read thousands of them.
_DIGITS: Final = 20
# Limits of the stream of terminal claims: field of the settings, name on the server, unit.
_LIMITS: Final = (
    ("claims_max_age", "max_age", " s"),
    ("claims_max_bytes", "max_bytes", ""),
    ("claims_replicas", "num_replicas", ""),
)

# Field of the settings: flag, variable of the NATS command line, key of its contexts, help.
_CONNECTION: Final = {
    "nats_url": ("--server", "NATS_URL", "url", "URL of the servers, separated by commas"),
    "user": ("--user", "NATS_USER", "user", "user name; without a password, a token"),
    "password": ("--password", "NATS_PASSWORD", "password", "password"),
    "token": ("--token", "NATS_TOKEN", "token", "token"),
    "creds": ("--creds", "NATS_CREDS", "creds", "credentials file"),
    "nkey": ("--nkey", "NATS_NKEY", "nkey", "file with an nkey seed"),
    "tls_cert": ("--tlscert", "NATS_CERT", "cert", "file with the client's certificate"),
    "tls_key": ("--tlskey", "NATS_KEY", "key", "file with the key of the client's certificate"),
    "tls_ca": ("--tlsca", "NATS_CA", "ca", "file with the certificates to trust"),
    "inbox_prefix": ("--inbox-prefix", "NATS_INBOX_PREFIX", "inbox_prefix", "prefix of inboxes"),
}


def _duration(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h)?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"not a duration such as 5s or 500ms: {text!r}")
    return float(match[1]) * {"ms": 0.001, "s": 1, "m": 60, "h": 3600}[match[2] or "s"]


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
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"not a number of beats, 0 or more: {text!r}")
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


def _signal(text: str) -> signal.Signals:
    try:
        if text.isdecimal():
            return signal.Signals(int(text))
        return signal.Signals[f"SIG{text.upper().removeprefix('SIG')}"]
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"not a signal: {text!r}") from None


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
    group = connection.add_argument_group("connection (as the NATS command line has them)")
    for field, (flag, variable, _, text) in _CONNECTION.items():
        flags = ("-s", flag) if field == "nats_url" else (flag,)
        group.add_argument(*flags, dest=field, metavar="X", help=f"{text} [{variable}]")
    group.add_argument(
        "--tlsfirst",
        dest="tls_first",
        action="store_true",
        default=None,
        help="begin TLS before the server has said a word",
    )
    group.add_argument("--context", metavar="NAME", help="a NATS context [NATS_CONTEXT]")
    group.add_argument(
        "--timeout",
        type=_duration,
        metavar="5s",
        help="how long to wait for a server or a metronome [NATS_TIMEOUT]",
    )
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

    pulse = command("pulse", _pulse, "run a metronome of a cluster: it leads, or stands by")
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
        _status,
        "show the health of a connection to the cluster",
        "Exits 0 where all is well, and 1 where the session is degraded: without a server or a "
        "metronome, or late itself.",
    )
    status.add_argument("-j", "--json", action="store_true", help="as JSON")
    status.add_argument("--wait", type=_beats, default=0.0, metavar="BEATS", help="listen so long")

    claims = command("claims", _claims, "show the claims of agents as they come, a line each")
    claims.add_argument("agent_id", nargs="?", type=_agent, default="*", metavar="AGENT")
    claims.add_argument("-j", "--json", action="store_true", help="as JSON, one object a line")
    claims.add_argument("--count", type=_whole, metavar="N", help="end after so many")

    tempo = command("tempo", _tempo, "change the tempo of the cluster")
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

    pause = command("pause", _pause, "have the grid stand still, and every budget wait")
    pause.add_argument("--at-beat", type=_index, metavar="N", help="default: a beat soon")
    pause.add_argument("-j", "--json", action="store_true", help="as JSON")

    resume = command("resume", _resume, "have a grid go on that stands still")
    resume.add_argument("-j", "--json", action="store_true", help="as JSON")

    run = command("exec", _exec, "run a command with a budget of beats, as timeout does in seconds")
    run.add_argument("--beats", type=_beats, required=True, metavar="N", help="0 is no limit")
    run.add_argument("--kill-after", type=_beats, metavar="BEATS", help="SIGKILL so much later")
    run.add_argument("--signal", type=_signal, default=signal.SIGTERM, help="in place of SIGTERM")
    run.add_argument("--preserve-status", action="store_true", help="exit as the command did")
    run.add_argument("--foreground", action="store_true", help="leave it the terminal")
    run.add_argument("--id", metavar="ID", help="the operation's id")
    run.add_argument("argv", nargs=argparse.REMAINDER, metavar="-- COMMAND ...")
    return parser


def load_context(name: str | None, env: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings of a NATS context, or of the one selected; nothing where none is.

    Raises:
      ConfigError: where the named one is missing or cannot be read.
    """
    home = env.get("XDG_CONFIG_HOME") or os.path.join(env.get("HOME", "~"), ".config")
    folder = Path(home).expanduser() / "nats"
    name = name or env.get("NATS_CONTEXT")
    if not name:
        try:
            name = (folder / "context.txt").read_text().strip()
        except OSError:
            return {}
    if not name:
        return {}
    if name != os.path.basename(name):
        raise ConfigError(f"context={name!r}: is no name")
    path = folder / "context" / f"{name}.json"
    try:
        context = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except OSError:
        raise ConfigError(f"context={name!r}: there is no {path}") from None
    except msgspec.DecodeError as error:
        raise ConfigError(f"context={name!r}: {path} cannot be read: {error}") from None
    settings = {field: context.get(key) or None for field, (_, _, key, _) in _CONNECTION.items()}
    settings["tls_first"] = context.get("tls_first") or None
    return {field: value for field, value in settings.items() if value is not None}


def settings(options: argparse.Namespace, env: Mapping[str, str] = os.environ) -> BackbeatConfig:
    """Return the settings: flags before ``CHORUS_BACKBEAT_*``, ``NATS_*`` and the context.

    Raises:
      ConfigError: where one cannot work.
    """
    given = {name: getattr(options, name, None) for name in (*_CONNECTION, "tls_first")}
    given["cluster_id"] = options.cluster_id
    flags = {name: value for name, value in given.items() if value is not None}
    own = {
        field for field in BackbeatConfig.__struct_fields__ if env.get(f"{PREFIX}{field.upper()}")
    }
    found: dict[str, Any] = {}
    if options.context or not ("nats_url" in flags or "nats_url" in own or env.get("NATS_URL")):
        found.update(load_context(options.context, env))
    found.update(
        {field: env[name] for field, (_, name, _, _) in _CONNECTION.items() if env.get(name)}
    )
    found = {field: value for field, value in found.items() if field not in own} | flags
    # The NATS command line takes a lone user for a token.
    if "user" in found and not ("password" in found or "password" in own):
        found["token"] = found.pop("user")
    seconds = options.timeout
    if seconds is None and env.get("NATS_TIMEOUT"):
        try:
            seconds = _duration(env["NATS_TIMEOUT"])
        except argparse.ArgumentTypeError as error:
            raise ConfigError(f"NATS_TIMEOUT={env['NATS_TIMEOUT']!r}: {error}") from None
    if seconds is not None:
        found |= {"connect_timeout": seconds, "lock_timeout": seconds}
    if options.command != "exec":
        found["health_beats"] = 0
    # A name of its own for each run: several may look at one cluster from one host.
    if "agent_id" not in own:
        found["agent_id"] = f"backbeat-{options.command}-{os.getpid()}-{os.urandom(3).hex()}"
    return BackbeatConfig.from_env(env, **found)


def _print(line: str) -> None:
    print(line, flush=True)


async def _demo(options: argparse.Namespace) -> int:
    from .demo import agent_main, demo

    if options.agent:
        return await agent_main(*options.agent)
    return await demo(memory=options.memory, beats=options.beats, bpm=options.bpm)


async def _pulse(options: argparse.Namespace) -> int:
    from .._transport.nats import NatsTransport

    config = settings(options)
    if config.memory_name is not None:
        raise ConfigError("a metronome of its own has nobody to lead on memory://")
    leader_id = options.id or config.agent_id
    transport = NatsTransport(config, name=f"backbeat pulse {leader_id}")
    logger = logging.getLogger("backbeat_trio")
    async with trio.open_nursery() as nursery:
        await nursery.start(transport.run)
        try:
            await transport.first_attempt()
        except BackbeatError as error:
            logger.warning("%s; trying on", error)
        store = await _open_store(transport, config, options.replicas, logger)
        if store is not None and config.store_claims:
            # The beats need it for nothing.
            nursery.start_soon(_make_stream, transport, config, logger)
        metronome = Metronome(
            transport,
            cluster_id=config.cluster_id,
            leader_id=leader_id,
            tempo_bpm=config.tempo_bpm if options.bpm is None else options.bpm,
            beats_per_bar=(
                config.beats_per_bar if options.beats_per_bar is None else options.beats_per_bar
            ),
            store=store,
        )
        if store is None:
            leader = await find_leader(transport, config.cluster_id, config.agent_id)
            if leader is not None:
                raise BackbeatError(
                    f"cluster {config.cluster_id} has a metronome already: {leader.leader_id}"
                )
            logger.warning("alone: the server has no JetStream, so nobody takes over from this one")
        await metronome.run()
    return 0


async def _open_store(
    transport: NatsTransport, config: BackbeatConfig, replicas: int | None, logger: logging.Logger
) -> KeyValueStore | None:
    from .._transport.jetstream import KeyValueStore, Refused

    bucket = bucket_of(config.cluster_id)
    store = KeyValueStore(transport, bucket, replicas=replicas)
    told = ""
    while True:
        await transport.wait_connected()
        try:
            if not await store.open():
                # It may be that the server has not found the rest of its cluster yet.
                await trio.sleep(_JETSTREAM_RETRY)
                if not await store.open():
                    return None
        except Refused as error:
            raise BackbeatError(f"the record of the grid cannot be kept: {error}") from error
        except TransportBroken as error:
            if str(error) != told:
                told = str(error)
                logger.warning("the record of the grid cannot be kept yet; trying on: %s", error)
            await trio.sleep(_JETSTREAM_RETRY)
            continue
        if store.short:
            _tell_short(f"KV_{bucket}", store.replicas, logger)
        elif replicas not in (None, store.replicas):
            logger.warning(
                "stream KV_%s exists with num_replicas %s, not %s: it is left as it is",
                *(bucket, store.replicas, replicas),
            )
        return store


async def _make_stream(
    transport: NatsTransport, config: BackbeatConfig, logger: logging.Logger
) -> None:
    from .._transport.jetstream import ClaimStream

    # Agents make it where they may, which is not everywhere.
    stream, told = ClaimStream(transport, config), ""
    while True:
        await transport.wait_connected()
        try:
            found = await stream.open()
        except TransportBroken as error:
            if str(error) != told:
                told = str(error)
                logger.warning("no stream of terminal claims yet; trying on: %s", error)
            await trio.sleep(_JETSTREAM_RETRY)
            continue
        if not found:
            logger.warning("no stream of terminal claims: %s", stream.reason)
        elif stream.limits is not None:
            if stream.short:
                _tell_short(stream.name, stream.limits["claims_replicas"], logger)
            _tell_difference(stream.name, stream.limits, config, logger)
        return


def _tell_short(stream: str, copies: float | None, logger: logging.Logger) -> None:
    logger.warning(
        "stream %s has %s copies, as the cluster has no more servers with JetStream; "
        "once it has: nats stream edit %s --replicas 3",
        *(stream, copies, stream),
    )


def _tell_difference(
    stream: str, limits: Mapping[str, float], config: BackbeatConfig, logger: logging.Logger
) -> None:
    # Of what nobody has set, the defaults are no wish.
    wanted = {
        field: getattr(config, field)
        for field in limits
        if os.environ.get(f"{PREFIX}{field.upper()}")
    }
    differing = ", ".join(
        f"{name} {limits[field]:.12g}{unit}, not {wanted[field]:.12g}{unit}"
        for field, name, unit in _LIMITS
        if field in wanted and wanted[field] != limits[field]
    )
    if differing:
        logger.warning("stream %s exists with %s: it is left as it is", stream, differing)


async def _status(options: argparse.Namespace) -> int:
    async with session(settings(options)) as bb:
        await bb.sleep(options.wait)
        health = bb.health()
    values = msgspec.to_builtins(health)
    if options.json:
        _print(encode(values).decode())
    else:
        from rich.console import Console
        from rich.table import Table

        table = Table(box=None, show_header=False)
        for name, value in values.items():
            table.add_row(name, _shown(name, value))
        Console().print(table)
    return 1 if health.local_degradation else 0


def _shown(name: str, value: Any) -> str:
    if name == "uncertainty" and value is not None:
        return f"{value * 1e3:.3g} ms"
    if name == "current_tempo":
        return f"{value:g} BPM"
    return ", ".join(value) if isinstance(value, tuple) else str(value)


async def _claims(options: argparse.Namespace) -> int:
    if options.count == 0:
        return 0
    async with (
        session(settings(options), require_connection=True) as bb,
        bb.open_claims(options.agent_id) as claims,
    ):
        number = 0
        async for claim in claims:
            _print(encode(claim).decode() if options.json else format_claim(claim))
            number += 1
            if number == options.count:
                break
    return 0


def format_claim(claim: StatusClaim) -> str:
    """Write a claim as a line for people. What agents write is shown without control characters."""
    fields = (claim.agent_id, claim.task_id, claim.notes)
    agent, task, notes = ("".join(c if c.isprintable() else "?" for c in text) for text in fields)
    return (
        f"{claim.beat_index:>8} {agent:<24} {task:<32} {claim.state:<9} "
        f"left={claim.beats_left:<4} {claim.progress:>4.0%} {notes}"
    )


async def _tempo(options: argparse.Namespace) -> int:
    async with session(settings(options), require_connection=True) as bb:
        beat = await bb.set_tempo(options.bpm, at_beat=options.at_beat, over=options.over)
    values = {"tempo_bpm": options.bpm, "effective_beat": beat}
    text = f"{options.bpm:g} BPM from beat {beat}"
    if options.over:
        values["over_beats"] = options.over
        text += f" on, over {options.over} beats"
    _print(encode(values).decode() if options.json else text)
    return 0


async def _pause(options: argparse.Namespace) -> int:
    async with session(settings(options), require_connection=True) as bb:
        beat = await bb.pause(at_beat=options.at_beat)
    paused = {"paused": True, "effective_beat": beat}
    _print(encode(paused).decode() if options.json else f"the grid stands still on beat {beat}")
    return 0


async def _resume(options: argparse.Namespace) -> int:
    async with session(settings(options), require_connection=True) as bb:
        beat = await bb.resume()
    resumed = {"paused": False, "effective_beat": beat}
    _print(encode(resumed).decode() if options.json else f"the grid goes on from beat {beat}")
    return 0


async def _exec(options: argparse.Namespace) -> int:
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
        status: int = _SIGNALLED - code if code < 0 else code
        if timed_out:
            operation.fail(f"the budget of {options.beats:g} beats ran out")
        elif code:
            operation.fail(f"exit status {status}")
        else:
            operation.complete()
        if not timed_out or options.preserve_status:
            return status
        return _SIGNALLED + signal.SIGKILL if killed else _TIMED_OUT


async def _until_terminated(function: Callable[[], Awaitable[int]]) -> int:
    # SIGTERM unwinds as Ctrl-C does, so that claims are flushed and children stopped.
    async def wait_for_signal() -> None:
        with trio.open_signal_receiver(signal.SIGTERM) as signals:
            async for _ in signals:
                nursery.cancel_scope.cancel("SIGTERM")

    status = _SIGNALLED + signal.SIGTERM
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
            return _SIGNALLED + signal.SIGINT
        if isinstance(error, BrokenPipeError):
            # Whoever read this has gone; the interpreter must not try to flush it once more.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return _SIGNALLED + signal.SIGPIPE
        if not isinstance(error, (BackbeatError, FileNotFoundError)):
            raise
        print(f"backbeat: {error}", file=sys.stderr)
        return 1


def _sole(error: BaseException) -> BaseException:
    # The nurseries here each have one task that may raise: what is in a group is all there is.
    while isinstance(error, BaseExceptionGroup):
        error = (error.subgroup(KeyboardInterrupt) or error).exceptions[0]
    return error
