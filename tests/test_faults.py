"""Faults that the grid survives, with real servers and real processes.

By default each fault is tried a few times; ``--faults`` tries them as often as it takes to find
what is rare, and does what takes long. At its end what was measured is printed beside the targets,
and written as JSON; ``--figures`` says where, and has it done in any run.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import shutil
import signal
import statistics
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest
import report as figures
import trio
import trio.abc
from helpers import clustered, connected, free_ports, guarded, linked, pulsing, until
from nats.aio.client import Client

import backbeat_trio as backbeat
from backbeat_trio import BackbeatConfig, Metronome, Session, StatusClaim
from backbeat_trio._time.local import local_ns
from backbeat_trio._transport.jetstream import KeyValueStore
from backbeat_trio._transport.nats import NatsTransport
from backbeat_trio._transport.store import Store
from backbeat_trio._wire import BeatFrame, bucket_of, decode_frame, decode_record
from backbeat_trio.testing import CLUSTER_ID, NatsServer, open_recorder, open_session

# So many times where the faults are tried as often as they should be, and once otherwise.
again = pytest.mark.again

BUCKET: Final = bucket_of(CLUSTER_ID)
JETSTREAM: Final = ("-js",)


@pytest.fixture
def thorough(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--faults"))


# Figures, and what they should be.


# What is missed of these fails the test that has found it out.
PROMISES: Final = {
    "lost_120": figures.Target(
        "kill -9 of the leader, 120 BPM: beats lost or repeated", "≤", 0, ""
    ),
    "lost_300": figures.Target(
        "kill -9 of the leader, 300 BPM: beats lost or repeated", "≤", 0, ""
    ),
    "alone_120": figures.Target(
        "a single metronome killed and restarted, 120 BPM: beats lost, repeated or moved",
        "≤",
        0,
        "",
    ),
    "alone_300": figures.Target(
        "a single metronome killed and restarted, 300 BPM: beats lost, repeated or moved",
        "≤",
        0,
        "",
    ),
    "cluster_lost": figures.Target(
        "kill -9 of JetStream's leader, then of another server: beats lost or repeated", "≤", 0, ""
    ),
    "differing": figures.Target("beats that two of eight agents had in two tempos", "≤", 0, ""),
    "race": figures.Target("rounds of twenty candidates with exactly one winner", "≥", 100, "%"),
    "restart_lost": figures.Target("server restarted: beats lost or repeated", "≤", 0, ""),
    "restart_claims": figures.Target(
        "server restarted: terminal claims lost, or stored twice", "≤", 0, ""
    ),
}
# What is missed of these is shown, and fails nothing: how long something takes on a machine that
# others use, too, says as much of them as of what is tried here.
TIMES: Final = {
    "late_120": figures.Target(
        "kill -9 of the leader, 120 BPM: first frame late by, p99", "≤", 20, "ms"
    ),
    "late_300": figures.Target(
        "kill -9 of the leader, 300 BPM: first frame late by, p99", "≤", 20, "ms"
    ),
    "half_open": figures.Target("half-open server: on the healthy one after", "≤", 2, "s"),
    "restart_locked": figures.Target("server restarted: all agents re-locked after", "≤", 0.5, "s"),
}
TARGETS: Final = PROMISES | TIMES


class Figures:
    """What was measured in a run; shown as it ends."""

    def __init__(self, config: pytest.Config) -> None:
        thorough, path = config.getoption("--faults"), config.getoption("--figures")
        self._thorough = bool(thorough)
        self._path = path or (figures.RESULTS / "faults.json" if thorough else None)
        self._figures: list[Any] = []
        self._rounds: dict[str, list[float]] = {}

    def keep(self, name: str, measured: float, note: str, values: list[float]) -> None:
        self._figures.append(figures.Figure(name, measured, note))
        if values:
            self._rounds[name] = values

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._path is None or not self._figures:
            return
        path = Path(self._path)
        console = figures.make_console()
        with console.capture() as capture:
            console.print(figures.make_table(self._figures, TARGETS))
        terminalreporter.section("figures beside their targets")
        terminalreporter.write(capture.get())
        results = {
            "machine": figures.machine(),
            "quick": not self._thorough,
            "figures": figures.results_of(self._figures, TARGETS),
            "rounds": self._rounds,
        }
        figures.write_json(path, results)
        terminalreporter.write_line(f"written to {path}")


@pytest.fixture(scope="session")
def run_figures(request: pytest.FixtureRequest) -> Figures:
    found = Figures(request.config)
    request.config.pluginmanager.register(found)
    return found


Report = Callable[..., None]


@pytest.fixture
def report(run_figures: Figures) -> Report:
    """Give a function that keeps a figure, and fails where that breaks a promise.

    It takes the name of the target, the figure or the values that it is made of with the share of
    them that should keep it, and a note.
    """

    def keep(
        name: str,
        measured: float = 0.0,
        note: str = "",
        *,
        values: list[float] | None = None,
        share: float = 1.0,
    ) -> None:
        if values:
            measured = figures.percentile(values, share)
            note = f"n {len(values)}, p50 {statistics.median(values):.3f}, max {max(values):.3f}"
        run_figures.keep(name, measured, note, values or [])
        assert name not in PROMISES or PROMISES[name].met(measured), TARGETS[name].what

    return keep


# Metronomes in this process.


@asynccontextmanager
async def metronome(
    url: str,
    name: str,
    *,
    wrap: Callable[[Store], Store] = lambda store: store,
    bpm: float = 240.0,
    **settings: Any,
) -> AsyncGenerator[tuple[Metronome, trio.CancelScope], None]:
    """Run a metronome in this process, with a connection of its own; its scope ends it at once."""
    config = BackbeatConfig(nats_url=url, agent_id=name, **settings)
    transport = NatsTransport(config)
    store = KeyValueStore(transport, BUCKET)
    pulse = Metronome(
        transport, cluster_id=CLUSTER_ID, leader_id=name, tempo_bpm=bpm, store=wrap(store)
    )

    async def run(task_status: trio.TaskStatus[trio.CancelScope]) -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(transport.run)
            await transport.wait_connected()
            assert await store.open()
            await nursery.start(pulse.run)
            task_status.started(nursery.cancel_scope)

    # A task of its own: whoever ends the metronome is not to be ended with it.
    async with trio.open_nursery() as outer:
        yield pulse, await outer.start(run)
        outer.cancel_scope.cancel()


async def kept(transport: NatsTransport) -> bytes:
    """Return the record that is in the bucket."""
    return (await KeyValueStore(transport, BUCKET).read()).data


# Agents, and what they hear.


class Agent:
    """A session, the beats that it had, and the frames that it heard."""

    def __init__(self, bb: Session) -> None:
        self.bb = bb
        self.beats: list[backbeat.Beat] = []
        self.frames: list[tuple[BeatFrame, int]] = []
        self.tempos: dict[int, float] = {}

    async def count(self) -> None:
        async for beat in self.bb.beats():
            self.beats.append(beat)
            self.tempos[beat.index] = beat.tempo_bpm

    async def hear(self, task_status: trio.TaskStatus[None]) -> None:
        transport = self.bb._runtime.transport
        assert transport is not None
        async with transport.open_subscription(f"backbeat.beat.{CLUSTER_ID}") as messages:
            task_status.started()
            async for message in messages:
                self.frames.append((decode_frame(message.data), message.received_ns))

    def lateness(self, frame: BeatFrame, received_ns: int) -> float:
        """Return by how many milliseconds a frame came after its beat."""
        clock = self.bb._clock
        due = clock.grid.timeline.time_of(frame.beat_index)
        return (clock.grid.cluster_at(received_ns) - due) / 1e6

    def lost(self) -> int:
        """Return how many beats did not come, or came twice."""
        indices = [beat.index for beat in self.beats]
        missing = set(range(indices[0], indices[-1] + 1)).difference(indices)
        return len(missing) + len(indices) - len(set(indices))

    def check(self) -> None:
        """Check that no beat was lost and none came twice."""
        assert not self.lost()
        indices = [beat.index for beat in self.beats]
        assert indices == sorted(indices)
        assert not any(beat.skipped for beat in self.beats)
        assert self.bb.statistics().locks == 1


@asynccontextmanager
async def agents(url: str, number: int = 4, **overrides: Any) -> AsyncGenerator[list[Agent], None]:
    """Open sessions that have locked, and count their beats."""
    async with AsyncExitStack() as stack:
        found: list[Agent] = []
        for index in range(number):
            options: dict[str, Any] = {"nats_url": url, "agent_id": f"agent-{index}"}
            bb = await stack.enter_async_context(
                open_session(**({"lock_timeout": 20.0} | options | overrides))
            )
            assert bb.health().leader_id is not None
            found.append(Agent(bb))
        nursery = await stack.enter_async_context(trio.open_nursery())
        for agent in found:
            await nursery.start(agent.hear)
            nursery.start_soon(agent.count)
        yield found
        nursery.cancel_scope.cancel()


def leader(agent: Agent) -> str:
    # Not from `health`, which names nobody between two leaders.
    listener = agent.bb._runtime.listener
    assert listener is not None
    return listener.follower.leader_id


async def led_anew(everybody: list[Agent], former: str) -> None:
    await until(lambda: all(leader(agent) != former for agent in everybody))


# 1. kill -9 of the leader, again and again.


@pytest.mark.parametrize("bpm", [120.0, 300.0])
async def test_leader_is_killed(bpm: float, thorough: bool, report: Report) -> None:
    rounds, late = 200 if thorough else 3, []
    with trio.fail_after(60 + 10 * rounds):
        async with (
            NatsServer(JETSTREAM) as server,
            pulsing(server.url, 3, bpm=bpm) as pulses,
            agents(server.url) as everybody,
        ):
            first = everybody[0]
            await until(lambda: len(first.beats) >= 4)
            for _ in range(rounds):
                await trio.sleep(random.uniform(0.5, 0.5 + 60 / bpm))
                former, heard = leader(first), len(first.frames)
                await pulses.kill(former)
                await led_anew(everybody, former)

                # An answer to a ping may have named the new leader before its first frame does.
                def news(heard: int = heard, former: str = former) -> list[tuple[BeatFrame, int]]:
                    return [f for f in first.frames[heard:] if f[0].leader_id != former]

                await until(news)
                late.append(first.lateness(*news()[0]))
                await pulses.start()
                # It has to be up and following before the next one dies.
                await trio.sleep(1.0)
            await trio.sleep(1.0)
            report(f"late_{bpm:g}", values=late, share=0.99)
            beats = sum(len(agent.beats) for agent in everybody)
            lost = sum(agent.lost() for agent in everybody)
            report(f"lost_{bpm:g}", lost, f"{beats:,} beats of four agents, {rounds} kills")
            for agent in everybody:
                agent.check()
                assert not agent.bb.health().local_degradation or agent.bb._clock.loop_late
    for (before, _), (after, _) in itertools.pairwise(first.frames):
        passed = after.beat_index - before.beat_index
        # Who takes over more than a beat late, as on a busy machine, publishes the present beat.
        assert passed == 1 or (passed > 1 and after.leader_id != before.leader_id)


@pytest.mark.parametrize("bpm", [120.0, 300.0])
async def test_a_single_metronome_is_killed_and_restarted(
    bpm: float, thorough: bool, report: Report
) -> None:
    rounds = 100 if thorough else 2
    with trio.fail_after(60 + 10 * rounds):
        async with (
            NatsServer(JETSTREAM) as server,
            pulsing(server.url, 1, bpm=bpm) as pulses,
            agents(server.url) as everybody,
        ):
            first = everybody[0]
            await until(lambda: len(first.beats) >= 4)
            incarnations, moved = {first.frames[-1][0].incarnation}, 0
            for _ in range(rounds):
                former = leader(first)
                await pulses.kill(former)
                await trio.sleep(random.uniform(0.0, 2.0))
                before = [agent.bb.current_position() for agent in everybody]
                begun = trio.current_time()
                await pulses.start()
                await led_anew(everybody, former)
                passed = (trio.current_time() - begun) * bpm / 60
                after = [agent.bb.current_position() for agent in everybody]
                # As exact as the next leader can know the time that others have kept.
                moved += sum(abs(b - a - passed) > 0.1 for a, b in zip(before, after, strict=True))
                await trio.sleep(random.uniform(0.5, 0.5 + 60 / bpm))
                incarnations.add(first.frames[-1][0].incarnation)
            beats = sum(len(agent.beats) for agent in everybody)
            wrong = moved + sum(agent.lost() for agent in everybody)
            report(f"alone_{bpm:g}", wrong, f"{beats:,} beats of four agents, {rounds} rounds")
            for agent in everybody:
                agent.check()
            assert len(incarnations) == 1


# 2. A leader that stands still, and comes back with what it had in its buffers.


@again(5)
@guarded(120)
async def test_leader_is_stopped_and_goes_on() -> None:
    async with (
        NatsServer(JETSTREAM) as server,
        pulsing(server.url, 2) as pulses,
        agents(server.url) as everybody,
    ):
        first = everybody[0]
        await until(lambda: len(first.beats) >= 4)
        # The second one must be ready to take over.
        await until(lambda: any("locked" in pulses.log(f"pulse-{n}") for n in (1, 2)))
        former, epoch = leader(first), first.bb.health().epoch
        assert epoch is not None
        pulses.send(former, signal.SIGSTOP)
        await first.bb.sleep(5)
        heard = len(first.frames)
        pulses.send(former, signal.SIGCONT)
        await led_anew(everybody, former)
        await first.bb.sleep(4)
        assert leader(first) != former
        # Once it has found out it says nothing any more, and nobody has believed it before.
        late = [frame for frame, _ in first.frames[heard:] if frame.leader_id == former]
        assert len(late) <= 1
        assert "another metronome leads" in pulses.log(former)
        # It is a standby like any other by now.
        await pulses.kill(leader(first))
        await until(lambda: leader(first) == former)
        await first.bb.sleep(3)
        for agent in everybody:
            agent.check()


# 3. A leader killed while it is being probed, and while it publishes.


@again(10)
@guarded(120)
async def test_leader_is_killed_within_a_probe() -> None:
    async with (
        NatsServer(JETSTREAM) as server,
        pulsing(server.url, 3, bpm=40.0) as pulses,
        agents(server.url) as everybody,
    ):
        first = everybody[0]
        transport = first.bb._runtime.transport
        assert transport is not None
        await until(lambda: any("locked" in pulses.log(f"pulse-{n}") for n in (1, 2, 3)))
        await trio.sleep(1.5)
        async with transport.open_subscription(f"backbeat.lead.{CLUSTER_ID}.*") as probes:
            former = leader(first)
            pulses.send(former, signal.SIGSTOP)
            await anext(probes)
            await pulses.kill(former)
        begun = trio.current_time()
        await led_anew(everybody, former)
        # Not a lease of two beats, as the death is seen between two probes.
        assert trio.current_time() - begun < 2.0
        await first.bb.sleep(3)
        for agent in everybody:
            agent.check()


@again(10)
@guarded(120)
async def test_leader_is_killed_as_its_frame_goes_out() -> None:
    async with (
        NatsServer(JETSTREAM) as server,
        pulsing(server.url, 2) as pulses,
        agents(server.url) as everybody,
    ):
        first = everybody[0]
        await until(lambda: len(first.beats) >= 4)
        await trio.sleep(1.5)
        former, edge = leader(first), first.bb.current_beat() + 2
        with first.bb.move_on_at(edge):
            await trio.sleep_forever()
        await pulses.kill(former)
        await led_anew(everybody, former)
        await first.bb.sleep(3)
        for agent in everybody:
            agent.check()
        indices = [frame.beat_index for frame, _ in first.frames]
        assert sorted(set(indices)) == list(range(indices[0], indices[-1] + 1))


# 4. The server dies between a compare-and-set and the news of it.


class LosesAnswer:
    """A store whose server dies before it has told of a write, once."""

    def __init__(self, store: Store, server: NatsServer, when: Callable[[bytes], bool]) -> None:
        self._store = store
        self._server = server
        self._when = when
        self.lost = trio.Event()

    async def open(self) -> bool:
        return await self._store.open()

    async def read(self) -> Any:
        return await self._store.read()

    async def write(self, data: bytes, revision: int) -> int:
        number = await self._store.write(data, revision)
        if not self.lost.is_set() and self._when(data):
            self._server.kill()
            self.lost.set()
            raise backbeat.TransportBroken("the server was killed")
        return number


@again(10)
@guarded(120)
async def test_server_dies_after_a_takeover_is_written() -> None:
    async with NatsServer(JETSTREAM) as server, AsyncExitStack() as stack:
        one, stop = await stack.enter_async_context(metronome(server.url, "pulse-1"))
        await until(lambda: one.leads)
        stores: list[LosesAnswer] = []

        def wrap(store: Store) -> Store:
            stores.append(LosesAnswer(store, server, lambda data: b'"pulse-2"' in data))
            return stores[0]

        two, _ = await stack.enter_async_context(metronome(server.url, "pulse-2", wrap=wrap))
        (agent,) = await stack.enter_async_context(agents(server.url, 1))
        await trio.sleep(1.0)
        stop.cancel()
        await stores[0].lost.wait()
        await server.start()
        await until(lambda: two.leads)
        await until(lambda: leader(agent) == "pulse-2")
        transport = await stack.enter_async_context(connected(nats_url=server.url))
        assert decode_record(await kept(transport)).epoch == two.epoch
        await agent.bb.sleep(3)
        agent.check()


@again(10)
@guarded(120)
async def test_server_dies_after_a_change_is_written() -> None:
    async with NatsServer(JETSTREAM) as server, AsyncExitStack() as stack:
        stores: list[LosesAnswer] = []

        def wrap(store: Store) -> Store:
            stores.append(LosesAnswer(store, server, lambda data: b'"milli_bpm":480000' in data))
            return stores[0]

        one, _ = await stack.enter_async_context(metronome(server.url, "pulse-1", wrap=wrap))
        await until(lambda: one.leads)
        (agent,) = await stack.enter_async_context(agents(server.url, 1))
        with pytest.raises(backbeat.TempoRefused, match="could not be committed"):
            await one.change_tempo(480)
        await server.start()
        await until(lambda: agent.bb.health().connected)
        # What was refused is not to happen: it is written over.
        transport = await stack.enter_async_context(connected(nats_url=server.url))

        async def is_gone() -> bool:
            with contextlib.suppress(backbeat.TransportBroken):
                return b"480000" not in await kept(transport)
            return False

        while not await is_gone():
            await trio.sleep(0.05)
        await until(lambda: one.statistics().commits >= 1)
        beat = await agent.bb.set_tempo(300)
        await agent.bb.sleep_until(beat)
        assert agent.bb.tempo_bpm == 300
        agent.check()


# 5. The bucket is wiped, or filled with rubbish, while agents live.


@pytest.mark.parametrize("fault", ["wiped", "deleted", "rubbish"])
@guarded(120)
async def test_record_is_lost(fault: str) -> None:
    async def spoil(client: Client) -> None:
        js = client.jetstream()
        if fault == "wiped":
            await js.delete_key_value(BUCKET)
        elif fault == "deleted":
            await (await js.key_value(BUCKET)).delete("metronome")
        else:
            await (await js.key_value(BUCKET)).put("metronome", b'{"type": "rubbish"}')

    async with NatsServer(JETSTREAM) as server, AsyncExitStack() as stack:
        one, stop = await stack.enter_async_context(metronome(server.url, "pulse-1"))
        await until(lambda: one.leads)
        two, _ = await stack.enter_async_context(metronome(server.url, "pulse-2"))
        everybody = await stack.enter_async_context(agents(server.url))
        transport = await stack.enter_async_context(connected(nats_url=server.url))
        await everybody[0].bb.sleep(2)
        await transport.call(spoil)
        # A newcomer finds no record, and a leader all the same.
        three, _ = await stack.enter_async_context(metronome(server.url, "pulse-3"))
        await until(lambda: len(everybody[0].frames) >= 16)
        assert decode_record(await kept(transport)).leader_id == "pulse-1"
        assert not three.leads
        assert one.leads
        stop.cancel()
        await led_anew(everybody, "pulse-1")
        await everybody[0].bb.sleep(3)
        assert two.leads is not three.leads
        for agent in everybody:
            agent.check()


@again(10)
@guarded(120)
async def test_record_is_spoiled_as_the_leader_dies() -> None:
    async with NatsServer(JETSTREAM) as server, AsyncExitStack() as stack:
        one, stop = await stack.enter_async_context(metronome(server.url, "pulse-1"))
        await until(lambda: one.leads)
        two, _ = await stack.enter_async_context(metronome(server.url, "pulse-2"))
        (agent,) = await stack.enter_async_context(agents(server.url, 1))
        transport = await stack.enter_async_context(connected(nats_url=server.url))
        await agent.bb.sleep(2)

        async def spoil(client: Client) -> None:
            await (await client.jetstream().key_value(BUCKET)).put("metronome", b"\xff")

        epoch = one.epoch
        await transport.call(spoil)
        stop.cancel()
        await until(lambda: two.leads)
        assert two.epoch > epoch
        await agent.bb.sleep(3)
        agent.check()


# 6. Three servers.


async def test_servers_of_a_cluster_die(thorough: bool, report: Report) -> None:
    if not thorough:
        pytest.skip("takes half a minute: run with --faults")
    with trio.fail_after(180):
        async with clustered() as servers, AsyncExitStack() as stack:
            # Everybody knows all of them, and begins with another one.
            urls = [",".join(server.url for server in servers[n:] + servers[:n]) for n in range(3)]
            pulses = await stack.enter_async_context(pulsing(urls[0], 1))
            await pulses.start("-s", urls[1])
            await pulses.start("-s", urls[2])
            everybody = await stack.enter_async_context(agents(urls[0], 4))
            first = everybody[0]
            await until(lambda: len(first.beats) >= 8)
            transport = await stack.enter_async_context(connected(nats_url=urls[0]))

            async def stream_leader(client: Client) -> str:
                info = await client.jetstream().stream_info(f"KV_{BUCKET}")
                assert info.config.num_replicas == 3
                assert info.cluster is not None
                return str(info.cluster.leader)

            name = await transport.call(stream_leader)
            dead = servers[int(name[1:])]
            beats = len(first.beats)
            dead.kill()
            begun = trio.current_time()
            refusals = 0
            while True:
                try:
                    await first.bb.set_tempo(121)
                    break
                except backbeat.BackbeatError:
                    refusals += 1
                    await trio.sleep(0.25)
            silent = trio.current_time() - begun
            assert len(first.beats) - beats >= int(silent * 2) - 1
            # One more, and nothing can be committed; beats go on, and are told.
            alive = [server for server in servers if server is not dead]
            alive[1].kill()
            await until(lambda: first.bb.health().connected)
            await trio.sleep(3.0)
            frames = len(first.frames)
            with pytest.raises(backbeat.BackbeatError):
                await first.bb.set_tempo(122)
            await first.bb.sleep(4)
            assert len(first.frames) >= frames + 3
            lost = sum(agent.lost() for agent in everybody)
            note = f"changes of the tempo were refused for {silent:.1f} s, {refusals} times"
            report("cluster_lost", lost, note)
            for agent in everybody:
                agent.check()


# 7. The leader dies when a change is committed and nobody has been told.


class DiesOfChange:
    """A store whose metronome dies as soon as it has committed a change."""

    def __init__(self, store: Store, die: Callable[[], None]) -> None:
        self._store = store
        self._die = die

    async def open(self) -> bool:
        return await self._store.open()

    async def read(self) -> Any:
        return await self._store.read()

    async def write(self, data: bytes, revision: int) -> int:
        number = await self._store.write(data, revision)
        if b'"milli_bpm":480000' in data:
            self._die()
            await trio.sleep_forever()
        return number


@again(10)
@guarded(120)
async def test_leader_dies_before_it_tells_of_a_change() -> None:
    async with NatsServer(JETSTREAM) as server, AsyncExitStack() as stack:
        scopes: list[trio.CancelScope] = []
        one, stop = await stack.enter_async_context(
            metronome(
                server.url, "pulse-1", wrap=lambda s: DiesOfChange(s, lambda: scopes[0].cancel())
            )
        )
        scopes.append(stop)
        await until(lambda: one.leads)
        two, _ = await stack.enter_async_context(metronome(server.url, "pulse-2"))
        everybody = await stack.enter_async_context(agents(server.url))
        first = everybody[0]
        await first.bb.sleep(2)
        with pytest.raises(backbeat.MetronomeUnavailable):
            await first.bb.set_tempo(480)
        await until(lambda: two.leads)
        await until(lambda: all(agent.bb.tempo_bpm == 480 for agent in everybody))
        await first.bb.sleep(4)
        switches = {
            min(index for index, tempo in agent.tempos.items() if tempo == 480)
            for agent in everybody
        }
        assert len(switches) == 1
        for agent in everybody:
            agent.check()


# 8. Loops that are blocked.


@guarded(400)
async def test_loop_of_a_follower_is_blocked() -> None:
    async with (
        NatsServer(JETSTREAM) as server,
        # Slow beats, for which frames may be later: other programs use this machine, too.
        pulsing(server.url, 1, bpm=60.0),
        agents(server.url, 1) as (agent,),
    ):
        bb = agent.bb
        await until(lambda: bb.health().tempo_drift == "acceptable", within=240)
        await until(lambda: not bb.health().local_degradation)
        time.sleep(6)
        # It blames itself, and not the metronome.
        assert bb.health().local_degradation
        await bb.sleep(2)
        assert bb.health().local_degradation
        assert bb.health().tempo_drift == "acceptable"
        assert any(beat.skipped >= 4 for beat in agent.beats)
        await until(lambda: not bb.health().local_degradation)
        assert bb.statistics().locks == 1


@guarded(120)
async def test_loop_of_the_leader_is_blocked() -> None:
    blocked = threading.Event()

    async with NatsServer(JETSTREAM) as server, AsyncExitStack() as stack:

        async def lead() -> None:
            async with metronome(server.url, "pulse-1") as (one, _):
                await until(lambda: one.leads)
                await trio.to_thread.run_sync(blocked.wait)
                time.sleep(3)
                await until(lambda: one.statistics().deposed == 1)

        thread = threading.Thread(target=trio.run, args=(lead,))
        thread.start()
        stack.callback(thread.join)
        stack.callback(blocked.set)
        everybody = await stack.enter_async_context(agents(server.url))
        two, _ = await stack.enter_async_context(metronome(server.url, "pulse-2"))
        await everybody[0].bb.sleep(8)
        assert leader(everybody[0]) == "pulse-1"
        blocked.set()
        await led_anew(everybody, "pulse-1")
        await everybody[0].bb.sleep(12)
        assert two.leads
        for agent in everybody:
            agent.check()
        await trio.to_thread.run_sync(thread.join)


# 9. Clocks that run wrong.


class WarpedClock(trio.abc.Clock):
    """A clock that runs at a rate of its own, and can be made to jump ahead, or to stand still."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.ahead = 1000.0
        self._last = 0.0

    def start_clock(self) -> None:
        pass

    def current_time(self) -> float:
        self._last = max(self._last, time.perf_counter() * self.rate + self.ahead)
        return self._last

    def deadline_to_sleep_time(self, deadline: float) -> float:
        return (deadline - self.current_time()) / self.rate


