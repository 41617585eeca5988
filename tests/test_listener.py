"""What the listener makes of pings and frames that it is handed."""

from __future__ import annotations

import logging

import pytest
import trio
import trio.testing

import backbeat_trio as backbeat
from backbeat_trio._clock import BeatClock, local_ns
from backbeat_trio._listener import BeatListener
from backbeat_trio._services import Counters
from backbeat_trio._steering import Ping
from backbeat_trio._timeline import Timeline
from backbeat_trio._wire import BeatFrame, Segment, SyncReply

MS = 1_000_000
AHEAD = 5_000 * MS
SEGMENT = Segment(1, 0, 0, 0, 120_000)

Clock = trio.testing.MockClock


def make_listener() -> tuple[BeatClock, BeatListener]:
    clock = BeatClock.local(120_000, 4)
    listener = BeatListener(
        clock,
        backbeat.MemoryTransport(backbeat.MemoryBus()),
        cluster_id="c",
        agent_id="agent",
        logger=logging.getLogger("backbeat_trio"),
        counters=Counters(),
    )
    return clock, listener


def answered(delay_ns: int, epoch: int = 1) -> tuple[Ping, SyncReply]:
    now = local_ns()
    there = now - delay_ns // 2 + AHEAD
    reply = SyncReply("c", epoch, "pulse", there, there, 4, SEGMENT)
    return Ping(now - delay_ns, there, there, now), reply


def hear_frame(listener: BeatListener) -> None:
    index = Timeline((SEGMENT,)).index_at(local_ns() + AHEAD)
    frame = BeatFrame(
        "c", index, index % 4 == 0, "upbeat", 120.0, 4, "w", 1, "pulse", segment=SEGMENT
    )
    listener._hear(frame, Timeline.of(frame), local_ns())


def error_ns(clock: BeatClock) -> int:
    return clock.steering.target_at(local_ns()) - AHEAD


@pytest.mark.parametrize("delay", [MS, 80 * MS])
async def test_frames_steer_only_where_they_are_better_than_pings(
    delay: int, autojump_clock: Clock
) -> None:
    await trio.sleep(1)
    clock, listener = make_listener()
    assert listener._steer([answered(delay)], None)
    assert listener.locked.is_set()
    assert abs(error_ns(clock)) <= 1000
    # A burst is lost, and the frame that comes then was on its way for 40 ms.
    await trio.sleep(0.54)
    listener._steer([], None)
    hear_frame(listener)
    assert abs(error_ns(clock)) <= 1000
    # Of a clock whose rate is not known the pings tell little after three minutes.
    await trio.sleep(180)
    listener._steer([], None)
    hear_frame(listener)
    assert error_ns(clock) == pytest.approx(-40 * MS, abs=MS)


async def test_another_leader_is_not_believed_for_one_bad_ping(autojump_clock: Clock) -> None:
    await trio.sleep(1)
    clock, listener = make_listener()
    assert listener._steer([answered(MS)], None)
    for _ in range(8):
        await trio.sleep(0.5)
        assert listener._steer([answered(MS)], None)
    ping, reply = answered(200 * MS, epoch=2)
    # All of its way was the way there.
    late = reply.received_ns + 100 * MS
    assert listener._steer([(ping._replace(received_ns=late, replied_ns=late), reply)], None)
    assert listener.epoch == 2
    assert abs(error_ns(clock)) <= MS
    for _ in range(8):
        await trio.sleep(0.5)
        assert listener._steer([answered(MS, epoch=2)], None)
        assert abs(error_ns(clock)) <= MS
