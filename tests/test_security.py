"""Who may do what on a server with permissions, and every way to log in to one.

The permissions are those of `examples/nats-server.conf`, word for word, on a real server with TLS.
"""

from __future__ import annotations

import base64
import functools
import json
import os
import re
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Final, NamedTuple

import helpers
import nkeys
import pytest
import trio
import trustme
from certificates import issue
from helpers import backbeat, connected, fake_server, leading, until
from msgspec import DecodeError

from backbeat_trio import (
    BackbeatConfig,
    BackbeatError,
    CancelRefused,
    ConfigError,
    NoResponders,
    OperationCancelled,
    OperationNotFound,
    PermissionDenied,
    Request,
    Session,
    TLSFailed,
    TransportBroken,
    session,
)
from backbeat_trio._cli.connection import settings, take_connection
from backbeat_trio._cli.main import cli
from backbeat_trio._cli.status import show_status
from backbeat_trio._runtime import runtime
from backbeat_trio._transport.jetstream import ClaimStream, KeyValueStore
from backbeat_trio._transport.nats import NatsTransport
from backbeat_trio._wire import (
    BeatFrame,
    RecallReply,
    RecallRequest,
    Segment,
    StatusClaim,
    SyncRequest,
    TempoRequest,
    decode_frame,
    decode_recall_reply,
    encode,
)
from backbeat_trio.testing import NatsServer, open_recorder, open_session

CONFIG: Final = (Path(__file__).parent.parent / "examples" / "nats-server.conf").read_text()
CLUSTER: Final = "chorus-production"
BEATS: Final = f"backbeat.beat.{CLUSTER}"
SYNC: Final = f"backbeat.sync.{CLUSTER}"
TEMPO: Final = f"backbeat.tempo.{CLUSTER}"
LEAD: Final = f"backbeat.lead.{CLUSTER}.7"
RECALL: Final = f"backbeat.recall.{CLUSTER}"
CONTROL: Final = "backbeat.control.agent-1"
BUCKET: Final = f"KV_backbeat-{CLUSTER}"
KEY: Final = f"$KV.backbeat-{CLUSTER}.metronome"
ROLES: Final = ("pulse-a", "pulse-b", "agent-1", "agent-2", "operator", "observer")
# What a server's configuration would take for something else without the quotes around it.
SECRET: Final = "s3cr3t, #?pä:ss@wo/rd%2C"
guarded = helpers.guarded(60)


class Files(NamedTuple):
    ca: str
    cert: str
    key: str
    """The certificate of agent-1, and its key."""


