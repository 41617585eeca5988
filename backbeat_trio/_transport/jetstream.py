"""The data in JetStream: the record of the metronomes, and the stream of terminal claims.

The functions with a parameter ``client`` run in the thread of the connection, where nats-py runs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, TypeVar, final

import nats.errors
import nats.js.api
import nats.js.errors
import trio
from nats.aio.client import Client
from nats.js import JetStreamContext
from nats.js.kv import KeyValue

from .._config import BackbeatConfig
from .._errors import TransportBroken
from .._wire import status_subject
from .headers import encode_headers
from .nats import NatsTransport
from .protocol import matches
from .store import Conflict, Entry, RecordRefused

# How long an answer may take, in seconds. A stream whose leader was killed is back after 7 to 8 s.
_PATIENCE: Final = 1.0
_KEY: Final = "metronome"
# No stream stores a message that expects another stream than the one with its subject.
_UNSTORED: Final = {"Nats-Expected-Stream": "-"}
# An id has at most this length.
_LONGEST_ID: Final = "-" * 32
# For how many seconds the stream recognises a claim that comes twice.
_DUPLICATE_WINDOW: Final = 600.0
# The numbers of copies to try if none is configured, until there are enough servers for one.
_COPIES: Final = (3, 2, 1)
_NO_PEERS: Final = 10005
_INVALID: Final = 10052
_NO_STORAGE: Final = 10047
_NOT_CLUSTERED: Final = 10074
_NOT_ENABLED: Final = (10039, 10076)
# The server's text if its cluster is too small. If servers are down or not yet known, the text goes
# on after a comma.
_TOO_FEW: Final = "no suitable peers for placement"
# For how many seconds it must say so, because not every version of the server gives all reasons.
_SETTLING: Final = 5.0

T = TypeVar("T")


def _may_be_absent(error: nats.js.errors.APIError) -> bool:
    # No process is subscribed to the request, or the account has no JetStream. A JetStream that is
    # electing a leader gives another error.
    if not isinstance(error, nats.js.errors.ServiceUnavailableError):
        return False
    return error.err_code is None or error.err_code in _NOT_ENABLED


async def _is_absent(js: JetStreamContext) -> bool:
    """Tell whether the server's answer to the account request says that there is no JetStream."""
    try:
        await js.account_info()
    except nats.js.errors.APIError as error:
        if _may_be_absent(error):
            return True
        raise
    return False


def _may_pass(error: nats.js.errors.APIError) -> bool:
    # A server of the cluster is away or not yet known. A server that is full gives another text.
    text = error.description or ""
    return error.err_code == _NO_PEERS and (
        text == _TOO_FEW or "offline" in text or "miscellaneous" in text
    )


@final
class _Copies:
    """The number of copies with which a stream is made."""

    def __init__(self, wanted: int | None) -> None:
        self.short = False
        """Whether the stream was made with fewer copies, because there are too few servers."""
        self._wanted = wanted
        self._too_few_since: float | None = None

    async def make(
        self, create: Callable[[int], Awaitable[T]], *, clustered: bool = True
    ) -> tuple[T, int]:
        """Make a stream with the wanted copies, or as many as there are servers for.

        Args:
          create: asks the server for a stream with a number of copies.
          clustered: whether the server is one of several in a cluster.

        Returns:
          The result of ``create``, and the number of copies.

        Raises:
          RecordRefused: if the server will never keep so many copies.
          nats.js.errors.APIError: if the server refuses for another reason, which may pass.
        """
        too_few = False
        for copies in _COPIES if self._wanted is None else (self._wanted,):
            try:
                made = await create(copies)
            except nats.js.errors.APIError as error:
                # A server that is not in a cluster first looks for room for all copies, and then
                # refuses to make more than one.
                alone = error.err_code == _NO_STORAGE and copies > 1 and not clustered
                if (alone or error.err_code == _NOT_CLUSTERED) and self._wanted is None:
                    continue
                too_few = error.err_code == _NO_PEERS and error.description == _TOO_FEW
                if too_few and self._settled():
                    continue
                if not too_few:
                    self._too_few_since = None
                self._check(error, copies)
                raise
            self.short = too_few
            return made, copies
        raise RecordRefused(f"the cluster has too few servers with JetStream for {copies} copies")

    def _settled(self) -> bool:
        now = time.monotonic()
        if self._too_few_since is None:
            self._too_few_since = now
        return now >= self._too_few_since + _SETTLING

    def _check(self, error: nats.js.errors.APIError, copies: int) -> None:
        if error.err_code == _NOT_CLUSTERED:
            raise RecordRefused(
                f"the server keeps no {copies} copies: it is not in a cluster"
            ) from None
        if error.err_code == _INVALID:
            raise RecordRefused(f"the server refuses: {error.description}") from None


