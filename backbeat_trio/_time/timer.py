"""A timer of the kernel that wakes Trio's loop at an instant, and not up to a millisecond later.

Trio waits for its deadlines with ``epoll``, whose time-out is rounded up to whole milliseconds.
Linux has timers that count nanoseconds. They are waited for as sockets are, and take a few
microseconds to set.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable
from typing import Final, TypeAlias, final

import trio

# Whoever waits for longer than a day, in seconds, does not mind the millisecond.
_FAR: Final = 86_400.0

_SetTimer: TypeAlias = Callable[[int, int], object]

if sys.version_info >= (3, 13):

    def _open_timer() -> tuple[int, _SetTimer]:
        flags = os.TFD_NONBLOCK | os.TFD_CLOEXEC
        descriptor = os.timerfd_create(time.CLOCK_MONOTONIC, flags=flags)
        return descriptor, lambda timer, ns: os.timerfd_settime_ns(timer, initial=ns)

else:

    def _open_timer() -> tuple[int, _SetTimer]:
        # Importing ctypes takes longer than importing the rest of this module.
        import ctypes

        # Setting a timer never blocks. So it keeps the GIL, which another thread might not give
        # back for milliseconds.
        library = ctypes.PyDLL(None, use_errno=True)
        create, settime = library.timerfd_create, library.timerfd_settime
        # Two structs of two longs each: the interval, and the time that is left.
        setting = (ctypes.c_long * 4)()
        create.argtypes = (ctypes.c_int, ctypes.c_int)
        settime.argtypes = (ctypes.c_int, ctypes.c_int, type(setting), ctypes.c_void_p)
        # The flags of timers have the values of those of files.
        descriptor = create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if descriptor < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")

        def set_timer(timer: int, ns: int) -> None:
            setting[2], setting[3] = divmod(ns, 1_000_000_000)
            settime(timer, 0, setting, None)

        return descriptor, set_timer


def _is_real(clock: trio.abc.Clock) -> bool:
    # A second of another clock lasts as long as its test likes, unless it says that it is real. The
    # class of Trio's own is not public, and what is not known is taken for virtual time: that costs
    # punctuality and nothing else.
    kind = type(clock)
    trios = kind.__name__ == "SystemClock" and kind.__module__.partition(".")[0] == "trio"
    return trios or getattr(clock, "is_real", False) is True


@final
class Alarm:
    """Wakes Trio's loop at an instant, as punctually as the system can.

    An alarm wakes the loop, and no task that anybody waits in. Whoever waits for the instant also
    has a deadline of Trio's for it, which expires in the turn of the loop that the alarm begins. So
    an alarm never changes what happens, or where in the loop it happens. It changes only when.

    Trio's deadline is also what is left where there is no alarm: in virtual time, on systems
    without such timers, and where no descriptor is free.

    An alarm belongs to the run of Trio in which it was made. A forked process shares the timer. If
    it sets the timer, the parent is as late as Trio is, and no later.
    """

    __slots__ = ("_clock", "_descriptor", "_due", "_set_timer")

    def __init__(self) -> None:
        self._clock = trio.lowlevel.current_clock()
        self._due = math.inf
        self._descriptor = -1
        self._set_timer: _SetTimer | None = None

    @property
    def is_open(self) -> bool:
        """Whether there is a timer at present."""
        return self._set_timer is not None

    def wake_at(self, deadline: float) -> None:
        """Have the loop wake at an instant, and no longer at the one that was named before.

        It may be called whether `run` is running or not. Not a checkpoint.

        Args:
          deadline: seconds of Trio's clock. For an instant that is past, and for ``inf``, there is
            no alarm.

        """
        if deadline != self._due:
            self._due = deadline
            if self._set_timer is not None:
                self._arm(self._set_timer)

    async def sleep_until(self, deadline: float) -> None:
        """Sleep until an instant, as `trio.sleep_until` does. A checkpoint.

        Args:
          deadline: seconds of Trio's clock.

        """
        self.wake_at(deadline)
        await trio.sleep_until(deadline)

    @trio.lowlevel.enable_ki_protection
    async def run(self) -> None:
        """Keep a timer until cancelled; return at once where there can be none."""
        if sys.platform != "linux" or not _is_real(self._clock):
            return
        try:
            self._descriptor, set_timer = _open_timer()
        except (OSError, AttributeError, ImportError):
            # Too many files are open, or the kernel, a sandbox or the C library has no such timers.
            return
        self._set_timer = set_timer
        try:
            # Where the loop cannot wait for the timer, it is as if there were none.
            with contextlib.suppress(OSError):
                while True:
                    # The timer is readable for as long as it is not set again.
                    self._arm(set_timer)
                    await trio.lowlevel.wait_readable(self._descriptor)
                    # Whoever waits for this instant comes first.
                    await trio.lowlevel.cancel_shielded_checkpoint()
        finally:
            self._set_timer = None
            with contextlib.suppress(OSError):
                os.close(self._descriptor)

    def _arm(self, set_timer: _SetTimer) -> None:
        # Trio's clock begins anywhere, so the timer is given what is left. It begins to count a
        # little later, so it is never early: then nothing would be due yet.
        left = self._clock.deadline_to_sleep_time(self._due)
        # What closes all descriptors of a process closes this one, too.
        with contextlib.suppress(OSError):
            set_timer(self._descriptor, 1 + int(left * 1e9) if 0 < left < _FAR else 0)
