"""What asyncio and nats-py complain of never reaches stderr."""

from __future__ import annotations

import gc
import logging
import sys
from typing import Final

import helpers
import pytest
import trio
from certificates import Certificates
from helpers import running

from backbeat_trio._transport import nats as _nats, nats_client as _nats_client
from backbeat_trio.testing import NatsServer

guarded = helpers.guarded(120)


@guarded
async def test_losing_connections_leaves_no_complaint_of_asyncio(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "backbeat_trio")
    # Looked after all the time, so that each loss falls into the middle of it.
    monkeypatch.setattr(_nats_client, "_PING_EVERY", 0.0002)
    monkeypatch.setattr(_nats, "_LASTING", 0)
    async with NatsServer() as server, running(nats_url=server.url) as transport:
        for _ in range(20):
            await transport.wait_connected()
            server.kill()
            await transport.wait_connected(False)
            await server.start()
    # What nobody has looked at is told of when it is collected.
    gc.collect()
    assert [message for message in caplog.messages if message.startswith("asyncio")] == []


_COMPLAINTS: Final = """
import asyncio, gc, logging, sys
import trio
from nats.aio import client as nats_client
from backbeat_trio import BackbeatConfig
from backbeat_trio._transport.nats import NatsTransport

kept = []

async def provoke(client):
    async def fail():
        raise ValueError("nobody looks at this")

    def fail_at_once(secret):
        raise ValueError("nor at this")

    loop = asyncio.get_running_loop()
    tasks = [asyncio.ensure_future(fail())]
    loop.call_soon(fail_at_once, "s3cr3t")
    asyncio.ensure_future(asyncio.Event().wait())
    await asyncio.sleep(0.01)
    kept.append(tasks.pop())
    gc.collect()
    asyncio.log.logger.warning("socket.send() raised exception.")
    nats_client._logger.error("nats: encountered error")

async def main():
    transport = NatsTransport(BackbeatConfig(nats_url=sys.argv[1], agent_id="a"))
    async with trio.open_nursery() as nursery:
        await nursery.start(transport.run)
        await transport.wait_connected()
        await transport.call(provoke)
        nursery.cancel_scope.cancel()

if sys.argv[2] == "debug":
    logging.basicConfig(format="%(levelname)s:%(name)s:%(message)s", stream=sys.stdout)
    logging.getLogger("backbeat_trio").setLevel(logging.DEBUG)
trio.run(main)
# This one is collected in another thread, when its loop has ended.
kept.clear()
gc.collect()
"""


async def complaints_of(program: str, *arguments: str) -> tuple[str, str]:
    """Run a program to its end, and return what it wrote to stdout and to stderr."""
    done = await trio.run_process(
        [sys.executable, "-W", "error", "-c", program, *arguments],
        capture_stdout=True,
        capture_stderr=True,
    )
    return done.stdout.decode(), done.stderr.decode()


@guarded
async def test_what_asyncio_and_nats_py_complain_of_goes_to_our_log_only() -> None:
    async with NatsServer() as server:
        assert await complaints_of(_COMPLAINTS, server.url, "silent") == ("", "")
        log, complaints = await complaints_of(_COMPLAINTS, server.url, "debug")
    assert complaints == ""
    for text in (
        "Task exception was never retrieved",
        "Task was destroyed but it is pending!",
        "Exception in callback",
        "socket.send() raised exception.",
        "nats: encountered error",
        "nobody looks at this",
        "nor at this",
    ):
        assert text in log
    lines = [line for line in log.splitlines() if "DEBUG" in line or "ERROR:" in line]
    assert len(lines) >= 5
    assert all(line.startswith("DEBUG:backbeat_trio:") for line in lines)
    assert "s3cr3t" not in log


_KILLS: Final = """
import random, sys
import trio
from backbeat_trio import BackbeatConfig, TransportBroken
from backbeat_trio._transport.nats import NatsTransport
from backbeat_trio.nats_server import NatsServer

async def use(transport, how):
    while True:
        try:
            if how == "flush":
                await transport.flush()
            else:
                await transport.publish("a", b"x" * 10_000)
            await trio.sleep(0)
        except TransportBroken:
            # A loop that never sleeps would keep the client's thread from connecting again.
            await trio.sleep(0.001)

async def main(scheme, ca, settings):
    async with NatsServer(config=settings) as server:
        url = f"{scheme}://127.0.0.1:{server.port}"
        transport = NatsTransport(BackbeatConfig(nats_url=url, agent_id="a", tls_ca=ca or None))
        async with trio.open_nursery() as nursery:
            await nursery.start(transport.run)
            for how in ("flush", "flush", "flush", "publish"):
                nursery.start_soon(use, transport, how)
            async with transport.open_subscription("a"):
                for _ in range(20):
                    await transport.wait_connected()
                    await trio.sleep(random.uniform(0, 0.06))
                    server.kill()
                    await transport.wait_connected(False)
                    await server.start()
            nursery.cancel_scope.cancel()

# Waiting longer and longer between connections is tested elsewhere.
sys.modules["backbeat_trio._transport.nats"]._LASTING = 0
trio.run(main, *sys.argv[1:])
"""


@pytest.mark.parametrize("scheme", ["nats", "tls"])
@guarded
async def test_server_killed_at_any_instant_leaves_stderr_empty(
    scheme: str, certificates: Certificates
) -> None:
    ca, config = (certificates.ca, certificates.config()) if scheme == "tls" else ("", "")
    assert await complaints_of(_KILLS, scheme, ca, config) == ("", "")
