"""How a session begins and ends where something goes wrong on the way."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
import trio.testing
from helpers import Lines

import backbeat_trio as backbeat
from backbeat_trio._runtime.emitter import ClaimEmitter
from backbeat_trio._runtime.services import ServiceGroup
from backbeat_trio.testing import open_session

Clock = trio.testing.MockClock


class Wrapped:
    """A transport that passes on what it is asked, and counts how often it was closed."""

    def __init__(self, run: Callable[..., Awaitable[None]] | None = None) -> None:
        self.inner = backbeat.MemoryTransport(backbeat.MemoryBus())
        self.run = run or self.inner.run
        self.closed = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    async def aclose(self) -> None:
        self.closed += 1
        await self.inner.aclose()


def wrapped(run: Callable[..., Awaitable[None]] | None = None) -> Any:
    return Wrapped(run)


# Exceptions.


@pytest.mark.parametrize("crash_in", ["_send_queue", "_confirm"])
async def test_a_crash_deep_inside_a_service_surfaces_as_itself(
    autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch, crash_in: str
) -> None:
    async def crash(self: ClaimEmitter) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(ClaimEmitter, crash_in, crash)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        async with open_session() as bb:
            bb.start_operation("election").complete()
            await trio.sleep_forever()


async def test_a_crash_of_the_listener_surfaces_as_itself(autojump_clock: Clock) -> None:
    transport = wrapped()

    async def crash(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug")

    transport.request = crash
    with pytest.raises(ZeroDivisionError, match="a bug"):
        async with open_session(transport=transport, lock_timeout=0):
            await trio.sleep_forever()


async def test_an_exception_without_a_text_fails_the_operation_and_leaves(
    autojump_clock: Clock,
) -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise KeyError("no text")

    async with open_session() as bb:
        with pytest.raises(Mute):
            async with bb.operation("election") as operation:
                raise Mute
        assert operation.phase is backbeat.Phase.FAILED


async def test_what_the_body_raised_is_not_lost_where_leaving_is_interrupted(
    autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def interrupted(self: ClaimEmitter) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ClaimEmitter, "drain", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        async with open_session():
            raise KeyError("from the body")
    assert isinstance(caught.value.__context__, KeyError)


# A transport of the user's own.


async def test_a_transport_that_was_given_is_closed(autojump_clock: Clock) -> None:
    left, disabled, failed, cancelled = (wrapped() for _ in range(4))
    async with open_session(transport=left, lock_timeout=0):
        assert not left.closed
    async with open_session(transport=disabled, enabled=False):
        assert not disabled.closed
    with pytest.raises(KeyError):
        async with open_session(transport=failed, lock_timeout=0):
            raise KeyError
    with trio.CancelScope() as scope:
        async with open_session(transport=cancelled, lock_timeout=0):
            scope.cancel()
    assert [t.closed for t in (left, disabled, failed, cancelled)] == [1, 1, 1, 1]


async def test_a_transport_that_never_closes_does_not_keep_the_session(
    autojump_clock: Clock,
) -> None:
    transport = wrapped()
    transport.aclose = trio.sleep_forever
    async with open_session(transport=transport, lock_timeout=0, grace_period=3.0):
        pass
    assert trio.current_time() == pytest.approx(3.0)


async def test_a_transport_that_does_not_start_is_an_error(autojump_clock: Clock) -> None:
    async def run(*, task_status: trio.TaskStatus[None]) -> None:
        await trio.sleep(1)

    with pytest.raises(RuntimeError, match=r"returned before it called `task_status\.started\(\)`"):
        async with open_session(transport=wrapped(run)):
            pytest.fail("not reached")  # pragma: no cover


async def test_a_transport_that_crashes_before_it_starts_is_its_own_error(
    autojump_clock: Clock,
) -> None:
    async def run(*, task_status: trio.TaskStatus[None]) -> None:
        await trio.sleep(1)
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError, match="a bug"):
        async with open_session(transport=wrapped(run)):
            pytest.fail("not reached")  # pragma: no cover


async def test_a_session_is_entered_only_once(autojump_clock: Clock) -> None:
    manager = backbeat.session(nats_url="memory://once", lock_timeout=0.0)
    async with manager:
        with pytest.raises(RuntimeError, match="only once"):
            await manager.__aenter__()
    with pytest.raises(RuntimeError, match="only once"):
        async with manager:
            pytest.fail("not reached")  # pragma: no cover


async def test_a_service_that_returns_ends_nothing(autojump_clock: Clock) -> None:
    async def once(*, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()

    async with trio.open_nursery() as nursery:
        services = ServiceGroup(nursery)
        await services.start(once)
        await services.release()
        assert not services.crashed


# Cancellation.


async def test_leaving_delivers_a_cancellation(autojump_clock: Clock) -> None:
    with trio.CancelScope() as scope:
        async with open_session():
            scope.cancel()
        pytest.fail("not reached")  # pragma: no cover
    assert scope.cancelled_caught


async def test_entering_delivers_a_cancellation(autojump_clock: Clock) -> None:
    for enabled in (True, False):
        with trio.CancelScope() as scope:
            scope.cancel()
            async with open_session(enabled=enabled):
                pytest.fail("not reached")  # pragma: no cover
        assert scope.cancelled_caught


async def test_changing_the_tempo_while_the_session_closes(autojump_clock: Clock) -> None:
    transport = backbeat.MemoryTransport(backbeat.MemoryBus())
    outcome: list[BaseException] = []

    async def change(bb: backbeat.Session) -> None:
        async with transport.open_subscription("backbeat.tempo.test-cluster"):
            try:
                await bb.set_tempo(60)
            except backbeat.BackbeatError as error:
                outcome.append(error)

    async with trio.open_nursery() as nursery:
        async with open_session(transport=transport, lock_timeout=0) as bb:
            nursery.start_soon(change, bb)
            await trio.testing.wait_all_tasks_blocked()
    assert [type(error) for error in outcome] == [backbeat.SessionClosed]


# What is left.


def test_health_is_told_after_the_run() -> None:
    async def main() -> backbeat.Session:
        async with open_session(tempo_bpm=60.0) as bb:
            await bb.sleep(2)
            assert bb.health().started
        return bb

    bb = trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    health = bb.health()
    assert (health.started, health.connected, health.current_beat) == (False, False, 2)
    assert bb.statistics().locks == 1


async def test_the_current_session_stays_in_its_run(autojump_clock: Clock) -> None:
    found: list[object] = []

    async def elsewhere() -> None:
        try:
            found.append(backbeat.current_session())
        except RuntimeError as error:
            found.append(str(error))

    async with open_session() as bb:
        # Both threads have this task's context, and only the second one a run of its own.
        await trio.to_thread.run_sync(lambda: found.append(backbeat.current_session()))
        await trio.to_thread.run_sync(trio.run, elsewhere)
    assert found[0] is bb
    assert "another run of Trio" in str(found[1])


# Several clusters, and the metronome.


async def test_two_clusters_on_one_bus_have_a_metronome_each(autojump_clock: Clock) -> None:
    url = "memory://shared"
    async with (
        open_session(nats_url=url, cluster_id="one", tempo_bpm=60.0) as one,
        open_session(nats_url=url, cluster_id="two", tempo_bpm=120.0) as two,
    ):
        assert (one.statistics().locks, two.statistics().locks) == (1, 1)
        await trio.sleep(4)
        assert (one.current_beat(), two.current_beat()) == (4, 8)
        assert await two.set_tempo(240) == 16
        assert one.tempo_bpm == 60.0


async def test_the_next_session_on_a_bus_goes_on_with_the_grid(autojump_clock: Clock) -> None:
    url = "memory://shared"
    async with open_session(nats_url=url, agent_id="second", tempo_bpm=30.0) as second:
        async with open_session(nats_url=url, cluster_id="one", tempo_bpm=60.0) as first:
            async with open_session(nats_url=url, cluster_id="one", agent_id="b") as other:
                await first.set_tempo(120)
                await first.sleep_until(10.5)
                assert other.current_beat() == 10
                late = other
                heard = [beat.index async for beat in _some(other, 2)]
        assert heard == [11, 12]
        assert not second.health().local_degradation
        assert late.health().current_beat == 12


async def _some(bb: backbeat.Session, count: int) -> Any:
    beats = bb.beats()
    for _ in range(count):
        yield await anext(beats)


async def test_the_metronome_of_a_session_logs_where_the_session_does(
    autojump_clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    logger = Lines()
    caplog.set_level(logging.DEBUG, "backbeat_trio")
    async with open_session(logger=logger):
        pass
    assert [line for line in logger.lines if line.startswith("metronome leads")]
    assert not caplog.records


# Ctrl-C.

INTERRUPTED = """
import collections, contextlib, os, signal, sys, trio, trio.testing
import backbeat_trio
from backbeat_trio import BackbeatConfig, session

