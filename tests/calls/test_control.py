"""Operations that are cancelled from outside: what the block, its claims and the asker see."""

from __future__ import annotations

import contextlib
import json
import logging
import pickle
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from helpers import guarded, leading_at, until

from backbeat_trio import (
    BackbeatError,
    BeatBudgetExceeded,
    CancelRefused,
    NoResponders,
    OperationCancelled,
    OperationNotFound,
    Session,
    SessionClosed,
    TransportBroken,
)
from backbeat_trio._transport.memory import MemoryBus, MemoryTransport
from backbeat_trio._wire import ControlReply, ControlRequest, decode_control_reply, encode
from backbeat_trio.testing import NatsServer, open_recorder, open_session

Clock = trio.testing.MockClock
AGENT: Any = {"agent_id": "agent", "node_id": "node"}


@asynccontextmanager
async def open_pair(**settings: Any) -> AsyncGenerator[tuple[Session, Session], None]:
    """Open the session of an agent and that of an operator, on one bus."""
    name = "memory://control"
    async with (
        open_session(nats_url=name, tempo_bpm=60.0, **(AGENT | settings)) as agent,
        open_session(nats_url=name, agent_id="operator", tempo_bpm=60.0) as operator,
    ):
        yield agent, operator


class Block:
    """A task in the block of an operation, which waits until it is cancelled."""

    def __init__(self, bb: Session, nursery: trio.Nursery, **options: Any) -> None:
        self.bb = bb
        self.options: dict[str, Any] = {"id": "job", "cancellable": True} | options
        self.entered = trio.Event()
        self.left = trio.Event()
        self.error: BaseException | None = None
        nursery.start_soon(self.run)

    async def work(self) -> None:
        await trio.sleep_forever()

    async def run(self) -> None:
        try:
            async with self.bb.operation("election", **self.options):
                self.entered.set()
                await self.work()
        except BackbeatError as error:
            self.error = error
        self.left.set()


async def test_an_operation_is_cancelled_and_fails_for_the_reason_that_was_given(
    autojump_clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "backbeat_trio")
    async with (
        open_pair() as (agent, operator),
        open_recorder(operator) as claims,
        trio.open_nursery() as nursery,
    ):
        block = Block(agent, nursery)
        await block.entered.wait()
        await operator.cancel_remote("agent", "job", "the disk is full")
        await block.left.wait()
        assert isinstance(block.error, OperationCancelled)
        assert (block.error.reason, block.error.asked_by) == ("the disk is full", "operator")
        text = "operation 'job' was cancelled by operator: the disk is full"
        assert str(block.error) == text
        assert block.error.__suppress_context__
        again = pickle.loads(pickle.dumps(block.error))
        assert (str(again), again.reason) == (text, "the disk is full")
        claim = await claims.wait_for("job", "failed")
        assert claim.notes == "P2P operation failed: the disk is full (type: election)"
        assert agent.statistics().operations_cancelled == 1
        assert agent.health().active_operations == 0
        with pytest.raises(OperationNotFound, match="agent agent has no live operation 'job'"):
            await operator.cancel_remote("agent", "job", "again")
    (line,) = [record for record in caplog.records if "request of" in record.message]
    assert (line.levelname, line.message) == (
        "INFO",
        "operation 'job' is cancelled at the request of 'operator': 'the disk is full'",
    )


async def test_an_agent_cancels_an_operation_of_its_own(autojump_clock: Clock) -> None:
    async with open_session(**AGENT) as bb, trio.open_nursery() as nursery:
        block = Block(bb, nursery)
        await block.entered.wait()
        await bb.cancel_remote("agent", "job", "why not")
        await block.left.wait()
        assert isinstance(block.error, OperationCancelled)
        assert block.error.asked_by == "agent"


