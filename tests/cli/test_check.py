"""``backbeat check``: what it measures, the limits, the formats, and the exit status."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from typing import Any

import pytest
import trio
from helpers import backbeat

from backbeat_trio import Session, session
from backbeat_trio._cli import main as cli
from backbeat_trio._cli.check import _report
from backbeat_trio._cli.connection import Connection
from backbeat_trio._cli.measures import (
    KINDS,
    Found,
    Limits,
    Report,
    Status,
    default_limits,
    format_nagios,
    format_prometheus,
    judge,
    unknown,
)
from backbeat_trio.testing import NatsServer

from .programs import cluster, invoked

NONE = Limits({}, {})
# What depends on how busy the machine of the tests is.
PATIENT = [
    *("--warn", "lateness=1h", "--critical", "lateness=1h"),
    *("--warn", "uncertainty=1h", "--critical", "uncertainty=1h"),
]


def verdict(name: str, found: Found, asked: Limits = NONE, beat: float = 0.5) -> str:
    report = judge("c", {name: found}, default_limits(beat), asked, "all is well")
    (measure,) = report.measures
    assert report.exit_code == Status[report.status.upper()]
    assert report.status == measure.status
    return report.status


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("leader", 1, "ok"),
        ("leader", 0, "critical"),
        ("standbys", 1, "ok"),
        ("standbys", 0, "warning"),
        ("drift", 0.001, "ok"),
        ("drift", 0.0011, "warning"),
        ("drift", 0.011, "critical"),
        ("uncertainty", 0.005, "ok"),
        ("uncertainty", 0.0051, "warning"),
        ("uncertainty", 0.051, "critical"),
        ("lateness", 0.05, "ok"),
        ("lateness", 0.051, "warning"),
        ("lateness", 0.51, "critical"),
        ("late", 0, "ok"),
        ("late", 1, "warning"),
        ("late", 10**6, "warning"),
        ("slow", 10**6, "ok"),
        ("silent", 1, "warning"),
        ("agents", 0, "ok"),
    ],
)
def test_the_default_limits(name: str, value: float, expected: str) -> None:
    assert verdict(name, Found(value)) == expected


def test_the_limits_of_times_follow_the_tempo() -> None:
    assert verdict("uncertainty", Found(0.2), beat=30.0) == "ok"
    assert verdict("uncertainty", Found(0.0021), beat=0.01) == "warning"
    # A paused grid has no beat, and the shortest limits.
    assert verdict("lateness", Found(0.006), beat=0.0) == "warning"


def test_limits_that_are_set_take_the_place_of_the_others() -> None:
    assert verdict("late", Found(3), Limits({"late": 3}, {})) == "ok"
    assert verdict("late", Found(3), Limits({}, {"late": 2})) == "critical"
    assert verdict("agents", Found(6), Limits({"agents": 7}, {"agents": 6})) == "warning"
    assert verdict("agents", Found(5), Limits({"agents": 7}, {"agents": 6})) == "critical"
    assert verdict("standbys", Found(0), Limits({"standbys": 0}, {})) == "ok"
    # The verdict of a measure counts only while nobody has set a limit.
    elevated = Found(0.0, verdict=Status.WARNING)
    assert verdict("drift", elevated) == "warning"
    assert verdict("drift", elevated, Limits({"drift": 0.1}, {})) == "ok"


def test_what_could_not_be_measured() -> None:
    assert verdict("drift", Found(None, "too early")) == "ok"
    assert verdict("drift", Found(None, "too early"), Limits({"drift": 0.1}, {})) == "unknown"
    assert verdict("late", Found(None, "not allowed", denied=True)) == "unknown"


def test_the_worst_counts_and_is_said_first() -> None:
    found = {
        "leader": Found(1.0, "fine"),
        "standbys": Found(0.0, "warned"),
        "uncertainty": Found(None, "denied", denied=True),
    }
    report = judge("c", found, default_limits(1.0), NONE, "all is well")
    assert (report.status, report.exit_code) == ("unknown", 3)
    assert report.text == "denied; warned (should be at least 1)"
    found["leader"] = Found(0.0, "gone")
    report = judge("c", found, default_limits(1.0), NONE, "all is well")
    assert (report.status, report.exit_code) == ("critical", 2)
    assert report.text.startswith("gone (should be at least 1); denied; warned")
    report = judge("c", {"late": Found(0.0)}, default_limits(1.0), NONE, "all is well")
    assert report.text == "all is well"


def full_report() -> Report:
    found = {name: Found(0.5 if kind.unit else 2.0) for name, kind in KINDS.items()}
    found["leader"] = Found(1.0, "a|b\nleads")
    found["silent"] = Found(None, "not yet")
    return judge("c", found, default_limits(0.5), Limits({}, {"agents": 3}), "well")


def test_the_format_of_nagios() -> None:
    first, *details = format_nagios(full_report()).splitlines()
    text, data = first.split(" | ")
    assert text.startswith("BACKBEAT CRITICAL - drift 50 % (should be at most 1 %); ")
    assert data.split() == [
        *("leader=1;;1:;0", "standbys=2;1:;;0", "drift=50%;0.1;1;0"),
        *("uncertainty=0.5s;0.005;0.05;0", "lateness=0.5s;0.05;0.5;0"),
        *("agents=2;;3:;0", "late=2;0;;0", "slow=2;;;0"),
    ]
    assert details[0] == "ok: a/b leads"
    assert format_nagios(unknown("c", "why")) == "BACKBEAT UNKNOWN - why\n"


def test_the_format_of_prometheus() -> None:
    text = format_prometheus(full_report())
    samples = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    assert samples['backbeat_check_status{cluster="c"}'] == "2"
    assert samples['backbeat_check_measure_status{cluster="c",measure="late"}'] == "1"
    assert samples['backbeat_check_uncertainty_seconds{cluster="c"}'] == "0.5"
    assert 'backbeat_check_silent_operations{cluster="c"}' not in samples
    assert 'backbeat_check_status{cluster="c"} 3' in format_prometheus(unknown("c", "why"))


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_has_nothing_to_say_about_the_metrics() -> None:
    done = subprocess.run(
        ["promtool", "check", "metrics"],
        input=format_prometheus(full_report()),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--warn", "late"],
        ["--warn", "late="],
        ["--warn", "late=-1"],
        ["--warn", "late=1.5"],
        ["--warn", "late=" + "9" * 400],
        ["--warn", "drift=nan"],
        ["--warn", "drift=-1%"],
        ["--critical", "uncertainty=soon"],
        ["--critical", "dance=3"],
        ["--agents", "-1"],
        ["--format", "xml"],
        ["--wait", "-1"],
        ["--timeout", "0s"],
        ["--bogus"],
        ["surplus"],
    ],
)
def test_wrong_arguments_are_unknown_to_a_monitoring_system(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["check", *arguments]) == 3
    out, err = capsys.readouterr()
    assert not out
    usage, error = err.splitlines()
    assert usage.startswith("Usage: backbeat check")
    assert error.endswith("Try 'backbeat check --help'.")


async def report_on(name: str, *, wait: float, asked: Limits = NONE) -> dict[str, Any]:
    connection = Connection("check", {"nats_url": f"memory://{name}"}, None, None)
    report = await _report(connection, asked, wait)
    measures = {each.name: each for each in report.measures}
    return measures | {"report": report}


async def test_operations_that_are_late_slow_and_silent(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with session(nats_url="memory://check", agent_id="worker") as bb:
        assert isinstance(bb, Session)
        bb.start_operation("x", id="fine", beats=1000)
        bb.start_operation("x", id="late", beats=1)
        await bb.sleep(3)
        async with bb.operation("x", id="slow", beats=1000, soft_after=0.5):
            found = await report_on("check", wait=5)
    assert (found["late"].value, found["late"].status) == (1, "warning")
    assert found["slow"].value == 1
    assert found["silent"].value == 0
    assert found["agents"].value == 1
    assert found["leader"].value == 1
    assert found["lateness"].value < 0.01
    # Two minutes: eight frames have not come.
    assert found["drift"].value is None
    assert found["report"].exit_code == 1


async def test_an_operation_whose_agent_says_nothing_more_is_silent(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with session(nats_url="memory://mute", agent_id="worker") as bb, trio.open_nursery() as n:
        bb.start_operation("x", id="mute", beats=1000)

        async def fall_silent() -> None:
            await bb.sleep(1.5)
            transport = bb._runtime.transport
            assert transport is not None
            transport.sever()  # type: ignore[attr-defined]

        n.start_soon(fall_silent)
        found = await report_on("mute", wait=6, asked=Limits({}, {"silent": 0}))
    assert (found["silent"].value, found["silent"].status) == (1, "critical")


async def test_a_short_look_says_what_it_could_not_see(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with session(nats_url="memory://short", agent_id="worker") as bb:
        bb.start_operation("x", beats=1000)
        found = await report_on("short", wait=0)
        assert found["late"].value is None
        assert "--wait" in found["late"].text
        assert found["agents"].value == 1
        await bb.pause()
        await trio.sleep(120)
        found = await report_on("short", wait=3)
        assert found["late"].value is None
        assert "paused" in found["report"].text or found["report"].status == "warning"


async def test_check_against_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    async with cluster(bpm=120) as url:
        program = await backbeat("check", "-s", url, *PATIENT, "--standbys", "0")
        assert program.returncode == 0, program.stdout
        assert program.stdout.startswith(b"ok: pulse-a leads, at 120 BPM, on beat ")
        assert b"\x1b" not in program.stdout
        done = await invoked(capsys, "check", "-s", url, *PATIENT, "--format", "nagios")
        assert done.status == 1
        assert done.out.startswith("BACKBEAT WARNING - 0 metronomes stand by")
        few = ("--agents", "1", "--format", "json")
        done = await invoked(capsys, "check", "-s", url, *PATIENT, *few)
        report = json.loads(done.out)
        assert (done.status, report["exit_code"], report["status"]) == (2, 2, "critical")
        assert report["cluster_id"] == "chorus-production"
        # The tempo is that of the frames, once there were eight.
        long = ("--wait", "12", "--format", "prometheus")
        done = await invoked(capsys, "check", "-s", url, *long)
        assert re.search(r"^backbeat_check_drift_ratio\{.*\} \d", done.out, re.MULTILINE)
        # No metronome is in that cluster, and that is known.
        other = ("--cluster-id", "other", "--timeout", "300ms", "--wait", "1000")
        done = await invoked(capsys, "check", "-s", url, *other)
        assert done.status == 2
        assert done.out.startswith("critical: no metronome is heard in cluster other")


async def test_without_a_connection_and_without_permissions_nothing_is_known(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = """
    authorization { users: [
      { user: u, password: secret-p, permissions: { subscribe: ["_INBOX.>"], publish: ["a"] } }
    ] }
    """
    async with NatsServer(config=config) as server:
        login = ("--user", "u", "--password", "secret-p", "--timeout", "500ms", "--wait", "0")
        done = await invoked(capsys, "check", "-s", server.url, *login, "--format", "nagios")
        assert done.status == 3, done.out
        assert done.out.startswith("BACKBEAT UNKNOWN - permission denied: ")
        wrong = ("--user", "u", "--password", "secret-x")
        done = await invoked(capsys, "check", "-s", server.url, *wrong)
        assert done.status == 3
        assert "refused the credentials" in done.out
        assert "secret" not in done.out + done.err
    where = ("-s", server.url, "--timeout", "300ms")
    done = await invoked(capsys, "check", *where, "--format", "prometheus")
    assert done.status == 3
    assert 'backbeat_check_status{cluster="chorus-production"} 3\n' in done.out
    monkeypatch.setenv("CHORUS_BACKBEAT_ENABLED", "false")
    assert (await invoked(capsys, "check", *where)).status == 3
    monkeypatch.setenv("CHORUS_BACKBEAT_TEMPO_BPM", "fast")
    done = await invoked(capsys, "check", *where)
    assert done.status == 3
    assert done.out.startswith("unknown: CHORUS_BACKBEAT_TEMPO_BPM='fast'")
