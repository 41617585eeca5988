"""What a session makes of frames and of claims, with the other side played by hand."""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

import backbeat_trio as backbeat
from backbeat_trio._grid.changes import propose
from backbeat_trio._grid.timeline import Timeline
from backbeat_trio._time.local import local_ns
from backbeat_trio._wire import (
    BeatFrame,
    Segment,
    SyncReply,
    beat_phase,
    encode,
    window_id,
)
from backbeat_trio.testing import CLUSTER_ID, open_session

Clock = trio.testing.MockClock
SECOND = 1_000_000_000


class Leader:
    """A leader of which a test decides every message."""

    def __init__(self, transport: backbeat.MemoryTransport) -> None:
        self.transport = transport
        self.epoch = 5
        self.segment = Segment(5, 0, 0, 0, 60_000)
        self.next_segment: Segment | None = None
        self.offset_ns = 1000 * SECOND - local_ns()
        self.answering = True
        self.lie_ns = 0
        self.bar = 4

    def cluster_ns(self) -> int:
        return local_ns() + self.offset_ns

    def index(self) -> int:
        beats = (self.cluster_ns() - self.segment.t0_ns) * self.segment.milli_bpm
        return self.segment.beat0 + beats // (60_000 * SECOND)

    def frame(self, **changes: Any) -> BeatFrame:
        index = changes.get("beat_index", self.index())
        fields: dict[str, Any] = {
            "cluster_id": CLUSTER_ID,
            "beat_index": index,
            "downbeat": index % self.bar == 0,
            "phase": beat_phase(index, self.bar),
            "tempo_bpm": self.segment.milli_bpm / 1000,
            "beats_per_bar": self.bar,
            "window_id": window_id(index, self.bar),
            "epoch": self.epoch,
            "leader_id": "by-hand",
            "segment": self.segment,
            "next_segment": self.next_segment,
        }
        return BeatFrame(**(fields | changes))

    def send(self, **changes: Any) -> None:
        self.send_raw(encode(self.frame(**changes)))

    def send_raw(self, data: bytes) -> None:
        self.transport.publish_nowait(f"backbeat.beat.{CLUSTER_ID}", data)

    async def beat(self, beats: int = 1) -> None:
        for _ in range(beats):
            edge = (self.index() + 1 - self.segment.beat0) * SECOND * 60_000
            edge = edge // self.segment.milli_bpm + self.segment.t0_ns
            await trio.sleep_until((edge - self.offset_ns) / 1e9)
            self.send()
            await trio.testing.wait_all_tasks_blocked()

    async def answer(self, task_status: trio.TaskStatus[None]) -> None:
        async with self.transport.open_subscription(f"backbeat.sync.{CLUSTER_ID}") as requests:
            task_status.started()
            async for request in requests:
                if self.answering:
                    self.reply(request)

    def reply(self, request: backbeat.Message) -> None:
        now = self.cluster_ns() + self.lie_ns
        reply = SyncReply(
            *(CLUSTER_ID, self.epoch, "by-hand", now, now, self.bar),
            *(self.segment, self.next_segment),
        )
        self.transport.publish_nowait(request.reply, encode(reply))


@asynccontextmanager
async def leading(
    *, answer: bool = True, **overrides: Any
) -> AsyncGenerator[tuple[Leader, backbeat.Session], None]:
    bus = backbeat.MemoryBus()
    transport = backbeat.MemoryTransport(bus)
    async with trio.open_nursery() as nursery:
        await nursery.start(transport.run)
        leader = Leader(transport)
        if answer:
            await nursery.start(leader.answer)
        options: dict[str, Any] = {"tempo_bpm": 60.0, "lock_timeout": 0.0} | overrides
        async with open_session(bus, **options) as bb:
            await trio.testing.wait_all_tasks_blocked()
            yield leader, bb
        nursery.cancel_scope.cancel()


