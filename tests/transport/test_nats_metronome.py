"""Sessions that follow a metronome over NATS."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import helpers
import trio
from helpers import degraded, leading_at, until
from plain import BEATS, Plain, dump, frame, plain_client

from backbeat_trio import Metronome
from backbeat_trio.testing import NatsServer, open_session

guarded = helpers.guarded(120)


@guarded
async def test_session_keeps_the_beats_of_the_metronome() -> None:
    async with (
        NatsServer() as server,
        leading_at(server.url) as metronome,
        open_session(nats_url=server.url, tempo_bpm=6.0) as bb,
    ):
        assert bb.tempo_bpm == 600.0
        assert not bb.health().local_degradation
        assert bb.statistics().locks == 1
        async for beat in bb.beats():
            # Both read the same clock of the same machine.
            if beat.index >= 10 and bb.current_beat() == metronome.current_beat():
                break
        effective = await bb.set_tempo(1200)
        assert effective % 8 == 0
        await bb.sleep_until(effective + 1)
        assert bb.tempo_bpm == 1200.0
        assert bb.statistics().locks == 1


@guarded
async def test_metronome_that_dies_and_another_that_begins() -> None:
    async with NatsServer() as server, open_session(nats_url=server.url, lock_timeout=0.0) as bb:
        # More beats than the second metronome's first indices: its grid is behind.
        async with leading_at(server.url, leader_id="pulse-a"):
            await degraded(bb, False)
            await bb.sleep_until(12)
            operation = bb.start_operation("election", beats=1000)
        # Holdover: the beats go on by themselves, and each comes.
        expected = None
        async for beat in bb.beats():
            if expected is not None:
                assert beat.index == expected + beat.skipped
            expected = beat.index + 1
            if bb.health().local_degradation and bb.health().connected and beat.index > 20:
                break
        assert bb.statistics().locks == 1
        with bb.move_on_after(1000) as budget:
            left, left_at = budget.beats_left, trio.current_time()
            before, start = bb.current_beat(), operation.start_beat
            async with leading_at(server.url, leader_id="pulse-b"):
                # A look at every turn of the loop, so that the last one is just before the change.
                while bb.statistics().locks == 1:
                    left, left_at = budget.beats_left, trio.current_time()
                    before, start = bb.current_beat(), operation.start_beat
                    await trio.lowlevel.checkpoint()
                passed = (trio.current_time() - left_at) * 10
                # Another grid, far behind the old one...
                assert bb.current_beat() < before - 10
                # ... and the same budgets, and the same beats passed by operations.
                assert abs(left - passed - budget.beats_left) < 2
                moved = bb.current_beat() - before
                assert abs((operation.start_beat - start) - moved) < 2
                await degraded(bb, False)
                assert bb.statistics().locks == 2
                budget.relative_deadline = 2
                await trio.sleep_forever()
        assert budget.cancelled_caught


@guarded
async def test_metronomes_that_follow_each_other_quickly() -> None:
    # Several within a second: each is a new incarnation all the same.
    async with NatsServer() as server, open_session(nats_url=server.url, lock_timeout=0.0) as bb:
        epochs = []

        async def follow(metronome: Metronome, locks: int) -> None:
            await until(lambda: bb.statistics().locks == locks)
            frames = bb.statistics().frames
            await until(lambda: bb.statistics().frames >= frames + 2)
            await until(lambda: bb.current_beat() == metronome.current_beat())

        for number in range(1, 6):
            async with leading_at(server.url, leader_id=f"pulse-{number}") as metronome:
                epochs.append(metronome.epoch)
                await follow(metronome, number)
        assert epochs == sorted(set(epochs))


class Publisher:
    """Beats by hand from a plain client: frames only, and no answer to any ping."""

    def __init__(self, plain: Plain) -> None:
        self.sent = -1
        self.going = True
        self._plain = plain

    async def run(
        self, first: int, count: int, beat_s: float, fields: Callable[[int], dict[str, Any]]
    ) -> None:
        async def run() -> None:
            loop = asyncio.get_running_loop()
            started = loop.time()
            for index in range(first, first + count):
                await asyncio.sleep(started + (index - first) * beat_s - loop.time())
                if not self.going:
                    return
                self.sent = index
                await self._plain.client.publish(BEATS, dump(frame(index, **fields(index))))
                await self._plain.client.flush()

        await self._plain.call(run())


@guarded
async def test_leader_that_only_beats() -> None:
    slow = {"epoch": 7, "seq": 3, "beat0": 12000, "t0_ns": 903_000_000_000, "milli_bpm": 300_000}
    # The same line, and from beat 12016 on twice as fast.
    quick = slow | {"seq": 4, "beat0": 12016, "t0_ns": 906_200_000_000, "milli_bpm": 600_000}

    def fields(index: int) -> dict[str, Any]:
        if index < 12016:
            return {"tempo_bpm": 300.0, "segment": slow, "next_segment": quick}
        return {"tempo_bpm": 600.0, "segment": quick}

    async with (
        NatsServer() as server,
        plain_client(server.url) as plain,
        open_session(nats_url=server.url, lock_timeout=0.0) as bb,
        trio.open_nursery() as nursery,
    ):
        publisher = Publisher(plain)
        nursery.start_soon(publisher.run, 12000, 16, 0.2, fields)
        await degraded(bb, False)
        assert bb.statistics().locks == 1
        assert bb.tempo_bpm == 300.0
        await until(lambda: publisher.sent == 12015)
        assert abs(bb.current_beat() - 12015) <= 1
        await bb.sleep_until(12016)
        nursery.start_soon(publisher.run, 12016, 10_000, 0.1, fields)
        await bb.sleep_until(12020)
        assert bb.tempo_bpm == 600.0
        # It follows the line that both have in common.
        frames = bb.statistics().frames
        await until(lambda: bb.statistics().frames >= frames + 5)
        await until(lambda: abs(bb.current_beat() - publisher.sent) <= 1)
        assert bb.statistics().locks == 1
        # One may be under way.
        await until(lambda: bb.statistics().pings_failed == bb.statistics().pings)
        publisher.going = False
        await degraded(bb, True)
