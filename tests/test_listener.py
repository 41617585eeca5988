"""What the listener makes of pings and frames that it is handed."""

from __future__ import annotations

import logging

import trio
import trio.testing

import backbeat_trio as backbeat
from backbeat_trio._clock import BeatClock, local_ns
from backbeat_trio._listener import BeatListener
from backbeat_trio._services import Counters
from backbeat_trio._steering import Ping
from backbeat_trio._wire import Segment, SyncReply

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


def error_ns(clock: BeatClock) -> int:
    return clock.steering.target_at(local_ns()) - AHEAD


async def test_another_leader_is_not_believed_for_one_bad_ping(autojump_clock: Clock) -> None:
    await trio.sleep(1)
    clock, listener = make_listener()
    assert listener._steer([answered(MS)])
    for _ in range(8):
        await trio.sleep(0.5)
        assert listener._steer([answered(MS)])
    ping, reply = answered(200 * MS, epoch=2)
    # All of its way was the way there.
    late = reply.received_ns + 100 * MS
    assert listener._steer([(ping._replace(received_ns=late, replied_ns=late), reply)])
    assert listener.epoch == 2
    assert abs(error_ns(clock)) <= MS
    for _ in range(8):
        await trio.sleep(0.5)
        assert listener._steer([answered(MS, epoch=2)])
        assert abs(error_ns(clock)) <= MS