async def test_a_session_locks_by_pings_and_follows_frames(autojump_clock: Clock) -> None:
    async with leading() as (leader, bb):
        assert bb.current_beat() == 1000
        assert not bb.health().local_degradation
        assert (await anext(bb.downbeats())).index == 1004
        await leader.beat(10)
        assert bb.statistics().frames == 10
        assert bb.health().tempo_drift == "acceptable"
        assert bb.health().measured_bpm == pytest.approx(60.0)


async def test_frames_alone_are_enough(autojump_clock: Clock) -> None:
    # An independent metronome that knows nothing of sync requests.
    async with leading(answer=False) as (leader, bb):
        assert bb.current_beat() == 0
        with bb.move_on_after(7) as scope:
            await trio.sleep(0.5)
            assert bb.health().local_degradation
            await leader.beat(3)
            assert bb.current_beat() == leader.index()
            assert not bb.health().local_degradation
            assert scope.beats_left == pytest.approx(4.0)


async def test_a_budget_keeps_what_is_left_over_the_lock(autojump_clock: Clock) -> None:
    async with leading(answer=False) as (leader, bb):
        operation = bb.start_operation("election", beats=9)
        beats = bb.beats()
        start = trio.current_time()
        with bb.move_on_after(5) as scope:
            await trio.sleep(1.25)
            assert (await anext(beats)).index == 1
            leader.offset_ns += SECOND // 2
            leader.send(beat_index=leader.index())
            leader.offset_ns -= SECOND // 2
            # The frame is believed although no ping is answered for so long.
            await trio.sleep(0.6)
            await trio.testing.wait_all_tasks_blocked()
            assert bb.current_beat() >= 1000
            assert operation.beats_left == 8
            assert (await anext(beats)).skipped == 0
            await trio.sleep_forever()
        assert scope.cancelled_caught
        assert trio.current_time() - start == pytest.approx(5.0)


async def test_hostile_frames_are_counted_and_beats_go_on(autojump_clock: Clock) -> None:
    async with leading() as (leader, bb):
        await leader.beat(3)
        good = leader.frame()
        before = bb.statistics()
        hostile = itertools.cycle(
            [
                b"{",
                encode(good)[:50],
                b"x" * 1_000_000,
                b'{"type":"backbeat.beatframe.v1","beat_index":"a"}',
                encode(msgspec.structs.replace(good, cluster_id="other")),
                encode(msgspec.structs.replace(good, beat_index=good.beat_index - 1)),
                encode(good),
                encode(msgspec.structs.replace(good, epoch=4, beat_index=good.beat_index + 5)),
            ]
        )
        for _ in range(5):
            for data in itertools.islice(hostile, 800):
                leader.send_raw(data)
            await trio.testing.wait_all_tasks_blocked()
        after = bb.statistics()
        assert after.frames == before.frames
        assert after.frames_undecodable == before.frames_undecodable + 2000
        assert after.frames_foreign == before.frames_foreign + 500
        assert after.frames_repeated == before.frames_repeated + 1000
        assert after.frames_stale_epoch == before.frames_stale_epoch + 500
        index = bb.current_beat()
        await leader.beat(2)
        assert bb.current_beat() == index + 2
        assert bb.statistics().frames == before.frames + 2


async def test_a_frame_from_far_ahead_is_asked_about_and_not_believed(
    autojump_clock: Clock,
) -> None:
    async with leading() as (leader, bb):
        await leader.beat(2)
        leader.send(beat_index=5000)
        await trio.sleep(0.03)
        assert bb.statistics().frames_unexplained == 1
        frames = bb.statistics().frames
        await leader.beat(2)
        assert bb.statistics().frames == frames + 2
        # Nor where nobody answers, as long as the frames go on.
        leader.answering = False
        leader.send(beat_index=5000)
        await trio.sleep(0.9)
        await leader.beat(2)
        assert bb.current_beat() == leader.index()
        assert not bb.health().local_degradation


