"""``backbeat status``, and what any command says without a server."""

from __future__ import annotations

import json

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
            *("grid", "last_frame_age"),
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
            assert (table["standbys"], table["pending"]) == ("0", "")
        await backbeat("tempo", "90", "--at-beat", "5000", "-s", url)
        done = await backbeat("status", "-s", url)
        assert "90 BPM on beat 5000" in done.stdout.decode()
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
