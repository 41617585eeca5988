"""What is measured of cluster time, and the clock that is steered by it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from heapq import heappop, heappush

import pytest
from hypothesis import assume, given, strategies as st

from backbeat_trio._grid.estimate import (
    REST_NS,
    Estimate,
    Ping,
    PingRate,
    Verdict,
    best_ping,
)
from backbeat_trio._grid.steering import MAX_SLEW, MIN_STEP_NS, PARTS, Steering
from backbeat_trio._grid.timeline import beat_ns
from backbeat_trio._wire import MAX_MILLI_BPM, MIN_MILLI_BPM

SECOND = 1_000_000_000
BEAT = SECOND // 2

millis = st.integers(MIN_MILLI_BPM, MAX_MILLI_BPM)
instants = st.integers(-(10**15), 10**18)
frequencies = st.integers(-(10**11), 10**11)
offsets = st.integers(-(10**10), 10**10)


waits = st.integers(0, 10**10)


@given(offsets, st.lists(st.tuples(waits, offsets, frequencies), max_size=6), millis)
def test_cluster_time_goes_back_only_in_steps_and_is_slewed_within_the_limit(
    first: int, corrections: list[tuple[int, int, int]], milli: int
) -> None:
    steering, now, slowest = Steering(first), 0, 1 - MAX_SLEW
    for wait, offset, frequency in corrections:
        before = steering.cluster_at(now)
        assert steering.cluster_at(now + wait) - before >= math.floor(wait * slowest) - 1
        now += wait
        before = steering.cluster_at(now)
        steering.correct(now, offset, beat_ns=beat_ns(milli), frequency=frequency)
        far = abs(now + offset - before) > max(MIN_STEP_NS, beat_ns(milli) // 4)
        assert steering.cluster_at(now) == (now + offset if far else before)
        slowest = 1 - MAX_SLEW + frequency / PARTS
    settled = steering.settled_ns + 1
    assert steering.cluster_at(settled) == settled + steering.target_at(settled)


@given(offsets, offsets, frequencies, st.integers(-(10**10), 10**11))
def test_local_at_inverts_cluster_at(
    first: int, second: int, frequency: int, cluster_ns: int
) -> None:
    steering = Steering(first)
    steering.correct(0, second, beat_ns=10**9, frequency=frequency)
    local = steering.local_at(cluster_ns)
    assert steering.cluster_at(local) >= cluster_ns
    assert steering.cluster_at(local - 1) < cluster_ns


def test_a_large_error_is_stepped_and_a_small_one_is_slewed() -> None:
    steering = Steering(0)
    for offset in (300_000_000, 0, -300_000_000):
        steering.correct(0, offset, beat_ns=1_000_000_000)
        assert steering.cluster_at(0) == offset
        assert steering.settled_ns == 0
    steering.correct(0, -500_000_000, beat_ns=1_000_000_000)
    assert steering.cluster_at(0) == -300_000_000
    assert steering.settled_ns == math.ceil(200_000_000 / MAX_SLEW)
    assert steering.cluster_at(steering.settled_ns) == steering.settled_ns - 500_000_000


pings = st.builds(Ping, instants, instants, instants, instants)


@given(instants, st.integers(0, 10**9), st.integers(0, 10**9), st.integers(0, 10**9), offsets)
def test_a_ping_is_wrong_by_half_its_delay_at_most(
    sent: int, there: int, work: int, back: int, offset: int
) -> None:
    ping = Ping(
        sent,
        sent + there + offset,
        sent + there + work + offset,
        sent + there + work + back,
    )
    assert ping.delay_ns == there + back
    assert abs(ping.offset_ns - offset) <= (there + back) // 2 + 1


@given(st.lists(pings))
def test_the_best_ping_is_a_valid_one(burst: list[Ping]) -> None:
    best = best_ping(burst)
    honest = [p for p in burst if p.delay_ns >= 0 and p.replied_ns >= p.received_ns]
    assume(honest)
    assert best is not None
    assert best.delay_ns == min(p.delay_ns for p in honest)


def test_an_empty_burst_has_no_best_ping() -> None:
    assert best_ping([]) is None
    assert best_ping([Ping(0, 0, 100, 50)]) is None


# Estimates. The leader's time is the true one. The agent's clock has its own rate and offset, and
# messages are delayed.


class Agent:
    def __init__(self, *, ppm: float = 0.0, start_ns: int = 0, seed: int = 1) -> None:
        self.random = random.Random(seed)
        self.rate = 1 + ppm * 1e-6
        self.start_ns = start_ns
        self.way_ns = self.jitter_ns = 150_000
        self.now = 0
        self.estimate = Estimate()
        self.steering = Steering()
        self.locked = False

    def local(self, true_ns: float) -> int:
        return round(true_ns * self.rate) + self.start_ns

    def ping(self, lie_ns: int = 0) -> Ping:
        there, back = (self.way_ns + self.random.expovariate(1 / self.jitter_ns) for _ in range(2))
        sent, came = self.now, self.now + there
        self.now = round(came + 100_000 + back)
        return Ping(
            self.local(sent),
            round(came) + lie_ns,
            round(came) + 100_000 + lie_ns,
            self.local(self.now),
        )

    def burst(self, pings: int = 4, lie_ns: int = 0) -> Verdict:
        verdict = self.estimate.add([self.ping(lie_ns) for _ in range(pings)])
        now, estimate = self.local(self.now), self.estimate
        offset, frequency = estimate.offset_at(now), estimate.frequency
        if not self.locked:
            self.locked = True
            self.steering.step(offset, at_ns=now, frequency=frequency)
        elif verdict in (Verdict.TAKEN, Verdict.OVERRULED):
            self.steering.correct(now, offset, beat_ns=BEAT, frequency=frequency)
        return verdict

    def error(self, true_ns: float) -> float:
        return self.steering.cluster_at(self.local(true_ns)) - true_ns

    def run(self, beats: int, *, each: Callable[[], object] = lambda: None) -> list[float]:
        errors = []
        for _ in range(beats):
            begun = self.now
            self.burst(4 if self.locked else 16)
            each()
            errors += [self.error(self.now + part * BEAT / 10) for part in range(10)]
            self.now = begun + BEAT
        return errors


def p99(values: list[float]) -> float:
    return sorted(map(abs, values))[len(values) * 99 // 100]


@pytest.mark.parametrize("ppm", [-200, -20, 0, 20, 200])
def test_clocks_with_different_rates_agree_to_a_fifth_of_a_millisecond(ppm: int) -> None:
    agent = Agent(ppm=ppm, start_ns=-5 * SECOND, seed=ppm)
    agent.run(10)
    assert p99(agent.run(200)) <= 200_000
    assert agent.estimate.frequency / PARTS == pytest.approx(-ppm * 1e-6, abs=5e-6)


@pytest.mark.parametrize(
    ("way", "jitter", "gap"),
    [(300_000, 150_000, BEAT), (2 * 10**8, 4_000_000, SECOND), (4 * 10**7, 2_000_000, BEAT)],
)
def test_an_estimate_knows_how_exact_its_rate_is(way: int, jitter: int, gap: int) -> None:
    ratios: list[list[float]] = []
    for seed in range(100):
        chance = random.Random(seed)
        agent = Agent(ppm=chance.uniform(-400, 400), seed=seed)
        agent.way_ns, agent.jitter_ns = way // 2, jitter
        ratios.append([])
        for number in range(10):
            agent.burst(4 if number else 16)
            off = agent.estimate.frequency / PARTS - (1 / agent.rate - 1)
            ratios[-1].append(off / agent.estimate._frequency_sd)
            agent.now += gap
    for number in range(1, 10):
        # In standard deviations, which may be smaller than claimed, but not larger.
        spread = math.sqrt(sum(ratio[number] ** 2 for ratio in ratios) / len(ratios))
        assert 0.2 <= spread <= 1


@pytest.mark.parametrize("ppm", [-200, 200])
def test_a_minute_without_pings_after_a_minute_with_them(ppm: int) -> None:
    agent = Agent(ppm=ppm, start_ns=3 * SECOND)
    agent.run(120)
    later = agent.now + 60 * SECOND
    assert abs(agent.error(later)) <= 5_000_000
    known, grown = (agent.estimate.uncertainty_at(agent.local(t)) for t in (agent.now, later))
    assert abs(agent.error(later)) <= grown
    assert known < 500_000 < grown - known + 500_000
    assert grown > known


@pytest.mark.parametrize("ppm", [80_000, -80_000])
def test_a_clock_with_an_extreme_rate(ppm: int) -> None:
    agent = Agent(ppm=ppm)
    agent.run(20)
    assert p99(agent.run(60)) <= 1_000_000


@pytest.mark.parametrize("jump", [-2 * SECOND, -10_000_000, 10_000_000, 2 * SECOND])
def test_a_jump_of_a_clock_is_noticed(jump: int) -> None:
    agent = Agent(ppm=50)
    agent.run(60)
    frequency = agent.estimate.frequency
    agent.start_ns += jump
    verdicts = []
    for _ in range(3):
        verdicts.append(agent.burst())
        agent.now += BEAT
    assert verdicts == [Verdict.OUTLYING, Verdict.OUTLYING, Verdict.OVERRULED]
    now = agent.local(agent.now)
    assert abs(now + agent.estimate.offset_at(now) - agent.now) <= 500_000
    # The frequency that was measured before is kept.
    assert agent.estimate.frequency / PARTS == pytest.approx(frequency / PARTS, abs=20e-6)
    # An agent that is ahead of its cluster holds its position, and never goes back.
    errors = agent.run(80)
    assert p99(errors[-50:]) <= 300_000


@pytest.mark.parametrize("beats", [2, 60])
@pytest.mark.parametrize("missing", [10_000_000, 150_000_000, 320_000_000])
def test_a_clock_that_stood_still_during_a_ping_is_noticed(missing: int, beats: int) -> None:
    agent = Agent(ppm=50)
    agent.way_ns = 220_000_000
    agent.run(beats)
    ping, suspended = agent.ping(), 320_000_000
    # The machine was asleep, and the answer came `suspended - missing` before it woke up.
    agent.start_ns -= suspended
    shorter = ping._replace(answered_ns=ping.answered_ns - missing)
    assert agent.estimate.add([shorter, agent.ping()]) is Verdict.OUTLYING
    for verdict in (Verdict.OUTLYING, Verdict.OUTLYING, Verdict.OVERRULED, Verdict.TAKEN):
        agent.now += BEAT
        assert agent.burst() is verdict
    assert abs(offset_error(agent)) <= 500_000
    agent.run(20)
    assert agent.estimate.frequency / PARTS == pytest.approx(-50e-6, abs=20e-6)


@pytest.mark.parametrize("before", [0, 3, 15])
def test_a_clock_that_stood_still_during_the_first_burst_is_noticed(before: int) -> None:
    agent = Agent(ppm=50)
    agent.way_ns = 220_000_000
    burst = [agent.ping() for _ in range(before)]
    ping, suspended, missing = agent.ping(), 400_000_000, 320_000_000
    agent.start_ns -= suspended
    burst.append(ping._replace(answered_ns=ping.answered_ns - missing))
    burst += [agent.ping() for _ in range(15 - before)]
    assert agent.estimate.add(burst) is Verdict.TAKEN
    assert abs(offset_error(agent)) >= 100_000_000
    # The bursts that follow agree with one another, and not with the short ping.
    for verdict in (Verdict.TAKEN, Verdict.TAKEN, Verdict.OVERRULED, Verdict.TAKEN):
        agent.now += BEAT
        assert agent.burst() is verdict
    assert abs(offset_error(agent)) <= 500_000
    agent.run(20)
    assert agent.estimate.frequency / PARTS == pytest.approx(-50e-6, abs=20e-6)


def test_round_trips_that_become_longer_do_not_undo_two_shorter_ones() -> None:
    # All that the longer ones take more is on one way, so they are wrong by half of it.
    agent, more = Agent(), 100_000_000
    for _ in range(2):
        assert agent.burst() is Verdict.TAKEN
        agent.now += BEAT
    for _ in range(20):
        pings = []
        for _ in range(4):
            ping = agent.ping()
            agent.now += more
            pings.append(ping._replace(answered_ns=ping.answered_ns + more))
        assert agent.estimate.add(pings) is Verdict.TAKEN
        agent.now += BEAT
    assert abs(offset_error(agent)) <= more / 4


@pytest.mark.parametrize("several", [False, True])
def test_a_shorter_round_trip_is_used_once_the_clock_is_known_to_run_on(several: bool) -> None:
    # Until now the answers came late, so the estimate was wrong by half of it.
    agent, late = Agent(), 100_000_000
    agent.way_ns = 20_000_000

    def answer_late() -> Ping:
        ping = agent.ping()
        agent.now += late
        return ping._replace(answered_ns=ping.answered_ns + late)

    for _ in range(10):
        assert agent.estimate.add([answer_late()]) is Verdict.TAKEN
        agent.now += BEAT
    assert abs(offset_error(agent)) >= 45_000_000
    if several:
        # The other pings of the burst are as short.
        assert agent.burst() is Verdict.TAKEN
    else:
        assert agent.burst(1) is Verdict.OUTLYING
        agent.now += BEAT
        assert agent.estimate.add([answer_late()]) is Verdict.TAKEN
    assert agent.estimate.way_ns <= 45_000_000
    assert abs(offset_error(agent)) <= 1_000_000


@pytest.mark.parametrize(
    ("ppm", "way"), [(-3_000, 150_000), (80_000, 150_000), (-13_000, 245_000_000)]
)
def test_a_rate_that_changes_back_is_measured_anew(ppm: int, way: int) -> None:
    agent = Agent()
    agent.way_ns = way

    def run(ppm: int) -> list[Verdict]:
        before = agent.local(agent.now)
        agent.rate = 1 + ppm * 1e-6
        agent.start_ns += before - agent.local(agent.now)
        # After the first burst that is off, others follow so soon that their delays hide the rate.
        verdicts: list[Verdict] = []
        for _ in range(30):
            agent.now += SECOND // 100 if Verdict.OUTLYING in verdicts[-1:] else 5 * SECOND
            verdicts.append(agent.burst())
        return verdicts

    run(50)
    for rate in (ppm, 0):
        verdicts = run(rate)
        assert Verdict.OVERRULED in verdicts
        assert set(verdicts[-15:]) == {Verdict.TAKEN}
        assert abs(offset_error(agent)) <= 500_000
        assert agent.estimate.frequency / PARTS == pytest.approx(1 / agent.rate - 1, abs=20e-6)


def test_wrong_answers_are_outlying_and_harmless() -> None:
    agent = Agent(ppm=-30)
    agent.run(60)
    for round_ in range(20):
        lie = SECOND * (3 + round_)
        assert agent.burst(lie_ns=lie * (-1) ** round_) is Verdict.OUTLYING
        assert abs(agent.error(agent.now)) <= 300_000
        agent.now += BEAT
        # Somebody else answers in between, and is believed.
        if round_ % 2:
            assert agent.burst() is Verdict.TAKEN


def test_the_leaders_answers_are_used_among_wrong_ones() -> None:
    agent = Agent()
    agent.run(30)
    burst = [agent.ping(lie_ns=7 * SECOND), agent.ping(), agent.ping(lie_ns=-SECOND)]
    assert agent.estimate.add(burst) is Verdict.TAKEN
    now = agent.local(agent.now)
    assert abs(now + agent.estimate.offset_at(now) - agent.now) <= 300_000


def test_wrong_answers_that_contradict_one_another_never_overrule() -> None:
    agent = Agent()
    agent.run(30)
    for round_ in range(10):
        assert agent.burst(lie_ns=5 * SECOND * (round_ + 1) * (-1) ** round_) is Verdict.OUTLYING
        agent.now += BEAT


def change_leader(agent: Agent, ping: Ping) -> None:
    agent.estimate.begin_anew(ping)
    assert agent.estimate.add([ping]) is Verdict.TAKEN


def long_ping(agent: Agent, lie_ns: int = 0) -> Ping:
    # The whole delay is on the way to the leader, so the offset is wrong by half of it.
    sent, agent.now = agent.now, agent.now + 40_000_000
    came = agent.now + lie_ns
    return Ping(agent.local(sent), came, came, agent.local(agent.now))


def offset_error(agent: Agent, lie_ns: int = 0) -> float:
    now = agent.local(agent.now)
    return now + agent.estimate.offset_at(now) - agent.now - lie_ns


@pytest.mark.parametrize("lie", [-400_000, 0, 400_000, 30_000_000, -30_000_000])
def test_the_offset_to_another_leader_is_measured_anew(lie: int) -> None:
    agent = Agent(ppm=100)
    agent.run(60)
    frequency = agent.estimate.frequency
    change_leader(agent, min((agent.ping(lie) for _ in range(16)), key=lambda p: p.delay_ns))
    assert abs(offset_error(agent, lie)) <= 250_000
    for _ in range(10):
        assert agent.burst(lie_ns=lie) is Verdict.TAKEN
        assert abs(offset_error(agent, lie)) <= agent.estimate.uncertainty_at(
            agent.local(agent.now)
        )
        agent.now += BEAT
    assert abs(offset_error(agent, lie)) <= 150_000
    assert agent.estimate.frequency / PARTS == pytest.approx(frequency / PARTS, abs=10e-6)


@pytest.mark.parametrize("after", [1, 2, 3, 5])
@pytest.mark.parametrize("jump", [-500_000_000, 500_000_000])
def test_a_jump_that_is_shorter_than_the_way_to_another_leader_is_noticed(
    jump: int, after: int
) -> None:
    agent = Agent(ppm=100)
    agent.way_ns = 300_000_000
    agent.run(60)
    change_leader(agent, agent.ping())
    for number in range(after + 10):
        agent.now += 5 * SECOND
        agent.burst(lie_ns=jump if number >= after else 0)
        assert agent.estimate.frequency / PARTS == pytest.approx(1 / agent.rate - 1, abs=50e-6)
    assert abs(offset_error(agent, jump)) <= 1_000_000


def test_one_bad_ping_of_another_leader_does_not_undo_the_offset_so_far() -> None:
    agent = Agent(ppm=100)
    agent.run(60)
    change_leader(agent, long_ping(agent))
    assert abs(offset_error(agent)) <= 500_000
    # None of the good pings that follow is an outlier.
    for _ in range(10):
        assert agent.burst() is Verdict.TAKEN
        agent.now += BEAT
    assert abs(offset_error(agent)) <= 150_000


def test_one_bad_ping_of_another_leader_whose_time_is_far_off() -> None:
    agent, lie = Agent(ppm=100), 100_000_000
    agent.run(60)
    change_leader(agent, long_ping(agent, lie))
    now = agent.local(agent.now)
    assert abs(offset_error(agent, lie)) <= agent.estimate.uncertainty_at(now)
    assert agent.burst(lie_ns=lie) is Verdict.TAKEN
    assert abs(offset_error(agent, lie)) <= 250_000


def test_good_pings_after_a_first_one_that_was_bad_are_no_outliers() -> None:
    agent = Agent()
    assert agent.estimate.add([long_ping(agent)]) is Verdict.TAKEN
    assert abs(offset_error(agent)) >= 15_000_000
    assert abs(offset_error(agent)) <= agent.estimate.uncertainty_at(agent.local(agent.now))
    assert agent.burst() is Verdict.TAKEN
    assert abs(offset_error(agent)) <= 250_000


def test_a_burst_without_pings_changes_nothing() -> None:
    estimate = Estimate()
    assert not estimate.known
    assert estimate.add([]) is Verdict.NOTHING
    assert estimate.add([Ping(0, 0, 100, 50)]) is Verdict.NOTHING
    assert not estimate.known


# How often a leader is pinged.


def test_a_leader_that_is_pinged_rarely_asks_no_agent_to_wait() -> None:
    rate, now = PingRate(), 0
    for _ in range(20_000):
        assert rate.add(now) == 0
        now += SECOND // 3000
    # Nor does it after a single large burst.
    assert {rate.add(now) for _ in range(3000)} == {0}


def test_agents_that_ping_too_often_are_spread_over_time() -> None:
    rate = PingRate()
    # Each would ping four times a second, together five times the limit.
    due = [(number * SECOND // 20_000, number) for number in range(5000)]
    asked = [0] * 60
    longest = 0
    while due[0][0] < 60 * SECOND:
        now, number = heappop(due)
        asked[now // SECOND] += 1
        wait = rate.add(now)
        longest = max(longest, wait)
        heappush(due, (now + max(wait, SECOND // 4), number))
    assert asked[0] >= 9_000
    assert all(3600 <= count <= 4400 for count in asked[20:])
    assert longest <= REST_NS


def test_no_agent_waits_longer_than_the_limit() -> None:
    rate = PingRate()
    assert max(rate.add(0) for _ in range(10**6)) == REST_NS
    assert rate.add(REST_NS) == 0
