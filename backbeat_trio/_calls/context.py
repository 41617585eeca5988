"""What bounds a task, and what it is a part of: how both get into a message and out of it.

The deadline is that of the scopes around the task. The operation and the trace that it is part of
are in a context variable, as is usual for them, so the tasks that it starts have them, too.
"""

from __future__ import annotations

import contextvars
import math
import secrets
from collections.abc import Generator, Mapping, MutableMapping
from contextlib import contextmanager
from types import TracebackType
from typing import Final, NamedTuple, TypedDict, final

import trio
from msgspec import UNSET, UnsetType

from .._runtime.operations import Operation
from .._runtime.runtime import Runtime
from .._time.heap import Anchor
from .._time.scopes import BeatScope, Bounds, Deadlines
from .._time.soft import SoftEdge
from .headers import (
    DEADLINE,
    OPERATION,
    SOFT_DEADLINE,
    TRACEPARENT,
    Carried,
    Deadline,
    Headers,
    ParentOperation,
    normalized,
    parse,
    write,
)
from .remaining import Remaining

_BOUND: Final = frozenset(name.lower() for name in (DEADLINE, SOFT_DEADLINE, OPERATION))
# Bytes of chance in the identity of a local grid.
_IDENTITY_BYTES: Final = 16


class _Part(NamedTuple):
    # What a task is a part of.

    operation: ParentOperation | None
    traceparent: str | None


_NOTHING: Final = _Part(None, None)
_part: contextvars.ContextVar[_Part] = contextvars.ContextVar("backbeat part", default=_NOTHING)


class Kin(TypedDict):
    """The arguments of `Operations.start` that say what an operation is a part of."""

    parent: str | UnsetType
    correlation_id: str | UnsetType


@final
class Calls:
    """What a session does so that deadlines, operations and traces travel with messages.

    Args:
      runtime: what the session runs.

    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime: Runtime = runtime
        self.deadlines: Deadlines = runtime.clock.deadlines
        self.deadlines.before_rebase = self._settle
        self._local_identity = secrets.token_hex(_IDENTITY_BYTES)
        self.extracted: set[Extracted] = set()
        """The blocks of `extract` that are entered and have a deadline."""

    @property
    def incarnation(self) -> str:
        """The identity of the present grid. That of a local grid is known to nobody else."""
        listener = self.runtime.listener
        if listener is None or not listener.follower.locked:
            return self._local_identity
        return listener.follower.incarnation or self._local_identity

    # Sending.

    def inject(self, headers: MutableMapping[str, str]) -> None:
        """Write the headers of a message; see `Session.inject`."""
        instruments = self.runtime.instruments
        if self.runtime.config.enabled and instruments.inject and not _has_trace(headers):
            instruments.tell(instruments.inject, headers)
        written = self.written()
        if headers:
            for name in [name for name in headers if _lower(name) in _BOUND]:
                del headers[name]
            if TRACEPARENT in written and _has_trace(headers):
                # The application traces itself, and its span is the nearer one.
                del written[TRACEPARENT]
        headers.update(written)

    def written(self) -> dict[str, str]:
        """Return the headers of a message that has no others."""
        if not self.runtime.config.enabled:
            return {}
        deadline = soft = None
        bounds, position = self.deadlines.bounds(), self.deadlines.position()
        beat, edge = bounds.beat, bounds.soft
        if bounds.seconds != math.inf:
            beat = self._nearest(bounds, position)
        if beat != math.inf or edge != math.inf:
            here = self.incarnation
            if beat != math.inf:
                deadline = Deadline(here, max(0.0, beat), beat - position)
            if edge < beat:
                soft = Deadline(here, max(0.0, edge), edge - position)
        return write(Carried(deadline, soft, *_part.get()))

    def _nearest(self, bounds: Bounds, position: float) -> float:
        # The nearest deadline as a position, with those in seconds at the present tempo.
        seconds = bounds.seconds
        if seconds == math.inf:
            return bounds.beat
        if seconds == -math.inf:
            return min(bounds.beat, position)
        milli = self.runtime.clock.segment().milli_bpm
        if not milli:
            # In a pause no position says when they are due.
            return bounds.beat
        return min(bounds.beat, position + (seconds - trio.current_time()) * milli / 60_000)

    def remaining(self) -> Remaining:
        """Return what is left of the current task's budget; see `Session.remaining`."""
        clock = self.runtime.clock
        bounds, position, milli = (
            self.deadlines.bounds(),
            clock.position(),
            clock.segment().milli_bpm,
        )
        nearest = self._nearest(bounds, position)
        beats = max(0.0, nearest - position)
        if milli:
            seconds = beats * 60_000 / milli
        else:
            seconds = max(0.0, bounds.seconds - trio.current_time())
            if not beats:
                seconds = 0.0
        soft = max(0.0, bounds.soft - position) if bounds.soft < nearest else math.inf
        return Remaining(beats, seconds, not milli, soft, milli / 1000)

    # Receiving.

    def extract(self, headers: Headers | None) -> Extracted:
        """Return a block that runs within what the headers say; see `Session.extract`."""
        seen = None
        if self.runtime.instruments.extract_entered:
            if headers is not None and not isinstance(headers, Mapping):
                # It may be an iterator, which can be read once.
                headers = list(headers)
            seen = normalized(headers or {})
        return Extracted(self, self.read(headers), seen)

    def read(self, headers: Headers | None) -> Carried:
        """Return what the headers of a message say, and count those that are not valid."""
        if not headers:
            return _NOTHING_CARRIED
        carried, problems = parse(headers)
        counts = self.runtime.call_counts
        for problem in problems:
            if problem.kind == "absurd":
                counts.headers_absurd += 1
            else:
                counts.headers_garbled += 1
            self.runtime.logger.debug("header %s is ignored: %s", problem.header, problem.text)
        return carried

    def _settle(self) -> None:
        here = self.incarnation
        for extracted in self.extracted:
            extracted.settle(here)

    # Parts of a whole.

    @contextmanager
    def detached(self) -> Generator[BeatScope, None, None]:
        """Run a block apart from its caller; see `Session.detached`."""
        former, instruments = _part.get(), self.runtime.instruments
        _part.set(_NOTHING)
        try:
            with self.deadlines.scope_after(math.inf, shield=True) as scope:
                instruments.tell(instruments.extract_entered, scope, None)
                try:
                    yield scope
                finally:
                    instruments.tell(instruments.extract_left, scope)
        finally:
            _part.set(former)

    def kin(self) -> Kin:
        """Return what an operation that is started now is a part of."""
        operation = _part.get().operation
        if operation is None:
            return {"parent": UNSET, "correlation_id": UNSET}
        return {"parent": operation.path, "correlation_id": operation.correlation_id}

    @contextmanager
    def inside(self, operation: Operation) -> Generator[None, None, None]:
        """Run a block as part of an operation, which hears of the soft edges around the block."""
        config = self.runtime.config
        parent = ParentOperation(
            config.cluster_id, config.agent_id, operation.id, operation.correlation_id
        )

        def soften() -> None:
            self._soften(operation)

        edges, instruments = self.deadlines.soft_edges(), self.runtime.instruments
        former = _part.get()
        _part.set(former._replace(operation=parent))
        instruments.tell(instruments.operation_entered, operation)
        try:
            for edge in edges:
                edge.watch(soften)
            yield
        finally:
            instruments.tell(instruments.operation_left, operation)
            # Not by a token: the block may be left in another context than it was entered in.
            _part.set(former)
            for edge in edges:
                edge.unwatch(soften)

    def _soften(self, operation: Operation) -> None:
        runtime = self.runtime
        if runtime.operations.soften(operation):
            runtime.call_counts.operations_soft += 1
            runtime.logger.info(
                "operation %s should wind down: its soft edge passed on beat %d",
                operation.id,
                runtime.current_beat(),
            )


