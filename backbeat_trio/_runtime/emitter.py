"""The claim emitter: what is said, when, and until when it is kept.

A terminal claim goes one of two ways. Where there is a stream for it, it is stored there, under an
id by which the stream knows it again, and kept here until that is acknowledged: it is stored once,
whatever is lost on the way. Where there is none it is sent as all claims are, and kept until the
server has answered a ping that was sent after it.
"""

from __future__ import annotations

import contextlib
import enum
import secrets
from collections import deque
from collections.abc import Sequence
from typing import Final, Protocol, final

import trio
from trio_util import AsyncBool

from .._errors import TransportBroken
from .._time.clock import BeatClock
from .._transport.protocol import Transport
from .._wire import ClaimArrays, StatusClaim, encode_claim, status_subject
from .health import ClaimCounts
from .operations import Operations

# How many claims are encoded in one go: about half a millisecond of the loop.
_SLICE: Final = 512
# Transition claims that may wait before those of live operations are left to the next beat's.
_WAITING_CLAIMS: Final = 10_000
# How many claims are on their way to the stream at once, and how soon it is tried again.
_STORED_AT_ONCE: Final = 256
_RETRY_MIN: Final = 0.1
_RETRY_MAX: Final = 5.0
# What headers take of the largest message, at most.
_HEADERS: Final = 512


class Journal(Protocol):
    """A stream that takes terminal claims."""

    async def open(self) -> bool:
        """Make the stream where it is missing; return whether there can be one.

        Raises:
          TransportBroken: where that cannot be told, as nobody answers.

        """
        ...

    async def store(self, subject: str, claims: Sequence[tuple[str, bytes]]) -> list[bool]:
        """Publish claims, each with its id, and tell which ones were stored."""
        ...

    async def pass_by(self, subject: str, data: bytes) -> None:
        """Publish what is for listeners only, and not to be stored."""
        ...


class _Way(enum.Enum):
    """Where terminal claims go."""

    UNKNOWN = enum.auto()
    """Nothing was terminal yet: whether there is a stream was not asked."""
    STREAM = enum.auto()
    SILENT = enum.auto()
    """There may be a stream, but it does not answer: listeners are told, and it is told later."""
    PLAIN = enum.auto()


