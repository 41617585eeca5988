"""Requests: the budgets that bound them, what they raise, and what they leave behind."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing
from helpers import guarded, pause, until

from backbeat_trio import (
    BeatBudgetExceeded,
    MemoryBus,
    MemoryTransport,
    Message,
    NoResponders,
    PermissionDenied,
    Request,
    ServiceError,
    Session,
    SessionClosed,
    Transport,
    TransportBroken,
)
from backbeat_trio._transport.protocol import Subscription
from backbeat_trio.testing import NatsServer, open_session

Clock = trio.testing.MockClock

CANCEL = "backbeat.cancel.a"


@asynccontextmanager
async def open_plain(**settings: Any) -> AsyncGenerator[tuple[Session, Transport], None]:
    """Open a session, and give its transport, over which the test answers by itself."""
    async with open_session(tempo_bpm=60.0, **settings) as bb:
        transport = bb._runtime.transport
        assert transport is not None
        await bb.sleep_until(bb.current_beat() + 1)
        yield bb, transport


async def ask(bb: Session, **options: Any) -> None:
    await bb.request("a", **options)


async def reply_with(messages: Subscription, transport: Transport, **headers: str) -> Message:
    """Answer one request, and return it."""
    message = await anext(aiter(messages))
    transport.publish_nowait(message.reply, b"answer", headers=headers)
    return message


# Deadlines.


async def test_request_without_a_deadline_carries_none(autojump_clock: Clock) -> None:
    async with open_plain() as (bb, transport), trio.open_nursery() as nursery:
        async with transport.open_subscription("a") as messages:
            nursery.start_soon(ask, bb)
            assert (await reply_with(messages, transport)).headers is None


async def test_request_carries_the_nearest_deadline(autojump_clock: Clock) -> None:
    async with open_plain() as (bb, transport), trio.open_nursery() as nursery:
        async with transport.open_subscription("a") as messages:
            begin, incarnation = bb.current_position(), bb._calls.incarnation

            async def ask_within(outer: float, beats: float | None) -> None:
                with bb.fail_after(outer):
                    await ask(bb, beats=beats, headers={"X": "1"})

            for outer, beats, nearest in ((3, 2, 2), (2, 3, 2), (4, None, 4)):
                nursery.start_soon(ask_within, outer, beats)
                headers = dict((await reply_with(messages, transport)).headers or {})
                value = headers.pop("Backbeat-Deadline")
                assert value == f"{incarnation}; {begin + nearest:.3f}; {nearest:.3f}"
                assert headers == {"X": "1"}


async def test_budget_of_the_request_raises(autojump_clock: Clock) -> None:
    async with open_plain() as (bb, transport), transport.open_subscription("a"):
        begin = bb.current_position()
        with pytest.raises(BeatBudgetExceeded):
            await bb.request("a", beats=2)
        assert bb.current_position() == begin + 2
        with pytest.raises(trio.TooSlowError), bb.fail_after(1):
            await bb.request("a", beats=2)
        with bb.move_on_after(1) as scope:
            await bb.request("a", beats=2)
        assert scope.cancelled_caught
        with trio.move_on_after(0.5) as seconds:
            await bb.request("a", beats=2)
        assert seconds.cancelled_caught


async def test_request_with_no_budget_left_is_not_sent(autojump_clock: Clock) -> None:
    async with open_plain() as (bb, transport), transport.open_subscription(">") as messages:
        messages.waiting()
        with pytest.raises(BeatBudgetExceeded):
            await bb.request("a", beats=0)
        with bb.move_on_at(0) as scope:
            await bb.request("a")
        assert scope.cancelled_caught
        assert not [message for message in messages.waiting() if message.subject == "a"]
        assert bb.statistics().requests == 0


# Who stops waiting says so.


async def test_caller_that_stops_waiting_says_why(autojump_clock: Clock) -> None:
    async with open_plain() as (bb, transport):
        async with (
            transport.open_subscription("a") as requests,
            transport.open_subscription(CANCEL) as notices,
        ):

            async def hear() -> str:
                request, notice = await anext(aiter(requests)), await anext(aiter(notices))
                headers = dict(notice.headers or {})
                assert headers.pop("Backbeat-Request") == request.reply
                assert notice.data == b""
                (reason,) = headers.values()
                assert set(headers) == {"Backbeat-Reason"}
                return reason

            with trio.move_on_after(1):
                await bb.request("a")
            assert await hear() == "the deadline has passed"
            with bb.move_on_after(1):
                await bb.request("a")
            assert "budget ran out" in await hear()
            with trio.CancelScope() as scope:
                scope.cancel()
                await bb.request("a")
            assert not requests.waiting()
            for reason, heard in ((None, "cancelled"), ("two\nlines ä", "two lines ä")):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(ask, bb)
                    await trio.testing.wait_all_tasks_blocked()
                    nursery.cancel_scope.cancel(reason)
                assert await hear() == heard
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask, bb)
                await trio.testing.wait_all_tasks_blocked()
                nursery.cancel_scope.cancel("x" * 10_000)
            assert len(await hear()) == 500
            assert bb.statistics().requests_abandoned == 5


async def test_leaving_the_session_tells_the_service(autojump_clock: Clock) -> None:
    bus = MemoryBus()
    transport = MemoryTransport(bus)
    transport.restore()
    async with (
        transport.open_subscription("a"),
        transport.open_subscription(CANCEL) as notices,
    ):
        with trio.CancelScope() as scope:
            async with open_session(bus, lock_timeout=0) as bb:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(ask, bb)
                    await trio.testing.wait_all_tasks_blocked()
                    scope.cancel("the program ends")
        (notice,) = notices.waiting()
        assert notice.headers
        assert notice.headers["Backbeat-Reason"] == "the program ends"


@guarded(120)
@pytest.mark.parametrize("bounds", [{}, {"beats": 1000}])
@pytest.mark.parametrize("url", ["memory://closing", "nats://"])
async def test_session_that_ends_before_the_task_that_asks_tells_the_service(
    url: str, bounds: dict[str, float]
) -> None:
    ended: list[BaseException] = []

    async def ask_until_closed(bb: Session) -> None:
        with pytest.raises(
            (SessionClosed, BeatBudgetExceeded), match=r"session (was|has been) closed"
        ):
            await ask(bb, **bounds)

    async with AsyncExitStack() as stack:
        if url == "nats://":
            url = (await stack.enter_async_context(NatsServer())).url
        options: Any = {"nats_url": url, "lock_timeout": 0, "require_connection": True}
        async with open_session(agent_id="server", **options) as serving:

            async def handle(_: Request) -> bytes:
                try:
                    await trio.sleep_forever()
                except trio.Cancelled as error:
                    ended.append(error)
                    raise
                raise AssertionError

            async with (
                serving.open_service("slow", version="1.0.0") as service,
                trio.open_nursery() as nursery,
            ):
                await nursery.start(service.serve, "a", handle)
                async with open_session(agent_id="caller", **options) as bb:
                    nursery.start_soon(ask_until_closed, bb)
                    await until(lambda: serving.statistics().live_calls == 1)
                await until(lambda: serving.statistics().calls_cancelled == 1)
                assert bb.statistics().requests_abandoned == 1
                nursery.cancel_scope.cancel()
    (error,) = ended
    assert "the session was closed" in str(error)


async def test_late_answers_are_counted(autojump_clock: Clock) -> None:
    async with open_plain() as (bb, transport):
        async with transport.open_subscription("a") as requests:
            with bb.move_on_after(1):
                await bb.request("a")
            await reply_with(requests, transport)
            assert not transport._requests  # type: ignore[attr-defined]


# Errors.


@pytest.mark.parametrize(
    ("headers", "code", "description"),
    [
        ({"Nats-Service-Error": "no", "Nats-Service-Error-Code": "404"}, 404, "no"),
        ({"nats-service-error": "no", "NATS-SERVICE-ERROR-CODE": "404"}, 404, "no"),
        ({"Nats-Service-Error": "no"}, 500, "no"),
        ({"Nats-Service-Error-Code": "7"}, 7, "the service gave no description"),
        ({"Nats-Service-Error": "no", "Nats-Service-Error-Code": "x"}, 500, "no"),
        ({"Nats-Service-Error": "no", "Nats-Service-Error-Code": "-1"}, 500, "no"),
        ({"Nats-Service-Error": "no", "Nats-Service-Error-Code": "9" * 5000}, 500, "no"),
        ({"Nats-Service-Error": "no", "Nats-Service-Error-Code": "٣"}, 500, "no"),
    ],
)
async def test_errors_of_a_service(
    autojump_clock: Clock, headers: dict[str, str], code: int, description: str
) -> None:
    async with open_plain() as (bb, transport), transport.open_subscription("a") as messages:
        async with trio.open_nursery() as nursery:

            async def answer() -> None:
                await reply_with(messages, transport, **headers)

            nursery.start_soon(answer)
            with pytest.raises(ServiceError) as info:
                await bb.request("a")
            assert (info.value.code, info.value.description) == (code, description)


@pytest.mark.parametrize("code", ["408", "504"])
async def test_service_whose_clock_is_ahead(autojump_clock: Clock, code: str) -> None:
    # It says that the budget is over a moment before it is over here.
    error = {"Nats-Service-Error": "over", "Nats-Service-Error-Code": code}
    async with open_plain() as (bb, transport), transport.open_subscription("a") as messages:

        async def answer(after: float) -> None:
            await trio.sleep(after)
            await reply_with(messages, transport, **error)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer, 0.97)
            with pytest.raises(BeatBudgetExceeded):
                await bb.request("a", beats=1)
            nursery.start_soon(answer, 0.97)
            with bb.move_on_after(1) as scope:
                await bb.request("a")
            assert scope.cancelled_caught
            # Long before, it is the service's own affair.
            nursery.start_soon(answer, 0.5)
            with pytest.raises(ServiceError, match="over"):
                await bb.request("a", beats=1)
            nursery.start_soon(answer, 0.5)
            with pytest.raises(ServiceError, match="over"):
                await bb.request("a")


async def test_nobody_serves(autojump_clock: Clock) -> None:
    async with open_plain() as (bb, transport):
        with pytest.raises(NoResponders, match="nobody"):
            await bb.request("nobody", beats=5)
        async with transport.open_subscription("a"), trio.open_nursery() as nursery:
            nursery.start_soon(sever_after, transport, 1)
            with pytest.raises(TransportBroken):
                await bb.request("a")
        with pytest.raises(TransportBroken):
            await bb.request("a")


async def sever_after(transport: Any, seconds: float) -> None:
    await trio.sleep(seconds)
    transport.sever()


@pytest.mark.parametrize(
    ("subject", "options", "error", "text"),
    [
        ("", {}, ValueError, "subject"),
        ("a.*", {}, ValueError, "subject"),
        ("a b", {}, ValueError, "subject"),
        ("a", {"payload": "text"}, TypeError, "payload"),
        ("a", {"payload": None}, TypeError, "payload"),
        ("a", {"payload": b"x" * 2_000_000}, ValueError, "bytes"),
        ("a", {"beats": -1}, ValueError, "beats"),
        ("a", {"beats": math.nan}, ValueError, "beats"),
        ("a", {"beats": "1"}, TypeError, "beats"),
        ("a", {"headers": {"a b": "c"}}, ValueError, "header"),
        ("a", {"headers": {"a": 1}}, TypeError, "header"),
        ("a", {"headers": {1: "a"}}, TypeError, "header"),
        (5, {}, TypeError, "subject"),
    ],
)
async def test_requests_that_cannot_be(
    autojump_clock: Clock, subject: Any, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    async with open_plain() as (bb, transport), transport.open_subscription(">"):
        with pytest.raises(error, match=text):
            await bb.request(subject, **options)


async def test_headers_of_the_caller_are_not_changed(autojump_clock: Clock) -> None:
    async with open_plain() as (bb, transport), transport.open_subscription("a") as messages:
        headers = {"X": "1", "backbeat-deadline": "whatever"}
        async with trio.open_nursery() as nursery:

            async def answer() -> None:
                message = await reply_with(messages, transport)
                assert message.headers
                assert set(message.headers) == {"X", "Backbeat-Deadline"}

            nursery.start_soon(answer)
            await bb.request("a", headers=headers, beats=1)
        assert headers == {"X": "1", "backbeat-deadline": "whatever"}


async def test_sessions_that_cannot_ask() -> None:
    async with open_session(enabled=False) as bb:
        with pytest.raises(TransportBroken, match="disabled"):
            await bb.request("a")
    async with open_session() as bb:
        pass
    with pytest.raises(SessionClosed):
        await bb.request("a")


# With a real server.


@guarded(120)
async def test_server_that_restarts_during_requests() -> None:
    async with NatsServer() as server, open_session(nats_url=server.url) as bb:
        transport = bb._runtime.transport
        assert transport is not None
        async with transport.open_subscription("a") as messages:
            outcomes: list[str] = []

            async def fail() -> None:
                with pytest.raises(TransportBroken):
                    await bb.request("a")
                outcomes.append("broken")

            async with trio.open_nursery() as nursery:
                for _ in range(20):
                    nursery.start_soon(fail)
                await until(lambda: bb.statistics().requests == 20)
                await anext(aiter(messages))
                server.kill()
                await server.start()
            assert len(outcomes) == 20
            await until(lambda: transport.connected)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(serve_all, messages, transport)
                await transport.flush()
                assert (await bb.request("a")).data == b"answer"
                nursery.cancel_scope.cancel()


async def serve_all(messages: Subscription, transport: Transport) -> None:
    while True:
        await reply_with(messages, transport)


@guarded(120)
async def test_server_that_hangs_during_a_request() -> None:
    async with NatsServer() as server, open_session(nats_url=server.url, tempo_bpm=600.0) as bb:
        transport = bb._runtime.transport
        assert transport is not None
        async with transport.open_subscription("a"):
            pause(server)
            try:
                with pytest.raises(BeatBudgetExceeded):
                    await bb.request("a", beats=3)
            finally:
                server.resume()


@guarded(120)
async def test_request_that_permissions_refuse() -> None:
    config = """
    authorization { users: [
        { user: u, password: p, permissions: {
            publish: { deny: ["secret", "backbeat.cancel.>"] }, subscribe: ">" } }
    ] }
    """
    async with (
        NatsServer(config=config) as server,
        open_session(nats_url=server.url, user="u", password="p") as bb,
    ):
        await until(lambda: bb.health().connected)
        with pytest.raises(PermissionDenied, match="secret"):
            await bb.request("secret")
        transport = bb._runtime.transport
        assert transport is not None
        async with transport.open_subscription("a"):
            with trio.move_on_after(0.1):
                await bb.request("a")
            await until(lambda: any("backbeat.cancel.a" in text for text in bb.health().errors))


@guarded(120)
async def test_request_whose_answer_permissions_refuse_is_not_sent() -> None:
    config = """
    authorization { users: [
        { user: deaf, password: p, permissions: { subscribe: { deny: "_INBOX.>" } } }
        { user: other, password: p }
    ] }
    """
    options: Any = {"password": "p", "lock_timeout": 0, "require_connection": True}
    async with (
        NatsServer(config=config) as server,
        open_session(nats_url=server.url, user="deaf", **options) as bb,
        open_session(nats_url=server.url, user="other", **options) as other,
    ):
        transport = other._runtime.transport
        assert transport is not None
        await until(lambda: any("inbox_prefix" in text for text in bb.health().errors))
        async with transport.open_subscription("a") as requests:
            with pytest.raises(PermissionDenied, match="inbox_prefix"):
                await bb.request("a", b"nobody waits for the answer")
            # What it sends after that arrives, so the request would have arrived, too.
            assert bb._runtime.transport is not None
            await bb._runtime.transport.publish("a", b"next")
            assert (await anext(aiter(requests))).data == b"next"


@guarded(120)
async def test_answer_after_the_deadline_over_a_real_server() -> None:
    async with NatsServer() as server, open_session(nats_url=server.url) as bb:
        transport = bb._runtime.transport
        assert transport is not None
        async with transport.open_subscription("a") as messages:
            with trio.move_on_after(0.05):
                await bb.request("a")
            await reply_with(messages, transport)
            await until(lambda: bb.statistics().late_replies == 1)


@guarded(120)
async def test_answer_that_arrived_before_the_deadline_is_not_lost_in_a_busy_loop() -> None:
    async with NatsServer() as server, open_session(nats_url=server.url) as bb:
        transport: Any = bb._runtime.transport
        async with transport.open_subscription("a") as messages, trio.open_nursery() as nursery:
            scope = trio.CancelScope()

            async def answer() -> None:
                (message,) = await messages.batch()
                scope.deadline = trio.current_time() + 0.05
                client = transport._client
                transport.publish_nowait(message.reply, b"in time")
                client.outgoing._push()
                # No other task runs until the answer is there and the deadline has passed.
                while not client.incoming._arrivals or trio.current_time() < scope.deadline:
                    time.sleep(0.001)

            nursery.start_soon(answer)
            with scope:
                assert (await bb.request("a")).data == b"in time"
            assert not scope.cancelled_caught
            assert bb.statistics().late_replies == 0
            assert bb.statistics().requests_abandoned == 0
            assert not transport._requests
