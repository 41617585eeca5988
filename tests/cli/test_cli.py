"""The command line, as processes against a real server."""

from __future__ import annotations

import argparse
import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from backbeat_trio import BackbeatConfig, ConfigError, StatusClaim
from backbeat_trio.__main__ import main
from backbeat_trio._cli import main as cli
from backbeat_trio._transport.jetstream import ClaimStream
from backbeat_trio._transport.nats import NatsTransport
from backbeat_trio.testing import NatsServer, open_recorder, open_session

CLEAN = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(("NATS_", "CHORUS_BACKBEAT_", "XDG_"))
}


async def backbeat(
    *arguments: str, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    with trio.fail_after(60):
        return await trio.run_process(
            [sys.executable, "-m", "backbeat_trio", *arguments],
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            env=CLEAN | dict(env or {}),
        )


@asynccontextmanager
async def program(
    *arguments: str, env: Mapping[str, str] | None = None
) -> AsyncGenerator[trio.Process, None]:
    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", "backbeat_trio", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=CLEAN | dict(env or {}),
    )
    try:
        yield process
    finally:
        with trio.CancelScope(shield=True):
            if process.returncode is None:
                process.terminate()
            await process.wait()
            for stream in (process.stdout, process.stderr):
                assert stream is not None
                await stream.aclose()


async def line_with(stream: trio.abc.ReceiveStream | None, text: str) -> str:
    """Read until some text has come."""
    assert stream is not None
    heard = ""
    with trio.fail_after(60):
        while text not in heard:
            data = await stream.receive_some()
            assert data, heard
            heard += data.decode()
    return heard


@asynccontextmanager
async def cluster(bpm: float = 600) -> AsyncGenerator[str, None]:
    async with NatsServer() as server:
        pulse = program("pulse", "-s", server.url, "--bpm", str(bpm), "--id", "pulse-a")
        async with pulse as process:
            await line_with(process.stderr, "metronome leads")
            yield server.url


async def test_status() -> None:
    async with cluster(bpm=120) as url:
        done = await backbeat("status", "-s", url, "-j", "--wait", "3")
        health = json.loads(done.stdout)
        assert done.returncode == 0
        assert list(health) == [
            *("enabled", "started", "connected", "current_beat", "current_tempo"),
            *("measured_bpm", "tempo_drift", "reconnect_count", "active_operations"),
            *("local_degradation", "errors", "node_id"),
            *("paused", "uncertainty", "epoch", "leader_id"),
        ]
        assert health["connected"]
        assert health["current_tempo"] == 120.0
        assert health["current_beat"] >= 3
        # The other ways to name the server, and the form for people.
        for env in ({"NATS_URL": url}, {"CHORUS_BACKBEAT_NATS_URL": url}):
            done = await backbeat("status", env=env)
            assert done.returncode == 0
            rows = [line.strip().partition(" ") for line in done.stdout.decode().splitlines()]
            table = {name: value.strip() for name, _, value in rows}
            assert table["current_tempo"] == "120 BPM"
            assert table["uncertainty"].endswith(" ms")
        done = await backbeat("status", "-s", url, "--cluster-id", "empty", "--timeout", "300ms")
        assert done.returncode == 1


async def test_without_a_server() -> None:
    async with NatsServer() as server:
        url = server.url
    done = await backbeat("status", "-s", url, "-j", "--timeout", "300ms")
    assert done.returncode == 1
    health = json.loads(done.stdout)
    assert (health["connected"], health["local_degradation"]) == (False, True)
    assert url in health["errors"][0]
    for command in (("claims",), ("tempo", "60")):
        done = await backbeat(*command, "-s", url, "--timeout", "300ms")
        assert done.returncode == 1
        assert done.stderr.decode().startswith(f"backbeat: no connection to {url}")
        assert not done.stdout


async def test_a_second_metronome_refuses() -> None:
    async with cluster() as url:
        done = await backbeat("pulse", "-s", url, "--bpm", "60")
        assert done.returncode == 1
        assert "has a metronome already: pulse-a" in done.stderr.decode()
        done = await backbeat("pulse", "-s", "memory://x")
        assert done.returncode == 1


