"""The beat clock that tasks wait on, and the cancel scopes whose deadline is a beat.

Scopes are ordered on an axis of the clock's own, in beats: the position less a shift that changes
only when the position moves to another grid. A change of tempo, a slew or a change of grid leaves
every key on the axis as it is, so one heap and one armed Trio timer serve any number of scopes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from heapq import heapify, heappop, heappush
from types import TracebackType
from typing import Final, NoReturn, TypeAlias, final

import trio
from msgspec import Struct
from trio import CancelScope, current_time
from trio.lowlevel import Task, current_task

from .._checks import check_beats, check_position
from .._errors import BeatBudgetExceeded, SessionClosed
from .._grid.grid import Grid
from .._grid.punctuality import Punctuality, is_late
from .._grid.steering import Steering
from .._grid.timeline import NEVER, Timeline, beat_ns
from .._wire import BeatPhase, Segment, beat_phase, window_id
from .local import local_ns, seconds_of

# How many scopes end in one go while Trio expires its deadlines; more would hold up the loop.
_AT_ONCE: Final = 1000
# Trio's timers are late by a millisecond or so: what must not be is waited for in checkpoints.
_NEAR_NS: Final = 2_000_000
# Whatever else falls due on a beat runs in the same turn of Trio's loop, and at times first: so the
# last part of the wait is no checkpoint at all.
_SPIN_NS: Final = 100_000
# Nor is it for ever, where Trio's clock is slow: on a real one this many looks take longer.
_SPINS: Final = 2000
_ENDED: Final = "the beat budget ran out"
_CLOSED: Final = "the session was closed"

# The constructor of the scopes, which are made by the methods of a session.
new_scope: Final[Callable[[type[BeatScope]], BeatScope]] = object.__new__


# A scope's place in the heap, for as long as its own `_entry` is this very object; its task is who
# entered it.
_Entry: TypeAlias = "tuple[float, int, BeatScope, Task]"


class Beat(Struct, frozen=True):
    """One beat, as the iterators of a session give it."""

    index: int
    """The beat's index: sequential over the life of the cluster."""
    downbeat: bool
    """Whether it is the first of its bar."""
    phase: BeatPhase
    """``"downbeat"`` or ``"upbeat"``."""
    tempo_bpm: float
    """Beats per minute in force."""
    window_id: str
    """The name of its bar."""
    skipped: int
    """How many the consumer missed since the last one it got, because it was busy."""


