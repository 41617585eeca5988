"""What a follower does with frames and with answers to pings."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from msgspec import UNSET, UnsetType
from msgspec.structs import replace

from backbeat_trio._grid.estimate import Ping
from backbeat_trio._grid.follower import (
    JOINING_PINGS,
    STEADY_PINGS,
    Answer,
    Follower,
    FollowerObserver,
)
from backbeat_trio._grid.grid import Grid
from backbeat_trio._grid.steering import MAX_SLEW, Steering
from backbeat_trio._grid.timeline import Timeline
from backbeat_trio._wire import BeatFrame, Segment, SyncReply, beat_phase, window_id

MS = 1_000_000
SECOND = 1_000 * MS
AHEAD = 5 * SECOND
SEGMENT = Segment(1, 0, 0, 0, 120_000)
TIMELINE = Timeline((SEGMENT,))
# A change of the tempo, and the grid of another cluster.
CHANGED = TIMELINE.change(60_000, 40, epoch=1)
OTHER = Timeline((Segment(9, 0, 1000, 0, 240_000),))


class Agent(FollowerObserver):
    """A follower, with methods that play its leader."""

    def __init__(self) -> None:
        self.now = SECOND
        self.grid = Grid(Timeline((Segment(0, 0, 0, 0, 30_000),)), Steering(-self.now), 8)
        self.chance = 0.0
        self.follower = Follower(
            self.grid, cluster_id="c", observer=self, chance=lambda: self.chance
        )
        self.odd: list[str] = []
        self.stale: list[int] = []
        self.calls: list[str] = []

    def on_odd(self, text: str) -> None:
        self.odd.append(text)

    def on_stale(self, epoch: int) -> None:
        self.stale.append(epoch)

    def on_lock(self) -> None:
        self.calls.append("lock")

    def on_followed(self) -> None:
        self.calls.append("followed")

    def answered(
        self, delay_ns: int = MS, *, epoch: int = 1, timeline: Timeline = TIMELINE, lie_ns: int = 0
    ) -> Answer:
        there = self.now - delay_ns // 2 + AHEAD + lie_ns
        told = timeline.since(there).wire_fields()
        reply = SyncReply("c", epoch, f"pulse-{epoch}", there, there, 4, **told)
        return Ping(self.now - delay_ns, there, there, self.now), reply

    def answer(self, *answers: Answer) -> bool:
        return self.follower.answer(answers, self.follower.question, self.now)

    def hear(
        self,
        index: int | None = None,
        *,
        epoch: int = 1,
        timeline: Timeline = TIMELINE,
        cluster_id: str = "c",
    ) -> bool:
        timeline = timeline.since(self.now + AHEAD)
        if index is None:
            index = timeline.index_at(self.now + AHEAD)
        frame = self.frame(index, epoch=epoch, timeline=timeline, cluster_id=cluster_id)
        return self.follower.hear(frame, timeline, self.now, self.now)

    def frame(
        self,
        index: int,
        *,
        epoch: int = 1,
        timeline: Timeline = TIMELINE,
        cluster_id: str = "c",
        incarnation: str | UnsetType = UNSET,
    ) -> BeatFrame:
        return BeatFrame(
            *(cluster_id, index, index % 4 == 0, beat_phase(index, 4)),
            *(timeline.segments[0].milli_bpm / 1000, 4, window_id(index, 4), epoch),
            f"pulse-{epoch}",
            incarnation=incarnation,
            **timeline.wire_fields(),
        )

    @property
    def pause(self) -> int:
        return self.follower.next_burst_ns - self.now

    @property
    def error_ns(self) -> int:
        return self.grid.steering.target_at(self.now) - AHEAD


@pytest.fixture
def agent() -> Agent:
    return Agent()


def test_the_first_burst_locks(agent: Agent) -> None:
    assert (agent.follower.pings, agent.follower.uncertainty_ns(agent.now)) == (JOINING_PINGS, None)
    assert agent.answer(agent.answered())
    assert agent.calls == ["lock", "followed"]
    assert agent.follower.locked
    assert (agent.follower.epoch, agent.follower.leader_id) == (1, "pulse-1")
    assert agent.grid.index_at(agent.now) == TIMELINE.index_at(agent.now + AHEAD)
    assert agent.grid.beats_per_bar == 4
    assert agent.follower.pings == STEADY_PINGS
    assert agent.follower.uncertainty_ns(agent.now) is not None


@pytest.mark.parametrize(
    ("milli", "seconds"), [(120_000, 0.5), (2_000, 5.0), (6_000_000, 0.25), (0, 1.0)]
)
def test_bursts_come_once_a_beat_at_first_within_limits(
    milli: int, seconds: float, agent: Agent
) -> None:
    assert agent.answer()
    assert agent.pause == SECOND
    timeline = Timeline((Segment(1, 0, 8, 0, milli),))
    agent.answer(agent.answered(timeline=timeline))
    assert agent.pause == seconds * SECOND
    for _ in range(8):
        agent.answer(agent.answered(timeline=timeline))
    assert not agent.answer(agent.answered(timeline=timeline, lie_ns=SECOND))
    assert agent.pause == SECOND // 4


def settle(agent: Agent, bursts: int = 40) -> list[float]:
    """Answer this many bursts when they are due, and return the intervals between them."""
    pauses = []
    for _ in range(bursts):
        assert agent.answer(agent.answered())
        pauses.append(agent.pause / SECOND)
        agent.now = agent.follower.next_burst_ns
    return pauses


def test_bursts_back_off_once_the_estimate_is_good(agent: Agent) -> None:
    pauses = settle(agent)
    assert pauses[0] == 0.5
    # The rate of the clock must be known before bursts can be far apart.
    assert max(pauses[:5]) <= 1.0
    assert all(later in (pause, 2 * pause, pause / 2) for pause, later in pairwise(pauses))
    assert 16 <= pauses[-1] <= 64
    uncertainty = agent.follower.uncertainty_ns(agent.now)
    assert uncertainty is not None
    assert uncertainty <= MS
    # Answer pings although no frames come.
    agent.hear()
    assert not agent.follower.in_holdover(agent.now + SECOND)
    assert agent.follower.in_holdover(agent.now + 2 * SECOND)


def surprise_by_another_leader(agent: Agent) -> None:
    assert agent.hear(epoch=2)
    assert agent.answer(agent.answered(epoch=2))


def surprise_by_an_outlier(agent: Agent) -> None:
    assert not agent.answer(agent.answered(lie_ns=10 * MS))


def surprise_by_frames(agent: Agent) -> None:
    for number in range(3):
        assert agent.follower._planned_ns - agent.now > 10 * SECOND
        due = TIMELINE.time_of(TIMELINE.index_at(agent.now + AHEAD) + 1) - AHEAD
        agent.now = due + (12 + number) * MS
        assert not agent.hear()


def surprise_by_a_stall(agent: Agent) -> None:
    told = TIMELINE.index_at(agent.now + AHEAD)
    frame = agent.frame(told)
    agent.now += 3 * SECOND
    assert not agent.follower.hear(frame, TIMELINE, agent.now - 2 * SECOND, agent.now)


def surprise_by_a_reconnection(agent: Agent) -> None:
    agent.follower.hurry(agent.now)


@pytest.mark.parametrize(
    "surprise",
    [
        surprise_by_another_leader,
        surprise_by_an_outlier,
        surprise_by_frames,
        surprise_by_a_stall,
        surprise_by_a_reconnection,
    ],
)
def test_bursts_come_sooner_after_a_surprise(
    surprise: Callable[[Agent], None], agent: Agent
) -> None:
    settle(agent)
    agent.answer(agent.answered())
    assert agent.pause >= 16 * SECOND
    surprise(agent)
    assert agent.pause <= SECOND


def test_a_burst_that_is_slightly_off_halves_the_interval(agent: Agent) -> None:
    before = settle(agent)[-1]
    assert agent.answer(agent.answered(lie_ns=300_000))
    assert agent.pause == before / 2 * SECOND


def test_a_change_that_a_frame_announced_is_checked_by_pings_soon(agent: Agent) -> None:
    settle(agent)
    agent.answer(agent.answered())
    agent.chance = 0.5
    ahead = TIMELINE.index_at(agent.now + AHEAD) + 8
    changed = TIMELINE.change(60_000, ahead, epoch=1)
    assert not agent.hear(timeline=changed)
    assert agent.follower._planned_ns - agent.now == 2 * SECOND
    # While the leader does not know the change, it is asked once a beat.
    for _ in range(3):
        assert agent.grid.timeline.segments == changed.segments
        assert agent.pause <= 2 * SECOND
        agent.now = agent.follower.next_burst_ns
        agent.answer(agent.answered())
    assert agent.grid.timeline.segments == TIMELINE.segments


def test_a_missing_frame_causes_a_burst(agent: Agent) -> None:
    settle(agent)
    agent.answer(agent.answered())
    for chance, after in ((0.0, 0.75), (1.0, 1.0)):
        agent.chance = chance
        agent.now = TIMELINE.time_of(TIMELINE.index_at(agent.now + AHEAD) + 2) - AHEAD
        assert not agent.hear()
        assert agent.pause == pytest.approx(after * SECOND, abs=MS)
    # It causes one burst only, until another frame has come.
    agent.now = agent.follower.next_burst_ns
    agent.answer(agent.answered())
    assert agent.pause >= 16 * SECOND


def test_a_leader_that_asks_for_patience_is_pinged_less(agent: Agent) -> None:
    def told(wait: float) -> Answer:
        ping, reply = agent.answered()
        return ping, replace(reply, wait_ns=round(wait * SECOND))

    burst = [told(20.0) for _ in range(STEADY_PINGS)]
    # An agent that has not locked yet sends a few more pings.
    assert [agent.follower.is_enough(burst[:n]) for n in (1, 3, 4)] == [False, False, True]
    agent.answer(*burst)
    assert agent.pause == 20 * SECOND
    assert agent.follower.is_enough(burst[:1])
    agent.now += SECOND
    agent.follower.hurry(agent.now)
    assert agent.pause == 19 * SECOND
    # A frame that must be checked is checked at once, in spite of the wait.
    assert agent.hear(epoch=7)
    agent.answer(agent.answered(epoch=7))
    assert agent.pause == SECOND // 2
    # The wait is at most about a minute, whatever the leader asks for.
    ping, reply = agent.answered(epoch=7)
    agent.answer((ping, replace(reply, wait_ns=10**18)))
    assert agent.pause == 64 * SECOND


def test_agents_that_started_together_do_not_ping_together() -> None:
    one, other = Agent(), Agent()
    one.chance = 1.0
    for agent in (one, other):
        settle(agent)
    assert max(settle(one, 8)) <= 64
    assert settle(other, 1)[0] * 1.25 == settle(one, 1)[0]


@pytest.mark.parametrize("delay", [MS, 80 * MS])
def test_frames_steer_only_if_they_are_better_than_pings(delay: int, agent: Agent) -> None:
    assert agent.answer(agent.answered(delay))
    assert abs(agent.error_ns) <= 1000
    # A burst is lost, and the next frame took 40 ms.
    agent.now += 540 * MS
    agent.answer()
    assert not agent.hear()
    assert abs(agent.error_ns) <= 1000
    # While the rate of the clock is unknown, pings say little after three minutes.
    agent.now += 180 * SECOND
    agent.answer()
    assert not agent.hear()
    assert agent.error_ns == pytest.approx(-40 * MS, abs=MS)


def follow_frames(agent: Agent) -> None:
    """Follow a leader that answers no pings, until its last frame has just come."""
    while not agent.follower.locked:
        agent.now += SECOND // 2
        agent.hear()
        agent.answer()
    assert abs(agent.error_ns) <= MS


def test_frames_that_were_held_up_do_not_move_an_agent_back(agent: Agent) -> None:
    follow_frames(agent)
    # The next four frames come all at once, 0.2 to 1.7 s late, and those after them in time.
    agent.now += 2200 * MS
    last = agent.follower._next_index
    for index in range(last, last + 4):
        assert not agent.hear(index)
        assert abs(agent.error_ns) <= MS
    agent.now += 300 * MS
    assert not agent.hear()
    agent.now += SECOND // 2 + 40 * MS
    # A frame that is only a little late moves the agent a little.
    assert not agent.hear()
    assert -41 * MS < agent.error_ns < -1 * MS


def test_frames_that_stay_late_move_an_agent_back_after_a_while(agent: Agent) -> None:
    follow_frames(agent)
    # The leader's clock stopped for 0.3 s, and its frames take up to 10 ms.
    errors = []
    for delay in (300, 10, -10, 5):
        agent.now += SECOND // 2 + delay * MS
        assert not agent.hear(agent.follower._next_index)
        errors.append(round(agent.error_ns / MS))
    assert errors == [0, 0, -300, -305]


def test_one_bad_ping_of_another_leader_does_not_move_the_offset_by_its_error(agent: Agent) -> None:
    assert agent.answer(agent.answered())
    for _ in range(8):
        agent.now += SECOND // 2
        assert agent.answer(agent.answered())
    # The whole delay was on the way to the leader.
    assert agent.answer(agent.answered(200 * MS, epoch=2, lie_ns=100 * MS))
    assert agent.follower.epoch == 2
    assert abs(agent.error_ns) <= MS
    for _ in range(8):
        agent.now += SECOND // 2
        assert agent.answer(agent.answered(epoch=2))
        assert abs(agent.error_ns) <= MS


def test_another_grid_of_the_same_epoch_is_followed_in_its_own_time(agent: Agent) -> None:
    # The server came back with an empty store, so epochs began again.
    agent.answer(agent.answered())
    later = 300_000 * SECOND
    other = Timeline((Segment(1, 0, 0, agent.now + AHEAD + later, 120_000),))
    for _ in range(2):
        agent.now += SECOND
        assert not agent.answer(agent.answered(timeline=other, lie_ns=later))
    # The clock of the agent jumps, so these answers do not agree with one another.
    agent.now += 4 * SECOND
    later -= 3 * SECOND
    agent.answer(agent.answered(timeline=other, lie_ns=later))
    assert agent.calls.count("lock") == 2
    assert agent.grid.index_at(agent.now) == other.index_at(agent.now + AHEAD + later) == 6
    assert agent.error_ns == later


def test_a_frame_from_far_ahead_is_checked_by_pings(agent: Agent) -> None:
    agent.answer(agent.answered())
    assert agent.hear(1000)
    assert agent.follower.question is not None
    assert agent.answer(agent.answered())
    assert agent.follower.question is None
    assert agent.follower.counts.frames_unexplained == 1
    assert "did not confirm" in agent.odd[-1]
    assert agent.follower.counts.frames == 0


def test_a_higher_epoch_is_believed_only_after_an_answer(agent: Agent) -> None:
    agent.answer(agent.answered())
    agent.now += SECOND // 2
    assert agent.hear(epoch=7)
    # The present leader still answers and beats.
    assert agent.answer(agent.answered())
    assert agent.follower.epoch == 1
    agent.now += SECOND // 2
    assert agent.hear(epoch=7)
    assert agent.answer(agent.answered(epoch=7))
    assert agent.follower.epoch == 7
    assert agent.follower.counts.frames == 1
    assert not agent.hear(epoch=1)
    assert agent.stale == [1]
    assert agent.follower.counts.locks == 1


def test_a_frame_that_came_during_a_burst_is_not_decided_by_it(agent: Agent) -> None:
    agent.answer(agent.answered())
    agent.now += SECOND // 2
    assert agent.hear(epoch=2)
    assert agent.follower.answer([agent.answered()], None, agent.now)
    assert agent.follower.question is not None
    # No answer comes, and two frames of the old leader are missing.
    agent.now += 2 * SECOND
    agent.answer()
    assert agent.follower.epoch == 2
    assert agent.follower.counts.frames == 1


def test_a_first_frame_waits_for_the_subscriptions_of_its_leader(agent: Agent) -> None:
    # A leader far away publishes its first frame, 200 ms late, before it can answer pings.
    agent.now += 200 * MS
    assert agent.hear()
    assert not agent.answer()
    assert not agent.follower.locked
    assert agent.pause == 250 * MS
    agent.now += agent.pause
    assert agent.answer(agent.answered(200 * MS))
    assert abs(agent.error_ns) <= MS


def test_frames_of_a_leader_that_never_answers_are_believed_after_half_a_second(
    agent: Agent,
) -> None:
    begun = agent.now
    # Each frame is another question.
    while not agent.follower.locked:
        agent.hear(timeline=TIMELINE.change(600_000, 0, epoch=1))
        agent.answer()
        agent.now += 100 * MS
    assert 500 * MS <= agent.now - begun <= 650 * MS


def test_a_leader_whose_frames_were_believed_first_is_measured_anew(agent: Agent) -> None:
    agent.answer(agent.answered())
    settle(agent, 10)
    # The next leader is so far away that its frames are believed before its first answer comes. It
    # measured cluster time less exactly.
    agent.now += 10 * SECOND
    lie, delay = -280 * MS, 600 * MS
    while agent.follower.epoch == 1:
        agent.hear(epoch=2)
        agent.answer()
        agent.now += 100 * MS
    for _ in range(6):
        agent.now += SECOND
        assert agent.answer(agent.answered(delay, epoch=2, lie_ns=lie))
    assert agent.error_ns == pytest.approx(lie, abs=MS)
    assert agent.follower.counts.locks == 1


def test_a_change_that_three_bursts_do_not_confirm_is_dropped(agent: Agent) -> None:
    agent.answer(agent.answered())
    agent.now += SECOND // 2
    assert not agent.hear(timeline=CHANGED)
    assert agent.grid.timeline.segments == CHANGED.segments
    for number in range(3):
        agent.now += SECOND // 2
        agent.answer(agent.answered())
        assert (agent.grid.timeline.segments == TIMELINE.segments) == (number == 2)
    assert agent.follower.counts.locks == 1


def test_foreign_stale_and_repeated_frames_are_counted(agent: Agent) -> None:
    agent.answer(agent.answered())
    agent.now += SECOND // 2
    assert not agent.hear()
    assert not agent.hear()
    assert not agent.hear(cluster_id="another")
    counts = agent.follower.counts
    assert (counts.frames, counts.frames_repeated, counts.frames_foreign) == (1, 1, 1)


def test_a_frame_with_an_unknown_older_segment_is_checked_by_pings(agent: Agent) -> None:
    agent.answer(agent.answered())
    agent.now += SECOND // 2
    # It is in the leader's name, and by its segment far ahead of the grid.
    newer = TIMELINE.change(120_000, 1, epoch=1).since(agent.now + AHEAD)
    agent.answer(agent.answered(timeline=newer))
    made_up = Timeline((Segment(1, 0, 10**9, agent.now + AHEAD, 120_000),))
    assert agent.hear(10**9, timeline=made_up)
    agent.answer(agent.answered(timeline=newer))
    assert agent.follower.counts.frames_unexplained == 1
    agent.now += SECOND // 2
    assert not agent.hear(timeline=newer)
    assert agent.follower.counts.frames == 1


def test_an_agent_that_holds_its_position_still_hears_the_leader(agent: Agent) -> None:
    agent.answer(agent.answered())
    agent.hear()
    assert agent.follower.error_text(agent.now) is None
    # It is six beats ahead, so it holds its position for three seconds.
    agent.grid.steering.step(AHEAD + 3 * SECOND, at_ns=agent.now)
    position = agent.grid.position_at(agent.now)
    for _ in range(4):
        agent.now += SECOND // 2
        agent.answer(agent.answered())
        agent.hear()
        assert not agent.follower.in_holdover(agent.now + SECOND // 2)
    assert agent.error_ns == pytest.approx(0, abs=MS)
    assert agent.grid.position_at(agent.now) == pytest.approx(position + 1)
    assert agent.follower.error_text(agent.now) == (
        "ahead of the cluster by 3 beats; the position holds until the grid reaches it"
    )
    assert agent.follower.counts.frames == 5
    # So another leader is not believed.
    assert not agent.hear(epoch=0)
    assert agent.stale == [0]
    agent.now += 2 * SECOND
    assert agent.follower.error_text(agent.now) is None
    assert agent.follower.in_holdover(agent.now)


@pytest.mark.parametrize(("apart", "where"), [(100 * MS, "ahead of"), (-100 * MS, "behind")])
def test_a_large_error_is_reported_while_it_is_corrected(
    apart: int, where: str, agent: Agent
) -> None:
    agent.answer(agent.answered())
    agent.now += SECOND
    agent.grid.steering.step(AHEAD + apart, at_ns=agent.now)
    agent.answer(agent.answered())
    text = agent.follower.error_text(agent.now)
    assert text == f"{where} the cluster by 0.2 beats; the position is steered to it"
    agent.now += 2 * SECOND
    assert agent.follower.error_text(agent.now) is None


@pytest.mark.parametrize(
    ("behind", "named", "held"),
    [(7, "another", True), (9, "another", False), (-3, "another", False), (900, "one", True)],
)
def test_a_grid_that_is_behind_holds_the_position(
    behind: int, named: str, held: bool, agent: Agent
) -> None:
    ping, reply = agent.answered()
    agent.answer((ping, replace(reply, incarnation="one")))
    agent.now += 1000 * SECOND
    before = agent.grid.index_at(agent.now)
    # It has four beats a bar, and begins at another instant of cluster time.
    other = Timeline((Segment(2, 0, before - behind, 7 * 10**15, 120_000),))
    lie = 7 * 10**15 - agent.now - AHEAD + 2 * MS
    for _ in range(3):
        ping, reply = agent.answered(epoch=2, timeline=other, lie_ns=lie)
        agent.answer((ping, replace(reply, incarnation=named)))
    assert agent.follower.counts.locks == 2
    assert agent.grid.index_at(agent.now) == (before if held else before - behind)
    # The leader's frames are followed from the first one on.
    offset = other.segments[0].t0_ns - agent.now
    for number in range(1, 3):
        agent.now += SECOND // 2
        index = before - behind + number
        frame = agent.frame(index, epoch=2, timeline=other, incarnation=named)
        assert not agent.follower.hear(frame, other, agent.now, agent.now)
    assert agent.follower.counts.frames == 2
    assert agent.grid.cluster_at(agent.now) == pytest.approx(agent.now + offset, abs=10 * MS)
    assert (agent.follower.error_text(agent.now) is not None) == (held and behind > 2)


def test_a_new_grid_of_the_same_epoch_is_followed_after_three_bursts(agent: Agent) -> None:
    agent.answer(agent.answered())
    other = Timeline((Segment(1, 0, 0, 7 * 10**15, 120_000),))
    for _ in range(3):
        agent.now += SECOND // 2
        agent.answer(agent.answered(timeline=other, lie_ns=7 * 10**15))
    assert agent.follower.counts.locks == 2
    assert agent.grid.timeline == other
    assert agent.error_ns == pytest.approx(7 * 10**15, abs=MS)


def test_answers_whose_segments_do_not_join_are_counted(agent: Agent) -> None:
    ping, reply = agent.answered()
    broken = Segment(1, 1, 0, 0, 60_000)
    told = SyncReply(
        *("c", 1, "pulse-1", reply.received_ns, reply.sent_ns, 4, SEGMENT),
        next_segment=broken,
    )
    assert agent.answer((ping, told))
    assert not agent.follower.locked
    assert agent.follower.counts.pings_failed == 1


class AnybodySaysAnything(RuleBasedStateMachine):
    """Whatever is heard from any process, the position never goes back on one grid."""

    def __init__(self) -> None:
        super().__init__()
        self.agent = Agent()
        self.locks = 0
        self.position = self.agent.grid.position_at(self.agent.now)

    epochs = st.integers(0, 4)
    timelines = st.sampled_from([TIMELINE, CHANGED, OTHER, TIMELINE.change(0, 30, epoch=1)])

    @rule(ms=st.integers(0, 3000))
    def wait(self, ms: int) -> None:
        self.agent.now += ms * MS

    @rule(epoch=epochs, timeline=timelines, ahead=st.integers(-3, 3), rest=st.randoms())
    def hear(self, epoch: int, timeline: Timeline, ahead: int, rest: random.Random) -> None:
        agent = self.agent
        present = timeline.since(agent.now + AHEAD).segments[0]
        index = timeline.index_at(agent.now + AHEAD)
        if present.milli_bpm:
            index = max(present.beat0, index + ahead)
        asked = agent.hear(index, epoch=epoch, timeline=timeline)
        assert not asked or agent.follower.question is not None

    @rule(
        epoch=epochs,
        timeline=timelines,
        delay=st.integers(0, 300),
        lie=st.sampled_from([0, 0, 0, -3600, -2, 2, 3600]),
    )
    def answer(self, epoch: int, timeline: Timeline, delay: int, lie: int) -> None:
        agent = self.agent
        told = [
            agent.answered(d * MS, epoch=epoch, timeline=timeline, lie_ns=lie * SECOND)
            for d in (delay, delay // 2)
        ]
        agent.answer(*told)

    @rule(seconds=st.integers(0, 10))
    def fall_silent(self, seconds: int) -> None:
        agent = self.agent
        agent.now += seconds * SECOND
        silent = not agent.follower.locked or agent.follower.in_holdover(agent.now)
        agent.answer()
        # Nobody else is heard: then frames are believed after half a second.
        assert not (silent and seconds and agent.follower.question)

    @invariant()
    def nothing_runs_back(self) -> None:
        agent = self.agent
        position = agent.grid.position_at(agent.now)
        if agent.follower.counts.locks == self.locks:
            assert position >= self.position
        self.locks, self.position = agent.follower.counts.locks, position

    @invariant()
    def it_goes_on_within_its_limits(self) -> None:
        agent, grid = self.agent, self.agent.grid
        cluster = grid.cluster_at(agent.now)
        # Not faster than slewing allows, give or take the rounding of both instants.
        later = grid.cluster_at(agent.now + 100 * MS) - cluster
        assert later <= 100 * MS * (1.1 + MAX_SLEW) + 1
        assert later >= 100 * MS * (0.9 - MAX_SLEW) - 1
        uncertainty = agent.follower.uncertainty_ns(agent.now)
        assert uncertainty is None or uncertainty >= 0
        assert agent.pause <= 64 * SECOND


AnybodySaysAnything.TestCase.settings = settings(stateful_step_count=40, deadline=None)
TestAnybodySaysAnything = AnybodySaysAnything.TestCase
