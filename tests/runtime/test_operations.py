"""The six-phase machine, driven against a model."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from backbeat_trio import (
    InvalidTransition,
    Operation,
    OperationExists,
    OperationNotFound,
    Phase,
    SessionClosed,
    StatusClaim,
)
from backbeat_trio._runtime.operations import ESTIMATES, Operations
from backbeat_trio._wire import decode_claims, encode


class Owner:
    """What a session is to its operations, without one."""

    def __init__(self) -> None:
        self.table = Operations("agent", "node-1", self, "test-cluster")
        self.beat = 100
        self.claims: list[StatusClaim] = []
        self.closed = False

    def current_beat(self) -> int:
        return self.beat

    def check_open(self) -> None:
        if self.closed:
            raise SessionClosed("closed")

    def emit(self, claim: StatusClaim, *, terminal: bool = False) -> None:
        assert terminal is (claim.state in ("done", "failed"))
        self.claims.append(claim)

    def start(self, type: str = "election", **options: Any) -> Operation:
        return self.table.start(type, **({"id": "op"} | options))


def test_the_claims_of_a_life() -> None:
    owner = Owner()
    operation = owner.start(id="election-leader-2025", beats=5)
    owner.beat += 2
    operation.advance(Phase.CONNECTING, peers=3)
    assert operation.beats_left == 3
    assert operation.start_beat == 100
    operation.complete()
    assert operation.beats_left == 0
    notes = "P2P election: {} (peers: {}, node: node-1)"
    assert owner.claims == [
        StatusClaim(
            *("agent", "election-leader-2025", 100, "executing", 5, 0.0),
            notes.format("started", 0),
            *("test-cluster", "election", "started", 0, 5),
        ),
        StatusClaim(
            *("agent", "election-leader-2025", 102, "executing", 3, 0.4),
            notes.format("connecting", 3),
            *("test-cluster", "election", "connecting", 3, 5),
        ),
        StatusClaim(
            *("agent", "election-leader-2025", 102, "done", 0, 1.0),
            notes.format("completed", 3),
            *("test-cluster", "election", "completed", 3, 5),
        ),
    ]


def test_a_failure_to_the_letter() -> None:
    owner = Owner()
    owner.start().fail("quorum not reached within timeout")
    assert owner.claims[-1] == StatusClaim(
        *("agent", "op", 100, "failed", 0, 0.0),
        "P2P operation failed: quorum not reached within timeout (type: election)",
        *("test-cluster", "election", "failed", 0, 10),
    )


names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=50)


@given(names, names, st.integers(1, 10**9), st.integers(0, 10**9), st.integers(0, 100))
def test_claims_of_a_beat_are_encoded_as_claims_of_transitions(
    type: str, id: str, beats: int, peers: int, passed: int
) -> None:
    owner = Owner()
    operation = owner.start(type, id=id, beats=beats)
    other = owner.start(type, id=f"{id} again", beats=beats)
    owner.beat += passed
    for each in (operation, other):
        each.advance(Phase.EXECUTING, peers=peers)
    live = owner.table.claims(owner.table.live(), owner.beat)
    assert [encode(each) for each in live] == [encode(claim) for claim in owner.claims[-2:]]
    assert [decode_claims(encode(each)) for each in live] == [[c] for c in owner.claims[-2:]]


def test_operations_of_many_kinds_keep_what_their_claims_say() -> None:
    owner = Owner()
    operations = [owner.start(id=f"{number}", beats=number + 1) for number in range(3000)]
    claims = [decode_claims(encode(live))[0] for live in owner.table.claims(operations, 100)]
    assert claims == owner.claims
    assert [claim.estimated_beats for claim in claims] == list(range(1, 3001))


@pytest.mark.parametrize("passed", [1, 5, 9])
def test_the_claims_of_a_beat_have_the_fields_of_a_transition(passed: int) -> None:
    owner = Owner()
    operation = owner.start(beats=5)
    operation.advance(Phase.EXECUTING, peers=4)
    owner.beat += passed
    (live,) = owner.table.claims([operation], owner.beat)
    operation.advance(Phase.EXECUTING)
    claim = owner.claims[-1]
    assert encode(live) == encode(claim)
    fields = (claim.cluster_id, claim.operation_type, claim.phase, claim.peers)
    assert fields == ("test-cluster", "election", "executing", 4)
    assert claim.estimated_beats == 5


def test_progress_and_beats_left_are_clamped() -> None:
    owner = Owner()
    operation = owner.start(beats=2)
    owner.beat += 7
    (claim,) = owner.table.claims([operation], owner.beat)
    assert (claim.beats_left, claim.progress) == (0, 1.0)


def test_moving_to_another_grid_keeps_the_beats_that_have_passed() -> None:
    owner = Owner()
    operation = owner.start(beats=5)
    owner.beat += 2
    owner.table.rebase(12_000)
    owner.beat += 12_000
    assert operation.start_beat == 12_100
    assert operation.beats_left == 3


@pytest.mark.parametrize(("type", "estimate"), ESTIMATES.items())
def test_estimates_by_type(type: str, estimate: tuple[int, int]) -> None:
    assert Owner().start(type).beats == estimate[1]


def test_other_types_are_welcome() -> None:
    assert Owner().start("tea making").beats == 8


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"beats": 0}, ValueError, "`beats` must be at least 1"),
        ({"beats": -3}, ValueError, "`beats` must be at least 1"),
        ({"beats": math.nan}, ValueError, "`beats` must not be NaN"),
        ({"beats": 1.5}, TypeError, "`beats` must be an integer"),
        ({"beats": "5"}, TypeError, "`beats` must be an integer"),
        ({"beats": True}, TypeError, "`beats` must be an integer"),
        ({"id": ""}, ValueError, "`id` must not be empty"),
        ({"id": 5}, TypeError, "`id` must be a str"),
        ({"beats": 2**53 + 1}, ValueError, "`beats` must be at most 9007199254740992"),
        ({"beats": 10**5000}, ValueError, "`beats` must be at most"),
        ({"beats": -(10**5000)}, ValueError, "`beats` must be at least 1"),
        ({"id": "\ud800"}, ValueError, "`id` has no encoding in UTF-8: surrogates not allowed"),
        ({"type": ""}, ValueError, "`type` must not be empty"),
        ({"type": None}, TypeError, "`type` must be a str"),
    ],
)
def test_a_start_that_is_refused_changes_nothing(
    options: dict[str, Any], error: type[Exception], text: str
) -> None:
    owner = Owner()
    with pytest.raises(error, match=text):
        owner.start(**({"type": "election"} | options))
    assert len(owner.table) == 0
    assert not owner.claims


def test_an_id_in_use() -> None:
    owner = Owner()
    first = owner.start()
    with pytest.raises(OperationExists, match="'op'"):
        owner.start()
    first.complete()
    owner.start()


def test_an_old_handle_does_not_touch_a_later_operation_of_its_id() -> None:
    owner = Owner()
    old = owner.start()
    old.complete()
    new = owner.start()
    with pytest.raises(InvalidTransition):
        old.fail("late")
    assert new.phase is Phase.STARTED


def test_refused_transitions_change_nothing() -> None:
    owner = Owner()
    operation = owner.start()
    operation.advance(Phase.NEGOTIATING, peers=2)
    sent = len(owner.claims)
    with pytest.raises(InvalidTransition, match="cannot go back"):
        operation.advance(Phase.CONNECTING, peers=9)
    for final in (Phase.COMPLETED, Phase.FAILED):
        with pytest.raises(InvalidTransition, match="gets to"):
            operation.advance(final)
    for peers in (-1, math.nan, 1.5, "3", 10**5000):
        with pytest.raises((ValueError, TypeError), match="`peers`"):
            operation.advance(Phase.EXECUTING, peers=peers)  # type: ignore[arg-type]
        with pytest.raises((ValueError, TypeError), match="`peers`"):
            operation.complete(peers=peers)  # type: ignore[arg-type]
    for reason in ("", "\ud800"):
        with pytest.raises(ValueError, match="`reason`"):
            operation.fail(reason)
    with pytest.raises(ValueError, match="is not a valid Phase"):
        operation.advance(17)  # type: ignore[arg-type]
    assert (operation.phase, operation.peers) == (Phase.NEGOTIATING, 2)
    assert len(owner.claims) == sent


def test_unknown_ids() -> None:
    owner = Owner()
    with pytest.raises(OperationNotFound, match="'x'"):
        owner.table.find("x")


def test_a_session_that_was_left_takes_no_more() -> None:
    owner = Owner()
    operation = owner.start()
    owner.closed = True
    for call in (
        lambda: owner.start(id="other"),
        lambda: owner.table.find("op"),
        lambda: operation.advance(Phase.EXECUTING),
        operation.complete,
        lambda: operation.fail("late"),
    ):
        with pytest.raises(SessionClosed):
            call()
    assert len(owner.table) == 1
    owner.table.fail_all("the session was closed")
    assert operation.phase is Phase.FAILED
    assert len(owner.table) == 0


def test_an_id_that_is_made_up_fits_whatever_the_type_is() -> None:
    owner = Owner()
    one, two = (owner.start("x" * 1000, id=None) for _ in range(2))
    assert one.id != two.id
    assert one.id.startswith("xxx")


def test_operations_are_not_made_by_hand() -> None:
    with pytest.raises(TypeError, match="Session"):
        Operation()


def test_repr_names_what_matters() -> None:
    assert repr(Owner().start()) == "<Operation 'op' type='election' phase=STARTED beats=10>"


class OperationMachine(RuleBasedStateMachine):
    """Any sequence of verbs, against a dictionary of (phase, peers, start, estimate)."""

    started: Bundle[str] = Bundle("started")

    def __init__(self) -> None:
        super().__init__()
        self.owner = Owner()
        self.model: dict[str, list[int]] = {}

    @rule(target=started, id=st.text("abc", min_size=1, max_size=2), beats=st.integers(1, 9))
    def start(self, id: str, beats: int) -> str:
        if id in self.model:
            with pytest.raises(OperationExists):
                self.owner.start(id=id, beats=beats)
        else:
            self.owner.start(id=id, beats=beats)
            self.model[id] = [Phase.STARTED, 0, self.owner.beat, beats]
        return id

    @rule(id=started, phase=st.sampled_from(Phase), peers=st.none() | st.integers(0, 9))
    def advance(self, id: str, phase: Phase, peers: int | None) -> None:
        if id not in self.model:
            with pytest.raises(OperationNotFound):
                self.owner.table.find(id).advance(phase, peers=peers)
        elif phase.final or phase < self.model[id][0]:
            with pytest.raises(InvalidTransition):
                self.owner.table.find(id).advance(phase, peers=peers)
        else:
            self.owner.table.find(id).advance(phase, peers=peers)
            self.model[id][0] = phase
            if peers is not None:
                self.model[id][1] = peers

    @rule(id=consumes(started), well=st.booleans())
    def end(self, id: str, well: bool) -> None:
        def end() -> None:
            if well:
                self.owner.table.find(id).complete()
            else:
                self.owner.table.find(id).fail("why not")

        if self.model.pop(id, None) is None:
            with pytest.raises(OperationNotFound):
                end()
        else:
            end()
            claim = self.owner.claims[-1]
            assert (claim.state, claim.beats_left) == ("done" if well else "failed", 0)

    @rule(beats=st.integers(1, 5))
    def wait(self, beats: int) -> None:
        self.owner.beat += beats

    @rule(beats=st.integers(-50, 1000))
    def change_grid(self, beats: int) -> None:
        self.owner.table.rebase(beats)
        self.owner.beat += beats
        for entry in self.model.values():
            entry[2] += beats

    @invariant()
    def claims_say_what_the_model_says(self) -> None:
        owner = self.owner
        live = owner.table.claims(owner.table.live(), owner.beat)
        claims = decode_claims(encode(live))
        assert {claim.task_id for claim in claims} == set(self.model)
        for claim in claims:
            phase, peers, start, beats = self.model[claim.task_id]
            passed = owner.beat - start
            assert claim.beats_left == max(0, beats - passed)
            assert claim.progress == min(1.0, passed / beats)
            assert f": {Phase(phase).name.lower()} (peers: {peers}," in claim.notes


TestOperationMachine: Any = OperationMachine.TestCase


@pytest.mark.parametrize("field", ["type", "id"])
def test_a_name_that_no_message_could_hold_is_refused(field: str) -> None:
    options: dict[str, Any] = {field: "x" * 1001}
    with pytest.raises(ValueError, match=f"`{field}` must have at most 1000 characters"):
        Owner().start(**options)
    Owner().start(**{field: "x" * 1000})