async def test_nothing_is_subscribed_to_unless_an_operation_asks_for_it(
    autojump_clock: Clock,
) -> None:
    async with open_pair() as (agent, operator):
        subjects = _bus_of(agent).subjects
        assert not [subject for subject in subjects if "control" in subject]
        async with agent.operation("election", id="plain"):
            with pytest.raises(NoResponders, match="agent agent takes no requests: it is not runn"):
                await operator.cancel_remote("agent", "plain", "why not")
        with pytest.raises(NoResponders, match="agent nobody takes"):
            await operator.cancel_remote("nobody", "plain", "why not")
        # It is subscribed when the block begins, and stays so.
        async with agent.operation("election", id="job", cancellable=True):
            subjects = _bus_of(agent).subjects
            assert "backbeat.control.agent" in subjects
        with pytest.raises(OperationNotFound):
            await operator.cancel_remote("agent", "job", "why not")
        async with (
            agent.operation("election", id="plain"),
            agent.operation("election", cancellable=True),
        ):
            agent.start_operation("election", id="no block")
            for id in ("plain", "no block"):
                with pytest.raises(CancelRefused, match=f"'{id}': the operation was not opened"):
                    await operator.cancel_remote("agent", id, "why not")
        assert agent.statistics().operations_cancelled == 0
        subjects = _bus_of(agent).subjects
        assert subjects.count("backbeat.control.agent") == 1


def _bus_of(bb: Session) -> MemoryBus:
    transport = bb._runtime.transport
    assert isinstance(transport, MemoryTransport)
    return transport.bus


async def test_shielded_clean_up_runs_to_its_end(autojump_clock: Clock) -> None:
    done: list[str] = []

    class CleaningBlock(Block):
        async def work(self) -> None:
            with self.bb.move_on_after(100) as scope:
                try:
                    await trio.sleep_forever()
                finally:
                    with trio.CancelScope(shield=True):
                        await trio.sleep(5)
                        done.append("shielded")
                    with scope.clean_up(beats=2):
                        await self.bb.sleep(1)
                        done.append("clean_up")
                    await trio.sleep(1)
                    done.append("not reached")  # pragma: no cover

    async with (
        open_pair() as (agent, operator),
        open_recorder(operator) as claims,
        trio.open_nursery() as nursery,
    ):
        block = CleaningBlock(agent, nursery)
        await block.entered.wait()
        began = trio.current_time()
        await operator.cancel_remote("agent", "job", "the disk is full")
        # The answer does not wait for the clean-up.
        assert trio.current_time() == began
        assert done == []
        assert agent.health().active_operations == 1
        # The first reason counts, and a second request is none that fails.
        await operator.cancel_remote("agent", "job", "a second thought")
        await block.left.wait()
        assert trio.current_time() == began + 6
        assert done == ["shielded", "clean_up"]
        assert isinstance(block.error, OperationCancelled)
        claim = await claims.wait_for("job", "failed")
        assert claim.notes == "P2P operation failed: the disk is full (type: election)"
        assert agent.statistics().operations_cancelled == 1


async def test_requests_at_once_are_all_done(autojump_clock: Clock) -> None:
    class SlowBlock(Block):
        async def work(self) -> None:
            try:
                await trio.sleep_forever()
            finally:
                with trio.CancelScope(shield=True):
                    await trio.sleep(1)

    async with open_pair() as (agent, operator), trio.open_nursery() as nursery:
        block = SlowBlock(agent, nursery)
        await block.entered.wait()
        async with trio.open_nursery() as askers:
            for number in range(20):
                askers.start_soon(operator.cancel_remote, "agent", "job", f"reason {number}")
        assert not block.left.is_set()
        await block.left.wait()
        assert isinstance(block.error, OperationCancelled)
        assert block.error.reason.startswith("reason ")
        assert agent.statistics().operations_cancelled == 1


async def test_an_operation_that_is_being_left_completes_all_the_same(
    autojump_clock: Clock,
) -> None:
    class FinishingBlock(Block):
        async def work(self) -> None:
            # The request comes while no checkpoint is left.
            with trio.CancelScope(shield=True):
                await finish.wait()

    finish = trio.Event()
    async with (
        open_pair() as (agent, operator),
        open_recorder(operator) as claims,
        trio.open_nursery() as nursery,
    ):
        block = FinishingBlock(agent, nursery)
        await block.entered.wait()
        await operator.cancel_remote("agent", "job", "too late")
        finish.set()
        await block.left.wait()
        assert block.error is None
        await claims.wait_for("job", "done")


