"""A pytest plug-in for programs that use this package: sessions in virtual time without a server.

Load the fixtures in a ``conftest.py``. Set ``trio_mode = true``, or mark tests as ``trio``::

    # conftest.py
    pytest_plugins = ["backbeat_trio.testing"]

    async def test_budget(backbeat_session):        # virtual time: this takes no time at all
        with backbeat_session.move_on_after(2) as scope:
            await trio.sleep_forever()
        assert scope.cancelled_caught

`backbeat_session` is a session whose clock jumps to the next deadline when all tasks wait.
`backbeat_metronome` is a metronome whose clock moves only when the test says so. `backbeat_claims`
records the claims of all agents on the bus of `backbeat_session`. `nats_server` is a real server on
a free loopback port.

A test has one clock. If its fixtures need different clocks, its set-up fails. In virtual time, a
test that waits for an event that never comes would hang, or the clock would jump on for ever. Such
a test fails after `PATIENCE` seconds of real time, or after the number of seconds in pytest's
setting ``backbeat_patience``.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
import os
import threading
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Generator,
    Iterable,
    Iterator,
    Sequence,
)
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final, TypeVar, cast, final

import pytest
import pytest_trio
import trio
import trio.testing
from pytest_trio import trio_fixture

from ._calls.instrument import Instrument
from ._checks import check_integer, check_seconds
from ._config import BackbeatConfig, check_fields
from ._errors import Logger
from ._metronome.metronome import Metronome
from ._session.lifecycle import session
from ._session.session import Session
from ._transport.memory import MemoryBus, MemoryTransport
from ._transport.protocol import Transport
from ._wire import ClaimState, StatusClaim
from .nats_server import NatsServer as NatsServer

CLUSTER_ID: Final = "test-cluster"
"""The cluster of the sessions and metronomes that this module makes."""
AGENT_ID: Final = "test-agent"
"""The agent id of a session that this module makes."""
NODE_ID: Final = "test-node"
"""The node id of a session that this module makes."""
PATIENCE: Final = 10.0
"""The seconds of real time after which a test without progress in virtual time fails."""

_PACKAGE: Final = os.path.dirname(__file__)
# Stack frames in these files do not show where a test waits.
_MACHINERY: Final = (
    _PACKAGE + os.sep,
    os.path.dirname(trio.__file__) + os.sep,
    os.path.dirname(pytest_trio.__file__) + os.sep,
    contextlib.__file__,
)

F = TypeVar("F", bound=Callable[..., AsyncGenerator[Any, None]])

_buses = itertools.count()


def _fixture(function: F) -> F:
    return cast(F, trio_fixture(function))


@asynccontextmanager
async def _open_background() -> AsyncGenerator[trio.Nursery, None]:
    """Open a nursery for tasks that are cancelled at the end of the block.

    An exception of the block or of a task leaves without a group. If both raise, the two exceptions
    leave in one group.
    """
    failure: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            try:
                yield nursery
            except BaseException as error:
                if nursery.cancel_scope.cancel_called:
                    # A task failed, and the nursery may have cancelled the block for that.
                    raise
                failure = error
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        errors = [*group.exceptions] if failure is None else [failure, *group.exceptions]
        failure = errors[0] if len(errors) == 1 else group.derive(errors)
    # Raise it outside of the handler, so that its context is not the group.
    if failure is not None:
        try:
            raise failure
        finally:
            # Its traceback refers to this frame. Do not let the frame refer to it.
            del failure


def _is_virtual(clock: trio.abc.Clock) -> bool:
    # A mock clock with a rate advances with real time.
    return isinstance(clock, trio.testing.MockClock) and clock.rate == 0


def _is_ours(task: trio.lowlevel.Task) -> bool:
    code = getattr(task.coro, "cr_code", None)
    return code is not None and code.co_filename.startswith(_PACKAGE + os.sep)


def _may_be_woken() -> bool:
    """Tell whether a thread or a file that Trio knows of may wake a task."""
    io = trio.lowlevel.current_statistics().io_statistics
    names = ("tasks_waiting_read", "tasks_waiting_write", "tasks_waiting_overlapped")
    waiting = getattr(io, "tasks_waiting", 0) + sum(getattr(io, name, 0) for name in names)
    # One task of Trio's own always waits, for calls of other threads.
    return waiting > 1 or trio.testing.active_thread_count() > 0


def _where() -> Generator[str, None, None]:
    """Yield the tasks that are not this package's own, each with the line at which it waits."""
    root = trio.lowlevel.current_root_task()
    tasks = [] if root is None else [root]
    for task in tasks:
        for nursery in task.child_nurseries:
            tasks.extend(nursery.child_tasks)
        line = ""
        for frame, number in task.iter_await_frames():
            if not frame.f_code.co_filename.startswith(_MACHINERY):
                line = f"{task.name} at {frame.f_code.co_filename}:{number}"
        if line and not _is_ours(task):
            yield line


