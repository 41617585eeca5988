"""The promises of Trio's cancel scopes, tested with Trio's own scopes and with beat scopes.

Each test runs twice: once in seconds, and once in beats on a grid of one beat a second.
"""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any, NamedTuple, TypeVar, cast

import pytest
import trio
import trio.testing
from pytest_trio import trio_fixture

from backbeat_trio import BeatBudgetExceeded
from backbeat_trio._time.clock import BeatClock

Clock = trio.testing.MockClock
T = TypeVar("T")


class Kind(NamedTuple):
    """The functions that make scopes of one kind, and read the time by which they count."""

    after: Callable[..., Any]
    at: Callable[..., Any]
    fail_after: Callable[..., AbstractContextManager[Any]]
    fail_at: Callable[..., AbstractContextManager[Any]]
    sleep: Callable[[float], Any]
    sleep_until: Callable[[float], Any]
    now: Callable[[], float]
    effective: Callable[[], float]

    def scope(self) -> Any:
        """Make a scope without a deadline."""
        return self.at(math.inf)


@cast(Callable[[T], T], trio_fixture)
async def beats(mock_clock: Clock) -> AsyncGenerator[Kind, None]:
    clock = BeatClock.local(60_000, 8)
    async with trio.open_nursery() as nursery:
        await nursery.start(clock.run)
        yield Kind(
            after=clock.deadlines.scope_after,
            at=clock.deadlines.scope_at,
            fail_after=lambda beats, **options: clock.deadlines.scope_after(
                beats, fail=True, **options
            ),
            fail_at=lambda beat, **options: clock.deadlines.scope_at(beat, fail=True, **options),
            sleep=clock.sleep,
            sleep_until=clock.sleep_until,
            now=clock.position,
            effective=clock.deadlines.effective_deadline,
        )
        nursery.cancel_scope.cancel()
    clock.close()


SECONDS = Kind(
    after=trio.move_on_after,
    at=trio.move_on_at,
    fail_after=trio.fail_after,
    fail_at=trio.fail_at,
    sleep=trio.sleep,
    sleep_until=trio.sleep_until,
    now=trio.current_time,
    effective=trio.current_effective_deadline,
)


@pytest.fixture(params=["seconds", "beats"])
def kind(request: pytest.FixtureRequest, beats: Kind) -> Kind:
    return SECONDS if request.param == "seconds" else beats


async def expect_cancelled() -> None:
    with pytest.raises(trio.Cancelled):
        await trio.lowlevel.checkpoint()


# Cancelling.


async def test_a_second_cancel_has_no_effect(kind: Kind, mock_clock: Clock) -> None:
    with kind.after(9) as scope:
        scope.cancel()
        scope.cancel()
        await trio.lowlevel.checkpoint()
    assert scope.cancel_called
    assert scope.cancelled_caught


async def test_a_cancelled_scope_cancels_every_checkpoint(kind: Kind, mock_clock: Clock) -> None:
    with kind.after(9) as scope:
        scope.cancel()
        for _ in range(3):
            await expect_cancelled()
    assert not scope.cancelled_caught
    with kind.after(1) as scope:
        with pytest.raises(trio.Cancelled):
            await wake_late(kind, scope)
        await expect_cancelled()


async def wake_late(kind: Kind, scope: Any) -> None:
    scope.deadline = kind.now()
    await trio.sleep_forever()


async def test_a_cancellation_without_a_checkpoint_is_not_caught(
    kind: Kind, mock_clock: Clock
) -> None:
    with kind.after(9) as scope:
        scope.cancel()
        await trio.lowlevel.cancel_shielded_checkpoint()
    await trio.lowlevel.checkpoint()
    assert scope.cancel_called
    assert not scope.cancelled_caught


async def test_a_scope_takes_only_its_own_cancellation_out_of_a_group(
    kind: Kind, mock_clock: Clock
) -> None:
    async def fail() -> None:
        raise KeyError

    for make in (kind.after, kind.fail_after):
        with pytest.RaisesGroup(KeyError), make(9) as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep_forever)
                nursery.start_soon(trio.sleep_forever)
                scope.cancel()
                nursery.start_soon(fail)
        assert scope.cancelled_caught


