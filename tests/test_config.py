"""Settings: what is taken, what is refused, and that no secret is shown."""

from __future__ import annotations

import copy
import math
import pickle
import socket
import subprocess
import sys
from typing import Any

import pytest

from backbeat_trio import BackbeatConfig, ConfigError, session
from backbeat_trio._config import redact_url
from backbeat_trio.testing import open_recorder


def test_defaults() -> None:
    config = BackbeatConfig.from_env({})
    assert config.enabled
    assert config.cluster_id == "chorus-production"
    assert config.agent_id == f"chorus-{config.node_id}"
    assert config.nats_url == "nats://backbeat-nats:4222"
    assert config.tempo_bpm == 2.0
    assert config.beats_per_bar == 8
    assert config.claims_replicas is None
    assert BackbeatConfig.from_env({}).node_id != config.node_id


def test_variables() -> None:
    config = BackbeatConfig.from_env(
        {
            "CHORUS_BACKBEAT_ENABLED": "off",
            "CHORUS_BACKBEAT_CLUSTER_ID": "dev",
            "CHORUS_BACKBEAT_AGENT_ID": "agent-42",
            "CHORUS_BACKBEAT_NATS_URL": "tls://a:1, nats://b,c:3",
            "CHORUS_BACKBEAT_TEMPO_BPM": "120.5",
            "CHORUS_BACKBEAT_BEATS_PER_BAR": "4",
            "CHORUS_BACKBEAT_CLAIMS_REPLICAS": "5",
            "CHORUS_BACKBEAT_NODE_ID": "",
            "CHORUS_BACKBEAT_SOMETHING_ELSE": "of another program",
            "ELSE": "x",
        }
    )
    assert not config.enabled
    assert (config.cluster_id, config.agent_id) == ("dev", "agent-42")
    assert (config.tempo_bpm, config.beats_per_bar) == (120.5, 4)
    assert config.claims_replicas == 5
    assert [server.url for server in config.servers] == ["tls://a:1", "nats://b:4222", "nats://c:3"]


def test_servers_without_a_scheme_have_that_of_the_one_before() -> None:
    config = BackbeatConfig(nats_url="a,tls://b:1,c,nats://d, e")
    assert [server.url for server in config.servers] == [
        *("nats://a:4222", "tls://b:1", "tls://c:4222", "nats://d:4222", "nats://e:4222")
    ]


def test_overrides_come_first_and_are_not_read_from_the_environment() -> None:
    env = {"CHORUS_BACKBEAT_ENABLED": "perhaps", "CHORUS_BACKBEAT_NODE_ID": "n"}
    config = BackbeatConfig.from_env(env, enabled=True)
    assert config.enabled
    assert config.agent_id == "chorus-n"


