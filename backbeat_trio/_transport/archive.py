"""Reading the claims that a stream has stored.

The claims are read by requests for single messages, a few at a time, and not through a consumer.
Whoever may make a consumer may have the server deliver what is stored on any subject, also on the
one of the beats. Permissions cannot tell such a consumer from any other. A request only ever brings
an answer that nobody takes for a beat. It also leaves nothing behind on the server, and is simply
repeated after the server was away.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple, Protocol, TypeVar, final

import msgspec
import trio
from msgspec import Struct

from .._errors import ClaimsUnavailable, NoResponders, PermissionDenied, TransportBroken
from .._time.local import local_ns
from .._wire import encode, status_subject
from .protocol import Message, Transport, matches

# What an answer may take, and how often it is looked whether permissions refused the request.
_PATIENCE: Final = 2.0
_LOOKS: Final = 20
# For how long JetStream may give no answer over a connection that stands. A stream whose leader was
# killed is back after 7 to 8 s.
_OUTAGE: Final = 30.0
_RETRY: Final = 0.1
# How many messages are asked for at once.
_AT_ONCE: Final = 64
# How long the server may take from the publication of a claim until it is stored.
_LAG: Final = 1.0
_NO_MESSAGE: Final = 10037
_NO_STREAM: Final = 10059
_NOT_ENABLED: Final = (10039, 10076)
_NO_JETSTREAM: Final = "the server has no JetStream, so it stores no claims"
_ID: Final = re.compile(rb"^Nats-Msg-Id: *([^\r\n]*)", re.MULTILINE | re.IGNORECASE)

T = TypeVar("T")


class Stored(NamedTuple):
    """A message that was stored, and its number. Numbers grow, and some may be missing."""

    number: int
    message: Message


class Archive(Protocol):
    """Where the claims that were stored can be read."""

    @property
    def lag(self) -> float:
        """For how many seconds a claim that was published may not be stored yet."""
        ...

    async def first_since(self, seconds: float) -> int:
        """Return the number of the first message that was stored within the last ``seconds``.

        A later message has a higher number. If there is no such message, return the number that the
        next one will have at the least. A checkpoint.

        Raises:
          ClaimsUnavailable: if nothing stores claims.
          PermissionDenied: if the server's permissions refuse it.
          TransportBroken: if there is no connection, or no answer.

        """
        ...

    async def last(self) -> int:
        """Return the number of the newest message. A checkpoint; raises as `read` does."""
        ...

    async def read(self, subject: str, number: int) -> Sequence[Stored]:
        """Return the next messages on a subject, in order; none if there is none yet.

        It waits while there is no connection. A checkpoint.

        Args:
          subject: the subject of the messages, which may have wildcards.
          number: the number from which to look.

        Raises:
          ClaimsUnavailable: if the stream is gone.
          PermissionDenied: if the server's permissions refuse it.
          TransportBroken: if there is no answer for long, over a connection that stands.
          TransportClosed: if the transport is closed.

        """
        ...


class _Failure(Struct):
    code: int = 0
    err_code: int = 0
    description: str = ""


class _Limits(Struct, frozen=True):
    subjects: tuple[str, ...] = ()


class _Contents(Struct):
    first_seq: int
    last_seq: int


class _Information(Struct):
    config: _Limits = _Limits()
    state: _Contents | None = None
    ts: datetime | None = None
    error: _Failure | None = None


class _Names(Struct):
    streams: list[str] | None = None
    error: _Failure | None = None


class _StoredMessage(Struct):
    subject: str
    seq: int
    time: datetime
    data: bytes = b""
    hdrs: bytes = b""


class _Found(Struct):
    message: _StoredMessage | None = None
    error: _Failure | None = None


@final
class StreamArchive:
    """The claims that a stream of JetStream has stored; see `Archive`.

    Args:
      transport: carries the requests; somebody else runs it.
      stream: the name of the stream. If there is none of that name, the one that takes the claims.

    """

    lag: Final = _LAG

    def __init__(self, transport: Transport, stream: str) -> None:
        self._transport = transport
        self._wanted = self._stream = stream
        self._width = 8

    async def first_since(self, seconds: float) -> int:
        """See `Archive.first_since`."""
        try:
            return await self._find_first(seconds)
        except NoResponders:
            raise ClaimsUnavailable(_NO_JETSTREAM) from None

    async def last(self) -> int:
        """See `Archive.last`."""
        return (await self._patiently(self._contents)).last_seq

    async def read(self, subject: str, number: int) -> Sequence[Stored]:
        """See `Archive.read`."""
        width = self._width
        answers: list[_StoredMessage | None] = [None] * width
        failures: list[Exception] = []

        async def get(index: int) -> None:
            try:
                answers[index] = await self._patiently(lambda: self._get(subject, number + index))
            except Exception as error:  # noqa: BLE001 - it is raised again, outside of the nursery
                failures.append(error)

        async with trio.open_nursery() as nursery:
            for index in range(width):
                nursery.start_soon(get, index)
        if failures:
            raise failures[0]
        # Each request brings the first message from its number on, so nothing in between is missed.
        # A request that brings none was answered before there was one. Those after it may have been
        # answered later, when messages had been stored that it did not see.
        found = {
            message.seq: Stored(message.seq, _restored(message))
            for message in itertools.takewhile(lambda message: message is not None, answers)
            if message is not None
        }
        # The fewer of the numbers are on the subject, the more requests bring the same.
        if len(found) > width // 2:
            self._width = min(2 * width, _AT_ONCE)
        elif found:
            self._width = max(width // 2, 1)
        return [found[each] for each in sorted(found)]

    async def _find_first(self, seconds: float) -> int:
        self._stream = await self._find_stream()
        information = await self._information()
        contents = _contents_of(information)
        begin, end = contents.first_seq, contents.last_seq + 1
        now = information.ts or datetime.now(UTC)
        try:
            since = now - timedelta(seconds=seconds)
        except OverflowError:
            return begin
        # Bisection by the times at which the messages were stored.
        while begin < end:
            middle = (begin + end) // 2
            message = await self._get(">", middle)
            if message is None or message.time >= since:
                end = middle
            else:
                begin = message.seq + 1
        return begin

    async def _find_stream(self) -> str:
        wanted = self._wanted
        information = await self._ask(f"INFO.{wanted}", b"", _Information)
        if information.error is None:
            subjects = information.config.subjects
            if any(_takes_claims(subject) for subject in subjects):
                return wanted
            raise ClaimsUnavailable(
                f"stream {wanted} stores no claims: it takes {', '.join(subjects) or 'nothing'}"
            )
        if information.error.err_code != _NO_STREAM:
            raise self._problem(information.error)
        try:
            names = await self._ask("NAMES", {"subject": status_subject("*")}, _Names)
        except PermissionDenied:
            names = _Names()
        if names.streams:
            return names.streams[0]
        raise self._problem(information.error)

    async def _information(self) -> _Information:
        information = await self._ask(f"INFO.{self._stream}", b"", _Information)
        if information.error is not None:
            raise self._problem(information.error)
        return information

    async def _contents(self) -> _Contents:
        return _contents_of(await self._information())

    async def _get(self, subject: str, number: int) -> _StoredMessage | None:
        request = {"seq": number, "next_by_subj": subject}
        found = await self._ask(f"MSG.GET.{self._stream}", request, _Found)
        if found.error is not None and found.error.err_code != _NO_MESSAGE:
            raise self._problem(found.error)
        return found.message

    def _problem(self, error: _Failure) -> ClaimsUnavailable | TransportBroken:
        if error.err_code == _NO_STREAM:
            return ClaimsUnavailable(f"there is no stream {self._stream}, so no claims are stored")
        if error.err_code in _NOT_ENABLED:
            return ClaimsUnavailable(_NO_JETSTREAM)
        return TransportBroken(f"JetStream: {error.description}")

    async def _patiently(self, function: Callable[[], Awaitable[T]]) -> T:
        since: float | None = None
        while True:
            await self._transport.wait_connected()
            try:
                return await function()
            except PermissionDenied:
                raise
            except TransportBroken:
                now = trio.current_time()
                if not self._transport.connected:
                    since = None
                elif since is None:
                    since = now
                elif now > since + _OUTAGE:
                    raise
            await trio.sleep(_RETRY)

    async def _ask(self, what: str, request: object, kind: type[T]) -> T:
        transport = self._transport
        subject = f"$JS.API.STREAM.{what}"
        before = dict(transport.statistics().refused)
        data = b"" if request == b"" else encode(request)
        async with transport.open_request(subject, data) as answers:
            for _ in range(_LOOKS):
                with trio.move_on_after(_PATIENCE / _LOOKS):
                    answer = await anext(answers)
                    break
                self._check_permission(before)
            else:
                raise TransportBroken(f"no answer on {subject} within {_PATIENCE:g} s")
        try:
            return msgspec.json.decode(answer.data, type=kind)
        except msgspec.DecodeError as error:
            raise TransportBroken(f"the answer on {subject} is not readable: {error}") from None

    def _check_permission(self, before: dict[str, int]) -> None:
        # The server names what it refuses as it is called after a mapping. So it may have another
        # name than the subject of the request, and what else the session publishes has a known one.
        for what, times in self._transport.statistics().refused:
            is_request = what.startswith("publish to") and "backbeat." not in what
            if is_request and times > before.get(what, 0):
                raise PermissionDenied(
                    f"permission denied: this user may not {what}, as reading stored claims needs; "
                    "docs/security.md says what each role may do"
                )


def _takes_claims(subject: str) -> bool:
    every = status_subject("")
    return subject.startswith(every) or matches(subject, f"{every}x")


def _contents_of(information: _Information) -> _Contents:
    if information.state is None:
        raise TransportBroken("the server does not tell what the stream contains")
    return information.state


def _restored(stored: _StoredMessage) -> Message:
    found = _ID.search(stored.hdrs)
    number: Any = found[1].decode(errors="replace") if found else ""
    return Message(stored.subject, stored.data, "", local_ns(), number)