async def test_the_outermost_cancelled_scope_catches(kind: Kind, mock_clock: Clock) -> None:
    with kind.after(9) as outer:
        with kind.after(9) as middle:
            with kind.after(9) as inner:
                inner.cancel()
                middle.cancel()
                await trio.sleep_forever()
    assert inner.cancel_called
    assert not inner.cancelled_caught
    assert middle.cancelled_caught
    assert not outer.cancel_called
    assert not outer.cancelled_caught


async def test_a_shield_keeps_out_outer_cancellations(kind: Kind, mock_clock: Clock) -> None:
    with kind.after(9) as outer:
        with kind.after(9) as inner:
            outer.cancel()
            await expect_cancelled()
            assert inner.shield is False
            with pytest.raises(TypeError):
                inner.shield = "yes"
            assert inner.shield is False
            inner.shield = True
            await trio.lowlevel.checkpoint()
            with kind.after(9) as innermost:
                innermost.cancel()
                await expect_cancelled()
            await trio.lowlevel.checkpoint()
            inner.shield = False
            await expect_cancelled()
            inner.shield = True
            inner.cancel()
            await trio.lowlevel.checkpoint()
        assert inner.cancelled_caught
        assert not outer.cancelled_caught


@pytest.mark.parametrize("name", ["after", "fail_after"])
async def test_a_shield_can_be_given_when_the_scope_is_made(
    kind: Kind, name: str, mock_clock: Clock
) -> None:
    with kind.after(9) as outer, getattr(kind, name)(9, shield=True) as inner:
        outer.cancel()
        await trio.lowlevel.checkpoint()
        inner.shield = False
        await expect_cancelled()


async def test_a_shield_can_be_set_during_a_cancellation(kind: Kind, mock_clock: Clock) -> None:
    with kind.after(9) as outer, kind.after(9) as inner:
        outer.cancel()
        try:
            await trio.lowlevel.checkpoint()
        finally:
            inner.shield = True
    assert outer.cancelled_caught
    assert not inner.cancelled_caught


@pytest.mark.parametrize("early", [True, False], ids=["before", "afterwards"])
async def test_another_task_can_cancel_a_scope(kind: Kind, early: bool, mock_clock: Clock) -> None:
    scope = kind.after(9)

    async def wait() -> None:
        with scope:
            await trio.sleep_forever()

    if early:
        scope.cancel()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        scope.cancel()
    assert scope.cancelled_caught


async def test_a_shield_can_be_set_before_the_entry(kind: Kind, mock_clock: Clock) -> None:
    scope = kind.scope()
    scope.shield = True
    assert scope.shield is True
    with kind.after(9) as outer, scope:
        outer.cancel()
        await trio.lowlevel.checkpoint()
        scope.shield = False
        await expect_cancelled()


# A scope is for one block.


@pytest.mark.parametrize("name", ["after", "at"])
async def test_a_scope_is_used_once(kind: Kind, name: str, mock_clock: Clock) -> None:
    with getattr(kind, name)(9) as scope:
        with pytest.raises(RuntimeError, match="single 'with' block"), scope:
            pytest.fail("not reached")  # pragma: no cover
        assert (scope.deadline, scope.is_relative) == (9.0, None)
    with pytest.raises(RuntimeError, match="single 'with' block"), scope:
        pytest.fail("not reached")  # pragma: no cover
    scope.cancel()
    await trio.lowlevel.checkpoint()
    assert scope.cancel_called
    assert not scope.cancelled_caught


async def test_two_tasks_cannot_share_a_scope(kind: Kind, mock_clock: Clock) -> None:
    scope = kind.after(9)

    async def wait() -> None:
        with scope:
            await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(RuntimeError, match="single 'with' block"), scope:
            pytest.fail("not reached")  # pragma: no cover
        nursery.cancel_scope.cancel()