@pytest.mark.parametrize("text", ["1", "t", "TRUE", "yes", "On"])
def test_true(text: str) -> None:
    assert BackbeatConfig.from_env({"CHORUS_BACKBEAT_ENABLED": text}).enabled


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("ENABLED", "maybe"),
        ("ENABLED", "2"),
        ("CLUSTER_ID", "a.b"),
        ("CLUSTER_ID", "a b"),
        ("CLUSTER_ID", ">"),
        ("CLUSTER_ID", "x" * 129),
        ("AGENT_ID", "*"),
        ("NODE_ID", "12D3\n"),
        ("NATS_URL", "http://localhost"),
        ("NATS_URL", "nats://"),
        ("NATS_URL", "nats://host:99999"),
        ("NATS_URL", "nats://host/path"),
        ("NATS_URL", "memory://"),
        ("NATS_URL", "memory://a/b"),
        ("NATS_URL", "memory:x"),
        ("TEMPO_BPM", "nan"),
        ("TEMPO_BPM", "0"),
        ("TEMPO_BPM", "6001"),
        ("TEMPO_BPM", "fast"),
        ("BEATS_PER_BAR", "0"),
        ("BEATS_PER_BAR", "4.5"),
        ("BEATS_PER_BAR", "1000001"),
        ("CLAIMS_REPLICAS", "0"),
        ("CLAIMS_REPLICAS", "many"),
        ("HEALTH_BEATS", "-1"),
        ("LOCK_TIMEOUT", "-1"),
        ("LOCK_TIMEOUT", "inf"),
        ("GRACE_PERIOD", "nan"),
        ("INBOX_PREFIX", "a..b"),
        ("TLS_KEY", "key.pem"),
        ("USER", "somebody"),
    ],
)
def test_refused_variables_are_named_with_their_value(variable: str, text: str) -> None:
    name = f"CHORUS_BACKBEAT_{variable}"
    with pytest.raises(ConfigError) as caught:
        BackbeatConfig.from_env({name: text})
    assert isinstance(caught.value, ValueError)
    if variable == "NODE_ID":
        assert "node_id" in str(caught.value).lower()
    else:
        assert str(caught.value).startswith(f"{name}=")
    shown = "'***'" if variable == "USER" else repr(text)[1:-1]
    assert shown in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("enabled", "true"),
        ("enabled", None),
        ("cluster_id", 5),
        ("tempo_bpm", "120"),
        ("tempo_bpm", True),
        ("tempo_bpm", math.nan),
        ("grace_period", 10**400),
        ("beats_per_bar", 4.0),
        ("beats_per_bar", True),
        ("claims_replicas", True),
        ("claims_replicas", 2.0),
        ("password", 5),
        ("user", 5),
        ("nats_url", 5),
        ("node_id", ""),
    ],
)
def test_refused_fields_are_named(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{field}="):
        BackbeatConfig(**{field: value})


def test_misspelt_fields_are_refused() -> None:
    with pytest.raises(TypeError, match="clusterid"):
        BackbeatConfig(clusterid="x")  # type: ignore[call-arg]


def test_a_node_whose_name_is_no_token_needs_an_agent_id() -> None:
    with pytest.raises(ConfigError, match="node_id='12D3 KooW'"):
        BackbeatConfig(node_id="12D3 KooW")
    assert BackbeatConfig(node_id="12D3 KooW", agent_id="a").node_id == "12D3 KooW"


def test_memory() -> None:
    assert BackbeatConfig(nats_url="memory://x").memory_name == "x"
    assert BackbeatConfig().memory_name is None


def test_logins_in_urls_are_decoded() -> None:
    one, two, six = BackbeatConfig(
        nats_url="nats://us%40er:p%2Fw@a,nats://token@b,nats://[::1]:5"
    ).servers
    assert (one.user, one.password, one.url) == ("us@er", "p/w", "nats://a:4222")
    assert (two.user, two.password) == ("token", None)
    assert six.url == "nats://[::1]:5"


SECRET = "s3cr3t"


@pytest.mark.parametrize(
    "fields",
    [
        {"nats_url": f"nats://me:{SECRET}@host"},
        {"nats_url": f"nats://{SECRET}@host,tls://me:{SECRET}@other"},
        {"nats_url": f"nats://me:{SECRET},{SECRET}@host"},
        {"nats_url": f"nats://me:{SECRET}@@host/path"},
        {"nats_url": f"http://me:{SECRET}@host"},
        {"nats_url": f"me:{SECRET}@host:99999"},
        {"nats_url": f"memory://me:{SECRET}@host"},
        {"user": "me", "password": SECRET},
        {"password": SECRET},
        {"user": SECRET},
        {"user": SECRET, "token": SECRET},
        {"nats_url": SECRET + "@host:99999"},
        {"nats_url": f"nats://a,nats://{SECRET}@b,c/path"},
        {"token": SECRET},
        {"user": "me", "password": SECRET, "cluster_id": "a.b"},
    ],
)
def test_secrets_are_not_shown(fields: dict[str, str]) -> None:
    try:
        config = BackbeatConfig(**fields)  # type: ignore[arg-type]
    except ConfigError as error:
        assert SECRET not in str(error)
    else:
        assert SECRET not in repr(config)
        assert SECRET not in str(config)
    variables = {f"CHORUS_BACKBEAT_{name.upper()}": value for name, value in fields.items()}
    try:
        assert SECRET not in repr(BackbeatConfig.from_env(variables))
    except ConfigError as error:
        assert SECRET not in str(error)


def test_values_of_another_type_are_not_shown_where_secrets_may_be() -> None:
    for name in ("nats_url", "user", "password", "token"):
        with pytest.raises(ConfigError, match=f"^{name}=") as caught:
            BackbeatConfig(**{name: [SECRET]})  # type: ignore[arg-type]
        assert SECRET not in str(caught.value)


def test_redact_url() -> None:
    assert redact_url("nats://a:b@h:1,tls://c@d") == "nats://***@h:1,tls://***@d"
    assert redact_url("nats://h:4222") == "nats://h:4222"


def test_settings_are_frozen() -> None:
    with pytest.raises(AttributeError):
        BackbeatConfig().enabled = False  # type: ignore[misc]


def test_an_agent_id_that_was_not_given_follows_the_node() -> None:
    config = BackbeatConfig(node_id="n", tempo_bpm=60)
    assert config.__replace__(node_id="m").agent_id == "chorus-m"
    assert config.__replace__(tempo_bpm=90).agent_id == "chorus-n"
    assert config.__replace__(tempo_bpm=90).__replace__(node_id="m").agent_id == "chorus-m"
    assert config.__replace__(node_id="m", agent_id="a").agent_id == "a"
    given = BackbeatConfig(node_id="n", agent_id="chorus-n", tempo_bpm=60)
    assert given.__replace__(node_id="m").agent_id == "chorus-n"
    for settings, agent_id in ((config, "chorus-m"), (given, "chorus-n")):
        pickled: BackbeatConfig = pickle.loads(pickle.dumps(settings))
        for copied in (copy.copy(settings), copy.deepcopy(settings), pickled):
            assert copied == settings
            assert copied.__replace__(node_id="m").agent_id == agent_id
    # What it is made of makes no difference beyond that.
    assert config == given
    assert repr(config) == repr(given)
    with pytest.raises(TypeError, match="clusterid"):
        config.__replace__(clusterid="x")  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="^node_id='a b'"):
        config.__replace__(node_id="a b")


