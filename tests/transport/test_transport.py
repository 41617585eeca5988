"""What every transport keeps, over the in-process bus and over a real server alike."""

from __future__ import annotations

import math
import random
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final, TypeAlias, TypeVar

import helpers
import pytest
import trio
import trio.testing
from helpers import client_threads, until
from hypothesis import given, strategies as st

from backbeat_trio import (
    BackbeatConfig,
    MemoryBus,
    MemoryTransport,
    Message,
    NoResponders,
    Transport,
    TransportBroken,
    TransportClosed,
)
from backbeat_trio._time.local import local_ns
from backbeat_trio._transport import nats_outgoing
from backbeat_trio._transport.headers import decode_headers, find_header
from backbeat_trio._transport.memory import open_memory_bus
from backbeat_trio._transport.nats import NatsTransport
from backbeat_trio._transport.protocol import check_subject, matches
from backbeat_trio.testing import NatsServer, open_session

T = TypeVar("T", bound=Transport)

Maker: TypeAlias = Callable[[], Transport]
"""Makes a transport that is not yet run; all of one maker's are on the same bus or server."""

# A stamp crosses from one thread's clock to another's; what that may cost, in ns.
_CARRY: Final = 1_000_000

guarded = helpers.guarded(120)


@pytest.fixture(params=["memory", "nats"])
async def make(request: pytest.FixtureRequest) -> AsyncGenerator[Maker, None]:
    if request.param == "memory":
        bus = MemoryBus()
        yield lambda: MemoryTransport(bus)
        return
    async with NatsServer() as server:
        config = BackbeatConfig(nats_url=server.url, agent_id="conformance")
        yield lambda: NatsTransport(config)


@asynccontextmanager
async def running(transport: T) -> AsyncGenerator[T, None]:
    async with trio.open_nursery() as nursery:
        await nursery.start(transport.run)
        await transport.wait_connected()
        yield transport
        nursery.cancel_scope.cancel()


async def take(messages: AsyncIterator[Message], count: int) -> list[bytes]:
    return [(await anext(messages)).data for _ in range(count)]


@asynccontextmanager
async def answering(transport: Transport, subject: str) -> AsyncGenerator[None, None]:
    """Answer requests with what they hold."""

    async def answer(messages: AsyncIterator[Message]) -> None:
        async for message in messages:
            transport.publish_nowait(message.reply, message.data)

    async with transport.open_subscription(subject) as messages, trio.open_nursery() as nursery:
        nursery.start_soon(answer, messages)
        yield
        nursery.cancel_scope.cancel()


def numbers(count: int) -> list[bytes]:
    return [b"%d" % number for number in range(count)]


# Publish and subscribe.


@guarded
async def test_messages_arrive_in_the_order_of_publishing(make: Maker) -> None:
    async with (
        running(make()) as sender,
        running(make()) as receiver,
        receiver.open_subscription("a.b") as messages,
    ):
        for number, data in enumerate(numbers(2000)):
            # Both ways of publishing share one order.
            if number % 3:
                sender.publish_nowait("a.b", data)
            else:
                await sender.publish("a.b", data)
        assert await take(messages, 2000) == numbers(2000)


@guarded
async def test_message_tells_subject_reply_and_arrival(make: Maker) -> None:
    async with running(make()) as transport, transport.open_subscription("a.*") as messages:
        before = local_ns()
        await transport.publish("a.b", b"data", reply="c.d")
        message = await anext(messages)
        after = local_ns()
    assert message[:3] == ("a.b", b"data", "c.d")
    assert before - _CARRY <= message.received_ns <= after + _CARRY


@guarded
async def test_a_subscription_that_is_not_confirmed_precedes_what_is_sent_after_it(
    make: Maker,
) -> None:
    async with running(make()) as transport:
        for number in range(50):
            subject = f"a.{number}"
            async with transport.open_subscription(subject, confirmed=False) as requests:
                # It would fail at once if nobody were subscribed.
                with pytest.raises(TransportBroken, match="no answer"):
                    await transport.request(subject, b"question", timeout=0.001)
                assert (await anext(requests)).data == b"question"


@guarded
async def test_publisher_hears_itself(make: Maker) -> None:
    async with running(make()) as transport, transport.open_subscription("a") as messages:
        await transport.publish("a", b"")
        assert (await anext(messages)).data == b""


@guarded
async def test_subscription_stands_when_its_block_is_entered(make: Maker) -> None:
    # From another connection, so that no order of one connection makes up for it.
    async with running(make()) as sender, running(make()) as receiver:
        for data in numbers(50):
            async with receiver.open_subscription("a") as messages:
                await sender.publish("a", data)
                assert (await anext(messages)).data == data


@guarded
async def test_subscription_ends_with_its_block(make: Maker) -> None:
    async with running(make()) as transport, transport.open_subscription("a") as kept:
        async with transport.open_subscription("a") as left:
            await transport.publish("a", b"1")
            assert await take(left, 1) == [b"1"]
        await transport.publish("a", b"2")
        assert await take(kept, 2) == [b"1", b"2"]
        with pytest.raises(TransportClosed):
            await anext(left)
        with pytest.raises(NoResponders):
            await transport.request("nobody", b"", timeout=20)


