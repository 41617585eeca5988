"""Random schedules of faults: that they find what is wrong, and can be run again."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import clients
import clusters
import faults
import invariants
import msgspec
import processes
import pytest
import schedules
import server
import trio

import backbeat_trio as backbeat
from backbeat_trio._grid.grid import Grid
from backbeat_trio._runtime.runtime import Runtime
from backbeat_trio._time.beats import Beats
from backbeat_trio._transport import jetstream as _jetstream, nats as _nats
from backbeat_trio._transport.store import Conflict
from backbeat_trio._wire import Record, Segment, decode_frame, decode_record, encode

FOLDER = Path(processes.__file__).parent
SECOND = processes.SECOND
FRAMES = "backbeat.beat.simulated"
Main = Callable[[Any, Any], Awaitable[None]]


def make(
    *happening: Any, pulses: int = 1, agents: int = 2, seconds: float = 20.0, apart: float = 0.5
) -> Any:
    """Make a schedule in which nothing happens but what is named."""
    names = [f"pulse-{n}" for n in range(pulses)] + [f"agent-{n}" for n in range(agents)]
    return faults.Schedule(
        seed=1,
        bpm=120.0,
        beats_per_bar=4,
        nodes=tuple(faults.Node(name, at=apart * n) for n, name in enumerate(names)),
        faults=tuple(happening),
        seconds=seconds,
    )


def broken(schedule: Any, **options: Any) -> set[str]:
    """Run a schedule, and return the rules that broke."""
    return {found.rule for found in clusters.run(schedule, **options).violations}


# Schedules.


def test_random_schedules_break_no_rule(tmp_path: Path) -> None:
    # Not measured: that makes each of them four times as slow, and other tests run the same code.
    results = tmp_path / "results.json"
    program = run_program("--quick", "--keep-going", "--json", str(results), measured=False)
    assert program.returncode == 0, program.stdout
    assert msgspec.json.decode(results.read_bytes())["seeds"] == []
    assert "200" in program.stdout


def test_a_schedule_without_faults_breaks_no_rule() -> None:
    result = clusters.run(make(pulses=2, agents=3), keep=True)
    assert not result.violations
    # From the first second or so on, two a second.
    assert 90 < result.frames < 110
    assert any("agent-2: beat 30 0 120" in line for line in result.trace)


def test_a_dead_leader_is_replaced_and_no_beat_is_lost() -> None:
    result = clusters.run(make(faults.Kill(10.1, "pulse-0", 2.0), pulses=2), keep=True)
    assert not result.violations
    assert any("pulse-0: metronome leads" in line for line in result.trace)
    assert any("pulse-1: takes over from pulse-0: its process is gone" in x for x in result.trace)
    assert any("pulse-0#1: stands by" in line for line in result.trace)


@pytest.mark.parametrize(("way_ms", "least", "most"), [(0.5, 9.5, 12), (100.0, 607.5, 612)])
@pytest.mark.parametrize("joins_at", [0.5, 10.0])
def test_a_takeover_takes_few_round_trips(
    joins_at: float, way_ms: float, least: float, most: float
) -> None:
    # One to learn that the leader is gone, and one to write the record. Reading the record takes a
    # third one, but a standby near the server does that while the frame is not late yet. A standby
    # that joins while somebody leads knows the round trip from pings alone.
    nodes = (
        faults.Node("pulse-0"),
        faults.Node("pulse-1", at=joins_at, up_ms=way_ms, down_ms=way_ms),
        faults.Node("agent-0", at=1.0),
    )
    schedule = make(faults.Kill(15.1, "pulse-0", 9.0))
    schedule = msgspec.structs.replace(schedule, bpm=30.0, nodes=nodes)
    result = clusters.run(schedule, keep=True)
    assert not result.violations
    line = next(line for line in result.trace if "pulse-1: takes over from pulse-0" in line)
    assert "its process is gone" in line
    # After 8 ms a frame is late.
    assert least < float(line.split(", ")[-1].split()[0]) < most


def test_agents_that_hold_their_positions_have_time_until_the_grid_reaches_them() -> None:
    # The leader's clock stops for 15 s, and then the grid is paused before it reaches the agents.
    schedule = make(faults.Suspend(5.0, "pulse-0", 15.0), faults.Pause(19.5, "agent-0"))
    result = clusters.run(schedule, keep=True)
    assert not result.violations
    stopped = next(line for line in result.trace if "integration stopped" in line)
    assert float(stopped.split()[0]) > schedule.seconds + schedule.quiet + 4


def test_agents_may_be_apart_at_the_instant_at_which_the_tempo_changes() -> None:
    schedule = make(faults.Change(19.0, "agent-0", 20.0, over=32))
    # Nobody can tell a longer way from a longer way back.
    pulse, near, far = schedule.nodes
    far = msgspec.structs.replace(far, up_ms=40.0)
    schedule = msgspec.structs.replace(schedule, nodes=(pulse, near, far))
    trace = clusters.run(schedule, keep=True).trace
    steps = sorted(float(line.split()[0]) for line in trace if ": beat 71 " in line)
    assert 0.01 < steps[1] - steps[0] < 0.03
    # The schedule ends when some agents have come to a step of the ramp, and others have not.
    seconds = (steps[0] + steps[-1]) / 2 - schedule.quiet
    assert not broken(msgspec.structs.replace(schedule, seconds=seconds))


@pytest.mark.parametrize("at", [0.1, 0.5])
def test_an_agent_far_away_locks_by_pings_within_seconds(at: float) -> None:
    # Its round trip to the leader takes 0.76 s, in which two frames come. If it were locked by
    # these alone, it would be 0.38 s behind until pings are answered.
    nodes = (
        faults.Node("pulse-0", up_ms=123.0, down_ms=116.0),
        faults.Node("agent-0", at=at, up_ms=270.0, down_ms=252.0),
    )
    schedule = msgspec.structs.replace(make(seconds=8.0), bpm=182.0, nodes=nodes)
    trace = clusters.run(schedule, keep=True).trace
    locked = next(n for n, line in enumerate(trace) if "locked to the grid" in line)
    assert float(trace[locked].split()[0]) < 9
    beats = [float(line.split()[0]) for line in trace[locked:] if "agent-0: beat" in line]
    pauses = [after - before for before, after in itertools.pairwise(beats)]
    assert all(abs(pause - 60 / 182) < 0.005 for pause in pauses)


def test_agents_that_cannot_hear_the_leader_have_time_to_come_back_into_line_afterwards() -> None:
    # The leader's clock jumps while the agent is cut off. When the agent is back, the leader hears
    # no pings. Frames alone move nobody so far.
    jump, cut = faults.ClockJump(9.0, "pulse-0", 2.5), faults.Cut(8.0, "agent-1", 5.0)
    deaf = faults.HalfOpen(13.3, "pulse-0", 15.0, "down")
    schedule = make(jump, cut, deaf, seconds=40.0)
    result = clusters.run(schedule, keep=True)
    assert not result.violations
    skipped = next(x for x in result.trace if "agent-1: beat" in x and int(x.split()[-2]) > 2)
    assert float(skipped.split()[0]) > 28
    watch = clusters.Cluster(schedule).watch
    times = [(20.0, 21.0), (41.0, 42.0), (43.0, 44.0)]
    heard = [watch.heard_all("agent-1", int(a * SECOND), int(b * SECOND)) for a, b in times]
    assert heard == [False, False, True]


# Each of these broke a rule once, and is the only one known for its cause.


@pytest.mark.parametrize(
    "seed",
    [
        167,
        2144,
        2193,
        2214,
        2457,
        2652,
        20103,
        20192,
        20237,
        31596,
        34374,
        41585,
        51390,
        51536,
        61031,
        61112,
        61964,
        75023,
        103954,
        202492,
        503222,
        516234,
    ],
)
def test_schedules_that_broke_a_rule_once(seed: int) -> None:
    assert not clusters.run(faults.draw(seed)).violations


# The same again.


@pytest.mark.parametrize("seed", [13, 19])
def test_the_same_seed_gives_the_same_trace(seed: int) -> None:
    one, two = (clusters.run(faults.draw(seed), keep=True) for _ in range(2))
    assert one == two
    assert len(one.trace) > 100
    assert one.digest != clusters.run(faults.draw(seed + 1)).digest


def test_two_interpreters_give_the_same_trace() -> None:
    told = [
        run_program("--seed", "7", "--trace", "--no-shrink", hashing=hashing).stdout
        for hashing in ("1", "2")
    ]
    assert told[0] == told[1]
    assert "metronome leads" in told[0]


def test_a_schedule_is_plain_data() -> None:
    for seed in range(100):
        schedule = faults.draw(seed)
        assert faults.decode(faults.encode(schedule)) == schedule
        names = {kind.__name__: kind for kind in (*faults.KINDS, faults.Schedule, faults.Node)}
        assert eval(repr(schedule), names) == schedule
    drawn = {type(fault) for seed in range(100) for fault in faults.draw(seed).faults}
    assert drawn == set(faults.KINDS)


def test_an_agent_whose_time_is_rounded_up_is_there_from_the_beginning() -> None:
    assert faults.draw(73603).nodes[-1].at == 1.0


# Processes.


def run_processes(seconds: float, *mains: Callable[[Any], Awaitable[None]]) -> list[Any]:
    world = processes.World(1)
    with world.patched():
        made = [
            processes.Process(world, processes.Machine(world, f"m{n}", ppm=200 * n), f"p{n}", main)
            for n, main in enumerate(mains)
        ]
        world.run(round(seconds * SECOND))
        for process in made:
            process.kill()
    return made


def test_each_process_has_its_own_clock() -> None:
    woken: dict[str, list[int]] = {"p0": [], "p1": []}

    async def main(process: Any) -> None:
        begun = trio.current_time()
        for second in range(1, 101):
            await trio.sleep_until(begun + second)
            woken[process.name].append(process.world.now)

    run_processes(101, main, main)
    # A clock that is 200 ppm too fast is 20 ms ahead by then; timers are late by 1 ms at most.
    assert 100 * SECOND < woken["p0"][-1] < 100.001 * SECOND
    assert 99.979 * SECOND < woken["p1"][-1] < 99.982 * SECOND


def test_a_stopped_process_fires_its_timers_late_and_all_at_once() -> None:
    woken = []

    async def main(process: Any) -> None:
        async with trio.open_nursery() as nursery:
            for second in range(1, 6):

                async def wait(second: int = second) -> None:
                    await trio.sleep(second)
                    woken.append(process.world.now / SECOND)

                nursery.start_soon(wait)

    world = processes.World(1)
    with world.patched():
        process = processes.Process(world, processes.Machine(world, "m"), "p", main)
        world.at(round(1.5 * SECOND), process.stop)
        world.at(round(4.5 * SECOND), process.go_on)
        world.run(10 * SECOND)
    assert process.ended
    assert [round(second, 2) for second in sorted(woken)] == [1.0, 4.5, 4.5, 4.5, 5.0]


def test_a_killed_process_ends_at_once_and_is_not_seen() -> None:
    unwound = []

    async def main(process: Any) -> None:
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(30)
            unwound.append((process.dead, process.world.now))

    assert all(process.ended for process in run_processes(3, main))
    assert unwound == [(True, 3 * SECOND)]


def test_a_killed_process_that_does_not_end_is_an_error() -> None:
    async def main(process: Any) -> None:
        with trio.CancelScope(shield=True):
            await trio.sleep_forever()

    with pytest.raises(processes.StuckError, match="does not end"):
        run_processes(1, main)


# The server.


def talk(*happening: Callable[[Any], None], asks: Main) -> Any:
    """Run a process that asks, beside one that answers on the subject ``there``."""

    async def answer(cluster: Any, process: Any) -> None:
        transport = cluster.transport(process)
        async with trio.open_nursery() as nursery:
            await nursery.start(transport.run)
            async with transport.open_subscription("there") as messages:
                async for message in messages:
                    transport.publish_nowait(message.reply, message.data)

    schedule = make(agents=1, seconds=10.0)
    cluster = clusters.Cluster(schedule, mains={"pulse-0": answer, "agent-0": asks})
    cluster.server.jetstream.on_write = lambda *args: None
    with cluster.world.patched():
        cluster._plan()
        for event in happening:
            event(cluster)
        cluster.world.run(30 * SECOND)
        for process in cluster._all:
            if process.error is not None:
                raise process.error
            process.kill()
    return cluster


async def open_client(cluster: Any, process: Any, nursery: trio.Nursery) -> Any:
    transport = cluster.transport(process)
    await nursery.start(transport.run)
    await transport.wait_connected()
    await trio.sleep(0.1)
    return transport


def test_requests_are_answered_or_fail_without_a_responder() -> None:
    told = []

    async def ask(cluster: Any, process: Any) -> None:
        async with trio.open_nursery() as nursery:
            transport = await open_client(cluster, process, nursery)
            reply = await transport.request("there", b"hello", timeout=1)
            told.append(reply.data)
            # Four ways of 0.2 ms each, and some jitter.
            told.append(0.7e6 < reply.received_ns - reply.sent_ns < 2e6)
            with pytest.raises(backbeat.TransportBroken) as caught:
                await transport.request("nowhere", b"", timeout=1)
            told.append(type(caught.value).__name__)
            nursery.cancel_scope.cancel()

    talk(asks=ask)
    assert told == [b"hello", True, "NoResponders"]


@pytest.mark.parametrize("way", ["both", "up", "down"])
def test_half_open_connections_are_noticed_after_seconds(way: Any) -> None:
    times = []

    async def ask(cluster: Any, process: Any) -> None:
        async with trio.open_nursery() as nursery:
            transport = await open_client(cluster, process, nursery)
            await trio.sleep_until(trio.current_time() + 1)
            with pytest.raises(backbeat.TransportBroken, match="no answer on there"):
                await transport.request("there", b"", timeout=0.5)
            assert transport.connected
            await transport.wait_connected(False)
            times.append(process.world.now / SECOND)
            await transport.wait_connected()
            times.append(process.world.now / SECOND)
            await trio.sleep(1)
            assert (await transport.request("there", b"2", timeout=1)).data == b"2"
            nursery.cancel_scope.cancel()

    def tear(cluster: Any) -> None:
        cluster._at(1.0, cluster._begin, faults.HalfOpen(1.0, "agent-0", 6.0, way))

    talk(tear, asks=ask)
    assert 3 <= times[0] <= 4
    assert 7 <= times[1] < 11


def test_a_write_whose_answer_is_lost_is_stored() -> None:
    told: list[Any] = []

    async def ask(cluster: Any, process: Any) -> None:
        async with trio.open_nursery() as nursery:
            transport = await open_client(cluster, process, nursery)
            store = clients.SimulatedStore(transport)
            told.append(await store.write(b"one", 0))
            cluster.server.jetstream.begin("losing answers", 0.0)
            with pytest.raises(backbeat.TransportBroken):
                await store.write(b"two", 1)
            cluster.server.jetstream.end("losing answers", 0.0)
            with pytest.raises(Conflict):
                await store.write(b"three", 1)
            told.append(await store.read())
            nursery.cancel_scope.cancel()

    talk(asks=ask)
    assert told == [1, (b"two", 2)]


def test_clients_are_as_patient_as_the_real_ones() -> None:
    assert clients.BACKOFF_MIN == _nats._BACKOFF_MIN
    assert clients.BACKOFF_MAX == _nats._BACKOFF_MAX
    assert clients.PATIENCE == _jetstream._PATIENCE
    assert backbeat.BackbeatConfig().connect_timeout == clients.CONNECT_TIMEOUT
    assert server._DUPLICATES_NS == _jetstream._DUPLICATE_WINDOW * SECOND


# Each rule finds what was planted for it.


async def hear_frames(cluster: Any, process: Any, answer: Callable[[Any, int], Any]) -> None:
    """Publish what a function makes of each frame that is heard, and of its number."""
    transport = cluster.transport(process)
    async with trio.open_nursery() as nursery:
        await nursery.start(transport.run)
        await transport.wait_connected()
        async with transport.open_subscription(FRAMES) as messages:
            number = 0
            async for message in messages:
                frame = decode_frame(message.data)
                if frame.leader_id == "rogue":
                    continue
                number += 1
                made = answer(frame, number)
                if made is not None:
                    made = msgspec.structs.replace(made, leader_id="rogue")
                    transport.publish_nowait(FRAMES, encode(made))


def rogue(answer: Callable[[Any, int], Any]) -> dict[str, Main]:
    async def main(cluster: Any, process: Any) -> None:
        await hear_frames(cluster, process, answer)

    return {"pulse-1": main}


def with_rogue(answer: Callable[[Any, int], Any]) -> set[str]:
    schedule = make(pulses=2, agents=1)
    nodes = tuple(
        msgspec.structs.replace(node, at=5.0) if node.name == "pulse-1" else node
        for node in schedule.nodes
    )
    return broken(msgspec.structs.replace(schedule, nodes=nodes), mains=rogue(answer))


def plant_epochs(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    def write(self: Any, connection: Any, data: bytes, revision: int) -> int:
        self.entry = type(self.entry)(data, self.entry.revision + 1)
        self.on_write(connection.process, data, self.life)
        return int(self.entry.revision)

    # A store that compares nothing.
    monkeypatch.setattr(server.JetStream, "_write", write)
    return broken(make(pulses=3, apart=0.0))


def plant_two_leaders(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    return with_rogue(lambda frame, number: frame)


def plant_frames(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    def answer(frame: Any, number: int) -> Any:
        return msgspec.structs.replace(frame, epoch=900, beat_index=1000 - number)

    return with_rogue(answer)


def plant_look(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    return with_rogue(lambda frame, number: msgspec.structs.replace(frame, epoch=0))


def plant_beginning(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    def answer(frame: Any, number: int) -> Any:
        if number < 10:
            return None
        segment = Segment(900, 0, frame.beat_index, 10**15, 120_000)
        return msgspec.structs.replace(frame, epoch=900, segment=segment)

    return with_rogue(answer)


def plant_repeated_beat(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    real, calls = Beats.__anext__, dict[Beats, list[Any]]()

    async def again(self: Beats) -> Any:
        got = calls.setdefault(self, [])
        got.append(got[-1] if len(got) == 20 else await real(self))
        return got[-1]

    monkeypatch.setattr(Beats, "__anext__", again)
    return broken(make(agents=1))


def plant_lost_beat(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    real, calls = Beats.__anext__, Counter[Beats]()

    async def less(self: Beats) -> Any:
        calls[self] += 1
        if calls[self] == 20:
            await real(self)
        return await real(self)

    monkeypatch.setattr(Beats, "__anext__", less)
    return broken(make(agents=1))


def plant_back(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    real, calls = Grid.position_at, itertools.count()

    def position_at(self: Grid, local_ns: int) -> float:
        return float(real(self, local_ns) - (next(calls) > 200))

    monkeypatch.setattr(Grid, "position_at", position_at)
    return broken(make(agents=1))


def plant_granted_too_soon(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    real = backbeat.Session.set_tempo

    async def set_tempo(self: Any, bpm: float, **options: Any) -> int:
        return await real(self, bpm, **options) - 1

    monkeypatch.setattr(backbeat.Session, "set_tempo", set_tempo)
    return broken(make(faults.Change(15.0, "agent-0", 90.0), seconds=25.0))


def plant_granted_too_late(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    real = backbeat.Session.set_tempo

    async def set_tempo(self: Any, bpm: float, **options: Any) -> int:
        return await real(self, bpm, **options) + 1

    monkeypatch.setattr(backbeat.Session, "set_tempo", set_tempo)
    return broken(make(faults.Change(15.0, "agent-0", 90.0), seconds=25.0))


def plant_granted_and_not_done(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    async def set_tempo(self: Any, bpm: float, **options: Any) -> int:
        await trio.lowlevel.checkpoint()
        return int(self.current_beat()) + 5

    monkeypatch.setattr(backbeat.Session, "set_tempo", set_tempo)
    # Only the end tells: others may have replaced it.
    return broken(make(*(faults.Change(15.0 + n, "agent-0", 90.0 + n) for n in range(2))))


def plant_resumed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    async def resume(self: Any) -> int:
        await trio.lowlevel.checkpoint()
        return int(self.current_beat())

    monkeypatch.setattr(backbeat.Session, "resume", resume)
    return broken(make(faults.Pause(5.0, "agent-0"), faults.Resume(10.0, "agent-0")))


def plant_resume(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    async def resume(self: Any) -> int:
        await trio.lowlevel.checkpoint()
        raise backbeat.TempoRefused("it may not go on")

    monkeypatch.setattr(backbeat.Session, "resume", resume)
    return broken(make(faults.Pause(5.0, "agent-0")))


async def idle(cluster: Any, process: Any) -> None:
    await process.leaving.wait()


def plant_no_leader(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    return broken(make(agents=1), mains={"pulse-0": idle})


def plant_tempo(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    def tempo(self: Any) -> float:
        return 120.0 if self.config.agent_id == "agent-0" else 121.0

    monkeypatch.setattr(backbeat.Session, "tempo_bpm", property(tempo))
    return broken(make())


def plant_position(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    real = backbeat.Session.current_position
    # 10 ms.
    monkeypatch.setattr(backbeat.Session, "current_position", lambda self: real(self) + 0.02)
    return broken(make())


def plant_position_held_too_late(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    real = backbeat.Session.current_position

    def current_position(self: Any) -> float:
        position = real(self)
        # From 38 s on, when nothing has happened for long, it holds a position that is far ahead.
        return max(position, 95.0) if position > 75 else position

    monkeypatch.setattr(backbeat.Session, "current_position", current_position)
    return broken(make())


def plant_unrest(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    async def main(cluster: Any, process: Any) -> None:
        transport = cluster.transport(process)
        async with trio.open_nursery() as nursery:
            await nursery.start(transport.run)
            await transport.wait_connected()
            end = cluster.schedule.seconds + cluster.schedule.quiet
            await trio.sleep(end - process.world.now / SECOND - 3)
            store = clients.SimulatedStore(transport)
            entry = await store.read()
            record: Record = decode_record(entry.data)
            record = msgspec.structs.replace(record, epoch=record.epoch + 1, nonce="rogue")
            await store.write(encode(record), entry.revision)
            nursery.cancel_scope.cancel()
        await process.leaving.wait()

    return broken(make(pulses=2), mains={"pulse-1": main})


def plant_claim_twice(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    # A stream that does not know again what it has stored.
    monkeypatch.setattr(server, "_DUPLICATES_NS", 0)
    return broken(make(faults.StoreTrouble(5.0, 8.0, "losing answers")))


def plant_claim_lost(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    async def store(self: Any, subject: str, claims: Any) -> list[bool]:
        await trio.lowlevel.checkpoint()
        return [True] * len(claims)

    monkeypatch.setattr(clients.SimulatedJournal, "store", store)
    return broken(make())


def plant_hang_on_entering(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    async def start(self: Any, services: Any) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(Runtime, "start", start)
    return broken(make())


def plant_hang_on_leaving(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    async def main(cluster: Any, process: Any) -> None:
        await trio.sleep_forever()

    return broken(make(pulses=2), mains={"pulse-1": main})


def plant_exception(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    async def main(cluster: Any, process: Any) -> None:
        await trio.sleep(5)
        raise LookupError("this came out")

    return broken(make(pulses=2), mains={"pulse-1": main})


def plant_end(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    async def main(cluster: Any, process: Any) -> None:
        await trio.sleep(5)

    return broken(make(pulses=2), mains={"pulse-1": main})


def plant_endless_turns(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    async def main(cluster: Any, process: Any) -> None:
        while True:
            await trio.lowlevel.checkpoint()

    return broken(make(pulses=2), mains={"pulse-1": main})


def plant_many_turns(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    async def main(cluster: Any, process: Any) -> None:
        while process.world.now < 3 * SECOND:
            await trio.sleep(0.001)
            for _ in range(20):
                await trio.lowlevel.checkpoint()
        await process.leaving.wait()

    return broken(make(pulses=2, seconds=3.0), mains={"pulse-1": main})


PLANTED: dict[str, tuple[Callable[[pytest.MonkeyPatch], set[str]], ...]] = {
    "epochs": (plant_epochs, plant_two_leaders),
    "frames": (plant_frames,),
    "look": (plant_look,),
    "beginning": (plant_beginning,),
    "beats": (plant_repeated_beat, plant_lost_beat),
    "back": (plant_back,),
    "granted": (plant_granted_too_soon, plant_granted_too_late, plant_granted_and_not_done),
    "resumed": (plant_resumed,),
    "resume": (plant_resume,),
    "one leader": (plant_no_leader,),
    "one tempo": (plant_tempo,),
    "one position": (plant_position, plant_position_held_too_late),
    "calm": (plant_unrest,),
    "claims": (plant_claim_twice, plant_claim_lost),
    "hangs": (plant_hang_on_entering, plant_hang_on_leaving),
    "exceptions": (plant_exception, plant_end),
    "busy": (plant_endless_turns, plant_many_turns),
}


@pytest.mark.parametrize(
    ("rule", "plant"), [(rule, plant) for rule, plants in PLANTED.items() for plant in plants]
)
def test_a_rule_finds_a_planted_fault(
    rule: str, plant: Callable[[pytest.MonkeyPatch], set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert rule in plant(monkeypatch)


def test_each_rule_has_a_planted_fault() -> None:
    assert set(PLANTED) == set(invariants.RULES)


# Shrinking, and the program.


def test_a_schedule_is_shrunk_to_the_faults_that_are_needed() -> None:
    schedule = next(
        drawn
        for drawn in map(faults.draw, range(1000))
        if len(drawn.faults) > 8
        and any(isinstance(fault, faults.Cut) for fault in drawn.faults)
        and any(isinstance(fault, faults.Pause) for fault in drawn.faults)
    )

    def breaks(candidate: Any) -> bool:
        kinds = {type(fault) for fault in candidate.faults}
        return {faults.Cut, faults.Pause} <= kinds

    shrunk = schedules.shrink(schedule, breaks)
    assert [type(fault) for fault in shrunk.faults].count(faults.Cut) == 1
    assert len(shrunk.faults) == 2
    assert {node.leads for node in shrunk.nodes} == {True, False}
    assert all(node == faults.Node(node.name) for node in shrunk.nodes)
    assert shrunk.seconds < schedule.seconds


def test_a_shrunk_schedule_breaks_the_same_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    real = backbeat.Session.current_position
    monkeypatch.setattr(backbeat.Session, "current_position", lambda self: real(self) + 0.02)
    schedule = make(faults.Cut(3.0, "agent-0", 1.0), pulses=2)
    shrunk = schedules.shrink(schedule, schedules.breaks("one position"), runs=30)
    assert not shrunk.faults
    assert len(shrunk.nodes) == 2
    assert "one position" in broken(shrunk)


def run_program(
    *arguments: str, hashing: str = "0", measured: bool = True
) -> subprocess.CompletedProcess[str]:
    # A program finds the modules beside it in its folder, which a safe path leaves out.
    environment = os.environ | {"PYTHONSAFEPATH": "", "PYTHONHASHSEED": hashing}
    if not measured:
        environment.pop("COVERAGE_PROCESS_CONFIG", None)
    return subprocess.run(
        # It keeps all cores busy for minutes, and other tests that run meanwhile measure time.
        ["nice", "-n", "19", sys.executable, str(FOLDER / "schedules.py"), *arguments],
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=900,
    )


def test_the_program_prints_figures_and_fails_if_a_rule_is_broken(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    program = run_program("--count", "4", "--seed", "4", "--jobs", "2", "--json", str(results))
    assert "random schedules without a violation" in program.stdout
    assert "schedules a minute" in program.stdout
    told = msgspec.json.decode(results.read_bytes())
    assert program.returncode == int(bool(told["seeds"]))


def test_the_program_runs_a_stored_schedule_again(tmp_path: Path) -> None:
    stored = tmp_path / "schedule.json"
    stored.write_bytes(faults.encode(make(faults.Kill(10.1, "pulse-0", 2.0), pulses=2)))
    program = run_program("--replay", str(stored), "--trace")
    assert program.returncode == 0, program.stdout[-2000:]
    assert "takes over from pulse-0" in program.stdout
    assert "nothing was violated" in program.stdout
