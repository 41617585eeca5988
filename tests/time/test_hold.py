"""Waits while the position is held because the agent is ahead of its cluster."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import trio
import trio.testing
from clocks import running_clock
from hypothesis import given, strategies as st

from backbeat_trio._grid.timeline import Timeline
from backbeat_trio._time.beats import Beats
from backbeat_trio._time.clock import BeatClock
from backbeat_trio._time.local import local_ns
from backbeat_trio._wire import Segment

Clock = trio.testing.MockClock
SECOND = 1_000_000_000


def steer(clock: BeatClock, error: float) -> None:
    """Correct the clock: the position is ahead by some seconds."""
    now = local_ns()
    clock.grid.steer(clock.grid.steering.target_at(now) - round(error * SECOND), now)


def rebase(clock: BeatClock, behind: float) -> None:
    """Move to the next incarnation, which is behind the position by some beats."""
    now, epoch = local_ns(), clock.grid.timeline.segments[0].epoch + 1
    position = clock.position() - behind
    segment = Segment(epoch, 0, 0, epoch * 10**15, 60_000)
    offset = segment.t0_ns + round(position * SECOND) - now
    clock.grid.rebase(Timeline((segment,)), offset, now, beats_per_bar=8, hold_beats=16)


async def test_every_wait_for_a_position_takes_longer(autojump_clock: Clock) -> None:
    ended: dict[str, float] = {}
    async with running_clock() as clock, trio.open_nursery() as nursery:
        start = trio.current_time()

        async def wait(name: str, beats: float) -> None:
            if name == "sleep":
                await clock.sleep(beats)
            else:
                scope = (
                    clock.deadlines.scope_at(beats)
                    if name == "at"
                    else clock.deadlines.scope_after(beats)
                )
                with scope:
                    await trio.sleep_forever()
                assert scope.cancelled_caught
            assert clock.position() == beats
            ended[name] = trio.current_time() - start

        for name, beats in (("after", 10), ("at", 12), ("sleep", 11)):
            nursery.start_soon(wait, name, beats)
        await trio.sleep(5.25)
        with clock.deadlines.scope_after(3) as before:
            steer(clock, 4)
            assert before.beats_left == 3
            with clock.deadlines.scope_after(1) as inside:
                await trio.sleep(2)
                assert inside.beats_left == 1
                # The held position was reached, and the next one was not.
                past, next_one = clock.deadlines.scope_at(5.2), clock.deadlines.scope_at(5.3)
                assert past.cancel_called
                assert not next_one.cancel_called
                assert clock.deadline_of(5.2) <= trio.current_time()
                await trio.sleep_forever()
            assert trio.current_time() - start == 5.25 + 4 + 1
            await trio.sleep_forever()
        assert trio.current_time() - start == 5.25 + 4 + 3
    assert ended == {"after": 14, "sleep": 15, "at": 16}


async def test_a_beat_that_is_due_before_the_hold_still_comes(mock_clock: Clock) -> None:
    async with running_clock() as clock:
        beats, found = Beats(clock, bars=False), list[int]()

        async def collect() -> None:
            async for beat in beats:
                found.append(beat.index)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(collect)
            await trio.testing.wait_all_tasks_blocked()
            mock_clock.jump(1.25)
            # The timer has not handled the beat yet.
            steer(clock, 1)
            await trio.testing.wait_all_tasks_blocked()
            assert found == [1]
            mock_clock.jump(1.5)
            rebase(clock, 1)
            await trio.testing.wait_all_tasks_blocked()
            assert found == [1]
            mock_clock.jump(1.5)
            await trio.testing.wait_all_tasks_blocked()
            assert found == [1, 2]
            nursery.cancel_scope.cancel()


async def test_the_position_is_held_until_the_next_incarnation_reaches_it(
    autojump_clock: Clock,
) -> None:
    moved: list[int] = []
    clock = BeatClock.local(60_000, 8, on_rebase=moved.append)
    async with trio.open_nursery() as nursery:
        await nursery.start(clock.run)
        await trio.sleep(20)
        start, beats = trio.current_time(), Beats(clock, bars=False)
        with clock.deadlines.scope_after(5) as relative, clock.deadlines.scope_at(40) as absolute:
            rebase(clock, 7)
            assert (clock.position(), clock.index()) == (20, 20)
            assert (relative.beats_left, relative.deadline) == (5, 25)
            assert (absolute.beats_left, absolute.deadline) == (20, 40)
            assert (await anext(beats)).index == 21
            assert trio.current_time() - start == pytest.approx(8)
            await trio.sleep_forever()
        assert relative.cancelled_caught
        assert trio.current_time() - start == pytest.approx(12)
        # The grid is too far behind, so the position moves, and relative deadlines move along.
        beats = Beats(clock, bars=False)
        with clock.deadlines.scope_after(5) as relative:
            rebase(clock, 17)
            assert (clock.position(), relative.deadline) == (8, 13)
            assert (await anext(beats)).index == 9
        nursery.cancel_scope.cancel()
    assert moved == [0, -17]


errors = st.floats(-4, 12).map(lambda seconds: round(seconds, 3))
steps = st.lists(
    st.tuples(st.floats(0.001, 6), st.sampled_from([steer, rebase]), errors), max_size=8
)


@given(steps, st.booleans())
def test_no_beat_comes_twice_and_scopes_end(
    plan: list[tuple[float, Callable[[BeatClock, float], None], float]], precise: bool
) -> None:
    async def main() -> None:
        beats: list[tuple[int, int]] = []
        budgets: list[float] = []

        async def collect(clock: BeatClock) -> None:
            async for beat in Beats(clock, bars=False, precise=precise):
                beats.append((beat.index, beat.skipped))
                assert clock.position() >= beat.index

        async def budget(clock: BeatClock) -> None:
            while True:
                begin = clock.position() - clock.deadlines.shift
                with clock.deadlines.scope_after(0.75) as scope:
                    await trio.sleep_forever()
                assert scope.cancelled_caught
                budgets.append(clock.position() - clock.deadlines.shift - begin)

        async with running_clock() as clock, trio.open_nursery() as nursery:
            nursery.start_soon(collect, clock)
            nursery.start_soon(budget, clock)
            for wait, correct, error in plan:
                await trio.sleep(wait)
                position, shift = clock.position(), clock.index_shift
                correct(clock, error if correct is steer else max(0.0, error))
                assert clock.position() >= position
                assert clock.index_shift == shift == 0
            count = len(beats)
            await trio.sleep(max(0.0, clock.grid.hold_ns(local_ns()) / SECOND) + 3.1)
            assert len(beats) - count >= 2
            nursery.cancel_scope.cancel()
        for (before, _), (index, skipped) in itertools.pairwise(beats):
            assert index == before + 1 + skipped
        assert all(length >= 0.75 - 1e-8 for length in budgets)
        assert math.isfinite(sum(budgets))

    trio.run(main, clock=Clock(autojump_threshold=0))
