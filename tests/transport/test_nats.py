"""Faults against a real nats-server: one of its own for each test, on a free loopback port."""

from __future__ import annotations

import asyncio
import functools
import gc
import itertools
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final, ParamSpec, TypeVar
from urllib.parse import quote

import msgspec
import nats
import nats.aio.client
import nats.errors
import nats.js.errors
import nkeys
import pytest
import trio
import trustme
from nats.aio.msg import Msg
from rich.pretty import pretty_repr

import backbeat_trio as backbeat
from backbeat_trio import (
    AuthenticationFailed,
    BackbeatConfig,
    Metronome,
    Phase,
    Session,
    StatusClaim,
    TLSFailed,
    TransportBroken,
    TransportClosed,
)
from backbeat_trio._time.local import local_ns
from backbeat_trio._transport import nats as _nats, nats_client as _nats_client
from backbeat_trio._transport.nats import Backoff, NatsTransport
from backbeat_trio.testing import AGENT_ID, CLUSTER_ID, NatsServer, open_recorder, open_session

P = ParamSpec("P")
T = TypeVar("T")

BEATS: Final = f"backbeat.beat.{CLUSTER_ID}"
# Awkward in URLs, in JSON and in a server's configuration; it must come through as it is.
PASSWORD: Final = "pä:ss@wo/rd%2C, #?"


def guarded(test: Callable[P, Awaitable[None]]) -> Callable[P, Awaitable[None]]:
    """Have a test that hangs fail, after far longer than it could need."""

    @functools.wraps(test)
    async def run(*args: P.args, **kwargs: P.kwargs) -> None:
        with trio.fail_after(30):
            await test(*args, **kwargs)

    return run


def client_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("backbeat-nats")]


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Check after each test that clients' threads end, the abandoned ones too, and sockets."""
    before = client_threads()
    yield
    for thread in client_threads():
        if thread not in before:
            thread.join(30)
            assert not thread.is_alive()
    # Warnings of what was not closed belong to this test, and not to a later one.
    gc.collect()


def pause(server: NatsServer) -> None:
    """Pause a server, and wait until it stands still: the signal alone does not."""
    server.pause()
    os.waitid(os.P_PID, server.pid, os.WSTOPPED | os.WNOWAIT)


async def until(condition: Callable[[], object]) -> None:
    """Wait for what no event tells."""
    while not condition():
        await trio.sleep(0.005)


@asynccontextmanager
async def running(url: str, **overrides: Any) -> AsyncGenerator[NatsTransport, None]:
    """Run a transport, without waiting for its connection."""
    transport = NatsTransport(BackbeatConfig(**{"nats_url": url, "agent_id": AGENT_ID} | overrides))
    async with trio.open_nursery() as nursery:
        await nursery.start(transport.run)
        yield transport
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def leading(
    url: str, *, tempo_bpm: float = 600.0, leader_id: str = "pulse-a", **overrides: Any
) -> AsyncGenerator[Metronome, None]:
    """Run a metronome over NATS, on a connection of its own."""
    config = BackbeatConfig(nats_url=url, agent_id=leader_id, **overrides)
    transport = NatsTransport(config)
    metronome = Metronome(
        transport, cluster_id=CLUSTER_ID, leader_id=leader_id, tempo_bpm=tempo_bpm
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(transport.run)
        await transport.wait_connected()
        await nursery.start(metronome.run)
        yield metronome
        nursery.cancel_scope.cancel()


class Plain:
    """A plain nats-py client, on an asyncio loop in a thread of its own; it knows nothing of us."""

    def __init__(self, url: str, subjects: tuple[str, ...], options: dict[str, Any]) -> None:
        self.heard: list[tuple[str, bytes]] = []
        self.ready = trio.Event()
        self.client = nats.aio.client.Client()
        self._url = url
        self._subjects = subjects
        self._options = options
        self._token = trio.lowlevel.current_trio_token()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None

    def run(self) -> None:
        asyncio.run(self._main())

    async def _main(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()

        async def fail(error: Exception) -> None:
            raise error

        async def hear(message: Msg) -> None:
            self._token.run_sync_soon(self.heard.append, (message.subject, message.data))

        await self.client.connect(self._url, error_cb=fail, allow_reconnect=False, **self._options)
        for subject in self._subjects:
            await self.client.subscribe(subject, cb=hear)
        await self.client.flush()
        self._token.run_sync_soon(self.ready.set)
        await self._stop.wait()
        await self.client.close()

    def stop(self) -> None:
        if self._loop is not None and self._stop is not None:
            self._loop.call_soon_threadsafe(self._stop.set)

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Have the client's loop run something."""
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    async def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Await something on the client's loop."""
        future = self.start(coroutine)
        return await trio.to_thread.run_sync(future.result, abandon_on_cancel=True)

    async def publish(self, messages: Iterable[tuple[str, bytes]]) -> None:
        """Publish, and wait until the server has it all."""

        async def publish() -> None:
            for subject, data in messages:
                await self.client.publish(subject, data)
            await self.client.flush()

        await self.call(publish())


@asynccontextmanager
async def plain_client(url: str, *subjects: str, **options: Any) -> AsyncGenerator[Plain, None]:
    plain = Plain(url, subjects, options)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, plain.run)
        await plain.ready.wait()
        try:
            yield plain
        finally:
            plain.stop()


async def degraded(bb: Session, wanted: bool) -> None:
    await until(lambda: bb.health().local_degradation is wanted)


# Connecting.


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
            async with leading(server.url):
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


def users(**passwords: str) -> str:
    """Write the part of a server's configuration that lets users in."""
    entries = ", ".join(
        f"{{user: {user}, password: {json.dumps(password, ensure_ascii=False)}}}"
        for user, password in passwords.items()
    )
    return f"authorization {{ users = [{entries}] }}"


@pytest.mark.parametrize("where", ["option", "url"])
@guarded
async def test_wrong_password(where: str) -> None:
    async with NatsServer(config=users(agent=PASSWORD)) as server:
        settings: dict[str, Any] = {"nats_url": server.url, "user": "agent", "password": "wrong"}
        if where == "url":
            settings = {"nats_url": f"nats://agent:wrong@127.0.0.1:{server.port}"}
        with pytest.raises(AuthenticationFailed, match=str(server.port)):
            async with open_session(**settings, require_connection=True):
                pytest.fail("the session was entered")


@guarded
async def test_wrong_password_without_a_required_connection() -> None:
    async with (
        NatsServer(config=users(agent=PASSWORD)) as server,
        open_session(nats_url=server.url, user="agent", password="wrong", lock_timeout=0.0) as bb,
    ):
        await until(lambda: bb.health().errors)
        health = bb.health()
        assert not health.connected
        assert health.local_degradation
        assert "refused the credentials" in health.errors[-1]
        # The same failure again and again is one error.
        await until(lambda: "ttempts" in server.log or server.log.count("authentication error") > 2)
        assert len(bb.health().errors) == 1


@pytest.mark.parametrize("where", ["option", "url"])
@guarded
async def test_user_and_password(where: str) -> None:
    async with NatsServer(config=users(agent=PASSWORD)) as server:
        settings: dict[str, Any] = {"nats_url": server.url, "user": "agent", "password": PASSWORD}
        if where == "url":
            escaped = quote(PASSWORD, safe="")
            settings = {"nats_url": f"nats://agent:{escaped}@127.0.0.1:{server.port}"}
        async with open_session(**settings, require_connection=True, lock_timeout=0.0) as bb:
            assert bb.health().connected


@pytest.mark.parametrize("where", ["option", "url"])
@guarded
async def test_token(where: str) -> None:
    async with NatsServer(config="authorization { token: 's3cr3t%/' }") as server:
        settings: dict[str, Any] = {"nats_url": server.url, "token": "s3cr3t%/"}
        if where == "url":
            settings = {"nats_url": f"nats://{quote('s3cr3t%/', safe='')}@127.0.0.1:{server.port}"}
        async with open_session(**settings, require_connection=True, lock_timeout=0.0) as bb:
            assert bb.health().connected
        with pytest.raises(AuthenticationFailed):
            async with open_session(
                nats_url=server.url, token="wrong", require_connection=True, lock_timeout=0.0
            ):
                pytest.fail("the session was entered")


def new_nkey() -> tuple[bytes, str]:
    """Make a user's seed, and the public key that belongs to it."""
    seed = bytes(nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER))
    pair = nkeys.from_seed(bytearray(seed))
    return seed, bytes(pair.public_key).decode()


