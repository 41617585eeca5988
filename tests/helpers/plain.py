"""What knows nothing of the package: a plain client of NATS, and frames written by hand."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncGenerator, Coroutine, Iterable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Any, Final, TypeVar

import nats.aio.client
import trio
from nats.aio.msg import Msg

from backbeat_trio.testing import CLUSTER_ID, NatsServer

T = TypeVar("T")

BEATS: Final = f"backbeat.beat.{CLUSTER_ID}"


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


def flood(server: NatsServer, subject: str, count: int) -> None:
    """Publish far faster than any client can take in, and block until the server has it all."""
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b'CONNECT {"verbose": false}\r\n')
        connection.sendall(b"PUB %s 1\r\nx\r\n" % subject.encode() * count + b"PING\r\n")
        with connection.makefile("rb") as answers:
            while answers.readline() != b"PONG\r\n":
                pass


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
