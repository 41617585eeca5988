"""``backbeat claims``."""

from __future__ import annotations

import json
import signal

import trio
from helpers import backbeat, until

from backbeat_trio import StatusClaim
from backbeat_trio._cli.claims import format_claim
from backbeat_trio.testing import NatsServer, open_session

from .programs import cluster, line_with, program


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
    line = format_claim(claim)
    assert line.isprintable()
    assert "t?[2J" in line


async def test_stored_claims_of_failures_come_first() -> None:
    async with NatsServer(["-js"]) as server:
        async with open_session(
            nats_url=server.url, agent_id="agent-1", cluster_id="chorus-production"
        ) as bb:
            for number in range(3):
                bb.start_operation("election", id=f"well-{number}").complete()
                bb.start_operation("election", id=f"badly-{number}").fail("no quorum")
            await until(lambda: bb.statistics().claims_stored == 6)
        done = await backbeat(
            *("claims", "--since", "1h", "--failed", "--count", "3", "--json", "-s", server.url)
        )
        assert done.returncode == 0, done.stderr
        claims = [json.loads(line) for line in done.stdout.splitlines()]
        assert [claim["task_id"] for claim in claims] == [f"badly-{n}" for n in range(3)]
        done = await backbeat(
            "claims", "agent-1", "--since", "1h", "--count", "6", "-s", server.url
        )
        assert len(done.stdout.splitlines()) == 6
        assert b"no quorum" in done.stdout
    async with cluster() as url:
        done = await backbeat("claims", "--since", "1h", "-s", url)
        assert done.returncode == 1
        assert done.stderr.startswith(b"backbeat: ")
        assert b"JetStream" in done.stderr


async def test_claims_of_other_clusters_are_shown_if_asked_for() -> None:
    async with NatsServer(["-js"]) as server:
        for cluster_id in ("chorus-production", "another"):
            async with open_session(
                nats_url=server.url, agent_id="agent-1", cluster_id=cluster_id
            ) as bb:
                bb.start_operation("election", id=cluster_id).complete()
                await until(lambda bb=bb: bb.statistics().claims_stored == 1)  # type: ignore[misc]
        shown = []
        for flags in (["--count", "1"], ["--count", "2", "--all-clusters"]):
            done = await backbeat("claims", "--since", "1h", "--json", "-s", server.url, *flags)
            assert done.returncode == 0, done.stderr
            shown.append([json.loads(line)["task_id"] for line in done.stdout.splitlines()])
        assert shown == [["chorus-production"], ["chorus-production", "another"]]
