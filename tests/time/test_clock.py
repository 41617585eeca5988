"""Beat scopes, sleeps and iterators in virtual time, compared with Trio's own where it has any."""

from __future__ import annotations

import gc
import math
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given, settings, strategies as st

from backbeat_trio import BeatBudgetExceeded, SessionClosed
from backbeat_trio._grid.timeline import Timeline
from backbeat_trio._time.beats import Beats
from backbeat_trio._time.clock import BeatClock
from backbeat_trio._time.local import local_ns
from backbeat_trio._time.scopes import BeatScope
from backbeat_trio._wire import Segment


@asynccontextmanager
async def running(
    bpm: float = 60, beats_per_bar: int = 8, **options: Any
) -> AsyncGenerator[BeatClock, None]:
    clock = BeatClock.local(round(bpm * 1000), beats_per_bar, **options)
    async with trio.open_nursery() as nursery:
        await nursery.start(clock.run)
        yield clock
        nursery.cancel_scope.cancel()
    clock.close()


def after(clock: BeatClock, beats: float, *, shield: bool = False, fail: bool = False) -> BeatScope:
    return clock.deadlines.scope_after(beats, shield=shield, fail=fail)


def at(clock: BeatClock, beat: float, *, shield: bool = False, fail: bool = False) -> BeatScope:
    return clock.deadlines.scope_at(beat, shield=shield, fail=fail)


def adopt(clock: BeatClock, timeline: Timeline) -> None:
    clock.grid.adopt(timeline, local_ns())


async def test_a_budget_ends_on_its_beat(autojump_clock: trio.testing.MockClock) -> None:
    async with running(bpm=2) as clock:
        start = trio.current_time()
        await trio.sleep(7.5)
        with after(clock, 2) as scope:
            await trio.sleep_forever()
        assert scope.cancelled_caught
        assert clock.position() == 2.25
        assert trio.current_time() - start == 67.5
        with at(clock, 4) as scope:
            await trio.sleep_forever()
        assert trio.current_time() - start == 120.0
        assert clock.index() == 4


