"""Whole processes in virtual time: each is its own Trio run, and one loop drives them all.

There are no threads and no waiting. A `World` has a heap of events, ordered by true time. A
`Process` is what ``trio.run`` would run: a main function, with a clock that may be wrong. Trio's
own loop is a generator (`trio._core._run.unrolled_run`), which yields when it would wait for input
or for a deadline. The world steps it again when a deadline has come, or when something has arrived
from the network.

All random numbers come from one seed. Each part of a world draws from its own generator, so that
leaving out one part does not change the others. While a world runs (`World.patched`), Trio's
scheduling, ``secrets`` and the wall clock depend on the seed, too. The order of sets of strings
depends on ``PYTHONHASHSEED``, which `fix_hashing` sets.
"""

from __future__ import annotations

import contextlib
import contextvars
import itertools
import math
import os
import random
import secrets
import sys
import time
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from heapq import heappop, heappush
from types import TracebackType
from typing import Any, Final, TypeVar, final

import trio
from outcome import Error
from trio._core import _run
from trio._core._entry_queue import EntryQueue
from trio._core._instrumentation import Instruments
from trio._core._ki import KIManager
from trio._core._run_context import GLOBAL_RUN_CONTEXT

US: Final = 1_000
MS: Final = 1_000_000
SECOND: Final = 1_000_000_000
# What the wall clock shows at the beginning.
_WALL_NS: Final = 1_760_000_000 * SECOND
_PARTS: Final = 1_000_000_000
# How many turns of Trio's loop may pass at one instant, and how many a process that was killed may
# take to unwind.
_TURNS: Final = 2_000
_TURNS_IN_LIMBO: Final = 50_000
_HASH_SEED: Final = "0"

T = TypeVar("T")


def fix_hashing() -> None:
    """Run this program again where the order of its sets would differ from one run to the next."""
    if os.environ.get("PYTHONHASHSEED") != _HASH_SEED:
        os.environ["PYTHONHASHSEED"] = _HASH_SEED
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


class StuckError(Exception):
    """A process that turns without end at one instant, or that never unwinds."""


@final
class ProcessClock(trio.abc.Clock):
    """The monotonic clock of one machine.

    It begins anywhere, its rate is wrong, it stands still while the machine is suspended, and it
    may jump ahead. A process sees it only while it is stepped, so the present reading is kept.
    """

    def __init__(self, origin_ns: int, ppm: float) -> None:
        self.now: float = 0.0
        """The reading at present, in seconds."""
        self._true_ns, self._local_ns = 0, origin_ns
        self._rate = _PARTS + round(ppm * 1000)
        self._suspended = False

    def local(self, true_ns: int) -> int:
        """Return what it shows at an instant of true time, in nanoseconds."""
        if self._suspended:
            return self._local_ns
        return self._local_ns + (true_ns - self._true_ns) * self._rate // _PARTS

    def true(self, local_s: float) -> int:
        """Return the instant of true time at which it shows so many seconds, or just after."""
        ahead = math.ceil(local_s * 1e9) - self._local_ns
        return self._true_ns + ahead * _PARTS // self._rate + 1

    def jump(self, true_ns: int, by_ns: int) -> None:
        """Move ahead at an instant."""
        self._local_ns, self._true_ns = self.local(true_ns) + by_ns, true_ns

    def suspend(self, true_ns: int) -> None:
        """Stand still from an instant on."""
        self._local_ns, self._true_ns, self._suspended = self.local(true_ns), true_ns, True

    def resume(self, true_ns: int) -> None:
        """Go on where it stood still."""
        if self._suspended:
            self._true_ns, self._suspended = true_ns, False

    def start_clock(self) -> None:
        """See `trio.abc.Clock.start_clock`."""

    def current_time(self) -> float:
        """See `trio.abc.Clock.current_time`."""
        return self.now

    def deadline_to_sleep_time(self, deadline: float) -> float:
        """See `trio.abc.Clock.deadline_to_sleep_time`."""
        return deadline - self.now


class _Wakeup:
    # What wakes a loop for what was put into its entry queue. There are no threads and no signals
    # here, so whoever puts something there runs in the very same loop.

    def __init__(self) -> None:
        self._woken = trio.Event()

    def wakeup_thread_and_signal_safe(self) -> None:
        self._woken.set()

    async def wait_woken(self) -> None:
        await self._woken.wait()
        self._woken = trio.Event()

    def wakeup_on_signals(self) -> None:
        pass

    def close(self) -> None:
        pass


class _NoInput:
    # Trio's wait for sockets, of which there are none.

    def process_events(self, events: object) -> None:
        pass

    def force_wakeup(self) -> None:
        pass

    def close(self) -> None:
        pass


