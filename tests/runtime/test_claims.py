"""How a session listens to the claims of others: one by one, and in batches."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

import backbeat_trio as backbeat
from backbeat_trio import StatusClaim
from backbeat_trio._runtime.claims import ClaimBatches, ClaimCounts, Claims
from backbeat_trio._transport.protocol import Message
from backbeat_trio.testing import open_session

Clock = trio.testing.MockClock


def claim(name: str, agent_id: str = "one") -> StatusClaim:
    return StatusClaim(agent_id, name, 0, "executing", 1, 0.5, "notes")


def message(*claims: StatusClaim) -> Message:
    return Message("backbeat.status.one", msgspec.json.encode(claims), "", 0)


class Messages:
    """Messages that come in turn, each after a checkpoint; then nothing more does."""

    def __init__(self, *messages: Message) -> None:
        self.messages = list(messages)

    def __aiter__(self) -> AsyncIterator[Message]:
        return self

    async def __anext__(self) -> Message:
        await trio.lowlevel.checkpoint()
        if not self.messages:
            await trio.sleep_forever()
        return self.messages.pop(0)


async def test_tasks_that_share_an_iterator_get_each_claim_once(autojump_clock: Clock) -> None:
    wanted = [f"{number}" for number in range(120)]
    messages = [
        message(*(claim(name) for name in wanted[start : start + 6]), claim("forged", "mallory"))
        for start in range(0, 120, 6)
    ]
    counts = ClaimCounts()
    claims = Claims(ClaimBatches(Messages(*messages), counts))
    heard: list[str] = []

    async def listen() -> None:
        async for each in claims:
            heard.append(each.task_id)
            assert 0 <= counts.claims_undecodable <= 20

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(listen)
        await trio.sleep(1)
        nursery.cancel_scope.cancel()
    assert sorted(heard) == sorted(wanted)
    assert counts.claims_undecodable == 20


async def test_a_batch_holds_what_one_message_said_for_its_speaker(autojump_clock: Clock) -> None:
    counts = ClaimCounts()
    batches = ClaimBatches(
        Messages(
            message(claim("a"), claim("forged", "mallory"), claim("b")),
            message(),
            message(claim("forged", "mallory")),
            Message("backbeat.status.one", b"{", "", 0),
            Message("backbeat.status.one", msgspec.json.encode(claim("c")), "", 0),
        ),
        counts,
    )
    assert await anext(batches) == [claim("a"), claim("b")]
    assert await anext(batches) == [claim("c")]
    assert counts.claims_undecodable == 3


@pytest.mark.parametrize(
    ("cluster_id", "wanted"), [("here", ["here", "unnamed"]), (None, ["here", "there", "unnamed"])]
)
async def test_a_batch_holds_the_claims_of_one_cluster(
    cluster_id: str | None, wanted: list[str], autojump_clock: Clock
) -> None:
    here, there = (
        msgspec.structs.replace(claim(name), cluster_id=name) for name in ("here", "there")
    )
    counts = ClaimCounts()
    messages = Messages(message(there), message(here, there, claim("unnamed")))
    claims = Claims(ClaimBatches(messages, counts, cluster_id))
    heard = []
    with trio.move_on_after(1):
        async for each in claims:
            heard.append(each.task_id)
    if cluster_id is None:
        wanted = ["there", *wanted]
    assert heard == wanted
    assert counts.claims_undecodable == 0


@pytest.mark.parametrize("batched", [False, True])
async def test_a_session_hears_its_own_cluster_unless_it_asks_for_all(
    batched: bool, autojump_clock: Clock
) -> None:
    bus = backbeat.MemoryBus()
    options: dict[str, Any] = {"tempo_bpm": 60.0, "lock_timeout": 0.0, "health_beats": 0}
    heard: dict[bool, set[str]] = {False: set(), True: set()}

    async def listen(bb: backbeat.Session, all_clusters: bool) -> None:
        if batched:
            async with bb.open_claims(batched=True, all_clusters=all_clusters) as batches:
                async for batch in batches:
                    heard[all_clusters].update(each.task_id for each in batch)
        else:
            async with bb.open_claims(all_clusters=all_clusters) as claims:
                async for each in claims:
                    heard[all_clusters].add(each.task_id)

    async with (
        open_session(bus, cluster_id="here", agent_id="one", **options) as one,
        open_session(bus, cluster_id="there", agent_id="two", **options) as two,
        trio.open_nursery() as nursery,
    ):
        for all_clusters in heard:
            nursery.start_soon(listen, one, all_clusters)
        await trio.testing.wait_all_tasks_blocked()
        one.start_operation("election", id="mine")
        two.start_operation("election", id="another's")
        await trio.sleep(0.5)
        nursery.cancel_scope.cancel()
    assert heard == {False: {"mine"}, True: {"mine", "another's"}}


async def test_a_session_hears_all_operations_of_a_beat_in_one_batch(autojump_clock: Clock) -> None:
    async with open_session(tempo_bpm=60.0) as bb:
        for number in range(1000):
            bb.start_operation("election", id=f"{number}", beats=10)
        await bb.sleep(0.5)
        async with bb.open_claims(batched=True) as batches, bb.open_claims() as claims:
            with trio.move_on_after(0.1) as scope:
                await anext(batches)
            assert scope.cancelled_caught
            for beat in (1, 2):
                batch = await anext(batches)
                assert len(batch) == 1000
                assert {each.beat_index for each in batch} == {beat}
                assert [await anext(claims) for _ in batch] == batch


async def test_batches_end_with_the_session_and_refuse_what_is_no_agent(
    autojump_clock: Clock,
) -> None:
    async with trio.open_nursery() as nursery, open_session() as bb:
        with pytest.raises(ValueError, match="`agent_id`"):
            async with bb.open_claims("a.b", batched=True):
                pytest.fail("not reached")  # pragma: no cover

        async def listen() -> None:
            with pytest.raises(backbeat.TransportClosed):
                async with bb.open_claims(batched=True) as batches:
                    async for batch in batches:
                        assert batch

        nursery.start_soon(listen)
        await bb.sleep(3)