async def test_a_session_that_is_given_another_node_is_another_agent() -> None:
    config = BackbeatConfig(node_id="n", nats_url="memory://another-node")
    async with session(config, node_id="m") as bb, open_recorder(bb) as claims:
        bb.start_operation("election", id="e").complete()
        assert (await claims.wait_for("e", "done")).agent_id == "chorus-m"


def test_a_node_id_that_is_too_long_is_told_its_limit() -> None:
    assert BackbeatConfig(node_id="n" * 121).agent_id == f"chorus-{'n' * 121}"
    with pytest.raises(ConfigError, match="^node_id='n+': must be 1 to 121 of") as caught:
        BackbeatConfig.from_env({}, node_id="n" * 122)
    assert caught.value.field == "node_id"
    with pytest.raises(ConfigError, match="^CHORUS_BACKBEAT_NODE_ID='n+': must be 1 to 121 of"):
        BackbeatConfig.from_env({"CHORUS_BACKBEAT_NODE_ID": "n" * 122})
    assert BackbeatConfig(node_id="n" * 122, agent_id="a").node_id == "n" * 122


@pytest.mark.parametrize("host", ["h" * 255, "", "a.b c\n", "ß"])
def test_any_name_of_a_host_gives_ids(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: host)
    config = BackbeatConfig()
    assert config.agent_id == f"chorus-{config.node_id}"


def test_help_does_not_show_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHORUS_BACKBEAT_TOKEN", SECRET)
    code = (
        "import pydoc, backbeat_trio, backbeat_trio._cli.connection as connection\n"
        "for thing in (backbeat_trio, backbeat_trio.BackbeatConfig, connection):\n"
        "    print(pydoc.render_doc(thing))\n"
        "print(backbeat_trio.BackbeatConfig.from_env().token)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # It is read when it is asked for, and then only.
    assert done.stdout.count(SECRET) == 1
    assert "environ(" not in done.stdout


def test_an_error_names_the_variable_whatever_the_value_looks_like() -> None:
    with pytest.raises(ConfigError) as caught:
        BackbeatConfig.from_env({"CHORUS_BACKBEAT_CLUSTER_ID": "node_id='x': y"})
    assert str(caught.value).startswith("CHORUS_BACKBEAT_CLUSTER_ID=\"node_id='x': y\": must be")
    # A field that was given beside the variables is named as it was given.
    with pytest.raises(ConfigError, match="^agent_id='a.b'"):
        BackbeatConfig.from_env({"CHORUS_BACKBEAT_CLUSTER_ID": "c"}, agent_id="a.b")
