"""Measure the dashboard's server: how soon a claim is on the page, and what many streams cost.

Run it as ``python benchmarks/dashboard.py [--quick] [--json PATH] [--only NAME ...]``. It needs the
extra ``dashboard``. The clients of many streams run in a process of their own.
"""

from __future__ import annotations

import logging
import selectors
import socket
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

import trio
from report import Figure, Outcome, Target, percentile, run

from backbeat_trio import Phase, Session
from backbeat_trio._views.access import Access
from backbeat_trio._views.dashboard import serve_dashboard
from backbeat_trio._views.server import bind
from backbeat_trio.testing import CLUSTER_ID, NatsServer, open_session

FOLDER: Final = Path(__file__).parent
HOST: Final = "127.0.0.1"
INTERVAL: Final = 0.25
OPERATIONS: Final = 1000
TICK: Final = 0.01

TARGETS: Final = {
    "shown": Target("claim to its change on the stream, beyond the interval, p95", "≤", 100, "ms"),
    "streams": Target("200 event streams at 4 updates a second, of a core", "≤", 20, "%"),
    "late": Target("lateness of Trio's loop meanwhile, p99", "≤", 5, "ms"),
}


class Sizes(NamedTuple):
    """How much to measure."""

    changes: int
    streams: int
    seconds: float


FULL: Final = Sizes(100, 200, 20.0)
QUICK: Final = Sizes(5, 20, 2.0)


@asynccontextmanager
async def serving() -> AsyncGenerator[tuple[str, int], None]:
    """Serve the dashboard of a cluster on NATS, and give the URL of NATS and the port."""
    async with NatsServer() as server, trio.open_nursery() as nursery:
        pulse = [sys.executable, "-m", "backbeat_trio", "pulse", "-s", server.url, "--bpm", "60"]
        pulse += ["--cluster-id", CLUSTER_ID]
        nursery.start_soon(partial(trio.run_process, pulse, check=False, stderr=-3))
        async with open_agent(server.url, "watcher") as bb, trio.open_nursery() as servers:
            listener = bind(HOST, 0)
            await servers.start(serve_dashboard, bb, Access(), listener)
            yield server.url, listener.getsockname()[1]
            servers.cancel_scope.cancel()
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def open_agent(url: str, name: str, operations: int = 0) -> AsyncGenerator[Session, None]:
    async with open_session(nats_url=url, agent_id=name, lock_timeout=30.0) as agent:
        for number in range(operations):
            agent.start_operation("search", id=f"search-{number:04}", beats=1000)
        yield agent


def request(query: str) -> bytes:
    return f"GET /api/v1/events?{query} HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode()


async def bench_shown(sizes: Sizes) -> Outcome:
    """Change the phase of an operation, and wait until a stream tells it."""
    times: list[float] = []
    async with serving() as (url, port), open_agent(url, "agent", OPERATIONS) as agent:
        stream = await trio.open_tcp_stream(HOST, port)
        await stream.send_all(request("text=probe&sort=id"))
        for number in range(sizes.changes):
            name = f"probe-{number}"
            operation = agent.start_operation("probe", id=name, beats=10)
            await _read_until(stream, f'"id":"{name}"'.encode())
            # At all points of the interval alike.
            await trio.sleep(INTERVAL * (number % 10) / 10)
            begun = time.perf_counter()
            operation.advance(Phase.NEGOTIATING)
            await _read_until(stream, b'"phase":"negotiating"')
            times.append(time.perf_counter() - begun)
            operation.complete()
            await _read_until(stream, b'"phase":"completed"')
        await stream.aclose()
    beyond = [max(0.0, seconds - INTERVAL) for seconds in times]
    p50, p95 = (percentile(times, share) * 1e3 for share in (0.5, 0.95))
    note = f"with it: p50 {p50:.0f} ms, p95 {p95:.0f} ms"
    return [Figure("shown", percentile(beyond, 0.95) * 1e3, note)], {"seconds": times}


async def _read_until(stream: trio.SocketStream, text: bytes) -> None:
    heard = b""
    while text not in heard:
        data = await stream.receive_some()
        if not data:
            raise RuntimeError("the dashboard closed the stream")
        heard = heard[-len(text) :] + data


async def bench_streams(sizes: Sizes) -> Outcome:
    """Have many clients follow, and look at what it costs here."""
    late: list[float] = []

    async def watch() -> None:
        while True:
            due = trio.current_time() + TICK
            await trio.sleep_until(due)
            late.append(trio.current_time() - due)

    async with serving() as (url, port), trio.open_nursery() as nursery:
        code = f"import dashboard, trio; trio.run(dashboard.work, {url!r})"
        agent = [sys.executable, "-c", code]
        nursery.start_soon(partial(trio.run_process, agent, cwd=FOLDER, check=False))
        nursery.start_soon(watch)
        await trio.sleep(5)
        late.clear()
        await trio.sleep(sizes.seconds / 4)
        alone = percentile(late, 0.99) * 1e3
        code = f"import dashboard; dashboard.drain({port}, {sizes.streams})"
        clients = await trio.lowlevel.open_process(
            [sys.executable, "-c", code], cwd=FOLDER, stdout=-1, stdin=-1
        )
        assert clients.stdout is not None
        assert clients.stdin is not None
        await clients.stdout.receive_some()
        await trio.sleep(1)
        late.clear()
        cpu, begun = time.process_time(), time.perf_counter()
        await trio.sleep(sizes.seconds)
        cpu, elapsed = time.process_time() - cpu, time.perf_counter() - begun
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await clients.stdin.aclose()
            heard = await clients.stdout.receive_some()
            await clients.wait()
    events, size = map(int, heard.split())
    rate = events / sizes.streams / (elapsed + 1)
    note = f"{rate:.1f} updates a second for each, of {size / max(1, events) / 1e3:.1f} kB"
    return [
        Figure("streams", 100 * cpu / elapsed, note),
        Figure("late", percentile(late, 0.99) * 1e3, f"without streams {alone:.1f} ms"),
    ], {"lateness_s": late}


async def work(url: str) -> None:
    """Be an agent with live operations, of which some begin and end all the time."""
    async with open_agent(url, "agent", OPERATIONS) as agent:
        while True:
            agent.start_operation("short", beats=2).complete()
            await trio.sleep(INTERVAL / 2)


def drain(port: int, count: int) -> None:
    """Read so many streams until stdin ends, and print how many events and bytes came."""
    selector = selectors.DefaultSelector()
    for _ in range(count):
        client = socket.create_connection((HOST, port))
        client.sendall(request("limit=40&agents_limit=25"))
        selector.register(client, selectors.EVENT_READ)
    selector.register(sys.stdin.buffer, selectors.EVENT_READ)
    print("ready", flush=True)
    events = size = 0
    while True:
        for key, _ in selector.select():
            if not isinstance(key.fileobj, socket.socket):
                print(events, size, flush=True)
                return
            data = key.fileobj.recv(1 << 20)
            events += data.count(b"\ndata: ")
            size += len(data)


BENCHMARKS: Final[dict[str, Callable[[Sizes], Awaitable[Outcome]]]] = {
    "shown": bench_shown,
    "streams": bench_streams,
}


def main() -> None:
    logging.getLogger("backbeat_trio").setLevel(logging.ERROR)
    run("dashboard", "Measure the dashboard.", BENCHMARKS, TARGETS, full=FULL, quick=QUICK)


if __name__ == "__main__":
    main()
