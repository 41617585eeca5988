"""What a Trio application does with a session: budgets, time, operations, observation."""

from __future__ import annotations

import contextvars
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator
from contextlib import (
    AbstractAsyncContextManager,
    asynccontextmanager,
    contextmanager,
    nullcontext,
)
from typing import Any, Final, Literal, TypeVar, TypeVarTuple, final, overload

import msgspec
import trio
from msgspec import UNSET

from .._checks import check_beats, check_index, check_position, check_seconds
from .._config import BackbeatConfig
from .._errors import (
    BackbeatError,
    MetronomeUnavailable,
    PermissionDenied,
    SessionClosed,
    TempoRefused,
    TransportBroken,
    TransportClosed,
)
from .._grid.changes import ASKED_NS
from .._grid.timeline import milli_bpm
from .._runtime.claims import ClaimBatches, Claims, open_stored_claims
from .._runtime.health import Health, SessionStatistics
from .._runtime.operations import Operation, Phase
from .._runtime.runtime import Runtime
from .._time.beats import Beats
from .._time.clock import BeatClock
from .._time.scopes import BeatScope
from .._wire import (
    StatusClaim,
    TempoRequest,
    decode_tempo_reply,
    encode,
    is_token,
    status_subject,
    tempo_subject,
)

T = TypeVar("T")
PosArgs = TypeVarTuple("PosArgs")

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
    """Return what an application sees of a runtime."""
    bb: Session = object.__new__(Session)
    bb._runtime = runtime
    bb._clock = runtime.clock
    return bb


