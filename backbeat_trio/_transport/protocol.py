"""The protocol of a transport, which carries the messages of sessions and metronomes.

The user of a transport runs `Transport.run` in a task. A transport delivers messages in order. It
promises nothing about messages that are sent while there is no connection. A slow subscriber does
not make others wait.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from functools import lru_cache
from typing import Final, NamedTuple, Protocol

import trio

# Enough for all claims of a large cluster on one beat. If it is full, new messages are dropped and
# counted.
SUBSCRIPTION_MESSAGES: Final = 4096

_SUBJECT: Final = re.compile(r"[^ .*>]+(?:\.[^ .*>]+)*")
# In bytes. A server ends the connection of whoever sends a line of more than 4,096 bytes, and a
# line may have two subjects, or a subject and a queue group.
_LONGEST: Final = 2000


class Message(NamedTuple):
    """One message as it arrived.

    Attributes:
      subject: the subject on which it was published.
      data: the payload.
      reply: the subject on which an answer is expected; empty if none is.
      received_ns: when it arrived at the socket, in nanoseconds of local time, which is that of
        `trio.current_time`.
      id: the id under which a stream stores it; empty if it has none.
      headers: the headers; None if it has none. A name that comes more than once with different
        values has them all, separated by commas.

    """

    subject: str
    data: bytes
    reply: str
    received_ns: int
    id: str = ""
    headers: Mapping[str, str] | None = None


class Reply(NamedTuple):
    """The answer to a request, and when both passed the socket.

    Attributes:
      data: the payload of the answer.
      sent_ns: when the request was sent, in nanoseconds of local time, which is that of
        `trio.current_time`.
      received_ns: when the answer arrived, in the same time.
      headers: the headers of the answer, as in `Message`.

    """

    data: bytes
    sent_ns: int
    received_ns: int
    headers: Mapping[str, str] | None = None


class Subscription(Protocol):
    """The messages of a subscription: an async iterator, each step of which is a checkpoint."""

    refusal: str | None
    """What the server's permissions refuse, for people; None if they let it be."""

    def __aiter__(self) -> AsyncIterator[Message]: ...

    async def __anext__(self) -> Message: ...

    async def batch(self) -> list[Message]:
        """Wait for a message, and return all that have arrived. A checkpoint.

        Raises:
          TransportClosed: if the transport is closed, and all messages have been returned.

        """
        ...

    def waiting(self) -> list[Message]:
        """Return all that have arrived, without waiting for one. Not a checkpoint."""
        ...

    async def drain(self) -> None:
        """Have the server send no more messages, and wait until it sends none. A checkpoint.

        What has arrived by then can still be read. If there is no connection, there is nothing to
        wait for.
        """
        ...


class Answers(Protocol):
    """The answers to a request: an async iterator, each step of which is a checkpoint."""

    reply: str
    """The subject on which they arrive."""

    def __aiter__(self) -> AsyncIterator[Reply]: ...

    async def __anext__(self) -> Reply: ...


class TransportStatistics(NamedTuple):
    """What a transport has counted since it was made.

    Attributes:
      connects: how many connections were made, including the first.
      received: messages that arrived for subscriptions.
      dropped: messages that were dropped because a subscriber, or this process, was too slow.
      permission_errors: how often the server's permissions refused something.
      last_error: the reason why there is no connection; None while there is one.
      recent_errors: the newest errors, each with the local time, in nanoseconds, at which it was
        seen.
      refused: what the permissions refused, and how often: ``publish to SUBJECT`` or
        ``subscription to SUBJECT``, in lower case.
      late_replies: answers that came when nobody waited for them any more, and further answers to a
        request that needs only one.
      waiting: messages that have arrived, and wait for their subscribers.
      unsent_bytes: how much is to be written to the connection.

    """

    connects: int
    received: int
    dropped: int
    permission_errors: int
    last_error: str | None
    recent_errors: tuple[tuple[int, str], ...]
    refused: tuple[tuple[str, int], ...] = ()
    late_replies: int = 0
    waiting: int = 0
    unsent_bytes: int = 0


