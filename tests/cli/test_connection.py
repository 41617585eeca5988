"""What comes of flags, variables and contexts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import trio
from helpers import backbeat

from backbeat_trio import BackbeatConfig, ConfigError
from backbeat_trio._cli.connection import Connection, settings, take_connection

from .programs import parsed


def options(*arguments: str) -> Connection:
    return take_connection("status", parsed("status", *arguments).params)


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    folder = tmp_path / "nats" / "context"
    folder.mkdir(parents=True)
    contexts: dict[str, dict[str, Any]] = {
        "one": {"url": "nats://one:1", "user": "u", "password": "p", "ca": "", "tls_first": True},
        "two": {"url": "tls://two:2", "token": "t", "inbox_prefix": "_IN"},
    }
    for name, context in contexts.items():
        (folder / f"{name}.json").write_text(json.dumps(context))
    (folder / "broken.json").write_text("{")
    return {"XDG_CONFIG_HOME": str(tmp_path)}


def test_a_context_is_named_by_flag_variable_or_selection(home: dict[str, str]) -> None:
    assert settings(options(), home).nats_url == "nats://backbeat-nats:4222"
    one = settings(options("--context", "one"), home)
    assert (one.nats_url, one.user, one.password) == ("nats://one:1", "u", "p")
    assert one.tls_first
    two = settings(options(), home | {"NATS_CONTEXT": "two"})
    assert (two.nats_url, two.token, two.inbox_prefix) == ("tls://two:2", "t", "_IN")
    Path(home["XDG_CONFIG_HOME"], "nats", "context.txt").write_text("one\n")
    assert settings(options(), home).nats_url == "nats://one:1"
    Path(home["XDG_CONFIG_HOME"], "nats", "context.txt").write_text("")
    assert settings(options(), home).nats_url == "nats://backbeat-nats:4222"


def test_what_comes_before_what(home: dict[str, str]) -> None:
    env = home | {"NATS_CONTEXT": "one"}
    assert settings(options(), env | {"NATS_URL": "nats://env"}).nats_url == "nats://env"
    own = env | {"NATS_URL": "nats://env", "CHORUS_BACKBEAT_NATS_URL": "nats://own"}
    assert settings(options(), own).nats_url == "nats://own"
    assert settings(options("-s", "nats://flag"), own).nats_url == "nats://flag"
    both = settings(options("--context", "two"), env | {"NATS_CONTEXT": "one"})
    assert both.nats_url == "tls://two:2"
    flags = settings(options("--context", "two", "--token", "flag", "--tlsfirst"), env)
    assert (flags.nats_url, flags.token, flags.tls_first) == ("tls://two:2", "flag", True)


def login(config: BackbeatConfig) -> tuple[str, dict[str, str]]:
    """Return where a login goes, and what is in it."""
    names = ("user", "password", "token", "creds", "nkey")
    found = {name: getattr(config, name) for name in names}
    return config.nats_url, {name: value for name, value in found.items() if value is not None}


@pytest.mark.parametrize("prefix", ["NATS_", "CHORUS_BACKBEAT_"])
@pytest.mark.parametrize("how", ["flag", "variable", "selection"])
def test_a_context_is_taken_whole(prefix: str, how: str, home: dict[str, str]) -> None:
    url = "NATS_URL" if prefix == "NATS_" else "CHORUS_BACKBEAT_NATS_URL"
    variables = {
        f"{prefix}{name}": value
        for name, value in (
            *(("USER", "mine"), ("PASSWORD", "mine"), ("TOKEN", "mine"), ("CREDS", "mine")),
            *(("NKEY", "mine"), ("INBOX_PREFIX", "mine"), ("TLS_CA", "mine"), ("CA", "mine")),
        )
    }
    env, flags = home | variables, []
    if how == "flag":
        env[url] = "nats://mine"
        flags = ["--context", "one"]
    elif how == "variable":
        env["NATS_CONTEXT"] = "one"
    else:
        Path(home["XDG_CONFIG_HOME"], "nats", "context.txt").write_text("one\n")
    config = settings(options(*flags), env)
    assert login(config) == ("nats://one:1", {"user": "u", "password": "p"})
    assert "mine" not in repr(config)
    assert config.tls_first


def test_a_context_and_a_server_are_refused_together(home: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="--context and --server"):
        settings(options("--context", "one", "-s", "nats://flag"), home)
    # One that was only selected is not looked at.
    config = settings(options("-s", "nats://flag"), home | {"NATS_CONTEXT": "one"})
    assert login(config) == ("nats://flag", {})
    config = settings(options(), home | {"NATS_CONTEXT": "one", "NATS_URL": "nats://env"})
    assert login(config) == ("nats://env", {})


def test_a_context_without_a_server_is_refused(home: dict[str, str]) -> None:
    path = Path(home["XDG_CONFIG_HOME"], "nats", "context", "nowhere.json")
    path.write_text(json.dumps({"user": "u", "password": "p"}))
    with pytest.raises(ConfigError, match="^context='nowhere': .* has no url"):
        settings(options("--context", "nowhere"), home | {"NATS_URL": "nats://env"})


PAIR = {"user": "u", "password": "p"}
NKEY = {"nkey": "k"}


@pytest.mark.parametrize(
    ("flags", "variables", "expected"),
    [
        # The variables name another server, so what they say of the login is for that one.
        (["-s", "nats://b"], {"NATS_URL": "nats://a", "NATS_TOKEN": "t"}, {}),
        (["-s", "nats://b"], {"URL": "nats://a", "USER": "u", "PASSWORD": "p"}, {}),
        ([], {"URL": "nats://b", "NATS_URL": "nats://a", "NATS_CREDS": "c"}, {}),
        (["-s", "nats://b", "--token", "f"], {"URL": "nats://a", "TOKEN": "t"}, {"token": "f"}),
        (["-s", "nats://b", "--user", "f"], {"URL": "nats://a", "PASSWORD": "p"}, {"token": "f"}),
        ([], {"URL": "nats://b", "NKEY": "k", "NATS_URL": "nats://a", "NATS_NKEY": "x"}, NKEY),
        # They name the same one, or none.
        (["-s", "nats://b"], {"URL": "nats://b", "USER": "u", "PASSWORD": "p"}, PAIR),
        (["-s", "nats://b"], {"NATS_USER": "u", "NATS_PASSWORD": "p"}, PAIR),
        (["-s", "nats://b", "--user", "f"], {"NATS_PASSWORD": "p"}, {"user": "f", "password": "p"}),
        ([], {"URL": "nats://b", "NATS_TOKEN": "t"}, {"token": "t"}),
        ([], {"NATS_URL": "nats://b", "TOKEN": "t"}, {"token": "t"}),
    ],
)  # fmt: skip
def test_logins_go_only_to_servers_that_they_were_given_with(
    flags: list[str], variables: dict[str, str], expected: dict[str, str], home: dict[str, str]
) -> None:
    ours = {"URL": "CHORUS_BACKBEAT_NATS_URL"}
    env = {
        name if name.startswith("NATS_") else ours.get(name, f"CHORUS_BACKBEAT_{name}"): value
        for name, value in variables.items()
    }
    assert login(settings(options(*flags), home | env)) == ("nats://b", expected)


async def test_the_password_of_a_context_reaches_no_other_server(home: dict[str, str]) -> None:
    heard = b""

    async def other(stream: trio.SocketStream) -> None:
        nonlocal heard
        await stream.send_all(b'INFO {"server_id":"x","auth_required":true,"max_payload":1024}\r\n')
        async for data in stream:
            heard += data

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, other, 0)
        port = listeners[0].socket.getsockname()[1]
        env = home | {"CHORUS_BACKBEAT_NATS_URL": f"nats://127.0.0.1:{port}"}
        await backbeat("status", "--context", "one", "--timeout", "200ms", env=env)
        assert not heard
        await backbeat("status", "--timeout", "1s", env=env)
        assert b"CONNECT" in heard
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("name", ["none", "broken", "../one"])
def test_contexts_that_cannot_be_read(name: str, home: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="^context="):
        settings(options("--context", name), home)


def test_flags_and_variables_of_the_nats_command_line() -> None:
    config = settings(options("--user", "lonely"), {})
    assert (config.user, config.token) == (None, "lonely")
    env = {"NATS_USER": "u", "NATS_PASSWORD": "p", "NATS_CA": "/ca", "NATS_TIMEOUT": "3s"}
    config = settings(options("--tlsfirst"), env)
    assert (config.user, config.password, config.tls_ca) == ("u", "p", "/ca")
    assert (config.connect_timeout, config.lock_timeout) == (3.0, 3.0)
    assert config.agent_id.startswith("backbeat-status-")
    assert settings(options(), {"CHORUS_BACKBEAT_AGENT_ID": "me"}).agent_id == "me"
    for text in ("x", "0s", "0", "0.0ms"):
        with pytest.raises(ConfigError, match=f"NATS_TIMEOUT='{text}'"):
            settings(options(), {"NATS_TIMEOUT": text})


async def test_a_user_that_may_be_a_token_is_not_shown() -> None:
    for env in ({"CHORUS_BACKBEAT_USER": "t0ken"}, {"NATS_USER": "t0ken", "NATS_URL": "http://x"}):
        done = await backbeat("status", env=env)
        assert done.returncode == 1
        assert done.stderr.startswith(b"backbeat: ")
        assert b"t0ken" not in done.stdout + done.stderr
