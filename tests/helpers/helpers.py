"""What several modules of tests share: waiting, programs, connections, servers and loggers.

pytest puts this folder on the path of imports, so a test module says ``from helpers import until``.
"""

from __future__ import annotations

import functools
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final, ParamSpec

import trio

from backbeat_trio import BackbeatConfig, Metronome, Session
from backbeat_trio._transport.nats import NatsTransport
from backbeat_trio._transport.store import Store
from backbeat_trio.testing import CLUSTER_ID, NatsServer

P = ParamSpec("P")

CLEAN: Final = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(("NATS_", "CHORUS_BACKBEAT_", "XDG_"))
}
"""The environment without what would change the settings of a session or of a command."""


# Waiting.


def guarded(seconds: float) -> Callable[[Callable[P, Awaitable[None]]], Callable[P, Any]]:
    """Have a test that hangs fail, after far longer than it could need."""

    def decorate(test: Callable[P, Awaitable[None]]) -> Callable[P, Awaitable[None]]:
        @functools.wraps(test)
        async def run(*args: P.args, **kwargs: P.kwargs) -> None:
            with trio.fail_after(seconds):
                await test(*args, **kwargs)

        return run

    return decorate


async def until(condition: Callable[[], object], *, within: float = 60.0) -> float:
    """Wait for what no event tells, and return how long it took."""
    begun = trio.current_time()
    with trio.fail_after(within):
        while not condition():
            await trio.sleep(0.005)
    return trio.current_time() - begun


async def degraded(bb: Session, wanted: bool) -> None:
    """Wait until a session is on its own, or until it follows a metronome."""
    await until(lambda: bb.health().local_degradation is wanted)


# Programs.