# The rate, and what the clock jumps by, or stands still for, after some seconds.
WRONG: Final = (
    (1.08, 0.0),
    (0.92, 0.0),
    (1.0, -3.0),
    (1.0001, 0.2),
    (1.0, 2.0),
    (0.9999, 5.0),
    (1.05, 5.0),
)
# Whoever is ahead holds its position until the others are there: so many times what it is ahead by,
# and the seconds in which it finds out.
HOLD: Final = 1.2
FINDS_OUT: Final = 3.0


class Mark(NamedTuple):
    """Where an agent believed to be, and by how much it thought that it may be wrong, in ms."""

    instant: float
    position: float
    uncertainty: float


@guarded(180)
async def test_clocks_of_agents_are_wrong() -> None:
    seen: dict[tuple[float, float], list[Mark]] = {}
    locks: list[int] = []

    def follow(url: str, number: int, rate: float, jump: float) -> None:
        clock = WarpedClock(rate)
        agent_id = f"warped-{number}"

        async def look() -> None:
            async with open_session(nats_url=url, agent_id=agent_id, lock_timeout=10.0) as bb:
                await trio.sleep(6)
                clock.ahead += jump
                await trio.sleep(max(6.0, HOLD * jump + FINDS_OUT))
                marks = seen[rate, jump] = []
                for _ in range(40):
                    told = bb.health().uncertainty
                    assert told is not None
                    marks.append(Mark(time.perf_counter(), bb.current_position(), told * 1e3))
                    await trio.sleep(0.05)
                locks.append(bb.statistics().locks)

        trio.run(look, clock=clock)

    async with NatsServer(JETSTREAM) as server, AsyncExitStack() as stack:
        one, _ = await stack.enter_async_context(metronome(server.url, "pulse-1"))
        await until(lambda: one.leads)
        (reference,) = await stack.enter_async_context(agents(server.url, 1))
        async with trio.open_nursery() as nursery:
            for number, (rate, jump) in enumerate(WRONG):
                nursery.start_soon(trio.to_thread.run_sync, follow, server.url, number, rate, jump)
        # The two clocks of this machine run at the same rate: one look at both compares them.
        now, local, clock = time.perf_counter(), local_ns(), reference.bb._clock
    for marks in seen.values():
        positions = [mark.position for mark in marks]
        assert positions == sorted(positions)
        errors = []
        for mark in marks:
            # Of instants that are past the grid itself says where it is now.
            cluster = clock.grid.cluster_at(local + round((mark.instant - now) * 1e9))
            believed = clock.grid.timeline.position_at(cluster)
            errors.append((mark.position - believed) * 60_000 / 240)
        assert statistics.median(map(abs, errors)) < 5.0
        beyond = [e - mark.uncertainty for e, mark in zip(errors, marks, strict=True)]
        assert statistics.median(beyond) < 5.0
    assert len(seen) == len(WRONG)
    assert set(locks) == {1}