async def test_a_metronome_waits_for_its_server_and_ends_in_order() -> None:
    server = NatsServer()
    try:
        await server.start()
        server.kill()
        async with program("pulse", "-s", server.url, "--bpm", "600", "-v") as pulse:
            await line_with(pulse.stderr, "trying on")
            await server.start()
            await line_with(pulse.stderr, "metronome leads")
            pulse.send_signal(signal.SIGTERM)
            assert await pulse.wait() == 128 + signal.SIGTERM
        async with program("pulse", "-s", server.url) as pulse:
            await line_with(pulse.stderr, "metronome leads")
            pulse.send_signal(signal.SIGINT)
            assert await pulse.wait() == 128 + signal.SIGINT
    finally:
        server.close()


async def test_tempo() -> None:
    async with (
        cluster(bpm=600) as url,
        open_session(nats_url=url, cluster_id="chorus-production", require_connection=True) as bb,
    ):
        done = await backbeat("tempo", "1200", "-s", url, "-j")
        reply = json.loads(done.stdout)
        assert reply["tempo_bpm"] == 1200.0
        assert reply["effective_beat"] % 8 == 0
        with trio.fail_after(60):
            await bb.sleep_until(reply["effective_beat"])
        assert bb.tempo_bpm == 1200.0
        done = await backbeat("tempo", "300.5", "-s", url, "--at-beat", "100000")
        assert done.stdout == b"300.5 BPM from beat 100000\n"
        done = await backbeat("tempo", "300", "-s", url, "--at-beat", "1")
        assert done.returncode == 1
        assert "beat 1 is past" in done.stderr.decode()
        # What the wire cannot tell is refused at once, and what no clock can count by the leader.
        done = await backbeat("tempo", "300", "-s", url, "--at-beat", str(2**53))
        assert "is too far ahead" in done.stderr.decode()
        for change in (
            functools.partial(bb.set_tempo, 60, at_beat=2**53 + 1),
            functools.partial(bb.pause, at_beat=2**53 + 1),
        ):
            with pytest.raises(ValueError, match="`at_beat` must be at most 9007199254740992"):
                await change()
        with pytest.raises(ValueError, match="`over` must be at most 9007199254740992"):
            await bb.set_tempo(60, over=2**53 + 1)


async def test_ramp_pause_and_resume() -> None:
    async with (
        cluster(bpm=600) as url,
        open_session(nats_url=url, cluster_id="chorus-production", require_connection=True) as bb,
    ):
        done = await backbeat("tempo", "1200", "--over", "16", "-s", url, "-j")
        reply = json.loads(done.stdout)
        assert (reply["tempo_bpm"], reply["over_beats"]) == (1200.0, 16)
        with trio.fail_after(60):
            await bb.sleep_until(reply["effective_beat"] + 8)
            assert 600 < bb.tempo_bpm < 1200
            await bb.sleep_until(reply["effective_beat"] + 16)
        assert bb.tempo_bpm == 1200.0
        done = await backbeat("pause", "-s", url, "-j")
        paused = json.loads(done.stdout)
        with trio.fail_after(60):
            await bb.sleep_until(paused["effective_beat"])
        assert bb.health().paused
        done = await backbeat("tempo", "60", "-s", url)
        assert done.returncode == 1
        assert "stands still" in done.stderr.decode()
        done = await backbeat("resume", "-s", url)
        beat = paused["effective_beat"]
        assert done.stdout == f"the grid goes on from beat {beat}\n".encode()
        with trio.fail_after(60):
            await bb.sleep(1)
        assert not bb.health().paused
        assert bb.tempo_bpm == 1200.0
        assert bb.statistics().locks == 1
        done = await backbeat("resume", "-s", url)
        assert done.returncode == 1
        done = await backbeat("pause", "-s", url, "--at-beat", "1000000")
        assert done.stdout == b"the grid stands still on beat 1000000\n"


async def test_metronomes_with_jetstream_take_turns() -> None:
    async with NatsServer(["-js"]) as server:
        arguments = ("pulse", "-s", server.url, "--bpm", "600", "--replicas", "1")
        async with program(*arguments, "--id", "one") as one:
            assert "leader=one epoch=1" in await line_with(one.stderr, "metronome leads")
            async with program(*arguments, "--id", "two") as two:
                await line_with(two.stderr, "locked to the grid - leader=one")
                one.kill()
                assert "leader=two" in await line_with(two.stderr, "metronome leads")


