"""How a page is found among many operations: by filters, by an order, and by its place in it.

Each step goes once through what the steps before have left, without a call for each operation, and
only the operations of the page become views.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, Final, TypeVar

from .entries import RANKS, Agent, Entry
from .shown import Page, Query, Sort, Timing

A = TypeVar("A")
B = TypeVar("B")

# From this part of a list on, sorting all of it is as quick as finding the first ones.
_SHARE: Final = 8


def choose(
    entries: list[Entry],
    query: Query,
    *,
    agents: Collection[Agent],
    types: Collection[str],
    silent_before: float,
) -> list[Entry]:
    """Return the operations that pass the filters of a query, except the one by agent.

    Args:
      entries: operations.
      query: the query.
      agents: all agents.
      types: all types.
      silent_before: as of `Ages.silent_before`.

    """
    if query.type:
        entries = [each for each in entries if each.type == query.type]
    if query.phase:
        entries = [each for each in entries if each.phase == query.phase]
    if query.outcome is not None:
        states = ("executing", "waiting") if query.outcome == "live" else (query.outcome,)
        entries = [each for each in entries if each.state in states]
    if query.timing is not None:
        entries = _timed(entries, query.timing, silent_before)
    if query.text:
        text = query.text.casefold()
        of_agents = {agent.id for agent in agents if mentions(agent, text)}
        of_types = {name for name in types if text in name.casefold()}
        is_wide = of_agents or of_types
        entries = [
            each
            for each in entries
            if text in each.id.casefold()
            or (is_wide and (each.agent_id in of_agents or each.type in of_types))
            or (each.state == "failed" and text in each.notes.casefold())
        ]
    return entries


def mentions(agent: Agent, text: str) -> bool:
    """Tell whether a text, without capitals, is in the id or the notes of an agent."""
    return text in agent.id.casefold() or text in agent.notes.casefold()


def _timed(entries: list[Entry], wanted: Timing, silent_before: float) -> list[Entry]:
    # As `Entry.timing`.
    live = ("executing", "waiting")
    if wanted == "silent":
        return [each for each in entries if each.heard <= silent_before and each.state in live]
    if silent_before > -math.inf:
        entries = [each for each in entries if each.heard > silent_before or each.state not in live]
    if wanted == "late":
        return [each for each in entries if each.last > each.due]
    if wanted == "slow":
        return [each for each in entries if each.last <= each.due and each.soft is True]
    return [each for each in entries if each.last <= each.due and each.soft is not True]


def keys_of(entries: list[Entry], sort: Sort) -> list[Any]:
    """Return the keys by which operations are sorted, the least one first."""
    match sort:
        case "used":
            # As `Entry.used`, negative.
            return [
                (each.due - each.estimated - each.last) / each.estimated
                if each.estimated and (each.due <= each.last or not each.at_least)
                else math.inf
                for each in entries
            ]
        case "left":
            return [each.due - each.last if each.estimated else math.inf for each in entries]
        case "age":
            return [each.due - each.estimated - each.last for each in entries]
        case "phase":
            return [RANKS.get(each.phase, len(RANKS)) for each in entries]
        case "agent":
            return [each.agent_id for each in entries]
        case "type":
            return [each.type for each in entries]
        case _:
            return [each.id for each in entries]


def make_page(
    chosen: Sequence[A], keys: Sequence[Any], query: Query, view: Callable[[A], B]
) -> Page[B]:
    """Return the page that a query asks for.

    Args:
      chosen: what passes its filters.
      keys: the keys by which these are sorted.
      query: the query.
      view: makes of one of them what is shown.

    """
    begin = max(0, query.offset)
    end = begin + max(0, query.limit)
    numbers = range(len(chosen))
    if end * _SHARE < len(chosen):
        first = heapq.nlargest if query.reverse else heapq.nsmallest
        ordered = first(end, numbers, key=keys.__getitem__)
    else:
        ordered = sorted(numbers, key=keys.__getitem__, reverse=query.reverse)
    return Page(len(chosen), tuple(view(chosen[number]) for number in ordered[begin:end]))
