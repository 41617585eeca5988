"""A kernel timer that wakes Trio's loop exactly at an instant, and not up to a millisecond later.

Trio waits for its deadlines with ``epoll``, whose timeout is rounded up to whole milliseconds.
Linux has timers (``timerfd``) that count nanoseconds. A loop can wait for them as it waits for
sockets. It takes a few microseconds to set one.
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

# For a wait of more than a day, in seconds, a millisecond does not matter.
_FAR: Final = 86_400.0
# A processor that has slept takes up to some tenths of a millisecond to run this process again, and
# then finds nothing of it in its caches. So a timer goes off this long before its instant, too, in
# seconds. The processor sleeps only lightly during the short wait that is left.
_EARLY: Final = 300e-6

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

        # Setting a timer never blocks, so keep the GIL. After a release, another thread might hold
        # it for milliseconds.
        library = ctypes.PyDLL(None, use_errno=True)
        create, settime = library.timerfd_create, library.timerfd_settime
        # Two structs of two longs each: the interval, and the time that is left.
        setting = (ctypes.c_long * 4)()
        create.argtypes = (ctypes.c_int, ctypes.c_int)
        settime.argtypes = (ctypes.c_int, ctypes.c_int, type(setting), ctypes.c_void_p)
        # The flags of a timer have the same values as those of a file.
        descriptor = create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if descriptor < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")

        def set_timer(timer: int, ns: int) -> None:
            setting[2], setting[3] = divmod(ns, 1_000_000_000)
            settime(timer, 0, setting, None)

        return descriptor, set_timer


def _is_real(clock: trio.abc.Clock) -> bool:
    # Only a clock that counts real seconds can use a kernel timer. That is Trio's own, whose class
    # is not public, or one that says that it is real. Any other clock counts as virtual time. A
    # mistake here costs punctuality and nothing else.
    kind = type(clock)
    trios = kind.__name__ == "SystemClock" and kind.__module__.partition(".")[0] == "trio"
    return trios or getattr(clock, "is_real", False) is True


@final
class Alarm:
    """Wake Trio's loop at an instant, as punctually as the system can.

    An alarm wakes only the loop. The task that waits for the instant also sets a deadline of Trio's
    for it, which expires in the turn of the loop that the alarm begins. So an alarm does not change
    what happens, or where in the loop it happens, but only when. It wakes the loop twice: shortly
    before the instant, when nothing is due, and at the instant.

    Without an alarm Trio's deadline still works. That is so in virtual time, on systems without
    such timers, and if no file descriptor is free.

    An alarm belongs to the run of Trio in which it was made. A forked process shares the timer. If
    it sets the timer, the parent wakes by Trio's deadline.
    """

    __slots__ = ("_clock", "_descriptor", "_due", "_set_timer")

    def __init__(self) -> None:
        self._clock = trio.lowlevel.current_clock()
        self._due = math.inf
        self._descriptor = -1
        self._set_timer: _SetTimer | None = None

    @property
    def is_open(self) -> bool:
        """Whether there is a kernel timer at present."""
        return self._set_timer is not None

    def wake_at(self, deadline: float) -> None:
        """Set the instant at which to wake the loop. It replaces the one that was set before.

        It can be called whether `run` is running or not. Not a checkpoint.

        Args:
          deadline: seconds of Trio's clock. An instant in the past and ``inf`` set no alarm.

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
        """Keep a kernel timer until cancelled; return at once if there cannot be one."""
        if sys.platform != "linux" or not _is_real(self._clock):
            return
        try:
            self._descriptor, set_timer = _open_timer()
        except (OSError, AttributeError, ImportError):
            # Too many files are open; or the kernel, a sandbox or the C library offers no timer.
            return
        self._set_timer = set_timer
        try:
            # If the loop cannot wait for the timer, go on without it.
            with contextlib.suppress(OSError):
                while True:
                    # A timer that went off stays readable until it is set again.
                    self._arm(set_timer)
                    await trio.lowlevel.wait_readable(self._descriptor)
                    # Let the tasks that wait for this instant run first.
                    await trio.lowlevel.cancel_shielded_checkpoint()
        finally:
            self._set_timer = None
            with contextlib.suppress(OSError):
                os.close(self._descriptor)

    def _arm(self, set_timer: _SetTimer) -> None:
        # The origin of Trio's clock is arbitrary, so the timer gets the time that is left. It
        # starts a little later, so it never goes off just before the instant, when nothing would
        # be due.
        left = self._clock.deadline_to_sleep_time(self._due)
        if left > 2 * _EARLY:
            left -= _EARLY
        # Code that closes all descriptors of the process has closed this one, too.
        with contextlib.suppress(OSError):
            set_timer(self._descriptor, 1 + int(left * 1e9) if 0 < left < _FAR else 0)
