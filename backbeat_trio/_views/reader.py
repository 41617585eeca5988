"""What a view reads of the model: no more often than needed, and what a pause keeps as it is.

Sorting 200,000 operations takes longer than a frame may. So what was read is kept until there is
something new, and until enough time has passed that reading takes a small share of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final, Protocol, TypeVar, final

import msgspec

from .shown import AgentView, GridView, OperationView, Page, Query, Totals, TypeView

T = TypeVar("T")

# Reading takes at most one part in so many of the time.
_SHARE: Final = 4
# So many rows can be looked at while the lists are paused.
_HELD: Final = 5000


class Source(Protocol):
    """What a view reads: a model, or a `Reader` of one."""

    @property
    def grid(self) -> GridView | None:
        """The state of the grid; None before it is known."""

    def totals(self) -> Totals:
        """Count agents and operations."""

    def operations(self, query: Query) -> Page[OperationView]:
        """Return a part of the list of operations."""

    def agents(self, query: Query) -> Page[AgentView]:
        """Return a part of the list of agents."""

    def types(self) -> tuple[TypeView, ...]:
        """Return what is known of each type of operation."""

    def operation(self, agent_id: str, id: str) -> OperationView | None:
        """Return an operation; None if it is not known."""


@final
class Reader:
    """Reads a model for a view.

    Each part that was read is kept until `renew` finds it out of date. While it is paused, nothing
    becomes out of date but the grid. What was not read before is read as it is then. Of each list
    the first 5,000 rows are kept.

    Args:
      model: what is read.
      clock: gives the time in seconds.

    """

    def __init__(self, model: Source, clock: Callable[[], float] = time.perf_counter) -> None:
        self._model = model
        self._clock = clock
        self._kept: dict[Any, Any] = {}
        self._spent = 0.0
        self._due = -float("inf")
        self.paused = False

    @property
    def grid(self) -> GridView | None:
        """The state of the grid; never out of date."""
        return self._model.grid

    def renew(self) -> None:
        """Let the next drawing read what is new, unless the last reading took too long for that."""
        now = self._clock()
        if self.paused or now < self._due:
            return
        self._kept.clear()
        self._due = now + self._spent * _SHARE
        self._spent = 0.0

    def totals(self) -> Totals:
        """Count agents and operations."""
        return self._read("totals", self._model.totals)

    def types(self) -> tuple[TypeView, ...]:
        """Return what is known of each type of operation."""
        return self._read("types", self._model.types)

    def operation(self, agent_id: str, id: str) -> OperationView | None:
        """Return an operation; None if it is not known."""
        return self._read((agent_id, id), lambda: self._model.operation(agent_id, id))

    def operations(self, query: Query) -> Page[OperationView]:
        """Return a part of the list of operations."""
        return self._page(self._model.operations, query)

    def agents(self, query: Query) -> Page[AgentView]:
        """Return a part of the list of agents."""
        return self._page(self._model.agents, query)

    def _page(self, read: Callable[[Query], Page[T]], query: Query) -> Page[T]:
        if not self.paused:
            return self._read((read.__name__, query), lambda: read(query))
        whole = msgspec.structs.replace(query, offset=0, limit=_HELD)
        page = self._read((read.__name__, whole), lambda: read(whole))
        end = query.offset + query.limit
        return Page(min(page.total, _HELD), page.items[query.offset : end])

    def _read(self, key: object, read: Callable[[], T]) -> T:
        if key not in self._kept:
            begun = self._clock()
            self._kept[key] = read()
            self._spent += self._clock() - begun
        found: T = self._kept[key]
        return found
