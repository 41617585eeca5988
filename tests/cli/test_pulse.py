"""``backbeat pulse`` on real servers."""

from __future__ import annotations

import contextlib
import re
import signal
from typing import Any

import httpx
import nats.js.errors
import trio
from helpers import backbeat, connected, free_ports
from nats.aio.client import Client

from backbeat_trio import BackbeatConfig
from backbeat_trio._transport.jetstream import ClaimStream
from backbeat_trio.testing import NatsServer, open_session

from .programs import cluster, line_with, program

LOGIN = {"CHORUS_BACKBEAT_USER": "p", "CHORUS_BACKBEAT_PASSWORD": "p"}


async def test_a_second_metronome_stands_by_also_without_jetstream() -> None:
    async with cluster() as url:
        async with program("pulse", "-s", url, "--bpm", "60", "--id", "pulse-b") as pulse:
            told = await line_with(pulse.stderr, "stands by - leader=pulse-a")
            # Not its own tempo, but that of the grid which it follows.
            assert " tempo=600" in told.partition("stands by")[2]
            assert "the grid has no record, as there is no JetStream" in told
            async with open_session(
                nats_url=url, cluster_id="chorus-production", lock_timeout=30.0
            ) as bb:
                await bb.sleep(3)
                assert (bb.tempo_bpm, bb.health().leader_id) == (600.0, "pulse-a")
                assert bb.health().standbys == 1
        done = await backbeat("pulse", "-s", "memory://x")
        assert done.returncode == 1


async def test_an_outage_is_told_with_how_long_it_was() -> None:
    async with (
        NatsServer(["-js"]) as server,
        program("pulse", "-s", server.url, "--bpm", "600") as pulse,
    ):
        await line_with(pulse.stderr, "metronome leads")
        server.kill()
        await line_with(pulse.stderr, "connection lost: ")
        await trio.sleep(1.5)
        await server.start()
        told = await line_with(pulse.stderr, "frames were not sent")
        outage = re.search(r"connected again after (\d+\.\d) s; (\d+) frames", told)
        assert outage is not None
        assert float(outage[1]) >= 1.4
        assert int(outage[2]) >= 10


RESTRICTED = """
jetstream {{ }}
authorization {{ users: [{{
    user: p, password: p, permissions: {{
        publish: {{ deny: [{}] }}, subscribe: {{ deny: ["backbeat.lead.>"] }}
    }}
}}] }}
"""


async def test_frames_that_are_refused_are_told_once_and_so_is_the_end_of_it() -> None:
    beats = "backbeat.beat.chorus-production"
    async with (
        NatsServer(config=RESTRICTED.format(f'"{beats}"')) as server,
        program("pulse", "-s", server.url, "--bpm", "600", env=LOGIN) as pulse,
    ):
        told = await line_with(pulse.stderr, "nobody hears this metronome")
        assert f"nobody hears this metronome: permissions refuse to publish to {beats}\n" in told
        if "backbeat.lead" not in told:
            told = await line_with(pulse.stderr, "this metronome is hampered")
        probes = "permissions refuse to subscribe to backbeat.lead.chorus-production.*\n"
        assert f"this metronome is hampered: {probes}" in told
        await trio.sleep(2)
        server.reload(RESTRICTED.format('"nothing"'))
        told = await line_with(pulse.stderr, "frames are taken again")
        assert "nobody hears" not in told
        async with open_session(
            nats_url=server.url, cluster_id="chorus-production", user="p", password="p"
        ) as bb:
            await bb.sleep(3)
            assert bb.health().leader_id


async def test_a_refused_question_for_the_record_is_told_once_and_waited_for() -> None:
    stream = "$JS.API.STREAM.INFO.KV_backbeat-chorus-production"
    async with (
        NatsServer(config=RESTRICTED.format(f'"{stream}"')) as server,
        program("pulse", "-s", server.url, "--bpm", "600", env=LOGIN) as pulse,
    ):
        waiting = "waiting for the record of the grid: permissions refuse to publish to"
        assert stream.lower() in await line_with(pulse.stderr, waiting)
        await trio.sleep(3)
        server.reload(RESTRICTED.format('"nothing"'))
        told = await line_with(pulse.stderr, "metronome leads")
        assert waiting not in told
        assert "the record of the grid answers" in told


