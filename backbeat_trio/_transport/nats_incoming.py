"""The way from a connection's thread to Trio: what has arrived, and how it is passed on.

Messages go through a deque, with one `run_sync_soon` for all that arrived together. The thread
notes when each of them arrived. These times are passed on as ages, because the clocks of the two
threads differ.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Final, final

from msgspec import Struct

from .._time.local import local_ns
from .headers import decode_headers

# How much may be on its way from the thread; more messages are dropped.
_INCOMING_MESSAGES: Final = 65_536
_INCOMING_BYTES: Final = 64 * 1024 * 1024
# How many messages are passed on before other tasks get a turn.
_AT_ONCE: Final = 1024

INBOX: Final = 0


class Arrival(Struct, frozen=True):
    # Messages are many, and no tuple is made as quickly.

    number: int
    """The subscription that it came for; `INBOX` for answers to requests."""
    subject: str
    data: bytes
    reply: str
    stamp: int
    status: str
    headers: dict[str, str] | None
    size: int
    """Of the payload and the headers, in bytes."""


@final
class Incoming:
    """What is on its way from the thread of one connection.

    Args:
      dispatch: called on Trio's side with each message, and with what to add to its time stamp to
        get local time, in nanoseconds. It must not raise.
      count_dropped: called on Trio's side with the number of messages that were dropped.
      to_trio: has a function called on Trio's side. It is called in the thread.

    """

    def __init__(
        self,
        dispatch: Callable[[Arrival, int], object],
        count_dropped: Callable[[int], object],
        to_trio: Callable[[Callable[[], object]], None],
    ) -> None:
        self._dispatch = dispatch
        self._count_dropped = count_dropped
        self._to_trio = to_trio
        self._arrivals: deque[Arrival] = deque()
        # Each thread changes only one of the two, so no sum is changed by two threads.
        self._taken_bytes = self._passed_bytes = 0
        self._dropped = self._dropped_reported = 0
        self._told = False

    # Trio's side.

    def drain(self) -> None:
        """Pass on what has arrived, without waiting for Trio's loop to do it."""
        arrivals, dispatch = self._arrivals, self._dispatch
        # First: what is appended from now on tells of itself.
        self._told = False
        if not arrivals:
            # Each request that is cancelled asks, and there may be thousands.
            return
        behind = _behind_ns()
        dropped = self._dropped
        self._count_dropped(dropped - self._dropped_reported)
        self._dropped_reported = dropped
        for _ in range(min(len(arrivals), _AT_ONCE)):
            arrival = arrivals.popleft()
            self._passed_bytes += arrival.size
            dispatch(arrival, behind)
        if arrivals:
            self._tell()

    # The thread's side.

    def take(
        self, number: int, subject: bytes, reply: bytes, data: bytes, block: bytes | None
    ) -> None:
        """Queue a message, or drop it if too many are waiting; see `nats_wire.Take`."""
        stamp = time.perf_counter_ns()
        arrivals = self._arrivals
        if (
            len(arrivals) >= _INCOMING_MESSAGES
            or self._taken_bytes - self._passed_bytes > _INCOMING_BYTES
        ):
            self._dropped += 1
            return
        status, headers, size = "", None, len(data)
        if block:
            status, headers = decode_headers(block)
            size += len(block)
        self._taken_bytes += size
        arrivals.append(
            Arrival(
                number,
                # Whatever these are, they must not end the task that reads.
                subject.decode(errors="replace"),
                data,
                reply.decode(errors="replace"),
                stamp,
                status,
                headers,
                size,
            )
        )

    def tell(self) -> None:
        """Have the messages passed on that were taken."""
        # Once for all messages that arrived together. Trio's thread would take the GIL for the
        # first of them, and hold up the parsing of the others.
        if self._arrivals and not self._told:
            self._tell()

    def _tell(self) -> None:
        # Each call writes to a socket pair, so that one for a batch is much cheaper than one for
        # each message.
        self._told = True
        self._to_trio(self.drain)


def _behind_ns() -> int:
    # Return what to add to a time of the other thread's clock to get local time. If this thread is
    # interrupted between reading the two clocks, the result is wrong by as much. So the best of a
    # few results counts, as with pings.
    best, behind = 1 << 62, 0
    for _ in range(3):
        before = time.perf_counter_ns()
        local = local_ns()
        after = time.perf_counter_ns()
        if after - before < best:
            best, behind = after - before, local - (before + after) // 2
        if best < 20_000:
            break
    return behind
