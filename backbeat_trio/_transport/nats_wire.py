"""nats-py's client, with a shorter way for messages in both directions.

nats-py takes what arrives through the queue and the task of its subscription, and what is published
through a task that writes. Each costs a turn of the event loop, and more processor time than the
message itself. Here, what arrives for a subscription of ours is passed on as soon as it has been
parsed. What is published is written at once while the socket takes it. Logging in, TLS, pings and
JetStream are nats-py's own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final, TypeAlias, final

import nats.aio.client
import nats.errors
from nats.protocol.parser import Parser

# nats-py's flush must never be cut short, as that ends its read loop. So it gets no time limit.
_FOREVER: Final = 10**9

Take: TypeAlias = Callable[[int, bytes, bytes, bytes, bytes | None], None]
"""Takes a message: its subscription's number, subject, reply subject, payload, and headers."""


@final
class _Parser(Parser):
    def __init__(self, wire: Wire, parsed: Callable[[], None]) -> None:
        super().__init__(wire)
        self._parsed = parsed

    async def parse(self, data: bytes = b"") -> None:
        await super().parse(data)
        self._parsed()


@final
class Wire(nats.aio.client.Client):
    """One connection. All of its methods run in its event loop's thread.

    Args:
      check: called before anything is sent to the server; it may raise.
      take: called with each message of a subscription that `subscribe_as` has made.
      parsed: called once all messages that arrived together have been taken.

    """

    def __init__(self, check: Callable[[], None], take: Take, parsed: Callable[[], None]) -> None:
        super().__init__()
        self._ps = _Parser(self, parsed)
        self._check = check
        self._take = take
        self._numbers: dict[int, int] = {}
        self._sids: dict[int, int] = {}

    def _connect_command(self) -> bytes:
        # nats-py signs for whoever greets it with a nonce, and what signs is no option that could
        # be a callable which looks first. This is the step before anything leaves.
        self._check()
        return super()._connect_command()

    @property
    def working(self) -> list[asyncio.Task[Any]]:
        """The tasks that read and that write; if one has ended, the client is of no use."""
        return [task for task in (self._reading_task, self._flusher_task) if task is not None]

    async def flush(self, timeout: int = _FOREVER) -> None:
        """Wait until the server has answered a ping."""
        # nats-py reports success at once if nothing would read the server's answer.
        if any(task.done() for task in self.working):
            raise nats.errors.ConnectionClosedError
        await super().flush(timeout)

    # Receiving.

    async def subscribe_as(self, number: int, subject: str, queue: str) -> None:
        """Subscribe, and have what arrives given to `take` with this number."""
        self._sid += 1
        self._numbers[self._sid] = number
        self._sids[number] = self._sid
        await self.write(f"SUB {subject} {queue} {self._sid}\r\n".encode())

    async def unsubscribe_as(self, number: int, *, keep: bool) -> None:
        """End a subscription; with ``keep``, what still arrives for it is passed on."""
        sid = self._sids.get(number)
        if sid is None:
            return
        if not keep:
            del self._sids[number], self._numbers[sid]
        await self.write(f"UNSUB {sid}\r\n".encode())

    async def _process_msg(
        self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes | None
    ) -> None:
        number = self._numbers.get(sid)
        if number is None:
            await super()._process_msg(sid, subject, reply, data, headers)  # type: ignore[arg-type]
            return
        stats = self.stats
        stats["in_msgs"] += 1
        stats["in_bytes"] += len(data)
        self._take(number, subject, reply, data, headers)

    # Sending.

    @property
    def is_ready(self) -> bool:
        """Whether the socket has taken everything so far, so that `write_now` may be called."""
        writer = self.writer
        return (
            writer is not None
            and self.is_connected
            and not writer.is_closing()
            and not writer.get_write_buffer_size()
        )

    @property
    def writer(self) -> asyncio.WriteTransport | None:
        """What writes to the socket; None if there is none yet."""
        stream = getattr(self._transport, "_io_writer", None)
        return None if stream is None else stream.transport

    def write_now(self, data: bytes) -> None:
        """Write to the socket, after what nats-py has gathered. Call it only if `is_ready`."""
        writer = self.writer
        assert writer is not None
        if self._pending:
            data = b"".join((*self._pending, data))
            self._pending = []
            self._pending_data_size = 0
        writer.write(data)

    async def write(self, data: bytes) -> None:
        """Have data written, and wait while too much is waiting to be written."""
        if not self.is_connected:
            raise nats.errors.ConnectionClosedError
        await self._send_command(data)
        if self._flush_queue is not None and self._flush_queue.empty():
            await self._flush_pending()

    def abort(self) -> None:
        """Close the socket at once.

        nats-py closes politely or not at all: it waits for a peer that reads no more, and leaves
        the socket of a connection that was refused to the garbage collector.
        """
        for name in ("_io_writer", "_bare_io_writer"):
            stream = getattr(self._transport, name, None)
            if stream is not None:
                stream.transport.abort()


def encode_publish(subject: str, reply: str, block: bytes, data: bytes) -> bytes:
    """Return what publishes a message; ``block`` are its encoded headers."""
    if block:
        head = f"HPUB {subject} {reply} {len(block)} {len(block) + len(data)}\r\n".encode()
        return b"".join((head, block, data, b"\r\n"))
    return b"".join((f"PUB {subject} {reply} {len(data)}\r\n".encode(), data, b"\r\n"))
