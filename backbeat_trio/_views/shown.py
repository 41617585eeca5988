"""What the views show: the structs of the model, and how foreign text is made safe.

All structs are frozen, and their JSON by msgspec is what the views give to programs. Every string
that came from another process has passed through `clean`.
"""

from __future__ import annotations

import math
from typing import Final, Generic, Literal, TypeAlias, TypeVar

from msgspec import Struct

from .._grid.punctuality import TempoDrift
from .._runtime.health import GridState, PendingChange

Timing: TypeAlias = Literal["on_time", "slow", "late", "silent"]
Outcome: TypeAlias = Literal["live", "done", "failed"]
AgentState: TypeAlias = Literal["waiting", "executing", "failed", "unknown"]
Sort: TypeAlias = Literal["used", "left", "age", "agent", "type", "phase", "id"]

BUCKETS: Final = (0.25, 0.5, 0.75, 0.9, 1.0, 1.25, 1.5, 2.0, math.inf)
"""The upper bounds of the buckets in which `TypeView.used` counts, each one included."""

OTHER_TYPES: Final = "\N{HORIZONTAL ELLIPSIS}"
"""The type of operations whose types are too many to be told apart."""

MAX_TEXT: Final = 200
"""The most characters that are shown of an id or of notes."""

_REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"
_ELLIPSIS: Final = "\N{HORIZONTAL ELLIPSIS}"

T = TypeVar("T")


def clean(text: str, limit: int = MAX_TEXT) -> str:
    """Return what may be shown of a foreign string.

    Whitespace becomes a space. All other characters that are not printable become U+FFFD: control
    characters, which begin the escape sequences of terminals, bidirectional overrides, other
    invisible characters, and lone surrogates. Nothing else is interpreted, so a view must neither
    parse markup in the result nor use it as HTML.

    Args:
      text: the string, of any length. Only its first ``limit`` characters are read.
      limit: the most characters of the result, 1 or more. A string that is longer ends with an
        ellipsis.

    """
    if len(text) > limit:
        text = text[: limit - 1] + _ELLIPSIS
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() else " " if each in "\t\n\r" else _REPLACEMENT for each in text
    )


class GridView(Struct, frozen=True):
    """The grid as this process knows it, and how well.

    Attributes:
      cluster_id: the cluster.
      position: the present position, in beats.
      beat: the index of the present beat.
      bar: the number of the present bar.
      beats_per_bar: the length of a bar, in beats.
      tempo_bpm: the tempo, in beats per minute; 0.0 while the grid is paused.
      paused: whether the grid is paused.
      grid: the grid on which this process counts, as in `Health.grid`.
      connected: whether this process is connected to the server.
      leader_id: the metronome that leads; None unless one is heard.
      epoch: the number of the present term of leadership; None on a local grid.
      standbys: how many metronomes stand by; None if that is not known.
      pending: the changes of the tempo that are still to come.
      tempo_drift: how far beat frames are from the grid that they announce, as in
        `Health.tempo_drift`.
      measured_bpm: the tempo at which beat frames arrive; None before two have arrived.
      uncertainty: how much the position may differ from the leader's, in seconds; None if that is
        not known.
      last_frame_age: how long ago the last beat frame arrived, in seconds; None before the first.
      lateness: by how much this process was late for its last beat, in seconds; None before its
        first beat.
      errors: the recent errors of this process, the newest one last.
      claims_refused: whether the server's permissions keep all claims from this process, so that it
        knows neither agents nor operations.

    """

    cluster_id: str
    position: float
    beat: int
    bar: int
    beats_per_bar: int
    tempo_bpm: float
    paused: bool
    grid: GridState
    connected: bool
    leader_id: str | None = None
    epoch: int | None = None
    standbys: int | None = None
    pending: tuple[PendingChange, ...] = ()
    tempo_drift: TempoDrift = "unknown"
    measured_bpm: float | None = None
    uncertainty: float | None = None
    last_frame_age: float | None = None
    lateness: float | None = None
    errors: tuple[str, ...] = ()
    claims_refused: bool = False


class AgentView(Struct, frozen=True):
    """An agent, as its claims describe it.

    Attributes:
      agent_id: the agent.
      state: the state of its newest claim of health; ``"unknown"`` if there was none.
      healthy: whether that claim reports no errors; None if there was none.
      silent: whether claims are due from it and none has come. An agent with live operations claims
        on every beat, so it is silent after three beats. One without claims its health every eight
        beats, or at longer intervals that the model has seen, and is silent after three intervals.
      notes: the notes of its newest claim of health.
      last_beat: the beat of its newest claim.
      live: how many of its operations are live.
      slow: how many of these are slow.
      late: how many of these are late.
      silent_operations: how many of these are silent.

    """

    agent_id: str
    state: AgentState
    healthy: bool | None
    silent: bool
    notes: str
    last_beat: int
    live: int
    slow: int
    late: int
    silent_operations: int


class PhaseChange(Struct, frozen=True):
    """The beat on which an operation was first seen in a phase.

    Attributes:
      phase: the phase, in lower case.
      beat: the index of the beat.

    """

    phase: str
    beat: int


