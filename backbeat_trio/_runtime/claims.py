"""What a session counts of claims, and how it listens to those of others."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator
from typing import final

import msgspec
import trio
from msgspec import UNSET

from .._transport.protocol import Message
from .._wire import StatusClaim, decode_claims


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


@final
class ClaimBatches:
    """An async iterator of the claims that came in one message, of the speaker alone.

    A batch is never empty: a message without a claim to give is passed over. This is no generator,
    as a generator ends where one of its steps is cancelled.

    Args:
      messages: what the agents publish.
      counts: what is no claim, or is a claim of another agent than its speaker, is counted there.
      cluster_id: the cluster whose claims are given. A claim that names no cluster is given, too,
        as agents of earlier versions publish it. None gives the claims of all clusters.

    """

    def __init__(
        self, messages: AsyncIterator[Message], counts: ClaimCounts, cluster_id: str | None = None
    ) -> None:
        self._messages = messages
        self._counts = counts
        self._cluster_id = cluster_id

    def __aiter__(self) -> ClaimBatches:
        return self

    async def __anext__(self) -> list[StatusClaim]:
        while True:
            message = await anext(self._messages)
            try:
                claims = decode_claims(message.data)
            except msgspec.DecodeError:
                self._counts.claims_undecodable += 1
                continue
            speaker = message.subject.rpartition(".")[2]
            own = [claim for claim in claims if claim.agent_id == speaker]
            self._counts.claims_undecodable += len(claims) - len(own)
            if self._cluster_id is not None:
                wanted = (self._cluster_id, UNSET)
                own = [claim for claim in own if claim.cluster_id in wanted]
            if own:
                return own


@final
class Claims:
    """An async iterator of the same claims, one by one.

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
