"""The tree of the operations around an operation, within bounds and whatever their claims say.

Parents and outermost operations are named by other processes. So they may be missing, belong to
operations that have ended long ago, or lead around in a circle.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Final

from .entries import Entry
from .shown import OperationNode, OperationView

LEVELS: Final = 32
"""The most levels of a tree."""

NODES: Final = 1000
"""The most operations of a tree, besides those between the outermost one and the one asked for."""


def grow(
    entry: Entry,
    entries: Iterable[Entry],
    find: Callable[[str], Entry | None],
    view: Callable[[Entry], OperationView],
) -> OperationNode:
    """Return the tree that has an operation in it, from its outermost operation.

    Args:
      entry: the operation.
      entries: all operations.
      find: returns the operation that has a key, or None.
      view: returns what is shown of an operation.

    """
    parts: defaultdict[str, list[Entry]] = defaultdict(list)
    for each in entries:
        if each.parent is not None:
            parts[each.parent].append(each)
    # From the operation up to the outermost one that is known.
    top, path = entry, {entry.key}
    while top.parent is not None and top.parent not in path and len(path) < LEVELS - 1:
        above = find(top.parent)
        if above is None:
            break
        top = above
        path.add(top.key)
    root = top.key
    if top.parent is not None and find(top.parent) is None:
        root = top.correlation_id or top.parent
        # What lies between these and the outermost operation is not known.
        parts[root] += [
            each
            for parent in list(parts)
            if parent != root and find(parent) is None
            for each in parts[parent]
            if each is top or each.correlation_id == root
        ]
    children, omitted = _choose(root, parts, path)
    nodes: dict[str, OperationNode] = {}
    for name in reversed(children):
        found = find(name)
        below = tuple(nodes[key] for key in children[name])
        nodes[name] = OperationNode(
            name, None if found is None else view(found), below, omitted[name]
        )
    return nodes[root]


def _choose(
    root: str, parts: defaultdict[str, list[Entry]], path: set[str]
) -> tuple[dict[str, list[str]], dict[str, int]]:
    # The children of each operation, level by level: what is left out lies deepest. And how many of
    # each are left out.
    children: dict[str, list[str]] = {}
    omitted: dict[str, int] = {}
    level, seen = [root], {root}
    for number in range(1, LEVELS + 1):
        below: list[str] = []
        for name in level:
            found = dict.fromkeys(each.key for each in parts[name] if each.key not in seen)
            room = NODES - len(seen) if number < LEVELS else 0
            kept = [key for place, key in enumerate(found) if place < room or key in path]
            children[name], omitted[name] = kept, len(found) - len(kept)
            seen.update(kept)
            below += kept
        level = below
    return children, omitted
