"""Sends an agent's claims.

What happens to a claim depends on its kind.

A claim of a live operation is sent once and may be lost, because the claims of the next beat
replace it.

A terminal claim is the last one of its operation, so the emitter keeps it until it is confirmed. If
JetStream has a stream for terminal claims, the emitter stores the claim there and waits for the
acknowledgement. If none comes, it sends the claim again, always under the same id, by which the
stream recognises a claim that it has stored already. If there is no stream, the emitter sends the
claim like any other, and then waits until the server has answered a ping that was sent after it.

A claim that is too large for the server loses a part of its notes. If it is too large without its
notes, it is dropped and counted.
"""

from __future__ import annotations

import enum
import secrets
from collections import deque
from collections.abc import Sequence
from itertools import islice
from typing import Final, Protocol, final

import trio
from trio_util import AsyncBool

from .._config import PREFIX
from .._errors import Logger, TransportBroken
from .._time.clock import BeatClock
from .._time.local import local_ns
from .._transport.protocol import Transport
from .._wire import ClaimArrays, StatusClaim, encode_claim, status_subject
from .claims import ClaimCounts
from .operations import Operations

# How many claims are encoded without a checkpoint, which takes about half a millisecond.
_SLICE: Final = 512
# How many claims may be queued. Further ones, unless they are terminal, are not queued: the claims
# of the next beat replace them.
_WAITING_CLAIMS: Final = 10_000
# How many claims are on their way to the stream at once, and after how many seconds the emitter
# tries again.
_STORED_AT_ONCE: Final = 256
_RETRY_MIN: Final = 0.1
_RETRY_MAX: Final = 5.0
# How many random bytes the id of a stored claim has.
_ID_BYTES: Final = 16
# How many characters of an operation's id an error shows.
_SHOWN: Final = 40


class Journal(Protocol):
    """A stream that takes terminal claims."""

    @property
    def reason(self) -> str:
        """Why there is no stream, once `open` has returned False; empty if that is not an error."""
        ...

    def room(self, max_payload: int, *, stored: bool) -> int:
        """Return how many bytes a claim may have.

        Args:
          max_payload: the largest message that the server takes, in bytes.
          stored: whether the claim is for `store`, and not for `publish_unstored`.

        """
        ...

    async def open(self) -> bool:
        """Create the stream if it is missing, and return whether there is one for this agent.

        Raises:
          TransportBroken: if the server does not answer.

        """
        ...

    async def store(self, subject: str, claims: Sequence[tuple[str, bytes]]) -> list[bool]:
        """Publish claims, each with its id, and return for each whether it was stored."""
        ...

    async def publish_unstored(self, subject: str, data: bytes) -> None:
        """Publish a message for listeners, which no stream stores."""
        ...


class _Delivery(enum.Enum):
    """How terminal claims are delivered at present."""

    UNDECIDED = enum.auto()
    """There was no terminal claim yet, so it is not known whether there is a stream."""
    STREAM = enum.auto()
    """The stream stores them."""
    STREAM_SILENT = enum.auto()
    """There may be a stream, but it does not answer. The claims are published for listeners at
    once, and kept until the stream answers."""
    LISTENERS = enum.auto()
    """There is no stream. The claims are published for listeners."""