def _make_runner(clock: ProcessClock) -> _run.Runner:
    # As `setup_runner` does, but without file descriptors and without the handler of Ctrl-C.
    wakeup: Any = _Wakeup()
    waiting: Any = _NoInput()
    return _run.Runner(
        clock=clock,
        instruments=Instruments(()),
        io_manager=waiting,
        system_context=contextvars.Context(),
        ki_manager=KIManager(),
        strict_exception_groups=True,
        entry_queue=EntryQueue(wakeup=wakeup),
    )


@final
class World:
    """True time, and what happens when.

    Args:
      seed: all chance comes from it.

    """

    def __init__(self, seed: int) -> None:
        self.seed: int = seed
        self.now: int = 0
        """True time, in nanoseconds."""
        self.current: Process | None = None
        """The process that is stepped at present."""
        self._order = itertools.count()
        self._events: list[tuple[int, int, Callable[..., None], tuple[Any, ...]]] = []

    def chance(self, *of: object) -> random.Random:
        """Return a generator of random numbers for one purpose."""
        return random.Random("/".join(map(str, (self.seed, *of))))

    def at(self, when_ns: int, function: Callable[..., None], *args: Any) -> None:
        """Have a function called at an instant of true time, or at once where that is past."""
        heappush(self._events, (max(when_ns, self.now), next(self._order), function, args))

    def run(self, until_ns: int) -> None:
        """Let happen what happens until an instant."""
        events = self._events
        while events and events[0][0] <= until_ns:
            self.now, _, function, args = heappop(events)
            function(*args)
        self.now = until_ns

    @contextmanager
    def patched(self) -> Generator[None]:
        """Take Trio's scheduling, all lots and the wall clock from the seed, for a block."""
        run: Any = _run
        kept_lots = random.getstate()
        random.seed(self.seed)
        kept = run._ALLOW_DETERMINISTIC_SCHEDULING, run._r
        kept_token, kept_below, kept_time = secrets.token_hex, secrets.randbelow, time.time_ns
        run._ALLOW_DETERMINISTIC_SCHEDULING = True
        modules: Any = secrets, time
        modules[0].token_hex, modules[0].randbelow = self._token_hex, self._randbelow
        modules[1].time_ns = self._time_ns
        try:
            yield
        finally:
            random.setstate(kept_lots)
            run._ALLOW_DETERMINISTIC_SCHEDULING, run._r = kept
            modules[0].token_hex, modules[0].randbelow = kept_token, kept_below
            modules[1].time_ns = kept_time

    def _drawn_by(self) -> Process:
        assert self.current is not None, "nobody is stepped"
        return self.current

    def _token_hex(self, nbytes: int | None = None) -> str:
        return self._drawn_by().chance.randbytes(nbytes or 32).hex()

    def _randbelow(self, bound: int) -> int:
        return self._drawn_by().chance.randrange(bound)

    def _time_ns(self) -> int:
        error = 0 if self.current is None else self.current.machine.wall_ns
        return _WALL_NS + self.now + error


@final
class Machine:
    """Where processes run: its two clocks. Processes come and go on it."""

    def __init__(self, world: World, name: str, *, ppm: float = 0.0, wall_ns: int = 0) -> None:
        self.name: str = name
        chance = world.chance(name, "clock")
        self.clock: ProcessClock = ProcessClock(chance.randrange(1, 1_000_000) * SECOND, ppm)
        self.wall_ns: int = wall_ns
        """What its wall clock is wrong by."""