async def test_replicas_that_cannot_be() -> None:
    async with NatsServer(["-js"]) as server:
        done = await backbeat("pulse", "-s", server.url, "--replicas", "3")
        assert done.returncode == 1
        assert done.stderr.decode() == (
            "backbeat: the record of the grid cannot be kept: "
            "the server keeps no 3 copies: it is not in a cluster\n"
        )


async def test_a_metronome_takes_its_tempo_and_bars_from_variables_and_flags() -> None:
    env = {"CHORUS_BACKBEAT_TEMPO_BPM": "600", "CHORUS_BACKBEAT_BEATS_PER_BAR": "3"}
    flags = ["--bpm", "1200", "--beats-per-bar", "5"]
    for given, bpm, length in (([], 600.0, 3), (flags, 1200.0, 5)):
        async with NatsServer() as server, program("pulse", "-s", server.url, *given, env=env):
            options: dict[str, Any] = {"lock_timeout": 60.0, "cluster_id": "chorus-production"}
            async with open_session(nats_url=server.url, **options) as bb:
                assert bb.tempo_bpm == bpm
                beat = await anext(bb.beats())
                assert beat.window_id == f"w-{beat.index // length}"


async def test_streams_that_exist_with_other_limits_are_left_as_they_are() -> None:
    async with NatsServer(["-js"]) as server:
        async with program("pulse", "-s", server.url, "--bpm", "600") as pulse:
            await line_with(pulse.stderr, "metronome leads")
            config = BackbeatConfig(nats_url=server.url, agent_id="a")
            transport = NatsTransport(config)
            async with trio.open_nursery() as nursery:
                await nursery.start(transport.run)
                await transport.wait_connected()
                assert await ClaimStream(transport, config).open()
                nursery.cancel_scope.cancel()
        env = {
            "CHORUS_BACKBEAT_CLAIMS_MAX_AGE": "3600",
            "CHORUS_BACKBEAT_CLAIMS_MAX_BYTES": "1073741824",
            "CHORUS_BACKBEAT_CLAIMS_REPLICAS": "3",
        }
        async with program("pulse", "-s", server.url, "--replicas", "3", env=env) as pulse:
            differing = "max_age 604800 s, not 3600 s, num_replicas 1, not 3: it is left as it is"
            told = await line_with(pulse.stderr, f"stream BACKBEAT_STATUS exists with {differing}")
            assert "KV_backbeat-chorus-production exists with num_replicas 1, not 3: it is" in told


async def test_claims() -> None:
    async with cluster() as url:
        async with (
            program("claims", "-s", url, "--json", "--count", "3") as json_lines,
            program("claims", "agent-1", "-s", url) as lines,
            open_session(nats_url=url, agent_id="agent-1", cluster_id="chorus-production") as bb,
        ):

            async def work() -> None:
                while True:
                    bb.start_operation("election", beats=2).complete()
                    await bb.sleep(1)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(work)
                heard = await line_with(json_lines.stdout, "\n")
                assert json.loads(heard.splitlines()[0])["agent_id"] == "agent-1"
                with trio.fail_after(60):
                    assert await json_lines.wait() == 0
                assert "P2P election: started" in await line_with(lines.stdout, "started")
                # The reader goes away.
                assert lines.stdout is not None
                await lines.stdout.aclose()
                with trio.fail_after(60):
                    assert await lines.wait() == 128 + signal.SIGPIPE
                nursery.cancel_scope.cancel()
    done = await backbeat("claims", "-s", url, "--count", "0")
    assert done.returncode == 0


def test_claims_are_shown_without_control_characters() -> None:
    claim = StatusClaim("a", "t\x1b[2J", 5, "done", 0, 1.0, "n\r\nx")
    line = cli.format_claim(claim)
    assert line.isprintable()
    assert "t?[2J" in line


