"""What comes of flags, variables and contexts."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from backbeat_trio import ConfigError
from backbeat_trio._cli import main as cli
from backbeat_trio._cli.connection import settings


def options(*arguments: str) -> argparse.Namespace:
    return cli._parser().parse_args(["status", *arguments])


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
    both = settings(options("--context", "two"), env | {"NATS_TOKEN": "from-env"})
    assert (both.nats_url, both.token) == ("tls://two:2", "from-env")


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
    with pytest.raises(ConfigError, match="NATS_TIMEOUT='x'"):
        settings(options(), {"NATS_TIMEOUT": "x"})