@guarded
async def test_nkey(tmp_path: Path) -> None:
    seed, public = new_nkey()
    path = tmp_path / "seed.nk"
    path.write_bytes(seed)
    other = tmp_path / "other.nk"
    other.write_bytes(new_nkey()[0])
    async with NatsServer(config=f"authorization {{ users = [{{nkey: {public}}}] }}") as server:
        async with open_session(
            nats_url=server.url, nkey=str(path), require_connection=True, lock_timeout=0.0
        ) as bb:
            assert bb.health().connected
        with pytest.raises(AuthenticationFailed):
            async with open_session(
                nats_url=server.url, nkey=str(other), require_connection=True, lock_timeout=0.0
            ):
                pytest.fail("the session was entered")


@guarded
async def test_credentials_that_are_revoked_and_granted_again() -> None:
    # nats-py gives a client up for good when its credentials are revoked.
    async with (
        NatsServer(config=users(agent=PASSWORD, other="x")) as server,
        open_session(nats_url=server.url, user="agent", password=PASSWORD, lock_timeout=0.0) as bb,
        open_recorder(bb) as recorder,
    ):
        await until(lambda: bb.health().connected)
        server.reload(users(other="x"))
        await until(lambda: not bb.health().connected)
        await until(lambda: any("refused" in error for error in bb.health().errors))
        server.reload(users(agent=PASSWORD, other="x"))
        await until(lambda: bb.health().connected)
        assert bb.health().reconnect_count == 1
        bb.start_operation("election", id="after")
        await recorder.wait_for("after", "executing")


# TLS.


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


class Certificates:
    """The files of a server's and a client's certificates, and of those that sign them."""

    def __init__(self, folder: Path, authority: trustme.CA, server_name: str) -> None:
        self.ca = str(folder / "ca.pem")
        self.other_ca = str(folder / "other-ca.pem")
        authority.cert_pem.write_to_path(self.ca)
        trustme.CA().cert_pem.write_to_path(self.other_ca)
        for name, host in (("server", server_name), ("client", "agent@example.org")):
            issued = authority.issue_cert(host)
            issued.private_key_pem.write_to_path(str(folder / f"{name}.key"))
            for number, blob in enumerate(issued.cert_chain_pems):
                blob.write_to_path(str(folder / f"{name}.pem"), append=number > 0)
        self.client = str(folder / "client.pem")
        self.client_key = str(folder / "client.key")
        self._files = f'cert_file: "{folder}/server.pem", key_file: "{folder}/server.key"'

    def config(self, more: str = "") -> str:
        return f"tls {{ {self._files} {more} }}"

    @property
    def mutual(self) -> str:
        return self.config(f', ca_file: "{self.ca}", verify: true')


@pytest.fixture
def certificates(tmp_path: Path, authority: trustme.CA) -> Certificates:
    return Certificates(tmp_path, authority, "127.0.0.1")


def tls(server: NatsServer) -> str:
    return f"tls://127.0.0.1:{server.port}"


@pytest.mark.parametrize("first", [False, True])
@guarded
async def test_tls(certificates: Certificates, first: bool) -> None:
    config = certificates.config(f", handshake_first: {str(first).lower()}")
    async with NatsServer(config=f"{config}\n{users(agent=PASSWORD)}") as server:
        settings: dict[str, Any] = {
            "nats_url": tls(server),
            "user": "agent",
            "password": PASSWORD,
            "tls_ca": certificates.ca,
            "tls_first": first,
        }
        async with (
            leading(**{"url": settings.pop("nats_url"), **settings}),
            open_session(nats_url=tls(server), **settings, require_connection=True) as bb,
        ):
            await degraded(bb, False)


