"""How a session counts claims, and how it listens to live and stored claims of other agents."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Final, final

import msgspec
import trio
from msgspec import UNSET

from .._errors import TransportBroken, TransportClosed
from .._transport.archive import Archive, Stored
from .._transport.protocol import Message, Subscription, Transport
from .._wire import StatusClaim, decode_claims, is_terminal


class ClaimCounts(msgspec.Struct):
    """What a session counts of claims while it runs.

    The emitter and the listeners change it. `Session.statistics` copies it into
    `SessionStatistics`, which has the same fields and says what each of them counts.
    """

    claims_sent: int = 0
    claims_stored: int = 0
    claims_coalesced: int = 0
    claims_undecodable: int = 0
    claims_dropped: int = 0


# How many of the newest messages are remembered, so that none is given twice.
_KNOWN: Final = 10_000
# How many messages may arrive while the last stored claims are being read.
_SEAM_MESSAGES: Final = 65_536


@final
class _Choice:
    # Which claims of a message are given.

    def __init__(self, counts: ClaimCounts, cluster_id: str | None) -> None:
        self._counts = counts
        self._cluster_id = cluster_id

    def of(self, message: Message) -> list[StatusClaim]:
        try:
            claims = decode_claims(message.data)
        except msgspec.DecodeError:
            self._counts.claims_undecodable += 1
            return []
        speaker = message.subject.rpartition(".")[2]
        own = [claim for claim in claims if claim.agent_id == speaker]
        self._counts.claims_undecodable += len(claims) - len(own)
        if self._cluster_id is None:
            return own
        wanted = (self._cluster_id, UNSET)
        return [claim for claim in own if claim.cluster_id in wanted]


@final
class ClaimBatches:
    """An async iterator that gives the claims of one message at a time.

    It gives only claims that name the agent on whose subject they came. A batch is never empty: a
    message without such a claim is skipped. This is not a generator, because a generator ends when
    one of its steps is cancelled.

    Args:
      messages: the messages of the agents.
      counts: where it counts messages that are not valid, and claims that name another agent.
      cluster_id: the cluster whose claims are given. Claims that do not name a cluster are given,
        too, because agents of earlier versions publish them. None gives the claims of all clusters.

    """

    def __init__(
        self, messages: Subscription, counts: ClaimCounts, cluster_id: str | None = None
    ) -> None:
        self._messages = messages
        self._choice = _Choice(counts, cluster_id)

    @property
    def refusal(self) -> str | None:
        """Why the server's permissions refuse these claims; None if they do not."""
        return self._messages.refusal

    def __aiter__(self) -> ClaimBatches:
        return self

    async def __anext__(self) -> list[StatusClaim]:
        while True:
            own = self._choice.of(await anext(self._messages))
            if own:
                return own


@asynccontextmanager
async def open_stored_claims(
    transport: Transport,
    archive: Archive,
    subject: str,
    seconds: float,
    counts: ClaimCounts,
    cluster_id: str | None,
) -> AsyncGenerator[StoredThenLive, None]:
    """Give the terminal claims that were stored, and then live ones, for the length of a block.

    Entering is a checkpoint.

    Args:
      transport: receives the live claims.
      archive: has the stored claims.
      subject: the subject of the claims.
      seconds: for how many seconds, up to now, stored claims are given.
      counts: as for `ClaimBatches`.
      cluster_id: as for `ClaimBatches`.

    Raises:
      ClaimsUnavailable: if nothing stores claims.
      PermissionDenied: if the server's permissions refuse it.
      TransportBroken: if there is no connection or no answer.

    """
    number = await archive.first_since(seconds)
    async with AsyncExitStack() as stack:
        yield StoredThenLive(transport, archive, subject, number, counts, cluster_id, stack)


