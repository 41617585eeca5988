"""Where an agent is on the grid, whatever it learns of it and whenever."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, strategies as st

from backbeat_trio._grid.grid import Grid
from backbeat_trio._grid.steering import MIN_STEP_NS, Steering
from backbeat_trio._grid.timeline import NEVER, Timeline, beat_ns
from backbeat_trio._wire import Segment

MS = 1_000_000
SECOND = 1_000 * MS
TIMELINE = Timeline((Segment(1, 0, 0, 0, 120_000),))

millis = st.sampled_from([100, 2_000, 40_000, 120_000, 6_000_000])


def make_grid(milli: int = 120_000) -> Grid:
    return Grid(Timeline((Segment(1, 0, 0, 0, milli),)), Steering(), 8)


def limit_ns(milli: int) -> int:
    return max(MIN_STEP_NS, beat_ns(milli) // 4)


def widest_limit(grid: Grid) -> int:
    return max(limit_ns(segment.milli_bpm) for segment in grid.timeline.segments)


@given(millis, st.integers(0, 10**12), st.integers(-(10**11), 10**11), st.integers(0, 10**9))
def test_an_agent_that_is_ahead_is_right_again_within_1_2_times_the_error(
    milli: int, ahead_ns: int, frequency: int, now: int
) -> None:
    grid = make_grid(milli)
    ahead_ns += limit_ns(milli) + 1
    position = grid.position_at(now)
    grid.steer(-ahead_ns, now, frequency)
    assert grid.position_at(now) == position
    assert grid.error_ns(now) == pytest.approx(ahead_ns, abs=1000 + ahead_ns * 1e-9)
    later = now + round(1.2 * ahead_ns)
    assert grid.error_ns(later) == grid.hold_ns(later) == 0
    assert grid.position_at(later) == grid.timeline.position_at(
        later + grid.steering.target_at(later)
    )


def test_small_errors_are_slewed() -> None:
    grid, now = make_grid(), 10 * SECOND
    grid.steer(-100 * MS, now)
    assert grid.hold_ns(now) == 0
    assert grid.error_ns(now) == 100 * MS
    assert grid.position_at(now + SECOND) - grid.position_at(now) == pytest.approx(1.84, abs=0.001)
    grid.steer(0, now + SECOND)
    assert grid.error_ns(now + SECOND) == -80 * MS
    assert grid.hold_ns(now + SECOND) == 0
    assert grid.error_ns(now + 10 * SECOND) == 0


def test_a_position_that_is_held_was_reached_when_the_hold_began() -> None:
    grid, now = make_grid(), 10 * SECOND
    grid.steer(-3 * SECOND, now)
    assert grid.position_at(now + SECOND) == 20.0
    assert grid.index_at(now + 2 * SECOND) == 20
    # The grid reaches beats 15 to 20 only now, but the agent was there before.
    assert [grid.local_at(beat) for beat in (15, 18.5, 20)] == [now] * 3
    assert grid.held_until() == now + 3 * SECOND
    assert grid.local_at(21) == now + 3 * SECOND + SECOND // 2
    assert grid.position_at(now + 4 * SECOND) == 22.0
    # The floor does not apply to instants before the hold.
    assert (grid.position_at(now - SECOND), grid.index_at(now - SECOND)) == (12.0, 12)


def test_an_agent_that_missed_a_slower_tempo_holds_its_position() -> None:
    # From beat 0 on the tempo was 40 BPM, but the agent stayed at 120. After 30 s it is 40 beats
    # ahead.
    grid, now = make_grid(), 30 * SECOND
    grid.adopt(Timeline((Segment(1, 1, 0, 0, 40_000),)), now)
    assert grid.position_at(now) == 60.0
    assert grid.error_ns(now) == 60 * SECOND
    assert grid.position_at(now + 59 * SECOND) == 60.0
    assert grid.position_at(now + 61 * SECOND) == pytest.approx(60 + 40 / 60)
    # Other changes of the grid do not end the hold.
    grid.adopt(
        Timeline((Segment(1, 1, 0, 0, 40_000), Segment(1, 2, 90, 135 * SECOND, 60_000))), now
    )
    grid.steer(1 * MS, now + SECOND)
    assert grid.position_at(now + 59 * SECOND) == 60.0
    assert grid.local_at(91) == pytest.approx(136 * SECOND, abs=2 * MS)


@pytest.mark.parametrize(
    ("behind", "hold", "moved"),
    [(3, 8, 0), (8, 8, 0), (9, 8, -9), (-3, 8, 3), (3, 0, -3), (1000, math.inf, 0)],
)
def test_moving_to_another_grid(behind: int, hold: float, moved: int) -> None:
    told: list[tuple[float, int]] = []

    class Observer:
        def changed(self) -> None:
            pass

        def rebased(self, beats: float, index: int) -> None:
            told.append((beats, index))

    now = 10 * SECOND + SECOND // 4
    grid = Grid(TIMELINE, Steering(), 8, Observer())
    other = Timeline((Segment(2, 0, 5000, 0, 120_000),))
    offset = (20 - behind - 5000) * SECOND // 2 - 10 * SECOND
    grid.rebase(other, offset, now, beats_per_bar=4, hold_beats=hold)
    assert told == [(moved, moved)]
    assert grid.position_at(now) == 20.5 + moved
    settled = now + 1000 * SECOND
    assert grid.position_at(settled) == pytest.approx(20.5 - behind + 2000)


corrections = st.one_of(
    st.tuples(st.just("wait"), st.integers(0, 10**11)),
    st.tuples(st.just("steer"), st.integers(-(10**11), 10**11)),
    st.tuples(st.just("tempo"), st.sampled_from([0, *[40_000, 120_000, 6_000_000]])),
    st.tuples(st.just("missed"), st.integers(1, 10**11)),
)


@given(st.lists(corrections, max_size=12))
def test_whatever_is_corrected_the_position_never_goes_back(
    plan: list[tuple[str, int]],
) -> None:
    grid, now, seq = make_grid(), SECOND, 0
    position, index = grid.position_at(now), grid.index_at(now)
    for what, value in plan:
        if what == "wait":
            # On the way each beat is reached when `local_at` has said so.
            due = grid.local_at(index + 1)
            if now < due <= now + value:
                assert grid.index_at(due) == index + 1
                assert grid.index_at(due - 1) == index
            else:
                assert due > now
            now += value
        elif what == "steer":
            grid.steer(grid.steering.target_at(now) + value, now, value // 10)
        else:
            seq += 1
            milli = value if what == "tempo" else 40_000
            # A change that is just due, or one that was in force for so long already.
            cluster = grid.cluster_at(now) - (0 if what == "tempo" else value)
            beat = max(0, grid.timeline.index_at(cluster) + (what == "tempo"))
            t0 = grid.timeline.time_of(beat)
            if t0 == NEVER:
                continue
            kept = [segment for segment in grid.timeline.segments if segment.beat0 < beat]
            grid.adopt(Timeline((*kept, Segment(1, seq, beat, t0, milli))), now)
        assert grid.position_at(now) >= position
        assert grid.index_at(now) == int(grid.position_at(now)) >= index
        # What was reached is reached, and what was not is to come.
        reached = grid.position_at(now)
        assert grid.local_at(reached) <= now + 1
        assert grid.local_at(grid.index_at(now) + 1) > now
        position, index = reached, grid.index_at(now)
    error, hold = grid.error_ns(now), grid.hold_ns(now)
    held_until = grid.held_until() if hold else now
    if held_until < NEVER:
        # However long that was, it is over, too; a slew takes its own time.
        settled = max(held_until, grid.steering.settled_ns) + 1
        assert grid.error_ns(settled) == 0
    else:
        assert not grid.timeline.segments[-1].milli_bpm
    assert error >= hold - widest_limit(grid)
