"""The mistakes that newcomers make: each is said once, with what to do about it."""

from __future__ import annotations

import logging
import typing

import msgspec
import pytest

from backbeat_trio import BackbeatConfig, session
from backbeat_trio._config import ConfigFields

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
