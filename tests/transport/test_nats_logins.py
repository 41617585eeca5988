"""Logins, TLS and secrets, at a nats-server of each test's own."""

from __future__ import annotations

import json
import logging
import os
import traceback
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import helpers
import nkeys
import pytest
import trustme
from certificates import Certificates
from helpers import degraded, fake_server, leading_at, until
from rich.pretty import pretty_repr

import backbeat_trio as backbeat
from backbeat_trio import AuthenticationFailed, BackbeatConfig, TLSFailed, TransportBroken
from backbeat_trio._transport.nats import NatsTransport
from backbeat_trio.testing import NatsServer, open_recorder, open_session

# Awkward in URLs, in JSON and in a server's configuration; it must come through as it is.
PASSWORD: Final = "pä:ss@wo/rd%2C, #?"
guarded = helpers.guarded(120)


def users(**passwords: str) -> str:
    """Write the part of a server's configuration that lets users in."""
    entries = ", ".join(
        f"{{user: {user}, password: {json.dumps(password, ensure_ascii=False)}}}"
        for user, password in passwords.items()
    )
    return f"authorization {{ users = [{entries}] }}"


@pytest.mark.parametrize("where", ["option", "url"])
@guarded
async def test_wrong_password(where: str) -> None:
    async with NatsServer(config=users(agent=PASSWORD)) as server:
        settings: dict[str, Any] = {"nats_url": server.url, "user": "agent", "password": "wrong"}
        if where == "url":
            settings = {"nats_url": f"nats://agent:wrong@127.0.0.1:{server.port}"}
        with pytest.raises(AuthenticationFailed, match=str(server.port)):
            async with open_session(**settings, require_connection=True):
                pytest.fail("the session was entered")


@guarded
async def test_wrong_password_without_a_required_connection() -> None:
    async with (
        NatsServer(config=users(agent=PASSWORD)) as server,
        open_session(nats_url=server.url, user="agent", password="wrong", lock_timeout=0.0) as bb,
    ):
        await until(lambda: bb.health().errors)
        health = bb.health()
        assert not health.connected
        assert health.local_degradation
        assert "refused the credentials" in health.errors[-1]
        # The same failure again and again is one error.
        await until(lambda: "ttempts" in server.log or server.log.count("authentication error") > 2)
        assert len(bb.health().errors) == 1


@pytest.mark.parametrize("where", ["option", "url"])
@guarded
async def test_user_and_password(where: str) -> None:
    async with NatsServer(config=users(agent=PASSWORD)) as server:
        settings: dict[str, Any] = {"nats_url": server.url, "user": "agent", "password": PASSWORD}
        if where == "url":
            escaped = quote(PASSWORD, safe="")
            settings = {"nats_url": f"nats://agent:{escaped}@127.0.0.1:{server.port}"}
        async with open_session(**settings, require_connection=True, lock_timeout=0.0) as bb:
            assert bb.health().connected


@pytest.mark.parametrize("where", ["option", "url"])
@guarded
async def test_token(where: str) -> None:
    async with NatsServer(config="authorization { token: 's3cr3t%/' }") as server:
        settings: dict[str, Any] = {"nats_url": server.url, "token": "s3cr3t%/"}
        if where == "url":
            settings = {"nats_url": f"nats://{quote('s3cr3t%/', safe='')}@127.0.0.1:{server.port}"}
        async with open_session(**settings, require_connection=True, lock_timeout=0.0) as bb:
            assert bb.health().connected
        with pytest.raises(AuthenticationFailed):
            async with open_session(
                nats_url=server.url, token="wrong", require_connection=True, lock_timeout=0.0
            ):
                pytest.fail("the session was entered")


def new_nkey() -> tuple[bytes, str]:
    """Make a user's seed, and the public key that belongs to it."""
    seed = bytes(nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER))
    pair = nkeys.from_seed(bytearray(seed))
    return seed, bytes(pair.public_key).decode()


