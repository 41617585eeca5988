"""The beat clock: it wakes the tasks that wait for beats, and ends the scopes that are due."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NoReturn, final

import trio

from .._errors import SessionClosed
from .._grid.grid import Grid
from .._grid.punctuality import Punctuality, is_late
from .._grid.steering import Steering
from .._grid.timeline import NEVER, Timeline, beat_ns
from .._wire import Segment
from .heap import seconds_at
from .local import local_ns
from .scopes import BeatScope, Deadlines
from .timer import Alarm


@final
class BeatClock:
    """A grid with a timer that follows it, for the tasks of one run of Trio.

    Args:
      timeline: the segments of the grid.
      steering: the mapping from local time to cluster time.
      beats_per_bar: the length of a bar, in beats.
      enforcing: whether scopes are cancelled at their deadlines.
      on_rebase: called when the index of the present beat moves to another grid, with the number
        of beats by which it moves.

    """

    def __init__(
        self,
        timeline: Timeline,
        steering: Steering,
        beats_per_bar: int,
        *,
        enforcing: bool = True,
        on_rebase: Callable[[int], None] | None = None,
    ) -> None:
        self.grid: Grid = Grid(timeline, steering, beats_per_bar, self)
        self.punctuality: Punctuality = Punctuality()
        self.index_shift: int = 0
        """By how many beats all moves to other grids together have changed the index."""
        self.deadlines: Deadlines = Deadlines(self.grid, self._arm, enforcing=enforcing)
        """The scopes on this clock. Its methods make new ones."""
        self._enforcing = enforcing
        self._on_rebase = on_rebase
        self._timer: trio.CancelScope | None = None
        self._alarm = Alarm()
        self._lot = trio.lowlevel.ParkingLot()
        self._lot_of_last = trio.lowlevel.ParkingLot()
        self._closed = trio.Event()
        self._next_index = self.index() + 1
        # When that beat is due, as of the last arming, and when its waiting tasks were woken.
        self._edge_ns = NEVER
        self._struck_ns: int | None = None

    @classmethod
    def local(
        cls,
        milli: int,
        beats_per_bar: int,
        *,
        enforcing: bool = True,
        on_rebase: Callable[[int], None] | None = None,
    ) -> BeatClock:
        """Make a clock on a local grid, which begins now with beat 0.

        Args:
          milli: the tempo, in thousandths of a beat per minute.
          beats_per_bar: the length of a bar, in beats.
          enforcing: whether scopes are cancelled at their deadlines.
          on_rebase: as for the constructor.

        """
        timeline, steering = Timeline((Segment(0, 0, 0, 0, milli),)), Steering(-local_ns())
        return cls(timeline, steering, beats_per_bar, enforcing=enforcing, on_rebase=on_rebase)

    # Reading.

    def cluster_ns(self) -> int:
        """Return the present cluster time, in nanoseconds."""
        return self.grid.cluster_at(local_ns())

    def index(self) -> int:
        """Return the index of the present beat."""
        return self.grid.index_at(local_ns())

    def position(self) -> float:
        """Return the present position in beats."""
        return self.grid.position_at(local_ns())

    def segment(self) -> Segment:
        """Return the segment that is in force now."""
        return self.grid.segment_at(local_ns())

    def deadline_of(self, position: float) -> float:
        """Return when the present grid reaches a position, in seconds of Trio's clock."""
        return seconds_at(self.grid, position)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self.deadlines.closed

    @property
    def live_scopes(self) -> int:
        """The number of scopes that wait for their deadline."""
        return self.deadlines.live

    def raise_closed(self) -> NoReturn:
        """Raise the error of a closed session."""
        raise SessionClosed("the session has been closed")

    # Waiting.

    async def sleep_until(self, position: float) -> None:
        """Wait until a position, in beats, is reached. Always a checkpoint."""
        await self._sleep(self.deadlines.scope_at(position))

    async def sleep(self, beats: float) -> None:
        """Wait for some beats, 0 or more. Always a checkpoint."""
        await self._sleep(self.deadlines.scope_after(beats))

    async def _sleep(self, scope: BeatScope) -> None:
        with scope:
            if self._enforcing:
                await trio.sleep_forever()
            # Scopes do not end by themselves here, but a sleep must.
            with trio.move_on_at(self.deadline_of(scope.deadline)):
                await self._closed.wait()
        if self.closed:
            self.raise_closed()

    async def wait_beat(self, *, last: bool = False) -> None:
        """Wait until the next beat begins, or the clock is closed. A checkpoint.

        Args:
          last: whether to wait one more turn of the loop, until all tasks that wait for the beat
            without this have run.

        """
        await (self._lot_of_last if last else self._lot).park()

    # Moving.

    def rebased(self, beats: float, index: int) -> None:
        """Follow the move of the position to another grid (see `GridObserver`)."""
        self.deadlines.rebase(beats)
        self.index_shift += index
        # If a beat is due and was not handled yet, it is still due.
        self._next_index += index
        if self._on_rebase is not None:
            self._on_rebase(index)

    def changed(self) -> None:
        """Follow a change of the times of future beats (see `GridObserver`)."""
        self.deadlines.redraw()
        self._arm()

    def close(self) -> None:
        """Cancel the scopes that are still open, and wake the tasks that wait, which then fail."""
        self.deadlines.close()
        self._closed.set()
        self._lot.unpark_all()
        self._lot_of_last.unpark_all()

    # The timer.

    def _arm(self) -> None:
        if self._timer is not None:
            self._edge_ns = edge = self.grid.local_at(self._next_index)
            self._timer.deadline = due = self.deadlines.arm(self._next_index, edge)
            self._alarm.wake_at(due)

    def _fire(self) -> None:
        # Trio calls this while it expires its deadlines, before any task of that turn runs. So a
        # beat scope is cancelled, and a task that waits for a beat is woken, at the same point of
        # the loop as with a scope of Trio's own.
        now = local_ns()
        if now >= self._edge_ns:
            self._struck_ns, self._edge_ns = now, NEVER
            self._lot.unpark_all()
        self.deadlines.expire(now)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Cancel scopes that are due and wake the tasks that wait for beats, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._alarm.run)
            task_status.started()
            await self._keep_time()

    async def _keep_time(self) -> None:
        task = trio.lowlevel.current_task()

        def timer_fired(_: object) -> trio.lowlevel.Abort:
            self._fire()
            # Reschedule the task instead of cancelling it: a `trio.Cancelled` takes more time.
            trio.lowlevel.reschedule(task)
            return trio.lowlevel.Abort.FAILED

        def turn_began(_: object) -> trio.lowlevel.Abort:
            self._fire()
            return trio.lowlevel.Abort.SUCCEEDED

        while True:
            with trio.CancelScope() as self._timer:
                self._arm()
                await trio.lowlevel.wait_task_rescheduled(timer_fired)
            self._timer = None
            # The tasks that were woken run first. The rest can wait until the next turn of the
            # loop. This waits for that turn with a deadline, which also handles what is due by
            # then.
            with trio.CancelScope() as turn:
                turn.deadline = -math.inf
                await trio.lowlevel.wait_task_rescheduled(turn_began)
            while self.deadlines.expire(local_ns()):
                await trio.lowlevel.checkpoint()
            self.deadlines.run_calls()
            self._strike()

    def _strike(self) -> None:
        now = local_ns()
        index = self.grid.index_at(now)
        if index >= self._next_index:
            struck = self._struck_ns
            if struck is None:
                self._lot.unpark_all()
            overdue = self._overdue_ns(now if struck is None else struck)
            self.punctuality.add(overdue, beat_ns(self.grid.segment_at(now).milli_bpm))
            self._next_index = index + 1
            self._lot_of_last.unpark_all()
        self._struck_ns = None

    def _overdue_ns(self, now: int) -> int:
        # The loop is not late with a beat that a step of cluster time has passed over.
        return now - max(self.grid.local_at(self._next_index), self.grid.steering.corrected_ns)

    @property
    def loop_late(self) -> bool:
        """Whether Trio's loop is late with a beat now, or was with one of the last eight."""
        if self.punctuality.late:
            return True
        return is_late(self._overdue_ns(local_ns()), beat_ns(self.segment().milli_bpm))