async def test_a_tempo_change_rides_in_frames(autojump_clock: Clock) -> None:
    async with leading() as (leader, bb):
        leader.next_segment = Segment(5, 1, 1004, 1004 * SECOND, 120_000)
        await leader.beat()
        assert bb.tempo_bpm == 60.0
        start = trio.current_time()
        await bb.sleep_until(1008)
        assert trio.current_time() - start == pytest.approx(3 + 4 * 0.5)
        assert bb.tempo_bpm == 120.0


async def test_holdover_says_so_and_beats_go_on(autojump_clock: Clock) -> None:
    async with leading() as (leader, bb):
        await leader.beat(2)
        leader.answering = False
        await trio.sleep(2.1)
        assert not bb.health().local_degradation
        await trio.sleep(0.3)
        assert bb.health().local_degradation
        with bb.move_on_after(5):
            await trio.sleep_forever()
        assert bb.current_beat() == leader.index()
        leader.answering = True
        await leader.beat()
        assert not bb.health().local_degradation


async def test_a_new_leader_in_the_same_time_changes_nothing(autojump_clock: Clock) -> None:
    async with leading() as (leader, bb):
        await leader.beat(2)
        leader.epoch = 6
        locks = bb.statistics().locks
        await leader.beat(2)
        assert bb.statistics().locks == locks
        assert bb.current_beat() == leader.index()
        # What its predecessor still has in its buffers is of no interest.
        leader.send(epoch=5, beat_index=leader.index() + 10)
        await trio.testing.wait_all_tasks_blocked()
        assert bb.statistics().frames_stale_epoch == 1


@pytest.mark.parametrize("answering", [True, False])
async def test_a_new_incarnation_moves_the_grid_and_keeps_the_budgets(
    answering: bool, autojump_clock: Clock
) -> None:
    async with leading() as (leader, bb):
        await leader.beat(2)
        start = trio.current_time()
        with bb.move_on_after(6) as scope:
            await trio.sleep(1.5)
            leader.epoch, leader.segment = 9, Segment(9, 0, 0, 0, 60_000)
            leader.offset_ns = -local_ns()
            leader.answering = answering
            leader.send()
            await trio.sleep(3)
            assert bb.current_beat() == leader.index() == 3
            assert bb.statistics().locks == 2
            assert scope.beats_left == pytest.approx(1.5)
            await trio.sleep_forever()
        assert trio.current_time() - start == pytest.approx(6.0)


async def test_a_leader_of_a_lower_epoch_is_followed_once_nobody_else_is_there(
    autojump_clock: Clock,
) -> None:
    async with leading() as (leader, bb):
        await leader.beat(2)
        leader.epoch, leader.segment = 1, Segment(1, 0, 0, 0, 60_000)
        leader.offset_ns = -local_ns()
        leader.send()
        await trio.testing.wait_all_tasks_blocked()
        assert bb.current_beat() >= 1000
        await trio.sleep(5.5)
        leader.send()
        await trio.testing.wait_all_tasks_blocked()
        assert bb.current_beat() == leader.index() == 5


async def test_replies_of_a_lower_epoch_are_not_believed(autojump_clock: Clock) -> None:
    async with leading() as (leader, bb):
        await leader.beat(2)
        leader.epoch = 4
        leader.lie_ns = 500 * SECOND
        await trio.sleep(1.2)
        assert bb.current_beat() == leader.index()
        assert bb.statistics().frames_stale_epoch >= 1


async def test_unreadable_replies_are_counted(autojump_clock: Clock) -> None:
    async with leading(answer=False) as (leader, bb), trio.open_nursery() as nursery:

        async def babble() -> None:
            subject = f"backbeat.sync.{CLUSTER_ID}"
            async with leader.transport.open_subscription(subject) as requests:
                async for request in requests:
                    leader.transport.publish_nowait(request.reply, b"babble")

        nursery.start_soon(babble)
        await trio.sleep(3)
        assert bb.statistics().pings_failed >= 16
        assert bb.current_beat() == 3
        nursery.cancel_scope.cancel()


