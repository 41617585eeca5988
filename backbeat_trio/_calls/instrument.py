"""`Instrument`, by which programs observe a session, and the `Call` that it is told of."""

from __future__ import annotations

from collections.abc import Generator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Final, Literal, Protocol, TypeAlias, final

import trio

from .._config import BackbeatConfig
from .._errors import NoResponders, ServiceError, SessionClosed, TransportError
from .._runtime.health import Health, SessionStatistics
from .._runtime.instruments import Instruments
from .._runtime.operations import Operation, Phase
from .._time.beats import Beat
from .._time.heap import ENDED
from .._time.scopes import BeatScope

Outcome: TypeAlias = Literal[
    "ok",
    "error",
    "failed",
    "refused",
    "expired_on_arrival",
    "expired",
    "cancelled_by_caller",
    "no_responders",
    "broken",
]

_OF_CODE: Final[Mapping[int, Outcome]] = {
    408: "expired_on_arrival",
    499: "cancelled_by_caller",
    500: "failed",
    503: "refused",
    504: "expired",
}


class Observed(Protocol):
    """What an instrument may use of the session that it observes; `Session` has more."""

    @property
    def config(self) -> BackbeatConfig:
        """As `Session.config`."""
        ...

    def health(self) -> Health:
        """As `Session.health`."""
        ...

    def statistics(self) -> SessionStatistics:
        """As `Session.statistics`."""
        ...


@final
class Call:
    """A request as an `Instrument` sees it, on the side that sends it or on the side that serves.

    Each request is one object on each side, which can be the key of a dictionary.

    Attributes:
      side: ``"client"`` for whoever sends the request, ``"server"`` for whoever serves it.
      protocol: ``"nats"`` for `Session.request` and `Service.serve`, ``"http"`` for
        `backbeat_trio.http`.
      method: ``"request"`` on NATS, and the method of the request, such as ``"GET"``, on HTTP.
      target: of a client, the subject or the URL without its query. Of a server, the subject of
        `Service.serve`, or the path.
      headers: of a server, those of the request, with names in lower case. Of a client, none.
      beats_left: what was left of its budget when it was started, in beats; ``inf`` if it has none.
      outcome: how it ended; None until then. ``"ok"``: with an answer. ``"error"``: with an answer
        that says that something is wrong. ``"failed"``: the handler crashed. ``"refused"``: it was
        refused before any work, or the service ended. ``"expired_on_arrival"``: its budget was
        spent when its turn came. ``"expired"``: its budget ran out. ``"cancelled_by_caller"``: its
        caller stopped waiting for another reason. ``"no_responders"``: nobody serves the subject.
        ``"broken"``: it could not be sent, or the connection was lost.
      code: the code of the error, or the status of HTTP; None if there is none.

    """

    __slots__ = (
        "beats_left",
        "code",
        "headers",
        "method",
        "outcome",
        "protocol",
        "side",
        "target",
    )

    side: Literal["client", "server"]
    protocol: Literal["nats", "http"]
    method: str
    target: str
    headers: Mapping[str, str]
    beats_left: float
    outcome: Outcome | None
    code: int | None

    def __init__(self) -> None:
        raise TypeError("calls are made by the session")

    def __repr__(self) -> str:
        return (
            f"<Call {self.method} {self.target} side={self.side} protocol={self.protocol} "
            f"outcome={self.outcome}>"
        )