async def test_requests_that_race_with_the_end_of_the_operation(autojump_clock: Clock) -> None:
    # Whatever comes first: the claim, the block and the answer agree, and nobody hangs.
    async with open_pair() as (agent, operator), open_recorder(operator) as claims:
        outcomes = set()
        for number in range(200):

            class RacingBlock(Block):
                async def work(self) -> None:
                    for _ in range(int(self.options["data"])):
                        await trio.lowlevel.checkpoint()

            async with trio.open_nursery() as nursery:
                block = RacingBlock(agent, nursery, id=f"job-{number}", data=number % 20)
                await block.entered.wait()
                try:
                    await operator.cancel_remote("agent", f"job-{number}", "why not")
                    answer = "done"
                except OperationNotFound:
                    answer = "not found"
                await block.left.wait()
            was_cut = isinstance(block.error, OperationCancelled)
            await claims.wait_for(f"job-{number}", "failed" if was_cut else "done")
            outcomes.add((answer, was_cut))
        assert outcomes >= {("done", True), ("not found", False)}
        assert ("not found", True) not in outcomes


async def test_an_operation_that_has_ended_in_its_block_cannot_be_cancelled(
    autojump_clock: Clock,
) -> None:
    async with open_pair() as (agent, operator):
        async with agent.operation("election", id="job", cancellable=True) as first:
            first.complete()
            with pytest.raises(OperationNotFound):
                await operator.cancel_remote("agent", "job", "why not")
            # A later one of the same id is another one.
            with pytest.raises(OperationCancelled):
                async with agent.operation("election", id="job", cancellable=True):
                    await operator.cancel_remote("agent", "job", "why not")
                    await trio.sleep_forever()
            await trio.lowlevel.checkpoint()
            agent.start_operation("election", id="job")
            with pytest.raises(CancelRefused):
                await operator.cancel_remote("agent", "job", "why not")
        with pytest.raises(OperationCancelled):
            async with agent.operation("election", id="again", cancellable=True) as operation:
                try:
                    await operator.cancel_remote("agent", "again", "why not")
                    await trio.sleep_forever()
                finally:
                    operation.fail("for a reason of its own")


async def test_children_are_cancelled_with_their_parent(autojump_clock: Clock) -> None:
    class Parent(Block):
        async def work(self) -> None:
            self.bb.start_operation("election", id="no block")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.child, "one", True)
                nursery.start_soon(self.child, "two", False)
                with self.bb.detached():
                    async with self.bb.operation("election", id="detached"):
                        await self.bb.sleep(3)

        async def child(self, id: str, cancellable: bool) -> None:
            async with self.bb.operation("election", id=id, cancellable=cancellable):
                await trio.sleep_forever()

    async with (
        open_pair() as (agent, operator),
        open_recorder(operator) as claims,
        trio.open_nursery() as nursery,
    ):
        block = Parent(agent, nursery, id="parent")
        await claims.wait_for("two", "executing")
        await claims.wait_for("one", "executing")
        await operator.cancel_remote("agent", "parent", "enough")
        await block.left.wait()
        assert isinstance(block.error, OperationCancelled)
        failed = "P2P operation failed: {} (type: election)"
        for id, reason in (
            ("one", "cancelled: enough"),
            ("two", "cancelled: enough"),
            ("parent", "enough"),
        ):
            assert (await claims.wait_for(id, "failed")).notes == failed.format(reason)
        await claims.wait_for("detached", "done")
        assert [operation.id for operation in agent._runtime.operations.live()] == ["no block"]


