"""``backbeat pulse`` on real servers."""

from __future__ import annotations

import signal
from typing import Any

from helpers import backbeat, connected

from backbeat_trio import BackbeatConfig
from backbeat_trio._transport.jetstream import ClaimStream
from backbeat_trio.testing import NatsServer, open_session

from .programs import cluster, line_with, program


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
            async with connected(nats_url=server.url) as transport:
                assert await ClaimStream(transport, BackbeatConfig(agent_id="a")).open()
        env = {
            "CHORUS_BACKBEAT_CLAIMS_MAX_AGE": "3600",
            "CHORUS_BACKBEAT_CLAIMS_MAX_BYTES": "1073741824",
            "CHORUS_BACKBEAT_CLAIMS_REPLICAS": "3",
        }
        async with program("pulse", "-s", server.url, "--replicas", "3", env=env) as pulse:
            differing = "max_age 604800 s, not 3600 s, num_replicas 1, not 3: it is left as it is"
            told = await line_with(pulse.stderr, f"stream BACKBEAT_STATUS exists with {differing}")
            assert "KV_backbeat-chorus-production exists with num_replicas 1, not 3: it is" in told