# 10. A hundred thousand budgets due on one beat, while the tempo goes up and down.


async def test_a_hundred_thousand_budgets_end_on_one_beat(thorough: bool) -> None:
    tasks, depth = (1000, 100) if thorough else (100, 100)
    joining = 50 if thorough else 8
    ended: list[float] = []
    with trio.fail_after(180):
        async with NatsServer(JETSTREAM) as server, AsyncExitStack() as stack:
            one, _ = await stack.enter_async_context(metronome(server.url, "pulse-1", bpm=20))
            await until(lambda: one.leads)
            (agent,) = await stack.enter_async_context(agents(server.url, 1))
            bb = agent.bb
            up = bb.current_beat() + 3
            due = up + 5

            async def spend(number: int) -> None:
                scopes = [bb.move_on_at(due, shield=(level % 2 == 1)) for level in range(depth)]
                with contextlib.ExitStack() as inner:
                    for scope in scopes:
                        inner.enter_context(scope)
                    await trio.sleep_forever()
                assert all(scope.cancel_called for scope in scopes)
                ended.append(bb.current_position())

            async def join(number: int) -> None:
                async with open_session(
                    nats_url=server.url, agent_id=f"joiner-{number}", tempo_bpm=77.0 + number
                ) as joined:
                    await until(lambda: joined.health().leader_id == "pulse-1", within=60)
                    assert joined.tempo_bpm in (20.0, 999.0)

            async with trio.open_nursery() as nursery:
                for number in range(tasks):
                    nursery.start_soon(spend, number)
                assert await bb.set_tempo(999, at_beat=up) == up
                assert await bb.set_tempo(20, at_beat=up + 3) == up + 3
                for number in range(joining):
                    nursery.start_soon(join, number)
            assert len(ended) == tasks
            assert due <= min(ended)
            assert max(ended) < due + 1
            assert one.statistics().tempo_changes == 2
            # A beat of 60 ms may be missed while so many join, but none has another tempo.
            fast = {agent.tempos.get(index, 999.0) for index in range(up, up + 3)}
            assert fast == {999.0}
            assert bb.tempo_bpm == 20.0