async def test_the_parent_of_a_cancelled_operation_goes_on_if_it_catches_the_error(
    autojump_clock: Clock,
) -> None:
    async with (
        open_pair() as (agent, operator),
        open_recorder(operator) as claims,
    ):
        async with agent.operation("election", id="parent", cancellable=True):
            with pytest.raises(OperationCancelled):
                async with agent.operation("election", id="child", cancellable=True):
                    await operator.cancel_remote("agent", "child", "enough")
                    await trio.sleep_forever()
            await trio.lowlevel.checkpoint()
        await claims.wait_for("parent", "done")
        with pytest.raises(OperationCancelled):
            async with agent.operation("election", id="other", cancellable=True):
                async with agent.operation("election", id="child", cancellable=True):
                    await operator.cancel_remote("agent", "child", "enough")
                    await trio.sleep_forever()
        # The reason was that of the child.
        assert (await claims.wait_for("other", "failed")).notes == (
            "P2P operation failed: OperationCancelled: operation 'child' was cancelled by "
            "operator: enough (type: election)"
        )


async def test_a_block_inside_of_a_shield_is_cancelled(autojump_clock: Clock) -> None:
    async with open_pair() as (agent, operator), trio.open_nursery() as nursery:
        with trio.CancelScope(shield=True):
            block = Block(agent, nursery)
            await block.entered.wait()
            with pytest.raises(OperationCancelled):
                async with agent.operation("election", id="shielded", cancellable=True):
                    await operator.cancel_remote("agent", "shielded", "why not")
                    await trio.sleep_forever()
        assert not block.left.is_set()
        await operator.cancel_remote("agent", "job", "why not")


async def test_budgets_and_cancellations_around_it(autojump_clock: Clock) -> None:
    async with open_pair() as (agent, operator), open_recorder(operator) as claims:
        options: dict[str, Any] = {"beats": 5, "enforce": True, "cancellable": True}
        # The budget runs out first.
        with pytest.raises(BeatBudgetExceeded):
            async with agent.operation("election", **options):
                await trio.sleep_forever()
        # The request comes first, and the budget runs out during the clean-up.
        with pytest.raises(OperationCancelled):
            async with agent.operation("election", id="job", **options):
                await operator.cancel_remote("agent", "job", "enough")
                with trio.CancelScope(shield=True):
                    await agent.sleep(6)
                await trio.sleep_forever()
        assert "failed: enough (" in (await claims.wait_for("job", "failed")).notes
        # A cancellation from further outside leaves as itself.
        with trio.CancelScope() as outer:
            async with agent.operation("election", id="outer", cancellable=True):
                outer.cancel("over")
                await trio.sleep_forever()
        assert outer.cancelled_caught
        assert "failed: cancelled: over (" in (await claims.wait_for("outer", "failed")).notes


async def test_an_exception_of_the_block_leaves_as_itself(autojump_clock: Clock) -> None:
    async with open_pair() as (agent, operator), open_recorder(operator) as claims:
        with pytest.raises(ValueError, match="during the clean-up"):
            async with agent.operation("election", id="job", cancellable=True):
                try:
                    await operator.cancel_remote("agent", "job", "enough")
                    await trio.sleep_forever()
                finally:
                    raise ValueError("during the clean-up")
        claim = await claims.wait_for("job", "failed")
        assert claim.notes == (
            "P2P operation failed: ValueError: during the clean-up (type: election)"
        )


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        (("a.b", "job", "why"), ValueError, "`agent_id` must be a subject token"),
        (("*", "job", "why"), ValueError, "`agent_id` must be a subject token"),
        ((7, "job", "why"), TypeError, "`agent_id` must be a str"),
        (("agent", "", "why"), ValueError, "`id` must not be empty"),
        (("agent", "x" * 1001, "why"), ValueError, "`id` must have at most 1000 characters"),
        (("agent", 7, "why"), TypeError, "`id` must be a str"),
        (("agent", "job", ""), ValueError, "`reason` must not be empty"),
        (("agent", "job", "x" * 1001), ValueError, "`reason` must have at most 1000 characters"),
        (("agent", "job", None), TypeError, "`reason` must be a str"),
        (("agent", "job", "\udcff"), ValueError, "surrogates not allowed"),
    ],
)
async def test_arguments_that_are_refused(
    arguments: Any, kind: type[Exception], text: str, autojump_clock: Clock
) -> None:
    async with open_session(**AGENT) as bb:
        with pytest.raises(kind, match=text):
            await bb.cancel_remote(*arguments)


