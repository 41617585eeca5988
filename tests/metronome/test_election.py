"""Leading and standing by, in virtual time, with a record in memory that can be made to fail."""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

import backbeat_trio as backbeat
from backbeat_trio._grid.steering import MIN_STEP_NS
from backbeat_trio._grid.timeline import Timeline
from backbeat_trio._metronome.standby import Standby
from backbeat_trio._time.local import local_ns
from backbeat_trio._transport.store import Conflict, Entry
from backbeat_trio._wire import (
    BeatFrame,
    Probe,
    RecallRequest,
    Segment,
    SyncRequest,
    decode_frame,
    decode_recall_reply,
    decode_record,
    decode_tempo_reply,
    encode,
    lead_subject,
    recall_subject,
    tempo_subject,
)
from backbeat_trio.testing import CLUSTER_ID, open_session

Clock = trio.testing.MockClock


class Memory:
    """The store that all metronomes share."""

    def __init__(self) -> None:
        self.entry = Entry(b"", 0)
        self.available = True
        self.answering = True
        self.losing = False
        self.delay = 0.0004
        self.writes = 0

    async def open(self) -> bool:
        await trio.sleep(self.delay)
        if not self.answering:
            await trio.sleep(1.0)
            raise backbeat.TransportBroken("no answer")
        return self.available

    async def read(self) -> Entry:
        await trio.sleep(self.delay)
        if not self.answering:
            await trio.sleep(1.0)
            raise backbeat.TransportBroken("no answer")
        return self.entry

    async def write(self, data: bytes, revision: int) -> int:
        await trio.sleep(self.delay)
        if not self.answering:
            await trio.sleep(1.0)
            raise backbeat.TransportBroken("no answer")
        if revision != self.entry.revision:
            raise Conflict("written by somebody else")
        self.entry = Entry(data, revision + 1)
        self.writes += 1
        if self.losing:
            raise backbeat.TransportBroken("the answer was lost")
        return revision + 1


class Reached:
    """The store as one metronome reaches it: over its connection."""

    def __init__(self, cluster: Cluster, transport: backbeat.MemoryTransport) -> None:
        self.over_another_way = False
        self._cluster = cluster
        self._transport = transport

    async def _reach(self) -> Memory:
        if not (self._transport.connected or self.over_another_way):
            await trio.lowlevel.checkpoint()
            raise backbeat.TransportBroken("there is no connection")
        return self._cluster.store

    async def open(self) -> bool:
        return await (await self._reach()).open()

    async def read(self) -> Entry:
        return await (await self._reach()).read()

    async def write(self, data: bytes, revision: int) -> int:
        return await (await self._reach()).write(data, revision)


class Pulse:
    """A metronome with its own connection, which can be killed."""

    def __init__(self, cluster: Cluster, name: str, bpm: float) -> None:
        self.transport = backbeat.MemoryTransport(cluster.bus)
        self.store = Reached(cluster, self.transport)
        self.metronome = backbeat.Metronome(
            self.transport,
            cluster_id=CLUSTER_ID,
            leader_id=name,
            tempo_bpm=bpm,
            store=self.store,
        )
        self.scope = trio.CancelScope()

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        with self.scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(self.transport.run)
                await nursery.start(self.metronome.run)
                task_status.started()

    @property
    def leads(self) -> bool:
        return self.metronome.leads

    def leads_now(self) -> bool:
        return self.leads


class Cluster:
    def __init__(self, nursery: trio.Nursery) -> None:
        self.bus = backbeat.MemoryBus()
        self.store = Memory()
        self.frames: list[tuple[float, BeatFrame]] = []
        self.transport = backbeat.MemoryTransport(self.bus)
        self.nursery = nursery

    async def start(self, name: str, bpm: float = 60.0) -> Pulse:
        pulse = Pulse(self, name, bpm)
        await self.nursery.start(pulse.run)
        return pulse

    async def listen(self, task_status: trio.TaskStatus[None]) -> None:
        async with self.transport.open_subscription(f"backbeat.beat.{CLUSTER_ID}") as messages:
            task_status.started()
            async for message in messages:
                self.frames.append((trio.current_time(), decode_frame(message.data)))

    async def wait_until(self, predicate: Callable[[], bool]) -> None:
        with trio.fail_after(100):
            while not predicate():
                await trio.sleep(0.001)

    def indices(self) -> list[int]:
        return [frame.beat_index for _, frame in self.frames]


@asynccontextmanager
async def cluster(
    number: int = 2, bpm: float = 60.0
) -> AsyncGenerator[tuple[Cluster, list[Pulse]], None]:
    async with trio.open_nursery() as nursery:
        made = Cluster(nursery)
        await nursery.start(made.transport.run)
        await nursery.start(made.listen)
        pulses = [await made.start("pulse-0", bpm)]
        await made.wait_until(pulses[0].leads_now)
        await trio.sleep(0.1)
        pulses += [await made.start(f"pulse-{n}") for n in range(1, number)]
        await trio.sleep(3.4)
        yield made, pulses
        nursery.cancel_scope.cancel()


def set_wall_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the wall clock follow the test's own clock."""
    clock = trio.lowlevel.current_clock()
    monkeypatch.setattr("time.time_ns", lambda: round((clock.current_time() + 10**9) * 1e9))


async def test_one_leads_and_the_others_follow(autojump_clock: Clock) -> None:
    async with cluster(5) as (made, pulses):
        assert [pulse.leads for pulse in pulses].count(True) == 1
        assert all(pulse.metronome.stands_by != pulse.leads for pulse in pulses)
        assert made.indices() == [0, 1, 2, 3]
        assert all(pulse.metronome.statistics().takeovers == pulse.leads for pulse in pulses)
        with pytest.raises(backbeat.MetronomeUnavailable, match="does not lead"):
            await next(p for p in pulses if not p.leads).metronome.change_tempo(120)


async def test_a_dead_leader_is_replaced_at_once_in_the_same_cluster_time(
    autojump_clock: Clock,
) -> None:
    async with cluster(2) as (made, (one, two)), open_session(made.bus) as bb:
        assert one.leads
        assert two.metronome.stands_by
        begun = made.frames[0][0]
        one.scope.cancel()
        await trio.sleep(3)
        assert two.leads
        assert not two.metronome.stands_by
        assert made.indices() == [0, 1, 2, 3, 4, 5, 6]
        lateness = [at - begun - frame.beat_index for at, frame in made.frames]
        assert 0.008 <= lateness[4] - lateness[3] < 0.012
        assert lateness[5] == pytest.approx(lateness[3], abs=1e-6)
        assert made.frames[3][1].epoch < made.frames[4][1].epoch
        assert bb.statistics().locks == 1
        assert bb.current_beat() == 6
        record = decode_record(made.store.entry.data)
        assert record.epoch == two.metronome.epoch == bb.health().epoch
        assert record.leader_id == bb.health().leader_id == "pulse-1"


