"""The feed: claims and the grid of a session reach a model, also after an outage."""

from __future__ import annotations

import pytest
import trio
from helpers import backbeat, guarded, leading_at, until

from backbeat_trio import BackbeatError, Phase
from backbeat_trio._views.feed import follow, grid_view
from backbeat_trio._views.model import ClusterModel, PhaseChange
from backbeat_trio.testing import ManualMetronome, NatsServer, open_session


async def test_claims_and_the_grid_reach_the_model(backbeat_metronome: ManualMetronome) -> None:
    model = ClusterModel()
    bus, tick = backbeat_metronome.bus, backbeat_metronome.tick
    async with (
        open_session(bus, agent_id="watcher", health_beats=0) as bb,
        open_session(bus, agent_id="worker") as worker,
        trio.open_nursery() as nursery,
    ):
        await nursery.start(follow, bb, model)
        assert model.grid is not None
        version = model.version
        await tick()
        begun = backbeat_metronome.beat
        operation = worker.start_operation("search", id="s", beats=3)
        await tick()
        operation.advance(Phase.EXECUTING, peers=2)
        for timing, passed in (("on_time", 1), ("on_time", 2), ("on_time", 3), ("late", 4)):
            await backbeat_metronome.pass_time(0.3)
            seen = model.operation("worker", "s")
            assert seen is not None
            assert (seen.timing, seen.passed, seen.start_beat) == (timing, passed, begun)
            changes = (PhaseChange("started", begun), PhaseChange("executing", begun + 1))
            assert (seen.peers, seen.history) == (2, changes)
            await tick()
        grid = model.grid
        assert (grid.grid, grid.cluster_id) == ("locked", bb.config.cluster_id)
        assert (grid.beat, grid.bar) == (backbeat_metronome.beat, bb.current_bar())
        assert grid.leader_id == bb.health().leader_id is not None
        assert grid.lateness is not None
        operation.complete()
        await tick()
        totals = model.totals()
        assert (totals.live, totals.done, totals.agents_silent) == (0, 1, 0)
        (agent,) = model.agents().items
        assert (agent.agent_id, agent.silent, agent.live) == ("worker", False, 0)
        assert model.version > version
        nursery.cancel_scope.cancel()


async def test_an_agent_that_is_gone_becomes_silent(backbeat_metronome: ManualMetronome) -> None:
    model = ClusterModel()
    bus, tick = backbeat_metronome.bus, backbeat_metronome.tick
    async with (
        open_session(bus, agent_id="watcher", health_beats=0) as bb,
        open_session(bus, agent_id="worker", health_beats=0) as worker,
        trio.open_nursery() as nursery,
    ):
        await nursery.start(follow, bb, model)
        worker.start_operation("search", id="s", beats=50)
        await tick(2)
        assert model.totals().on_time == 1
        assert worker._runtime.emitter is not None
        # It lives, and publishes no more.
        worker._runtime.emitter.beat = lambda: None  # type: ignore[method-assign]
        await tick(5)
        assert (model.totals().silent, model.totals().agents_silent) == (1, 1)
        nursery.cancel_scope.cancel()


async def test_a_disabled_session_has_no_claims(autojump_clock: trio.testing.MockClock) -> None:
    async with open_session(enabled=False) as bb:
        assert grid_view(bb).grid == "local"
        with pytest.raises(BackbeatError):
            await follow(bb, ClusterModel())


@guarded(120)
async def test_refused_claims_are_told_from_an_empty_cluster() -> None:
    config = """
    authorization { users: [
      { user: u, password: p, permissions: { subscribe: { deny: "backbeat.status.>" } } }
    ] }"""
    model = ClusterModel()
    async with NatsServer(config=config) as server:
        url = server.url.replace("//", "//u:p@")
        async with open_session(nats_url=url) as bb, trio.open_nursery() as nursery:
            await nursery.start(follow, bb, model)
            await until(lambda: model.grid is not None and model.grid.claims_refused)
            nursery.cancel_scope.cancel()
        done = await backbeat("watch", "-s", url, "--wait", "0")
        assert done.returncode == 1
        assert "permissions keep all claims from this user" in done.stdout.decode()


@guarded(120)
async def test_the_feed_goes_on_after_an_outage_of_the_server() -> None:
    model = ClusterModel()

    def timing() -> str | None:
        seen = model.operation("worker", "s")
        return None if seen is None else seen.timing

    async with NatsServer() as server, leading_at(server.url, tempo_bpm=300.0):
        async with (
            open_session(nats_url=server.url, agent_id="watcher") as bb,
            open_session(nats_url=server.url, agent_id="worker") as worker,
            trio.open_nursery() as nursery,
        ):
            await nursery.start(follow, bb, model)
            worker.start_operation("search", id="s", beats=100_000)
            await until(lambda: timing() == "on_time")
            server.kill()
            await until(lambda: model.grid is not None and not model.grid.connected)
            lost = model.totals().claims
            # Nobody is heard, and nothing is known of the operation.
            position = bb.current_position()
            await until(lambda: bb.current_position() > position + 10)
            assert timing() == "on_time"
            await server.start()
            await until(lambda: model.grid is not None and model.grid.grid == "locked")
            await until(lambda: model.totals().claims > lost + 5)
            await until(lambda: timing() == "on_time")
            worker.complete_operation("s")
            await until(lambda: model.totals().done == 1)
            nursery.cancel_scope.cancel()
