"""The model: the rule of timing, order, bounds, hostile input, pages and trees."""

from __future__ import annotations

import itertools
import math
import re
import tracemalloc
from typing import Any

import msgspec
import pytest
from msgspec import UNSET
from watched import BAR, Watched, claim, health

from backbeat_trio._views import model as model_module
from backbeat_trio._views.model import (
    BUCKETS,
    MAX_TEXT,
    OTHER_TYPES,
    ClusterModel,
    OperationNode,
    OperationView,
    Page,
    Query,
    Totals,
    clean,
)
from backbeat_trio._wire import StatusClaim


def cases() -> list[tuple[str, ...]]:
    """Return the rows of the table in the docstring of the module."""
    rows = re.findall(r"^(live|done|failed) +(.*)$", model_module.__doc__ or "", re.MULTILINE)
    return [(outcome, *rest.split()) for outcome, rest in rows]


@pytest.mark.parametrize(
    ("outcome", "unheard", "paused", "passed", "soft", "timing"), cases(), ids=" ".join
)
def test_timing_is_that_of_the_table(
    outcome: str, unheard: str, paused: str, passed: str, soft: str, timing: str
) -> None:
    watched = Watched()
    state = "executing" if outcome == "live" else outcome
    fields: dict[str, Any] = {"start": 100, "soft": soft == "yes" or UNSET}
    watched.take(claim(100, start=100))
    watched.go(int(passed))
    watched.take(claim(100 + int(passed), state=state, **fields))
    watched.go(int(unheard))
    if paused == "yes":
        watched.go(5, paused=True, tempo_bpm=0.0)
    seen = watched.seen()
    assert (seen.outcome, seen.timing) == (outcome, timing)
    assert seen.passed == int(passed)
    for wanted in ("on_time", "slow", "late", "silent"):
        page = watched.model.operations(Query(timing=wanted))
        assert page.items == ((seen,) if wanted == timing else ())


def test_the_table_has_cases_of_each_timing() -> None:
    assert {case[-1] for case in cases()} == {"on_time", "slow", "late", "silent"}


# Order.


def test_a_claim_that_is_out_of_order_changes_nothing() -> None:
    watched = Watched()
    watched.take(claim(104, start=100, phase="negotiating"))
    before = watched.seen()
    watched.take(claim(103, start=100, phase="executing"))
    watched.take(claim(104, start=100, phase="started"))
    watched.take(claim(103, start=100, state="done"))
    assert watched.seen() == before
    assert watched.model.totals().ignored == 3


@pytest.mark.parametrize("end", ["done", "failed"])
def test_no_claim_revives_what_has_ended(end: str) -> None:
    watched = Watched()
    watched.take(claim(100), claim(103, start=100, state=end))
    before = watched.seen()
    assert not before.live
    watched.take(
        claim(102, start=100),
        claim(103, start=100),
        claim(103, start=103 - 4),
        claim(103, start=100, state="done"),
        claim(103, start=100, state="failed"),
    )
    assert watched.seen() == before
    assert watched.model.totals().live == 0


def test_a_later_operation_with_the_same_id_starts_afresh() -> None:
    watched = Watched()
    watched.take(claim(100, phase="started"), claim(101, start=100), claim(105, start=100))
    assert watched.seen().timing == "late"
    watched.take(claim(105, start=100, state="failed"))
    # On the very beat on which the first one ended.
    watched.take(claim(105, phase="started", estimated=9))
    seen = watched.seen()
    assert (seen.start_beat, seen.passed, seen.estimated, seen.timing) == (105, 0, 9, "on_time")
    assert [change.phase for change in seen.history] == ["started"]
    # Both count, and the list has the later one.
    totals = watched.model.totals()
    assert (totals.live, totals.failed) == (1, 1)
    assert watched.model.operations(Query()).total == 1
    # The end of this one is lost.
    watched.take(claim(107, start=105), claim(108, phase="started"))
    seen = watched.seen()
    assert (seen.start_beat, seen.history[0].beat, len(seen.history)) == (108, 108, 1)
    assert watched.model.totals().live == 1


def test_claims_of_another_cluster_are_ignored() -> None:
    watched = Watched()
    foreign: dict[str, Any] = {"cluster_id": "elsewhere"}
    watched.take(claim(100), claim(101, start=100, state="done", **foreign))
    watched.take(claim(100, agent="b", **foreign), msgspec.structs.replace(health(100), **foreign))
    totals = watched.model.totals()
    assert (totals.agents, totals.live, totals.done, totals.ignored) == (1, 1, 0, 3)


