"""The simulation of many agents: its results, and that it notices what is wrong."""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest
import simulate
import simulated_agents as agents
import simulated_leaders as leaders
import simulated_regions as regions

from backbeat_trio._metronome import listener as _listener, term as _term


@functools.cache
def report(seed: int = 3) -> Any:
    return simulate.simulate(40, 60.0, seed, 1)


def figures() -> dict[str, float]:
    return {figure.name: figure.measured for figure in report().figures}


def test_the_simulation_uses_the_constants_of_the_listener_and_the_standby() -> None:
    assert agents.PING_TIMEOUT_NS / agents.SECOND == _listener._PING_TIMEOUT
    assert agents.ASK_EVERY_NS / agents.SECOND == _listener._ASK_EVERY
    assert (leaders.LEASE_BEATS, leaders.LEASE_NS) == (_term._LEASE_BEATS, _term._LEASE_NS)


def test_all_agents_change_the_tempo_on_the_same_beat() -> None:
    assert figures()["same_index"] == 100.0
    told = leaders.tell(leaders.schedule(120.0), 120.0, random.Random("3:leaders"))
    tempos = set(told.history.tempos.values())
    # A change, the steps of a ramp, a pause, and a change back; a failover postponed one of them.
    assert {0, 60_000, 75_000, 80_000, 100_000} < tempos
    assert [reign.epoch for reign in told.history.reigns] == [1, 2, 3, 4, 5]


def test_no_beat_is_lost_or_repeated() -> None:
    assert [figures()[name] for name in ("lost", "stalled_lost", "back", "relocks")] == [0] * 4


def test_only_agents_whose_loop_stalls_miss_beats() -> None:
    missed = report().missed
    assert sum(counts.total() for counts in missed.values()) == 40
    assert set(missed["never stalls"]) == {0}
    assert missed["stalls"].total() > 0
    told = leaders.tell(leaders.schedule(60.0), 60.0, random.Random("3:leaders"))
    agent = agents.make_agent(agents.World(told.history, 60.0, "3:agents"), 0)
    # Four beats begin while its loop is stalled, and it gets only the last of them.
    agent.stalls = [(21 * agents.SECOND, 24 * agents.SECOND)]
    agent.run(60 * agents.SECOND)
    assert [count for _, count in agent.skips] == [3]
    assert len(set(range(min(agent.beats), max(agent.beats))) - set(agent.beats)) == 3


def test_agents_agree_and_report_how_well() -> None:
    found = figures()
    assert 0.01 < found["skew"] < 0.5
    assert 0.01 < found["beats"] < 1.0
    assert found["honest"] >= 99.9
    assert 0.01 < found["holdover"] < 5.0
    assert found["drift"] >= 99.0


def test_the_same_seed_gives_the_same_result() -> None:
    again, other = (simulate.simulate(4, 40.0, seed, 1) for seed in (5, 6))
    assert again == simulate.simulate(4, 40.0, 5, 1)
    assert again != other


def test_an_agent_that_hears_of_a_change_too_late_is_noticed() -> None:
    told = leaders.tell(leaders.schedule(60.0), 60.0, random.Random("7:leaders"))
    change = told.kept[0][0].true_ns
    cut = agents.World(told.history, 60.0, "7:agents", cut_ns=change, stalls=False)
    assert not simulate.in_tempo(agents.live(cut, 0), told.history.tempos)


def test_the_conversions_of_a_clock_are_inverse() -> None:
    clock = agents.LocalClock(random.Random(1), 150.0, 30.0)
    for true in (0, 1, 4_999_999_999, 5_000_000_000, 12_345_678_901):
        local = clock.local(true)
        assert clock.local(clock.true(local)) >= local
        assert clock.true(local) <= true
        assert clock.local(clock.true(local) - 1) < local


def test_a_metronome_in_each_region_agrees_better_within_it() -> None:
    one, strata = regions.simulate(2, 24, 40.0, 1, 1, 120_000)
    p99 = agents.percentile
    assert p99(one.within, 0.99) < 2_000_000
    assert p99(strata.within, 0.99) < 500_000
    # Half of the difference between the two ways cannot be measured, and shows as an error.
    assert strata.errors[-1] < 12_000_000
    assert strata.honest < 90.0
    assert strata.honest_together == one.honest == 100.0
    assert strata.far_pings < one.far_pings
    for way in (one, strata):
        assert [good for lead, (good, of) in way.right.items() if lead > 3 and good != of] == []
        assert all(of for _, of in way.right.values())


def test_the_program_prints_and_stores_its_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = tmp_path / "found.json"
    arguments = ["--agents", "4", "--seconds", "40", "--jobs", "1", "--json", str(found)]
    missed = simulate.main(arguments)
    results = msgspec.json.decode(found.read_bytes())
    assert missed == (not all(figure["met"] for figure in results["figures"]))
    assert len(results["figures"]) == len(simulate.TARGETS)
    assert sum(sum(counts.values()) for counts in results["missed"].values()) == 4
    out = capsys.readouterr().out
    assert all(figure["note"].split()[0] in out for figure in results["figures"] if figure["note"])
    assert "missed beats of an agent whose loop never stalls" in out


def test_the_program_fails_if_a_target_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    hard = simulate.TARGETS | {"skew": simulate.TARGETS["skew"]._replace(target=0.0)}
    monkeypatch.setattr(simulate, "TARGETS", hard)
    assert simulate.main(["--agents", "4", "--seconds", "40", "--jobs", "1"]) == 1
