"""Cancel scopes whose deadline is a beat, and the heap that orders them.

The key of a scope in the heap is its deadline on an axis in beats: the position minus a shift. When
the position moves to another grid, the shift changes by as much. A change of tempo, a slew or a
move to another grid leaves the key of every relative deadline as it is. So one heap and one armed
Trio timer serve any number of scopes.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable
from heapq import heapify, heappop, heappush
from types import TracebackType
from typing import Any, Final, TypeAlias, final

import trio
from trio import CancelScope
from trio.lowlevel import current_task

from .._checks import check_beats, check_position
from .._errors import BeatBudgetExceeded, SessionClosed
from .._grid.grid import Grid
from .._grid.timeline import NEVER
from .local import local_ns, seconds_of

# The largest finite number of beats.
_MAX: Final = sys.float_info.max
# How many scopes are cancelled at once while Trio expires its deadlines; more would block the loop.
_AT_ONCE: Final = 1000
_ENDED: Final = "the beat budget ran out"
_CLOSED: Final = "the session was closed"
# Seconds of Trio's clock that are later than any instant of local time.
_FAR: Final = NEVER / 1e9

# `BeatScope.__init__` refuses calls, because the methods of a session make the scopes.
_new_scope: Final[Callable[[type[BeatScope]], BeatScope]] = object.__new__

# An entry of the heap: the key, a unique number, the scope, and the task that entered it. The last
# two become None when the scope is left, so that the heap does not keep the objects alive.
_Entry: TypeAlias = list[Any]


def seconds_at(grid: Grid, position: float) -> float:
    """Return when a position will be reached by the present grid, in seconds of Trio's clock.

    It is ``inf`` for a position that the grid does not reach.
    """
    if math.isinf(position):
        return position
    reached = grid.local_at(position)
    if abs(reached) >= NEVER:
        return math.inf if reached > 0 else -math.inf
    return seconds_of(reached)


@final
class BeatScope:
    """A cancel scope whose deadline is a position of the grid.

    Use it like `trio.CancelScope`, with beats instead of seconds. The methods of a session make it:
    `Session.move_on_after`, `Session.move_on_at`, `Session.fail_after` and `Session.fail_at`.

    A deadline is either relative or absolute. A relative deadline counts beats from the entry, or
    from the moment at which `relative_deadline` was set. If the position moves to another grid, the
    beats that are left stay the same. An absolute deadline is a position, which was given to
    `move_on_at` or `fail_at`, or by setting `deadline`. It names a beat of the cluster, and stays
    the same on another grid.

    It differs from Trio's scopes in three ways. The class cannot be subclassed or called. The texts
    of errors and of ``repr`` are different. And `trio.current_effective_deadline` does not see
    deadlines in beats; `Session.current_effective_deadline` sees both kinds.
    """

    # Scopes are entered and left very often, so these two methods make as few calls as possible.
    __slots__ = (
        "__weakref__",
        "_deadlines",
        "_entry",
        "_fail",
        "_key",
        "_position",
        "_relative",
        "_scope",
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
    _fail: bool
    _entry: _Entry | None

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
            key = self._position - deadlines._shift
        else:
            # The scope was entered before. Trio raises an error for that below.
            key = self._key
        self._scope.__enter__()
        # From here on nothing may raise, or the scope would stay entered.
        self._key = key
        self._relative = None
        if not deadlines._enforcing:
            pass
        elif key > now:
            self._entry = entry = [key, next(deadlines._order), self, current_task()]
            heappush(deadlines._heap, entry)
            if key < deadlines._armed:
                deadlines._rearm()
        else:
            self._scope.cancel(_ENDED)
        return self

    @trio.lowlevel.enable_ki_protection
    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        try:
            handled = self._scope.__exit__(exc_type, exc, traceback)
        except BaseException as error:
            entry = self._entry
            # If an unrelated task tries to leave the scope, Trio refuses and the scope stays
            # entered.
            if entry is not None and not (
                isinstance(error, RuntimeError) and entry[3] is not current_task()
            ):
                self._entry = None
                self._deadlines._drop(entry)
            raise
        entry = self._entry
        if entry is not None:
            self._entry = None
            deadlines = self._deadlines
            heap = deadlines._heap
            if heap[-1] is entry:
                heap.pop()
            else:
                deadlines._drop(entry)
        if self._fail and self._scope.cancelled_caught:
            raise BeatBudgetExceeded(
                _CLOSED if self._deadlines.closed else f"{_ENDED} at beat {self.deadline:g}"
            ) from None
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
        return self._key + self._deadlines._shift

    @deadline.setter
    def deadline(self, position: float) -> None:
        position = check_position("deadline", position)
        if self._relative is not None:
            raise RuntimeError("unentered relative beat scope does not have an absolute deadline")
        self._position = position
        self._move(position - self._deadlines._shift)

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
        if self.is_relative is None:
            self._position = None
            self._move(self._deadlines._axis_now() + beats)
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
            self._scope.cancel(_ENDED)
        return self._scope.cancel_called

    @property
    def cancelled_caught(self) -> bool:
        """Whether this scope caught a `trio.Cancelled` of its own when it was left."""
        return self._scope.cancelled_caught

    def cancel(self, reason: str | None = None) -> None:
        """Cancel the scope at once. A second call has no effect. Not a checkpoint.

        Args:
          reason: the reason that the resulting `trio.Cancelled` carries.

        """
        self._scope.cancel(reason)

    def _left(self) -> float:
        deadlines = self._deadlines
        if self._position is None:
            return self._key - deadlines._axis_now()
        return self._position - deadlines._axis_now() - deadlines._shift

    def _is_past(self) -> bool:
        # False once the scope is cancelled or left, because then the deadline has no effect.
        deadlines = self._deadlines
        if self._entry is not None:
            return deadlines._due(self._key)
        if self._position is None or self.is_relative is None or not deadlines._enforcing:
            return False
        return deadlines._due(self._position - deadlines._shift)

    def _move(self, key: float) -> None:
        self._key = key
        # A scope has an entry while it is entered and not cancelled.
        entry = self._entry
        if entry is not None:
            deadlines = self._deadlines
            self._entry = moved = [key, next(deadlines._order), self, entry[3]]
            heappush(deadlines._heap, moved)
            deadlines._drop(entry)
            if key < deadlines._armed:
                deadlines._rearm()

    def __repr__(self) -> str:
        if self._relative is not None:
            state = f"{self._relative:g} beats from entry"
        else:
            state = f"deadline at beat {self.deadline:g}"
        return f"<BeatScope at {id(self):#x}, {state}, {self._scope!r}>"


@final
class Deadlines:
    """The scopes that wait for their deadline, ordered by it.

    Args:
      grid: the grid that gives the position.
      rearm: called if a new deadline comes before the instant that `arm` has returned.
      enforcing: whether scopes are cancelled at their deadlines.

    """

    def __init__(self, grid: Grid, rearm: Callable[[], None], *, enforcing: bool) -> None:
        self.closed: bool = False
        self._grid = grid
        self._rearm = rearm
        self._enforcing = enforcing
        self._shift = 0.0
        self._heap: list[_Entry] = []
        self._time = trio.lowlevel.current_clock().current_time
        self._order = itertools.count()
        self._prune_at = 1000
        self._armed = math.inf
        self.redraw()

    @property
    def live(self) -> int:
        """The number of scopes that wait for their deadline."""
        return sum(entry[2] is not None for entry in self._heap)

    # Making.

    def scope_after(self, beats: float, shield: bool = False, fail: bool = False) -> BeatScope:
        """Make a scope that ends some beats after it is entered.

        Args:
          beats: the number of beats, 0 or more; ``inf`` for no limit.
          shield: whether cancellations from outside do not reach the block.
          fail: whether leaving the scope raises `BeatBudgetExceeded` if the scope has caught its
            own cancellation.

        Raises:
          ValueError: if ``beats`` is an int that is too large for a float.

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
        scope._fail = fail
        scope._entry = None
        return scope

    def scope_at(self, position: float, shield: bool = False, fail: bool = False) -> BeatScope:
        """Make a scope that ends at a position of the grid; otherwise as `scope_after` does."""
        scope = self.scope_after(math.inf, shield=shield, fail=fail)
        scope._position = position
        return scope

    # Ending.

    def arm(self, index: int, due: int) -> float:
        """Return when a beat or the first deadline is due, whichever comes first.

        The result holds until `rearm` is called.

        Args:
          index: the index of the beat.
          due: the local time, in nanoseconds, at which it begins.

        Returns:
          Seconds of Trio's clock.

        """
        first, edge = self._first(), index - self._shift
        self._armed = min(first, edge)
        if first <= self._axis_now():
            # The deadline may be so long past that Trio's clock has no number for it.
            return -math.inf
        if first < edge:
            due = min(due, self._due_ns(first))
        return seconds_of(due)

    def expire(self, now_ns: int) -> bool:
        """Cancel scopes that are due at a local time, and return whether more may be due."""
        if self._first() == math.inf:
            return False
        limit = self._grid.position_at(now_ns) - self._shift
        for _ in range(_AT_ONCE):
            key = self._first()
            if key > limit and (key == math.inf or self._due_ns(key) > now_ns):
                return False
            scope = heappop(self._heap)[2]
            scope._entry = None
            scope._scope.cancel(_ENDED)
        return True

    def rebase(self, beats: float) -> None:
        """Follow the move of the position to another grid by some beats.

        Relative deadlines keep the beats that are left, so their keys stay the same. Absolute
        deadlines keep their position, so their keys change.
        """
        self._shift += beats
        for entry in self._heap:
            scope = entry[2]
            if scope is not None and scope._position is not None:
                entry[0] = scope._key = scope._position - self._shift
        self._prune()

    def close(self) -> None:
        """Cancel the scopes that are still open. Entering another one raises `SessionClosed`."""
        self.closed = True
        self._line_until = -math.inf
        for entry in self._heap:
            scope = entry[2]
            if scope is not None:
                scope._entry = None
                scope._scope.cancel(_CLOSED)
        self._heap.clear()

    def effective_deadline(self) -> float:
        """Return the position at which the current task will be cancelled, by the present grid."""
        # Only Trio knows which scopes enclose the task and which of them shield it. So the scopes
        # that may enclose it get a deadline in seconds while Trio computes the answer.
        ancestors = set()
        task: trio.lowlevel.Task | None = current_task()
        while task is not None:
            ancestors.add(task)
            task = None if task.parent_nursery is None else task.parent_nursery.parent_task
        entries = sorted(
            entry for entry in self._heap if entry[0] != math.inf and entry[3] in ancestors
        )
        # Deadlines that the present grid does not reach have no instant, but keep their order.
        asked: list[tuple[BeatScope, float]] = [
            (entry[2], min(seconds_at(self._grid, entry[2].deadline), _FAR + number))
            for number, entry in enumerate(entries)
        ]
        try:
            for scope, seconds in asked:
                scope._scope.deadline = seconds
            answer = trio.current_effective_deadline()
        finally:
            for scope, _ in asked:
                scope._scope.deadline = math.inf
        for scope, seconds in asked:
            if seconds == answer:
                return scope.deadline
        if abs(answer) >= _FAR:
            return math.copysign(math.inf, answer)
        return self._grid.position_at(round(answer * 1e9))

    # The heap.

    def _due_ns(self, key: float) -> int:
        return self._grid.local_at(key + self._shift)

    def _due(self, key: float) -> bool:
        return key != math.inf and (key == -math.inf or self._due_ns(key) <= local_ns())

    def _drop(self, entry: _Entry) -> None:
        entry[2] = entry[3] = None
        if len(self._heap) > self._prune_at:
            self._prune()

    def _prune(self) -> None:
        # Change the list in place: a task that is entering or leaving a scope may hold it.
        heap = self._heap
        heap[:] = [entry for entry in heap if entry[2] is not None]
        heapify(heap)
        self._prune_at = 1000 + 2 * len(heap)

    def _first(self) -> float:
        heap = self._heap
        while heap and heap[0][2] is None:
            heappop(heap)
        key: float = heap[0][0] if heap else math.inf
        return key

    # The axis. Every entry of a scope computes the position on it. So the present straight line of
    # the grid is kept in three numbers, with the local time until which it is valid: until the next
    # segment, the end of slewing or the end of a hold. It is never valid after `close`.

    def redraw(self) -> None:
        """Compute the line again, because the grid has changed."""
        now, grid = local_ns(), self._grid
        steering, timeline = grid.steering, grid.timeline
        cluster = steering.cluster_at(now)
        segment, position = timeline.segment_at(cluster), timeline.position_at(cluster)
        ends = [other.t0_ns for other in timeline.segments if other.t0_ns > segment.t0_ns]
        until = [steering.local_at(min(ends))] if ends else []
        if now < steering.settled_ns:
            until.append(steering.settled_ns)
        behind = position < grid.floor
        if behind and (reached := grid.held_until()) != NEVER:
            until.append(reached)
        if behind or not segment.milli_bpm:
            self._line_base, self._line_beat_s = 0.0, math.inf
            self._line_beat = max(grid.floor, position) - self._shift
        elif now < steering.settled_ns or steering.frequency:
            self._line_base = now / 1e9
            self._line_beat_s = 60_000 / segment.milli_bpm / steering.rate_at(now)
            self._line_beat = position - self._shift
        else:
            # The line begins with the segment, so that whole beats are computed exactly.
            self._line_base = (segment.t0_ns - steering.target_at(now)) / 1e9
            self._line_beat_s = 60_000 / segment.milli_bpm
            self._line_beat = segment.beat0 - self._shift
        self._line_until = min(until) / 1e9 if until else math.inf
        if self.closed:
            self._line_until = -math.inf

    def _check_line(self) -> None:
        if self.closed:
            raise SessionClosed("the session has been closed")
        self.redraw()

    def _axis_now(self) -> float:
        return self._grid.position_at(local_ns()) - self._shift
