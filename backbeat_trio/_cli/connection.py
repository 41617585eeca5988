"""The connection: its options and variables, NATS contexts, and the settings that come of them."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Collection, Coroutine, Mapping
from functools import wraps
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias, final

import click
import msgspec
from click.shell_completion import CompletionItem

from .._config import PREFIX, BackbeatConfig
from .._errors import ConfigError
from .parameters import duration, name as cluster_name

Command: TypeAlias = Callable[..., Coroutine[Any, Any, int]]

# Field of the settings: option, variable of the NATS command line, key of its contexts, help.
CONNECTION: Final = {
    "nats_url": ("--server", "NATS_URL", "url", "URLs of the servers, separated by commas."),
    "user": ("--user", "NATS_USER", "user", "User name; a token if there is no password."),
    "password": ("--password", "NATS_PASSWORD", "password", "Password."),
    "token": ("--token", "NATS_TOKEN", "token", "Token."),
    "creds": ("--creds", "NATS_CREDS", "creds", "Credentials file."),
    "nkey": ("--nkey", "NATS_NKEY", "nkey", "File with an nkey seed."),
    "tls_cert": ("--tlscert", "NATS_CERT", "cert", "File with the client's certificate."),
    "tls_key": ("--tlskey", "NATS_KEY", "key", "File with the key of that certificate."),
    "tls_ca": ("--tlsca", "NATS_CA", "ca", "File with the certificates to trust."),
    "inbox_prefix": ("--inbox-prefix", "NATS_INBOX_PREFIX", "inbox_prefix", "Prefix of inboxes."),
}
_METAVARS: Final = {"nats_url": "URL", "user": "NAME", "inbox_prefix": "PREFIX"}
_FILES: Final = ("creds", "nkey", "tls_cert", "tls_key", "tls_ca")
_LOGIN: Final = ("user", "password", "token", "creds", "nkey")
_FIELDS: Final = (*CONNECTION, "tls_first")
_OTHERS: Final = ("cluster_id", "context", "timeout")
_LEVELS: Final = (logging.WARNING, logging.INFO, logging.DEBUG)


class Connection(NamedTuple):
    """What the options of a command say of the connection."""

    command: str
    """The name of the command."""
    given: dict[str, Any]
    """Fields of the settings, and the values that options gave them."""
    context: str | None
    """The NATS context that was named."""
    timeout: float | None
    """How many seconds to wait for a server or a metronome."""


@final
class SettingOption(click.Option):
    """An option that has a variable beside it, which the settings read."""

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        """Return None: which variables count depends on the server, see `settings`."""
        return None


class ConnectedCommand(click.Command):
    """A command whose help lists the options of the connection by themselves."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options in two lists."""
        groups: dict[str, list[tuple[str, str]]] = {"Options": [], "Connection": []}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None and isinstance(param, click.Option):
                connects = param.name in _FIELDS or param.name in _OTHERS
                groups["Connection" if connects else "Options"].append(record)
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records)


