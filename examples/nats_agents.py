"""Two agents that share one metronome over a real nats-server.

If it gets a URL as its argument, it uses that server, which must have a metronome. Otherwise it
starts both. ``pip install 'backbeat-trio[server]'`` installs a nats-server.
"""

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

import backbeat_trio as backbeat
from backbeat_trio.nats_server import NatsServer


@asynccontextmanager
async def cluster() -> AsyncIterator[str]:
    """Yield the URL of a server that has a metronome."""
    if len(sys.argv) > 1:
        yield sys.argv[1]
        return
    async with NatsServer() as server:
        command = [sys.executable, "-m", "backbeat_trio", "pulse", "-s", server.url, "--bpm", "240"]
        async with trio.open_nursery() as nursery:
            await nursery.start(trio.run_process, command)
            yield server.url
            nursery.cancel_scope.cancel()


async def voter(url: str, *, task_status: trio.TaskStatus[None]) -> None:
    """Print a vote for every election that the candidate reports."""
    async with backbeat.session(nats_url=url, agent_id="voter") as bb, bb.open_claims() as claims:
        task_status.started()
        async for claim in claims:
            if claim.agent_id == "candidate" and claim.state == "executing":
                print(
                    f"voter:     beat {bb.current_beat()}, {claim.notes}, {claim.beats_left} left"
                )


async def candidate(url: str) -> None:
    """Run an election of four beats."""
    async with backbeat.session(nats_url=url, agent_id="candidate", lock_timeout=10) as bb:
        async with bb.operation("election", beats=4) as op:
            for phase in (backbeat.Phase.CONNECTING, backbeat.Phase.EXECUTING):
                op.advance(phase, peers=1)
                await bb.sleep(2)
        health = bb.health()
        print(f"candidate: elected on beat {health.current_beat} at {health.current_tempo:g} BPM")
        assert health.connected
        assert bb.statistics().frames > 0


async def main() -> None:
    async with cluster() as url, trio.open_nursery() as nursery:
        await nursery.start(voter, url)
        await candidate(url)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main)
