"""What bounds a task, on its way into a message, through services, and out of it again."""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from backbeat_trio import MemoryBus, Session, SessionClosed, StatusClaim
from backbeat_trio._grid.timeline import Timeline
from backbeat_trio._time.local import local_ns
from backbeat_trio._wire import Segment
from backbeat_trio.testing import open_session

Clock = trio.testing.MockClock
TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@asynccontextmanager
async def open_pair(**settings: Any) -> AsyncGenerator[tuple[Session, Session], None]:
    """Open two sessions on one grid, at the beginning of a beat."""
    name = "memory://calls"
    async with (
        open_session(nats_url=name, agent_id="caller", tempo_bpm=60.0, **settings) as caller,
        open_session(nats_url=name, agent_id="service", tempo_bpm=60.0, **settings) as service,
    ):
        await caller.sleep_until(caller.current_beat() + 1)
        assert caller._calls.incarnation == service._calls.incarnation
        assert caller.current_position() == service.current_position()
        yield caller, service


def injected(bb: Session, **headers: str) -> dict[str, str]:
    bb.inject(headers)
    return headers


def move(bb: Session, position: float, incarnation: str) -> None:
    """Move a session to another grid, as its follower does when it locks."""
    listener, whole, now = bb._runtime.listener, math.floor(position), local_ns()
    assert listener is not None
    listener.follower.incarnation = incarnation
    segment = Segment(bb._clock.grid.timeline.segments[0].epoch + 1, 0, whole, 0, 60_000)
    offset = round((position - whole) * 1e9) - now
    bb._clock.grid.rebase(Timeline((segment,)), offset, now, beats_per_bar=8)
    assert bb.current_position() == position


def set_tempo(bb: Session, milli: int) -> None:
    """Change the tempo of one session now, at the beginning of a beat; 0 pauses its grid."""
    clock = bb._clock
    segments = (Segment(9, 99, clock.index(), clock.cluster_ns(), milli),)
    clock.grid.adopt(Timeline(segments), local_ns())


# The deadline.


async def test_a_deadline_ends_on_the_same_beat_for_everybody(autojump_clock: Clock) -> None:
    async with open_pair() as (caller, service):
        begin = caller.current_position()
        with caller.fail_after(5.125):
            headers = injected(caller)
        incarnation = caller._calls.incarnation
        assert headers == {"Backbeat-Deadline": f"{incarnation}; {begin + 5.125:.3f}; 5.125"}
        await trio.sleep(2)
        with service.extract(headers) as scope:
            assert scope.deadline == begin + 5.125
            # The next hop gets the same beat.
            again = injected(service)
            assert again["Backbeat-Deadline"] == f"{incarnation}; {begin + 5.125:.3f}; 3.125"
            await trio.sleep_forever()
        assert scope.cancelled_caught
        assert service.current_position() == begin + 5.125
        assert service.statistics().headers_expired == 0


async def test_no_deadline_is_none_through_two_hops(autojump_clock: Clock) -> None:
    async with open_pair() as (caller, service):
        headers = injected(caller)
        assert headers == {}
        for _ in range(2):
            with service.extract(headers) as scope:
                assert scope.deadline == math.inf
                assert service.current_effective_deadline() == math.inf
                headers = injected(service)
                assert headers == {}
        with service.extract(None) as scope:
            assert scope.deadline == math.inf
        with caller.fail_after(math.inf), caller.fail_after(2e9):
            # Nobody would believe that there are two thousand million beats left.
            assert injected(caller) == {}


async def test_the_nearest_deadline_counts(autojump_clock: Clock) -> None:
    async with open_pair() as (caller, service):
        begin = caller.current_position()

        def left() -> float:
            beat, left = injected(service)["Backbeat-Deadline"].split("; ")[1:]
            assert float(beat) - begin == float(left)
            return float(left)

        with caller.fail_after(10), caller.fail_after(6), caller.fail_after(8):
            headers = injected(caller)
        with service.extract(headers):
            assert left() == 6
            with service.fail_after(4):
                assert left() == 4
                with trio.move_on_after(2.5):
                    assert left() == 2.5
                with service.extract(headers):
                    assert left() == 4
                with trio.CancelScope(shield=True):
                    assert injected(service) == {}
                    with service.extract(headers):
                        assert left() == 6
                with trio.CancelScope() as cancelled:
                    cancelled.cancel()
                    assert left() == 0


