"""Sessions on the in-process bus, in virtual time: everything that needs no server."""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import signal
import sys
import weakref
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from helpers import Lines

import backbeat_trio as backbeat
from backbeat_trio import Phase, Session
from backbeat_trio._runtime.runtime import Runtime
from backbeat_trio.testing import ClaimRecorder, ManualMetronome, open_recorder, open_session

Clock = trio.testing.MockClock


async def test_the_start_and_the_end_are_logged(
    autojump_clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with open_session(tempo_bpm=2.0, cluster_id="c", agent_id="a") as bb:
        assert bb.health().started
        await bb.sleep_until(8.5)
    assert not bb.health().started
    lines = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert ("INFO", "🎵 CHORUS BACKBEAT integration started - cluster=c agent=a") in lines
    assert lines[-1] == ("INFO", "🎵 CHORUS BACKBEAT integration stopped")
    beats = [line for level, line in lines if level == "DEBUG"]
    assert beats[0] == "🥁 BACKBEAT beat received - beat=1 phase=upbeat tempo=2 window=w-0"
    assert beats[-2:] == [
        "🥁 BACKBEAT beat received - beat=8 phase=downbeat tempo=2 window=w-1",
        "🎼 BACKBEAT downbeat - new bar started - beat=8 window=w-1",
    ]


async def test_health_of_a_locked_session(autojump_clock: Clock) -> None:
    async with open_session(tempo_bpm=120.0) as bb:
        bb.start_operation("election")
        await bb.sleep(10)
        health = bb.health()
        assert msgspec.to_builtins(health) == {
            "enabled": True,
            "started": True,
            "connected": True,
            "current_beat": 10,
            "current_tempo": 120.0,
            "measured_bpm": pytest.approx(120.0),
            "tempo_drift": "acceptable",
            "reconnect_count": 0,
            "active_operations": 1,
            "local_degradation": False,
            "errors": (),
            "node_id": "test-node",
            "paused": False,
            "uncertainty": pytest.approx(0.0, abs=1e-3),
            "epoch": 1,
            "leader_id": "test-agent",
            "standbys": 0,
            "pending": (),
            "grid": "locked",
            "last_frame_age": 0.5,
            "skew": 0.0,
        }
        assert (bb.current_position(), bb.current_beat(), bb.current_bar()) == (10.0, 10, 1)
        assert bb.tempo_bpm == 120.0
        assert bb.config.cluster_id == "test-cluster"


async def test_budgets(autojump_clock: Clock) -> None:
    async with open_session(tempo_bpm=2.0) as bb:
        with bb.move_on_after(2) as scope:
            assert bb.current_effective_deadline() == 2.0
            await trio.sleep_forever()
        assert scope.cancelled_caught
        with pytest.raises(backbeat.BeatBudgetExceeded), bb.fail_at(4):
            await trio.sleep_forever()
        with bb.move_on_at(5):
            await trio.sleep_forever()
        with pytest.raises(trio.TooSlowError), bb.fail_after(0.5):
            await trio.sleep_forever()
        assert bb.current_position() == 5.5

        async def double(number: int) -> int:
            await bb.sleep(1)
            return 2 * number

        assert await bb.execute_with_beat_budget(2, double, 21) == 42
        with pytest.raises(backbeat.BeatBudgetExceeded):
            await bb.execute_with_beat_budget(0.5, double, 21)


async def test_a_budget_for_a_coroutine_says_what_to_write(autojump_clock: Clock) -> None:
    async with open_session() as bb:
        work: Any = trio.sleep(1)
        with pytest.raises(TypeError, match=r"write `sleep` and the arguments, not `sleep\(...\)`"):
            await bb.execute_with_beat_budget(2, work)


@pytest.mark.parametrize("make", ["move_on_after", "fail_after"])
@pytest.mark.parametrize(
    ("beats", "error", "text"),
    [
        (-1, ValueError, "`beats` must be non-negative"),
        (math.nan, ValueError, "`beats` must not be NaN"),
        ("5", TypeError, "`beats` must be a number of beats, not '5'"),
        (None, TypeError, "`beats` must be a number of beats, not None"),
    ],
)
async def test_budgets_that_are_none(
    make: str, beats: Any, error: type[Exception], text: str, autojump_clock: Clock
) -> None:
    async with open_session() as bb:
        with pytest.raises(error, match=text):
            getattr(bb, make)(beats)
        with pytest.raises(error, match=text):
            await bb.sleep(beats)
        with pytest.raises(error, match=text):
            await bb.execute_with_beat_budget(beats, trio.sleep, 0)


@pytest.mark.parametrize("make", ["move_on_at", "fail_at"])
async def test_deadlines_that_are_none(make: str, autojump_clock: Clock) -> None:
    async with open_session() as bb:
        for beat, error in ((math.nan, ValueError), ("5", TypeError)):
            with pytest.raises(error, match="`beat` must"):
                getattr(bb, make)(beat)
            with pytest.raises(error, match="`beat` must"):
                await bb.sleep_until(beat)  # type: ignore[arg-type]


async def test_tempo_changes_for_everybody_on_one_beat(
    backbeat_session: backbeat.Session,
) -> None:
    bb = backbeat_session
    await bb.sleep(0.5)
    assert await bb.set_tempo(120) == 8
    assert await bb.set_tempo(30, at_beat=6) == 6
    with pytest.raises(backbeat.TempoRefused, match="beat 0 is past: the cluster is on beat 0"):
        await bb.set_tempo(30, at_beat=0)
    with pytest.raises(backbeat.TempoRefused, match="too soon: the earliest possible is 3"):
        await bb.set_tempo(30, at_beat=2)
    start = trio.current_time()
    with bb.move_on_after(9.5):
        await trio.sleep_forever()
    assert bb.current_position() == 10.0
    assert trio.current_time() - start == 5.5 + 4 * 2.0


async def test_health_tells_of_changes_to_come(backbeat_session: backbeat.Session) -> None:
    bb, change = backbeat_session, backbeat.PendingChange
    assert bb.health().pending == ()
    assert await bb.set_tempo(120, at_beat=4, over=3) == 4
    assert await bb.pause(at_beat=9) == 9
    # The next frame tells of them.
    await bb.sleep(1.5)
    *steps, last = bb.health().pending
    assert [step.beat for step in steps] == [4, 5, 6, 7]
    assert [step.tempo_bpm for step in steps] == sorted(step.tempo_bpm for step in steps)
    assert steps[-1].tempo_bpm == 120.0
    assert last == change(9, 0.0)
    await bb.sleep_until(7.5)
    assert bb.health().pending == (change(9, 0.0),)
    await trio.sleep(5)
    assert (bb.health().paused, bb.health().pending) == (True, ())
    await bb.resume()
    await trio.sleep(0.5)
    assert bb.health().pending == (change(9, 120.0),)
    await trio.sleep(5)
    assert bb.health().pending == ()


@pytest.mark.parametrize("bpm", [0, 6001, math.nan, -3])
async def test_a_tempo_that_is_none(bpm: float, backbeat_session: backbeat.Session) -> None:
    with pytest.raises(ValueError, match="`bpm` must be from 0.1 to 6000"):
        await backbeat_session.set_tempo(bpm)
    with pytest.raises(ValueError, match="`at_beat`"):
        await backbeat_session.set_tempo(60, at_beat=-1)
    assert backbeat_session.tempo_bpm == 60.0


async def test_an_operation_of_a_block(
    backbeat_session: backbeat.Session, backbeat_claims: ClaimRecorder
) -> None:
    bb, claims = backbeat_session, backbeat_claims
    async with bb.operation("election", id="well", beats=5) as operation:
        operation.advance(Phase.CONNECTING, peers=3)
        await bb.sleep(2.5)
        operation.advance(Phase.EXECUTING)
    with pytest.raises(KeyError):
        async with bb.operation("election", id="badly"):
            raise KeyError("gone")
    with pytest.raises(RuntimeError):
        async with bb.operation("election", id="silently"):
            raise RuntimeError
    with trio.move_on_after(1):
        async with bb.operation("election", id="cancelled"):
            await trio.sleep_forever()
    async with bb.operation("election", id="ended inside") as operation:
        operation.fail("no quorum")
    await bb.sleep(0.1)
    assert [(claim.state, claim.beats_left) for claim in claims.of("well")] == [
        ("executing", 5),
        ("executing", 5),
        ("executing", 4),
        ("executing", 3),
        ("executing", 3),
        ("done", 0),
    ]
    reasons = {
        "badly": "KeyError: 'gone'",
        "silently": "RuntimeError",
        "cancelled": "cancelled",
        "ended inside": "no quorum",
    }
    for id, reason in reasons.items():
        last = claims.of(id)[-1]
        assert last.state == "failed"
        assert last.notes == f"P2P operation failed: {reason} (type: election)"


async def test_an_operation_that_is_cut_at_its_budget(
    backbeat_session: backbeat.Session, backbeat_claims: ClaimRecorder
) -> None:
    with pytest.raises(backbeat.BeatBudgetExceeded):
        async with backbeat_session.operation("dht_store", id="slow", beats=2, enforce=True):
            await trio.sleep_forever()
    assert backbeat_session.current_position() == 2.0
    claim = await backbeat_claims.wait_for("slow", "failed")
    assert "BeatBudgetExceeded" in claim.notes


async def test_operations_by_id(
    backbeat_session: backbeat.Session, backbeat_claims: ClaimRecorder
) -> None:
    bb = backbeat_session
    operation = bb.start_operation("pubsub_sync", id="x", beats=3, data={"topic": "t"})
    assert operation.data == {"topic": "t"}
    assert bb.start_operation("pubsub_sync").id.startswith("pubsub_sync-")
    bb.advance_operation("x", Phase.EXECUTING, peers=2)
    bb.complete_operation("x", peers=4)
    done = await backbeat_claims.wait_for("x", "done")
    assert "(peers: 4," in done.notes
    with pytest.raises(backbeat.OperationNotFound):
        bb.fail_operation("x", "late")
    assert bb.health().active_operations == 1


async def test_health_in_other_threads() -> None:
    async with open_session(tempo_bpm=600.0) as bb:
        health = await trio.to_thread.run_sync(trio.from_thread.run_sync, bb.health)
        assert health.started
        with pytest.raises(RuntimeError, match="async context"):
            await trio.to_thread.run_sync(bb.health)
    left = bb.health()
    assert await trio.to_thread.run_sync(bb.health) == left
    await trio.to_thread.run_sync(bb.statistics)


async def test_every_beat_has_one_array_of_claims(autojump_clock: Clock) -> None:
    async with open_session(tempo_bpm=60.0) as bb:
        transport = bb._runtime.transport
        assert transport is not None
        async with transport.open_subscription("backbeat.status.*") as messages:
            for number in range(2000):
                bb.start_operation("dht_store", id=f"op-{number}", beats=4)
            for number in range(2000):
                message = await anext(messages)
                assert b'"op-%d"' % number in message.data
                assert message.data.startswith(b"{")
            for beat in (1, 2):
                message = await anext(messages)
                claims = msgspec.json.decode(message.data)
                assert len(claims) == 2000
                assert {claim["beat_index"] for claim in claims} == {beat}
                assert trio.current_time() == bb._clock.deadline_of(beat)


async def test_health_claims(
    backbeat_session: backbeat.Session, backbeat_claims: ClaimRecorder
) -> None:
    bb = backbeat_session
    await bb.sleep(9)
    bb.start_operation("election")
    await bb.sleep(8)
    waiting, executing = backbeat_claims.of("chorus-p2p-health")
    assert (waiting.beat_index, executing.beat_index) == (8, 16)
    assert (waiting.state, waiting.beats_left, waiting.progress) == ("waiting", 0, 1.0)
    assert waiting.notes == (
        "CHORUS P2P healthy: connected=true, operations=0, tempo=60 BPM, node=test-node"
    )
    assert executing.state == "executing"
    assert "operations=1" in executing.notes
    assert waiting.cluster_id == executing.cluster_id == "test-cluster"
    assert not waiting.operation_type


async def test_health_claims_can_be_left_out(
    backbeat_metronome: ManualMetronome,
) -> None:
    bus = backbeat_metronome.bus
    async with (
        open_session(bus, agent_id="watcher") as watcher,
        open_session(bus, health_beats=0) as bb,
        open_recorder(watcher) as claims,
    ):
        await backbeat_metronome.tick(16)
        assert bb.health().errors == ()
        assert {claim.agent_id for claim in claims.claims} == {"watcher"}


async def test_errors_make_health_claims_fail(backbeat_metronome: ManualMetronome) -> None:
    bus = backbeat_metronome.bus
    transport = backbeat.MemoryTransport(bus)
    async with (
        open_session(bus, agent_id="watcher") as watcher,
        open_session(transport=transport) as bb,
        open_recorder(watcher, "test-agent") as claims,
    ):
        transport.sever()
        await backbeat_metronome.tick(2)
        assert bb.health().errors == ("the connection was severed",)
        assert bb.health().local_degradation
        transport.restore()
        await backbeat_metronome.tick(6)
        (claim,) = claims.of("chorus-p2p-health")
        assert claim.state == "failed"
        assert claim.notes.startswith("CHORUS P2P unhealthy: connected=true")
        await backbeat_metronome.tick(16)
        assert claims.of("chorus-p2p-health")[-1].state == "waiting"
        assert bb.health().reconnect_count == 1


async def test_what_ends_in_an_outage_is_told_afterwards(
    backbeat_metronome: ManualMetronome,
) -> None:
    bus = backbeat_metronome.bus
    transport = backbeat.MemoryTransport(bus)
    async with (
        open_session(bus, agent_id="watcher") as watcher,
        open_session(transport=transport) as bb,
        open_recorder(watcher, "test-agent") as claims,
    ):
        live = bb.start_operation("election", id="live")
        await backbeat_metronome.tick()
        transport.sever()
        heard = len(claims.claims)
        for number in range(100):
            bb.start_operation("dht_store", id=f"op-{number}").complete()
        live.advance(Phase.CONNECTING)
        live.advance(Phase.EXECUTING, peers=2)
        await backbeat_metronome.tick(3)
        assert bb.current_beat() == 4
        assert bb.statistics().claims_pending == 100
        assert len(claims.claims) == heard
        transport.restore()
        await trio.testing.wait_all_tasks_blocked()
        later = claims.claims[heard:]
        assert [claim.task_id for claim in later[:-1]] == [f"op-{n}" for n in range(100)]
        assert {claim.state for claim in later[:-1]} == {"done"}
        # Of the live one only the newest is told.
        assert later[-1].task_id == "live"
        assert (later[-1].beat_index, "executing (peers: 2" in later[-1].notes) == (4, True)
        assert bb.statistics().claims_pending == 0
        assert bb.statistics().claims_coalesced == 102


async def test_leaving_tells_of_what_was_still_live(backbeat_metronome: ManualMetronome) -> None:
    async with open_session(backbeat_metronome.bus, agent_id="watcher") as watcher:
        async with open_recorder(watcher, "test-agent") as claims:
            async with open_session(backbeat_metronome.bus) as bb:
                bb.start_operation("election", id="left")
                bb.start_operation("election", id="done").complete()
            await claims.wait_for("done", "done")
            claim = await claims.wait_for("left", "failed")
    assert claim.notes == "P2P operation failed: the session was closed (type: election)"


async def test_the_grace_period_bounds_the_leaving(
    autojump_clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    transport = backbeat.MemoryTransport(backbeat.MemoryBus())
    async with open_session(transport=transport, grace_period=3.0, lock_timeout=0.0) as bb:
        transport.sever()
        bb.start_operation("election")
        left = trio.current_time()
    assert trio.current_time() - left == 3.0
    assert "1 terminal claims were not delivered within 3 s" in caplog.text


async def test_a_session_without_a_metronome_goes_on_without(autojump_clock: Clock) -> None:
    start = trio.current_time()
    async with open_session(backbeat.MemoryBus(), tempo_bpm=60.0, lock_timeout=2.5) as bb:
        assert trio.current_time() - start == 2.5
        health = bb.health()
        assert health.connected
        assert health.local_degradation
        with pytest.raises(backbeat.MetronomeUnavailable, match="no process is subscribed"):
            await bb.set_tempo(60)
        with bb.move_on_after(3):
            await trio.sleep_forever()
        assert bb.current_position() == 5.5


async def test_the_grid_goes_on_while_a_session_of_it_lives(autojump_clock: Clock) -> None:
    url = "memory://shared"
    leave = trio.Event()

    async def lead(task_status: trio.TaskStatus[backbeat.Session]) -> None:
        async with open_session(nats_url=url, agent_id="one", tempo_bpm=60) as one:
            task_status.started(one)
            await leave.wait()

    async with trio.open_nursery() as nursery:
        one = await nursery.start(lead)
        await one.sleep(3.25)
        async with open_session(
            nats_url=url, agent_id="two", tempo_bpm=999, beats_per_bar=3
        ) as two:
            assert two.tempo_bpm == one.tempo_bpm == 60.0
            # Each would go on with the grid.
            assert two.health().standbys == 1
            assert two.current_position() == one.current_position() == 3.25
            with two.move_on_after(4) as scope:
                await one.set_tempo(120, at_beat=6)
                leave.set()
                await two.sleep(1)
                assert not one.health().started
                assert not two.health().local_degradation
                await trio.sleep_forever()
            assert scope.cancelled_caught
            assert two.current_position() == 7.25
            assert two.tempo_bpm == 120.0
            assert two.statistics().frames_repeated == 0
            assert (await anext(two.downbeats())).index == 8
    async with open_session(nats_url=url, agent_id="three", tempo_bpm=60) as three:
        assert three.current_position() == 0.0


async def test_a_joiner_does_not_change_the_tempo(autojump_clock: Clock) -> None:
    async with contextlib.AsyncExitStack() as stack:
        sessions = [
            await stack.enter_async_context(
                open_session(nats_url="memory://many", agent_id=f"agent-{n}", tempo_bpm=60 + n)
            )
            for n in range(10)
        ]
        await trio.sleep(12.5)
        assert {bb.tempo_bpm for bb in sessions} == {60.0}
        assert {bb.current_position() for bb in sessions} == {12.5}


async def test_disabled_means_inert(autojump_clock: Clock) -> None:
    async with open_session(enabled=False, tempo_bpm=60.0) as bb:
        with bb.fail_after(1):
            await bb.sleep(3)
        assert bb.current_position() == 3.0
        async with bb.operation("election", beats=1, enforce=True) as operation:
            operation.advance(Phase.EXECUTING)
            await bb.sleep(2)
        health = bb.health()
        assert (health.enabled, health.connected, health.local_degradation) == (False, False, False)
        assert bb.statistics().transport is None
        with pytest.raises(backbeat.MetronomeUnavailable):
            await bb.set_tempo(60)
        with pytest.raises(backbeat.BackbeatError, match="disabled"):
            async with bb.open_claims():
                pytest.fail("not reached")  # pragma: no cover
        assert (await anext(bb.beats())).index == 6


async def test_use_after_the_end(autojump_clock: Clock) -> None:
    async with open_session() as bb:
        operation = bb.start_operation("election", id="x")
        old_scope = bb.move_on_after(1)
    uses: list[Any] = [
        lambda: bb.start_operation("election"),
        lambda: bb.advance_operation("x", Phase.EXECUTING),
        lambda: bb.complete_operation("x"),
        lambda: bb.fail_operation("x", "y"),
        bb.beats,
        bb.downbeats,
        lambda: bb.move_on_after(1).__enter__(),
        lambda: bb.fail_at(1).__enter__(),
        old_scope.__enter__,
    ]
    for use in uses:
        with pytest.raises(backbeat.SessionClosed):
            use()
    for wait in (
        lambda: bb.sleep(1),
        lambda: bb.sleep_until(10**6),
        lambda: bb.set_tempo(60),
        lambda: bb.execute_with_beat_budget(1, trio.sleep, 0),
        lambda: bb.open_claims().__aenter__(),
        lambda: bb.operation("election").__aenter__(),
    ):
        with pytest.raises(backbeat.SessionClosed):
            await wait()
    with pytest.raises(backbeat.InvalidTransition):
        operation.complete()
    assert not bb.health().connected
    bb.statistics()


async def test_operations_are_refused_while_leaving(autojump_clock: Clock) -> None:
    refused = []

    async def straggle(bb: backbeat.Session) -> None:
        with pytest.raises(backbeat.SessionClosed):
            await bb.sleep(1000)
        with pytest.raises(backbeat.SessionClosed):
            bb.start_operation("election")
        refused.append(True)

    async with trio.open_nursery() as nursery, open_session() as bb:
        nursery.start_soon(straggle, bb)
        await trio.testing.wait_all_tasks_blocked()
    assert refused


async def test_current_session(autojump_clock: Clock) -> None:
    with pytest.raises(RuntimeError, match="no backbeat session"):
        backbeat.current_session()
    async with open_session() as bb:
        assert backbeat.current_session() is bb
        heard = []

        async def child() -> None:
            heard.append(backbeat.current_session())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(child)
        assert heard == [bb]
    with pytest.raises(RuntimeError, match="no backbeat session"):
        backbeat.current_session()
    with pytest.raises(TypeError, match="made by"):
        backbeat.Session()


# Exceptions come out as they went in.


@pytest.mark.parametrize(
    "raised",
    [
        KeyError("x"),
        ExceptionGroup("theirs", [ValueError(), KeyError()]),
        ExceptionGroup("theirs", [ValueError()]),
        SystemExit(3),
        KeyboardInterrupt(),
        StopAsyncIteration(),
        GeneratorExit(),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_what_the_body_raises_leaves_as_itself(
    raised: BaseException, autojump_clock: Clock
) -> None:
    try:
        async with open_session():
            raise raised
    except BaseException as error:
        assert error is raised
        assert error.__context__ is None
        assert error.__cause__ is None
    else:  # pragma: no cover
        pytest.fail("it was swallowed")


async def test_what_the_body_chained_stays_chained(autojump_clock: Clock) -> None:
    with pytest.raises(ValueError, match="second") as caught:
        async with open_session():
            try:
                raise KeyError("first")
            except KeyError as error:
                raise ValueError("second") from error
    assert isinstance(caught.value.__cause__, KeyError)


async def test_a_cancellation_from_outside_leaves_as_one(
    backbeat_metronome: ManualMetronome,
) -> None:
    async with open_session(backbeat_metronome.bus, agent_id="watcher") as watcher:
        async with open_recorder(watcher, "test-agent") as claims:
            with trio.CancelScope() as scope:
                async with open_session(backbeat_metronome.bus) as bb:
                    async with bb.operation("election", id="cut"):
                        scope.cancel()
                        await trio.sleep_forever()
            assert scope.cancelled_caught
            # Flushed although the cancellation was pending all the while.
            claim = await claims.wait_for("cut", "failed")
    assert "cancelled" in claim.notes


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (None, "cancelled"),
        ("the user left", "cancelled: the user left"),
        ("lone \ud800", "cancelled: lone ?"),
    ],
)
async def test_a_claim_of_a_cancelled_operation_has_the_reason(
    backbeat_session: backbeat.Session,
    backbeat_claims: ClaimRecorder,
    given: str | None,
    reason: str,
) -> None:
    with trio.CancelScope() as scope:
        async with backbeat_session.operation("election", id="cut"):
            scope.cancel(given)
            await trio.sleep_forever()
    claim = await backbeat_claims.wait_for("cut", "failed")
    assert claim.notes == f"P2P operation failed: {reason} (type: election)"


async def test_a_claim_says_that_a_budget_around_the_operation_ran_out(
    backbeat_session: backbeat.Session, backbeat_claims: ClaimRecorder
) -> None:
    with backbeat_session.move_on_after(2):
        async with backbeat_session.operation("election", id="cut"):
            await trio.sleep_forever()
    claim = await backbeat_claims.wait_for("cut", "failed")
    assert "failed: cancelled: the beat budget ran out (type" in claim.notes


async def test_a_cancellation_by_another_tasks_error_does_not_tell_the_error(
    backbeat_session: backbeat.Session, backbeat_claims: ClaimRecorder
) -> None:
    async def crash() -> None:
        raise KeyError("secret")

    with pytest.raises(ExceptionGroup):
        async with trio.open_nursery() as nursery:
            async with backbeat_session.operation("election", id="cut"):
                nursery.start_soon(crash)
                await trio.sleep_forever()
    claim = await backbeat_claims.wait_for("cut", "failed")
    assert claim.notes == "P2P operation failed: cancelled (type: election)"


async def test_a_cancellation_before_the_lock_leaves_nothing_behind(
    autojump_clock: Clock,
) -> None:
    bus = backbeat.MemoryBus()
    for moment in (0.0, 0.5):
        with trio.move_on_after(moment) as scope:
            async with open_session(bus):
                pytest.fail("not reached")  # pragma: no cover
        assert scope.cancelled_caught
    assert not bus._mailboxes


async def crash(*_: object, task_status: trio.TaskStatus[None]) -> None:
    task_status.started()
    await trio.sleep(5)
    raise ZeroDivisionError("a bug")


async def test_a_service_that_crashes_cancels_the_body_and_surfaces(
    autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Runtime, "_tick", crash)
    unwound = []
    with pytest.raises(ZeroDivisionError, match="a bug"):
        async with open_session() as bb:
            bb.start_operation("election")
            try:
                await trio.sleep_forever()
            finally:
                unwound.append(True)
    assert unwound


async def test_a_crash_and_an_error_of_the_body_leave_together(
    autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Runtime, "_tick", crash)
    with pytest.raises(ExceptionGroup) as caught:
        async with open_session():
            try:
                await trio.sleep_forever()
            finally:
                raise KeyError("from the body")
    assert {type(error) for error in caught.value.exceptions} == {ZeroDivisionError, KeyError}


def test_ctrl_c_flushes_the_terminal_claims() -> None:
    heard: list[str] = []

    async def main() -> None:
        bus = backbeat.MemoryBus()
        async with open_session(bus, agent_id="watcher", lock_timeout=0) as watcher:
            async with open_recorder(watcher, "test-agent") as claims:
                try:
                    async with open_session(bus, lock_timeout=0) as bb:
                        async with bb.operation("election", id="cut"):
                            signal.raise_signal(signal.SIGINT)
                            await trio.sleep_forever()
                finally:
                    with trio.CancelScope(shield=True):
                        heard.append((await claims.wait_for("cut", "failed")).notes)

    with pytest.raises((KeyboardInterrupt, BaseExceptionGroup)):
        trio.run(main)
    assert "KeyboardInterrupt" in heard[0]


async def test_a_left_session_is_released(autojump_clock: Clock) -> None:
    async with open_session() as bb:
        await bb.sleep(1)
    gone = weakref.ref(bb._clock)
    del bb
    gc.collect()
    assert gone() is None


async def test_claims_of_others_are_heard_and_forgeries_are_not(
    backbeat_metronome: ManualMetronome,
) -> None:
    bus = backbeat_metronome.bus
    forger = backbeat.MemoryTransport(bus)
    async with trio.open_nursery() as nursery:
        await nursery.start(forger.run)
        async with (
            open_session(bus, agent_id="one") as one,
            open_session(bus, agent_id="two") as two,
        ):
            async with open_recorder(two) as claims:
                operation = one.start_operation("election", id="x")
                forged = backbeat.StatusClaim("one", "x", 0, "done", 0, 1.0, "forged")
                forger.publish_nowait("backbeat.status.mallory", msgspec.json.encode(forged))
                forger.publish_nowait("backbeat.status.one", b"{")
                forger.publish_nowait("backbeat.status.one", b"x" * 1_000_000)
                operation.complete()
                await claims.wait_for("x", "done")
                assert [claim.notes[:12] for claim in claims.of("x")] == ["P2P election"] * 2
                assert two.statistics().claims_undecodable == 3
            with pytest.raises(ValueError, match="`agent_id`"):
                async with two.open_claims("a.b"):
                    pytest.fail("not reached")  # pragma: no cover
        nursery.cancel_scope.cancel()


async def test_the_iterator_of_claims_survives_a_cancellation(autojump_clock: Clock) -> None:
    async with open_session(tempo_bpm=60.0) as bb, bb.open_claims() as claims:
        with trio.move_on_after(0.5) as scope:
            await anext(claims)
        assert scope.cancelled_caught
        bb.start_operation("election", id="x")
        bb.start_operation("election", id="y")
        assert [(await anext(claims)).task_id, (await anext(claims)).task_id] == ["x", "y"]
        heard = [(await anext(claims)).task_id for _ in range(2)]
        assert sorted(heard) == ["x", "y"]


async def test_the_iterator_of_claims_ends_with_the_session(autojump_clock: Clock) -> None:
    async with trio.open_nursery() as nursery, open_session() as bb:

        async def listen() -> None:
            with pytest.raises(backbeat.TransportClosed):
                async with bb.open_claims() as claims:
                    async for _ in claims:
                        pass

        nursery.start_soon(listen)
        await bb.sleep(3)


async def test_config_is_taken_from_the_environment(
    autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHORUS_BACKBEAT_NATS_URL", "memory://env")
    monkeypatch.setenv("CHORUS_BACKBEAT_CLUSTER_ID", "from-env")
    monkeypatch.setenv("CHORUS_BACKBEAT_AGENT_ID", "agent-env")
    async with backbeat.session(agent_id="agent-override") as bb:
        assert bb.config.cluster_id == "from-env"
        assert bb.config.agent_id == "agent-override"
    config = backbeat.BackbeatConfig(nats_url="memory://given", cluster_id="given")
    async with backbeat.session(config, cluster_id="changed") as bb:
        assert bb.config.cluster_id == "changed"
    monkeypatch.setenv("CHORUS_BACKBEAT_ENABLED", "perhaps")
    with pytest.raises(backbeat.ConfigError, match="CHORUS_BACKBEAT_ENABLED='perhaps'"):
        async with backbeat.session():
            pytest.fail("not reached")  # pragma: no cover


async def test_another_logger(autojump_clock: Clock) -> None:
    logger = Lines()
    async with open_session(logger=logger, cluster_id="c", agent_id="a"):
        pass
    assert "🎵 CHORUS BACKBEAT integration started - cluster=c agent=a" in logger.lines


async def test_an_operation_that_another_thread_fails_to_end_is_still_live(
    autojump_clock: Clock,
) -> None:
    async with open_session() as bb, open_recorder(bb) as claims:
        operation = bb.start_operation("election", id="here")
        operation.advance(Phase.CONNECTING, peers=2)
        for end in (
            lambda: operation.advance(Phase.EXECUTING, peers=9),
            lambda: operation.complete(peers=9),
            lambda: operation.fail("in a thread"),
        ):
            with pytest.raises(RuntimeError):
                await trio.to_thread.run_sync(end)
        assert (operation.phase, operation.peers) == (Phase.CONNECTING, 2)
        await trio.to_thread.run_sync(lambda: trio.from_thread.run_sync(operation.complete))
        assert (await claims.wait_for("here", "done")).peers == 2


def test_ctrl_c_between_any_two_lines_leaves_no_operation_half_made() -> None:
    lines, interrupt_at = 0, 1

    def tracer(frame: FrameType, event: str, _: object) -> Any:
        nonlocal lines
        if Path(frame.f_code.co_filename).name not in ("operations.py", "session.py"):
            return None
        if event == "line":
            lines += 1
            if lines == interrupt_at:
                signal.raise_signal(signal.SIGINT)
        return tracer

    async def use(bb: Session) -> None:
        sys.settrace(tracer)
        try:
            async with bb.operation("election", id=f"{interrupt_at}") as operation:
                operation.advance(Phase.EXECUTING, peers=1)
        finally:
            sys.settrace(None)
        await trio.lowlevel.checkpoint()

    async def main() -> None:
        nonlocal lines, interrupt_at
        async with open_session(tempo_bpm=60.0) as bb:
            while lines >= interrupt_at - 1:
                lines = 0
                with contextlib.suppress(KeyboardInterrupt):
                    await use(bb)
                assert bb.health().active_operations == 0
                interrupt_at += 1
            await bb.sleep(1)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert interrupt_at > 50


async def test_arguments_of_a_wrong_type_are_named(autojump_clock: Clock) -> None:
    wrong: Any
    for wrong in ("nats://u:s3cr3t@h", {"cluster_id": "c"}):
        with pytest.raises(TypeError, match=f"`config` .* not of type {type(wrong).__name__}$"):
            backbeat.session(wrong)
    async with open_session() as bb:
        for wrong in (5, None, b"a"):
            with pytest.raises(ValueError, match="`agent_id` must be"):
                async with bb.open_claims(wrong):
                    pass
