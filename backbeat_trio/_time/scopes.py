"""Cancel scopes whose deadline is a beat."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from heapq import heappush
from types import TracebackType
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, cast, final

import trio
from trio import CancelScope

from .._checks import check_beats, check_position
from .._errors import BeatBudgetExceeded
from .._grid.grid import Grid
from .._grid.timeline import NEVER
from .enclosing import find_enclosing
from .heap import CLOSED, ENDED, BeatHeap, Entry, seconds_at
from .soft import SoftEdge

# The largest finite number of beats.
_MAX: Final = sys.float_info.max
_SOFT_PASSED: Final = "the soft edge has passed"
_CANCELLED: Final = "the block was cancelled before its beat budget ran out"
# Seconds of Trio's clock that are later than any instant of local time.
_FAR: Final = NEVER / 1e9

# `BeatScope.__init__` refuses calls, because the methods of a session make the scopes.
_new_scope: Final[Callable[[type[BeatScope]], BeatScope]] = object.__new__


@final
class BeatScope:
    """A cancel scope whose deadline is a position of the grid.

    Use it like `trio.CancelScope`, with beats instead of seconds. You cannot call the class: the
    methods of a session make it. These are `Session.move_on_after`, `Session.move_on_at`,
    `Session.fail_after` and `Session.fail_at`.

    A deadline is either relative or absolute. A relative deadline counts beats from the entry, or
    from the moment at which `relative_deadline` was set. If the position moves to another grid, the
    beats that are left stay the same. An absolute deadline is a position, which was given to
    `move_on_at` or `fail_at`, or by setting `deadline`. It names a beat of the cluster, and stays
    the same on another grid.

    It differs from Trio's scopes in three more ways. The class cannot be subclassed. The texts of
    errors and of ``repr`` are different. And `trio.current_effective_deadline` does not see
    deadlines in beats; `Session.current_effective_deadline` sees both kinds.
    """

    # Scopes are entered and left very often, so these two methods make as few calls as possible.
    __slots__ = (
        "__weakref__",
        "_budget",
        "_deadlines",
        "_key",
        "_position",
        "_relative",
        "_scope",
        "_soft",
    )

    _deadlines: Deadlines
    _scope: trio.CancelScope
    # Before the entry one of these two is None: the number of beats from the entry, or the
    # position.
    _relative: float | None
    # After the entry this is None if the deadline is relative.
    _position: float | None
    # The deadline on the axis, after the entry.
    _key: float
    # The number of beats from the entry, for the error; None if the scope raises none.
    _budget: float | None
    _soft: SoftEdge | None

    def __init__(self) -> None:
        raise TypeError("beat scopes are made by the methods of a session")

    @trio.lowlevel.enable_ki_protection
    def __enter__(self) -> BeatScope:
        deadlines = self._deadlines
        time = deadlines._time
        now = time()
        if now >= deadlines._line_until:
            deadlines._check_line()
        now = (now - deadlines._line_base) / deadlines._line_beat_s + deadlines._line_beat
        relative = self._relative
        if relative is not None:
            key = now + relative
        elif self._position is not None:
            key = self._position - deadlines.shift
        else:
            # The scope was entered before. Trio raises an error for that below.
            key = self._key
        scope = self._scope
        scope.__enter__()
        # From here on nothing may raise, or the scope would stay entered.
        self._key = key
        self._relative = None
        if self._soft is not None:
            # First, so that the edge passes before a deadline on the same beat.
            self._soft.enter(now)
        if not deadlines.enforcing:
            pass
        elif key > now:
            deadlines._entered[scope] = entry = [key, next(deadlines._order), self]
            heappush(deadlines._heap, entry)
            if key < deadlines._armed:
                deadlines._rearm()
        else:
            scope.cancel(ENDED)
        return self

    @trio.lowlevel.enable_ki_protection
    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        scope, deadlines = self._scope, self._deadlines
        try:
            handled = scope.__exit__(exc_type, exc, traceback)
        except BaseException:
            # If an unrelated task tries to leave the scope, Trio refuses and the scope stays
            # entered. Only its text tells.
            if "active" not in repr(scope):
                self._leave()
            raise
        entry = deadlines._take(scope, None)
        if entry is not None:
            heap = deadlines._heap
            if heap[-1] is entry:
                heap.pop()
            else:
                deadlines.drop(entry)
        if self._soft is not None:
            self._soft.leave()
        if self._budget is not None and scope.cancelled_caught:
            # The entry is there until the deadline passes.
            early = entry is not None and not deadlines.is_due(self._key)
            if early or not deadlines.enforcing:
                raise BeatBudgetExceeded(_CANCELLED) from None
            raise BeatBudgetExceeded(self._ended_text(self._budget)) from None
        return handled

    @property
    def deadline(self) -> float:
        """The position, in beats, at which the scope is cancelled; ``inf`` for never.

        It can be set, which makes the deadline absolute.

        Raises:
          RuntimeError: if the scope has a relative deadline and is not yet entered.
          TypeError: if it is set to something that is not a number.
          ValueError: if it is set to NaN, or to a number that is too large for a float.

        """
        if self._relative is not None:
            raise RuntimeError("unentered relative beat scope does not have an absolute deadline")
        if self._position is not None:
            return self._position
        return self._key + self._deadlines.shift

    @deadline.setter
    def deadline(self, position: float) -> None:
        position = check_position("deadline", position)
        if self._relative is not None:
            raise RuntimeError("unentered relative beat scope does not have an absolute deadline")
        self._position = position
        self._move(position - self._deadlines.shift)

    @property
    def relative_deadline(self) -> float:
        """The number of beats until the deadline, negative once it is past.

        Before the entry it is the number of beats from the entry to the deadline. It can be set,
        which makes the deadline relative.

        Raises:
          RuntimeError: if the scope has an absolute deadline and is not yet entered.
          TypeError: if it is set to something that is not a number.
          ValueError: if it is set to NaN, to a negative number, or to one too large for a float.

        """
        if self._relative is not None:
            return float(self._relative)
        if self.is_relative is False and self._position != math.inf:
            raise RuntimeError("unentered absolute beat scope does not have a relative deadline")
        return self._left()

    @relative_deadline.setter
    def relative_deadline(self, beats: float) -> None:
        beats = check_beats("relative_deadline", beats)
        if self._budget is not None:
            self._budget = beats
        if self.is_relative is None:
            self._position = None
            self._move(self._deadlines.axis_now() + beats)
        elif self._relative is None and self._position != math.inf:
            raise RuntimeError("unentered absolute beat scope does not have a relative deadline")
        elif beats == math.inf:
            self._relative, self._position = None, beats
        else:
            self._relative, self._position = beats, None

    @property
    def is_relative(self) -> bool | None:
        """Whether the deadline counts from the entry; None once the scope was entered.

        It is False if there is no deadline.
        """
        if self._scope.is_relative is None:
            return None
        return self._relative is not None

    @property
    def beats_left(self) -> float:
        """The number of beats until the deadline; 0.0 once it is past, ``inf`` without one."""
        if self._relative is not None:
            return float(self._relative)
        return max(0.0, self._left())

    @property
    def shield(self) -> bool:
        """Whether cancellations from outside do not reach the block. It can be set."""
        return self._scope.shield

    @shield.setter
    def shield(self, shield: bool) -> None:
        self._scope.shield = shield

    @property
    def cancel_called(self) -> bool:
        """Whether the scope was cancelled, by `cancel` or because the deadline has passed.

        An absolute deadline may pass before the scope is entered.
        """
        if not self._scope.cancel_called and self._is_past():
            self._scope.cancel(ENDED)
        return self._scope.cancel_called

    @property
    def has_ended(self) -> bool:
        """Whether the scope was cancelled already.

        Unlike `cancel_called`, it does not cancel a scope whose deadline has just passed.
        """
        return self._scope.cancel_called

    @property
    def cancelled_caught(self) -> bool:
        """Whether this scope caught a `trio.Cancelled` of its own when it was left."""
        return self._scope.cancelled_caught

    @property
    def soft_deadline(self) -> float:
        """The position, in beats, of the soft edge; ``inf`` if there is none.

        From this position on, the block should wind down: `soft_called` is true, `wait_soft`
        returns, and `graceful` blocks are cut. The scope itself is not cancelled. It can be set,
        which makes it a position that stays the same on another grid. It has no effect if it is
        later than the deadline, and moving it does not undo that it has passed.

        Raises:
          RuntimeError: if the scope counts the soft edge from its entry and is not yet entered.
          TypeError: if it is set to something that is not a number.
          ValueError: if it is set to NaN, or to a number that is too large for a float.

        """
        if self._soft is None:
            return math.inf
        self._check_soft()
        return self._soft.position

    @soft_deadline.setter
    def soft_deadline(self, position: float) -> None:
        position = check_position("soft_deadline", position)
        self._check_soft()
        self._any_soft().position = position

    @property
    def soft_called(self) -> bool:
        """Whether the soft edge has passed while the scope was entered."""
        return self._soft is not None and self._soft.called()

    async def wait_soft(self) -> None:
        """Wait until the soft edge passes. A checkpoint.

        It returns at once if the edge has passed. It waits until it is cancelled if the scope has
        no soft edge, or is left before the edge.

        Raises:
          SessionClosed: if the session is closed before.

        """
        await self._any_soft().wait()

    def graceful(self) -> AbstractContextManager[BeatScope, bool]:
        """Run a block that is cut at the soft edge, so that what follows it has the rest.

        Use it inside of the scope. The block ends quietly, and its own scope says whether it was
        cut. Inside of the block, the soft edge is the deadline. Entering and leaving are not
        checkpoints.

        Raises:
          RuntimeError: if the scope is not entered.

        """
        return cast("AbstractContextManager[BeatScope, bool]", self._graceful())

    @contextmanager
    def _graceful(self) -> Generator[BeatScope, None, None]:
        if self.is_relative is not None:
            raise RuntimeError("a block can be graceful only inside of the scope")
        soft = self._any_soft()
        scope = self._deadlines.scope_at(math.inf)
        scope._position = None if soft.is_relative else soft.position
        scope._key = soft._key
        soft.followers.append(scope)
        try:
            with scope:
                if soft.called():
                    scope.cancel(_SOFT_PASSED)
                yield scope
        finally:
            soft.followers.remove(scope)

    def clean_up(self, beats: float = 1) -> BeatScope:
        """Make a shielded scope with a budget of its own, for what must follow a cancellation.

        Use it in a ``finally`` or an ``except`` clause inside of the scope. A cancellation of the
        scope, or of any scope around it, does not reach the block. The block ends quietly after
        ``beats``. Not a checkpoint; neither is entering or leaving it.

        Args:
          beats: the number of beats, 0 or more.

        Raises:
          TypeError: if ``beats`` is not a number.
          ValueError: if ``beats`` is negative, NaN or too large for a float.

        """
        return self._deadlines.scope_after(check_beats("beats", beats), shield=True)

    def _any_soft(self) -> SoftEdge:
        # An edge that never passes takes the place of one that is missing, as it can be set later.
        soft = self._soft
        if soft is None:
            self._soft = soft = SoftEdge(self._deadlines, position=math.inf)
            if self.is_relative is None:
                soft.enter(self._deadlines.axis_now())
        return soft

    def _check_soft(self) -> None:
        relative = self._relative is not None or (self._soft is not None and self._soft.is_relative)
        if relative and self.is_relative is not None:
            raise RuntimeError("unentered relative beat scope does not have an absolute soft edge")

    def cancel(self, reason: str | None = None) -> None:
        """Cancel the scope at once. A second call has no effect. Not a checkpoint.

        Args:
          reason: the reason that the resulting `trio.Cancelled` carries.

        """
        self._scope.cancel(reason)

    def _ended_text(self, budget: float) -> str:
        if self._deadlines.closed:
            return CLOSED
        beat = f"{self.deadline:.3f}".rstrip("0").rstrip(".")
        if self._position is not None:
            return f"{ENDED} at beat {beat}"
        beats = "1 beat" if budget == 1 else f"{budget:.6g} beats"
        return f"the budget of {beats} ran out at beat {beat}"

    def _left(self) -> float:
        deadlines = self._deadlines
        if self._position is None:
            return self._key - deadlines.axis_now()
        return self._position - deadlines.axis_now() - deadlines.shift

    def _is_past(self) -> bool:
        # False once the scope is cancelled or left, because then the deadline has no effect.
        deadlines = self._deadlines
        if self._scope in deadlines._entered:
            return deadlines.is_due(self._key)
        if self._position is None or self.is_relative is None or not deadlines.enforcing:
            return False
        return deadlines.is_due(self._position - deadlines.shift)

    def _end(self, reason: str) -> None:
        # The heap calls this when the scope is due, and when the session is closed.
        del self._deadlines._entered[self._scope]
        self._scope.cancel(reason)

    def _anchor(self, position: float | None) -> None:
        self._position = position

    def _leave(self) -> None:
        entry = self._deadlines._entered.pop(self._scope, None)
        if entry is not None:
            self._deadlines.drop(entry)
        if self._soft is not None:
            self._soft.leave()

    def _move(self, key: float) -> None:
        self._key = key
        # A scope has an entry while it is entered and not cancelled.
        deadlines = self._deadlines
        entry = deadlines._entered.get(self._scope)
        if entry is not None:
            deadlines.drop(entry)
            deadlines._entered[self._scope] = moved = [key, next(deadlines._order), self]
            heappush(deadlines._heap, moved)
            if key < deadlines._armed:
                deadlines._rearm()

    def __repr__(self) -> str:
        if self._relative is not None:
            state = f"{self._relative:g} beats from entry"
        else:
            state = f"deadline at beat {self.deadline:g}"
        return f"<BeatScope at {id(self):#x}, {state}, {self._scope!r}>"


if TYPE_CHECKING:

    class FailingScope(BeatScope):  # type: ignore[misc]
        """A scope that raises an error if it has cancelled its block, as type checkers see it.

        A block of another scope may be cut and end quietly. So a function that returns a value only
        inside of such a block may return None, and type checkers report that. Here they must not.
        """

        def __exit__(
            self,
            exc_type: type[BaseException] | None,
            exc: BaseException | None,
            traceback: TracebackType | None,
        ) -> Literal[False]: ...

else:
    FailingScope = BeatScope


class Bounds(NamedTuple):
    """What bounds a task: the nearest of each kind."""

    beat: float
    """The position of the nearest deadline in beats; ``inf`` for none."""
    soft: float
    """The position of the nearest soft edge, past or not; ``inf`` for none."""
    seconds: float
    """The nearest deadline in seconds, on Trio's clock; ``inf`` for none, and ``-inf`` if the task
    is cancelled already."""


@final
class Deadlines(BeatHeap):
    """The scopes that wait for their deadline, ordered by it.

    Args:
      grid: the grid that gives the position.
      rearm: called if a new deadline comes before the instant that `arm` has returned.
      enforcing: whether scopes are cancelled at their deadlines.

    """

    def __init__(self, grid: Grid, rearm: Callable[[], None], *, enforcing: bool) -> None:
        super().__init__(grid, rearm, enforcing=enforcing)
        # The entries of the scopes that are entered and were not cancelled at their deadlines.
        self._entered: dict[CancelScope, Entry] = {}
        self._take = self._entered.pop

    @property
    def live(self) -> int:
        """The number of scopes that wait for their deadline."""
        return len(self._entered)

    # Making.

    def scope_after(
        self,
        beats: float,
        shield: bool = False,
        fail: bool = False,
        soft: float | None = None,
    ) -> BeatScope:
        """Make a scope that ends some beats after it is entered.

        Args:
          beats: the number of beats, 0 or more; ``inf`` for no limit.
          shield: whether cancellations from outside do not reach the block.
          fail: whether leaving the scope raises `BeatBudgetExceeded` if the scope has caught its
            own cancellation.
          soft: how many beats after the entry its soft edge is; None for no soft edge.

        Raises:
          TypeError: if ``soft`` is not a number.
          ValueError: if ``beats`` is an int that is too large for a float, or if ``soft`` is
            negative, NaN, or more than ``beats``.

        """
        scope = _new_scope(BeatScope)
        scope._deadlines = self
        scope._scope = CancelScope(shield=True) if shield else CancelScope()
        if beats <= _MAX:
            scope._relative = beats
            scope._position = None
        else:
            # `beats` is infinite, or an int that is too large for a float and is refused here.
            scope._relative = None
            scope._position = check_beats("beats", beats)
        scope._budget = beats if fail else None
        if soft is None:
            scope._soft = None
        else:
            soft = check_beats("soft_after", soft)
            if soft > beats:
                raise ValueError(
                    f"`soft_after` must not be later than the deadline: {soft:g} beats"
                )
            scope._soft = SoftEdge(self, beats=soft)
        return scope

    def scope_at(
        self,
        position: float,
        shield: bool = False,
        fail: bool = False,
        soft: float | None = None,
    ) -> BeatScope:
        """Make a scope that ends at a position of the grid; otherwise as `scope_after` does.

        Args:
          position: the position, in beats.
          shield: as for `scope_after`.
          fail: as for `scope_after`.
          soft: the position of its soft edge; None for no soft edge.

        Raises:
          TypeError: if ``soft`` is not a number.
          ValueError: if ``soft`` is NaN, or later than ``position``.

        """
        scope = self.scope_after(0, shield, fail)
        scope._relative, scope._position = None, position
        if fail:
            scope._budget = math.inf
        if soft is not None:
            soft = check_position("soft_at", soft)
            if soft > position:
                raise ValueError(f"`soft_at` must not be later than the deadline: beat {soft:g}")
            scope._soft = SoftEdge(self, position=soft)
        return scope

    def soften(
        self, scope: BeatScope, *, beats: float = math.inf, position: float | None = None
    ) -> SoftEdge:
        """Give a scope that is not entered yet a soft edge, whatever its deadline is."""
        scope._soft = edge = SoftEdge(self, beats=beats, position=position)
        return edge

    def is_waiting(self, scope: BeatScope) -> bool:
        """Return whether a scope is entered, and was not cancelled at its deadline."""
        return scope._scope in self._entered

    def effective_deadline(self) -> float:
        """Return the position at which the current task will be cancelled, by the present grid."""
        seconds, scopes = self._enclosing()
        first = min(scopes, key=_key_of, default=None)
        if first is not None and seconds_at(self._grid, first.deadline) <= seconds:
            return first.deadline
        if abs(seconds) >= _FAR:
            return math.copysign(math.inf, seconds)
        return self._grid.position_at(round(seconds * 1e9))

    def bounds(self) -> Bounds:
        """Return what bounds the current task, in beats and in seconds."""
        seconds, entries = find_enclosing(self._entered)
        beat = soft = first = math.inf
        for key, _, scope in entries:
            if key < first:
                first, position = key, scope._position
                beat = key + self.shift if position is None else position
            if scope._soft is not None:
                soft = min(soft, scope._soft.position)
        return Bounds(beat, soft, seconds)

    def soft_edges(self) -> list[SoftEdge]:
        """Return the soft edges of the scopes that can cancel the current task."""
        return [scope._soft for scope in self._enclosing()[1] if scope._soft is not None]

    def _enclosing(self) -> tuple[float, list[BeatScope]]:
        seconds, entries = find_enclosing(self._entered)
        return seconds, [entry[2] for entry in entries]


def _key_of(scope: BeatScope) -> float:
    return scope._key
