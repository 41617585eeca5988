"""The leader: its grid, its frames and its answers."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given, strategies as st
from msgspec import UNSET

import backbeat_trio as backbeat
from backbeat_trio._grid.changes import propose
from backbeat_trio._grid.timeline import Timeline, beat_ns
from backbeat_trio._metronome.metronome import Metronome
from backbeat_trio._transport.store import Entry, MemoryStore, RecordRefused
from backbeat_trio._wire import (
    Segment,
    SyncRequest,
    TempoRequest,
    decode_frame,
    decode_sync_reply,
    decode_tempo_reply,
    encode,
)
from backbeat_trio.testing import CLUSTER_ID, open_session

Clock = trio.testing.MockClock


@asynccontextmanager
async def leading(
    **options: Any,
) -> AsyncGenerator[tuple[Metronome, backbeat.MemoryTransport], None]:
    transport = backbeat.MemoryTransport(backbeat.MemoryBus())
    settings: dict[str, Any] = {"cluster_id": "c", "leader_id": "pulse-a", "tempo_bpm": 120.0}
    metronome = Metronome(transport, **(settings | options))
    async with trio.open_nursery() as nursery:
        await nursery.start(transport.run)
        await nursery.start(metronome.run)
        await trio.testing.wait_all_tasks_blocked()
        yield metronome, transport
        nursery.cancel_scope.cancel()


async def test_each_beat_has_a_frame_at_its_instant(autojump_clock: Clock) -> None:
    transport = backbeat.MemoryTransport(backbeat.MemoryBus())
    metronome = Metronome(transport, cluster_id="c", leader_id="pulse-a", tempo_bpm=120.0)
    async with trio.open_nursery() as nursery:
        await nursery.start(transport.run)
        async with transport.open_subscription("backbeat.beat.c") as messages:
            start = trio.current_time()
            await nursery.start(metronome.run)
            for index in range(20):
                message = await anext(messages)
                frame = decode_frame(message.data)
                assert trio.current_time() - start == index / 2
                assert frame.beat_index == index
                assert frame.downbeat == (index % 8 == 0)
                assert frame.window_id == f"w-{index // 8}"
                assert (frame.tempo_bpm, frame.beats_per_bar) == (120.0, 8)
                assert (frame.leader_id, frame.epoch) == ("pulse-a", metronome.epoch)
                assert frame.segment.milli_bpm == 120_000
                assert frame.next_segment is None
        nursery.cancel_scope.cancel()
    assert metronome.statistics().frames == 20


async def test_sync_replies_are_in_cluster_time(autojump_clock: Clock) -> None:
    async with leading() as (metronome, transport):
        await trio.sleep(3.25)
        request = encode(SyncRequest("c", "agent"))
        answer = await transport.request("backbeat.sync.c", request, timeout=1)
        reply = decode_sync_reply(answer.data)
        assert reply.received_ns == reply.sent_ns == reply.segment.t0_ns + 3_250_000_000
        assert (reply.leader_id, reply.epoch) == ("pulse-a", metronome.epoch)
        for data in (b"{", encode(SyncRequest("other", "agent"))):
            with pytest.raises(backbeat.TransportBroken, match="no answer"):
                await transport.request("backbeat.sync.c", data, timeout=1)
        assert metronome.statistics().undecodable == 2
        assert metronome.statistics().syncs == 1


async def test_a_leader_that_is_pinged_too_often_says_how_long_to_wait(
    autojump_clock: Clock,
) -> None:
    async with leading() as (_, transport):
        request = encode(SyncRequest("c", "a"))
        waits = []
        for _ in range(4200):
            answer = await transport.request("backbeat.sync.c", request, timeout=1)
            waits.append(decode_sync_reply(answer.data).wait_ns)
        assert waits[:4000] == [UNSET] * 4000
        assert all(isinstance(wait, int) and 10**9 < wait < 2 * 10**9 for wait in waits[4000:])
        await trio.sleep(2)
        answer = await transport.request("backbeat.sync.c", request, timeout=1)
        assert decode_sync_reply(answer.data).wait_ns is UNSET


async def test_a_change_of_tempo_is_announced_before_it_takes_effect(autojump_clock: Clock) -> None:
    async with leading() as (_, transport):
        async with transport.open_subscription("backbeat.beat.c") as messages:
            request = encode(TempoRequest("c", 240.0, at_beat=5))
            answer = await transport.request("backbeat.tempo.c", request, timeout=1)
            reply = decode_tempo_reply(answer.data)
            assert (reply.ok, reply.effective_beat) == (True, 5)
            start = trio.current_time()
            for index in range(1, 9):
                frame = decode_frame((await anext(messages)).data)
                assert frame.beat_index == index
                assert (frame.next_segment is None) == (index >= 5)
                assert frame.tempo_bpm == (240.0 if index >= 5 else 120.0)
                if index >= 5:
                    assert frame.segment == reply.segment
            assert trio.current_time() - start == 5 * 0.5 + 3 * 0.25


@pytest.mark.parametrize(
    ("bpm", "at_beat", "text"),
    [
        (0.05, None, "from 0.1 to 6000"),
        (7000, None, "from 0.1 to 6000"),
        (60, 0, "is past"),
        (60, 2, "too soon"),
    ],
)
async def test_a_refused_change_says_why(
    bpm: float, at_beat: int | None, text: str, autojump_clock: Clock
) -> None:
    async with leading() as (metronome, transport):
        await trio.sleep(0.75)
        request = encode(TempoRequest("c", bpm, at_beat=at_beat))
        answer = await transport.request("backbeat.tempo.c", request, timeout=1)
        reply = decode_tempo_reply(answer.data)
        assert not reply.ok
        assert text in str(reply.error)
        assert reply.effective_beat is None
        assert metronome.statistics().refused == 1
        assert metronome.statistics().tempo_changes == 0


async def test_arguments_of_a_change_that_are_not_valid_change_nothing(
    autojump_clock: Clock,
) -> None:
    # No agent could read a frame whose segment begins with the beat 10.0.
    invalid: list[tuple[Any, dict[str, Any], str]] = [
        (240, {"at_beat": 10.0}, "`at_beat` must be an integer"),
        (240, {"at_beat": "10"}, "`at_beat` must be an integer"),
        (240, {"at_beat": -1}, "`at_beat` must be at least 0"),
        (240, {"over": 1.5}, "`over` must be an integer"),
        (False, {}, "`bpm` must be a number"),
        ("", {}, "`bpm` must be a number"),
        (7000, {}, "`bpm` must be from 0.1 to 6000"),
    ]
    async with leading() as (metronome, _):
        for bpm, options, text in invalid:
            with pytest.raises((TypeError, ValueError), match=text):
                await metronome.change_tempo(bpm, **options)
        assert metronome.statistics().tempo_changes == 0


async def test_requests_without_a_reply_subject_and_hostile_ones_are_dropped(
    autojump_clock: Clock,
) -> None:
    async with leading() as (metronome, transport):
        transport.publish_nowait("backbeat.tempo.c", encode(TempoRequest("c", 240.0)))
        transport.publish_nowait("backbeat.tempo.c", b'{"type":"backbeat.tempo.v1"}')
        transport.publish_nowait("backbeat.tempo.c", b"x" * 1_000_000)
        transport.publish_nowait(
            "backbeat.sync.c", encode(SyncRequest("c", "a")), reply="nobody.listens"
        )
        await trio.sleep(1)
        assert metronome.statistics().tempo_changes == 1
        assert metronome.statistics().undecodable == 2
        assert metronome.current_beat() == 2


async def test_frames_can_be_read_whatever_ids_pings_name(autojump_clock: Clock) -> None:
    async with leading() as (metronome, transport):
        async with transport.open_subscription("backbeat.beat.c") as messages:
            for agent_id in ("n" * 129, "n" * 128):
                for process in ("one", "two"):
                    ping = SyncRequest("c", agent_id, process=process)
                    transport.publish_nowait("backbeat.sync.c", encode(ping))
            await trio.sleep(0.6)
            frame = decode_frame((await anext(messages)).data)
        # A frame that names a longer id would not be valid.
        assert frame.contested == ("n" * 128,)
        assert metronome.statistics().undecodable == 2


async def test_the_leader_goes_on_beating_without_a_connection(autojump_clock: Clock) -> None:
    async with leading() as (metronome, transport):
        transport.sever()
        await trio.sleep(2.25)
        assert metronome.statistics().frames_unsent == 4
        transport.restore()
        async with transport.open_subscription("backbeat.beat.c") as messages:
            assert decode_frame((await anext(messages)).data).beat_index == 5


async def test_a_loop_that_was_blocked_sends_one_frame_and_no_burst(mock_clock: Clock) -> None:
    async with leading() as (metronome, transport):
        async with transport.open_subscription("backbeat.beat.c") as messages:
            mock_clock.jump(5.1)
            assert decode_frame((await anext(messages)).data).beat_index == 10
            await trio.testing.wait_all_tasks_blocked()
        assert metronome.statistics().frames == 2


milli = st.integers(100, 6_000_000)


@given(milli, milli, st.integers(0, 10**12), st.integers(1, 16), st.none() | st.integers(0, 400))
def test_proposed_changes_lie_on_downbeats_or_named_beats(
    first: int, second: int, now: int, bar: int, ahead: int | None
) -> None:
    timeline = Timeline((Segment(1, 0, 0, 0, first),))
    index = timeline.index_at(now)
    at_beat = None if ahead is None else index + ahead
    least = max(2 * 60_000 * 10**9 / first, 250_000_000)
    try:
        changed = propose(timeline, now, second, at_beat, beats_per_bar=bar, epoch=7)
    except backbeat.TempoRefused:
        assert at_beat is not None
        assert timeline.time_of(at_beat) - now < least + 2 * beat_ns(first)
        return
    present, added = changed.segments
    assert present == timeline.segments[0]
    assert (added.milli_bpm, added.epoch, added.seq) == (second, 7, 1)
    assert added.t0_ns == timeline.time_of(added.beat0)
    assert added.t0_ns - now >= math.floor(least) - 1
    if at_beat is None:
        assert added.beat0 % bar == 0
        assert timeline.time_of(added.beat0 - bar) - now < least + beat_ns(first)
    else:
        assert added.beat0 == at_beat


def test_a_proposal_replaces_what_is_pending_from_its_beat_on() -> None:
    timeline = Timeline((Segment(1, 0, 0, 0, 60_000),))
    pending = propose(timeline, 0, 120_000, 10, beats_per_bar=8, epoch=1)
    later = propose(pending, 0, 30_000, 12, beats_per_bar=8, epoch=1)
    assert [(s.beat0, s.milli_bpm) for s in later.segments] == [
        (0, 60_000),
        (10, 120_000),
        (12, 30_000),
    ]
    sooner = propose(later, 0, 40_000, 9, beats_per_bar=8, epoch=1)
    assert [segment.beat0 for segment in sooner.segments] == [0, 9]
    assert sooner.segments[-1].seq > later.segments[-1].seq


async def test_statistics_are_immutable(autojump_clock: Clock) -> None:
    async with leading() as (metronome, _):
        with pytest.raises(AttributeError):
            metronome.statistics().frames = 5  # type: ignore[misc]


@pytest.mark.parametrize("bar", [0, 1_000_001])
def test_bar_lengths_that_no_frame_can_carry_are_refused(bar: int) -> None:
    transport = backbeat.MemoryTransport(backbeat.MemoryBus())
    with pytest.raises(ValueError, match="beats_per_bar"):
        Metronome(transport, cluster_id="c", leader_id="pulse-a", beats_per_bar=bar)


async def test_an_agent_follows_frames_alone_if_its_pings_are_too_large(
    autojump_clock: Clock,
) -> None:
    bus = backbeat.MemoryBus()
    transport, small = backbeat.MemoryTransport(bus), backbeat.MemoryTransport(bus)
    small.max_payload = 16
    metronome = Metronome(transport, cluster_id=CLUSTER_ID, leader_id="pulse-a", tempo_bpm=120.0)
    async with trio.open_nursery() as nursery:
        await nursery.start(transport.run)
        await nursery.start(metronome.run)
        async with open_session(transport=small, health_beats=0) as bb:
            await trio.sleep(3.25)
            assert any("no pings" in error for error in bb.health().errors)
            assert bb.health().leader_id == "pulse-a"
            assert bb.current_beat() == metronome.current_beat()
        nursery.cancel_scope.cancel()


class Answering:
    """A store whose answers the test sets."""

    def __init__(self, answer: bool | Exception) -> None:
        self.answer = answer
        self.opened = 0
        self.store = MemoryStore()

    async def open(self) -> bool:
        await trio.lowlevel.checkpoint()
        self.opened += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    async def read(self) -> Entry:
        return await self.store.read()

    async def write(self, data: bytes, revision: int) -> int:
        return await self.store.write(data, revision)


async def test_a_leader_without_a_record_logs_why_and_gets_one_as_soon_as_possible(
    autojump_clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    store = Answering(False)
    async with leading(store=store) as (metronome, transport):
        async with transport.open_subscription("backbeat.beat.c") as messages:
            assert decode_frame((await anext(messages)).data).alone is True
            await trio.sleep(20)
            assert metronome.leads
            refused = backbeat.TransportBroken("permissions refuse it")
            for answer in (refused, RecordRefused("no 3 copies")):
                opened, store.answer = store.opened, answer
                # The store was asked many times, the reason was logged once, and the leader stayed.
                await trio.sleep(20)
                assert store.opened >= opened + 3
                assert caplog.messages.count(f"still without a record: {answer}") == 1
                assert metronome.leads
            assert sum("as there is no JetStream" in text for text in caplog.messages) == 1
            store.answer = True
            await trio.sleep(6)
            assert metronome.leads
            assert store.store.read_nowait().data
            frames = [decode_frame((await anext(messages)).data) for _ in range(120)]
        indices = [frame.beat_index for frame in frames]
        assert indices == list(range(1, 121))


async def test_a_metronome_waits_for_a_store_that_does_not_answer_and_logs_why(
    autojump_clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    store = Answering(backbeat.TransportBroken("no answer in time"))
    async with leading(store=store) as (metronome, _):
        await trio.sleep(30)
        store.answer = backbeat.TransportBroken("permissions refuse it")
        await trio.sleep(30)
        assert not metronome.leads
        told = [text for text in caplog.messages if "the record of the grid" in text]
        waiting = "waiting for the record of the grid:"
        assert told == [f"{waiting} no answer in time", f"{waiting} permissions refuse it"]
        store.answer = True
        await trio.sleep(5)
        assert metronome.leads
        assert "the record of the grid answers" in caplog.messages


async def test_a_store_that_refuses_for_good_ends_the_metronome(autojump_clock: Clock) -> None:
    transport = backbeat.MemoryTransport(backbeat.MemoryBus())
    store = Answering(RecordRefused("no 3 copies"))
    metronome = Metronome(transport, cluster_id="c", leader_id="pulse-a", store=store)
    async with trio.open_nursery() as nursery:
        await nursery.start(transport.run)
        with pytest.raises(RecordRefused, match="no 3 copies"):
            await metronome.run()
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "options",
    [{"cluster_id": "a.b"}, {"cluster_id": ">"}, {"cluster_id": 5}, {"leader_id": None}],
    ids=str,
)
def test_a_metronome_that_nobody_could_hear_is_refused(options: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"cluster_id": "c", "leader_id": "pulse-a"} | options
    (name,) = options
    with pytest.raises((TypeError, ValueError), match=f"`{name}` must be"):
        Metronome(backbeat.MemoryTransport(backbeat.MemoryBus()), **settings)