@final
class BeatScope:
    """A cancel scope whose deadline is a position of the grid.

    It is used as `trio.CancelScope` is, and behaves as that does, with beats in the place of
    seconds. It is made by the methods of a session.
    """

    # Entering and leaving happens as often as with Trio's own scopes, so the two methods call as
    # little as they can.
    __slots__ = ("__weakref__", "_clock", "_entry", "_fail", "_key", "_relative", "_scope")

    _clock: BeatClock
    _scope: trio.CancelScope
    _key: float
    _relative: float | None
    _fail: bool
    _entry: _Entry | None

    def __init__(self) -> None:
        raise TypeError("beat scopes are made by the methods of a session")

    @trio.lowlevel.enable_ki_protection
    def __enter__(self) -> BeatScope:
        clock = self._clock
        now = clock._time()
        if now >= clock._line_until:
            clock._check_line()
        now = (now - clock._line_base) / clock._line_beat_s + clock._line_beat
        self._scope.__enter__()
        relative = self._relative
        if relative is None:
            key = self._key
        else:
            key = self._key = now + relative
            self._relative = None
        if not clock._enforcing:
            pass
        elif key > now:
            self._entry = entry = (key, next(clock._order), self, current_task())
            heappush(clock._heap, entry)
            if key < clock._armed:
                clock._arm()
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
        entry = self._entry
        if entry is not None:
            self._entry = None
            clock = self._clock
            heap = clock._heap
            if heap[-1] is entry:
                heap.pop()
            elif len(heap) > clock._prune_at:
                clock._prune()
        if not self._fail:
            return self._scope.__exit__(exc_type, exc, traceback)
        handled = self._scope.__exit__(exc_type, exc, traceback)
        if self._scope.cancelled_caught:
            clock = self._clock
            raise BeatBudgetExceeded(
                _CLOSED if clock.closed else f"{_ENDED} at beat {self._key + clock._shift:g}"
            ) from None
        return handled

    @property
    def deadline(self) -> float:
        """The position, in beats, at which the scope is cancelled; settable, ``inf`` for never.

        Raises:
          RuntimeError: where the scope was made with a relative deadline and is not yet entered.
          ValueError: for NaN.

        """
        if self._relative is not None:
            raise RuntimeError("unentered relative beat scope does not have an absolute deadline")
        return self._key + self._clock._shift

    @deadline.setter
    def deadline(self, position: float) -> None:
        check_position("deadline", position)
        if self._relative is not None:
            raise RuntimeError("unentered relative beat scope does not have an absolute deadline")
        self._move(position - self._clock._shift)

    @property
    def relative_deadline(self) -> float:
        """The beats that remain until the deadline, negative once it is past; settable.

        Before entering it is what the deadline will be set to, counted from the entry.

        Raises:
          RuntimeError: where the scope was made with an absolute deadline and is not yet entered.
          ValueError: for NaN and for a negative value.

        """
        if self._relative is not None:
            return self._relative
        if self.is_relative is False and self._key != math.inf:
            raise RuntimeError("unentered absolute beat scope does not have a relative deadline")
        return self._key - self._clock._axis_now()

    @relative_deadline.setter
    def relative_deadline(self, beats: float) -> None:
        check_beats("relative_deadline", beats)
        if self._relative is None and self.is_relative is None:
            self._move(self._clock._axis_now() + beats)
        elif self._relative is None and self._key != math.inf:
            raise RuntimeError("unentered absolute beat scope does not have a relative deadline")
        else:
            self._relative = beats

    @property
    def is_relative(self) -> bool | None:
        """Whether the deadline counts from the entry; None once the scope was entered."""
        if self._scope.is_relative is None:
            return None
        return self._relative is not None

    @property
    def beats_left(self) -> float:
        """The beats that remain until the deadline; 0.0 once it is past, ``inf`` without one."""
        if self._relative is not None:
            return self._relative
        return max(0.0, self._key - self._clock._axis_now())

    @property
    def shield(self) -> bool:
        """Whether cancellations from outside are kept out; settable."""
        return self._scope.shield

    @shield.setter
    def shield(self, shield: bool) -> None:
        self._scope.shield = shield

    @property
    def cancel_called(self) -> bool:
        """Whether cancellation was requested, by `cancel` or because the deadline has passed."""
        if (
            not self._scope.cancel_called
            and self._entry is not None
            and self._clock._due(self._key)
        ):
            self._scope.cancel(_ENDED)
        return self._scope.cancel_called

    @property
    def cancelled_caught(self) -> bool:
        """Whether this scope caught a `trio.Cancelled` of its own when it was left."""
        return self._scope.cancelled_caught

    def cancel(self, reason: str | None = None) -> None:
        """Cancel the scope at once. Not a checkpoint; doing it again changes nothing.

        Args:
          reason: attached to the `trio.Cancelled` that results.

        """
        self._scope.cancel(reason)

    def _move(self, key: float) -> None:
        self._key = key
        clock = self._clock
        # A scope that is running has an entry, until it is cancelled.
        entry = self._entry
        if entry is not None:
            self._entry = entry = (key, next(clock._order), self, entry[3])
            heappush(clock._heap, entry)
            if key < clock._armed:
                clock._arm()

    def __repr__(self) -> str:
        if self._relative is not None:
            state = f"{self._relative:g} beats from entry"
        else:
            state = f"deadline at beat {self._key + self._clock._shift:g}"
        return f"<BeatScope at {id(self):#x}, {state}, {self._scope!r}>"


