"""Connecting to NATS servers: absent ones, silent ones, and connections that do not last."""

from __future__ import annotations

import socket
import sys
import threading
from typing import Any, Final

import helpers
import pytest
import trio
from helpers import client_threads, degraded, leading_at, running, until

from backbeat_trio import TransportBroken
from backbeat_trio._transport import nats as _nats, nats_client as _nats_client
from backbeat_trio._transport.nats import Backoff
from backbeat_trio.testing import NatsServer, open_session

guarded = helpers.guarded(120)


@guarded
async def test_server_that_is_absent_at_first() -> None:
    async with NatsServer() as server:
        server.kill()
        async with open_session(nats_url=server.url, lock_timeout=0.0, tempo_bpm=600.0) as bb:
            health = bb.health()
            assert health.started
            assert not health.connected
            assert health.local_degradation
            # Budgets are enforced all the same.
            with bb.move_on_after(2) as scope:
                await trio.sleep_forever()
            assert scope.cancelled_caught
            await server.start()
            await until(lambda: bb.health().connected)
            assert bb.health().reconnect_count == 0
            async with leading_at(server.url):
                await degraded(bb, False)
                assert bb.statistics().locks == 1


@guarded
async def test_absent_server_where_a_connection_is_required() -> None:
    async with NatsServer() as server:
        server.kill()
        with pytest.raises(TransportBroken, match=str(server.port)) as caught:
            async with open_session(nats_url=server.url, require_connection=True):
                pytest.fail("the session was entered")
        assert type(caught.value) is TransportBroken


@guarded
async def test_required_connection_may_be_to_any_server() -> None:
    async with NatsServer() as absent, NatsServer() as server:
        absent.kill()
        url = f"{absent.url},{server.url}"
        async with open_session(nats_url=url, require_connection=True, lock_timeout=0.0) as bb:
            assert bb.health().connected
            assert bb.health().reconnect_count == 0


@guarded
async def test_server_that_never_says_a_word() -> None:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, lambda stream: trio.sleep_forever(), listeners)
        with pytest.raises(TransportBroken, match=str(port)):
            async with open_session(
                nats_url=f"nats://127.0.0.1:{port}", connect_timeout=0.1, require_connection=True
            ):
                pytest.fail("the session was entered")
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "words", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"INFO {\r\n", b"\x00\xff\r\n", b""]
)
@guarded
async def test_server_that_speaks_something_else(words: bytes) -> None:
    async def serve(stream: trio.SocketStream) -> None:
        await stream.send_all(words)
        await stream.aclose()

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, serve, listeners)
        with pytest.raises(TransportBroken, match=str(port)):
            async with open_session(nats_url=f"nats://127.0.0.1:{port}", require_connection=True):
                pytest.fail("the session was entered")
        nursery.cancel_scope.cancel()


# Connections that do not last.


@guarded
async def test_server_that_drops_each_connection_at_once_is_not_pestered() -> None:
    async with (
        NatsServer(config="max_subscriptions: 2") as server,
        running(nats_url=server.url) as transport,
        transport.open_subscription("a"),
        transport.open_subscription("b"),
        transport.open_subscription("c"),
    ):
        await until(lambda: transport.generation >= 2)
        await trio.sleep(3)
        # Without waiting in between there would be hundreds.
        assert transport.generation < 30
        assert len(client_threads()) <= 3


def test_waits_before_attempts_grow_with_failures_and_with_connections_that_do_not_last() -> None:
    backoff = Backoff()
    assert [backoff.next_delay() for _ in range(9)] == [
        *(0.01 * 2**number for number in range(7)),
        1.0,
        1.0,
    ]
    # Each is used for a moment only, and then an attempt fails.
    for first in (0.02, 0.04, 0.08):
        backoff.lost(lasted=0.05)
        assert backoff.next_delay() == first
        assert backoff.next_delay() == 2 * first
    for _ in range(10):
        backoff.lost(lasted=0.05)
    assert backoff.next_delay() == 1.0
    backoff.lost(lasted=3.0)
    assert backoff.next_delay() == 0.01


@guarded
async def test_clients_whose_threads_do_not_end_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()

    def leave_late(portal_cm: Any) -> None:
        released.wait()
        leave(portal_cm)

    leave = _nats_client._leave
    monkeypatch.setattr(_nats_client, "_leave", leave_late)
    monkeypatch.setattr(_nats, "_BACKOFF_MAX", 0.02)
    try:
        async with NatsServer() as server:
            server.kill()
            async with running(nats_url=server.url) as transport:
                await until(lambda: len(client_threads()) >= _nats._UNENDED_CLIENTS)
                await trio.sleep(1)
                assert len(client_threads()) == _nats._UNENDED_CLIENTS
                # As soon as one has ended, there are attempts again.
                released.set()
                await server.start()
                await transport.wait_connected()
                released.clear()
                await until(lambda: len(client_threads()) == 1)
                server.kill()
                await until(lambda: len(client_threads()) >= _nats._UNENDED_CLIENTS)
        # The one that waited for room was left in time.
        assert len(client_threads()) == _nats._UNENDED_CLIENTS
    finally:
        released.set()


_NO_NAMES: Final = """
import socket, threading, time
import trio
import backbeat_trio as backbeat

def hang(host, *args, **kwargs):
    assert host == "nats.example.org", host
    threading.Event().wait(60)

socket.getaddrinfo = hang

async def main():
    most = 0
    async with backbeat.session(
        nats_url="nats://nats.example.org:4222", connect_timeout=0.05, lock_timeout=0.0
    ):
        for _ in range(150):
            await trio.sleep(0.02)
            most = max(most, threading.active_count())
    print(most, flush=True)

trio.run(main)
"""


@guarded
async def test_name_server_that_hangs_costs_few_threads_and_delays_no_exit() -> None:
    with trio.fail_after(15):
        done = await trio.run_process(
            [sys.executable, "-W", "error", "-c", _NO_NAMES],
            capture_stdout=True,
            capture_stderr=True,
        )
    # Without a handler, logging writes warnings to stderr; nothing else may be there.
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith("not connected: no answer from nats://nats.example.org:4222 in time; ")
    assert int(done.stdout) <= 8


@guarded
async def test_name_that_is_looked_up_and_one_that_does_not_exist(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def look_up(host: str, *args: Any) -> Any:
        if host == "other.example.org":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        assert host == "nats.example.org"
        return genuine("127.0.0.1", *args)

    genuine = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    async with NatsServer() as server:
        async with running(nats_url=f"nats://nats.example.org:{server.port}") as transport:
            await transport.wait_connected()
        async with running(nats_url=f"nats://other.example.org:{server.port}") as transport:
            with pytest.raises(TransportBroken, match="Name or service not known"):
                await transport.first_attempt()