def test_agents_of_the_first_version_are_understood() -> None:
    newer, older = Watched(), Watched()
    extra = ("cluster_id", "operation_type", "phase", "peers", "estimated_beats")
    made = [
        claim(100, phase="started"),
        claim(101, start=100, phase="connecting"),
        claim(102, start=100, phase="connecting"),
        claim(105, start=100, phase="connecting", soft=True),
        claim(106, start=100, state="done", notes="P2P search: completed (peers: 2, node: n)"),
    ]
    for each in made:
        newer.take(each)
        older.take(msgspec.structs.replace(each, **dict.fromkeys(extra, UNSET)))
        assert older.seen() == newer.seen()
    assert older.seen().timing == "late"
    assert older.model.types() == newer.model.types()
    failed = claim(109, state="failed", notes="P2P operation failed: no (peers) (type: search)")
    older.take(msgspec.structs.replace(failed, **dict.fromkeys(extra, UNSET)))
    assert (older.seen().type, older.seen().phase) == ("search", "failed")


# What has passed.


def test_what_was_late_at_first_sight_has_passed_at_least_its_estimate() -> None:
    watched = Watched()
    watched.take(claim(100, start=50))
    seen = watched.seen()
    assert (seen.passed, seen.used, seen.at_least, seen.timing) == (4, 1.0, True, "on_time")
    watched.take(claim(101, start=50))
    seen = watched.seen()
    assert (seen.passed, seen.used, seen.at_least, seen.timing) == (5, 1.25, True, "late")
    watched.take(claim(102, start=50, state="done"))
    seen = watched.seen()
    assert (seen.passed, seen.at_least, seen.timing) == (6, True, "late")


def test_an_end_alone_does_not_tell_how_long_it_took() -> None:
    watched = Watched()
    watched.take(claim(100, state="done"))
    seen = watched.seen()
    assert (seen.passed, seen.used, seen.at_least, seen.timing) == (0, None, True, "on_time")
    (kind,) = watched.model.types()
    assert (kind.done, sum(kind.used)) == (1, 0)


def test_what_ends_early_says_by_how_much() -> None:
    watched = Watched()
    watched.take(claim(100, estimated=10), claim(103, start=100, estimated=10, state="done"))
    seen = watched.seen()
    assert (seen.passed, seen.beats_left, seen.used) == (3, 7, 0.3)


def test_types_have_the_distribution_of_the_budget_that_was_used() -> None:
    watched = Watched()
    for number, passed in enumerate((1, 2, 4, 5, 8, 9)):
        id = f"x{number}"
        watched.take(claim(100, id=id), claim(100 + passed, start=100, id=id, state="done"))
    watched.take(claim(100, id="live", operation_type="other"))
    other, search = sorted(watched.model.types(), key=lambda each: each.type)
    assert search.used == (1, 1, 0, 0, 1, 1, 0, 1, 1)
    assert (search.done, search.late, other.live) == (6, 3, 1)
    assert BUCKETS[-1] == math.inf


def test_history_keeps_the_newest_changes() -> None:
    watched = Watched(max_history=3)
    for beat in range(10):
        watched.take(claim(100 + beat, start=100, estimated=50, phase=f"step-{beat}"))
    changes = [(change.phase, change.beat) for change in watched.seen().history]
    assert changes == [("step-7", 107), ("step-8", 108), ("step-9", 109)]


# The grid.


def run_beats(watched: Watched, beats: int, passed: int = 0, moved: int = 0) -> None:
    """Have three operations claim on some beats, of which one is slow, and one needs its budget."""
    for number in range(passed, passed + beats):
        beat = int(watched.position) + moved
        watched.take(
            claim(beat, id="long", start=beat - number, estimated=1000),
            claim(beat, id="near", start=beat - number, estimated=16),
            claim(beat, id="soft", start=beat - number, estimated=1000, soft=True),
        )
        watched.go(1)


