"""The decisions of a metronome that does not lead: each row of the table, and random sequences."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from backbeat_trio._grid import presence as module
from backbeat_trio._grid.presence import Action, Decision, Presence

MS = 1_000_000
SECOND = 1_000_000_000
LEASE = 2 * SECOND


def following(**options: Any) -> Presence:
    """Return a presence that follows a grid whose next frame is late 10 s after the beginning."""
    presence = Presence(0, **options)
    presence.follows(0, 10 * SECOND, LEASE)
    presence.follows(1, 10 * SECOND, LEASE)
    return presence


def recalling(**options: Any) -> Presence:
    """Return a presence that has just decided to send a recall."""
    presence = Presence(0, **options)
    assert presence.decide(200 * MS).action is Action.RECALL
    return presence


def unconnected() -> Decision:
    return Presence(0, connected=False).decide(SECOND)


def reconnected() -> Decision:
    presence = following()
    presence.connection(11 * SECOND, connected=False)
    presence.connection(12 * SECOND, connected=True)
    return presence.decide(12 * SECOND + 100 * MS)


def led_alone() -> Decision:
    presence = following()
    presence.follows(1, 10 * SECOND, LEASE, alone=True)
    return presence.decide(SECOND)


def in_time() -> Decision:
    return following().decide(9 * SECOND)


def late_itself() -> Decision:
    presence = following()
    presence.lost_time(11 * SECOND, SECOND)
    return presence.decide(11 * SECOND)


def late() -> Decision:
    return following().decide(11 * SECOND)


def answered() -> Decision:
    presence = following()
    presence.asked()
    assert presence.decide(SECOND).action is Action.PROBE
    presence.led(SECOND)
    return presence.decide(SECOND)


def refused() -> Decision:
    presence = following()
    assert presence.decide(11 * SECOND).action is Action.PROBE
    presence.refused()
    return presence.decide(11 * SECOND)


def silent() -> Decision:
    presence = following()
    assert presence.decide(11 * SECOND).action is Action.PROBE
    assert presence.decide(12 * SECOND).action is Action.PROBE
    return presence.decide(13 * SECOND)


def led_lately() -> Decision:
    presence = Presence(0)
    presence.led(SECOND)
    return presence.decide(SECOND + 50 * MS)


def unled() -> Decision:
    return Presence(0).decide(200 * MS)


def held() -> Decision:
    presence = recalling()
    presence.holds(LEASE, held=True)
    return presence.decide(SECOND)


def stood_by() -> Decision:
    presence = recalling()
    presence.answered("standby", 210 * MS)
    return presence.decide(SECOND)


def stood_by_in_vain() -> Decision:
    presence = recalling()
    presence.holds(LEASE, held=False)
    for ms in range(210, 4500, 100):
        presence.answered("standby", ms * MS)
        if ms < 4000:
            assert presence.decide(ms * MS).reason == "a standby looks after the leader"
    return presence.decide(4500 * MS)


def remembered() -> Decision:
    presence = recalling()
    presence.answered("agent", 210 * MS)
    waits = presence.decide(250 * MS)
    assert (waits.action, waits.reason) == (Action.WAIT, "agents answer")
    return presence.decide(400 * MS)


def remembered_early() -> Decision:
    presence = recalling()
    presence.answered("agent", 210 * MS)
    assert presence.decide(400 * MS).action is Action.GO_ON
    assert presence.early(2 * SECOND)
    return presence.decide(500 * MS)


def remembers_itself() -> Decision:
    return recalling(remembers=True).decide(1300 * MS)


def forgotten() -> Decision:
    presence = recalling()
    assert presence.decide(1100 * MS).action is Action.RECALL
    return presence.decide(1300 * MS)


CASES: dict[str, Callable[[], Decision]] = {
    "there is no connection": unconnected,
    "the connection is new": reconnected,
    "the leader has no record, this metronome has one": led_alone,
    "the next frame is not late yet": in_time,
    "it is late, and so was this process": late_itself,
    "it is late, or another metronome asks for a leader": late,
    "the leader answers a probe": answered,
    "no process is subscribed to the probes": refused,
    "no answer for a lease": silent,
    "a leader was heard a moment ago": led_lately,
    "no leader was heard": unled,
    "the holder of the record does not answer a probe": held,
    "a standby answers": stood_by,
    "...and there is no leader two leases later": stood_by_in_vain,
    "agents answered, but the record is of a later time": remembered_early,
    "agents answered, and all had enough time to": remembered,
    "no answer came, and this metronome led before": remembers_itself,
    "no answer came for long enough": forgotten,
}


def table() -> dict[str, tuple[str, str]]:
    rows = re.findall(
        r"^([\w.].{48,50}?)  +([a-z ]+?)  +(\w.*)$", module.__doc__ or "", re.MULTILINE
    )
    return {known.strip(): (decision, why) for known, decision, why in rows if why != "reason"}


def test_the_table_and_the_cases_here_have_the_same_rows() -> None:
    assert list(table()) == list(CASES)


@pytest.mark.parametrize("known", CASES)
def test_each_case_of_the_table(known: str) -> None:
    decision, why = table()[known]
    found = CASES[known]()
    assert found.action.value == decision
    assert found.reason in why


def test_a_recall_makes_a_standby_probe_its_leader_before_a_frame_is_late() -> None:
    presence = following()
    presence.asked()
    decision = presence.decide(SECOND)
    assert (decision.action, decision.reason) == (Action.PROBE, "somebody asks who leads")
    # A frame shows as well as an answer that the leader is alive.
    presence.follows(2, 20 * SECOND, LEASE)
    assert presence.decide(SECOND).action is Action.WAIT


def test_the_process_own_lateness_excuses_a_leader_for_one_lease_at_most() -> None:
    presence = following()
    presence.lost_time(17 * SECOND, 7 * SECOND)
    assert presence.decide(17 * SECOND).until_ns == 17 * SECOND + LEASE
    assert presence.decide(17 * SECOND + LEASE).action is Action.PROBE


def test_time_that_this_process_lost_does_not_count_as_the_silence_of_its_leader() -> None:
    presence = following()
    begun = 11 * SECOND
    assert presence.decide(begun).action is Action.PROBE
    # The process is suspended while the answer to its probe is on the way.
    now = begun + 7 * SECOND
    presence.lost_time(now, now - begun)
    assert presence.decide(now).action is Action.PROBE
    assert presence.decide(now + LEASE - MS).action is Action.PROBE
    assert presence.decide(now + LEASE).reason == "it is silent"


@pytest.mark.parametrize("remembers", [True, False])
def test_everybody_is_asked_again_after_the_lease_of_a_leader_that_may_be_stopped(
    remembers: bool,
) -> None:
    presence = recalling(remembers=remembers)
    presence.holds(LEASE, held=True)
    # No answer comes, and then only the leader is asked until its lease ends.
    now = 1300 * MS
    while (decision := presence.decide(now)).action is Action.PROBE:
        now += 5 * MS
    assert now == 1300 * MS + LEASE
    assert decision.action is Action.RECALL
    # Whoever has come back meanwhile has as much time to answer as everybody else had.
    assert presence.decide(now + 990 * MS).action is not Action.GO_ON
    assert presence.decide(now + 990 * MS).action is not Action.BEGIN
    ended = presence.decide(now + SECOND).action
    assert ended is (Action.GO_ON if remembers else Action.BEGIN)
    presence.answered("agent", now + 500 * MS)
    assert presence.decide(now + 600 * MS).reason == "agents remember the grid"


def test_time_that_this_process_lost_does_not_count_as_waiting_for_answers() -> None:
    presence = recalling()
    begun = 100 * MS
    # The clock jumps while the answers are on their way.
    now = begun + 4600 * MS
    presence.lost_time(now, 4500 * MS)
    assert presence.decide(now + 890 * MS).action is not Action.BEGIN
    assert presence.decide(now + 1000 * MS).action is Action.BEGIN


def test_every_waiting_time_grows_with_the_round_trip() -> None:
    presence = Presence(0)
    presence.measured(600 * MS)
    # Three round trips take 1.8 s. After that long without a leader, a recall is sent.
    assert presence.decide(1700 * MS).action is Action.WAIT
    assert presence.decide(1800 * MS).action is Action.RECALL
    assert presence.decide(3500 * MS).action is not Action.BEGIN
    assert presence.decide(3600 * MS).action is Action.BEGIN
    far = following()
    far.measured(600 * MS)
    assert far.decide(11 * SECOND).action is Action.PROBE
    assert far.decide(15 * SECOND).action is Action.PROBE
    assert far.decide(16 * SECOND).action is Action.TAKE_OVER


def test_the_interval_between_recalls_grows() -> None:
    presence = recalling()
    presence.holds(100 * LEASE, held=False)
    presence.answered("standby", 200 * MS)
    recalls = []
    for ms in range(200, 20_000, 10):
        presence.answered("standby", ms * MS)
        if presence.decide(ms * MS).action is Action.RECALL:
            recalls.append(ms)
    gaps = [after - before for before, after in itertools.pairwise(recalls)]
    assert gaps == sorted(gaps)
    assert gaps[-1] == 2000


def test_agents_that_do_not_agree_do_not_keep_a_grid_from_beginning() -> None:
    presence = recalling()
    presence.answered("agent", 210 * MS)
    assert presence.decide(400 * MS).action is Action.GO_ON
    presence.disbelieved()
    assert presence.decide(400 * MS).action is Action.RECALL
    assert presence.decide(1200 * MS).action is Action.BEGIN


def test_the_agents_time_is_awaited_only_once() -> None:
    presence = recalling()
    presence.answered("agent", 210 * MS)
    assert presence.early(2 * SECOND)
    assert presence.decide(1900 * MS).action is Action.RECALL
    assert presence.decide(2 * SECOND).action is Action.GO_ON
    assert not presence.early(4 * SECOND)
    assert presence.decide(2100 * MS).action is Action.GO_ON
    presence.led(3 * SECOND)
    assert presence.early(4 * SECOND)


class Anything(RuleBasedStateMachine):
    """Whatever is heard, a metronome does not try to lead while anybody shows a sign of life."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.presence = Presence(0)
        self.connected = True
        self.follows = False
        self.frame = 0
        self.late = 0
        self.shown = 0

    @rule(ms=st.integers(0, 700))
    def wait(self, ms: int) -> None:
        self.now += ms * MS

    @rule(connected=st.booleans())
    def connect(self, connected: bool) -> None:
        self.connected = connected
        self.presence.connection(self.now, connected=connected)

    @rule(ms=st.integers(1, 1000))
    def hear(self, ms: int) -> None:
        self.frame += 1
        self.follows = True
        self.late, self.shown = self.now + ms * MS, self.now
        self.presence.follows(self.frame, self.late, LEASE)

    @precondition(lambda self: self.follows)
    @rule()
    def hear_nothing_new(self) -> None:
        self.presence.follows(self.frame, self.late, LEASE)

    @rule()
    def be_led(self) -> None:
        self.shown = self.now
        self.presence.led(self.now)

    @rule()
    def be_asked(self) -> None:
        self.presence.asked()

    # Only a metronome that follows nobody sends a recall.
    @precondition(lambda self: not self.follows)
    @rule(role=st.sampled_from(["leader", "standby", "agent"]))
    def be_answered(self, role: Any) -> None:
        self.shown = self.now
        self.presence.answered(role, self.now)

    @rule(ms=st.integers(0, 10_000))
    def lose_time(self, ms: int) -> None:
        self.presence.lost_time(self.now, ms * MS)

    @invariant()
    def it_is_patient(self) -> None:
        decision = self.presence.decide(self.now)
        assert decision.until_ns > self.now
        if not self.connected:
            assert decision.action is Action.WAIT
        if decision.action is Action.BEGIN:
            assert not self.follows
            assert self.now - self.shown >= SECOND
        if decision.action is Action.TAKE_OVER:
            # Here the server never says that no process is subscribed to the probes.
            assert self.now - self.shown >= LEASE


TestAnything = Anything.TestCase