@guarded
async def test_untrusted_certificate(certificates: Certificates) -> None:
    async with NatsServer(config=certificates.config()) as server:
        with pytest.raises(TLSFailed, match=str(server.port)):
            async with open_session(
                nats_url=tls(server), tls_ca=certificates.other_ca, require_connection=True
            ):
                pytest.fail("the session was entered")


@guarded
async def test_certificate_of_another_host(tmp_path: Path, authority: trustme.CA) -> None:
    certificates = Certificates(tmp_path, authority, "elsewhere.example.org")
    async with NatsServer(config=certificates.config()) as server:
        with pytest.raises(TLSFailed, match=str(server.port)):
            async with open_session(
                nats_url=tls(server), tls_ca=certificates.ca, require_connection=True
            ):
                pytest.fail("the session was entered")


@guarded
async def test_mutual_tls(certificates: Certificates) -> None:
    async with NatsServer(config=certificates.mutual) as server:
        async with open_session(
            nats_url=tls(server),
            tls_ca=certificates.ca,
            tls_cert=certificates.client,
            tls_key=certificates.client_key,
            require_connection=True,
            lock_timeout=0.0,
        ) as bb:
            assert bb.health().connected
        with pytest.raises(TransportBroken, match=str(server.port)):
            async with open_session(
                nats_url=tls(server), tls_ca=certificates.ca, require_connection=True
            ):
                pytest.fail("the session was entered")


@asynccontextmanager
async def fake_server(
    *, farewell: bytes = b"", **info: Any
) -> AsyncGenerator[tuple[int, bytearray], None]:
    """Run a server without TLS that lets everybody in, and keep what it is told.

    It sends ``farewell`` once a client has subscribed to something.
    """
    told = bytearray()
    greeting = {
        "server_id": "FAKE",
        "version": "2.15.0",
        "headers": True,
        "max_payload": 1048576,
        **info,
    }

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


@pytest.mark.parametrize("greeting", [{"auth_required": True}, {"tls_available": True}, {}])
@pytest.mark.parametrize("secret", ["password", "password in the URL", "token", "token in the URL"])
@guarded
async def test_secret_never_reaches_a_server_without_tls(
    secret: str, greeting: dict[str, Any]
) -> None:
    async with fake_server(**greeting) as (port, told):
        settings: dict[str, Any] = {
            "password": {"user": "agentname", "password": "s3cr3t"},
            "password in the URL": {"nats_url": f"tls://agentname:s3cr3t@127.0.0.1:{port}"},
            "token": {"token": "s3cr3t"},
            "token in the URL": {"nats_url": f"tls://s3cr3t@127.0.0.1:{port}"},
        }[secret]
        settings = {"nats_url": f"tls://127.0.0.1:{port}"} | settings
        with pytest.raises(TLSFailed, match="does not offer TLS"):
            async with open_session(**settings, require_connection=True):
                pytest.fail("the session was entered")
        # Nor when it goes on trying: this session does until it is left.
        async with open_session(**settings, lock_timeout=0.0) as bb:
            await until(lambda: bb.health().errors)
            assert not bb.health().connected
    assert b"s3cr3t" not in told
    assert b"agentname" not in told


@guarded
async def test_secret_reaches_a_server_without_tls_where_none_is_asked_for() -> None:
    # What the last test relies on: the fake server gets to see what is sent to it.
    async with (
        fake_server(auth_required=True) as (port, told),
        open_session(
            nats_url=f"nats://agentname:s3cr3t@127.0.0.1:{port}",
            require_connection=True,
            lock_timeout=0.0,
        ),
    ):
        assert b"s3cr3t" in told
        assert b"agentname" in told


@guarded
async def test_server_without_tls_where_there_is_no_secret() -> None:
    async with fake_server() as (port, _):
        with pytest.raises(TLSFailed, match="does not offer TLS"):
            async with open_session(nats_url=f"tls://127.0.0.1:{port}", require_connection=True):
                pytest.fail("the session was entered")


@guarded
async def test_tls_first_with_a_server_without_tls() -> None:
    async with fake_server() as (port, told):
        with pytest.raises(TransportBroken, match=str(port)):
            async with open_session(
                nats_url=f"tls://agentname:s3cr3t@127.0.0.1:{port}",
                tls_first=True,
                connect_timeout=1.0,
                require_connection=True,
            ):
                pytest.fail("the session was entered")
    assert b"s3cr3t" not in told


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


# Outages.


@guarded
async def test_killed_server_that_comes_back(caplog: pytest.LogCaptureFixture) -> None:
    async with (
        NatsServer() as server,
        leading(server.url),
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
            leading(second.url),
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
        running(f"{first.url},{second.url}") as transport,
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
        leading(server.url),
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
        running(proxy.url) as transport,
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
        running(proxy.url) as transport,
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
        running(proxy.url) as transport,
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
    # nats-py ends its reading when a message cannot be parsed, and calls the client connected.
    async with (
        fake_server(farewell=b"MSG \xff 1 1\r\nx\r\n") as (port, _),
        running(f"nats://127.0.0.1:{port}") as transport,
    ):
        await until(lambda: transport.generation >= 2)


@guarded
async def test_flush_is_not_answered_where_nobody_reads_the_answer() -> None:
    async def flush(client: nats.aio.client.Client) -> None:
        assert client._reading_task is not None
        client._reading_task.cancel()
        await asyncio.wait({client._reading_task})
        # Before anybody has heard of it.
        await client.flush()

    async with NatsServer() as server, running(server.url) as transport:
        await transport.wait_connected()
        with pytest.raises(TransportBroken):
            await transport.call(flush)
        await until(lambda: transport.generation >= 2)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            nats.js.errors.BadRequestError(400, "stream names it 'x'", 10001),
            "JetStream on {url}: stream names it 'x'",
        ),
        (nats.js.errors.ServiceUnavailableError(), "JetStream on {url}: nobody answers"),
        (nats.errors.TimeoutError(), "JetStream on {url}: no answer in time"),
        (nats.errors.ConnectionClosedError(), "no connection to {url}: connection closed"),
    ],
)
@guarded
async def test_what_becomes_of_a_call_is_told_in_its_own_words(error: Exception, told: str) -> None:
    async def refused(client: nats.aio.client.Client) -> None:
        raise error

    async with NatsServer() as server, running(server.url) as transport:
        await transport.wait_connected()
        with pytest.raises(TransportBroken) as caught:
            await transport.call(refused)
        assert str(caught.value) == told.format(url=server.url)
        assert transport.connected


