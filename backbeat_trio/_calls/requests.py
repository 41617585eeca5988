"""Requests that carry their caller's deadline, and say so when their caller waits no longer."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Final

import trio
from msgspec import Struct

from .._checks import check_beats
from .._errors import ServiceError, SessionClosed, TransportBroken, TransportClosed, TransportError
from .._transport.headers import find_header
from .._wire import cancel_subject
from .context import Calls
from .instrument import make_call, observing

ERROR: Final = "Nats-Service-Error"
ERROR_CODE: Final = "Nats-Service-Error-Code"
REQUEST: Final = "Backbeat-Request"
REASON: Final = "Backbeat-Reason"

SPENT: Final = 408
"""The budget was spent when the request's turn came, or less was left than the service asks for."""
OUT_OF_TIME: Final = 504
"""The budget ran out while the handler was running."""

_LENGTHS: Final = (len(ERROR), len(ERROR_CODE))
# The longest text in a header of ours, in characters.
_MAX_TEXT: Final = 500
# The code of an error reply that names none that can be read.
_UNKNOWN: Final = 500
_CODE_DIGITS: Final = 9
_UNOBSERVED: Final = nullcontext()
# How near the end of a caller's own budget is if a service that shares it says that it is over.
_NEAR_BEATS: Final = 1 / 20
_NEAR_SECONDS: Final = 0.02


class Response(Struct, frozen=True):
    """The answer to a request, as `Session.request` returns it.

    Attributes:
      data: the payload.
      headers: the headers; empty if the answer has none. A name that comes more than once with
        different values has them all, separated by commas.

    """

    data: bytes
    headers: Mapping[str, str]


async def request(
    calls: Calls,
    subject: str,
    payload: bytes,
    *,
    beats: float | None,
    headers: Mapping[str, str] | None,
) -> Response:
    """Send a request, and return its answer; see `Session.request`."""
    if not isinstance(subject, str):
        raise TypeError(f"`subject` must be a string, not {subject!r}")
    if not isinstance(payload, (bytes, bytearray, memoryview)):
        raise TypeError(f"`payload` must be bytes, not {type(payload).__name__}")
    if beats is not None:
        with calls.deadlines.scope_after(check_beats("beats", beats), fail=True):
            return await request(calls, subject, payload, beats=None, headers=headers)
    # A request whose budget is spent is not sent.
    await trio.lowlevel.checkpoint_if_cancelled()
    runtime = calls.runtime
    runtime.check_open()
    transport = runtime.transport
    if transport is None:
        raise TransportBroken("the session is disabled, so it has no connection")
    counts, instruments = runtime.call_counts, runtime.instruments
    observed: AbstractContextManager[object] = _UNOBSERVED
    if instruments.call_started or instruments.call_finished:
        call = make_call("client", "nats", "request", subject, calls.remaining().beats)
        observed = observing(instruments, call)

    def abandoned(reply: str, error: BaseException) -> None:
        counts.requests_abandoned += 1
        # This never waits: the task is being cancelled, or the session is being left.
        with contextlib.suppress(TransportError, ValueError):
            transport.publish_nowait(
                cancel_subject(subject),
                b"",
                headers={REQUEST: reply, REASON: text_for_header(_reason_of(error))},
            )

    # In one coroutine, as each one between a task and what it waits for costs time.
    with observed:
        if headers or instruments.inject:
            sent = dict(headers or {})
            calls.inject(sent)
        else:
            sent = calls.written()
        counts.requests += 1
        try:
            reply = await transport.request(
                subject, bytes(payload), timeout=math.inf, headers=sent, abandoned=abandoned
            )
        except TransportClosed:
            raise SessionClosed("the session has been closed") from None
        received = reply.headers or {}
        error = _error_of(received) if received else None
        if error is None:
            return Response(reply.data, received)
        if error.code in (SPENT, OUT_OF_TIME):
            await _wait_for_own_deadline(calls)
        raise error


def _error_of(headers: Mapping[str, str]) -> ServiceError | None:
    if not any(len(name) in _LENGTHS for name in headers):
        # Most answers, at the least cost.
        return None
    description, code = find_header(headers, ERROR), find_header(headers, ERROR_CODE)
    if description is None and code is None:
        return None
    number = _UNKNOWN
    if code is not None and code.isascii() and code.isdecimal() and len(code) <= _CODE_DIGITS:
        number = int(code)
    return ServiceError(number, description or "the service gave no description")


async def _wait_for_own_deadline(calls: Calls) -> None:
    # The same deadline ends the handler there and the caller here, and no two clocks agree to the
    # microsecond. Whoever calls should see it as the end of its own budget either way.
    left = calls.remaining()
    if left.beats <= _NEAR_BEATS or left.seconds <= _NEAR_SECONDS:
        with trio.move_on_after(min(left.seconds, 1.0) + _NEAR_SECONDS):
            await trio.sleep_forever()


def _reason_of(error: BaseException) -> str:
    if isinstance(error, trio.Cancelled):
        if error.source == "deadline":
            return "the deadline has passed"
        # Other reasons than those of `cancel(reason)` are Trio's own words.
        given = error.reason if error.source == "explicit" else None
        return given or "cancelled"
    if isinstance(error, TransportClosed):
        return "the session was closed"
    return type(error).__name__


def text_for_header(text: str) -> str:
    """Return a text as one line that a header can hold."""
    line = " ".join(text.split()).encode(errors="replace").decode()
    return line if len(line) <= _MAX_TEXT else f"{line[: _MAX_TEXT - 3]}..."
