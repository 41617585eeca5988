"""The stream of terminal claims, on a real server."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest
import trio
from helpers import clustered, connected, until
from nats.aio.client import Client
from nats.js.api import DiscardPolicy, StreamConfig, StreamInfo

import backbeat_trio as backbeat
from backbeat_trio import BackbeatConfig, ConfigError, Session, StatusClaim
from backbeat_trio._transport import jetstream as _jetstream
from backbeat_trio._transport.jetstream import ClaimStream, KeyValueStore
from backbeat_trio._transport.nats import NatsTransport
from backbeat_trio._transport.store import Conflict, RecordRefused
from backbeat_trio._wire import decode_claims
from backbeat_trio.testing import NatsServer, open_recorder, open_session

STREAM = "BACKBEAT_STATUS"
NEW = DiscardPolicy.NEW


def admin(url: str) -> AbstractAsyncContextManager[NatsTransport]:
    return connected(nats_url=url)


async def info(transport: NatsTransport, stream: str = STREAM) -> StreamInfo:
    async def ask(client: Client) -> StreamInfo:
        return await client.jetstream().stream_info(stream)

    return await transport.call(ask)


async def stored(transport: NatsTransport, stream: str = STREAM) -> list[StatusClaim]:
    async def read(client: Client) -> list[StatusClaim]:
        js = client.jetstream()
        last = (await js.stream_info(stream)).state.last_seq
        found = []
        for number in range(1, last + 1):
            found += decode_claims((await js.get_msg(stream, number)).data or b"")
        return found

    return await transport.call(read)


def session(server: NatsServer, **overrides: Any) -> Any:
    options: dict[str, Any] = {"tempo_bpm": 600.0, "lock_timeout": 0.0, "require_connection": True}
    return open_session(nats_url=server.url, **(options | overrides))


async def confirmed(bb: Session) -> None:
    await until(lambda: not bb.statistics().claims_pending)


async def test_terminal_claims_are_stored_and_heard_and_others_only_heard() -> None:
    async with NatsServer(["-js"]) as server, admin(server.url) as transport:
        async with session(server, health_beats=1) as bb, open_recorder(bb) as recorder:
            bb.start_operation("election", id="long")
            for number in range(300):
                bb.start_operation("dht_store", id=f"short-{number}").complete()
            await confirmed(bb)
            await bb.sleep(5)
            await recorder.wait_for("short-299", "done")
            heard = recorder.of("short-7")
            # What is terminal is heard after what is not.
            assert [claim.state for claim in heard][-1] == "done"
            assert len(recorder.of("long")) > 4
            assert bb.statistics().claims_stored == 300
            assert recorder.of("chorus-p2p-health")
        claims = await stored(transport)
        wanted = [*(f"short-{number}" for number in range(300)), "long"]
        assert sorted(claim.task_id for claim in claims) == sorted(wanted)
        assert {claim.state for claim in claims} == {"done", "failed"}


async def test_the_stream_is_made_on_demand_with_its_limits() -> None:
    async with NatsServer(["-js"]) as server, admin(server.url) as transport:
        async with session(
            server, claims_stream="ENDS", claims_max_age=60.0, claims_max_bytes=1_000_000
        ) as bb:
            await bb.sleep(2)
            with pytest.raises(backbeat.TransportBroken, match="stream not found"):
                await info(transport, "ENDS")
            bb.start_operation("election").complete()
            await confirmed(bb)
        config = (await info(transport, "ENDS")).config
        assert config.subjects == ["backbeat.status.>"]
        assert (config.max_age, config.max_bytes, config.num_replicas) == (60.0, 1_000_000, 1)
        assert config.duplicate_window == 60.0


async def test_a_claim_whose_acknowledgement_is_lost_is_stored_once() -> None:
    async with NatsServer(["-js"]) as server, admin(server.url) as transport:
        config = BackbeatConfig(nats_url=server.url, agent_id="a")
        journal = ClaimStream(transport, config)
        assert await journal.open()
        for _ in range(3):
            assert await journal.store("backbeat.status.a", [("id-1", b"{}"), ("id-2", b"{}")])
        assert (await info(transport)).state.messages == 2


async def test_whoever_knows_all_ids_so_far_cannot_swallow_the_next_claim() -> None:
    async with NatsServer(["-js"]) as server, admin(server.url) as transport:

        async def known_ids(client: Client) -> list[str]:
            js = client.jetstream()
            last = (await js.stream_info(STREAM)).state.last_seq
            headers = [(await js.get_msg(STREAM, n)).headers or {} for n in range(1, last + 1)]
            return [header["Nats-Msg-Id"] for header in headers]

        async with session(server, agent_id="victim") as bb:
            for number in range(5):
                bb.start_operation("election", id=f"{number}").complete()
            await confirmed(bb)
            ids = await transport.call(known_ids)
            assert len(set(ids)) == 5
            # Where ids count, the next ones follow from these.
            guesses = {
                head + str(int(tail) + further)
                for text in ids
                for head, tail in [re.fullmatch(r"(.*?)(\d*)", text, re.DOTALL).groups()]  # type: ignore[union-attr]
                if tail
                for further in range(1, 20)
            } - set(ids)
            for guess in guesses:
                await transport.publish(
                    "backbeat.status.somebody", b"{}", headers={"Nats-Msg-Id": guess}
                )
            await transport.flush()
            bb.start_operation("election", id="last").complete()
            await confirmed(bb)

        async def last(client: Client) -> bytes | None:
            return (await client.jetstream().get_last_msg(STREAM, "backbeat.status.victim")).data

        assert b'"last"' in (await transport.call(last) or b"")


async def test_a_stream_of_other_subjects_keeps_nothing_pending(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with NatsServer(["-js"]) as server, admin(server.url) as transport:

        async def add(client: Client) -> None:
            await client.jetstream().add_stream(name=STREAM, subjects=["another.subject"])

        await transport.call(add)
        async with session(server, agent_id="a") as bb, open_recorder(bb) as recorder:
            for name in ("one", "two"):
                bb.start_operation("election", id=name).complete()
                await recorder.wait_for(name, "done")
                await confirmed(bb)
            assert len(recorder.of("one")) == 2
            error = f"no stream of terminal claims: stream {STREAM} does not take backbeat.status.a"
            assert bb.health().errors == (error,)
            assert caplog.messages.count(error) == 1


@pytest.mark.parametrize("jetstream", [True, False])
async def test_claims_keep_the_limit_of_the_server(jetstream: bool) -> None:
    config = "max_payload: 1024"
    async with (
        NatsServer(["-js"] if jetstream else [], config=config) as server,
        session(server) as bb,
        open_recorder(bb) as recorder,
    ):
        # With one operation as with many, and with notes that take up what remains.
        for number in range(600, 1000, 7):
            operation = bb.start_operation("election", id=f"{number}".ljust(number, "x"))
            operation.advance(backbeat.Phase.EXECUTING)
            await bb.sleep(0.1)
            operation.fail("y" * number)
        await confirmed(bb)
        statistics = bb.statistics()
        assert 0 < statistics.claims_dropped < 200
        assert bb.health().reconnect_count == 0
        assert (statistics.claims_stored > 0) == jetstream
        # The claims of the agent's health fail, too, as it has errors to report.
        failed = [
            claim
            for claim in recorder.claims
            if claim.state == "failed" and claim.operation_type == "election"
        ]
        assert failed
        assert all(claim.notes.endswith("…") or not claim.notes for claim in failed)


async def test_a_stream_of_small_messages_keeps_nothing_pending() -> None:
    async with NatsServer(["-js"]) as server, admin(server.url) as transport:

        async def add(client: Client) -> None:
            await client.jetstream().add_stream(
                StreamConfig(name=STREAM, subjects=["backbeat.status.>"], max_msg_size=600)
            )

        await transport.call(add)
        async with session(server) as bb:
            bb.start_operation("election", id="short").fail("x" * 5000)
            bb.start_operation("election", id="x" * 600).complete()
            await confirmed(bb)
            assert (bb.statistics().claims_stored, bb.statistics().claims_dropped) == (1, 1)
        (claim,) = await stored(transport)
        assert claim.notes.endswith("…")


async def test_without_jetstream_claims_are_sent_as_ever() -> None:
    async with (
        NatsServer() as server,
        session(server) as bb,
        open_recorder(bb) as recorder,
    ):
        bb.start_operation("election", id="x").complete()
        await recorder.wait_for("x", "done")
        await confirmed(bb)
        assert bb.statistics().claims_stored == 0
        assert bb.health().errors == ()


@pytest.mark.parametrize("fault", ["refused", "narrow"])
async def test_where_there_can_be_no_stream_claims_are_sent_as_ever(fault: str) -> None:
    async with NatsServer(["-js"]) as server, admin(server.url) as transport:
        if fault == "narrow":
            # Somebody else keeps one agent's claims: there cannot be a stream of all.
            async def add(client: Client) -> None:
                await client.jetstream().add_stream(
                    StreamConfig(name="other", subjects=["backbeat.status.somebody"])
                )

            await transport.call(add)
        limit = 2**62 if fault == "refused" else -1
        async with session(server, claims_max_bytes=limit) as bb, open_recorder(bb) as recorder:
            bb.start_operation("election", id="x").complete()
            await recorder.wait_for("x", "done")
            await confirmed(bb)
            assert any("no stream of terminal claims" in error for error in bb.health().errors)


async def test_a_stream_of_another_name_is_used() -> None:
    async with NatsServer(["-js"]) as server, admin(server.url) as transport:

        async def add(client: Client) -> None:
            await client.jetstream().add_stream(name="mine", subjects=["backbeat.status.*"])

        await transport.call(add)
        async with session(server) as bb:
            bb.start_operation("election", id="x").complete()
            await confirmed(bb)
            assert bb.statistics().claims_stored == 1
        assert [claim.task_id for claim in await stored(transport, "mine")] == ["x"]


async def test_it_can_be_left_out() -> None:
    async with NatsServer(["-js"]) as server, admin(server.url) as transport:
        async with session(server, store_claims=False) as bb:
            bb.start_operation("election").complete()
            await confirmed(bb)
        with pytest.raises(backbeat.TransportBroken, match="stream not found"):
            await info(transport)


async def test_a_stream_that_goes_away_is_made_again() -> None:
    async with NatsServer(["-js"]) as server, admin(server.url) as transport, session(server) as bb:
        bb.start_operation("election", id="one").complete()
        await confirmed(bb)

        async def delete(client: Client) -> None:
            await client.jetstream().delete_stream(STREAM)

        await transport.call(delete)
        bb.start_operation("election", id="two").complete()
        await confirmed(bb)
        assert [claim.task_id for claim in await stored(transport)] == ["two"]


async def test_a_stream_that_takes_nothing_is_tried_again_and_listeners_are_told() -> None:
    async with NatsServer(["-js"]) as server, admin(server.url) as transport:

        async def seal(client: Client) -> None:
            js = client.jetstream()
            await js.add_stream(
                StreamConfig(name=STREAM, subjects=["backbeat.status.>"], max_msgs=1, discard=NEW)
            )

        async def unseal(client: Client) -> None:
            js = client.jetstream()
            await js.update_stream(
                StreamConfig(name=STREAM, subjects=["backbeat.status.>"], max_msgs=9, discard=NEW)
            )

        await transport.call(seal)
        async with session(server) as bb, open_recorder(bb) as recorder:
            for name in ("one", "two", "three"):
                bb.start_operation("election", id=name).complete()
            for name in ("one", "two", "three"):
                await recorder.wait_for(name, "done")
            assert bb.statistics().claims_pending
            await transport.call(unseal)
            await confirmed(bb)
        found = [claim.task_id for claim in await stored(transport)]
        assert sorted(found) == ["one", "three", "two"]


async def test_a_paused_server_holds_claims_back_and_loses_none() -> None:
    async with NatsServer(["-js"]) as server:
        async with session(server) as bb:
            bb.start_operation("election", id="first").complete()
            await confirmed(bb)
            server.pause()
            for number in range(50):
                bb.start_operation("election", id=f"{number}").complete()
            await trio.sleep(2)
            server.resume()
            await confirmed(bb)
        async with admin(server.url) as transport:
            found = sorted(claim.task_id for claim in await stored(transport))
        assert found == sorted(["first", *map(str, range(50))])


async def test_an_account_without_jetstream() -> None:
    config = """
    accounts { A { users: [{ user: a, password: a }] }
               J { jetstream: enabled, users: [{ user: j, password: j }] } }
    """
    async with NatsServer(["-js"], config=config) as server:
        login = {"user": "a", "password": "a"}
        async with session(server, **login) as bb:
            bb.start_operation("election").complete()
            await confirmed(bb)
            transport = bb._runtime.transport
            assert isinstance(transport, NatsTransport)
            assert not await KeyValueStore(transport, "backbeat-c").open()
            assert bb.statistics().claims_stored == 0


@pytest.mark.parametrize("subjects", [["plain"], ["$KV.other.>"]])
async def test_a_plain_stream_of_the_buckets_name_is_refused(subjects: list[str]) -> None:
    async with NatsServer(["-js"]) as server, admin(server.url) as transport:

        async def add(client: Client) -> None:
            # One of them looks like a bucket by everything but its subjects.
            last = 1 if subjects == ["$KV.other.>"] else -1
            config = StreamConfig(
                name="KV_backbeat-c", subjects=subjects, max_msgs_per_subject=last
            )
            await client.jetstream().add_stream(config)

        await transport.call(add)
        store = KeyValueStore(transport, "backbeat-c")
        with pytest.raises(RecordRefused, match="KV_backbeat-c exists and is not the key-value"):
            await store.open()
        # Whoever has it open already finds that it does not answer.
        for use in (store.read(), store.write(b"x", 0)):
            with pytest.raises(backbeat.TransportBroken, match="is not the key-value bucket"):
                await use


@pytest.mark.parametrize(
    ("refused", "asked"),
    [
        ("$JS.API.STREAM.INFO.KV_backbeat-c", True),
        ("$JS.API.STREAM.CREATE.KV_backbeat-c", True),
        ("$JS.API.INFO", False),
    ],
)
async def test_a_refused_question_is_told_and_is_not_no_jetstream(
    refused: str, asked: bool
) -> None:
    # Without JetStream only the account request may tell so.
    config = f"""
    authorization {{ users: [{{ user: a, password: a, permissions: {{
        publish: {{ deny: ["{refused}", "backbeat.status.a"] }} }} }}] }}
    """
    arguments = ["-js"] if asked else []
    login: dict[str, Any] = {"user": "a", "password": "a"}
    async with NatsServer(arguments, config=config) as server:
        transport = NatsTransport(BackbeatConfig(nats_url=server.url, agent_id="a", **login))
        async with trio.open_nursery() as nursery:
            await nursery.start(transport.run)
            await transport.wait_connected()
            transport.publish_nowait("backbeat.status.a", b"{}")
            store = KeyValueStore(transport, "backbeat-c")
            for times in (1, 2):
                with pytest.raises(backbeat.TransportBroken, match="permissions refuse") as caught:
                    await store.open()
                assert str(caught.value).endswith(f"publish to {refused.lower()}")
                told = dict(transport.statistics().refused)
                assert told[f"publish to {refused.lower()}"] == times
                assert told["publish to backbeat.status.a"] == 1
            nursery.cancel_scope.cancel()


async def test_the_bucket_is_looked_for_again_on_each_connection() -> None:
    # The same client, on a server with JetStream, on one without, and on a third with its own.
    async with (
        NatsServer(["-js"]) as one,
        NatsServer() as two,
        NatsServer(["-js"]) as three,
    ):
        urls = ",".join(server.url for server in (one, two, three))
        async with admin(urls) as transport:
            store = KeyValueStore(transport, "backbeat-c")
            assert await store.open()
            assert await store.write(b"first", 0) == 1
            sent = one.log
            for _ in range(1000):
                assert await store.open()
            assert one.log == sent
            for server, has_jetstream in ((one, False), (two, True)):
                generation = transport.generation
                server.kill()
                await until(lambda g=generation: transport.generation > g)  # type: ignore[misc]
                assert await store.open() is has_jetstream
            # What is there is another record.
            assert (await store.read()).data == b""
            with pytest.raises(Conflict):
                await store.write(b"second", 1)
            assert await store.write(b"second", 0) == 1


@pytest.mark.parametrize("direct", [False, True])
async def test_a_bucket_that_was_deleted_is_made_again_by_whoever_writes(direct: bool) -> None:
    # The NATS command line makes buckets that are read directly.
    async with NatsServer(["-js"]) as server, admin(server.url) as transport:

        async def create(client: Client) -> None:
            await client.jetstream().create_key_value(bucket="backbeat-c", direct=direct)

        async def delete(client: Client) -> None:
            await client.jetstream().delete_key_value("backbeat-c")

        await transport.call(create)
        store = KeyValueStore(transport, "backbeat-c")
        assert await store.open()
        await store.write(b"first", 0)
        await transport.call(delete)
        if direct:
            with pytest.raises(backbeat.TransportBroken):
                await store.read()
        assert (await store.read()).data == b""
        with contextlib.suppress(Conflict):
            await store.write(b"second", 0)
        revision = (await store.read()).revision
        assert await store.write(b"second", revision) == revision + 1


async def settled(open_it: Callable[[], Awaitable[bool]]) -> list[str]:
    """Try until there is an answer, as everybody does; return what the refusals before it said."""
    told: list[str] = []
    with trio.fail_after(60):
        while True:
            try:
                assert await open_it()
            except RecordRefused:
                raise
            except backbeat.TransportBroken as error:
                told.append(str(error))
                await trio.sleep(0.1)
            else:
                return told


def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_jetstream, "_SETTLING", 0.3)


async def test_a_cluster_of_three_servers_keeps_three_copies() -> None:
    async with clustered(3) as servers, admin(servers[0].url) as transport:
        store = KeyValueStore(transport, "backbeat-c")
        claims = ClaimStream(transport, BackbeatConfig(agent_id="a"))
        await settled(store.open)
        await settled(claims.open)
        for stream in ("KV_backbeat-c", STREAM):
            assert (await info(transport, stream)).config.num_replicas == 3
        assert (store.replicas, store.short, claims.short) == (3, False, False)


async def test_a_cluster_of_two_servers_keeps_two_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once(monkeypatch)
    async with clustered(2) as servers, admin(servers[0].url) as transport:
        store = KeyValueStore(transport, "backbeat-c")
        assert (
            f"JetStream on {servers[0].url}: no suitable peers" in (await settled(store.open))[-1]
        )
        config = BackbeatConfig(agent_id="a")
        claims = ClaimStream(transport, config)
        await settled(claims.open)
        for stream in ("KV_backbeat-c", STREAM):
            assert (await info(transport, stream)).config.num_replicas == 2
        assert (store.replicas, store.short, claims.short) == (2, True, True)
        # Who comes later finds them, and has nothing to tell of.
        again = KeyValueStore(transport, "backbeat-c", replicas=3)
        assert await again.open()
        assert (again.replicas, again.short) == (2, False)
        # Three that were asked for are not made two.
        with pytest.raises(RecordRefused, match="too few servers with JetStream for 3 copies"):
            await settled(KeyValueStore(transport, "backbeat-d", replicas=3).open)


async def test_a_third_server_that_is_down_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once(monkeypatch)
    async with clustered(3) as servers:
        async with admin(servers[0].url) as transport:
            await settled(KeyValueStore(transport, "backbeat-first").open)
        # The two that come back know that there is a third one, and nothing else of it.
        for server in servers:
            server.kill()
        async with trio.open_nursery() as nursery:
            for server in servers[:2]:
                nursery.start_soon(server.start)
        async with admin(servers[0].url) as transport:
            store = KeyValueStore(transport, "backbeat-c")
            refusals = 0
            with trio.fail_after(60):
                while refusals < 10:
                    with pytest.raises(backbeat.TransportBroken) as caught:
                        await store.open()
                    assert not isinstance(caught.value, RecordRefused)
                    refusals += "no suitable peers" in str(caught.value)
                    await trio.sleep(0.1)
            await servers[2].start()
            await settled(store.open)
            assert (store.replicas, store.short) == (3, False)


async def test_copies_that_a_lone_server_does_not_keep() -> None:
    async with NatsServer(["-js"]) as server, admin(server.url) as transport:
        with pytest.raises(RecordRefused, match="keeps no 3 copies: it is not in a cluster"):
            await KeyValueStore(transport, "backbeat-c", replicas=3).open()
        with pytest.raises(RecordRefused, match="maximum replicas is 5"):
            await KeyValueStore(transport, "backbeat-c", replicas=9).open()
        claims = ClaimStream(transport, BackbeatConfig(agent_id="a", claims_replicas=3))
        assert not await claims.open()
        assert claims.reason == "the server keeps no 3 copies: it is not in a cluster"
        store = KeyValueStore(transport, "backbeat-c")
        assert await store.open()
        assert (store.replicas, store.short) == (1, False)


@pytest.mark.parametrize(("size", "kept"), [(2**20, True), (2**21 + 1, False)])
async def test_an_account_with_room_for_one_copy(size: int, kept: bool) -> None:
    config = """
    accounts { A { jetstream: { max_file: 2MB }, users: [{ user: a, password: a }] } }
    """
    async with NatsServer(["-js"], config=config) as server:
        async with session(server, user="a", password="a", claims_max_bytes=size) as bb:
            bb.start_operation("election").complete()
            await confirmed(bb)
            assert bb.statistics().claims_stored == kept
            refusal = "no stream of terminal claims: insufficient storage resources available"
            assert bb.health().errors == (() if kept else (refusal,))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("claims_stream", "no.token"),
        ("claims_replicas", 6),
        ("claims_max_bytes", 0),
        ("claims_max_age", -1.0),
    ],
)
def test_settings_that_cannot_work(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field):
        BackbeatConfig(**{field: value})