class _Watch(trio.abc.Instrument):
    """Notice that a test makes no progress in virtual time.

    If the clock does not move by itself, Trio's loop then sleeps and nothing wakes it. If the clock
    jumps, only the tasks of this package run, and no task of the test waits for a time.
    """

    def __init__(self, clock: trio.testing.MockClock, patience: float) -> None:
        self.stuck = trio.Event()
        self.sessions: list[Session] = []
        self._deadlines: dict[trio.lowlevel.Task, float] = {}
        self._clock = clock
        self._patience = patience
        self._token = trio.lowlevel.current_trio_token()
        self._timer: threading.Timer | None = None
        self._last = time.perf_counter()
        self._spent = 0.0

    def before_io_wait(self, timeout: float) -> None:
        now = time.perf_counter()
        # The limit leaves out the time in a debugger, or while the machine sleeps.
        self._spent += min(now - self._last, 0.1)
        self._last = now
        if self._clock.rate:
            self._spent = 0.0
        elif self._clock.autojump_threshold < math.inf:
            if self._spent > self._patience:
                self._spent = 0.0
                if not self._time_is_awaited() and not _may_be_woken():
                    self.stuck.set()
        elif timeout > self._patience and not _may_be_woken():
            self._timer = threading.Timer(self._patience, self._wake)
            self._timer.daemon = True
            self._timer.start()

    def after_io_wait(self, timeout: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            if time.perf_counter() - self._last >= self._patience:
                self.stuck.set()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if not _is_ours(task):
            self._spent = 0.0
            if inspect.getcoroutinestate(task.coro) == inspect.CORO_CLOSED:
                self._deadlines.pop(task, None)
            else:
                self._deadlines[task] = trio.current_effective_deadline()

    def _time_is_awaited(self) -> bool:
        # Trio does not see deadlines in beats, so these are checked separately.
        now = self._clock.current_time()
        return any(now < deadline < math.inf for deadline in self._deadlines.values()) or any(
            bb.tempo_bpm and bb.statistics().live_scopes for bb in self.sessions
        )

    def _wake(self) -> None:
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(lambda: None)


class _Limit(trio.abc.Instrument):
    """Cancel a scope after some seconds of real time, even if tasks always run."""

    def __init__(self, scope: trio.CancelScope, seconds: float) -> None:
        self._scope = scope
        self._end = time.perf_counter() + seconds

    def after_io_wait(self, timeout: float) -> None:
        if time.perf_counter() > self._end:
            self._scope.cancel()


@contextmanager
def _installed(instrument: trio.abc.Instrument) -> Iterator[None]:
    trio.lowlevel.add_instrument(instrument)
    try:
        yield
    finally:
        # Trio removes an instrument that has raised.
        with contextlib.suppress(KeyError):
            trio.lowlevel.remove_instrument(instrument)


async def _keep_watch(
    clock: trio.testing.MockClock,
    patience: float,
    *,
    task_status: trio.TaskStatus[_Watch] = trio.TASK_STATUS_IGNORED,
) -> None:
    watch = _Watch(clock, patience)
    began = trio.current_time()
    with _installed(watch):
        task_status.started(watch)
        await watch.stuck.wait()
    waiting = "".join(f"\n  {line}" for line in _where())
    if clock.autojump_threshold < math.inf:
        raise RuntimeError(
            f"what the test waits for does not come: for {patience:g} s of real time only the "
            "session's own services have run, while virtual time jumped on from beat to beat "
            f"({trio.current_time() - began:,.0f} s of it since the session was opened). A grid "
            f"that `pause()` has stopped waits for `resume()`. These tasks wait:{waiting}"
        )
    raise RuntimeError(
        f"no task has run for {patience:g} s of real time, and none will: all of them wait, and "
        "the virtual clock stands still. Let time pass by `tick()` or `pass_time()`, and cancel "
        f"what still waits at the end of a test. These tasks wait:{waiting}"
    )


_watches: Final[trio.lowlevel.RunVar[_Watch | None]] = trio.lowlevel.RunVar(
    "backbeat watch", default=None
)


@asynccontextmanager
async def _open_watch(patience: float) -> AsyncGenerator[_Watch | None, None]:
    """Fail the block if virtual time makes no progress; with a real clock, do nothing."""
    clock = trio.lowlevel.current_clock()
    watch = _watches.get()
    if not isinstance(clock, trio.testing.MockClock) or watch is not None:
        # A second watch would notice the same, and both errors would leave in a group.
        yield watch
        return
    async with _open_background() as nursery:
        watch = await nursery.start(_keep_watch, clock, patience)
        _watches.set(watch)
        try:
            yield watch
        finally:
            _watches.set(None)


@asynccontextmanager
async def open_session(
    bus: MemoryBus | None = None,
    /,
    *,
    transport: Transport | None = None,
    logger: Logger | None = None,
    instruments: Iterable[Instrument] = (),
    patience: float = PATIENCE,
    **overrides: Any,
) -> AsyncGenerator[Session, None]:
    """Open a session on an in-process bus, with settings that do not depend on the environment.

    An exception of the block leaves without a group. Entering and leaving are checkpoints.

    Args:
      bus: the bus, on which another metronome leads; None for a new bus with a metronome.
      transport: the transport to use instead of one over the bus.
      logger: as for `backbeat_trio.session`.
      instruments: as for `backbeat_trio.session`.
      patience: in virtual time, for how many seconds of real time the test may make no progress:
        only tasks of this package run, or none at all.
      **overrides: fields of `BackbeatConfig`.

    Raises:
      RuntimeError: if the test makes no progress for ``patience`` seconds; the text has the lines
        at which tasks wait. A wait for a thread of `trio.to_thread` or for a file does not count.
      TypeError: if an override is not a field of `BackbeatConfig`.
    """
    check_fields("open_session", overrides)
    if transport is None and bus is not None:
        transport = MemoryTransport(bus)
    fields: dict[str, Any] = {
        "cluster_id": CLUSTER_ID,
        "agent_id": AGENT_ID,
        "node_id": NODE_ID,
        "nats_url": f"memory://private-{next(_buses)}",
    }
    config = BackbeatConfig(**(fields | overrides))
    async with (
        _open_watch(patience) as watch,
        session(config, transport=transport, logger=logger, instruments=instruments) as bb,
    ):
        if watch is not None:
            watch.sessions.append(bb)
        try:
            yield bb
        finally:
            if watch is not None:
                watch.sessions.remove(bb)


@final
class ManualMetronome:
    """A metronome in virtual time, which passes only by `tick` and `pass_time`.

    `open_metronome` and the fixture ``backbeat_metronome`` make it.
    """

    def __init__(
        self,
        clock: trio.testing.MockClock,
        bus: MemoryBus,
        metronome: Metronome,
        patience: float = PATIENCE,
    ) -> None:
        self._clock = clock
        self._metronome = metronome
        self._patience = patience
        self.bus = bus
        """The bus on which it leads, for `open_session`."""

    @property
    def beat(self) -> int:
        """The index of the present beat."""
        return self._metronome.current_beat()

    async def tick(self, beats: int = 1) -> int:
        """Let time pass until the next beat, or a later one, and let all tasks react.

        Time passes as with `pass_time`, so no beat and no deadline on the way is skipped. While the
        grid is paused, a second passes instead of each beat. A checkpoint.

        Args:
          beats: the number of beats, 1 or more.

        Returns:
          The index of the present beat.

        Raises:
          RuntimeError: as `pass_time` does.
          TypeError, ValueError: if ``beats`` is not an integer of 1 or more.
        """
        for _ in range(check_integer("beats", beats, 1)):
            await self._pass_until(self._metronome.next_beat_time())
        return self.beat

    async def pass_time(self, seconds: float) -> None:
        """Let some seconds of virtual time pass, and let all tasks react.

        Time stops at each deadline on the way until all tasks that it wakes are blocked again. So
        tasks see the same order of events as on a real clock. A checkpoint.

        Args:
          seconds: the number of seconds, 0 or more.

        Raises:
          RuntimeError: if a task never waits for a later time.
          TypeError: if ``seconds`` is not a number.
          ValueError: if ``seconds`` is negative, infinite or NaN.
        """
        seconds = check_seconds("seconds", seconds)
        if seconds == math.inf:
            raise ValueError("`seconds` must be finite")
        await self._pass_until(trio.current_time() + seconds)

    async def _pass_until(self, end: float) -> None:
        await self._settle()
        while (left := end - trio.current_time()) > 0:
            next_deadline = trio.lowlevel.current_statistics().seconds_to_next_deadline
            self._clock.jump(min(max(0.0, next_deadline), left))
            await self._settle()

    async def _settle(self) -> None:
        with trio.CancelScope() as scope, _installed(_Limit(scope, self._patience)):
            await trio.testing.wait_all_tasks_blocked()
        if scope.cancelled_caught:
            raise RuntimeError(
                f"a task runs on and on: for {self._patience:g} s of real time, there was always "
                "a task that could run, so virtual time cannot pass. Does one sleep for 0 seconds "
                "in a loop?"
            )

    async def set_tempo(
        self, bpm: float | None, *, at_beat: int | None = None, over: int = 0
    ) -> int:
        """Commit a change of the tempo, and return the index of the beat at which it begins.

        A tempo of 0 pauses the grid, and None resumes it. The arguments, errors and checkpoints are
        those of `backbeat_trio.Metronome.change_tempo`.
        """
        return await self._metronome.change_tempo(bpm, at_beat=at_beat, over=over)


@asynccontextmanager
async def open_metronome(
    clock: trio.testing.MockClock,
    *,
    tempo_bpm: float = 60.0,
    beats_per_bar: int = 8,
    patience: float = PATIENCE,
) -> AsyncGenerator[ManualMetronome, None]:
    """Run a metronome on a new bus, in virtual time that passes only on demand.

    An exception of the block leaves without a group. Entering and leaving are checkpoints.

    Args:
      clock: the clock of this Trio run; it must neither run nor jump by itself.
      tempo_bpm: beats per minute, 0.1 to 6,000.
      beats_per_bar: the length of a bar, in beats.
      patience: for how many seconds of real time all tasks may wait, or one may run while time
        should pass.

    Raises:
      RuntimeError: if all tasks wait for ``patience`` seconds; the text has the lines at which they
        wait. A wait for a thread of `trio.to_thread` or for a file does not count.
      ValueError: if ``clock`` is not the clock of this Trio run, or moves by itself.
    """
    if clock is not trio.lowlevel.current_clock():
        raise ValueError("`clock` must be the clock of this Trio run")
    if clock.rate or clock.autojump_threshold < math.inf:
        raise ValueError("`clock` must neither run nor jump by itself")
    bus = MemoryBus()
    transport = MemoryTransport(bus)
    metronome = Metronome(
        transport,
        cluster_id=CLUSTER_ID,
        leader_id="manual-metronome",
        tempo_bpm=tempo_bpm,
        beats_per_bar=beats_per_bar,
        bus=bus,
    )
    async with _open_watch(patience), _open_background() as nursery:
        await nursery.start(transport.run)
        await nursery.start(metronome.run)
        yield ManualMetronome(clock, bus, metronome, patience)


@final
class ClaimRecorder:
    """The claims that a session has heard. `open_recorder` and ``backbeat_claims`` make it."""

    def __init__(self) -> None:
        self.claims: list[StatusClaim] = []
        """All claims so far, in the order in which they were heard."""
        self._awaited: dict[tuple[str, ClaimState], trio.Event] = {}

    def of(self, task_id: str) -> list[StatusClaim]:
        """Return the claims of one operation so far, by its id."""
        return [claim for claim in self.claims if claim.task_id == task_id]

    async def wait_for(self, task_id: str, state: ClaimState) -> StatusClaim:
        """Return the first claim of one operation in a state. A checkpoint only if it must wait."""
        while True:
            for claim in self.of(task_id):
                if claim.state == state:
                    return claim
            # Only such a claim wakes this task. Otherwise a test that waits in vain would seem
            # busy.
            await self._awaited.setdefault((task_id, state), trio.Event()).wait()

    async def _record(self, claims: AsyncIterator[StatusClaim]) -> None:
        async for claim in claims:
            self.claims.append(claim)
            awaited = self._awaited.pop((claim.task_id, claim.state), None)
            if awaited is not None:
                awaited.set()


@asynccontextmanager
async def open_recorder(
    bb: Session, agent_id: str = "*", *, all_clusters: bool = False
) -> AsyncGenerator[ClaimRecorder, None]:
    """Record the claims that a session hears during a block.

    An exception of the block leaves without a group. Leaving is a checkpoint.

    Args:
      bb: the session that hears them.
      agent_id: the agent whose claims are recorded; ``"*"`` is all of them.
      all_clusters: whether claims of all clusters are recorded, and not only of the session's own.
    """
    recorder = ClaimRecorder()
    listening = bb.open_claims(agent_id, all_clusters=all_clusters)
    async with listening as claims, _open_background() as nursery:
        nursery.start_soon(recorder._record, claims)
        yield recorder


_VIRTUAL: Final = {"backbeat_session", "backbeat_metronome"}
_PATIENCE_SETTING: Final = "backbeat_patience"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the setting ``backbeat_patience``."""
    parser.addini(
        _PATIENCE_SETTING,
        "seconds of real time after which a test without progress in virtual time fails",
        default=str(PATIENCE),
    )


def _clocks(item: pytest.Item) -> dict[str, trio.abc.Clock]:
    # These include the clocks that other fixtures ask for.
    values: dict[str, Any] = getattr(item, "funcargs", {})
    return {name: value for name, value in values.items() if isinstance(value, trio.abc.Clock)}


def pytest_itemcollected(item: pytest.Item) -> None:
    """Run tests that use a fixture of virtual time on that fixture's clock."""
    # pytest-trio looks for a clock only among the arguments of the test itself. But the function
    # that runs the test can be given to its marker.
    if not _VIRTUAL.intersection(getattr(item, "fixturenames", ())):
        return

    def run(
        function: Callable[[], Awaitable[Any]],
        *,
        clock: trio.abc.Clock | None,
        instruments: Sequence[trio.abc.Instrument],
    ) -> Any:
        clock = clock or next(iter(_clocks(item).values()))
        return trio.run(function, clock=clock, instruments=instruments)

    item.add_marker(pytest.mark.trio(run=run))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, object, object]:
    """Refuse a test whose fixtures need different clocks, before any of it runs."""
    result = yield
    names = set(getattr(item, "fixturenames", ()))
    clocks = _clocks(item)
    kit = sorted(names & _VIRTUAL)
    if kit and len({id(clock) for clock in clocks.values()}) > 1:
        raise pytest.UsageError(
            f"a test has one clock, but these fixtures need different ones: "
            f"{', '.join([*kit, *sorted(clocks)])}. `backbeat_session` is on `autojump_clock`, "
            "`backbeat_metronome` on `mock_clock`"
        )
    if "nats_server" in names and any(_is_virtual(clock) for clock in clocks.values()):
        virtual = [name for name, clock in sorted(clocks.items()) if _is_virtual(clock)]
        raise pytest.UsageError(
            f"`nats_server` needs a real clock, but {', '.join([*kit, *virtual])} "
            "brings virtual time, which does not wait for a server. For a session on the server, "
            "use `open_session(nats_url=nats_server.url)`"
        )
    return result