async def test_an_unanswered_tempo_request(autojump_clock: Clock) -> None:
    async with leading() as (leader, bb), trio.open_nursery() as nursery:
        subject = f"backbeat.tempo.{CLUSTER_ID}"
        answers: list[bytes | None] = [
            None,
            b"babble",
            b'{"type":"backbeat.tempo.v1","cluster_id":"c","ok":false}',
        ]

        async def serve() -> None:
            async with leader.transport.open_subscription(subject) as requests:
                async for request in requests:
                    answer = answers.pop(0)
                    if answer is not None:
                        leader.transport.publish_nowait(request.reply, answer)

        nursery.start_soon(serve)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(backbeat.MetronomeUnavailable, match="no answer"):
            await bb.set_tempo(60)
        with pytest.raises(backbeat.MetronomeUnavailable, match="not readable"):
            await bb.set_tempo(60)
        with pytest.raises(backbeat.TempoRefused, match="without a reason"):
            await bb.set_tempo(60)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("milli", "drift"), [(60_000, "acceptable"), (60_300, "elevated"), (66_000, "severe")]
)
async def test_drift_is_told(milli: int, drift: str, autojump_clock: Clock) -> None:
    # The frames say 60 a minute, and come at another pace.
    async with leading(answer=False) as (leader, bb):
        # The first frame waits for an answer, so its arrival does not count.
        for index in range(999, 1007):
            leader.send(beat_index=index)
            await trio.sleep(60_000 / milli)
        assert bb.health().tempo_drift == "unknown"
        leader.send(beat_index=1007)
        await trio.testing.wait_all_tasks_blocked()
        assert bb.health().tempo_drift == drift
        assert bb.health().measured_bpm == pytest.approx(milli / 1000, rel=1e-6)


async def test_a_forged_epoch_is_asked_about_and_told_of(autojump_clock: Clock) -> None:
    async with leading() as (leader, bb):
        await leader.beat(3)
        for _ in range(4):
            leader.send(epoch=2**53, leader_id="forger")
            await leader.beat()
        assert bb.health().epoch == 5
        assert bb.health().leader_id == "by-hand"
        assert bb.statistics().frames_unexplained == 4
        assert any("epoch 9007199254740992" in error for error in bb.health().errors)
        assert bb.current_beat() == leader.index()
        # Where nobody can be asked it is not believed as long as the other one is heard.
        leader.answering = False
        leader.send(epoch=2**53, leader_id="forger")
        await leader.beat(2)
        assert bb.health().epoch == 5
        assert bb.statistics().frames_unexplained == 5


async def test_answers_that_lie_by_seconds_are_outlying(autojump_clock: Clock) -> None:
    async with leading() as (leader, bb):
        await leader.beat(5)
        locks = bb.statistics().locks
        leader.lie_ns = 7 * SECOND
        while not bb.statistics().pings_outlying:
            await trio.sleep(0.1)
        leader.lie_ns = 0
        await leader.beat(3)
        assert bb.statistics().pings_outlying == 1
        assert bb.statistics().locks == locks
        assert any("contradicts" in error for error in bb.health().errors)
        assert bb.current_position() == pytest.approx(leader.index(), abs=1e-3)


async def test_a_leader_whose_clock_jumped_is_followed_forward(autojump_clock: Clock) -> None:
    async with leading() as (leader, bb):
        await leader.beat(5)
        leader.offset_ns += 3 * SECOND
        await leader.beat(4)
        assert bb.current_beat() == leader.index()
        # Back it goes slowly, and never runs backwards.
        leader.offset_ns -= SECOND // 10
        positions = []
        for number in range(80):
            if number % 10 == 0:
                leader.send()
            await trio.sleep(0.1)
            positions.append(bb.current_position())
        assert positions == sorted(positions)
        assert bb.current_beat() == leader.index()
        assert bb.statistics().locks == 1