class Instrument:
    """A base class for what observes a session: for metrics, traces or logs of your own.

    Override the methods that you need, and give an instance to `session` as ``instruments=[...]``.
    Methods that are not overridden cost nothing. The session calls them in the task in which the
    event happens, so they must be quick and must not wait. If one raises an exception, the session
    logs it, and does not call this instrument any more.

    Events come in pairs: an operation that has started finishes, and a block that was entered is
    left. Both events of a pair come in the same task, except those of operations, which any task
    may end. A context variable that is set on the first event of a block is in force in the block.
    Set it back to its former value on the second one; `contextvars.ContextVar.reset` may raise.
    """

    def session_opened(self, session: Observed) -> None:
        """Note that a session begins, before anything else of it happens.

        Args:
          session: the `Session`.

        """

    def session_closed(self) -> None:
        """Note that the session has ended."""

    def beat(self, beat: Beat, lateness: float) -> None:
        """Note a beat, after the tasks that wait for it were woken.

        Args:
          beat: the beat. Its ``skipped`` is the number of beats that passed without this event.
          lateness: how long after its beginning Trio's loop handled it, in seconds.

        """

    def operation_started(self, operation: Operation) -> None:
        """Note that an operation has started, in the task that started it.

        Args:
          operation: the operation, which can be the key of a dictionary.

        """

    def operation_advanced(self, operation: Operation, former: Phase, beat: int) -> None:
        """Note that an operation has gone on to a phase.

        Args:
          operation: the operation. Its ``phase`` is the new one.
          former: its former phase. It may be the same as the new one.
          beat: the index of the present beat.

        """

    def operation_finished(
        self, operation: Operation, former: Phase, beat: int, reason: str | None
    ) -> None:
        """Note that an operation has ended.

        Args:
          operation: the operation. Its ``phase`` is ``COMPLETED`` or ``FAILED``.
          former: its phase before that.
          beat: the index of the present beat.
          reason: why it has failed, for people to read; None if it was completed.

        """

    def operation_entered(self, operation: Operation) -> None:
        """Note that the block of `Session.operation` was entered.

        Args:
          operation: the operation, which has started.

        """

    def operation_left(self, operation: Operation) -> None:
        """Note that the block of `Session.operation` was left.

        Args:
          operation: the operation. It may have ended, or may be about to.

        """

    def call_started(self, call: Call) -> None:
        """Note that a request is about to be sent, or that its handler is about to run.

        Args:
          call: the request.

        """

    def call_finished(self, call: Call) -> None:
        """Note that a request has ended: its ``outcome`` is known.

        Args:
          call: the request.

        """

    def extract_entered(self, scope: BeatScope, headers: Mapping[str, str] | None) -> None:
        """Note that a block of `Session.extract` or of `Session.detached` was entered.

        Args:
          scope: the scope of the block, which can be the key of a dictionary.
          headers: the headers of the message, with names in lower case; None for a block of
            `Session.detached`, which is no part of any trace.

        """

    def extract_left(self, scope: BeatScope) -> None:
        """Note that a block of `Session.extract` or of `Session.detached` was left.

        Args:
          scope: the scope of the block.

        """

    def inject(self, headers: MutableMapping[str, str]) -> None:
        """Write headers into a message that is about to be sent.

        It is not called if the message has a ``traceparent`` already.

        Args:
          headers: the headers of the message, to be changed.

        """


def make_call(
    side: Literal["client", "server"],
    protocol: Literal["nats", "http"],
    method: str,
    target: str,
    beats_left: float,
    headers: Mapping[str, str] | None = None,
) -> Call:
    """Make the object by which instruments know a request; see `Call` for the arguments."""
    call = object.__new__(Call)
    call.side, call.protocol = side, protocol
    call.method, call.target = method, target
    call.headers = headers or {}
    call.beats_left = beats_left
    call.outcome = call.code = None
    return call


@contextmanager
def observing(instruments: Instruments, call: Call) -> Generator[Call, None, None]:
    """Tell instruments of a request that is made, or served, in a block.

    The block may set the outcome. Otherwise it is ``"ok"``, or that of the exception.
    """
    instruments.tell(instruments.call_started, call)
    try:
        yield call
    except BaseException as error:
        if call.outcome is None:
            call.outcome, call.code = _outcome_of(error, call.side)
        raise
    finally:
        if call.outcome is None:
            call.outcome = "ok"
        instruments.tell(instruments.call_finished, call)


def outcome_of_code(code: int) -> Outcome:
    """Return what the code of an error, or a status of HTTP, says of a request."""
    return "ok" if code < 400 else _OF_CODE.get(code, "error")


def _outcome_of(error: BaseException, side: str) -> tuple[Outcome, int | None]:
    if isinstance(error, trio.Cancelled):
        is_late = error.source == "deadline" or error.reason == ENDED
        return ("expired" if is_late else "cancelled_by_caller"), None
    if isinstance(error, ServiceError):
        return outcome_of_code(error.code), error.code
    if isinstance(error, NoResponders):
        return "no_responders", None
    if side == "client" or isinstance(error, (TransportError, SessionClosed)):
        return "broken", None
    return "failed", None
