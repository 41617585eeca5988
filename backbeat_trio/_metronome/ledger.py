"""The record of the grid that metronomes share, as one of them last read or wrote it."""

from __future__ import annotations

from typing import final

import msgspec

from .._transport.store import Conflict, Entry, Store
from .._wire import Record, decode_record, encode


@final
class Ledger:
    """The record of the grid, as this metronome last read or wrote it.

    Args:
      store: where the record is kept.
      cluster_id: the cluster; a record of another cluster counts as unreadable.

    """

    def __init__(self, store: Store, cluster_id: str) -> None:
        self.record: Record | None = None
        """The record that was read or written last; None if there was none or it was unreadable."""
        self.revision: int = 0
        """The revision of the store that was seen last, readable or not."""
        self.unreadable: int = 0
        """How many values were read that are not a record of this cluster."""
        self._store = store
        self._cluster_id = cluster_id

    async def open(self) -> bool:
        """Create the place for the record if it is missing, and return whether it can be kept.

        It cannot be kept if the server has no JetStream. This is a checkpoint.

        Raises:
          RecordRefused: if the server refuses to keep the record, whatever is tried.
          TransportBroken: if the store does not answer.
        """
        return await self._store.open()

    async def read(self) -> Record | None:
        """Read the record, and return it, or None if it is missing or unreadable. A checkpoint.

        Raises:
          TransportBroken: if the store does not answer.
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
        """Replace the record, if nobody has changed it since it was seen last. A checkpoint.

        Raises:
          Conflict: if another process has written a record. That one has been read.
          TransportBroken: if the store does not answer. The record may have been written.
        """
        data = encode(record)
        try:
            self.revision = await self._store.write(data, self.revision)
        except Conflict:
            # An earlier attempt at this very write may have succeeded, with its answer lost.
            entry = await self._store.read()
            self._take(entry)
            if entry.data != data:
                raise
        else:
            self.record = record