@guarded
async def test_requests_and_flushes_under_way_end_with_the_connection() -> None:
    async with (
        NatsServer() as server,
        running(server.url) as transport,
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


@guarded
async def test_losing_connections_leaves_no_complaint_of_asyncio(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "backbeat_trio")
    # Looked after all the time, so that each loss falls into the middle of it.
    monkeypatch.setattr(_nats_client, "_PING_EVERY", 0.0002)
    monkeypatch.setattr(_nats, "_LASTING", 0)
    async with NatsServer() as server, running(server.url) as transport:
        for _ in range(20):
            await transport.wait_connected()
            server.kill()
            await transport.wait_connected(False)
            await server.start()
    # What nobody has looked at is told of when it is collected.
    gc.collect()
    assert [message for message in caplog.messages if message.startswith("asyncio")] == []


# Connections that do not last.


@guarded
async def test_server_that_drops_each_connection_at_once_is_not_pestered() -> None:
    async with (
        NatsServer(config="max_subscriptions: 2") as server,
        running(server.url) as transport,
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
            async with running(server.url) as transport:
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
    assert done.stderr == b""
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
        async with running(f"nats://nats.example.org:{server.port}") as transport:
            await transport.wait_connected()
        async with running(f"nats://other.example.org:{server.port}") as transport:
            with pytest.raises(TransportBroken, match="Name or service not known"):
                await transport.first_attempt()


# Refusals, and what is hostile.


def permitted(publish: str) -> str:
    permissions = f"permissions: {{ publish: {{ {publish} }} }}"
    return f"authorization {{ users = [{{user: agent, password: x, {permissions}}}] }}"


@guarded
async def test_status_that_may_not_be_published() -> None:
    async with (
        NatsServer(config=permitted('deny: ["backbeat.status.>"]')) as server,
        open_session(nats_url=server.url, user="agent", password="x", lock_timeout=0.0) as bb,
    ):
        await until(lambda: bb.health().connected)
        assert bb.health().errors == ()
        bb.start_operation("election", id="unheard")
        await until(lambda: bb.health().errors)
        assert f"backbeat.status.{AGENT_ID}" in bb.health().errors[-1]
        assert "permissions violation" in bb.health().errors[-1].lower()
        transport = bb.statistics().transport
        assert transport is not None
        assert transport.permission_errors >= 1
        # A refusal is no loss of the connection.
        assert bb.health().connected
        assert bb.health().reconnect_count == 0


@guarded
async def test_health_claims_tell_of_refusals() -> None:
    async with (
        NatsServer(config=permitted(f'deny: ["backbeat.sync.{CLUSTER_ID}"]')) as server,
        open_session(
            nats_url=server.url,
            user="agent",
            password="x",
            lock_timeout=0.0,
            tempo_bpm=600.0,
            health_beats=2,
        ) as bb,
        open_recorder(bb) as recorder,
    ):
        claim = await recorder.wait_for("chorus-p2p-health", "failed")
        assert claim.notes.startswith("CHORUS P2P unhealthy: connected=true, operations=0, ")
        assert bb.health().connected


def frame(index: int, **fields: Any) -> dict[str, Any]:
    """Write the frame of a beat by hand, 8 beats a bar."""
    return {
        "type": "backbeat.beatframe.v1",
        "cluster_id": CLUSTER_ID,
        "beat_index": index,
        "downbeat": index % 8 == 0,
        "phase": "upbeat" if index % 8 else "downbeat",
        "tempo_bpm": 600.0,
        "beats_per_bar": 8,
        "window_id": f"w-{index // 8}",
        "epoch": 7,
        "leader_id": "by-hand",
        "segment": {"epoch": 7, "seq": 0, "beat0": 0, "t0_ns": 0, "milli_bpm": 600_000},
        "next_segment": None,
    } | fields


def dump(message: object) -> bytes:
    return json.dumps(message).encode()


@guarded
async def test_ten_thousand_hostile_messages() -> None:
    # At 4 beats a second, so that no beat is late enough for holdover, where a lower epoch may be
    # that of a metronome that began anew.
    async with (
        NatsServer() as server,
        plain_client(server.url) as plain,
        leading(server.url, tempo_bpm=240.0) as metronome,
        open_session(nats_url=server.url) as bb,
    ):
        await until(lambda: bb.statistics().frames >= 2)
        good = frame(9, epoch=metronome.epoch)
        truncated = [dump(good)[:length] for length in range(len(dump(good)))]
        wrongs: tuple[dict[str, Any], ...] = (
            {"type": "backbeat.statusclaim.v1"},
            {"type": None},
            {"cluster_id": 5},
            {"beat_index": "9"},
            {"beat_index": 9.5},
            {"beat_index": -1},
            {"beat_index": 2**64},
            {"beat_index": True},
            {"beat_index": None},
            {"downbeat": 0},
            {"phase": "offbeat"},
            {"tempo_bpm": "fast"},
            {"beats_per_bar": 0},
            {"window_id": []},
            {"epoch": 1e300},
            {"segment": None},
            {"segment": good["segment"] | {"milli_bpm": 0}},
            {"segment": good["segment"] | {"beat0": 10}},
            {"next_segment": 1},
        )
        wrong_types = [dump(good | wrong) for wrong in wrongs]
        wrong_types += [
            b"",
            b"null",
            b"[]",
            b"{}",
            b"7",
            b'"beat"',
            dump([good]),
            b"\x00\xff\xfe" * 9,
        ]
        huge = [b"x" * 1024 * 1024, dump(good | {"window_id": "w" * 1_048_000})[:-1]]
        foreign = [dump(good | {"cluster_id": f"cluster-{number}"}) for number in range(50)]
        going_back = [dump(good | {"beat_index": 0})]
        lower_epoch = [
            dump(good | {"epoch": metronome.epoch - number, "beat_index": 10**6})
            for number in (1, 2, metronome.epoch)
        ]
        counts = {"undecodable": 5000, "foreign": 2000, "repeated": 1500, "stale_epoch": 1500}
        bad = itertools.chain(huge * 5, itertools.cycle(truncated + wrong_types))
        messages = [
            *itertools.islice(bad, counts["undecodable"]),
            *itertools.islice(itertools.cycle(foreign), counts["foreign"]),
            *itertools.islice(itertools.cycle(going_back), counts["repeated"]),
            *itertools.islice(itertools.cycle(lower_epoch), counts["stale_epoch"]),
        ]
        assert len(messages) == 10_000
        before = bb.statistics()

        def counted() -> dict[str, int]:
            now = bb.statistics()
            return {
                name: getattr(now, f"frames_{name}") - getattr(before, f"frames_{name}")
                for name in counts
            }

        indices: list[int] = []
        fired: list[float] = []

        async def listen() -> None:
            async for beat in bb.beats():
                indices.append(beat.index)

        async def spend() -> None:
            while True:
                with bb.move_on_after(1) as scope:
                    await trio.sleep_forever()
                assert scope.cancelled_caught
                fired.append(bb.current_position())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen)
            nursery.start_soon(spend)
            # In parts, so that what is counted as dropped elsewhere stays nothing.
            for number in range(0, 10_000, 500):
                await plain.publish((BEATS, data) for data in messages[number : number + 500])
                end = number + 500
                await until(lambda: sum(counted().values()) == end)  # noqa: B023 - awaited here
            await until(lambda: len(fired) >= 4)
            nursery.cancel_scope.cancel()
        assert counted() == counts
        transport = bb.statistics().transport
        assert transport is not None
        assert transport.dropped == 0
        assert indices == sorted(set(indices))
        assert indices
        # The clock is where it was, on the same grid.
        frames = bb.statistics().frames
        await until(lambda: bb.statistics().frames > frames)
        assert bb.statistics().locks == 1
        assert not bb.health().local_degradation
        await until(lambda: bb.current_beat() == metronome.current_beat())


@pytest.mark.parametrize(
    "data",
    [
        dump(frame(9))[:-1] + b', "more": ' + b"[" * 100_000,
        dump(frame(9))[:-1] + b', "more": ' + b'{"a":' * 100_000,
        dump(frame(9)).replace(CLUSTER_ID.encode(), b"\xff\xfe"),
        dump(frame(9)).replace(b"beatframe", b"\xff\xfe"),
        dump(frame(9)).replace(b"by-hand", b"\\ud800"),
    ],
    ids=["nested arrays", "nested objects", "no UTF-8", "no UTF-8 in the type", "lone surrogate"],
)
@pytest.mark.parametrize("subject", ["beat", "sync", "tempo", "status"])
@guarded
async def test_what_cannot_be_decoded_never_ends_a_session(subject: str, data: bytes) -> None:
    async with (
        NatsServer() as server,
        plain_client(server.url) as plain,
        leading(server.url) as metronome,
        open_session(nats_url=server.url) as bb,
        open_recorder(bb) as recorder,
    ):
        target = AGENT_ID if subject == "status" else CLUSTER_ID
        for kind in ("beatframe", "sync", "tempo", "statusclaim"):
            message = data.replace(b"beatframe", kind.encode())
            await plain.publish([(f"backbeat.{subject}.{target}", message)])
        await until(
            lambda: (
                bb.statistics().frames_undecodable
                + bb.statistics().claims_undecodable
                + metronome.statistics().undecodable
                >= 4
            )
        )
        frames, syncs = bb.statistics().frames, metronome.statistics().syncs
        await until(lambda: bb.statistics().frames > frames)
        await until(lambda: metronome.statistics().syncs > syncs)
        bb.start_operation("election", id="after").complete()
        await recorder.wait_for("after", "done")


@guarded
async def test_frame_from_far_ahead_does_not_silence_the_metronome() -> None:
    # One corrupt or forged index would otherwise make every frame that follows an old one.
    async with (
        NatsServer() as server,
        plain_client(server.url) as plain,
        leading(server.url) as metronome,
        open_session(nats_url=server.url) as bb,
    ):
        await until(lambda: bb.statistics().frames >= 2)
        segment = {"epoch": metronome.epoch, "seq": 0, "beat0": 0, "t0_ns": 0}
        forged = frame(2**53, epoch=metronome.epoch, segment=segment | {"milli_bpm": 600_000})
        await plain.publish([(BEATS, dump(forged))])
        async with plain_client(server.url, BEATS) as witness:
            await until(lambda: len(witness.heard) >= 10)
        frames = bb.statistics().frames
        await until(lambda: bb.statistics().frames > frames + 2)
        await degraded(bb, False)


def flood(server: NatsServer, subject: str, count: int) -> None:
    """Publish far faster than any client can take in, and block until the server has it all."""
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b'CONNECT {"verbose": false}\r\n')
        connection.sendall(b"PUB %s 1\r\nx\r\n" % subject.encode() * count + b"PING\r\n")
        with connection.makefile("rb") as answers:
            while answers.readline() != b"PONG\r\n":
                pass


