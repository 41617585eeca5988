"""A store of one value under compare-and-set, for the record that metronomes share.

The store keeps one value and its revision. It accepts a write only if the writer names the present
revision. If the answer to a write is lost, the writer does not know whether the value was stored,
and has to read it back.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, final

import trio

from .._errors import BackbeatError


class Entry(NamedTuple):
    """A stored value and its revision; an empty value and 0 if nothing is stored."""

    data: bytes
    revision: int


class Conflict(BackbeatError):
    """The value was not written, because another process has written since the last read."""


class RecordRefused(BackbeatError):
    """JetStream refuses to keep the record of the grid, and trying again will not help.

    `Metronome.run` raises it. The text has the server's reason, for example too few servers for the
    copies that were asked for.
    """


class Store(Protocol):
    """One value under compare-and-set."""

    async def open(self) -> bool:
        """Create the place for the value if it is missing, and return whether it can be kept.

        Raises:
          RecordRefused: if the store will never keep it.
          TransportBroken: if the store does not answer.

        """
        ...

    async def read(self) -> Entry:
        """Return the stored value and its revision.

        Raises:
          TransportBroken: if the store does not answer.

        """
        ...

    async def write(self, data: bytes, revision: int) -> int:
        """Replace the value of a revision, and return the new revision.

        Raises:
          Conflict: if another revision is stored.
          TransportBroken: if the store does not answer. The value may have been written.

        """
        ...


@final
class MemoryStore:
    """A store in this process, for the metronomes of one cluster on one bus.

    The metronomes use the same clock, so they also share the offset of cluster time here. A lock
    decides which of them leads.
    """

    def __init__(self) -> None:
        self.turn: trio.Lock = trio.Lock()
        """The metronome that leads holds this lock."""
        self.offset_ns: int = 0
        """Cluster time minus local time, in ns, as the last leader had it."""
        self._entry = Entry(b"", 0)

    def read_nowait(self) -> Entry:
        """Return the stored value and its revision."""
        return self._entry

    def write_nowait(self, data: bytes, revision: int) -> int:
        """Replace the value of a revision, and return the new revision.

        Raises:
          Conflict: if another revision is stored.

        """
        if revision != self._entry.revision:
            raise Conflict("another process has written the value")
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
