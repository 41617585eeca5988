"""`Session`, by which an application uses budgets, time, operations and observation."""

from __future__ import annotations

import contextvars
import math
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Generator,
    Mapping,
    MutableMapping,
)
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
    nullcontext,
)
from typing import Any, Final, Literal, cast, final, overload

import trio

from .._calls.context import Calls
from .._calls.control import Control
from .._calls.headers import Headers
from .._calls.instrument import Instrument
from .._calls.remaining import Remaining
from .._calls.requests import Response, request
from .._calls.service import Service, open_service
from .._checks import check_seconds
from .._config import BackbeatConfig
from .._errors import BackbeatError
from .._runtime.claims import ClaimBatches, Claims, open_stored_claims
from .._runtime.health import Health, SessionStatistics
from .._runtime.operations import Operation, Phase, check_estimate
from .._runtime.runtime import Runtime
from .._time.scopes import BeatScope
from .._wire import StatusClaim, is_token, status_subject
from .budgets import Budgets
from .tempo import TempoChanges

session_var: contextvars.ContextVar[Session] = contextvars.ContextVar("backbeat session")

_ELSEWHERE: Final = (
    "this backbeat session belongs to another run of Trio: open one in this run, with `async with "
    "backbeat_trio.session()`"
)


def current_session() -> Session:
    """Return the session of the running task's context. Not a checkpoint.

    A task has the session in whose block it was started, or the one of `use_session`. A thread of
    `trio.to_thread.run_sync` has the session of the task that started it, and calls its methods by
    `trio.from_thread`. Another run of Trio has no session of this one. A session that was left in
    the meantime is returned, and its methods raise `SessionClosed`.

    Returns:
      The session whose block is the innermost one around the task.

    Raises:
      RuntimeError: if there is none; the text says how to open one.

    """
    bb = session_var.get(None)
    if bb is None:
        raise RuntimeError(
            "no backbeat session is open in this context: open one with `async with "
            "backbeat_trio.session()`, and start this task inside of that block. In a task that "
            "somebody else starts, such as a handler of a web server, enter `with "
            "backbeat_trio.use_session(bb)` first"
        )
    if bb._runtime.is_elsewhere:
        raise RuntimeError(_ELSEWHERE)
    return bb


@contextmanager
def use_session(bb: Session) -> Generator[Session, None, None]:
    """Make an open session the one of `current_session` for the length of the block.

    It is for tasks that were not started in the session's own block, such as the handlers of a web
    server whose session is opened in the application's lifespan. It holds for the running task, and
    for the tasks and threads that are started in the block. Blocks may be nested: the innermost one
    counts. Neither entering nor leaving is a checkpoint, and leaving does not close the session.

    Args:
      bb: the session, which the block also gives.

    Raises:
      TypeError: if ``bb`` is not a session.
      SessionClosed: if the session has been left.
      RuntimeError: if the session belongs to another run of Trio.

    """
    if not isinstance(bb, Session):
        raise TypeError(f"`bb` must be a session, not {bb!r}")
    if bb._runtime.is_elsewhere:
        raise RuntimeError(_ELSEWHERE)
    bb._runtime.check_open()
    token = session_var.set(bb)
    try:
        yield bb
    finally:
        session_var.reset(token)


def make_session(runtime: Runtime) -> Session:
    """Make the session that an application gets of a runtime."""
    bb: Session = object.__new__(Session)
    bb._runtime = runtime
    bb._clock = runtime.clock
    bb._calls = Calls(runtime)
    bb._control = Control(runtime)
    return bb


