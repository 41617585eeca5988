"""The part of a service that says that it is there, and how it does: ``$SRV`` of ADR-32 of NATS."""

from __future__ import annotations

import contextlib
import re
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Final, Literal, TypeAlias, final

import msgspec
import trio

from .._errors import Logger, TransportClosed, TransportError
from .._wire import is_inbox
from .adr32 import EndpointInfo, EndpointStats, Info, Ping, Stats, timestamp
from .protocol import Transport

Verb: TypeAlias = Literal["PING", "INFO", "STATS"]

VERBS: Final[tuple[Verb, ...]] = ("PING", "INFO", "STATS")
# Bytes of chance in an instance's id.
_ID_BYTES: Final = 11


# What is at the beginning of versions that are not semantic ones, too.
_NUMBERS: Final = re.compile(r"\d+\.\d+\.\d+")


def own_version() -> str:
    """Return the version of this package."""
    # Imported on use: the package imports this module.
    from .. import __version__

    return __version__


def discover_own(name: str, description: str, metadata: Callable[[], dict[str, str]]) -> Discovery:
    """Return how a part of this package, such as an agent, can be found as a service."""
    version = own_version()
    numbers = _NUMBERS.match(version)
    return Discovery(
        name,
        "0.0.0" if numbers is None else numbers[0],
        description,
        lambda: metadata() | {"version": version},
    )


def _nothing() -> Sequence[EndpointInfo]:
    return ()


def _no_stats() -> Sequence[EndpointStats]:
    return ()


@final
class Discovery:
    """One instance of a service, as everybody on the server can find it.

    Args:
      name: the name that all instances share, which must be valid (see `adr32.check_name`).
      version: the version, which must be valid (see `adr32.check_version`).
      description: for people.
      metadata: returns the metadata of the present.
      infos: returns what ``$SRV.INFO`` tells of the endpoints.
      stats: returns what ``$SRV.STATS`` tells of them.

    """

    def __init__(
        self,
        name: str,
        version: str,
        description: str,
        metadata: Callable[[], dict[str, str]],
        infos: Callable[[], Sequence[EndpointInfo]] = _nothing,
        stats: Callable[[], Sequence[EndpointStats]] = _no_stats,
    ) -> None:
        self.name: str = name
        self.version: str = version
        self.description: str = description
        self.id: str = secrets.token_hex(_ID_BYTES)
        """What tells this instance from the others."""
        self._metadata = metadata
        self._infos = infos
        self._stats = stats
        self._started = timestamp(time.time_ns())

    def answer(self, verb: Verb) -> Ping | Info | Stats:
        """Return the answer to a verb."""
        standard = (self.name, self.id, self.version, self._metadata())
        if verb == "PING":
            return Ping(*standard)
        if verb == "INFO":
            return Info(*standard, self.description, list(self._infos()))
        return Stats(*standard, list(self._stats()), self._started)

    async def run(
        self,
        transport: Transport,
        optional: Logger | None = None,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Answer over a transport, until cancelled or the transport is closed.

        Args:
          transport: the transport, whose `run` is called elsewhere.
          optional: if given, it is no error if the server's permissions refuse this, and one line
            of this log says so.
          task_status: told once the server knows of the nine subscriptions.

        """
        missing = 3 * len(VERBS)
        refusals: list[str] = []

        def ready(refusal: str | None) -> None:
            nonlocal missing
            missing -= 1
            if refusal is not None:
                refusals.append(refusal)
            if not missing:
                if refusals and optional is not None:
                    optional.debug("not every service tool can find this one: %s", refusals[0])
                task_status.started()

        async with trio.open_nursery() as nursery:
            for verb in VERBS:
                for subject in (
                    f"$SRV.{verb}",
                    f"$SRV.{verb}.{self.name}",
                    f"$SRV.{verb}.{self.name}.{self.id}",
                ):
                    nursery.start_soon(
                        self._answer_on, transport, subject, verb, optional is not None, ready
                    )

    async def _answer_on(
        self,
        transport: Transport,
        subject: str,
        verb: Verb,
        optional: bool,
        ready: Callable[[str | None], None],
    ) -> None:
        with contextlib.suppress(TransportClosed):
            async with transport.open_subscription(subject, optional=optional) as messages:
                ready(messages.refusal)
                async for message in messages:
                    # Nobody should have it publish where they may not publish themselves.
                    if is_inbox(message.reply):
                        with contextlib.suppress(TransportError, ValueError):
                            transport.publish_nowait(
                                message.reply, msgspec.json.encode(self.answer(verb))
                            )