@pytest.mark.parametrize("first", ["agents", "watcher"])
@pytest.mark.parametrize("to", [3.0, 90_000.0])
def test_another_incarnation_makes_nothing_late_or_silent(first: str, to: float) -> None:
    watched = Watched(position=500.0)
    run_beats(watched, 10)
    shift = int(to - watched.position)
    if first == "agents":
        # The agents are on the new grid for two beats before this process is.
        run_beats(watched, 2, passed=10, moved=shift)
        watched.position += shift
    else:
        watched.position += shift
        watched.look()
        run_beats(watched, 2, passed=10, moved=-shift)
    watched.look()
    run_beats(watched, 5, passed=12)
    assert [watched.seen(id).timing for id in ("long", "near", "soft")] == [
        *("on_time", "on_time", "slow"),
    ]
    totals = watched.model.totals()
    assert (totals.late, totals.silent, totals.agents_silent) == (0, 0, 0)
    seen = watched.seen("long")
    assert (seen.passed, seen.last_beat - seen.history[0].beat) == (16, 16)


@pytest.mark.parametrize("to", [20, 90_000])
def test_a_budget_that_is_out_stays_as_late_as_it_was_on_another_grid(to: int) -> None:
    watched = Watched(position=500.0)
    for number in range(10):
        watched.take(claim(500 + number, start=500))
        watched.go(1)
    assert (watched.seen().timing, watched.seen().passed) == ("late", 9)
    watched.position = to
    watched.look()
    watched.take(claim(to, start=to - 10))
    seen = watched.seen()
    assert (seen.timing, seen.passed, seen.start_beat) == ("late", 10, to - 10)
    assert seen.history[0].beat == to - 10


def test_claims_that_were_late_are_not_taken_for_another_grid() -> None:
    watched = Watched(position=500.0)
    watched.take(claim(500, start=490))
    watched.go(20)
    # All of it comes at once.
    watched.take(*(claim(501 + number, start=490) for number in range(20)))
    assert (watched.seen().passed, watched.seen().at_least) == (4 + 20, True)


def test_a_new_process_on_a_grid_that_began_again_is_not_out_of_order() -> None:
    watched = Watched(position=90_000.0)
    watched.take(claim(90_000, id="x"), claim(90_000, id="y"), claim(90_001, id="y", state="done"))
    watched.take(health(90_000))
    watched.position = 20.0
    watched.look()
    watched.take(claim(20, phase="started"), claim(20, id="y", phase="started"), health(20))
    assert [watched.seen(id).start_beat for id in "xy"] == [20, 20]
    assert watched.model.totals().ignored == 0
    # Within the new grid, order counts.
    watched.take(claim(19, start=10))
    assert watched.seen().last_beat == 20


def test_a_pause_makes_nothing_silent() -> None:
    watched = Watched()
    watched.take(claim(100))
    watched.go(2)
    for _ in range(5):
        watched.go(100, paused=True, tempo_bpm=0.0)
        assert watched.seen().timing == "on_time"
    # It goes on where it was.
    watched.go(0.5)
    assert watched.seen().timing == "on_time"
    watched.go(0.5)
    assert watched.seen().timing == "silent"
    assert watched.model.totals().silent == 1


def test_nothing_is_silent_to_a_process_that_cannot_hear() -> None:
    watched = Watched()
    watched.take(claim(100))
    watched.go(10, connected=False)
    assert watched.seen().timing == "on_time"
    watched.go(1)
    watched.go(2.9)
    assert watched.seen().timing == "on_time"
    watched.go(0.1)
    assert watched.seen().timing == "silent"
    watched.take(claim(114, start=100))
    assert watched.seen().timing == "late"


def test_silence_lasts_a_second_at_least() -> None:
    watched = Watched()
    watched.look(tempo_bpm=600.0)
    watched.take(claim(100, estimated=1000))
    for beats, timing in ((9, "on_time"), (1, "silent")):
        watched.now += beats / 10
        watched.position += beats
        watched.look(tempo_bpm=600.0)
        assert watched.seen().timing == timing


def test_an_agent_is_silent_once_three_claims_are_missing() -> None:
    def silent(agent: str) -> bool:
        (found,) = watched.model.agents(Query(agent=agent)).items
        return found.silent

    watched = Watched()
    watched.take(health(100), claim(100, agent="busy"), health(100, agent="rare"))
    watched.go(20)
    # This one claims its health every 20 beats.
    watched.take(health(120, agent="rare"))
    watched.go(3)
    assert [silent(agent) for agent in ("a", "busy", "rare")] == [False, True, False]
    watched.go(1)
    assert silent("a")
    watched.go(50)
    assert not silent("rare")
    watched.go(6)
    assert silent("rare")
    # What lies between two grids is no interval.
    watched.position = 90_000.0
    watched.look()
    watched.take(health(90_000, agent="rare"))
    assert not silent("rare")
    watched.go(60)
    assert silent("rare")
    assert watched.model.totals().agents_silent == 3


