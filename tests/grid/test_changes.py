"""Changes of the grid: ramps, pauses, and what a leader left behind."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from backbeat_trio import Segment, TempoRefused
from backbeat_trio._grid.changes import LEAD_NS, propose, reschedule
from backbeat_trio._grid.timeline import NEVER, PAUSED_BEAT_NS, Timeline
from backbeat_trio._wire import MAX_MILLI_BPM, MIN_MILLI_BPM

SECOND = 1_000_000_000
GRID = Timeline((Segment(1, 0, 0, 0, 60_000),))

millis = st.integers(MIN_MILLI_BPM, MAX_MILLI_BPM)


def change(timeline: Timeline, now: int, milli: int | None, *args: int, **options: int) -> Timeline:
    return propose(timeline, now, milli, *args, **({"beats_per_bar": 8, "epoch": 2} | options))


@given(millis, millis, st.integers(1, 1000))
def test_a_ramp_is_a_list_of_segments_that_join(first: int, last: int, over: int) -> None:
    timeline = Timeline((Segment(1, 0, 0, 0, first),))
    ramp = change(timeline, 0, last, over=over)
    begin, *_, end = ramp.segments[1:] if len(ramp.segments) > 2 else ramp.segments
    assert end.milli_bpm == last
    assert end.beat0 == begin.beat0 + over
    assert begin.beat0 % 8 == 0
    assert len(ramp.segments) <= 66
    tempos = [segment.milli_bpm for segment in ramp.segments]
    assert sorted(tempos) == tempos or sorted(tempos, reverse=True) == tempos
    seqs = [segment.seq for segment in ramp.segments]
    assert seqs == sorted(set(seqs))
    for before, segment in zip(ramp.segments, ramp.segments[1:], strict=False):
        assert before.beat0 < segment.beat0
        assert Timeline((before,)).time_of(segment.beat0) == segment.t0_ns


def test_a_ramp_of_few_beats() -> None:
    ramp = change(GRID, 0, 120_000, 16, over=4)
    assert [(s.beat0, s.milli_bpm) for s in ramp.segments] == [
        (0, 60_000),
        (16, 67_500),
        (17, 82_500),
        (18, 97_500),
        (19, 112_500),
        (20, 120_000),
    ]


def test_a_pause_begins_on_one_of_the_next_beats() -> None:
    still = change(GRID, SECOND // 2, 0)
    assert still.segments[-1] == Segment(2, 1, 3, 3 * SECOND, 0)
    assert still.time_of(3) == 3 * SECOND
    assert still.time_of(3.5) == NEVER
    now = 100 * SECOND + 1
    resumed = change(still, now, None, former=60_000)
    assert resumed.segments == (
        Segment(2, 1, 3, 3 * SECOND, 0),
        Segment(2, 2, 3, 102 * SECOND, 60_000),
    )
    assert resumed.time_of(4) == 103 * SECOND
    assert now + PAUSED_BEAT_NS <= resumed.segments[-1].t0_ns <= now + 2 * PAUSED_BEAT_NS
    # The beat of the pause gets no second frame when the pause ends.
    assert resumed.next_beat(101 * SECOND) == 103 * SECOND
    assert still.next_beat(101 * SECOND) == 102 * SECOND


def test_changes_that_a_paused_or_a_running_grid_refuses() -> None:
    with pytest.raises(TempoRefused, match="is not paused"):
        change(GRID, 0, None, former=60_000)
    still = change(GRID, 0, 0)
    with pytest.raises(TempoRefused, match="is paused from beat 2 on"):
        change(still, 0, 120_000, 8)
    with pytest.raises(TempoRefused, match="is paused: resume it"):
        change(still, 10 * SECOND, 120_000)
    resumed = change(still, 10 * SECOND, None, former=60_000)
    with pytest.raises(TempoRefused, match="about to resume"):
        change(resumed, 10 * SECOND, None, former=60_000)


def test_a_pause_that_has_not_begun_can_be_taken_back() -> None:
    still = change(GRID, 0, 0, 10)
    kept = change(still, SECOND, None, former=1)
    assert [(s.beat0, s.milli_bpm) for s in kept.segments] == [(0, 60_000), (10, 60_000)]
    with pytest.raises(TempoRefused, match="is not paused"):
        change(still, 9 * SECOND, None, former=1)


@pytest.mark.parametrize(("at_beat", "over"), [(2**53, 1), (2**53 - 1, 0), (8, 2**53)])
def test_a_change_that_no_message_can_carry_is_refused(at_beat: int, over: int) -> None:
    with pytest.raises(TempoRefused, match="too far ahead"):
        change(GRID, 0, 120_000, at_beat, over=over)


def test_a_pause_with_a_ramp_and_too_many_changes_are_refused() -> None:
    with pytest.raises(TempoRefused, match="cannot be a ramp"):
        change(GRID, 0, 0, over=4)
    timeline = GRID
    with pytest.raises(TempoRefused, match="too many"):
        for number in range(10):
            timeline = change(timeline, 0, 120_000, 1000 * (number + 1), over=64)
    assert len(timeline.segments) < 256


# Changes that a leader committed, and may not have announced.


def left(heard: Timeline, committed: Timeline, now: int, announced_seq: int = 0) -> Timeline:
    return reschedule(heard, committed, now, announced_seq=announced_seq, beats_per_bar=8, epoch=9)


def test_a_change_that_is_still_far_ahead_stays_as_it_is() -> None:
    committed = change(GRID, 0, 120_000)
    assert left(GRID, committed, 7 * SECOND) == committed
    assert left(committed, committed, 7 * SECOND) == committed
    # The frames that were heard may be newer than the record.
    assert left(committed, GRID, 7 * SECOND) == committed


@pytest.mark.parametrize("over", [0, 16])
def test_a_change_that_was_not_announced_in_time_is_postponed(over: int) -> None:
    committed = change(GRID, 0, 120_000, over=over)
    now = 8 * SECOND - LEAD_NS + 1
    later = left(GRID, committed, now)
    assert later.segments[0] == GRID.segments[0]
    assert later.segments[1].beat0 == 16
    assert later.segments[-1].milli_bpm == 120_000
    assert later.segments[-1].beat0 == 16 + over
    assert later.position_at(now) == GRID.position_at(now)


def test_an_end_of_a_pause_that_was_not_announced_in_time_is_postponed() -> None:
    still = change(GRID, 0, 0).since(5 * SECOND)
    committed = change(still, 10 * SECOND, None, former=60_000)
    later = left(still, committed, 20 * SECOND)
    assert later.segments[-1].milli_bpm == 60_000
    assert later.segments[-1].t0_ns > 20 * SECOND
    assert left(still, committed, 10 * SECOND) == committed


def test_an_announced_change_stays_even_if_the_new_leader_has_not_heard_of_it() -> None:
    committed = change(GRID, 0, 120_000)
    seq = committed.segments[-1].seq
    now = 9 * SECOND
    assert left(GRID, committed, now, announced_seq=seq) == committed.since(now)
    # Only the first of two changes was announced.
    both = change(committed, 0, 240_000, 16)
    later = left(GRID, both, 12 * SECOND, announced_seq=seq)
    assert later.segments[0] == committed.segments[-1]
    assert later.segments[-1].milli_bpm == 240_000
    assert later.segments[-1].beat0 > 16
    assert later.segments[-1].seq > both.segments[-1].seq


def test_a_pause_that_was_taken_back_ends_as_soon_as_it_can_be_announced() -> None:
    heard = change(GRID, 0, 0, 24)
    committed = change(heard, 10 * SECOND, None)
    assert committed.segments[-1].milli_bpm == 60_000
    now = 24 * SECOND - LEAD_NS // 2
    later = left(heard, committed, now, announced_seq=heard.segments[-1].seq)
    assert later.segments[:2] == heard.segments
    assert later.segments[2].beat0 == 24
    assert now + SECOND < later.segments[2].t0_ns < now + 3 * SECOND
    assert later.segments[2].seq > committed.segments[-1].seq
