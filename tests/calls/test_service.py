"""Services: handlers side by side, within their callers' budgets, and the end of a service."""

from __future__ import annotations

import contextvars
import math
import subprocess
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, NamedTuple

import clocks
import pytest
import trio
import trio.testing
from helpers import CLEAN, Lines, guarded, until

from backbeat_trio import (
    BackbeatError,
    BeatBudgetExceeded,
    MemoryTransport,
    NoResponders,
    PermissionDenied,
    Request,
    Response,
    Service,
    ServiceError,
    Session,
    SessionClosed,
    current_session,
)
from backbeat_trio.testing import CLUSTER_ID, NatsServer, open_session

Clock = trio.testing.MockClock
Handler = Callable[[Request], Awaitable[bytes]]

SUBJECT = "pages.fetch"


class Pair(NamedTuple):
    caller: Session
    server: Session
    service: Service
    log: Lines


@asynccontextmanager
async def open_pair(
    handler: Handler | None = None, *, url: str = "memory://service", **options: Any
) -> AsyncGenerator[Pair, None]:
    """Open a session that calls, and one that serves a handler on `SUBJECT`."""
    log = Lines()
    async with (
        open_session(nats_url=url, agent_id="caller", tempo_bpm=60.0) as caller,
        # The last one is that of `current_session`.
        open_session(nats_url=url, agent_id="server", tempo_bpm=60.0, logger=log) as server,
        server.open_service("pages", version="1.2.0") as service,
    ):
        await caller.sleep_until(caller.current_beat() + 1)
        async with trio.open_nursery() as nursery:
            if handler is not None:
                await nursery.start(partial_serve(service, handler, options))
            yield Pair(caller, server, service, log)
            nursery.cancel_scope.cancel()


def partial_serve(
    service: Service, handler: Handler, options: dict[str, Any]
) -> Callable[..., Awaitable[None]]:
    async def serve(*, task_status: trio.TaskStatus[None]) -> None:
        await service.serve(SUBJECT, handler, task_status=task_status, **options)

    return serve


async def echo(request: Request) -> bytes:
    return request.data