async def test_leaving_scopes_in_the_wrong_order_is_an_error(kind: Kind, mock_clock: Clock) -> None:
    with ExitStack() as stack:
        stack.enter_context(kind.after(5))
        with kind.after(9) as inner:
            with pytest.raises(RuntimeError, match="still within its child"):
                stack.close()
    mock_clock.jump(10)
    await trio.lowlevel.checkpoint()
    assert not inner.cancelled_caught


@pytest.mark.parametrize("way", ["cancel", "deadline"])
async def test_an_unrelated_task_cannot_leave_a_scope(
    kind: Kind, way: str, mock_clock: Clock
) -> None:
    async def wait(task_status: trio.TaskStatus[Any]) -> None:
        with kind.after(5) as scope:
            task_status.started(scope)
            await trio.sleep_forever()
        assert scope.cancelled_caught

    async with trio.open_nursery() as nursery:
        scope = await nursery.start(wait)
        with pytest.raises(RuntimeError, match="from unrelated"):
            scope.__exit__(None, None, None)
        if way == "cancel":
            scope.cancel()
        else:
            mock_clock.jump(5)


async def test_scopes_nest_deeply(kind: Kind, mock_clock: Clock) -> None:
    with ExitStack() as stack:
        outermost = stack.enter_context(kind.after(9))
        for _ in range(3000):
            stack.enter_context(kind.after(9))
        outermost.cancel()


# Deadlines.


async def test_a_set_deadline_that_does_not_pass_has_no_effect(
    kind: Kind, mock_clock: Clock
) -> None:
    start = kind.now()
    with kind.scope() as scope:
        assert scope.deadline == math.inf
        scope.deadline = start + 1
        assert scope.deadline == start + 1
    assert not scope.cancel_called
    mock_clock.jump(2)
    for _ in range(3):
        await trio.lowlevel.checkpoint()
    assert not scope.cancel_called


async def test_a_deadline_ends_the_block(kind: Kind, mock_clock: Clock) -> None:
    with kind.at(kind.now() + 1) as scope:
        mock_clock.jump(2)
        await trio.sleep_forever()
    assert scope.cancel_called
    assert scope.cancelled_caught


async def test_a_deadline_that_is_moved_into_the_past(kind: Kind, mock_clock: Clock) -> None:
    start = kind.now()
    with kind.scope() as scope:
        await trio.lowlevel.checkpoint()
        scope.deadline = start + 10
        await trio.lowlevel.checkpoint()
        mock_clock.jump(5)
        await trio.lowlevel.checkpoint()
        scope.deadline = start + 1
        await expect_cancelled()
        await expect_cancelled()


async def test_a_past_deadline_that_is_moved_before_a_checkpoint(
    kind: Kind, mock_clock: Clock
) -> None:
    with kind.after(5) as scope:
        mock_clock.jump(6)
        scope.deadline = kind.now() + 1
        await trio.lowlevel.checkpoint()
        assert not scope.cancel_called
        scope.deadline = -math.inf
        assert scope.cancel_called
        scope.deadline = math.inf
        assert scope.cancel_called
        await expect_cancelled()


async def test_an_unentered_scope_whose_deadline_has_passed(kind: Kind, mock_clock: Clock) -> None:
    scope = kind.at(kind.now() + 1)
    assert not scope.cancel_called
    scope.deadline -= 1
    assert scope.cancel_called
    scope.deadline += 1
    # A cancelled scope stays cancelled.
    assert scope.cancel_called
    with scope:
        await trio.lowlevel.checkpoint()
    assert scope.cancelled_caught
    scope = kind.at(kind.now() + 1)
    mock_clock.jump(1)
    assert scope.cancel_called
    scope = kind.after(0)
    mock_clock.jump(1)
    assert not scope.cancel_called


async def test_a_deadline_that_passes_after_the_end_does_nothing(
    kind: Kind, mock_clock: Clock
) -> None:
    for make in (kind.after, kind.at):
        with make(kind.now() + 5) as scope:
            pass
        mock_clock.jump(20)
        assert not scope.cancel_called


