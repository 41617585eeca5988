"""Calls the instruments of a session, and costs nothing if there are none.

For each event there is a tuple of those methods that instruments have overridden. Where an event
happens, the code looks whether its tuple is empty, which is a few nanoseconds::

    if instruments.beat:
        instruments.tell(instruments.beat, beat, lateness)
"""

from __future__ import annotations

import inspect
import logging
import traceback
from collections.abc import Callable, Iterable
from typing import Any, Final, TypeAlias, final

from .._errors import Logger

Hooks: TypeAlias = tuple[tuple[object, Callable[..., Any]], ...]

EVENTS: Final = (
    "session_opened",
    "session_closed",
    "beat",
    "operation_started",
    "operation_advanced",
    "operation_finished",
    "operation_entered",
    "operation_left",
    "call_started",
    "call_finished",
    "extract_entered",
    "extract_left",
    "inject",
)
"""The methods of `Instrument`."""


@final
class Instruments:
    """The instruments of one session.

    Args:
      instruments: the instruments, in the order in which they are called.
      base: the class of instruments. A method that an instrument has of this class does nothing,
        and is never called.
      logger: where the exception of an instrument is logged.

    Raises:
      TypeError: if one is not an instrument, or has a method that is an async function.

    """

    __slots__ = (*EVENTS, "_logger", "_members")

    session_opened: Hooks
    session_closed: Hooks
    beat: Hooks
    operation_started: Hooks
    operation_advanced: Hooks
    operation_finished: Hooks
    operation_entered: Hooks
    operation_left: Hooks
    call_started: Hooks
    call_finished: Hooks
    extract_entered: Hooks
    extract_left: Hooks
    inject: Hooks

    def __init__(self, instruments: Iterable[object], base: type, logger: Logger) -> None:
        self._logger = logger
        self._members: tuple[object, ...] = tuple(instruments)
        for member in self._members:
            if not isinstance(member, base):
                raise TypeError(f"`instruments` must be of the class Instrument, not {member!r}")
            for event in EVENTS:
                if inspect.iscoroutinefunction(getattr(member, event)):
                    raise TypeError(f"{event} of {member!r} must not be an async function")
        for event in EVENTS:
            hooks = tuple(
                (member, getattr(member, event))
                for member in self._members
                if getattr(type(member), event) is not getattr(base, event)
            )
            setattr(self, event, hooks)

    @property
    def members(self) -> tuple[object, ...]:
        """The instruments that have not raised an exception."""
        return self._members

    def tell(self, hooks: Hooks, *args: object) -> None:
        """Call methods of instruments. It removes an instrument that raises an exception."""
        for member, hook in hooks:
            try:
                hook(*args)
            except Exception as error:  # noqa: BLE001 - an instrument must not break the session
                self._remove(member, error)

    def _remove(self, failed: object, error: Exception) -> None:
        self._logger.error(
            "the instrument %r raised an exception, and is not called any more:\n%s",
            failed,
            "".join(traceback.format_exception(error)),
        )
        self._members = tuple(member for member in self._members if member is not failed)
        for event in EVENTS:
            hooks: Hooks = getattr(self, event)
            setattr(self, event, tuple(hook for hook in hooks if hook[0] is not failed))


NONE: Final = Instruments((), object, logging.getLogger("backbeat_trio"))
"""No instruments."""
