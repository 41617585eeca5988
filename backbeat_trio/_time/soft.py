"""The soft edge of a beat scope: the position at which its block should begin to wind down.

A soft edge is in the same heap as the deadlines, and follows the grid as they do. When it passes,
nothing is cancelled except the blocks that asked for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol, final

import trio

from .._errors import SessionClosed
from .heap import BeatHeap, Entry


class Following(Protocol):
    """A scope whose deadline is a soft edge, for as long as it is entered."""

    _position: float | None

    def _move(self, key: float) -> None: ...


@final
class SoftEdge:
    """The soft edge of one scope.

    Args:
      heap: the heap that it joins while the scope is entered.
      beats: how many beats after the entry of the scope it is, if ``position`` is None.
      position: the position at which it is.

    """

    __slots__ = (
        "_beats",
        "_entered",
        "_entry",
        "_event",
        "_heap",
        "_key",
        "_position",
        "_watchers",
        "followers",
        "has_passed",
    )

    _entry: Entry | None
    # The key on the axis, after the entry. As with scopes, the position is None if it is relative.
    _key: float
    _position: float | None

    def __init__(
        self,
        heap: BeatHeap,
        *,
        beats: float = math.inf,
        position: float | None = None,
    ) -> None:
        self._heap = heap
        self._beats = beats
        self._position = position
        self._key = math.inf
        self._entry = None
        self._entered = False
        self._event: trio.Event | None = None
        self._watchers: list[Callable[[], object]] = []
        self.has_passed: bool = False
        self.followers: list[Following] = []
        """The scopes that end with it."""

    def enter(self, now: float) -> None:
        """Join the heap; ``now`` is the present position on the axis. It must not raise."""
        if self._position is None:
            self._key = now + self._beats
        else:
            self._key = self._position - self._heap.shift
        self._entered = True
        if self._heap.enforcing:
            if self._key <= now:
                self._pass()
            elif self._key != math.inf:
                self._entry = self._heap.push(self._key, self)

    def leave(self) -> None:
        """Leave the heap: the edge does not pass any more."""
        self._entered = False
        self._drop()

    def _drop(self) -> None:
        entry, self._entry = self._entry, None
        if entry is not None:
            self._heap.drop(entry)

    @property
    def position(self) -> float:
        """The position; it has one once the scope was entered, or if it is absolute."""
        if self._position is not None:
            return self._position
        return self._key + self._heap.shift

    @position.setter
    def position(self, position: float) -> None:
        self._anchor(position)
        self._key = key = position - self._heap.shift
        self._drop()
        if self._entered and self._heap.enforcing and not self.has_passed and key != math.inf:
            self._entry = self._heap.push(key, self)
        for scope in self.followers:
            scope._move(key)

    def _anchor(self, position: float | None) -> None:
        """Make it absolute, or relative if ``position`` is None. Call it before a rebase only."""
        self._position = position
        for scope in self.followers:
            scope._position = position

    @property
    def is_relative(self) -> bool:
        """Whether it keeps the beats that are left when the position moves to another grid."""
        return self._position is None

    def called(self) -> bool:
        """Return whether it has passed while the scope was entered."""
        if not self.has_passed and self._entry is not None and self._heap.is_due(self._key):
            self._pass()
        return self.has_passed

    async def wait(self) -> None:
        """Wait until it passes. A checkpoint."""
        if self._event is None:
            self._event = trio.Event()
            if self.called() or self._heap.closed:
                self._event.set()
        await self._event.wait()
        if not self.has_passed:
            raise SessionClosed("the session has been closed")

    def watch(self, watcher: Callable[[], object]) -> None:
        """Have a function called once the edge has passed, at once if it has already."""
        if self.called():
            watcher()
        else:
            self._watchers.append(watcher)

    def unwatch(self, watcher: Callable[[], object]) -> None:
        """Do not call that function any more."""
        if watcher in self._watchers:
            self._watchers.remove(watcher)

    def notify(self) -> None:
        """Call the functions that wait for the edge."""
        while self._watchers:
            self._watchers.pop(0)()

    def _pass(self) -> None:
        self.has_passed = True
        if self._event is not None:
            self._event.set()
        if self._watchers:
            # This may run while Trio expires its deadlines, where no foreign code should.
            self._heap.calls.append(self.notify)

    def _end(self, reason: str) -> None:
        # The heap calls this when the edge is due, and when the session is closed.
        self._entry = None
        if not self._heap.closed:
            if not self.has_passed:
                self._pass()
        elif self._event is not None:
            self._event.set()
