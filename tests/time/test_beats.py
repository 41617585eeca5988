"""Waits in virtual time for beats whose edges lie between the floats of Trio's clock."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import Any, Final

import pytest
import trio
import trio.testing
from hypothesis import example, given, strategies as st

from backbeat_trio import SessionClosed
from backbeat_trio._time.beats import Beats
from backbeat_trio._time.clock import BeatClock
from backbeat_trio._time.local import local_ns

# A wait for some beats that takes more task steps than this makes no progress.
MANY: Final = 2000


class Fuse(trio.abc.Instrument):
    """Cancel a scope after many task steps, to end a loop that would never end."""

    def __init__(self, scope: trio.CancelScope) -> None:
        self._scope = scope
        self._steps = 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._steps += 1
        if self._steps > MANY:
            self._scope.cancel()


def run_on(
    start: float, milli: int, async_fn: Callable[[BeatClock], Awaitable[None]], bar: int = 2
) -> None:
    """Run a function on a clock that begins at an instant of virtual time."""

    async def main() -> None:
        await trio.sleep(start)
        clock = BeatClock.local(milli, bar)
        with trio.CancelScope() as scope:
            trio.lowlevel.add_instrument(Fuse(scope))
            async with trio.open_nursery() as nursery:
                await nursery.start(clock.run)
                await async_fn(clock)
                nursery.cancel_scope.cancel()
        clock.close()
        assert not scope.cancelled_caught, "it went round in circles"

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


starts = st.one_of(st.floats(0, 10), st.floats(0, 1e6), st.integers(0, 1000).map(lambda n: n / 100))
tempos = st.integers(100, 6_000_000)


@pytest.mark.parametrize("bars", [False, True], ids=["beats", "downbeats"])
@pytest.mark.parametrize("precise", [False, True], ids=["plain", "precise"])
@given(start=starts, milli=tempos)
@example(start=0.37, milli=60_000)
def test_an_iterator_yields_every_beat_at_its_instant(
    precise: bool, bars: bool, start: float, milli: int
) -> None:
    async def listen(clock: BeatClock) -> None:
        step = 2 if bars else 1
        beats = Beats(clock, bars=bars, precise=precise)
        for index in range(step, 6 * step, step):
            beat = await anext(beats)
            assert (beat.index, beat.skipped) == (index, 0)
            assert clock.index() == index
            # Trio's clock may have no float between the beat's last nanosecond and the next.
            late = trio.current_time() - clock.deadline_of(index)
            assert abs(late) <= 1e-9 + 2 * math.ulp(trio.current_time())

    run_on(start, milli, listen)


@given(start=starts, milli=tempos, wait=st.floats(0, 20))
@example(start=0.37, milli=60_000, wait=1.0)
def test_a_sleep_ends_at_its_position(start: float, milli: int, wait: float) -> None:
    async def sleep(clock: BeatClock) -> None:
        await clock.sleep_until(3)
        assert clock.index() == 3
        await clock.sleep_until(7)
        assert clock.index() == 7
        before = clock.position()
        await clock.sleep(wait)
        # A nanosecond in beats, and the distance between two floats of Trio's clock.
        grain = (2e-9 + 4 * math.ulp(trio.current_time())) * milli / 60_000
        assert abs(clock.position() - before - wait) <= grain + 1e-9

    run_on(start, milli, sleep)


@given(start=starts, milli=tempos)
@example(start=0.37, milli=60_000)
def test_iterators_and_sleeps_wake_on_the_same_beat(start: float, milli: int) -> None:
    async def meet(clock: BeatClock) -> None:
        heard: list[tuple[str, int]] = []

        async def listen(name: str, precise: bool) -> None:
            beats = Beats(clock, bars=False, precise=precise)
            for _ in range(4):
                heard.append((name, (await anext(beats)).index))

        async def sleep() -> None:
            for index in range(1, 5):
                await clock.sleep_until(index)
                heard.append(("sleep", clock.index()))

        async def sleep_in_seconds() -> None:
            for index in range(1, 5):
                await trio.sleep_until(clock.deadline_of(index))
                heard.append(("seconds", clock.index()))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen, "plain", False)
            nursery.start_soon(listen, "precise", True)
            nursery.start_soon(sleep)
            nursery.start_soon(sleep_in_seconds)
        for name in ("plain", "precise", "sleep", "seconds"):
            assert [index for other, index in heard if other == name] == [1, 2, 3, 4]

    run_on(start, milli, meet)


@given(start=starts, milli=tempos, slew=st.integers(-50_000_000, 50_000_000))
def test_beats_are_found_while_the_clock_is_slewed(start: float, milli: int, slew: int) -> None:
    async def listen(clock: BeatClock) -> None:
        now, steering = local_ns(), clock.grid.steering
        clock.grid.steer(steering.target_at(now) + slew, now, 30_000_000)
        beats, last = Beats(clock, bars=False, precise=True), clock.index()
        for _ in range(6):
            beat = await anext(beats)
            assert beat.index == clock.index() > last
            last = beat.index

    run_on(start, milli, listen)


@pytest.mark.parametrize("precise", [False, True], ids=["plain", "precise"])
def test_a_change_of_grid_on_the_way_loses_no_beat(precise: bool) -> None:
    async def listen(clock: BeatClock) -> None:
        beats = Beats(clock, bars=False, precise=precise)
        assert (await anext(beats)).index == 1
        async with trio.open_nursery() as nursery:

            async def change() -> None:
                await trio.sleep(0.5)
                now = local_ns()
                changed = clock.grid.timeline.change(240_000, 2, epoch=1)
                clock.grid.rebase(changed, clock.cluster_ns() - now, now, beats_per_bar=2)

            nursery.start_soon(change)
            heard = [await anext(beats) for _ in range(4)]
        assert [(beat.index, beat.skipped) for beat in heard] == [(n, 0) for n in range(2, 6)]
        assert clock.position() == 5.0

    run_on(0.37, 60_000, listen)


@pytest.mark.parametrize("wait", ["sleep", "beats", "precise beats"])
async def test_waits_in_a_paused_grid_do_not_move_virtual_time(
    wait: str, mock_clock: trio.testing.MockClock
) -> None:
    # Trio's clock does not jump while nothing has a deadline, so it must not jump here.
    clock = BeatClock.local(60_000, 8)
    async with trio.open_nursery() as nursery:
        await nursery.start(clock.run)
        await trio.sleep(0)
        clock.grid.adopt(clock.grid.timeline.change(0, 1, epoch=0), local_ns())
        mock_clock.jump(1.5)
        await trio.testing.wait_all_tasks_blocked()
        if wait == "sleep":
            nursery.start_soon(clock.sleep, 5)
        else:
            nursery.start_soon(anext, Beats(clock, bars=False, precise=wait != "beats"))
        await trio.testing.wait_all_tasks_blocked()
        assert trio.lowlevel.current_statistics().seconds_to_next_deadline == math.inf
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("enforcing", [True, False], ids=["enforcing", "inert"])
@pytest.mark.parametrize("wait", ["sleep", "long sleep", "endless sleep", "beats", "precise beats"])
async def test_closing_ends_every_wait(
    wait: str, enforcing: bool, autojump_clock: trio.testing.MockClock
) -> None:
    clock = BeatClock.local(100, 8, enforcing=enforcing)
    waits: dict[str, Callable[[], Awaitable[Any]]] = {
        "sleep": lambda: clock.sleep(5),
        "long sleep": lambda: clock.sleep_until(1e300),
        "endless sleep": lambda: clock.sleep(math.inf),
        "beats": lambda: anext(Beats(clock, bars=False)),
        "precise beats": lambda: anext(Beats(clock, bars=True, precise=True)),
    }
    ended: list[float] = []

    async def waiter() -> None:
        with pytest.raises(SessionClosed):
            await waits[wait]()
        ended.append(trio.current_time())

    async with trio.open_nursery() as nursery:
        await nursery.start(clock.run)
        nursery.start_soon(waiter)
        await trio.sleep(0.25)
        now = trio.current_time()
        clock.close()
        await trio.sleep(0.25)
        assert ended == [now]
        with pytest.raises(SessionClosed):
            await waits[wait]()
        nursery.cancel_scope.cancel()
