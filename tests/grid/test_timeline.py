"""The arithmetic of the grid: exact, monotone, the same on every node."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given, strategies as st
from msgspec import UNSET, Struct, UnsetType
from msgspec.structs import replace

from backbeat_trio._grid.timeline import (
    BEAT_UNITS,
    NEVER,
    PAUSED_BEAT_NS,
    Timeline,
    beat_ns,
    milli_bpm,
)
from backbeat_trio._wire import MAX_MILLI_BPM, MIN_MILLI_BPM, Segment

millis = st.integers(MIN_MILLI_BPM, MAX_MILLI_BPM)
indexes = st.integers(0, 10**9)
instants = st.integers(-(10**15), 10**18)
segments = st.builds(Segment, st.just(1), st.just(0), indexes, instants, millis)


@st.composite
def timelines(draw: st.DrawFn) -> Timeline:
    timeline = Timeline((draw(segments),))
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


@given(timelines(), indexes, st.integers(0, 10**12), millis)
def test_a_pause_only_shifts_the_grid_in_time(
    timeline: Timeline, ahead: int, pause: int, milli: int
) -> None:
    at_beat = timeline.segments[-1].beat0 + 1 + ahead
    stop = timeline.time_of(at_beat)
    still = timeline.change(0, at_beat, epoch=1)
    assert still.time_of(at_beat) == stop
    assert still.time_of(at_beat + 0.5) == NEVER
    for later in (0, pause, pause + 1):
        assert still.position_at(stop + later) == at_beat
    assert still.next_beat(stop + pause) == stop + (pause // PAUSED_BEAT_NS + 1) * PAUSED_BEAT_NS
    resumed = still.since(stop).resume(milli, stop + pause + 1, epoch=2)
    assert resumed.time_of(at_beat) == stop
    assert resumed.time_of(at_beat + 1) == stop + pause + 1 + beat_ns(milli)
    assert resumed.continues(timeline, 0)
    assert resumed.shares(still)
    assert Timeline.of(Grid(**resumed.wire_fields())) == resumed


class Grid(Struct):
    segment: Segment
    next_segment: Segment | None
    later_segments: tuple[Segment, ...] | UnsetType


@given(timelines())
def test_a_frame_describes_the_whole_timeline(timeline: Timeline) -> None:
    assert Timeline.of(Grid(**timeline.wire_fields())) == timeline


@given(timelines(), st.integers(1, 10**6))
def test_segments_that_do_not_join_are_refused(timeline: Timeline, gap: int) -> None:
    last = timeline.segments[-1]
    at_beat = last.beat0 + 1
    told = timeline.change(60_000, at_beat, epoch=1)
    torn = replace(told.segments[-1], t0_ns=told.segments[-1].t0_ns + 1000 + gap)
    with pytest.raises(ValueError, match="does not begin where"):
        Timeline.of(Grid(last, torn, UNSET))
    with pytest.raises(ValueError, match="not in the order"):
        Timeline.of(Grid(told.segments[-1], last, UNSET))


@given(timelines(), st.integers(0, 10**13))
def test_next_beat_is_the_first_edge_after_an_instant(timeline: Timeline, later: int) -> None:
    now = timeline.segments[0].t0_ns + later
    assert timeline.next_beat(now) == timeline.time_of(timeline.index_at(now) + 1)
    assert timeline.after(now) in (timeline.index_at(now), timeline.index_at(now) + 1)
    assert timeline.time_of(timeline.after(now)) >= now


def test_a_new_incarnation_does_not_continue_another() -> None:
    old = Timeline((Segment(3, 2, 100, 10**12, 60_000), Segment(3, 3, 108, 10**12 + 1, 1000)))
    assert not Timeline((Segment(9, 0, 0, 0, 60_000),)).continues(old, 0)
    assert Timeline(old.segments[1:]).continues(old, 10**18)
    later = Timeline((Segment(4, 9, 500, 10**13, 60_000),))
    assert later.continues(old, 10**9)
    # Its numbers would allow it, but its cluster time differs.
    assert not later.continues(old, 10**13)
    assert not later.continues(old, -(10**13))


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
    timeline = Timeline((segment,))
    position = segment.beat0 + beats
    found = timeline.position_at(timeline.time_of(position))
    # Half a nanosecond of time, or a whole one at an edge, and the rounding of the float.
    grain = 2 * math.ulp(position) + 1e-9 + segment.milli_bpm / BEAT_UNITS
    assert abs(found - position) <= grain


@given(segments, st.floats(0, 1e5), st.floats(0, 1e5))
def test_time_is_monotone_in_position(segment: Segment, one: float, other: float) -> None:
    timeline = Timeline((segment,))
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
    # The edges, one after another, give every index once.
    index = timeline.segments[0].beat0
    for _ in range(50):
        index += 1
        assert timeline.index_at(timeline.time_of(index)) == index


@given(timelines(), st.integers(0, 10**13))
def test_since_changes_nothing_of_the_future(timeline: Timeline, later: int) -> None:
    now = timeline.segments[0].t0_ns + later
    kept = timeline.since(now)
    assert kept.position_at(now) == timeline.position_at(now)
    index = timeline.index_at(now) + 1
    assert kept.time_of(index) == timeline.time_of(index)
    assert kept.segments[0] == timeline.segment_at(now)


def test_a_change_replaces_later_segments() -> None:
    timeline = Timeline((Segment(1, 0, 0, 0, 60_000),)).change(120_000, 8, epoch=1)
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