async def test_a_task_is_bound_by_the_scopes_around_its_nursery(mock_clock: Clock) -> None:
    heard: list[dict[str, str]] = []

    async def work() -> None:
        heard.append(injected(bb))

    async with open_session(tempo_bpm=60.0) as bb:
        with bb.move_on_after(7):
            expected = injected(bb)
            async with trio.open_nursery() as nursery:
                with bb.move_on_after(3):
                    nursery.start_soon(work)
    assert heard == [expected]


async def test_a_deadline_in_seconds_counts_at_the_present_tempo(autojump_clock: Clock) -> None:
    async with open_session(tempo_bpm=60.0) as bb:
        await bb.sleep_until(bb.current_beat() + 1)
        set_tempo(bb, 30_000)
        with trio.move_on_after(10), bb.move_on_after(7):
            assert injected(bb)["Backbeat-Deadline"].endswith("; 5.000")
            assert bb.remaining().beats == 5
            assert bb.remaining().seconds == 10
            set_tempo(bb, 0)
            # No position says when the seconds are over, so only the beats remain.
            assert injected(bb)["Backbeat-Deadline"].endswith("; 7.000")
            with bb.detached(), trio.move_on_after(5):
                assert injected(bb) == {}


async def test_a_deadline_follows_pauses_and_changes_of_tempo(autojump_clock: Clock) -> None:
    async with open_pair() as (caller, service):
        begin = service.current_beat()
        with caller.fail_after(10):
            headers = injected(caller)
        with service.extract(headers) as scope:
            beat = await caller.pause()
            assert beat < begin + 10
            await trio.sleep(1000)
            assert service.health().paused
            assert not scope.cancel_called
            assert scope.deadline == begin + 10
            await caller.resume()
            await caller.sleep_until(beat + 1)
            await caller.set_tempo(120, at_beat=beat + 4)
            await trio.sleep_forever()
        assert scope.cancelled_caught
        assert service.current_position() == begin + 10
        assert service.current_beat() == begin + 10


# Other grids.


async def test_on_another_grid_what_was_left_counts(autojump_clock: Clock) -> None:
    async with open_session(tempo_bpm=60.0) as caller, open_session(tempo_bpm=30.0) as service:
        assert caller._calls.incarnation != service._calls.incarnation
        await service.sleep_until(service.current_beat() + 7)
        with caller.fail_after(5, soft_after=3):
            headers = injected(caller)
        await trio.sleep(1)
        begin = service.current_position()
        with service.extract(headers) as scope:
            assert scope.deadline == begin + 5
            assert scope.soft_deadline == begin + 3
            await scope.wait_soft()
            assert service.current_position() == begin + 3
            await trio.sleep_forever()
        assert service.current_position() == begin + 5


async def test_what_is_left_counts_from_a_move_on_and_the_beat_again_on_the_way_back(
    autojump_clock: Clock,
) -> None:
    async with open_pair() as (caller, service):
        home, begin = service._calls.incarnation, service.current_position()
        with caller.fail_after(10, soft_after=8):
            headers = injected(caller)
        with service.extract(headers) as scope, service.extract(headers) as moved:
            moved.deadline = begin + 9
            await trio.sleep(2)
            with scope.graceful() as graceful:
                move(service, 1000, "another")
                assert scope.deadline == 1008
                assert scope.soft_deadline == graceful.deadline == 1006
                assert scope.beats_left == 8
                # Somebody has set this one, as a position.
                assert moved.deadline == begin + 9
                await trio.lowlevel.checkpoint()
                move(service, 1003, "a third one")
                assert scope.deadline == 1011
                move(service, begin + 4, home)
                assert scope.deadline == begin + 10
                assert scope.soft_deadline == graceful.deadline == begin + 8


async def test_a_session_that_locks_later_ends_on_the_beat(autojump_clock: Clock) -> None:
    async with open_pair() as (caller, service):
        home, begin = caller._calls.incarnation, caller.current_position()
        with caller.fail_after(10):
            headers = injected(caller)
        move(service, 0, "")
        assert service._calls.incarnation not in ("", home)
        with service.extract(headers) as scope:
            assert scope.deadline == 10
            await trio.sleep(1)
            move(service, begin + 3, home)
            assert scope.deadline == begin + 10
            with service.extract(headers) as other:
                other.relative_deadline = 2
                move(service, 50, "another")
                assert other.deadline == 52


async def test_a_local_grid_is_known_to_nobody_else(mock_clock: Clock) -> None:
    async with open_session(tempo_bpm=60.0, enabled=False) as a:
        assert injected(a) == {}
        with a.fail_after(0), trio.fail_after(5):
            assert injected(a) == {}


