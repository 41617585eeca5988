"""The steps of ``backbeat doctor`` from the name of a server to a connection with a login."""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any, Final, NamedTuple
from urllib.parse import quote

import msgspec
import trio

from .._config import BackbeatConfig, Server
from .._errors import AuthenticationFailed, ConfigError, TLSFailed, TransportBroken
from .._transport.nats import NatsTransport
from .._views.shown import clean
from .findings import Finding, Say

_STEP: Final = "connection"
# The most bytes of the first line that a server sends.
_GREETING: Final = 65_536
# The oldest version of the server that this package is tried with.
_OLDEST: Final = (2, 10)
_URL: Final = "--server (CHORUS_BACKBEAT_NATS_URL)"


class Greeting(msgspec.Struct, frozen=True):
    """What a server says of itself when somebody connects."""

    version: str = ""
    tls_required: bool = False
    auth_required: bool = False
    jetstream: bool = False
    cluster: str = ""


class Reached(NamedTuple):
    """A server that has let this user in."""

    config: BackbeatConfig
    """The settings, with this server only."""
    greeting: Greeting


async def reach(config: BackbeatConfig, say: Say) -> Reached | None:
    """Try each server of the settings, step by step; return the first one that lets this user in.

    Args:
      config: the settings.
      say: called with each finding.

    """
    reached = None
    for server in config.servers:
        found = await _try_server(config, server, say)
        reached = reached or found
    return reached


@asynccontextmanager
async def open_connection(config: BackbeatConfig) -> AsyncGenerator[NatsTransport, None]:
    """Connect for the length of a block.

    Raises:
      TransportBroken: if there is no connection after the first attempt.

    """
    transport = NatsTransport(config, name=f"backbeat doctor {config.agent_id}")
    async with trio.open_nursery() as nursery:
        await nursery.start(transport.run)
        await transport.first_attempt()
        yield transport
        nursery.cancel_scope.cancel()


async def _try_server(config: BackbeatConfig, server: Server, say: Say) -> Reached | None:
    addresses = await _resolve(config, server, say)
    if addresses is None:
        return None
    greeting = await _greet(config, server, say)
    if greeting is None:
        return None
    if server.scheme == "tls" and not (greeting.tls_required or config.tls_first):
        text = f"{server.url} does not offer TLS, so nothing secret was sent to it"
        mend = "Give the server a `tls` block, as in examples/nats-server.conf."
        say(Finding(_STEP, "TLS", "failed", text, mend))
        return None
    alone = config.__replace__(nats_url=_url_of(server))
    try:
        async with open_connection(alone) as transport:
            # What it says once TLS has begun cannot have been changed on the way.
            found = await transport.call(_greeting_of)
            _say_tls(config, server, found, addresses, say)
            _say_login(config, server, found, say)
            _say_version(server, found, say)
            return Reached(alone, found)
    except* ConfigError as group:
        # A file of the settings is missing, or does not have what it should.
        say(Finding(_STEP, "settings", "failed", text_of(group), "Correct this setting."))
    except* TLSFailed as group:
        say(Finding(_STEP, "TLS", "failed", text_of(group), _mend_tls(text_of(group))))
    except* AuthenticationFailed as group:
        mend = (
            f"Check the login that was given, {login_of(config, server)}, against the server's "
            "configuration; docs/security.md, 'Logging in', lists the ways."
        )
        say(Finding(_STEP, "login", "failed", text_of(group), mend))
    except* TransportBroken as group:
        mend = "Look at the server's log; if it is slow, try a longer --timeout."
        say(Finding(_STEP, "login", "failed", text_of(group), mend))
    return None