class Transport(Protocol):
    """What a session needs of its connection: to publish, to subscribe, and to send requests.

    Sessions have one for NATS, and `MemoryTransport`. Any object with these methods can be passed
    as the ``transport`` of `session`. Subjects are those of NATS: words between dots; in a
    subscription ``*`` stands for one word, and ``>`` for all that follow.
    """

    @property
    def connected(self) -> bool:
        """Whether there is a connection."""
        ...

    async def wait_connected(self, connected: bool = True, /) -> None:
        """Wait until there is a connection, or until there is none. A checkpoint.

        Args:
          connected: whether to wait for a connection, or for its end.

        Raises:
          TransportClosed: if it waits for a connection, and the transport is closed.

        """
        ...

    @property
    def generation(self) -> int:
        """The number of connections so far, which grows with each new one."""
        ...

    @property
    def max_payload(self) -> int:
        """The size of the largest message that the server accepts, in bytes."""
        ...

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Connect, and keep connecting, until cancelled or closed."""
        ...

    async def first_attempt(self) -> None:
        """Wait for the end of the first attempt to connect. A checkpoint.

        A session with `BackbeatConfig.require_connection` calls it once, after `run` has started,
        and does not start if it raises.

        Raises:
          TransportBroken: if it failed; a subclass names the kind of failure.

        """
        ...

    def publish_nowait(
        self,
        subject: str,
        data: bytes,
        *,
        reply: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Queue a message for sending. Not a checkpoint.

        Args:
          subject: the subject, without ``*`` and ``>``.
          data: the payload.
          reply: the subject on which an answer is expected; empty for none.
          headers: the headers of the message. White space around a value is lost.

        Raises:
          TransportBroken: if there is no connection.
          TransportClosed: if the transport was closed.
          ValueError: if the message with its headers is larger than `max_payload`, or a subject or
            a header is not valid.

        """
        ...

    async def publish(
        self,
        subject: str,
        data: bytes,
        *,
        reply: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Queue a message for sending; wait first if too much is queued already. A checkpoint.

        It takes the arguments, and raises the errors, of `publish_nowait`.
        """
        ...

    async def flush(self) -> None:
        """Wait until the server has received all that was published before. A checkpoint.

        Raises:
          TransportBroken: if there is no connection, or it is lost meanwhile.

        """
        ...

    async def request(
        self,
        subject: str,
        data: bytes,
        *,
        timeout: float,
        headers: Mapping[str, str] | None = None,
        abandoned: Callable[[str, BaseException], object] | None = None,
    ) -> Reply:
        """Send a message, and return its first answer. A checkpoint.

        Args:
          subject: the subject, without ``*`` and ``>``.
          data: the payload.
          timeout: how long to wait for the answer, in seconds.
          headers: the headers of the message.
          abandoned: called with the subject on which the answer was expected, and the exception,
            if the wait is cancelled or interrupted, or the transport is about to be closed.

        Raises:
          NoResponders: if no process is subscribed to the subject.
          PermissionDenied: if the server's permissions refuse the message, or the subscription on
            which its answer comes.
          TransportBroken: if no answer comes in time, or the connection is lost.

        """
        ...

    def open_request(
        self, subject: str, data: bytes, *, headers: Mapping[str, str] | None = None
    ) -> AbstractAsyncContextManager[Answers]:
        """Send a message, and iterate over all its answers in a block.

        It is called for a request that several processes may answer, such as that of a metronome
        which asks who knows the grid; `request` is for a single answer. Entering and each step of
        the iterator are checkpoints. The iterator raises `NoResponders` if no process is subscribed
        to the subject, `PermissionDenied` if the server's permissions refuse the message or the
        subscription on which its answers come, and `TransportBroken` if the connection is lost. It
        does not end by itself.

        Args:
          subject: the subject, without ``*`` and ``>``.
          data: the payload.
          headers: headers of the message; None for none.

        Raises:
          TransportBroken: if there is no connection.
          ValueError: if the message is larger than `max_payload`.

        """
        ...

    def open_subscription(
        self,
        subject: str,
        *,
        capacity: int = SUBSCRIPTION_MESSAGES,
        queue: str = "",
        optional: bool = False,
        confirmed: bool = True,
    ) -> AbstractAsyncContextManager[Subscription]:
        """Subscribe to a subject, and iterate over its messages in a block.

        If there is a connection, the server knows the subscription when the block begins. The
        subscription outlives reconnects. Its iterator raises `TransportClosed` when the transport
        is closed. Entering and each step of the iterator are checkpoints.

        Args:
          subject: the subject, which may contain ``*`` and ``>``.
          capacity: how many messages may wait for the iterator; more are dropped and counted.
          queue: the name of a queue group: each message goes to one subscription of the group. An
            empty string is no group.
          optional: whether it is no error if the server's permissions refuse the subscription. It
            brings no messages then.
          confirmed: whether the block begins only when the server knows the subscription. If not,
            the server knows it before anything that the block sends, which saves a round trip.

        """
        ...

    async def aclose(self) -> None:
        """Close the transport. A second call has no effect. It closes even when cancelled."""
        ...

    def statistics(self) -> TransportStatistics:
        """Return what the transport has counted since it was made. Not a checkpoint."""
        ...


def matches(pattern: str, subject: str) -> bool:
    """Tell whether a subject matches a pattern, by the rules of NATS."""
    if pattern == subject:
        return True
    wanted, tokens = pattern.split("."), subject.split(".")
    for index, token in enumerate(wanted):
        if token == ">":
            return len(tokens) > index
        if index >= len(tokens) or (token != "*" and token != tokens[index]):
            return False
    return len(wanted) == len(tokens)


def is_subject(subject: str) -> bool:
    """Tell whether a message can be published on this subject."""
    return (
        _SUBJECT.fullmatch(subject) is not None
        and subject.isprintable()
        and len(subject.encode()) <= _LONGEST
    )


# Subjects are few, and messages many.
@lru_cache(maxsize=1024)
def check_subject(subject: str) -> None:
    """Raise `ValueError` unless a message can be published on this subject."""
    if not is_subject(subject):
        raise ValueError(f"not a subject to publish on: {_shown(subject)}")


def check_pattern(pattern: str) -> None:
    """Raise `ValueError` unless a subscription can be made to this subject."""
    *tokens, last = pattern.split(".")
    plain = all(token == "*" or _is_plain(token) for token in tokens)
    plain = plain and (last in ("*", ">") or _is_plain(last))
    if not plain or len(pattern.encode()) > _LONGEST:
        raise ValueError(f"not a subject to subscribe to: {_shown(pattern)}")


def check_queue(queue: str) -> None:
    """Raise `ValueError` unless a queue group can have this name."""
    if queue and not is_subject(queue):
        raise ValueError(f"not the name of a queue group: {_shown(queue)}")


def _shown(subject: str) -> str:
    if len(subject.encode(errors="replace")) <= _LONGEST:
        return repr(subject)
    return f"{subject[:100]!r}... (at most {_LONGEST:,} bytes are allowed)"


def _is_plain(token: str) -> bool:
    return "." not in token and is_subject(token)
