"""The settings of a session: their checks, and how they are read from the environment."""

from __future__ import annotations

import difflib
import logging
import os
import re
import secrets
import socket
import sys
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, ClassVar, Final, Self, TypedDict, Unpack
from urllib.parse import SplitResult, unquote, urlsplit

import msgspec

from ._errors import ConfigError, Logger
from ._grid.timeline import milli_bpm
from ._wire import MAX_BEATS_PER_BAR, MAX_TOKEN, is_token

PREFIX: Final = "CHORUS_BACKBEAT_"

_TRUE: Final = frozenset({"1", "t", "true", "y", "yes", "on"})
_FALSE: Final = frozenset({"0", "f", "false", "n", "no", "off"})
MAX_REPLICAS: Final = 5
_INTEGERS: Final = (int, int | None)
_SECRET: Final = frozenset({"password", "token"})
_AGENT_PREFIX: Final = "chorus-"


class Server(msgspec.Struct, frozen=True):
    """One server of a URL: its address, and the user and the password if the URL has them."""

    scheme: str
    host: str
    port: int
    user: str | None
    password: str | None

    @property
    def url(self) -> str:
        """The address, without user and password."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"

    def __repr__(self) -> str:
        return f"Server({self.url!r})"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [("url", self.url)]


def _default_node_id() -> str:
    host = re.sub(r"[^A-Za-z0-9_-]", "-", socket.gethostname())[:48] or "node"
    return f"{host}-{secrets.token_hex(4)}"


class ConfigFields(TypedDict, total=False):
    """The fields of `BackbeatConfig` as keyword arguments, for type checkers."""

    enabled: bool
    cluster_id: str
    agent_id: str
    node_id: str
    nats_url: str
    tempo_bpm: float
    beats_per_bar: int
    lock_timeout: float
    connect_timeout: float
    grace_period: float
    require_connection: bool
    health_beats: int
    answer_recalls: bool
    serve_info: bool
    store_claims: bool
    claims_stream: str
    claims_max_age: float
    claims_max_bytes: int
    claims_replicas: int | None
    user: str | None
    password: str | None
    token: str | None
    creds: str | None
    nkey: str | None
    tls_ca: str | None
    tls_cert: str | None
    tls_key: str | None
    tls_first: bool
    inbox_prefix: str


class BackbeatConfig(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """The settings of a session. They cannot be changed.

    Each field has a variable of the environment, ``CHORUS_BACKBEAT_`` and its name in upper case,
    which `from_env` reads. ``repr`` does not show secrets.

    Attributes:
      enabled: whether the session does anything. With False all methods work, but no claims are
        published, and no budget cancels its block.
      cluster_id: the name of the cluster, 1 to 128 of ``A-Z a-z 0-9 _ -``. Agents and metronomes of
        the same name count the same beats.
      agent_id: the name of this agent, 1 to 128 of ``A-Z a-z 0-9 _ -``. No other live process may
        have it. By default it is ``chorus-`` and the node's id.
      node_id: the name of the machine or process, as claims show it to people; any printable text.
        By default it is the host's name and a random part. Unless ``agent_id`` is given, it must be
        1 to 121 of ``A-Z a-z 0-9 _ -``.
      nats_url: the servers: ``nats://`` or ``tls://`` with host and port, or several of these,
        separated by commas. One without a scheme has the scheme of the one before it.
        ``memory://<name>`` is a bus inside of this process, which needs no server.
      tempo_bpm: the tempo of the local grid, and of the grid of a ``memory://`` bus, in beats per
        minute, 0.1 to 6,000.
      beats_per_bar: the length of a bar of these grids, in beats, 1 to 1,000,000.
      lock_timeout: how long entering the session waits for a metronome, in seconds, 0 or more.
      connect_timeout: how long an attempt to connect to one server may take, in seconds, 0 or more.
      grace_period: how long leaving the session waits until the terminal claims have reached the
        server, and leaving a service until its handlers have finished, in seconds, 0 or more.
      require_connection: whether entering the session fails if the first attempt to connect does.
        Otherwise the session starts without a connection, and goes on trying.
      health_beats: how many beats apart the claims of the agent's health are, 0 to 1,000,000. 0
        publishes none, as is right for a program that only observes.
      answer_recalls: whether the session tells a new metronome what it knows of the grid, if the
        metronome finds no leader. False is right for a program that only observes.
      serve_info: whether the session answers what service tools ask, such as ``nats service ls``.
        They show it as an instance of ``backbeat-agent``.
      store_claims: whether terminal claims are stored in a stream of JetStream, if the server has
        JetStream.
      claims_stream: the name of that stream, 1 to 128 of ``A-Z a-z 0-9 _ -``. The first session
        that needs the stream creates it, with the limits below.
      claims_max_age: how long the stream keeps a claim, in seconds; 0 is without limit.
      claims_max_bytes: how many bytes the stream may hold before its oldest claims are deleted, 1
        or more; -1 is without limit.
      claims_replicas: on how many servers the stream is kept, 1 to 5. None is three in a cluster of
        servers, or two if it has no third one, and one without a cluster.
      user: the user's name, for a server that asks for one; it needs ``password``.
      password: the user's password.
      token: the token, for a server that asks for one.
      creds: the path of a credentials file, which holds a JWT and an nkey seed. It needs the extra
        ``nkeys``.
      nkey: the path of a file that holds an nkey seed. It needs the extra ``nkeys``.
      tls_ca: the path of the certificates of the authorities to trust, in PEM format. None trusts
        those of the system.
      tls_cert: the path of this client's certificate, in PEM format, for a server that asks for
        one.
      tls_key: the path of that certificate's private key. None if the key is in ``tls_cert``.
      tls_first: whether TLS begins before the server's first message. The server must be configured
        for it, by ``handshake_first``.
      inbox_prefix: the beginning of the subjects on which answers arrive. Change it if the server's
        permissions allow only certain ones.

    Raises:
      ConfigError: if a setting is not valid. The text names the field, or the variable, and its
        value unless that is a secret.

    """

    enabled: bool = True
    cluster_id: str = "chorus-production"
    agent_id: str = ""
    node_id: str = msgspec.field(default_factory=_default_node_id)
    nats_url: str = "nats://backbeat-nats:4222"
    tempo_bpm: float = 2.0
    beats_per_bar: int = 8
    lock_timeout: float = 2.0
    connect_timeout: float = 2.0
    grace_period: float = 2.0
    require_connection: bool = False
    health_beats: int = 8
    answer_recalls: bool = True
    serve_info: bool = True
    store_claims: bool = True
    claims_stream: str = "BACKBEAT_STATUS"
    claims_max_age: float = 604_800.0
    claims_max_bytes: int = 1_073_741_824
    claims_replicas: int | None = None
    user: str | None = None
    password: str | None = None
    token: str | None = None
    creds: str | None = None
    nkey: str | None = None
    tls_ca: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_first: bool = False
    inbox_prefix: str = "_INBOX"

    # Whether `agent_id` is the default. It is not a field, so comparisons ignore it.
    _follows_node: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for field in msgspec.structs.fields(self):
            _check_type(field, getattr(self, field.name))
        if not self.agent_id:
            msgspec.structs.force_setattr(self, "agent_id", f"{_AGENT_PREFIX}{self.node_id}")
            msgspec.structs.force_setattr(self, "_follows_node", True)
            if not is_token(self.agent_id):
                most = MAX_TOKEN - len(_AGENT_PREFIX)
                text = f"must be 1 to {most} of A-Z a-z 0-9 _ - if there is no `agent_id`"
                raise _refused("node_id", self.node_id, text)
        for name in ("cluster_id", "agent_id"):
            if not is_token(getattr(self, name)):
                raise _refused(name, getattr(self, name), "must be 1 to 128 of A-Z a-z 0-9 _ -")
        if not self.node_id or not self.node_id.isprintable():
            raise _refused("node_id", self.node_id, "must be printable and not empty")
        try:
            milli_bpm("tempo_bpm", self.tempo_bpm)
        except ValueError:
            raise _refused("tempo_bpm", self.tempo_bpm, "must be from 0.1 to 6000") from None
        for name, least in (("beats_per_bar", 1), ("health_beats", 0)):
            if not least <= getattr(self, name) <= MAX_BEATS_PER_BAR:
                text = f"must be from {least} to {MAX_BEATS_PER_BAR}"
                raise _refused(name, getattr(self, name), text)
        replicas = self.claims_replicas
        if replicas is not None and not 1 <= replicas <= MAX_REPLICAS:
            raise _refused("claims_replicas", replicas, f"must be from 1 to {MAX_REPLICAS}")
        if self.claims_max_bytes < 1 and self.claims_max_bytes != -1:
            raise _refused("claims_max_bytes", self.claims_max_bytes, "must be 1 or more, or -1")
        if not is_token(self.claims_stream):
            text = f"must be 1 to {MAX_TOKEN} of A-Z a-z 0-9 _ -"
            raise _refused("claims_stream", self.claims_stream, text)
        for name in ("lock_timeout", "connect_timeout", "grace_period", "claims_max_age"):
            # NaN fails every comparison. An int may be too large for a float.
            if not 0 <= getattr(self, name) <= sys.float_info.max:
                raise _refused(name, getattr(self, name), "must be 0 or more seconds, and finite")
        if not all(map(is_token, self.inbox_prefix.split("."))):
            text = "must be names of A-Z a-z 0-9 _ -, separated by dots"
            raise _refused("inbox_prefix", self.inbox_prefix, text)
        if (self.password is None) is not (self.user is None):
            raise _refused("user", self.user, "and `password` go together")
        if self.tls_key is not None and self.tls_cert is None:
            raise _refused("tls_key", self.tls_key, "needs `tls_cert`")
        if self.memory_name is None:
            self.servers  # noqa: B018 - for its checks

    @classmethod
    def from_env(
        cls,
        env: Mapping[str, str] | None = None,
        *,
        logger: Logger | None = None,
        **overrides: Unpack[ConfigFields],
    ) -> BackbeatConfig:
        """Read the settings from variables named ``CHORUS_BACKBEAT_<FIELD>``.

        An empty variable counts as absent. A variable that has the prefix but does not name a field
        is ignored, and logged at WARNING with the nearest name.

        Args:
          env: the variables; None means those of the process.
          logger: where to log; by default ``logging.getLogger("backbeat_trio")``.
          **overrides: fields that take precedence over the variables.

        Returns:
          The settings.

        Raises:
          ConfigError: if a setting is not valid. The text names the variable and its value, unless
            that is a secret.
          TypeError: if an override is not a field.

        """
        check_fields("BackbeatConfig.from_env", overrides)
        env = os.environ if env is None else env
        fields = {field.encode_name: field for field in msgspec.structs.fields(cls)}
        values: dict[str, Any] = {}
        for variable, text in env.items():
            if not variable.startswith(PREFIX) or not text:
                continue
            name = variable.removeprefix(PREFIX).lower()
            if name not in fields:
                _warn_of_variable(variable, logger or logging.getLogger("backbeat_trio"))
            if name in overrides or name not in fields:
                continue
            try:
                values[name] = _parse(fields[name].type, text)
            except ValueError as error:
                raise _refused(name, text, str(error), variable) from None
        try:
            return cls(**values, **overrides)
        except ConfigError as error:
            if error.field in values:
                error.args = (f"{PREFIX}{error.field.upper()}={error.problem}",)
            raise

    def __replace__(self, **changes: Unpack[ConfigFields]) -> BackbeatConfig:
        """Return a copy of these settings with some fields changed.

        If ``agent_id`` is the default, which contains the node's id, it changes with ``node_id``.
        On Python 3.13 and later `copy.replace` calls this.

        Args:
          **changes: fields, and their new values.

        Raises:
          ConfigError: if a value is not valid.
          TypeError: if a change is not of a field.

        """
        check_fields("BackbeatConfig.__replace__", changes)
        if self._follows_node:
            changes.setdefault("agent_id", "")
        return msgspec.structs.replace(self, **changes)

    def __copy__(self) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy in another process must know, too, that its `agent_id` follows the node's id.
        fields = msgspec.structs.asdict(self)
        if self._follows_node:
            fields["agent_id"] = ""
        return partial(type(self), **fields), ()

    @property
    def memory_name(self) -> str | None:
        """The name of the bus inside of this process; None if `nats_url` is of NATS."""
        url = self.nats_url.strip()
        if not url.startswith("memory:"):
            return None
        name = url.removeprefix("memory://")
        if not is_token(name):
            raise _refused("nats_url", url, "must be memory://<name>, the name of A-Z a-z 0-9 _ -")
        return name

    @property
    def servers(self) -> tuple[Server, ...]:
        """The servers that `nats_url` names, in their order."""
        servers: list[Server] = []
        for part in self.nats_url.split(","):
            # A server that follows a tls:// one is meant to be secured, too.
            scheme = servers[-1].scheme if servers else "nats"
            servers.append(_server(part.strip(), scheme, self.nats_url))
        return tuple(servers)

    def _shown(self) -> dict[str, object]:
        return {name: _redacted(name, getattr(self, name)) for name in self.__struct_fields__}

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in self._shown().items())
        return f"BackbeatConfig({shown})"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        # Without this method rich would show all fields, including the secrets.
        return list(self._shown().items())


def check_fields(function: str, names: Iterable[str]) -> None:
    """Raise unless all names are fields of `BackbeatConfig`.

    Args:
      function: the function that was called with them, for the text of the error.
      names: its keyword arguments.

    Raises:
      TypeError: if a name is not one of a field. The text has the nearest name.

    """
    for name in names:
        if name not in BackbeatConfig.__struct_fields__:
            near = _nearest_field(name)
            hint = f"; did you mean {near!r}?" if near else ""
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}{hint}")


def _nearest_field(name: str) -> str | None:
    return next(iter(difflib.get_close_matches(name, BackbeatConfig.__struct_fields__, 1)), None)


def _warn_of_variable(variable: str, logger: Logger) -> None:
    # The value is not logged, because the variable may be a misspelt password.
    near = _nearest_field(variable.removeprefix(PREFIX).lower())
    hint = f"did you mean {PREFIX}{near.upper()}?" if near else "no setting has a similar name"
    logger.warning("the variable %s is ignored, because it names no setting: %s", variable, hint)


def redact_url(url: str) -> str:
    """Return a URL, or several separated by commas, with user and password hidden."""
    # A comma may belong to a password. It surely separates URLs only if a scheme follows.
    parts = re.split(r",\s*(?=\w+://)", url)
    return ",".join(re.sub(r"(^|://)(?:(?!://).)*@", r"\1***@", part) for part in parts)


def _redacted(name: str, value: object) -> object:
    if name in _SECRET and value is not None:
        return "***"
    if name == "nats_url":
        return redact_url(value) if isinstance(value, str) else "***"
    return value


def _refused(field: str, value: object, why: str, variable: str | None = None) -> ConfigError:
    # A user without a password may be a token.
    shown = "***" if field == "user" and value is not None else _redacted(field, value)
    problem = f"{shown!r}: {why}"
    error = ConfigError(f"{variable or field}={problem}")
    error.field, error.problem = field, problem
    return error


def _check_type(field: msgspec.structs.FieldInfo, value: object) -> None:
    name = field.encode_name
    kind = field.type
    if kind is float:
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
    elif kind in _INTEGERS:
        good = isinstance(value, kind) and not isinstance(value, bool)
    else:
        good = isinstance(value, kind)
    if not good:
        expected = getattr(kind, "__name__", kind)
        raise _refused(name, value, f"must be {expected}")


def _parse(kind: Any, text: str) -> object:
    if kind is bool:
        word = text.strip().lower()
        if word in _TRUE:
            return True
        if word in _FALSE:
            return False
        raise ValueError("must be true or false")
    if kind is float or kind in _INTEGERS:
        try:
            return float(text) if kind is float else int(text)
        except ValueError:
            raise ValueError(
                "must be a number" if kind is float else "must be an integer"
            ) from None
    return text


def _server(url: str, scheme: str, whole: str) -> Server:
    if "://" not in url:
        url = f"{scheme}://{url}"
    try:
        parts: SplitResult = urlsplit(url)
        port = parts.port or 4222
    except ValueError:
        raise _refused("nats_url", whole, "is not a URL") from None
    if parts.scheme not in ("nats", "tls"):
        raise _refused("nats_url", whole, "the scheme must be nats://, tls:// or memory://")
    if not parts.hostname or parts.path not in ("", "/") or parts.query or parts.fragment:
        text = f"must be {parts.scheme}://[user:password@]host[:port]"
        raise _refused("nats_url", whole, text)
    return Server(
        parts.scheme,
        parts.hostname,
        port,
        None if parts.username is None else unquote(parts.username),
        None if parts.password is None else unquote(parts.password),
    )