@guarded
async def test_nkey(tmp_path: Path) -> None:
    seed, public = new_nkey()
    path = tmp_path / "seed.nk"
    path.write_bytes(seed)
    other = tmp_path / "other.nk"
    other.write_bytes(new_nkey()[0])
    async with NatsServer(config=f"authorization {{ users = [{{nkey: {public}}}] }}") as server:
        async with open_session(
            nats_url=server.url, nkey=str(path), require_connection=True, lock_timeout=0.0
        ) as bb:
            assert bb.health().connected
        with pytest.raises(AuthenticationFailed):
            async with open_session(
                nats_url=server.url, nkey=str(other), require_connection=True, lock_timeout=0.0
            ):
                pytest.fail("the session was entered")


@guarded
async def test_credentials_that_are_revoked_and_granted_again() -> None:
    # nats-py gives a client up for good when its credentials are revoked.
    async with (
        NatsServer(config=users(agent=PASSWORD, other="x")) as server,
        open_session(nats_url=server.url, user="agent", password=PASSWORD, lock_timeout=0.0) as bb,
        open_recorder(bb) as recorder,
    ):
        await until(lambda: bb.health().connected)
        server.reload(users(other="x"))
        await until(lambda: not bb.health().connected)
        await until(lambda: any("refused" in error for error in bb.health().errors))
        server.reload(users(agent=PASSWORD, other="x"))
        await until(lambda: bb.health().connected)
        assert bb.health().reconnect_count == 1
        bb.start_operation("election", id="after")
        await recorder.wait_for("after", "executing")


# TLS.


def tls(server: NatsServer) -> str:
    return f"tls://127.0.0.1:{server.port}"


@pytest.mark.parametrize("first", [False, True])
@guarded
async def test_tls(certificates: Certificates, first: bool) -> None:
    config = certificates.config(f", handshake_first: {str(first).lower()}")
    async with NatsServer(config=f"{config}\n{users(agent=PASSWORD)}") as server:
        settings: dict[str, Any] = {
            "nats_url": tls(server),
            "user": "agent",
            "password": PASSWORD,
            "tls_ca": certificates.ca,
            "tls_first": first,
        }
        async with (
            leading_at(**{"url": settings.pop("nats_url"), **settings}),
            open_session(nats_url=tls(server), **settings, require_connection=True) as bb,
        ):
            await degraded(bb, False)


@guarded
async def test_untrusted_certificate(certificates: Certificates) -> None:
    async with NatsServer(config=certificates.config()) as server:
        with pytest.raises(TLSFailed, match=str(server.port)):
            async with open_session(
                nats_url=tls(server), tls_ca=certificates.other_ca, require_connection=True
            ):
                pytest.fail("the session was entered")


@guarded
async def test_certificate_of_another_host(tmp_path: Path, authority: trustme.CA) -> None:
    certificates = Certificates(tmp_path, authority, "elsewhere.example.org")
    async with NatsServer(config=certificates.config()) as server:
        with pytest.raises(TLSFailed, match=str(server.port)):
            async with open_session(
                nats_url=tls(server), tls_ca=certificates.ca, require_connection=True
            ):
                pytest.fail("the session was entered")


@guarded
async def test_mutual_tls(certificates: Certificates) -> None:
    async with NatsServer(config=certificates.mutual) as server:
        async with open_session(
            nats_url=tls(server),
            tls_ca=certificates.ca,
            tls_cert=certificates.client,
            tls_key=certificates.client_key,
            require_connection=True,
            lock_timeout=0.0,
        ) as bb:
            assert bb.health().connected
        with pytest.raises(TransportBroken, match=str(server.port)):
            async with open_session(
                nats_url=tls(server), tls_ca=certificates.ca, require_connection=True
            ):
                pytest.fail("the session was entered")


@pytest.mark.parametrize("greeting", [{"auth_required": True}, {"tls_available": True}, {}])
@pytest.mark.parametrize("secret", ["password", "password in the URL", "token", "token in the URL"])
@guarded
async def test_secret_never_reaches_a_server_without_tls(
    secret: str, greeting: dict[str, Any]
) -> None:
    async with fake_server(**greeting) as (port, told):
        settings: dict[str, Any] = {
            "password": {"user": "agentname", "password": "s3cr3t"},
            "password in the URL": {"nats_url": f"tls://agentname:s3cr3t@127.0.0.1:{port}"},
            "token": {"token": "s3cr3t"},
            "token in the URL": {"nats_url": f"tls://s3cr3t@127.0.0.1:{port}"},
        }[secret]
        settings = {"nats_url": f"tls://127.0.0.1:{port}"} | settings
        with pytest.raises(TLSFailed, match="does not offer TLS"):
            async with open_session(**settings, require_connection=True):
                pytest.fail("the session was entered")
        # Nor when it goes on trying: this session does until it is left.
        async with open_session(**settings, lock_timeout=0.0) as bb:
            await until(lambda: bb.health().errors)
            assert not bb.health().connected
    assert b"s3cr3t" not in told
    assert b"agentname" not in told


