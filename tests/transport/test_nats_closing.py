"""Leaving sessions and closing transports over NATS, whatever the server does meanwhile."""

from __future__ import annotations

import logging
import subprocess
import sys
from typing import Final

import helpers
import pytest
import trio
from helpers import client_threads, pause, running, until
from plain import flood

from backbeat_trio import BackbeatConfig, TransportClosed
from backbeat_trio._transport import nats_client as _nats_client
from backbeat_trio._transport.nats import NatsTransport
from backbeat_trio.testing import AGENT_ID, NatsServer, open_session

guarded = helpers.guarded(120)


@guarded
async def test_closing_while_messages_come() -> None:
    async with (
        NatsServer() as server,
        running(nats_url=server.url) as transport,
        transport.open_subscription("flood") as messages,
    ):
        await transport.wait_connected()
        await transport.flush()
        # Trio's loop is stuck meanwhile: when it goes on, the messages are there.
        flood(server, "flood", 2000)
        await transport.aclose()
        received = transport.statistics().received
        for _ in range(20):
            await trio.sleep(0.01)
        assert transport.statistics().received == received
        with pytest.raises(TransportClosed):
            await anext(messages)


@guarded
async def test_closing_at_the_instant_of_connecting(monkeypatch: pytest.MonkeyPatch) -> None:
    async with NatsServer() as server:
        config = BackbeatConfig(nats_url=server.url, agent_id=AGENT_ID)
        transport = NatsTransport(config)

        def connect_and_close(client: _nats_client.Client, max_payload: int) -> None:
            connect(client, max_payload)
            # What `aclose` does up to its first checkpoint.
            closing = transport.aclose()
            closing.send(None)
            closing.close()

        connect = _nats_client.Client._on_connected
        monkeypatch.setattr(_nats_client.Client, "_on_connected", connect_and_close)
        await transport.run()
        assert transport.generation == 0
        assert not transport.connected


@pytest.mark.parametrize("when", ["before", "during", "after"])
@guarded
async def test_closing_twice_and_when_cancelled(when: str) -> None:
    async with NatsServer() as server:
        transport = NatsTransport(BackbeatConfig(nats_url=server.url, agent_id=AGENT_ID))

        async def close() -> None:
            with trio.CancelScope() as scope:
                scope.cancel()
                await transport.aclose()
            assert scope.cancelled_caught
            with pytest.raises(TransportClosed):
                await transport.flush()
            await transport.aclose()

        if when == "before":
            await close()
            with pytest.raises(TransportClosed):
                await transport.run()
        else:
            async with trio.open_nursery() as nursery:
                await nursery.start(transport.run)
                await transport.wait_connected()
                if when == "during":
                    await close()
                else:
                    nursery.cancel_scope.cancel()
            await close()
        assert not client_threads()


@guarded
async def test_thread_ends_with_the_session() -> None:
    async with NatsServer() as server:
        for _ in range(5):
            async with open_session(nats_url=server.url, lock_timeout=0.0) as bb:
                await until(lambda: bb.health().connected)
                assert len(client_threads()) == 1
            assert not client_threads()
            # To be closed is no error.
            assert bb.health().errors == ()
        # While it is still connecting, too.
        async with open_session(nats_url=server.url, lock_timeout=0.0):
            pass
        assert not client_threads()


@guarded
async def test_threads_end_with_sessions_that_never_connect() -> None:
    async with NatsServer() as server:
        server.kill()
        async with open_session(nats_url=server.url, lock_timeout=0.0) as bb:
            await until(lambda: bb.health().errors)
        assert not client_threads()


@guarded
async def test_leaving_with_a_paused_server(caplog: pytest.LogCaptureFixture) -> None:
    async with NatsServer() as server:
        async with open_session(nats_url=server.url, lock_timeout=0.0, grace_period=0.05) as bb:
            await until(lambda: bb.health().connected)
            pause(server)
            bb.start_operation("election", id="unheard")
        assert "1 terminal claims were not delivered" in caplog.text
        # The thread may have been left behind; it ends all the same, while the server is paused.
        for thread in client_threads():
            await trio.to_thread.run_sync(thread.join, abandon_on_cancel=True)
        assert not client_threads()


_PROGRAM: Final = """
import sys
import trio
import backbeat_trio as backbeat

async def main():
    async with backbeat.session(
        nats_url=sys.argv[1], lock_timeout=0.0, grace_period=0.1, require_connection=True
    ) as bb:
        bb.start_operation("election")
        print("in", flush=True)
        await trio.to_thread.run_sync(sys.stdin.readline)
    print("out", flush=True)

trio.run(main)
"""


@pytest.mark.parametrize("fault", ["none", "pause", "kill"])
@guarded
async def test_process_ends_whatever_the_server_does(fault: str) -> None:
    async with NatsServer() as server:
        process = await trio.lowlevel.open_process(
            [sys.executable, "-W", "error", "-c", _PROGRAM, server.url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            said = b""
            while not said.endswith(b"\n"):
                said += await process.stdout.receive_some()
            assert said == b"in\n"
            if fault == "pause":
                pause(server)
            elif fault == "kill":
                server.kill()
            await process.stdin.send_all(b"\n")
            assert b"".join([chunk async for chunk in process.stdout]) == b"out\n"
            complaints = b"".join([chunk async for chunk in process.stderr])
            assert await process.wait() == 0
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()
                for stream in (process.stdin, process.stdout, process.stderr):
                    await stream.aclose()
        lines = complaints.decode().splitlines()
        # Without a handler, logging writes warnings to stderr; nothing else may be there.
        expected = [] if fault == "none" else ["1 terminal claims were not delivered within 0.1 s"]
        lines = [line for line in lines if not line.startswith("connection lost")]
        assert lines == expected, complaints.decode()


@guarded
async def test_grace_period_without_a_server(caplog: pytest.LogCaptureFixture) -> None:
    async with NatsServer() as server:
        server.kill()
        async with open_session(nats_url=server.url, lock_timeout=0.0, grace_period=0.05) as bb:
            bb.start_operation("election", id="completed").complete()
            bb.start_operation("election", id="failed").fail("no peers")
            bb.start_operation("election", id="left")
            assert bb.statistics().claims_pending == 2
        assert bb.statistics().claims_pending == 3
        warnings = [
            record.getMessage() for record in caplog.records if record.levelno == logging.WARNING
        ]
        assert warnings == ["3 terminal claims were not delivered within 0.05 s"]
