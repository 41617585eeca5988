"""``backbeat doctor``: each step, role by role, and that nothing is changed or given away."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import trio
import trustme
from certificates import issue
from helpers import backbeat, connected, fake_server, leading, until
from msgspec.structs import replace

from backbeat_trio import BackbeatConfig, Session
from backbeat_trio._cli.doctor import _say_difference, _say_metronomes
from backbeat_trio._cli.findings import Finding
from backbeat_trio._cli.reach import Greeting
from backbeat_trio._cli.storage import format_bytes, try_stores
from backbeat_trio._transport.jetstream import ClaimStream, KeyValueStore
from backbeat_trio._transport.nats import NatsTransport
from backbeat_trio._wire import bucket_of, recall_subject, status_subject, tempo_subject
from backbeat_trio.testing import NatsServer, open_session

from .programs import invoked
from .test_output import at_a_terminal

CLUSTER: Final = "chorus-production"
# The example as it stands, without its TLS.
CONFIG: Final = (
    "jetstream {"
    + (Path(__file__).parent.parent.parent / "examples" / "nats-server.conf")
    .read_text()
    .partition("\njetstream {")[2]
)
ROLES: Final = {
    "pulse-a": "metronome",
    "pulse-b": "metronome",
    "agent-1": "agent",
    "agent-2": "agent",
    "operator": "operator",
    "observer": "observer",
}

Findings = dict[tuple[str, str], dict[str, str]]


def secret_of(user: str) -> str:
    return f"s3cr3t-of-{user}"


def login(server: NatsServer, user: str) -> dict[str, Any]:
    inbox = "_INBOX_metronome" if user.startswith("pulse") else f"_INBOX_{user}"
    return {
        "nats_url": server.url,
        "cluster_id": CLUSTER,
        "agent_id": user,
        "user": user,
        "password": secret_of(user),
        "inbox_prefix": inbox,
        "lock_timeout": 30.0,
    }


def flags(server: NatsServer, user: str) -> list[str]:
    fields = login(server, user)
    return [
        *("-s", server.url, "--user", user, "--password", fields["password"]),
        *("--inbox-prefix", fields["inbox_prefix"], "--timeout", "20s"),
    ]


def read(output: str) -> Findings:
    return {(each["step"], each["name"]): each for each in json.loads(output)["findings"]}


def failed(found: Findings) -> set[str]:
    return {name for (_, name), each in found.items() if each["verdict"] == "failed"}


@pytest.fixture
def passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    for user in ROLES:
        variable = f"BACKBEAT_{user.upper().replace('-', '_')}_PASSWORD"
        monkeypatch.setenv(variable, f'"{secret_of(user)}"')


@asynccontextmanager
async def guarded_cluster() -> AsyncGenerator[tuple[NatsServer, NatsTransport], None]:
    """Run the example's server with a metronome, and give its connection."""
    async with (
        NatsServer(config=CONFIG) as server,
        connected(**login(server, "pulse-a")) as transport,
        # So slow that no machine is so busy that two frames are missing.
        leading(
            transport,
            cluster_id=CLUSTER,
            tempo_bpm=20.0,
            store=KeyValueStore(transport, bucket_of(CLUSTER)),
        ) as metronome,
    ):
        assert await ClaimStream(transport, BackbeatConfig(**login(server, "pulse-a"))).open()
        await until(lambda: metronome.leads)
        yield server, transport


