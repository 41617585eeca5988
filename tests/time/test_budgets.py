"""Which numbers the budgets of a session accept, and what happens after a refused one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
import trio
import trio.testing

from backbeat_trio import BeatBudgetExceeded, Session, SessionClosed
from backbeat_trio.testing import open_session

Clock = trio.testing.MockClock


EXACT = [Decimal(2), Fraction(2), 2, 2.0]


@pytest.mark.parametrize("beats", EXACT, ids=lambda value: type(value).__name__)
async def test_any_number_is_a_budget(beats: Any, autojump_clock: Clock) -> None:
    async with open_session(tempo_bpm=60.0) as bb:
        start = bb.current_position()
        for make in (bb.move_on_after, bb.move_on_at):
            budget: float = beats if make == bb.move_on_after else start + 4
            with make(budget) as scope:
                assert type(scope.deadline) is float
                await trio.sleep_forever()
            assert scope.cancelled_caught
        assert bb.current_position() - start == 4
        await bb.sleep(beats)
        assert bb.current_position() - start == 6
        with bb.move_on_after(9) as scope:
            scope.relative_deadline = beats
            await trio.sleep_forever()
        assert bb.current_position() - start == 8
        with bb.move_on_after(9) as scope:
            scope.deadline = type(beats)(round(start)) + 10
            assert type(scope.deadline) is float
        assert bb.move_on_after(beats).relative_deadline == 2.0


@pytest.mark.parametrize("make", ["move_on_after", "fail_after", "move_on_at", "fail_at"])
@pytest.mark.parametrize("value", [10**400, True, b"2"], ids=["huge", "bool", "bytes"])
async def test_a_refused_number_leaves_trio_as_it_was(
    make: str, value: Any, autojump_clock: Clock
) -> None:
    async with open_session() as bb:
        with trio.CancelScope() as outer:
            with pytest.raises((TypeError, ValueError), match="`beats?` must be"):
                with getattr(bb, make)(value):
                    pytest.fail("not reached")  # pragma: no cover
            with bb.move_on_after(1) as scope:
                with pytest.raises((TypeError, ValueError), match="`deadline` must be"):
                    scope.deadline = value
                with pytest.raises((TypeError, ValueError), match="`relative_deadline` must be"):
                    scope.relative_deadline = value
            outer.cancel()
            await trio.lowlevel.checkpoint()
        assert outer.cancelled_caught


@pytest.mark.parametrize("enabled", [True, False], ids=["enabled", "disabled"])
async def test_waits_for_beats_end_with_the_session(enabled: bool, autojump_clock: Clock) -> None:
    ended: list[str] = []

    async def expect_end(name: str, async_fn: Callable[..., Awaitable[Any]], *args: Any) -> None:
        with pytest.raises(SessionClosed):
            await async_fn(*args)
        ended.append(name)

    async with trio.open_nursery() as nursery:
        async with open_session(enabled=enabled) as bb:
            nursery.start_soon(expect_end, "sleep", bb.sleep, 10**6)
            nursery.start_soon(expect_end, "sleep_until", bb.sleep_until, 10**9)
            nursery.start_soon(expect_end, "beats", anext, bb.beats())
            nursery.start_soon(expect_end, "downbeats", anext, bb.downbeats(precise=True))
            await trio.sleep(0.25)
            assert not ended
            left = trio.current_time()
        await trio.testing.wait_all_tasks_blocked()
        assert sorted(ended) == ["beats", "downbeats", "sleep", "sleep_until"]
        assert trio.current_time() == left


# Type checkers must report that these functions return None if their block is cut. Where they do
# not, mypy reports that the comment is not used.


async def move_on(bb: Session) -> int:  # type: ignore[return]
    with bb.move_on_after(0):
        await trio.lowlevel.checkpoint()
        return 1


async def graceful(bb: Session) -> int:  # type: ignore[return]
    with bb.fail_after(1, soft_after=0) as scope:
        with scope.graceful():
            await trio.lowlevel.checkpoint()
            return 1


async def detached(bb: Session) -> int:  # type: ignore[return]
    with bb.detached() as scope:
        scope.cancel()
        await trio.lowlevel.checkpoint()
        return 1


async def extract(bb: Session) -> int:  # type: ignore[return]
    headers: dict[str, str] = {}
    with bb.move_on_after(0):
        bb.inject(headers)
    with bb.extract(headers):
        await trio.lowlevel.checkpoint()
        return 1


# This one never returns None, so they must report nothing.
async def fail(bb: Session) -> int:
    with bb.fail_after(0):
        await trio.lowlevel.checkpoint()
        return 1


async def test_type_checkers_know_which_blocks_may_end_quietly(autojump_clock: Clock) -> None:
    async with open_session(tempo_bpm=60.0) as bb:
        for cut in (move_on, graceful, detached, extract):
            result: object = await cut(bb)
            assert result is None
        with pytest.raises(BeatBudgetExceeded):
            await fail(bb)