def test_agents_show_their_health_and_their_operations() -> None:
    watched = Watched()
    watched.take(health(100, state="executing"), health(100, agent="b", state="failed"))
    watched.take(
        claim(100, id="fine"),
        claim(106, id="late", start=100),
        claim(106, id="late", start=101),
        claim(101, id="soft", start=100, soft=True),
        claim(100, id="ended", state="done"),
        claim(100, agent="c"),
    )
    trouble, busy, unknown = watched.model.agents(Query()).items
    assert (trouble.agent_id, trouble.healthy, trouble.state) == ("b", False, "failed")
    assert (busy.agent_id, busy.healthy, busy.live, busy.slow) == ("a", True, 3, 1)
    assert (unknown.agent_id, unknown.healthy, unknown.state) == ("c", None, "unknown")
    watched.take(claim(107, id="late", start=101))
    assert [each.agent_id for each in watched.model.agents(Query(timing="late")).items] == ["a"]
    assert watched.model.totals().agents_unhealthy == 1
    names = watched.model.agents(Query(sort="agent", reverse=True, limit=2, offset=1))
    assert (names.total, [each.agent_id for each in names.items]) == (3, ["b", "a"])


def test_text_is_looked_for_where_an_operator_reads_it() -> None:
    def found(text: str) -> tuple[list[str], list[str]]:
        query = Query(text=text, sort="id")
        operations = watched.model.operations(query).items
        return [each.agent_id for each in watched.model.agents(query).items], [
            each.id for each in operations
        ]

    watched = Watched()
    watched.take(msgspec.structs.replace(health(100), notes="CHORUS P2P healthy: node=12D3KooW"))
    reason = "P2P operation failed: Connection lost (type: search)"
    watched.take(claim(100, id="ok"), claim(100, id="bad", state="failed", notes=reason))
    watched.take(claim(100, agent="zed", id="OTHER", operation_type="Pubsub"))
    assert found("12d3") == (["a"], ["bad", "ok"])
    assert found("connection LOST") == ([], ["bad"])
    assert found("other") == found("pubSUB") == ([], ["OTHER"])
    assert found("zed") == (["zed"], ["OTHER"])
    # The notes of the others say nothing that has no filter of its own.
    assert found("peers: 2") == ([], [])


# Bounds.


def ids(watched: Watched) -> set[str]:
    return {each.id for each in watched.model.operations(Query(limit=1000)).items}


def test_what_has_ended_is_kept_for_some_bars() -> None:
    watched = Watched(keep_bars=2)
    watched.take(claim(100), claim(101, start=100, state="done"))
    watched.go(2 * BAR - 1)
    assert watched.model.totals().done == 1
    watched.go(1)
    assert watched.model.operation("a", "x") is None
    assert watched.model.totals().done == 0
    assert watched.model.types() == ()
    assert watched.model.totals().dropped_operations == 0


def test_what_is_silent_for_long_is_forgotten() -> None:
    watched = Watched(keep_bars=2)
    watched.take(claim(100), health(100, agent="b"))
    watched.go(64 * BAR - 1)
    assert (watched.model.totals().agents, watched.model.totals().silent) == (2, 1)
    watched.go(3 * BAR)
    assert watched.model.totals() == Totals(claims=2)


def test_those_that_have_ended_make_room_first() -> None:
    watched = Watched(max_operations=4)
    for number in range(4):
        watched.take(claim(100 + number, id=str(number), estimated=50))
    watched.take(claim(104, id="2", start=102, state="done"))
    watched.take(claim(105, id="3", start=103, state="done"))
    watched.take(claim(105, id="4"))
    assert ids(watched) == {"0", "1", "3", "4"}
    watched.take(claim(105, id="5"), claim(105, id="6"))
    assert ids(watched) == {"1", "4", "5", "6"}
    assert watched.model.totals().dropped_operations == 3


def test_what_was_left_out_does_not_push_out_others_on_each_beat() -> None:
    watched = Watched(max_operations=10)
    for beat in range(100, 110):
        watched.take(*(claim(beat, id=f"{n}", start=100, estimated=50) for n in range(30)))
        assert ids(watched) == {f"{number}" for number in range(10)}
        watched.go(1)
    assert watched.seen("3").history[0].beat == 100
    assert watched.model.totals().dropped_operations == 20
    # What starts later is newer.
    watched.take(claim(110, id="new", phase="started"))
    assert "new" in ids(watched)
    watched.take(*(claim(111, id=f"{n}", start=100, estimated=50) for n in range(30)))
    assert "new" in ids(watched)
    assert watched.model.totals().dropped_operations == 21