@guarded(120)
async def test_everybody_switches_on_the_same_beat(thorough: bool, report: Report) -> None:
    changes = 40 if thorough else 6
    async with NatsServer(JETSTREAM) as server, AsyncExitStack() as stack:
        one, _ = await stack.enter_async_context(metronome(server.url, "pulse-1", bpm=600))
        await until(lambda: one.leads)
        everybody = await stack.enter_async_context(agents(server.url, 8))
        first = everybody[0]
        for number in range(changes):
            asked = random.choice(everybody).bb
            beat = await asked.set_tempo(random.choice([600, 900, 1200]), over=number % 3 * 4)
            await first.bb.sleep_until(beat + 10)
        await first.bb.sleep(2)
    tempos: dict[int, set[float]] = {}
    for agent in everybody:
        for index, tempo in agent.tempos.items():
            tempos.setdefault(index, set()).add(tempo)
    differing = [index for index, told in tempos.items() if len(told) > 1]
    made = one.statistics().tempo_changes
    report("differing", len(differing), f"{made} changes, {len(tempos):,} beats")


# 11. Every public call cancelled, while the server stands still and goes on.


async def beats_again(bb: Session) -> None:
    """Have a grid go on that stands still, or is to, and wait for beats."""
    while True:
        # Refused where the grid stands still before that beat.
        with contextlib.suppress(backbeat.BackbeatError):
            await bb.set_tempo(300)
            break
        with contextlib.suppress(backbeat.BackbeatError):
            await bb.resume()
        await trio.sleep(0.1)
    await bb.sleep(2)


