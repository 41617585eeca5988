"""How a session listens to the claims of others: one by one, and in batches."""

from __future__ import annotations

import math
import random
from collections.abc import AsyncIterator
from typing import Any, cast

import msgspec
import pytest
import trio
import trio.testing

import backbeat_trio as backbeat
from backbeat_trio import MemoryBus, MemoryTransport, StatusClaim
from backbeat_trio._runtime.claims import ClaimBatches, ClaimCounts, Claims, open_stored_claims
from backbeat_trio._transport.archive import Stored
from backbeat_trio._transport.protocol import Message, Subscription
from backbeat_trio.testing import open_session

Clock = trio.testing.MockClock


def claim(name: str, agent_id: str = "one") -> StatusClaim:
    return StatusClaim(agent_id, name, 0, "executing", 1, 0.5, "notes")


def message(*claims: StatusClaim) -> Message:
    return Message("backbeat.status.one", msgspec.json.encode(claims), "", 0)


class _Messages:
    """Messages that come in turn, each after a checkpoint; then nothing more does."""

    refusal: str | None = None

    def __init__(self, *messages: Message) -> None:
        self.messages = list(messages)

    def __aiter__(self) -> AsyncIterator[Message]:
        return self

    async def __anext__(self) -> Message:
        await trio.lowlevel.checkpoint()
        if not self.messages:
            await trio.sleep_forever()
        return self.messages.pop(0)


def coming(*messages: Message) -> Subscription:
    return cast(Subscription, _Messages(*messages))