def test_agents_that_are_silent_make_room() -> None:
    watched = Watched(max_agents=2)
    watched.take(claim(100, agent="a"), claim(100, agent="b"), claim(100, agent="c"))
    assert watched.model.totals().agents == 2
    assert watched.model.totals().dropped_agents == 1
    watched.go(5)
    watched.take(claim(105, start=100, agent="b"), claim(105, agent="d"), claim(105, agent="e"))
    assert {each.agent_id for each in watched.model.agents().items} == {"b", "d"}
    totals = watched.model.totals()
    assert (totals.dropped_agents, totals.dropped_operations, totals.live) == (3, 1, 2)


@pytest.mark.parametrize("text", ["ascii" * 40, "\N{GRINNING FACE}" * 200, "\u202e" * 10**6])
def test_hostile_text_takes_no_more_memory_than_allowed(text: str) -> None:
    count = 3000
    watched = Watched(max_operations=count)
    # What is kept once, for all operations, is there.
    watched.take(*(claim(99, id=f"{n}", notes=f"{n}") for n in range(5000)))

    def hostile(number: int) -> StatusClaim:
        own = f"{number}" + text[len(f"{number}") :]
        same: dict[str, Any] = {
            "parent": f"{own[:99]}/{own}",
            "correlation_id": f"{own[:98]}/{own}",
        }
        return claim(100, id=own, notes=own, operation_type=own, phase=own, **same)

    number = count if len(text) < 1000 else 10
    tracemalloc.start()
    for each in range(number):
        watched.take(hostile(each))
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # The rest does not grow with the bounds: what is kept once, and the counts of types.
    assert kept < 900 * count + 12_000_000
    totals = watched.model.totals()
    assert totals.live > 0
    assert (totals.live < count) == (number == count)
    assert msgspec.json.encode(watched.model.operations(Query(limit=50)))


def test_numbers_of_any_size_can_be_shown() -> None:
    watched = Watched()
    huge = 10**300
    for number, (beat, left, estimated, progress) in enumerate(
        itertools.product((100, -1, huge), (0, -huge, huge), (0, -huge, huge, UNSET), (1e308, 0.9))
    ):
        fields: dict[str, Any] = {"estimated_beats": estimated, "progress": progress, "peers": huge}
        each = claim(100, id=f"{number}", beats_left=left, **fields)
        watched.take(msgspec.structs.replace(each, beat_index=beat))
        watched.take(claim(101, id=f"{number}", beats_left=0, **fields))
        watched.take(claim(102, id=f"{number}", beats_left=huge, **fields))
        watched.take(claim(103, id=f"{number}", state="done", **fields))
    model = watched.model
    for sort in ("used", "left", "age"):
        page = model.operations(Query(limit=1000, sort=sort))
        assert msgspec.json.decode(msgspec.json.encode(page), type=Page[OperationView]) == page
    assert msgspec.json.encode((model.totals(), model.types(), model.agents()))
    assert model.totals().ignored > 0


def test_ids_that_are_cut_stay_different_and_are_found_by_either() -> None:
    watched = Watched()
    long = ["x" * 1000 + end for end in "ab"]
    escaped = ["\x1b[31m", "\x1b]31m"]
    for id in long + escaped:
        watched.take(claim(100, id=id), claim(101, start=100, id=id))
    page = watched.model.operations()
    assert page.total == 4
    assert all(len(each.id) <= MAX_TEXT and each.id.isprintable() for each in page.items)
    for id in long + escaped:
        seen = watched.seen(id)
        assert watched.seen(seen.id) == seen
        assert seen.last_beat == 101


def test_types_and_phases_without_number_are_summed_up() -> None:
    watched = Watched()
    for number in range(6000):
        watched.take(claim(100, id=f"{number}", operation_type=f"t{number}", phase=f"p{number}"))
    types = watched.model.types()
    assert len(types) == 201
    assert sum(each.live for each in types) == 6000
    assert {types[0].type, types[-1].type} == {OTHER_TYPES}
    phases = {each.phase for each in watched.model.operations(Query(limit=6000)).items}
    assert len(phases) <= 65


# Trees.


def names(node: OperationNode | None) -> Any:
    assert node is not None
    return {node.name: [names(child) for child in node.children]} if node.children else node.name


