"""NATS servers that die or stand still, and connections that are cut."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress

import helpers
import msgspec
import nats.aio.client
import pytest
import trio
from helpers import degraded, fake_server, leading_at, pause, running, until
from plain import plain_client

from backbeat_trio import StatusClaim, TransportBroken
from backbeat_trio.testing import NatsServer, open_recorder, open_session

guarded = helpers.guarded(120)


@guarded
async def test_killed_server_that_comes_back(caplog: pytest.LogCaptureFixture) -> None:
    async with (
        NatsServer() as server,
        leading_at(server.url),
        open_session(nats_url=server.url) as bb,
        open_recorder(bb) as recorder,
    ):
        for round_number in range(1, 4):
            await degraded(bb, False)
            server.kill()
            await until(lambda: not bb.health().connected)
            assert bb.health().local_degradation
            bb.start_operation("election", id=f"during-{round_number}", beats=1)
            before = bb.current_beat()
            with bb.move_on_after(2) as scope:
                await trio.sleep_forever()
            assert scope.cancelled_caught
            assert bb.current_beat() >= before + 2
            await server.start()
            await degraded(bb, False)
            assert bb.health().reconnect_count == round_number
            # The subscription has lived on, and the claims of what went on meanwhile come.
            await recorder.wait_for(f"during-{round_number}", "executing")
            bb.complete_operation(f"during-{round_number}")
            await recorder.wait_for(f"during-{round_number}", "done")
        # The grid is the one it was.
        assert bb.statistics().locks == 1
        lost = [text for text in caplog.messages if text.startswith("connection lost")]
        assert len(lost) == 3
        # It says why, whichever task runs first.
        assert "connection lost: None" not in lost


@guarded
async def test_terminal_claims_of_an_outage_reach_others() -> None:
    # A stream takes the place of a subscriber that would have to be quicker than the session.
    async with NatsServer(["-js"]) as server:

        async def make_stream(client: nats.aio.client.Client) -> None:
            await client.jetstream().add_stream(name="claims", subjects=["backbeat.status.>"])

        async def read_stream(client: nats.aio.client.Client) -> list[StatusClaim]:
            stream = client.jetstream()
            found = []
            for number in range(1, (await stream.stream_info("claims")).state.messages + 1):
                data = (await stream.get_msg("claims", number)).data or b""
                if data.startswith(b"{"):
                    found.append(msgspec.json.decode(data, type=StatusClaim))
            return found

        async with plain_client(server.url) as plain:
            await plain.call(make_stream(plain.client))
        async with open_session(nats_url=server.url, tempo_bpm=600.0, lock_timeout=0.0) as bb:
            await until(lambda: bb.health().connected)
            bb.start_operation("election", id="before")
            server.kill()
            # Some are handed over before the loss is noticed, and some after it.
            for number in range(20):
                bb.start_operation("dht_store", id=f"early-{number}").complete()
            await until(lambda: not bb.health().connected)
            for number in range(20):
                bb.start_operation("dht_store", id=f"done-{number}").complete()
                bb.start_operation("dht_store", id=f"failed-{number}").fail("no peers")
            bb.complete_operation("before")
            assert bb.statistics().claims_pending == 61
            await server.start()
            await until(lambda: not bb.statistics().claims_pending)
            async with plain_client(server.url) as plain:
                claims = await plain.call(read_stream(plain.client))
        ended = {claim.task_id: claim.state for claim in claims if claim.state != "executing"}
        wanted = {"before": "done"}
        for number in range(20):
            wanted |= {f"early-{number}": "done", f"done-{number}": "done"}
            wanted |= {f"failed-{number}": "failed"}
        assert ended == wanted


@guarded
async def test_paused_server_is_left_for_a_healthy_one() -> None:
    # Half-open: the connection to the first looks well for minutes unless something is asked of it.
    async with NatsServer() as first, NatsServer() as second:
        url = f"{first.url},{second.url}"
        async with (
            open_session(nats_url=url, lock_timeout=0.0) as bb,
            open_recorder(bb) as recorder,
            leading_at(second.url),
        ):
            await until(lambda: bb.health().connected)
            # The metronome is on the other one.
            assert bb.statistics().locks == 0
            pause(first)
            await until(lambda: bb.statistics().locks)
            await degraded(bb, False)
            assert bb.health().reconnect_count == 1
            assert any("lost" in error for error in bb.health().errors)
            bb.start_operation("election", id="after").complete()
            await recorder.wait_for("after", "done")


@guarded
async def test_paused_server_with_full_buffers_is_left_for_a_healthy_one() -> None:
    async with (
        NatsServer() as first,
        NatsServer() as second,
        running(nats_url=f"{first.url},{second.url}") as transport,
        transport.open_subscription("a") as messages,
    ):
        await transport.wait_connected()
        pause(first)
        # Until nothing more fits anywhere, and the loss is noticed.
        with pytest.raises(TransportBroken):
            while True:
                await transport.publish("noise", b"x" * 100_000)
        await transport.wait_connected()
        await transport.publish("a", b"alive")
        assert (await anext(messages)).data == b"alive"
        assert transport.generation == 2


@guarded
async def test_paused_server_that_goes_on() -> None:
    async with (
        NatsServer() as server,
        leading_at(server.url),
        open_session(nats_url=server.url) as bb,
    ):
        await degraded(bb, False)
        pause(server)
        await until(lambda: not bb.health().connected)
        before = bb.current_beat()
        await bb.sleep(2)
        assert bb.current_beat() >= before + 2
        server.resume()
        await degraded(bb, False)
        assert bb.health().reconnect_count >= 1


# Connections that are cut.


class Proxy:
    """A TCP proxy before a server, which can slow down, or swallow what goes one way."""

    def __init__(self, server: NatsServer, port: int) -> None:
        self.url = f"nats://127.0.0.1:{port}"
        self._server = server
        # Bytes a second, for what comes from the server; 0 is as fast as it can.
        self.rate = 0
        self._cut: set[str] = set()
        self._connections = 0

    async def serve(self, client: trio.SocketStream) -> None:
        self._connections += 1
        number = self._connections
        async with await trio.open_tcp_stream("127.0.0.1", self._server.port) as server:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._pass, client, server, f"{number} to the server")
                nursery.start_soon(self._pass, server, client, f"{number} from the server")

    async def _pass(self, source: trio.SocketStream, sink: trio.SocketStream, way: str) -> None:
        try:
            async for chunk in source:
                if way not in self._cut:
                    await sink.send_all(chunk)
                if self.rate and way.endswith("from the server"):
                    await trio.sleep(len(chunk) / self.rate)
            await sink.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            # One of the two has hung up, which the other learns now.
            await source.aclose()
            await sink.aclose()

    def cut(self, *ways: str) -> None:
        """Swallow what the newest connection sends one way; later connections are not affected."""
        self._cut.update(f"{self._connections} {way}" for way in ways)


@asynccontextmanager
async def proxied(server: NatsServer) -> AsyncGenerator[Proxy, None]:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    proxy = Proxy(server, listeners[0].socket.getsockname()[1])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, proxy.serve, listeners)
        yield proxy
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(("messages", "every"), [(0, 1.0), (1, 0.1), (200, 0.01)])
@guarded
async def test_connection_whose_way_to_the_server_is_cut_is_left(
    messages: int, every: float
) -> None:
    # Messages from the server still come, and they say nothing of the other direction.
    async with (
        NatsServer() as server,
        plain_client(server.url) as plain,
        proxied(server) as proxy,
        running(nats_url=proxy.url) as transport,
        transport.open_subscription("noise"),
        trio.open_nursery() as nursery,
    ):

        async def make_noise() -> None:
            while True:
                await plain.publish([("noise", b"x" * 100)] * messages)
                await trio.sleep(every)

        await transport.wait_connected()
        await transport.flush()
        nursery.start_soon(make_noise)
        await trio.sleep(0.5)
        proxy.cut("to the server")
        before = transport.statistics().received
        with trio.fail_after(10):
            await transport.wait_connected(False)
        assert transport.statistics().received - before >= 5 * messages
        assert "Slow Consumer" not in server.log
        # The proxy swallows nothing of the next one.
        await transport.wait_connected()
        await transport.flush()
        assert transport.generation == 2
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("size", [100, 100_000])
@guarded
async def test_connection_whose_way_from_the_server_is_cut_is_left(size: int) -> None:
    # The server reads all that is sent: that it can be written says nothing of the other direction.
    async with (
        NatsServer() as server,
        proxied(server) as proxy,
        running(nats_url=proxy.url) as transport,
        trio.open_nursery() as nursery,
    ):

        async def publish() -> None:
            while True:
                with suppress(TransportBroken):
                    await transport.publish("noise", b"x" * size)
                await trio.sleep(0)

        await transport.wait_connected()
        nursery.start_soon(publish)
        proxy.cut("from the server")
        with trio.fail_after(10):
            await transport.wait_connected(False)
        await transport.wait_connected()
        await transport.flush()
        assert transport.generation == 2
        nursery.cancel_scope.cancel()


@guarded
async def test_connection_whose_answers_wait_behind_a_queue_is_kept() -> None:
    async with (
        NatsServer() as server,
        plain_client(server.url) as plain,
        proxied(server) as proxy,
        running(nats_url=proxy.url) as transport,
        transport.open_subscription("noise") as noise,
    ):
        await transport.wait_connected()
        await transport.flush()
        # Reading all this takes 3 s, and the answer to the next ping comes after it.
        proxy.rate = 100_000
        await plain.publish([("noise", b"x" * 1000)] * 300)
        for _ in range(300):
            await anext(noise)
        await transport.flush()
        assert transport.generation == 1


@guarded
async def test_connection_that_nobody_reads_from_any_more_is_left() -> None:
    # nats-py ends its reading when a line cannot be parsed, and calls the client connected.
    async with (
        fake_server(farewell=b'INFO {"\xff": 1}\r\n') as (port, _),
        running(nats_url=f"nats://127.0.0.1:{port}") as transport,
    ):
        await until(lambda: transport.generation >= 2)


@guarded
async def test_message_whose_subject_is_not_utf8_is_no_loss_of_the_connection() -> None:
    async with (
        fake_server(farewell=b"MSG _INBOX.\xff 1 1\r\nx\r\n") as (port, _),
        running(nats_url=f"nats://127.0.0.1:{port}") as transport,
    ):
        await until(lambda: transport.statistics().late_replies == 1)
        await transport.flush()
        assert transport.generation == 1


@guarded
async def test_flush_is_not_answered_where_nobody_reads_the_answer() -> None:
    async def flush(client: nats.aio.client.Client) -> None:
        assert client._reading_task is not None
        client._reading_task.cancel()
        await asyncio.wait({client._reading_task})
        # Before anybody has heard of it.
        await client.flush()

    async with NatsServer() as server, running(nats_url=server.url) as transport:
        await transport.wait_connected()
        with pytest.raises(TransportBroken):
            await transport.call(flush)
        await until(lambda: transport.generation >= 2)


@guarded
async def test_requests_and_flushes_under_way_end_with_the_connection() -> None:
    async with (
        NatsServer() as server,
        running(nats_url=server.url) as transport,
        transport.open_subscription("silent") as requests,
    ):
        await transport.wait_connected()

        async def ask() -> None:
            with pytest.raises(TransportBroken):
                await transport.request("silent", b"", timeout=1000)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await anext(requests)
            pause(server)

            async def flush() -> None:
                with pytest.raises(TransportBroken):
                    await transport.flush()

            nursery.start_soon(flush)
            server.kill()
        assert not transport.connected