@pytest.mark.parametrize(
    ("options", "command", "status"),
    [
        (["--beats", "100"], ["true"], 0),
        (["--beats", "100"], ["sh", "-c", "exit 3"], 3),
        (["--beats", "100"], ["sh", "-c", "kill -KILL $$"], 137),
        (["--beats", "0"], ["true"], 0),
        (["--beats", "2"], ["sleep", "60"], 124),
        (["--beats", "2", "--foreground"], ["sleep", "60"], 124),
        (["--beats", "2", "--preserve-status"], ["sleep", "60"], 143),
        (["--beats", "2", "--preserve-status", "--signal", "INT"], ["sleep", "60"], 130),
        (["--beats", "2"], ["sh", "-c", "trap 'exit 7' TERM; sleep 60 & wait"], 124),
        (
            ["--beats", "2", "--kill-after", "1"],
            ["sh", "-c", "trap '' TERM; while :; do sleep 1; done"],
            137,
        ),
        (["--beats", "2"], ["no-such-command"], 127),
        (["--beats", "2"], ["/etc/passwd"], 126),
        (["--beats", "2"], [], 125),
    ],
)
async def test_exec(options: list[str], command: list[str], status: int) -> None:
    # Without a server, on the local grid; a metronome's makes no difference to any of this.
    env = {"CHORUS_BACKBEAT_TEMPO_BPM": "600", "CHORUS_BACKBEAT_NATS_URL": "memory://exec"}
    done = await backbeat("exec", *options, "--", *command, env=env)
    assert (done.returncode, done.stderr.decode()) == (status, done.stderr.decode())
    assert "no metronome" not in done.stderr.decode()


async def test_exec_without_a_metronome_says_whose_beats_it_counts() -> None:
    async with NatsServer() as server:
        for beats, told in (("50", True), ("0", False)):
            done = await backbeat(
                *("exec", "-s", server.url, "--timeout", "100ms", "--beats", beats, "--", "true"),
                env={"CHORUS_BACKBEAT_TEMPO_BPM": "90"},
            )
            assert done.returncode == 0
            line = (
                "backbeat exec: no metronome: "
                "budgets are counted on a local grid, 0.666667 s a beat\n"
            )
            assert (line in done.stderr.decode()) is told


async def test_exec_is_an_operation_of_the_cluster() -> None:
    async with cluster() as url:
        async with (
            open_session(nats_url=url, cluster_id="chorus-production") as bb,
            open_recorder(bb) as claims,
        ):
            done = await backbeat("exec", "-s", url, "--beats", "3", "--id", "late", "sleep", "60")
            assert done.returncode == 124
            done = await backbeat("exec", "-s", url, "--beats", "50", "--id", "well", "true")
            assert done.returncode == 0
            done = await backbeat("exec", "-s", url, "--beats", "50", "--id", "badly", "false")
            assert done.returncode == 1
            with trio.fail_after(60):
                failed = await claims.wait_for("late", "failed")
                assert "the budget of 3 beats ran out" in failed.notes
                await claims.wait_for("well", "done")
                assert "exit status 1" in (await claims.wait_for("badly", "failed")).notes
            assert {claim.state for claim in claims.of("late")} == {"executing", "failed"}


async def test_exec_passes_signals_on() -> None:
    script = "trap 'echo got it; exit 9' TERM; echo ready; sleep 60 & wait"
    async with program(
        "exec", "-s", "memory://exec", "--beats", "1000", "--", "sh", "-c", script
    ) as running:
        await line_with(running.stdout, "ready")
        running.send_signal(signal.SIGTERM)
        await line_with(running.stdout, "got it")
        assert await running.wait() == 9


async def test_exec_with_settings_that_cannot_work() -> None:
    done = await backbeat("exec", "--beats", "1", "-s", "http://x", "--", "true")
    assert done.returncode == 125
    assert "nats_url" in done.stderr.decode()


@pytest.mark.parametrize("memory", [False, True], ids=["server", "memory"])
async def test_demo(memory: bool) -> None:
    flags = ["--memory"] if memory else []
    done = await backbeat("demo", "--bpm", "600", "--beats", "24", *flags)
    text = done.stdout.decode()
    assert done.returncode == 0, done.stderr.decode()
    assert "tempo 600 -> 1200 BPM" in text
    assert "3 agents" in text
    for kind in ("election", "dht_store", "pubsub_sync", "peer_discovery"):
        assert f"  {kind} " in text
    assert not done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["pulse", "--bpm", "0"],
        ["pulse", "--bpm", "nan"],
        ["pulse", "--bpm", "fast"],
        ["pulse", "--id", "a.b"],
        ["pulse", "--beats-per-bar", "0"],
        ["pulse", "--beats-per-bar", "1000001"],
        ["pulse", "--replicas", "0"],
        ["pulse", "--replicas", "6"],
        ["pause", "--at-beat", str(2**53 + 1)],
        ["tempo", "60", "--at-beat", "9" * 5000],
        ["tempo", "60", "--over", str(2**53 + 1)],
        ["tempo", "6001"],
        ["tempo", "60", "--at-beat", "-1"],
        ["status", "--timeout", "soon"],
        ["status", "--wait", "nan"],
        ["status", "--cluster-id", "a b"],
        ["claims", "a.b"],
        ["exec", "--beats", "-1", "true"],
        ["exec", "--beats", "1", "--signal", "NONE", "true"],
        ["exec", "true"],
        [],
        ["dance"],
    ],
)
def test_arguments_that_are_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.run(arguments)
    assert caught.value.code == 2
    assert "backbeat" in capsys.readouterr().err


