"""What carries messages: the protocol that sessions and metronomes speak.

A transport is run by a service of its user (`Transport.run`), delivers in order, promises nothing
about what was sent while no connection stood, and never makes a subscriber wait for another one.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Final, NamedTuple, Protocol

import trio

# Enough for a beat's claims of a large cluster; beyond it the newest are dropped and counted.
SUBSCRIPTION_MESSAGES: Final = 4096


class Message(NamedTuple):
    """One message as it arrived."""

    subject: str
    data: bytes
    reply: str
    """The subject on which an answer is expected, or an empty string."""
    received_ns: int
    """When it arrived at the socket, in local nanoseconds."""
    id: str = ""
    """The id under which a stream stores it; empty if it has none."""


class Reply(NamedTuple):
    """The answer to a request, with the instants at which both passed the socket, in local ns."""

    data: bytes
    sent_ns: int
    received_ns: int


class TransportStatistics(NamedTuple):
    """Counters of a transport since it was made."""

    connects: int
    """How many times a connection was made, the first included."""
    received: int
    dropped: int
    """Messages that came faster than they were taken in, and were dropped."""
    permission_errors: int
    last_error: str | None
    """Why there is no connection; None while one stands."""
    recent_errors: tuple[tuple[int, str], ...]
    """The newest things that went wrong, each with when it did, in local ns."""
    refused: tuple[tuple[str, int], ...] = ()
    """What permissions refused, and how many times: ``publish to SUBJECT``, or ``subscription to
    SUBJECT``, in lower case, as the client tells of it."""


class Transport(Protocol):
    """Publish, subscribe and request over subjects.

    Subjects are those of NATS: tokens between dots; in a subscription ``*`` stands for one token
    and ``>`` for all that follow.
    """

    @property
    def connected(self) -> bool:
        """Whether a connection stands."""
        ...

    async def wait_connected(self, connected: bool = True, /) -> None:
        """Wait until a connection stands, or until none does. A checkpoint.

        Raises:
          TransportClosed: where it will never stand again, as the transport was closed.
        """
        ...

    @property
    def generation(self) -> int:
        """A number that grows with every connection made."""
        ...

    @property
    def max_payload(self) -> int:
        """The largest message that the server takes, in bytes."""
        ...

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Connect, and keep connecting, until cancelled or closed."""
        ...

    async def first_attempt(self) -> None:
        """Wait for the outcome of the first attempt to connect. A checkpoint.

        Raises:
          TransportBroken: where it failed, or a subclass of it that tells why.

        """
        ...

    def publish_nowait(self, subject: str, data: bytes, *, reply: str = "") -> None:
        """Hand over a message for sending. Not a checkpoint.

        Raises:
          TransportBroken: where no connection stands.
          TransportClosed: where the transport was closed.
          ValueError: where the message is larger than `max_payload`.

        """
        ...

    async def publish(self, subject: str, data: bytes, *, reply: str = "") -> None:
        """Hand over a message for sending, after waiting while too much is under way. A checkpoint.

        Raises as `publish_nowait` does.
        """
        ...

    async def flush(self) -> None:
        """Wait until the server has taken in all that was published before. A checkpoint.

        Raises:
          TransportBroken: where the connection goes away meanwhile.

        """
        ...

    async def request(self, subject: str, data: bytes, *, timeout: float) -> Reply:
        """Send a message and wait for its first answer. A checkpoint.

        Args:
          timeout: seconds.

        Raises:
          NoResponders: where nobody is subscribed to the subject.
          PermissionDenied: if the server's permissions refuse the message, or the subscription on
            which its answer comes.
          TransportBroken: where no answer comes in time, or the connection goes away.

        """
        ...

    def open_request(
        self, subject: str, data: bytes
    ) -> AbstractAsyncContextManager[AsyncIterator[Reply]]:
        """Send a message, and hear every answer to it for the length of a block.

        Entering and each step of the iterator are checkpoints. The iterator raises `NoResponders`
        where nobody is subscribed to the subject, `PermissionDenied` if the server's permissions
        refuse the message, and `TransportBroken` where the connection goes away. It does not end by
        itself.

        Raises:
          TransportBroken: where no connection stands.
          ValueError: where the message is larger than `max_payload`.

        """
        ...

    def open_subscription(
        self, subject: str, *, capacity: int = SUBSCRIPTION_MESSAGES
    ) -> AbstractAsyncContextManager[AsyncIterator[Message]]:
        """Subscribe for the length of a block.

        Where a connection stands, the server knows of the subscription once the block is entered.
        The subscription outlives reconnects; its iterator raises `TransportClosed` when the
        transport is closed. Entering and each step of the iterator are checkpoints.

        Args:
          capacity: how many messages may wait to be taken; later ones are dropped and counted.

        """
        ...

    async def aclose(self) -> None:
        """Close the transport; doing it again changes nothing. Releases even when cancelled."""
        ...

    def statistics(self) -> TransportStatistics:
        """Return the counters."""
        ...


def matches(pattern: str, subject: str) -> bool:
    """Tell whether a subject falls under a pattern of NATS's."""
    if pattern == subject:
        return True
    wanted, tokens = pattern.split("."), subject.split(".")
    for index, token in enumerate(wanted):
        if token == ">":
            return len(tokens) > index
        if index >= len(tokens) or (token != "*" and token != tokens[index]):
            return False
    return len(wanted) == len(tokens)


def check_subject(subject: str) -> None:
    """Refuse what no message can be published on."""
    if not all(map(_is_plain, subject.split("."))):
        raise ValueError(f"not a subject to publish on: {subject!r}")


def check_pattern(pattern: str) -> None:
    """Refuse what no subscription can be made to."""
    *tokens, last = pattern.split(".")
    plain = all(token == "*" or _is_plain(token) for token in tokens)
    if not plain or not (last in ("*", ">") or _is_plain(last)):
        raise ValueError(f"not a subject to subscribe to: {pattern!r}")


def _is_plain(token: str) -> bool:
    return bool(token) and token.isprintable() and not set(token) & set(" *>")