@pytest.mark.parametrize(
    ("pattern", "heard"),
    [
        ("a.b", ["a.b"]),
        ("a.*", ["a.b", "a.c"]),
        ("*.b", ["a.b", "b.b"]),
        ("a.>", ["a.b", "a.c", "a.b.c"]),
        ("a.*.c", ["a.b.c"]),
        ("*", ["a"]),
        (">", ["a", "a.b", "a.c", "a.b.c", "b.b", "ab.c"]),
    ],
)
@guarded
async def test_wildcards(make: Maker, pattern: str, heard: list[str]) -> None:
    async with running(make()) as transport, transport.open_subscription(pattern) as messages:
        for subject in ("a", "a.b", "a.c", "a.b.c", "b.b", "ab.c"):
            await transport.publish(subject, b"")
        # Each pattern matches the last, so that nothing can come after it unseen.
        end = pattern.replace("*", "end").replace(">", "end")
        await transport.publish(end, b"end")
        subjects = []
        async for message in messages:
            if message.data == b"end":
                break
            subjects.append(message.subject)
        assert subjects == heard


@guarded
async def test_every_subscriber_gets_every_message_once(make: Maker) -> None:
    async with (
        running(make()) as one,
        running(make()) as two,
        one.open_subscription("a.b") as first,
        one.open_subscription("a.*") as second,
        two.open_subscription("a.b") as third,
        two.open_subscription("a.b") as fourth,
    ):
        for data in numbers(100):
            await one.publish("a.b", data)
        for messages in (first, second, third, fourth):
            assert await take(messages, 100) == numbers(100)


@guarded
async def test_slow_subscriber_loses_the_newest_and_holds_up_nobody(make: Maker) -> None:
    async with (
        running(make()) as transport,
        transport.open_subscription("a", capacity=3) as slow,
        transport.open_subscription("a") as quick,
    ):
        for data in numbers(10):
            await transport.publish("a", data)
        assert await take(quick, 10) == numbers(10)
        await until(lambda: transport.statistics().dropped == 7)
        assert await take(slow, 3) == numbers(3)
        # It is as good as new once it has caught up.
        await transport.publish("a", b"again")
        assert await take(slow, 1) == [b"again"]
        # The quick one's copy comes by itself, and may come later.
        assert await take(quick, 1) == [b"again"]
        assert transport.statistics().dropped == 7
        assert transport.statistics().received == 22


@guarded
async def test_publish_takes_more_than_fits_at_once(make: Maker) -> None:
    # 16 MB, which is several times what may be under way.
    async with (
        running(make()) as sender,
        running(make()) as receiver,
        receiver.open_subscription("a") as messages,
    ):
        for number in range(160):
            await sender.publish("a", number.to_bytes(2, "big") * 50_000)
        received = await take(messages, 160)
    assert [int.from_bytes(data[:2], "big") for data in received] == list(range(160))
    assert {len(data) for data in received} == {100_000}


@guarded
async def test_largest_message_passes_and_a_larger_one_is_refused(make: Maker) -> None:
    async with running(make()) as transport, transport.open_subscription("a") as messages:
        largest = b"x" * transport.max_payload
        for refused in (
            lambda: transport.publish("a", largest + b"x"),
            lambda: transport.request("a", largest + b"x", timeout=20),
        ):
            with pytest.raises(ValueError, match=str(transport.max_payload)):
                await refused()
        with pytest.raises(ValueError, match=str(transport.max_payload)):
            transport.publish_nowait("a", largest + b"x")
        await transport.publish("a", largest)
        assert await take(messages, 1) == [largest]


_NO_SUBJECTS: Final = ("", "*", ">", "a.*", "a.>", ".a", "a.", "a..b", "a b", "a\r\nb", "a\tb")


@guarded
async def test_publishing_where_nothing_can_be_published(make: Maker) -> None:
    async with running(make()) as transport, transport.open_subscription(">") as messages:
        for subject in _NO_SUBJECTS:
            with pytest.raises(ValueError, match="subject"):
                transport.publish_nowait(subject, b"")
            with pytest.raises(ValueError, match="subject"):
                await transport.publish(subject, b"")
            with pytest.raises(ValueError, match="subject"):
                await transport.request(subject, b"", timeout=20)
        await transport.publish("a", b"the first to arrive")
        assert await take(messages, 1) == [b"the first to arrive"]
        assert transport.generation == 1


@guarded
async def test_reply_where_nothing_can_be_published(make: Maker) -> None:
    # Refused at the call: nats-py drops the connection over some of them.
    async with running(make()) as transport, transport.open_subscription("a") as messages:
        for reply in _NO_SUBJECTS[1:]:
            with pytest.raises(ValueError, match="subject"):
                transport.publish_nowait("a", b"", reply=reply)
            with pytest.raises(ValueError, match="subject"):
                await transport.publish("a", b"", reply=reply)
        await transport.publish("a", b"the first to arrive")
        assert await take(messages, 1) == [b"the first to arrive"]
        assert transport.generation == 1


