"""The record that metronomes keep of the grid, as one of them last saw it."""

from __future__ import annotations

from typing import final

import msgspec

from .._transport.store import Conflict, Entry, Store
from .._wire import Record, decode_record, encode


@final
class Ledger:
    """The record, as this metronome last saw it."""

    def __init__(self, store: Store, cluster_id: str) -> None:
        self.record: Record | None = None
        """What was read or written last; None for nothing, or what cannot be read."""
        self.revision: int = 0
        self.unreadable: int = 0
        """How many values were found that are no record of this cluster."""
        self._store = store
        self._cluster_id = cluster_id

    async def open(self) -> bool:
        """Make the place for the record where it is missing; return whether there can be one.

        A checkpoint.

        Raises:
          RecordRefused: where there never will be one.
          TransportBroken: where that cannot be told at present.
        """
        return await self._store.open()

    async def read(self) -> Record | None:
        """Read the record. A checkpoint.

        Raises:
          TransportBroken: where the store does not answer.
        """
        self._take(await self._store.read())
        return self.record

    def _take(self, entry: Entry) -> None:
        self.revision, self.record = entry.revision, None
        if not entry.data:
            return
        try:
            record = decode_record(entry.data)
        except msgspec.DecodeError:
            self.unreadable += 1
            return
        if record.cluster_id == self._cluster_id:
            self.record = record
        else:
            self.unreadable += 1

    async def write(self, record: Record) -> None:
        """Write a record over the one that was seen last. A checkpoint.

        Raises:
          Conflict: where another one is there by now; it has been read.
          TransportBroken: where the store does not answer; it may have been written.
        """
        data = encode(record)
        try:
            self.revision = await self._store.write(data, self.revision)
        except Conflict:
            # It may be this very write, whose answer was lost.
            entry = await self._store.read()
            self._take(entry)
            if entry.data != data:
                raise
        else:
            self.record = record