async def test_a_full_store_is_told_once_and_so_is_the_end_of_it() -> None:
    # The record's bucket, and a stream that somebody else fills the account with.
    config = """
    accounts { A { jetstream: { max_file: 64KB }, users: [{ user: p, password: p }] } }
    """
    async with (
        NatsServer(["-js"], config=config) as server,
        connected(nats_url=server.url, user="p", password="p") as transport,
    ):

        async def fill(client: Client) -> None:
            js = client.jetstream()
            await js.add_stream(name="other", subjects=["other"])
            for size in (1000, 100, 1):
                with contextlib.suppress(nats.js.errors.APIError):
                    while True:
                        await js.publish("other", b"x" * size)

        async def empty(client: Client) -> None:
            await client.jetstream().delete_stream("other")

        env = LOGIN | {"CHORUS_BACKBEAT_STORE_CLAIMS": "false"}
        async with program("pulse", "-s", server.url, "--bpm", "1200", env=env) as pulse:
            await line_with(pulse.stderr, "metronome leads")
            await transport.call(fill)
            full = "beating on without the record, tempo changes refused: JetStream does not take"
            told = await line_with(pulse.stderr, full)
            assert "resource limits exceeded for account" in told
            await trio.sleep(3)
            await transport.call(empty)
            told = await line_with(pulse.stderr, "the record can be written again")
            assert full not in told


async def test_a_plain_stream_in_the_records_place_ends_it() -> None:
    async with NatsServer(["-js"]) as server, connected(nats_url=server.url) as transport:

        async def add(client: Client) -> None:
            await client.jetstream().add_stream(
                name="KV_backbeat-chorus-production", subjects=["mine"]
            )

        await transport.call(add)
        done = await backbeat("pulse", "-s", server.url)
        assert done.returncode == 1
        assert done.stderr.decode() == (
            "backbeat: the record of the grid cannot be kept: stream KV_backbeat-chorus-production "
            "exists and is not the key-value bucket backbeat-chorus-production\n"
        )


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
            told = await line_with(one.stderr, "metronome leads")
            assert "leader=one epoch=1 tempo=600" in told
            # It takes over from nobody, so that is the first that it says.
            assert told.count("\n") == 1
            async with program(*arguments, "--id", "two") as two:
                await line_with(two.stderr, "locked to the grid - leader=one")
                one.kill()
                told = await line_with(two.stderr, "metronome leads")
                assert "takes over from one: " in told
                assert "leader=two" in told


async def test_probes_say_whether_it_leads_or_could_take_over() -> None:
    ports = free_ports(2)

    async def ask(number: int, path: str) -> tuple[int, Any]:
        async with httpx.AsyncClient(timeout=60) as client:
            answer = await client.get(f"http://127.0.0.1:{ports[number]}{path}")
            return answer.status_code, answer.json()

    first, second = (("--probes", f"127.0.0.1:{port}") for port in ports)
    async with NatsServer(["-js"]) as server:
        arguments = ("pulse", "-s", server.url, "--bpm", "600")
        async with program(*arguments, *first) as one:
            await line_with(one.stderr, "metronome leads")
            async with program(*arguments, *second) as two:
                await line_with(two.stderr, "locked to the grid")
                for number in (0, 1):
                    status, answer = await ask(number, "/readyz")
                    assert (status, answer["ok"], answer["connected"]) == (200, True, True)
                server.kill()
                await line_with(two.stderr, "connection lost")
                status, answer = await ask(1, "/readyz")
                assert (status, answer["reason"]) == (503, "there is no connection to the server")
                # A new process would not bring the server back.
                assert (await ask(1, "/healthz"))[0] == 200
                taken = await backbeat(*arguments, *second)
    assert taken.returncode == 1
    assert f"cannot listen on 127.0.0.1:{ports[1]}: " in taken.stderr.decode()


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
