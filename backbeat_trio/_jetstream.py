"""What is kept in JetStream: the metronomes' record, and the stream of terminal claims.

The functions with a ``client`` run in the thread of the connection, as nats-py does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final, final

import nats.js.api
import nats.js.errors
from nats.aio.client import Client
from nats.js import JetStreamContext
from nats.js.kv import KeyValue

from ._config import BackbeatConfig
from ._errors import TransportBroken
from ._ledger import Conflict, Entry
from ._nats import NatsTransport
from ._wire import status_subject

# What an answer may take. A stream whose leader was killed is back after 7 to 8 s.
_PATIENCE: Final = 1.0
_KEY: Final = "metronome"
# A message that expects another stream than the one that takes its subject is stored by none.
_PASS_BY: Final = {"Nats-Expected-Stream": "-"}
# For how long the stream knows a claim again that comes twice, in seconds.
_DUPLICATE_WINDOW: Final = 600.0
# Replicas, where nothing is said of them and there is a cluster of servers.
_REPLICAS: Final = 3
_NOT_CLUSTERED: Final = 10074
_NOT_ENABLED: Final = (10039, 10076)


def _absent(error: nats.js.errors.APIError) -> bool:
    # Nobody answers at all, or an account without JetStream; and not one that is busy electing.
    return error.err_code is None or error.err_code in _NOT_ENABLED


@final
class KeyValueStore:
    """The metronomes' key in a key-value bucket.

    Args:
      transport: run by somebody else.
      bucket: the bucket, made where it is missing.
      replicas: 1 to 5; None is three in a cluster of servers, and one otherwise.

    """

    def __init__(
        self, transport: NatsTransport, bucket: str, *, replicas: int | None = None
    ) -> None:
        self._transport = transport
        self._bucket = bucket
        self._replicas = replicas
        self._opened: tuple[Client, KeyValue] | None = None

    async def open(self) -> bool:
        """Make the bucket where it is missing; return whether the server has JetStream.

        Raises:
          TransportBroken: where JetStream does not answer.
        """
        return await self._transport.call(self._open)

    async def read(self) -> Entry:
        """See `Store.read`."""
        return await self._transport.call(self._read)

    async def write(self, data: bytes, revision: int) -> int:
        """See `Store.write`."""

        async def write(client: Client) -> int:
            return await self._write(client, data, revision)

        return await self._transport.call(write)

    async def _open(self, client: Client) -> bool:
        try:
            await self._bucket_of(client)
        except nats.js.errors.APIError as error:
            if _absent(error):
                return False
            raise
        return True

    async def _bucket_of(self, client: Client) -> KeyValue:
        if self._opened is None or self._opened[0] is not client:
            js = client.jetstream(timeout=_PATIENCE)
            try:
                bucket = await js.key_value(self._bucket)
            except nats.js.errors.NotFoundError:
                bucket = await self._create(js)
            self._opened = client, bucket
        return self._opened[1]

    async def _create(self, js: JetStreamContext) -> KeyValue:
        config = nats.js.api.KeyValueConfig(
            bucket=self._bucket,
            description="The grid of a BACKBEAT cluster",
            storage=nats.js.api.StorageType.FILE,
            replicas=self._replicas or _REPLICAS,
        )
        try:
            return await js.create_key_value(config)
        except nats.js.errors.APIError as error:
            if self._replicas is not None or error.err_code != _NOT_CLUSTERED:
                raise
        return await js.create_key_value(config.evolve(replicas=1))

    async def _read(self, client: Client) -> Entry:
        bucket = await self._bucket_of(client)
        try:
            entry = await bucket.get(_KEY)
        except nats.js.errors.KeyNotFoundError as error:
            deleted: Any = error.entry
            return Entry(b"", 0 if deleted is None else deleted.revision or 0)
        return Entry(entry.value or b"", entry.revision or 0)

    async def _write(self, client: Client, data: bytes, revision: int) -> int:
        bucket = await self._bucket_of(client)
        try:
            return await bucket.update(_KEY, data, last=revision)
        except nats.js.errors.KeyWrongLastSequenceError:
            raise Conflict("the record was written by somebody else") from None
        except nats.js.errors.NoStreamResponseError:
            # The bucket is gone, and with it what was read: whoever wrote must look again.
            self._opened = None
            await self._bucket_of(client)
            raise Conflict("the record is gone") from None
        except nats.js.errors.APIError as error:
            raise TransportBroken(f"JetStream does not take the record: {error}") from None


@final
class ClaimStream:
    """The stream of terminal claims; see `Journal`."""

    def __init__(self, transport: NatsTransport, config: BackbeatConfig) -> None:
        self._transport = transport
        self._config = config
        self._name = config.claims_stream

    async def open(self) -> bool:
        """See `Journal.open`."""
        refused = self._transport.statistics().permission_errors
        try:
            reason = await self._transport.call(self._open)
        except TransportBroken:
            if self._transport.statistics().permission_errors == refused:
                raise
            # Somebody who may not ask has no stream, as far as that goes.
            return False
        if reason:
            self._transport.note_error(f"no stream of terminal claims: {reason}")
        return reason is None

    async def _open(self, client: Client) -> str | None:
        # Returns why there is none; nothing where that is as it should be.
        js, wanted = client.jetstream(timeout=_PATIENCE), self._config.claims_stream
        try:
            await js.stream_info(wanted)
        except nats.js.errors.NotFoundError:
            return await self._find_or_create(js)
        except nats.js.errors.APIError as error:
            if _absent(error):
                return ""
            raise
        self._name = wanted
        return None

    async def _find_or_create(self, js: JetStreamContext) -> str | None:
        # Whoever made a stream of these subjects beforehand has chosen its name.
        subject = status_subject(self._config.agent_id)
        try:
            self._name = await js.find_stream_name_by_subject(subject)
        except nats.js.errors.NotFoundError:
            return await self._create(js)
        return None

    async def _create(self, js: JetStreamContext) -> str | None:
        config = self._config
        age = config.claims_max_age
        stream = nats.js.api.StreamConfig(
            name=config.claims_stream,
            description="Terminal claims of BACKBEAT agents",
            subjects=[status_subject(">")],
            storage=nats.js.api.StorageType.FILE,
            discard=nats.js.api.DiscardPolicy.OLD,
            max_age=age or None,
            max_bytes=config.claims_max_bytes,
            num_replicas=config.claims_replicas,
            duplicate_window=min(age, _DUPLICATE_WINDOW) if age else _DUPLICATE_WINDOW,
        )
        try:
            await js.add_stream(stream)
        except nats.js.errors.ServiceUnavailableError:
            raise
        except nats.js.errors.APIError as error:
            return error.description or "refused"
        self._name = config.claims_stream
        return None

    async def store(self, subject: str, claims: Sequence[tuple[str, bytes]]) -> list[bool]:
        """See `Journal.store`."""

        async def store(client: Client) -> list[bool]:
            js = client.jetstream(timeout=_PATIENCE)
            answers = await asyncio.gather(
                *(
                    js.publish(subject, data, stream=self._name, headers={"Nats-Msg-Id": number})
                    for number, data in claims
                ),
                return_exceptions=True,
            )
            return [not isinstance(answer, BaseException) for answer in answers]

        return await self._transport.call(store)

    async def pass_by(self, subject: str, data: bytes) -> None:
        """See `Journal.pass_by`."""
        await self._transport.publish(subject, data, headers=_PASS_BY)
