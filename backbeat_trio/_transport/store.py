"""One value under compare-and-set: what keeps the record that metronomes share.

The store holds one value and its revision, and takes a write only over the revision that the writer
has seen. An answer that is lost leaves it unknown whether a write was made: it is read back.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from .._errors import BackbeatError


class Entry(NamedTuple):
    """A value as it is stored, and its revision; empty and 0 where there is none."""

    data: bytes
    revision: int


class Conflict(BackbeatError):
    """Somebody else has written since; what is there now has been read."""


class Store(Protocol):
    """One value under compare-and-set."""

    async def open(self) -> bool:
        """Make the place for the value where it is missing; return whether there can be one."""
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