@final
class Beats:
    """An async iterator of beats, or of downbeats, with no queue behind it.

    However slow its consumer is, it costs the others nothing: the next `Beat` is the newest, and
    its ``skipped`` tells how many were missed. Each step is a checkpoint.

    Raises:
      SessionClosed: when the session is closed.

    """

    __slots__ = ("_bars", "_clock", "_last", "_precise")

    def __init__(self, clock: BeatClock, *, bars: bool, precise: bool = False) -> None:
        self._clock = clock
        self._bars = bars
        self._precise = precise
        self._last = clock.index() - clock._index_shift

    def __aiter__(self) -> Beats:
        return self

    async def __anext__(self) -> Beat:
        clock = self._clock
        await trio.lowlevel.checkpoint_if_cancelled()
        waited = False
        while True:
            if clock.closed:
                clock.raise_closed()
            index = clock.index()
            step = clock.grid.beats_per_bar if self._bars else 1
            newest = index - index % step
            if newest - clock._index_shift > self._last:
                break
            waited = True
            if self._precise:
                await clock.near_edge()
            else:
                await clock._lot.park()
        if not waited:
            await trio.lowlevel.cancel_shielded_checkpoint()
        last = self._last + clock._index_shift
        self._last = newest - clock._index_shift
        return clock.beat(newest, skipped=newest // step - last // step - 1)


@final
class BeatClock:
    """The grid as the tasks of this run see it: the timer that follows it, and who waits for it."""

    def __init__(self, grid: Grid, *, enforcing: bool = True) -> None:
        self.grid: Grid = grid
        self.closed: bool = False
        self.punctuality: Punctuality = Punctuality()
        self.on_rebase: Callable[[int], None] = lambda beats: None
        self._enforcing = enforcing
        self._shift = 0.0
        self._index_shift = 0
        self._heap: list[_Entry] = []
        self._time = trio.lowlevel.current_clock().current_time
        self._order = itertools.count()
        self._prune_at = 1000
        self._timer: trio.CancelScope | None = None
        self._armed = math.inf
        self._lot = trio.lowlevel.ParkingLot()
        self._next_index = self.index() + 1
        grid.on_rebase, grid.on_change = self._rebased, self._changed
        self._redraw()

    @classmethod
    def local(cls, milli: int, beats_per_bar: int, *, enforcing: bool = True) -> BeatClock:
        """Make a clock on a grid of its own, that begins now with beat 0."""
        timeline = Timeline((Segment(0, 0, 0, 0, milli),))
        return cls(Grid(timeline, Steering(-local_ns()), beats_per_bar), enforcing=enforcing)

    # Reading.

    def cluster_ns(self) -> int:
        """Return the present cluster time."""
        return self.grid.cluster_at(local_ns())

    def index(self) -> int:
        """Return the index of the present beat."""
        return self.grid.index_at(local_ns())

    def position(self) -> float:
        """Return the present position in beats."""
        return self.grid.position_at(local_ns())

    def segment(self) -> Segment:
        """Return the segment in force."""
        return self.grid.segment_at(local_ns())

    def deadline_of(self, position: float) -> float:
        """Return when a position will be reached, in seconds of Trio's clock, as things stand."""
        if math.isinf(position):
            return position
        reached = self.grid.local_at(position)
        return math.inf if reached == NEVER else reached / 1e9

    def beat(self, index: int, *, skipped: int = 0) -> Beat:
        """Describe a beat."""
        bar, timeline = self.grid.beats_per_bar, self.grid.timeline
        # Of that beat, also where the next one has begun by now.
        begun = min(timeline.time_of(index), self.cluster_ns())
        return Beat(
            index=index,
            downbeat=index % bar == 0,
            phase=beat_phase(index, bar),
            tempo_bpm=timeline.segment_at(begun).milli_bpm / 1000,
            window_id=window_id(index, bar),
            skipped=skipped,
        )

    @property
    def live_scopes(self) -> int:
        """How many scopes wait for their deadline."""
        return sum(entry[2]._entry is entry for entry in self._heap)

    def raise_closed(self) -> NoReturn:
        """Raise the error of a session that was left."""
        raise SessionClosed("the session has been closed")

    # Making.

    def scope(self, beats: float | None, at: float, shield: bool, fail: bool) -> BeatScope:
        """Make a scope that ends after some beats from its entry, or at a position."""
        scope = new_scope(BeatScope)
        scope._clock = self
        scope._scope = CancelScope(shield=True) if shield else CancelScope()
        scope._key = at - self._shift
        scope._relative = beats
        scope._fail = fail
        scope._entry = None
        return scope

    async def sleep_until(self, position: float) -> None:
        """Wait until a position is reached; always a checkpoint."""
        with self.scope(None, position, False, False) as scope:
            if not self._enforcing:
                await self._sleep_inert(scope)
            else:
                await trio.sleep_forever()
        if self.closed:
            self.raise_closed()

    async def sleep(self, beats: float) -> None:
        """Wait for some beats; always a checkpoint."""
        await self.sleep_until(self.position() + beats)

    async def _sleep_inert(self, scope: BeatScope) -> None:
        # Nothing is enforced in an inert session, but what sleeps must wake.
        await trio.sleep_until(self.deadline_of(scope.deadline))

    # Moving.

    def _rebased(self, beats: float, index: int) -> None:
        # Deadlines keep the beats they have left.
        self._shift += beats
        self._index_shift += index
        self._next_index = self.index() + 1
        self.on_rebase(index)

    def _changed(self) -> None:
        self._redraw()
        self._arm()

    def close(self) -> None:
        """Cancel the scopes that are still open, and fail whoever waits."""
        self.closed = True
        self._line_until = -math.inf
        for entry in self._heap:
            scope = entry[2]
            if scope._entry is entry:
                scope._entry = None
                scope._scope.cancel(_CLOSED)
        self._heap.clear()
        self._lot.unpark_all()

    # The axis. It is read on every entry of a scope, so the straight line that holds at present is
    # kept as (base, slope) with the local time until which it does: for ever, until the next
    # segment, or while slewing until that is over. Once closed it holds no more.

    def _redraw(self) -> None:
        now, grid = local_ns(), self.grid
        steering, timeline = grid.steering, grid.timeline
        cluster = steering.cluster_at(now)
        segment, position = timeline.segment_at(cluster), timeline.position_at(cluster)
        ends = [other.t0_ns for other in timeline.segments if other.t0_ns > segment.t0_ns]
        until = [steering.local_at(min(ends))] if ends else []
        if now < steering.settled_ns:
            until.append(steering.settled_ns)
        behind = position < grid.floor
        if behind and (reached := grid.local_at(grid.floor)) != NEVER:
            until.append(reached)
        if behind or not segment.milli_bpm:
            self._line_base, self._line_beat_s = 0.0, math.inf
            self._line_beat = max(grid.floor, position) - self._shift
        elif now < steering.settled_ns or steering.frequency:
            self._line_base = now / 1e9
            self._line_beat_s = 60_000 / segment.milli_bpm / steering.rate_at(now)
            self._line_beat = position - self._shift
        else:
            # From the segment's own beginning, which keeps whole beats whole.
            self._line_base = (segment.t0_ns - steering.target_at(now)) / 1e9
            self._line_beat_s = 60_000 / segment.milli_bpm
            self._line_beat = segment.beat0 - self._shift
        self._line_until = min(until) / 1e9 if until else math.inf
        if self.closed:
            self._line_until = -math.inf

    def _check_line(self) -> None:
        if self.closed:
            self.raise_closed()
        self._redraw()

    def _axis_now(self) -> float:
        if current_time() >= self._line_until:
            self._redraw()
        return self.position() - self._shift

    async def near_edge(self) -> None:
        """Wait for the next beat or for part of the way to it; at its end, without sleeping."""
        now = local_ns()
        left = self._edge_ns() - now
        if left > _NEAR_NS:
            left -= _NEAR_NS
        else:
            await trio.lowlevel.checkpoint()
            if local_ns() != now:
                self._spin()
                return
            # Virtual time, which stands still until everybody sleeps.
        # Woken by what changes the grid, or by the beat, where that is sooner.
        with trio.move_on_after(max(0, left) / 1e9):
            await self._lot.park()

    def _spin(self) -> None:
        edge = self._edge_ns()
        if 0 < edge - local_ns() <= _SPIN_NS:
            for _ in range(_SPINS):
                if local_ns() >= edge:
                    break

    # The heap and its timer.

    def _edge_ns(self) -> int:
        return self.grid.local_at(self._next_index)

    def _due_ns(self, key: float) -> int:
        return self.grid.local_at(key + self._shift)

    def _due(self, key: float) -> bool:
        return key != math.inf and (key == -math.inf or self._due_ns(key) <= local_ns())

    def _prune(self) -> None:
        # In place: the list is also held by whoever is just entering or leaving a scope.
        heap = self._heap
        heap[:] = [entry for entry in heap if entry[2]._entry is entry]
        heapify(heap)
        self._prune_at = 1000 + 2 * len(heap)

    def _first(self) -> float:
        heap = self._heap
        while heap and heap[0][2]._entry is not heap[0]:
            heappop(heap)
        return heap[0][0] if heap else math.inf

    def _arm(self) -> None:
        if self._timer is None:
            return
        first, edge = self._first(), self._next_index - self._shift
        self._armed = min(first, edge)
        if first == -math.inf:
            self._timer.deadline = -math.inf
            return
        due = self._edge_ns()
        if first < edge:
            due = min(due, self._due_ns(first))
        self._timer.deadline = seconds_of(due)

    def _expire(self, now: int) -> bool:
        # Returns whether some that are due remain.
        limit = self.grid.position_at(now) - self._shift
        for _ in range(_AT_ONCE):
            key = self._first()
            if key > limit and (key == math.inf or self._due_ns(key) > now):
                return False
            scope = heappop(self._heap)[2]
            scope._entry = None
            scope._scope.cancel(_ENDED)
        return True

    def _timer_fired(self, _: object) -> trio.lowlevel.Abort:
        # Trio calls this while it expires its deadlines, before any task of that turn runs: a beat
        # scope is cancelled, and who waits for a beat is woken, at the same point of the loop at
        # which a scope of Trio's would be.
        self._expire(local_ns())
        self._strike()
        return trio.lowlevel.Abort.SUCCEEDED

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Cancel scopes as they fall due and wake whoever waits for a beat, until cancelled."""
        task_status.started()
        while True:
            with trio.CancelScope() as self._timer:
                self._arm()
                await trio.lowlevel.wait_task_rescheduled(self._timer_fired)
            self._timer = None
            while self._expire(local_ns()):
                await trio.lowlevel.checkpoint()
            self._strike()

    def _strike(self) -> None:
        index = self.index()
        if index >= self._next_index:
            self.punctuality.add(self._overdue_ns(), beat_ns(self.segment().milli_bpm))
            self._next_index = index + 1
            self._lot.unpark_all()

    def _overdue_ns(self) -> int:
        # A beat that a step has passed over was not missed by the loop.
        return local_ns() - max(self._edge_ns(), self.grid.steering.corrected_ns)

    @property
    def loop_late(self) -> bool:
        """Whether this task's own loop is late with its beats, or was lately."""
        if self.punctuality.late:
            return True
        return is_late(self._overdue_ns(), beat_ns(self.segment().milli_bpm))

    def effective_deadline(self) -> float:
        """Return the position at which the current task will be cancelled, as things stand."""
        # Only Trio knows which scopes the task is in and what shields it. So the scopes that may
        # enclose it are given their deadline in seconds for the length of this question.
        ancestors = set()
        task: trio.lowlevel.Task | None = current_task()
        while task is not None:
            ancestors.add(task)
            task = None if task.parent_nursery is None else task.parent_nursery.parent_task
        scopes = [entry[2] for entry in self._heap if entry[3] in ancestors]
        asked = [
            (scope, self.deadline_of(scope.deadline))
            for scope in scopes
            if scope._entry is not None
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
        if math.isinf(answer):
            return answer
        return self.grid.position_at(round(answer * 1e9))
