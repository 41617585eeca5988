"""``backbeat status``, and what any command says without a server."""

from __future__ import annotations

import json
import re

import trio
from helpers import backbeat

from backbeat_trio.testing import NatsServer

from .programs import cluster


async def test_status() -> None:
    async with cluster(bpm=120) as url:
        done = await backbeat("status", "-s", url, "-j", "--wait", "3")
        health = json.loads(done.stdout)
        assert done.returncode == 0
        assert list(health) == [
            *("enabled", "started", "connected", "current_beat", "current_tempo"),
            *("measured_bpm", "tempo_drift", "reconnect_count", "active_operations"),
            *("local_degradation", "errors", "node_id"),
            *("paused", "uncertainty", "epoch", "leader_id", "standbys", "pending"),
            *("grid", "last_frame_age", "skew"),
        ]
        assert health["connected"]
        assert health["current_tempo"] == 120.0
        assert health["current_beat"] >= 3
        # The other ways to name the server, and the form for people.
        for env in ({"NATS_URL": url}, {"CHORUS_BACKBEAT_NATS_URL": url}):
            done = await backbeat("status", env=env)
            assert done.returncode == 0
            verdict, shown = read(done.stdout)
            assert verdict == "healthy: this session follows the beats of pulse-a"
            assert list(shown) == ["Cluster", "Clock", "Connection", "This process"]
            assert shown["Cluster"]["tempo"] == "120 BPM"
            assert shown["Cluster"]["standing by"] == "0"
            assert "to come" not in shown["Cluster"]
            assert shown["Clock"]["uncertainty"].endswith(" ms")
            assert shown["Connection"]["server"] == url
        await backbeat("tempo", "90", "--at-beat", "5000", "-s", url)
        done = await backbeat("status", "-s", url)
        assert read(done.stdout)[1]["Cluster"]["to come"].startswith("90 BPM from beat 5000, in ")


async def test_without_a_metronome_no_tempo_is_shown_as_that_of_the_cluster() -> None:
    async with NatsServer() as server:
        done = await backbeat(
            *("status", "-s", server.url, "--cluster-id", "empty", "--timeout", "300ms"),
            env={"CHORUS_BACKBEAT_TEMPO_BPM": "90"},
        )
    assert done.returncode == 1
    verdict, shown = read(done.stdout)
    assert verdict == "degraded: no metronome in cluster empty"
    assert shown["Cluster"] == {"name": "empty", "metronome": "no metronome"}
    assert shown["Clock"]["grid"] == "local: only this process counts it, 0.666667 s a beat"
    assert b"BPM" not in done.stdout


async def test_a_paused_cluster_is_no_degraded_one() -> None:
    async with cluster(bpm=600) as url:
        await backbeat("pause", "-s", url)
        await trio.sleep(1)
        # No beat comes, and it does not wait for one.
        done = await backbeat("status", "-s", url, "--wait", "1")
        assert done.returncode == 0
        verdict, shown = read(done.stdout)
        assert verdict == "paused: pulse-a leads, and every budget waits on this beat"
        assert shown["Cluster"]["tempo"] == "paused"


async def test_a_disabled_session_says_so() -> None:
    done = await backbeat("status", env={"CHORUS_BACKBEAT_ENABLED": "false"})
    assert read(done.stdout)[0].startswith("disabled: CHORUS_BACKBEAT_ENABLED is false")


def read(output: bytes) -> tuple[str, dict[str, dict[str, str]]]:
    """Return the verdict, and the lines of each group by their names."""
    verdict, *groups = output.decode().rstrip("\n").split("\n\n")
    read: dict[str, dict[str, str]] = {}
    for group in groups:
        title, *lines = group.splitlines()
        pairs = (re.split(r"  +", line.strip(), maxsplit=1) for line in lines)
        read[title.removesuffix(":")] = dict(pairs)
    return verdict, read


async def test_without_a_server() -> None:
    async with NatsServer() as server:
        url = server.url
    done = await backbeat("status", "-s", url, "-j", "--timeout", "300ms")
    assert done.returncode == 1
    health = json.loads(done.stdout)
    assert (health["connected"], health["local_degradation"]) == (False, True)
    assert url in health["errors"][0]
    done = await backbeat("status", "-s", url, "--timeout", "300ms")
    verdict, shown = read(done.stdout)
    assert verdict.startswith("degraded: ")
    assert url in verdict
    assert shown["Connection"]["connected"] == "no"
    for command in (("claims",), ("tempo", "60"), ("tempo",)):
        done = await backbeat(*command, "-s", url, "--timeout", "300ms")
        assert done.returncode == 1
        assert done.stderr.decode().startswith(f"backbeat: no connection to {url}")
        assert not done.stdout