@guarded
async def test_subscribing_to_what_is_no_pattern(make: Maker) -> None:
    # Refused at the call: nats-py drops the connection over it, and would again after reconnecting.
    async with running(make()) as transport, transport.open_subscription("a") as messages:
        for pattern in ("", ".a", "a.", "a..b", "a b", "a\r\nb", "a\tb", ">.a", "a.>.b", "a*"):
            with pytest.raises(ValueError, match="subject"):
                async with transport.open_subscription(pattern):
                    await transport.publish("a", b"never sent")
        await transport.publish("a", b"the first to arrive")
        assert await take(messages, 1) == [b"the first to arrive"]
        assert transport.generation == 1


# Headers.


@guarded
async def test_headers_arrive_with_the_message(make: Maker) -> None:
    headers = {"Plain": "a", "lower-case": "with spaces, and: colons", "Empty": "", "U": "ü"}
    async with running(make()) as transport, transport.open_subscription("a") as messages:
        await transport.publish("a", b"data", headers=headers)
        transport.publish_nowait("a", b"", headers=headers, reply="b")
        await transport.publish("a", b"none")
        await transport.publish("a", b"none", headers={})
        assert [(await anext(messages)).headers for _ in range(4)] == [headers, headers, None, None]


@guarded
async def test_request_and_answer_carry_headers(make: Maker) -> None:
    async with running(make()) as transport, transport.open_subscription("a") as messages:

        async def answer() -> None:
            request = await anext(messages)
            transport.publish_nowait(request.reply, b"", headers=dict(request.headers or {}))
            request = await anext(messages)
            assert request.headers is None
            transport.publish_nowait(request.reply, b"")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer)
            first = await transport.request("a", b"", timeout=20, headers={"X": "1"})
            second = await transport.request("a", b"", timeout=math.inf)
    assert first.headers == {"X": "1"}
    assert second.headers is None


@guarded
async def test_white_space_around_a_header_is_lost(make: Maker) -> None:
    async with running(make()) as transport, transport.open_subscription("a") as messages:
        await transport.publish("a", b"", headers={"X": "  1 \t"})
        assert (await anext(messages)).headers == {"X": "1"}


@pytest.mark.parametrize(
    "headers",
    [
        {"": "a"},
        {"a b": "c"},
        {"a:": "c"},
        {"ä": "c"},
        {"a": "b\r\nc: d"},
        {"a": "b\n"},
        {"a": "\ud800"},
    ],
)
@guarded
async def test_headers_that_no_message_can_have(make: Maker, headers: dict[str, str]) -> None:
    async with running(make()) as transport, transport.open_subscription("a") as messages:
        with pytest.raises(ValueError, match="header"):
            transport.publish_nowait("a", b"", headers=headers)
        with pytest.raises(ValueError, match="header"):
            await transport.publish("a", b"", headers=headers)
        with pytest.raises(ValueError, match="header"):
            await transport.request("a", b"", timeout=20, headers=headers)
        wrong: Any = {"a": 1}
        with pytest.raises(TypeError, match="header"):
            transport.publish_nowait("a", b"", headers=wrong)
        await transport.publish("a", b"the first to arrive")
        assert (await anext(messages)).data == b"the first to arrive"
        assert transport.generation == 1


@guarded
async def test_headers_count_as_a_part_of_the_message(make: Maker) -> None:
    async with running(make()) as transport, transport.open_subscription("a") as messages:
        long = {"X": "x" * (transport.max_payload - 100)}
        with pytest.raises(ValueError, match=str(transport.max_payload)):
            transport.publish_nowait("a", b"x" * 100, headers=long)
        transport.publish_nowait("a", b"x" * 50, headers=long)
        message = await anext(messages)
        assert message.headers == long
        assert message.data == b"x" * 50


@pytest.mark.parametrize(
    ("block", "status", "headers"),
    [
        (b"NATS/1.0\r\n\r\n", "", {}),
        (b"NATS/1.0 503\r\n\r\n", "503", {}),
        (b"NATS/1.0 100 Idle Heartbeat\r\nA: b\r\n\r\n", "100", {"A": "b"}),
        (b"NATS/1.0\r\nA:b\r\nB :  c \r\n\r\n", "", {"A": "b", "B": "c"}),
        (b"NATS/1.0\r\nA: 1\r\nA: 2\r\na: 3\r\n\r\n", "", {"A": "1, 2", "a": "3"}),
        (b"NATS/1.0\r\nA: 1\r\nA: 1\r\n\r\n", "", {"A": "1"}),
        (b"NATS/1.0\r\nno header\r\nA: \xff\r\n\r\n", "", {"A": "\ufffd"}),
        (b"\xff\x00", "", {}),
        (b"", "", {}),
    ],
)
def test_reading_headers(block: bytes, status: str, headers: dict[str, str]) -> None:
    assert decode_headers(block) == (status, headers)


