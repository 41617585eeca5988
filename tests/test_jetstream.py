"""The stream of terminal claims, on a real server."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from nats.aio.client import Client
from nats.js.api import DiscardPolicy, StreamConfig, StreamInfo

import backbeat_trio as backbeat
from backbeat_trio import BackbeatConfig, ConfigError, Session, StatusClaim
from backbeat_trio._jetstream import ClaimStream, KeyValueStore
from backbeat_trio._nats import NatsTransport
from backbeat_trio._wire import decode_claims
from backbeat_trio.testing import NatsServer, open_recorder, open_session

STREAM = "BACKBEAT_STATUS"
NEW = DiscardPolicy.NEW


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(20):
        while not condition():
            await trio.sleep(0.005)


@asynccontextmanager
async def admin(url: str) -> AsyncGenerator[NatsTransport, None]:
    transport = NatsTransport(BackbeatConfig(nats_url=url, agent_id="admin"))
    async with trio.open_nursery() as nursery:
        await nursery.start(transport.run)
        await transport.wait_connected()
        yield transport
        nursery.cancel_scope.cancel()


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
            transport = bb._transport
            assert isinstance(transport, NatsTransport)
            assert not await KeyValueStore(transport, "backbeat-c").open()
            assert bb.statistics().claims_stored == 0


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
