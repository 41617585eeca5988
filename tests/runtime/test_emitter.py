"""Which way terminal claims go, while other things happen."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

import backbeat_trio as backbeat
from backbeat_trio import StatusClaim, TransportBroken
from backbeat_trio._runtime.claims import ClaimCounts
from backbeat_trio._runtime.emitter import ClaimEmitter
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
        self.reason = ""
        self.largest = 1_000_000

    async def open(self) -> bool:
        await trio.sleep(0.1)
        if self.answer is None:
            raise TransportBroken("the server does not answer")
        return self.answer

    async def store(self, subject: str, claims: Sequence[tuple[str, bytes]]) -> list[bool]:
        self.stores += 1
        await trio.lowlevel.checkpoint()
        return [False] * len(claims)

    def room(self, max_payload: int, *, stored: bool) -> int:
        return min(max_payload, self.largest) if stored else max_payload

    async def publish_unstored(self, subject: str, data: bytes) -> None:
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
        Operations("a", "n", Host(), "test-cluster"),
        agent_id="a",
        counts=ClaimCounts(),
        logger=logging.getLogger("backbeat_trio"),
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


SMILE = "\N{GRINNING FACE}"


@asynccontextmanager
async def limited(
    limit: int,
) -> AsyncGenerator[tuple[backbeat.Session, backbeat.MemoryTransport, list[StatusClaim]], None]:
    """Open a session on a server that takes messages of at most ``limit`` bytes, and listen."""
    transport = backbeat.MemoryTransport(backbeat.MemoryBus())
    transport.max_payload = limit
    heard: list[StatusClaim] = []
    config = backbeat.BackbeatConfig(agent_id="a", node_id="n", tempo_bpm=60.0, lock_timeout=0.0)
    async with backbeat.session(config, transport=transport) as bb, bb.open_claims() as claims:

        async def listen() -> None:
            async for claim in claims:
                heard.append(claim)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen)
            yield bb, transport, heard
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize(("limit", "id"), [(1024, "x" * 1000), (4096, SMILE * 1000)])
async def test_a_claim_that_fits_no_message_is_counted_and_ends_nothing(
    limit: int, id: str, autojump_clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    async with limited(limit) as (bb, _, heard):
        bb.start_operation("election", id="small")
        bb.start_operation("election", id=id)
        await bb.sleep(3.5)
        # The one of the start, and those of three beats.
        assert bb.statistics().claims_dropped == 4
        assert [claim.task_id for claim in heard] == ["small"] * 4
        assert bb.statistics().claims_sent == 4
        bb.complete_operation(id)
        bb.complete_operation("small")
        await bb.sleep(0.5)
        assert heard[-1].state == "done"
        statistics = bb.statistics()
        assert (statistics.claims_dropped, statistics.claims_pending) == (5, 0)
        (error,) = bb.health().errors
        assert "was dropped" in error
        assert id[:20] in error
    assert [text for text in caplog.messages if "was dropped" in text] == [error]


async def test_a_claim_whose_notes_are_too_long_is_shortened(autojump_clock: Clock) -> None:
    async with limited(1024) as (bb, _, heard):
        bb.start_operation("election", id="x" * 700).fail(SMILE * 500)
        await bb.sleep(0.5)
        first, last = heard
        assert first.notes.endswith("node: n)")
        assert last.notes.startswith("P2P operation failed: " + SMILE)
        assert last.notes.endswith("…")
        assert (bb.statistics().claims_dropped, bb.statistics().claims_pending) == (0, 0)
        assert not bb.health().errors


async def test_a_server_that_takes_less_than_the_one_before(autojump_clock: Clock) -> None:
    for turns in range(6):
        async with limited(1_000_000) as (bb, transport, heard):
            for number in range(50):
                bb.start_operation("election", id=f"{number}").fail("x" * 2000)
            for _ in range(turns):
                await trio.lowlevel.checkpoint()
            transport.sever()
            transport.max_payload = 1024
            transport.restore()
            await bb.sleep(2)
            ended = {claim.task_id for claim in heard if claim.state == "failed"}
            assert ended == {str(number) for number in range(50)}
            assert bb.statistics().claims_pending == 0


@pytest.mark.parametrize("answer", [True, False, None])
async def test_a_terminal_claim_that_is_too_large_does_not_stay_pending(
    answer: bool | None, autojump_clock: Clock
) -> None:
    async with emitting(answer) as (emitter, journal, _):
        journal.transport.max_payload = journal.largest = 100
        emitter.emit(claim("terminal"), terminal=True)
        await trio.sleep(1)
        journal.answer = answer or answer is None
        emitter.emit(claim("another"), terminal=True)
        await trio.sleep(10)
        assert emitter.pending == 0
        assert emitter._counts.claims_dropped == 2
        assert journal.stores == 0
        assert len(emitter.recent_errors) == 1
        with trio.fail_after(1):
            await emitter.drain()


async def test_it_is_told_why_there_is_no_stream(
    autojump_clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    async with emitting(False) as (emitter, journal, heard):
        journal.reason = "somebody has other plans"
        for name in ("one", "two", "three"):
            emitter.emit(claim(name), terminal=True)
            await trio.sleep(1)
        assert heard == ["one", "two", "three"]
        assert emitter.pending == 0
        (told,) = caplog.messages
        assert told == "no stream of terminal claims: somebody has other plans"
        assert [text for _, text in emitter.recent_errors] == [told]
        # It may be another server that is asked now, and its answer is no news.
        journal.transport.sever()
        journal.transport.restore()
        emitter.emit(claim("four"), terminal=True)
        await trio.sleep(1)
        assert len(emitter.recent_errors) == 2
        assert caplog.messages == [told]