@pytest.fixture(scope="module")
def issued(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("certificates")
    authority = trustme.CA()
    paths = {"ca": str(folder / "ca.pem")}
    authority.cert_pem.write_to_path(paths["ca"])
    for name in ("127.0.0.1", "agent-1"):
        paths[name], paths[f"{name} key"] = issue(authority, name, folder)
    return paths


@pytest.fixture
def files(issued: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Files:
    """Give the server's environment what the example wants of it."""
    monkeypatch.setenv("BACKBEAT_TLS_CERT", f'"{issued["127.0.0.1"]}"')
    monkeypatch.setenv("BACKBEAT_TLS_KEY", f'"{issued["127.0.0.1 key"]}"')
    monkeypatch.setenv("BACKBEAT_TLS_CA", f'"{issued["ca"]}"')
    for role in ROLES:
        monkeypatch.setenv(variable_of(role), f'"{password_of(role)}"')
    return Files(issued["ca"], issued["agent-1"], issued["agent-1 key"])


def variable_of(role: str) -> str:
    return f"BACKBEAT_{role.upper().replace('-', '_')}_PASSWORD"


def password_of(role: str) -> str:
    return f"{SECRET} of {role}"


def inbox_of(role: str) -> str:
    return "_INBOX_metronome" if role.startswith("pulse") else f"_INBOX_{role}"


def url_of(server: NatsServer) -> str:
    return f"tls://127.0.0.1:{server.port}"


def login(server: NatsServer, files: Files, role: str) -> dict[str, Any]:
    """Return the settings of a role, as its owner would have them."""
    return {
        "nats_url": url_of(server),
        "cluster_id": CLUSTER,
        "agent_id": role,
        "user": role,
        "password": password_of(role),
        "inbox_prefix": inbox_of(role),
        "tls_ca": files.ca,
        "health_beats": 8 if role.startswith("agent") else 0,
        "answer_recalls": role.startswith("agent"),
        "serve_info": role.startswith("agent"),
    }


def connection(
    server: NatsServer, files: Files, role: str
) -> AbstractAsyncContextManager[NatsTransport]:
    """Log in as a role, to do by hand what no session would."""
    return connected(**login(server, files, role))


async def ask(transport: NatsTransport, subject: str, data: object = None) -> Any:
    """Ask JetStream, and return its answer."""
    request = b"" if data is None else json.dumps(data).encode()
    return json.loads((await transport.request(subject, request, timeout=10)).data)


async def keep(transport: NatsTransport) -> None:
    """Make the bucket and the stream of a cluster, and have a leader in it."""
    for name, more in (
        (BUCKET, {"subjects": [KEY.replace("metronome", ">")], "allow_direct": True}),
        ("BACKBEAT_STATUS", {"subjects": ["backbeat.status.>"]}),
    ):
        answer = await ask(transport, f"$JS.API.STREAM.CREATE.{name}", {"name": name, **more})
        assert "error" not in answer, answer
    answer = json.loads((await transport.request(KEY, b"pulse-a leads", timeout=10)).data)
    assert answer["stream"] == BUCKET


async def kept(transport: NatsTransport) -> tuple[int, bytes]:
    """Return the number and the text of what the bucket says last."""
    answer = await ask(transport, f"$JS.API.STREAM.MSG.GET.{BUCKET}", {"last_by_subj": KEY})
    return answer["message"]["seq"], base64.b64decode(answer["message"]["data"])


def forged_frame() -> bytes:
    """Write a frame of a leader that would be believed over every other."""
    segment = Segment(1 << 50, 0, 0, 0, 600_000)
    return encode(
        BeatFrame(
            cluster_id=CLUSTER,
            beat_index=1_000_000,
            downbeat=True,
            phase="downbeat",
            tempo_bpm=600.0,
            beats_per_bar=8,
            window_id="w-125000",
            epoch=1 << 50,
            leader_id="nobody",
            segment=segment,
        )
    )


def claim_of(agent_id: str) -> bytes:
    return encode(StatusClaim(agent_id, "election", 5, "done", 0, 1.0, "says who"))


# A grid of roles.


@guarded
async def test_everybody_can_do_what_they_are_there_for(files: Files, tmp_path: Path) -> None:
    # Each logs in another way: by variables of the NATS command line and our own, by a context and
    # by options.
    async with NatsServer(config=CONFIG) as server, trio.open_nursery() as nursery:
        pulse = {
            "NATS_URL": url_of(server),
            "NATS_USER": "pulse-a",
            "NATS_PASSWORD": password_of("pulse-a"),
            "NATS_CA": files.ca,
            "NATS_INBOX_PREFIX": "_INBOX_metronome",
        }
        nursery.start_soon(functools.partial(backbeat, "pulse", "--bpm", "120", env=pulse))
        fields = login(server, files, "agent-1")
        config = BackbeatConfig.from_env(
            {f"CHORUS_BACKBEAT_{name.upper()}": str(value) for name, value in fields.items()},
            require_connection=True,
            lock_timeout=30.0,
        )
        folder = tmp_path / "nats" / "context"
        folder.mkdir(parents=True)
        context = {"url": url_of(server), "user": "operator", "ca": files.ca}
        context |= {"password": password_of("operator"), "inbox_prefix": "_INBOX_operator"}
        (folder / "grid.json").write_text(json.dumps(context))
        async with (
            open_session(**login(server, files, "observer"), require_connection=True) as observer,
            open_recorder(observer, "agent-1") as claims,
            session(config) as agent,
        ):
            assert not agent.health().local_degradation
            async with agent.operation("election", id="election", beats=4):
                await agent.sleep(2)
            await claims.wait_for("election", "executing")
            await claims.wait_for("election", "done")
            home = {"XDG_CONFIG_HOME": str(tmp_path)}
            done = await backbeat("tempo", "240", "--context", "grid", env=home)
            assert done.returncode == 0, done.stderr
            await until(lambda: agent.tempo_bpm == observer.tempo_bpm == 240.0)
            flags = ["-s", url_of(server), "--user", "observer", "--tlsca", files.ca]
            flags += ["--password", password_of("observer"), "--inbox-prefix", "_INBOX_observer"]
            done = await backbeat("status", "--json", *flags, env={})
            assert done.returncode == 0, done.stderr
            assert json.loads(done.stdout)["current_tempo"] == 240.0
            assert agent.health().errors == observer.health().errors == ()
        nursery.cancel_scope.cancel()
        assert "Violation" not in server.log
        # The metronome made the stream that agents may not make, and who leads is on record.
        async with connection(server, files, "pulse-b") as transport:
            info = await ask(transport, "$JS.API.STREAM.INFO.BACKBEAT_STATUS")
            assert info["state"]["messages"] == 1
            assert json.loads((await kept(transport))[1])["leader_id"]


@guarded
async def test_metronomes_keep_who_leads_and_agents_their_last_word(files: Files) -> None:
    async with (
        NatsServer(config=CONFIG) as server,
        connection(server, files, "pulse-a") as leader,
        connection(server, files, "pulse-b") as other,
        connection(server, files, "agent-1") as agent,
    ):
        await keep(leader)
        for reader in (leader, other):
            direct = f"$JS.API.DIRECT.GET.{BUCKET}.{KEY}"
            assert (await reader.request(direct, b"", timeout=10)).data == b"pulse-a leads"
            assert await kept(reader) == (1, b"pulse-a leads")
            await ask(reader, f"$JS.API.STREAM.INFO.{BUCKET}")
        async with other.open_subscription(KEY) as changes:
            leader.publish_nowait(KEY, b"still")
            assert (await anext(aiter(changes))).data == b"still"
        async with leader.open_subscription(LEAD) as probes, trio.open_nursery() as nursery:

            async def answer() -> None:
                leader.publish_nowait((await anext(aiter(probes))).reply, b"here")

            nursery.start_soon(answer)
            assert (await other.request(LEAD, b"", timeout=10)).data == b"here"
        # The same answer each time, as there are two accounts that could give one.
        for _ in range(20):
            found = await ask(agent, "$JS.API.STREAM.INFO.BACKBEAT_STATUS")
            assert found["config"]["name"] == "BACKBEAT_STATUS", found
        said = await agent.request("backbeat.status.agent-1", claim_of("agent-1"), timeout=10)
        assert json.loads(said.data) == {"stream": "BACKBEAT_STATUS", "seq": 1}
        for transport in (leader, other, agent):
            assert transport.statistics().permission_errors == 0


@guarded
async def test_agents_call_services_of_others(files: Files) -> None:
    begun, ended = trio.Event(), trio.Event()

    async def handle(request: Request) -> bytes:
        if not request.data:
            begun.set()
            try:
                await trio.sleep_forever()
            finally:
                ended.set()
        return request.data

    async with (
        NatsServer(config=CONFIG) as server,
        open_session(**login(server, files, "agent-1")) as caller,
        open_session(**login(server, files, "agent-2")) as bb,
        bb.open_service("pages", version="1.2.0") as service,
        trio.open_nursery() as nursery,
    ):
        await until(lambda: caller.health().connected and bb.health().connected)
        await nursery.start(service.serve, "pages.fetch", handle)
        assert (await caller.request("pages.fetch", b"x", beats=100)).data == b"x"
        async with trio.open_nursery() as asking:
            asking.start_soon(caller.request, "pages.fetch")
            await begun.wait()
            asking.cancel_scope.cancel()
        await ended.wait()
        assert bb.statistics().calls_cancelled == 1
        # Neither is what the other is.
        with pytest.raises(PermissionDenied, match=r"publish to pages\.fetch"):
            await bb.request("pages.fetch", b"x")
        async with caller.open_service("pages", version="1.2.0") as other:
            with pytest.raises(PermissionDenied, match=r"subscribe to pages\.fetch"):
                await other.serve("pages.fetch", handle)
        nursery.cancel_scope.cancel()


@guarded
async def test_a_service_publishes_nothing_for_its_callers(files: Files) -> None:
    async def echo(request: Request) -> bytes:
        return request.data

    async with (
        NatsServer(config=CONFIG) as server,
        connection(server, files, "agent-1") as forger,
        open_session(**login(server, files, "agent-2")) as bb,
        bb.open_service("pages", version="1.2.0") as service,
        trio.open_nursery() as nursery,
        forger.open_subscription(BEATS) as beats,
    ):
        await until(lambda: bb.health().connected)
        await nursery.start(service.serve, "pages.fetch", echo)
        for reply in (BEATS, TEMPO, SYNC, "$JS.API.INFO"):
            forger.publish_nowait("pages.fetch", forged_frame(), reply=reply)
            forger.publish_nowait("pages.fetch", b"x", reply=reply)
        await until(lambda: bb.statistics().calls_unanswered == 8)
        await forger.request("pages.fetch", b"", timeout=10)
        assert not beats.waiting()
        # The inbox of agent-2 itself is not one of its callers'.
        forger.publish_nowait("_INBOX_agent-2.x", b"")
        await until(lambda: forger.statistics().permission_errors == 1)
        nursery.cancel_scope.cancel()


@guarded
async def test_an_operator_finds_all_services(files: Files) -> None:
    async with (
        NatsServer(["-js"], config=CONFIG) as server,
        connection(server, files, "pulse-a") as transport,
        leading(transport, cluster_id=CLUSTER, leader_id="pulse-a"),
        open_session(**login(server, files, "agent-1")),
        open_session(**login(server, files, "agent-2")) as bb,
        bb.open_service("pages", version="1.2.0"),
        connection(server, files, "operator") as operator,
    ):
        found: set[str] = set()
        while len(found) < 4:
            async with operator.open_request("$SRV.PING", b"") as answers:
                with trio.move_on_after(0.5):
                    async for answer in answers:
                        service = json.loads(answer.data)
                        metadata = service["metadata"]
                        who = metadata.get("agent_id") or metadata.get("leader_id")
                        found.add(f"{service['name']} {who}")
        assert found == {
            "backbeat-metronome pulse-a",
            "backbeat-agent agent-1",
            "backbeat-agent agent-2",
            "pages None",
        }
        assert "Violation" not in server.log


@pytest.mark.parametrize("limit", ["1536KB", "1MB"])
@guarded
async def test_claims_leave_room_for_the_record_of_who_leads(limit: str, files: Files) -> None:
    config = CONFIG
    # The example's own figures, a thousandth of them, but for the one that is tried.
    for figure, small in (
        ("max_file_store: 2GB", "max_file_store: 2MB"),
        ("max_file: 1536MB", f"max_file: {limit}"),
        ("disk_max_stream_bytes: 1GB", "disk_max_stream_bytes: 1MB"),
    ):
        assert config.count(figure) == 1
        config = config.replace(figure, small)
    async with (
        NatsServer(config=config) as server,
        connection(server, files, "pulse-a") as leader,
    ):
        store = KeyValueStore(leader, f"backbeat-{CLUSTER}")
        assert await store.open()
        revision = await store.write(b"pulse-a leads", 0)
        fields = login(server, files, "pulse-a")
        larger = ClaimStream(leader, BackbeatConfig(**fields, claims_max_bytes=2**20 + 1))
        assert not await larger.open()
        refusal = "max stream bytes" if limit == "1536KB" else "insufficient storage"
        assert refusal in larger.reason
        stream = ClaimStream(leader, BackbeatConfig(**fields, claims_max_bytes=2**20))
        assert await stream.open()
        options = login(server, files, "agent-1") | {"lock_timeout": 0.0, "grace_period": 0.0}
        async with open_session(**options) as bb:
            await until(lambda: bb.health().connected)
            for number in range(6000):
                bb.start_operation("election", id=f"election-{number:06}").complete()
            if limit == "1MB":
                # Then neither of the two has room for anything.
                with pytest.raises(TransportBroken, match="resource limits exceeded"):
                    while True:
                        revision = await store.write(b"x" * 2000, revision)
                        await trio.sleep(0.05)
                return
            await until(lambda: not bb.statistics().claims_pending)
            assert bb.statistics().claims_stored == 6000
        info = await ask(leader, "$JS.API.STREAM.INFO.BACKBEAT_STATUS")
        # It is full, as otherwise nothing would have been tried.
        assert info["state"]["messages"] < 6000
        for _ in range(5):
            revision = await store.write(b"x" * 2000, revision)


def test_the_default_size_of_the_stream_fits_into_the_example() -> None:
    figures = {
        name: int(amount) * {"MB": 2**20, "GB": 2**30}[unit]
        for name, amount, unit in re.findall(r"(\w+): (\d+)([MG]B)\b", CONFIG)
    }
    size = BackbeatConfig().claims_max_bytes
    assert figures["disk_max_stream_bytes"] == size
    assert figures["max_file"] == 1.5 * size
    assert figures["max_file_store"] > figures["max_file"]


@guarded
async def test_an_agent_can_find_out_who_has_claims_in_the_stream_and_reads_none(
    files: Files,
) -> None:
    async with (
        NatsServer(config=CONFIG) as server,
        connection(server, files, "pulse-a") as leader,
        connection(server, files, "agent-1") as agent,
        connection(server, files, "agent-2") as other,
    ):
        await keep(leader)
        await other.request("backbeat.status.agent-2", claim_of("agent-2"), timeout=10)
        subject = "$JS.API.STREAM.INFO.BACKBEAT_STATUS"
        request = json.dumps({"subjects_filter": ">"}).encode()
        answer = (await agent.request(subject, request, timeout=10)).data
        assert json.loads(answer)["state"]["subjects"] == {"backbeat.status.agent-2": 1}
        assert b"says who" not in answer
        assert b"says who" in claim_of("agent-2")


@guarded
async def test_the_observer_reads_what_agents_have_stored(files: Files) -> None:
    async with (
        NatsServer(config=CONFIG) as server,
        connection(server, files, "pulse-a") as leader,
        open_session(**login(server, files, "observer"), require_connection=True) as observer,
        open_session(**login(server, files, "operator"), require_connection=True) as operator,
        open_session(**login(server, files, "agent-1"), require_connection=True) as agent,
        open_session(**login(server, files, "agent-2"), require_connection=True) as other,
    ):
        await keep(leader)
        for number, bb in enumerate([agent, other] * 20):
            bb.start_operation("election", id=f"{number}").complete()
        await until(lambda: agent.statistics().claims_stored == 20)
        await until(lambda: other.statistics().claims_stored == 20)
        for agent_id, wanted in (("*", range(40)), ("agent-1", range(0, 40, 2))):
            async with observer.open_claims(agent_id, since=3600) as claims:
                found = [await anext(claims) for _ in wanted]
                assert sorted(int(claim.task_id) for claim in found) == list(wanted)
                agent.start_operation("election", id="live")
                assert (await anext(claims)).task_id == "live"
                agent.fail_operation("live", "its time has come")
        assert observer.health().errors == ()
        # The stream is not there for everybody.
        for bb in (agent, operator):
            with pytest.raises(PermissionDenied, match=re.escape(READING)):
                async with bb.open_claims(since=3600):
                    pytest.fail("not reached")  # pragma: no cover


@guarded
async def test_a_stored_claim_cannot_be_delivered_as_a_frame(files: Files) -> None:
    async with (
        NatsServer(config=CONFIG) as server,
        connection(server, files, "pulse-a") as leader,
        connection(server, files, "agent-1") as agent,
        connection(server, files, "observer") as observer,
    ):
        await keep(leader)
        await agent.request("backbeat.status.agent-1", forged_frame(), timeout=10)
        get = json.dumps({"seq": 1}).encode()
        async with agent.open_subscription(BEATS) as beats:
            for reply in (BEATS, f"{BEATS}.x", KEY):
                observer.publish_nowait("$JS.API.STREAM.MSG.GET.BACKBEAT_STATUS", get, reply=reply)
            await observer.flush()
            # The answer names the forged frame, and is none.
            with pytest.raises(DecodeError):
                decode_frame((await anext(aiter(beats))).data)
        decode_frame(forged_frame())
        assert await kept(leader) == (1, b"pulse-a leads")


JETSTREAM: Final = (
    KEY,
    f"$JS.API.STREAM.MSG.GET.{BUCKET}",
    f"$JS.API.STREAM.PURGE.{BUCKET}",
    f"$JS.API.STREAM.DELETE.{BUCKET}",
    # What is stored could be sent anywhere by these, as if the server had said it.
    "$JS.API.DIRECT.GET.BACKBEAT_STATUS",
    "$JS.API.DIRECT.GET.BACKBEAT_STATUS.backbeat.status.agent-1",
    "$JS.API.CONSUMER.CREATE.BACKBEAT_STATUS",
    "$JS.API.CONSUMER.CREATE.BACKBEAT_STATUS.name",
    "$JS.API.CONSUMER.CREATE.BACKBEAT_STATUS.name.backbeat.status.agent-1",
    "$JS.API.CONSUMER.DURABLE.CREATE.BACKBEAT_STATUS.name",
    "$JS.API.CONSUMER.MSG.NEXT.BACKBEAT_STATUS.name",
    "$JS.API.CONSUMER.DELETE.BACKBEAT_STATUS.name",
    "$JS.API.CONSUMER.LIST.BACKBEAT_STATUS",
    "$JS.API.STREAM.UPDATE.BACKBEAT_STATUS",
    "$JS.API.STREAM.PURGE.BACKBEAT_STATUS",
    "$JS.API.STREAM.DELETE.BACKBEAT_STATUS",
    "$JS.API.STREAM.MSG.DELETE.BACKBEAT_STATUS",
    "$JS.API.STREAM.CREATE.FORGED",
)
OTHERS: Final = ("_INBOX_metronome.>", "_INBOX_agent-2.>", "_INBOX.>", "*.>", ">")
# What reads the stored claims, as the server names it.
READING: Final = "grid.status.get"
# Where the server has an agent answer a metronome, and what else such an answer could be sent to.
ANSWERS: Final = ("_R_.x.1", "_INBOX_metronome.x.1", *JETSTREAM)
INBOXES: Final = ("_INBOX_metronome.x.1", "_INBOX_agent-2.x.1")


@pytest.mark.parametrize(
    ("role", "subjects"),
    [
        (
            "agent-1",
            (
                *(BEATS, TEMPO, LEAD, RECALL, CONTROL, "backbeat.control.agent-2", READING),
                *("backbeat.status.agent-2", "_INBOX_operator.x.1", *JETSTREAM, *INBOXES),
            ),
        ),
        (
            "operator",
            (
                *(BEATS, RECALL, READING, "backbeat.status.agent-1", "backbeat.status.operator"),
                *ANSWERS,
            ),
        ),
        (
            "observer",
            (BEATS, TEMPO, LEAD, RECALL, CONTROL, "backbeat.status.agent-1", *ANSWERS),
        ),
        (
            "pulse-b",
            ("backbeat.status.agent-1", "backbeat.beat.another", TEMPO, CONTROL, *INBOXES),
        ),
    ],
)
@guarded
async def test_publications_that_are_refused(
    role: str, subjects: tuple[str, ...], files: Files
) -> None:
    async with (
        NatsServer(config=CONFIG) as server,
        connection(server, files, "pulse-a") as leader,
        connection(server, files, "observer") as observer,
        connection(server, files, role) as transport,
    ):
        await keep(leader)
        async with (
            leader.open_subscription(BEATS),
            leader.open_subscription(TEMPO),
            leader.open_subscription(f"backbeat.lead.{CLUSTER}.*"),
            leader.open_subscription(KEY),
            observer.open_subscription(BEATS),
            observer.open_subscription("backbeat.status.*"),
        ):
            before = leader.statistics().received
            for number, subject in enumerate(subjects, 1):
                transport.publish_nowait(subject, b"{}")
                await transport.flush()
                statistics = transport.statistics()
                assert statistics.permission_errors == number, subject
                # nats-py tells of it in small letters. Answers have too many subjects to name each.
                first = subject.partition(".")[0]
                named = f"{first}.>" if first.startswith(("_INBOX", "_R_")) else subject
                assert named.lower() in statistics.recent_errors[-1][1].lower()
            for hearer in (leader, observer):
                await hearer.flush()
            assert leader.statistics().received == before
            assert observer.statistics().received == 0
            # They would have heard.
            leader.publish_nowait(BEATS, b"{}")
            await leader.flush()
            await observer.flush()
            assert leader.statistics().received == before + 1
            assert observer.statistics().received == 1
        assert await kept(leader) == (1, b"pulse-a leads")


@pytest.mark.parametrize(
    ("role", "subjects"),
    [
        (
            "agent-1",
            (
                *(SYNC, TEMPO, LEAD, "backbeat.control.agent-2", "backbeat.control.*"),
                *("_R_.>", "backbeat.>", KEY, *OTHERS),
            ),
        ),
        (
            "observer",
            (SYNC, TEMPO, RECALL, CONTROL, "_INBOX_agent-1.>", "_R_.>", "backbeat.>", ">"),
        ),
        ("operator", (SYNC, TEMPO, RECALL, CONTROL, "_INBOX_agent-1.>", "_R_.>", ">")),
        ("pulse-b", (CONTROL, "_INBOX_agent-1.>", ">")),
    ],
)
@guarded
async def test_subscriptions_that_are_refused(
    role: str, subjects: tuple[str, ...], files: Files
) -> None:
    async with (
        NatsServer(config=CONFIG) as server,
        connection(server, files, role) as transport,
    ):
        for number, subject in enumerate(subjects, 1):
            async with transport.open_subscription(subject):
                assert transport.statistics().permission_errors == number, subject


async def recalled(transport: NatsTransport) -> dict[str, RecallReply]:
    """Ask for the grid as a metronome does, and return the answers by the name of who gave it."""
    found: dict[str, RecallReply] = {}
    request = encode(RecallRequest(CLUSTER, "pulse-b"))
    async with transport.open_request(RECALL, request) as answers:
        with trio.move_on_after(1.0):
            async for answer in answers:
                reply = decode_recall_reply(answer.data)
                found[reply.agent_id] = reply
    return found


@guarded
async def test_metronomes_ask_for_the_grid_and_those_who_follow_it_answer(files: Files) -> None:
    async with (
        NatsServer(config=CONFIG) as server,
        connection(server, files, "pulse-a") as transport,
        leading(transport, cluster_id=CLUSTER) as metronome,
        connection(server, files, "pulse-b") as other,
        open_session(**login(server, files, "agent-1"), lock_timeout=30.0) as one,
        open_session(**login(server, files, "agent-2"), lock_timeout=30.0) as two,
        open_session(**login(server, files, "observer"), lock_timeout=30.0) as observer,
        open_session(**login(server, files, "operator"), lock_timeout=30.0) as operator,
    ):
        found = await recalled(other)
        assert {name: reply.role for name, reply in found.items()} == {
            "pulse-a": "leader",
            "agent-1": "agent",
            "agent-2": "agent",
        }
        assert {reply.epoch for reply in found.values()} == {metronome.epoch}
        for bb in (one, two, observer, operator):
            assert bb.health().errors == ()
        for each in (transport, other):
            assert each.statistics().permission_errors == 0


@guarded
async def test_agents_carry_the_grid_from_one_metronome_to_the_next(files: Files) -> None:
    async with (
        NatsServer(config=CONFIG) as server,
        connection(server, files, "pulse-a") as one,
        connection(server, files, "pulse-b") as two,
        open_session(**login(server, files, "agent-1"), lock_timeout=0.0) as bb,
    ):
        for name, transport in (("pulse-1", one), ("pulse-2", two), ("pulse-3", one)):
            store = KeyValueStore(transport, f"backbeat-{CLUSTER}")
            async with leading(transport, cluster_id=CLUSTER, store=store, leader_id=name):
                await until(lambda n=name: bb.health().leader_id == n)  # type: ignore[misc]
                await trio.sleep(0.5)
        assert bb.statistics().locks == 1
        for each in (one, two):
            assert each.statistics().permission_errors == 0
        assert "Violation" not in server.log


@guarded
async def test_who_hears_claims_cannot_allow_itself_to_publish_frames(files: Files) -> None:
    # As `open_claims` needs it: what it hears may name any subject for an answer.
    own = '            "$SRV.>"\n            "_INBOX_agent-1.>"'
    assert CONFIG.count(own) == 1
    config = CONFIG.replace(own, f'            "backbeat.status.*"\n{own}')
    async with (
        NatsServer(config=config) as server,
        connection(server, files, "agent-1") as agent,
        agent.open_subscription("backbeat.status.*") as claims,
    ):
        agent.publish_nowait("backbeat.status.agent-1", claim_of("agent-1"), reply=BEATS)
        assert (await anext(aiter(claims))).reply == BEATS
        agent.publish_nowait(BEATS, forged_frame())
        await agent.flush()
        assert dict(agent.statistics().refused) == {f"publish to {BEATS}": 1}


@guarded
async def test_agent_cannot_publish_frames(files: Files) -> None:
    async with (
        NatsServer(config=CONFIG) as server,
        connection(server, files, "pulse-a") as transport,
        leading(
            transport, cluster_id=CLUSTER, store=KeyValueStore(transport, f"backbeat-{CLUSTER}")
        ) as metronome,
        connection(server, files, "agent-2") as forger,
        open_session(**login(server, files, "agent-1"), lock_timeout=30.0) as bb,
    ):
        assert not bb.health().local_degradation
        forger.publish_nowait(BEATS, forged_frame())
        await forger.flush()
        assert forger.statistics().permission_errors == 1
        frames = bb.statistics().frames
        await until(lambda: bb.statistics().frames >= frames + 3)
        assert bb.statistics().locks == 1
        assert bb.current_beat() < 100_000
        assert bb.statistics().frames_unexplained == 0
        # It would have been heard. Nor would it be believed while a leader answers: that is asked.
        transport.publish_nowait(BEATS, forged_frame())
        await until(lambda: bb.statistics().frames_unexplained == 1)
        assert bb.statistics().locks == 1
        assert bb.current_beat() < 100_000 > metronome.current_beat()


@guarded
async def test_agent_cannot_publish_the_status_of_another(files: Files) -> None:
    async with (
        NatsServer(config=CONFIG) as server,
        open_session(
            **login(server, files, "observer"), require_connection=True, lock_timeout=0.0
        ) as observer,
        open_recorder(observer) as claims,
        connection(server, files, "agent-1") as forger,
    ):
        forger.publish_nowait("backbeat.status.agent-2", claim_of("agent-2"))
        # Nor on its own subject, where it is the listener that looks.
        forger.publish_nowait("backbeat.status.agent-1", claim_of("agent-2"))
        forger.publish_nowait("backbeat.status.agent-1", claim_of("agent-1"))
        await claims.wait_for("election", "done")
        assert [claim.agent_id for claim in claims.claims] == ["agent-1"]
        await forger.flush()
        assert forger.statistics().permission_errors == 1
        assert observer.statistics().claims_undecodable == 1


@guarded
async def test_agent_cannot_answer_sync_requests(files: Files) -> None:
    async with (
        NatsServer(config=CONFIG) as server,
        connection(server, files, "agent-2") as forger,
        forger.open_subscription(SYNC),
        open_session(**login(server, files, "agent-1"), lock_timeout=0.0, tempo_bpm=600.0) as bb,
    ):
        await until(lambda: bb.statistics().pings_failed >= 2)
        await forger.flush()
        assert forger.statistics().received == 0
        assert forger.statistics().permission_errors == 1
        assert bb.statistics().locks == 0


@pytest.mark.parametrize("role", ["agent-1", "observer"])
@guarded
async def test_only_the_operator_changes_the_tempo(role: str, files: Files) -> None:
    async with (
        NatsServer(config=CONFIG) as server,
        connection(server, files, "pulse-a") as transport,
        leading(transport, cluster_id=CLUSTER) as metronome,
        open_session(**login(server, files, role), lock_timeout=30.0) as bb,
        open_session(**login(server, files, "operator"), lock_timeout=30.0) as operator,
    ):
        with pytest.raises(BackbeatError):
            await bb.set_tempo(1200)
        assert metronome.statistics().tempo_changes == 0
        assert TEMPO in bb.health().errors[-1]
        await operator.set_tempo(1200)
        assert metronome.statistics().tempo_changes == 1
        await until(lambda: bb.tempo_bpm == 1200.0)


@guarded
async def test_only_the_operator_cancels_operations(files: Files) -> None:
    async with (
        NatsServer(config=CONFIG) as server,
        open_session(**login(server, files, "agent-1"), require_connection=True) as agent,
        open_session(**login(server, files, "agent-2"), require_connection=True) as other,
        open_session(**login(server, files, "observer"), require_connection=True) as observer,
        open_session(**login(server, files, "operator"), require_connection=True) as operator,
        open_recorder(operator, "agent-1") as claims,
    ):
        with pytest.raises(NoResponders, match="agent agent-1 takes no requests"):
            await operator.cancel_remote("agent-1", "election", "why not")
        with pytest.raises(OperationCancelled) as caught:
            async with agent.operation("election", id="election", cancellable=True):
                for bb in (agent, other, observer):
                    with pytest.raises(PermissionDenied, match=re.escape(CONTROL)):
                        await bb.cancel_remote("agent-1", "election", "why not")
                assert agent.statistics().operations_cancelled == 0
                with pytest.raises(OperationNotFound):
                    await operator.cancel_remote("agent-1", "another", "why not")
                agent.start_operation("election", id="no block")
                with pytest.raises(CancelRefused):
                    await operator.cancel_remote("agent-1", "no block", "why not")
                await operator.cancel_remote("agent-1", "election", "the disk is full")
                await trio.sleep_forever()
        assert (caught.value.reason, caught.value.asked_by) == ("the disk is full", "operator")
        claim = await claims.wait_for("election", "failed")
        assert claim.notes == "P2P operation failed: the disk is full (type: election)"
        assert operator.health().errors == ()
        with pytest.raises(NoResponders):
            await operator.cancel_remote("agent-2", "election", "why not")
        assert server.log.count(f'Publish Violation - Subject "{CONTROL}"') == 3


@guarded
async def test_an_agent_without_the_permission_works_and_is_not_cancelled(files: Files) -> None:
    line = '            "backbeat.control.agent-1"\n'
    assert CONFIG.count(line) == 1
    async with (
        NatsServer(config=CONFIG.replace(line, "")) as server,
        open_session(**login(server, files, "agent-1"), require_connection=True) as agent,
        open_session(**login(server, files, "operator"), require_connection=True) as operator,
    ):
        async with agent.operation("election", id="plain"):
            pass
        assert "control" not in str(agent.health().errors)
        async with agent.operation("election", id="election", cancellable=True):
            with pytest.raises(NoResponders):
                await operator.cancel_remote("agent-1", "election", "why not")
        await until(lambda: f"may not subscribe to {CONTROL};" in str(agent.health().errors))


@guarded
async def test_refusals_show_in_health_and_statistics(files: Files) -> None:
    fields = {"agent_id": "agent-2", "lock_timeout": 0.0}
    async with (
        NatsServer(config=CONFIG) as server,
        open_session(**(login(server, files, "agent-1") | fields)) as bb,
    ):

        def refused(session: Session) -> int:
            transport = session.statistics().transport
            assert transport is not None
            return transport.permission_errors

        await until(lambda: bb.health().connected)
        bb.start_operation("election")
        await until(lambda: bb.health().errors)
        assert "permission denied" in bb.health().errors[-1]
        assert "backbeat.status.agent-2" in bb.health().errors[-1]
        assert refused(bb) >= 1
        assert bb.health().connected
        assert bb.health().reconnect_count == 0
        # A forgotten inbox prefix, too, is told of.
        forgotten = login(server, files, "agent-2") | {"inbox_prefix": "_INBOX"}
        async with open_session(**forgotten, lock_timeout=0.0) as other:
            await until(lambda: any("_INBOX.>" in error for error in other.health().errors))
            assert refused(other) >= 1


@guarded
async def test_two_agents_of_one_id_hear_of_each_other(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        NatsServer(config=CONFIG) as server,
        connection(server, files, "pulse-a") as leader,
        leading(leader, cluster_id=CLUSTER, tempo_bpm=600.0),
    ):
        names = (f"process-{number}" for number in range(1, 4))
        monkeypatch.setattr(runtime, "process_name", lambda: next(names))
        agent_1 = login(server, files, "agent-1") | {"lock_timeout": 20.0}
        async with open_session(**agent_1) as one, open_session(**agent_1) as two:
            agent_2 = login(server, files, "agent-2") | {"lock_timeout": 20.0}
            async with open_session(**agent_2) as other:
                for bb in (one, two):
                    await until(lambda bb=bb: "agent id 'agent-1'" in str(bb.health().errors))  # type: ignore[misc]
                    assert "permission denied" not in str(bb.health().errors)
                assert "agent id" not in str(other.health().errors)


# Subjects for answers, which no server checks.


@guarded
async def test_no_answer_is_written_over_the_key_that_says_who_leads(files: Files) -> None:
    async with (
        NatsServer(config=CONFIG) as server,
        connection(server, files, "pulse-a") as leader,
        leading(leader, cluster_id=CLUSTER) as metronome,
        connection(server, files, "observer") as observer,
        observer.open_subscription(BEATS) as beats,
        connection(server, files, "agent-1") as agent,
    ):
        await keep(leader)
        request = encode(SyncRequest(CLUSTER, "agent-1"))
        for reply in (KEY, BEATS, "$JS.API.STREAM.PURGE.BACKBEAT_STATUS"):
            agent.publish_nowait(SYNC, request, reply=reply)
            agent.publish_nowait("backbeat.status.agent-1", claim_of("agent-1"), reply=reply)
            agent.publish_nowait("grid.status.info", b"", reply=reply)
            await agent.flush()
        assert agent.statistics().permission_errors == 0
        # An answer to be waited for: by then the others have been given.
        await agent.request(SYNC, request, timeout=10)
        assert metronome.statistics().syncs == 4
        assert await kept(leader) == (1, b"pulse-a leads")
        info = await ask(agent, "$JS.API.STREAM.INFO.BACKBEAT_STATUS")
        assert info["state"]["messages"] == 3
        # On the subject of the beats agents may find such answers, which are no frames.
        sent = metronome.statistics().frames
        types: set[str | None] = set()
        while metronome.statistics().frames < sent + 2 or len(types) < 2:
            types.add(json.loads((await anext(aiter(beats))).data).get("type"))
        assert "backbeat.beatframe.v1" in types


@guarded
async def test_metronome_writes_answers_to_inboxes_only() -> None:
    # Where there is one account, or no permissions at all.
    replies = ("backbeat.beat.c", "backbeat.status.other", "$KV.backbeat-c.metronome", "$JS.API.X")
    async with NatsServer() as server:
        one, two = (NatsTransport(BackbeatConfig(nats_url=server.url)) for _ in range(2))
        async with trio.open_nursery() as nursery:
            for transport in (one, two):
                await nursery.start(transport.run)
                await transport.wait_connected()
            async with (
                leading(one, cluster_id="c") as metronome,
                two.open_subscription("backbeat.status.other"),
                two.open_subscription("$KV.>"),
                two.open_subscription("my.inbox") as inbox,
            ):
                requests = {
                    "backbeat.sync.c": encode(SyncRequest("c", "a")),
                    "backbeat.tempo.c": encode(TempoRequest("c", 1200.0)),
                }
                for subject, request in requests.items():
                    for reply in (*replies, "my.inbox"):
                        two.publish_nowait(subject, request, reply=reply)
                for _ in requests:
                    await anext(aiter(inbox))
                assert metronome.statistics().undecodable == 2 * len(replies)
                assert metronome.statistics().syncs == 1
                # What is refused an answer is not done either.
                assert metronome.statistics().tempo_changes == 1
                # The answers in the inbox are all that came.
                assert two.statistics().received == len(requests)
            nursery.cancel_scope.cancel()


# The example's passwords.


async def refused(fields: dict[str, Any]) -> BackbeatError:
    """Log in with settings that must not do, and return why they did not."""
    with pytest.raises(BackbeatError) as caught:
        async with open_session(**fields, require_connection=True):
            pytest.fail("the session was entered")
    return caught.value


@guarded
async def test_passwords_of_the_environment(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    # A bcrypt hash needs no quotes, though it begins as a variable does.
    digest = "$2a$04$abcdefghijklmnopqrstuukuzxyRvTzshtzmn.wAn7Hp4DSS0GdUi"
    monkeypatch.setenv(variable_of("observer"), digest)
    async with NatsServer(config=CONFIG) as server:
        fields = login(server, files, "observer") | {"password": "hunter", "lock_timeout": 0.0}
        async with open_session(**fields, require_connection=True) as bb:
            assert bb.health().connected
        for wrong in (
            {"password": digest},
            {"password": ""},
            {"user": "agent-1"},
            {"user": None, "password": None},
            {"user": None, "password": None, "token": "hunter"},
        ):
            assert "refused the credentials" in str(await refused(fields | wrong))
        # And in the clear nobody gets as far as saying a password.
        assert isinstance(await refused(fields | {"tls_ca": None}), TLSFailed)


@pytest.mark.parametrize(
    "variable", ["BACKBEAT_TLS_KEY", "BACKBEAT_TLS_CERT", *map(variable_of, ROLES)]
)
@guarded
async def test_server_does_not_start_without_a_password(
    variable: str, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(variable)
    with pytest.raises(RuntimeError, match="did not start"):
        async with NatsServer(config=CONFIG):
            pytest.fail("the server came up")


# Every way to log in.

WAYS: Final = ("option", "flag", "our variable", "their variable", "context")
# The field, and what it is called by the flags, the variables and the contexts of the NATS command
# line.
NAMES: Final = {
    "nats_url": ("--server", "NATS_URL", "url"),
    "user": ("--user", "NATS_USER", "user"),
    "password": ("--password", "NATS_PASSWORD", "password"),
    "token": ("--token", "NATS_TOKEN", "token"),
    "nkey": ("--nkey", "NATS_NKEY", "nkey"),
    "creds": ("--creds", "NATS_CREDS", "creds"),
    "tls_ca": ("--tlsca", "NATS_CA", "ca"),
    "tls_cert": ("--tlscert", "NATS_CERT", "cert"),
    "tls_key": ("--tlskey", "NATS_KEY", "key"),
    "inbox_prefix": ("--inbox-prefix", "NATS_INBOX_PREFIX", "inbox_prefix"),
}


def configured(way: str, fields: dict[str, Any], home: Path) -> BackbeatConfig:
    """Give settings in one of the ways there are."""
    env = {"CHORUS_BACKBEAT_REQUIRE_CONNECTION": "true", "CHORUS_BACKBEAT_LOCK_TIMEOUT": "0"}
    flags: list[str] = []
    if way == "option":
        return BackbeatConfig.from_env(env, **fields)
    if way == "flag":
        flags = [word for name, value in fields.items() for word in (NAMES[name][0], value)]
    elif way == "our variable":
        env |= {f"CHORUS_BACKBEAT_{name.upper()}": value for name, value in fields.items()}
        assert BackbeatConfig.from_env(env | {"CHORUS_BACKBEAT_AGENT_ID": "a"}).user == fields.get(
            "user"
        )
    elif way == "their variable":
        env |= {NAMES[name][1]: value for name, value in fields.items()}
    else:
        folder = home / "nats" / "context"
        folder.mkdir(parents=True, exist_ok=True)
        context = {NAMES[name][2]: value for name, value in fields.items()}
        (folder / "grid.json").write_text(json.dumps(context))
        env |= {"XDG_CONFIG_HOME": str(home)}
        flags = ["--context", "grid"]
    root = cli.make_context("backbeat", ["status", *flags])
    params = show_status.make_context("status", flags, parent=root).params
    return settings(take_connection("status", params), env)


class Key(NamedTuple):
    seed: bytes
    public: str

    @classmethod
    def new(cls, kind: int) -> Key:
        seed = bytes(nkeys.encode_seed(os.urandom(32), kind))
        return cls(seed, bytes(nkeys.from_seed(bytearray(seed)).public_key).decode())

    def token(self, subject: str, about: dict[str, Any]) -> str:
        """Sign what is said of another key."""

        def part(data: bytes) -> str:
            return base64.urlsafe_b64encode(data).rstrip(b"=").decode()

        header = {"typ": "JWT", "alg": "ed25519-nkey"}
        claims = {"jti": "1", "iat": 1, "iss": self.public, "name": about["type"], "sub": subject}
        claims["nats"] = {**about, "version": 2}
        signed = ".".join(part(json.dumps(words).encode()) for words in (header, claims))
        signature = nkeys.from_seed(bytearray(self.seed)).sign(signed.encode())
        return f"{signed}.{part(bytes(signature))}"


def credentials(folder: Path) -> tuple[str, str]:
    """Make an operator, its account and a user; return a server's configuration and a path."""
    operator = Key.new(nkeys.PREFIX_BYTE_OPERATOR)
    account = Key.new(nkeys.PREFIX_BYTE_ACCOUNT)
    user = Key.new(nkeys.PREFIX_BYTE_USER)
    unlimited = dict.fromkeys(("subs", "data", "payload", "imports", "exports", "conn", "leaf"), -1)
    granted = operator.token(
        account.public, {"type": "account", "limits": {**unlimited, "wildcards": True}}
    )
    config = (
        f"operator: {operator.token(operator.public, {'type': 'operator'})}\n"
        f"resolver: MEMORY\nresolver_preload: {{ {account.public}: {granted} }}\n"
    )
    rights: dict[str, Any] = {"type": "user", "pub": {}, "sub": {}}
    rights |= dict.fromkeys(("subs", "data", "payload"), -1)
    path = folder / "user.creds"
    path.write_text(
        f"-----BEGIN NATS USER JWT-----\n{account.token(user.public, rights)}\n"
        "------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{user.seed.decode()}\n------END USER NKEY SEED------\n"
    )
    return config, str(path)


(TLS,) = re.findall(r"^tls \{.*?^\}\n", CONFIG, re.DOTALL | re.MULTILINE)


def uncommented(*settings: str) -> str:
    """Return the example with some of its TLS settings in force."""
    config = CONFIG
    for setting in settings:
        assert config.count(f"  # {setting}") == 1
        config = config.replace(f"  # {setting}", f"  {setting}")
    return config


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["password", "token", "nkey", "creds", "TLS", "mutual TLS"])
@guarded
async def test_every_way_to_log_in(kind: str, way: str, files: Files, tmp_path: Path) -> None:
    proof: dict[str, str]
    if kind == "password":
        config = CONFIG
        proof = {"user": "agent-1", "password": password_of("agent-1")}
        proof["inbox_prefix"] = "_INBOX_agent-1"
    elif kind == "token":
        config = f'{TLS}\nauthorization {{ token: "{SECRET}" }}'
        proof = {"token": SECRET}
    elif kind == "nkey":
        key = Key.new(nkeys.PREFIX_BYTE_USER)
        by_password = "user: pulse-b, password: $BACKBEAT_PULSE_B_PASSWORD"
        assert by_password in CONFIG
        config = CONFIG.replace(by_password, f"nkey: {key.public}")
        (tmp_path / "seed.nk").write_bytes(key.seed)
        proof = {"nkey": str(tmp_path / "seed.nk"), "inbox_prefix": "_INBOX_metronome"}
    elif kind == "creds":
        accounts, path = credentials(tmp_path)
        config = f"{TLS}\n{accounts}"
        proof = {"creds": path}
    elif kind == "TLS":
        config = TLS
        proof = {"tls_ca": files.ca}
    else:
        config = uncommented("ca_file: $BACKBEAT_TLS_CA", "verify_and_map: true")
        password = "        password: $BACKBEAT_AGENT_1_PASSWORD\n"
        assert password in config
        config = config.replace(password, "")
        proof = {"tls_cert": files.cert, "tls_key": files.key, "inbox_prefix": "_INBOX_agent-1"}
    async with NatsServer(config=config) as server:
        common = {"nats_url": url_of(server)}
        if kind != "TLS":
            common["tls_ca"] = files.ca
        async with session(configured(way, common | proof, tmp_path)) as bb:
            assert bb.health().connected
            assert bb.health().errors == ()
        with pytest.raises(TransportBroken):
            async with session(configured(way, common, tmp_path)):
                pytest.fail("the session was entered")


@guarded
async def test_certificates_beside_passwords(files: Files) -> None:
    config = uncommented("ca_file: $BACKBEAT_TLS_CA", "verify: true")
    async with NatsServer(config=config) as server:
        fields = login(server, files, "agent-2") | {"lock_timeout": 0.0}
        with_cert = fields | {"tls_cert": files.cert, "tls_key": files.key}
        async with open_session(**with_cert, require_connection=True) as bb:
            assert bb.health().connected
        await refused(fields)
        await refused(with_cert | {"password": "wrong"})


@guarded
async def test_handshake_before_the_greeting(files: Files) -> None:
    async with NatsServer(config=uncommented("handshake_first: true")) as server:
        fields = login(server, files, "agent-1") | {"lock_timeout": 0.0, "tls_first": True}
        async with open_session(**fields, require_connection=True) as bb:
            assert bb.health().connected


# Nothing secret in the clear.


@pytest.mark.parametrize("kind", ["password", "token", "nkey", "creds", "nkey and token"])
@guarded
async def test_nothing_is_said_or_signed_without_tls(kind: str, tmp_path: Path) -> None:
    _, path = credentials(tmp_path)
    seed = tmp_path / "seed.nk"
    seed.write_bytes(Key.new(nkeys.PREFIX_BYTE_USER).seed)
    proof: dict[str, Any] = {
        "password": {"user": "agent-1", "password": "s3cr3t"},
        "token": {"token": "s3cr3t"},
        "nkey": {"nkey": str(seed)},
        "creds": {"creds": path},
        "nkey and token": {"nkey": str(seed), "token": "s3cr3t"},
    }[kind]
    nonce = "bm9uY2Vub25jZQ"
    async with fake_server(auth_required=True, nonce=nonce) as (port, told):
        fields = {"nats_url": f"tls://127.0.0.1:{port}", **proof}
        assert "does not offer TLS" in str(await refused(fields))
        # Nor as the second server, whose scheme is left to be that of the first.
        fields["nats_url"] += f",127.0.0.1:{port}"
        assert "does not offer TLS" in str(await refused(fields))
        # Nor when it goes on trying.
        async with open_session(**fields, lock_timeout=0.0) as bb:
            await until(lambda: bb.health().errors)
            assert not bb.health().connected
        assert told == b""
        # It would have been told.
        fields["nats_url"] = f"nats://127.0.0.1:{port}"
        async with open_session(**fields, require_connection=True, lock_timeout=0.0):
            assert any(word in told for word in (b"s3cr3t", b'"sig"', b'"jwt"'))


@pytest.mark.parametrize("part", ["JWT", "SEED", "nothing"])
def test_credentials_that_lack_a_part(part: str, tmp_path: Path) -> None:
    path = Path(credentials(tmp_path)[1])
    text = path.read_text()
    seed = re.findall(r"^SU\w+$", text, re.MULTILINE)[0]
    jwt, _, key = text.partition("\n\n")
    path.write_text({"JWT": jwt, "SEED": key, "nothing": ""}[part])
    with pytest.raises(ConfigError, match="holds no JWT and its seed") as caught:
        NatsTransport(BackbeatConfig(creds=str(path)))
    assert seed not in str(caught.value)
    path.unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        NatsTransport(BackbeatConfig(creds=str(path)))
