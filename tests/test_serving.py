"""Probes and metrics over HTTP: what they answer, and clients that do not behave."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import trio
from helpers import guarded, until
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from backbeat_trio import Session, serving
from backbeat_trio._runtime import probes
from backbeat_trio.metrics import SessionMetrics
from backbeat_trio.serving import serve_health
from backbeat_trio.testing import NatsServer, open_session


@asynccontextmanager
async def serving_of(bb: Session, **options: Any) -> AsyncGenerator[int, None]:
    """Serve in a nursery, and give the port."""
    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(functools.partial(serve_health, bb, port=0, **options))
        yield listener.socket.getsockname()[1]
        nursery.cancel_scope.cancel()


async def get(port: int, path: str, method: str = "GET", **options: Any) -> httpx.Response:
    async with httpx.AsyncClient(timeout=60, trust_env=False) as client:
        return await client.request(method, f"http://127.0.0.1:{port}{path}", **options)


async def send(port: int, data: bytes) -> bytes:
    """Send some bytes, and return what is answered until the connection is closed."""
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    async with stream:
        answer = b""
        try:
            await stream.send_all(data)
            async for part in stream:
                answer += part
        except trio.BrokenResourceError:
            # It was closed while some of it was not read.
            pass
        return answer


@guarded(120)
async def test_the_three_paths() -> None:
    metrics = SessionMetrics()
    async with open_session(instruments=[metrics]) as bb, serving_of(bb) as port:
        alive = await get(port, "/healthz?verbose")
        assert (alive.status_code, alive.json()["ok"]) == (200, True)
        assert list(alive.json()) == ["ok", "tick_age"]
        assert alive.json()["tick_age"] < 10
        ready = await get(port, "/readyz")
        assert ready.status_code == 200
        assert ready.json()["reason"] == ""
        assert ready.json()["grid"] == "locked"
        assert ready.headers["content-type"] == "application/json"
        assert ready.headers["cache-control"] == "no-store"
        assert ready.headers["connection"] == "close"
        accept = {"accept": "application/openmetrics-text; version=1.0.0, text/plain;q=0.5"}
        scraped = await get(port, "/metrics", headers=accept)
        assert scraped.headers["content-type"].startswith("application/openmetrics-text")
        parse: Any = text_string_to_metric_families
        names = {family.name for family in parse(scraped.text)}
        assert "backbeat_connected" in names
        head = await get(port, "/readyz", "HEAD")
        assert (head.status_code, head.content) == (200, b"")
        # The ages in the other answers have more digits at some times than at others.
        head, constant = await get(port, "/", "HEAD"), await get(port, "/")
        assert head.headers["content-length"] == str(len(constant.content))
        for path, method, status in (
            ("/", "GET", 404),
            ("/healthz/", "GET", 404),
            ("/readyz", "POST", 405),
            ("/metrics", "DELETE", 405),
        ):
            assert (await get(port, path, method)).status_code == status


@guarded(120)
async def test_a_session_without_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_session(enabled=False) as bb, serving_of(bb) as port:
        answer = await get(port, "/metrics")
        assert answer.status_code == 404
        assert "SessionMetrics" in answer.text
        # A disabled session needs nothing.
        assert (await get(port, "/readyz")).status_code == 200


@guarded(180)
async def test_readiness_follows_the_connection_and_the_session() -> None:
    async with trio.open_nursery() as nursery, NatsServer() as server:
        async with open_session(nats_url=server.url, lock_timeout=0.0) as bb:
            start = functools.partial(serve_health, bb, port=0)
            (listener,) = await nursery.start(start)
            port = listener.socket.getsockname()[1]
            await until(lambda: bb.health().connected)
            answer = await get(port, "/readyz")
            assert answer.status_code == 503
            assert answer.json()["reason"] == "no metronome has been heard yet"
            server.kill()
            await until(lambda: not bb.health().connected)
            answer = await get(port, "/readyz")
            assert answer.status_code == 503
            assert answer.json()["reason"] == "there is no connection to the server"
            # A new process would not bring the server back.
            assert (await get(port, "/healthz")).status_code == 200
        answer = await get(port, "/readyz")
        assert (answer.status_code, answer.json()["reason"]) == (503, "the session is not open")
        assert (await get(port, "/healthz")).status_code == 200
        nursery.cancel_scope.cancel()


@guarded(120)
async def test_a_loop_that_does_not_tick_is_not_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "_EVERY", 3600.0)
    async with open_session() as bb, serving_of(bb, alive_within=0.5) as port:
        await trio.sleep(0.6)
        answer = await get(port, "/healthz")
        assert (answer.status_code, answer.json()["ok"]) == (503, False)
        assert answer.json()["tick_age"] >= 0.6


@guarded(120)
@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET /healthz HTTP/1.0\r\n\r\n", 200),
        (b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\nGET /readyz HTTP/1.1\r\nHost: a\r\n\r\n", 200),
        (b"GET /healthz HTTP/1.1\r\n\r\n", 400),
        (b"garbage\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 100_000, 431),
        (b"POST /healthz HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n", 405),
        (b"GET /%00\xff HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET /%00%ff HTTP/1.1\r\nHost: a\r\n\r\n", 404),
    ],
)
async def test_requests_that_are_not_usual(data: bytes, status: int) -> None:
    async with open_session() as bb, serving_of(bb) as port:
        answer = await send(port, data)
        # What was not read may cost a client the answer, as a connection that is closed does.
        if answer or len(data) < 10_000:
            assert answer.startswith(b"HTTP/1.1 %d " % status), answer
            assert answer.count(b"HTTP/1.1") == 1
        assert (await get(port, "/healthz")).status_code == 200


@guarded(180)
async def test_slow_and_idle_clients_hold_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "_REQUEST_WITHIN", 1.0)
    monkeypatch.setattr(serving, "_CONNECTIONS", 5)
    async with open_session() as bb, serving_of(bb) as port:
        # Somebody hangs up at once, and in the middle of a request.
        for part in (b"", b"GET /hea"):
            stream = await trio.open_tcp_stream("127.0.0.1", port)
            if part:
                await stream.send_all(part)
            await stream.aclose()
        answer = await send(port, b"GET /healthz HTTP/1.1\r\n")
        assert answer.startswith(b"HTTP/1.1 408 ")
        # Far more than are kept.
        idle = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(50)]
        assert (await get(port, "/healthz")).status_code == 200
        for stream in idle:
            await receive_end(stream)
            await stream.aclose()


async def receive_end(stream: trio.SocketStream) -> None:
    """Read until the connection is closed, in whichever way."""
    with contextlib.suppress(trio.BrokenResourceError):
        async for _ in stream:
            pass


class Large(Collector):
    """A registry whose text fills all buffers of a connection, or that fails."""

    def __init__(self, size: int) -> None:
        self.size = size

    def collect(self) -> Iterator[Metric]:
        if not self.size:
            raise RuntimeError("a fault of a collector")
        yield Metric("large", "x" * self.size, "gauge")


@guarded(180)
async def test_a_client_that_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "_SEND_WITHIN", 2.0)
    metrics = SessionMetrics()
    async with open_session(instruments=[metrics]) as bb, serving_of(bb) as port:
        metrics.registry.register(Large(20_000_000))
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        await stream.send_all(b"GET /metrics HTTP/1.0\r\n\r\n")
        # The answer is being sent, and is not read for longer than that may take.
        received = len(await stream.receive_some(1))
        assert (await get(port, "/healthz")).status_code == 200
        await trio.sleep(3)
        with contextlib.suppress(trio.BrokenResourceError):
            while part := await stream.receive_some():
                received += len(part)
        await stream.aclose()
        assert received < 20_000_000


@guarded(120)
async def test_a_collector_that_fails_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    metrics = SessionMetrics()
    async with open_session(instruments=[metrics]) as bb, serving_of(bb) as port:
        metrics.registry.register(failing := Large(1))
        failing.size = 0
        answer = await get(port, "/metrics")
        assert (answer.status_code, answer.text) == (500, "this failed, and the log says why\n")
        assert "a fault of a collector" in caplog.text
        failing.size = 1
        assert (await get(port, "/metrics")).status_code == 200


@guarded(120)
async def test_a_cancellation_ends_all_at_once() -> None:
    async with open_session() as bb:
        async with serving_of(bb) as port:
            idle = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(10)]
            await idle[0].send_all(b"GET /healthz")
            assert (await get(port, "/healthz")).status_code == 200
            begin = trio.current_time()
        # Not even the time for a request was waited for.
        assert trio.current_time() - begin < 4.5
        for stream in idle:
            await receive_end(stream)
            await stream.aclose()
        with pytest.raises(OSError, match=r"refused|failed"):
            await trio.open_tcp_stream("127.0.0.1", port)


async def test_arguments() -> None:
    async with open_session() as bb:
        options: dict[str, Any]
        for options, error in (
            ({"port": -1}, ValueError),
            ({"port": 65_536}, ValueError),
            ({"port": "80"}, TypeError),
            ({"port": 0, "alive_within": 0}, ValueError),
        ):
            with pytest.raises(error):
                await serve_health(bb, **options)
        with pytest.raises(TypeError, match="must be a session"):
            await serve_health(object(), port=0)  # type: ignore[arg-type]