_NOTHING_CARRIED: Final = Carried()


def _has_trace(headers: Mapping[str, str]) -> bool:
    return any(_lower(name) == TRACEPARENT for name in headers)


def _lower(name: object) -> object:
    # What is not a string is refused once the message is sent.
    return name.lower() if isinstance(name, str) else name


@final
class Extracted:
    """The block of `Session.extract`. It can be entered once."""

    __slots__ = (
        "_anchors",
        "_calls",
        "_carried",
        "_edge",
        "_former",
        "_here",
        "_keys",
        "_scope",
        "_seen",
    )

    _former: _Part
    _scope: BeatScope
    _edge: SoftEdge | None
    # The grid on which it was entered, and the keys that its deadline and its edge had then.
    _here: str
    _keys: tuple[float, float]

    def __init__(
        self, calls: Calls, carried: Carried, seen: Mapping[str, str] | None = None
    ) -> None:
        self._calls = calls
        self._carried = carried
        # The headers that instruments see; None if they do not hear of this block.
        self._seen = seen
        # They are made when they are needed, as moves to another grid are rare.
        self._anchors: list[Anchor] | None = None

    @trio.lowlevel.enable_ki_protection
    def __enter__(self) -> BeatScope:
        calls, carried = self._calls, self._carried
        deadlines, here = calls.deadlines, calls.incarnation
        deadline, soft = carried.deadline, carried.soft
        operation, traceparent = carried.operation, carried.traceparent
        if hasattr(self, "_scope"):
            raise RuntimeError("each block of `extract` can be entered once")
        if deadline is None:
            scope = deadlines.scope_at(math.inf)
        elif deadline.incarnation == here:
            scope = deadlines.scope_at(deadline.beat)
        else:
            scope = deadlines.scope_after(deadline.left)
        edge = None
        if soft is not None:
            if soft.incarnation == here:
                edge = deadlines.soften(scope, position=soft.beat)
            else:
                edge = deadlines.soften(scope, beats=soft.left)
        scope.__enter__()
        self._scope, self._edge, self._here = scope, edge, here
        if deadline is not None or edge is not None:
            self._keys = scope._key, math.inf if edge is None else edge._key
            calls.extracted.add(self)
            if deadlines.enforcing and not deadlines.is_waiting(scope):
                calls.runtime.call_counts.headers_expired += 1
        self._former = former = _part.get()
        if operation is not None or traceparent is not None:
            _part.set(_Part(operation or former.operation, traceparent or former.traceparent))
        if self._seen is not None:
            instruments = calls.runtime.instruments
            instruments.tell(instruments.extract_entered, scope, self._seen)
        return scope

    @trio.lowlevel.enable_ki_protection
    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        _part.set(self._former)
        self._calls.extracted.discard(self)
        if self._seen is not None:
            instruments = self._calls.runtime.instruments
            instruments.tell(instruments.extract_left, self._scope)
        return self._scope.__exit__(exc_type, exc, traceback)

    def settle(self, here: str) -> None:
        """Follow the move to another grid (see `Anchor.settle`)."""
        if self._anchors is None:
            self._anchors = []
            members = (self._scope, self._carried.deadline), (self._edge, self._carried.soft)
            for (member, deadline), key in zip(members, self._keys, strict=True):
                if member is not None and deadline is not None:
                    home = deadline.incarnation
                    is_home = home == self._here
                    self._anchors.append(
                        Anchor(member, home, deadline.beat, is_home=is_home, key=key)
                    )
        for anchor in self._anchors:
            anchor.settle(here)
