"""Leading and standing by, in virtual time; the record is in memory, and fails when told to."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager

import msgspec
import pytest
import trio
import trio.testing

import backbeat_trio as backbeat
from backbeat_trio._transport.store import Conflict, Entry
from backbeat_trio._wire import (
    BeatFrame,
    Probe,
    Segment,
    decode_frame,
    decode_record,
    decode_tempo_reply,
    encode,
    lead_subject,
    tempo_subject,
)
from backbeat_trio.testing import CLUSTER_ID, open_session

Clock = trio.testing.MockClock


class Memory:
    """A store that all have."""

    def __init__(self) -> None:
        self.entry = Entry(b"", 0)
        self.answering = True
        self.losing = False
        self.writes = 0

    async def open(self) -> bool:
        await trio.lowlevel.checkpoint()
        return True

    async def read(self) -> Entry:
        await trio.sleep(0.0004)
        if not self.answering:
            await trio.sleep(1.0)
            raise backbeat.TransportBroken("no answer")
        return self.entry

    async def write(self, data: bytes, revision: int) -> int:
        await trio.sleep(0.0004)
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


class Pulse:
    """A metronome with a connection of its own, that can be killed."""

    def __init__(self, cluster: Cluster, name: str, bpm: float) -> None:
        self.transport = backbeat.MemoryTransport(cluster.bus)
        self.metronome = backbeat.Metronome(
            self.transport,
            cluster_id=CLUSTER_ID,
            leader_id=name,
            tempo_bpm=bpm,
            store=cluster.store,
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


class Cluster:
    def __init__(self, nursery: trio.Nursery) -> None:
        self.bus = backbeat.MemoryBus()
        self.store = Memory()
        self.frames: list[tuple[float, BeatFrame]] = []
        self.transport = backbeat.MemoryTransport(self.bus)
        self._nursery = nursery

    async def start(self, name: str, bpm: float = 60.0) -> Pulse:
        pulse = Pulse(self, name, bpm)
        await self._nursery.start(pulse.run)
        return pulse

    async def listen(self, task_status: trio.TaskStatus[None]) -> None:
        async with self.transport.open_subscription(f"backbeat.beat.{CLUSTER_ID}") as messages:
            task_status.started()
            async for message in messages:
                self.frames.append((trio.current_time(), decode_frame(message.data)))

    def indices(self) -> list[int]:
        return [frame.beat_index for _, frame in self.frames]


@asynccontextmanager
async def cluster(number: int = 2) -> AsyncGenerator[tuple[Cluster, list[Pulse]], None]:
    async with trio.open_nursery() as nursery:
        made = Cluster(nursery)
        await nursery.start(made.transport.run)
        await nursery.start(made.listen)
        pulses = [await made.start("pulse-0")]
        await trio.sleep(0.1)
        pulses += [await made.start(f"pulse-{n}") for n in range(1, number)]
        await trio.sleep(3.4)
        yield made, pulses
        nursery.cancel_scope.cancel()


async def test_one_leads_and_the_others_follow(autojump_clock: Clock) -> None:
    async with cluster(5) as (made, pulses):
        assert [pulse.leads for pulse in pulses].count(True) == 1
        assert made.indices() == [0, 1, 2, 3]
        assert all(pulse.metronome.statistics().takeovers == pulse.leads for pulse in pulses)
        with pytest.raises(backbeat.MetronomeUnavailable, match="does not lead"):
            await next(p for p in pulses if not p.leads).metronome.change_tempo(120)


async def test_the_dead_are_replaced_at_once_in_the_same_time(autojump_clock: Clock) -> None:
    async with cluster(2) as (made, (one, two)), open_session(made.bus) as bb:
        assert one.leads
        begun = made.frames[0][0]
        one.scope.cancel()
        await trio.sleep(3)
        assert two.leads
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


async def test_a_lost_frame_makes_a_standby_ask_and_nothing_else(autojump_clock: Clock) -> None:
    async with cluster(2) as (made, (one, two)):
        # Whoever else listens misses it, too.
        leader = one.metronome._leader
        assert leader is not None
        leader.sent += 1
        await trio.sleep(4)
        assert made.indices() == [0, 1, 2, 3, 5, 6, 7]
        assert one.leads
        assert two.metronome.statistics().probes == 1


async def test_the_silent_keep_their_lease(autojump_clock: Clock) -> None:
    async with cluster(2) as (_, (one, two)):
        # It says nothing, but is there: others find its subscriptions.
        one.transport.publish_nowait = lambda *_, **__: None  # type: ignore[method-assign]
        await trio.sleep(2.4)
        assert not two.leads
        await trio.sleep(0.3)
        assert two.leads
        # It hears who leads, and looks at the record.
        await trio.sleep(2)
        assert not one.leads
        assert one.metronome.statistics().deposed == 1


async def test_a_standby_that_was_late_itself_waits(autojump_clock: Clock) -> None:
    async with cluster(2) as (_, (one, two)):
        # A jump of the clock is what a loop that stood still sees of it.
        autojump_clock.jump(2.0)
        await trio.sleep(3)
        assert one.leads
        assert not two.leads


async def test_nobody_takes_over_without_the_record(autojump_clock: Clock) -> None:
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
        # In the same time: nobody noticed but by the missing frames.
        assert bb.current_beat() == beat + 3
        assert bb.statistics().locks == 1
        assert not bb.health().local_degradation


async def test_a_lost_answer_is_read_back(autojump_clock: Clock) -> None:
    async with cluster(2) as (made, (one, two)):
        made.store.losing = True
        one.scope.cancel()
        await trio.sleep(2)
        made.store.losing = False
        await trio.sleep(2)
        assert two.leads
        assert decode_record(made.store.entry.data).epoch == two.metronome.epoch


async def test_a_leader_without_the_record_beats_on_and_refuses_changes(
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


async def test_a_change_that_was_refused_is_written_over(autojump_clock: Clock) -> None:
    async with cluster(1) as (made, (one,)):
        made.store.losing = True
        with pytest.raises(backbeat.TempoRefused, match="the answer was lost"):
            await one.metronome.change_tempo(480)
        made.store.losing = False
        assert b"480000" in made.store.entry.data
        await trio.sleep(0.5)
        assert b"480000" not in made.store.entry.data
        assert one.leads


async def test_an_unreadable_record_is_written_over(autojump_clock: Clock) -> None:
    async with cluster(2) as (made, (one, two)):
        epoch = one.metronome.epoch
        for rubbish in (b"\xff", b"{}", made.store.entry.data.replace(b"test-cluster", b"another")):
            made.store.entry = Entry(rubbish, made.store.entry.revision + 1)
            # Every bar it is written again.
            await trio.sleep(8)
            assert decode_record(made.store.entry.data).cluster_id == CLUSTER_ID
        made.store.entry = Entry(b"rubbish", made.store.entry.revision + 1)
        one.scope.cancel()
        await trio.sleep(2)
        assert two.leads
        assert two.metronome.epoch > epoch


async def test_a_wiped_record_comes_back_with_the_same_grid(autojump_clock: Clock) -> None:
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


async def test_a_forged_frame_makes_a_leader_look_and_nothing_else(autojump_clock: Clock) -> None:
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
        # Agents have asked, and do not believe it; they say so.
        assert bb.health().leader_id == "pulse-0"
        assert bb.statistics().frames_unexplained >= 5
        assert any("does not bear out" in error for error in bb.health().errors)
        probe = encode(Probe(CLUSTER_ID, 10**13, "forger"))
        subject = lead_subject(CLUSTER_ID, one.metronome.epoch)
        await made.transport.request(subject, probe, timeout=1)
        await trio.sleep(2)
        assert one.leads


async def test_a_cluster_that_begins_again_repeats_no_beat(autojump_clock: Clock) -> None:
    async with cluster(1) as (made, (one,)), open_session(made.bus) as bb:
        await trio.sleep(20)
        last = made.indices()[-1]
        with bb.move_on_after(100) as scope:
            one.scope.cancel()
            await trio.sleep(4.5)
            left = scope.beats_left
            await made.start("pulse-9", bpm=999)
            await trio.sleep(4.3)
            assert made.indices()[-1] > last
            assert made.frames[-1][1].segment.beat0 > last
            # The tempo is that of the record, and not that of whoever came.
            assert bb.tempo_bpm == 60
            assert bb.statistics().locks == 2
            assert bb.current_beat() == made.indices()[-1]
            assert scope.beats_left == pytest.approx(left - 4.3, abs=0.1)
        assert made.indices() == sorted(set(made.indices()))


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
            assert scope.beats_left == 2
            start = trio.current_time()
            await trio.sleep_forever()
        assert scope.cancelled_caught
        assert 3 <= trio.current_time() - start <= 4
        assert not bb.health().paused
        assert bb.statistics().locks == 1
        assert made.indices() == sorted(made.indices())


async def test_a_grid_that_stood_still_does_so_when_it_begins_again(autojump_clock: Clock) -> None:
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
        # Both are away, and the leader is back a little later.
        one.transport.sever()
        two.transport.sever()
        await trio.sleep(5)
        two.transport.restore()
        await trio.sleep(0.3)
        one.transport.restore()
        await trio.sleep(3)
        assert one.leads
        assert not two.leads


async def test_two_that_lead_for_a_moment_tell_the_same_grid(autojump_clock: Clock) -> None:
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


async def test_a_leader_that_is_silent_as_a_newcomer_comes(autojump_clock: Clock) -> None:
    async with trio.open_nursery() as nursery:
        made = Cluster(nursery)
        await nursery.start(made.transport.run)
        # Somebody is there to be asked, and says nothing; and there is no record.
        async with made.transport.open_subscription(f"backbeat.sync.{CLUSTER_ID}"):
            one = await made.start("pulse-0")
            await trio.sleep(1.9)
            assert not one.leads
            await trio.sleep(0.5)
            assert one.leads
        nursery.cancel_scope.cancel()


async def test_a_change_that_a_bar_comes_in_between_of_stays_in_the_record(
    autojump_clock: Clock,
) -> None:
    async with cluster(2) as (made, (one, two)), open_session(made.bus) as bb:
        leader = one.metronome._leader
        assert leader is not None
        # Its commit is on its way as the bar asks for the record to be written.
        downbeat = leader.steering.local_at(leader.timeline.time_of(8)) / 1e9
        await trio.sleep_until(downbeat - 0.0002)
        await one.metronome.change_tempo(120)
        await trio.sleep(0.1)
        assert decode_record(made.store.entry.data).segments[-1].milli_bpm == 120_000
        one.scope.cancel()
        await trio.sleep(15)
        assert two.leads
        assert bb.tempo_bpm == 120


async def test_a_deposed_leader_changes_nothing(autojump_clock: Clock) -> None:
    async with cluster(2) as (made, (one, two)):
        # It hears nobody, and has the record all the same.
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


async def test_a_stream_that_acknowledges_probes_is_no_leader(autojump_clock: Clock) -> None:
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
        # It cannot be told from a leader that stands still, but it does not last longer than that.
        assert two.leads
        nursery.cancel_scope.cancel()


async def test_a_standby_far_from_its_server_learns_who_is_gone(autojump_clock: Clock) -> None:
    async with cluster(2) as (_, (one, two)):
        request = two.transport.request

        async def slow(subject: str, data: bytes, *, timeout: float) -> backbeat.Reply:
            if timeout <= 0.006:
                await trio.sleep(timeout)
                raise backbeat.TransportBroken("no answer in time")
            await trio.sleep(0.006)
            return await request(subject, data, timeout=timeout - 0.006)

        two.transport.request = slow  # type: ignore[method-assign]
        one.scope.cancel()
        await trio.sleep(1.2)
        assert two.leads
        assert two.metronome.statistics().probes <= 3


async def test_a_metronome_that_runs_alone_is_left_to_lead(autojump_clock: Clock) -> None:
    async with trio.open_nursery() as nursery:
        made = Cluster(nursery)
        await nursery.start(made.transport.run)
        transport = backbeat.MemoryTransport(made.bus)
        alone = backbeat.Metronome(
            transport, cluster_id=CLUSTER_ID, leader_id="alone", tempo_bpm=60
        )
        await nursery.start(transport.run)
        await nursery.start(alone.run)
        await trio.sleep(2.5)
        other = await made.start("other")
        await trio.sleep(3)
        assert alone._leader is not None
        alone._leader.sent += 1
        await trio.sleep(3)
        assert alone.leads
        assert not other.leads
        nursery.cancel_scope.cancel()


async def test_a_leader_that_was_replaced_by_the_dead_leads_again(autojump_clock: Clock) -> None:
    async with cluster(1) as (made, (one,)), open_session(made.bus) as bb:
        record = decode_record(made.store.entry.data)
        dead = msgspec.structs.replace(record, epoch=record.epoch + 1, nonce="dead")
        made.store.entry = Entry(encode(dead), made.store.entry.revision + 1)
        await trio.sleep(12)
        assert one.metronome.statistics().deposed == 1
        assert one.leads
        # With the grid that it had.
        assert bb.statistics().locks == 1
        assert made.indices() == sorted(set(made.indices()))
        assert made.indices()[-1] == bb.current_beat()


async def test_frames_that_are_too_large_do_not_end_a_leader(autojump_clock: Clock) -> None:
    async with cluster(1) as (_, (one,)):
        one.transport.max_payload = 100
        await trio.sleep(3)
        one.transport.max_payload = 1 << 20
        await trio.sleep(2)
        assert one.leads
        assert one.metronome.statistics().frames_unsent >= 2


async def test_far_from_the_clocks_origin(mock_clock: Clock) -> None:
    # Floats are coarser than nanoseconds there.
    mock_clock.jump(3e8)
    mock_clock.autojump_threshold = 0
    async with cluster(1) as (made, (one,)), open_session(made.bus) as bb:
        await one.metronome.change_tempo(33.3)
        await bb.sleep(20)
        assert bb.tempo_bpm == 33.3


# What is not to be undone, and what is not to be taken for something else.


async def test_a_change_in_force_outlives_a_leader_who_has_not_heard_of_it(
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


async def test_what_was_told_is_soon_in_the_record(autojump_clock: Clock) -> None:
    async with cluster(1) as (made, (one,)), open_session(made.bus) as bb:
        beat = await bb.set_tempo(240)
        # By the answer to a ping, or with the next frame.
        await trio.sleep(1.1)
        assert bb.current_beat() < beat
        record = decode_record(made.store.entry.data)
        assert record.announced_seq == record.segments[-1].seq == 1
        assert one.leads


async def test_a_change_for_later_is_still_for_later_when_the_grid_begins_again(
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


async def test_no_beat_comes_twice_though_the_record_was_out(
    autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A wall clock that goes with the test's own.
    clock = trio.lowlevel.current_clock()
    monkeypatch.setattr("time.time_ns", lambda: round((clock.current_time() + 10**9) * 1e9))
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
        # Nor is any counted twice by who went on alone.
        assert alone < made.frames[-1][1].segment.beat0 < alone + 32
        assert bb.current_beat() - made.indices()[-1] in (0, 1)


async def test_another_grid_that_begins_just_as_the_last_one_is_another(
    autojump_clock: Clock,
) -> None:
    async with cluster(1) as (made, (one,)), open_session(made.bus) as bb:
        await trio.sleep(60)
        one.scope.cancel()
        await trio.sleep(1)
        # With all that was stored.
        made.store.entry = Entry(b"", 0)
        await made.start("pulse-9")
        await trio.sleep(20)
        assert bb.health().epoch == made.frames[0][1].epoch == made.frames[-1][1].epoch
        assert made.indices()[-1] < 30
        assert bb.current_beat() - made.indices()[-1] in (0, 1)
        assert bb.statistics().locks == 2
        assert not bb.health().local_degradation


async def test_who_was_away_while_a_grid_began_and_changed_is_not_mistaken(
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
            # Its number is greater than that of all that is known far away.
            await near.set_tempo(100)
            await trio.sleep(20)
            away.restore()
            await trio.sleep(2)
            assert far.statistics().locks == 2
            assert far.current_position() == pytest.approx(near.current_position(), abs=1e-3)


async def test_an_epoch_that_somebody_made_up_is_not_the_last(autojump_clock: Clock) -> None:
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


async def test_requests_that_nobody_waits_for_any_more_are_refused(autojump_clock: Clock) -> None:
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


async def test_a_change_that_no_frame_has_room_for_is_refused(autojump_clock: Clock) -> None:
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


async def test_who_led_before_goes_on_with_what_the_one_after_it_did(autojump_clock: Clock) -> None:
    async with cluster(2) as (made, (one, two)), open_session(made.bus) as bb:
        one.transport.sever()
        await trio.sleep(4)
        assert two.leads
        beat = await bb.set_tempo(240)
        await bb.sleep_until(beat + 50)
        # All that is left of the grid is a metronome that knows nothing of the last minute.
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