async def backbeat(
    *arguments: str, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Run a command of ``backbeat`` to its end."""
    with trio.fail_after(60):
        return await trio.run_process(
            [sys.executable, "-m", "backbeat_trio", *arguments],
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            env=CLEAN | dict(env or {}),
        )


class Pulses:
    """`backbeat pulse` processes, by the names that they lead under."""

    def __init__(self, url: str, bpm: float, folder: Path) -> None:
        self._url = url
        self._bpm = bpm
        self._folder = folder
        self._processes: dict[str, trio.Process] = {}
        self._number = 0

    async def start(self, *options: str) -> str:
        """Start one more, and return its name."""
        self._number += 1
        name = f"pulse-{self._number}"
        command = [sys.executable, "-m", "backbeat_trio", "pulse", "-s", self._url, "--id", name]
        command += ["--cluster-id", CLUSTER_ID, "--bpm", f"{self._bpm:g}", *options]
        with Path(self._folder, f"{name}.log").open("wb") as log:
            self._processes[name] = await trio.lowlevel.open_process(command, stderr=log, env=CLEAN)
        return name

    def log(self, name: str) -> str:
        return Path(self._folder, f"{name}.log").read_text()

    def send(self, name: str, number: signal.Signals) -> None:
        self._processes[name].send_signal(number)

    async def kill(self, name: str) -> None:
        process = self._processes.pop(name)
        process.kill()
        await process.wait()

    async def close(self) -> None:
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            await process.wait()


@asynccontextmanager
async def pulsing(url: str, number: int, *, bpm: float = 120.0) -> AsyncGenerator[Pulses, None]:
    """Run some metronomes as processes, which lead the testing kit's cluster by turns."""
    with tempfile.TemporaryDirectory() as folder:
        pulses = Pulses(url, bpm, Path(folder))
        try:
            for _ in range(number):
                await pulses.start()
            yield pulses
        finally:
            with trio.CancelScope(shield=True):
                await pulses.close()


# Connections.


@asynccontextmanager
async def running(**settings: Any) -> AsyncGenerator[NatsTransport, None]:
    """Run a connection, without waiting until it is made."""
    transport = NatsTransport(BackbeatConfig(**{"agent_id": "admin"} | settings))
    async with trio.open_nursery() as nursery:
        await nursery.start(transport.run)
        yield transport
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def connected(**settings: Any) -> AsyncGenerator[NatsTransport, None]:
    """Give a connection of its own, for what no session does."""
    async with running(**settings) as transport:
        await transport.wait_connected()
        yield transport


@asynccontextmanager
async def leading(
    transport: NatsTransport,
    *,
    cluster_id: str = CLUSTER_ID,
    leader_id: str = "pulse-a",
    tempo_bpm: float = 600.0,
    store: Store | None = None,
) -> AsyncGenerator[Metronome, None]:
    """Run a metronome over a connection that somebody else runs."""
    metronome = Metronome(
        transport, cluster_id=cluster_id, leader_id=leader_id, tempo_bpm=tempo_bpm, store=store
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(metronome.run)
        yield metronome
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def leading_at(
    url: str, *, tempo_bpm: float = 600.0, leader_id: str = "pulse-a", **settings: Any
) -> AsyncGenerator[Metronome, None]:
    """Run a metronome over NATS, with a connection of its own."""
    async with (
        connected(nats_url=url, agent_id=leader_id, **settings) as transport,
        leading(transport, leader_id=leader_id, tempo_bpm=tempo_bpm) as metronome,
    ):
        yield metronome


def client_threads() -> list[threading.Thread]:
    """Return the threads in which connections to NATS live at this moment."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("backbeat-nats")]


# Servers.


def pause(server: NatsServer) -> None:
    """Pause a server, and wait until it stands still: the signal alone does not."""
    server.pause()
    os.waitid(os.P_PID, server.pid, os.WSTOPPED | os.WNOWAIT)


def free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@asynccontextmanager
async def clustered(number: int = 3) -> AsyncGenerator[list[NatsServer], None]:
    """Run servers that are one JetStream."""
    ports = free_ports(number)
    routes = ", ".join(f"nats-route://127.0.0.1:{port}" for port in ports)
    servers = [
        NatsServer(
            ["-js"],
            config=f"server_name: s{index}\n"
            f"cluster {{ name: c, listen: 127.0.0.1:{port}, routes: [{routes}] }}\n",
        )
        for index, port in enumerate(ports)
    ]
    async with AsyncExitStack() as stack:
        for server in servers:
            await stack.enter_async_context(server)
        yield servers


@asynccontextmanager
async def fake_server(
    *, farewell: bytes = b"", **info: Any
) -> AsyncGenerator[tuple[int, bytearray], None]:
    """Run what greets as a server without TLS and lets everybody in, and keep what it is told.

    Args:
      farewell: what it sends once a client has subscribed to something.
      **info: fields of its greeting.
    """
    told = bytearray()
    greeting = {"server_id": "FAKE", "version": "2.15.0", "headers": True, "max_payload": 1048576}
    greeting |= info

    async def serve(stream: trio.SocketStream) -> None:
        try:
            await stream.send_all(b"INFO " + json.dumps(greeting).encode() + b"\r\n")
            async for chunk in stream:
                told.extend(chunk)
                await stream.send_all(b"PONG\r\n" * chunk.count(b"PING\r\n"))
                if farewell and b"SUB " in told:
                    await stream.send_all(farewell)
        except trio.BrokenResourceError:
            # Hung up on, as it deserves.
            pass

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, serve, listeners)
        yield listeners[0].socket.getsockname()[1], told
        nursery.cancel_scope.cancel()


class Link:
    """A TCP proxy before a server: a way that takes some time, and that can be cut and mended.

    Args:
      delay: seconds that each way takes.

    """

    def __init__(self, server: NatsServer, port: int, delay: float) -> None:
        self.url = f"nats://127.0.0.1:{port}"
        self._server = server
        self._delay = delay
        self._whole = True
        self._scopes: set[trio.CancelScope] = set()

    def cut(self) -> None:
        """Hang up on everybody, and let nobody through any more."""
        self._whole = False
        for scope in self._scopes:
            scope.cancel()

    def mend(self) -> None:
        """Let everybody through again."""
        self._whole = True

    async def serve(self, client: trio.SocketStream) -> None:
        with trio.CancelScope() as scope:
            if not self._whole:
                return
            self._scopes.add(scope)
            try:
                async with (
                    await trio.open_tcp_stream("127.0.0.1", self._server.port) as server,
                    trio.open_nursery() as nursery,
                ):
                    nursery.start_soon(self._pass, client, server, scope)
                    nursery.start_soon(self._pass, server, client, scope)
            except OSError:
                # The server is away, and whoever asks for it is told so by hanging up.
                pass
            finally:
                self._scopes.discard(scope)

    async def _pass(
        self, source: trio.SocketStream, sink: trio.SocketStream, scope: trio.CancelScope
    ) -> None:
        send, receive = trio.open_memory_channel[tuple[float, bytes]](math.inf)

        async def deliver() -> None:
            async for due, chunk in receive:
                await trio.sleep_until(due)
                await sink.send_all(chunk)

        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(deliver)
                async for chunk in source:
                    send.send_nowait((trio.current_time() + self._delay, bytes(chunk)))
                send.close()
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        # One of the two has hung up, which the other learns now.
        scope.cancel()


@asynccontextmanager
async def linked(server: NatsServer, *, delay: float = 0.0) -> AsyncGenerator[Link, None]:
    """Run a proxy before a server."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    link = Link(server, listeners[0].socket.getsockname()[1], delay)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, link.serve, listeners)
        yield link
        nursery.cancel_scope.cancel()


# Loggers.


class Lines:
    """A logger that is none of the standard library's, and keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def info(self, msg: object, /, *args: object) -> None:
        self.lines.append(str(msg) % args)

    def lines_with(self, text: str) -> list[str]:
        """Return the lines that contain a text."""
        return [line for line in self.lines if text in line]

    debug = warning = error = info