async def test_names_and_reasons_of_any_kind_and_of_the_greatest_length(
    autojump_clock: Clock,
) -> None:
    async with open_pair() as (agent, operator), trio.open_nursery() as nursery:
        id, reason = "\N{SNOWMAN}\n\0" + 997 * "x", 1000 * "\N{PILE OF POO}"
        block = Block(agent, nursery, id=id)
        await block.entered.wait()
        await operator.cancel_remote("agent", id, reason)
        await block.left.wait()
        assert isinstance(block.error, OperationCancelled)
        assert block.error.reason == reason


async def test_requests_that_are_not_valid(autojump_clock: Clock) -> None:
    async with open_pair() as (agent, operator), trio.open_nursery() as nursery:
        block = Block(agent, nursery)
        await block.entered.wait()
        transport = operator._runtime.transport
        assert transport is not None
        subject = "backbeat.control.agent"
        request = ControlRequest("test-cluster", "cancel", "job", "why not", "me")
        plain = msgspec.to_builtins(request)
        wrong: list[Any] = [
            {"type": "backbeat.control.v2"},
            {"operation_id": ""},
            {"operation_id": "x" * 1001},
            {"reason": ""},
            {"reason": "x" * 1001},
            {"reason": None},
            {"asked_by": "x" * 129},
            {"action": "x" * 129},
            {"cluster_id": "x" * 129},
        ]
        payloads = [b"", b"[]", b"\xff", json.dumps(plain | {"reason": "\ud800"}).encode()]
        payloads += [json.dumps(plain | change).encode() for change in wrong]
        for payload in payloads:
            transport.publish_nowait(subject, payload, reply="_INBOX.x")
        # Whoever cannot be answered, or has somebody else's subject for the answer, gets nothing.
        for reply in ("", "backbeat.beat.test-cluster", "$KV.x"):
            transport.publish_nowait(subject, encode(request), reply=reply)
        await trio.testing.wait_all_tasks_blocked()
        assert agent.statistics().controls_undecodable == len(payloads) + 3
        # That of another cluster is for its own agent of this id.
        foreign = msgspec.structs.replace(request, cluster_id="another")
        async with transport.open_request(subject, encode(foreign)) as answers:
            with trio.move_on_after(1) as silence:
                await anext(answers)
        assert silence.cancelled_caught
        assert not block.left.is_set()
        unknown = msgspec.structs.replace(request, action="restart")
        answer = await transport.request(subject, encode(unknown), timeout=1)
        assert decode_control_reply(answer.data) == ControlReply(
            *("test-cluster", "agent", False),
            code="unknown_action",
            error="this agent does not know the action",
        )
        assert not block.left.is_set()
        answer = await transport.request(subject, encode(request), timeout=1)
        assert decode_control_reply(answer.data) == ControlReply("test-cluster", "agent", True)
        await block.left.wait()


@pytest.mark.parametrize(
    ("answer", "kind", "text"),
    [
        (b"nonsense", TransportBroken, "the answer of agent other is not valid"),
        (
            encode(ControlReply("c", "other", False, "rate_limited", "come back later")),
            CancelRefused,
            "refused to cancel operation 'job': come back later",
        ),
        (encode(ControlReply("c", "other", False, "busy")), CancelRefused, "'job': busy"),
        (encode(ControlReply("c", "other", False)), CancelRefused, "it gave no reason"),
        (None, TransportBroken, "did not say whether the operation was cancelled: no answer"),
    ],
)
async def test_answers_that_are_not_expected(
    answer: bytes | None, kind: type[Exception], text: str, autojump_clock: Clock
) -> None:
    async with open_session(**AGENT) as bb, trio.open_nursery() as nursery:
        transport = bb._runtime.transport
        assert transport is not None

        async def respond(*, task_status: trio.TaskStatus[None]) -> None:
            async with transport.open_subscription("backbeat.control.other") as requests:
                task_status.started()
                request = await anext(aiter(requests))
                if answer is None:
                    await trio.sleep_forever()
                transport.publish_nowait(request.reply, answer)

        await nursery.start(respond)
        with pytest.raises(kind, match=text):
            await bb.cancel_remote("other", "job", "why not")
        nursery.cancel_scope.cancel()


