"""Which cancel scopes can cancel the running task, and the nearest deadline in seconds of these.

Only Trio knows that: a task is also inside of the scopes around its nursery, and not inside of what
a shield keeps out. Trio's public interface gives the nearest deadline and not the scopes, so this
reads the chain of scopes that Trio keeps for each task. If a later version of Trio keeps it in
another way, the same is found out from the outside, which takes longer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

import trio
from trio import CancelScope
from trio.lowlevel import current_task

T = TypeVar("T")


def find_enclosing(known: Mapping[CancelScope, T]) -> tuple[float, list[T]]:
    """Return what bounds the running task.

    Args:
      known: scopes without a deadline of Trio's, with the values that stand for them.

    Returns:
      The nearest deadline in seconds of Trio's clock, ``-inf`` if the task is cancelled already;
      and the values of those known scopes that can cancel the task, in no particular order.

    """
    nearest, found = math.inf, []
    try:
        status: Any = current_task()._cancel_status
        if status.effectively_cancelled:
            return -math.inf, []
        while status is not None:
            scope = status._scope
            value = known.get(scope)
            if value is not None:
                found.append(value)
            elif scope._deadline < nearest:
                nearest = scope._deadline
            status = None if scope._shield else status._parent
    except AttributeError:
        return probe_enclosing(known)
    return nearest, found


def probe_enclosing(known: Mapping[CancelScope, T]) -> tuple[float, list[T]]:
    """Do the same as `find_enclosing` by Trio's public interface alone."""
    nearest = trio.current_effective_deadline()
    if nearest == -math.inf:
        return nearest, []
    found = []
    for scope, value in known.items():
        # Nothing is cancelled by a deadline before the next turn of Trio's loop.
        scope.deadline = -math.inf
        if trio.current_effective_deadline() == -math.inf:
            found.append(value)
        scope.deadline = math.inf
    return nearest, found