async def test_every_call_is_cancelled(thorough: bool) -> None:
    rounds = 1000 if thorough else 60
    with trio.fail_after(60 + rounds):
        async with NatsServer(JETSTREAM) as server, AsyncExitStack() as stack:
            one, _ = await stack.enter_async_context(metronome(server.url, "pulse-1"))
            await until(lambda: one.leads)
            (agent,) = await stack.enter_async_context(agents(server.url, 1))
            bb = agent.bb

            async def operate() -> None:
                async with bb.operation("election", enforce=True):
                    await bb.sleep(0.1)

            async def listen() -> None:
                async with bb.open_claims() as claims:
                    await anext(claims)

            async def join() -> None:
                # What it has to say when it leaves is not waited for while the server stands still.
                async with open_session(
                    nats_url=server.url, agent_id="passer-by", grace_period=0.05
                ) as joined:
                    await joined.sleep(0.1)

            async def stand_still() -> None:
                await bb.pause()
                await bb.resume()

            async def refused(call: Callable[[], Awaitable[object]]) -> None:
                with contextlib.suppress(backbeat.BackbeatError):
                    await call()

            calls: list[Callable[[], Awaitable[object]]] = [
                lambda: bb.sleep(0.05),
                lambda: bb.sleep_until(bb.current_position() + 0.05),
                lambda: anext(bb.beats()),
                lambda: anext(bb.beats(precise=True)),
                lambda: anext(bb.downbeats()),
                lambda: bb.execute_with_beat_budget(0.05, trio.sleep_forever),
                lambda: bb.set_tempo(240),
                lambda: bb.set_tempo(300, over=4),
                lambda: bb.pause(at_beat=0),
                stand_still,
                lambda: bb.resume(),
                operate,
                listen,
                join,
            ]

            async def disturb() -> None:
                while True:
                    await trio.sleep(random.uniform(0.01, 0.1))
                    server.pause()
                    await trio.sleep(random.uniform(0.01, 0.3))
                    server.resume()

            # The grid stands still to begin with, and goes on when one of the calls has it do so.
            await bb.pause()
            await until(lambda: bb.health().paused)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(disturb)
                for _ in range(rounds):
                    for call in calls:
                        with trio.move_on_after(random.expovariate(1 / 0.002)):
                            await refused(call)
                nursery.cancel_scope.cancel()
            server.resume()
            # It hears, and is heard.
            await until(lambda: bb.health().connected)
            await beats_again(bb)
            assert not bb.health().paused
            frames = bb.statistics().frames
            await until(lambda: bb.statistics().frames > frames + 2)
            async with open_recorder(bb) as recorder:
                bb.start_operation("dht_store", id="after").complete()
                with trio.fail_after(10):
                    await recorder.wait_for("after", "done")
            assert await bb.set_tempo(300) > 0


