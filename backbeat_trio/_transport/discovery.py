"""Saying that a service is there, and finding services: ``$SRV`` of ADR-32 of NATS."""

from __future__ import annotations

import contextlib
import re
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Final, Literal, TypeAlias, final

import msgspec
import trio

from .._errors import Logger, NoResponders, TransportClosed, TransportError
from .._version import __version__
from .._wire import is_inbox
from .adr32 import EndpointInfo, EndpointStats, Info, Ping, Stats, timestamp
from .protocol import Transport

Verb: TypeAlias = Literal["PING", "INFO", "STATS"]

VERBS: Final[tuple[Verb, ...]] = ("PING", "INFO", "STATS")
# Bytes of chance in an instance's id.
_ID_BYTES: Final = 11
# Whoever asks for services waits this long for the first answer, and for the next one after each.
# All together take so long at most. Times are in seconds.
_FIRST: Final = 2.0
_QUIET: Final = 0.3
_LONGEST: Final = 10.0
# How many instances are found at most.
_INSTANCES: Final = 65_536

# What is at the beginning of versions that are not semantic ones, too.
_NUMBERS: Final = re.compile(r"\d+\.\d+\.\d+")


def discover_own(name: str, description: str, metadata: Callable[[], dict[str, str]]) -> Discovery:
    """Return how a part of this package, such as an agent, can be found as a service."""
    numbers = _NUMBERS.match(__version__)
    return Discovery(
        name,
        "0.0.0" if numbers is None else numbers[0],
        description,
        lambda: metadata() | {"version": __version__},
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


async def find_services(transport: Transport, name: str = "") -> list[Info]:
    """Ask which services there are, and return an answer for each instance, sorted. A checkpoint.

    It waits up to 2 s for the first answer, and ends 0.3 s after the last one, or after 10 s.
    Answers that are not valid are left out.

    Args:
      transport: the transport, whose `run` is called elsewhere.
      name: the name of the services to find; by default all.

    Raises:
      PermissionDenied: if the server's permissions refuse the question or its answers.
      TransportBroken: if there is no connection.

    """
    found: dict[str, Info] = {}
    wait = _FIRST
    with contextlib.suppress(NoResponders):
        async with transport.open_request(f"$SRV.INFO.{name}".rstrip("."), b"") as answers:
            ends = trio.current_time() + _LONGEST
            while len(found) < _INSTANCES:
                with trio.move_on_at(min(trio.current_time() + wait, ends)) as waiting:
                    answer = await anext(answers)
                if waiting.cancelled_caught:
                    break
                wait = _QUIET
                with contextlib.suppress(msgspec.DecodeError, RecursionError, UnicodeDecodeError):
                    info = msgspec.json.decode(answer.data, type=Info)
                    found[info.id] = info
    return sorted(found.values(), key=lambda info: (info.name, info.id))