# What is not valid.


async def test_headers_that_are_not_valid_are_counted(
    autojump_clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "backbeat_trio")
    async with open_pair() as (caller, service):
        garbled = {"backbeat-deadline": "x; nan; 1", "Backbeat-Operation": "?", "traceparent": "0"}
        with service.extract(garbled) as scope:
            assert scope.deadline == math.inf
            assert injected(service) == {}
        with service.extract({"Backbeat-Deadline": "x; 1; 1e300"}) as scope:
            assert scope.deadline == math.inf
        past = f"{service._calls.incarnation}; 0.5; 3"
        for value in (past, "another; 99999; 0.000"):
            with service.extract({"Backbeat-Deadline": value}) as scope:
                await trio.lowlevel.checkpoint()
                pytest.fail("not reached")  # pragma: no cover
            assert scope.cancelled_caught
        counts = service.statistics()
        assert counts.headers_garbled == 3
        assert counts.headers_absurd == 1
        assert counts.headers_expired == 2
        assert "Backbeat-Operation is ignored" in caplog.text
        with caller.fail_after(0), caller.fail_at(-5), trio.CancelScope(shield=True):
            pass
        with caller.move_on_at(-5):
            # A deadline that is past is written as such.
            assert injected(caller)["Backbeat-Deadline"].endswith("; 0.000")


async def test_a_block_is_entered_once_and_in_an_open_session(mock_clock: Clock) -> None:
    async with open_session() as bb:
        block = bb.extract({"traceparent": TRACE})
        with block:
            pass
        with pytest.raises(RuntimeError, match="once"), block:
            pytest.fail("not reached")  # pragma: no cover
        unentered = bb.extract({"traceparent": TRACE})
    with pytest.raises(SessionClosed), unentered:
        pytest.fail("not reached")  # pragma: no cover
    with pytest.raises(SessionClosed):
        bb.inject({})


async def test_other_headers_stay(mock_clock: Clock) -> None:
    async with open_session(tempo_bpm=60.0) as bb:
        headers = {"Content-Type": "text/plain", "backbeat-deadline": "old", "X": "y"}
        bb.inject(headers)
        assert headers == {"Content-Type": "text/plain", "X": "y"}
        with bb.move_on_after(5), bb.extract({"traceparent": TRACE}):
            headers |= {"BACKBEAT-DEADLINE": "old", "Backbeat-Soft-Deadline": "old"}
            bb.inject(headers)
            bb.inject(headers)
            assert sorted(headers) == ["Backbeat-Deadline", "Content-Type", "X", "traceparent"]
            assert headers["Backbeat-Deadline"].endswith("; 5.000")
            own = {"Traceparent": TRACE.replace("00f0", "11f1")}
            bb.inject(own)
            assert own["Traceparent"] == TRACE.replace("00f0", "11f1")
            assert "traceparent" not in own


# The soft edge.


async def test_a_soft_edge_travels(autojump_clock: Clock) -> None:
    async with open_pair() as (caller, service):
        begin = caller.current_position()
        incarnation = caller._calls.incarnation
        with caller.fail_after(10, soft_after=8) as scope:
            headers = injected(caller)
            assert headers == {
                "Backbeat-Deadline": f"{incarnation}; {begin + 10:.3f}; 10.000",
                "Backbeat-Soft-Deadline": f"{incarnation}; {begin + 8:.3f}; 8.000",
            }
            # It has no effect after the deadline, so it is not written.
            with caller.fail_after(8):
                assert list(injected(caller)) == ["Backbeat-Deadline"]
            with scope.graceful():
                assert injected(caller) == {
                    "Backbeat-Deadline": f"{incarnation}; {begin + 8:.3f}; 8.000"
                }
        with service.extract(headers) as scope, scope.graceful() as graceful:
            await trio.sleep_forever()
        assert graceful.cancelled_caught
        assert service.current_position() == begin + 8
        with service.extract(headers) as scope:
            assert scope.soft_called
            assert injected(service)["Backbeat-Soft-Deadline"].endswith("; 0.000")
        headers = {"Backbeat-Soft-Deadline": "another; 5; 2"}
        with service.extract(headers) as scope:
            assert scope.soft_deadline == begin + 10
            assert scope.deadline == math.inf


# What is left.


