"""The connection: its flags and variables, NATS contexts, and the settings that come of them."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from .._config import PREFIX, BackbeatConfig
from .._errors import ConfigError

# Field of the settings: flag, variable of the NATS command line, key of its contexts, help.
CONNECTION: Final = {
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
_LOGIN: Final = ("user", "password", "token", "creds", "nkey")
_FIELDS: Final = (*CONNECTION, "tls_first")


def duration(text: str) -> float:
    """Return the seconds that a flag or a variable says, more than 0."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h)?", text, re.ASCII)
    seconds = 0.0
    if match is not None:
        seconds = float(match[1]) * {"ms": 0.001, "s": 1, "m": 60, "h": 3600}[match[2] or "s"]
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"not a duration such as 5s or 500ms: {text!r}")
    return seconds


def add_connection(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say where the servers are, and how to log in."""
    group = parser.add_argument_group("connection (as the NATS command line has them)")
    for field, (flag, variable, _, text) in CONNECTION.items():
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
        type=duration,
        metavar="5s",
        help="how long to wait for a server or a metronome [NATS_TIMEOUT]",
    )


def load_context(name: str | None, env: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings of a NATS context, or of the one selected; nothing where none is.

    Raises:
      ConfigError: where the named one is missing, cannot be read, or names no server.
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
    settings = {field: context.get(key) or None for field, (_, _, key, _) in CONNECTION.items()}
    settings["tls_first"] = context.get("tls_first") or None
    if settings["nats_url"] is None:
        raise ConfigError(f"context={name!r}: {path} has no url")
    return {field: value for field, value in settings.items() if value is not None}


def settings(options: argparse.Namespace, env: Mapping[str, str] | None = None) -> BackbeatConfig:
    """Return the settings: flags before ``CHORUS_BACKBEAT_*``, ``NATS_*`` and the context.

    Logins go only to servers that they were given with. A context, named or selected, is taken
    whole: of the rest only flags count beside it, and a flag for the server is refused beside one
    for the context. Variables that name another server than the one in use do not count for the
    login; ``CHORUS_BACKBEAT_*`` and ``NATS_*`` are looked at separately.

    Args:
      options: the parsed arguments.
      env: the variables; None means those of the process.

    Raises:
      ConfigError: where one cannot work.
    """
    env = dict(os.environ if env is None else env)
    given = {name: getattr(options, name, None) for name in _FIELDS}
    given["cluster_id"] = options.cluster_id
    flags = {name: value for name, value in given.items() if value is not None}
    if options.context and "nats_url" in flags:
        raise ConfigError("--context and --server cannot both name the server: give one of them")
    ours = {field: f"{PREFIX}{field.upper()}" for field in _FIELDS}
    theirs = {field: variable for field, (_, variable, _, _) in CONNECTION.items()}
    url = flags.get("nats_url") or env.get(ours["nats_url"]) or env.get(theirs["nats_url"])
    context = {} if url and not options.context else load_context(options.context, env)
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
    seconds = options.timeout
    if seconds is None and env.get("NATS_TIMEOUT"):
        try:
            seconds = duration(env["NATS_TIMEOUT"])
        except argparse.ArgumentTypeError as error:
            raise ConfigError(f"NATS_TIMEOUT={env['NATS_TIMEOUT']!r}: {error}") from None
    if seconds is not None:
        found |= {"connect_timeout": seconds, "lock_timeout": seconds}
    if options.command != "exec":
        found |= {"health_beats": 0, "answer_recalls": False}
    # A name of its own for each run: several may look at one cluster from one host.
    if not env.get(f"{PREFIX}AGENT_ID"):
        found["agent_id"] = f"backbeat-{options.command}-{os.getpid()}-{os.urandom(3).hex()}"
    return BackbeatConfig.from_env(env, **found)