async def test_two_that_answer_in_different_epochs_are_told_of(autojump_clock: Clock) -> None:
    async with leading() as (leader, bb), trio.open_nursery() as nursery:
        await leader.beat(2)

        async def change() -> None:
            # Between two pings of one burst.
            async with leader.transport.open_subscription(f"backbeat.sync.{CLUSTER_ID}") as asked:
                number = 0
                async for _ in asked:
                    number += 1
                    leader.epoch = 5 + number % 2

        nursery.start_soon(change)
        await trio.sleep(3)
        assert any("several epochs" in error for error in bb.health().errors)
        nursery.cancel_scope.cancel()


async def test_uncertainty_grows_in_holdover(autojump_clock: Clock) -> None:
    async with leading() as (leader, bb):
        await leader.beat(20)
        known = bb.health().uncertainty
        assert known is not None
        assert known < 0.001
        leader.answering = False
        await trio.sleep(60)
        assert bb.health().local_degradation
        grown = bb.health().uncertainty
        assert grown is not None
        assert 0.005 > grown > known + 50e-6
        leader.answering = True
        # What was asked last is waited for, and then it is asked again.
        await leader.beat(12)
        again = bb.health().uncertainty
        assert again is not None
        assert again < grown


async def test_uncertainty_is_unknown_without_pings(autojump_clock: Clock) -> None:
    async with leading(answer=False) as (leader, bb):
        assert bb.health().uncertainty is None
        assert bb.health().leader_id is None
        await leader.beat(3)
        assert bb.health().leader_id == "by-hand"
        assert bb.health().uncertainty is None


async def test_health_says_which_grid_it_is(autojump_clock: Clock) -> None:
    async with leading(answer=False) as (leader, bb):
        await trio.sleep(10)
        assert (bb.health().grid, bb.health().last_frame_age) == ("local", None)
        await leader.beat(3)
        assert (bb.health().grid, bb.health().last_frame_age) == ("locked", 0.0)
        # The leader dies: it is not named for ever.
        await trio.sleep(1.5)
        assert (bb.health().grid, bb.health().leader_id) == ("locked", "by-hand")
        await trio.sleep(8.5)
        assert bb.health().last_frame_age == pytest.approx(10.0)
        assert (bb.health().grid, bb.health().leader_id) == ("holdover", None)
        await leader.beat(1)
        assert (bb.health().grid, bb.health().leader_id) == ("locked", "by-hand")
        # No frame can come over a connection that is lost.
        assert isinstance(bb._runtime.transport, backbeat.MemoryTransport)
        bb._runtime.transport.sever()
        assert (bb.health().grid, bb.health().leader_id) == ("holdover", None)


async def test_a_disabled_session_counts_on_a_local_grid(autojump_clock: Clock) -> None:
    async with open_session(enabled=False) as bb:
        assert (bb.health().grid, bb.health().last_frame_age) == ("local", None)


async def test_a_pause_that_was_heard_of_too_late(autojump_clock: Clock) -> None:
    async with leading() as (leader, bb):
        await leader.beat(2)
        leader.answering = False
        await trio.sleep(3.5)
        position = bb.current_position()
        with bb.move_on_after(2) as scope:
            # It stood still behind the agent's back, three beats ago.
            stopped = leader.index() - 3
            still = Segment(5, 1, stopped, stopped * SECOND, 0)
            leader.segment = still
            leader.send(beat_index=stopped, tempo_bpm=0.0)
            await trio.sleep(5)
            assert bb.health().paused
            assert bb.tempo_bpm == 0
            # It stands still, too, and does not go back.
            assert bb.current_position() == pytest.approx(position, abs=0.1)
            assert bb.current_beat() == int(position)
            left = scope.beats_left
            await trio.sleep(5)
            assert scope.beats_left == left > 1
            # Once the grid goes on so does the agent, and comes back to it.
            now = leader.cluster_ns()
            leader.segment = Segment(5, 2, stopped, now, 60_000)
            leader.answering = True
            leader.send(beat_index=stopped + 1)
            await trio.sleep_forever()
        assert scope.cancelled_caught
        await trio.sleep(60)
        assert bb.current_beat() == leader.index()
        assert bb.statistics().locks == 1