FOLDER = os.path.dirname(backbeat_trio.__file__)
LAYERS = ("_transport", "_metronome", "_runtime", "_session")
FILES = {os.path.join(FOLDER, la, name) for la in LAYERS for name in os.listdir(f"{FOLDER}/{la}")}
FILES.add(contextlib.__file__)
enabled = sys.argv[1] == "enabled"

def interrupt_at(number):
    # Returns whether so many lines were run, counting each of them once.
    count, runs = 0, collections.Counter()

    def trace(frame, event, argument):
        nonlocal count
        if frame.f_code.co_filename not in FILES:
            return None if event == "call" else trace
        runs[frame.f_code, frame.f_lineno] += event == "line"
        if event == "line" and runs[frame.f_code, frame.f_lineno] == 1:
            count += 1
            if count == number:
                sys.settrace(None)
                signal.raise_signal(signal.SIGINT)
        return trace

    async def main():
        config = BackbeatConfig(nats_url="memory://ki", enabled=enabled, tempo_bpm=60.0)
        # A hang is waited for outside, as nothing in here could end it.
        sys.settrace(trace)
        try:
            async with session(config) as bb:
                bb.start_operation("election")
                await bb.sleep(0.5)
        finally:
            sys.settrace(None)
        await trio.sleep(1)

    try:
        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    except BaseException as error:
        while isinstance(error, BaseExceptionGroup):
            (error,) = error.exceptions
        assert isinstance(error, KeyboardInterrupt), error
    else:
        assert count < number, f"the interruption at line {number} was lost"
    return count >= number

number = 0
while True:
    number += 1
    print(number, flush=True)
    if not interrupt_at(number):
        break
"""


@pytest.mark.parametrize("kind", ["enabled", "disabled"])
def test_ctrl_c_on_any_line_ends_the_session(kind: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", INTERRUPTED, kind],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert not done.stderr, f"at line {done.stdout.split()[-1]}: {done.stderr}"
    assert done.returncode == 0
    assert int(done.stdout.split()[-1]) > 100