def test_a_tree_has_the_whole_of_which_an_operation_is_a_part() -> None:
    watched = Watched()
    root: dict[str, Any] = {"correlation_id": "a/root"}
    watched.take(
        claim(100, id="root"),
        claim(100, agent="b", id="left", parent="a/root", **root),
        claim(100, agent="c", id="right", parent="a/root", **root),
        claim(100, agent="c", id="with/slash", parent="b/left", **root),
        claim(100, agent="c", id="leaf", parent="c/with/slash", **root),
        claim(100, agent="c", id="apart"),
    )
    whole = {"a/root": [{"b/left": [{"c/with/slash": ["c/leaf"]}]}, "c/right"]}
    for agent, id in (("a", "root"), ("b", "left"), ("c", "leaf"), ("c", "with/slash")):
        assert names(watched.model.tree(agent, id)) == whole
    node = watched.model.tree("c", "apart")
    assert node == OperationNode("c/apart", watched.seen("apart", "c"))
    assert watched.model.tree("a", "nothing") is None


def test_a_tree_without_its_root_keeps_together_what_belongs_together() -> None:
    watched = Watched()
    root: dict[str, Any] = {"correlation_id": "a/root"}
    watched.take(
        claim(100, id="x", parent="a/root", **root),
        claim(100, id="y", parent="a/lost", **root),
        claim(100, id="z", parent="a/y", **root),
        claim(100, id="other", parent="a/lost", correlation_id="a/elsewhere"),
    )
    for id in "xyz":
        node = watched.model.tree("a", id)
        assert names(node) == {"a/root": ["a/x", {"a/y": ["a/z"]}]}
        assert node is not None
        assert node.operation is None
    watched.take(claim(100, id="root"))
    assert names(watched.model.tree("a", "z")) == {"a/root": ["a/x", {"a/y": ["a/z"]}]}


@pytest.mark.parametrize(
    "parents",
    [
        {"x": "x"},
        {"x": "y", "y": "x"},
        {"x": "y", "y": "z", "z": "y"},
        {"x": "y", "y": "z", "z": "x", "w": "x"},
    ],
    ids=["itself", "two", "tail", "three"],
)
@pytest.mark.parametrize("correlation", ["a/x", "a/y", "a/nothing", "", "/"])
def test_a_circle_of_parents_ends(parents: dict[str, str], correlation: str) -> None:
    watched = Watched()
    for id, parent in parents.items():
        watched.take(claim(100, id=id, parent=f"a/{parent}", correlation_id=correlation))
    for id in parents:
        assert f"a/{id}" in str(names(watched.model.tree("a", id)))


def test_a_tree_is_bounded_and_has_the_operation_that_was_asked_for() -> None:
    watched = Watched()
    chain = [claim(100, id="0")]
    chain += [
        claim(100, id=f"{n}", parent=f"a/{n - 1}", correlation_id="a/0") for n in range(1, 5000)
    ]
    watched.take(*chain)
    watched.take(*(claim(100, agent="b", id=f"{n}", parent="a/0") for n in range(3000)))
    for agent, id in (("a", "0"), ("a", "4999"), ("a", "31"), ("b", "2999")):
        node = watched.model.tree(agent, id)
        assert node is not None
        text = msgspec.json.encode(node).decode()
        assert f'"{agent}/{id}"' in text
        assert text.count('"omitted"') <= 1032
    assert node is not None
    assert (node.name, node.omitted) == ("a/0", 3001 - 1000)


# Text.


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain: äöü 中文 \N{GRINNING FACE}", "plain: äöü 中文 \N{GRINNING FACE}"),
        ("\x1b[31mred\x1b]0;t\x07", "�[31mred�]0;t�"),
        ("a\x9b31m\x00\x7f\r\n\tb", "a�31m��   b"),
        ("\u202eevil\u2066\u200b\ufeff\u2028", "�evil����"),
        ("<b>[bold]&amp;", "<b>[bold]&amp;"),
        ("\ud800", "�"),
        ("", ""),
        ("x" * 200, "x" * 200),
        ("x" * 201, "x" * 199 + "…"),
        ("\x00" * 10**6, "�" * 199 + "…"),
    ],
)
def test_foreign_text_is_made_safe(text: str, shown: str) -> None:
    assert clean(text) == shown


def test_a_model_without_a_grid_shows_what_it_has() -> None:
    model = ClusterModel()
    model.take([claim(100), health(100)], 5.0)
    assert (model.grid, model.totals().live, model.version) == (None, 1, 1)
    model.take([], 6.0)
    assert model.version == 1