async def test_frames_of_a_grid_that_stands_still_go_on(autojump_clock: Clock) -> None:
    async with leading() as (leader, bb):
        await leader.beat(2)
        beat = leader.index() + 2
        leader.next_segment = Segment(5, 1, beat, beat * SECOND, 0)
        await leader.beat(2)
        leader.segment, leader.next_segment = leader.next_segment, None
        frames = bb.statistics().frames
        for _ in range(5):
            await trio.sleep(1)
            leader.send(beat_index=beat, tempo_bpm=0.0)
        await trio.testing.wait_all_tasks_blocked()
        health = bb.health()
        assert (health.paused, health.current_beat, health.current_tempo) == (True, beat, 0.0)
        assert not health.local_degradation
        assert bb.statistics().frames == frames + 5
        assert bb.statistics().frames_repeated == 0
        leader.answering = False
        await trio.sleep(2.5)
        assert bb.health().local_degradation


async def test_a_ramp_is_followed_from_one_frame(autojump_clock: Clock) -> None:
    async with leading() as (leader, bb):
        await leader.beat()
        await trio.sleep(1)
        beat = leader.index() + 2
        ramp = propose(
            Timeline((leader.segment,)),
            leader.cluster_ns(),
            120_000,
            beat,
            over=8,
            beats_per_bar=4,
            epoch=5,
        )
        leader.send(**ramp.wire_fields())
        leader.answering = False
        # All the frames after that one are lost, and whoever is alive knows what is to come.
        switches = {}
        async for heard in bb.beats():
            switches[heard.index] = round(heard.tempo_bpm * 1000)
            if heard.index == beat + 9:
                break
        steps = {segment.beat0: segment.milli_bpm for segment in ramp.segments[1:]}
        assert {index: switches[index] for index in steps} == steps
        assert bb.tempo_bpm == 120


async def test_frames_whose_segments_do_not_join_are_counted(autojump_clock: Clock) -> None:
    async with leading() as (leader, bb):
        await leader.beat()
        leader.send(
            beat_index=leader.index() + 1, next_segment=Segment(5, 1, 2000, 17 * SECOND, 60_000)
        )
        await trio.testing.wait_all_tasks_blocked()
        assert bb.statistics().frames_undecodable == 1


async def test_a_loop_that_was_blocked_blames_itself(autojump_clock: Clock) -> None:
    async with leading() as (leader, bb):
        await leader.beat(10)
        assert not bb.health().local_degradation
        autojump_clock.jump(0.2)
        leader.send(beat_index=leader.index())
        await trio.sleep(0.5)
        autojump_clock.jump(1.5)
        # Before its own loop got round to anything.
        assert bb.health().local_degradation
        await leader.beat(5)
        assert bb.health().local_degradation
        assert bb.health().tempo_drift == "acceptable"
        await leader.beat(5)
        assert not bb.health().local_degradation


async def test_a_follower_starts_soon_after_its_metronome(autojump_clock: Clock) -> None:
    async with leading(answer=False, tempo_bpm=2.0) as (leader, bb):
        await trio.sleep(7)
        assert bb.health().local_degradation
        async with trio.open_nursery() as nursery:
            await nursery.start(leader.answer)
            await trio.sleep(1.1)
            assert not bb.health().local_degradation
            nursery.cancel_scope.cancel()


async def test_a_leader_may_die_with_its_last_answer(autojump_clock: Clock) -> None:
    async with leading() as (leader, bb), trio.open_nursery() as nursery:
        await leader.beat(2)
        leader.answering = False
        subject = f"backbeat.sync.{CLUSTER_ID}"

        async def succeed() -> None:
            async with leader.transport.open_subscription(subject) as asked:
                leader.reply(await anext(asked))
                # The next leader's first frame comes while the rest of the burst is not answered.
                await anext(asked)
                leader.epoch = 6
                leader.send(beat_index=leader.index())
                await trio.sleep(0.1)
                leader.answering = True

        nursery.start_soon(succeed)
        await trio.sleep(3)
        await leader.beat(2)
        assert bb.health().epoch == 6
        assert bb.statistics().frames_unexplained == 0
        assert bb.health().errors == ()


