"""What answers to a recall come to: the majority's time, whatever the others say."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, strategies as st

from backbeat_trio._grid.estimate import Ping
from backbeat_trio._grid.recall import Agreement, Memory, agree, limit
from backbeat_trio._grid.timeline import Timeline
from backbeat_trio._wire import MAX_NS, RecallReply, Record, Segment

MS = 1_000_000
SECOND = 1_000_000_000
NOW = 500 * SECOND
OFFSET = 7_000 * SECOND
GRID = Timeline((Segment(1, 0, 0, 0, 60_000),))
CHANGED = GRID.change(120_000, 7_000, epoch=1)


def memory(
    name: str = "a",
    *,
    error_ns: int = 0,
    delay_ns: int = MS,
    uncertainty_ns: int = MS,
    timeline: Timeline = GRID,
    **fields: Any,
) -> Memory:
    there = NOW + OFFSET + error_ns
    options: dict[str, Any] = {
        "cluster_id": "c",
        "agent_id": name,
        "role": "agent",
        "epoch": 3,
        "received_ns": there,
        "sent_ns": there,
        "uncertainty_ns": uncertainty_ns,
        "last_beat": timeline.index_at(there),
        "beats_per_bar": 8,
        "incarnation": "grid",
    }
    reply = RecallReply(**(options | timeline.since(there).wire_fields() | fields))
    half = delay_ns // 2
    return Memory(Ping(NOW - half, there, there, NOW + half), reply, timeline)


def found(*memories: Memory, **options: Any) -> Agreement:
    agreement = agree(memories, NOW, **options)
    assert agreement is not None
    return agreement


def test_one_agent_is_a_majority() -> None:
    agreement = found(memory())
    assert agreement.offset_ns == pytest.approx(OFFSET, abs=2)
    assert agreement.uncertainty_ns == pytest.approx(1.5 * MS, abs=2)
    assert agreement.timeline == GRID
    assert (agreement.incarnation, agreement.epoch, agreement.beats_per_bar) == ("grid", 3, 8)
    assert agreement.last_beat == 7500


def test_the_largest_uncertainty_of_an_answer_still_fits_into_messages() -> None:
    assert found(memory(uncertainty_ns=MAX_NS)).uncertainty_ns == MAX_NS


def test_no_answers_are_no_agreement() -> None:
    assert agree([], NOW) is None


def test_two_that_contradict_each_other_are_no_majority() -> None:
    assert agree([memory("a"), memory("b", error_ns=SECOND)], NOW) is None


def test_without_a_majority_the_answer_nearest_to_the_expected_time_counts() -> None:
    # The clock of an agent stops while its machine is suspended, and it does not know.
    right, suspended = memory("a"), memory("b", error_ns=-6 * SECOND)
    for expected in (NOW + OFFSET, NOW + OFFSET - 2 * SECOND):
        for memories in ((right, suspended), (suspended, right)):
            assert found(*memories, expected_ns=expected) == found(right)
    # The answers that agree with that one count, too.
    other = memory("c", error_ns=-9 * SECOND)
    agreement = found(right, memory("d", last_beat=7501), suspended, other, expected_ns=expected)
    assert agreement.offset_ns == pytest.approx(OFFSET, abs=2)
    assert agreement.last_beat == 7501


def test_one_wrong_answer_changes_nothing() -> None:
    lie = memory(
        "c", error_ns=20 * SECOND, epoch=2**53, last_beat=2**53, timeline=CHANGED, beats_per_bar=3
    )
    honest = found(memory("a"), memory("b"))
    assert found(memory("a"), memory("b"), lie) == honest
    # Nor does it if the wall clock is wrong, too.
    expected = NOW + OFFSET + 20 * SECOND
    assert found(memory("a"), memory("b"), lie, expected_ns=expected) == honest


def test_an_answer_with_the_right_time_and_a_made_up_epoch_and_beat_changes_little() -> None:
    lie = memory("c", epoch=2**53, last_beat=2**53)
    agreement = found(memory("a"), memory("b"), lie)
    assert agreement.epoch == 3
    assert agreement.last_beat == 7501


def test_answers_of_another_grid_do_not_count() -> None:
    others = [memory(name, error_ns=SECOND, incarnation="other") for name in "bcd"]
    assert found(memory("a"), *others, incarnation="grid").incarnation == "grid"
    # Without a record, the grid of the majority counts.
    assert found(memory("a"), *others).incarnation == "other"
    assert agree(others, NOW, incarnation="grid") is None
    half = [memory("a"), memory("b", incarnation="other")]
    assert agree(half, NOW) is None


def test_answers_far_from_the_expected_time_do_not_count() -> None:
    expected = NOW + OFFSET
    late = memory("a", error_ns=-61 * SECOND)
    assert agree([late], NOW, expected_ns=expected) is None
    early = memory("a", error_ns=59 * SECOND)
    assert found(early, expected_ns=expected).offset_ns == pytest.approx(OFFSET + 59e9, abs=2)


def test_a_change_that_most_agents_know_counts() -> None:
    agreement = found(
        memory("a", timeline=CHANGED), memory("b", timeline=CHANGED), memory("c", timeline=GRID)
    )
    assert agreement.timeline == CHANGED.since(NOW + OFFSET)


def test_answers_with_impossible_time_stamps_do_not_count() -> None:
    backwards = memory("a")
    backwards = backwards._replace(ping=backwards.ping._replace(answered_ns=NOW - SECOND))
    assert agree([backwards], NOW) is None


def test_answers_of_a_time_before_the_record_do_not_count() -> None:
    written = NOW + OFFSET - SECOND
    late, right = memory("a", error_ns=-2 * SECOND), memory("b")
    assert agree([late], NOW, written_ns=written) is None
    assert found(late, right, written_ns=written).offset_ns == OFFSET
    # One that may be wrong by much may be right, but not before the record was written.
    vague = found(memory(error_ns=-2 * SECOND, uncertainty_ns=5 * SECOND), written_ns=written)
    assert NOW + vague.offset_ns >= written


def test_the_record_tells_what_the_grid_is() -> None:
    committed = GRID.change(30_000, 9_000, epoch=2)
    record = Record(
        cluster_id="c",
        incarnation="grid",
        epoch=3,
        nonce="n",
        leader_id="l",
        beats_per_bar=8,
        segments=committed.segments,
        high_water=7_400,
        milli_bpm=60_000,
    )
    now = NOW + OFFSET
    for timeline, heard in (
        # A change that is not in the record, one that is, and a grid that the record knows not.
        (CHANGED, GRID),
        (committed, committed),
        (Timeline((Segment(9, 9, 50_000, now, 6_000_000),)), GRID),
    ):
        agreement = found(memory(timeline=timeline, beats_per_bar=5, last_beat=1_000_000))
        limited = limit(agreement, record, now)
        assert limited.timeline == heard
        assert (limited.beats_per_bar, limited.last_beat) == (8, 7_501)
    # What this metronome itself changed while it had no record counts as well.
    agreement = found(memory(timeline=CHANGED))
    assert limit(agreement, record, now, CHANGED).timeline == CHANGED.since(now)


honest = st.tuples(
    st.integers(0, 300 * MS), st.integers(0, 50 * MS), st.floats(-1, 1, allow_nan=False)
)
lies = st.tuples(st.integers(-30, 30), st.integers(0, 300 * MS), st.integers(0, SECOND))


@given(st.lists(honest, min_size=1, max_size=9), st.lists(lies, max_size=8))
def test_the_time_of_an_honest_majority_is_found(
    truths: list[tuple[int, int, float]], wrongs: list[tuple[int, int, int]]
) -> None:
    memories = []
    for number, (delay, uncertainty, share) in enumerate(truths):
        # As wrong as it says that it may be, and with as lopsided a way as there can be.
        error = round(share * (delay // 2 + uncertainty))
        memories.append(
            memory(f"h{number}", error_ns=error, delay_ns=delay, uncertainty_ns=uncertainty)
        )
    wrongs = wrongs[: len(truths) - 1]
    for number, (seconds, delay, uncertainty) in enumerate(wrongs):
        memories.append(
            memory(
                f"l{number}",
                error_ns=seconds * SECOND,
                delay_ns=delay,
                uncertainty_ns=uncertainty,
            )
        )
    agreement = found(*memories)
    # More than half of the answers agree on it, so at least one right answer does.
    allowed = max(delay + 2 * uncertainty for delay, uncertainty, _ in truths) + 2
    assert abs(agreement.offset_ns - OFFSET) <= allowed
