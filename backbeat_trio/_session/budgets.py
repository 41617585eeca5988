"""Budgets and time, as a session gives them to an application."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import TypeVar, TypeVarTuple, cast

from .._checks import check_beats, check_position
from .._runtime.runtime import Runtime
from .._time.beats import Beats
from .._time.clock import BeatClock
from .._time.scopes import BeatScope, FailingScope

T = TypeVar("T")
PosArgs = TypeVarTuple("PosArgs")


class Budgets:
    """The part of `Session` that has to do with budgets and beats."""

    _runtime: Runtime
    # The runtime's clock, as budgets are made and entered as often as Trio's own scopes.
    _clock: BeatClock

    # Budgets.

    def move_on_after(
        self, beats: float, *, shield: bool = False, soft_after: float | None = None
    ) -> BeatScope:
        """Make a cancel scope whose deadline is some beats after it is entered.

        Use it as ``with bb.move_on_after(2):``. The block is cancelled when that many beats have
        passed, however long they last: if the tempo changes meanwhile, so does the time in seconds.
        If the session moves to another grid, the number of beats that are left stays the same. Not
        a checkpoint; neither is entering or leaving the scope.

        Args:
          beats: the number of beats, 0 or more; fractions are allowed, and ``inf`` is no limit.
          shield: whether cancellations from outside do not reach the block.
          soft_after: how many beats after the entry the block should begin to wind down, at most
            ``beats``; see `BeatScope.soft_deadline`. None is no soft edge.

        Raises:
          TypeError: if ``beats`` or ``soft_after`` is not a number.
          ValueError: if one of them is negative, NaN or too large for a float, or if ``soft_after``
            is later than the deadline.
          SessionClosed: on entering, if the session was left.

        """
        # Making a scope is frequent: the usual numbers are checked here, without a call. An int
        # becomes a float when the scope adds it to the present position.
        kind = type(beats)
        if not (kind is int or kind is float) or not beats >= 0:
            beats = check_beats("beats", beats)
        if soft_after is None:
            return self._clock.deadlines.scope_after(beats, shield)
        return self._clock.deadlines.scope_after(beats, shield, soft=soft_after)

    def move_on_at(
        self, beat: float, *, shield: bool = False, soft_at: float | None = None
    ) -> BeatScope:
        """Make a cancel scope whose deadline is a position of the grid.

        A position names a beat of the cluster, which is the same for every agent. If the session
        moves to another grid, as it does when it first hears a metronome, the deadline stays at
        this position. Not a checkpoint; neither is entering or leaving the scope.

        Args:
          beat: a beat's index, or a position between beats. If it is past, the block is cancelled
            at its first checkpoint.
          shield: whether cancellations from outside do not reach the block.
          soft_at: the position at which the block should begin to wind down, not later than
            ``beat``; see `BeatScope.soft_deadline`. None is no soft edge.

        Raises:
          TypeError: if ``beat`` or ``soft_at`` is not a number.
          ValueError: if one of them is NaN or too large for a float, or if ``soft_at`` is later
            than the deadline.
          SessionClosed: on entering, if the session was left.

        """
        return self._clock.deadlines.scope_at(
            check_position("beat", beat), shield=shield, soft=soft_at
        )

    def fail_after(
        self, beats: float, *, shield: bool = False, soft_after: float | None = None
    ) -> FailingScope:
        """Make a scope as `move_on_after` does, which raises an error if it cancelled its block.

        Args:
          beats: the number of beats, 0 or more; fractions are allowed, and ``inf`` is no limit.
          shield: whether cancellations from outside do not reach the block.
          soft_after: how many beats after the entry the block should begin to wind down, at most
            ``beats``; see `BeatScope.soft_deadline`. None is no soft edge.

        Returns:
          A `BeatScope`. Type checkers know it as a subclass, which never ends its block quietly.

        Raises:
          BeatBudgetExceeded: on leaving, if the scope cancelled its block, also by
            `BeatScope.cancel`; the text says which.
          TypeError: if ``beats`` or ``soft_after`` is not a number.
          ValueError: if one of them is negative, NaN or too large for a float, or if ``soft_after``
            is later than the deadline.
          SessionClosed: on entering, if the session was left.

        """
        scope = self._clock.deadlines.scope_after(
            check_beats("beats", beats), shield=shield, fail=True, soft=soft_after
        )
        return cast("FailingScope", scope)

    def fail_at(
        self, beat: float, *, shield: bool = False, soft_at: float | None = None
    ) -> FailingScope:
        """Make a scope as `move_on_at` does, which raises an error if it cancelled its block.

        Args:
          beat: a beat's index, or a position between beats.
          shield: whether cancellations from outside do not reach the block.
          soft_at: the position at which the block should begin to wind down, not later than
            ``beat``; see `BeatScope.soft_deadline`. None is no soft edge.

        Returns:
          A `BeatScope`, as `fail_after` does.

        Raises:
          BeatBudgetExceeded: on leaving, if the scope cancelled its block, also by
            `BeatScope.cancel`; the text says which.
          TypeError: if ``beat`` or ``soft_at`` is not a number.
          ValueError: if one of them is NaN or too large for a float, or if ``soft_at`` is later
            than the deadline.
          SessionClosed: on entering, if the session was left.

        """
        scope = self._clock.deadlines.scope_at(
            check_position("beat", beat), shield=shield, fail=True, soft=soft_at
        )
        return cast("FailingScope", scope)

    async def execute_with_beat_budget(
        self, beats: float, async_fn: Callable[[*PosArgs], Awaitable[T]], *args: *PosArgs
    ) -> T:
        """Call an async function, and cancel it when its budget of beats runs out.

        It is a checkpoint if the function is one.

        Args:
          beats: the budget, in beats, 0 or more; ``inf`` is no limit.
          async_fn: the function.
          *args: its arguments.

        Returns:
          What the function returns.

        Raises:
          BeatBudgetExceeded: if the budget ran out first.
          TypeError: if ``beats`` is not a number, or ``async_fn`` is a coroutine, which is what a
            call of an async function returns.
          ValueError: if ``beats`` is negative, NaN or too large for a float.
          SessionClosed: if the session was left.

        """
        if inspect.iscoroutine(async_fn):
            name = async_fn.__name__
            # Python would warn, too, that it was never awaited.
            async_fn.close()
            raise TypeError(
                f"`async_fn` must be an async function, not a coroutine: write `{name}` and the"
                f" arguments, not `{name}(...)`"
            )
        with self.fail_after(beats):
            return await async_fn(*args)

    def current_effective_deadline(self) -> float:
        """Return the nearest deadline that can cancel the current task, as a position in beats.

        It takes all scopes around the task into account: those of this session, and Trio's own,
        whose deadlines in seconds are converted at the present tempo. A shielded scope hides those
        outside of it. Not a checkpoint.

        `trio.current_effective_deadline` sees deadlines in seconds only. It takes a `BeatScope` for
        a scope without a deadline.

        Returns:
          The position; ``inf`` if there is no deadline, ``-inf`` if the task is cancelled already.

        """
        return self._clock.deadlines.effective_deadline()

    # Time.

    def current_position(self) -> float:
        """Return the present position: the beat's index, plus the part of it that has passed.

        It never goes back on the same grid. It may jump either way when the session moves to
        another grid: when it first hears a metronome, and when the cluster begins a new grid. Not a
        checkpoint.
        """
        return self._clock.position()

    def current_beat(self) -> int:
        """Return the index of the present beat. Not a checkpoint."""
        return self._clock.index()

    def current_bar(self) -> int:
        """Return the number of the present bar, from 0 on. Not a checkpoint."""
        return self._clock.index() // self._clock.grid.beats_per_bar

    @property
    def tempo_bpm(self) -> float:
        """The present tempo, in beats per minute; 0.0 while the grid is paused."""
        return self._clock.segment().milli_bpm / 1000

    async def sleep(self, beats: float) -> None:
        """Sleep for some beats. Always a checkpoint.

        It takes longer if the tempo gets slower meanwhile, and as long as the grid is paused.

        Args:
          beats: the number of beats, 0 or more; ``inf`` sleeps until cancelled.

        Raises:
          TypeError: if ``beats`` is not a number.
          ValueError: if ``beats`` is negative or NaN.
          SessionClosed: if the session was left, or is left meanwhile.

        """
        await self._clock.sleep(check_beats("beats", beats))

    async def sleep_until(self, beat: float) -> None:
        """Sleep until a position of the grid is reached. Always a checkpoint.

        If the position is past, it returns at once.

        Args:
          beat: a beat's index, or a position between beats.

        Raises:
          TypeError: if ``beat`` is not a number.
          ValueError: if ``beat`` is NaN.
          SessionClosed: if the session was left, or is left meanwhile.

        """
        await self._clock.sleep_until(check_position("beat", beat))

    def beats(self, *, precise: bool = False) -> Beats:
        """Return an async iterator of beats, from the next one on. Not a checkpoint.

        Use it as ``async for beat in bb.beats():``; each step gives a `Beat`, and is a checkpoint.
        The session computes the beats itself, so a message that is late or lost loses none of them.
        A consumer that was busy gets the newest beat only, which says how many it missed. Each call
        returns an iterator of its own.

        With ``precise`` the iterator waits busily just before each beat: it polls the clock at
        checkpoints for up to 2 ms, and blocks all other tasks for the last 0.1 ms. A beat then
        comes some hundredths of a millisecond late, and costs up to 2 ms of processor time.
        Otherwise it comes some tenths of a millisecond late on Linux, and about one on other
        systems.

        Args:
          precise: whether to wait busily just before each beat.

        Raises:
          SessionClosed: if the session was left. The iterator raises it, too.

        """
        self._runtime.check_open()
        return Beats(self._clock, bars=False, precise=precise)

    def downbeats(self, *, precise: bool = False) -> Beats:
        """Return an async iterator of downbeats, the first beats of bars. Not a checkpoint.

        Apart from that it is as `beats`. Its ``skipped`` counts downbeats.

        Args:
          precise: whether to wait busily just before each downbeat, as for `beats`.

        Raises:
          SessionClosed: if the session was left. The iterator raises it, too.

        """
        self._runtime.check_open()
        return Beats(self._clock, bars=True, precise=precise)