async def test_each_role_of_the_example_is_told_what_it_may_do(
    passwords: None, capsys: pytest.CaptureFixture[str]
) -> None:
    async with guarded_cluster() as (server, _):
        for user, role in ROLES.items():
            where = [*flags(server, user), "-j"]
            if role == "agent":
                where += ["--agent-id", user]
            done = await invoked(capsys, "doctor", *where)
            assert "s3cr3t" not in done.out + done.err
            found = read(done.out)
            assert failed(found) == set(), found
            assert done.status == 0
            told = found["permissions", "role"]["text"]
            assert told.endswith(f" {role} does"), told
            # Nobody has more than that, and what is not tried says why.
            assert ("permissions", "powers") not in found
            assert found["permissions", "publish beats"]["verdict"] == "not tried"
            assert found["clock", "skew"]["verdict"] in ("ok", "warning")
            assert found["cluster", "metronome"]["text"].startswith("pulse-a leads")
            assert found["cluster", "standbys"]["verdict"] == "warning"
            may_read = role == "metronome"
            for name in ("bucket", "storage"):
                assert (found["JetStream", name]["verdict"] == "ok") is may_read, found
            assert (("JetStream", "record") in found) is may_read
            assert found["JetStream", "claims"]["verdict"] == "ok"
            assert found["JetStream", "limits"]["text"].endswith(" of 1 GiB")
            finds = found["cluster", "versions"]["verdict"]
            assert finds == ("ok" if role == "operator" else "not tried")
            # Asked for as another role, it is told what it lacks.
            if user == "observer":
                done = await invoked(capsys, "doctor", *where, "--role", "operator")
                found = read(done.out)
                assert done.status == 1
                lacks = {"change the tempo", "cancel operations", "find services", "role"}
                assert failed(found) == lacks
            if user == "operator":
                done = await invoked(capsys, "doctor", *where, "--role", "observer")
                assert "change the tempo" in read(done.out)["permissions", "powers"]["text"]
            if user == "agent-1":
                done = await invoked(capsys, "doctor", *where, "--agent-id", "agent-2")
                assert "publish claims" in failed(read(done.out))


async def test_nothing_in_the_cluster_is_changed(
    passwords: None, capsys: pytest.CaptureFixture[str]
) -> None:
    async with (
        NatsServer(["-js"]) as server,
        connected(nats_url=server.url) as transport,
        connected(nats_url=server.url) as watcher,
        # So slow that no machine is so busy that two frames are missing.
        leading(
            transport,
            cluster_id=CLUSTER,
            tempo_bpm=20.0,
            store=KeyValueStore(transport, bucket_of(CLUSTER)),
        ) as metronome,
        open_session(nats_url=server.url, agent_id="agent-1", cluster_id=CLUSTER) as bb,
    ):
        await until(lambda: metronome.leads and bb.health().leader_id)
        stream = ClaimStream(transport, BackbeatConfig(agent_id="agent-1", nats_url=server.url))
        assert await stream.open()
        before = metronome.statistics(), bb.health().epoch
        subjects = [tempo_subject(CLUSTER), recall_subject(CLUSTER), status_subject("*")]
        async with bb.operation("election", beats=1000, cancellable=True) as operation:
            async with (
                watcher.open_subscription(subjects[0]) as tempo,
                watcher.open_subscription(subjects[1]) as recalls,
                watcher.open_subscription(subjects[2]) as stati,
            ):
                where = ("-s", server.url, "--agent-id", "agent-1", "-j")
                done = await invoked(capsys, "doctor", *where)
                await watcher.flush()
                heard = [*tempo.waiting(), *recalls.waiting(), *stati.waiting()]
            found = read(done.out)
            assert failed(found) == set(), found
            # This server permits everything, so all of it was tried.
            assert found["permissions", "powers"]["text"].startswith("this user may do everything")
            assert {message.data for message in heard if len(message.data) < 10} == {b"", b"[]"}
            after = metronome.statistics()
            assert (after.tempo_changes, after.refused) == (0, 0)
            assert after.deposed == before[0].deposed
            assert (bb.health().epoch, bb.health().pending) == (before[1], ())
            assert not operation.phase.final
            assert bb.statistics().claims_undecodable == 0
            assert bb.statistics().frames_undecodable == 0
        await until(lambda: bb.statistics().claims_stored == 1)
        answer = await transport.request("$JS.API.STREAM.INFO.BACKBEAT_STATUS", b"", timeout=30)
        # Only the last claim of the operation is there.
        assert json.loads(answer.data)["state"]["messages"] == 1