@final
class StoredThenLive:
    """An async iterator of the claims of one message at a time: first stored ones, then live ones.

    No claim is lost or given twice where the two meet. Once all stored claims have been given, it
    subscribes. Claims that were published before may still be on their way into the stream. So it
    waits until they are stored, and reads the stream once more. A claim that it has heard meanwhile
    and then reads has the same id in both places, and is given once.

    A step that is cancelled changes nothing; the next step does the same work again.
    """

    def __init__(
        self,
        transport: Transport,
        archive: Archive,
        subject: str,
        number: int,
        counts: ClaimCounts,
        cluster_id: str | None,
        stack: AsyncExitStack,
    ) -> None:
        self._transport = transport
        self._archive = archive
        self._subject = subject
        self._next = number
        self._choice = _Choice(counts, cluster_id)
        self._stack = stack
        self._turn = trio.Lock()
        self._ready: deque[list[StatusClaim]] = deque()
        self._known: dict[tuple[str, str | int], None] = {}
        self._subscription: AsyncIterator[Message] | None = None
        self._heard: list[Message] = []
        self._is_live = False
        self.went_live: trio.Event = trio.Event()
        """Set once all stored claims have been read, so that what comes after them is live."""

    def __aiter__(self) -> StoredThenLive:
        return self

    async def __anext__(self) -> list[StatusClaim]:
        if self._ready:
            await trio.lowlevel.checkpoint()
        # Another task may have taken what was ready before the checkpoint.
        while not self._ready:
            if self._is_live and self._subscription is not None:
                self._take_live(await anext(self._subscription))
                continue
            async with self._turn:
                # Another task may have read on while this one waited for its turn.
                if not self._ready and not self._is_live:
                    await self._read_on()
        return self._ready.popleft()

    async def _read_on(self) -> None:
        if self._subscription is None:
            await self._transport.wait_connected()
            stored = await self._archive.read(self._subject, self._next)
            if stored:
                self._take_stored(stored)
                return
        await self._join()

    async def _join(self) -> None:
        transport, archive = self._transport, self._archive
        if self._subscription is None:
            subscription = transport.open_subscription(self._subject, capacity=_SEAM_MESSAGES)
            self._subscription = await self._stack.enter_async_context(subscription)
        while True:
            await transport.wait_connected()
            connection = transport.generation
            await trio.sleep(archive.lag)
            last, number = await archive.last(), self._next
            tail: list[Stored] = []
            while number <= last:
                stored = await archive.read(self._subject, number)
                if not stored:
                    break
                tail += stored
                number = stored[-1].number + 1
            try:
                await transport.flush()
            except TransportBroken:
                continue
            # What was published while there was no connection was not heard. It is read again.
            if transport.generation == connection:
                break
        await self._take_waiting(self._subscription)
        # From here on there is no checkpoint.
        heard = {_key(message) for message in self._heard}
        self._take_stored([each for each in tail if _key(each.message) not in heard])
        for message in self._heard:
            self._take_live(message)
        self._heard.clear()
        self._is_live = True
        self.went_live.set()

    async def _take_waiting(self, subscription: AsyncIterator[Message]) -> None:
        # An iterator cannot be asked whether its next step would wait. So another task takes the
        # steps, and is cancelled once it waits.
        heard = self._heard

        async def take() -> None:
            with suppress(TransportClosed):
                while True:
                    heard.append(await anext(subscription))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(take)
            before = -1
            while before != len(heard):
                before = len(heard)
                for _ in range(3):
                    await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()

    def _take_stored(self, stored: Sequence[Stored]) -> None:
        for number, message in stored:
            self._next = number + 1
            self._know(_key(message))
            # Agents that do not store their terminal claims may have had others stored.
            own = [claim for claim in self._choice.of(message) if is_terminal(claim)]
            if own:
                self._ready.append(own)

    def _take_live(self, message: Message) -> None:
        key = _key(message)
        if key in self._known:
            return
        if message.id:
            # Its agent publishes it again under this id, until it is acknowledged.
            self._know(key)
        own = self._choice.of(message)
        if own:
            self._ready.append(own)

    def _know(self, key: tuple[str, str | int]) -> None:
        self._known[key] = None
        if len(self._known) > _KNOWN:
            del self._known[next(iter(self._known))]


def _key(message: Message) -> tuple[str, str | int]:
    # The subject is a part of the key, because an agent that knows the id of another agent's claim
    # could publish under that id. The data itself may be a megabyte, so only its hash is kept.
    return message.subject, message.id or hash(message.data)


@final
class Claims:
    """An async iterator of the claims of batches, one by one.

    Several tasks may iterate it at the same time: each claim goes to one of them.
    """

    def __init__(self, batches: AsyncIterator[list[StatusClaim]]) -> None:
        self._batches = batches
        self._waiting: deque[StatusClaim] = deque()

    def __aiter__(self) -> Claims:
        return self

    async def __anext__(self) -> StatusClaim:
        if self._waiting:
            await trio.lowlevel.checkpoint()
        # Another task may have taken what was waiting before the checkpoint.
        while not self._waiting:
            self._waiting.extend(await anext(self._batches))
        return self._waiting.popleft()
