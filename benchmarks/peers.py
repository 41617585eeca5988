"""The other processes of the benchmarks: plain nats-py clients, and the functions that run them.

A peer writes one line of JSON when it is ready, and one for each round. It ends when its standard
input ends. So it ends with the process that started it, however that one ends.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any, Final, TypeVar, final

import msgspec
import nats
import trio
from nats.aio.msg import Msg

from backbeat_trio import StatusClaim
from backbeat_trio._wire import ClaimArrays

AGENT_ID: Final = "bench-agent"
NODE_ID: Final = "bench-node"
TYPE: Final = "task_coordination"
CLUSTER_ID: Final = "test-cluster"
END: Final = b"end"
"""The message that ends a round."""
MARK: Final = b"mark"
"""The request that the listener answers once it has taken in all that was sent before it."""

T = TypeVar("T", bound=msgspec.Struct)


class Ready(msgspec.Struct):
    """What a peer says first."""


class Heard(msgspec.Struct):
    """What the listener says at the end of a round."""

    messages: int
    bytes: int
    claims: int
    seconds: float
    """From the first message to the last one."""
    claims_timed: int
    """The claims that came in that time: those of the first message came before it."""

    @property
    def rate(self) -> float:
        """Claims a second."""
        return self.claims_timed / self.seconds if self.seconds else 0.0


@final
class Peer:
    """A process of this kind, seen from the one that started it."""

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self._buffer = b""

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    async def read(self, kind: type[T]) -> T:
        """Wait for the next line."""
        assert self._process.stdout is not None
        while b"\n" not in self._buffer:
            piece = await self._process.stdout.receive_some()
            if not piece:
                raise EOFError(f"process {self.pid} has ended")
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        return msgspec.json.decode(line, type=kind)

    async def go(self) -> None:
        """Let it begin a round."""
        assert self._process.stdin is not None
        await self._process.stdin.send_all(b"go\n")


@asynccontextmanager
async def open_process(*command: str, stderr: int | None = None) -> AsyncGenerator[Peer, None]:
    """Run a process for the length of a block."""
    process = await trio.lowlevel.open_process(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr
    )
    try:
        yield Peer(process)
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


@asynccontextmanager
async def open_peer(
    role: str, *arguments: str, script: str = __file__
) -> AsyncGenerator[Peer, None]:
    """Run a peer for the length of a block."""
    async with open_process(sys.executable, script, role, *arguments) as peer:
        await peer.read(Ready)
        yield peer


def say(message: msgspec.Struct) -> None:
    """Write a line for whoever started this process."""
    sys.stdout.buffer.write(msgspec.json.encode(message) + b"\n")
    sys.stdout.buffer.flush()


async def _give_up() -> None:
    # At once, though a thread waits for standard input: whoever reads from here must learn of it.
    os._exit(1)


def _heard(payloads: list[bytes], first: float, last: float) -> Heard:
    claims = [payload.count(b'"type":') for payload in payloads]
    return Heard(
        messages=len(payloads),
        bytes=sum(map(len, payloads)),
        claims=sum(claims),
        seconds=last - first,
        claims_timed=sum(claims[1:]),
    )


async def listen(url: str, subject: str) -> None:
    """Take in messages, and count what was in them once a round has ended."""
    client = await nats.connect(url, allow_reconnect=False, closed_cb=_give_up)
    payloads: list[bytes] = []
    first = last = 0.0

    async def receive(message: Msg) -> None:
        nonlocal first, last
        if message.data == END:
            # One that is repeated says nothing new.
            if payloads:
                say(_heard(payloads, first, last))
            payloads.clear()
            return
        if message.data == MARK:
            await message.respond(b"")
            return
        last = time.perf_counter()
        if not payloads:
            first = last
        payloads.append(message.data)

    # Without limits, as a listener that drops would make the sender look fast.
    await client.subscribe(subject, cb=receive, pending_msgs_limit=0, pending_bytes_limit=0)
    await client.flush()
    say(Ready())
    await asyncio.to_thread(sys.stdin.read)
    await client.close()


def _claims(count: int) -> list[StatusClaim]:
    notes = f"P2P {TYPE}: started (peers: 0, node: {NODE_ID})"
    return [
        StatusClaim(
            *(AGENT_ID, f"operation-{number:06}", 12345, "executing", 15, 0.25, notes),
            *(CLUSTER_ID, TYPE, "started", 0, 100_000),
        )
        for number in range(count)
    ]


async def _publish_rounds(url: str, subject: str, messages: list[bytes]) -> None:
    client = await nats.connect(url, allow_reconnect=False, closed_cb=_give_up)
    say(Ready())
    while await asyncio.to_thread(sys.stdin.readline):
        for message in messages:
            await client.publish(subject, message)
        await client.flush()
    await client.close()


async def publish(url: str, subject: str, count: str) -> None:
    """Publish as many claims one by one in each round, encoded beforehand."""
    claims = [msgspec.json.encode(claim) for claim in _claims(int(count))]
    await _publish_rounds(url, subject, [*claims, END])


async def publish_arrays(url: str, subject: str, count: str) -> None:
    """Publish as many claims in each round, in arrays as a session makes them."""
    arrays = ClaimArrays(1024 * 1024)
    messages = arrays.add(_claims(int(count)))
    await _publish_rounds(url, subject, [*messages, arrays.take()])


_ROLES: Final[dict[str, Callable[..., Any]]] = {
    "listen": listen,
    "publish": publish,
    "publish-arrays": publish_arrays,
}

if __name__ == "__main__":
    asyncio.run(_ROLES[sys.argv[1]](*sys.argv[2:]))
