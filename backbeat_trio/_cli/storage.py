"""The steps of ``backbeat doctor`` about JetStream: the record, the stored claims, and their room.

Everything here only reads. A user may ask for what its role needs: only a metronome's user may read
the record.
"""

from __future__ import annotations

import time
from datetime import datetime
from typing import Final, NamedTuple, TypeVar

import msgspec
import trio
from msgspec import Struct

from .._config import BackbeatConfig
from .._errors import NoResponders, PermissionDenied, TransportBroken
from .._transport.nats import NatsTransport
from .._views.shown import clean
from .._wire import Record, bucket_of, decode_record, encode
from .findings import Finding, Say
from .reach import Greeting

_STEP: Final = "JetStream"
_API: Final = "$JS.API."
# How long an answer may take, in seconds. A stream whose leader was killed is back after 7 to 8 s.
_PATIENCE: Final = 10.0
_NO_STREAM: Final = 10059
_NO_MESSAGE: Final = 10037
# How much of the account should be left when the stream of claims is full, in bytes. The record is
# small, and is written again and again.
_ROOM: Final = 16 * 1024 * 1024
# From so much on a stream counts as full.
_FULL: Final = 0.95
_UNITS: Final = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))

T = TypeVar("T")


class _Failure(Struct, frozen=True):
    err_code: int = 0
    description: str = ""


class _Copy(Struct, frozen=True):
    name: str = ""
    current: bool = True
    offline: bool = False


class _Copies(Struct, frozen=True):
    replicas: tuple[_Copy, ...] = ()


class _Config(Struct, frozen=True):
    max_age: int = 0
    max_bytes: int = -1
    num_replicas: int = 1


class _State(Struct, frozen=True):
    messages: int = 0
    bytes: int = 0


class Stream(Struct, frozen=True):
    """What the server says of a stream."""

    config: _Config = _Config()
    state: _State = _State()
    cluster: _Copies = _Copies()
    ts: datetime | None = None
    error: _Failure | None = None


class _AccountLimits(Struct, frozen=True):
    max_storage: int = -1


class _Account(Struct, frozen=True):
    storage: int = 0
    limits: _AccountLimits = _AccountLimits()
    error: _Failure | None = None


class _Message(Struct, frozen=True):
    data: bytes = b""


class _Stored(Struct, frozen=True):
    message: _Message | None = None
    error: _Failure | None = None


class Stores(NamedTuple):
    """What was read that other steps need.

    Attributes:
      record: the record of the metronomes; None if it could not be read.
      server_ahead: by how many seconds the server's wall clock is ahead of this machine's; None if
        the server did not tell its time.

    """

    record: Record | None
    server_ahead: float | None


async def try_stores(
    transport: NatsTransport, config: BackbeatConfig, greeting: Greeting, say: Say
) -> Stores:
    """Say what JetStream keeps for the cluster, and how much room there is. A checkpoint.

    Args:
      transport: a connection that nobody else uses.
      config: the settings.
      greeting: what the server says of itself.
      say: called with each finding.

    Raises:
      TransportBroken: if the connection is lost.

    """
    if not greeting.jetstream:
        text = "the server has no JetStream, so nothing keeps who leads, and no claims are stored"
        mend = "Start it with `-js`, or give its configuration a `jetstream` block."
        say(Finding(_STEP, "JetStream", "warning", text, mend))
        return Stores(None, None)
    say(Finding(_STEP, "JetStream", "ok", "the server has it"))
    bucket = f"KV_{bucket_of(config.cluster_id)}"
    record_stream, _ = await _try_stream(transport, "bucket", bucket, greeting, say)
    record = None if record_stream is None else await _try_record(transport, config, bucket, say)
    claims, ahead = await _try_stream(transport, "claims", config.claims_stream, greeting, say)
    if claims is not None:
        _say_limits(config.claims_stream, claims, say)
    await _try_account(transport, claims, say)
    return Stores(record, ahead)


async def _ask(transport: NatsTransport, what: str, request: object, kind: type[T]) -> T:
    before = transport.statistics().permission_errors
    data = b"" if request is None else encode(request)
    async with transport.open_request(f"{_API}{what}", data) as answers:
        # The server refuses the subject under the name that a mapping gives it, so that the request
        # does not raise by itself.
        await transport.flush()
        if transport.statistics().permission_errors > before:
            raise PermissionDenied(f"this user may not ask for {what}")
        with trio.move_on_after(_PATIENCE):
            answer = await anext(answers)
            return msgspec.json.decode(answer.data, type=kind)
    raise TransportBroken(f"JetStream does not answer {what} within {_PATIENCE:g} s")


async def _try_stream(
    transport: NatsTransport, name: str, stream: str, greeting: Greeting, say: Say
) -> tuple[Stream | None, float | None]:
    asked = time.time()
    try:
        found = await _ask(transport, f"STREAM.INFO.{stream}", None, Stream)
    except (PermissionDenied, NoResponders, TransportBroken, msgspec.DecodeError) as error:
        say(_not_read(name, f"stream {stream}", error, transport))
        return None, None
    ahead = None if found.ts is None else found.ts.timestamp() - (asked + time.time()) / 2
    if found.error is not None:
        if found.error.err_code == _NO_STREAM:
            text = f"there is no stream {stream}"
            mend = "Start `backbeat pulse`, which makes it, with a user of the role metronome."
            say(Finding(_STEP, name, "warning", text, mend))
        else:
            text = f"stream {stream}: {clean(found.error.description)}"
            say(Finding(_STEP, name, "failed", text, "Look at the server's log."))
        return None, ahead
    _say_copies(name, stream, found, greeting, say)
    return found, ahead


