"""The testing kit, as its users use it."""

from __future__ import annotations

import os

import pytest
import trio
import trio.testing

import backbeat_trio as backbeat
from backbeat_trio.testing import (
    ClaimRecorder,
    ManualMetronome,
    NatsServer,
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


async def test_what_the_body_of_a_server_raises_leaves_as_itself() -> None:
    error = AssertionError("no")
    server = NatsServer()
    with pytest.raises(AssertionError) as caught:
        async with server:
            raise error
    assert caught.value is error
    with pytest.raises(ProcessLookupError):
        os.kill(server.pid, 0)


async def test_a_server_does_not_start_in_virtual_time(
    autojump_clock: trio.testing.MockClock,
) -> None:
    with pytest.raises(RuntimeError, match="virtual time"):
        async with NatsServer():
            pass


async def test_a_server_that_runs_is_not_started_again(nats_server: NatsServer) -> None:
    pid = nats_server.pid
    with pytest.raises(RuntimeError, match="runs already"):
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
