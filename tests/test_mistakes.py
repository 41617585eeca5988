"""The mistakes that newcomers make: each is said once, with what to do about it."""

from __future__ import annotations

import logging
import subprocess
import sys
import typing
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import helpers
import msgspec
import pytest
import trio
import trustme
from certificates import Certificates
from helpers import connected, leading, leading_at, pause, until

from backbeat_trio import (
    BackbeatConfig,
    MemoryBus,
    MemoryTransport,
    Metronome,
    PermissionDenied,
    Session,
    TransportBroken,
    session,
)
from backbeat_trio._config import ConfigFields
from backbeat_trio._grid.namesakes import Namesakes
from backbeat_trio._runtime import runtime
from backbeat_trio._transport.jetstream import KeyValueStore
from backbeat_trio.testing import CLUSTER_ID, NatsServer, open_session

guarded = helpers.guarded(120)


def users(permissions: str) -> str:
    """Give the configuration of a server with one user, of these permissions."""
    return (
        f"authorization {{ users: [{{ user: u, password: p, permissions: {{ {permissions} }} }}] }}"
    )


Clock = trio.testing.MockClock

LOGIN: Any = {"user": "u", "password": "p"}


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return Certificates(tmp_path, trustme.CA(), "127.0.0.1")


# Misspelt settings.


def test_the_typed_dictionary_has_the_fields_of_the_config() -> None:
    types = {field.encode_name: field.type for field in msgspec.structs.fields(BackbeatConfig)}
    assert typing.get_type_hints(ConfigFields) == types
    assert not ConfigFields.__required_keys__