async def give_up(bb: Session, data: bytes = b"") -> None:
    """Send a request without a deadline, and stop waiting for its answer."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bb.request, SUBJECT, data)
        await trio.sleep(1)
        nursery.cancel_scope.cancel("the user went away")


def code_of(info: pytest.ExceptionInfo[ServiceError]) -> int:
    return info.value.code


# Answers.


async def test_handler_gets_the_request_and_its_result_is_the_answer(
    autojump_clock: Clock,
) -> None:
    seen: list[Request] = []

    async def handle(request: Request) -> bytes:
        seen.append(request)
        assert current_session().config.agent_id == "server"
        return request.data.upper()

    async with open_pair(handle) as pair:
        answer = await pair.caller.request(SUBJECT, b"page", headers={"X": "1"})
        assert answer == Response(b"PAGE", {})
        await pair.caller.request(SUBJECT)
        assert seen == [Request(b"page", {"X": "1"}, SUBJECT), Request(b"", {}, SUBJECT)]
        assert pair.server.statistics().calls == 2
        assert pair.server.statistics().live_calls == 0


async def test_handlers_run_side_by_side_up_to_the_limit(autojump_clock: Clock) -> None:
    running = most = 0

    async def handle(request: Request) -> bytes:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await trio.sleep(1)
        running -= 1
        return request.data

    async with open_pair(handle, concurrency=3) as pair:
        begin, answers = trio.current_time(), []

        async def ask(number: int) -> None:
            answers.append((await pair.caller.request(SUBJECT, b"%d" % number)).data)

        async with trio.open_nursery() as nursery:
            for number in range(7):
                nursery.start_soon(ask, number)
                await trio.testing.wait_all_tasks_blocked()
        assert trio.current_time() - begin == 3
        assert most == 3
        # Who came first had its turn first.
        groups = [answers[:3], answers[3:6], answers[6:]]
        assert [sorted(group) for group in groups] == [
            [b"0", b"1", b"2"],
            [b"3", b"4", b"5"],
            [b"6"],
        ]


async def test_each_call_has_a_context_of_its_own(autojump_clock: Clock) -> None:
    var: contextvars.ContextVar[bytes] = contextvars.ContextVar("var")

    async def handle(request: Request) -> bytes:
        before = var.get(b"none")
        var.set(request.data)
        await trio.lowlevel.checkpoint()
        assert var.get() == request.data
        return before

    async with open_pair(handle, concurrency=2) as pair:
        answers: list[bytes] = []

        async def ask(data: bytes) -> None:
            answers.append((await pair.caller.request(SUBJECT, data)).data)

        for _ in range(2):
            async with trio.open_nursery() as nursery:
                for number in range(6):
                    nursery.start_soon(ask, b"%d" % number)
        assert answers == [b"none"] * 12


async def test_message_that_expects_no_answer_is_handled(autojump_clock: Clock) -> None:
    seen: list[bytes] = []

    async def handle(request: Request) -> bytes:
        seen.append(request.data)
        raise ServiceError(404, "nothing to say it to")

    async with open_pair(handle) as pair:
        transport = pair.caller._runtime.transport
        assert transport is not None
        await transport.publish(SUBJECT, b"one")
        await trio.sleep(1)
        assert seen == [b"one"]
        assert pair.server.statistics().calls_unanswered == 0
        assert pair.server.statistics().calls_failed == 1


# Errors.


async def test_error_that_a_handler_raises_is_the_answer(autojump_clock: Clock) -> None:
    async def handle(request: Request) -> bytes:
        raise ServiceError(404, "no such page:\r\n  line two")

    async with open_pair(handle) as pair:
        with pytest.raises(ServiceError) as info:
            await pair.caller.request(SUBJECT)
        assert (info.value.code, info.value.description) == (404, "no such page: line two")
        assert str(info.value) == "no such page: line two (404)"
        assert isinstance(info.value, BackbeatError)
        assert not pair.log.lines_with("crashed")


async def test_crash_is_an_error_reply_and_a_log_line_and_ends_nothing(
    autojump_clock: Clock,
) -> None:
    async def handle(request: Request) -> bytes:
        if request.data == b"group":
            raise ExceptionGroup("several", [ValueError("one"), KeyError("two")])
        if request.data == b"not made":
            raise ServiceError.__new__(ServiceError, 400, "without its attributes")
        if request.data:
            raise ValueError("the secret reason")
        return b"fine"

    async with open_pair(handle) as pair:
        for data in (b"x", b"group", b"not made"):
            with pytest.raises(ServiceError) as info:
                await pair.caller.request(SUBJECT, data)
            assert (info.value.code, info.value.description) == (500, "the handler crashed")
        (first, second, third) = pair.log.lines_with("crashed")
        assert "the secret reason" in first
        assert "in handle" in first
        assert "KeyError" in second
        assert "AttributeError" in third
        assert (await pair.caller.request(SUBJECT)).data == b"fine"
        assert pair.server.statistics().calls_failed == 3


async def test_error_in_a_group_of_one_is_the_answer(autojump_clock: Clock) -> None:
    async def handle(request: Request) -> bytes:
        async def fail() -> None:
            raise ServiceError(404, "no such page")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail)
        return b""

    async with open_pair(handle) as pair:
        with pytest.raises(ServiceError, match="no such page"):
            await pair.caller.request(SUBJECT)


@pytest.mark.parametrize("answer", [None, "text", 3, [b"x"]])
async def test_handler_that_returns_no_bytes(autojump_clock: Clock, answer: Any) -> None:
    async def handle(request: Request) -> Any:
        return answer

    async with open_pair(handle) as pair:
        with pytest.raises(ServiceError, match="no bytes") as info:
            await pair.caller.request(SUBJECT)
        assert code_of(info) == 500
        assert len(pair.log.lines_with("must return bytes")) == 1
        assert pair.server.statistics().calls_failed == 1


async def test_handler_may_return_other_kinds_of_bytes(autojump_clock: Clock) -> None:
    async def handle(request: Request) -> Any:
        return bytearray(b"a") if request.data else memoryview(b"b")

    async with open_pair(handle) as pair:
        assert (await pair.caller.request(SUBJECT, b"x")).data == b"a"
        assert (await pair.caller.request(SUBJECT)).data == b"b"


async def test_answer_that_is_larger_than_a_message(autojump_clock: Clock) -> None:
    async def handle(request: Request) -> bytes:
        return b"x" * int(request.data)

    async with open_pair(handle) as pair:
        transport = pair.server._runtime.transport
        assert transport is not None
        most = transport.max_payload
        assert len((await pair.caller.request(SUBJECT, b"%d" % most)).data) == most
        with pytest.raises(ServiceError, match=f"{most + 1} bytes") as info:
            await pair.caller.request(SUBJECT, b"%d" % (most + 1))
        assert code_of(info) == 413
        assert pair.server.statistics().calls_failed == 1


@pytest.mark.parametrize("grouped", [False, True])
async def test_exception_that_is_none_of_exceptions_ends_the_service(
    grouped: bool, autojump_clock: Clock
) -> None:
    async def handle(request: Request) -> bytes:
        if grouped:
            raise BaseExceptionGroup("of a nursery", [KeyboardInterrupt()])
        raise KeyboardInterrupt

    answers: list[int] = []

    async def ask(caller: Session) -> None:
        try:
            await caller.request(SUBJECT)
        except ServiceError as error:
            answers.append(error.code)

    async with (
        open_session(nats_url="memory://ki", agent_id="caller") as caller,
        trio.open_nursery() as asking,
        open_session(nats_url="memory://ki", agent_id="server") as server,
    ):
        with pytest.raises(KeyboardInterrupt):
            async with (
                server.open_service("pages", version="1.0.0") as service,
                trio.open_nursery() as nursery,
            ):
                await nursery.start(service.serve, SUBJECT, handle)
                asking.start_soon(ask, caller)
        await trio.sleep(1)
    assert answers == [500]


# Budgets.


async def test_handler_ends_at_its_callers_deadline(autojump_clock: Clock) -> None:
    ended: list[float] = []

    async def handle(request: Request) -> bytes:
        bb = current_session()
        try:
            await trio.sleep_forever()
        finally:
            ended.append(bb.current_position())
        raise AssertionError

    async with open_pair(handle) as pair:
        begin = pair.caller.current_position()
        with pair.caller.move_on_after(2.5) as scope:
            await pair.caller.request(SUBJECT)
        assert scope.cancelled_caught
        await trio.sleep(1)
        assert ended == [begin + 2.5]
        counts = pair.server.statistics()
        assert counts.calls_expired + counts.calls_cancelled == 1
        # A caller that is gone does not say that it waits no longer.
        headers: dict[str, str] = {}
        begin = pair.caller.current_position()
        with pair.caller.move_on_after(1.25):
            pair.caller.inject(headers)
        assert (await raw_request(pair.caller, headers))["Nats-Service-Error-Code"] == "504"
        assert ended[1:] == [begin + 1.25]


async def test_request_whose_budget_is_spent_is_refused_before_any_work(
    autojump_clock: Clock,
) -> None:
    async def handle(request: Request) -> bytes:
        raise AssertionError

    async with open_pair(handle) as pair:
        with pair.caller.move_on_after(1):
            headers: dict[str, str] = {}
            pair.caller.inject(headers)
        await trio.sleep(1)
        answer = await raw_request(pair.caller, headers)
        assert answer["Nats-Service-Error-Code"] == "408"
        assert "spent" in answer["Nats-Service-Error"]
        assert pair.server.statistics().calls_refused == 1
        assert pair.server.statistics().headers_expired == 1


async def raw_request(bb: Session, headers: dict[str, str], data: bytes = b"") -> Any:
    """Send a request with headers as they are, and return those of the answer."""
    transport = bb._runtime.transport
    assert transport is not None
    reply = await transport.request(SUBJECT, data, timeout=60, headers=headers)
    return reply.headers or {}


@pytest.mark.parametrize(("jump", "code", "min_beats"), [(5, "504", 0), (1, "", 1.5)])
async def test_budget_that_is_too_small_once_the_task_has_its_turn(
    autojump_clock: Clock, jump: float, code: str, min_beats: float
) -> None:
    begun: list[bytes] = []

    async def handle(request: Request) -> bytes:
        begun.append(request.data)
        # No other task runs meanwhile, and both have arrived.
        autojump_clock.jump(jump)
        return b""

    async with open_pair(handle, min_beats=min_beats) as pair:
        headers: dict[str, str] = {}
        with pair.caller.move_on_after(2):
            pair.caller.inject(headers)
        codes: list[str] = []

        async def ask() -> None:
            answer = await raw_request(pair.caller, headers)
            codes.append(answer.get("Nats-Service-Error-Code", ""))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            nursery.start_soon(ask)
        assert sorted(codes) == sorted(["408", code])
        assert len(begun) == 1
        counts = pair.server.statistics()
        assert (counts.calls_refused, counts.calls_expired) == (1, int(code == "504"))
        assert counts.headers_expired == int(code == "504")
        assert counts.live_calls == 0


async def test_request_with_less_than_the_handler_needs_is_refused(
    autojump_clock: Clock,
) -> None:
    async with open_pair(echo, min_beats=2.5) as pair:
        with pytest.raises(ServiceError, match=r"2\.000 beats are left, and at least 2\.5") as info:
            await pair.caller.request(SUBJECT, beats=2)
        assert code_of(info) == 408
        assert (await pair.caller.request(SUBJECT, b"x", beats=3)).data == b"x"
        # No deadline is enough.
        assert (await pair.caller.request(SUBJECT, b"x")).data == b"x"


async def test_request_whose_budget_runs_out_while_it_waits_never_starts(
    autojump_clock: Clock,
) -> None:
    started: list[bytes] = []

    async def handle(request: Request) -> bytes:
        started.append(request.data)
        await trio.sleep(3)
        return b""

    async with open_pair(handle, concurrency=1) as pair, trio.open_nursery() as nursery:
        nursery.start_soon(pair.caller.request, SUBJECT, b"first")
        await trio.testing.wait_all_tasks_blocked()
        with pair.caller.move_on_after(1):
            headers: dict[str, str] = {}
            pair.caller.inject(headers)
        # Another grid's deadline counts from the arrival, and not from the turn.
        foreign = {"Backbeat-Deadline": "0123456789abcdef; 1000000.000; 2.000"}
        answers: list[str] = []

        async def ask(headers: dict[str, str], data: bytes) -> None:
            answer = await raw_request(pair.caller, headers, data)
            answers.append(answer["Nats-Service-Error-Code"])

        nursery.start_soon(ask, headers, b"second")
        nursery.start_soon(ask, foreign, b"third")
        await trio.sleep(4)
        assert answers == ["408", "408"]
        assert started == [b"first"]


async def test_budget_of_another_grid_that_waited_has_what_is_left(
    autojump_clock: Clock,
) -> None:
    left: list[float] = []

    async def handle(request: Request) -> bytes:
        left.append(current_session().remaining().beats)
        await trio.sleep(3)
        return b""

    async with open_pair(handle, concurrency=1) as pair, trio.open_nursery() as nursery:
        nursery.start_soon(pair.caller.request, SUBJECT)
        await trio.testing.wait_all_tasks_blocked()
        foreign = {"Backbeat-Deadline": "0123456789abcdef; 1000000.000; 20.000"}
        await raw_request(pair.caller, foreign)
        assert left == [math.inf, 17.0]


async def test_soft_edge_of_another_grid_that_waited_has_what_is_left(
    autojump_clock: Clock,
) -> None:
    left: list[tuple[float, float]] = []

    async def handle(request: Request) -> bytes:
        remaining = current_session().remaining()
        left.append((remaining.beats, remaining.soft_beats))
        await trio.sleep(3)
        return b""

    foreign = "0123456789abcdef; 1000000.000; "
    async with open_pair(handle, concurrency=1) as pair:
        for headers in (
            {"Backbeat-Deadline": foreign + "20", "Backbeat-Soft-Deadline": foreign + "10"},
            {"Backbeat-Soft-Deadline": foreign + "10"},
            {"Backbeat-Soft-Deadline": foreign + "2"},
        ):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pair.caller.request, SUBJECT)
                await trio.testing.wait_all_tasks_blocked()
                await raw_request(pair.caller, headers)
    free = math.inf, math.inf
    assert left == [free, (17, 7), free, (math.inf, 7), free, (math.inf, 0)]


def move(bb: Session, position: float, incarnation: str) -> None:
    """Move a session to another grid, as its follower does when it locks."""
    listener = bb._runtime.listener
    assert listener is not None
    listener.follower.incarnation = incarnation
    clocks.move(bb._clock, position)


@pytest.mark.parametrize(("way", "expected"), [("away", 9.5), ("back", 7.0)])
async def test_request_that_waits_while_the_session_moves_to_another_grid(
    way: str, expected: float, autojump_clock: Clock
) -> None:
    left: list[float] = []
    moved = trio.Event()

    async def handle(request: Request) -> bytes:
        left.append(current_session().remaining().beats)
        await moved.wait()
        return b""

    async with open_pair(handle, concurrency=1) as pair, trio.open_nursery() as nursery:
        nursery.start_soon(pair.caller.request, SUBJECT)
        await trio.testing.wait_all_tasks_blocked()
        begin, home = pair.server.current_position(), pair.server._calls.incarnation
        if way == "back":
            # The session is not locked yet when the request arrives.
            move(pair.server, 0, "")
        deadline = f"{home}; {begin + 10}; 10"
        nursery.start_soon(raw_request, pair.caller, {"Backbeat-Deadline": deadline})
        await trio.sleep(0.5)
        # It is in the queue. What was left counts, or the beat again.
        if way == "back":
            move(pair.server, begin + 3, home)
        else:
            move(pair.server, 1000, "another")
        moved.set()
    assert left == [math.inf, expected]


async def test_too_many_waiting_requests_are_refused(
    autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backbeat_trio._calls.endpoint.WAITING", 2)

    async def handle(request: Request) -> bytes:
        await trio.sleep(1)
        return b""

    codes: list[int] = []
    async with open_pair(handle, concurrency=1) as pair:

        async def ask() -> None:
            try:
                await pair.caller.request(SUBJECT)
                codes.append(0)
            except ServiceError as error:
                codes.append(error.code)

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(ask)
    assert sorted(codes) == [0, 0, 0, 503, 503]


async def test_a_budget_of_the_handlers_own_that_runs_out(autojump_clock: Clock) -> None:
    async def handle(request: Request) -> bytes:
        with current_session().fail_after(1):
            await trio.sleep_forever()
        raise AssertionError

    async with open_pair(handle) as pair:
        with pytest.raises(ServiceError, match="inside of the handler") as info:
            await pair.caller.request(SUBJECT, beats=10)
        assert code_of(info) == 504


# Cancellation.


async def test_handler_is_cancelled_when_its_caller_stops_waiting(autojump_clock: Clock) -> None:
    reasons: list[str | None] = []
    ended: list[float] = []

    async def handle(request: Request) -> bytes:
        try:
            await trio.sleep_forever()
        except trio.Cancelled as error:
            reasons.append(error.reason)
            ended.append(trio.current_time())
            raise
        raise AssertionError

    async with open_pair(handle) as pair:
        begin = trio.current_time()
        for _ in range(2):
            await give_up(pair.caller)
        await trio.testing.wait_all_tasks_blocked()
        assert ended == [begin + 1, begin + 2]
        assert reasons == ["the user went away"] * 2
        assert pair.server.statistics().calls_cancelled == 2
        assert pair.caller.statistics().requests_abandoned == 2
        assert pair.server.statistics().live_calls == 0


async def test_cancelled_call_answers_with_the_reason(autojump_clock: Clock) -> None:
    async def handle(request: Request) -> bytes:
        await trio.sleep_forever()
        raise AssertionError

    async with open_pair(handle) as pair:
        transport = pair.caller._runtime.transport
        assert transport is not None
        async with transport.open_request(SUBJECT, b"") as answers:
            await trio.testing.wait_all_tasks_blocked()
            await transport.publish(
                f"backbeat.cancel.{SUBJECT}",
                b"",
                # Names of headers count in any case of letters.
                headers={"backbeat-REQUEST": answers.reply, "BACKBEAT-reason": "no more"},
            )
            headers: Any = (await anext(aiter(answers))).headers
        assert headers["Nats-Service-Error-Code"] == "499"
        assert headers["Nats-Service-Error"] == "cancelled by the caller: no more"


async def test_request_that_waits_is_cancelled_before_it_starts(autojump_clock: Clock) -> None:
    started: list[bytes] = []

    async def handle(request: Request) -> bytes:
        started.append(request.data)
        await trio.sleep(5)
        return b""

    async with open_pair(handle, concurrency=1) as pair, trio.open_nursery() as nursery:
        nursery.start_soon(pair.caller.request, SUBJECT, b"first")
        await trio.testing.wait_all_tasks_blocked()
        await give_up(pair.caller, b"second")
        await trio.sleep(6)
        assert started == [b"first"]
        assert pair.server.statistics().calls_cancelled == 1
        nursery.cancel_scope.cancel()


async def test_request_and_its_cancellation_that_arrive_together(autojump_clock: Clock) -> None:
    async def handle(request: Request) -> bytes:
        await trio.sleep_forever()
        raise AssertionError

    async with open_pair(handle) as pair:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                for _ in range(10):
                    nursery.start_soon(pair.caller.request, SUBJECT)
                await trio.lowlevel.checkpoint()
                scope.cancel()
        await trio.sleep(1)
        counts = pair.server.statistics()
        assert counts.calls == counts.calls_cancelled
        assert counts.live_calls == 0
        # The tasks that were started for them serve others as before.
        with trio.move_on_after(1):
            await pair.caller.request(SUBJECT)
        await trio.sleep(1)
        assert pair.server.statistics().live_calls == 0


@pytest.mark.parametrize(
    "headers", [{}, {"Backbeat-Request": ""}, {"Backbeat-Request": "_INBOX.x"}, None]
)
async def test_cancellations_that_name_no_call_are_passed_over(
    autojump_clock: Clock, headers: dict[str, str] | None
) -> None:
    async def handle(request: Request) -> bytes:
        await trio.sleep(2)
        return request.data

    async with open_pair(handle) as pair, trio.open_nursery() as nursery:
        transport = pair.caller._runtime.transport
        assert transport is not None
        # One that expects no answer is nobody's.
        await transport.publish(SUBJECT, b"alone")

        async def disturb() -> None:
            await trio.sleep(1)
            await transport.publish(f"backbeat.cancel.{SUBJECT}", b"", headers=headers)

        nursery.start_soon(disturb)
        assert (await pair.caller.request(SUBJECT, b"x")).data == b"x"
        assert pair.server.statistics().calls_cancelled == 0


async def test_handler_that_swallows_its_cancellation(autojump_clock: Clock) -> None:
    async def handle(request: Request) -> bytes:
        with suppress(trio.Cancelled):
            await trio.sleep_forever()
        return b"all the same"

    async with open_pair(handle) as pair:
        codes: list[str] = []

        async def ask(headers: dict[str, str]) -> None:
            codes.append((await raw_request(pair.caller, headers))["Nats-Service-Error-Code"])

        with pair.caller.move_on_after(1):
            headers: dict[str, str] = {}
            pair.caller.inject(headers)
        await ask(headers)
        assert codes == ["504"]
        await give_up(pair.caller)
        await trio.sleep(1)
        counts = pair.server.statistics()
        assert counts.calls_stubborn == 2
        assert (counts.calls_expired, counts.calls_cancelled) == (1, 1)
        assert len(pair.log.lines_with("although it was cancelled")) == 2


async def test_handler_that_is_shielded_beyond_its_deadline_has_expired(
    autojump_clock: Clock,
) -> None:
    async def handle(request: Request) -> bytes:
        with trio.CancelScope(shield=True):
            await trio.sleep(3)
        await trio.sleep_forever()
        raise AssertionError

    async with open_pair(handle) as pair:
        with pair.caller.move_on_after(1):
            await pair.caller.request(SUBJECT)
        # The caller has said that it waits no longer, after the handler's deadline.
        assert pair.caller.statistics().requests_abandoned == 1
        await trio.sleep(5)
        counts = pair.server.statistics()
        assert (counts.calls_expired, counts.calls_cancelled, counts.live_calls) == (1, 0, 0)


async def test_handler_that_blocks_the_loop(autojump_clock: Clock) -> None:
    async def handle(request: Request) -> bytes:
        # Time passes, and no other task runs.
        autojump_clock.jump(float(request.data))
        return request.data

    async with open_pair(handle) as pair, trio.open_nursery() as nursery:
        answers: list[bytes] = []

        async def ask(data: bytes) -> None:
            answers.append((await pair.caller.request(SUBJECT, data)).data)

        nursery.start_soon(ask, b"0.5")
        with pytest.raises(BeatBudgetExceeded):
            await pair.caller.request(SUBJECT, b"7", beats=2)
        # The answer would have been too late.
        await until(lambda: pair.server.statistics().calls_expired == 1)
        nursery.start_soon(ask, b"0")
        await until(lambda: sorted(answers) == [b"0", b"0.5"])
        counts = pair.server.statistics()
        assert (counts.live_calls, counts.calls_failed, counts.calls_unanswered) == (0, 0, 0)


@pytest.mark.parametrize(
    ("headers", "left", "garbled", "absurd"),
    [
        ({"Backbeat-Deadline": "{here}; nan; 4"}, None, 1, 0),
        ({"Backbeat-Deadline": "{here}; 12; -4"}, None, 1, 0),
        ({"Backbeat-Deadline": "{here}; 1e300; 4"}, None, 0, 1),
        ({"Backbeat-Deadline": "elsewhere; 12; 1e300"}, None, 0, 1),
        ({"Backbeat-Deadline": "a; 1; 9", "backbeat-deadline": "a; 1; 8"}, None, 1, 0),
        ({"BACKBEAT-DEADLINE": "elsewhere; 12; 4"}, 4, 0, 0),
        ({"backbeat-deadline": "elsewhere; 999999; 0.5"}, 0.5, 0, 0),
    ],
)
async def test_what_a_handler_has_of_headers_that_are_not_ours(
    autojump_clock: Clock, headers: dict[str, str], left: float | None, garbled: int, absurd: int
) -> None:
    found: list[float] = []

    async def handle(request: Request) -> bytes:
        found.append(current_session().remaining().beats)
        return b"ok"

    async with open_pair(handle) as pair:
        here = pair.server._calls.incarnation
        sent = {name: value.format(here=here) for name, value in headers.items()}
        assert await raw_request(pair.caller, sent) == {}
        assert found == [math.inf if left is None else pytest.approx(left)]
        counts = pair.server.statistics()
        assert (counts.headers_garbled, counts.headers_absurd) == (garbled, absurd)


@pytest.mark.parametrize("unit", ["beats", "seconds", "none"])
async def test_handler_that_leaves_a_scope_open(autojump_clock: Clock, unit: str) -> None:
    async def handle(request: Request) -> bytes:
        if request.data == b"leave":
            # As an async generator does that is not iterated to its end.
            if unit == "beats":
                current_session().move_on_after(2).__enter__()
            else:
                trio.move_on_after(2 if unit == "seconds" else math.inf).__enter__()
        else:
            await trio.sleep(5)
        return request.data

    async with open_pair(handle) as pair:
        for data in (b"leave", b"1", b"leave", b"2"):
            # The scope of one handler bounds no other one.
            assert (await pair.caller.request(SUBJECT, data)).data == data
    # The service has ended without an error, and the log says what is wrong.
    assert pair.log.lines_with("Cancel scope stack corrupted")


async def test_exception_in_answer_to_a_cancellation(autojump_clock: Clock) -> None:
    async def handle(request: Request) -> bytes:
        async def fail() -> None:
            try:
                await trio.sleep_forever()
            finally:
                raise ValueError("cannot clean up")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail)
            nursery.start_soon(trio.sleep_forever)
        raise AssertionError

    async with open_pair(handle) as pair:
        with pair.caller.move_on_after(1):
            await pair.caller.request(SUBJECT)
        await give_up(pair.caller)
        await trio.sleep(1)
        assert len(pair.log.lines_with("cannot clean up")) == 2
        assert pair.server.statistics().live_calls == 0
        assert pair.server.statistics().calls_failed == 2


# Endpoints.


async def test_service_with_several_endpoints(autojump_clock: Clock) -> None:
    async def shout(request: Request) -> bytes:
        return request.data.upper()

    async def where(request: Request) -> bytes:
        return request.subject.encode()

    async with open_pair() as pair, trio.open_nursery() as nursery:
        await nursery.start(pair.service.serve, "a.echo", echo)
        await nursery.start(pair.service.serve, "a.shout", shout)
        await nursery.start(pair.service.serve, "b.*.>", where)
        assert (await pair.caller.request("a.echo", b"x")).data == b"x"
        assert (await pair.caller.request("a.shout", b"x")).data == b"X"
        assert (await pair.caller.request("b.c.d.e", b"x")).data == b"b.c.d.e"
        with trio.move_on_after(1):
            await pair.caller.request("b.c.d.e", b"x")
        nursery.cancel_scope.cancel()


async def test_instances_share_the_requests_of_a_queue_group(autojump_clock: Clock) -> None:
    heard = [0, 0, 0]

    def counting(index: int) -> Handler:
        async def handle(request: Request) -> bytes:
            heard[index] += 1
            return b""

        return handle

    async with (
        open_pair() as pair,
        pair.server.open_service("pages", version="1.0.0") as other,
        trio.open_nursery() as nursery,
    ):
        await nursery.start(pair.service.serve, SUBJECT, counting(0))
        await nursery.start(other.serve, SUBJECT, counting(1))

        async def serve_all(*, task_status: trio.TaskStatus[None]) -> None:
            await other.serve(SUBJECT, counting(2), queue="", task_status=task_status)

        await nursery.start(serve_all)
        for _ in range(20):
            await pair.caller.request(SUBJECT)
        assert heard[0] + heard[1] == 20
        assert all(heard)
        assert heard[2] == 20
        nursery.cancel_scope.cancel()


# The end of a service.


async def test_leaving_lets_handlers_finish_and_refuses_new_requests(
    autojump_clock: Clock,
) -> None:
    async def handle(request: Request) -> bytes:
        await trio.sleep(1.5)
        return b"done"

    answers: list[object] = []

    async def ask(bb: Session) -> None:
        try:
            answers.append((await bb.request(SUBJECT)).data)
        except (ServiceError, NoResponders) as error:
            answers.append(error)

    async with (
        open_session(nats_url="memory://leaving", agent_id="caller") as caller,
        trio.open_nursery() as asking,
    ):
        async with open_session(nats_url="memory://leaving", agent_id="server") as server:
            async with (
                server.open_service("pages", version="1.0.0") as service,
                trio.open_nursery() as nursery,
            ):
                await nursery.start(service.serve, SUBJECT, handle)
                asking.start_soon(ask, caller)
                await trio.sleep(1)
                nursery.cancel_scope.cancel()
                asking.start_soon(ask, caller)
            assert answers[-1] == b"done"
        assert server.statistics().live_calls == 0
    assert len(answers) == 2
    assert isinstance(answers[0], (ServiceError, NoResponders))


async def test_handlers_are_cancelled_at_the_end_of_the_grace_period(
    autojump_clock: Clock,
) -> None:
    reasons: list[str | None] = []

    async def handle(request: Request) -> bytes:
        try:
            await trio.sleep_forever()
        except trio.Cancelled as error:
            reasons.append(error.reason)
            raise
        raise AssertionError

    codes: list[int] = []

    async def ask(bb: Session, **options: Any) -> None:
        try:
            await bb.request(SUBJECT, **options)
        except ServiceError as error:
            codes.append(error.code)

    async with (
        open_session(nats_url="memory://grace", agent_id="caller") as caller,
        trio.open_nursery() as asking,
        open_session(nats_url="memory://grace", agent_id="server", grace_period=3.0) as server,
    ):
        async with server.open_service("pages", version="1.0.0") as service:
            async with trio.open_nursery() as nursery:

                async def serve_one(*, task_status: trio.TaskStatus[None]) -> None:
                    await service.serve(SUBJECT, handle, concurrency=2, task_status=task_status)

                await nursery.start(serve_one)
                asking.start_soon(ask, caller)
                asking.start_soon(lambda: ask(caller, beats=1000))
                await trio.sleep(1)
                # This one waits, and is refused at once.
                asking.start_soon(ask, caller)
                await trio.sleep(1)
                begin = trio.current_time()
                nursery.cancel_scope.cancel()
                await trio.sleep(0)
            assert trio.current_time() == begin + 3
    assert codes == [503, 503, 503]
    assert reasons == ["the service is closing"] * 2


async def test_leaving_the_service_ends_endpoints_that_others_run(autojump_clock: Clock) -> None:
    async with (
        open_session(nats_url="memory://outer", agent_id="server") as server,
        trio.open_nursery() as nursery,
    ):
        async with server.open_service("pages", version="1.0.0") as service:
            await nursery.start(service.serve, SUBJECT, echo)
            assert (await server.request(SUBJECT, b"x")).data == b"x"
        # The nursery is not cancelled, and ends as no task is left.
        with pytest.raises(SessionClosed):
            await service.serve(SUBJECT, echo)
        with pytest.raises(NoResponders):
            await server.request(SUBJECT)


@pytest.mark.parametrize(
    ("seconds", "outcome"), [(0.5, SessionClosed), (1.5, SessionClosed), (9, None)]
)
async def test_endpoint_that_is_starting_while_the_service_is_left(
    seconds: float,
    outcome: type[Exception] | None,
    autojump_clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def answer_slowly(_: MemoryTransport) -> None:
        await trio.sleep(1)

    outcomes: list[type[Exception] | None] = []

    async def serve(service: Service) -> None:
        try:
            await service.serve(SUBJECT, echo)
        except Exception as error:
            outcomes.append(type(error))
        else:
            outcomes.append(None)

    async with open_pair() as pair, trio.open_nursery() as nursery:
        # The server confirms each of the endpoint's two subscriptions after a second.
        monkeypatch.setattr(MemoryTransport, "flush", answer_slowly)
        async with pair.server.open_service("pages", version="1.0.0") as service:
            nursery.start_soon(serve, service)
            await trio.sleep(seconds)
    assert outcomes == [outcome]


async def test_exception_of_the_block_leaves_as_itself(autojump_clock: Clock) -> None:
    async with open_session() as bb:
        with pytest.raises(ValueError, match="mine"):
            async with bb.open_service("pages", version="1.0.0"):
                raise ValueError("mine")
        with trio.move_on_after(1) as scope:
            async with bb.open_service("pages", version="1.0.0") as service:
                await service.serve(SUBJECT, echo)
        assert scope.cancelled_caught


async def test_a_handler_outlives_a_cancellation_from_outside_to_finish(
    autojump_clock: Clock,
) -> None:
    done: list[float] = []

    async def handle(request: Request) -> bytes:
        await trio.sleep(1)
        done.append(trio.current_time())
        return b"done"

    answers: list[bytes] = []

    async def ask(bb: Session) -> None:
        answers.append((await bb.request(SUBJECT)).data)

    async with (
        open_session(nats_url="memory://outside", agent_id="caller") as caller,
        trio.open_nursery() as asking,
        open_session(nats_url="memory://outside", agent_id="server") as server,
    ):
        with trio.move_on_after(0.5):
            async with server.open_service("pages", version="1.0.0") as service:
                async with trio.open_nursery() as nursery:
                    await nursery.start(service.serve, SUBJECT, handle)
                    asking.start_soon(ask, caller)
                    await trio.sleep_forever()
        assert len(done) == 1
    assert answers == [b"done"]


async def test_stubborn_handler_at_the_end_is_named(autojump_clock: Clock) -> None:
    async def handle(request: Request) -> bytes:
        with trio.CancelScope(shield=True):
            await trio.sleep(30)
        return b""

    log = Lines()
    async with open_session(logger=log, grace_period=1.0) as bb:
        with trio.move_on_after(100) as scope:
            async with bb.open_service("pages", version="1.0.0") as service:
                async with trio.open_nursery() as nursery:
                    await nursery.start(service.serve, SUBJECT, handle)
                    with trio.move_on_after(1):
                        await bb.request(SUBJECT)
                    nursery.cancel_scope.cancel()
        assert not scope.cancelled_caught
    assert log.lines_with("1 handlers of pages.fetch go on")


# Arguments.


@pytest.mark.parametrize(
    ("name", "options", "error", "text"),
    [
        ("", {}, ValueError, "name"),
        ("a b", {}, ValueError, "name"),
        ("a.b", {}, ValueError, "name"),
        ("ä", {}, ValueError, "name"),
        (3, {}, TypeError, "name"),
        ("a", {"version": "1"}, ValueError, "version"),
        ("a", {"version": "1.2.3.4"}, ValueError, "version"),
        ("a", {"version": "01.2.3"}, ValueError, "version"),
        ("a", {"version": "1.2.3\n"}, ValueError, "version"),
        ("a", {"version": None}, TypeError, "version"),
        ("a", {"description": None}, TypeError, "description"),
        ("a", {"description": "\ud800"}, ValueError, "description"),
        ("a", {"metadata": {"a": 1}}, TypeError, "metadata"),
        ("a", {"metadata": {1: "a"}}, TypeError, "metadata"),
    ],
)
async def test_services_that_cannot_be(
    name: Any, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    async with open_session() as bb:
        with pytest.raises(error, match=text):
            async with bb.open_service(name, **({"version": "1.0.0"} | options)):
                pass


@pytest.mark.parametrize("version", ["0.0.0", "1.2.0", "1.0.0-alpha.1+build.5", "10.20.30-rc-1"])
async def test_versions_that_are_valid(version: str) -> None:
    async with open_session() as bb, bb.open_service("a", version=version) as service:
        assert service.version == version
        assert service.name == "a"
        assert service.id
        assert service.metadata == {}
        with pytest.raises(TypeError):
            Service()


@pytest.mark.parametrize(
    ("subject", "options", "error", "text"),
    [
        ("", {}, ValueError, "subject"),
        ("a b", {}, ValueError, "subject"),
        ("a..b", {}, ValueError, "subject"),
        (3, {}, TypeError, "subject"),
        ("a", {"name": "a.b"}, ValueError, "name"),
        ("a", {"name": ""}, ValueError, "name"),
        ("a", {"concurrency": 0}, ValueError, "concurrency"),
        ("a", {"concurrency": 1.5}, TypeError, "concurrency"),
        ("a", {"queue": "a b"}, ValueError, "queue"),
        ("a", {"queue": None}, TypeError, "queue"),
        ("a", {"min_beats": -1}, ValueError, "min_beats"),
        ("a", {"min_beats": math.nan}, ValueError, "min_beats"),
        ("a", {"handler": None}, TypeError, "handler"),
    ],
)
async def test_endpoints_that_cannot_be(
    subject: Any, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    async with open_session() as bb, bb.open_service("a", version="1.0.0") as service:
        with pytest.raises(error, match=text):
            await service.serve(subject, **({"handler": echo} | options))


@pytest.mark.parametrize(
    ("code", "description"), [(-1, "x"), (10**9, "x"), (True, "x"), (1.5, 3), ("1", "x")]
)
def test_errors_that_cannot_be(code: Any, description: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        ServiceError(code, description)


async def test_service_of_a_disabled_session_waits(autojump_clock: Clock) -> None:
    async with (
        open_session(enabled=False) as bb,
        trio.open_nursery() as nursery,
    ):
        async with bb.open_service("a", version="1.0.0") as service:
            await nursery.start(service.serve, SUBJECT, echo)
            await trio.sleep(5)


async def test_service_of_a_session_that_was_left() -> None:
    async with open_session() as bb:
        pass
    with pytest.raises(SessionClosed):
        async with bb.open_service("a", version="1.0.0"):
            pass


# With a real server.


@guarded(120)
async def test_over_a_real_server() -> None:
    async with NatsServer() as server, open_pair(echo, url=server.url) as pair:
        answer = await pair.caller.request(SUBJECT, b"x", headers={"X": "1"}, beats=100)
        assert answer == Response(b"x", {})
        with pytest.raises(NoResponders):
            await pair.caller.request("nobody", b"x")


@guarded(120)
async def test_handler_that_blocks_the_loop_of_its_process() -> None:
    program = f"""