@final
class Session(Budgets, TempoChanges):
    """An agent's part in a cluster: its budgets, its beats, and its operations.

    Open one by ``async with session() as bb``. You cannot call the class.

    Beats, positions and budgets are those of the cluster's grid, or of a local grid until a
    metronome is heard. A *position* is a beat's index and its fraction: 12344.25 is a quarter of
    the way through beat 12344. Methods raise `SessionClosed` once the block has been left, except
    those that only read. Call them in the session's run of Trio; other threads do so by
    `trio.from_thread`.
    """

    _calls: Calls
    _control: Control

    def __init__(self) -> None:
        raise TypeError("sessions are made by `backbeat_trio.session`")

    @property
    def config(self) -> BackbeatConfig:
        """The settings that the session was opened with."""
        return self._runtime.config

    @property
    def instruments(self) -> tuple[Instrument, ...]:
        """The instruments that the session was opened with, without those that have failed."""
        return tuple(
            member for member in self._runtime.instruments.members if isinstance(member, Instrument)
        )

    # Calls.

    def remaining(self) -> Remaining:
        """Return what is left of the current task's budget, in beats and in seconds.

        ``str`` of the result is a sentence for people and for language models, such as "12 beats
        left, about 6 minutes at 2 BPM". The nearest deadline around the task counts, in whichever
        unit it is; the seconds are those at the present tempo. A disabled session enforces no
        deadlines in beats, so it has none here. Not a checkpoint.
        """
        return self._calls.remaining()

    def inject(self, headers: MutableMapping[str, str]) -> None:
        """Write into the headers of a message what bounds the current task.

        These are the nearest deadline and the nearest soft edge around the task, the operation that
        it is a part of, and the ``traceparent`` that it was called with. The receiver enters
        `extract` with them. A deadline in seconds is converted at the present tempo; while the grid
        is paused it cannot be converted, and is left out. What the task is not bound by is not
        written. A disabled session writes nothing. Not a checkpoint.

        Args:
          headers: the headers, which are changed. Earlier ones of this kind are removed, in any
            case of letters. All others stay, and so does a ``traceparent`` that is there already.

        Raises:
          SessionClosed: if the session was left.

        """
        self._calls.inject(headers)

    def extract(self, headers: Headers | None) -> AbstractContextManager[BeatScope, bool]:
        """Return a block that runs within what the headers of a message say.

        Use it as ``with bb.extract(headers) as scope:``. The block gives a `BeatScope` that ends
        quietly, as that of `move_on_at` does, on the beat of the header, which is the same for the
        sender and for everybody whom the message reaches. If the header is of another grid, the
        beats that were left when the message was sent count from now. If the session moves to
        another grid, so do the beats that are left then. Without a header there is no deadline.
        Deadlines around the block still count.

        Operations that are opened in the block are parts of the sender's operation, and messages of
        the block carry its ``traceparent``. A header that is not valid counts as missing;
        `statistics` counts those. Not a checkpoint; neither is entering or leaving the block.

        Args:
          headers: a mapping from names to values or lists of values, or pairs of name and value.
            None is the same as no headers.

        Raises:
          SessionClosed: on entering, if the session was left.

        """
        return self._calls.extract(headers)

    def detached(self) -> AbstractContextManager[BeatScope, bool]:
        """Return a block that runs apart from its caller.

        Neither deadlines nor cancellations from outside reach the block, operations that are opened
        in it are parts of no other one, and its messages carry no deadline and no trace. The end of
        the session cancels it. The block gives its scope, which has no deadline until you set one.
        Not a checkpoint; neither is entering or leaving the block.

        Raises:
          SessionClosed: on entering, if the session was left.

        """
        return cast("AbstractContextManager[BeatScope, bool]", self._calls.detached())

    async def request(
        self,
        subject: str,
        payload: bytes = b"",
        *,
        beats: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Response:
        """Send a request to a service, and return its answer. A checkpoint.

        The request carries the nearest deadline around it, and the rest of what `inject` writes.
        The nearest deadline ends the wait, as everywhere in Trio: it cancels its own scope. With
        ``beats`` the request has a budget of its own beside the others.

        Whoever stops waiting, because of a deadline, a cancellation or the end of the session, says
        so to the service, which then cancels the handler.

        Args:
          subject: the subject, without ``*`` and ``>``.
          payload: what the service gets.
          beats: the budget of this request, in beats, 0 or more; None is no budget of its own.
          headers: further headers.

        Raises:
          BeatBudgetExceeded: if ``beats`` have passed without an answer.
          NoResponders: if no process serves the subject.
          ServiceError: if the service answers with an error.
          PermissionDenied: if the server's permissions refuse the request.
          TransportBroken: if there is no connection, it is lost meanwhile, or the session is
            disabled. The request may have been carried out.
          SessionClosed: if the session was left.
          TypeError, ValueError: for an argument that is not valid, and for a message that is larger
            than the server accepts.

        """
        return await request(self._calls, subject, payload, beats=beats, headers=headers)

    def open_service(
        self,
        name: str,
        *,
        version: str,
        description: str = "",
        metadata: Mapping[str, str] | None = None,
    ) -> AbstractAsyncContextManager[Service]:
        """Be an instance of a service for the length of a block.

        `Service.serve` adds the endpoints. The service follows ADR-32 of NATS: the NATS command
        line finds it by ``nats service ls``, and shows it by ``nats service info`` and ``nats
        service stats``. It answers these at once, also while all handlers are busy.

        Leaving the block has its endpoints take no more requests, and waits until the handlers that
        are running have ended, for `BackbeatConfig.grace_period` at most; then it cancels them.
        What the block raises leaves as itself. Entering and leaving are checkpoints.

        Args:
          name: the name, which all instances of the service share: letters, digits, ``-`` and
            ``_``.
          version: a semantic version, such as ``"1.2.0"``.
          description: what the service does, for people.
          metadata: what else there is to know of this instance.

        Raises:
          TypeError, ValueError: for an argument that is not valid; the text names it.
          SessionClosed: if the session was left.

        """
        return open_service(
            self._calls, name, version=version, description=description, metadata=metadata
        )

    # Operations.

    @asynccontextmanager
    @trio.lowlevel.enable_ki_protection
    async def operation(
        self,
        type: str,
        *,
        id: str | None = None,
        beats: int | None = None,
        data: Any = None,
        enforce: bool = False,
        soft_after: float | None = None,
        cancellable: bool = False,
    ) -> AsyncGenerator[Operation, None]:
        """Run a block as an operation, whose progress the session publishes as claims.

        Leaving the block completes the operation. If an exception leaves the block, the operation
        has failed, and the claim has the exception's text.

        ``beats`` is an estimate: it says how long the operation will probably take, and nothing
        happens when it runs out. With ``enforce=True`` it is a budget: the block is cancelled then.

        These types have default estimates, in beats: ``"dht_retrieve"`` 3, ``"dht_store"`` 4,
        ``"election"`` 10, ``"peer_discovery"`` 5, ``"pubsub_sync"`` 2, ``"task_coordination"`` 20.
        Any other name has 8.

        An operation that is opened inside another one, or inside an `extract` block, is a part of
        that one, and its claims say so. If a soft edge around the block passes, the claims say
        that, too. This includes the edges of scopes around the operation.

        With ``cancellable=True`` other programs may cancel the block, by `cancel_remote` and by
        ``backbeat cancel``. The operation then fails for the reason that they give, and leaving the
        block raises `OperationCancelled`. As with each cancellation in Trio, shielded code in the
        block runs to its end. A block that reaches no checkpoint any more completes all the same.
        Operations that are opened inside the block are cancelled with it, except for those of
        `start_operation` and of `detached` blocks. The first such operation of a session subscribes
        to the requests, which takes a round trip. Without a connection it does not wait, and can be
        cancelled once there is one.

        An operation that was ended in the block stays as it is. Entering is a checkpoint, leaving
        is not.

        Args:
          type: what kind of work it is: a name of at most 1,000 characters.
          id: the name of this operation, of at most 1,000 characters. No other live operation of
            the session may have it. By default it is the type and a random part.
          beats: the estimate, in whole beats, 1 to 2**53; by default that of the type.
          data: any object, which is kept as `Operation.data` and is not published.
          enforce: whether the block is cancelled when the estimate runs out.
          soft_after: how many beats after its start the operation should begin to wind down. With
            ``enforce`` it must not be later than the end of the budget. None is no soft edge.
          cancellable: whether other programs may cancel the block.

        Raises:
          OperationExists: if a live operation has this id.
          TypeError, ValueError: if the type, the id, the estimate or the soft edge is not valid;
            the text names it.
          BeatBudgetExceeded: with ``enforce``, if the budget ran out.
          OperationCancelled: with ``cancellable``, if another program cancelled the block.
          SessionClosed: if the session was left.

        """
        await trio.lowlevel.checkpoint()
        if cancellable:
            await self._control.listen()
        scope = None
        if enforce or soft_after is not None:
            budget = check_estimate(type, beats) if enforce else math.inf
            scope = self.fail_after(budget, soft_after=soft_after)
        operation = self.start_operation(type, id=id, beats=beats, data=data)
        cut = self._control.cancellable(operation) if cancellable else nullcontext()
        try:
            with cut, scope or nullcontext(), self._calls.inside(operation):
                yield operation
        except BaseException as error:
            if not operation.phase.final:
                operation.fail(_reason(error))
            raise
        if not operation.phase.final:
            operation.complete()

    def start_operation(
        self, type: str, *, id: str | None = None, beats: int | None = None, data: Any = None
    ) -> Operation:
        """Start an operation that has no block of its own, and queue its first claim.

        End it by `Operation.complete` or `Operation.fail`. An operation that is live when the
        session is left fails then. It is a part of the operation that the task is in, as
        with `operation`, but it may outlive the scopes around it, so it has no soft edge. Not a
        checkpoint.

        ``beats`` is an estimate: nothing happens when it runs out. To end work at a budget, use
        `fail_after`, or `operation` with ``enforce=True``.

        Args:
          type: what kind of work it is: a name of at most 1,000 characters.
          id: the name of this operation, of at most 1,000 characters. No other live operation of
            the session may have it. By default it is the type and a random part.
          beats: the estimate, in whole beats, 1 to 2**53; by default that of the type, which
            `operation` lists.
          data: any object, which is kept as `Operation.data` and is not published.

        Raises:
          OperationExists: if a live operation has this id.
          TypeError, ValueError: if the type, the id or the estimate is not valid; the text names
            it.
          SessionClosed: if the session was left.

        """
        return self._runtime.operations.start(
            type, id=id, beats=beats, data=data, **self._calls.kin()
        )

    def advance_operation(self, id: str, phase: Phase, *, peers: int | None = None) -> None:
        """Move an operation on to a later phase; see `Operation.advance`. Not a checkpoint.

        Args:
          id: the id of a live operation.
          phase: the phase, up to `Phase.EXECUTING`. It may skip some, and must not be an earlier
            one than the present.
          peers: how many peers take part, 0 or more; None leaves the count as it was.

        Raises:
          OperationNotFound: if no live operation has this id.
          InvalidTransition: if the phase is an earlier one, `Phase.COMPLETED` or `Phase.FAILED`.
          TypeError, ValueError: if ``phase`` is not a phase, or ``peers`` is not a number of peers.
          SessionClosed: if the session was left.

        """
        self._runtime.operations.find(id).advance(phase, peers=peers)

    def complete_operation(self, id: str, *, peers: int | None = None) -> None:
        """End an operation as completed, and queue its terminal claim. Not a checkpoint.

        Args:
          id: the id of a live operation.
          peers: how many peers took part, 0 or more; None leaves the count as it was.

        Raises:
          OperationNotFound: if no live operation has this id.
          TypeError, ValueError: if ``peers`` is not a number of peers.
          SessionClosed: if the session was left.

        """
        self._runtime.operations.find(id).complete(peers=peers)

    def fail_operation(self, id: str, reason: str) -> None:
        """End an operation as failed, and queue its terminal claim. Not a checkpoint.

        Args:
          id: the id of a live operation.
          reason: why, for people to read. It becomes a part of the claim's notes.

        Raises:
          OperationNotFound: if no live operation has this id.
          TypeError, ValueError: if ``reason`` is not a string, or is empty.
          SessionClosed: if the session was left.

        """
        self._runtime.operations.find(id).fail(reason)

    async def cancel_remote(self, agent_id: str, id: str, reason: str) -> None:
        """Cancel an operation of an agent of this cluster. A checkpoint.

        The operation must have been opened by ``operation(..., cancellable=True)``. This returns
        when the agent has cancelled the block of the operation. Shielded code in the block may
        still run then, and a block that was just being left may still complete. The operation's
        terminal claim says how it ended. If the block was cancelled before, the first reason
        counts.

        Args:
          agent_id: the agent that runs the operation. It may be this session's own.
          id: of a live operation.
          reason: why, in 1 to 1,000 characters. It goes into the notes of the terminal claim, as
            ``P2P operation failed: <reason> (type: <type>)``.

        Raises:
          OperationNotFound: if the agent has no live operation of that id.
          CancelRefused: if the operation was not opened as cancellable.
          NoResponders: if the agent is not running, or has not opened a cancellable operation yet.
          PermissionDenied: if the server's permissions do not let this user ask for it.
          TransportBroken: if there is no connection, or no answer within 5 seconds. The operation
            may have been cancelled or not.
          TypeError, ValueError: if an argument is not valid; the text names it.
          BackbeatError: if this session is disabled.
          SessionClosed: if this session was left.

        """
        await self._control.ask(agent_id, id, reason)

    # Observation.

    def health(self) -> Health:
        """Return how the session is doing, or how it was when it was left. Not a checkpoint.

        While the session is open, call it where Trio runs. Another thread does so by
        ``trio.from_thread.run_sync(bb.health)``; without that, Trio raises `RuntimeError`. Once the
        session was left, it can be called anywhere, even after Trio's run has ended.
        """
        return self._runtime.health()

    def statistics(self) -> SessionStatistics:
        """Return what the session has counted since it began. Not a checkpoint.

        It also works once the session was left, and after Trio's run has ended.
        """
        return self._runtime.statistics()

    @overload
    def open_claims(
        self,
        agent_id: str = "*",
        *,
        batched: Literal[False] = False,
        all_clusters: bool = False,
        since: float | None = None,
    ) -> AbstractAsyncContextManager[AsyncIterator[StatusClaim]]: ...

    @overload
    def open_claims(
        self,
        agent_id: str = "*",
        *,
        batched: Literal[True],
        all_clusters: bool = False,
        since: float | None = None,
    ) -> AbstractAsyncContextManager[AsyncIterator[list[StatusClaim]]]: ...

    @asynccontextmanager
    async def open_claims(
        self,
        agent_id: str = "*",
        *,
        batched: bool = False,
        all_clusters: bool = False,
        since: float | None = None,
    ) -> AsyncGenerator[AsyncIterator[Any], None]:
        """Listen to the claims of agents for the length of a block.

        Use it as ``async with bb.open_claims() as claims:``, and in it ``async for claim in
        claims:``. Each step gives a `StatusClaim`, of an operation or of an agent's health. With
        ``batched=True`` each step gives a list of all claims that came in one message, which takes
        a tenth of the time; a list is never empty.

        Agents of several clusters may share a server. The iterator gives the claims of the
        session's own cluster. It also gives claims that name no cluster, as agents of earlier
        versions publish them.

        With ``since`` the iterator first gives the terminal claims of the last seconds, oldest
        first, and then goes on with live claims. No terminal claim is lost or given twice where the
        two meet. The terminal claims are those that the stream `BackbeatConfig.claims_stream` of
        JetStream has stored; on a ``memory://`` bus, the newest 10,000. While stored claims are
        being read, live claims are not heard. About a second passes between the last stored claim
        and the first live one. The iterator waits while there is no connection.

        A message that cannot be decoded, or whose claims name another agent than its subject does,
        is dropped and counted. If the consumer falls far behind, the newest messages are dropped
        and counted. Several tasks may iterate at the same time: each claim goes to one of them.
        Entering and each step are checkpoints; leaving is not.

        Args:
          agent_id: the agent to listen to; ``"*"`` is all of them.
          batched: whether each step gives a list of claims instead of a single one.
          all_clusters: whether the claims of all clusters are given.
          since: for how many seconds, by the server's clock, stored claims are given first, 0 or
            more; ``inf`` gives all that are stored, None gives none.

        Raises:
          ClaimsUnavailable: with ``since``, if nothing stores claims: the server has no JetStream,
            or there is no stream. The iterator raises it if the stream is deleted meanwhile.
          PermissionDenied: with ``since``, if the server's permissions refuse to read the stream.
          TransportBroken: with ``since``, if there is no connection, or JetStream does not answer.
          BackbeatError: if the session is disabled.
          TypeError: if ``since`` is not a number.
          ValueError: if ``agent_id`` is neither ``"*"`` nor 1 to 128 of ``A-Z a-z 0-9 _ -``, or
            ``since`` is negative or NaN.
          TransportClosed: by the iterator, if the session is left meanwhile.
          SessionClosed: if the session was left.

        """
        if agent_id != "*" and not is_token(agent_id):
            raise ValueError(
                f"`agent_id` must be '*' or 1 to 128 of A-Z a-z 0-9 _ -, not {agent_id!r}"
            )
        seconds = None if since is None else check_seconds("since", since)
        runtime, subject = self._runtime, status_subject(agent_id)
        runtime.check_open()
        transport, archive, counts = runtime.transport, runtime.archive, runtime.claim_counts
        if transport is None or archive is None:
            raise BackbeatError("the session is disabled, so it cannot listen to claims")
        cluster_id = None if all_clusters else runtime.config.cluster_id
        if seconds is not None:
            async with open_stored_claims(
                transport, archive, subject, seconds, counts, cluster_id
            ) as stored:
                yield stored if batched else Claims(stored)
            return
        async with transport.open_subscription(subject) as messages:
            batches = ClaimBatches(messages, counts, cluster_id)
            yield batches if batched else Claims(batches)


def _reason(error: BaseException) -> str:
    if isinstance(error, trio.Cancelled):
        # Other reasons than those of `cancel(reason)` are Trio's, and name tasks and exceptions.
        given = error.reason if error.source == "explicit" else None
        return f"cancelled: {given}".encode(errors="replace").decode() if given else "cancelled"
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 - it must not take the place of the exception itself
        text = "its text cannot be shown"
    text = text.encode(errors="replace").decode()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