# 12. A server that stands still with everything full, beside a healthy one.


@guarded(180)
async def test_half_open_server_is_left_for_a_healthy_one(thorough: bool, report: Report) -> None:
    rounds, left = 10 if thorough else 2, []
    for _ in range(rounds):
        async with (
            NatsServer(JETSTREAM) as first,
            NatsServer(JETSTREAM) as second,
            metronome(second.url, "pulse-1") as (one, _),
            agents(f"{second.url},{first.url}", 1, lock_timeout=5.0) as (listening,),
            open_session(nats_url=f"{first.url},{second.url}", lock_timeout=0.0) as bb,
            open_recorder(listening.bb) as recorder,
            trio.open_nursery() as nursery,
        ):
            transport = bb._runtime.transport
            assert transport is not None
            await until(lambda: bb.health().connected)
            # The metronome is on the other one.
            assert bb.health().leader_id is None

            async def fill() -> None:
                with contextlib.suppress(backbeat.TransportBroken):
                    while True:
                        await transport.publish("noise", b"x" * 100_000)  # noqa: B023 - ended in here

            first.pause()
            nursery.start_soon(fill)
            bb.start_operation("election", id="meanwhile").complete()
            left.append(await until(lambda: bb.health().leader_id is not None))
            assert one.leads
            with trio.fail_after(10):
                await recorder.wait_for("meanwhile", "done")
            nursery.cancel_scope.cancel()
            first.resume()
    report("half_open", values=left)