def text_of(group: BaseExceptionGroup[Any]) -> str:
    """Return the text of the first error in a group, as it may be shown."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return clean(str(error), 1000)


def _url_of(server: Server) -> str:
    if server.user is None:
        return server.url
    login = quote(server.user, safe="")
    if server.password is not None:
        login += f":{quote(server.password, safe='')}"
    return server.url.replace("://", f"://{login}@", 1)


async def _resolve(config: BackbeatConfig, server: Server, say: Say) -> list[str] | None:
    try:
        with trio.fail_after(config.connect_timeout):
            found = await trio.socket.getaddrinfo(
                server.host, server.port, type=trio.socket.SOCK_STREAM
            )
    except (OSError, trio.TooSlowError, UnicodeError) as error:
        why = _why(error, config)
        text = f"the name {clean(server.host)} has no address: {why}"
        mend = f"Correct the host in {_URL}, or add it to DNS or /etc/hosts."
        say(Finding(_STEP, "resolves", "failed", text, mend))
        return None
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    say(Finding(_STEP, "resolves", "ok", f"{clean(server.host)} is {', '.join(addresses)}"))
    return addresses


def _why(error: BaseException, config: BackbeatConfig) -> str:
    if isinstance(error, trio.TooSlowError):
        return f"nothing within {config.connect_timeout:g} s"
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(getattr(error, "strerror", None) or error)


async def _greet(config: BackbeatConfig, server: Server, say: Say) -> Greeting | None:
    # `trio.open_tcp_stream` tries all addresses, as one that is not reached may be followed by one
    # that is.
    try:
        begun = trio.current_time()
        with trio.fail_after(config.connect_timeout):
            stream = await trio.open_tcp_stream(server.host, server.port)
    except (OSError, trio.TooSlowError) as error:
        text = f"no connection to {server.url}: {_why(error, config)}"
        mend = f"Start nats-server there, or correct the port in {_URL} or the firewall."
        say(Finding(_STEP, "TCP", "failed", text, mend))
        return None
    async with stream:
        milliseconds = 1000 * (trio.current_time() - begun)
        say(Finding(_STEP, "TCP", "ok", f"{server.url} accepts within {milliseconds:.3g} ms"))
        if config.tls_first:
            return Greeting()
        line = b""
        with trio.move_on_after(config.connect_timeout):
            try:
                while b"\n" not in line and len(line) < _GREETING:
                    data = await stream.receive_some(_GREETING)
                    if not data:
                        break
                    line += data
            except trio.BrokenResourceError:
                pass
    try:
        if not line.startswith(b"INFO "):
            raise msgspec.DecodeError("no INFO")
        return msgspec.json.decode(line.partition(b"\n")[0][5:], type=Greeting)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        text = f"{server.url} does not greet as a NATS server does"
        mend = (
            "Give --tlsfirst if the server begins with TLS (`handshake_first`); otherwise correct "
            f"the port in {_URL}."
        )
        say(Finding(_STEP, "greeting", "failed", text, mend))
        return None


async def _greeting_of(client: Any) -> Greeting:
    return msgspec.convert(getattr(client, "_server_info", {}), Greeting)


def _has_login(config: BackbeatConfig, server: Server) -> bool:
    given = (server.user, config.user, config.token, config.creds, config.nkey)
    return any(value is not None for value in given)


def login_of(config: BackbeatConfig, server: Server) -> str:
    """Return which kind of login is given to a server, without the login itself."""
    if config.creds is not None:
        return "a credentials file"
    if config.nkey is not None:
        return "an nkey"
    if server.password is not None or (server.user is None and config.password is not None):
        return "a user and a password"
    if server.user is not None or config.token is not None:
        return "a token"
    return "none"


def _say_tls(
    config: BackbeatConfig, server: Server, greeting: Greeting, addresses: list[str], say: Say
) -> None:
    if greeting.tls_required or config.tls_first:
        text = f"{server.url} is encrypted, and its certificate is trusted"
        if server.scheme == "tls":
            say(Finding(_STEP, "TLS", "ok", text))
            return
        text += "; with nats:// somebody on the way could have TLS left out"
        say(Finding(_STEP, "TLS", "warning", text, f"Write tls:// in {_URL}."))
    elif all(_is_loopback(address) for address in addresses):
        say(Finding(_STEP, "TLS", "ok", f"{server.url} has none, and is on this machine"))
    else:
        sent = "the login is sent in the clear" if _has_login(config, server) else "none is used"
        text = f"{server.url} does not ask for TLS: {sent}"
        mend = "Give the server a `tls` block, and write tls:// in its URL; see docs/security.md."
        say(Finding(_STEP, "TLS", "warning", text, mend))


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False


def _mend_tls(text: str) -> str:
    if "does not offer" in text:
        return "Give the server a `tls` block, as in examples/nats-server.conf."
    if re.search(r"hostname|IP address|doesn't match", text, re.IGNORECASE):
        return "Use a name that the certificate has, or issue one for this name."
    if "expired" in text:
        return "Issue another certificate for the server, and check the clock of this machine."
    return (
        "Name the authority of the server's certificate by --tlsca, and give --tlscert and "
        "--tlskey if the server asks for a certificate."
    )


def _say_login(config: BackbeatConfig, server: Server, greeting: Greeting, say: Say) -> None:
    kind = login_of(config, server)
    if greeting.auth_required:
        say(Finding(_STEP, "login", "ok", f"{server.url} accepts {kind}"))
        return
    text = f"{server.url} lets everybody in, so everybody can move all deadlines"
    mend = "Give each role a user, as in examples/nats-server.conf."
    say(Finding(_STEP, "login", "warning", text, mend))


def _say_version(server: Server, greeting: Greeting, say: Say) -> None:
    version = clean(greeting.version, 50)
    numbers = re.match(r"(\d{1,9})\.(\d{1,9})", greeting.version)
    known = (int(numbers[1]), int(numbers[2])) if numbers else (math.inf, math.inf)
    text = f"{server.url} is nats-server {version or 'of an unknown version'}"
    if known >= _OLDEST:
        say(Finding(_STEP, "version", "ok", text))
        return
    oldest = ".".join(map(str, _OLDEST))
    say(Finding(_STEP, "version", "warning", text, f"Upgrade it to {oldest} or later."))