def _not_read(name: str, what: str, error: Exception, transport: NatsTransport) -> Finding:
    if not transport.connected:
        raise error
    if isinstance(error, PermissionDenied):
        text = f"{what}: this user may not ask for it, and only some roles need to"
        return Finding(_STEP, name, "not tried", text)
    if isinstance(error, NoResponders):
        text = f"{what}: the account of this user has no JetStream"
        return Finding(_STEP, name, "not tried", text)
    text = f"{what}: {clean(str(error))}"
    return Finding(_STEP, name, "failed", text, "Look at the log of the server, and at its disk.")


def _say_copies(name: str, stream: str, found: Stream, greeting: Greeting, say: Say) -> None:
    copies = found.config.num_replicas
    held = f"{found.state.messages} messages, {format_bytes(found.state.bytes)}"
    text = f"stream {stream}: {held}, {copies} {'copy' if copies == 1 else 'copies'}"
    behind = [
        clean(each.name, 50) for each in found.cluster.replicas if each.offline or not each.current
    ]
    if behind:
        text += f", of which these are not up to date: {', '.join(behind)}"
        say(Finding(_STEP, name, "warning", text, "Start these servers, or wait for them."))
    elif copies < 3 and greeting.cluster:
        text += ", so that it does not outlive every loss of a server"
        mend = f"With three servers or more: nats stream edit {stream} --replicas 3"
        say(Finding(_STEP, name, "warning", text, mend))
    else:
        say(Finding(_STEP, name, "ok", text))


async def _try_record(
    transport: NatsTransport, config: BackbeatConfig, bucket: str, say: Say
) -> Record | None:
    key = f"$KV.{bucket.removeprefix('KV_')}.metronome"
    request = {"last_by_subj": key}
    try:
        found = await _ask(transport, f"STREAM.MSG.GET.{bucket}", request, _Stored)
    except (PermissionDenied, NoResponders, TransportBroken, msgspec.DecodeError) as error:
        say(_not_read("record", "the record", error, transport))
        return None
    if found.message is None:
        why = "" if found.error is None else clean(found.error.description)
        empty = found.error is not None and found.error.err_code == _NO_MESSAGE
        text = "nobody has written the record yet" if empty else f"the record: {why}"
        mend = f"Start `backbeat pulse` for cluster {config.cluster_id}."
        say(Finding(_STEP, "record", "warning", text, mend))
        return None
    try:
        record = decode_record(found.message.data)
    except msgspec.DecodeError as error:
        text = f"the record cannot be read: {clean(str(error))}"
        mend = "Upgrade all metronomes to one version; the leader then writes it again."
        say(Finding(_STEP, "record", "failed", text, mend))
        return None
    text = f"{clean(record.leader_id)} wrote it in epoch {record.epoch}"
    if record.written_ms is not None:
        text += f", {max(0.0, time.time() - record.written_ms / 1000):.3g} s ago"
    say(Finding(_STEP, "record", "ok", text))
    return record


def _say_limits(name: str, stream: Stream, say: Say) -> None:
    config, used = stream.config, stream.state.bytes
    age = f"{config.max_age / 1e9 / 86_400:.3g} days" if config.max_age else "for ever"
    if config.max_bytes < 0:
        text = f"claims are kept {age}, and {name} has no limit of its size"
        mend = f"nats stream edit {name} --max-bytes 1GB, as it could fill the storage otherwise."
        say(Finding(_STEP, "limits", "warning", text, mend))
        return
    share = used / config.max_bytes if config.max_bytes else 1.0
    text = f"claims are kept {age}; {name} is {share:.0%} of {format_bytes(config.max_bytes)}"
    if share < _FULL or not config.max_age:
        say(Finding(_STEP, "limits", "ok", text))
        return
    text += ", so that claims are dropped before that"
    mend = "Give it more room, up to what the account allows, or a shorter age."
    say(Finding(_STEP, "limits", "warning", text, mend))


async def _try_account(transport: NatsTransport, claims: Stream | None, say: Say) -> None:
    try:
        account = await _ask(transport, "INFO", None, _Account)
    except (PermissionDenied, NoResponders, TransportBroken, msgspec.DecodeError) as error:
        say(_not_read("storage", "how much storage is left", error, transport))
        return
    if account.error is not None:
        text = f"the account: {clean(account.error.description)}"
        say(Finding(_STEP, "storage", "failed", text, "Give the account a `jetstream` block."))
        return
    most, used = account.limits.max_storage, account.storage
    if most < 0:
        text = f"{format_bytes(used)} are used, and the account has no limit but the server's"
        say(Finding(_STEP, "storage", "ok", text))
        return
    left = most - used
    text = f"{format_bytes(used)} of {format_bytes(most)} are used"
    mend = (
        "Raise `max_file` of the account, or lower the size of the stream of claims, as the "
        "comments in examples/nats-server.conf explain."
    )
    if left < _ROOM // 16:
        text += ", so that the record can hardly be written"
        say(Finding(_STEP, "storage", "failed", text, mend))
        return
    if claims is not None and claims.config.max_bytes >= 0:
        growth = (claims.config.max_bytes - claims.state.bytes) * claims.config.num_replicas
        if left - max(0, growth) < _ROOM:
            text += "; once the stream of claims is full, there is no room left for the record"
            say(Finding(_STEP, "storage", "warning", text, mend))
            return
    say(Finding(_STEP, "storage", "ok", f"{text}; {format_bytes(left)} are left"))


def format_bytes(number: float) -> str:
    """Write a number of bytes for people."""
    for unit, size in _UNITS:
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} bytes"