def _patience(request: pytest.FixtureRequest) -> float:
    return float(request.config.getini(_PATIENCE_SETTING))


@_fixture
async def backbeat_session(
    autojump_clock: trio.testing.MockClock, request: pytest.FixtureRequest
) -> AsyncGenerator[Session, None]:
    """Open a session whose virtual time jumps: 60 BPM, 8 beats a bar, beginning with beat 0."""
    async with open_session(tempo_bpm=60.0, patience=_patience(request)) as bb:
        yield bb


@_fixture
async def backbeat_claims(backbeat_session: Session) -> AsyncGenerator[ClaimRecorder, None]:
    """Record the claims of all agents on the bus of ``backbeat_session``."""
    async with open_recorder(backbeat_session) as recorder:
        yield recorder


@_fixture
async def backbeat_metronome(
    mock_clock: trio.testing.MockClock, request: pytest.FixtureRequest
) -> AsyncGenerator[ManualMetronome, None]:
    """Run a metronome in virtual time that passes only on demand."""
    async with open_metronome(mock_clock, patience=_patience(request)) as metronome:
        yield metronome


@_fixture
async def nats_server() -> AsyncGenerator[NatsServer, None]:
    """Run a real nats-server on a free loopback port, for one test."""
    async with NatsServer() as server:
        yield server