async def test_what_is_left_as_a_sentence(autojump_clock: Clock) -> None:
    # On a bus without a metronome the session keeps the tempo that it is given here.
    async with open_session(MemoryBus(), tempo_bpm=2.0, lock_timeout=0.0) as bb:
        await bb.sleep_until(bb.current_beat() + 1)
        assert str(bb.remaining()) == "no limit"
        assert bb.remaining().beats == bb.remaining().seconds == math.inf
        with bb.move_on_after(12, soft_after=8) as scope:
            left = bb.remaining()
            assert (left.beats, left.seconds, left.paused) == (12, 360, False)
            assert (left.soft_beats, left.tempo_bpm) == (8, 2)
            assert str(left) == (
                "12 beats left, about 6 minutes at 2 BPM; finish within 8 beats, about 4 minutes"
            )
            set_tempo(bb, 0)
            left = bb.remaining()
            assert (left.beats, left.seconds, left.paused) == (12, math.inf, True)
            assert str(left) == (
                "12 beats left; the grid is paused, and no beats pass until it resumes; "
                "finish within 8 beats"
            )
            with trio.move_on_after(30):
                assert str(bb.remaining()) == (
                    "12 beats left; the grid is paused, and no beats pass until it resumes; "
                    "about 30 seconds left in any case; finish within 8 beats"
                )
                with bb.detached(), trio.move_on_after(1):
                    assert str(bb.remaining()) == "about 1 second left"
            set_tempo(bb, 120_000)
            await scope.wait_soft()
            assert bb.remaining().soft_beats == 0
            assert str(bb.remaining()) == (
                "4 beats left, about 2 seconds at 120 BPM; it is time to finish"
            )
            scope.cancel()
            assert str(bb.remaining()) == "no time left"
            with pytest.raises(trio.Cancelled):
                await trio.lowlevel.checkpoint()
            with scope.clean_up(beats=1):
                assert str(bb.remaining()) == "1 beat left, less than a second at 120 BPM"


@pytest.mark.parametrize(
    ("beats", "bpm", "sentence"),
    [
        (1, 60, "1 beat left, about 1 second at 60 BPM"),
        (0.04, 60, "less than 0.1 beats left, less than a second at 60 BPM"),
        (2.5, 2, "2.5 beats left, about 75 seconds at 2 BPM"),
        (100.4, 120.5, "100 beats left, about 50 seconds at 120.5 BPM"),
        (1440, 2, "1440 beats left, about 12 hours at 2 BPM"),
        (999_999.75, 60, "1000000 beats left, about 12 days at 60 BPM"),
        (2e7, 0.1, "20000000 beats left, about 138889 days at 0.1 BPM"),
    ],
)
async def test_sentences(beats: float, bpm: float, sentence: str, mock_clock: Clock) -> None:
    async with open_session(tempo_bpm=bpm) as bb:
        with bb.move_on_after(beats):
            assert str(bb.remaining()) == sentence


# Parts of a whole.


async def test_an_operation_inside_of_another_one_is_its_child(autojump_clock: Clock) -> None:
    async with open_session(agent_id="agent", tempo_bpm=60.0) as bb, bb.open_claims() as claims:
        async with bb.operation("a", id="root") as root:
            assert root.parent is None
            assert root.correlation_id == "agent/root"
            async with bb.operation("b", id="child; 1") as child:
                grandchild = bb.start_operation("c", id="grandchild")
                spawned = []

                async def spawn() -> None:
                    async with bb.operation("d", id="spawned") as operation:
                        spawned.append((operation.parent, operation.correlation_id))

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(spawn)
            sibling = bb.start_operation("e", id="sibling")
        alone = bb.start_operation("f", id="alone")
        assert (child.parent, child.correlation_id) == ("agent/root", "agent/root")
        assert (grandchild.parent, grandchild.correlation_id) == ("agent/child; 1", "agent/root")
        assert spawned == [("agent/child; 1", "agent/root")]
        assert (sibling.parent, alone.parent) == ("agent/root", None)
        heard: dict[str, StatusClaim] = {}
        while "alone" not in heard:
            claim = await anext(claims)
            heard[claim.task_id] = claim
        assert not heard["root"].parent
        assert not heard["root"].correlation_id
        assert (heard["child; 1"].parent, heard["child; 1"].correlation_id) == (
            "agent/root",
            "agent/root",
        )
        assert heard["grandchild"].parent == "agent/child; 1"
        assert heard["grandchild"].correlation_id == "agent/root"