@pytest.fixture
def standbys(monkeypatch: pytest.MonkeyPatch) -> list[Standby]:
    """Whoever has begun to stand by."""
    noted: list[Standby] = []
    follow = Standby.follow

    async def note(standby: Standby, *, task_status: trio.TaskStatus[None]) -> None:
        noted.append(standby)
        await follow(standby, task_status=task_status)

    monkeypatch.setattr(Standby, "follow", note)
    return noted


async def test_a_standby_whose_clock_is_still_corrected_takes_over_in_the_measured_time(
    autojump_clock: Clock, standbys: list[Standby]
) -> None:
    # A beat lasts 15 s, so an error of 2 s is slewed, which takes 25 s.
    async with cluster(2, bpm=4.0) as (made, (one, two)):
        assert one.leads
        grid, now = standbys[-1]._clock.grid, local_ns()
        measured = grid.steering.target_at(now)
        grid.steering.step(measured + 2 * 10**9, at_ns=now)
        grid.steer(measured, now)
        one.scope.cancel()
        await made.wait_until(two.leads_now)
        leader = two.metronome._leader
        assert leader is not None
        now = local_ns()
        assert abs(leader.cluster_ns(now) - now - measured) < 10**6
        assert leader.steering.rate_at(now) == pytest.approx(1, abs=0.001)
        assert leader.present_term().uncertainty_ns < 10**9
        await trio.sleep(20)
        assert made.indices() == [0, 1, 2]
        begun = made.frames[0][0]
        lateness = [at - begun - 15 * frame.beat_index for at, frame in made.frames]
        assert lateness == pytest.approx([0, 0, 0], abs=0.02)


