"""The testing kit, as its users use it."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

import backbeat_trio as backbeat
from backbeat_trio.testing import (
    ClaimRecorder,
    ManualMetronome,
    NatsServer,
    open_metronome,
    open_recorder,
    open_session,
)


async def test_session_in_virtual_time(backbeat_session: backbeat.Session) -> None:
    started = trio.current_time()
    with backbeat_session.move_on_after(2) as scope:
        await trio.sleep_forever()
    assert scope.cancelled_caught
    assert trio.current_time() == started + 2.0


async def test_recorder(backbeat_session: backbeat.Session, backbeat_claims: ClaimRecorder) -> None:
    async with backbeat_session.operation("dht_store", id="job", beats=4):
        await backbeat_session.sleep(2.5)
    done = await backbeat_claims.wait_for("job", "done")
    assert done.progress == 1.0
    assert [claim.progress for claim in backbeat_claims.of("job")] == [0.0, 0.25, 0.5, 1.0]


async def test_manual_metronome_moves_on_demand(
    backbeat_metronome: ManualMetronome, mock_clock: trio.testing.MockClock
) -> None:
    async with open_session(backbeat_metronome.bus) as bb:
        assert bb.current_position() == 0.0
        assert await backbeat_metronome.tick() == 1
        assert bb.current_beat() == 1
        await backbeat_metronome.pass_time(0.25)
        assert bb.current_position() == 1.25
        assert await backbeat_metronome.tick(3) == 4
        assert trio.current_time() == 4.0


async def test_manual_metronome_changes_tempo(backbeat_metronome: ManualMetronome) -> None:
    async with open_session(backbeat_metronome.bus) as bb, trio.open_nursery() as nursery:
        ended: list[tuple[int, float]] = []

        async def work() -> None:
            with bb.move_on_after(6):
                await trio.sleep_forever()
            ended.append((bb.current_beat(), trio.current_time()))

        nursery.start_soon(work)
        await trio.testing.wait_all_tasks_blocked()
        assert await backbeat_metronome.set_tempo(120, at_beat=4) == 4
        with pytest.raises(backbeat.TempoRefused):
            await backbeat_metronome.set_tempo(120, at_beat=1)
        await backbeat_metronome.tick(5)
        assert bb.tempo_bpm == 120.0
        assert not ended
        await backbeat_metronome.tick()
        assert ended == [(6, 5.0)]


async def test_recorder_of_one_agent(backbeat_metronome: ManualMetronome) -> None:
    bus = backbeat_metronome.bus
    async with (
        open_session(bus, agent_id="one") as one,
        open_session(bus, agent_id="two") as two,
        open_recorder(one, "two") as recorder,
    ):
        one.start_operation("election", id="a")
        two.start_operation("election", id="b")
        await recorder.wait_for("b", "executing")
        assert not recorder.of("a")


async def test_real_server(nats_server: NatsServer) -> None:
    async with open_session(nats_url=nats_server.url, require_connection=True) as bb:
        assert bb.health().connected


# Time that passes on demand.


async def test_a_tick_stops_at_each_deadline_on_the_way(
    backbeat_metronome: ManualMetronome,
) -> None:
    async with open_session(backbeat_metronome.bus) as bb, trio.open_nursery() as nursery:
        seen: list[tuple[str, float]] = []

        async def work() -> None:
            with bb.move_on_after(2) as scope:
                await trio.sleep(1.5)
                seen.append(("slept", trio.current_time()))
                await trio.sleep(0.25)
                seen.append(("slept again", trio.current_time()))
                await trio.sleep_forever()
            assert scope.cancelled_caught
            seen.append(("cancelled", trio.current_time()))

        nursery.start_soon(work)
        await trio.testing.wait_all_tasks_blocked()
        assert await backbeat_metronome.tick(3) == 3
        assert trio.current_time() == 3.0
        assert seen == [("slept", 1.5), ("slept again", 1.75), ("cancelled", 2.0)]


async def test_time_that_passes_stops_at_each_deadline_on_the_way(
    backbeat_metronome: ManualMetronome,
) -> None:
    woken: list[float] = []

    async def work() -> None:
        while True:
            await trio.sleep(0.3)
            woken.append(round(trio.current_time(), 6))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(work)
        await backbeat_metronome.pass_time(1.0)
        assert woken == [0.3, 0.6, 0.9]
        assert trio.current_time() == 1.0
        await backbeat_metronome.pass_time(0.0)
        assert trio.current_time() == 1.0
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("seconds", [-1.0, math.inf, math.nan])
async def test_time_that_cannot_pass(seconds: float, backbeat_metronome: ManualMetronome) -> None:
    with pytest.raises(ValueError, match="`seconds` must"):
        await backbeat_metronome.pass_time(seconds)


@pytest.mark.parametrize("seconds", [0.0, 1e-30])
async def test_a_task_that_sleeps_for_no_time_in_a_loop_is_an_error(
    seconds: float, mock_clock: trio.testing.MockClock
) -> None:
    mock_clock.jump(1.0)

    async def work() -> None:
        while True:
            await trio.sleep(seconds)

    async with open_metronome(mock_clock, patience=0.2) as metronome, trio.open_nursery() as tasks:
        tasks.start_soon(work)
        with pytest.raises(RuntimeError, match=r"runs on and on: for 0\.2 s of real time"):
            await metronome.tick()
        tasks.cancel_scope.cancel()


async def test_who_lets_time_pass_is_cancelled_on_time(backbeat_metronome: ManualMetronome) -> None:
    with trio.move_on_after(1.5) as scope:
        await backbeat_metronome.tick(3)
    assert scope.cancelled_caught
    assert trio.current_time() == 1.5


async def test_a_tick_on_a_grid_that_stands_still(backbeat_metronome: ManualMetronome) -> None:
    await backbeat_metronome.set_tempo(0, at_beat=2)
    assert await backbeat_metronome.tick(4) == 2
    assert trio.current_time() == 4.0


@pytest.mark.parametrize("change", [{"rate": 1.0}, {"autojump_threshold": 0.0}])
async def test_a_metronome_on_demand_needs_a_clock_that_stands_still(
    change: dict[str, float], mock_clock: trio.testing.MockClock
) -> None:
    for name, value in change.items():
        setattr(mock_clock, name, value)
    with pytest.raises(ValueError, match="neither run nor jump"):
        async with open_metronome(mock_clock):
            pass


async def test_a_metronome_on_demand_needs_the_clock_of_the_run() -> None:
    with pytest.raises(ValueError, match="the clock of this Trio run"):
        async with open_metronome(trio.testing.MockClock()):
            pass


# What the body of a block raises.


@asynccontextmanager
async def recording(clock: trio.testing.MockClock) -> AsyncGenerator[ClaimRecorder, None]:
    async with open_metronome(clock) as metronome, open_session(metronome.bus) as bb:
        async with open_recorder(bb) as recorder:
            yield recorder


@pytest.mark.parametrize("error", [AssertionError("no"), KeyboardInterrupt(), SystemExit(3)])
@pytest.mark.parametrize("open_one", [open_metronome, recording])
async def test_what_the_body_raises_leaves_as_itself(
    error: BaseException, open_one: Any, mock_clock: trio.testing.MockClock
) -> None:
    caught: BaseException | None = None
    try:
        async with open_one(mock_clock):
            raise error
    except BaseException as raised:
        caught = raised
    assert caught is error
    assert caught.__context__ is None


@pytest.mark.parametrize("open_one", [open_metronome, recording])
async def test_a_body_that_is_cancelled_leaves_as_cancelled(
    open_one: Any, mock_clock: trio.testing.MockClock
) -> None:
    with trio.CancelScope() as scope:
        async with open_one(mock_clock):
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught


async def test_a_recorder_that_fails_cancels_its_block(
    backbeat_session: backbeat.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(self: ClaimRecorder, claims: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(ClaimRecorder, "_record", fail)
    with pytest.raises(OSError, match="the disk is full"):
        async with open_recorder(backbeat_session):
            await trio.sleep_forever()


async def test_a_body_and_a_recorder_that_both_fail(
    backbeat_session: backbeat.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(self: ClaimRecorder, claims: object) -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise OSError("the disk is full")

    monkeypatch.setattr(ClaimRecorder, "_record", fail)
    error = AssertionError("no")
    with pytest.raises(ExceptionGroup) as caught:
        async with open_recorder(backbeat_session):
            await trio.testing.wait_all_tasks_blocked()
            raise error
    first, second = caught.value.exceptions
    assert first is error
    assert isinstance(second, OSError)


async def test_what_the_body_of_a_server_raises_leaves_as_itself() -> None:
    error = AssertionError("no")
    server = NatsServer()
    with pytest.raises(AssertionError) as caught:
        async with server:
            raise error
    assert caught.value is error
    with pytest.raises(ProcessLookupError):
        os.kill(server.pid, 0)


# Virtual time that leads nowhere.


async def test_a_thread_that_takes_longer_than_patience_is_waited_for(
    mock_clock: trio.testing.MockClock,
) -> None:
    async with open_metronome(mock_clock, patience=0.1):
        await trio.to_thread.run_sync(time.sleep, 0.5)


async def test_a_process_that_takes_longer_than_patience_is_waited_for(
    mock_clock: trio.testing.MockClock,
) -> None:
    async with open_metronome(mock_clock, patience=0.1):
        await trio.run_process([sys.executable, "-c", "import time; time.sleep(0.5)"])


async def test_a_thread_is_waited_for_while_virtual_time_jumps(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_session(tempo_bpm=60.0, patience=0.2):
        await trio.to_thread.run_sync(time.sleep, 1.0)


async def test_work_that_takes_longer_than_patience_is_not_in_the_way(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_session(tempo_bpm=60.0, patience=0.2) as bb:
        begun = time.perf_counter()
        beats = 0
        async for _ in bb.beats():
            time.sleep(0.001)
            beats += 1
            if time.perf_counter() - begun > 0.6:
                break
        assert beats > 3


@pytest.mark.parametrize("unit", ["beats", "seconds"])
async def test_what_comes_late_is_waited_for_while_virtual_time_jumps(
    unit: str, autojump_clock: trio.testing.MockClock
) -> None:
    # This takes some times the patience.
    async with open_session(tempo_bpm=60.0, patience=0.2) as bb:
        move_on_after = bb.move_on_after if unit == "beats" else trio.move_on_after
        with move_on_after(600) as scope:
            await trio.sleep_forever()
        assert scope.cancelled_caught


async def test_a_clock_with_a_rate_is_waited_for() -> None:
    # pytest-trio takes clocks from fixtures; this one is of this run alone.
    async def main() -> None:
        async with open_session(tempo_bpm=60.0, patience=0.1):
            await trio.sleep(0.5 * 100)

    clock = trio.testing.MockClock(rate=100.0)
    await trio.to_thread.run_sync(lambda: trio.run(main, clock=clock))


PRELUDE = """
    import pytest, trio, trio.testing
    from backbeat_trio.testing import open_session