async def test_an_operation_has_its_parent_across_processes(autojump_clock: Clock) -> None:
    async with open_pair(cluster_id="two") as (caller, service):
        async with caller.operation("plan", id="root"), caller.operation("ask", id="a/b; c"):
            with caller.extract({"traceparent": TRACE}):
                headers = injected(caller)
        assert headers == {
            "Backbeat-Operation": "two; caller; a/b%3B%20c; caller/root",
            "traceparent": TRACE,
        }
        with service.extract(headers):
            async with service.operation("answer", id="answer") as answer:
                assert answer.parent == "caller/a/b; c"
                assert answer.correlation_id == "caller/root"
                assert injected(service) == {
                    "Backbeat-Operation": "two; service; answer; caller/root",
                    "traceparent": TRACE,
                }
            # What the header does not say stays as it is.
            with service.extract({"traceparent": TRACE.replace("00f0", "11f1")}):
                assert injected(service) == {
                    "Backbeat-Operation": "two; caller; a/b%3B%20c; caller/root",
                    "traceparent": TRACE.replace("00f0", "11f1"),
                }
        assert injected(service) == {}


async def test_detached_work_has_neither_deadline_nor_parent(autojump_clock: Clock) -> None:
    async with open_session(tempo_bpm=60.0) as bb:
        headers = {"traceparent": TRACE}
        with bb.extract(headers):
            async with bb.operation("a", id="root"):
                with bb.move_on_after(2, soft_after=1) as outer, bb.detached() as scope:
                    assert scope.deadline == math.inf
                    assert injected(bb) == {}
                    assert str(bb.remaining()) == "no limit"
                    assert bb.start_operation("b").parent is None
                    outer.cancel()
                    await trio.sleep(5)
                    scope.relative_deadline = 3
                    assert injected(bb)["Backbeat-Deadline"].endswith("; 3.000")
                    await trio.sleep_forever()
                assert scope.cancelled_caught
                assert not outer.cancelled_caught
                assert bb.start_operation("b").parent == f"{bb.config.agent_id}/root"


async def test_an_operation_says_that_its_soft_edge_has_passed(
    autojump_clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "backbeat_trio")
    async with open_session(tempo_bpm=60.0) as bb, bb.open_claims() as claims:
        await bb.sleep_until(bb.current_beat() + 1)
        with bb.move_on_after(10, soft_after=2) as outer:
            async with bb.operation("a", id="outer", beats=9) as operation:
                async with bb.operation("b", id="own", soft_after=4) as own:
                    async with bb.operation("c", id="early"):
                        pass
                    detached = bb.start_operation("d", id="no block")
                    assert not operation.soft
                    await outer.wait_soft()
                    await trio.testing.wait_all_tasks_blocked()
                    assert operation.soft
                    assert own.soft
                    await trio.sleep(5)
                # One that begins after the edge says so at once.
                async with bb.operation("e", id="late") as late:
                    assert late.soft
        with bb.move_on_after(10, soft_after=9):
            async with bb.operation("f", id="shielded", beats=5, enforce=True, soft_after=1):
                await bb.sleep(1.5)
        assert not detached.soft
        assert bb.statistics().operations_soft == 4
        begin = bb.current_beat()
        heard: dict[str, list[StatusClaim]] = {}
        while "shielded" not in heard or heard["shielded"][-1].state != "done":
            claim = await anext(claims)
            heard.setdefault(claim.task_id, []).append(claim)
        softs = [claim.soft is True for claim in heard["outer"]]
        assert softs == sorted(softs)
        first = heard["outer"][softs.index(True)]
        assert first.beat_index == begin - 8 + 2 or first.state == "executing"
        assert softs[0] is False
        assert softs[-1] is True
        assert not any(claim.soft for claim in heard["no block"])
        assert not any(claim.soft for claim in heard["early"])
        assert all(claim.soft for claim in heard["late"][1:])
        assert heard["shielded"][-1].soft is True
    lines = [record for record in caplog.records if "soft edge passed" in record.message]
    assert [record.levelname for record in lines] == ["INFO"] * 4


async def test_a_soft_edge_of_an_operation_is_checked_before_it_starts(mock_clock: Clock) -> None:
    async with open_session() as bb:
        arguments: Any
        for arguments in ({"soft_after": 6, "enforce": True}, {"soft_after": -1}):
            with pytest.raises(ValueError, match="`soft_after`"):
                async with bb.operation("a", beats=5, **arguments):
                    pytest.fail("not reached")  # pragma: no cover
        assert bb.health().active_operations == 0
        async with bb.operation("a", beats=5, soft_after=6) as operation:
            assert not operation.soft