async def test_a_standby_that_could_not_measure_cluster_time_says_so_as_leader(
    autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = backbeat.MemoryTransport.request

    async def without_pings(
        transport: backbeat.MemoryTransport, subject: str, data: bytes, **options: Any
    ) -> backbeat.Reply:
        if subject.startswith("backbeat.sync."):
            raise backbeat.PermissionDenied("no pings")
        return await request(transport, subject, data, **options)

    monkeypatch.setattr(backbeat.MemoryTransport, "request", without_pings)
    async with cluster(2) as (made, (one, two)):
        # It is locked by frames alone.
        await made.wait_until(lambda: two.metronome.stands_by)
        one.scope.cancel()
        await made.wait_until(two.leads_now)
        leader = two.metronome._leader
        assert leader is not None
        assert leader.present_term().uncertainty_ns == MIN_STEP_NS


@pytest.mark.parametrize("remembered", [True, False])
async def test_a_standby_whose_clock_stopped_does_not_take_over_in_the_past(
    autojump_clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    standbys: list[Standby],
    remembered: bool,
) -> None:
    set_wall_clock(monkeypatch)
    async with (
        cluster(2, bpm=240) as (made, (one, two)),
        open_session(made.bus, answer_recalls=remembered) as bb,
    ):
        begun = made.frames[0][0]
        # The leader is heard by nobody any more, and still writes the record.
        one.transport.publish_nowait = lambda *_, **__: None  # type: ignore[method-assign]
        # To a machine that is suspended, it looks as if no time had passed.
        grid, now = standbys[-1]._clock.grid, local_ns()
        grid.steering.step(grid.steering.target_at(now) - 5 * 10**9, at_ns=now)
        await made.wait_until(two.leads_now)
        await trio.sleep(2)
        indices = made.indices()
        assert indices == sorted(set(indices))
        assert bb.current_beat() - indices[-1] in (0, 1)
        assert bb.statistics().locks == (1 if remembered else 2)
        if remembered:
            assert made.frames[-1][0] == pytest.approx(begun + indices[-1] / 4, abs=0.001)


async def test_a_lost_frame_makes_a_standby_probe_and_nothing_else(autojump_clock: Clock) -> None:
    async with cluster(2) as (made, (one, two)):
        # All the others miss the frame, too.
        leader = one.metronome._leader
        assert leader is not None
        leader.sent += 1
        await trio.sleep(4)
        assert made.indices() == [0, 1, 2, 3, 5, 6, 7]
        assert one.leads
        assert two.metronome.statistics().probes == 1


async def test_a_silent_leader_keeps_its_lease(autojump_clock: Clock) -> None:
    async with cluster(2) as (_, (one, two)):
        # It is silent, but its process is there: its subscriptions are found.
        one.transport.publish_nowait = lambda *_, **__: None  # type: ignore[method-assign]
        await trio.sleep(2.4)
        assert not two.leads
        await trio.sleep(0.3)
        assert two.leads
        # It hears the new leader, and looks at the record.
        await trio.sleep(2)
        assert not one.leads
        assert one.metronome.statistics().deposed == 1


async def test_a_standby_that_was_late_itself_waits(autojump_clock: Clock) -> None:
    async with cluster(2) as (_, (one, two)):
        # To a loop that was suspended, it looks as if the clock had jumped.
        autojump_clock.jump(2.0)
        await trio.sleep(3)
        assert one.leads
        assert not two.leads


async def test_no_standby_takes_over_while_the_store_is_out_of_reach(autojump_clock: Clock) -> None:
    async with cluster(2) as (made, (one, two)), open_session(made.bus) as bb:
        made.store.answering = False
        one.scope.cancel()
        await trio.sleep(5)
        assert not two.leads
        assert bb.health().local_degradation
        beat = bb.current_beat()
        made.store.answering = True
        await trio.sleep(3)
        assert two.leads
        # The cluster time is the same: only frames were missing.
        assert bb.current_beat() == beat + 3
        assert bb.statistics().locks == 1
        assert not bb.health().local_degradation


async def test_a_write_whose_answer_is_lost_is_read_back(autojump_clock: Clock) -> None:
    async with cluster(2) as (made, (one, two)):
        made.store.losing = True
        one.scope.cancel()
        await trio.sleep(2)
        made.store.losing = False
        await trio.sleep(2)
        assert two.leads
        assert decode_record(made.store.entry.data).epoch == two.metronome.epoch


async def test_a_leader_whose_store_fails_beats_on_and_refuses_changes(
    autojump_clock: Clock,
) -> None:
    async with cluster(1) as (made, (one,)), open_session(made.bus) as bb:
        made.store.answering = False
        with pytest.raises(backbeat.TempoRefused, match="could not be committed"):
            await bb.set_tempo(120)
        frames = len(made.frames)
        await trio.sleep(10)
        assert len(made.frames) == frames + 10
        assert one.metronome.statistics().commits_failed >= 2
        made.store.answering = True
        await trio.sleep(3)
        beat = await bb.set_tempo(120)
        await bb.sleep_until(beat)
        assert bb.tempo_bpm == 120


async def test_a_refused_change_that_was_stored_is_overwritten(autojump_clock: Clock) -> None:
    async with cluster(1) as (made, (one,)):
        made.store.losing = True
        with pytest.raises(backbeat.TempoRefused, match="the answer was lost"):
            await one.metronome.change_tempo(480)
        made.store.losing = False
        assert b"480000" in made.store.entry.data
        await trio.sleep(0.5)
        assert b"480000" not in made.store.entry.data
        assert one.leads


async def test_an_unreadable_record_is_overwritten(autojump_clock: Clock) -> None:
    async with cluster(2) as (made, (one, two)):
        epoch = one.metronome.epoch
        for rubbish in (b"\xff", b"{}", made.store.entry.data.replace(b"test-cluster", b"another")):
            made.store.entry = Entry(rubbish, made.store.entry.revision + 1)
            # The record is written once a bar.
            await trio.sleep(8)
            assert decode_record(made.store.entry.data).cluster_id == CLUSTER_ID
        made.store.entry = Entry(b"rubbish", made.store.entry.revision + 1)
        one.scope.cancel()
        await trio.sleep(2)
        assert two.leads
        assert two.metronome.epoch > epoch


async def test_a_deleted_record_is_written_again_with_the_same_grid(autojump_clock: Clock) -> None:
    async with cluster(1) as (made, (one,)), open_session(made.bus) as bb:
        before = decode_record(made.store.entry.data)
        made.store.entry = Entry(b"", 0)
        three = await made.start("pulse-3")
        await trio.sleep(8)
        after = decode_record(made.store.entry.data)
        assert (after.nonce, after.incarnation) == (before.nonce, before.incarnation)
        assert one.leads
        assert not three.leads
        one.scope.cancel()
        await trio.sleep(2)
        assert three.leads
        assert bb.statistics().locks == 1


async def test_a_forged_frame_makes_a_leader_read_the_record_and_nothing_else(
    autojump_clock: Clock,
) -> None:
    async with cluster(2) as (made, (one, two)), open_session(made.bus) as bb:
        await trio.sleep(0.2)
        leader = one.metronome._leader
        assert leader is not None
        for number in range(20):
            frame = leader.frame(bb.current_beat())
            forged = encode(
                msgspec.structs.replace(frame, epoch=10**12 + number, leader_id="forger")
            )
            made.transport.publish_nowait(f"backbeat.beat.{CLUSTER_ID}", forged)
            await trio.sleep(0.25)
        assert one.leads
        assert not two.leads
        assert one.metronome.statistics().frames_foreign == 20
        # Agents have pinged the leader, do not believe the frame, and report it.
        assert bb.health().leader_id == "pulse-0"
        assert bb.statistics().frames_unexplained >= 5
        assert any("did not confirm" in error for error in bb.health().errors)
        probe = encode(Probe(CLUSTER_ID, 10**13, "forger"))
        subject = lead_subject(CLUSTER_ID, one.metronome.epoch)
        await made.transport.request(subject, probe, timeout=1)
        await trio.sleep(2)
        assert one.leads


async def test_a_grid_that_no_process_remembers_begins_anew_and_repeats_no_beat(
    autojump_clock: Clock,
) -> None:
    async with cluster(1) as (made, (one,)):
        await trio.sleep(20)
        last = made.frames[-1][1]
        one.scope.cancel()
        await trio.sleep(4.5)
        await made.start("pulse-9", bpm=999)
        await trio.sleep(4.3)
        assert made.indices()[-1] > last.beat_index
        assert made.frames[-1][1].segment.beat0 > last.beat_index
        # The tempo is that of the record, and not that of the new metronome.
        assert made.frames[-1][1].tempo_bpm == 60
        assert made.frames[-1][1].incarnation != last.incarnation
        assert made.indices() == sorted(set(made.indices()))


@pytest.mark.parametrize(
    ("away", "agent_id"),
    [(0.5, "agent"), (4.5, "agent"), (4.5, "pulse-9"), (60.0, "agent"), (3600.0, "agent")],
)
async def test_one_agent_that_remembers_the_grid_is_enough_to_continue_it(
    autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch, away: float, agent_id: str
) -> None:
    set_wall_clock(monkeypatch)
    async with cluster(1) as (made, (one,)), open_session(made.bus, agent_id=agent_id) as bb:
        await trio.sleep(20)
        last, begun = made.frames[-1][1], made.frames[0][0]
        heard: list[int] = []

        async def count() -> None:
            async for beat in bb.beats():
                heard.append(beat.index)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(count)
            with bb.move_on_after(1e6) as scope:
                one.scope.cancel()
                await trio.sleep(away)
                left, before = scope.beats_left, trio.current_time()
                nine = await made.start("pulse-9", bpm=999)
                await trio.sleep(6.3)
                passed = trio.current_time() - before
                assert scope.beats_left == pytest.approx(left - passed, abs=1e-3)
            nursery.cancel_scope.cancel()
        assert nine.leads
        assert made.frames[-1][1].incarnation == last.incarnation
        assert made.frames[-1][1].epoch > last.epoch
        assert made.frames[-1][0] - begun == pytest.approx(made.indices()[-1], abs=1e-3)
        assert made.indices() == sorted(set(made.indices()))
        assert heard == list(range(heard[0], heard[-1] + 1))
        assert bb.statistics().locks == 1


async def test_a_recall_is_answered_by_an_agent_that_locks_soon_afterwards(
    autojump_clock: Clock,
) -> None:
    async with trio.open_nursery() as nursery:
        made, heard = Cluster(nursery), []
        await nursery.start(made.transport.run)

        async def recall() -> None:
            request = encode(RecallRequest(CLUSTER_ID, "newcomer"))
            subject, begun = recall_subject(CLUSTER_ID), trio.current_time()
            async with made.transport.open_request(subject, request) as answers:
                with trio.move_on_after(1.5):
                    async for answer in answers:
                        reply = decode_recall_reply(answer.data)
                        heard.append((begun, reply.agent_id, reply.role))

        async with open_session(made.bus, agent_id="agent", lock_timeout=0) as bb:
            assert bb.health().grid == "local"
            pulse = await made.start("pulse-0")
            # A grid begins after a second in which nobody answers.
            nursery.start_soon(recall)
            await trio.sleep(0.9)
            begun = trio.current_time()
            await recall()
            assert pulse.leads
            assert bb.health().grid == "locked"
        assert heard == [(begun, "agent", "agent")]
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("after", [0.1, 0.3, 0.75])
async def test_an_agent_that_comes_back_while_a_newcomer_asks_is_asked_too(
    autojump_clock: Clock, after: float
) -> None:
    async with cluster(1) as (made, (one,)):
        away = backbeat.MemoryTransport(made.bus)
        async with (
            open_session(transport=away, agent_id="away") as bb,
            # Somebody who does not know the grid: the server does not refuse the recall at once.
            made.transport.open_subscription(recall_subject(CLUSTER_ID)) as recalls,
        ):
            await trio.sleep(10)
            away.sever()
            one.scope.cancel()
            made.store.entry = Entry(b"", 0)
            await trio.sleep(5)
            two = await made.start("pulse-9")
            await anext(recalls)
            await trio.sleep(after)
            assert not two.leads
            away.restore()
            await made.wait_until(two.leads_now)
            await bb.sleep(3)
            assert len({frame.incarnation for _, frame in made.frames}) == 1
            assert made.indices() == sorted(set(made.indices()))
            assert bb.statistics().locks == 1


@pytest.mark.parametrize("standby_id", ["pulse-1", "pulse-0"])
async def test_a_newcomers_recall_makes_a_standby_take_over_first(
    autojump_clock: Clock, standby_id: str
) -> None:
    # At 2 BPM the next frame may be due in half a minute.
    async with trio.open_nursery() as nursery:
        made = Cluster(nursery)
        await nursery.start(made.transport.run)
        await nursery.start(made.listen)
        one = await made.start("pulse-0", bpm=2.0)
        await trio.sleep(40)
        two = await made.start(standby_id, bpm=2.0)
        await trio.sleep(5)
        one.scope.cancel()
        await trio.sleep(1.6)
        again = await made.start("pulse-0", bpm=2.0)
        await trio.sleep(1.0)
        assert (two.leads, again.leads) == (True, False)
        await trio.sleep(200)
        assert (two.leads, again.leads) == (True, False)
        assert made.indices() == list(range(len(made.indices())))
        assert len({frame.incarnation for _, frame in made.frames}) == 1
        nursery.cancel_scope.cancel()


async def test_one_wrong_answer_among_several_agents_changes_nothing(autojump_clock: Clock) -> None:
    async with cluster(1) as (made, (one,)), AsyncExitStack() as stack:
        sessions = [
            await stack.enter_async_context(open_session(made.bus, agent_id=f"agent-{n}"))
            for n in range(3)
        ]
        await trio.sleep(5)
        begun, incarnation = made.frames[0][0], made.frames[0][1].incarnation
        one.scope.cancel()
        await trio.sleep(5)
        lies = sessions[0]._runtime.clock.grid
        lies.steering.step(lies.steering.target_at(0) + 20_000_000_000)
        await made.start("pulse-9")
        await trio.sleep(10)
        assert made.frames[-1][1].incarnation == incarnation
        assert made.frames[-1][0] - begun == pytest.approx(made.indices()[-1], abs=1e-3)
        assert made.indices() == sorted(set(made.indices()))


@pytest.mark.parametrize("lie", ["tempo", "change", "bars", "time"])
async def test_a_lone_agent_that_lies_does_not_change_what_the_record_says(
    autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch, lie: str
) -> None:
    set_wall_clock(monkeypatch)
    async with cluster(1, bpm=300) as (made, (one,)), open_session(made.bus) as bb:
        await trio.sleep(20)
        one.scope.cancel()
        await trio.sleep(1)
        grid = bb._runtime.clock.grid
        segment = grid.timeline.segments[0]
        if lie == "tempo":
            faster = Segment(segment.epoch, 9, segment.beat0 + 5, segment.t0_ns + 1, 6_000_000)
            grid.timeline = Timeline((faster,))
        elif lie == "change":
            beat = bb.current_beat() + 5
            grid.timeline = grid.timeline.change(6_000_000, beat, epoch=segment.epoch)
        elif lie == "bars":
            grid.beats_per_bar = 77
        else:
            grid.steering.step(grid.steering.target_at(0) - 15_000_000_000)
        await made.start("pulse-9")
        await trio.sleep(10)
        frames = [frame for _, frame in made.frames]
        assert {frame.tempo_bpm for frame in frames} == {300}
        assert {frame.beats_per_bar for frame in frames} == {8}
        assert made.indices() == sorted(set(made.indices()))
        # Whoever lies about the time is not believed, and another grid begins.
        assert len({frame.incarnation for frame in frames}) == (2 if lie == "time" else 1)


async def test_the_time_of_the_agents_is_awaited_if_that_of_the_record_is_later(
    autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The clock of a leader that died jumped ahead, which no agent believed by then.
    set_wall_clock(monkeypatch)
    async with cluster(1) as (made, (one,)), open_session(made.bus) as bb:
        await trio.sleep(20)
        one.scope.cancel()
        before, begun = made.frames[-1][1], made.frames[0][0]
        record = decode_record(made.store.entry.data)
        assert record.written_ns is not None
        made.store.entry = Entry(
            encode(msgspec.structs.replace(record, written_ns=record.written_ns + 12 * 10**9)), 99
        )
        nine = await made.start("pulse-9")
        await trio.sleep(10)
        assert nine.leads
        assert bb.statistics().locks == 1
        assert made.frames[-1][1].incarnation == before.incarnation
        assert made.indices() == sorted(set(made.indices()))
        assert made.frames[-1][0] - begun == pytest.approx(made.indices()[-1], abs=1e-3)


async def test_a_pause_outlives_its_leader(autojump_clock: Clock) -> None:
    async with cluster(2) as (made, (one, two)), open_session(made.bus) as bb:
        beat = await bb.pause()
        await bb.sleep_until(beat)
        with bb.move_on_after(2) as scope:
            await trio.sleep(10)
            assert bb.health().paused
            one.scope.cancel()
            await trio.sleep(10)
            assert two.leads
            assert bb.health().paused
            assert bb.health().leader_id == "pulse-1"
            assert not bb.health().local_degradation
            assert bb.current_position() == beat
            assert await bb.resume() == beat
            assert scope.beats_left == pytest.approx(2)
            start = trio.current_time()
            await trio.sleep_forever()
        assert scope.cancelled_caught
        assert 3 <= trio.current_time() - start <= 4
        assert not bb.health().paused
        assert bb.statistics().locks == 1
        assert made.indices() == sorted(made.indices())


async def test_a_paused_grid_that_begins_anew_is_paused(autojump_clock: Clock) -> None:
    async with cluster(1) as (made, (one,)), open_session(made.bus) as bb:
        beat = await bb.pause()
        await bb.sleep_until(beat)
        await trio.sleep(3)
        one.scope.cancel()
        await trio.sleep(1)
        await made.start("pulse-9")
        await trio.sleep(8)
        assert bb.health().paused
        assert bb.health().leader_id == "pulse-9"
        await bb.resume()
        await trio.sleep(3)
        assert bb.tempo_bpm == 60


async def test_standbys_wait_for_the_connection(autojump_clock: Clock) -> None:
    async with cluster(2) as (_, (one, two)):
        two.transport.sever()
        await trio.sleep(5)
        two.transport.restore()
        await trio.sleep(3)
        assert one.leads
        assert not two.leads
        # Both lose their connection, and the leader is back a little later.
        one.transport.sever()
        two.transport.sever()
        await trio.sleep(5)
        two.transport.restore()
        await trio.sleep(0.3)
        one.transport.restore()
        await trio.sleep(3)
        assert one.leads
        assert not two.leads


async def test_two_leaders_at_the_same_time_publish_the_same_grid(autojump_clock: Clock) -> None:
    async with cluster(2) as (made, (one, two)), AsyncExitStack() as stack:
        bb = await stack.enter_async_context(open_session(made.bus))
        one.transport.sever()
        await trio.sleep(4)
        assert two.leads
        assert one.leads
        one.transport.restore()
        await trio.sleep(2)
        assert not one.leads
        assert bb.statistics().locks == 1
        seen = {(f.beat_index, f.segment.t0_ns) for _, f in made.frames}
        assert len(seen) == len({index for index, _ in seen})


async def test_a_silent_subscriber_does_not_hold_up_a_newcomer(
    autojump_clock: Clock,
) -> None:
    async with trio.open_nursery() as nursery:
        made = Cluster(nursery)
        await nursery.start(made.transport.run)
        async with (
            made.transport.open_subscription(f"backbeat.sync.{CLUSTER_ID}"),
            made.transport.open_subscription(f"backbeat.recall.{CLUSTER_ID}"),
        ):
            one = await made.start("pulse-0")
            await trio.sleep(0.9)
            assert not one.leads
            await trio.sleep(0.6)
            assert one.leads
        nursery.cancel_scope.cancel()


async def test_a_suspended_leader_keeps_its_lease_when_a_newcomer_comes(
    autojump_clock: Clock,
) -> None:
    async with cluster(1) as (made, (one,)):
        one.transport.sever()
        subject = lead_subject(CLUSTER_ID, one.metronome.epoch)
        async with made.transport.open_subscription(subject):
            two = await made.start("pulse-1")
            await trio.sleep(1.9)
            assert not two.leads
            await trio.sleep(3)
            assert two.leads


async def test_a_change_stays_in_the_record_if_a_bar_begins_during_its_commit(
    autojump_clock: Clock,
) -> None:
    async with cluster(2) as (made, (one, two)), open_session(made.bus) as bb:
        leader = one.metronome._leader
        assert leader is not None
        # The commit is under way when the bar begins and the record is to be written.
        downbeat = leader.steering.local_at(leader.timeline.time_of(8)) / 1e9
        await trio.sleep_until(downbeat - 0.0002)
        await one.metronome.change_tempo(120)
        await trio.sleep(0.1)
        assert decode_record(made.store.entry.data).segments[-1].milli_bpm == 120_000
        one.scope.cancel()
        await trio.sleep(15)
        assert two.leads
        assert bb.tempo_bpm == 120


async def test_a_replaced_leader_changes_nothing(autojump_clock: Clock) -> None:
    async with cluster(2) as (made, (one, two)):
        # It hears no other process, but can use the store.
        one.store.over_another_way = True
        one.transport.sever()
        await trio.sleep(4)
        assert one.leads
        assert two.leads
        before = made.store.entry
        with pytest.raises(backbeat.MetronomeUnavailable, match="another metronome leads"):
            await one.metronome.change_tempo(240)
        assert made.store.entry == before
        await trio.sleep(1)
        assert not one.leads


async def test_a_stream_that_acknowledges_probes_is_not_taken_for_a_leader(
    autojump_clock: Clock,
) -> None:
    async with cluster(2) as (made, (one, two)), trio.open_nursery() as nursery:

        async def acknowledge() -> None:
            async with made.transport.open_subscription("backbeat.>") as messages:
                async for message in messages:
                    if message.reply:
                        made.transport.publish_nowait(message.reply, b'{"stream":"ALL","seq":1}')

        nursery.start_soon(acknowledge)
        await trio.sleep(1)
        one.scope.cancel()
        await trio.sleep(4)
        # It looks like a suspended leader, so it delays the takeover by one lease.
        assert two.leads
        nursery.cancel_scope.cancel()


async def test_a_standby_far_from_its_server_learns_that_the_leader_is_gone(
    autojump_clock: Clock,
) -> None:
    async with cluster(2) as (_, (one, two)):
        request = two.transport.request

        async def slow(
            subject: str, data: bytes, *, timeout: float, **options: Any
        ) -> backbeat.Reply:
            if timeout <= 0.006:
                await trio.sleep(timeout)
                raise backbeat.TransportBroken("no answer in time")
            await trio.sleep(0.006)
            return await request(subject, data, timeout=timeout - 0.006, **options)

        two.transport.request = slow  # type: ignore[method-assign]
        one.scope.cancel()
        await trio.sleep(1.2)
        assert two.leads
        assert two.metronome.statistics().probes <= 3


async def test_agents_learn_the_number_of_standbys(autojump_clock: Clock) -> None:
    async with cluster(3) as (made, (one, two, three)), open_session(made.bus) as bb:
        await trio.sleep(70)
        assert bb.health().standbys == 2
        # A standby that took over no longer counts, and one that is gone is forgotten in time.
        one.scope.cancel()
        await trio.sleep(70)
        assert bb.health().standbys == 1
        next(pulse for pulse in (two, three) if not pulse.leads).scope.cancel()
        await trio.sleep(80)
        assert bb.health().standbys == 1
        await trio.sleep(150)
        assert bb.health().standbys == 0
        # Any process may say that it stands by, and an unknown role is not an error.
        for role, number in [("standby", 300), ("ghost", 5)]:
            for index in range(number):
                ping = encode(SyncRequest(CLUSTER_ID, f"{role}-{index}", role))
                await made.transport.request(f"backbeat.sync.{CLUSTER_ID}", ping, timeout=1)
        await trio.sleep(70)
        assert bb.health().standbys == 256
        await trio.sleep(250)
        assert bb.health().standbys == 0


async def test_a_metronome_with_a_record_outranks_one_without(autojump_clock: Clock) -> None:
    async with trio.open_nursery() as nursery:
        made = Cluster(nursery)
        await nursery.start(made.transport.run)
        await nursery.start(made.listen)
        transport = backbeat.MemoryTransport(made.bus)
        alone = backbeat.Metronome(
            transport, cluster_id=CLUSTER_ID, leader_id="alone", tempo_bpm=60
        )
        await nursery.start(transport.run)
        await nursery.start(alone.run)
        async with open_session(made.bus) as bb:
            await trio.sleep(2.5)
            assert all(frame.alone is True for _, frame in made.frames)
            other = await made.start("other")
            await trio.sleep(3)
            assert (alone.leads, other.leads) == (False, True)
            await trio.sleep(5)
            assert (alone.leads, other.leads) == (False, True)
            # It continues the grid. For a moment both may have led.
            assert made.indices() == sorted(made.indices())
            assert set(made.indices()) == set(range(made.indices()[-1] + 1))
            assert bb.statistics().locks == 1
            assert bb.health().leader_id == "other"
        nursery.cancel_scope.cancel()


async def test_of_two_grids_the_one_with_a_record_wins(autojump_clock: Clock) -> None:
    # A leaf node that was cut off began another grid, and comes back.
    async with cluster(1) as (made, (one,)), open_session(made.bus) as bb:
        leaf = backbeat.MemoryTransport(backbeat.MemoryBus())
        alone = backbeat.Metronome(leaf, cluster_id=CLUSTER_ID, leader_id="alone", tempo_bpm=120)
        async with trio.open_nursery() as nursery:
            await nursery.start(leaf.run)
            await nursery.start(alone.run)
            await trio.sleep(5)
            leaf.bus = made.bus
            for number, mailbox in list(leaf._mailboxes.items()):
                leaf._subscribe(number, mailbox)
            await trio.sleep(5)
            assert one.leads
            assert not alone.leads
            assert bb.health().leader_id == "pulse-0"
            assert bb.statistics().locks == 1
            assert made.indices()[-1] == bb.current_beat()
            nursery.cancel_scope.cancel()


async def test_a_leader_leads_again_after_the_one_that_replaced_it_died(
    autojump_clock: Clock,
) -> None:
    async with cluster(1) as (made, (one,)), open_session(made.bus) as bb:
        record = decode_record(made.store.entry.data)
        dead = msgspec.structs.replace(record, epoch=record.epoch + 1, nonce="dead")
        made.store.entry = Entry(encode(dead), made.store.entry.revision + 1)
        await trio.sleep(12)
        assert one.metronome.statistics().deposed == 1
        assert one.leads
        # It continues its grid.
        assert bb.statistics().locks == 1
        assert made.indices() == sorted(set(made.indices()))
        assert made.indices()[-1] == bb.current_beat()


@pytest.mark.parametrize("nonce", ["0", "z"])
async def test_a_leader_reads_the_record_of_a_store_that_was_replaced(
    autojump_clock: Clock, nonce: str
) -> None:
    async with cluster(1) as (made, (one,)):
        record = decode_record(made.store.entry.data)
        one.transport.sever()
        # The server came back with an empty store, in which another metronome has begun a grid of
        # the same epoch. The numbers of revisions are the same by chance.
        other = msgspec.structs.replace(record, nonce=nonce, incarnation="other")
        entry = made.store.entry = Entry(encode(other), made.store.entry.revision)
        one.transport.restore()
        await made.wait_until(lambda: made.store.entry is not entry)
        assert one.metronome.statistics().deposed == 1
        assert decode_record(made.store.entry.data).epoch > record.epoch


async def test_a_leader_goes_on_if_its_frames_are_too_large(autojump_clock: Clock) -> None:
    async with cluster(1) as (_, (one,)):
        one.transport.max_payload = 100
        await trio.sleep(3)
        one.transport.max_payload = 1 << 20
        await trio.sleep(2)
        assert one.leads
        assert one.metronome.statistics().frames_unsent >= 2


async def test_takeovers_work_far_from_the_origin_of_trios_clock(mock_clock: Clock) -> None:
    # There a float of seconds cannot hold nanoseconds.
    mock_clock.jump(3e8)
    mock_clock.autojump_threshold = 0
    async with cluster(1) as (made, (one,)), open_session(made.bus) as bb:
        await one.metronome.change_tempo(33.3)
        await bb.sleep(20)
        assert bb.tempo_bpm == 33.3


# Changes that must not be undone, and grids that must not be mixed up.


async def test_a_change_in_force_stays_if_the_new_leader_has_not_heard_of_it(
    autojump_clock: Clock,
) -> None:
    async with cluster(2) as (made, (one, two)), open_session(made.bus) as bb:
        two.transport.sever()
        await trio.sleep(1)
        beat = await bb.set_tempo(240)
        await bb.sleep_until(beat + 100)
        one.scope.cancel()
        two.transport.restore()
        await trio.sleep(5)
        assert two.leads
        assert bb.tempo_bpm == 240
        assert bb.statistics().locks == 1
        indices = made.indices()
        assert indices == sorted(set(indices))
        assert bb.current_beat() - indices[-1] in (0, 1)


async def test_an_announcement_is_soon_in_the_record(autojump_clock: Clock) -> None:
    async with cluster(1) as (made, (one,)), open_session(made.bus) as bb:
        beat = await bb.set_tempo(240)
        # It was announced by the answer to a ping, or by the next frame.
        await trio.sleep(1.1)
        assert bb.current_beat() < beat
        record = decode_record(made.store.entry.data)
        assert record.announced_seq == record.segments[-1].seq == 1
        assert one.leads


async def test_a_pending_change_stays_pending_when_the_grid_begins_anew(
    autojump_clock: Clock,
) -> None:
    async with cluster(1) as (made, (one,)), open_session(made.bus) as bb:
        assert await bb.set_tempo(600, at_beat=100_000) == 100_000
        assert await bb.pause(at_beat=200_000) == 200_000
        one.scope.cancel()
        await trio.sleep(1)
        await made.start("pulse-9")
        await trio.sleep(5)
        assert bb.tempo_bpm == 60
        present, faster, still = made.frames[-1][1].segment, *bb._clock.grid.timeline.segments[1:]
        assert present.beat0 < 100
        assert (faster.beat0, faster.milli_bpm) == (100_000, 600_000)
        assert (still.beat0, still.milli_bpm) == (200_000, 0)


async def test_no_beat_comes_twice_although_the_record_was_old(
    autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_wall_clock(monkeypatch)
    async with cluster(1) as (made, (one,)), open_session(made.bus) as bb:
        await bb.set_tempo(300)
        await trio.sleep(20)
        made.store.answering = False
        await trio.sleep(60)
        one.scope.cancel()
        await trio.sleep(30)
        made.store.answering = True
        alone = bb.current_beat()
        await made.start("pulse-9")
        await trio.sleep(5)
        assert made.indices() == sorted(set(made.indices()))
        # Nor is any repeated for an agent that went on alone and remembers the change.
        assert made.indices()[-1] > alone
        assert made.frames[-1][1].tempo_bpm == 300
        assert bb.current_beat() - made.indices()[-1] in (0, 1)
        assert bb.statistics().locks == 1


async def test_a_new_grid_with_the_same_numbers_is_another_grid(
    autojump_clock: Clock,
) -> None:
    async with cluster(1) as (made, (one,)), open_session(made.bus) as bb:
        await trio.sleep(60)
        one.scope.cancel()
        # The agents that remember the grid are away, and the store is empty.
        transport = bb._runtime.transport
        assert isinstance(transport, backbeat.MemoryTransport)
        transport.sever()
        await trio.sleep(1)
        made.store.entry = Entry(b"", 0)
        await made.start("pulse-9")
        await trio.sleep(5)
        transport.restore()
        await trio.sleep(20)
        assert bb.health().epoch == made.frames[0][1].epoch == made.frames[-1][1].epoch
        assert made.indices()[-1] < 30
        assert bb.current_beat() - made.indices()[-1] in (0, 1)
        assert bb.statistics().locks == 2
        assert not bb.health().local_degradation


async def test_an_agent_that_was_away_when_a_new_grid_began_moves_to_it(
    autojump_clock: Clock,
) -> None:
    async with cluster(1) as (made, (one,)):
        away = backbeat.MemoryTransport(made.bus)
        async with (
            open_session(made.bus, agent_id="near") as near,
            open_session(transport=away, agent_id="far") as far,
        ):
            await trio.sleep(10)
            away.sever()
            one.scope.cancel()
            await trio.sleep(600)
            await made.start("pulse-9")
            await trio.sleep(5)
            # Its number is greater than all that the agent knows.
            await near.set_tempo(100)
            await trio.sleep(20)
            away.restore()
            await trio.sleep(2)
            assert far.statistics().locks == 2
            assert far.current_position() == pytest.approx(near.current_position(), abs=1e-3)


async def test_a_made_up_highest_epoch_does_not_prevent_later_ones(autojump_clock: Clock) -> None:
    async with cluster(1) as (made, (one,)), open_session(made.bus) as bb:
        one.scope.cancel()
        await trio.sleep(1)
        epoch = 2**53
        segment = Segment(epoch, 0, 1000, 0, 60_000)
        forged = BeatFrame(
            *(CLUSTER_ID, 1000, True, "downbeat", 60.0, 8, "w-125", epoch, "forger", segment)
        )
        nine = await made.start("pulse-9")
        made.transport.publish_nowait(f"backbeat.beat.{CLUSTER_ID}", encode(forged))
        await trio.sleep(20)
        assert nine.leads
        assert nine.metronome.epoch < epoch
        assert made.frames[-1][1].leader_id == "pulse-9"
        assert bb.health().leader_id == "pulse-9"
        assert decode_record(made.store.entry.data).leader_id == "pulse-9"


async def test_requests_whose_sender_no_longer_waits_are_refused(autojump_clock: Clock) -> None:
    async with cluster(1) as (made, (one,)), open_session(made.bus) as bb:
        made.store.answering = False
        asked: list[str] = []

        async def ask(bpm: float) -> None:
            with pytest.raises(backbeat.BackbeatError) as caught:
                await bb.set_tempo(bpm)
            asked.append(type(caught.value).__name__)

        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(ask, 100 + number)
        made.store.answering = True
        await trio.sleep(30)
        assert asked.count("MetronomeUnavailable") >= 6
        assert bb.tempo_bpm == 60
        assert one.metronome.statistics().tempo_changes == 0
        assert one.metronome.statistics().refused == 8


async def test_a_change_that_makes_frames_too_large_is_refused(autojump_clock: Clock) -> None:
    async with cluster(1) as (made, (one,)), open_session(made.bus) as bb:
        one.transport.max_payload = 4096
        with pytest.raises(backbeat.TempoRefused, match="larger than the server takes"):
            await bb.set_tempo(120, over=64)
        beat = await bb.set_tempo(120, over=8)
        await bb.sleep_until(beat + 9)
        assert bb.tempo_bpm == 120
        assert made.indices() == sorted(set(made.indices()))


async def test_a_request_that_cannot_be_read_is_answered(autojump_clock: Clock) -> None:
    async with cluster(1) as (made, (one,)):
        answer = await made.transport.request(
            tempo_subject(CLUSTER_ID), b'{"type": "backbeat.tempo.v1"}', timeout=1
        )
        reply = decode_tempo_reply(answer.data)
        assert not reply.ok
        assert "cannot be read" in str(reply.error)
        assert one.metronome.statistics().undecodable == 1


async def test_a_former_leader_continues_with_the_changes_of_its_successor(
    autojump_clock: Clock,
) -> None:
    async with cluster(2) as (made, (one, two)), open_session(made.bus) as bb:
        one.transport.sever()
        await trio.sleep(4)
        assert two.leads
        beat = await bb.set_tempo(240)
        await bb.sleep_until(beat + 50)
        # Only a metronome remains, which has not heard the last minute of the grid.
        two.scope.cancel()
        one.transport.restore()
        await trio.sleep(5)
        assert one.leads
        assert one.metronome.statistics().deposed == 1
        assert bb.tempo_bpm == 240
        assert bb.statistics().locks == 1
        indices = made.indices()
        assert indices == sorted(set(indices))
        assert bb.current_beat() - indices[-1] in (0, 1)


async def test_a_change_whose_commit_comes_back_late_is_postponed(autojump_clock: Clock) -> None:
    async with cluster(2) as (made, (one, _)), open_session(made.bus) as bb:
        write, stalls = made.store.write, {b":120000}": 3.0, b":240000}": 9.0}

        async def stall(data: bytes, revision: int) -> int:
            written = await write(data, revision)
            for tempo in [tempo for tempo in stalls if tempo in data]:
                # The process is suspended after the store has accepted the write.
                autojump_clock.jump(stalls.pop(tempo))
            return written

        made.store.write = stall  # type: ignore[method-assign]
        asked = bb.current_beat()
        beat = await bb.set_tempo(120)
        assert beat > asked + 3
        assert made.frames[-1][1].beat_index < beat
        tempos = {}
        async for heard in bb.beats():
            tempos[heard.index] = heard.tempo_bpm
            if heard.index > beat:
                break
        assert (tempos[beat - 1], tempos[beat]) == (60, 120)
        # A change that names its beat is refused, and is never announced.
        with pytest.raises(backbeat.TempoRefused, match="committed too late for its beat"):
            await one.metronome.change_tempo(240, at_beat=bb.current_beat() + 12)
        assert not stalls
        await trio.sleep(20)
        assert bb.tempo_bpm == 120


async def test_a_change_that_no_frame_would_announce_is_postponed(autojump_clock: Clock) -> None:
    async with cluster(1) as (made, _), open_session(made.bus) as bb:
        write, stalls = made.store.write, [1.5]

        async def stall(data: bytes, revision: int) -> int:
            written = await write(data, revision)
            if stalls and b":0}" in data:
                await trio.sleep(stalls.pop())
            return written

        made.store.write = stall  # type: ignore[method-assign]
        # The pause could take effect three beats later, but the answer of the store comes after the
        # last frame before that.
        asked = bb.current_beat() + 2
        await bb.sleep_until(asked + 0.9)
        beat = await bb.pause()
        assert not stalls
        # The next attempt allows for as much time.
        assert beat == asked + 6
        tempos = {}
        async for heard in bb.beats():
            tempos[heard.index] = heard.tempo_bpm
            if heard.index >= beat:
                break
        assert tempos == {asked + 3: 60, asked + 4: 60, asked + 5: 60, beat: 0}


@pytest.mark.parametrize("bpm", [100.0, 446.0, 600.0, 6000.0])
async def test_a_change_is_announced_in_time_although_the_store_is_slow(
    bpm: float, autojump_clock: Clock
) -> None:
    async with cluster(1, bpm) as (made, _), open_session(made.bus) as bb:
        made.store.delay = 0.08
        for number in range(6):
            await trio.sleep(1 + number * 0.137)
            beat = await bb.pause()
            await bb.sleep_until(beat)
            told = [
                (when, frame)
                for when, frame in made.frames
                if frame.next_segment is not None and frame.next_segment.beat0 == beat
            ]
            due = told[0][0] + (beat - told[0][1].beat_index) * 60 / bpm
            assert due - told[0][0] >= 0.195
            await bb.sleep_until(await bb.resume() + 1)


@pytest.mark.parametrize("past", [-1, 3])
async def test_a_paused_grid_can_resume_after_a_takeover_near_the_pause(
    autojump_clock: Clock, past: int
) -> None:
    async with cluster(2) as (made, (one, two)), open_session(made.bus) as bb:
        beat = await bb.pause()
        # The last frame of the old leader that is heard comes before the pause.
        await bb.sleep_until(beat - 1)
        await trio.sleep(0.3)
        one.scope.cancel()
        await trio.sleep(5)
        assert two.leads
        leader = two.metronome._leader
        assert leader is not None
        # Or agents have counted beats beyond it, because they had not heard of the pause.
        leader.sent = beat + past
        assert bb.health().paused
        assert await bb.resume() == beat
        await trio.sleep(4)
        assert not bb.health().paused


async def test_a_leader_that_was_cut_off_reads_the_record_before_it_publishes(
    autojump_clock: Clock,
) -> None:
    async with cluster(2) as (made, (one, two)), open_session(made.bus) as bb:
        one.transport.sever()
        await trio.sleep(8)
        assert two.leads
        two.scope.cancel()
        await trio.sleep(8)
        heard, former = len(made.frames), made.frames[0][1].epoch
        assert bb.health().local_degradation
        made.store.delay = 0.3
        one.transport.restore()
        await trio.sleep(0.25)
        # It has not read the record yet, so it sends neither frames nor answers.
        assert len(made.frames) == heard
        request = encode(SyncRequest(CLUSTER_ID, "asks"))
        with pytest.raises(backbeat.TransportBroken):
            await made.transport.request(f"backbeat.sync.{CLUSTER_ID}", request, timeout=0.02)
        await trio.sleep(6)
        assert one.leads
        assert all(frame.epoch > former for _, frame in made.frames[heard:])
        assert bb.statistics().locks == 1
        assert made.indices() == sorted(set(made.indices()))


async def test_a_leader_that_cannot_read_the_record_beats_on_if_it_hears_no_other_leader(
    autojump_clock: Clock,
) -> None:
    async with cluster(1) as (made, (one,)):
        made.store.answering = False
        one.transport.sever()
        await trio.sleep(3)
        one.transport.restore()
        heard = len(made.frames)
        await trio.sleep(6)
        assert one.leads
        assert len(made.frames) > heard + 2


async def test_a_leader_that_cannot_read_the_record_is_silent_while_it_hears_another_one(
    autojump_clock: Clock,
) -> None:
    async with cluster(2) as (made, (one, two)):
        one.transport.sever()
        await trio.sleep(4)
        made.store.answering = False
        one.transport.restore()
        heard = len(made.frames)
        await trio.sleep(10)
        assert one.leads
        assert two.leads
        assert {frame.leader_id for _, frame in made.frames[heard:]} == {"pulse-1"}
        made.store.answering = True
        await trio.sleep(4)
        assert not one.leads


async def bridge(one: backbeat.MemoryBus, two: backbeat.MemoryBus, seconds: float) -> None:
    """Pass on what is published on each bus to the other one, with a delay in seconds."""
    ends = [backbeat.MemoryTransport(bus) for bus in (one, two)]
    crossed: set[bytes] = set()

    async def carry(source: backbeat.MemoryTransport, target: backbeat.MemoryTransport) -> None:
        async with source.open_subscription(">") as messages, trio.open_nursery() as inner:
            async for message in messages:
                mark = repr((message.subject, message.data, message.reply)).encode()
                if mark in crossed:
                    crossed.remove(mark)
                    continue
                inner.start_soon(deliver, target, message, mark)

    async def deliver(
        target: backbeat.MemoryTransport, message: backbeat.Message, mark: bytes
    ) -> None:
        await trio.sleep(seconds)
        crossed.add(mark)
        target.publish_nowait(message.subject, message.data, reply=message.reply)

    async with trio.open_nursery() as nursery:
        for end in ends:
            await nursery.start(end.run)
        nursery.start_soon(carry, ends[0], ends[1])
        nursery.start_soon(carry, ends[1], ends[0])


@pytest.mark.parametrize(("bpm", "minutes"), [(60.0, 10), (120.0, 2), (600.0, 1)])
async def test_metronomes_with_a_long_round_trip_do_not_take_the_lead(
    autojump_clock: Clock, bpm: float, minutes: int
) -> None:
    # Each way takes 150 ms.
    async with cluster(1, bpm) as (made, (one,)), open_session(made.bus) as bb:
        there = Cluster(made.nursery)
        there.store = made.store
        made.nursery.start_soon(bridge, made.bus, there.bus, 0.15)
        far = await there.start("far", bpm)
        await trio.sleep(60 * minutes)
        assert one.leads
        assert not far.leads
        assert far.metronome.statistics().takeovers == 0
        assert bb.statistics().locks == 1
        # It stands by nevertheless.
        one.scope.cancel()
        await trio.sleep(10)
        assert far.leads
        assert bb.statistics().locks == 1


async def test_metronomes_without_a_record_find_one_as_soon_as_there_is_one(
    autojump_clock: Clock,
) -> None:
    async with trio.open_nursery() as nursery:
        made = Cluster(nursery)
        made.store.available = False
        await nursery.start(made.transport.run)
        await nursery.start(made.listen)
        one = await made.start("pulse-0")
        await made.wait_until(one.leads_now)
        two = await made.start("pulse-1")
        async with open_session(made.bus) as bb:
            await trio.sleep(5)
            assert (one.leads, two.leads) == (True, False)
            assert all(frame.alone is True for _, frame in made.frames)
            # Without a record, too, one leads and the other stands by.
            one.scope.cancel()
            await trio.sleep(3)
            assert two.leads
            made.store.available = True
            await trio.sleep(20)
            assert two.leads
            assert made.frames[-1][1].alone is not True
            assert decode_record(made.store.entry.data).leader_id == "pulse-1"
            assert made.indices() == sorted(made.indices())
            assert set(made.indices()) == set(range(made.indices()[-1] + 1))
            assert bb.statistics().locks == 1
            assert bb.current_beat() - made.indices()[-1] in (0, 1)
        nursery.cancel_scope.cancel()


@pytest.mark.again(10)
async def test_a_single_metronome_at_two_beats_a_minute_comes_and_goes(
    autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_wall_clock(monkeypatch)
    async with cluster(1, bpm=2.0) as (made, (one,)), open_session(made.bus) as bb:
        begun, heard, pulse = made.frames[0][0], list[int](), one

        async def count() -> None:
            async for beat in bb.beats():
                heard.append(beat.index)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(count)
            for _ in range(10):
                await trio.sleep(random.uniform(0, 60))
                pulse.scope.cancel()
                await trio.sleep(random.uniform(0, 60))
                pulse = await made.start("pulse-0", bpm=2.0)
                await made.wait_until(pulse.leads_now)
                passed = (trio.current_time() - begun) / 30
                assert bb.current_position() == pytest.approx(passed, abs=1e-4)
            nursery.cancel_scope.cancel()
        assert heard == list(range(heard[0], heard[-1] + 1))
        assert made.indices() == sorted(set(made.indices()))
        assert len({frame.incarnation for _, frame in made.frames}) == 1
        assert bb.statistics().locks == 1