@pytest.mark.parametrize("ahead", [0, 4])
async def test_a_frame_that_was_not_the_leaders_is_not_followed_for_ever(
    ahead: int, autojump_clock: Clock
) -> None:
    async with leading() as (leader, bb):
        await leader.beat(5)
        index = leader.index() + 1
        slow = Segment(5, 7, index + ahead, (index + ahead) * SECOND, 100)
        with bb.move_on_after(30) as scope:
            # Somebody else tells of another tempo, in the leader's name.
            await trio.sleep(0.999)
            if ahead:
                leader.send(beat_index=index, next_segment=slow)
            else:
                leader.send(beat_index=index, segment=slow)
            await trio.sleep(0.01)
            await leader.beat(60)
        assert scope.cancel_called
        assert bb.tempo_bpm == 60
        assert bb.current_beat() == leader.index()
        # The frame itself, and one of the leader's that came before it was given up.
        assert 1 <= bb.statistics().frames_unexplained <= 2
        assert bb.statistics().locks == (1 if ahead else 2)


async def test_pings_become_rare_and_come_at_once_where_there_is_a_question(
    autojump_clock: Clock,
) -> None:
    async with leading() as (leader, bb):
        await leader.beat(300)
        before = bb.statistics().pings
        await leader.beat(100)
        # Four a burst, of which few were due.
        assert 4 <= bb.statistics().pings - before <= 40
        uncertainty = bb.health().uncertainty
        assert uncertainty is not None
        assert uncertainty < 0.001
        assert bb.health().errors == ()
        # A higher epoch is asked about at once, and the new leader again soon.
        before = bb.statistics().pings
        leader.epoch = 6
        await leader.beat()
        await trio.sleep(0.1)
        assert bb.health().epoch == 6
        assert bb.statistics().pings - before == 4
        await leader.beat(3)
        assert bb.statistics().pings - before >= 8


async def test_an_agent_looks_sooner_where_frames_come_at_odd_times(autojump_clock: Clock) -> None:
    async with leading() as (leader, bb):
        await leader.beat(300)
        # Late, as the clock of somebody has jumped, and no answer has been outlying yet.
        leader.offset_ns -= 40_000_000
        begun = trio.current_time()
        while not bb.statistics().pings_outlying:
            await leader.beat()
        assert trio.current_time() - begun < 6
        await leader.beat(2)
        assert bb.current_position() == pytest.approx(leader.index(), abs=1e-3)


async def test_an_agent_that_missed_a_slow_down_waits_for_its_cluster(
    autojump_clock: Clock,
) -> None:
    async with leading() as (leader, bb):
        await leader.beat(2)
        leader.answering = False
        # Two thirds of the beats are missing that the agent counts for itself.
        slow = leader.index() + 1
        leader.segment = Segment(5, 1, slow, slow * SECOND, 20_000)
        await trio.sleep(30.2)
        ahead = bb.current_position() - (leader.cluster_ns() - leader.segment.t0_ns) / 3e9 - slow
        position, begun = bb.current_position(), trio.current_time()
        beats = bb.beats()
        leader.answering = True
        leader.send(beat_index=leader.index())
        await trio.testing.wait_all_tasks_blocked()
        health = bb.health()
        assert health.local_degradation
        assert health.errors[-1] == (
            f"ahead of the cluster by {ahead:.3g} beats; "
            "the position holds until the grid reaches it"
        )
        assert health.uncertainty is not None
        assert health.uncertainty > 3 * ahead - 1
        with bb.move_on_after(2) as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(leader.beat, 25)
                beat = await anext(beats)
                assert trio.current_time() - begun < 1.2 * 3 * ahead
                nursery.cancel_scope.cancel()
        assert not scope.cancel_called
        assert (beat.index, beat.skipped) == (int(position) + 1, 0)
        assert beat.index == leader.index()
        assert bb.health().errors == ()
        assert bb.statistics().locks == 1


