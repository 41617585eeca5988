"""Budgets and sleeps when the position moves to another grid: which move along, and which stay."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
import trio.testing
from clocks import move, running_clock
from hypothesis import given, strategies as st

from backbeat_trio._time.clock import BeatClock
from backbeat_trio._time.scopes import BeatScope

Clock = trio.testing.MockClock


MAKERS: dict[str, tuple[bool, Callable[[BeatClock], BeatScope]]] = {
    "move_on_after": (True, lambda clock: clock.deadlines.scope_after(10)),
    "fail_after": (True, lambda clock: clock.deadlines.scope_after(10, fail=True)),
    "move_on_at": (False, lambda clock: clock.deadlines.scope_at(1010)),
    "fail_at": (False, lambda clock: clock.deadlines.scope_at(1010, fail=True)),
}


@pytest.mark.parametrize("entered", [False, True], ids=["unentered", "entered"])
@pytest.mark.parametrize("make", MAKERS)
async def test_budgets_over_a_move(make: str, entered: bool, autojump_clock: Clock) -> None:
    relative, maker = MAKERS[make]
    async with running_clock() as clock:
        scope = maker(clock)
        try:
            if entered:
                with scope:
                    await trio.sleep(2)
                    move(clock, 1002)
                    assert scope.deadline == 1010
                    assert scope.beats_left == scope.relative_deadline == 8
                    await trio.sleep_forever()
            else:
                await trio.sleep(2)
                move(clock, 1002)
                assert scope.beats_left == (10 if relative else 8)
                with scope:
                    assert scope.deadline == (1012 if relative else 1010)
                    await trio.sleep_forever()
        except trio.TooSlowError as error:
            assert make.startswith("fail")
            assert f"{scope.deadline:g}" in str(error)
        assert scope.cancelled_caught
        assert clock.position() == scope.deadline == (1012 if relative and not entered else 1010)


@pytest.mark.parametrize(
    ("wait", "end"),
    [
        (lambda clock: clock.sleep_until(1010), 1010),
        (lambda clock: clock.sleep_until(10), 1002),
        (lambda clock: clock.sleep(1010), 2010),
        (lambda clock: clock.sleep(5), 1005),
    ],
    ids=["a position ahead", "a position that is past by then", "many beats", "some beats"],
)
async def test_sleeps_over_a_move(
    wait: Callable[[BeatClock], Awaitable[None]], end: float, autojump_clock: Clock
) -> None:
    ended = []
    async with running_clock() as clock, trio.open_nursery() as nursery:

        async def sleep() -> None:
            await wait(clock)
            ended.append(clock.position())

        nursery.start_soon(sleep)
        await trio.sleep(2)
        move(clock, 1002)
    assert ended == [end]


async def test_a_position_that_is_past_on_the_other_grid_ends_at_once(mock_clock: Clock) -> None:
    async with running_clock() as clock:
        with clock.deadlines.scope_at(50) as scope, clock.deadlines.scope_after(60) as outside:
            move(clock, 1000)
            assert scope.beats_left == 0
            await trio.lowlevel.checkpoint()
            pytest.fail("not reached")  # pragma: no cover
        assert scope.cancelled_caught
        assert not outside.cancel_called
        unentered = clock.deadlines.scope_at(1010)
        move(clock, 2000)
        assert unentered.cancel_called


@pytest.mark.parametrize("entered", ["unentered", "entered"])
@pytest.mark.parametrize("name", ["deadline", "relative_deadline"])
async def test_the_kind_of_deadline_that_was_set_last_counts(
    name: str, entered: str, autojump_clock: Clock
) -> None:
    async with running_clock() as clock:
        if entered == "unentered":
            scope = clock.deadlines.scope_at(math.inf)
            setattr(scope, name, 1010)
            move(clock, 1000)
            with scope:
                await trio.sleep_forever()
        else:
            opposite = (
                clock.deadlines.scope_after if name == "deadline" else clock.deadlines.scope_at
            )
            with opposite(5) as scope:
                setattr(scope, name, 1010)
                move(clock, 1000)
                await trio.sleep_forever()
        assert clock.position() == scope.deadline == (1010 if name == "deadline" else 2010)


async def test_a_scope_that_was_left_keeps_its_kind_of_deadline(mock_clock: Clock) -> None:
    async with running_clock() as clock:
        with clock.deadlines.scope_after(10) as relative, clock.deadlines.scope_at(10) as absolute:
            pass
        move(clock, 1000)
        assert (relative.deadline, relative.relative_deadline) == (1010, 10)
        assert (absolute.deadline, absolute.relative_deadline) == (10, -990)
        assert not relative.cancel_called
        assert not absolute.cancel_called


async def test_a_move_can_change_the_order_of_deadlines(autojump_clock: Clock) -> None:
    ended: list[tuple[str, float]] = []
    async with running_clock() as clock, trio.open_nursery() as nursery:

        async def wait(name: str, scope: BeatScope) -> None:
            with scope:
                await trio.sleep_forever()
            ended.append((name, clock.position()))

        nursery.start_soon(wait, "after 10", clock.deadlines.scope_after(10))
        nursery.start_soon(wait, "at 103", clock.deadlines.scope_at(103))
        nursery.start_soon(wait, "after 5", clock.deadlines.scope_after(5))
        nursery.start_soon(wait, "at 108", clock.deadlines.scope_at(108))
        nursery.start_soon(wait, "at 3", clock.deadlines.scope_at(3))
        await trio.testing.wait_all_tasks_blocked()
        move(clock, 100)
    assert ended == [
        ("at 3", 100),
        ("at 103", 103),
        ("after 5", 105),
        ("at 108", 108),
        ("after 10", 110),
    ]


async def test_the_effective_deadline_over_a_move(mock_clock: Clock) -> None:
    async with running_clock() as clock:
        with clock.deadlines.scope_at(1003), clock.deadlines.scope_after(5):
            assert clock.deadlines.effective_deadline() == 5
            move(clock, 1000)
            assert clock.deadlines.effective_deadline() == 1003


quarters = st.integers(0, 60).map(lambda n: n / 4)
steps = st.one_of(
    st.tuples(st.sampled_from(["after", "at", "enter"]), quarters),
    st.tuples(st.sampled_from(["deadline", "relative_deadline"]), quarters, st.integers(0, 9)),
    st.tuples(st.just("move"), quarters),
    st.tuples(st.just("pass"), quarters),
)


class Model:
    """The model of a budget: its deadline, and whether it is still running."""

    def __init__(self, relative: bool, value: float) -> None:
        self.relative, self.value = relative, value
        self.entered = self.ended = False

    def left(self, position: float) -> float:
        return self.value if self.relative else self.value - position


@given(st.lists(steps, max_size=25))
def test_budgets_agree_with_a_simple_model(plan: list[tuple[Any, ...]]) -> None:
    async def main(mock_clock: Clock) -> None:
        position = 0.0
        made: list[tuple[BeatScope, Model]] = []

        async def enter(scope: BeatScope, model: Model) -> None:
            with scope:
                await trio.sleep_forever()
            assert scope.cancelled_caught
            model.ended = True

        async with running_clock() as clock, trio.open_nursery() as nursery:
            for name, value, *which in plan:
                if name == "after":
                    made.append((clock.deadlines.scope_after(value), Model(True, value)))
                elif name == "at":
                    made.append((clock.deadlines.scope_at(value), Model(False, value)))
                elif name == "enter":
                    for scope, model in made:
                        if not model.entered:
                            model.entered = True
                            nursery.start_soon(enter, scope, model)
                elif name == "move":
                    position = value
                    move(clock, value)
                elif name == "pass":
                    mock_clock.jump(value)
                    position += value
                    for _, model in made:
                        if model.relative and model.entered:
                            model.value -= value
                elif made:
                    scope, model = made[which[0] % len(made)]
                    relative = name == "relative_deadline"
                    if not model.entered and relative != model.relative:
                        with pytest.raises(RuntimeError):
                            setattr(scope, name, value)
                    else:
                        setattr(scope, name, value)
                        model.relative, model.value = relative, value
                await trio.testing.wait_all_tasks_blocked()
                for scope, model in made:
                    left = model.left(position)
                    assert scope.beats_left == max(0, left)
                    if model.entered or not model.relative:
                        assert scope.deadline == position + left
                    # A cancelled scope stays cancelled, wherever its deadline moves.
                    due = left <= 0 and (model.entered or not model.relative)
                    assert scope.cancel_called or not due
                    assert model.ended == (model.entered and scope.cancel_called)
                    if scope.cancel_called and not due:
                        assert model in cancelled
                    if scope.cancel_called:
                        cancelled.add(model)
            nursery.cancel_scope.cancel()

    cancelled: set[Model] = set()
    mock_clock = Clock()
    trio.run(main, mock_clock, clock=mock_clock)


async def test_scopes_do_not_keep_ended_tasks_alive(mock_clock: Clock) -> None:
    # An early deadline keeps later entries in the heap, but not their scopes and tasks.
    gone: list[weakref.ref[object]] = []

    async def work(number: int) -> None:
        with clock.deadlines.scope_after(1000 + number % 7) as scope:
            gone.append(weakref.ref(trio.lowlevel.current_task()))
            gone.append(weakref.ref(scope))
            await event.wait()

    async with running_clock() as clock:
        with clock.deadlines.scope_after(5) as early:
            for count in (20_000, 500):
                event = trio.Event()
                async with trio.open_nursery() as nursery:
                    for number in range(count):
                        nursery.start_soon(work, number)
                    await trio.testing.wait_all_tasks_blocked()
                    assert clock.live_scopes == count + 1
                    event.set()
                del nursery
                gc.collect()
                assert len(gone) == 2 * count
                assert not [reference for reference in gone if reference() is not None]
                assert clock.live_scopes == 1
                gone.clear()
            mock_clock.jump(5)
            await trio.lowlevel.checkpoint()
        assert early.cancelled_caught
