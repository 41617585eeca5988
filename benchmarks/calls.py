"""Requests and services beside nats-py's own: the processes, and the benchmarks that run them.

Each side is a process of its own, on the same server. Both sides of a ratio take turns.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from statistics import median
from typing import Any, Final

import msgspec
import nats
import nats.micro
import trio
from nats.aio.msg import Msg
from nats.micro.request import Request as MicroRequest
from peers import Peer, Ready, open_peer, say
from report import Figure, Outcome, Rounds

import backbeat_trio as backbeat
from backbeat_trio.testing import CLUSTER_ID, NatsServer

PAYLOAD: Final = b"x" * 100
WIDTH: Final = 256
"""How many callers ask side by side."""
SUBJECT: Final = "bench.calls"


class Asked(msgspec.Struct):
    """What a caller says at the end of a round."""

    latency: float
    """Seconds from a request to its answer, at the median."""
    rate: float
    """Answers a second."""


def _asked(latencies: list[float], begin: float) -> Asked:
    return Asked(median(latencies), len(latencies) / (time.perf_counter() - begin))


async def ask(url: str, subject: str, width: str, count: str) -> None:
    """Send so many requests in each round, with nats-py, so many side by side."""
    client = await nats.connect(url)
    latencies: list[float] = []

    async def call() -> None:
        for _ in range(int(count) // int(width)):
            begin = time.perf_counter()
            answer = await client.request(subject, PAYLOAD, timeout=60)
            latencies.append(time.perf_counter() - begin)
            assert answer.data == PAYLOAD

    say(Ready())
    while await asyncio.to_thread(sys.stdin.readline):
        latencies.clear()
        begin = time.perf_counter()
        await asyncio.gather(*(call() for _ in range(int(width))))
        say(_asked(latencies, begin))
    await client.close()


async def echo(url: str, subject: str) -> None:
    """Answer requests with what they hold, with nats-py."""
    client = await nats.connect(url)

    async def answer(message: Msg) -> None:
        # `message.respond` would also send the headers back, which only one side has.
        await client.publish(message.reply, message.data)

    await client.subscribe(subject, cb=answer)
    await client.flush()
    say(Ready())
    await asyncio.to_thread(sys.stdin.read)


async def micro(url: str, subject: str, seconds: str) -> None:
    """Serve requests with nats-py's framework for services; each takes so many seconds."""
    client = await nats.connect(url)

    async def handle(request: MicroRequest) -> None:
        if float(seconds):
            await asyncio.sleep(float(seconds))
        await request.respond(request.data)

    service = await nats.micro.add_service(
        client, name="bench", version="1.0.0", description="of the benchmark"
    )
    await service.add_endpoint(name="bench", subject=subject, handler=handle)
    await client.flush()
    say(Ready())
    await asyncio.to_thread(sys.stdin.read)


@asynccontextmanager
async def _joined(url: str) -> AsyncGenerator[backbeat.Session, None]:
    async with backbeat.session(
        backbeat.BackbeatConfig(
            nats_url=url,
            cluster_id=CLUSTER_ID,
            agent_id="bench",
            lock_timeout=0.0,
            require_connection=True,
        )
    ) as bb:
        yield bb


async def _read_line() -> str:
    return await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True)