@guarded
async def test_flood_is_bounded_and_counted_and_no_loss_of_the_connection() -> None:
    # It takes a while to read; what the server says to a ping comes after all of it. There are a
    # few more than may wait for Trio's loop.
    sent = 70_000
    async with (
        NatsServer() as server,
        plain_client(server.url) as plain,
        running(server.url) as transport,
        transport.open_subscription("flood", capacity=100) as messages,
    ):
        await transport.wait_connected()
        # The subscription is older than the connection: only now the server knows of it.
        await transport.flush()
        # Trio's loop is stuck meanwhile.
        flood(server, "flood", sent)
        await until(lambda: transport.statistics().dropped >= sent - 100)
        assert transport.statistics().dropped == sent - 100
        assert [(await anext(messages)).data for _ in range(100)] == [b"x"] * 100
        await plain.publish([("flood", b"end")])
        assert (await anext(messages)).data == b"end"
        assert transport.generation == 1


@guarded
async def test_stamps_of_a_thread_that_was_preempted(monkeypatch: pytest.MonkeyPatch) -> None:
    # The scheduler may stop a thread between its two looks at the clocks. What is measured then is
    # wrong by as much, and no round trip shows it.
    readings = itertools.count()

    def interrupted() -> int:
        now = local_ns()
        if next(readings) % 2 == 0:
            time.sleep(0.02)
        return now

    async with (
        NatsServer() as server,
        running(server.url) as transport,
        transport.open_subscription("a") as messages,
    ):
        await transport.wait_connected()
        monkeypatch.setattr(_nats_client, "local_ns", interrupted)
        for _ in range(20):
            before = local_ns()
            await transport.publish("a", b"")
            message = await anext(messages)
            assert before - 1_000_000 <= message.received_ns <= local_ns() + 1_000_000