@final
class KeyValueStore:
    """The store of the record: one key in a key-value bucket.

    Args:
      transport: the transport; its `run` is called elsewhere.
      bucket: the name of the bucket, which is created if it is missing.
      replicas: the number of copies, 1 to 5. None stands for three in a cluster of servers (for
        fewer if it has fewer servers), and for one otherwise.

    """

    def __init__(
        self, transport: NatsTransport, bucket: str, *, replicas: int | None = None
    ) -> None:
        self._transport = transport
        self._bucket = bucket
        self._stream = f"KV_{bucket}"
        self.replicas: int | None = None
        """The number of copies of the bucket, once `open` has returned True."""
        self.opened = trio.Event()
        """Set once `open` has returned True."""
        self._copies = _Copies(replicas)
        self._found: tuple[Client, KeyValue] | None = None

    async def open(self) -> bool:
        """Create the bucket if it is missing, and return whether the server has JetStream.

        It may be called again at any time. On a connection on which the bucket was found before, it
        sends no request. The result is False only if the server's answer to the account request
        says that there is no JetStream. A checkpoint.

        Raises:
          TransportBroken: if JetStream does not answer, or cannot create the bucket at present, or
            if permissions refuse the request.
          RecordRefused: if JetStream will never create the bucket, or if another kind of stream has
            its name.
        """
        before = dict(self._transport.statistics().refused)
        try:
            found = await self._transport.call(self._open)
        except TransportBroken:
            stream = self._stream.lower()
            for what, times in self._transport.statistics().refused:
                is_own = what.startswith("publish to $js.api.") and what.endswith((stream, ".info"))
                if is_own and times > before.get(what, 0):
                    raise TransportBroken(f"permissions refuse to {what}") from None
            raise
        if found:
            self.opened.set()
        return found

    @property
    def short(self) -> bool:
        """Whether it was made with fewer copies than it should have: there are too few servers."""
        return self._copies.short

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
            # A request for a stream may be without an answer for other reasons.
            if _may_be_absent(error) and await _is_absent(client.jetstream(timeout=_PATIENCE)):
                return False
            raise
        return True

    async def _bucket_of(self, client: Client) -> KeyValue:
        if self._found is None or self._found[0] is not client:
            js = client.jetstream(timeout=_PATIENCE)
            try:
                bucket = await js.key_value(self._bucket)
            except nats.js.errors.BadBucketError:
                raise self._no_bucket() from None
            except nats.js.errors.NotFoundError:
                bucket = await self._create(js)
            else:
                config = (await bucket.status()).stream_info.config
                key = f"$KV.{self._bucket}.{_KEY}"
                if not any(matches(pattern, key) for pattern in config.subjects or ()):
                    raise self._no_bucket()
                if self.replicas is None:
                    self.replicas = config.num_replicas
            self._found = client, bucket
        return self._found[1]

    def _no_bucket(self) -> RecordRefused:
        return RecordRefused(
            f"stream {self._stream} exists and is not the key-value bucket {self._bucket}"
        )

    async def _bucket_again(self, client: Client) -> KeyValue:
        try:
            return await self._bucket_of(client)
        except RecordRefused as error:
            # A leader goes on without the record for now. `open` raises the final error.
            raise TransportBroken(str(error)) from None

    async def _create(self, js: JetStreamContext) -> KeyValue:
        config = nats.js.api.KeyValueConfig(
            bucket=self._bucket,
            description="The grid of a BACKBEAT cluster",
            storage=nats.js.api.StorageType.FILE,
        )

        async def create(copies: int) -> KeyValue:
            return await js.create_key_value(config.evolve(replicas=copies))

        bucket, self.replicas = await self._copies.make(create)
        return bucket

    async def _read(self, client: Client) -> Entry:
        bucket = await self._bucket_again(client)
        try:
            entry = await bucket.get(_KEY)
        except nats.js.errors.KeyNotFoundError as error:
            deleted: Any = error.entry
            return Entry(b"", 0 if deleted is None else deleted.revision or 0)
        except (nats.errors.NoRespondersError, nats.js.errors.APIError):
            # The bucket may have been deleted, so the next access looks for it again.
            self._found = None
            raise
        return Entry(entry.value or b"", entry.revision or 0)

    async def _write(self, client: Client, data: bytes, revision: int) -> int:
        bucket = await self._bucket_again(client)
        try:
            return await bucket.update(_KEY, data, last=revision)
        except nats.js.errors.KeyWrongLastSequenceError:
            raise Conflict("another metronome has written the record") from None
        except nats.js.errors.NoStreamResponseError:
            # The bucket has been deleted, and with it the value that was read. So it must be read
            # again.
            self._found = None
            await self._bucket_again(client)
            raise Conflict("the record has been deleted") from None
        except nats.js.errors.APIError as error:
            why = error.description or error
            raise TransportBroken(f"JetStream does not take the record: {why}") from None


