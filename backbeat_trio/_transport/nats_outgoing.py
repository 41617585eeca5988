"""The way from Trio to a connection's thread: what is handed over, and how it is written.

What is handed over goes through a deque, with one wake-up of the thread for all that is in it. The
wake-up itself writes messages while the socket takes them. Otherwise a task in the thread does,
which waits for the socket. The thread notes when a message was sent.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Final, NamedTuple, TypeAlias, final

import trio
from msgspec import Struct

from .._errors import TransportBroken
from .nats_wire import Wire, encode_publish

# Publishers wait from so many bytes on their way to the thread until there are only so many.
_HIGH_WATER: Final = 2 * 1024 * 1024
_LOW_WATER: Final = 1024 * 1024
# How much is joined into one piece of memory and written at once, in bytes of payload.
_PIECE: Final = 64 * 1024


class Departure:
    """When a message passed the socket."""

    __slots__ = ("stamp",)

    def __init__(self) -> None:
        self.stamp = 0
        """By the clock of the thread; 0 until then."""


class Outcome:
    """The result of a call, on Trio's side."""

    def __init__(self) -> None:
        self.event = trio.Event()
        self.value: Any = None
        self.error: Exception | None = None

    def settle(self, value: Any, error: Exception | None) -> None:
        """Keep what the call returned or raised."""
        self.value, self.error = value, error
        self.event.set()


class Publish(Struct, frozen=True):
    # Messages are many, and no tuple is made as quickly.

    subject: str
    data: bytes
    reply: str
    block: bytes
    """The encoded headers."""
    departure: Departure | None
    """Where the instant is kept at which it is written."""


class Subscribe(NamedTuple):
    number: int
    subject: str
    queue: str


class Unsubscribe(NamedTuple):
    number: int
    keep: bool
    """Whether what still arrives is passed on."""


class Flush(NamedTuple):
    number: int


class Call(NamedTuple):
    function: Callable[[Any], Awaitable[Any]]
    outcome: Outcome


Item: TypeAlias = Publish | Subscribe | Unsubscribe | Flush | Call


