"""The judgements behind `/healthz` and `/readyz`."""

from __future__ import annotations

import time
from typing import Any

import msgspec
import trio

from backbeat_trio._runtime.probes import LoopTicks, judge_alive, judge_ready
from backbeat_trio.testing import open_session


async def test_ready_needs_a_connection_and_a_fresh_beat(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_session(tempo_bpm=60.0) as bb:
        health = bb.health()
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, ""),
        ({"paused": True, "current_tempo": 0.0, "last_frame_age": 3600.0}, ""),
        ({"tempo_drift": "severe", "errors": ("it is off",), "local_degradation": True}, ""),
        ({"connected": False, "grid": "holdover"}, "there is no connection to the server"),
        ({"connected": False, "grid": "local"}, "there is no connection to the server"),
        ({"grid": "local"}, "no metronome has been heard yet"),
        ({"grid": "holdover"}, "no metronome is heard any more"),
        ({"started": False}, "the session is not open"),
        ({"enabled": False, "connected": False, "grid": "local"}, ""),
        ({"enabled": False, "started": False}, "the session is not open"),
    ]
    for changes, reason in cases:
        ready = judge_ready(msgspec.structs.replace(health, **changes))
        assert (ready.ok, ready.reason) == (not reason, reason), changes


def test_alive_is_the_age_of_the_last_tick() -> None:
    assert judge_alive(9.9996).ok
    assert judge_alive(9.9996).tick_age == 10.0
    assert not judge_alive(10.1).ok
    assert judge_alive(10.1, limit=20.0).ok


async def test_ticks_grow_old_only_while_the_loop_is_blocked() -> None:
    ticks = LoopTicks()
    async with trio.open_nursery() as nursery:
        await nursery.start(ticks.run)
        time.sleep(1.5)
        assert ticks.age >= 1.5
        with trio.fail_after(60):
            while ticks.age >= 1.0:
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()


async def test_a_tick_comes_in_virtual_time(autojump_clock: trio.testing.MockClock) -> None:
    ticks = LoopTicks()
    async with trio.open_nursery() as nursery:
        await nursery.start(ticks.run)
        for _ in range(20):
            await trio.sleep(0.3)
            assert ticks.age <= 0.5
        nursery.cancel_scope.cancel()
    await trio.sleep(30)
    assert ticks.age >= 30