@final
class ClaimEmitter:
    """Sends claims in the background, so that operations do not wait for it.

    Claims of changes of phase are queued, and each is sent in a message of its own. The claims of a
    beat are made while they are sent, so a slow transport gets the newest ones only. Terminal
    claims are kept until they are confirmed, as the module's docstring says.

    Args:
      clock: gives the present beat.
      transport: sends the claims. The session runs it.
      operations: the operations whose claims are sent on each beat.
      agent_id: the agent whose claims these are.
      counts: where it counts the claims.
      logger: where it logs, once each, what cannot be delivered.
      journal: the stream for terminal claims; None if there is none.

    """

    def __init__(
        self,
        clock: BeatClock,
        transport: Transport,
        operations: Operations,
        *,
        agent_id: str,
        counts: ClaimCounts,
        logger: Logger,
        journal: Journal | None = None,
    ) -> None:
        self._clock = clock
        self._transport = transport
        self._operations = operations
        self._subject = status_subject(agent_id)
        self._counts = counts
        self._logger = logger
        self.recent_errors: deque[tuple[int, str]] = deque(maxlen=8)
        """What could not be delivered, each with the local time of its report, in nanoseconds."""
        self.confirmed: int = 0
        """How many terminal claims the server or the stream has confirmed."""
        self.trouble: str = ""
        """Why the stream does not take terminal claims at the moment; empty if it does."""
        self._logged: set[str] = set()
        self._told_dropped = self._told_unstored = False
        self._queue: deque[tuple[StatusClaim, bool]] = deque()
        # Terminal claims that were sent, each with the number of the connection.
        self._unconfirmed: deque[tuple[int, StatusClaim]] = deque()
        self._journal = journal
        self._delivery = _Delivery.LISTENERS if journal is None else _Delivery.UNDECIDED
        # Terminal claims that the stream has not acknowledged yet, by their ids.
        self._unstored: dict[str, StatusClaim] = {}
        self._generation = 0
        self._to_store = AsyncBool(False)
        self._beat_due = False
        self._work = AsyncBool(False)
        self._sent_terminal = AsyncBool(False)

    @property
    def has_journal(self) -> bool:
        """Whether there may be a stream for terminal claims."""
        return self._journal is not None

    @property
    def pending(self) -> int:
        """How many terminal claims neither the server nor the stream has confirmed yet."""
        waiting = sum(terminal for _, terminal in self._queue)
        return len(self._unconfirmed) + len(self._unstored) + waiting

    @property
    def queued(self) -> int:
        """How many claims wait to be sent."""
        return len(self._queue)

    def emit(self, claim: StatusClaim, *, terminal: bool = False) -> None:
        """Queue a claim."""
        if terminal or (self._transport.connected and len(self._queue) < _WAITING_CLAIMS):
            self._queue.append((claim, terminal))
        else:
            self._counts.claims_coalesced += 1
            self._beat_due = True
        self._work.value = True

    def beat(self) -> None:
        """Order the claims of all live operations to be sent."""
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
                    # Claims that were not sent are still queued. The claims of the newest beat
                    # follow them.
                    self._work.value = self._beat_due = True

    async def drain(self) -> None:
        """Send what is queued, and wait until all terminal claims are confirmed."""
        while self._queue or self._unconfirmed or self._unstored:
            await self._transport.wait_connected()
            try:
                await self._send_queue()
                if self._unstored and self._journal is not None:
                    await self._store(self._journal)
                await self._confirm()
            except TransportBroken:
                # Listeners hear each attempt, so there must not be many.
                await trio.sleep(_RETRY_MIN)

    def _room(self, *, terminal: bool = False) -> int:
        # How many bytes a message for listeners may have.
        limit = self._transport.max_payload
        if self._journal is None or (terminal and self._delivery is _Delivery.LISTENERS):
            return limit
        return self._journal.room(limit, stored=False)

    async def _publish(self, data: bytes, *, terminal: bool = False) -> None:
        try:
            if self._journal is None or (terminal and self._delivery is _Delivery.LISTENERS):
                await self._transport.publish(self._subject, data)
            else:
                await self._journal.publish_unstored(self._subject, data)
        except ValueError as error:
            if len(data) <= self._transport.max_payload:
                raise
            # Between encoding and publishing, there came a new connection, to a server that accepts
            # less. The claims that were not sent are encoded again.
            raise TransportBroken(str(error)) from None

    def _drop(self, claim: StatusClaim | None = None, count: int = 1) -> None:
        self._counts.claims_dropped += count
        if self._told_dropped or not count:
            return
        self._told_dropped = True
        of = "" if claim is None else f" of operation {claim.task_id[:_SHOWN]!r}"
        self._tell(
            f"a claim{of} was dropped, because it is larger than the server accepts even without "
            "its notes; `claims_dropped` counts all of them"
        )

    def _tell(self, text: str) -> None:
        self.recent_errors.append((local_ns(), text))
        if text not in self._logged:
            self._logged.add(text)
            self._logger.warning("%s", text)

    async def _send_queue(self) -> None:
        transport, queue = self._transport, self._queue
        if self._journal is not None and self._generation != transport.generation:
            # Another server, or the same one with more of its cluster, may have JetStream.
            self._generation = transport.generation
            if self._delivery is _Delivery.LISTENERS:
                self._delivery = _Delivery.UNDECIDED
        # Claims that were sent over a connection that was lost may be lost, too.
        lost = [claim for number, claim in self._unconfirmed if number != transport.generation]
        if lost:
            kept = [entry for entry in self._unconfirmed if entry[0] == transport.generation]
            self._unconfirmed = deque(kept)
            queue.extendleft((claim, True) for claim in reversed(lost))
        while queue:
            entry = claim, terminal = queue[0]
            if not terminal or self._delivery in (_Delivery.LISTENERS, _Delivery.STREAM_SILENT):
                data = encode_claim(claim, self._room(terminal=terminal))
                if data is None:
                    queue.popleft()
                    self._drop(claim)
                    continue
                await self._publish(data, terminal=terminal)
                self._counts.claims_sent += 1
            # While this claim waited to be sent, others may have been queued before it.
            queue.remove(entry)
            if not terminal:
                continue
            if self._delivery is _Delivery.LISTENERS:
                self._unconfirmed.append((transport.generation, claim))
                self._sent_terminal.value = True
            else:
                # A client that could guess the id could store something else under it first. The
                # stream would then take this claim for a repetition.
                self._unstored[secrets.token_urlsafe(_ID_BYTES)] = claim
                self._to_store.value = True

    async def _send_beat(self) -> None:
        operations = self._operations
        self._beat_due = False
        live, beat = operations.live(), self._clock.index()
        arrays = ClaimArrays(self._room())
        for start in range(0, len(live), _SLICE):
            claims = operations.claims(live[start : start + _SLICE], beat)
            dropped = -arrays.dropped
            for array in arrays.add(claims):
                await self._publish(array)
            dropped += arrays.dropped
            self._drop(count=dropped)
            self._counts.claims_sent += len(claims) - dropped
            await trio.lowlevel.checkpoint()
        last = arrays.take()
        if last:
            await self._publish(last)

    # The stream.

    @trio.lowlevel.enable_ki_protection
    async def _store_forever(self, journal: Journal) -> None:
        delay = _RETRY_MIN
        while True:
            await self._to_store.wait_value(True)
            self._to_store.value = False
            await self._transport.wait_connected()
            before = self._counts.claims_stored
            try:
                await self._store(journal)
            except TransportBroken as error:
                self.trouble = str(error)
            else:
                self.trouble = ""
            if self._unstored:
                delay = _RETRY_MIN if self._counts.claims_stored > before else delay
                await trio.sleep(delay)
                # Listeners hear each attempt, so there must not be many.
                delay = min(2 * delay, _RETRY_MAX)
                self._to_store.value = True

    async def _store(self, journal: Journal) -> None:
        if self._delivery is not _Delivery.STREAM:
            await self._find_delivery(journal)
        while self._unstored and self._delivery is _Delivery.STREAM:
            room = journal.room(self._transport.max_payload, stored=True)
            data = []
            for number, claim in list(islice(self._unstored.items(), _STORED_AT_ONCE)):
                encoded = encode_claim(claim, room)
                if encoded is None:
                    del self._unstored[number]
                    self._drop(claim)
                else:
                    data.append((number, encoded))
            if not data:
                continue
            stored = await journal.store(self._subject, data)
            for (number, _), good in zip(data, stored, strict=True):
                if good and self._unstored.pop(number, None) is not None:
                    self._counts.claims_sent += 1
                    self._counts.claims_stored += 1
                    self.confirmed += 1
            if not any(stored):
                # The stream may have been deleted, so look for it again.
                self._delivery = _Delivery.STREAM_SILENT
                raise TransportBroken("the stream does not acknowledge any claim")

    async def _find_delivery(self, journal: Journal) -> None:
        first = self._delivery is _Delivery.UNDECIDED
        try:
            self._delivery = _Delivery.STREAM if await journal.open() else _Delivery.LISTENERS
        except TransportBroken:
            self._delivery = _Delivery.STREAM_SILENT
            if first:
                for claim in list(self._unstored.values()):
                    data = encode_claim(claim, self._room())
                    if data is not None:
                        await self._publish(data)
            raise
        if self._delivery is _Delivery.LISTENERS:
            if journal.reason:
                self._tell(f"no stream of terminal claims: {journal.reason}")
            elif not self._told_unstored:
                self._told_unstored = True
                self._logger.info(
                    "terminal claims are not stored, as the server has no JetStream: only programs "
                    "that listen at that moment get them. Start nats-server with -js, or set "
                    "`store_claims` (%sSTORE_CLAIMS) to false",
                    PREFIX,
                )
            self._queue.extendleft((claim, True) for claim in reversed(self._unstored.values()))
            self._unstored.clear()
            self._work.value = True

    async def _confirm(self) -> None:
        number, count = self._transport.generation, len(self._unconfirmed)
        await self._transport.flush()
        if number == self._transport.generation:
            for _ in range(count):
                self._unconfirmed.popleft()
            self.confirmed += count

    @trio.lowlevel.enable_ki_protection
    async def _confirm_forever(self) -> None:
        while True:
            await self._sent_terminal.wait_value(True)
            self._sent_terminal.value = False
            try:
                await self._confirm()
            except TransportBroken:
                self._work.value = True
