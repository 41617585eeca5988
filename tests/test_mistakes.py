"""The mistakes that newcomers make: each is said once, with what to do about it."""

from __future__ import annotations

import logging
import typing
from functools import partial
from pathlib import Path
from typing import Any

import helpers
import msgspec
import pytest
import trustme
from certificates import Certificates
from helpers import connected, until

from backbeat_trio import BackbeatConfig, PermissionDenied, session
from backbeat_trio._config import ConfigFields
from backbeat_trio.testing import CLUSTER_ID, NatsServer, open_session

guarded = helpers.guarded(120)


def users(permissions: str) -> str:
    """Give the configuration of a server with one user, of these permissions."""
    return (
        f"authorization {{ users: [{{ user: u, password: p, permissions: {{ {permissions} }} }}] }}"
    )


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