async def test_an_agent_ahead_of_a_pause_that_it_missed(autojump_clock: Clock) -> None:
    async with leading() as (leader, bb):
        await leader.beat(2)
        leader.answering = False
        beat = leader.index()
        await trio.sleep(6.5)
        # Meanwhile the cluster slowed down, and is about to stand still before the agent's beat.
        slow = (beat + 2) * SECOND
        leader.segment = Segment(5, 1, beat + 2, slow, 12_000)
        leader.next_segment = Segment(5, 2, beat + 4, slow + 10 * SECOND, 0)
        before = bb.current_position()
        with bb.move_on_after(3) as scope:
            leader.send(beat_index=leader.index())
            await trio.testing.wait_all_tasks_blocked()
            assert bb.current_position() == pytest.approx(before, abs=0.01)
            leader.answering = True
            await trio.sleep(3)
            assert bb.current_position() >= before
            assert scope.beats_left == pytest.approx(3, abs=0.01)
            assert not bb.health().paused


async def test_a_budget_entered_while_the_grid_catches_up(autojump_clock: Clock) -> None:
    async with leading() as (leader, bb):
        await leader.beat(2)
        leader.answering = False
        await trio.sleep(4.5)
        stopped = leader.index() - 3
        leader.segment = Segment(5, 1, stopped, stopped * SECOND, 0)
        leader.send(beat_index=stopped, tempo_bpm=0.0)
        await trio.sleep(2)
        resumed = leader.cluster_ns() + 3 * SECOND // 2
        leader.next_segment = Segment(5, 2, stopped, resumed, 60_000)
        leader.send(beat_index=stopped, tempo_bpm=0.0)
        await trio.sleep(2)
        position = bb.current_position()
        with bb.move_on_after(3) as scope:
            assert scope.beats_left == pytest.approx(3)
            await trio.sleep(1)
            assert bb.current_position() >= position
            assert scope.beats_left <= 3


async def test_a_jump_of_the_leader_is_not_this_loops_fault(autojump_clock: Clock) -> None:
    async with leading() as (leader, bb):
        await leader.beat(10)
        leader.offset_ns += 3 * SECOND
        await leader.beat(4)
        assert bb.current_beat() == leader.index()
        assert not bb.health().local_degradation
        await leader.beat(20)
        assert bb.health().tempo_drift == "acceptable"


async def test_frames_alone_do_not_move_a_grid_that_stands_still(autojump_clock: Clock) -> None:
    async with leading(answer=False) as (leader, bb):
        await leader.beat(3)
        beat = leader.index() + 2
        leader.next_segment = Segment(5, 1, beat, beat * SECOND, 0)
        await leader.beat(2)
        leader.segment, leader.next_segment = leader.next_segment, None
        for _ in range(60):
            await trio.sleep(1)
            leader.send(beat_index=beat, tempo_bpm=0.0)
            await trio.testing.wait_all_tasks_blocked()
        resumed = leader.cluster_ns() + 3 * SECOND // 2
        leader.next_segment = Segment(5, 2, beat, resumed, 60_000)
        leader.send(beat_index=beat, tempo_bpm=0.0)
        await trio.sleep(1.5)
        leader.segment, leader.next_segment = leader.next_segment, None
        await leader.beat(8)
        assert bb.current_beat() == leader.index()
        assert bb.statistics().frames_unexplained == 0


async def test_forged_epochs_do_not_make_agents_ask_without_pause(
    autojump_clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    async with leading() as (leader, bb):
        await leader.beat(2)
        before = bb.statistics().pings
        for number in range(500):
            leader.send(epoch=10**6 + number, beat_index=leader.index() + 1)
            await trio.sleep(0.001)
        assert bb.statistics().pings - before <= 4 * 0.5 / 0.02 + 8
        assert len(caplog.records) < 15
        assert bb.health().epoch == 5
