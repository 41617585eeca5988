"""The examples that work inside a budget: the agent that plans by it, and retries; virtual time."""

from __future__ import annotations

from itertools import pairwise

import agent_loop
import pytest
import retries
import trio
import trio.testing

from backbeat_trio import BeatBudgetExceeded, Session

# The agent.

NOTES = ["what it costs: a long note", "who uses it: a short note"]
PLANS = [
    "Plan how to find out what it costs. 8 beats left, about 8 seconds at 60 BPM.",
    "Plan how to find out who uses it. 5.2 beats left, about 5 seconds at 60 BPM.",
    "Plan how to find out how it fails. 4 beats left, about 4 seconds at 60 BPM.",
]


async def run_agent(bb: Session, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Run the agent, check all that does not depend on the tempo, and return its prompts."""
    model = agent_loop.Model(bb)
    agent = agent_loop.Agent(bb, model)
    begin = bb.current_position()
    assert await agent.run() == "A report of 2 notes."
    # It was cut at the soft edge, and wrote for a quarter of a beat.
    assert bb.current_position() == begin + 8.25
    assert agent.notes == NOTES
    assert "winds down. 2 beats left" in capsys.readouterr().out
    return model.prompts


async def test_the_agent_plans_by_what_is_left_and_hands_in_what_it_has(
    backbeat_session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    start = trio.current_time()
    prompts = await run_agent(backbeat_session, capsys)
    assert trio.current_time() == start + 8.25
    assert prompts[::2][:3] == PLANS
    assert prompts[-1] == f"Write a report of {'; '.join(NOTES)}."


async def test_the_agent_does_the_same_if_the_grid_is_paused_meanwhile(
    backbeat_session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    bb = backbeat_session
    await bb.sleep_until(4)

    async def operate(task_status: trio.TaskStatus[float]) -> None:
        paused = await bb.pause(at_beat=10)
        task_status.started(trio.current_time())
        await bb.sleep_until(paused)
        await trio.sleep(1000)
        assert bb.remaining().paused
        await bb.resume()

    async with trio.open_nursery() as nursery:
        start = await nursery.start(operate)
        prompts = await run_agent(bb, capsys)
    assert prompts[::2][:3] == PLANS
    assert trio.current_time() > start + 1008


async def test_the_agent_has_enough_time_if_nothing_takes_too_long(
    backbeat_session: Session, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(agent_loop, "QUESTIONS", agent_loop.QUESTIONS[:2])
    agent = agent_loop.Agent(backbeat_session, agent_loop.Model(backbeat_session))
    assert await agent.run() == "A report of 2 notes."
    assert "winds down" not in capsys.readouterr().out


# Retries.


def gaps(service: retries.Service) -> list[float]:
    """Return how many beats passed between the attempts, without the attempts themselves."""
    return [after - before - 0.1 for before, after in pairwise(service.calls)]


def assert_backoff(waits: list[float]) -> None:
    for number, wait in enumerate(waits):
        assert 0.75 * 0.25 * 2**number - 1e-6 <= wait <= 1.25 * 0.25 * 2**number + 1e-6


async def test_retries_wait_in_beats(backbeat_session: Session) -> None:
    service = retries.Service(backbeat_session, failures=4)
    with backbeat_session.fail_after(20):
        result = await retries.retry(backbeat_session, service.call)
    assert result == "it answered at attempt 5"
    assert len(gaps(service)) == 4
    assert_backoff(gaps(service))


async def test_a_change_of_tempo_applies_to_a_wait(backbeat_session: Session) -> None:
    bb = backbeat_session
    service = retries.Service(bb, failures=5)
    await bb.sleep_until(5.5)
    await bb.set_tempo(600, at_beat=8)
    start = trio.current_time()
    # The waits last until beat 11.9 at least, so the change comes during one of them.
    with bb.fail_after(16):
        assert await retries.retry(bb, service.call) == "it answered at attempt 6"
    assert service.calls[0] < 8 < service.calls[-1]
    assert_backoff(gaps(service))
    assert trio.current_time() - start == pytest.approx(2.5 + (bb.current_position() - 8) / 10)


async def test_a_pause_applies_to_a_wait(backbeat_session: Session) -> None:
    bb = backbeat_session
    service = retries.Service(bb, failures=5)
    await bb.sleep_until(5.5)
    await bb.pause(at_beat=8)

    async def resume() -> None:
        await bb.sleep_until(8)
        await trio.sleep(1000)
        made.append(len(service.calls))
        await bb.resume()

    made: list[int] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(resume)
        await trio.testing.wait_all_tasks_blocked()
        with bb.fail_after(16):
            assert await retries.retry(bb, service.call) == "it answered at attempt 6"
    # No attempt was made during the pause.
    assert made == [sum(position < 8 for position in service.calls)]
    assert_backoff(gaps(service))


async def test_a_wait_is_trimmed_so_that_there_is_time_for_the_attempt(
    backbeat_session: Session,
) -> None:
    service = retries.Service(backbeat_session, failures=9)
    with pytest.raises(retries.Unavailable, match="it has failed 4 times"):
        with backbeat_session.fail_after(2):
            await retries.retry(backbeat_session, service.call)
    # The last attempt has what it should have, and the error comes before the deadline.
    assert service.calls[-1] == pytest.approx(2 - retries.TRY)
    assert backbeat_session.current_position() == pytest.approx(1.6)


async def test_the_budget_ends_an_attempt_that_hangs(backbeat_session: Session) -> None:
    with pytest.raises(BeatBudgetExceeded):
        with backbeat_session.fail_after(2):
            await retries.retry(backbeat_session, trio.sleep_forever)
    assert backbeat_session.current_position() == 2


async def test_retries_end_after_some_attempts_and_for_other_errors(
    backbeat_session: Session,
) -> None:
    service = retries.Service(backbeat_session, failures=100)
    with pytest.raises(retries.Unavailable, match=f"it has failed {retries.ATTEMPTS} times"):
        await retries.retry(backbeat_session, service.call)

    async def wrong() -> None:
        calls.append(1)
        raise ValueError("wrong")

    calls: list[int] = []
    with pytest.raises(ValueError, match="wrong"):
        await retries.retry(backbeat_session, wrong)
    assert calls == [1]