@final
class Process:
    """One process: a Trio run of its own.

    Args:
      world: steps it.
      machine: where it runs.
      name: how it is called in what is told of it.
      number: how many processes of this name there were before.
      main: what it runs, until that returns.

    """

    def __init__(
        self,
        world: World,
        machine: Machine,
        name: str,
        main: Callable[[Process], Awaitable[None]],
        *,
        number: int = 0,
    ) -> None:
        self.world: World = world
        self.machine: Machine = machine
        self.name: str = name
        self.number: int = number
        self.chance: random.Random = world.chance(name, number, "process")
        self.begun_ns: int = world.now
        self.dead: bool = False
        """Whether it was killed: what it still does to unwind happens nowhere."""
        self.stopped: bool = False
        self.moved_ns: int = world.now
        """When it was stopped, went on, or had its clock moved last."""
        self.ended: bool = False
        self.error: BaseException | None = None
        """What its main function raised."""
        self.turns: int = 0
        """How many turns Trio's loop has made."""
        self.leaving: trio.Event = trio.Event()
        """Set when it is asked to end."""
        self._main = main
        self._scope = trio.CancelScope()
        self._order = world.chance(name, number, "order")
        self._late = world.chance(name, number, "late")
        self._held: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        self._armed = math.inf
        self._arming = 0
        self._runner = _make_runner(machine.clock)
        kept = sys.get_asyncgen_hooks()
        self._runner.asyncgens.install_hooks(self._runner)
        self._hooks = sys.get_asyncgen_hooks()
        sys.set_asyncgen_hooks(*kept)
        self._loop = _run.unrolled_run(self._runner, self._run, (), True)
        with self:
            next(self._loop)
        self._step()

    def __repr__(self) -> str:
        return f"{self.name}#{self.number}" if self.number else self.name

    async def _run(self) -> None:
        with self._scope:
            await self._main(self)

    # Being called into. Whatever touches Trio's state must know whose it is.

    def __enter__(self) -> Process:
        world = self.world
        assert world.current is None, "a process is stepped already"
        world.current = self
        run: Any = _run
        run._r = self._order
        GLOBAL_RUN_CONTEXT.runner = self._runner
        self._kept_hooks = sys.get_asyncgen_hooks()
        sys.set_asyncgen_hooks(*self._hooks)
        if not self.dead:
            self.machine.clock.now = self.machine.clock.local(world.now) / 1e9
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        sys.set_asyncgen_hooks(*self._kept_hooks)
        GLOBAL_RUN_CONTEXT.__dict__.clear()
        self.world.current = None

    def _turn(self) -> None:
        self.turns += 1
        try:
            self._loop.send([])
        except StopIteration:
            self.ended = True
            outcome = self._runner.main_task_outcome
            if isinstance(outcome, Error):
                self.error = outcome.error

    def _due(self) -> bool:
        runner = self._runner
        return bool(runner.runq) or runner.deadlines.next_deadline() <= self.machine.clock.now

    def _step(self) -> None:
        with self:
            for _ in range(_TURNS):
                self._turn()
                if self.ended:
                    return
                if not self._due():
                    break
            else:
                raise StuckError(f"the loop of {self!r} runs on without end")
        self._arm()

    def _arm(self) -> None:
        deadline = self._runner.deadlines.next_deadline()
        if deadline == self._armed:
            return
        self._armed = deadline
        self._arming += 1
        if deadline < math.inf:
            # Timers are late, by most of a millisecond where the system rounds up.
            when = self.machine.clock.true(deadline) + self._late.randrange(20 * US, MS)
            self.world.at(when, self._wake, self._arming)

    def _wake(self, arming: int) -> None:
        if arming == self._arming and not (self.stopped or self.dead or self.ended):
            self._armed = math.inf
            self._step()

    def call(self, function: Callable[..., None], *args: Any) -> None:
        """Call into the process, as from its network; then it runs. A stopped one does so later."""
        if self.dead or self.ended:
            return
        if self.stopped:
            self._held.append((function, args))
            return
        with self:
            function(*args)
            due = self._due()
        if due:
            self._step()
        else:
            self._arm()

    def look(self, function: Callable[[], T]) -> T:
        """Call a function that changes nothing in the process, and return what it returns."""
        with self:
            return function()

    # What can be done to it.

    def stop(self) -> None:
        """Stop it, as SIGSTOP does: its clock goes on and its input waits."""
        self.stopped, self.moved_ns = True, self.world.now

    def go_on(self) -> None:
        """Have it go on after `stop`: its timers fire late, and what has arrived is read."""
        if not self.stopped:
            return
        self.stopped, self.moved_ns = False, self.world.now
        if self.dead or self.ended:
            return
        held, self._held = self._held, []
        # Reading begins in another thread: at times before the timers have fired, at times after.
        first = self._late.random() < 0.5
        if first:
            self._read(held)
        else:
            self.world.at(self.world.now + self._late.randrange(3 * MS), self._read, held)
        self.clock_jumped()

    def _read(self, held: list[tuple[Callable[..., None], tuple[Any, ...]]]) -> None:
        for function, args in held:
            self.call(function, *args)

    def clock_jumped(self) -> None:
        """Take note that the clock has moved: timers may be due."""
        self.moved_ns = self.world.now
        self._armed = math.inf
        self._arming += 1
        if not (self.dead or self.ended or self.stopped):
            self._step()

    def leave(self) -> None:
        """Ask it to end, as SIGTERM does."""
        self.call(self.leaving.set)

    def kill(self) -> None:
        """Kill it, as SIGKILL does. Whoever carries its messages must be told before.

        What is left of it unwinds at once, in a time that is nobody else's.
        """
        if self.dead or self.ended:
            return
        self.dead = True
        clock = self.machine.clock
        with self:
            clock.now = clock.local(self.world.now) / 1e9
            self._scope.cancel()
            for _ in range(_TURNS_IN_LIMBO):
                self._turn()
                if self.ended:
                    break
                if not self._due():
                    deadline = self._runner.deadlines.next_deadline()
                    if deadline == math.inf:
                        raise StuckError(f"{self!r} does not end when it is killed")
                    clock.now = deadline
            else:
                raise StuckError(f"{self!r} does not end when it is killed")
        with contextlib.suppress(StopIteration):
            self._loop.close()