@final
class Session:
    """What ``async with session()`` gives. Made by nothing else.

    Beats, positions and budgets are those of the cluster's grid, or of a local one while there is
    no other. Methods raise `SessionClosed` once the block has been left.
    """

    _runtime: Runtime
    # The runtime's clock, as budgets are made and entered as often as Trio's own scopes.
    _clock: BeatClock

    def __init__(self) -> None:
        raise TypeError("sessions are made by `backbeat_trio.session`")

    @property
    def config(self) -> BackbeatConfig:
        """The settings that the session was opened with."""
        return self._runtime.config

    # Budgets.

    def move_on_after(self, beats: float, *, shield: bool = False) -> BeatScope:
        """Make a cancel scope whose deadline is some beats after it is entered.

        The deadline follows the grid: it falls when so many beats have passed, whatever they last.
        When the position moves to another grid, the beats that are left stay the same. Not a
        checkpoint; neither is entering or leaving the scope.

        Args:
          beats: 0 or more; fractions are fine, and ``inf`` is no limit.
          shield: whether cancellations from outside are kept out.

        Raises:
          TypeError: where ``beats`` is no number.
          ValueError: where ``beats`` is negative, NaN or too large for a float.
          SessionClosed: where the session was left.

        """
        # Making a scope is frequent: the usual numbers are checked here, without a call. An int
        # becomes a float when the scope adds it to the present position.
        kind = type(beats)
        if not (kind is int or kind is float) or not beats >= 0:
            beats = check_beats("beats", beats)
        return self._clock.deadlines.scope_after(beats, shield)

    def move_on_at(self, beat: float, *, shield: bool = False) -> BeatScope:
        """Make a cancel scope whose deadline is a position of the grid.

        A position names a beat of the cluster. When this session moves to another grid, as it does
        when it locks to the cluster's, the deadline stays at this position. Not a checkpoint.

        Args:
          beat: a beat's index, or a position between beats; one that is past cancels at once.
          shield: whether cancellations from outside are kept out.

        Raises:
          TypeError: where ``beat`` is no number.
          ValueError: where ``beat`` is NaN or too large for a float.
          SessionClosed: on entering, where the session was left.

        """
        return self._clock.deadlines.scope_at(check_position("beat", beat), shield=shield)

    def fail_after(self, beats: float, *, shield: bool = False) -> BeatScope:
        """Make a scope as `move_on_after` does, that raises `BeatBudgetExceeded` when it has ended.

        Args:
          beats: 0 or more; fractions are fine, and ``inf`` is no limit.
          shield: whether cancellations from outside are kept out.

        Raises:
          BeatBudgetExceeded: on leaving, where the scope caught a cancellation of its own.
          TypeError: where ``beats`` is no number.
          ValueError: where ``beats`` is negative, NaN or too large for a float.

        """
        return self._clock.deadlines.scope_after(
            check_beats("beats", beats), shield=shield, fail=True
        )

    def fail_at(self, beat: float, *, shield: bool = False) -> BeatScope:
        """Make a scope as `move_on_at` does, that raises `BeatBudgetExceeded` when it has ended.

        Args:
          beat: a beat's index, or a position between beats.
          shield: whether cancellations from outside are kept out.

        Raises:
          BeatBudgetExceeded: on leaving, where the scope caught a cancellation of its own.
          TypeError: where ``beat`` is no number.
          ValueError: where ``beat`` is NaN or too large for a float.

        """
        return self._clock.deadlines.scope_at(
            check_position("beat", beat), shield=shield, fail=True
        )

    async def execute_with_beat_budget(
        self, beats: float, async_fn: Callable[[*PosArgs], Awaitable[T]], *args: *PosArgs
    ) -> T:
        """Call an async function, and cancel it when its budget of beats runs out.

        Args:
          beats: 0 or more.
          async_fn: what to call; it is a checkpoint where that is one.
          *args: passed to it.

        Returns:
          What the function returns.

        Raises:
          BeatBudgetExceeded: where the budget ran out first.
          TypeError: where ``beats`` is no number.
          ValueError: where ``beats`` is negative, NaN or too large for a float.

        """
        with self.fail_after(beats):
            return await async_fn(*args)

    def current_effective_deadline(self) -> float:
        """Return the position at which the current task will be cancelled, as things stand.

        It is the earliest deadline of the scopes around the current task that are visible to it. A
        deadline in seconds counts as the position that the grid will have then at the present
        tempo. It is ``inf`` without any deadline, and ``-inf`` where the task is cancelled already.
        Not a checkpoint.

        `trio.current_effective_deadline` sees deadlines in seconds only: to it, a `BeatScope` is a
        scope without a deadline.
        """
        return self._clock.deadlines.effective_deadline()

    # Time.

    def current_position(self) -> float:
        """Return the position: the index of the present beat, and how much of it has passed.

        Not a checkpoint. On one grid it never goes back; on locking, and when the cluster's grid
        begins a new incarnation, it changes grid.
        """
        return self._clock.position()

    def current_beat(self) -> int:
        """Return the index of the present beat. Not a checkpoint."""
        return self._clock.index()

    def current_bar(self) -> int:
        """Return the number of the present bar: beat index // beats per bar. Not a checkpoint."""
        return self._clock.index() // self._clock.grid.beats_per_bar

    @property
    def tempo_bpm(self) -> float:
        """The tempo in force, in beats per minute."""
        return self._clock.segment().milli_bpm / 1000

    async def sleep(self, beats: float) -> None:
        """Sleep for some beats. Always a checkpoint.

        Args:
          beats: 0 or more.

        Raises:
          TypeError: where ``beats`` is no number.
          ValueError: where ``beats`` is negative or NaN.
          SessionClosed: where the session is or gets closed.

        """
        await self._clock.sleep(check_beats("beats", beats))

    async def sleep_until(self, beat: float) -> None:
        """Sleep until a position of the grid is reached; not at all where it is past. A checkpoint.

        Args:
          beat: a beat's index, or a position between beats.

        Raises:
          TypeError: where ``beat`` is no number.
          ValueError: where ``beat`` is NaN.
          SessionClosed: where the session is or gets closed.

        """
        await self._clock.sleep_until(check_position("beat", beat))

    def beats(self, *, precise: bool = False) -> Beats:
        """Return an async iterator of beats, from the next one on.

        Beats are made locally: a frame that is late or lost loses none. A consumer that was busy
        gets the newest beat only, with the number of those it missed; each call gives an iterator
        of its own, and there is no queue behind it.

        Args:
          precise: whether the last two milliseconds before a beat are spent at checkpoints in place
            of sleeping, and the last tenth of one without letting anybody else run: the beat comes
            some hundredths of a millisecond late instead of some tenths (on Linux) or about a whole
            one (elsewhere), for up to 2 ms of processor time a beat.

        Raises:
          SessionClosed: where the session is closed; so does the iterator.

        """
        self._runtime.check_open()
        return Beats(self._clock, bars=False, precise=precise)

    def downbeats(self, *, precise: bool = False) -> Beats:
        """Return an async iterator of the first beats of bars; as `beats` in everything else.

        Raises:
          SessionClosed: where the session is closed; so does the iterator.

        """
        self._runtime.check_open()
        return Beats(self._clock, bars=True, precise=precise)

    async def set_tempo(self, bpm: float, *, at_beat: int | None = None, over: int = 0) -> int:
        """Ask the metronome's leader for another tempo, for the whole cluster. A checkpoint.

        Args:
          bpm: beats per minute, 0.1 to 6,000; exact to a thousandth.
          at_beat: the index of the beat at which to change; None is the next downbeat that is at
            least max(2 beats, 250 ms) ahead.
          over: a ramp: so many beats the change takes, in up to 64 equal steps on whole beats; 0 is
            at once.

        Returns:
          The index of the beat at which the change takes effect, or a ramp begins.

        Raises:
          TypeError: where an argument is of the wrong type.
          ValueError: where ``bpm`` is out of range or NaN, or another argument negative or more
            than 2**53.
          TempoRefused: where the leader refuses: the beat is past or too soon, the grid stands
            still, or the change cannot be committed.
          MetronomeUnavailable: where no leader can be reached.
          PermissionDenied: if the server's permissions do not let this user ask for a change.
          SessionClosed: where the session was left.

        """
        milli = milli_bpm("bpm", bpm)
        return await self._change_grid(milli / 1000, at_beat, check_index("over", over))

    async def pause(self, *, at_beat: int | None = None) -> int:
        """Ask the metronome's leader to have the grid stand still. A checkpoint.

        Every budget in the cluster waits then: no beats pass until `resume`. Time in seconds, and
        what is limited by it, goes on.

        Args:
          at_beat: the index of the beat to stand still on; None is the next one that is at least
            max(2 beats, 250 ms) ahead.

        Returns:
          The index of the beat on which the grid will stand still.

        Raises:
          TypeError, ValueError: for what is no index, from 0 to 2**53.
          TempoRefused: where the leader refuses, as for `set_tempo`.
          MetronomeUnavailable: where no leader can be reached.
          PermissionDenied: if the server's permissions do not let this user ask for a change.
          SessionClosed: where the session was left.

        """
        return await self._change_grid(0.0, at_beat)

    async def resume(self) -> int:
        """Ask the leader to have a grid go on that stands still, at its tempo of before.

        It does so one to two seconds later, so that everybody has heard of it. One that is about to
        stand still does not. A checkpoint.

        Returns:
          The index of the beat on which it stands.

        Raises:
          TempoRefused: where the grid does not stand still, or the change cannot be committed.
          MetronomeUnavailable: where no leader can be reached.
          PermissionDenied: if the server's permissions do not let this user ask for a change.
          SessionClosed: where the session was left.

        """
        return await self._change_grid(None, None)

    async def _change_grid(self, bpm: float | None, at_beat: int | None, over: int = 0) -> int:
        if at_beat is not None:
            at_beat = check_index("at_beat", at_beat)
        self._runtime.check_open()
        cluster_id, transport = self._runtime.config.cluster_id, self._runtime.transport
        if transport is None:
            raise MetronomeUnavailable("the session is disabled")
        request = encode(TempoRequest(cluster_id, bpm, at_beat, over or UNSET))
        try:
            answer = await transport.request(
                tempo_subject(cluster_id), request, timeout=ASKED_NS / 1e9
            )
            reply = decode_tempo_reply(answer.data)
        except TransportClosed:
            raise SessionClosed("the session has been closed") from None
        except PermissionDenied:
            raise
        except TransportBroken as error:
            raise MetronomeUnavailable(f"no metronome took the request: {error}") from error
        except msgspec.DecodeError as error:
            raise MetronomeUnavailable(f"the metronome's answer is not readable: {error}") from None
        if not reply.ok or reply.effective_beat is None:
            raise TempoRefused(reply.error or "the metronome refused without a reason")
        return reply.effective_beat

    # Operations.

    @asynccontextmanager
    async def operation(
        self,
        type: str,
        *,
        id: str | None = None,
        beats: int | None = None,
        data: Any = None,
        enforce: bool = False,
    ) -> AsyncGenerator[Operation, None]:
        """Run a block as an operation: leaving it completes the operation, an exception fails it.

        ``beats`` is an estimate: it says how long the operation will probably take, and nothing
        happens when it runs out. With ``enforce=True`` it is a budget: the block is cancelled then.

        An operation that was ended in the block stays as it is. Entering is a checkpoint, leaving
        is not.

        Args:
          type: one of the known types (``"election"``, ``"dht_store"``, ...) or any other name.
          id: unique among the live operations of the session; by default made up.
          beats: the estimate, in whole beats, 1 or more; by default the type's maximum.
          data: kept with the operation, in this process.
          enforce: whether the estimate is a budget, at whose end the block is cancelled.

        Raises:
          OperationExists: where an operation with the id is live.
          TypeError, ValueError: for what is no type, id or estimate; the text names it.
          BeatBudgetExceeded: with ``enforce``, where the budget ran out.
          SessionClosed: where the session was left.

        """
        await trio.lowlevel.checkpoint()
        operation = self.start_operation(type, id=id, beats=beats, data=data)
        try:
            with self.fail_after(operation.beats) if enforce else nullcontext():
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

        ``beats`` is an estimate: nothing happens when it runs out. To end work at a budget, use
        `fail_after`, or `operation` with ``enforce=True``. An operation that is live when the
        session is left fails then. Not a checkpoint.

        Args:
          type: one of the known types or any other name, of at most 1,000 characters.
          id: unique among the live operations of the session, of at most 1,000 characters; by
            default made up.
          beats: the estimate, in whole beats, 1 or more; by default the type's maximum.
          data: kept with the operation, in this process.

        Raises:
          OperationExists: where an operation with the id is live.
          TypeError, ValueError: for what is no type, id or estimate; the text names it.
          SessionClosed: where the session was left.

        """
        return self._runtime.operations.start(type, id=id, beats=beats, data=data)

    def advance_operation(self, id: str, phase: Phase, *, peers: int | None = None) -> None:
        """Take an operation on to a later phase, and queue a claim. Not a checkpoint.

        Args:
          id: of a live operation.
          phase: up to `Phase.EXECUTING`; skipping some is fine, going back is not.
          peers: how many take part; None leaves the count as it was.

        Raises:
          OperationNotFound: where no such operation is live.
          InvalidTransition: for an earlier phase, and for the two final ones.
          SessionClosed: where the session was left.

        """
        self._runtime.operations.find(id).advance(phase, peers=peers)

    def complete_operation(self, id: str, *, peers: int | None = None) -> None:
        """End an operation well, and queue its terminal claim. Not a checkpoint.

        Args:
          id: of a live operation.
          peers: how many took part; None leaves the count as it was.

        Raises:
          OperationNotFound: where no such operation is live.
          SessionClosed: where the session was left.

        """
        self._runtime.operations.find(id).complete(peers=peers)

    def fail_operation(self, id: str, reason: str) -> None:
        """End an operation as failed, and queue its terminal claim. Not a checkpoint.

        Args:
          id: of a live operation.
          reason: goes into the claim's notes.

        Raises:
          OperationNotFound: where no such operation is live.
          SessionClosed: where the session was left.

        """
        self._runtime.operations.find(id).fail(reason)

    # Observation.

    def health(self) -> Health:
        """Return how the session is doing, or how it was when it was left.

        Not a checkpoint. It may be called at any time, also after Trio's run has ended.
        """
        return self._runtime.health()

    def statistics(self) -> SessionStatistics:
        """Return the counters. Not a checkpoint; fine at any time."""
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

        The iterator gives one claim after the other, of operations and of health. With ``batched``
        it gives a list of all claims that came in one message: of every live operation of an agent
        at once, and at a fraction of the cost. A list is never empty.

        Agents of several clusters may share a server. The iterator gives the claims of the
        session's own cluster. It also gives claims that name no cluster, as agents of earlier
        versions publish them.

        With ``since`` the iterator first gives the terminal claims of the last seconds, oldest
        first, and then goes on with live claims. No terminal claim is lost or given twice where the
        two meet. The terminal claims are those that the stream `BackbeatConfig.claims_stream` of
        JetStream has stored; on a ``memory://`` bus, the newest 10,000. While stored claims are
        being read nothing else is heard; about a second passes between the last of them and the
        first live claim. The iterator waits while there is no connection.

        What does not decode, or speaks for another agent than its subject does, is counted and
        dropped; so are the newest messages where the consumer falls far behind. Several tasks may
        iterate at the same time: each step's result goes to one of them. Entering and each step are
        checkpoints; leaving is not.

        Args:
          agent_id: the agent to listen to; ``"*"`` is all of them.
          batched: whether a step gives a list of claims and not a single one.
          all_clusters: whether claims of all clusters are given.
          since: for how many seconds, by the server's clock, stored claims are given first, 0 or
            more; ``inf`` gives all that are stored, None gives none.

        Raises:
          ClaimsUnavailable: with ``since``, if nothing stores claims: the server has no JetStream,
            or there is no stream. The iterator raises it if the stream is deleted meanwhile.
          PermissionDenied: with ``since``, if the server's permissions refuse to read the stream.
          TransportBroken: with ``since``, if there is no connection, or JetStream does not answer.
          ValueError: where ``agent_id`` is no subject token.
          TransportClosed: by the iterator, when the session is closed.
          SessionClosed: where the session was left.

        """
        if agent_id != "*" and not is_token(agent_id):
            raise ValueError(f"`agent_id` must be a subject token or '*', not {agent_id!r}")
        seconds = None if since is None else check_seconds("since", since)
        runtime, subject = self._runtime, status_subject(agent_id)
        runtime.check_open()
        transport, archive, counts = runtime.transport, runtime.archive, runtime.claim_counts
        if transport is None or archive is None:
            raise BackbeatError("there are no claims to hear: the session is disabled")
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
        text = "its text cannot be told"
    text = text.encode(errors="replace").decode()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
