"""What is said of frames, and of the own loop, and for how long."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, strategies as st

from backbeat_trio._grid.punctuality import Drift, Punctuality, is_late

SECOND = 1_000_000_000
MS = 1_000_000


class Frames:
    def __init__(self, bpm: float = 60.0) -> None:
        self.drift = Drift()
        self.beat = round(60 * SECOND / bpm)
        self.due = 0
        self.local = 5 * SECOND

    def hear(self, number: int = 1, *, late_ms: float = 0.0, rate: float = 1.0) -> list[str]:
        verdicts: list[str] = []
        for _ in range(number):
            self.due += self.beat
            self.local += round(self.beat / rate)
            late = round(late_ms * MS)
            self.drift.add(self.due, self.local + late, late, self.beat)
            verdicts.append(self.drift.verdict)
        return verdicts


def test_no_verdict_before_eight_frames() -> None:
    assert Frames().hear(9) == ["unknown"] * 7 + ["acceptable"] * 2


@pytest.mark.parametrize(
    ("bpm", "good", "bad"), [(60.0, 9.9, 10.1), (120.0, 4.9, 5.1), (2.0, 299, 301), (999, 1.9, 2.1)]
)
def test_a_bad_phase_is_elevated_after_three_frames_and_acceptable_after_eight(
    bpm: float, good: float, bad: float
) -> None:
    frames = Frames(bpm)
    assert set(frames.hear(20, late_ms=good)[8:]) == {"acceptable"}
    # Two bad frames in a row are not enough, nor are seven good ones.
    assert frames.hear(2, late_ms=bad) == ["acceptable"] * 2
    frames.hear(1)
    assert frames.hear(3, late_ms=bad) == ["acceptable", "acceptable", "elevated"]
    assert frames.hear(7) == ["elevated"] * 7
    assert frames.hear(1, late_ms=bad) == ["elevated"]
    assert frames.hear(8) == ["elevated"] * 7 + ["acceptable"]


def test_ten_times_the_tolerance_is_severe() -> None:
    frames = Frames()
    frames.hear(8)
    assert frames.hear(3, late_ms=150)[-1] == "severe"
    # A frame that was so late still counts for the tempo while it is kept.
    assert frames.hear(80, late_ms=15)[-1] == "elevated"


@pytest.mark.parametrize(
    ("rate", "verdict"),
    [(1.0, "acceptable"), (1.0009, "acceptable"), (1.002, "elevated"), (0.9, "severe")],
)
def test_a_tempo_that_differs_from_the_announced_one(rate: float, verdict: str) -> None:
    frames = Frames()
    assert frames.hear(40, rate=rate)[-1] == verdict
    assert frames.drift.rate == pytest.approx(rate, rel=1e-6)


@pytest.mark.parametrize("bpm", [0.1, 2.0, 120.0, 999.0, 6000.0])
def test_frames_that_come_a_little_irregularly_are_acceptable(bpm: float) -> None:
    frames, irregular = Frames(bpm), random.Random(1)
    verdicts = [frames.hear(late_ms=irregular.expovariate(4))[0] for _ in range(600)]
    assert set(verdicts[8:]) == {"acceptable"}
    assert frames.drift.rate == pytest.approx(1.0, rel=1e-3)
    assert 0 < frames.drift.jitter_ns < MS


@given(st.lists(st.floats(0, 5), min_size=20, max_size=60), st.sampled_from([0.5, 2.0, 100.0]))
def test_a_change_of_tempo_alone_is_no_drift(lates: list[float], factor: float) -> None:
    frames = Frames()
    for index, late in enumerate(lates):
        if index == 10:
            frames.beat = round(frames.beat / factor)
        tolerated = min(late, 0.9 * max(2.0, frames.beat / MS / 100))
        verdict = frames.hear(late_ms=tolerated)[0]
    assert verdict == "acceptable"


def test_clear_forgets_the_frames_of_another_grid() -> None:
    frames = Frames()
    frames.hear(20, late_ms=50)
    frames.drift.clear()
    assert frames.drift.rate is None
    assert frames.hear(1) == ["unknown"]


def test_frames_that_all_came_at_once_have_no_rate() -> None:
    drift = Drift()
    for index in range(3):
        drift.add(index * SECOND, 7, 0, SECOND)
    assert drift.rate is None


def test_a_loop_is_late_until_it_was_punctual_for_eight_beats() -> None:
    own = Punctuality()
    assert not own.late
    own.add(49 * MS, SECOND // 2)
    assert not own.late
    own.add(51 * MS, SECOND // 2)
    for _ in range(7):
        own.add(0, SECOND // 2)
        assert own.late
    own.add(0, SECOND // 2)
    assert not own.late
    # At a fast tempo a tenth of a beat is shorter than timers are exact.
    assert not is_late(4 * MS, 10 * MS)
    assert is_late(6 * MS, 10 * MS)