# 13. Many candidates at once.


async def test_candidates_race(thorough: bool, report: Report) -> None:
    rounds, won = 50 if thorough else 2, []
    for _ in range(rounds):
        with trio.fail_after(60):
            async with NatsServer(JETSTREAM) as server, trio.open_nursery() as nursery:
                transports = [
                    NatsTransport(BackbeatConfig(nats_url=server.url, agent_id=f"pulse-{n}"))
                    for n in range(20)
                ]
                for transport in transports:
                    nursery.start_soon(transport.run)
                for transport in transports:
                    await transport.wait_connected()
                stores = [KeyValueStore(transport, BUCKET) for transport in transports]
                candidates = [
                    Metronome(
                        transport,
                        cluster_id=CLUSTER_ID,
                        leader_id=f"pulse-{number}",
                        tempo_bpm=240,
                        store=store,
                    )
                    for number, (transport, store) in enumerate(
                        zip(transports, stores, strict=True)
                    )
                ]

                async def run(
                    metronome: Metronome, store: KeyValueStore, start: trio.Event
                ) -> None:
                    assert await store.open()
                    await start.wait()
                    await metronome.run()

                start = trio.Event()
                for candidate, store in zip(candidates, stores, strict=True):
                    nursery.start_soon(run, candidate, store, start)
                await trio.sleep(0.3)
                start.set()
                await until(lambda: any(each.leads for each in candidates))  # noqa: B023 - awaited here
                await trio.sleep(1.0)
                won.append(sum(each.leads for each in candidates))
                assert sum(each.statistics().takeovers for each in candidates) == 1
                nursery.cancel_scope.cancel()
    report("race", 100 * won.count(1) / rounds, f"{won.count(1)} of {rounds}")


# 14. Credentials that are revoked, and granted again.

USERS: Final = """
authorization {{ users = [
  {{ user: one, password: {one} }}
  {{ user: two, password: fine }}
] }}
"""


@guarded(120)
async def test_credentials_of_the_leader_are_revoked() -> None:
    good, bad = USERS.format(one="fine"), USERS.format(one="gone")
    async with NatsServer(JETSTREAM, config=good) as server, AsyncExitStack() as stack:
        one, _ = await stack.enter_async_context(
            metronome(server.url, "pulse-1", user="one", password="fine")
        )
        await until(lambda: one.leads)
        login: dict[str, Any] = {"user": "two", "password": "fine"}
        two, _ = await stack.enter_async_context(metronome(server.url, "pulse-2", **login))
        everybody = await stack.enter_async_context(agents(server.url, **login))
        await everybody[0].bb.sleep(4)
        server.reload(bad)
        await led_anew(everybody, "pulse-1")
        assert two.leads
        await everybody[0].bb.sleep(3)
        server.reload(good)
        await until(lambda: not one.leads)
        await everybody[0].bb.sleep(8)
        assert leader(everybody[0]) == "pulse-2"
        for agent in everybody:
            agent.check()


# The server itself.


def pings_answered(agent: Agent) -> int:
    statistics = agent.bb.statistics()
    return statistics.pings - statistics.pings_failed


@guarded(120)
async def test_server_is_killed_and_restarted_at_once(thorough: bool, report: Report) -> None:
    locked: list[float] = []
    rounds = 10 if thorough else 2
    async with NatsServer(JETSTREAM) as server, AsyncExitStack() as stack:
        one, _ = await stack.enter_async_context(metronome(server.url, "pulse-1"))
        await until(lambda: one.leads)
        await stack.enter_async_context(metronome(server.url, "pulse-2"))
        everybody = await stack.enter_async_context(agents(server.url))
        transport = await stack.enter_async_context(connected(nats_url=server.url))
        await everybody[0].bb.sleep(2)
        for round_ in range(rounds):
            for number, agent in enumerate(everybody):
                for count in range(5):
                    name = f"{round_}-{number}-{count}"
                    agent.bb.start_operation("dht_store", id=name).complete()
            answered = [pings_answered(agent) for agent in everybody]
            server.kill()
            for number, agent in enumerate(everybody):
                agent.bb.start_operation("dht_store", id=f"{round_}-{number}-late").complete()
            await server.start()

            def locked_again(before: list[int] = answered) -> bool:
                return all(
                    agent.bb.health().connected and pings_answered(agent) > number
                    for agent, number in zip(everybody, before, strict=True)
                )

            locked.append(await until(locked_again))
            await trio.sleep(1.0)
        await until(lambda: not any(a.bb.statistics().claims_pending for a in everybody))
        await everybody[0].bb.sleep(3)
        report("restart_locked", values=locked)
        report("restart_lost", sum(agent.lost() for agent in everybody), f"{rounds} restarts")
        for agent in everybody:
            agent.check()

        async def stored(client: Client) -> list[StatusClaim]:
            js = client.jetstream()
            last = (await js.stream_info("BACKBEAT_STATUS")).state.last_seq
            found = []
            for number in range(1, last + 1):
                data = (await js.get_msg("BACKBEAT_STATUS", number)).data or b""
                found += backbeat._wire.decode_claims(data)
            return found

        claims = await transport.call(stored)
        wanted = {
            f"{round_}-{number}-{count}"
            for round_ in range(rounds)
            for number in range(4)
            for count in (*range(5), "late")
        }
        found = [claim.task_id for claim in claims if claim.state == "done"]
        wrong = len(wanted.difference(found)) + len(found) - len(set(found))
        report("restart_claims", wrong, f"{len(wanted)} claims")
        assert sorted(claim.task_id for claim in claims) == sorted(wanted)


# 15. Metronomes that could believe that nobody is there.


def leaders(agent: Agent) -> list[str]:
    """Return who has led, in turn, as an agent has heard it."""
    names = [frame.leader_id for frame, _ in agent.frames]
    return [name for name, before in zip(names, ["", *names], strict=False) if name != before]


def grids(agent: Agent) -> set[object]:
    return {frame.incarnation for frame, _ in agent.frames}


