"""A small cluster for the dashboard's page: a server, two metronomes and agents at work.

``python tests/helpers/page_cluster.py`` prints the address of its nats-server, and runs until its
standard input is closed. With ``--hostile`` some agents claim what should break a page, and with
``--slow`` the beat is one that a busy machine keeps to well.
"""

from __future__ import annotations

import json
import random
import sys
from contextlib import AsyncExitStack, suppress
from functools import partial
from typing import Final

import trio

import backbeat_trio as backbeat
from backbeat_trio.nats_server import NatsServer

CLUSTER: Final = "chorus-production"
BPM: Final = 120.0
SLOW_BPM: Final = 20.0
AGENTS: Final = 8
LATE: Final = "election-leader-2025"
STUCK: Final = "index-rebuild"
SILENT: Final = "chorus-99"

# Each of them sets `pwned` if any part of it is run.
HOSTILE: Final = (
    "<script>window.pwned=1</script>",
    "<img src=x onerror=window.pwned=1>",
    "a/b?c=d#e%2f'\"&amp;",
)
OVERRIDE: Final = "invoice\u202egnp.exe"

_WORK: Final = (
    ("election", 10),
    ("dht_store", 4),
    ("dht_retrieve", 3),
    ("pubsub_sync", 2),
    ("peer_discovery", 5),
    ("task_coordination", 20),
)


async def churn(bb: backbeat.Session, dice: random.Random) -> None:
    """Run one operation after the other: most end early, some late, and few fail."""
    while True:
        kind, estimate = dice.choice(_WORK)
        share = 1.6 if dice.random() < 0.03 else dice.uniform(0.3, 0.95)
        try:
            async with bb.operation(kind, beats=estimate, soft_after=0.8 * estimate) as operation:
                for phase in (backbeat.Phase.CONNECTING, backbeat.Phase.EXECUTING):
                    operation.advance(phase, peers=dice.randrange(2, 9))
                    await bb.sleep(estimate * share / 2)
                if dice.random() < 0.04:
                    raise ConnectionError("the peer went away")
        except ConnectionError:
            continue


async def endless(
    bb: backbeat.Session, kind: str, id: str, beats: int, parts: tuple[str, ...] = ()
) -> None:
    """Run an operation that ends by being cancelled only, with one inside it for each part."""
    with suppress(backbeat.OperationCancelled):
        async with bb.operation(kind, id=id, beats=beats, cancellable=True) as operation:
            operation.advance(backbeat.Phase.EXECUTING, peers=3)
            async with trio.open_nursery() as nursery:
                for part in parts:
                    nursery.start_soon(endless, bb, "dht_store", part, 4000)
                await trio.sleep_forever()


async def agent(url: str, number: int, *, hostile: bool) -> None:
    """Run an agent."""
    dice = random.Random(number)
    async with (
        backbeat.session(
            nats_url=url, cluster_id=CLUSTER, agent_id=f"chorus-{number:02}", lock_timeout=60
        ) as bb,
        trio.open_nursery() as nursery,
    ):
        for _ in range(4):
            nursery.start_soon(churn, bb, dice)
        if number == 3:
            nursery.start_soon(endless, bb, "election", LATE, 6)
        if number == 5:
            parts = ("shard-1", "shard-2")
            nursery.start_soon(endless, bb, "task_coordination", STUCK, 4, parts)
        if number == 6 and hostile:
            for name in (*HOSTILE, OVERRIDE):
                nursery.start_soon(endless, bb, f"<b>{name[:8]}</b>", name, 4000)


async def claim_once(url: str) -> None:
    """Publish a claim that no session would make, of an agent that falls silent after it."""
    claim = {
        "type": "backbeat.statusclaim.v1",
        "agent_id": SILENT,
        "task_id": HOSTILE[1],
        "beat_index": 1,
        "state": "executing",
        "beats_left": 4000,
        "progress": 0.0,
        "notes": HOSTILE[1] * 5000,
        "cluster_id": CLUSTER,
        "operation_type": HOSTILE[0],
        "phase": HOSTILE[0],
        "estimated_beats": 4000,
    }
    body = json.dumps(claim).encode()
    port = int(url.rpartition(":")[2])
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        message = b"PUB backbeat.status.%s %d\r\n%s\r\nPING\r\n" % (
            SILENT.encode(),
            len(body),
            body,
        )
        await stream.send_all(b"CONNECT {}\r\n" + message)
        answer = b""
        while b"PONG" not in answer:
            answer += await stream.receive_some(4096)


async def main(*, hostile: bool, bpm: float) -> None:
    """Run the cluster until standard input is closed."""
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(NatsServer(("-js",)))
        nursery = await stack.enter_async_context(trio.open_nursery())
        for name in ("pulse-a", "pulse-b"):
            command = [sys.executable, "-m", "backbeat_trio", "pulse", "-s", server.url]
            command += ["--cluster-id", CLUSTER, "--bpm", f"{bpm:g}", "--id", name]
            nursery.start_soon(partial(trio.run_process, command))
        for number in range(1, AGENTS + 1):
            nursery.start_soon(partial(agent, server.url, number, hostile=hostile))
        print(server.url, flush=True)
        async for line in trio.wrap_file(sys.stdin):
            if line == "claim\n":
                await claim_once(server.url)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    bpm = SLOW_BPM if "--slow" in sys.argv else BPM
    trio.run(partial(main, hostile="--hostile" in sys.argv, bpm=bpm))