import sys, time, trio, backbeat_trio

async def handle(request):
    time.sleep(float(request.data))
    return b"awake"

async def main():
    async with (
        backbeat_trio.session(nats_url=sys.argv[1], cluster_id={CLUSTER_ID!r}) as bb,
        bb.open_service("pages", version="1.0.0") as service,
    ):
        await service.serve({SUBJECT!r}, handle)

trio.run(main)
"""
    async with NatsServer() as server, open_session(nats_url=server.url, tempo_bpm=600.0) as bb:
        process = await trio.lowlevel.open_process(
            [sys.executable, "-c", program, server.url], env=CLEAN, stderr=subprocess.DEVNULL
        )
        try:
            while True:
                with suppress(NoResponders):
                    assert (await bb.request(SUBJECT, b"0")).data == b"awake"
                    break
                await trio.sleep(0.05)
            # The caller does not wait for the handler, which nothing can cancel.
            with pytest.raises(BeatBudgetExceeded):
                await bb.request(SUBJECT, b"4", beats=1)
            assert bb.statistics().late_replies == 0
            # Its late answer is counted as such, and others are served again.
            assert (await bb.request(SUBJECT, b"0")).data == b"awake"
            assert bb.statistics().late_replies == 1
            assert process.poll() is None
        finally:
            process.kill()
            await process.wait()


@guarded(120)
async def test_subscription_that_permissions_refuse() -> None:
    config = """
    authorization { users: [
        { user: u, password: p, permissions: {
            publish: ">", subscribe: { deny: ["pages.>", "backbeat.cancel.a"] } } }
    ] }
    """
    log = Lines()
    async with (
        NatsServer(config=config) as server,
        open_session(nats_url=server.url, user="u", password="p", logger=log) as bb,
        bb.open_service("pages", version="1.0.0") as service,
    ):
        await until(lambda: bb.health().connected)
        with pytest.raises(PermissionDenied, match=r"subscribe to pages\.fetch"):
            await service.serve(SUBJECT, echo)
        async with trio.open_nursery() as nursery:
            await nursery.start(service.serve, "a", echo)
            assert (await bb.request("a", b"x")).data == b"x"
            assert log.lines_with("go on after their callers have stopped waiting")
            nursery.cancel_scope.cancel()


@guarded(120)
async def test_answers_that_permissions_refuse_are_one_line_of_the_log() -> None:
    config = """
    authorization { users: [
        { user: u, password: p, permissions: { publish: { deny: "_INBOX_web.>" } } }
    ] }
    """
    log = Lines()
    options: Any = {"user": "u", "password": "p", "lock_timeout": 0, "require_connection": True}
    async with (
        NatsServer(config=config) as server,
        open_session(nats_url=server.url, logger=log, **options) as bb,
        open_session(nats_url=server.url, inbox_prefix="_INBOX_web", **options) as caller,
        bb.open_service("pages", version="1.0.0") as service,
        trio.open_nursery() as nursery,
    ):
        await nursery.start(service.serve, SUBJECT, echo)
        for _ in range(5):
            with trio.move_on_after(0.02):
                await caller.request(SUBJECT)
        transport = bb._runtime.transport
        assert transport is not None
        await until(lambda: transport.statistics().permission_errors == 5)
        await until(lambda: log.lines_with("may not publish to _INBOX_web.>;"))
        assert len(log.lines_with("permission denied")) == 1
        assert transport.statistics().refused == (("publish to _inbox_web.>", 5),)
        nursery.cancel_scope.cancel()


@guarded(120)
async def test_subjects_that_are_as_long_as_a_line_may_be() -> None:
    async def handle(request: Request) -> bytes:
        raise ServiceError(400, "an answer with headers")

    async with (
        NatsServer() as server,
        open_session(nats_url=server.url, lock_timeout=0, require_connection=True) as bb,
        bb.open_service("pages", version="1.0.0") as service,
        trio.open_nursery() as nursery,
    ):
        await nursery.start(service.serve, SUBJECT, handle)
        # The server ends the connection of whoever sends a line of more than 4,096 bytes. That of
        # the answer would be longer than that of the request.
        async with await trio.open_tcp_stream("127.0.0.1", server.port) as stream:
            line = f"PUB {SUBJECT} {'r' * 4078} 0"
            await stream.send_all(f"CONNECT {{}}\r\n{line}\r\n\r\n".encode())
            await until(lambda: bb.statistics().calls_failed == 1)
        assert bb.statistics().calls_unanswered == 1
        for subject in ("x" * 4070, "ä" * 1001, ".".join(["x" * 200] * 11)):
            with pytest.raises(ValueError, match="2,000 bytes"):
                await bb.request(subject)
            with pytest.raises(ValueError, match="2,000 bytes"):
                await service.serve(subject, echo)
        with pytest.raises(NoResponders):
            await bb.request("x" * 2000)
        with pytest.raises(ServiceError, match="an answer"):
            await bb.request(SUBJECT)
        transport = bb._runtime.transport
        assert transport is not None
        assert transport.generation == 1
        nursery.cancel_scope.cancel()


@guarded(120)
async def test_headers_of_a_megabyte() -> None:
    seen: list[int] = []

    async def handle(request: Request) -> bytes:
        seen.append(len(request.headers["X"]))
        return b"ok"

    async with NatsServer() as server, open_pair(handle, url=server.url) as pair:
        long = "x" * (1024 * 1024 - 200)
        assert (await pair.caller.request(SUBJECT, headers={"X": long})).data == b"ok"
        with pytest.raises(ValueError, match="bytes"):
            await pair.caller.request(SUBJECT, headers={"X": long + "x" * 200})
        name = "Backbeat-Deadline"
        answer = await raw_request(pair.caller, {name: long, "X": ""})
        assert answer == {}
        assert pair.server.statistics().headers_garbled == 1
        assert seen == [len(long), 0]