def _complete_context(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    names = sorted(path.stem for path in (_contexts(os.environ) / "context").glob("*.json"))
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def _set_up_logging(ctx: click.Context, param: click.Parameter, value: int) -> None:
    if not ctx.resilient_parsing:
        verbosity = value + (ctx.info_name == "pulse")
        logging.basicConfig(
            level=_LEVELS[min(verbosity, len(_LEVELS) - 1)],
            stream=sys.stderr,
            format="%(asctime)s %(levelname)s %(message)s",
        )


def _setting(*names: str, variable: str, **attributes: Any) -> Callable[[Command], Command]:
    return click.option(*names, cls=SettingOption, envvar=variable, show_envvar=True, **attributes)


def _options(short: bool) -> list[Callable[[Command], Command]]:
    options = [
        _setting(
            *(["-s"] if short and field == "nats_url" else []),
            *(flag, field),
            variable=variable,
            metavar="FILE" if field in _FILES else _METAVARS.get(field, "TEXT"),
            type=click.Path() if field in _FILES else str,
            help=text,
        )
        for field, (flag, variable, _, text) in CONNECTION.items()
    ]
    return [
        *options,
        click.option(
            *("--tlsfirst", "tls_first"),
            is_flag=True,
            default=None,
            help="Begin TLS before the server has sent anything.",
        ),
        _setting(
            "--context",
            variable="NATS_CONTEXT",
            metavar="NAME",
            help="A context of the NATS command line.",
            shell_complete=_complete_context,
        ),
        _setting(
            "--timeout",
            variable="NATS_TIMEOUT",
            type=duration,
            metavar="5s",
            help="How long to wait for a server or a metronome.",
        ),
        _setting(
            "--cluster-id",
            variable=f"{PREFIX}CLUSTER_ID",
            type=cluster_name,
            metavar="NAME",
            help="The cluster; by default chorus-production.",
        ),
        click.option(
            *("-v", "--verbose"),
            count=True,
            expose_value=False,
            callback=_set_up_logging,
            help="Log more on stderr; -vv logs everything.",
        ),
    ]


def takes_connection(*, short: bool = True) -> Callable[[Command], Command]:
    """Make a decorator that gives a command the options of the connection, and ``--verbose``.

    The function gets a `Connection` as its first argument, and its own options after it.

    Args:
      short: whether ``-s`` is the server.
    """

    def decorate(function: Command) -> Command:
        @wraps(function)
        def call(**params: Any) -> Coroutine[Any, Any, int]:
            command = click.get_current_context().info_name or ""
            return function(take_connection(command, params), **params)

        decorated: Command = call
        for option in reversed(_options(short)):
            decorated = option(decorated)
        return decorated

    return decorate


def take_connection(command: str, params: dict[str, Any]) -> Connection:
    """Take the options of the connection out of the parameters of a command."""
    context, timeout = params.pop("context"), params.pop("timeout")
    fields = {field: params.pop(field) for field in (*_FIELDS, "cluster_id")}
    given = {field: value for field, value in fields.items() if value is not None}
    return Connection(command, given, context, timeout)


def _contexts(env: Mapping[str, str]) -> Path:
    home = env.get("XDG_CONFIG_HOME") or os.path.join(env.get("HOME", "~"), ".config")
    return Path(home).expanduser() / "nats"


def load_context(name: str | None, env: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings of a NATS context.

    Args:
      name: the context; None is the one that the variables name or that is selected. If there is
        none of these, there are no settings.
      env: the variables.

    Raises:
      ConfigError: if the context is missing, cannot be read, or names no server.
    """
    folder = _contexts(env)
    name = name or env.get("NATS_CONTEXT")
    if not name:
        try:
            name = (folder / "context.txt").read_text().strip()
        except OSError:
            return {}
    if not name:
        return {}
    if name != os.path.basename(name):
        raise ConfigError(f"context={name!r}: must be a name, without a folder")
    path = folder / "context" / f"{name}.json"
    try:
        context = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except OSError:
        raise ConfigError(f"context={name!r}: there is no {path}") from None
    except msgspec.DecodeError as error:
        raise ConfigError(f"context={name!r}: {path} cannot be read: {error}") from None
    settings = {field: context.get(key) or None for field, (_, _, key, _) in CONNECTION.items()}
    settings["tls_first"] = context.get("tls_first") or None
    if settings["nats_url"] is None:
        raise ConfigError(f"context={name!r}: {path} has no url")
    return {field: value for field, value in settings.items() if value is not None}


def settings(connection: Connection, env: Mapping[str, str] | None = None) -> BackbeatConfig:
    """Return the settings: options before ``CHORUS_BACKBEAT_*``, ``NATS_*`` and the context.

    Logins go only to servers that they were given with. A context, named or selected, is taken
    whole: beside it only options count, and an option for the server is refused beside one for the
    context. Variables that name another server than the one in use do not count for the login;
    ``CHORUS_BACKBEAT_*`` and ``NATS_*`` are looked at separately.

    Args:
      connection: what the options say.
      env: the variables; None means those of the process.

    Raises:
      ConfigError: if a setting cannot work.
    """
    env = dict(os.environ if env is None else env)
    flags, named = connection.given, connection.context
    if named and "nats_url" in flags:
        raise ConfigError("--context and --server cannot both name the server: give one of them")
    ours = {field: f"{PREFIX}{field.upper()}" for field in _FIELDS}
    theirs = {field: variable for field, (_, variable, _, _) in CONNECTION.items()}
    url = flags.get("nats_url") or env.get(ours["nats_url"]) or env.get(theirs["nats_url"])
    context = {} if url and not named else load_context(named, env)
    for variables in (ours, theirs):
        server = env.get(variables["nats_url"])
        if context:
            unused: Collection[str] = variables
        else:
            unused = _LOGIN if server and server != url else ()
        for field in unused:
            env.pop(variables[field], None)
    found = context | {
        field: env[variable]
        for field, variable in theirs.items()
        if env.get(variable) and not env.get(ours[field])
    }
    found |= flags
    # The NATS command line takes a lone user for a token.
    if "user" in found and not ("password" in found or env.get(ours["password"])):
        found["token"] = found.pop("user")
    seconds = connection.timeout
    if seconds is None and env.get("NATS_TIMEOUT"):
        try:
            seconds = duration(env["NATS_TIMEOUT"])
        except click.BadParameter as error:
            raise ConfigError(f"NATS_TIMEOUT={env['NATS_TIMEOUT']!r}: {error.message}") from None
    if seconds is not None:
        found |= {"connect_timeout": seconds, "lock_timeout": seconds}
    if connection.command != "exec":
        found |= {"health_beats": 0, "answer_recalls": False}
    if connection.command not in ("exec", "pulse"):
        found["serve_info"] = False
    # A name of its own for each run: several may look at one cluster from one host.
    if not env.get(f"{PREFIX}AGENT_ID"):
        found["agent_id"] = f"backbeat-{connection.command}-{os.getpid()}-{os.urandom(3).hex()}"
    return BackbeatConfig.from_env(env, **found)
