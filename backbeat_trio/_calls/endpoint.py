"""One endpoint of a service: it takes requests, runs their handlers side by side, and answers.

Each handler runs in what is left of its caller's budget. It is shielded from cancellations from
outside, so that leaving a service can let it finish. What cancels it is its deadline, its caller,
and the end of the grace period.

Handlers run in tasks that are kept for the next request, as to start a task and to enter a scope
costs more than all the rest of a small request. Each call has a context of its own all the same.
"""

from __future__ import annotations

import contextvars
import math
import time
import traceback
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, TypeAlias, final

import trio
from msgspec import Struct

from .._errors import BeatBudgetExceeded, ServiceError, TransportError
from .._runtime.services import sole
from .._time.scopes import BeatScope
from .._transport.adr32 import EndpointInfo, EndpointStats
from .._transport.headers import find_header
from .._transport.protocol import Message, Subscription, Transport
from .._wire import is_inbox
from .context import Calls, Extracted
from .headers import Carried, Deadline, normalized, resolve
from .instrument import Call, Outcome, make_call
from .requests import ERROR, ERROR_CODE, OUT_OF_TIME, REASON, REQUEST, SPENT, text_for_header

CANCELLED: Final = 499
CRASHED: Final = 500
UNAVAILABLE: Final = 503
TOO_LARGE: Final = 413

WAITING: Final = 4096
"""How many requests of an endpoint may wait for their turn."""

_NOTHING: Final = Carried()
# How many tasks wait for the next request; more end.
_SPARE: Final = 64
_CLOSING: Final = "the service is closing"
_SPENT_TEXT: Final = "the budget was spent when its turn came"
# How often a service that is left says that it still waits for handlers.
_REMIND: Final = 10.0


class Request(Struct, frozen=True):
    """A request, as the handler of `Service.serve` gets it.

    Attributes:
      data: the payload.
      headers: the headers; empty if the request has none. A name that comes more than once with
        different values has them all, separated by commas.
      subject: the subject on which it was sent.

    """

    data: bytes
    headers: Mapping[str, str]
    subject: str


Handler: TypeAlias = Callable[[Request], Awaitable[bytes]]


@final
class _Call:
    """One request, from its arrival to its answer."""

    __slots__ = (
        "carried",
        "incarnation",
        "is_free",
        "message",
        "observed",
        "position",
        "scope",
        "shift",
        "why",
    )

    # The grid when it arrived, where that was then, and `BeatHeap.shift`. They are there if it
    # carries a deadline or a soft edge.
    incarnation: str
    position: float
    shift: float

    def __init__(self, message: Message, carried: Carried) -> None:
        self.is_free = carried == _NOTHING
        """Whether its caller is bound by nothing, and it is a part of nothing."""
        self.message = message
        self.carried = carried
        self.scope: BeatScope | trio.CancelScope | None = None
        self.why: tuple[int, str] | None = None
        """The code and the reason with which something else than its deadline cancelled it."""
        self.observed: Call | None = None
        """What instruments know it by; None until they are told of it."""

    def cancel(self, code: int, reason: str) -> None:
        """Cancel its handler."""
        has_expired = isinstance(self.scope, BeatScope) and self.scope.has_ended
        if self.why is None and not has_expired:
            self.why = code, reason
        if self.scope is not None:
            self.scope.cancel(reason)


@final
class _Worker:
    """A task that waits for the next request."""

    __slots__ = ("call", "task")

    def __init__(self, task: trio.lowlevel.Task) -> None:
        self.task = task
        self.call: _Call | None = None