def test_finding_a_header_in_any_case() -> None:
    headers = {"Nats-Service-Error": "a", "nats-service-error": "b"}
    assert find_header(headers, "Nats-Service-Error") == "a"
    assert find_header(headers, "NATS-SERVICE-ERROR") == "a"
    assert find_header(headers, "other") is None


# Queue groups, and draining.


@guarded
async def test_message_goes_to_one_of_a_queue_group(make: Maker) -> None:
    async with (
        running(make()) as one,
        running(make()) as two,
        one.open_subscription("a.b", queue="q") as first,
        two.open_subscription("a.*", queue="q") as second,
        two.open_subscription("a.b", queue="other") as other,
        one.open_subscription("a.b") as alone,
    ):
        for data in numbers(200):
            await one.publish("a.b", data)
        assert await take(other, 200) == numbers(200)
        assert await take(alone, 200) == numbers(200)
        await one.flush()
        await two.flush()
        shares = [[message.data for message in each.waiting()] for each in (first, second)]
        assert all(shares)
        assert sorted(shares[0] + shares[1]) == sorted(numbers(200))


@guarded
async def test_queue_group_whose_members_leave(make: Maker) -> None:
    async with running(make()) as one, running(make()) as two:
        async with one.open_subscription("a", queue="q") as first:
            async with two.open_subscription("a", queue="q"):
                pass
            # Leaving does not wait until the server knows.
            await two.flush()
            for data in numbers(20):
                await two.publish("a", data)
            assert await take(first, 20) == numbers(20)
        await one.flush()
        with pytest.raises(NoResponders):
            await two.request("a", b"", timeout=20)


@guarded
async def test_names_that_no_queue_group_can_have(make: Maker) -> None:
    async with running(make()) as transport, transport.open_subscription("a") as messages:
        for queue in (" ", "a b", "*", "a.>", "a\r\n", "a..b"):
            with pytest.raises(ValueError, match="queue group"):
                async with transport.open_subscription("a", queue=queue):
                    pass
        await transport.publish("a", b"the first to arrive")
        assert await take(messages, 1) == [b"the first to arrive"]


@guarded
async def test_batch_is_everything_that_has_arrived(make: Maker) -> None:
    async with running(make()) as transport, transport.open_subscription("a") as messages:
        assert messages.waiting() == []
        taken: list[bytes] = []
        for data in numbers(500):
            transport.publish_nowait("a", data)
        while len(taken) < 500:
            batch = await messages.batch()
            assert batch
            taken += [message.data for message in batch]
        assert taken == numbers(500)
        assert messages.waiting() == []


@guarded
async def test_draining_loses_nothing_that_was_sent_to_this_subscription(make: Maker) -> None:
    async with (
        running(make()) as sender,
        running(make()) as receiver,
        running(make()) as other,
        receiver.open_subscription("a", queue="q") as drained,
        other.open_subscription("a", queue="q") as kept,
    ):
        done = trio.Event()

        async def send() -> None:
            for data in numbers(2000):
                await sender.publish("a", data)
            done.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            taken = [message.data for message in await drained.batch()]
            await drained.drain()
            taken += [message.data for message in drained.waiting()]
            await done.wait()
        await sender.flush()
        await other.flush()
        rest = [message.data for message in kept.waiting()]
        assert drained.waiting() == []
        assert sorted(taken + rest) == sorted(numbers(2000))


@guarded
async def test_draining_twice_and_without_a_connection(make: Maker) -> None:
    transport = make()
    async with transport.open_subscription("a") as messages:
        await messages.drain()
        await messages.drain()
        assert messages.waiting() == []


# Requests.


@guarded
async def test_request_that_is_cancelled_leaves_nothing_behind(make: Maker) -> None:
    async with running(make()) as transport, transport.open_subscription("a") as messages:
        given: list[tuple[str, BaseException]] = []
        for timeout in (20, math.inf):
            with trio.move_on_after(0.01):
                await transport.request(
                    "a", b"", timeout=timeout, abandoned=lambda *args: given.append(args)
                )
        replies = [(await anext(messages)).reply for _ in range(2)]
        assert [reply for reply, _ in given] == replies
        assert {type(error) for _, error in given} == {trio.Cancelled}
        assert not transport._requests  # type: ignore[attr-defined]
        # Nobody waits for these any more.
        for reply in replies:
            transport.publish_nowait(reply, b"late")
        await transport.flush()
        await transport.flush()
        if isinstance(transport, NatsTransport):
            await until(lambda: transport.statistics().late_replies == 2)