async def test_a_forgotten_inbox_prefix_and_a_user_of_no_role(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = """
    authorization { users: [
      { user: u, password: p, permissions: {
        subscribe: ["_IN.>"], publish: ["backbeat.tempo.*"] } }
    ] }
    """
    async with NatsServer(config=config) as server:
        where = ("-s", server.url, "--user", "u", "--password", "p", "--timeout", "300ms", "-j")
        done = await invoked(capsys, "doctor", *where)
        found = read(done.out)
        assert done.status == 1
        assert "--inbox-prefix" in found["permissions", "get answers"]["mend"]
        assert "misses: hear beats" in found["permissions", "role"]["text"]
        assert found["JetStream", "JetStream"]["verdict"] == "warning"
        assert "-js" in found["JetStream", "JetStream"]["mend"]
        assert "backbeat pulse" in found["cluster", "metronome"]["mend"]


async def test_what_is_wrong_before_there_is_a_connection(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ("--timeout", "5s", "-j")

    async def doctor(*arguments: str) -> Findings:
        done = await invoked(capsys, "doctor", *arguments, *short)
        assert done.status == 1
        assert "s3cr3t" not in done.out + done.err
        return read(done.out)

    found = await doctor("-s", "nats://u:s3cr3t@127.0.0.1:1")
    assert found["connection", "TCP"]["verdict"] == "failed"
    assert found["clock", "all"]["verdict"] == "not tried"
    found = await doctor("-s", "nats://does-not-exist.invalid")
    assert found["connection", "resolves"]["verdict"] == "failed"
    # Something that is no NATS server, and a server without TLS.
    async with trio.open_nursery() as nursery:

        async def greet(stream: trio.SocketStream) -> None:
            await stream.send_all(b"220 mail.example.org ESMTP\r\n")
            await stream.receive_some()

        listeners = await nursery.start(trio.serve_tcp, greet, 0)
        port = listeners[0].socket.getsockname()[1]
        found = await doctor("-s", f"nats://127.0.0.1:{port}")
        assert found["connection", "greeting"]["verdict"] == "failed"
        nursery.cancel_scope.cancel()
    async with fake_server() as (port, told):
        found = await doctor("-s", f"tls://u:s3cr3t@127.0.0.1:{port}")
        assert found["connection", "TLS"]["verdict"] == "failed"
        assert b"s3cr3t" not in told
    # A certificate of an authority that is not trusted, and one that is; and a wrong password.
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    cert, key = issue(authority, "127.0.0.1", tmp_path)
    config = f"""
    tls {{ cert_file: "{cert}", key_file: "{key}" }}
    authorization {{ user: u, password: s3cr3t-1 }}
    """
    async with NatsServer(config=config) as server:
        url = f"tls://127.0.0.1:{server.port}"
        found = await doctor("-s", url, "--user", "u", "--password", "s3cr3t-1")
        assert found["connection", "TLS"]["verdict"] == "failed"
        assert "--tlsca" in found["connection", "TLS"]["mend"]
        trusted = ("--tlsca", str(tmp_path / "ca.pem"), "--user", "u", "--password")
        found = await doctor("-s", url, *trusted, "s3cr3t-2")
        assert found["connection", "login"]["verdict"] == "failed"
        assert "a user and a password" in found["connection", "login"]["mend"]
        found = await doctor("-s", url, *trusted, "s3cr3t-1")
        assert found["connection", "TLS"]["verdict"] == "ok"
        assert found["connection", "login"]["verdict"] == "ok"
        assert found["connection", "version"]["verdict"] == "ok"
        # Files that are not there.
        for option in ("--creds", "--nkey", "--tlsca"):
            found = await doctor("-s", url, option, str(tmp_path / "missing"))
            assert "missing" in found["connection", "settings"]["text"]
            assert found["cluster", "all"]["verdict"] == "not tried"
        # A second server that is not there is a failure, and the first one is looked at.
        found = await doctor("-s", f"{url},127.0.0.1:1", *trusted, "s3cr3t-1")
        assert found["connection", "TCP"]["verdict"] == "failed"
        assert found["permissions", "hear beats"]["verdict"] == "ok"


@pytest.mark.parametrize(
    ("claims_max_bytes", "name", "verdict", "words"),
    [
        (30_000_000, "storage", "ok", "are left"),
        (62_000_000, "storage", "warning", "no room left for the record"),
        (-1, "limits", "warning", "no limit of its size"),
    ],
)
async def test_the_room_for_the_record(
    claims_max_bytes: int, name: str, verdict: str, words: str
) -> None:
    config = "jetstream {}\naccounts { G { jetstream: { max_file: 64MB }\n"
    config += "users: [{ user: u, password: p }] } }\n"
    found: list[Finding] = []
    async with NatsServer(config=config) as server:
        fields: dict[str, Any] = {"nats_url": server.url, "user": "u", "password": "p"}
        settings = BackbeatConfig(**fields, claims_max_bytes=claims_max_bytes)
        async with connected(**fields) as transport:
            await try_stores(transport, settings, Greeting(jetstream=True), found.append)
            missing = {each.name: each.verdict for each in found}
            assert (missing["bucket"], missing["claims"]) == ("warning", "warning")
            store = KeyValueStore(transport, bucket_of(settings.cluster_id))
            assert await store.open()
            assert await ClaimStream(transport, settings).open()
            await store.write(b"no record", 0)
            found.clear()
            stores = await try_stores(transport, settings, Greeting(jetstream=True), found.append)
    by_name = {each.name: each for each in found}
    assert by_name[name].verdict == verdict
    assert words in by_name[name].text
    assert (by_name["record"].verdict, stores.record) == ("failed", None)
    assert stores.server_ahead is not None


@pytest.mark.parametrize(
    ("ahead", "verdict"), [(0.9, "ok"), (-1.1, "warning"), (59.0, "warning"), (-61.0, "failed")]
)
def test_the_difference_of_wall_clocks(ahead: float, verdict: str) -> None:
    found: list[Finding] = []
    _say_difference(ahead, "the server's", found.append)
    assert found[0].verdict == verdict
    assert ("ahead of" if ahead > 0 else "behind") in found[0].text
    assert bool(found[0].mend) is (verdict != "ok")


async def test_how_many_stand_by(backbeat_session: Session) -> None:
    found: list[Finding] = []
    for standbys in (0, 1, 2):
        health = replace(backbeat_session.health(), standbys=standbys)
        _say_metronomes(health, backbeat_session.config, found.append)
    assert [each.text for each in found if each.name == "standbys"] == [
        *("none stands by, so nobody would take over", "1 stands by", "2 stand by")
    ]


def test_sizes() -> None:
    assert [format_bytes(number) for number in (0, 1023, 2048, 2**20, 3 * 2**30)] == [
        *("0 bytes", "1023 bytes", "2 KiB", "1 MiB", "3 GiB")
    ]


async def test_doctor_for_people() -> None:
    async with NatsServer() as server:
        where = ("doctor", "-s", server.url, "--timeout", "300ms")
        done = await backbeat(*where)
        assert done.returncode == 1
        text = done.stdout.decode()
        assert "\x1b" not in text
        steps = [line for line in text.splitlines() if line and line[0] != " "]
        assert steps[:4] == ["connection:", "permissions:", "JetStream:", "clock:"]
        assert "To mend: Start `backbeat pulse --cluster-id chorus-production`" in text
        assert re.fullmatch(r"1 failed, \d warnings", text.splitlines()[-1])
        status, shown = await at_a_terminal(*where, columns=60)
        assert status == 1
        assert "\x1b[31mfailed" in shown
        assert max(map(len, re.sub("\x1b\\[[0-9;]*m", "", shown).splitlines())) <= 60


async def test_there_is_no_server_on_a_bus(capsys: pytest.CaptureFixture[str]) -> None:
    done = await invoked(capsys, "doctor", "-s", "memory://x")
    assert (done.status, done.out) == (1, "")
    assert "memory://" in done.err