async def test_a_tempo_change_moves_the_instant_and_not_the_beats(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with running(bpm=60) as clock:
        start = trio.current_time()
        with after(clock, 10) as scope:
            await trio.sleep(2)
            adopt(clock, clock.grid.timeline.change(120_000, 4, epoch=0))
            assert scope.beats_left == 8.0
            await trio.sleep_forever()
        assert clock.position() == 10.0
        assert trio.current_time() - start == 4 + 6 * 0.5


async def test_moving_to_another_grid_keeps_what_is_left(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with running(bpm=60) as clock:
        start = trio.current_time()
        with after(clock, 5) as scope:
            await trio.sleep(1.5)
            other = Timeline((Segment(3, 0, 12_000, 0, 60_000),))
            now = local_ns()
            clock.grid.rebase(other, 250_000_000 - now, now, beats_per_bar=4)
            assert clock.position() == 12_000.25
            assert scope.deadline == 12_003.75
            assert scope.beats_left == 3.5
            await trio.sleep_forever()
        assert trio.current_time() - start == 5.0
        assert clock.position() == 12_003.75


async def test_a_change_that_is_learnt_late_never_moves_the_position_back(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with running(bpm=60) as clock:
        await trio.sleep(10)
        slower = clock.grid.timeline.change(30_000, 6, epoch=0)
        adopt(clock, slower)
        assert clock.position() == 10.0
        positions = []
        for _ in range(200):
            await trio.sleep(0.5)
            positions.append(clock.position())
        assert positions == sorted(positions)
        assert positions[-1] == slower.position_at(clock.cluster_ns()) == 58.0


async def test_a_position_that_is_behind_after_a_late_change_catches_up(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with running(bpm=60) as clock:
        beats = Beats(clock, bars=False)
        await trio.sleep(10)
        await anext(beats)
        adopt(clock, clock.grid.timeline.change(120_000, 6, epoch=0))
        assert clock.position() == 14.0
        assert (await anext(beats)).skipped == 3


@pytest.mark.parametrize("beats", [0, 0.0])
async def test_zero_cancels_at_the_first_checkpoint(
    beats: float, autojump_clock: trio.testing.MockClock
) -> None:
    async with running() as clock:
        with after(clock, beats) as scope:
            assert scope.cancel_called
            await trio.lowlevel.checkpoint()
            pytest.fail("not reached")  # pragma: no cover
        assert scope.cancelled_caught
        with at(clock, -math.inf) as scope:
            await trio.lowlevel.checkpoint()
        assert scope.cancelled_caught


async def test_a_body_without_a_checkpoint_is_not_cancelled(
    mock_clock: trio.testing.MockClock,
) -> None:
    async with running() as clock:
        with after(clock, 1, fail=True) as scope:
            mock_clock.jump(5)
        assert not scope.cancelled_caught
        with pytest.raises(BeatBudgetExceeded), after(clock, 1, fail=True) as scope:
            mock_clock.jump(5)
            assert scope.cancel_called
            await trio.lowlevel.checkpoint()


async def test_the_first_checkpoint_after_the_deadline_cancels(
    mock_clock: trio.testing.MockClock,
) -> None:
    # The test does not read the scope, as with Trio's own. It repeats because a race is rare.
    async with running() as clock:
        for _ in range(50):
            with after(clock, 1) as scope:
                mock_clock.jump(1.5)
                await trio.lowlevel.checkpoint()
            assert scope.cancelled_caught


async def test_errors_name_the_budget_and_its_beat(autojump_clock: trio.testing.MockClock) -> None:
    async with running() as clock:
        with pytest.raises(BeatBudgetExceeded, match="ran out at beat 3") as caught:
            with after(clock, 3, fail=True):
                await trio.sleep_forever()
        assert isinstance(caught.value, trio.TooSlowError)
        assert caught.value.__suppress_context__
        with pytest.raises(KeyError), after(clock, 3, fail=True):
            raise KeyError
        for budget, text in (1, "1 beat"), (2.5, "2.5 beats"), (0, "0 beats"):
            beat = f"{clock.position() + budget:.3f}".rstrip("0").rstrip(".")
            with pytest.raises(BeatBudgetExceeded) as caught, after(clock, budget, fail=True):
                await trio.sleep_forever()
            assert str(caught.value) == f"the budget of {text} ran out at beat {beat}"
        with pytest.raises(BeatBudgetExceeded) as caught, at(clock, 10.0625, fail=True):
            await trio.sleep_forever()
        assert str(caught.value) == "the beat budget ran out at beat 10.062"


async def test_errors_tell_a_cancellation_from_a_budget_that_ran_out(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with running() as clock:
        for make, number in (after, 5), (after, math.inf), (at, 12345):
            for entered in (True, False):
                scope = make(clock, number, fail=True)
                if not entered:
                    scope.cancel()
                with pytest.raises(BeatBudgetExceeded, match="^the block was cancelled before"):
                    with scope:
                        await clock.sleep(1)
                        scope.cancel()
                        await trio.lowlevel.checkpoint()
        with pytest.raises(BeatBudgetExceeded, match="^the budget of 2 beats ran out"):
            with after(clock, 2, fail=True) as scope:
                autojump_clock.jump(60)
                # It is past, but the timer had no turn yet.
                assert scope.cancel_called
                await trio.lowlevel.checkpoint()
    async with running(enforcing=False) as clock:
        with pytest.raises(BeatBudgetExceeded, match="^the block was cancelled before"):
            with after(clock, 0, fail=True) as scope:
                scope.cancel()
                await trio.lowlevel.checkpoint()


async def test_errors_name_the_budget_that_was_set_last(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with running() as clock:
        # Also a beat that has more digits than a float shows by default.
        with pytest.raises(BeatBudgetExceeded, match=r"^the beat budget ran out at beat 12345\.5$"):
            with after(clock, 3, fail=True) as scope:
                scope.deadline = 12345.5
                await trio.sleep_forever()
        with pytest.raises(
            BeatBudgetExceeded, match=r"^the budget of 2 beats ran out at .* 12348\.5$"
        ):
            with after(clock, 30, fail=True) as scope:
                await clock.sleep(1)
                scope.relative_deadline = 2
                await trio.sleep_forever()
        scope = at(clock, math.inf, fail=True)
        scope.relative_deadline = 4
        with pytest.raises(BeatBudgetExceeded, match="budget of 4 beats"), scope:
            await trio.sleep_forever()


async def test_a_budget_and_a_sleep_on_one_beat(autojump_clock: trio.testing.MockClock) -> None:
    # The outer scope catches, as with Trio's own.
    async with running() as clock:
        for _ in range(20):
            with after(clock, 2) as scope:
                await clock.sleep(2)
            assert scope.cancelled_caught
            with after(clock, 2) as scope:
                await trio.sleep(2)
            assert scope.cancelled_caught
            with trio.move_on_after(2) as seconds:
                await clock.sleep(2)
            assert seconds.cancelled_caught


async def test_shield(autojump_clock: trio.testing.MockClock) -> None:
    async with running() as clock:
        with after(clock, 1) as outer:
            with after(clock, 3, shield=True) as inner:
                await trio.sleep_forever()
            assert inner.cancelled_caught
            assert clock.position() == 3.0
            await trio.lowlevel.checkpoint()
        assert outer.cancelled_caught
        with after(clock, 1) as outer:
            with after(clock, 3) as inner:
                inner.shield = True
                assert inner.shield
                await trio.sleep(2)
                inner.shield = False
                await trio.sleep_forever()
            pytest.fail("not reached")  # pragma: no cover
        assert clock.position() == 5.0
        assert not inner.cancelled_caught


async def test_cancel_with_a_reason(autojump_clock: trio.testing.MockClock) -> None:
    async with running() as clock:
        with after(clock, 5) as scope:
            assert not scope.cancel_called
            scope.cancel("enough")
            scope.cancel("more than enough")
            assert scope.cancel_called
            with pytest.raises(trio.Cancelled, match="enough"):
                await trio.lowlevel.checkpoint()
            await trio.lowlevel.checkpoint()
        assert scope.cancelled_caught
        assert trio.current_time() == autojump_clock.current_time()


async def test_deadlines_can_be_moved(autojump_clock: trio.testing.MockClock) -> None:
    async with running() as clock:
        with after(clock, 2) as scope:
            scope.deadline += 3
            assert scope.deadline == 5.0
            await trio.sleep(4)
            scope.relative_deadline = 2.5
            assert scope.relative_deadline == scope.beats_left == 2.5
            await trio.sleep_forever()
        assert clock.position() == 6.5
        assert scope.relative_deadline == scope.beats_left == 0.0
        await trio.sleep(1)
        assert (scope.relative_deadline, scope.beats_left) == (-1.0, 0.0)
        with after(clock, math.inf) as scope:
            assert scope.deadline == math.inf
            await trio.sleep(1)
            scope.deadline = -math.inf
            await trio.sleep_forever()
        assert scope.cancelled_caught
        with after(clock, 1) as scope:
            scope.deadline = math.inf
            await trio.sleep(100)
        assert not scope.cancel_called
        with after(clock, 9) as scope:
            scope.deadline = clock.position() - 1
            await trio.sleep_forever()
        assert scope.cancelled_caught


async def test_a_deadline_that_is_moved_after_the_end_does_nothing(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with running() as clock:
        with after(clock, 1) as scope:
            await trio.sleep(0)
        scope.deadline = 5
        assert clock.live_scopes == 0
        await trio.sleep(10)
        assert not scope.cancel_called


SCOPES: dict[str, tuple[Callable[[BeatClock], Any], Callable[[], Any]]] = {
    "relative": (lambda clock: after(clock, 5), lambda: trio.CancelScope(relative_deadline=5)),
    "absolute": (lambda clock: at(clock, 7), lambda: trio.CancelScope(deadline=7)),
    "endless": (lambda clock: at(clock, math.inf), trio.CancelScope),
}
PROBES: dict[str, Callable[[Any], object]] = {
    "deadline": lambda scope: scope.deadline,
    "relative_deadline": lambda scope: scope.relative_deadline,
    "is_relative": lambda scope: scope.is_relative,
    "set deadline": lambda scope: setattr(scope, "deadline", 9.0),
    "set relative_deadline": lambda scope: setattr(scope, "relative_deadline", 2.0),
    "deadline NaN": lambda scope: setattr(scope, "deadline", math.nan),
    "relative NaN": lambda scope: setattr(scope, "relative_deadline", math.nan),
    "relative negative": lambda scope: setattr(scope, "relative_deadline", -1),
    "shield": lambda scope: scope.shield,
    "set shield": lambda scope: setattr(scope, "shield", "yes"),
    "cancel_called": lambda scope: scope.cancel_called,
    "cancelled_caught": lambda scope: scope.cancelled_caught,
}


@pytest.mark.parametrize("entered", [False, True, None], ids=["before", "inside", "afterwards"])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("probe", PROBES)
async def test_a_beat_scope_answers_as_trio_does(
    scope: str, probe: str, entered: bool | None
) -> None:
    # At one beat a second, with grid and virtual time beginning at 0, both must be equal.
    async def answers(made: Any) -> list[object]:
        heard: list[object] = []

        def ask() -> None:
            for name in (probe, "deadline", "relative_deadline", "is_relative", "cancel_called"):
                try:
                    heard.append(PROBES[name](made))
                except (RuntimeError, ValueError, TypeError) as error:
                    heard.append(type(error))

        if entered is False:
            ask()
        with made:
            if entered:
                ask()
        if entered is None:
            ask()
        return heard

    async with running() as clock:
        theirs = await answers(SCOPES[scope][1]())
        ours = await answers(SCOPES[scope][0](clock))
    assert ours == theirs


test_a_beat_scope_answers_as_trio_does = pytest.mark.trio(
    run=lambda function, **_: trio.run(function, clock=trio.testing.MockClock())
)(test_a_beat_scope_answers_as_trio_does)


async def test_scopes_are_used_once(autojump_clock: trio.testing.MockClock) -> None:
    async with running() as clock:
        scope = after(clock, 1)
        with scope:
            pass
        with pytest.raises(RuntimeError, match="single 'with' block"), scope:
            pytest.fail("not reached")  # pragma: no cover
    with pytest.raises(TypeError, match="session"):
        BeatScope()


plans = st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=1, max_size=5)


@settings(max_examples=60)
@given(plans, st.integers(0, 12))
def test_nested_budgets_end_as_trio_s_do(plan: list[tuple[int, bool]], sleep: int) -> None:
    async def run(make: Callable[[int, bool], Any], wait: Callable[[float], Any]) -> list[object]:
        heard: list[object] = []

        async def nest(depth: int) -> None:
            if depth == len(plan):
                await wait(sleep / 4)
                heard.append(("slept", trio.current_time()))
                return
            with make(*plan[depth]) as scope:
                await nest(depth + 1)
            heard.append((depth, scope.cancelled_caught, trio.current_time()))
            await trio.lowlevel.checkpoint()

        with trio.CancelScope():
            await nest(0)
        return heard

    async def main() -> None:
        theirs = await run(lambda n, s: trio.move_on_after(n / 4, shield=s), trio.sleep)
        async with running() as clock:
            base = trio.current_time()
            ours = await run(lambda n, s: after(clock, n / 4, shield=s), clock.sleep)
        shifted = [(*entry[:-1], entry[-1] - base) for entry in ours]  # type: ignore[index]
        assert shifted == theirs

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


async def test_effective_deadline(autojump_clock: trio.testing.MockClock) -> None:
    async with running() as clock:
        assert clock.deadlines.effective_deadline() == math.inf
        with after(clock, 9) as outer, after(clock, 5), after(clock, 7):
            assert clock.deadlines.effective_deadline() == 5.0
            with after(clock, 20, shield=True):
                assert clock.deadlines.effective_deadline() == 20.0
            with trio.CancelScope(shield=True):
                assert clock.deadlines.effective_deadline() == math.inf
                with trio.move_on_after(2.5):
                    assert clock.deadlines.effective_deadline() == 2.5
            with trio.move_on_after(2.5):
                assert clock.deadlines.effective_deadline() == 2.5
            async with trio.open_nursery() as nursery:
                heard: list[float] = []

                async def child() -> None:
                    with after(clock, 30):
                        heard.append(clock.deadlines.effective_deadline())

                with after(clock, 1):
                    # The task is started inside the scope, but its nursery is outside.
                    nursery.start_soon(child)
                    assert clock.deadlines.effective_deadline() == 1.0
            assert heard == [5.0]
            outer.cancel()
            assert clock.deadlines.effective_deadline() == -math.inf
        with after(clock, 0):
            assert clock.deadlines.effective_deadline() == -math.inf


async def test_every_consumer_gets_all_beats(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with running(beats_per_bar=4) as clock, trio.open_nursery() as nursery:
        heard: dict[str, list[tuple[int, int, float]]] = {"fast": [], "slow": [], "bars": []}

        async def listen(name: str, bars: bool, pause: float) -> None:
            beats = Beats(clock, bars=bars)
            async for beat in beats:
                assert beat.downbeat == (beat.index % 4 == 0)
                assert beat.phase == ("downbeat" if beat.downbeat else "upbeat")
                assert beat.window_id == f"w-{beat.index // 4}"
                assert beat.tempo_bpm == 60.0
                heard[name].append((beat.index, beat.skipped, trio.current_time()))
                await trio.sleep(pause)

        nursery.start_soon(listen, "fast", False, 0)
        nursery.start_soon(listen, "slow", False, 2.5)
        nursery.start_soon(listen, "bars", True, 0)
        start = trio.current_time()
        await trio.sleep(9.75)
        nursery.cancel_scope.cancel()
    assert heard["fast"] == [(index, 0, start + index) for index in range(1, 10)]
    assert [entry[:2] for entry in heard["slow"]] == [(1, 0), (3, 1), (6, 2), (8, 1)]
    assert [entry[:2] for entry in heard["bars"]] == [(4, 0), (8, 0)]


async def test_a_loop_that_was_blocked_gets_one_beat(mock_clock: trio.testing.MockClock) -> None:
    async with running(beats_per_bar=2) as clock:
        beats, bars = Beats(clock, bars=False), Beats(clock, bars=True)
        mock_clock.jump(7.5)
        beat = await anext(beats)
        assert (beat.index, beat.skipped) == (7, 6)
        bar = await anext(bars)
        assert (bar.index, bar.skipped) == (6, 2)


async def test_an_iterator_is_a_checkpoint_at_every_step(
    mock_clock: trio.testing.MockClock,
) -> None:
    async with running() as clock:
        beats = Beats(clock, bars=False)
        mock_clock.jump(1)
        with trio.testing.assert_checkpoints():
            await anext(beats)
        mock_clock.jump(1)
        with trio.CancelScope() as scope:
            scope.cancel()
            await anext(beats)
        assert scope.cancelled_caught
        assert (await anext(beats)).index == 2


async def test_sleeps_end_on_their_beat(autojump_clock: trio.testing.MockClock) -> None:
    async with running(bpm=120) as clock:
        start = trio.current_time()
        await clock.sleep(3)
        assert trio.current_time() - start == 1.5
        await clock.sleep_until(8)
        assert clock.position() == 8.0
        with trio.testing.assert_checkpoints():
            await clock.sleep_until(2)
        with trio.testing.assert_checkpoints():
            await clock.sleep(0)
        assert clock.position() == 8.0
        with trio.move_on_after(5) as scope:
            await clock.sleep(math.inf)
        assert scope.cancelled_caught


async def test_an_inert_clock_runs_and_enforces_nothing(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with running(enforcing=False) as clock:
        with after(clock, 1, fail=True) as scope:
            await clock.sleep(3)
            assert clock.position() == 3.0
        assert not scope.cancel_called
        assert (await anext(Beats(clock, bars=False))).index == 4


async def test_closing_ends_every_wait(autojump_clock: trio.testing.MockClock) -> None:
    ended: list[str] = []
    async with trio.open_nursery() as outer, running() as clock:

        async def sleep() -> None:
            with pytest.raises(SessionClosed):
                await clock.sleep(5)
            ended.append("sleep")

        async def iterate() -> None:
            with pytest.raises(SessionClosed):
                await anext(Beats(clock, bars=False))
            ended.append("beats")

        async def work() -> None:
            with pytest.raises(BeatBudgetExceeded, match="closed"):
                with after(clock, 5, fail=True):
                    await trio.sleep_forever()
            ended.append("budget")

        for wait in (sleep, iterate, work):
            outer.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
    assert sorted(ended) == ["beats", "budget", "sleep"]
    with pytest.raises(SessionClosed), after(clock, 1):
        pytest.fail("not reached")  # pragma: no cover
    with pytest.raises(SessionClosed):
        await clock.sleep(1)
    with pytest.raises(SessionClosed):
        await anext(Beats(clock, bars=False))


async def test_many_budgets_on_one_beat_all_end_there(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with running() as clock:
        ended: list[float] = []

        async def work(beats: float) -> None:
            with after(clock, beats) as scope:
                await trio.sleep_forever()
            assert scope.cancelled_caught
            ended.append(clock.position())

        async with trio.open_nursery() as nursery:
            for number in range(5000):
                nursery.start_soon(work, 2 + number % 2)
        assert ended == [2.0] * 2500 + [3.0] * 2500
        assert clock.live_scopes == 0


async def test_scopes_that_were_left_are_forgotten(autojump_clock: trio.testing.MockClock) -> None:
    async with running() as clock:
        with after(clock, 1_000_000):
            for number in range(10_000):
                # In this order, the scope that was entered last is not last in the heap.
                with after(clock, 1000 - number / 100), after(clock, 5000):
                    pass
            assert clock.live_scopes == 1
            assert len(clock.deadlines._heap) <= 1001
            await trio.lowlevel.checkpoint()
        assert clock.live_scopes == 0
    gc.collect()


async def test_precise_beats_come_in_virtual_time(autojump_clock: trio.testing.MockClock) -> None:
    async with running() as clock:
        start = trio.current_time()
        beats = Beats(clock, bars=False, precise=True)
        for number in range(1, 4):
            assert (await anext(beats)).index == number
            assert trio.current_time() - start == pytest.approx(number)


class StepClock(trio.abc.Clock):
    """A clock that advances a little whenever it is read."""

    def __init__(self) -> None:
        self._now = 0.0

    def start_clock(self) -> None:
        pass

    def current_time(self) -> float:
        self._now += 1.37e-6
        return self._now

    def deadline_to_sleep_time(self, deadline: float) -> float:
        return 0.0


def test_a_precise_beat_comes_before_other_tasks_that_are_due_on_it() -> None:
    late = []

    async def main() -> None:
        async with running(bpm=6000) as clock, trio.open_nursery() as nursery:

            async def work(index: int) -> None:
                await trio.sleep_until(clock.deadline_of(index))
                for _ in range(100):
                    trio.current_time()

            beats = Beats(clock, bars=False, precise=True)
            for index in range(1, 41):
                for _ in range(10):
                    nursery.start_soon(work, index)
                assert (await anext(beats)).index == index
                late.append(trio.current_time() - clock.deadline_of(index))
            nursery.cancel_scope.cancel()

    trio.run(main, clock=StepClock())
    assert max(late) < 20e-6


async def test_slewing_moves_the_instant_and_never_the_beats(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with running() as clock:
        start = trio.current_time()
        with after(clock, 10):
            await trio.sleep(1)
            now = local_ns()
            clock.grid.steer(clock.grid.steering.target_at(now) - 40_000_000, now)
            with after(clock, 0.25) as inside:
                await trio.sleep_forever()
            assert inside.cancelled_caught
            assert 1.25 < trio.current_time() - start < 1.25 / 0.92
            await trio.sleep_forever()
        assert clock.position() == 10.0
        assert trio.current_time() - start == pytest.approx(10.04, abs=1e-8)


async def test_repr(autojump_clock: trio.testing.MockClock) -> None:
    async with running() as clock:
        scope = after(clock, 2)
        assert "2 beats from entry" in repr(scope)
        with scope:
            assert "deadline at beat 2" in repr(scope)


@pytest.mark.parametrize("far", [1e300, 1.7e308, -1e300, -1.7e308])
async def test_deadlines_that_trios_clock_cannot_represent(
    far: float, autojump_clock: trio.testing.MockClock
) -> None:
    async with running() as clock:
        with at(clock, far) as scope:
            await trio.sleep(1)
        assert scope.cancelled_caught == (far < 0)
        with after(clock, math.inf) as scope:
            scope.deadline = far
            assert clock.deadlines.effective_deadline() == far
            await trio.sleep(1)
        assert scope.cancelled_caught == (far < 0)
        assert clock.deadline_of(far) == math.copysign(math.inf, far)
        with trio.move_on_at(far):
            assert clock.deadlines.effective_deadline() == math.copysign(math.inf, far)
        with after(clock, abs(far)), after(clock, 2) as scope:
            await trio.sleep_forever()
        assert scope.cancelled_caught


async def test_a_budget_that_is_due_just_after_a_beat_ends_in_the_same_turn_as_trios_own(
    mock_clock: trio.testing.MockClock,
) -> None:
    ended: list[tuple[str, int]] = []
    turns = 0

    class Turns(trio.abc.Instrument):
        def before_io_wait(self, timeout: float) -> None:
            nonlocal turns
            turns += 1

    async def end_by_beat(clock: BeatClock) -> None:
        with at(clock, 1.5):
            await trio.sleep_forever()
        ended.append(("beat", turns))

    async def end_by_second(clock: BeatClock) -> None:
        with trio.move_on_at(clock.deadline_of(1.5)):
            await trio.sleep_forever()
        ended.append(("second", turns))

    async with running(bpm=60) as clock, trio.open_nursery() as nursery:
        nursery.start_soon(end_by_beat, clock)
        nursery.start_soon(end_by_second, clock)
        await trio.testing.wait_all_tasks_blocked()
        trio.lowlevel.add_instrument(Turns())
        beats = Beats(clock, bars=False)
        mock_clock.jump(1)
        assert (await anext(beats)).index == 1
        # Both are due by the next turn, in which the clock still has to handle the beat.
        mock_clock.jump(0.75)
    assert [turn for _, turn in ended] == [ended[0][1]] * 2