@final
class Endpoint:
    """One endpoint. The nursery in which its handlers run is the service's.

    Args:
      calls: the session's.
      transport: over which it answers.
      nursery: where handlers are started.
      name, subject, queue: as for `Service.serve`.
      handler: as for `Service.serve`.
      concurrency: how many handlers run at the same time.
      min_beats: how much of a budget must be left for a handler to start.

    """

    def __init__(
        self,
        calls: Calls,
        transport: Transport,
        nursery: trio.Nursery,
        *,
        name: str,
        subject: str,
        queue: str,
        handler: Handler,
        concurrency: int,
        min_beats: float,
    ) -> None:
        self.name = name
        self.subject = subject
        self.queue = queue
        self._calls = calls
        self._counts = calls.runtime.call_counts
        self._instruments = calls.runtime.instruments
        self._logger = calls.runtime.logger
        self._transport = transport
        self._nursery = nursery
        self._handler = handler
        self._concurrency = concurrency
        self._min_beats = min_beats
        self._enabled = calls.runtime.config.enabled
        # Those that wait for their turn, in the order of their arrival, and all that live.
        self._waiting: deque[_Call] = deque()
        self._live: dict[str, list[_Call]] = {}
        self._running = 0
        self._spare: list[_Worker] = []
        # Nobody runs in it, so that it can be entered and copied at any time.
        self._context = contextvars.copy_context()
        self._messages: Subscription | None = None
        self._draining = False
        self._idle = trio.Event()
        self._requests = self._errors = self._busy_ns = 0
        self._last_error = ""

    # Receiving.

    async def receive(self, messages: Subscription) -> None:
        """Take requests until cancelled. A checkpoint."""
        self._messages = messages
        while True:
            for message in await messages.batch():
                self._arrive(message)

    async def hear_cancellations(self, notices: Subscription) -> None:
        """Cancel the handlers whose callers say that they wait no longer, until cancelled."""
        async for notice in notices:
            headers = notice.headers or {}
            reply = find_header(headers, REQUEST)
            if not reply:
                continue
            if self._messages is not None and reply not in self._live:
                # The request came before, and nobody has looked at it yet.
                for message in self._messages.waiting():
                    self._arrive(message)
            reason = text_for_header(find_header(headers, REASON) or "") or "cancelled"
            for call in list(self._live.get(reply, ())):
                call.cancel(CANCELLED, reason)
                if call.scope is None and call in self._waiting:
                    self._waiting.remove(call)
                    self._counts.waiting_calls -= 1
                    self._forget(call)
                    self._end_cancelled(call)

    def _arrive(self, message: Message) -> None:
        self._requests += 1
        self._counts.calls += 1
        calls = self._calls
        carried = calls.read(message.headers)
        call = _Call(message, carried)
        if carried.deadline is not None or carried.soft is not None:
            call.incarnation = calls.incarnation
            call.position = calls.runtime.clock.position()
            call.shift = calls.deadlines.shift
        refusal = self._refusal(call)
        if refusal is None and self._draining:
            refusal = UNAVAILABLE, _CLOSING
        if refusal is None and self._running >= self._concurrency:
            if len(self._waiting) < WAITING:
                self._remember(call)
                self._waiting.append(call)
                self._counts.waiting_calls += 1
                return
            refusal = UNAVAILABLE, "too many requests are waiting"
        if refusal is not None:
            self._refuse(call, *refusal)
            return
        self._remember(call)
        self._start(call)

    def _refusal(self, call: _Call) -> tuple[int, str] | None:
        deadline = call.carried.deadline
        if deadline is None or not self._enabled:
            return None
        left = self._left(call, deadline)
        if left <= 0:
            self._counts.headers_expired += 1
            return SPENT, _SPENT_TEXT
        if left < self._min_beats:
            return SPENT, f"{left:.3f} beats are left, and at least {self._min_beats:g} are needed"
        return None

    def _left(self, call: _Call, instant: Deadline) -> float:
        # Return how many beats are left until a deadline or a soft edge that a call carries.
        calls = self._calls
        if instant.incarnation == calls.incarnation:
            return instant.beat - calls.runtime.clock.position()
        # What was left when it arrived counts, and the session may be on another grid since then.
        now = calls.deadlines.axis_now() + call.shift
        return resolve(instant, call.incarnation, call.position) - now

    def _renewed(self, call: _Call, instant: Deadline | None) -> Deadline | None:
        # Return a deadline or a soft edge of a call with what is left of it now.
        if instant is None or instant.incarnation == self._calls.incarnation:
            return instant
        left = max(0.0, self._left(call, instant))
        return Deadline(instant.incarnation, instant.beat, left)

    def _remember(self, call: _Call) -> None:
        # Those that expect no answer are together under an empty string.
        self._live.setdefault(call.message.reply, []).append(call)

    def _forget(self, call: _Call) -> None:
        same = self._live.get(call.message.reply)
        if same is not None:
            same.remove(call)
            if not same:
                del self._live[call.message.reply]

    # Running.

    def _start(self, call: _Call) -> None:
        self._running += 1
        self._counts.live_calls += 1
        if self._spare:
            worker = self._spare.pop()
            worker.call = call
            worker.task.context = self._context.copy()
            trio.lowlevel.reschedule(worker.task)
        else:
            self._context.run(self._spawn, call)

    def _spawn(self, call: _Call) -> None:
        self._nursery.start_soon(self._work, call, name=f"handlers of {self.subject}")

    async def _work(self, first: _Call) -> None:
        worker = _Worker(trio.lowlevel.current_task())
        call: _Call | None = first
        while call is not None:
            failure: Exception | None = None
            try:
                with trio.CancelScope(shield=True) as scope:
                    while call is not None:
                        await self._run(call, scope)
                        is_cancelled, call = call.why is not None, None
                        if is_cancelled or self._is_bound():
                            # The scope may be of no more use.
                            break
                        call = await self._next(worker)
                        if call is None:
                            return
            except Exception as error:  # noqa: BLE001 - whatever it is, it ends this call only
                failure = error
            if call is not None:
                # Its cancellation has left it, and may have been in a group with other exceptions.
                if failure is None:
                    self._end_cancelled(call)
                else:
                    self._end_failed(call, failure)
            elif failure is not None:
                # It has been answered, but has left a cancel scope of its own open.
                self._log_crash(failure)
            call = await self._next(worker)

    def _is_bound(self) -> bool:
        # Return whether a handler without a budget has left one behind, which would end the next.
        bounds = self._calls.deadlines.bounds()
        return bounds.beat != math.inf or bounds.seconds != math.inf

    async def _next(self, worker: _Worker) -> _Call | None:
        # Return the next call, or None if the task should end.
        call = self._take_waiting()
        if call is not None:
            worker.task.context = self._context.copy()
            # Others get their turn, and the context is in force after that.
            await trio.lowlevel.cancel_shielded_checkpoint()
            return call
        if self._draining or len(self._spare) >= _SPARE:
            return None
        self._spare.append(worker)

        def abort(_: object) -> trio.lowlevel.Abort:
            # Nothing cancels a task between two calls.
            return trio.lowlevel.Abort.FAILED

        await trio.lowlevel.wait_task_rescheduled(abort)
        call, worker.call = worker.call, None
        return call

    def _take_waiting(self) -> _Call | None:
        while self._waiting:
            call = self._waiting.popleft()
            self._counts.waiting_calls -= 1
            refusal = self._refusal(call)
            if refusal is None:
                self._running += 1
                self._counts.live_calls += 1
                return call
            self._forget(call)
            self._refuse(call, *refusal)
        return None

    async def _run(self, call: _Call, scope: trio.CancelScope) -> None:
        begin = time.perf_counter_ns()
        try:
            if call.why is not None:
                # Since it was started.
                self._end_cancelled(call)
            elif call.is_free:
                call.scope = scope
                await self._handle(call, scope)
            elif (refusal := self._refusal(call)) is not None:
                # Time may have passed since it was started, too.
                self._refuse(call, *refusal)
            else:
                await self._handle_within(call)
        except BaseException as error:
            rest: BaseException | None = error
            if isinstance(error, BaseExceptionGroup):
                rest = error.split(trio.Cancelled)[1]
            if rest is not None and not isinstance(rest, (Exception, trio.Cancelled)):
                # It is about to end the program, so the caller should not wait for an answer.
                self._fail(call, CRASHED, "the handler was interrupted")
            raise
        finally:
            self._busy_ns += time.perf_counter_ns() - begin
            self._running -= 1
            self._counts.live_calls -= 1
            self._forget(call)
            if self._draining and not self._running:
                self._idle.set()

    async def _handle_within(self, call: _Call) -> None:
        # In what is left of the caller's budget.
        carried = call.carried
        deadline, soft = self._renewed(call, carried.deadline), self._renewed(call, carried.soft)
        present = Carried(deadline, soft, carried.operation, carried.traceparent)
        try:
            with Extracted(self._calls, present) as scope:
                call.scope = scope
                await self._handle(call, scope)
        except Exception as error:  # noqa: BLE001 - whatever it is, it ends this call only
            # Its own cancellation was in a group with this.
            self._end_failed(call, error)
        else:
            if scope.cancelled_caught:
                self._end_cancelled(call)

    async def _handle(self, call: _Call, scope: BeatScope | trio.CancelScope) -> None:
        message = call.message
        if self._instruments.call_started or self._instruments.call_finished:
            self._tell_started(call, self._calls.remaining().beats)
        try:
            answer = await self._handler(
                Request(message.data, message.headers or {}, message.subject)
            )
        except Exception as error:  # noqa: BLE001 - whatever it is, it ends this call only
            self._end_failed(call, error)
            return
        # Nothing but a call to `cancel` cancels a scope without a deadline.
        was_cancelled = call.why is not None or (isinstance(scope, BeatScope) and scope.has_ended)
        if was_cancelled:
            self._counts.calls_stubborn += 1
            self._logger.warning(
                "the handler of %s returned although it was cancelled", self.subject
            )
        if was_cancelled or (not call.is_free and scope.cancel_called):
            # Or its deadline has passed just now, since its last checkpoint.
            self._end_cancelled(call)
        else:
            self._answer(call, answer)

    def _answer(self, call: _Call, answer: object) -> None:
        if type(answer) is bytes and len(answer) <= self._transport.max_payload:
            self._reply(call, answer)
            self._tell_finished(call, "ok")
            return
        if not isinstance(answer, (bytes, bytearray, memoryview)):
            self._logger.error(
                "the handler of %s must return bytes, and returned %s",
                self.subject,
                type(answer).__name__,
            )
            self._fail(call, CRASHED, "the handler returned no bytes")
            return
        data, most = bytes(answer), self._transport.max_payload
        if len(data) > most:
            text = f"the answer has {len(data)} bytes, and a message can have {most}"
            self._logger.error("the handler of %s: %s", self.subject, text)
            self._fail(call, TOO_LARGE, text)
            return
        self._reply(call, data)
        self._tell_finished(call, "ok")

    def _end_cancelled(self, call: _Call) -> None:
        if call.why is None:
            self._counts.calls_expired += 1
            text = "the budget ran out while the handler was running"
            self._reply_error(call, OUT_OF_TIME, text, "expired")
            return
        code, reason = call.why
        if code == CANCELLED:
            self._counts.calls_cancelled += 1
            text = f"cancelled by the caller: {reason}"
            self._reply_error(call, CANCELLED, text, "cancelled_by_caller")
        else:
            self._fail(call, code, reason, "refused")

    def _end_failed(self, call: _Call, failure: Exception) -> None:
        error = sole(failure)
        if isinstance(error, ServiceError):
            self._fail(call, error.code, error.description, "error")
        elif isinstance(error, BeatBudgetExceeded):
            self._logger.warning("the handler of %s: %s", self.subject, error)
            self._fail(call, OUT_OF_TIME, "a budget inside of the handler ran out", "error")
        else:
            self._log_crash(failure)
            self._fail(call, CRASHED, "the handler crashed")

    def _log_crash(self, failure: Exception) -> None:
        self._logger.error(
            "the handler of %s crashed:\n%s",
            self.subject,
            "".join(traceback.format_exception(failure)),
        )

    # Answering.

    def _refuse(self, call: _Call, code: int, description: str) -> None:
        self._counts.calls_refused += 1
        is_spent = description is _SPENT_TEXT
        self._reply_error(call, code, description, "expired_on_arrival" if is_spent else "refused")

    def _fail(self, call: _Call, code: int, description: str, outcome: Outcome = "failed") -> None:
        self._counts.calls_failed += 1
        self._reply_error(call, code, description, outcome)

    def _reply_error(self, call: _Call, code: int, description: str, outcome: Outcome) -> None:
        self._errors += 1
        text = text_for_header(description)
        self._last_error = f"{code}:{text}"
        self._reply(call, b"", {ERROR: text, ERROR_CODE: str(code)})
        self._tell_finished(call, outcome, code)

    def _reply(self, call: _Call, data: bytes, headers: Mapping[str, str] | None = None) -> None:
        reply = call.message.reply
        if not reply:
            return
        try:
            if not is_inbox(reply):
                # Nobody should have it publish where they may not publish themselves.
                raise ValueError(f"{reply} is not an inbox")
            self._transport.publish_nowait(reply, data, headers=headers)
        except (TransportError, ValueError) as error:
            self._counts.calls_unanswered += 1
            self._logger.debug("an answer on %s could not be sent: %s", self.subject, error)

    def _tell_started(self, call: _Call, beats_left: float) -> None:
        headers = normalized(call.message.headers or {})
        call.observed = make_call("server", "nats", "request", self.subject, beats_left, headers)
        self._instruments.tell(self._instruments.call_started, call.observed)

    def _tell_finished(self, call: _Call, outcome: Outcome, code: int | None = None) -> None:
        instruments = self._instruments
        if call.observed is None:
            if not (instruments.call_started or instruments.call_finished):
                return
            # It has ended before its handler was called.
            self._tell_started(call, 0.0)
        observed = call.observed
        assert observed is not None
        observed.outcome, observed.code = outcome, code
        instruments.tell(instruments.call_finished, observed)

    # Ending.

    async def drain(self, messages: Subscription, deadline: float) -> None:
        """Take no more requests, and let those that are running finish. A checkpoint.

        Args:
          messages: the subscription.
          deadline: when handlers are cancelled that still run, in seconds of Trio's clock.

        """
        self._stop()
        with trio.move_on_at(deadline):
            await messages.drain()
        for message in messages.waiting():
            self._arrive(message)
        if not self._running:
            return
        with trio.move_on_at(deadline):
            await self._idle.wait()
        self.abort()
        while self._running:
            with trio.move_on_after(_REMIND):
                await self._idle.wait()
            if self._running:
                self._logger.error(
                    "%d handlers of %s go on although they were cancelled",
                    self._running,
                    self.subject,
                )

    def _stop(self) -> None:
        self._draining = True
        while self._waiting:
            call = self._waiting.popleft()
            self._counts.waiting_calls -= 1
            self._forget(call)
            self._refuse(call, UNAVAILABLE, _CLOSING)
        while self._spare:
            trio.lowlevel.reschedule(self._spare.pop().task)

    def abort(self) -> None:
        """Cancel all handlers. Not a checkpoint."""
        self._stop()
        for same in list(self._live.values()):
            for call in same:
                call.cancel(UNAVAILABLE, _CLOSING)

    # Observation.

    def info(self) -> EndpointInfo:
        """Return what ``$SRV.INFO`` tells of it."""
        return EndpointInfo(self.name, self.subject, self.queue, {})

    def stats(self) -> EndpointStats:
        """Return what ``$SRV.STATS`` tells of it."""
        requests = self._requests
        return EndpointStats(
            self.name,
            self.subject,
            self.queue,
            requests,
            self._errors,
            self._last_error,
            self._busy_ns,
            self._busy_ns // requests if requests else 0,
        )