class OperationView(Struct, frozen=True):
    """An operation, as its claims describe it.

    Attributes:
      agent_id: the agent that runs it.
      id: its id.
      type: its type.
      phase: its phase, in lower case.
      state: the state of its newest claim.
      live: whether it has not ended.
      timing: whether it is on time, by the rule of `backbeat_trio._views.model`.
      start_beat: the beat on which it started.
      last_beat: the beat of its newest claim.
      passed: how many beats had passed by its newest claim. For one that has ended, how many it
        took.
      estimated: how many beats it was expected to take; None if its claims do not tell.
      used: how much of the estimate had passed, as a fraction that may exceed 1; None if that is
        not known.
      beats_left: how many beats of the estimate were left by its newest claim, 0 or more. One that
        has ended was early by so many.
      peers: how many peers take part; None if its claims do not tell.
      parent: the operation of which it is a part, as ``"<agent id>/<operation id>"``, or None.
      correlation_id: the outermost of the operations around it, in the same form, or None.
      soft: whether its soft edge has passed, so that it should wind down.
      notes: the notes of its newest claim.
      history: the changes of its phase that were seen, oldest first; the newest ones if they were
        too many.
      outcome: ``"live"``, ``"done"`` or ``"failed"``.
      at_least: whether `passed` and `used` are lower bounds, to be shown as "≥ 5 beats". So it is
        if the budget had run out already when the operation was first seen, and if only its end was
        seen.

    """

    agent_id: str
    id: str
    type: str
    phase: str
    state: str
    live: bool
    timing: Timing
    start_beat: int
    last_beat: int
    passed: int
    estimated: int | None
    used: float | None
    beats_left: int
    peers: int | None
    parent: str | None
    correlation_id: str | None
    soft: bool
    notes: str
    history: tuple[PhaseChange, ...]
    outcome: Outcome
    at_least: bool = False


class OperationNode(Struct, frozen=True):
    """An operation in the tree of the operations around it.

    Attributes:
      name: the operation, as ``"<agent id>/<operation id>"``.
      operation: the operation; None if others name it as the outermost one and the model does not
        have it.
      children: the operations that are parts of it.
      omitted: how many parts of it are left out, because the tree is too large.

    """

    name: str
    operation: OperationView | None
    children: tuple[OperationNode, ...] = ()
    omitted: int = 0


class TypeView(Struct, frozen=True):
    """The operations of one type.

    Attributes:
      type: the type.
      live: how many are live.
      done: how many have completed lately.
      failed: how many have failed lately.
      late: how many of all these are late.
      used: how much of their estimates those that have ended took: for each of `BUCKETS`, how many
        are above the bucket before and up to this one.

    """

    type: str
    live: int
    done: int
    failed: int
    late: int
    used: tuple[int, ...]


class Totals(Struct, frozen=True):
    """How many agents and operations there are.

    Attributes:
      agents: the agents.
      agents_unhealthy: the agents that report errors.
      agents_silent: the agents that are silent.
      live: the operations that are live.
      on_time: how many of these are on time.
      slow: how many of these are slow.
      late: how many of these are late.
      silent: how many of these are silent.
      done: the operations that have completed lately.
      failed: the operations that have failed lately.
      claims: the claims that were taken in since the model was made.
      ignored: how many of these were ignored: they are of another cluster, older than a claim that
        came before, or not valid.
      dropped_agents: the agents that were left out, because there were too many.
      dropped_operations: the operations that were left out, because there were too many. If they
        are very many, there may be more.

    """

    agents: int = 0
    agents_unhealthy: int = 0
    agents_silent: int = 0
    live: int = 0
    on_time: int = 0
    slow: int = 0
    late: int = 0
    silent: int = 0
    done: int = 0
    failed: int = 0
    claims: int = 0
    ignored: int = 0
    dropped_agents: int = 0
    dropped_operations: int = 0


class Query(Struct, frozen=True):
    """Which agents or operations to show, and in which order. An operation must pass all filters.

    Attributes:
      text: a part of the id or the notes of an agent, of the id or the type of an operation, or of
        the notes of one that has failed. Case does not matter.
      agent: the id of the agent.
      type: the type of an operation.
      phase: the phase of an operation.
      timing: the timing of an operation. An agent passes if it has such an operation, or for
        ``"silent"`` if it is silent itself.
      outcome: the outcome of an operation.
      sort: the order of operations: most of the estimate used first (``"used"``), fewest beats left
        first (``"left"``), most beats passed first (``"age"``), by the order of phases
        (``"phase"``), or alphabetically. Operations that are not known well enough come last.
        Agents have these orders: by their ids (``"agent"``, ``"id"``), the one that was heard last
        at the end (``"age"``), and the one with the most trouble first (all others).
      reverse: whether the order is reversed.
      limit: the most items to return, 0 or more.
      offset: how many items are left out before these, 0 or more.

    """

    text: str = ""
    agent: str = ""
    type: str = ""
    phase: str = ""
    timing: Timing | None = None
    outcome: Outcome | None = None
    sort: Sort = "used"
    reverse: bool = False
    limit: int = 40
    offset: int = 0


class Page(Struct, Generic[T], frozen=True):
    """A part of a list.

    Attributes:
      total: how many items there are in the list.
      items: the part.

    """

    total: int
    items: tuple[T, ...]
