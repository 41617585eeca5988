"""The heap that orders deadlines by beat.

The key of a deadline in the heap is its place on an axis in beats: the position minus a shift. When
the position moves to another grid, the shift changes by as much. A change of tempo, a slew or a
move to another grid leaves the key of every relative deadline as it is. So one heap and one armed
Trio timer serve any number of scopes.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable
from heapq import heapify, heappop, heappush
from typing import Any, Final, Protocol, TypeAlias, final

import trio

from .._errors import SessionClosed
from .._grid.grid import Grid
from .._grid.timeline import NEVER
from .local import local_ns, seconds_of

ENDED: Final = "the beat budget ran out"
CLOSED: Final = "the session was closed"
"""The reasons of cancellations."""

# How many scopes are cancelled at once while Trio expires its deadlines; more would block the loop.
_AT_ONCE: Final = 1000

Entry: TypeAlias = list[Any]
"""An entry of the heap: the key, a unique number and the member. The member becomes None when it
leaves, so that the heap does not keep it alive."""


class Member(Protocol):
    """What the heap orders: a scope, or the soft edge of one."""

    _key: float
    """The deadline on the axis."""
    _position: float | None
    """The deadline as a position if it is absolute; None if it is relative."""

    def _end(self, reason: str) -> None:
        """React to the deadline, or to the end of the session. The entry is out of the heap."""

    def _anchor(self, position: float | None) -> None:
        """Make it absolute, or relative if ``position`` is None. Call it before a rebase only."""


@final
class Anchor:
    """A deadline that is a beat of one grid, and counts what was left while that grid is away.

    Args:
      member: what waits for the deadline.
      home: the identity of that grid.
      beat: the position of the deadline on that grid, in beats.
      is_home: whether the present grid is that one. If so, the member is absolute.
      key: the key that the member had when it was entered.

    """

    __slots__ = ("_beat", "_home", "_is_home", "_key", "_member")

    def __init__(
        self, member: Member, home: str, beat: float, *, is_home: bool, key: float
    ) -> None:
        self._member = member
        self._home = home
        self._beat = beat
        self._is_home = is_home
        self._key = key

    def settle(self, here: str) -> None:
        """Follow the move to another grid; `BeatHeap.before_rebase` calls this.

        A deadline that somebody has moved in the meantime stays where it is.

        Args:
          here: the identity of the grid to which the position is about to move.

        """
        member, to_home = self._member, here == self._home
        if self._is_home:
            if member._position == self._beat and not to_home:
                self._key, self._is_home = member._key, False
                member._anchor(None)
        elif member._position is None and member._key == self._key and to_home:
            self._is_home = True
            member._anchor(self._beat)


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


class BeatHeap:
    """Members that wait for their deadlines, ordered by them.

    Args:
      grid: the grid that gives the position.
      rearm: called if a new deadline comes before the instant that `arm` has returned.
      enforcing: whether deadlines have any effect.

    """

    def __init__(self, grid: Grid, rearm: Callable[[], None], *, enforcing: bool) -> None:
        self.closed: bool = False
        self._grid = grid
        self._rearm = rearm
        self.enforcing: bool = enforcing
        self.shift: float = 0.0
        self.before_rebase: Callable[[], None] | None = None
        """Called when the position is about to move to another grid, while keys are still those of
        the present one. `Anchor.settle` may be called then."""
        self.calls: deque[Callable[[], object]] = deque()
        """What `run_calls` will call."""
        self._heap: list[Entry] = []
        self._time = trio.lowlevel.current_clock().current_time
        self._order = itertools.count()
        self._prune_at = 1000
        self._armed = math.inf
        self.redraw()

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
        first, edge = self._first(), index - self.shift
        self._armed = min(first, edge)
        if first <= self.axis_now():
            # The deadline may be so long past that Trio's clock has no number for it.
            return -math.inf
        if first < edge:
            due = min(due, self._due_ns(first))
        return seconds_of(due)

    def expire(self, now_ns: int) -> bool:
        """Cancel scopes that are due at a local time, and return whether more may be due."""
        if self._first() == math.inf:
            return False
        limit = self._grid.position_at(now_ns) - self.shift
        for _ in range(_AT_ONCE):
            key = self._first()
            if key > limit and (key == math.inf or self._due_ns(key) > now_ns):
                return False
            heappop(self._heap)[2]._end(ENDED)
        return True

    def run_calls(self) -> None:
        """Call what the members that have ended want called by a task.

        They end while Trio expires its deadlines, where foreign code must not run.
        """
        while self.calls:
            self.calls.popleft()()

    def rebase(self, beats: float) -> None:
        """Follow the move of the position to another grid by some beats.

        Relative deadlines keep the beats that are left, so their keys stay the same. Absolute
        deadlines keep their position, so their keys change.
        """
        if self.before_rebase is not None:
            self.before_rebase()
        self.shift += beats
        for entry in self._heap:
            member = entry[2]
            if member is not None and member._position is not None:
                entry[0] = member._key = member._position - self.shift
        self._prune()

    def close(self) -> None:
        """Cancel the scopes that are still open. Entering another one raises `SessionClosed`."""
        self.closed = True
        self._line_until = -math.inf
        for entry in self._heap:
            if entry[2] is not None:
                entry[2]._end(CLOSED)
        self._heap.clear()

    # The heap.

    def _due_ns(self, key: float) -> int:
        return self._grid.local_at(key + self.shift)

    def is_due(self, key: float) -> bool:
        """Return whether a key is past."""
        return key != math.inf and (key == -math.inf or self._due_ns(key) <= local_ns())

    def push(self, key: float, member: Member) -> Entry:
        """Add an entry to the heap, and return it."""
        entry: Entry = [key, next(self._order), member]
        heappush(self._heap, entry)
        if key < self._armed:
            self._rearm()
        return entry

    def drop(self, entry: Entry) -> None:
        """Remove an entry from the heap."""
        entry[2] = None
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
            self._line_beat = max(grid.floor, position) - self.shift
        elif now < steering.settled_ns or steering.frequency:
            self._line_base = now / 1e9
            self._line_beat_s = 60_000 / segment.milli_bpm / steering.rate_at(now)
            self._line_beat = position - self.shift
        else:
            # The line begins with the segment, so that whole beats are computed exactly.
            self._line_base = (segment.t0_ns - steering.target_at(now)) / 1e9
            self._line_beat_s = 60_000 / segment.milli_bpm
            self._line_beat = segment.beat0 - self.shift
        self._line_until = min(until) / 1e9 if until else math.inf
        if self.closed:
            self._line_until = -math.inf

    def position(self) -> float:
        """Return the present position by the line, which takes less time than by the grid."""
        now = self._time()
        if now >= self._line_until:
            self._check_line()
        return (now - self._line_base) / self._line_beat_s + self._line_beat + self.shift

    def _check_line(self) -> None:
        if self.closed:
            raise SessionClosed("the session has been closed")
        self.redraw()

    def axis_now(self) -> float:
        """Return the present position on the axis."""
        return self._grid.position_at(local_ns()) - self.shift
