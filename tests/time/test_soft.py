"""Soft edges: when they pass, whom they cut, and what they follow."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing
from clocks import move, running_clock
from hypothesis import given, strategies as st

from backbeat_trio import BeatBudgetExceeded, SessionClosed
from backbeat_trio._grid.timeline import Timeline
from backbeat_trio._time.clock import BeatClock
from backbeat_trio._time.local import local_ns
from backbeat_trio._time.scopes import BeatScope
from backbeat_trio._wire import Segment
from backbeat_trio.testing import open_session

Clock = trio.testing.MockClock


def set_tempo(clock: BeatClock, milli: int) -> None:
    """Change the tempo now; 0 pauses the grid. The present position must be a whole beat."""
    changed = clock.grid.timeline.change(milli, clock.index(), epoch=1)
    clock.grid.adopt(Timeline(changed.segments[-1:]), local_ns())


async def note_soft(clock: BeatClock, scope: BeatScope, heard: list[float]) -> None:
    await scope.wait_soft()
    heard.append(clock.position())


MAKERS: dict[str, Callable[[Any], BeatScope]] = {
    "move_on_after": lambda bb: bb.move_on_after(10, soft_after=8),
    "fail_after": lambda bb: bb.fail_after(10, soft_after=8),
    "move_on_at": lambda bb: bb.move_on_at(bb.current_beat() + 10, soft_at=bb.current_beat() + 8),
    "fail_at": lambda bb: bb.fail_at(bb.current_beat() + 10, soft_at=bb.current_beat() + 8),
}


@pytest.mark.parametrize("make", MAKERS)
async def test_a_soft_edge_comes_before_the_deadline(make: str, autojump_clock: Clock) -> None:
    async with open_session(tempo_bpm=60.0) as bb:
        await bb.sleep_until(bb.current_beat() + 1)
        begin = bb.current_position()
        scope = MAKERS[make](bb)
        try:
            with scope:
                assert scope.soft_deadline == begin + 8
                assert not scope.soft_called
                for _ in range(2):
                    await scope.wait_soft()
                    assert bb.current_position() == begin + 8
                    assert scope.soft_called
                assert not scope.cancel_called
                await trio.sleep_forever()
        except BeatBudgetExceeded:
            assert make.startswith("fail")
        assert scope.cancelled_caught
        assert scope.soft_called
        assert bb.current_position() == begin + 10


async def test_an_edge_on_the_deadline_passes_first(autojump_clock: Clock) -> None:
    heard: list[float] = []
    async with running_clock() as clock, trio.open_nursery() as nursery:
        for beats in (3.0, 0.0):
            with clock.deadlines.scope_after(beats, soft=beats) as scope:
                nursery.start_soon(note_soft, clock, scope, heard)
                await trio.sleep_forever()
            assert scope.cancelled_caught
            assert scope.soft_called
    assert heard == [3, 3]


async def test_without_an_edge_nothing_passes(autojump_clock: Clock) -> None:
    async with running_clock() as clock:
        with clock.deadlines.scope_after(3) as scope:
            assert scope.soft_deadline == math.inf
            await scope.wait_soft()
        assert scope.cancelled_caught
        assert not scope.soft_called
        with clock.deadlines.scope_after(3) as scope, scope.graceful() as inner:
            assert inner.deadline == math.inf
            await trio.sleep_forever()
        assert scope.cancelled_caught
        assert not inner.cancelled_caught
        assert clock.position() == 6


@pytest.mark.parametrize(
    ("name", "arguments", "error"),
    [
        ("move_on_after", {"beats": 10, "soft_after": 11}, "`soft_after` must not be later"),
        ("fail_after", {"beats": 0, "soft_after": 1}, "`soft_after` must not be later"),
        ("move_on_after", {"beats": 10, "soft_after": -1}, "`soft_after` must be non-negative"),
        ("fail_after", {"beats": 10, "soft_after": math.nan}, "`soft_after` must not be NaN"),
        ("move_on_after", {"beats": 10, "soft_after": "8"}, "`soft_after` must be a number"),
        ("move_on_at", {"beat": 10, "soft_at": 10.5}, "`soft_at` must not be later"),
        ("fail_at", {"beat": 10, "soft_at": math.inf}, "`soft_at` must not be later"),
        ("fail_at", {"beat": 10, "soft_at": math.nan}, "`soft_at` must not be NaN"),
        ("move_on_at", {"beat": 10, "soft_at": True}, "`soft_at` must be a position"),
    ],
)
async def test_edges_that_are_refused(
    name: str, arguments: Any, error: str, autojump_clock: Clock
) -> None:
    async with open_session() as bb:
        with pytest.raises((TypeError, ValueError), match=error):
            getattr(bb, name)(**arguments)
        setting: Any
        for setting in (math.nan, "8"):
            with bb.move_on_after(5) as scope, pytest.raises((TypeError, ValueError)):
                scope.soft_deadline = setting
            assert scope.soft_deadline == math.inf


async def test_an_edge_has_a_position_once_the_scope_is_entered(mock_clock: Clock) -> None:
    async with running_clock() as clock:
        scope = clock.deadlines.scope_after(10, soft=8)
        with pytest.raises(RuntimeError, match="unentered relative"):
            scope.soft_deadline  # noqa: B018 - reading it raises
        with pytest.raises(RuntimeError, match="unentered relative"):
            scope.soft_deadline = 5
        with pytest.raises(RuntimeError, match="inside of the scope"), scope.graceful():
            pytest.fail("not reached")  # pragma: no cover
        assert not scope.soft_called
        absolute = clock.deadlines.scope_at(10, soft=8)
        assert absolute.soft_deadline == 8
        absolute.soft_deadline = 7
        assert absolute.soft_deadline == 7
        with scope, absolute:
            assert scope.soft_deadline == 8
            assert absolute.soft_deadline == 7


async def test_an_edge_can_be_moved(autojump_clock: Clock) -> None:
    heard: list[float] = []
    async with running_clock() as clock, trio.open_nursery() as nursery:
        with clock.deadlines.scope_after(20) as scope:
            nursery.start_soon(note_soft, clock, scope, heard)
            scope.soft_deadline = 9
            await trio.sleep(1)
            scope.soft_deadline = 3
            await trio.sleep(1)
            scope.soft_deadline = 5
            await trio.sleep(2)
            assert not scope.soft_called
            await trio.sleep(2)
            assert heard == [5]
            # It has passed, and stays so.
            scope.soft_deadline = 15
            assert scope.soft_called
            assert scope.soft_deadline == 15
            with scope.graceful() as inner:
                await trio.lowlevel.checkpoint()
            assert inner.cancelled_caught
            await trio.sleep(12)
            assert heard == [5]
        with clock.deadlines.scope_after(20, soft=4) as scope:
            scope.soft_deadline = math.inf
            await trio.sleep_forever()
        assert not scope.soft_called
        with clock.deadlines.scope_after(20, soft=4) as scope:
            scope.soft_deadline = -math.inf
            await scope.wait_soft()
            assert clock.position() == 38


async def test_a_graceful_block_is_cut_at_the_edge(autojump_clock: Clock) -> None:
    async with running_clock() as clock:
        with clock.deadlines.scope_after(10, fail=True, soft=8) as scope:
            with scope.graceful() as inner:
                assert inner.deadline == 8
                assert clock.deadlines.effective_deadline() == 8
                await trio.sleep_forever()
            assert inner.cancelled_caught
            assert clock.position() == 8
            assert clock.deadlines.effective_deadline() == 10
            with scope.graceful() as late:
                await trio.lowlevel.checkpoint()
                pytest.fail("not reached")  # pragma: no cover
            assert late.cancelled_caught
            await trio.sleep(1)
        assert clock.position() == 9
        with clock.deadlines.scope_after(10, soft=8) as scope:
            with scope.graceful() as inner:
                scope.soft_deadline = clock.position() + 2
                assert inner.deadline == 11
                await trio.sleep_forever()
            assert clock.position() == 11
        with clock.deadlines.scope_after(10, soft=8) as scope, scope.graceful() as inner:
            pass
        assert not inner.cancel_called
        with clock.deadlines.scope_after(10, soft=8) as scope, scope.graceful() as inner:
            scope.cancel()
            await trio.lowlevel.checkpoint()
        assert scope.cancelled_caught
        assert not inner.cancelled_caught


async def test_cleaning_up_has_a_budget_of_its_own(autojump_clock: Clock) -> None:
    cleaned = []
    async with running_clock() as clock:
        with clock.deadlines.scope_after(5) as scope:
            try:
                await trio.sleep_forever()
            finally:
                with scope.clean_up() as clean_up:
                    await trio.sleep(0.5)
                    cleaned.append(clock.position())
                    assert clock.deadlines.effective_deadline() == 6
                    await trio.sleep_forever()
                assert clean_up.cancelled_caught
                cleaned.append(clock.position())
                with scope.clean_up(beats=3):
                    await trio.sleep(2)
                    cleaned.append(clock.position())
        assert cleaned == [5.5, 6, 8]
        for beats in (-1, math.nan):
            with pytest.raises(ValueError, match="`beats`"):
                scope.clean_up(beats)


async def test_an_edge_waits_while_the_grid_is_paused(autojump_clock: Clock) -> None:
    heard: list[float] = []
    async with running_clock() as clock, trio.open_nursery() as nursery:
        with clock.deadlines.scope_after(10, soft=8) as scope:
            nursery.start_soon(note_soft, clock, scope, heard)
            await trio.sleep(4)
            set_tempo(clock, 0)
            await trio.sleep(1000)
            assert scope.soft_deadline == 8
            assert not scope.soft_called
            changed = Timeline((Segment(2, 9, 4, clock.cluster_ns(), 120_000),))
            clock.grid.adopt(changed, local_ns())
            begin = trio.current_time()
            await scope.wait_soft()
            assert trio.current_time() - begin == 2
            await trio.sleep_forever()
        assert trio.current_time() - begin == 3
    assert heard == [8]


@pytest.mark.parametrize("relative", [True, False], ids=["relative", "absolute"])
async def test_an_edge_over_a_move(relative: bool, autojump_clock: Clock) -> None:
    async with running_clock() as clock:
        scope = (
            clock.deadlines.scope_after(10, soft=8)
            if relative
            else clock.deadlines.scope_at(1010, soft=1008)
        )
        with scope:
            await trio.sleep(2)
            with scope.graceful() as inner:
                move(clock, 1002)
                assert scope.soft_deadline == inner.deadline == 1008
                await trio.sleep_forever()
            assert clock.position() == 1008
            await trio.sleep_forever()
        assert clock.position() == 1010


async def test_a_move_can_pass_an_edge(mock_clock: Clock) -> None:
    async with running_clock() as clock:
        with clock.deadlines.scope_at(1010, soft=50) as scope, scope.graceful() as inner:
            move(clock, 1000)
            assert scope.soft_called
            await trio.lowlevel.checkpoint()
            pytest.fail("not reached")  # pragma: no cover
        assert inner.cancelled_caught
        assert not scope.cancel_called


async def test_edges_do_not_pass_outside_of_their_scope(autojump_clock: Clock) -> None:
    async with running_clock() as clock:
        with clock.deadlines.scope_after(10, soft=8) as scope:
            pass
        await trio.sleep(9)
        assert not scope.soft_called
        assert not clock.deadlines._heap


async def test_waiting_for_an_edge_ends_with_the_session(autojump_clock: Clock) -> None:
    ended = []

    async def hold(scope: BeatScope) -> None:
        with scope:
            nursery.start_soon(wait, scope)
            await trio.sleep_forever()
        assert scope.cancelled_caught
        assert not scope.soft_called

    async def wait(scope: BeatScope) -> None:
        for _ in range(2):
            with pytest.raises(SessionClosed):
                await scope.wait_soft()
        ended.append(scope)

    async with trio.open_nursery() as nursery:
        async with open_session() as bb:
            scope = bb.move_on_after(10, soft_after=8)
            nursery.start_soon(hold, scope)
            await trio.testing.wait_all_tasks_blocked()
            assert not ended
    assert ended == [scope]


async def test_a_disabled_session_has_no_edges(autojump_clock: Clock) -> None:
    async with running_clock(enforcing=False) as clock:
        with clock.deadlines.scope_after(1, soft=0) as scope, scope.graceful():
            await trio.sleep(100)
            assert not scope.soft_called


async def test_watchers_are_called_by_a_task(autojump_clock: Clock) -> None:
    called: list[tuple[str, float]] = []

    def note(name: str) -> Callable[[], None]:
        def watcher() -> None:
            assert trio.lowlevel.current_task() is not None
            called.append((name, clock.position()))

        return watcher

    async with running_clock() as clock:
        with clock.deadlines.scope_after(10, soft=2), clock.deadlines.scope_after(10, soft=4):
            near, far = sorted(clock.deadlines.soft_edges(), key=lambda edge: edge.position)
            near.watch(note("near"))
            gone = note("gone")
            far.watch(gone)
            far.watch(note("far"))
            far.unwatch(gone)
            await trio.sleep(5)
            near.watch(note("late"))
        with clock.deadlines.scope_after(10, soft=4):
            with trio.CancelScope(shield=True):
                assert clock.deadlines.soft_edges() == []
            assert len(clock.deadlines.soft_edges()) == 1
    assert called == [("near", 2), ("far", 4), ("late", 5)]


quarters = st.integers(0, 40).map(lambda n: n / 4)
steps = st.one_of(
    st.tuples(st.sampled_from(["after", "at"]), quarters, quarters),
    st.tuples(st.just("soft"), quarters, st.integers(0, 9)),
    st.tuples(st.just("move"), st.integers(0, 60)),
    st.tuples(st.just("tempo"), st.sampled_from([0, 30_000, 60_000, 120_000])),
    st.tuples(st.just("pass"), quarters),
    st.tuples(st.just("leave"), st.integers(0, 9)),
)


class Point:
    """The model of a deadline or of an edge: so many beats are left, or it is a position."""

    def __init__(self, relative: bool, value: float) -> None:
        self.relative, self.value = relative, value
        self.passed = False

    def left(self, position: float) -> float:
        return self.value if self.relative else self.value - position


class Budget:
    """A scope that a task has entered, and the models of what becomes of it."""

    def __init__(self, scope: BeatScope, end: Point, soft: Point) -> None:
        self.scope, self.end, self.soft = scope, end, soft
        self.leave = trio.Event()
        self.left = False
        self.heard = False
        self.cut = False

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            with self.scope as scope:
                nursery.start_soon(self.hear)
                with scope.graceful() as inner:
                    await self.leave.wait()
                self.cut = inner.cancelled_caught
                await self.leave.wait()
            self.left = True
            nursery.cancel_scope.cancel()

    async def hear(self) -> None:
        await self.scope.wait_soft()
        self.heard = True


@given(st.lists(steps, max_size=30))
def test_edges_agree_with_a_simple_model(plan: list[tuple[Any, ...]]) -> None:
    async def main(mock_clock: Clock) -> None:
        position, milli = 0.0, 60_000
        budgets: list[Budget] = []
        async with running_clock() as clock, trio.open_nursery() as nursery:
            for name, value, *more in plan:
                live = [budget for budget in budgets if not budget.left]
                if name in ("after", "at"):
                    soft = min(value, more[0])
                    if name == "after":
                        scope = clock.deadlines.scope_after(value, soft=soft)
                    else:
                        scope = clock.deadlines.scope_at(value, soft=soft)
                    relative = name == "after"
                    budget = Budget(scope, Point(relative, value), Point(relative, soft))
                    budgets.append(budget)
                    nursery.start_soon(budget.run)
                elif name == "soft" and live:
                    budget = live[more[0] % len(live)]
                    budget.scope.soft_deadline = value
                    budget.soft.relative, budget.soft.value = False, value
                elif name == "leave" and live:
                    live[value % len(live)].leave.set()
                elif name == "move":
                    position, milli = float(value), 60_000
                    move(clock, position)
                elif name == "tempo" and position == int(position):
                    milli = value
                    segments = (Segment(9, len(budgets), int(position), clock.cluster_ns(), milli),)
                    clock.grid.adopt(Timeline(segments), local_ns())
                elif name == "pass" and milli:
                    mock_clock.jump(value * 60_000 / milli)
                    position += value
                    for budget in budgets:
                        for point in (budget.end, budget.soft):
                            if point.relative:
                                point.value -= value
                elif name == "pass":
                    mock_clock.jump(1000)
                await trio.testing.wait_all_tasks_blocked()
                assert clock.position() == position
                for budget in budgets:
                    check(budget, position)
            for budget in budgets:
                budget.leave.set()

    def check(budget: Budget, position: float) -> None:
        scope = budget.scope
        if budget in finished:
            # It was left, or its deadline has passed: nothing more happens to it.
            assert scope.soft_called == budget.soft.passed
            return
        budget.soft.passed |= budget.soft.left(position) <= 0
        budget.end.passed |= budget.end.left(position) <= 0
        if budget.left:
            finished.add(budget)
        assert scope.soft_deadline == position + budget.soft.left(position)
        assert scope.deadline == position + budget.end.left(position)
        assert scope.cancel_called == budget.end.passed
        assert budget.left == (budget.end.passed or budget.leave.is_set())
        # An edge that has passed together with the deadline need not be heard.
        assert scope.soft_called == budget.soft.passed
        assert budget.heard == budget.soft.passed or budget.left
        assert budget.cut == (budget.soft.passed and not budget.leave.is_set()) or budget.left

    finished: set[Budget] = set()
    mock_clock = Clock()
    trio.run(main, mock_clock, clock=mock_clock)