async def test_relative_deadlines_count_from_the_entry(kind: Kind, mock_clock: Clock) -> None:
    made = kind.after(5)
    assert (made.relative_deadline, made.is_relative) == (5, True)
    mock_clock.jump(3)
    start = kind.now()
    with made as scope:
        assert scope is made
        assert scope.is_relative is None
        assert (scope.deadline, scope.relative_deadline) == (start + 5, 5)
        scope.deadline = start + 3
        assert (scope.deadline, scope.relative_deadline) == (start + 3, 3)
        scope.relative_deadline = 4
        assert (scope.deadline, scope.relative_deadline) == (start + 4, 4)
        mock_clock.jump(1)
        assert (scope.deadline, scope.relative_deadline) == (start + 4, 3)
    mock_clock.jump(4)
    assert (scope.deadline, scope.relative_deadline) == (start + 4, -1)


async def test_an_unentered_scope_has_only_its_own_kind_of_deadline(
    kind: Kind, mock_clock: Clock
) -> None:
    relative = kind.after(5)
    with pytest.raises(RuntimeError, match="does not have an absolute deadline"):
        _ = relative.deadline
    with pytest.raises(RuntimeError, match="does not have an absolute deadline"):
        relative.deadline = 7
    assert (relative.relative_deadline, relative.is_relative) == (5, True)
    absolute = kind.at(5)
    with pytest.raises(RuntimeError, match="does not have a relative deadline"):
        _ = absolute.relative_deadline
    with pytest.raises(RuntimeError, match="does not have a relative deadline"):
        absolute.relative_deadline = 7
    assert (absolute.deadline, absolute.is_relative) == (5, False)


@pytest.mark.parametrize("name", ["after", "at"])
@pytest.mark.parametrize("turn", ["relative", "absolute", "neither"])
async def test_a_scope_without_a_deadline_accepts_both_kinds(
    kind: Kind, name: str, turn: str, mock_clock: Clock
) -> None:
    scope = getattr(kind, name)(math.inf)
    assert scope.is_relative is False
    assert scope.deadline == scope.relative_deadline == math.inf
    if turn == "relative":
        scope.relative_deadline = 5
        assert (scope.relative_deadline, scope.is_relative) == (5, True)
        scope.relative_deadline = math.inf
        assert (scope.deadline, scope.is_relative) == (math.inf, False)
        scope.relative_deadline = 5
    elif turn == "absolute":
        scope.deadline = 7
        assert (scope.deadline, scope.is_relative) == (7, False)
    mock_clock.jump(1)
    with scope:
        end = {"relative": 6, "absolute": 7, "neither": math.inf}[turn]
        assert scope.deadline == end
        assert scope.is_relative is None
        assert scope.relative_deadline == end - 1


@pytest.mark.parametrize("value", [math.nan, -1, -math.inf])
async def test_invalid_relative_deadlines_are_refused(
    kind: Kind, value: float, mock_clock: Clock
) -> None:
    for scope in (kind.after(5), kind.scope()):
        with pytest.raises(ValueError, match="must not be NaN|must be non-negative"):
            scope.relative_deadline = value
        with scope, pytest.raises(ValueError, match="must not be NaN|must be non-negative"):
            scope.relative_deadline = value
        assert not scope.cancel_called


async def test_a_deadline_that_is_moved_often(kind: Kind, mock_clock: Clock) -> None:
    start = kind.now()
    with kind.scope() as scope:
        for _ in range(5000):
            scope.deadline = start + 9998
            scope.deadline = start + 9999
        mock_clock.jump(9998.5)
        await trio.lowlevel.checkpoint()
        assert not scope.cancel_called
        mock_clock.jump(1)
        await trio.lowlevel.checkpoint()
    assert scope.cancelled_caught


# `fail_after`, `fail_at` and sleeps.


