"""Reading stored claims, on a real server."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import trio
import trio.testing
from helpers import connected, guarded as _guarded, until

import backbeat_trio as backbeat
from backbeat_trio import (
    ClaimsUnavailable,
    MemoryBus,
    MemoryTransport,
    NoResponders,
    Session,
    TransportBroken,
)
from backbeat_trio._transport import archive as _archive
from backbeat_trio._transport.archive import StreamArchive
from backbeat_trio._transport.nats import NatsTransport
from backbeat_trio._wire import encode
from backbeat_trio.testing import NatsServer, open_session

STREAM = "BACKBEAT_STATUS"
guarded = _guarded(120)


def session(server: NatsServer, **overrides: Any) -> Any:
    options: dict[str, Any] = {
        "tempo_bpm": 600.0,
        "lock_timeout": 0.0,
        "require_connection": True,
        "health_beats": 0,
    }
    return open_session(nats_url=server.url, **(options | overrides))


async def finish(bb: Session, *names: str) -> None:
    """End operations, and wait until the stream has their claims."""
    before = bb.statistics().claims_stored
    for name in names:
        bb.start_operation("election", id=name).complete()
    await until(lambda: bb.statistics().claims_stored >= before + len(names))


async def ask(transport: NatsTransport, what: str, **request: Any) -> Any:
    subject = f"$JS.API.STREAM.{what}"
    answer = await transport.request(subject, json.dumps(request).encode(), timeout=10)
    return json.loads(answer.data)


@guarded
async def test_stored_claims_come_first_and_in_order() -> None:
    wanted = [f"{number}" for number in range(300)]
    async with NatsServer(["-js"]) as server, session(server, agent_id="one") as one:
        async with session(server, agent_id="two") as two:
            await finish(one, *wanted)
            await finish(two, "another")
            one.start_operation("election", id="long", beats=1000)
            async with two.open_claims(since=3600) as claims:
                found = [await anext(claims) for _ in range(301)]
                assert sorted(claim.task_id for claim in found) == sorted([*wanted, "another"])
                assert {claim.state for claim in found} == {"done"}
                # Then come live ones.
                live = await anext(claims)
                assert (live.task_id, live.state) == ("long", "executing")
                assert live.beat_index >= found[-1].beat_index
            async with two.open_claims("two", since=3600, batched=True) as batches:
                assert [claim.task_id for claim in await anext(batches)] == ["another"]
        # What was read is no business of the server any more.
        async with connected(nats_url=server.url) as admin:
            information = await ask(admin, f"INFO.{STREAM}")
            assert information["state"]["consumer_count"] == 0


@guarded
async def test_only_claims_of_the_last_seconds_are_read() -> None:
    async with NatsServer(["-js"]) as server, session(server) as bb:
        await finish(bb, *(f"early-{number}" for number in range(20)))
        await trio.sleep(3)
        begun = trio.current_time()
        await finish(bb, *(f"late-{number}" for number in range(20)))
        for since, first in ((trio.current_time() - begun + 1.5, "late"), (3600, "early")):
            async with bb.open_claims(since=since) as claims:
                assert (await anext(claims)).task_id.startswith(first)
        async with bb.open_claims(since=0) as claims:
            bb.start_operation("election", id="live")
            assert (await anext(claims)).task_id == "live"


@guarded
async def test_the_first_of_many_is_found_by_its_time() -> None:
    async with NatsServer(["-js"]) as server, session(server) as bb:
        await finish(bb, *(f"{number}" for number in range(40)))
        async with connected(nats_url=server.url) as admin:
            # Messages that were deleted leave holes in the numbers.
            for number in (1, 2, 3, 17, 18, 19, 20, 39, 40):
                assert (await ask(admin, f"MSG.DELETE.{STREAM}", seq=number))["success"]
            archive = StreamArchive(admin, STREAM)
            assert await archive.first_since(1e300) == 4
            assert await archive.first_since(3600) <= 4
            assert not await archive.read("backbeat.status.*", await archive.first_since(0))
            found = []
            number = 0
            while stored := await archive.read("backbeat.status.*", number):
                found += [each.number for each in stored]
                number = found[-1] + 1
            assert found == [*range(4, 17), *range(21, 39)]
            assert await archive.last() == 40


@guarded
async def test_no_claim_is_lost_or_given_twice_while_claims_are_stored() -> None:
    async with (
        NatsServer(["-js"]) as server,
        session(server, agent_id="busy", tempo_bpm=60.0) as busy,
        session(server, agent_id="reader") as reader,
        trio.open_nursery() as nursery,
    ):
        await finish(busy, *(f"before-{number}" for number in range(500)))
        started: list[str] = []

        async def work(task_status: trio.TaskStatus[trio.CancelScope]) -> None:
            with trio.CancelScope() as scope:
                task_status.started(scope)
                while True:
                    for _ in range(5):
                        started.append(f"{len(started)}")
                        busy.start_operation("election", id=started[-1]).complete()
                    await trio.sleep(0.02)

        working = await nursery.start(work)
        ends: list[str] = []
        others: set[str] = set()
        async with reader.open_claims(since=3600) as claims:
            async for claim in claims:
                if claim.state == "executing":
                    others.add(claim.task_id)
                    # Live claims have been given for a while.
                    if len(others) > 200:
                        working.cancel()
                    continue
                ends.append(claim.task_id)
                if working.cancel_called and len(ends) >= 500 + len(started):
                    break
        assert len(ends) == 500 + len(started)
        assert set(ends) == {f"before-{number}" for number in range(500)}.union(started)


async def test_what_is_stored_between_two_answers_is_not_passed_over(
    autojump_clock: trio.testing.MockClock,
) -> None:
    bus = MemoryBus()
    transport, server = MemoryTransport(bus), MemoryTransport(bus)
    stored: list[int] = []

    async def answer() -> None:
        async with server.open_subscription(f"$JS.API.STREAM.MSG.GET.{STREAM}") as requests:
            async for request in requests:
                number = json.loads(request.data)["seq"]
                found: dict[str, Any] = {"error": {"code": 404, "err_code": 10037}}
                if later := [each for each in stored if each >= number]:
                    message = {"subject": "backbeat.status.a", "seq": later[0], "data": ""}
                    found = {"message": message | {"time": "2026-01-01T00:00:00Z"}}
                await server.publish(request.reply, json.dumps(found).encode())
                stored.append(len(stored) + 1)

    async with trio.open_nursery() as nursery:
        for each in (transport, server):
            await nursery.start(each.run)
        nursery.start_soon(answer)
        await trio.testing.wait_all_tasks_blocked()
        archive = StreamArchive(transport, STREAM)
        read: list[int] = []
        while len(read) < 30:
            messages = await archive.read("backbeat.status.*", len(read) + 1)
            read += [number for number, _ in messages]
        assert read == list(range(1, len(read) + 1))
        nursery.cancel_scope.cancel()


@guarded
async def test_reading_goes_on_after_the_server_was_restarted() -> None:
    wanted = [f"{number}" for number in range(200)]
    async with NatsServer(["-js"]) as server, session(server) as bb:
        await finish(bb, *wanted)
        async with bb.open_claims(since=3600) as claims:
            found = [(await anext(claims)).task_id for _ in range(3)]
            server.kill()
            await server.start()
            found += [(await anext(claims)).task_id for _ in range(197)]
            assert found == wanted
            # Between the last stored claim and the first live one, too.
            with trio.move_on_after(0.2):
                await anext(claims)
                pytest.fail("there is none")  # pragma: no cover
            server.kill()
            await server.start()
            await until(lambda: bb.health().connected)
            await finish(bb, "afterwards")
            while (claim := await anext(claims)).state == "executing":
                assert claim.task_id == "afterwards"
            assert claim.task_id == "afterwards"


@guarded
async def test_what_is_missing_is_said() -> None:
    async with NatsServer() as server, session(server) as bb:
        with pytest.raises(ClaimsUnavailable, match="has no JetStream"):
            async with bb.open_claims(since=60):
                pytest.fail("not reached")  # pragma: no cover
    async with NatsServer(["-js"]) as server, connected(nats_url=server.url) as admin:
        async with session(server) as bb:
            with pytest.raises(ClaimsUnavailable, match=f"there is no stream {STREAM}"):
                async with bb.open_claims(since=60):
                    pytest.fail("not reached")  # pragma: no cover
            created = await ask(admin, f"CREATE.{STREAM}", name=STREAM, subjects=["other.>"])
            assert "error" not in created
            with pytest.raises(ClaimsUnavailable, match=re.escape("it takes other.>")):
                async with bb.open_claims(since=60):
                    pytest.fail("not reached")  # pragma: no cover


@guarded
async def test_a_stream_of_another_name_is_found_by_its_subject() -> None:
    async with NatsServer(["-js"]) as server, connected(nats_url=server.url) as admin:
        await ask(admin, "CREATE.ENDS", name="ENDS", subjects=["backbeat.status.*"])
        async with session(server) as bb:
            await finish(bb, "one")
            async with bb.open_claims(since=60) as claims:
                assert (await anext(claims)).task_id == "one"


@guarded
async def test_a_stream_that_is_deleted_meanwhile_is_told_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_archive, "_AT_ONCE", 8)
    async with NatsServer(["-js"]) as server, session(server) as bb:
        await finish(bb, *(f"{number}" for number in range(50)))
        async with connected(nats_url=server.url) as admin, bb.open_claims(since=60) as claims:
            assert (await anext(claims)).task_id == "0"
            assert (await ask(admin, f"DELETE.{STREAM}"))["success"]
            with pytest.raises(ClaimsUnavailable, match=f"there is no stream {STREAM}"):
                async for claim in claims:
                    assert claim.state == "done"


@guarded
async def test_messages_of_others_in_the_stream_are_passed_over() -> None:
    async with NatsServer(["-js"]) as server, session(server) as bb:
        await finish(bb, "one")
        async with connected(nats_url=server.url) as admin:
            # Agents that do not store their terminal claims have had these stored.
            executing = backbeat.StatusClaim("test-agent", "x", 0, "executing", 1, 0.0, "")
            failed = backbeat.StatusClaim("test-agent", "chorus-p2p-health", 0, "failed", 0, 1, "")
            for data in (b"{", b"[]", executing, [executing, executing], failed):
                encoded = data if isinstance(data, bytes) else encode(data)
                await admin.publish("backbeat.status.test-agent", encoded)
            await admin.flush()
        await finish(bb, "two")
        async with bb.open_claims(since=60) as claims:
            assert [(await anext(claims)).task_id for _ in range(2)] == ["one", "two"]
        assert bb.statistics().claims_undecodable == 1


@guarded
async def test_there_must_be_a_connection() -> None:
    async with open_session(nats_url="nats://127.0.0.1:1", lock_timeout=0.0) as bb:
        with pytest.raises(TransportBroken):
            async with bb.open_claims(since=60):
                pytest.fail("not reached")  # pragma: no cover


async def test_an_outage_of_jetstream_is_waited_for_and_not_for_ever(
    autojump_clock: trio.testing.MockClock,
) -> None:
    transport = MemoryTransport(MemoryBus())
    archive = StreamArchive(transport, STREAM)
    async with trio.open_nursery() as nursery:
        await nursery.start(transport.run)
        with pytest.raises(ClaimsUnavailable, match="has no JetStream"):
            await archive.first_since(60)
        begun = trio.current_time()
        with pytest.raises(NoResponders):
            await archive.read("backbeat.status.*", 1)
        assert 25 < trio.current_time() - begun < 35
        async with transport.open_subscription("$JS.API.>"):
            with pytest.raises(TransportBroken, match=r"no answer on .* within 2 s"):
                await archive.first_since(60)
            # While there is no connection it waits.
            transport.sever()
            with trio.move_on_after(1000) as scope:
                await archive.read("backbeat.status.*", 1)
            assert scope.cancelled_caught
        nursery.cancel_scope.cancel()