@guarded
async def test_many_requests_side_by_side_share_their_wake_ups(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    woken = 0
    wake = nats_outgoing.Outgoing._push

    def count(outgoing: nats_outgoing.Outgoing) -> None:
        nonlocal woken
        woken += 1
        wake(outgoing)

    monkeypatch.setattr(nats_outgoing.Outgoing, "_push", count)
    async with NatsServer() as server:
        config = BackbeatConfig(nats_url=server.url, agent_id="conformance")
        async with running(NatsTransport(config)) as transport, answering(transport, "echo"):
            before = woken
            async with trio.open_nursery() as nursery:
                for number in range(256):
                    nursery.start_soon(
                        partial(transport.request, "echo", b"%d" % number, timeout=50)
                    )
            # 256 requests, 256 answers, and no more than a few of them at a time alone.
            assert woken - before < 128


@guarded
async def test_request_brings_the_answer_with_its_stamps(make: Maker) -> None:
    async with running(make()) as asker, running(make()) as other, answering(other, "echo"):
        for data in numbers(100):
            before = local_ns()
            reply = await asker.request("echo", data, timeout=20)
            after = local_ns()
            assert reply.data == data
            assert reply.sent_ns <= reply.received_ns
            assert before - _CARRY <= reply.sent_ns
            assert reply.received_ns <= after + _CARRY


@guarded
async def test_answer_is_for_its_own_request(make: Maker) -> None:
    answers: dict[bytes, bytes] = {}

    async def ask(transport: Transport, data: bytes) -> None:
        answers[data] = (await transport.request("echo", data, timeout=20)).data

    async with (
        running(make()) as asker,
        running(make()) as other,
        answering(other, "echo"),
        trio.open_nursery() as nursery,
    ):
        for data in numbers(100):
            nursery.start_soon(ask, asker, data)
    assert answers == {data: data for data in numbers(100)}


@guarded
async def test_request_that_nobody_hears(make: Maker) -> None:
    async with running(make()) as transport:
        with pytest.raises(NoResponders, match="nobody"):
            await transport.request("nobody", b"", timeout=20)


@guarded
async def test_request_that_nobody_answers(make: Maker) -> None:
    async with (
        running(make()) as transport,
        transport.open_subscription("a") as messages,
        answering(transport, "echo"),
    ):
        with pytest.raises(TransportBroken, match=r"no answer on a within 0\.01 s") as caught:
            await transport.request("a", b"", timeout=0.01)
        assert not isinstance(caught.value, NoResponders)
        # An answer that is late is nobody's.
        late = await anext(messages)
        await transport.publish(late.reply, b"late")
        assert (await transport.request("echo", b"in time", timeout=20)).data == b"in time"


@guarded
async def test_first_of_several_answers(make: Maker) -> None:
    async with (
        running(make()) as transport,
        answering(transport, "echo"),
        answering(transport, "echo"),
    ):
        for data in numbers(20):
            assert (await transport.request("echo", data, timeout=20)).data == data


# The connection's state.


@guarded
async def test_before_it_runs(make: Maker) -> None:
    transport = make()
    assert not transport.connected
    assert transport.generation == 0
    assert transport.statistics().connects == 0
    with pytest.raises(TransportBroken):
        transport.publish_nowait("a", b"")
    with pytest.raises(TransportBroken):
        await transport.publish("a", b"")
    with pytest.raises(TransportBroken):
        await transport.flush()
    with pytest.raises(TransportBroken):
        await transport.request("a", b"", timeout=20)
    await transport.wait_connected(False)
    await transport.aclose()


@guarded
async def test_connection_is_told(make: Maker) -> None:
    transport = make()
    async with trio.open_nursery() as nursery:
        await nursery.start(transport.run)
        await transport.first_attempt()
        await transport.wait_connected()
        assert transport.connected
        assert transport.generation == 1
        assert transport.max_payload == 1024 * 1024
        statistics = transport.statistics()
        assert statistics.connects == 1
        assert statistics.last_error is None
        assert statistics.recent_errors == ()
        await transport.aclose()
        assert not transport.connected
        await transport.wait_connected(False)
        assert transport.generation == 1


@guarded
async def test_subscription_made_before_it_runs(make: Maker) -> None:
    transport = make()
    async with transport.open_subscription("a") as messages, running(transport):
        await transport.publish("a", b"1")
        assert await take(messages, 1) == [b"1"]


@guarded
async def test_awaiting_is_a_checkpoint(make: Maker) -> None:
    async with (
        running(make()) as transport,
        running(make()) as other,
        answering(other, "echo"),
    ):
        with trio.testing.assert_checkpoints():
            await transport.publish("a", b"")
        with trio.testing.assert_checkpoints():
            await transport.flush()
        with trio.testing.assert_checkpoints():
            await transport.request("echo", b"", timeout=20)
        with trio.testing.assert_checkpoints():
            await transport.wait_connected()
        with trio.testing.assert_checkpoints():
            await transport.first_attempt()
        subscription = transport.open_subscription("a")
        with trio.testing.assert_checkpoints():
            messages = await subscription.__aenter__()
        received = transport.statistics().received
        await transport.publish("a", b"")
        await until(lambda: transport.statistics().received == received + 1)
        with trio.testing.assert_checkpoints():
            await anext(messages)
        await subscription.__aexit__(None, None, None)
        with trio.testing.assert_checkpoints():
            await transport.aclose()
        with trio.testing.assert_checkpoints():
            await transport.aclose()


# Closing.


async def refuses(transport: Transport) -> None:
    """Check that nothing can be done with a transport any more."""
    with pytest.raises(TransportClosed):
        transport.publish_nowait("a", b"")
    with pytest.raises(TransportClosed):
        await transport.publish("a", b"")
    with pytest.raises(TransportClosed):
        await transport.flush()
    with pytest.raises(TransportClosed):
        await transport.request("a", b"", timeout=20)
    with pytest.raises(TransportClosed):
        async with transport.open_subscription("a"):
            pass
    with pytest.raises(TransportClosed):
        await transport.run()
    assert not transport.connected
    transport.statistics()


@guarded
async def test_use_after_closing(make: Maker) -> None:
    async with running(make()) as transport:
        await transport.aclose()
        await refuses(transport)
        await transport.aclose()
        await refuses(transport)


@guarded
async def test_closing_before_it_runs(make: Maker) -> None:
    transport = make()
    await transport.aclose()
    await transport.aclose()
    await refuses(transport)


@guarded
async def test_waiting_for_the_connection_of_a_closed_transport(make: Maker) -> None:
    # It will never stand again: whoever waits for it must learn that.
    async with running(make()) as transport:
        await transport.aclose()
        with pytest.raises(TransportClosed):
            await transport.wait_connected()


@guarded
async def test_closing_ends_the_wait_for_a_connection(make: Maker) -> None:
    transport = make()
    async with trio.open_nursery() as nursery:

        async def wait() -> None:
            with pytest.raises(TransportClosed):
                await transport.wait_connected()

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        await transport.aclose()


@guarded
async def test_closing_ends_run(make: Maker) -> None:
    transport = make()
    async with trio.open_nursery() as nursery:
        await nursery.start(transport.run)
        await transport.wait_connected()
        await transport.aclose()
    # Left without a cancellation: `run` has returned.


@guarded
async def test_closing_while_cancelled(make: Maker) -> None:
    async with trio.open_nursery() as nursery:
        transport = make()
        await nursery.start(transport.run)
        await transport.wait_connected()
        with trio.CancelScope() as scope:
            scope.cancel()
            await transport.aclose()
        await refuses(transport)
        # And again.
        with trio.CancelScope() as scope:
            scope.cancel()
            await transport.aclose()
        nursery.cancel_scope.cancel()
    assert not client_threads()


@guarded
async def test_closing_ends_iteration_after_what_had_arrived(make: Maker) -> None:
    async with (
        running(make()) as transport,
        transport.open_subscription("a") as busy,
        transport.open_subscription("b") as idle,
    ):
        await transport.publish("a", b"1")
        await transport.publish("a", b"2")
        await until(lambda: transport.statistics().received == 2)
        async with trio.open_nursery() as nursery:

            async def waits() -> None:
                with pytest.raises(TransportClosed):
                    await anext(idle)

            nursery.start_soon(waits)
            await trio.testing.wait_all_tasks_blocked(0.01)
            await transport.aclose()
        assert await take(busy, 2) == [b"1", b"2"]
        for messages in (busy, idle, busy):
            with pytest.raises(TransportClosed):
                await anext(messages)


@guarded
async def test_closing_ends_a_request_under_way(make: Maker) -> None:
    # You closed it: that is no failure of the connection's.
    async with (
        running(make()) as transport,
        transport.open_subscription("a") as requests,
        trio.open_nursery() as nursery,
    ):

        async def ask() -> None:
            with pytest.raises(TransportClosed):
                await transport.request("a", b"", timeout=1000)

        nursery.start_soon(ask)
        await anext(requests)
        await transport.aclose()


@guarded
async def test_cancelling_run_releases_everything(make: Maker) -> None:
    # At every point of its start, too; sockets left open show as resource warnings.
    dice = random.Random(0)
    for attempt in range(60):
        transport = make()
        async with transport.open_subscription("a") as messages:
            async with trio.open_nursery() as nursery:
                await nursery.start(transport.run)
                if attempt < 15:
                    for _ in range(attempt):
                        await trio.lowlevel.checkpoint()
                elif attempt < 55:
                    await trio.sleep(dice.uniform(0, 0.01))
                else:
                    await transport.wait_connected()
                nursery.cancel_scope.cancel()
            assert not client_threads()
            with pytest.raises(TransportClosed):
                await anext(messages)
            await refuses(transport)


# Cancellation.


async def _open_and_leave(transport: Transport) -> None:
    async with transport.open_subscription("noise.1"):
        pass


async def _step(transport: Transport) -> None:
    async with transport.open_subscription("noise.2") as messages:
        await anext(messages)


CANCELLABLE: Final[dict[str, Callable[[Transport], Awaitable[object]]]] = {
    "publish": lambda transport: transport.publish("noise.3", b"x" * 1000),
    "flush": lambda transport: transport.flush(),
    "request-answered": lambda transport: transport.request("echo", b"", timeout=20),
    "request-unanswered": lambda transport: transport.request("silent", b"", timeout=20),
    "step": _step,
    "wait-connected": lambda transport: transport.wait_connected(),
    "wait-disconnected": lambda transport: transport.wait_connected(False),
    "first-attempt": lambda transport: transport.first_attempt(),
    "open-subscription": _open_and_leave,
}


@pytest.mark.parametrize("name", CANCELLABLE)
@guarded
async def test_cancelling_leaves_the_transport_sound(make: Maker, name: str) -> None:
    # nats-py stops reading when certain calls are cut short; nothing of that may show here.
    dice = random.Random(name)
    async with (
        running(make()) as transport,
        running(make()) as other,
        answering(other, "echo"),
        other.open_subscription("silent"),
        transport.open_subscription("a") as messages,
    ):
        for number in range(150):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(CANCELLABLE[name], transport)
                # At every point on the way: before its first step, between two, and while the
                # answer is on its way from the thread.
                if number % 3 == 2:
                    await trio.sleep(dice.uniform(0, 0.003))
                else:
                    for _ in range(number % 10):
                        await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
        for data in numbers(100):
            await other.publish("a", data)
        assert await take(messages, 100) == numbers(100)
        await transport.flush()
        assert (await transport.request("echo", b"sound", timeout=20)).data == b"sound"
        assert transport.connected
        assert transport.generation == 1
        # No subscription is left behind on the server.
        for subject in ("noise.1", "noise.2"):
            with pytest.raises(NoResponders):
                await transport.request(subject, b"", timeout=20)


@guarded
async def test_cancelled_steps_lose_no_message(make: Maker) -> None:
    taken: list[bytes] = []
    async with running(make()) as transport, transport.open_subscription("a") as messages:

        async def step() -> None:
            taken.append((await anext(messages)).data)

        for number, data in enumerate(numbers(300)):
            await transport.publish("a", data)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(step)
                for _ in range(number % 5):
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
        while len(taken) < 300:
            await step()
    assert taken == numbers(300)


@guarded
async def test_cancelled_publish_sends_nothing(make: Maker) -> None:
    published = 0
    async with running(make()) as transport, transport.open_subscription("a") as messages:

        async def publish(data: bytes) -> None:
            nonlocal published
            await transport.publish("a", data)
            published += 1

        for number, data in enumerate(numbers(200)):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(publish, data)
                for _ in range(number % 3):
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
        await transport.publish("a", b"end")
        received = 0
        async for message in messages:
            if message.data == b"end":
                break
            received += 1
    assert 0 < published < 200
    assert received == published


# Subjects.

tokens = st.text("abc", min_size=1, max_size=2)
subjects = st.lists(tokens, min_size=1, max_size=5).map(".".join)
patterns = st.builds(
    lambda head, tail: ".".join([*head, *tail]),
    st.lists(tokens | st.just("*"), max_size=4),
    st.sampled_from([[">"], ["*"], ["a"]]),
)


def matches_by_the_book(pattern: list[str], subject: list[str]) -> bool:
    if not pattern or not subject:
        return pattern == subject
    if pattern == [">"]:
        return True
    return pattern[0] in ("*", subject[0]) and matches_by_the_book(pattern[1:], subject[1:])


@given(patterns, subjects)
def test_matches_as_the_book_says(pattern: str, subject: str) -> None:
    assert matches(pattern, subject) is matches_by_the_book(pattern.split("."), subject.split("."))


@given(subjects, st.data())
def test_pattern_made_of_a_subject_matches_it(subject: str, data: st.DataObject) -> None:
    split = subject.split(".")
    stars = [data.draw(st.sampled_from([token, "*"])) for token in split]
    kept = data.draw(st.integers(0, len(split) - 1))
    assert matches(subject, subject)
    assert matches(".".join(stars), subject)
    assert matches(".".join([*stars[:kept], ">"]), subject)
    # `>` stands for one token at least.
    assert not matches(".".join([*split, ">"]), subject)
    assert not matches(".".join([*split, "*"]), subject)


@given(subjects)
def test_subjects_are_fine_to_publish_on(subject: str) -> None:
    check_subject(subject)


@given(st.text())
def test_whatever_passes_is_one_line_of_plain_tokens(text: str) -> None:
    try:
        check_subject(text)
    except ValueError:
        return
    assert not any(character.isspace() for character in text)
    assert not {"", "*", ">"} & set(text.split("."))
    assert text.encode()


@pytest.mark.parametrize("subject", [*_NO_SUBJECTS, "a\x00b", "a\x7f", "\ud800", "a\u2028b", " "])
def test_no_subjects_to_publish_on(subject: str) -> None:
    with pytest.raises(ValueError, match="not a subject"):
        check_subject(subject)


# The in-process bus only.


@guarded
async def test_severed_transport_is_like_one_without_a_server() -> None:
    bus = MemoryBus()
    async with (
        running(MemoryTransport(bus)) as one,
        running(MemoryTransport(bus)) as two,
        one.open_subscription("a") as messages,
        two.open_subscription("b") as others,
    ):
        one.sever()
        assert not one.connected
        await one.wait_connected(False)
        assert one.statistics().last_error == "the connection was severed"
        assert [text for _, text in one.statistics().recent_errors] == [
            "the connection was severed"
        ]
        with pytest.raises(TransportBroken, match="severed"):
            one.publish_nowait("b", b"")
        with pytest.raises(TransportBroken, match="severed"):
            await one.publish("b", b"")
        with pytest.raises(TransportBroken, match="severed"):
            await one.flush()
        with pytest.raises(TransportBroken, match="severed"):
            await one.request("b", b"", timeout=1)
        # What is sent meanwhile passes it by, and nobody answers for it.
        await two.publish("a", b"unheard")
        with pytest.raises(NoResponders):
            await two.request("a", b"", timeout=1)
        async with one.open_subscription("c") as opened_meanwhile:
            one.restore()
            assert one.connected
            assert one.generation == 2
            assert one.statistics().connects == 2
            assert one.statistics().last_error is None
            await two.publish("c", b"1")
            assert await take(opened_meanwhile, 1) == [b"1"]
        # Its subscriptions have lived on.
        await two.publish("a", b"heard")
        assert await take(messages, 1) == [b"heard"]
        await one.publish("b", b"back")
        assert await take(others, 1) == [b"back"]


async def test_waiting_through_an_outage(autojump_clock: trio.testing.MockClock) -> None:
    seen: list[tuple[float, bool]] = []
    async with running(MemoryTransport(MemoryBus())) as transport, trio.open_nursery() as nursery:
        started = trio.current_time()

        async def watch() -> None:
            for connected in (False, True):
                await transport.wait_connected(connected)
                seen.append((trio.current_time() - started, connected))

        nursery.start_soon(watch)
        await trio.sleep(3)
        transport.sever()
        await trio.sleep(4)
        transport.restore()
    assert seen == [(3.0, False), (7.0, True)]


async def test_closed_transport_cannot_be_restored() -> None:
    transport = MemoryTransport(MemoryBus())
    async with running(transport):
        await transport.aclose()
        with pytest.raises(TransportClosed):
            transport.restore()
        assert not transport.connected


async def test_delivery_takes_no_time(autojump_clock: trio.testing.MockClock) -> None:
    bus = MemoryBus()
    async with (
        running(MemoryTransport(bus)) as one,
        running(MemoryTransport(bus)) as two,
        two.open_subscription("a") as messages,
        answering(two, "echo"),
    ):
        await trio.sleep(5)
        now = trio.current_time()
        await one.publish("a", b"")
        assert (await anext(messages)).received_ns == local_ns()
        reply = await one.request("echo", b"", timeout=1)
        assert reply.sent_ns == reply.received_ns == local_ns()
        assert trio.current_time() == now


async def test_request_times_out_to_the_instant(autojump_clock: trio.testing.MockClock) -> None:
    async with (
        running(MemoryTransport(MemoryBus())) as transport,
        transport.open_subscription("a"),
    ):
        started = trio.current_time()
        with pytest.raises(TransportBroken, match=r"within 2\.5 s"):
            await transport.request("a", b"", timeout=2.5)
        assert trio.current_time() - started == 2.5


async def test_buses_of_different_names_are_apart() -> None:
    async with (
        open_memory_bus("one") as one,
        open_memory_bus("one") as same,
        open_memory_bus("two") as two,
    ):
        assert one is same
        assert one is not two
        async with (
            running(MemoryTransport(one)) as here,
            running(MemoryTransport(two)) as there,
            here.open_subscription(">"),
        ):
            with pytest.raises(NoResponders):
                await there.request("a", b"", timeout=1)
    # Nobody had it open any more.
    async with open_memory_bus("one") as fresh:
        assert fresh is not one


async def test_two_sessions_meet_on_one_bus(autojump_clock: trio.testing.MockClock) -> None:
    async with (
        open_session(nats_url="memory://shared", agent_id="one", tempo_bpm=60.0) as one,
        open_session(nats_url="memory://shared", agent_id="two", tempo_bpm=90.0) as two,
        one.open_claims("two") as claims,
    ):
        # The second joins the grid of the first.
        assert two.tempo_bpm == 60.0
        await one.sleep_until(3)
        assert two.current_position() == one.current_position() == 3.0
        two.start_operation("election", id="job")
        assert (await anext(claims)).task_id == "job"


async def test_hearing_of_claims_goes_on_after_a_cancelled_step(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_session(tempo_bpm=60.0) as bb, bb.open_claims() as claims:
        with trio.move_on_after(0.5) as scope:
            await anext(claims)
        assert scope.cancelled_caught
        bb.start_operation("election", id="job")
        assert (await anext(claims)).task_id == "job"