async def ask_within_budgets(url: str, subject: str, width: str, count: str) -> None:
    """Send so many requests in each round, with a session, within a deadline for each caller."""
    latencies: list[float] = []
    async with _joined(url) as bb:

        async def call() -> None:
            with bb.fail_after(100):
                for _ in range(int(count) // int(width)):
                    begin = time.perf_counter()
                    answer = await bb.request(subject, PAYLOAD)
                    latencies.append(time.perf_counter() - begin)
                    assert answer.data == PAYLOAD

        say(Ready())
        while await _read_line():
            latencies.clear()
            begin = time.perf_counter()
            async with trio.open_nursery() as nursery:
                for _ in range(int(width)):
                    nursery.start_soon(call)
            say(_asked(latencies, begin))


async def serve(url: str, subject: str, seconds: str) -> None:
    """Serve requests with a session; each takes so many seconds."""

    async def handle(request: backbeat.Request) -> bytes:
        if float(seconds):
            await trio.sleep(float(seconds))
        return request.data

    async with (
        _joined(url) as bb,
        bb.open_service("bench", version="1.0.0") as service,
        trio.open_nursery() as nursery,
    ):
        await nursery.start(service.serve, subject, handle)
        say(Ready())
        while await _read_line():
            pass
        nursery.cancel_scope.cancel()


async def _alternate(
    ours: Peer, theirs: Peer, rounds: int
) -> AsyncGenerator[tuple[Asked, Asked], None]:
    for number in range(rounds + 1):
        found: dict[bool, Asked] = {}
        # In turns, so that neither always comes second.
        for is_ours in (True, False) if number % 2 else (False, True):
            peer = ours if is_ours else theirs
            await peer.go()
            found[is_ours] = await peer.read(Asked)
        if number:
            # The first round opens what is opened once.
            yield found[True], found[False]


async def bench_requests(rounds: int, count: int) -> Outcome:
    """Measure requests with a deadline beside nats-py's own, both to the same responder."""
    values: Rounds = {}
    figures: list[Figure] = []
    async with NatsServer() as server, open_peer("echo", server.url, SUBJECT, script=__file__):
        for name, width in (("request", 1), ("requests", WIDTH)):
            options = (server.url, SUBJECT, str(width), str(max(count, width)))
            ours_s, theirs_s = values[f"{name}_s"], values[f"{name}_nats_s"] = [], []
            async with (
                open_peer("ask-within-budgets", *options, script=__file__) as ours,
                open_peer("ask", *options, script=__file__) as theirs,
            ):
                async for our, their in _alternate(ours, theirs, rounds):
                    ours_s.append(our.latency)
                    theirs_s.append(their.latency)
            ratios = [our / their for our, their in zip(ours_s, theirs_s, strict=True)]
            values[f"{name}_ratio"] = ratios
            note = f"{median(ours_s) * 1e3:.2f} ms against {median(theirs_s) * 1e3:.2f} ms"
            figures.append(Figure(name, median(ratios), note))
    return figures, values


async def bench_serving(rounds: int, count: int) -> Outcome:
    """Measure a service beside one of nats-py's framework, with the same callers."""
    values: Rounds = {}
    figures: list[Figure] = []
    for name, seconds, share in (("serving", 0.0, 1.0), ("serving_wait", 0.005, 0.05)):
        number = max(round(count * share), WIDTH)
        async with NatsServer() as server, AsyncExitStack() as stack:
            callers: list[Peer] = []
            for role in ("serve", "micro"):
                subject = f"{SUBJECT}.{role}"
                options = (server.url, subject)
                await stack.enter_async_context(
                    open_peer(role, *options, str(seconds), script=__file__)
                )
                caller = await stack.enter_async_context(
                    open_peer("ask", *options, str(WIDTH), str(number), script=__file__)
                )
                callers.append(caller)
            ours_rates, theirs_rates = values[f"{name}_rate"], values[f"{name}_nats_rate"] = [], []
            async for our, their in _alternate(callers[0], callers[1], rounds):
                ours_rates.append(our.rate)
                theirs_rates.append(their.rate)
        ratios = [our / their for our, their in zip(ours_rates, theirs_rates, strict=True)]
        values[f"{name}_ratio"] = ratios
        note = f"{median(ours_rates):,.0f}/s against {median(theirs_rates):,.0f}/s"
        figures.append(Figure(name, median(ratios), note))
    return figures, values


def _run_asyncio(role: Callable[..., Coroutine[Any, Any, None]], *arguments: str) -> None:
    asyncio.run(role(*arguments))


# What runs each role.
_ROLES: Final[dict[str, tuple[Callable[..., Any], Callable[..., Any]]]] = {
    "ask": (_run_asyncio, ask),
    "echo": (_run_asyncio, echo),
    "micro": (_run_asyncio, micro),
    "ask-within-budgets": (trio.run, ask_within_budgets),
    "serve": (trio.run, serve),
}

if __name__ == "__main__":
    runner, role = _ROLES[sys.argv[1]]
    runner(role, *sys.argv[2:])
