"""Which scopes can cancel a task, found by Trio's own chain and from the outside."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import trio
import trio.testing

from backbeat_trio._time.enclosing import find_enclosing, probe_enclosing

Find = Callable[[Mapping[trio.CancelScope, str]], tuple[float, list[str]]]


class _Other:
    """A task of a version of Trio that keeps its scopes in another way."""


def find_without_chain(known: Mapping[trio.CancelScope, str]) -> tuple[float, list[str]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("backbeat_trio._time.enclosing.current_task", _Other)
        return find_enclosing(known)


@pytest.fixture(params=[find_enclosing, probe_enclosing, find_without_chain])
def find(request: pytest.FixtureRequest) -> Any:
    return request.param


def names(answer: tuple[float, list[str]]) -> tuple[float, list[str]]:
    return answer[0], sorted(answer[1])


async def test_shields_keep_scopes_out(find: Find, mock_clock: trio.testing.MockClock) -> None:
    a, b, c, d = (trio.CancelScope() for _ in range(4))
    b.shield = True
    known = {a: "a", b: "b", c: "c", d: "d"}
    with trio.move_on_at(50), a, trio.move_on_at(90):
        assert names(find(known)) == (50, ["a"])
        with b, c:
            assert names(find(known)) == (math.inf, ["b", "c"])
            b.shield = False
            assert names(find(known)) == (50, ["a", "b", "c"])
            with trio.CancelScope(shield=True):
                assert names(find(known)) == (math.inf, [])
        with trio.CancelScope(shield=True), trio.move_on_at(20), d:
            assert names(find(known)) == (20, ["d"])
    assert names(find({})) == (math.inf, [])


async def test_a_task_is_in_the_scopes_around_its_nursery(
    find: Find, mock_clock: trio.testing.MockClock
) -> None:
    found = []
    around, between, spawner, own = (trio.CancelScope() for _ in range(4))
    known = {around: "around", between: "between", spawner: "spawner", own: "own"}

    async def work() -> None:
        with own:
            found.append(names(find(known)))

    async def spawn(nursery: trio.Nursery) -> None:
        with spawner:
            nursery.start_soon(work)
            await trio.testing.wait_all_tasks_blocked()

    with around:
        async with trio.open_nursery() as nursery:
            with between:
                nursery.start_soon(spawn, nursery)
                await trio.testing.wait_all_tasks_blocked(0.01)
            assert names(find(known)) == (math.inf, ["around"])
    assert found == [(math.inf, ["around", "own"])]


async def test_a_cancelled_task_has_no_time(find: Find, mock_clock: trio.testing.MockClock) -> None:
    with trio.CancelScope() as outer, trio.CancelScope() as inner:
        known = {outer: "outer", inner: "inner"}
        outer.cancel()
        assert names(find(known)) == (-math.inf, [])
        with trio.CancelScope(shield=True):
            assert names(find(known)) == (math.inf, [])


async def test_asking_changes_nothing(find: Find, autojump_clock: trio.testing.MockClock) -> None:
    with trio.CancelScope() as scope:
        find({scope: "scope"})
        assert scope.deadline == math.inf
        await trio.sleep(1)
    assert not scope.cancel_called