async def test_tasks_that_share_an_iterator_get_each_claim_once(autojump_clock: Clock) -> None:
    wanted = [f"{number}" for number in range(120)]
    messages = [
        message(*(claim(name) for name in wanted[start : start + 6]), claim("forged", "mallory"))
        for start in range(0, 120, 6)
    ]
    counts = ClaimCounts()
    claims = Claims(ClaimBatches(coming(*messages), counts))
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
        coming(
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
    messages = coming(message(there), message(here, there, claim("unnamed")))
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


class Stream:
    """An archive of which a claim is a part some time after it was published."""

    def __init__(self, bus: MemoryBus, lag: float, rng: random.Random) -> None:
        self.lag = lag
        self.bus = bus
        self.rng = rng
        self.stored: list[Stored] = []
        self.reads = 0
        # In place of the bus's own.
        bus.archive = cast("Any", self)

    def keep(self, message: Message) -> Message:
        return message

    async def store(self, transport: MemoryTransport, message: Message) -> None:
        """Publish a claim, as its agent does, and store it later."""
        transport.bus._publish(message)
        await trio.sleep(self.rng.uniform(0, 0.9 * self.lag))
        self.stored.append(Stored(len(self.stored) * 2 + 1, message))

    async def first_since(self, seconds: float) -> int:
        await trio.lowlevel.checkpoint()
        return 0

    async def last(self) -> int:
        await trio.sleep(self.rng.uniform(0, 0.01))
        return self.stored[-1].number if self.stored else 0

    async def read(self, subject: str, number: int) -> list[Stored]:
        await trio.sleep(self.rng.uniform(0, 0.01))
        self.reads += 1
        return [each for each in self.stored if each.number >= number][:5]


def terminal(name: str, agent_id: str = "one") -> StatusClaim:
    return msgspec.structs.replace(claim(name, agent_id), state="done")


@pytest.mark.parametrize("seed", range(12))
async def test_no_claim_is_lost_or_given_twice_where_stored_and_live_ones_meet(
    seed: int, autojump_clock: Clock
) -> None:
    rng = random.Random(seed)
    transport = MemoryTransport(MemoryBus())
    stream = Stream(transport.bus, lag=1.0, rng=rng)
    published: list[str] = []
    given: list[str] = []
    beats: list[int] = []

    async def publish(nursery: trio.Nursery) -> None:
        for number in range(800):
            name = f"{number}"
            published.append(name)
            data = msgspec.json.encode(terminal(name))
            message = Message("backbeat.status.one", data, "", 0, f"id of {name}")
            nursery.start_soon(stream.store, transport, message)
            if rng.random() < 0.3:
                # A claim of a live operation is not stored.
                other = msgspec.structs.replace(claim("long"), beat_index=number)
                transport.publish_nowait("backbeat.status.one", msgspec.json.encode(other))
            if rng.random() < 0.1:
                # Its agent heard no acknowledgement.
                transport.bus._publish(message)
            await trio.sleep(rng.uniform(0, 0.01))

    async def listen(claims: AsyncIterator[list[StatusClaim]]) -> None:
        while True:
            # A step that is cancelled changes nothing.
            with trio.move_on_after(rng.choice([0.0, 0.02, 1.5, 10])):
                (each,) = await anext(claims)
                if each.task_id == "long":
                    beats.append(each.beat_index)
                    # It was published after the claims with lower numbers only.
                    assert max(map(int, given)) <= each.beat_index
                else:
                    given.append(each.task_id)

    async with trio.open_nursery() as nursery:
        await nursery.start(transport.run)
        nursery.start_soon(publish, nursery)
        await trio.sleep(1)
        async with open_stored_claims(
            transport, stream, "backbeat.status.one", 60, ClaimCounts(), None
        ) as claims:
            for _ in range(2):
                nursery.start_soon(listen, claims)
            await trio.sleep(30)
            nursery.cancel_scope.cancel()
    assert len(published) == 800
    assert sorted(given) == sorted(published)
    # Some were read and some were heard, in the order in which they were published.
    assert stream.reads > 10
    assert len(beats) > 10
    assert beats == sorted(beats)


async def test_a_bus_keeps_the_last_word_about_each_operation(autojump_clock: Clock) -> None:
    bus = backbeat.MemoryBus()
    options: dict[str, Any] = {"tempo_bpm": 60.0, "lock_timeout": 0.0}
    async with (
        open_session(bus, agent_id="one", **options) as one,
        open_session(bus, agent_id="two", **options) as two,
        open_session(bus, agent_id="three", cluster_id="there", **options) as three,
    ):
        await one.sleep(0.5)
        ended = []
        for number in range(150):
            ended.append(trio.current_time() - 0.5)
            one.start_operation("election", id=f"{number}").complete()
            await trio.sleep(1)
        two.start_operation("election", id="another").fail("no quorum")
        three.start_operation("election", id="elsewhere").complete()
        await trio.sleep(0.5)
        one.start_operation("election", id="live", beats=1000)

        async def read(count: int, *agents: str, **options: Any) -> list[str]:
            async with one.open_claims(*agents, **options) as claims:
                found = [await anext(claims) for _ in range(count)]
                if count:
                    assert {claim.state for claim in found} <= {"done", "failed"}
                # Then come live ones.
                two.start_operation("election", id=f"now-{count}")
                while (heard := await anext(claims)).task_id != f"now-{count}":
                    assert heard.state in ("executing", "waiting")
                two.fail_operation(f"now-{count}", "over")
                await trio.sleep(0)
                return [claim.task_id for claim in found]

        everything = [*(f"{number}" for number in range(150)), "another"]
        assert await read(151, since=math.inf) == everything
        found = await read(153, since=3600, all_clusters=True)
        assert found[:150] == everything[:150]
        assert sorted(found[150:]) == ["another", "elsewhere", "now-151"]
        async with one.open_claims("one", since=trio.current_time() - ended[100]) as claims:
            assert [(await anext(claims)).task_id for _ in range(2)] == ["100", "101"]
        with pytest.raises(ValueError, match="`since` must be non-negative"):
            await read(0, since=-1)
        with pytest.raises(TypeError, match="`since` must be a number of seconds"):
            await read(0, since="1h")


async def test_a_bus_keeps_ten_thousand_claims(autojump_clock: Clock) -> None:
    async with open_session(tempo_bpm=60.0, health_beats=0) as bb:
        for number in range(10_100):
            bb.start_operation("election", id=f"{number}").complete()
        await trio.sleep(1)
        async with bb.open_claims(since=3600, batched=True) as batches:
            found = [claim.task_id for _ in range(10_000) for claim in await anext(batches)]
        assert found == [f"{number}" for number in range(100, 10_100)]


async def test_reading_stored_claims_ends_with_the_session(autojump_clock: Clock) -> None:
    async with trio.open_nursery() as nursery, open_session() as bb:
        bb.start_operation("election").complete()

        async def listen() -> None:
            with pytest.raises(backbeat.TransportClosed):
                async with bb.open_claims(since=60) as claims:
                    async for each in claims:
                        assert each.agent_id == bb.config.agent_id

        nursery.start_soon(listen)
        await bb.sleep(3)


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