@guarded(120)
async def test_a_newcomer_at_two_beats_a_minute_begins_no_other_grid() -> None:
    async with NatsServer(JETSTREAM) as server, pulsing(server.url, 1, bpm=2.0) as pulses:
        await until(lambda: "metronome leads" in pulses.log("pulse-1"))
        await pulses.start()
        await until(lambda: "stands by - leader=pulse-1" in pulses.log("pulse-2"))
        async with agents(server.url, 2) as everybody:
            first = everybody[0]
            epoch, position = first.bb.health().epoch, first.bb.current_position()
            begun = trio.current_time()
            await pulses.kill("pulse-1")
            await trio.sleep(1.6)
            newcomer = await pulses.start()
            # The standby looks as soon as it is asked, and not when the next frame is due.
            await until(lambda: leader(first) != "pulse-1")
            await until(lambda: "stands by" in pulses.log(newcomer), within=10)
            assert leader(first) == "pulse-2"
            assert first.bb.health().epoch != epoch
            assert "nobody is left" not in pulses.log(newcomer) + pulses.log("pulse-2")
            assert "metronome leads" not in pulses.log(newcomer)
            passed = (trio.current_time() - begun) * 2 / 60
            assert abs(first.bb.current_position() - position - passed) < 0.001
            for agent in everybody:
                assert agent.bb.statistics().locks == 1


@guarded(120)
async def test_a_distant_metronome_leaves_the_lead_to_a_healthy_one() -> None:
    async with (
        NatsServer(JETSTREAM) as server,
        linked(server, delay=0.053) as link,
        pulsing(server.url, 1) as near,
        agents(server.url, 1) as (agent,),
        pulsing(link.url, 0) as far,
    ):
        distant = await far.start("--id", "distant")
        await until(lambda: "stands by - leader=pulse-1" in far.log(distant))
        await trio.sleep(6)
        assert leaders(agent) == ["pulse-1"]
        assert "metronome leads" not in far.log(distant)
        # It would take over if it had to.
        await near.kill("pulse-1")
        await until(lambda: leader(agent) == "distant")
        await agent.bb.sleep(4)
        agent.check()
        assert leaders(agent) == ["pulse-1", "distant"]
        assert len(grids(agent)) == 1


@guarded(90)
async def test_a_leaf_that_was_alone_yields_to_the_record() -> None:
    (port,) = free_ports(1)
    hub = NatsServer(JETSTREAM, config=f"leafnodes {{ listen: 127.0.0.1:{port} }}")
    remote = f'leafnodes {{ reconnect: 1, remotes: [{{ url: "nats-leaf://127.0.0.1:{port}" }}] }}'
    async with NatsServer(config=remote) as leaf, pulsing(leaf.url, 1) as outer:
        await until(lambda: "metronome leads" in outer.log("pulse-1"))
        assert "no JetStream" in outer.log("pulse-1")
        async with AsyncExitStack() as stack:
            (far,) = await stack.enter_async_context(agents(leaf.url, 1))
            await stack.enter_async_context(hub)
            inner = await stack.enter_async_context(pulsing(hub.url, 0))
            await inner.start("--id", "hub", "--bpm", "240")
            (near,) = await stack.enter_async_context(agents(hub.url, 1))
            # One leads, with the record, and everybody follows that one.
            await until(lambda: leader(near) == leader(far))
            await until(lambda: far.frames[-1][0].alone is not True)
            await trio.sleep(8)
            led, heard = len(leaders(near)), len(near.frames)
            await trio.sleep(3)
            assert leader(near) == leader(far)
            assert (len(leaders(near)), len(near.frames) > heard) == (led, True)
            assert near.bb.health().epoch == far.bb.health().epoch
            assert not any(agent.frames[-1][0].alone is True for agent in (near, far))
            assert abs(near.bb.current_position() - far.bb.current_position()) < 0.05
            transport = await stack.enter_async_context(connected(nats_url=hub.url))
            assert decode_record(await kept(transport)).leader_id == leader(near)


@guarded(120)
async def test_a_newcomer_on_an_empty_store_repeats_no_beat() -> None:
    async with NatsServer(JETSTREAM) as server, AsyncExitStack() as stack:
        link = await stack.enter_async_context(linked(server))
        one, _ = await stack.enter_async_context(metronome(link.url, "pulse-1"))
        await until(lambda: one.leads)
        everybody = await stack.enter_async_context(agents(server.url, 2))
        first = everybody[0]
        await until(lambda: len(first.beats) >= 8)
        (before,) = grids(first)
        link.cut()
        server.kill()
        shutil.rmtree(Path(server._folder.name, "js"))
        await server.start()
        # The living leader comes back only when the newcomer has looked around.
        two, _ = await stack.enter_async_context(metronome(server.url, "pulse-2"))
        await until(lambda: two.leads)
        await trio.sleep(1.0)
        link.mend()
        await until(lambda: not one.leads or not two.leads)
        await first.bb.sleep(8)
        assert one.leads is not two.leads
        # Agents remembered the grid, and so it went on.
        assert grids(first) == {before}
        for agent in everybody:
            agent.check()


@guarded(120)
async def test_a_leader_that_was_cut_off_looks_before_it_speaks() -> None:
    async with NatsServer(JETSTREAM) as server, AsyncExitStack() as stack:
        link = await stack.enter_async_context(linked(server))
        one, _ = await stack.enter_async_context(metronome(link.url, "pulse-1"))
        await until(lambda: one.leads)
        two, stop = await stack.enter_async_context(metronome(server.url, "pulse-2"))
        everybody = await stack.enter_async_context(agents(server.url, 2))
        first = everybody[0]
        await until(lambda: len(first.beats) >= 8)
        epoch = one.epoch
        link.cut()
        await until(lambda: two.leads)
        await first.bb.sleep(3)
        stop.cancel()
        await until(lambda: not two.leads)
        await trio.sleep(2.0)
        heard = len(first.frames)
        link.mend()
        await until(lambda: len(first.frames) > heard + 8)
        # It says nothing in its old term, which somebody else has ended.
        assert {frame.leader_id for frame, _ in first.frames[heard:]} == {"pulse-1"}
        assert all(frame.epoch > two.epoch > epoch for frame, _ in first.frames[heard:])
        assert len(grids(first)) == 1
        indices = [frame.beat_index for frame, _ in first.frames]
        assert indices == sorted(set(indices))
        for agent in everybody:
            agent.check()