@final
class ClaimEmitter:
    """Sends claims, and blocks nobody with it.

    Transition claims are queued, and sent one by one. A beat's claims are made while they are
    sent, so of a slow transport's only the newest ever exist. Terminal claims are kept until the
    server or the stream has confirmed that it took them in, and sent again where a connection was
    lost first.
    """

    def __init__(
        self,
        clock: BeatClock,
        transport: Transport,
        operations: Operations,
        *,
        agent_id: str,
        counters: ClaimCounts,
        journal: Journal | None = None,
    ) -> None:
        self._clock = clock
        self._transport = transport
        self._operations = operations
        self._subject = status_subject(agent_id)
        self._counters = counters
        self._queue: deque[tuple[StatusClaim, bool]] = deque()
        # Terminal claims that were sent, each with the connection it was sent over.
        self._unconfirmed: deque[tuple[int, StatusClaim]] = deque()
        self._journal = journal
        self._way = _Way.PLAIN if journal is None else _Way.UNKNOWN
        # Those that the stream has not acknowledged yet, by their ids.
        self._unstored: dict[str, StatusClaim] = {}
        self._ids = f"{agent_id}-{secrets.token_hex(6)}"
        self._number = 0
        self._generation = 0
        self._to_store = AsyncBool(False)
        self._beat_due = False
        self._work = AsyncBool(False)
        self._sent_terminal = AsyncBool(False)

    @property
    def pending(self) -> int:
        """How many terminal claims were not confirmed yet, by the server or the stream."""
        waiting = sum(terminal for _, terminal in self._queue)
        return len(self._unconfirmed) + len(self._unstored) + waiting

    def emit(self, claim: StatusClaim, *, terminal: bool = False) -> None:
        """Queue a claim."""
        if terminal or (self._transport.connected and len(self._queue) < _WAITING_CLAIMS):
            self._queue.append((claim, terminal))
        else:
            self._counters.claims_coalesced += 1
            self._beat_due = True
        self._work.value = True

    def beat(self) -> None:
        """Have the claims of all live operations sent."""
        self._beat_due = True
        self._work.value = True

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Send until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._confirm_forever)
            if self._journal is not None:
                nursery.start_soon(self._store_forever, self._journal)
            task_status.started()
            while True:
                await self._work.wait_value(True)
                await self._transport.wait_connected()
                self._work.value = False
                try:
                    await self._send_queue()
                    if self._beat_due:
                        await self._send_beat()
                except TransportBroken:
                    # What was not sent is still queued; the newest beat claims follow it.
                    self._work.value = self._beat_due = True

    async def drain(self) -> None:
        """Send what is queued, and wait until all terminal claims are where they belong."""
        while self._queue or self._unconfirmed or self._unstored:
            await self._transport.wait_connected()
            try:
                await self._send_queue()
                if self._unstored and self._journal is not None:
                    await self._store(self._journal)
                await self._confirm()
            except TransportBroken:
                # Each try is heard by whoever listens: they are not to be many.
                await trio.sleep(_RETRY_MIN)

    @property
    def _limit(self) -> int:
        return self._transport.max_payload - (0 if self._journal is None else _HEADERS)

    async def _publish(self, data: bytes, *, terminal: bool = False) -> None:
        if self._journal is None or (terminal and self._way is _Way.PLAIN):
            await self._transport.publish(self._subject, data)
        else:
            await self._journal.pass_by(self._subject, data)

    async def _send_queue(self) -> None:
        transport, queue = self._transport, self._queue
        if self._journal is not None and self._generation != transport.generation:
            # Another server, or the same one with more of its cluster, may have JetStream.
            self._generation = transport.generation
            self._way = _Way.UNKNOWN if self._way is _Way.PLAIN else self._way
        # What went over a connection that was lost since may be lost with it.
        lost = [claim for number, claim in self._unconfirmed if number != transport.generation]
        if lost:
            kept = [entry for entry in self._unconfirmed if entry[0] == transport.generation]
            self._unconfirmed = deque(kept)
            queue.extendleft((claim, True) for claim in reversed(lost))
        while queue:
            entry = claim, terminal = queue[0]
            if not terminal or self._way in (_Way.PLAIN, _Way.SILENT):
                data = encode_claim(claim, self._limit)
                await self._publish(data, terminal=terminal)
                self._counters.claims_sent += 1
            # While it waited to be handed over, others may have been put before it.
            queue.remove(entry)
            if not terminal:
                continue
            if self._way is _Way.PLAIN:
                self._unconfirmed.append((transport.generation, claim))
                self._sent_terminal.value = True
            else:
                self._number += 1
                self._unstored[f"{self._ids}-{self._number}"] = claim
                self._to_store.value = True

    async def _send_beat(self) -> None:
        operations = self._operations
        self._beat_due = False
        live, beat = operations.live(), self._clock.index()
        arrays = ClaimArrays(self._limit)
        for start in range(0, len(live), _SLICE):
            claims = operations.claims(live[start : start + _SLICE], beat)
            if claims:
                for array in arrays.add(claims):
                    await self._publish(array)
                self._counters.claims_sent += len(claims)
            await trio.lowlevel.checkpoint()
        last = arrays.take()
        if last:
            await self._publish(last)

    # The stream.

    async def _store_forever(self, journal: Journal) -> None:
        delay = _RETRY_MIN
        while True:
            await self._to_store.wait_value(True)
            self._to_store.value = False
            await self._transport.wait_connected()
            before = self._counters.claims_stored
            with contextlib.suppress(TransportBroken):
                await self._store(journal)
            if self._unstored:
                delay = _RETRY_MIN if self._counters.claims_stored > before else delay
                await trio.sleep(delay)
                # Each try is heard by whoever listens: they are not to be many.
                delay = min(2 * delay, _RETRY_MAX)
                self._to_store.value = True

    async def _store(self, journal: Journal) -> None:
        if self._way is not _Way.STREAM:
            await self._find_way(journal)
        while self._unstored and self._way is _Way.STREAM:
            batch = list(self._unstored.items())[:_STORED_AT_ONCE]
            data = [(number, encode_claim(claim, self._limit)) for number, claim in batch]
            stored = await journal.store(self._subject, data)
            for (number, _), good in zip(data, stored, strict=True):
                if good and self._unstored.pop(number, None) is not None:
                    self._counters.claims_sent += 1
                    self._counters.claims_stored += 1
            if not any(stored):
                # The stream may have gone; whether it did is asked again.
                self._way = _Way.SILENT
                raise TransportBroken("the stream acknowledges nothing")

    async def _find_way(self, journal: Journal) -> None:
        first = self._way is _Way.UNKNOWN
        try:
            self._way = _Way.STREAM if await journal.open() else _Way.PLAIN
        except TransportBroken:
            self._way = _Way.SILENT
            if first:
                for claim in list(self._unstored.values()):
                    await self._publish(encode_claim(claim, self._limit))
            raise
        if self._way is _Way.PLAIN:
            self._queue.extendleft((claim, True) for claim in reversed(self._unstored.values()))
            self._unstored.clear()
            self._work.value = True

    async def _confirm(self) -> None:
        number, count = self._transport.generation, len(self._unconfirmed)
        await self._transport.flush()
        if number == self._transport.generation:
            for _ in range(count):
                self._unconfirmed.popleft()

    async def _confirm_forever(self) -> None:
        while True:
            await self._sent_terminal.wait_value(True)
            self._sent_terminal.value = False
            try:
                await self._confirm()
            except TransportBroken:
                self._work.value = True
