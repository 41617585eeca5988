"""Which way terminal claims go, while other things happen."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager

import trio
import trio.testing

import backbeat_trio as backbeat
from backbeat_trio import StatusClaim, TransportBroken
from backbeat_trio._runtime.emitter import ClaimEmitter
from backbeat_trio._runtime.health import ClaimCounts
from backbeat_trio._runtime.operations import Operations
from backbeat_trio._time.clock import BeatClock
from backbeat_trio._wire import ClaimState, decode_claims

Clock = trio.testing.MockClock


def claim(name: str, state: ClaimState = "done") -> StatusClaim:
    return StatusClaim("a", name, 0, state, 0, 1.0, "notes")


class Host:
    """A session that is always on beat 0, and emits nothing."""

    def current_beat(self) -> int:
        return 0

    def check_open(self) -> None:
        pass

    def emit(self, claim: StatusClaim, *, terminal: bool = False) -> None:
        pass


class Journal:
    """A stream that answers as it is told to, after a while; it stores nothing."""

    def __init__(self, transport: backbeat.MemoryTransport, answer: bool | None) -> None:
        self.transport = transport
        self.answer = answer
        self.stores = 0

    async def open(self) -> bool:
        await trio.sleep(0.1)
        if self.answer is None:
            raise TransportBroken("nobody answers")
        return self.answer

    async def store(self, subject: str, claims: Sequence[tuple[str, bytes]]) -> list[bool]:
        self.stores += 1
        await trio.lowlevel.checkpoint()
        return [False] * len(claims)

    async def pass_by(self, subject: str, data: bytes) -> None:
        await self.transport.publish(subject, data)


@asynccontextmanager
async def emitting(
    answer: bool | None,
) -> AsyncGenerator[tuple[ClaimEmitter, Journal, list[str]], None]:
    transport = backbeat.MemoryTransport(backbeat.MemoryBus())
    journal, heard = Journal(transport, answer), list[str]()
    emitter = ClaimEmitter(
        BeatClock.local(60_000, 4),
        transport,
        Operations("a", "n", Host()),
        agent_id="a",
        counters=ClaimCounts(),
        journal=journal,
    )

    async def listen(task_status: trio.TaskStatus[None]) -> None:
        async with transport.open_subscription("backbeat.status.a") as messages:
            task_status.started()
            async for message in messages:
                heard.extend(claim.task_id for claim in decode_claims(message.data))

    async with trio.open_nursery() as nursery:
        await nursery.start(transport.run)
        await nursery.start(listen)
        await nursery.start(emitter.run)
        yield emitter, journal, heard
        nursery.cancel_scope.cancel()


async def test_nothing_is_lost_or_doubled_while_it_is_found_that_there_is_no_stream(
    autojump_clock: Clock,
) -> None:
    for turns in range(12):
        async with emitting(False) as (emitter, _, heard):
            emitter.emit(claim("terminal"), terminal=True)
            await trio.sleep(0.1 - 1e-9)
            others = [f"other-{number}" for number in range(40)]
            for name in others:
                emitter.emit(claim(name, "executing"))
            for _ in range(turns):
                await trio.lowlevel.checkpoint()
            autojump_clock.jump(1e-6)
            await trio.sleep(5)
            assert sorted(heard) == sorted(["terminal", *others])
            assert not emitter.pending


async def test_claims_that_come_while_listeners_are_told_of_others(autojump_clock: Clock) -> None:
    for turns in range(12):
        async with emitting(None) as (emitter, _, heard):
            names = [f"terminal-{number}" for number in range(20)]
            for name in names:
                emitter.emit(claim(name), terminal=True)
            await trio.sleep(0.1 - 1e-9)
            autojump_clock.jump(1e-6)
            for _ in range(turns):
                await trio.lowlevel.checkpoint()
            emitter.emit(claim("late"), terminal=True)
            await trio.sleep(5)
            assert set(heard) == {*names, "late"}
            assert emitter.pending == 21


async def test_a_stream_that_refuses_at_once_is_not_asked_without_pause(
    autojump_clock: Clock,
) -> None:
    async with emitting(True) as (emitter, journal, _):
        emitter.emit(claim("terminal"), terminal=True)
        with trio.move_on_after(2):
            await emitter.drain()
        assert 2 <= journal.stores <= 30
        assert emitter.pending == 1


async def test_a_stream_is_looked_for_again_on_another_connection(autojump_clock: Clock) -> None:
    async with emitting(False) as (emitter, journal, heard):
        emitter.emit(claim("one"), terminal=True)
        await trio.sleep(1)
        assert heard == ["one"]
        journal.answer = True
        emitter.emit(claim("two"), terminal=True)
        await trio.sleep(1)
        assert journal.stores == 0
        journal.transport.sever()
        journal.transport.restore()
        emitter.emit(claim("three"), terminal=True)
        await trio.sleep(1)
        assert journal.stores > 0
