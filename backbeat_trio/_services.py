"""What a session's nursery runs beside the listener: the claim emitter and the health ticker."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Final, Protocol, final

import trio
from trio_util import AsyncBool

from ._clock import BeatClock, Beats
from ._errors import TransportBroken
from ._operations import Operations
from ._transport import Transport
from ._wire import (
    ClaimArrays,
    StatusClaim,
    encode_claim,
    format_bpm,
    status_subject,
)

# How many claims are encoded in one go: about half a millisecond of the loop.
_SLICE: Final = 512
# Transition claims that may wait before those of live operations are left to the next beat's.
_WAITING_CLAIMS: Final = 10_000


class Logger(Protocol):
    """What a session logs to; `logging.Logger` is one."""

    def debug(self, msg: object, /, *args: object) -> Any: ...
    def info(self, msg: object, /, *args: object) -> Any: ...
    def warning(self, msg: object, /, *args: object) -> Any: ...
    def error(self, msg: object, /, *args: object) -> Any: ...


@final
class Counters:
    """What a session counts; made an immutable snapshot by `Session.statistics`."""

    def __init__(self) -> None:
        self.frames = 0
        self.frames_undecodable = 0
        self.frames_foreign = 0
        self.frames_stale_epoch = 0
        self.frames_repeated = 0
        self.frames_unexplained = 0
        self.pings = 0
        self.pings_failed = 0
        self.pings_outlying = 0
        self.locks = 0
        self.claims_sent = 0
        self.claims_coalesced = 0
        self.claims_undecodable = 0


@final
class ClaimEmitter:
    """Sends claims, and blocks nobody with it.

    Transition claims are queued, and sent one by one. A beat's claims are made while they are
    sent, so of a slow transport's only the newest ever exist. Terminal claims are kept until the
    server has confirmed that it took them in, and sent again where a connection was lost first.
    """

    def __init__(
        self,
        clock: BeatClock,
        transport: Transport,
        operations: Operations,
        *,
        agent_id: str,
        counters: Counters,
    ) -> None:
        self._clock = clock
        self._transport = transport
        self._operations = operations
        self._subject = status_subject(agent_id)
        self._counters = counters
        self._queue: deque[tuple[StatusClaim, bool]] = deque()
        # Terminal claims that were sent, each with the connection it was sent over.
        self._unconfirmed: deque[tuple[int, StatusClaim]] = deque()
        self._beat_due = False
        self._work = AsyncBool(False)
        self._sent_terminal = AsyncBool(False)

    @property
    def pending(self) -> int:
        """How many terminal claims the server has not confirmed yet."""
        return len(self._unconfirmed) + sum(terminal for _, terminal in self._queue)

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
        """Send what is queued, and wait until the server has all terminal claims."""
        while self._queue or self._unconfirmed:
            await self._transport.wait_connected()
            try:
                await self._send_queue()
                await self._confirm()
            except TransportBroken:
                continue

    async def _send_queue(self) -> None:
        transport, queue = self._transport, self._queue
        # What went over a connection that was lost since may be lost with it.
        lost = [claim for number, claim in self._unconfirmed if number != transport.generation]
        if lost:
            kept = [entry for entry in self._unconfirmed if entry[0] == transport.generation]
            self._unconfirmed = deque(kept)
            queue.extendleft((claim, True) for claim in reversed(lost))
        while queue:
            claim, terminal = queue[0]
            await transport.publish(self._subject, encode_claim(claim, transport.max_payload))
            # Nothing was awaited since it was handed over.
            queue.popleft()
            self._counters.claims_sent += 1
            if terminal:
                self._unconfirmed.append((transport.generation, claim))
                self._sent_terminal.value = True

    async def _send_beat(self) -> None:
        transport, operations = self._transport, self._operations
        self._beat_due = False
        live, beat = operations.live(), self._clock.index()
        arrays = ClaimArrays(transport.max_payload)
        for start in range(0, len(live), _SLICE):
            claims = operations.claims(live[start : start + _SLICE], beat)
            if claims:
                for array in arrays.add(claims):
                    await transport.publish(self._subject, array)
                self._counters.claims_sent += len(claims)
            await trio.lowlevel.checkpoint()
        last = arrays.take()
        if last:
            await transport.publish(self._subject, last)

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


async def tick(
    clock: BeatClock,
    logger: Logger,
    on_beat: Callable[[int, int], None],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Log every beat, and call ``on_beat`` with its index and how many were skipped before it."""
    beats = Beats(clock, bars=False)
    task_status.started()
    async for beat in beats:
        tempo = format_bpm(round(beat.tempo_bpm * 1000))
        logger.debug(
            "🥁 BACKBEAT beat received - beat=%d phase=%s tempo=%s window=%s",
            beat.index,
            beat.phase,
            tempo,
            beat.window_id,
        )
        if beat.downbeat:
            logger.debug(
                "🎼 BACKBEAT downbeat - new bar started - beat=%d window=%s",
                beat.index,
                beat.window_id,
            )
        on_beat(beat.index, beat.skipped)


async def watch_connection(
    transport: Transport,
    logger: Logger,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Log when the connection comes and goes."""
    task_status.started()
    while True:
        await transport.wait_connected()
        logger.info("connected")
        await transport.wait_connected(False)
        # Not the error of the present: by now there may be a connection again.
        errors = transport.statistics().recent_errors
        logger.warning("connection lost: %s", errors[-1][1] if errors else "closed")