def test_a_misspelt_argument_is_refused_with_the_nearest_name() -> None:
    # mypy complains where an ignore is not needed: so each of these is an error for it, too.
    said = r"unexpected keyword argument 'nats_ulr'; did you mean 'nats_url'\?"
    with pytest.raises(TypeError, match=rf"^session\(\) got an {said}"):
        session(nats_ulr="nats://127.0.0.1")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=said):
        session(BackbeatConfig(), nats_ulr="nats://127.0.0.1")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=said):
        BackbeatConfig.from_env({}, nats_ulr="nats://127.0.0.1")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=said):
        BackbeatConfig().__replace__(nats_ulr="nats://127.0.0.1")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="argument 'xyz'$"):
        session(xyz=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        BackbeatConfig(nats_ulr="nats://127.0.0.1")  # type: ignore[call-arg]


def test_a_misspelt_variable_is_said_with_the_nearest_name(
    caplog: pytest.LogCaptureFixture,
) -> None:
    env = {
        "CHORUS_BACKBEAT_NATS_ULR": "nats://127.0.0.1",
        "CHORUS_BACKBEAT_PASWORD": "s3cr3t",
        "CHORUS_BACKBEAT_QQQ": "1",
        "CHORUS_BACKBEAT_EMPTY": "",
        "CHORUS_BACKBEAT_CLUSTER_ID": "c",
        "PATH": "/bin",
    }
    assert BackbeatConfig.from_env(env).cluster_id == "c"
    ignored = "is ignored, because it names no setting:"
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 3
    assert caplog.messages == [
        f"the variable CHORUS_BACKBEAT_{wrong} {ignored} {hint}"
        for wrong, hint in (
            ("NATS_ULR", "did you mean CHORUS_BACKBEAT_NATS_URL?"),
            ("PASWORD", "did you mean CHORUS_BACKBEAT_PASSWORD?"),
            ("QQQ", "no setting has a similar name"),
        )
    ]
    assert "s3cr3t" not in caplog.text


async def test_a_session_says_it_through_its_own_logger(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CHORUS_BACKBEAT_NATS_ULR", "nats://127.0.0.1")
    async with session(nats_url="memory://own-logger", logger=logging.getLogger("mine")):
        pass
    said = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [record.name for record in said] == ["mine"]
    assert "CHORUS_BACKBEAT_NATS_URL" in said[0].getMessage()


# What a user may not do.


@guarded
async def test_a_request_that_permissions_refuse_fails_at_once() -> None:
    config = users(f'publish: {{ deny: ["backbeat.tempo.{CLUSTER_ID}"] }}')
    async with (
        NatsServer(config=config) as server,
        open_session(nats_url=server.url, **LOGIN, lock_timeout=0.0) as bb,
    ):
        await until(lambda: bb.health().connected)
        for ask in (partial(bb.set_tempo, 60), bb.pause, bb.resume):
            with pytest.raises(PermissionDenied, match="docs/security.md") as caught:
                await ask()
            assert f"may not publish to backbeat.tempo.{CLUSTER_ID};" in str(caught.value)
        # It is one error, however often it came.
        assert bb.health().errors.count(str(caught.value)) == 1


@guarded
async def test_only_the_requests_on_a_refused_subject_fail() -> None:
    config = users('publish: { deny: ["Not.Allowed"] }')
    async with (
        NatsServer(config=config) as server,
        connected(nats_url=server.url, **LOGIN) as transport,
        transport.open_subscription("allowed") as requests,
        transport.open_request("allowed", b"") as answers,
    ):
        for _ in range(3):
            # With the subject as it is spelt.
            with pytest.raises(PermissionDenied, match=r"may not publish to Not\.Allowed;"):
                await transport.request("Not.Allowed", b"", timeout=60)
        request = await anext(requests)
        await transport.publish(request.reply, b"answer")
        assert (await anext(answers)).data == b"answer"


@guarded
async def test_requests_fail_at_once_where_the_inbox_is_refused() -> None:
    config = users('subscribe: { deny: ["_INBOX.>"] }')
    async with NatsServer(config=config) as server:
        async with connected(nats_url=server.url, **LOGIN) as transport:
            async with transport.open_subscription("service"):
                for _ in range(3):
                    with pytest.raises(PermissionDenied, match="CHORUS_BACKBEAT_INBOX_PREFIX"):
                        await transport.request("service", b"", timeout=60)
            # Another connection has another inbox, and that is no other error.
            server.kill()
            await transport.wait_connected(False)
            await server.start()
            await transport.wait_connected()
            await until(lambda: transport.statistics().permission_errors == 2)
            texts = [text for _, text in transport.statistics().recent_errors]
            assert sum("_INBOX.>" in text for text in texts) == 1
        async with (
            connected(nats_url=server.url, **LOGIN, inbox_prefix="mine") as transport,
            transport.open_subscription("service") as requests,
            transport.open_request("service", b"") as answers,
        ):
            await transport.publish((await anext(requests)).reply, b"answer")
            assert (await anext(answers)).data == b"answer"


# TLS.


@pytest.mark.parametrize("end", ["the session is left", "the server dies"])
@guarded
async def test_the_end_of_a_tls_connection_makes_no_noise(
    end: str, certificates: Certificates, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with NatsServer(config=certificates.config()) as server:
        async with connected(
            nats_url=f"tls://127.0.0.1:{server.port}", tls_ca=certificates.ca
        ) as transport:
            if end == "the server dies":
                server.kill()
                await transport.wait_connected(False)
                assert "EOF" not in str(transport.statistics().recent_errors)
        # The thread of the connection may still be about to say something.
        await until(lambda: not helpers.client_threads())
    assert "eof_received" not in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


# What a session logs. In virtual time first.


class Lines(logging.Handler):
    """The lines that a session logs, at INFO and above, but for those on its start and end."""

    def __init__(self) -> None:
        super().__init__()
        self.logger = logging.getLogger(f"test-{id(self)}")
        self.logger.setLevel(logging.INFO)
        self.logger.propagate = False
        self.logger.addHandler(self)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def of(self, level: int) -> list[str]:
        return [
            record.getMessage()
            for record in self.records
            if record.levelno == level and "CHORUS BACKBEAT" not in record.getMessage()
        ]

    @property
    def warnings(self) -> list[str]:
        return self.of(logging.WARNING)

    @property
    def infos(self) -> list[str]:
        return self.of(logging.INFO)


@pytest.fixture
def lines() -> Lines:
    return Lines()


@asynccontextmanager
async def metronome_on(bus: MemoryBus, **settings: Any) -> AsyncGenerator[MemoryTransport, None]:
    """Run a metronome on a bus for the length of a block."""
    transport = MemoryTransport(bus)
    given: dict[str, Any] = {"cluster_id": CLUSTER_ID, "leader_id": "pulse-a", "bus": bus}
    metronome = Metronome(transport, **given | settings)
    async with trio.open_nursery() as nursery:
        await nursery.start(transport.run)
        await nursery.start(metronome.run)
        yield transport
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("bpm", [0.1, 2.0, 120.0, 6000.0])
async def test_a_healthy_session_says_nothing_at_warning(
    bpm: float, autojump_clock: Clock, lines: Lines
) -> None:
    async with session(nats_url="memory://healthy", tempo_bpm=bpm, logger=lines.logger) as bb:
        await bb.sleep(min(1000, 20 * bpm))
        async with bb.operation("election"):
            await bb.sleep(2)
        await bb.set_tempo(2 * bpm if bpm < 3000 else bpm / 2)
        await bb.sleep(10)
        await bb.pause()
        await trio.sleep(1000)
        await bb.resume()
        await bb.sleep(10)
    assert lines.warnings == []
    assert [text for text in lines.infos if "metronome" not in text and "lock" not in text] == [
        "connected"
    ]


async def test_a_metronome_that_dies_is_said_once_and_so_is_its_return(
    autojump_clock: Clock, lines: Lines
) -> None:
    bus = MemoryBus()

    async def lead_at_first(*, task_status: trio.TaskStatus[trio.CancelScope]) -> None:
        with trio.CancelScope() as scope:
            async with metronome_on(bus, tempo_bpm=60.0):
                task_status.started(scope)
                await trio.sleep_forever()

    async with (
        trio.open_nursery() as nursery,
        open_session(bus, logger=lines.logger, lock_timeout=0.0) as bb,
    ):
        first = await nursery.start(lead_at_first)
        await until(lambda: bb.health().grid == "locked")
        await bb.sleep(20.5)
        assert lines.warnings == []
        first.cancel()
        for name in ("pulse-b", "pulse-c"):
            lines.records.clear()
            await bb.sleep(5)
            assert len(lines.warnings) == 1
            await bb.sleep(1000)
            (said,) = lines.warnings
            assert "no metronome has been heard in cluster 'test-cluster' for " in said
            assert "the grid goes on by the local clock, at 60 BPM. Check " in said
            assert lines.infos == []
            assert bb.health().leader_id is None
            async with metronome_on(bus, tempo_bpm=60.0, leader_id=name):
                await bb.sleep(20)
                again = f"a metronome is heard again in cluster 'test-cluster' - leader={name}"
                assert lines.infos.count(again) == 1
                assert lines.warnings == [said]


async def test_a_metronome_heard_now_and_then_is_said_once(
    autojump_clock: Clock, lines: Lines
) -> None:
    bus = MemoryBus()
    async with (
        metronome_on(bus, tempo_bpm=60.0) as transport,
        open_session(bus, logger=lines.logger) as bb,
    ):
        await bb.sleep(20)
        for _ in range(50):
            transport.sever()
            await trio.sleep(3.9)
            transport.restore()
            await trio.sleep(1.1)
        assert len(lines.warnings) == 1
        assert not any("heard again" in text for text in lines.infos)
        await trio.sleep(20)
        assert sum("heard again" in text for text in lines.infos) == 1
        assert len(lines.warnings) == 1


async def test_a_late_lock_is_no_mistake(autojump_clock: Clock, lines: Lines) -> None:
    bus = MemoryBus()
    async with open_session(bus, logger=lines.logger, lock_timeout=0.0) as bb:
        await trio.sleep(2)
        async with metronome_on(bus):
            await until(lambda: bb.health().grid == "locked")
            await trio.sleep(600)
            assert lines.warnings == []


async def test_a_local_grid_is_said_with_the_length_of_its_beat(
    autojump_clock: Clock, lines: Lines
) -> None:
    bus = MemoryBus()
    async with open_session(bus, logger=lines.logger) as bb:
        await trio.sleep(3_000)
        (said,) = lines.warnings
        assert said.startswith("no metronome has been heard in cluster 'test-cluster' for 0.0833 ")
        assert "counting on a local grid, where a beat lasts 30 s" in said
        assert "CHORUS_BACKBEAT_CLUSTER_ID" in said
        assert "backbeat pulse --cluster-id test-cluster" in said
        async with metronome_on(bus):
            await trio.sleep(100)
        assert sum("heard again" in text for text in lines.infos) == 1
        assert bb.health().errors == ()


async def test_an_outage_is_said_once_for_each_reason(autojump_clock: Clock, lines: Lines) -> None:
    bus = MemoryBus()
    transport = MemoryTransport(bus)
    async with (
        metronome_on(bus),
        open_session(transport=transport, logger=lines.logger) as bb,
    ):
        await trio.sleep(100)
        assert (lines.warnings, lines.infos[0]) == ([], "connected")
        transport.sever()
        await trio.sleep(300)
        bb.start_operation("election").complete()
        for _ in range(100):
            await trio.sleep(60)
            for reason in ("the first reason", "another reason"):
                transport._note_down(TransportBroken(reason))
                await trio.sleep(1)
        lost, *others = lines.warnings
        assert lost == "connection lost: the connection was severed"
        meanwhile = "the grid goes on by the local clock, at 2 BPM"
        assert [text for text in others if "terminal" not in text] == [
            f"not connected: {reason}; {meanwhile}. Check `nats_url` (CHORUS_BACKBEAT_NATS_URL), "
            "and that a NATS server listens there; the session goes on trying"
            for reason in ("the first reason", "another reason")
        ]
        (waiting,) = [text for text in others if "terminal" in text]
        assert waiting.startswith("1 terminal claims wait: there is no connection.")
        lines.records.clear()
        transport.restore()
        await trio.sleep(300)
        assert lines.warnings == []
        assert [text.partition(" after")[0] for text in lines.infos] == [
            "connected again",
            "terminal claims are delivered again",
        ]


async def test_a_connection_that_flaps_is_not_said_for_ever(
    autojump_clock: Clock, lines: Lines
) -> None:
    bus = MemoryBus()
    transport = MemoryTransport(bus)
    async with (
        metronome_on(bus, tempo_bpm=60.0),
        open_session(transport=transport, logger=lines.logger),
    ):
        for _ in range(300):
            await trio.sleep(0.5)
            transport.sever()
            await trio.sleep(0.5)
            transport.restore()
        assert len(lines.records) < 25


async def test_each_error_is_said_once(autojump_clock: Clock, lines: Lines) -> None:
    transport = MemoryTransport(MemoryBus())
    async with (
        metronome_on(transport.bus, tempo_bpm=60.0),
        open_session(transport=transport, logger=lines.logger) as bb,
    ):
        for _ in range(100):
            transport.note_error("one error")
            await bb.sleep(0.5)
            transport.note_error("another error")
        assert lines.warnings == ["one error", "another error"]
        assert set(lines.warnings) == set(bb.health().errors)


# The mistakes, on a real server.


async def said(lines: Lines, *words: str) -> str:
    """Wait for a line at WARNING that has these words in it, and return it."""

    def found() -> list[str]:
        return [text for text in lines.warnings if all(word in text for word in words)]

    await until(found)
    return found()[0]


async def said_once(lines: Lines, bb: Session, *words: str) -> str:
    """Wait for that line, and see that it does not come again within some beats."""
    text = await said(lines, *words)
    await trio.sleep(1)
    await bb.sleep(4)
    assert lines.warnings.count(text) == 1
    same = [line for line in lines.warnings if all(word in line for word in words)]
    assert same == [text]
    return text


@asynccontextmanager
async def mistaken(lines: Lines, **settings: Any) -> AsyncGenerator[Session, None]:
    """Open a session that has one setting wrong."""
    given: dict[str, Any] = {"cluster_id": CLUSTER_ID, "agent_id": "agent-1", "tempo_bpm": 120.0}
    async with session(BackbeatConfig(**given | settings), logger=lines.logger) as bb:
        yield bb


LOCAL = "counting on a local grid, where a beat lasts 0.5 s. "


@guarded
async def test_a_healthy_session_over_nats_says_nothing_at_warning(lines: Lines) -> None:
    async with (
        NatsServer(["-js"]) as server,
        leading_at(server.url, tempo_bpm=120.0),
        # Waits as long as it takes on a slow machine.
        mistaken(lines, nats_url=server.url, lock_timeout=60.0) as bb,
    ):
        async with bb.operation("election"):
            await bb.sleep(2)
        await bb.sleep(10)
    # Only a machine that does not get round to it may put the position off.
    assert [text for text in lines.warnings if "of the cluster by" not in text] == []
    assert "connected" in lines.infos


@guarded
async def test_wrong_url(lines: Lines) -> None:
    async with NatsServer() as server:
        url = server.url
    async with mistaken(lines, nats_url=url) as bb:
        text = await said_once(lines, bb, "not connected: no connection to", url)
        assert LOCAL in text
        assert "Check `nats_url` (CHORUS_BACKBEAT_NATS_URL), and that a NATS server listens" in text
        assert lines.warnings == [text]


@guarded
async def test_host_that_does_not_exist(lines: Lines) -> None:
    async with mistaken(lines, nats_url="nats://no-such-host.invalid:4222") as bb:
        text = await said_once(lines, bb, "not connected: ", "no-such-host.invalid")
        assert "CHORUS_BACKBEAT_NATS_URL" in text


@guarded
async def test_server_that_does_not_answer_at_first(lines: Lines) -> None:
    # Before the attempt to connect is given up there is no reason to name.
    async with (
        NatsServer() as server,
        mistaken(lines, nats_url=server.url, connect_timeout=30.0, lock_timeout=0.0) as healthy,
    ):
        await until(lambda: healthy.health().connected)
        pause(server)
        try:
            async with mistaken(
                lines, nats_url=server.url, connect_timeout=30.0, lock_timeout=0.0
            ) as bb:
                await said_once(lines, bb, f"not connected: no answer from {server.url} yet")
        finally:
            server.resume()


@guarded
async def test_wrong_password_is_said_and_no_secret_is(lines: Lines) -> None:
    lines.logger.setLevel(logging.DEBUG)
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.DEBUG)
    root.addHandler(lines)
    try:
        async with (
            NatsServer(config=users("")) as server,
            mistaken(lines, nats_url=server.url, user="u", password="s3cr3t-p") as bb,
        ):
            text = await said_once(lines, bb, "not connected: ", "refused the credentials")
            assert "authorization violation" in text.lower()
            assert "CHORUS_BACKBEAT_USER, CHORUS_BACKBEAT_PASSWORD" in text
    finally:
        root.removeHandler(lines)
        root.setLevel(level)
    assert any(record.levelno == logging.DEBUG for record in lines.records)
    for record in lines.records:
        assert "s3cr3t-p" not in f"{record.getMessage()} {record.__dict__}"


@guarded
async def test_wrong_ca(certificates: Certificates, lines: Lines) -> None:
    async with NatsServer(config=certificates.config()) as server:
        url = f"tls://127.0.0.1:{server.port}"
        async with mistaken(lines, nats_url=url, tls_ca=certificates.other_ca) as bb:
            text = await said_once(lines, bb, "not connected: no trusted TLS connection to", url)
            assert "certificate verify failed" in text
            assert "Check `tls_ca` (CHORUS_BACKBEAT_TLS_CA)" in text
            assert lines.warnings == [text]


@guarded
async def test_wrong_cluster_id_or_no_metronome(lines: Lines) -> None:
    async with (
        NatsServer() as server,
        leading_at(server.url, tempo_bpm=120.0),
        mistaken(lines, nats_url=server.url, cluster_id="chorus-prodution") as bb,
    ):
        text = await said_once(lines, bb, "no metronome has been heard in cluster", LOCAL)
        assert "'chorus-prodution'" in text
        assert "Check `cluster_id` (CHORUS_BACKBEAT_CLUSTER_ID)" in text
        assert "backbeat pulse --cluster-id chorus-prodution" in text
        assert lines.warnings == [text]
        async with (
            connected(nats_url=server.url) as transport,
            leading(transport, cluster_id="chorus-prodution", leader_id="pulse-b"),
        ):
            heard = "a metronome is heard again in cluster 'chorus-prodution' - leader=pulse-b"
            await until(lambda: heard in lines.infos)
        assert lines.infos.count(heard) == 1


@guarded
async def test_wrong_cluster_id_where_permissions_refuse_it(lines: Lines) -> None:
    allowed = "backbeat.beat.right"
    config = users(f'subscribe: ["{allowed}", "_INBOX.>"], publish: ["backbeat.status.agent-1"]')
    async with (
        NatsServer(config=config) as server,
        mistaken(lines, nats_url=server.url, **LOGIN, cluster_id="wrong") as bb,
    ):
        for what in ("subscribe to backbeat.beat.wrong;", "publish to backbeat.sync.wrong;"):
            text = await said_once(lines, bb, f"permission denied: this user may not {what}")
            assert "`cluster_id` (CHORUS_BACKBEAT_CLUSTER_ID) must be the one in them" in text
            assert "docs/security.md" in text
            assert text in bb.health().errors


@guarded
async def test_wrong_agent_id(lines: Lines) -> None:
    config = users('publish: ["backbeat.status.agent-1", "backbeat.sync.*", "$JS.API.>"]')
    async with (
        NatsServer(config=config) as server,
        mistaken(lines, nats_url=server.url, **LOGIN, agent_id="Agent-2") as bb,
    ):
        # Without any operation.
        text = await said_once(lines, bb, "permission denied: this user may not publish to")
        assert "backbeat.status.Agent-2; `agent_id` (CHORUS_BACKBEAT_AGENT_ID) must be" in text
        assert "docs/security.md" in text
        for number in range(3):
            bb.start_operation("election", id=f"{number}").complete()
        await said_once(lines, bb, "backbeat.status.Agent-2")


@guarded
async def test_wrong_inbox_prefix(lines: Lines) -> None:
    config = users('subscribe: ["backbeat.>", "_INBOX_agent-1.>"]')
    async with (
        NatsServer(config=config) as server,
        mistaken(lines, nats_url=server.url, **LOGIN) as bb,
    ):
        text = await said_once(lines, bb, "permission denied: this user may not subscribe to")
        assert "_INBOX.>, where answers to its requests come; set `inbox_prefix`" in text
        assert "CHORUS_BACKBEAT_INBOX_PREFIX" in text
        assert "docs/security.md" in text
        with pytest.raises(PermissionDenied, match="_INBOX.>"):
            await bb.set_tempo(60)


@guarded
async def test_no_jetstream(lines: Lines, caplog: pytest.LogCaptureFixture) -> None:
    async with (
        NatsServer() as server,
        connected(nats_url=server.url) as transport,
    ):
        store = KeyValueStore(transport, "backbeat-test")
        async with (
            leading(transport, store=store),
            mistaken(lines, nats_url=server.url) as bb,
        ):
            told = [text for text in caplog.messages if "there is no JetStream" in text]
            assert len(told) == 1
            assert "Start nats-server with -js" in told[0]
            for number in range(3):
                bb.start_operation("election", id=f"{number}").complete()
            stored = "terminal claims are not stored, as the server has no JetStream"
            await until(lambda: any(stored in text for text in lines.infos))
            await bb.sleep(4)
            (text,) = [text for text in lines.infos if stored in text]
            assert "Start nats-server with -js, or set `store_claims`" in text


@guarded
async def test_claims_that_wait_for_the_server(lines: Lines) -> None:
    async with (
        NatsServer(["-js"]) as server,
        mistaken(lines, nats_url=server.url) as bb,
    ):
        bb.start_operation("election", id="first").complete()
        await until(lambda: bb.statistics().claims_stored == 1)
        server.kill()
        bb.start_operation("election", id="second").complete()
        text = await said_once(lines, bb, "terminal claims wait: there is no connection")
        assert text.startswith("1 terminal claims wait")
        await server.start()
        await until(lambda: "terminal claims are delivered again" in lines.infos)


# Two agents of one id.


def names(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the sessions that are opened from now on seem to be in another process."""
    monkeypatch.setattr(runtime, "process_name", lambda: f"process-{number}")


def shared(bb: Session) -> bool:
    return any("another live process uses the agent id" in text for text in bb.health().errors)


@pytest.mark.parametrize("bpm", [2.0, 60.0, 600.0])
async def test_two_agents_of_one_id_in_virtual_time(
    bpm: float, autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus, one_says, other_says = MemoryBus(), Lines(), Lines()
    async with metronome_on(bus, tempo_bpm=bpm):
        names(1, monkeypatch)
        async with open_session(bus, logger=one_says.logger) as one:
            # By now it pings as seldom as any.
            await trio.sleep(300)
            names(2, monkeypatch)
            async with open_session(bus, logger=other_says.logger) as other:
                await one.sleep(2)
                await trio.sleep(3)
                assert shared(one)
                await one.sleep(1)
                await trio.sleep(3)
                assert shared(other)
                await one.sleep(100)
                for says in (one_says, other_says):
                    (text,) = says.warnings
                    assert "uses the agent id 'test-agent' in cluster 'test-cluster'" in text
                    assert "CHORUS_BACKBEAT_AGENT_ID" in text
                assert one.health().errors.count(one_says.warnings[0]) == 1
            await one.sleep(20)
            await trio.sleep(120)
            assert not shared(one)
            over = "no other process uses the id 'test-agent' any more"
            assert one_says.infos.count(over) == 1
            assert len(one_says.warnings) == 1


async def test_what_is_no_other_agent_of_the_same_id(
    autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch, lines: Lines
) -> None:
    bus = MemoryBus()
    async with metronome_on(bus, tempo_bpm=60.0):
        # Restarts, one after the other, each within a second.
        for number in range(20):
            names(number, monkeypatch)
            transport = MemoryTransport(bus)
            async with open_session(transport=transport, logger=lines.logger) as bb:
                await trio.sleep(number)
                # A connection that is made again.
                transport.sever()
                await trio.sleep(0.1)
                transport.restore()
                await trio.sleep(number)
                assert not shared(bb)
            await trio.sleep(0.5)
        # Two sessions of one process, and one that only looks on from another.
        async with (
            open_session(bus, logger=lines.logger) as one,
            open_session(bus, logger=lines.logger) as two,
        ):
            names(100, monkeypatch)
            async with open_session(bus, logger=lines.logger, health_beats=0) as onlooker:
                await trio.sleep(300)
                assert not any(shared(bb) for bb in (one, two, onlooker))
        # Two agents of different ids.
        async with (
            open_session(bus, agent_id="a", logger=lines.logger),
            open_session(bus, agent_id="b", logger=lines.logger),
        ):
            await trio.sleep(300)
    assert not [text for text in lines.warnings if "another live process" in text]


def test_a_late_ping_of_a_process_that_has_ended_proves_nothing() -> None:
    namesakes, second = Namesakes(), 1_000_000_000
    assert not namesakes.hear("a", "one", 0, second)
    assert not namesakes.hear("a", "two", 5 * second, second)
    assert not namesakes.hear("a", "one", 5 * second + 1000, second)
    for number in range(6, 40):
        assert not namesakes.hear("a", "two", number * second, second)
        assert namesakes.contested(number * second, second) == (("a",) if number <= 15 else ())
    # It is noticed afterwards, too.
    assert not namesakes.hear("a", "three", 40 * second, second)
    assert namesakes.hear("a", "two", 42 * second, second)
    assert namesakes.hear("a", "three", 43 * second, second)


def test_contests_are_bounded() -> None:
    namesakes, second = Namesakes(), 1_000_000_000
    for number in range(70_000):
        namesakes.hear(f"a{number}", "one", second, second)
    assert len(namesakes._last) == 65_536
    for number in range(69_000, 70_000):
        namesakes.hear(f"a{number}", "two", second, second)
    frames = [namesakes.contested(2 * second, second) for _ in range(8)]
    assert all(len(named) == 8 for named in frames)
    # Each has its turn.
    assert len({name for named in frames for name in named}) == 64


_AGENT: Final = """
import sys, trio
import backbeat_trio as backbeat

async def main():
    async with backbeat.session(
        nats_url=sys.argv[1], cluster_id=sys.argv[2], agent_id="twin", lock_timeout=60.0
    ) as bb:
        await trio.sleep_forever()

trio.run(main)
"""


@guarded
async def test_two_processes_of_one_id(lines: Lines) -> None:
    async with (
        NatsServer() as server,
        leading_at(server.url, tempo_bpm=120.0),
        mistaken(lines, nats_url=server.url, agent_id="twin", lock_timeout=60.0) as bb,
    ):
        await bb.sleep(4)
        assert not shared(bb)
        process = await trio.lowlevel.open_process(
            [sys.executable, "-c", _AGENT, server.url, CLUSTER_ID],
            stderr=subprocess.PIPE,
            env=helpers.CLEAN,
        )
        try:
            text = await said(lines, "another live process uses the agent id 'twin'")
            assert text in bb.health().errors
            assert process.stderr is not None
            heard = b""
            while b"another live process uses the agent id 'twin'" not in heard:
                heard += await process.stderr.receive_some()
        finally:
            process.kill()
            await process.wait()
        await until(lambda: "no other process uses the id 'twin' any more" in lines.infos)
        assert not shared(bb)
        assert lines.warnings.count(text) == 1
