"""One value under compare-and-set: what keeps the record that metronomes share.

The store holds one value and its revision, and takes a write only over the revision that the writer
has seen. An answer that is lost leaves it unknown whether a write was made: it is read back.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, final

import trio

from .._errors import BackbeatError


class Entry(NamedTuple):
    """A value as it is stored, and its revision; empty and 0 where there is none."""

    data: bytes
    revision: int


class Conflict(BackbeatError):
    """Somebody else has written since; what is there now has been read."""


class RecordRefused(BackbeatError):
    """The store refuses to keep the value, and would do so again."""


class Store(Protocol):
    """One value under compare-and-set."""

    async def open(self) -> bool:
        """Make the place for the value where it is missing; return whether there can be one.

        Raises:
          RecordRefused: where the store will never keep it.
          TransportBroken: where that cannot be told, as the store does not answer.

        """
        ...

    async def read(self) -> Entry:
        """Return what is stored.

        Raises:
          TransportBroken: where the store does not answer.

        """
        ...

    async def write(self, data: bytes, revision: int) -> int:
        """Store a value over a revision, and return its own.

        Raises:
          Conflict: where another revision is stored.
          TransportBroken: where the store does not answer; it may have been written.

        """
        ...


@final
class MemoryStore:
    """A value that is kept in this process, for the metronomes of one cluster on one bus.

    They share Trio's clock, so they can also share cluster time, and take turns by a lock.
    """

    def __init__(self) -> None:
        self.turn: trio.Lock = trio.Lock()
        """Held by whoever leads."""
        self.offset_ns: int = 0
        """Cluster time minus local time, as whoever led last had it."""
        self._entry = Entry(b"", 0)

    def read_nowait(self) -> Entry:
        """Return what is stored."""
        return self._entry

    def write_nowait(self, data: bytes, revision: int) -> int:
        """Store a value over a revision, and return its own; raise `Conflict` over another one."""
        if revision != self._entry.revision:
            raise Conflict("the value was written by somebody else")
        self._entry = Entry(data, revision + 1)
        return revision + 1

    async def open(self) -> bool:
        """See `Store.open`. A checkpoint."""
        await trio.lowlevel.checkpoint()
        return True

    async def read(self) -> Entry:
        """See `Store.read`. A checkpoint."""
        await trio.lowlevel.checkpoint()
        return self.read_nowait()

    async def write(self, data: bytes, revision: int) -> int:
        """See `Store.write`. A checkpoint."""
        await trio.lowlevel.checkpoint()
        return self.write_nowait(data, revision)
