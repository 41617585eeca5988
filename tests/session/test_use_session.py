"""Whose session `current_session` gives, and how another task gets one."""

from __future__ import annotations

import contextvars

import pytest
import trio
import trio.testing

import backbeat_trio as backbeat
from backbeat_trio.testing import open_session

Clock = trio.testing.MockClock


def test_no_session_says_how_to_open_one() -> None:
    with pytest.raises(RuntimeError) as caught:
        contextvars.Context().run(backbeat.current_session)
    text = str(caught.value)
    assert "open one with `async with backbeat_trio.session()`" in text
    assert "`with backbeat_trio.use_session(bb)`" in text


async def current(event: trio.Event, found: list[object]) -> None:
    await event.wait()
    try:
        found.append(backbeat.current_session())
    except RuntimeError:
        found.append(None)


async def test_a_task_that_was_started_outside_uses_the_session_it_is_given(
    autojump_clock: Clock,
) -> None:
    found: list[object] = []
    opened = trio.Event()
    box: list[backbeat.Session] = []

    async def handle() -> None:
        await opened.wait()
        with pytest.raises(RuntimeError, match="no backbeat session"):
            backbeat.current_session()
        with backbeat.use_session(box[0]) as bb:
            assert bb is box[0]
            found.append(backbeat.current_session())
            async with trio.open_nursery() as nursery:
                nursery.start_soon(current, opened, found)
            found.append(await trio.to_thread.run_sync(backbeat.current_session))
            # In a thread, methods are called in Trio's thread.
            beat = await trio.to_thread.run_sync(trio.from_thread.run_sync, bb.current_beat)
            assert beat == bb.current_beat()
        with pytest.raises(RuntimeError, match="no backbeat session"):
            backbeat.current_session()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(handle)
        nursery.start_soon(current, opened, found)
        async with open_session() as bb:
            box.append(bb)
            opened.set()
            await trio.testing.wait_all_tasks_blocked()
    assert found.count(bb) == 3
    assert found.count(None) == 1


async def test_blocks_may_be_nested_and_the_innermost_counts(autojump_clock: Clock) -> None:
    async with open_session(agent_id="one") as one:
        async with open_session(agent_id="two") as two:
            with backbeat.use_session(one):
                assert backbeat.current_session() is one
                with backbeat.use_session(two):
                    assert backbeat.current_session() is two
                with pytest.raises(KeyError):
                    with backbeat.use_session(two):
                        raise KeyError
                assert backbeat.current_session() is one
            assert backbeat.current_session() is two
        assert backbeat.current_session() is one
        # Leaving the block does not close the session.
        await one.sleep(1)


async def test_two_tasks_use_two_sessions(autojump_clock: Clock) -> None:
    async with open_session(agent_id="one") as one, open_session(agent_id="two") as two:

        async def use(bb: backbeat.Session) -> None:
            with backbeat.use_session(bb):
                for _ in range(3):
                    await bb.sleep(1)
                    assert backbeat.current_session() is bb

        async with trio.open_nursery() as nursery:
            nursery.start_soon(use, one)
            nursery.start_soon(use, two)


async def test_what_cannot_be_used_is_refused(autojump_clock: Clock) -> None:
    for wrong in (None, backbeat.session(), backbeat.Session):
        with pytest.raises(TypeError, match="`bb` must be a session, not "):
            with backbeat.use_session(wrong):  # type: ignore[arg-type]
                pytest.fail("not reached")  # pragma: no cover
    async with open_session() as bb:
        pass
    with pytest.raises(backbeat.SessionClosed):
        with backbeat.use_session(bb):
            pytest.fail("not reached")  # pragma: no cover


async def test_a_session_that_is_left_in_the_meantime_says_so(autojump_clock: Clock) -> None:
    left = trio.Event()

    async def outlive(bb: backbeat.Session, *, task_status: trio.TaskStatus[None]) -> None:
        with backbeat.use_session(bb):
            task_status.started()
            await left.wait()
            assert backbeat.current_session() is bb
            with pytest.raises(backbeat.SessionClosed):
                bb.start_operation("election")

    async with trio.open_nursery() as nursery:
        async with open_session() as bb:
            await nursery.start(outlive, bb)
        left.set()


async def test_another_run_of_trio_may_not_use_it(autojump_clock: Clock) -> None:
    async def elsewhere(bb: backbeat.Session) -> None:
        with pytest.raises(RuntimeError, match="another run of Trio: open one in this run"):
            backbeat.current_session()
        with pytest.raises(RuntimeError, match="another run of Trio: open one in this run"):
            with backbeat.use_session(bb):
                pytest.fail("not reached")  # pragma: no cover
        async with open_session(lock_timeout=0) as own:
            assert backbeat.current_session() is own

    async with open_session() as bb:
        await trio.to_thread.run_sync(trio.run, elsewhere, bb)