@final
class Outgoing:
    """What is on its way to the thread of one connection.

    Args:
      fail: called on Trio's side if the thread turns out to have ended.
      to_trio: has a function called on Trio's side. It may be called in both threads.

    """

    def __init__(
        self,
        fail: Callable[[Exception], None],
        to_trio: Callable[[Callable[[], object]], None],
    ) -> None:
        self.written = 0
        """How many bytes have been written."""
        self.ended = asyncio.Event()
        """Set in the thread once nothing can be written any more."""
        self._fail = fail
        self._to_trio = to_trio
        self._items: deque[Item] = deque()
        self._queued = 0
        self._is_lost = False
        self._room = trio.Event()
        self._waiting = False
        self._pusher: trio.lowlevel.Task | None = None
        self._woken = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wire: Wire | None = None
        self._wake = asyncio.Event()
        self._idle = False
        self._stopping = False

    # Trio's side.

    @property
    def backlog(self) -> int:
        """How many bytes have been passed to the thread, and not been written yet."""
        return self._queued - self.written

    def send(self, item: Item, *, at_once: bool = False) -> None:
        """Hand an item to the thread.

        Args:
          item: the item.
          at_once: whether the thread is woken without waiting for what other tasks may hand over.

        """
        if isinstance(item, Publish):
            self._queued += len(item.data) + len(item.block)
        self._items.append(item)
        if at_once and not self._woken:
            self._woken = True
            self._push()
        else:
            self._wake_thread()

    async def push(self) -> None:
        """Wake the thread for what is handed over, until the connection is gone.

        It does so once all tasks have run that Trio runs in the same turn. The thread takes the GIL
        when it wakes: if it woke for the first message, the tasks that are about to send others
        would wait for it, each for each.
        """
        task = trio.lowlevel.current_task()

        def abort(_: object) -> trio.lowlevel.Abort:
            self._pusher = None
            return trio.lowlevel.Abort.SUCCEEDED

        try:
            while not self._is_lost:
                self._pusher = task
                await trio.lowlevel.wait_task_rescheduled(abort)
                self._push()
        finally:
            # Whatever was handed over since is pushed by this, and what follows at once.
            self._push()

    async def wait_room(self) -> None:
        """Wait while too much is on its way to the thread."""
        while self.backlog > _HIGH_WATER and not self._is_lost:
            if self._room.is_set():
                self._room = trio.Event()
            self._waiting = True
            # The thread may have caught up before it saw the flag.
            if self.backlog > _LOW_WATER:
                await self._room.wait()

    def lose(self) -> None:
        """Wake the tasks that wait, because the connection is lost."""
        self._is_lost = True
        self._wake_pusher()
        self._room.set()

    def _wake_thread(self) -> None:
        if self._woken or self._loop is None:
            return
        self._woken = True
        if not self._wake_pusher():
            self._push()

    def _wake_pusher(self) -> bool:
        pusher, self._pusher = self._pusher, None
        if pusher is not None:
            trio.lowlevel.reschedule(pusher)
        return pusher is not None

    def _push(self) -> None:
        if self._loop is None:
            return
        try:
            self._loop.call_soon_threadsafe(self._on_wake)
        except RuntimeError:
            # The loop has ended by itself, or it belongs to the process that this is a fork of.
            self._fail(TransportBroken("the connection's thread has ended"))

    def _made_room(self) -> None:
        self._room.set()

    # The thread's side.

    def start(self, wire: Wire) -> None:
        """Let the thread be woken from now on; call it in the thread."""
        self._wire = wire
        self._loop = asyncio.get_running_loop()

    def stop(self) -> None:
        """Have `pump` return once it has written what has been handed over."""
        self._stopping = True
        self._wake.set()

    def end(self) -> None:
        """Note that nothing can be written any more."""
        self._stopping = True
        self.ended.set()

    async def pump(self, wire: Wire, start: Callable[[Flush | Call], object]) -> None:
        """Write what is handed over, until it is stopped and everything has been written.

        Args:
          wire: where to write.
          start: called with each item that is neither a message nor a subscription.

        """
        while True:
            while self._items and not self.ended.is_set():
                if self._write_piece():
                    # So that what arrives gets its turn.
                    await asyncio.sleep(0)
                    continue
                item = self._items.popleft()
                if isinstance(item, Publish):
                    if item.departure is not None:
                        item.departure.stamp = time.perf_counter_ns()
                    await wire.write(
                        encode_publish(item.subject, item.reply, item.block, item.data)
                    )
                    self._count_written(len(item.data) + len(item.block))
                elif isinstance(item, (Flush, Call)):
                    start(item)
                elif isinstance(item, Subscribe):
                    await wire.subscribe_as(item.number, item.subject, item.queue)
                else:
                    await wire.unsubscribe_as(item.number, keep=item.keep)
            if self._stopping:
                return
            self._woken = False
            # Something that was passed on before the flag was cleared has not woken this task.
            if not self._items:
                self._idle = True
                await self._wake.wait()
                self._idle = False
            self._wake.clear()

    def _on_wake(self) -> None:
        if self._idle:
            # First: what is handed over from now on wakes the thread again.
            self._woken = False
            self._write_piece()
            if not self._items and not self._stopping:
                return
        self._wake.set()

    def _write_piece(self) -> bool:
        # Write messages at once, and return whether there were any and the socket takes them.
        wire, items = self._wire, self._items
        if wire is None or not wire.is_ready:
            return False
        parts: list[bytes] = []
        departures: list[Departure] = []
        size = 0
        while items and size < _PIECE:
            item = items[0]
            if not isinstance(item, Publish):
                break
            items.popleft()
            if item.departure is not None:
                departures.append(item.departure)
            size += len(item.data) + len(item.block)
            parts.append(encode_publish(item.subject, item.reply, item.block, item.data))
        if not parts:
            return False
        data = b"".join(parts)
        stamp = time.perf_counter_ns()
        for departure in departures:
            departure.stamp = stamp
        wire.write_now(data)
        self._count_written(size)
        return True

    def _count_written(self, size: int) -> None:
        self.written += size
        if self._waiting and self.backlog < _LOW_WATER:
            self._waiting = False
            self._to_trio(self._made_room)