@final
class ClaimStream:
    """The stream of terminal claims; see `Journal`."""

    def __init__(self, transport: NatsTransport, config: BackbeatConfig) -> None:
        self._transport = transport
        self._config = config
        self.name = config.claims_stream
        """The name of the stream. It is not that of the settings if a stream with the subjects of
        claims existed before."""
        self._max_message = -1
        self.limits: dict[str, float] | None = None
        """The limits of the stream, by their settings, once `open` has returned True."""
        self.reason = ""
        """Why there is no stream, once `open` has returned False."""
        self._copies = _Copies(config.claims_replicas)

    @property
    def short(self) -> bool:
        """Whether it was made with fewer copies than it should have: there are too few servers."""
        return self._copies.short

    async def open(self) -> bool:
        """See `Journal.open`."""
        refused = self._transport.statistics().permission_errors
        try:
            reason = await self._transport.call(self._open)
        except RecordRefused as error:
            reason = str(error)
        except TransportBroken:
            if self._transport.statistics().permission_errors == refused:
                raise
            # For an agent that may not ask for the stream, there is none.
            self.reason = "the server's permissions do not let this user ask for it"
            return False
        self.reason = reason or ""
        return reason is None

    async def _open(self, client: Client) -> str | None:
        # Return why there is no stream, with an empty string if that is not an error; or None if
        # there is one.
        js, wanted = client.jetstream(timeout=_PATIENCE), self._config.claims_stream
        try:
            info = await js.stream_info(wanted)
        except nats.js.errors.NotFoundError:
            return await self._find_or_create(client, js)
        except nats.js.errors.APIError as error:
            # A user who may ask for the stream may not be allowed to ask for the account.
            if _may_be_absent(error):
                return ""
            raise
        subject = status_subject(self._config.agent_id)
        if not any(matches(pattern, subject) for pattern in info.config.subjects or ()):
            # A claim that is published for it would never be acknowledged.
            return f"stream {wanted} does not take {subject}"
        self._take(info)
        return None

    def _take(self, info: nats.js.api.StreamInfo) -> None:
        config = info.config
        self.name = config.name or self._config.claims_stream
        self._max_message = config.max_msg_size or -1
        self.limits = {
            "claims_max_age": config.max_age or 0.0,
            "claims_max_bytes": config.max_bytes or -1,
            "claims_replicas": config.num_replicas or 1,
        }

    async def _find_or_create(self, client: Client, js: JetStreamContext) -> str | None:
        # A stream with these subjects that was created before may have any name.
        subject = status_subject(self._config.agent_id)
        try:
            self.name = await js.find_stream_name_by_subject(subject)
        except nats.js.errors.NotFoundError:
            info: dict[str, Any] = getattr(client, "_server_info", {})
            return await self._create(js, clustered=bool(info.get("cluster")))
        return None

    async def _create(self, js: JetStreamContext, *, clustered: bool) -> str | None:
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
            duplicate_window=min(age, _DUPLICATE_WINDOW) if age else _DUPLICATE_WINDOW,
        )

        async def create(copies: int) -> nats.js.api.StreamInfo:
            return await js.add_stream(stream.evolve(num_replicas=copies))

        try:
            info, _ = await self._copies.make(create, clustered=clustered)
        except nats.js.errors.ServiceUnavailableError:
            raise
        except nats.js.errors.APIError as error:
            if _may_pass(error):
                raise
            return error.description or "refused"
        self._take(info)
        return None

    def room(self, max_payload: int, *, stored: bool) -> int:
        """See `Journal.room`."""
        if not stored:
            return max_payload - len(encode_headers(_UNSTORED))
        if self._max_message >= 0:
            max_payload = min(max_payload, self._max_message)
        return max_payload - len(encode_headers(self._headers(_LONGEST_ID)))

    def _headers(self, number: str) -> dict[str, str]:
        return {"Nats-Msg-Id": number, "Nats-Expected-Stream": self.name}

    async def store(self, subject: str, claims: Sequence[tuple[str, bytes]]) -> list[bool]:
        """See `Journal.store`."""

        async def store(client: Client) -> list[bool]:
            js = client.jetstream(timeout=_PATIENCE)
            answers = await asyncio.gather(
                *(
                    js.publish(subject, data, headers=self._headers(number))
                    for number, data in claims
                ),
                return_exceptions=True,
            )
            return [not isinstance(answer, BaseException) for answer in answers]

        return await self._transport.call(store)

    async def publish_unstored(self, subject: str, data: bytes) -> None:
        """See `Journal.publish_unstored`."""
        await self._transport.publish(subject, data, headers=_UNSTORED)