async def test_fail_after_and_fail_at(kind: Kind, mock_clock: Clock) -> None:
    mock_clock.autojump_threshold = 0
    for make, start in ((kind.fail_after, 0), (kind.fail_at, kind.now() + 3)):
        before = kind.now()
        with pytest.raises(trio.TooSlowError), make(start + 3):
            await kind.sleep(100)
        assert kind.now() == before + 3
        with make(start + 300):
            await kind.sleep(0)
    with pytest.raises(KeyError), kind.fail_after(5):
        raise KeyError
    with pytest.raises(trio.TooSlowError), trio.CancelScope() as outer:
        with kind.fail_after(5, shield=True):
            outer.cancel()
            await trio.sleep_forever()
    with trio.CancelScope() as outer, kind.fail_after(5):
        outer.cancel()
        await trio.sleep_forever()
    assert outer.cancelled_caught


async def test_a_shielded_scope_ends_at_its_own_deadline(kind: Kind, mock_clock: Clock) -> None:
    mock_clock.autojump_threshold = 0
    start = kind.now()
    with kind.scope() as outer, kind.after(3, shield=True) as inner:
        outer.cancel()
        await trio.sleep_forever()
    assert inner.cancelled_caught
    assert kind.now() == start + 3


async def test_sleeps_end_at_their_time(kind: Kind, mock_clock: Clock) -> None:
    mock_clock.autojump_threshold = 0
    start = kind.now()
    await kind.sleep(2)
    await kind.sleep_until(start + 5)
    assert kind.now() == start + 5
    for wait in (kind.sleep(0), kind.sleep_until(0), kind.sleep_until(-math.inf)):
        with trio.testing.assert_checkpoints():
            await wait
    with kind.at(kind.now()) as scope:
        await kind.sleep(0)
    assert scope.cancelled_caught
    assert kind.now() == start + 5


async def test_a_sleep_is_cancelled_from_outside(kind: Kind, mock_clock: Clock) -> None:
    for wait in (kind.sleep(100), kind.sleep(math.inf), kind.sleep_until(1e6), kind.sleep(0)):
        with kind.scope() as scope:
            scope.cancel()
            await wait
        assert scope.cancelled_caught


# The effective deadline.


async def test_the_effective_deadline(kind: Kind, mock_clock: Clock) -> None:
    assert kind.effective() == math.inf
    with kind.at(5) as first:
        with kind.at(10) as second:
            assert kind.effective() == 5
            second.deadline = 3
            assert kind.effective() == 3
            second.deadline = 10
            assert kind.effective() == 5
            second.shield = True
            assert kind.effective() == 10
            second.shield = False
            assert kind.effective() == 5
            first.cancel()
            assert kind.effective() == -math.inf
            second.shield = True
            assert kind.effective() == 10
        assert kind.effective() == -math.inf
    assert kind.effective() == math.inf


async def test_trio_cannot_see_deadlines_in_beats(beats: Kind, mock_clock: Clock) -> None:
    # The docstring of `BeatScope` says that this differs.
    with beats.after(5):
        assert trio.current_effective_deadline() == math.inf
        assert beats.effective() == 5


# Garbage.


@pytest.mark.parametrize("name", ["after", "fail_after"])
async def test_scopes_make_no_cyclic_garbage(kind: Kind, name: str, mock_clock: Clock) -> None:
    if kind is SECONDS and name == "fail_after" and sys.version_info >= (3, 12):
        pytest.skip("Trio's own leaves some since Python 3.12")

    async def cancel() -> None:
        with getattr(kind, name)(9) as scope:
            scope.cancel()
            await trio.sleep_forever()

    async def expect_failure() -> None:
        try:
            await cancel()
        except (trio.TooSlowError, BeatBudgetExceeded):
            assert name == "fail_after"

    async def crash() -> None:
        raise ValueError("crashed")

    flags = gc.get_debug()
    gc.collect()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        await expect_failure()
        await expect_failure()
        with pytest.RaisesGroup(ValueError), getattr(kind, name)(9) as outer:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep_forever)
                outer.cancel()
                nursery.start_soon(crash)
        gc.collect()
        assert not gc.garbage
    finally:
        gc.set_debug(flags)
        gc.garbage.clear()