async def test_a_disabled_session(autojump_clock: Clock) -> None:
    async with open_session(enabled=False, **AGENT) as bb:
        async with bb.operation("election", id="job", cancellable=True):
            with pytest.raises(BackbeatError, match="the session is disabled"):
                await bb.cancel_remote("agent", "job", "why not")


async def test_a_session_that_was_left(autojump_clock: Clock) -> None:
    async with open_session(**AGENT) as bb:
        pass
    with pytest.raises(SessionClosed):
        await bb.cancel_remote("agent", "job", "why not")
    with pytest.raises(SessionClosed):
        async with bb.operation("election", cancellable=True):
            pytest.fail("not reached")  # pragma: no cover


async def test_operations_of_an_agent_that_was_cut_off_can_be_cancelled(
    autojump_clock: Clock,
) -> None:
    bus = MemoryBus()
    transport = MemoryTransport(bus)
    async with (
        open_session(transport=transport, **AGENT) as agent,
        open_session(bus, agent_id="operator") as operator,
        trio.open_nursery() as nursery,
    ):
        transport.sever()
        # Work does not wait for the connection.
        began = trio.current_time()
        block = Block(agent, nursery)
        await block.entered.wait()
        assert trio.current_time() == began
        with pytest.raises(NoResponders):
            await operator.cancel_remote("agent", "job", "why not")
        transport.restore()
        await operator.cancel_remote("agent", "job", "why not")
        await block.left.wait()
        assert isinstance(block.error, OperationCancelled)
        transport.sever()
        with pytest.raises(TransportBroken, match="did not say whether"):
            await agent.cancel_remote("operator", "job", "why not")
        transport.restore()


async def test_a_server_that_does_not_answer_holds_work_up_for_two_seconds_once(
    autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_pair() as (agent, operator), trio.open_nursery() as nursery:
        answers = trio.Event()
        monkeypatch.setattr(agent._runtime.transport, "flush", answers.wait)
        began = trio.current_time()
        block = Block(agent, nursery)
        await block.entered.wait()
        assert trio.current_time() == began + 2
        answers.set()
        await trio.testing.wait_all_tasks_blocked()
        began = trio.current_time()
        async with agent.operation("election", cancellable=True):
            assert trio.current_time() == began
        await operator.cancel_remote("agent", "job", "why not")


@guarded(120)
async def test_a_real_server_before_and_after_it_was_restarted() -> None:
    async with NatsServer() as server, leading_at(server.url):
        common: Any = {"nats_url": server.url, "lock_timeout": 30.0}
        async with (
            open_session(**common, **AGENT) as agent,
            open_session(**common, agent_id="operator") as operator,
            open_recorder(operator) as claims,
            trio.open_nursery() as nursery,
        ):
            with pytest.raises(NoResponders):
                await operator.cancel_remote("agent", "job", "why not")
            # Who has heard of the operation can cancel it.
            first = Block(agent, nursery, id="first")
            await claims.wait_for("first", "executing")
            await operator.cancel_remote("agent", "first", "the first reason")
            await first.left.wait()
            second = Block(agent, nursery, id="second")
            await second.entered.wait()
            server.kill()
            await until(lambda: not agent.health().connected and not operator.health().connected)
            with pytest.raises(TransportBroken):
                await operator.cancel_remote("agent", "second", "why not")
            await server.start()
            await until(lambda: agent.health().connected and operator.health().connected)
            # The server may hear of the request before it hears of the subscription.
            while not second.left.is_set():
                with contextlib.suppress(NoResponders, OperationNotFound):
                    await operator.cancel_remote("agent", "second", "the second reason")
            for name, block in (("first", first), ("second", second)):
                assert isinstance(block.error, OperationCancelled)
                assert block.error.reason == f"the {name} reason"
            claim = await claims.wait_for("second", "failed")
            assert claim.notes == "P2P operation failed: the second reason (type: election)"