@guarded
async def test_use_in_a_forked_child(monkeypatch: pytest.MonkeyPatch) -> None:
    async with NatsServer() as server, running(server.url) as transport:
        await transport.wait_connected()
        parent = os.getpid()
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: parent + 1)
            with pytest.raises(TransportBroken, match="forked"):
                transport.publish_nowait("a", b"")
            with pytest.raises(TransportBroken, match="forked"):
                await transport.request("a", b"", timeout=1)
        await transport.publish("a", b"")
        await transport.flush()


# Leaving.


@guarded
async def test_closing_while_messages_come() -> None:
    async with (
        NatsServer() as server,
        running(server.url) as transport,
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
        except TransportBroken:
            pass
        await trio.sleep(0)

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


# Secrets.


@pytest.mark.parametrize("where", ["option", "url", "token", "token in the URL"])
@guarded
async def test_secrets_are_never_shown(where: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    secret = "hünter/2:@%2C"
    escaped = quote(secret, safe="")
    authorization = f"authorization {{ token: {json.dumps(secret, ensure_ascii=False)} }}"
    if "token" not in where:
        authorization = users(agent=secret)
    shown: list[str] = []
    async with NatsServer(config=authorization) as server:
        address = f"127.0.0.1:{server.port}"
        for password, url_password in ((secret, escaped), (f"wrong-{secret}", f"wrong-{escaped}")):
            settings: dict[str, Any] = {
                "option": {
                    "nats_url": f"nats://{address}",
                    "user": "agent",
                    "password": password,
                },
                "url": {"nats_url": f"nats://agent:{url_password}@{address}"},
                "token": {"nats_url": f"nats://{address}", "token": password},
                "token in the URL": {"nats_url": f"nats://{url_password}@{address}"},
            }[where]
            config = BackbeatConfig(**settings)
            shown += [repr(config), str(config), f"{config}", pretty_repr(config)]
            shown += [repr(config.servers), str(config.servers)]
            transport = NatsTransport(config)
            shown += [repr(transport), str(transport)]
            try:
                async with open_session(
                    **settings, require_connection=True, lock_timeout=0.0
                ) as bb:
                    assert password == secret
                    shown += [repr(bb), repr(bb.config), repr(bb.health()), repr(bb.statistics())]
                    server.kill()
                    await until(lambda: len(bb.health().errors) >= 2)
                    shown += [repr(bb.health()), repr(bb.statistics())]
                    await server.start()
                    await until(lambda: bb.health().connected)
            except AuthenticationFailed as error:
                assert password != secret
                shown += [repr(error), *traceback.format_exception(error)]
            # And where the URL itself is wrong.
            for wrong in (":notaport", "/path", " "):
                try:
                    BackbeatConfig(**settings | {"nats_url": settings["nats_url"] + wrong})
                except backbeat.ConfigError as error:
                    shown += [repr(error), *traceback.format_exception(error)]
    assert caplog.records
    for record in caplog.records:
        shown += [record.getMessage(), repr(record.args), repr(record.__dict__)]
    for text in shown:
        assert secret not in text
        assert escaped not in text


# A metronome over NATS.


@guarded
async def test_session_keeps_the_beats_of_the_metronome() -> None:
    async with (
        NatsServer() as server,
        leading(server.url) as metronome,
        open_session(nats_url=server.url, tempo_bpm=6.0) as bb,
    ):
        assert bb.tempo_bpm == 600.0
        assert not bb.health().local_degradation
        assert bb.statistics().locks == 1
        async for beat in bb.beats():
            # Both read the same clock of the same machine.
            if beat.index >= 10 and bb.current_beat() == metronome.current_beat():
                break
        effective = await bb.set_tempo(1200)
        assert effective % 8 == 0
        await bb.sleep_until(effective + 1)
        assert bb.tempo_bpm == 1200.0
        assert bb.statistics().locks == 1


@guarded
async def test_metronome_that_dies_and_another_that_begins() -> None:
    async with NatsServer() as server, open_session(nats_url=server.url, lock_timeout=0.0) as bb:
        # More beats than the second metronome's first indices: its grid is behind.
        async with leading(server.url, leader_id="pulse-a"):
            await degraded(bb, False)
            await bb.sleep_until(12)
            operation = bb.start_operation("election", beats=1000)
        # Holdover: the beats go on by themselves, and each comes.
        expected = None
        async for beat in bb.beats():
            if expected is not None:
                assert beat.index == expected + beat.skipped
            expected = beat.index + 1
            if bb.health().local_degradation and bb.health().connected and beat.index > 20:
                break
        assert bb.statistics().locks == 1
        with bb.move_on_after(1000) as budget:
            left, left_at = budget.beats_left, trio.current_time()
            before, start = bb.current_beat(), operation.start_beat
            async with leading(server.url, leader_id="pulse-b"):
                # A look at every turn of the loop, so that the last one is just before the change.
                while bb.statistics().locks == 1:
                    left, left_at = budget.beats_left, trio.current_time()
                    before, start = bb.current_beat(), operation.start_beat
                    await trio.lowlevel.checkpoint()
                passed = (trio.current_time() - left_at) * 10
                # Another grid, far behind the old one...
                assert bb.current_beat() < before - 10
                # ... and the same budgets, and the same beats passed by operations.
                assert abs(left - passed - budget.beats_left) < 2
                moved = bb.current_beat() - before
                assert abs((operation.start_beat - start) - moved) < 2
                await degraded(bb, False)
                assert bb.statistics().locks == 2
                budget.relative_deadline = 2
                await trio.sleep_forever()
        assert budget.cancelled_caught


@guarded
async def test_metronomes_that_follow_each_other_quickly() -> None:
    # Several within a second: each is a new incarnation all the same.
    async with NatsServer() as server, open_session(nats_url=server.url, lock_timeout=0.0) as bb:
        epochs = []

        async def follow(metronome: Metronome, locks: int) -> None:
            await until(lambda: bb.statistics().locks == locks)
            frames = bb.statistics().frames
            await until(lambda: bb.statistics().frames >= frames + 2)
            await until(lambda: bb.current_beat() == metronome.current_beat())

        for number in range(1, 6):
            async with leading(server.url, leader_id=f"pulse-{number}") as metronome:
                epochs.append(metronome.epoch)
                await follow(metronome, number)
        assert epochs == sorted(set(epochs))


class Publisher:
    """Beats by hand from a plain client: frames only, and no answer to any ping."""

    def __init__(self, plain: Plain) -> None:
        self.sent = -1
        self.going = True
        self._plain = plain

    async def run(
        self, first: int, count: int, beat_s: float, fields: Callable[[int], dict[str, Any]]
    ) -> None:
        async def run() -> None:
            loop = asyncio.get_running_loop()
            started = loop.time()
            for index in range(first, first + count):
                await asyncio.sleep(started + (index - first) * beat_s - loop.time())
                if not self.going:
                    return
                self.sent = index
                await self._plain.client.publish(BEATS, dump(frame(index, **fields(index))))
                await self._plain.client.flush()

        await self._plain.call(run())


@guarded
async def test_leader_that_only_beats() -> None:
    slow = {"epoch": 7, "seq": 3, "beat0": 12000, "t0_ns": 903_000_000_000, "milli_bpm": 300_000}
    # The same line, and from beat 12016 on twice as fast.
    quick = slow | {"seq": 4, "beat0": 12016, "t0_ns": 906_200_000_000, "milli_bpm": 600_000}

    def fields(index: int) -> dict[str, Any]:
        if index < 12016:
            return {"tempo_bpm": 300.0, "segment": slow, "next_segment": quick}
        return {"tempo_bpm": 600.0, "segment": quick}

    async with (
        NatsServer() as server,
        plain_client(server.url) as plain,
        open_session(nats_url=server.url, lock_timeout=0.0) as bb,
        trio.open_nursery() as nursery,
    ):
        publisher = Publisher(plain)
        nursery.start_soon(publisher.run, 12000, 16, 0.2, fields)
        await degraded(bb, False)
        assert bb.statistics().locks == 1
        assert bb.tempo_bpm == 300.0
        await until(lambda: publisher.sent == 12015)
        assert abs(bb.current_beat() - 12015) <= 1
        await bb.sleep_until(12016)
        nursery.start_soon(publisher.run, 12016, 10_000, 0.1, fields)
        await bb.sleep_until(12020)
        assert bb.tempo_bpm == 600.0
        # It follows the line that both have in common.
        frames = bb.statistics().frames
        await until(lambda: bb.statistics().frames >= frames + 5)
        await until(lambda: abs(bb.current_beat() - publisher.sent) <= 1)
        assert bb.statistics().locks == 1
        assert bb.statistics().pings_failed == bb.statistics().pings
        publisher.going = False
        await degraded(bb, True)


# The wire format, to the letter of the design's section 3.

AGENT: Final = "chorus-agent-42"
NODE: Final = "12D3KooW"


def parse(data: bytes) -> Any:
    """Decode JSON, and refuse a key that comes twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len({key for key, _ in pairs}) == len(pairs)
        return dict(pairs)

    return json.loads(data, object_pairs_hook=unique)


def same(found: Any, wanted: Any) -> bool:
    """Compare JSON values strictly: 1, 1.0 and true are three different ones."""
    if type(found) is not type(wanted):
        return False
    if isinstance(found, dict):
        return found.keys() == wanted.keys() and all(same(found[key], wanted[key]) for key in found)
    return bool(found == wanted)


def claim(task_id: str, beat: int, state: str, left: int, progress: float, notes: str) -> object:
    return {
        "type": "backbeat.statusclaim.v1",
        "agent_id": AGENT,
        "task_id": task_id,
        "beat_index": beat,
        "state": state,
        "beats_left": left,
        "progress": progress,
        "notes": notes,
    }


@guarded
async def test_frames_on_the_wire() -> None:
    async with (
        NatsServer() as server,
        plain_client(server.url, "backbeat.beat.>") as plain,
        leading(server.url, leader_id="pulse-a") as metronome,
        open_session(nats_url=server.url) as bb,
    ):
        await until(lambda: len(plain.heard) >= 3)
        change = await bb.set_tempo(1200)
        await until(lambda: parse(plain.heard[-1][1])["beat_index"] >= change + 2)
    assert {subject for subject, _ in plain.heard} == {BEATS}
    frames = [parse(data) for _, data in plain.heard]
    epoch = metronome.epoch
    begun = frames[0]["segment"]["t0_ns"]
    slow = {"epoch": epoch, "seq": 0, "beat0": 0, "t0_ns": begun, "milli_bpm": 600_000}
    quick = {
        "epoch": epoch,
        "seq": 1,
        "beat0": change,
        "t0_ns": begun + change * 100_000_000,
        "milli_bpm": 1_200_000,
    }
    last = -1
    announced = 0
    for found in frames:
        index = found["beat_index"]
        assert index > last
        last = index
        before = index < change
        announced += found["next_segment"] is not None
        assert same(
            found,
            {
                "type": "backbeat.beatframe.v1",
                "cluster_id": CLUSTER_ID,
                "beat_index": index,
                "downbeat": index % 8 == 0,
                "phase": "upbeat" if index % 8 else "downbeat",
                "tempo_bpm": 600.0 if before else 1200.0,
                "beats_per_bar": 8,
                "window_id": f"w-{index // 8}",
                "epoch": epoch,
                "leader_id": "pulse-a",
                "segment": slow if before else quick,
                "next_segment": quick if before and announced else None,
            },
        )
    # Announced at least max(2 beats, 250 ms) ahead.
    assert announced >= 2


@guarded
async def test_claims_on_the_wire() -> None:
    async with (
        NatsServer() as server,
        plain_client(server.url, "backbeat.status.>") as plain,
        leading(server.url),
        open_session(nats_url=server.url, agent_id=AGENT, node_id=NODE) as bb,
    ):

        def objects(task_id: str) -> list[dict[str, Any]]:
            return [
                message
                for message in (parse(data) for _, data in plain.heard)
                if isinstance(message, dict) and message["task_id"] == task_id
            ]

        def arrays() -> list[list[dict[str, Any]]]:
            messages = [parse(data) for _, data in plain.heard]
            return [message for message in messages if isinstance(message, list)]

        election = bb.start_operation("election", id="election-leader-2025", beats=4)
        election.advance(Phase.CONNECTING, peers=3)
        await until(lambda: objects("election-leader-2025"))
        start = objects("election-leader-2025")[0]["beat_index"]
        other = bb.start_operation("gossip")
        # Past its estimate, where nothing is left and the progress stays at 1.
        await until(lambda: any(array[0]["beat_index"] > start + 5 for array in arrays()))
        election.complete(peers=4)
        other.fail("no peers")
        await until(
            lambda: len(objects("election-leader-2025")) == 3 and len(objects(other.id)) == 2
        )
        ended = bb.current_beat()

    assert {subject for subject, _ in plain.heard} == {f"backbeat.status.{AGENT}"}
    transitions = objects("election-leader-2025")
    begun, advanced, done = (message["beat_index"] for message in transitions)
    assert start == begun <= advanced <= done <= ended

    def running_claim(task_id: str, beat: int, notes: str) -> object:
        passed = beat - start
        return claim(task_id, beat, "executing", max(0, 4 - passed), min(1.0, passed / 4), notes)

    note = f"P2P election: %s (peers: %d, node: {NODE})"
    assert same(transitions[0], running_claim("election-leader-2025", begun, note % ("started", 0)))
    assert same(
        transitions[1], running_claim("election-leader-2025", advanced, note % ("connecting", 3))
    )
    assert same(
        transitions[2],
        claim("election-leader-2025", done, "done", 0, 1.0, note % ("completed", 4)),
    )
    gossip = objects(other.id)
    assert same(
        gossip[1],
        claim(
            other.id,
            gossip[1]["beat_index"],
            "failed",
            0,
            0.0,
            "P2P operation failed: no peers (type: gossip)",
        ),
    )
    # One array a beat, with each live operation once.
    beats = []
    for array in arrays():
        beat = array[0]["beat_index"]
        beats.append(beat)
        if array[0]["task_id"] == "election-leader-2025":
            notes = note % ("connecting", 3)
            assert same(array[0], running_claim("election-leader-2025", beat, notes))
        for entry in array:
            assert entry["beat_index"] == beat
            assert entry["state"] == "executing"
        ids = [entry["task_id"] for entry in array]
        assert len(ids) == len(set(ids))
    assert beats == sorted(set(beats))
    full = [array for array in arrays() if array[0]["beat_index"] > start + 1]
    assert full
    for array in full:
        assert [entry["task_id"] for entry in array] == ["election-leader-2025", other.id]
    # The terminal claim is the last word about an operation.
    parsed = [parse(data) for _, data in plain.heard]
    entries = [
        entry for found in parsed for entry in (found if isinstance(found, list) else [found])
    ]
    mentions = [entry for entry in entries if entry["task_id"] == "election-leader-2025"]
    assert [entry["state"] for entry in mentions[:-1]] == ["executing"] * (len(mentions) - 1)
    assert mentions[-1]["state"] == "done"


@guarded
async def test_health_claims_on_the_wire() -> None:
    async with (
        NatsServer() as server,
        plain_client(server.url, "backbeat.status.>") as plain,
        leading(server.url),
        open_session(nats_url=server.url, agent_id=AGENT, node_id=NODE) as bb,
    ):

        def claims(state: str) -> list[dict[str, Any]]:
            return [
                message
                for message in (parse(data) for _, data in plain.heard)
                if isinstance(message, dict)
                and message["task_id"] == "chorus-p2p-health"
                and message["state"] == state
            ]

        await until(lambda: claims("waiting"))
        with trio.CancelScope() as scope:
            async with bb.operation("election"), bb.operation("dht_store"):
                await until(lambda: claims("executing"))
                scope.cancel()
        waiting = len(claims("waiting"))
        await until(lambda: len(claims("waiting")) > waiting)
    for state, operations in (("waiting", 0), ("executing", 2)):
        for found in claims(state):
            beat = found["beat_index"]
            notes = (
                f"CHORUS P2P healthy: connected=true, operations={operations}, "
                f"tempo=600 BPM, node={NODE}"
            )
            assert same(found, claim("chorus-p2p-health", beat, state, 0, 1.0, notes))
    # Every 8 beats: one in each window at most.
    windows = [found["beat_index"] // 8 for found in claims("waiting") + claims("executing")]
    assert len(windows) == len(set(windows))
    assert not claims("failed")
    assert not claims("done")


@guarded
async def test_notes_that_need_escapes_survive_the_wire() -> None:
    notes = 'quote " backslash \\ newline \n 🥁 <&> '
    async with (
        NatsServer() as server,
        plain_client(server.url, "backbeat.status.>") as plain,
        open_session(nats_url=server.url, lock_timeout=0.0, agent_id=AGENT) as bb,
    ):
        await until(lambda: bb.health().connected)
        bb.start_operation("election", id='id "\\"').fail(notes)
        await until(lambda: len(plain.heard) >= 2)
    found = parse(plain.heard[-1][1])
    assert found["task_id"] == 'id "\\"'
    assert found["notes"] == f"P2P operation failed: {notes} (type: election)"
