"""What a service tells of itself, field by field against what ADR-32 of NATS says."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import Any

import pytest
import trio
from helpers import Lines, guarded, leading_at, until

from backbeat_trio import NoResponders, Request, ServiceError, Session, __version__
from backbeat_trio._transport.adr32 import endpoint_name, timestamp
from backbeat_trio.testing import CLUSTER_ID, NatsServer, open_session

STANDARD: dict[str, type] = {"type": str, "name": str, "id": str, "version": str, "metadata": dict}
FIELDS: dict[str, dict[str, type]] = {
    "PING": STANDARD,
    "INFO": STANDARD | {"description": str, "endpoints": list},
    "STATS": STANDARD | {"endpoints": list, "started": str},
}
ENDPOINT_INFO: dict[str, type] = {"name": str, "subject": str, "queue_group": str, "metadata": dict}
ENDPOINT_STATS: dict[str, type] = {
    "name": str,
    "subject": str,
    "queue_group": str,
    "num_requests": int,
    "num_errors": int,
    "last_error": str,
    "processing_time": int,
    "average_processing_time": int,
}


@pytest.fixture(params=["memory", "nats"])
async def url(request: pytest.FixtureRequest) -> AsyncIterator[str]:
    if request.param == "memory":
        yield "memory://adr32"
        return
    async with NatsServer() as server:
        yield server.url


async def ask(bb: Session, subject: str) -> Any:
    transport = bb._runtime.transport
    assert transport is not None
    return json.loads((await transport.request(subject, b"", timeout=60)).data)


async def ask_all(bb: Session, subject: str, count: int) -> list[Any]:
    transport = bb._runtime.transport
    assert transport is not None
    async with transport.open_request(subject, b"") as answers:
        return [json.loads((await anext(aiter(answers))).data) for _ in range(count)]


def check(answer: Any, fields: dict[str, type]) -> None:
    assert {name: type(value) for name, value in answer.items()} == fields
    for name, value in answer.get("metadata", {}).items():
        assert type(name) is str
        assert type(value) is str


async def handle(request: Request) -> bytes:
    if request.data:
        raise ServiceError(418, "a teapot")
    await trio.sleep(0.002)
    return b""


@guarded(120)
async def test_every_field_on_every_subject(url: str) -> None:
    metadata = {"region": "eu", "line": "a"}
    async with (
        open_session(nats_url=url, agent_id="one", serve_info=False) as bb,
        open_session(nats_url=url, agent_id="two", serve_info=False) as other,
        bb.open_service(
            "pages", version="1.2.0-rc.1+b5", description="Fetches pages", metadata=metadata
        ) as service,
        trio.open_nursery() as nursery,
    ):
        metadata["line"] = "changed afterwards"
        before = datetime.now(UTC)
        await nursery.start(service.serve, "pages.fetch", handle)

        async def serve_other(*, task_status: trio.TaskStatus[None]) -> None:
            await service.serve(
                "pages.*.list", handle, name="list", queue="", task_status=task_status
            )

        await nursery.start(serve_other)
        for _ in range(3):
            await other.request("pages.fetch")
        with pytest.raises(ServiceError):
            await other.request("pages.fetch", b"x")
        for verb, fields in FIELDS.items():
            own = f"$SRV.{verb}", f"$SRV.{verb}.pages", f"$SRV.{verb}.pages.{service.id}"
            answers = [await ask(other, subject) for subject in own]
            for answer in answers:
                assert answer == answers[0]
                check(answer, fields)
            assert answers[0]["type"] == f"io.nats.micro.v1.{verb.lower()}_response"
            assert answers[0]["name"] == "pages"
            assert answers[0]["id"] == service.id
            assert answers[0]["version"] == "1.2.0-rc.1+b5"
            assert answers[0]["metadata"] == {"region": "eu", "line": "a"}
        info, stats = await ask(bb, "$SRV.INFO"), await ask(bb, "$SRV.STATS")
        assert info["description"] == "Fetches pages"
        assert info["endpoints"] == [
            {"name": "pages-fetch", "subject": "pages.fetch", "queue_group": "q", "metadata": {}},
            {"name": "list", "subject": "pages.*.list", "queue_group": "", "metadata": {}},
        ]
        for endpoint in info["endpoints"]:
            check(endpoint, ENDPOINT_INFO)
        started = stats["started"]
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z", started)
        # With a wall clock that may be corrected at any time: not far from now is right.
        assert abs((datetime.fromisoformat(started[:26] + "+00:00") - before).total_seconds()) < 600
        for endpoint in stats["endpoints"]:
            check(endpoint, ENDPOINT_STATS)
        fetch, listing = stats["endpoints"]
        assert (fetch["name"], fetch["subject"], fetch["queue_group"]) == (
            "pages-fetch",
            "pages.fetch",
            "q",
        )
        assert (fetch["num_requests"], fetch["num_errors"]) == (4, 1)
        assert fetch["last_error"] == "418:a teapot"
        assert fetch["processing_time"] > 0
        assert fetch["average_processing_time"] == fetch["processing_time"] // 4
        assert {name: listing[name] for name in ("num_requests", "num_errors", "last_error")} == {
            "num_requests": 0,
            "num_errors": 0,
            "last_error": "",
        }
        assert listing["processing_time"] == listing["average_processing_time"] == 0
        for subject in ("$SRV.PING.other", "$SRV.PING.pages.other", "$SRV.OTHER", "$SRV.ping"):
            with pytest.raises(NoResponders):
                await ask(other, subject)
        nursery.cancel_scope.cancel()


@guarded(120)
async def test_answers_at_once_while_all_handlers_are_busy(url: str) -> None:
    async def never(request: Request) -> bytes:
        await trio.sleep_forever()
        raise AssertionError

    async with (
        # A beat is ten minutes long: nothing here waits for one.
        open_session(
            nats_url=url, serve_info=False, tempo_bpm=0.1, lock_timeout=0, require_connection=True
        ) as bb,
        bb.open_service("busy", version="1.0.0") as service,
        trio.open_nursery() as nursery,
    ):

        async def serve(*, task_status: trio.TaskStatus[None]) -> None:
            await service.serve("busy", never, concurrency=1, task_status=task_status)

        await nursery.start(serve)
        for _ in range(3):
            nursery.start_soon(bb.request, "busy")
        await until(lambda: bb.statistics().calls == 3)
        for verb in FIELDS:
            assert (await ask(bb, f"$SRV.{verb}.busy"))["id"] == service.id
        nursery.cancel_scope.cancel()


@guarded(120)
async def test_instances_have_ids_of_their_own(url: str) -> None:
    async with (
        open_session(nats_url=url, serve_info=False) as bb,
        bb.open_service("pages", version="1.0.0") as one,
        bb.open_service("pages", version="1.1.0") as two,
        bb.open_service("other", version="1.0.0") as other,
    ):
        assert len({one.id, two.id, other.id}) == 3
        found = await ask_all(bb, "$SRV.PING.pages", 2)
        assert {(answer["id"], answer["version"]) for answer in found} == {
            (one.id, "1.0.0"),
            (two.id, "1.1.0"),
        }
        assert len(await ask_all(bb, "$SRV.INFO", 3)) == 3


@guarded(120)
async def test_two_services_of_one_name_and_id(url: str) -> None:
    # Nothing of this package makes them, but another client may.
    async def answer(request: Request) -> bytes:
        return b""

    async with (
        open_session(nats_url=url, agent_id="one", serve_info=False) as bb,
        open_session(nats_url=url, agent_id="two", serve_info=False) as other,
    ):
        ids = iter(["same", "same"])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("secrets.token_hex", lambda _: next(ids))
            async with (
                bb.open_service("pages", version="1.0.0") as one,
                other.open_service("pages", version="1.0.0") as two,
            ):
                assert one.id == two.id == "same"
                async with trio.open_nursery() as nursery:
                    await nursery.start(one.serve, "pages", answer)
                    await nursery.start(two.serve, "pages", answer)
                    assert len(await ask_all(bb, "$SRV.PING.pages.same", 2)) == 2
                    for _ in range(10):
                        await bb.request("pages")
                    stats = await ask_all(bb, "$SRV.STATS.pages.same", 2)
                    counts = [answer["endpoints"][0]["num_requests"] for answer in stats]
                    assert sum(counts) == 10
                    nursery.cancel_scope.cancel()


@guarded(120)
async def test_service_is_gone_once_its_block_is_left(url: str) -> None:
    async with open_session(nats_url=url, serve_info=False) as bb:
        async with bb.open_service("pages", version="1.0.0"):
            assert (await ask(bb, "$SRV.PING.pages"))["name"] == "pages"
        transport = bb._runtime.transport
        assert transport is not None
        await transport.flush()
        with pytest.raises(NoResponders):
            await ask(bb, "$SRV.PING.pages")


@guarded(120)
async def test_service_is_found_again_after_the_server_restarts() -> None:
    async with (
        NatsServer() as server,
        open_session(nats_url=server.url, serve_info=False) as bb,
        bb.open_service("pages", version="1.0.0") as service,
        trio.open_nursery() as nursery,
    ):
        await nursery.start(service.serve, "pages", handle)
        server.kill()
        await server.start()
        await until(lambda: bb.statistics().transport.connects == 2)  # type: ignore[union-attr]
        assert (await ask(bb, "$SRV.PING.pages"))["id"] == service.id
        await bb.request("pages")
        nursery.cancel_scope.cancel()


# Metronomes and agents.


@guarded(120)
async def test_agents_and_metronomes_are_services_themselves(url: str) -> None:
    async with AsyncExitStack() as stack:
        if not url.startswith("memory:"):
            await stack.enter_async_context(leading_at(url, leader_id="pulse-a"))
        one = await stack.enter_async_context(open_session(nats_url=url, agent_id="one"))
        await stack.enter_async_context(open_session(nats_url=url, agent_id="two"))
        await stack.enter_async_context(
            open_session(nats_url=url, agent_id="observer", serve_info=False)
        )
        await until(lambda: one.health().grid == "locked")

        async def found(name: str, count: int) -> list[Any]:
            answers: list[Any] = []
            while len(answers) < count:
                try:
                    with trio.fail_after(20):
                        answers = await ask_all(one, f"$SRV.INFO.{name}", count)
                except (NoResponders, trio.TooSlowError):
                    await trio.sleep(0.05)
            return answers

        agents = {info["metadata"]["agent_id"]: info for info in await found("backbeat-agent", 2)}
        assert set(agents) == {"one", "two"}
        for info in agents.values():
            check(info, FIELDS["INFO"])
            assert re.fullmatch(r"\d+\.\d+\.\d+", info["version"])
            assert info["endpoints"] == []
            assert info["description"]
            metadata = info["metadata"]
            assert set(metadata) == {"cluster", "role", "epoch", "version", "agent_id"}
            assert metadata["cluster"] == CLUSTER_ID
            assert metadata["role"] == "agent"
            assert metadata["version"] == __version__
        assert agents["one"]["metadata"]["epoch"] == str(one.health().epoch)
        # On the bus each session runs a metronome.
        number = 2 if url.startswith("memory:") else 1
        metronomes = [info["metadata"] for info in await found("backbeat-metronome", number)]
        leaders = [metadata for metadata in metronomes if metadata["role"] == "leader"]
        assert [metadata["role"] for metadata in metronomes].count("standby") == number - 1
        (leader,) = leaders
        assert leader["epoch"] == str(one.health().epoch)
        assert leader["leader_id"] == one.health().leader_id
        check(await ask(one, "$SRV.STATS.backbeat-metronome"), FIELDS["STATS"])


@guarded(120)
async def test_service_tools_that_permissions_keep_away() -> None:
    config = """
    authorization { users: [
        { user: u, password: p, permissions: { publish: ">", subscribe: { deny: ["$SRV.>"] } } }
    ] }
    """
    log = Lines()
    async with (
        NatsServer(config=config) as server,
        open_session(nats_url=server.url, user="u", password="p", logger=log) as bb,
    ):
        await until(lambda: log.lines_with("not every service tool"))
        await bb._runtime.transport.flush()  # type: ignore[union-attr]
        assert len(log.lines_with("not every service tool")) == 1
        assert not [text for text in bb.health().errors if "SRV" in text.upper()]
        transport = bb.statistics().transport
        assert transport is not None
        assert transport.permission_errors == 0
        assert transport.refused == ()


@pytest.mark.parametrize(
    ("subject", "name"),
    [
        ("pages.fetch", "pages-fetch"),
        ("pages", "pages"),
        ("a.*.b.>", "a-b"),
        (">", "default"),
        ("ä.b", "b"),
        ("$X.y_z", "X-y_z"),
    ],
)
def test_names_of_endpoints(subject: str, name: str) -> None:
    assert endpoint_name(subject) == name


def test_times() -> None:
    assert timestamp(0) == "1970-01-01T00:00:00.000000000Z"
    assert timestamp(1_700_000_000_123_456_789) == "2023-11-14T22:13:20.123456789Z"