@guarded
async def test_secret_reaches_a_server_without_tls_where_none_is_asked_for() -> None:
    # What the last test relies on: the fake server gets to see what is sent to it.
    async with (
        fake_server(auth_required=True) as (port, told),
        open_session(
            nats_url=f"nats://agentname:s3cr3t@127.0.0.1:{port}",
            require_connection=True,
            lock_timeout=0.0,
        ),
    ):
        assert b"s3cr3t" in told
        assert b"agentname" in told


@guarded
async def test_server_without_tls_where_there_is_no_secret() -> None:
    async with fake_server() as (port, _):
        with pytest.raises(TLSFailed, match="does not offer TLS"):
            async with open_session(nats_url=f"tls://127.0.0.1:{port}", require_connection=True):
                pytest.fail("the session was entered")


@guarded
async def test_tls_first_with_a_server_without_tls() -> None:
    async with fake_server() as (port, told):
        with pytest.raises(TransportBroken, match=str(port)):
            async with open_session(
                nats_url=f"tls://agentname:s3cr3t@127.0.0.1:{port}",
                tls_first=True,
                connect_timeout=1.0,
                require_connection=True,
            ):
                pytest.fail("the session was entered")
    assert b"s3cr3t" not in told


# Secrets.


@pytest.mark.parametrize("where", ["option", "url", "token", "token in the URL"])
@guarded
async def test_secrets_are_never_shown(where: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    secret = "hünter/2:@%2C"
    escaped = quote(secret, safe="")
    authorization = f"authorization {{ token: {json.dumps(secret, ensure_ascii=False)} }}"
    if "token" not in where:
        authorization = users(agent=secret)
    shown: list[str] = []
    async with NatsServer(config=authorization) as server:
        address = f"127.0.0.1:{server.port}"
        for password, url_password in ((secret, escaped), (f"wrong-{secret}", f"wrong-{escaped}")):
            settings: dict[str, Any] = {
                "option": {
                    "nats_url": f"nats://{address}",
                    "user": "agent",
                    "password": password,
                },
                "url": {"nats_url": f"nats://agent:{url_password}@{address}"},
                "token": {"nats_url": f"nats://{address}", "token": password},
                "token in the URL": {"nats_url": f"nats://{url_password}@{address}"},
            }[where]
            config = BackbeatConfig(**settings)
            shown += [repr(config), str(config), f"{config}", pretty_repr(config)]
            shown += [repr(config.servers), str(config.servers)]
            transport = NatsTransport(config)
            shown += [repr(transport), str(transport)]
            try:
                async with open_session(
                    **settings, require_connection=True, lock_timeout=0.0
                ) as bb:
                    assert password == secret
                    shown += [repr(bb), repr(bb.config), repr(bb.health()), repr(bb.statistics())]
                    server.kill()
                    await until(lambda: len(bb.health().errors) >= 2)
                    shown += [repr(bb.health()), repr(bb.statistics())]
                    await server.start()
                    await until(lambda: bb.health().connected)
            except AuthenticationFailed as error:
                assert password != secret
                shown += [repr(error), *traceback.format_exception(error)]
            # And where the URL itself is wrong.
            for wrong in (":notaport", "/path", " "):
                try:
                    BackbeatConfig(**settings | {"nats_url": settings["nats_url"] + wrong})
                except backbeat.ConfigError as error:
                    shown += [repr(error), *traceback.format_exception(error)]
    assert caplog.records
    for record in caplog.records:
        shown += [record.getMessage(), repr(record.args), repr(record.__dict__)]
    for text in shown:
        assert secret not in text
        assert escaped not in text