def test_an_unknown_option_is_refused_by_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.run(["status", "--bogus"])
    told = capsys.readouterr().err
    assert told.startswith("usage: backbeat status ")
    assert told.endswith("backbeat status: error: unrecognized arguments: --bogus\n")


def test_ctrl_c_outside_of_a_run_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(arguments: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run", interrupted)
    assert main() == 128 + signal.SIGINT


def test_arguments_that_are_taken() -> None:
    parse = cli._parser().parse_args
    assert parse(["claims", "*"]).agent_id == "*"
    assert parse(["tempo", "60", "--at-beat", str(2**53)]).at_beat == 2**53
    assert parse(["pulse", "--beats-per-bar", "1000000"]).beats_per_bar == 1_000_000
    assert parse(["status", "--timeout", "1.5m"]).timeout == 90.0
    assert parse(["exec", "--beats", "2", "--signal", "9", "x"]).signal == signal.SIGKILL
    assert parse(["exec", "--beats", "2", "--", "x", "-s"]).argv[-2:] == ["x", "-s"]


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
    assert cli.settings(options(), home).nats_url == "nats://backbeat-nats:4222"
    one = cli.settings(options("--context", "one"), home)
    assert (one.nats_url, one.user, one.password) == ("nats://one:1", "u", "p")
    assert one.tls_first
    two = cli.settings(options(), home | {"NATS_CONTEXT": "two"})
    assert (two.nats_url, two.token, two.inbox_prefix) == ("tls://two:2", "t", "_IN")
    Path(home["XDG_CONFIG_HOME"], "nats", "context.txt").write_text("one\n")
    assert cli.settings(options(), home).nats_url == "nats://one:1"
    Path(home["XDG_CONFIG_HOME"], "nats", "context.txt").write_text("")
    assert cli.settings(options(), home).nats_url == "nats://backbeat-nats:4222"


def test_what_comes_before_what(home: dict[str, str]) -> None:
    env = home | {"NATS_CONTEXT": "one"}
    assert cli.settings(options(), env | {"NATS_URL": "nats://env"}).nats_url == "nats://env"
    own = env | {"NATS_URL": "nats://env", "CHORUS_BACKBEAT_NATS_URL": "nats://own"}
    assert cli.settings(options(), own).nats_url == "nats://own"
    assert cli.settings(options("-s", "nats://flag"), own).nats_url == "nats://flag"
    both = cli.settings(options("--context", "two"), env | {"NATS_TOKEN": "from-env"})
    assert (both.nats_url, both.token) == ("tls://two:2", "from-env")


@pytest.mark.parametrize("name", ["none", "broken", "../one"])
def test_contexts_that_cannot_be_read(name: str, home: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="^context="):
        cli.settings(options("--context", name), home)


def test_flags_and_variables_of_the_nats_command_line() -> None:
    config = cli.settings(options("--user", "lonely"), {})
    assert (config.user, config.token) == (None, "lonely")
    env = {"NATS_USER": "u", "NATS_PASSWORD": "p", "NATS_CA": "/ca", "NATS_TIMEOUT": "3s"}
    config = cli.settings(options("--tlsfirst"), env)
    assert (config.user, config.password, config.tls_ca) == ("u", "p", "/ca")
    assert (config.connect_timeout, config.lock_timeout) == (3.0, 3.0)
    assert config.agent_id.startswith("backbeat-status-")
    assert cli.settings(options(), {"CHORUS_BACKBEAT_AGENT_ID": "me"}).agent_id == "me"
    with pytest.raises(ConfigError, match="NATS_TIMEOUT='x'"):
        cli.settings(options(), {"NATS_TIMEOUT": "x"})
