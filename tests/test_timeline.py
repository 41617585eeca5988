"""The arithmetic of the grid: exact, monotone, the same on every node."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import assume, given, strategies as st

from backbeat_trio._timeline import (
    BEAT_UNITS,
    MAX_SLEW,
    Ping,
    Steering,
    Timeline,
    beat_ns,
    best_ping,
    milli_bpm,
)
from backbeat_trio._wire import MAX_MILLI_BPM, MIN_MILLI_BPM, Segment

millis = st.integers(MIN_MILLI_BPM, MAX_MILLI_BPM)
indexes = st.integers(0, 10**9)
instants = st.integers(-(10**15), 10**18)
segments = st.builds(Segment, st.just(1), st.just(0), indexes, instants, millis)


@st.composite
def timelines(draw: st.DrawFn) -> Timeline:
    timeline = Timeline.of(draw(segments))
    for _ in range(draw(st.integers(0, 4))):
        ahead = draw(st.integers(1, 1000))
        at_beat = timeline.segments[-1].beat0 + ahead
        timeline = timeline.change(draw(millis), at_beat, epoch=1)
    return timeline


def position_of(segment: Segment, cluster_ns: int) -> Fraction:
    distance = Fraction((cluster_ns - segment.t0_ns) * segment.milli_bpm, BEAT_UNITS)
    return segment.beat0 + distance


@given(timelines(), indexes)
def test_an_edge_is_the_first_nanosecond_of_its_beat(timeline: Timeline, ahead: int) -> None:
    index = timeline.segments[0].beat0 + ahead
    edge = timeline.time_of(index)
    assert timeline.index_at(edge) == index
    assert timeline.index_at(edge - 1) == index - 1


@given(timelines(), st.integers(0, 10**13))
def test_an_instant_lies_between_the_edges_of_its_beat(timeline: Timeline, later: int) -> None:
    now = timeline.segments[0].t0_ns + later
    index = timeline.index_at(now)
    assert timeline.time_of(index) <= now < timeline.time_of(index + 1)


@given(timelines(), st.integers(0, 10**13), st.integers(0, 10**11))
def test_position_is_monotone(timeline: Timeline, first: int, further: int) -> None:
    start = timeline.segments[0].t0_ns
    before = timeline.position_at(start + first)
    after = timeline.position_at(start + first + further)
    assert before <= after
    assert math.floor(before) == timeline.index_at(start + first)


@given(segments, st.floats(0, 1e6))
def test_position_and_time_round_trip(segment: Segment, beats: float) -> None:
    timeline = Timeline.of(segment)
    position = segment.beat0 + beats
    found = timeline.position_at(timeline.time_of(position))
    # Half a nanosecond of time, or a whole one at an edge, and the float's own grain.
    grain = 2 * math.ulp(position) + 1e-9 + segment.milli_bpm / BEAT_UNITS
    assert abs(found - position) <= grain


@given(segments, st.floats(0, 1e5), st.floats(0, 1e5))
def test_time_is_monotone_in_position(segment: Segment, one: float, other: float) -> None:
    timeline = Timeline.of(segment)
    low, high = sorted((segment.beat0 + one, segment.beat0 + other))
    assert timeline.time_of(low) <= timeline.time_of(high)


@given(timelines())
def test_a_change_begins_on_the_edge_that_the_old_tempo_gives(timeline: Timeline) -> None:
    for before, after in zip(timeline.segments, timeline.segments[1:], strict=False):
        exact = before.t0_ns + Fraction((after.beat0 - before.beat0) * BEAT_UNITS, before.milli_bpm)
        assert after.t0_ns == math.ceil(exact)
        assert after.seq == before.seq + 1


@given(timelines(), timelines())
def test_no_beat_is_lost_over_any_changes(timeline: Timeline, other: Timeline) -> None:
    # Whoever steps from edge to edge meets every index once.
    index = timeline.segments[0].beat0
    for _ in range(50):
        index += 1
        assert timeline.index_at(timeline.time_of(index)) == index


@given(timelines(), st.integers(0, 10**13))
def test_forgetting_what_is_over_changes_nothing_that_is_to_come(
    timeline: Timeline, later: int
) -> None:
    now = timeline.segments[0].t0_ns + later
    kept = timeline.since(now)
    assert kept.position_at(now) == timeline.position_at(now)
    index = timeline.index_at(now) + 1
    assert kept.time_of(index) == timeline.time_of(index)
    assert kept.segments[0] == timeline.segment_at(now)


def test_a_change_replaces_what_was_to_come_there() -> None:
    timeline = Timeline.of(Segment(1, 0, 0, 0, 60_000)).change(120_000, 8, epoch=1)
    changed = timeline.change(30_000, 8, epoch=2)
    assert [segment.milli_bpm for segment in changed.segments] == [60_000, 30_000]
    assert changed.segments[1] == Segment(2, 2, 8, 8_000_000_000, 30_000)


@pytest.mark.parametrize("bpm", [0.0999, 6000.001, math.nan, math.inf, -1, 0])
def test_tempo_out_of_range(bpm: float) -> None:
    with pytest.raises(ValueError, match="`bpm` must be from 0.1 to 6000"):
        milli_bpm("bpm", bpm)


@pytest.mark.parametrize("bpm", ["60", None, True])
def test_tempo_of_the_wrong_type(bpm: object) -> None:
    with pytest.raises(TypeError, match="`bpm` must be a number"):
        milli_bpm("bpm", bpm)  # type: ignore[arg-type]


def test_tempo_is_exact_to_a_thousandth() -> None:
    assert milli_bpm("bpm", 0.1) == 100
    assert milli_bpm("bpm", 120.5) == 120_500
    assert milli_bpm("bpm", 6000) == 6_000_000
    assert beat_ns(2000) == 30_000_000_000


# Steering.

offsets = st.integers(-(10**10), 10**10)


@given(offsets, st.lists(st.tuples(st.integers(0, 10**10), offsets), max_size=6), millis)
def test_cluster_time_never_runs_back_nor_slower_than_it_may(
    first: int, corrections: list[tuple[int, int]], milli: int
) -> None:
    steering, now = Steering(first), 0
    for wait, offset in corrections:
        before = steering.cluster_at(now)
        assert steering.cluster_at(now + wait) - before >= math.floor(wait * (1 - MAX_SLEW)) - 1
        now += wait
        before = steering.cluster_at(now)
        steering.correct(now, offset, beat_ns=beat_ns(milli))
        assert steering.cluster_at(now) >= before
    settled = steering.settled_ns + 1
    assert steering.cluster_at(settled) == settled + steering.offset_ns


@given(offsets, offsets, st.integers(-(10**10), 10**11))
def test_local_at_inverts_cluster_at(first: int, second: int, cluster_ns: int) -> None:
    steering = Steering(first)
    steering.correct(0, second, beat_ns=10**9)
    local = steering.local_at(cluster_ns)
    assert steering.cluster_at(local) >= cluster_ns
    assert steering.cluster_at(local - 1) < cluster_ns


def test_a_large_error_forward_is_stepped_and_backward_is_slewed() -> None:
    steering = Steering(0)
    steering.correct(0, 300_000_000, beat_ns=1_000_000_000)
    assert steering.cluster_at(0) == 300_000_000
    steering.correct(0, 0, beat_ns=1_000_000_000)
    assert steering.cluster_at(0) == 300_000_000
    assert steering.settled_ns == math.ceil(300_000_000 / MAX_SLEW)
    assert steering.cluster_at(steering.settled_ns) == steering.settled_ns


pings = st.builds(Ping, instants, instants, instants, instants)


@given(instants, st.integers(0, 10**9), st.integers(0, 10**9), st.integers(0, 10**9), offsets)
def test_a_ping_is_wrong_by_half_its_way_at_most(
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
def test_the_best_ping_is_an_honest_one(burst: list[Ping]) -> None:
    best = best_ping(burst)
    honest = [p for p in burst if p.delay_ns >= 0 and p.replied_ns >= p.received_ns]
    assume(honest)
    assert best is not None
    assert best.delay_ns == min(p.delay_ns for p in honest)


def test_no_ping_is_best_of_none() -> None:
    assert best_ping([]) is None
    assert best_ping([Ping(0, 0, 100, 50)]) is None