"""


class Suite:
    """Tests of a user, run by pytest."""

    def __init__(self, pytester: pytest.Pytester) -> None:
        self._pytester = pytester
        pytester.makeconftest('pytest_plugins = ["backbeat_trio.testing"]')
        pytester.makeini("[pytest]\ntrio_mode = true\nbackbeat_patience = 0.3\n")

    def run(self, code: str, **outcomes: int) -> str:
        self._pytester.makepyfile(PRELUDE + code)
        result = self._pytester.runpytest_inprocess("-p", "no:cacheprovider")
        result.assert_outcomes(**outcomes)
        return " ".join(result.stdout.str().split())


@pytest.fixture
def suite(pytester: pytest.Pytester) -> Suite:
    return Suite(pytester)


def test_unfinished_work_on_a_still_clock_is_an_error(suite: Suite) -> None:
    said = suite.run(
        """
    async def worker(bb):
        await bb.sleep(3)

    async def test_it(backbeat_metronome):
        async with open_session(backbeat_metronome.bus) as bb, trio.open_nursery() as nursery:
            nursery.start_soon(worker, bb)

    async def test_after_it(backbeat_metronome):
        assert await backbeat_metronome.tick(3) == 3
        """,
        failed=1,
        passed=1,
    )
    assert "no task has run for 0.3 s of real time" in said
    assert "the virtual clock stands still" in said
    assert "worker at " in said


def test_what_never_comes_is_an_error_where_time_jumps(suite: Suite) -> None:
    said = suite.run(
        """
    async def test_it(backbeat_session, backbeat_claims):
        await backbeat_claims.wait_for("nobody", "done")
        """,
        failed=1,
    )
    assert "what the test waits for does not come: for 0.3 s of real time" in said
    assert "test_it" in said
    # pytest-trio puts each test into a nursery, and nothing else adds a group.
    assert said.count("sub-exception") == 1


def test_a_pause_that_nobody_ends_is_an_error(suite: Suite) -> None:
    said = suite.run(
        """
    async def test_it(backbeat_session):
        await backbeat_session.pause()
        await backbeat_session.sleep(8)

    async def test_sessions_of_its_own(autojump_clock):
        async with open_session(patience=0.2) as one, open_session(patience=0.2) as two:
            await one.pause()
            await one.sleep(8)

    async def test_resumed(backbeat_session):
        await backbeat_session.pause()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(backbeat_session.sleep, 8)
            await trio.sleep(100)
            await backbeat_session.resume()
        """,
        failed=2,
        passed=1,
    )
    assert "A grid that `pause()` has stopped waits for `resume()`" in said
    assert "for 0.3 s of real time" in said
    assert "for 0.2 s of real time" in said
    # The lines of the test, and not those of the session's services.
    assert "test_sessions_of_its_own'> at " in said
    assert "backbeat_trio._runtime" not in said.split("These tasks wait:")[-1]
    assert said.count("sub-exception") == 2


def test_two_clocks_in_one_test_are_an_error(suite: Suite) -> None:
    said = suite.run(
        """
    async def test_both(backbeat_session, backbeat_metronome):
        await backbeat_metronome.tick()

    async def test_another_clock(mock_clock, backbeat_session):
        await backbeat_session.sleep(1)

    async def test_the_same_clock(autojump_clock, backbeat_session):
        await backbeat_session.sleep(1)
        """,
        errors=2,
        passed=1,
    )
    assert "UsageError" in said
    assert (
        "need different ones: backbeat_metronome, backbeat_session, autojump_clock, mock_clock"
        in said
    )


def test_virtual_time_and_a_real_server_in_one_test_are_an_error(suite: Suite) -> None:
    said = suite.run(
        """
    async def test_session(backbeat_session, nats_server): pass
    async def test_metronome(nats_server, backbeat_metronome): pass
    async def test_clock(nats_server, autojump_clock): pass

    @pytest.fixture
    def fast_clock():
        return trio.testing.MockClock(rate=2.0)

    async def test_a_clock_that_runs(nats_server, fast_clock):
        await trio.sleep(0.01)
        """,
        errors=3,
        passed=1,
    )
    for fixtures in (
        "backbeat_session, autojump_clock",
        "backbeat_metronome, mock_clock",
        "autojump_clock",
    ):
        assert f"`nats_server` needs a real clock, but {fixtures} brings virtual time" in said


async def test_a_server_does_not_start_in_virtual_time(
    autojump_clock: trio.testing.MockClock,
) -> None:
    with pytest.raises(RuntimeError, match="virtual time"):
        async with NatsServer():
            pass


async def test_a_server_that_runs_is_not_started_again(nats_server: NatsServer) -> None:
    pid = nats_server.pid
    with pytest.raises(RuntimeError, match="already running"):
        await nats_server.start()
    assert nats_server.pid == pid
    async with open_session(nats_url=nats_server.url, require_connection=True) as bb:
        assert bb.health().connected


async def test_a_start_that_is_cancelled_leaves_no_process() -> None:
    server = NatsServer()
    try:
        with trio.CancelScope() as scope:
            scope.cancel()
            await server.start()
        assert scope.cancelled_caught
        with pytest.raises(ProcessLookupError):
            os.kill(server.pid, 0)
        await server.start()
        os.kill(server.pid, 0)
    finally:
        server.close()


async def test_wrong_arguments_are_named(backbeat_metronome: ManualMetronome) -> None:
    wrong: Any
    for wrong in (0, -1, 1.5, "1"):
        with pytest.raises((TypeError, ValueError), match="`beats` must"):
            await backbeat_metronome.tick(wrong)
    wrong = "1"
    with pytest.raises(TypeError, match="`seconds` must"):
        await backbeat_metronome.pass_time(wrong)
    with pytest.raises(TypeError, match="did you mean 'tempo_bpm'"):
        async with open_session(tempo=60):
            pytest.fail("it was opened")
    assert backbeat_metronome.beat == 0
