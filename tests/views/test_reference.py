"""The model agrees with a slow one that says the same in the simplest way."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import msgspec
from hypothesis import given, settings, strategies as st
from msgspec import UNSET
from watched import BAR, Watched, claim

from backbeat_trio._views.model import (
    BUCKETS,
    OperationView,
    PhaseChange,
    Query,
    Timing,
    Totals,
    TypeView,
)
from backbeat_trio._wire import StatusClaim

PHASES = ("started", "connecting", "negotiating", "executing", "completed", "failed")
KEEP = 2


@dataclass
class Run:
    """One operation, as the claims that counted describe it."""

    first: StatusClaim
    newest: StatusClaim
    heard: float
    start: int
    estimated: int
    exact: bool
    history: list[PhaseChange] = field(default_factory=list)

    @property
    def live(self) -> bool:
        return self.newest.state == "executing"


class Slow:
    """What a model with two bars of memory makes of claims, one at a time, on one grid."""

    def __init__(self) -> None:
        self.elapsed = 0.0
        self.hearing = 0.0
        self.listens = True
        self.claims = self.ignored = 0
        self.newest: dict[tuple[str, str], Run] = {}
        self.ended: list[Run] = []

    def go(self, beats: float, *, paused: bool, connected: bool) -> None:
        self.elapsed += 0 if paused else beats
        if not self.connected:
            self.hearing = self.elapsed
        self.connected = connected
        self.listens = connected and not paused
        gone = [run for run in self.ended if run.heard <= self.elapsed - KEEP * BAR]
        self.ended = [run for run in self.ended if run not in gone]
        self.newest = {key: run for key, run in self.newest.items() if run not in gone}

    connected = True

    def take(self, claim: StatusClaim) -> None:
        self.claims += 1
        key = (claim.agent_id, claim.task_id)
        run = self.newest.get(key)
        if claim.cluster_id not in ("c", UNSET) or claim.beat_index < 0:
            self.ignored += 1
        elif run is None or self.is_later(run, claim):
            self.begin(key, claim)
        elif not run.live or self.is_older(run, claim):
            self.ignored += 1
        else:
            self.go_on(run, claim)

    def goes_back(self, run: Run, claim: StatusClaim) -> bool:
        return PHASES.index(str(claim.phase)) < PHASES.index(str(run.newest.phase))

    def is_later(self, run: Run, claim: StatusClaim) -> bool:
        goes_back = claim.state == "executing" and self.goes_back(run, claim)
        if claim.beat_index > run.newest.beat_index:
            return not run.live or goes_back
        begins = claim.beat_index + claim.beats_left - (claim.estimated_beats or 0)
        return (
            claim.beat_index == run.newest.beat_index
            and not run.live
            and claim.state == "executing"
            and claim.beats_left > 0
            and begins > run.start
        )

    def is_older(self, run: Run, claim: StatusClaim) -> bool:
        if claim.beat_index == run.newest.beat_index:
            return claim.state == "executing" and self.goes_back(run, claim)
        return claim.beat_index < run.newest.beat_index

    def begin(self, key: tuple[str, str], claim: StatusClaim) -> None:
        exact = claim.beats_left > 0
        estimated = claim.estimated_beats or 0
        start = claim.beat_index
        if claim.state == "executing":
            start += claim.beats_left - estimated
        change = PhaseChange(str(claim.phase), claim.beat_index)
        run = Run(claim, claim, self.elapsed, start, estimated, exact, [change])
        self.newest[key] = run
        if not run.live:
            self.ended.append(run)

    def go_on(self, run: Run, claim: StatusClaim) -> None:
        if claim.beats_left > 0:
            start = claim.beat_index + claim.beats_left - (claim.estimated_beats or 0)
            run.estimated = claim.estimated_beats or 0
            if run.exact:
                moved = start - run.start
                run.history = [PhaseChange(each.phase, each.beat + moved) for each in run.history]
            run.start, run.exact = start, True
        elif claim.state == "executing":
            run.start = min(run.start, claim.beat_index - run.estimated)
        if claim.phase != run.newest.phase:
            run.history.append(PhaseChange(str(claim.phase), claim.beat_index))
        run.newest, run.heard = claim, self.elapsed
        if not run.live:
            self.ended.append(run)

    # What is seen.

    def timing(self, run: Run) -> Timing:
        heard_for = self.elapsed - self.hearing
        if run.live and self.listens and heard_for >= 3 and self.elapsed - run.heard >= 3:
            return "silent"
        if run.newest.beat_index - run.start > run.estimated:
            return "late"
        return "slow" if run.newest.soft is True else "on_time"

    def used(self, run: Run) -> float | None:
        only_end = run.first is run.newest and not run.live
        return None if only_end else (run.newest.beat_index - run.start) / run.estimated

    def view(self, run: Run) -> OperationView:
        newest = run.newest
        passed = newest.beat_index - run.start
        return OperationView(
            agent_id=newest.agent_id,
            id=newest.task_id,
            type=str(run.first.operation_type),
            phase=str(newest.phase),
            state=newest.state,
            live=run.live,
            timing=self.timing(run),
            start_beat=run.start,
            last_beat=newest.beat_index,
            passed=passed,
            estimated=run.estimated,
            used=self.used(run),
            beats_left=max(0, run.estimated - passed),
            peers=newest.peers or 0,
            parent=None,
            correlation_id=None,
            soft=newest.soft is True,
            notes=newest.notes,
            history=tuple(run.history),
            outcome="live" if run.live else "done" if newest.state == "done" else "failed",
            at_least=not run.exact,
        )

    def views(self) -> list[OperationView]:
        return [self.view(run) for run in self.newest.values()]

    def totals(self) -> Totals:
        live = [self.timing(run) for run in self.newest.values() if run.live]
        return Totals(
            live=len(live),
            on_time=live.count("on_time"),
            slow=live.count("slow"),
            late=live.count("late"),
            silent=live.count("silent"),
            done=sum(run.newest.state == "done" for run in self.ended),
            failed=sum(run.newest.state == "failed" for run in self.ended),
            claims=self.claims,
            ignored=self.ignored,
        )

    def types(self) -> dict[str, TypeView]:
        runs = [*(run for run in self.newest.values() if run.live), *self.ended]
        found = {}
        for type in {str(run.first.operation_type) for run in runs}:
            own = [run for run in runs if run.first.operation_type == type]
            ended = [run for run in own if not run.live]
            used = [used for run in ended if (used := self.used(run)) is not None]
            bounds = list(zip((-math.inf, *BUCKETS[:-1]), BUCKETS, strict=True))
            found[type] = TypeView(
                type=type,
                live=len(own) - len(ended),
                done=sum(run.newest.state == "done" for run in ended),
                failed=sum(run.newest.state == "failed" for run in ended),
                late=sum(self.timing(run) == "late" for run in own),
                used=tuple(sum(low < each <= high for each in used) for low, high in bounds),
            )
        return found


@st.composite
def claims(draw: st.DrawFn) -> StatusClaim:
    beat = draw(st.integers(-1, 14))
    return claim(
        beat,
        agent=draw(st.sampled_from("ab")),
        id=draw(st.sampled_from("xy")),
        # Most operations start once.
        start=min(beat, draw(st.sampled_from((0, 0, 0, 0, 3, 7)))),
        estimated=draw(st.sampled_from((4, 4, 4, 9))),
        state=draw(st.sampled_from(("executing",) * 6 + ("done", "failed"))),
        phase=draw(st.sampled_from(PHASES[:4])),
        soft=draw(st.sampled_from((UNSET, UNSET, True))),
        peers=draw(st.integers(1, 2)),
        operation_type=draw(st.sampled_from("st")),
        cluster_id=draw(st.sampled_from(("c",) * 8 + ("d", UNSET))),
    )


@st.composite
def honest(draw: st.DrawFn) -> list[StatusClaim]:
    """All claims of one operation, a few of which are lost."""
    start, estimated = draw(st.integers(0, 3)), draw(st.integers(1, 5))
    phases = sorted(draw(st.lists(st.sampled_from(PHASES[:4]), min_size=8, max_size=8)))
    order = sorted(phases, key=PHASES.index)
    id = draw(st.sampled_from("xy"))
    made = [
        claim(start + passed, id=id, start=start, estimated=estimated, phase=phase)
        for passed, phase in enumerate(order)
    ]
    made.append(claim(start + 8, id=id, start=start, estimated=estimated, state="done"))
    return [each for each in made if draw(st.integers(0, 5))]


moves = st.tuples(st.sampled_from((0.5, 1.0, 3.0, 9.0)), st.booleans(), st.integers(0, 4))
steps = st.lists(st.lists(claims(), max_size=8) | honest() | moves, max_size=25)


@settings(max_examples=100, deadline=None)
@given(steps=steps)
def test_the_model_agrees_with_a_slow_one(steps: list[Any]) -> None:
    slow, watched = Slow(), Watched(keep_bars=KEEP)
    for step in steps:
        version = watched.model.version
        if isinstance(step, list):
            for each in step:
                slow.take(each)
            watched.take(*step)
        else:
            beats, paused, connected = step
            slow.go(beats, paused=paused, connected=bool(connected))
            watched.go(
                beats,
                paused=paused,
                connected=bool(connected),
                tempo_bpm=0.0 if paused else 60.0,
            )
        assert watched.model.version > version or step == []
        expected = slow.views()
        for view in expected:
            assert watched.seen(view.id, view.agent_id) == view
        totals = watched.model.totals()
        assert msgspec.structs.replace(totals, agents=0, agents_silent=0) == slow.totals()
        assert {each.type: each for each in watched.model.types()} == slow.types()
        page = watched.model.operations(Query(limit=100))
        assert page.total == len(expected)
        assert sorted(map(repr, page.items)) == sorted(map(repr, expected))


KEYS: dict[str, Any] = {
    "used": lambda each: math.inf if each.used is None else -each.used,
    "left": lambda each: (each.estimated or 0) - each.passed,
    "age": lambda each: -each.passed,
    "agent": lambda each: each.agent_id,
    "type": lambda each: each.type,
    "phase": lambda each: PHASES.index(each.phase),
    "id": lambda each: each.id,
}


@settings(max_examples=100, deadline=None)
@given(
    taken=st.lists(claims(), min_size=5, max_size=60),
    quiet=st.sampled_from((0, 2)),
    query=st.builds(
        Query,
        text=st.sampled_from(("", "", "A", "NODE: n", "nothing")),
        agent=st.sampled_from(("", "", "a", "nobody")),
        type=st.sampled_from(("", "", "s")),
        phase=st.sampled_from(("", "", "executing")),
        timing=st.sampled_from((None, None, "on_time", "slow", "late", "silent")),
        outcome=st.sampled_from((None, None, "live", "done", "failed")),
        sort=st.sampled_from(tuple(KEYS)),
        reverse=st.booleans(),
        limit=st.integers(0, 5),
        offset=st.integers(0, 3),
    ),
)
def test_a_page_is_a_part_of_what_passes_all_filters(
    taken: list[StatusClaim], quiet: int, query: Query
) -> None:
    slow, watched = Slow(), Watched()
    for number, each in enumerate(taken):
        made = msgspec.structs.replace(each, task_id=f"{each.task_id}{number // 2}")
        slow.take(made)
        watched.take(made)
        if number % 3 == 0:
            slow.go(1, paused=False, connected=True)
            watched.go(1)
    # What came before is silent then, and what came last is not.
    slow.go(quiet, paused=False, connected=True)
    watched.go(quiet)
    wanted = [
        each
        for each in slow.views()
        if query.agent in ("", each.agent_id)
        and query.type in ("", each.type)
        and query.phase in ("", each.phase)
        and query.timing in (None, each.timing)
        and query.outcome in (None, each.outcome)
        and any(
            query.text.lower() in text.lower()
            for text in (each.agent_id, each.id, each.type, each.notes * (each.state == "failed"))
        )
    ]
    key = KEYS[query.sort]
    page = watched.model.operations(query)
    everything = watched.model.operations(msgspec.structs.replace(query, limit=1000, offset=0))
    assert page.total == len(wanted) == len(everything.items)
    assert sorted(map(repr, everything.items)) == sorted(map(repr, wanted))
    assert [key(each) for each in everything.items] == sorted(
        map(key, wanted), reverse=query.reverse
    )
    assert page.items == everything.items[query.offset : query.offset + query.limit]


@settings(max_examples=100, deadline=None)
@given(
    steps=st.lists(
        st.lists(st.tuples(claims(), st.sampled_from("abcd"), st.sampled_from("stuvwxyz")))
        | st.sampled_from((1.0, 4.0, 20.0, 1000.0)),
        max_size=20,
    )
)
def test_counts_agree_with_lists_whatever_is_left_out(steps: list[Any]) -> None:
    watched = Watched(max_agents=3, max_operations=6, keep_bars=KEEP)
    model = watched.model
    for step in steps:
        if isinstance(step, float):
            watched.go(step)
        else:
            for each, agent, id in step:
                watched.take(msgspec.structs.replace(each, agent_id=agent, task_id=id))
        totals, agents, types = model.totals(), model.agents(), model.types()
        views = model.operations(Query(limit=100)).items
        assert agents.total == totals.agents <= 3
        assert len(views) <= totals.live + totals.done + totals.failed <= 6
        live = [each for each in views if each.live]
        assert len(live) == totals.live
        for timing in ("on_time", "slow", "late", "silent"):
            assert getattr(totals, timing) == sum(each.timing == timing for each in live)
        for agent in agents.items:
            own = [each for each in live if each.agent_id == agent.agent_id]
            assert agent.live == len(own)
            assert agent.late == sum(each.timing == "late" for each in own)
            assert agent.slow == sum(each.timing == "slow" for each in own)
            assert agent.silent_operations == sum(each.timing == "silent" for each in own)
        assert {each.agent_id for each in views} <= {each.agent_id for each in agents.items}
        assert sum(each.live for each in types) == totals.live
        assert sum(each.done for each in types) == totals.done
        assert sum(each.failed for each in types) == totals.failed
        assert all(each.live + each.done + each.failed for each in types)
    # Nothing is left of it in the end.
    watched.go(10_000)
    watched.go(10_000)
    assert model._table._count == model._table._size == 0
    assert model.agents().total == 0
