"""A kit for testing what is built on this: sessions in virtual time, and no server.

Have pytest load the fixtures, with ``trio_mode = true`` or ``@pytest.mark.trio`` for the tests::

    # conftest.py
    pytest_plugins = ["backbeat_trio.testing"]

    async def test_budget(backbeat_session):        # virtual time: this takes no time at all
        with backbeat_session.move_on_after(2) as scope:
            await trio.sleep_forever()
        assert scope.cancelled_caught

`backbeat_session` follows a clock that jumps to the next deadline when nothing is left to do.
`backbeat_metronome` ticks on demand instead, and does not move by itself. `backbeat_claims` records
what every agent on the same bus says. `nats_server` is a real server on a free loopback port.

A test has one clock: fixtures with different clocks in one test are an error when it is set up. In
virtual time a test that waits for what never comes would hang, or have the clock jump for ever. It
fails instead, after `PATIENCE` seconds of real time, or as many as pytest's setting
``backbeat_patience`` says.
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

from ._config import BackbeatConfig
from ._errors import Logger
from ._metronome.metronome import Metronome
from ._session.lifecycle import session
from ._session.session import Session
from ._transport.memory import MemoryBus, MemoryTransport
from ._transport.protocol import Transport
from ._wire import ClaimState, StatusClaim
from .nats_server import NatsServer as NatsServer

CLUSTER_ID: Final = "test-cluster"
"""The cluster of the kit's sessions and metronomes."""
AGENT_ID: Final = "test-agent"
"""The agent that the kit's session is."""
NODE_ID: Final = "test-node"
"""The node that the kit's session is on."""
PATIENCE: Final = 10.0
"""How long virtual time may lead nowhere before the test fails, in seconds of real time."""

_PACKAGE: Final = os.path.dirname(__file__)
# Frames in these say nothing about where a test is.
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

    What the block raises leaves as itself, and so does the exception of a task that fails. Where
    both raise, the two leave together in a group.
    """
    failure: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            try:
                yield nursery
            except BaseException as error:
                if nursery.cancel_scope.cancel_called:
                    # It may be the cancellation by which the nursery answers a task that failed.
                    raise
                failure = error
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        errors = [*group.exceptions] if failure is None else [failure, *group.exceptions]
        failure = errors[0] if len(errors) == 1 else group.derive(errors)
    # Outside of the handler, so that the exception does not get the group for its context.
    if failure is not None:
        try:
            raise failure
        finally:
            # Its traceback holds this frame, and this frame would hold it.
            del failure


def _is_virtual(clock: trio.abc.Clock) -> bool:
    # A mock clock with a rate runs along with real time.
    return isinstance(clock, trio.testing.MockClock) and clock.rate == 0


def _is_ours(task: trio.lowlevel.Task) -> bool:
    code = getattr(task.coro, "cr_code", None)
    return code is not None and code.co_filename.startswith(_PACKAGE + os.sep)


def _may_be_woken() -> bool:
    """Tell whether a thread or a file that Trio knows of may wake a task."""
    io = trio.lowlevel.current_statistics().io_statistics
    names = ("tasks_waiting_read", "tasks_waiting_write", "tasks_waiting_overlapped")
    waiting = getattr(io, "tasks_waiting", 0) + sum(getattr(io, name, 0) for name in names)
    # One task of Trio's own always waits, for calls from other threads.
    return waiting > 1 or trio.testing.active_thread_count() > 0


def _where() -> Generator[str, None, None]:
    """Give the tasks that are not the kit's own, each with the line at which it waits."""
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
    """What notices that virtual time leads a test nowhere.

    On a clock that stands still Trio's loop then sleeps: nothing would ever wake it. On one that
    jumps, only the tasks of this package run, and none of the test's own waits for a time.
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
        # So that a debugger or a machine that was asleep does not count.
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
        # Beats are counted apart: Trio does not know of deadlines in beats.
        now = self._clock.current_time()
        return any(now < deadline < math.inf for deadline in self._deadlines.values()) or any(
            bb.tempo_bpm and bb.statistics().live_scopes for bb in self.sessions
        )

    def _wake(self) -> None:
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(lambda: None)


class _Limit(trio.abc.Instrument):
    """What cancels a scope while tasks run, once some seconds of real time are over."""

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
    """Have the block fail where virtual time leads nowhere; with a real clock, do nothing."""
    clock = trio.lowlevel.current_clock()
    watch = _watches.get()
    if not isinstance(clock, trio.testing.MockClock) or watch is not None:
        # Two that notice the same would have both errors leave in a group.
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
    patience: float = PATIENCE,
    **overrides: Any,
) -> AsyncGenerator[Session, None]:
    """Open a session on an in-process bus, with settings that depend on no environment.

    What the body raises leaves as itself. Entering and leaving are checkpoints.

    Args:
      bus: the bus to be on, with whoever leads there; None is one of its own, with a metronome.
      transport: used in place of one over the bus.
      logger: as for `backbeat_trio.session`.
      patience: in virtual time, how long only the tasks of this package may run, or none at all,
        in seconds of real time.
      **overrides: fields of `BackbeatConfig`.

    Raises:
      RuntimeError: where ``patience`` is over; the text has the lines at which tasks wait. A
        thread of `trio.to_thread` and a file that a task waits for are waited for in any case.
    """
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
        session(config, transport=transport, logger=logger) as bb,
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
    """A metronome whose time stands still but for what a test asks of it.

    Made by `open_metronome` or the fixture ``backbeat_metronome``.
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
        """The bus that it leads on, for `open_session`."""

    @property
    def beat(self) -> int:
        """The index of the present beat."""
        return self._metronome.current_beat()

    async def tick(self, beats: int = 1) -> int:
        """Go to the beginning of the next beat, or of a later one, and let everybody react.

        Time passes as with `pass_time`, so no beat and no deadline on the way is skipped. Where
        the grid stands still, a second passes in place of each beat. A checkpoint.

        Args:
          beats: how many, 1 or more.

        Returns:
          The index of the present beat.

        Raises:
          RuntimeError: as `pass_time`.
        """
        for _ in range(beats):
            await self._pass_until(self._metronome.next_beat_time())
        return self.beat

    async def pass_time(self, seconds: float) -> None:
        """Let some seconds of virtual time pass, and let everybody react to it.

        Time stops at each deadline on the way until all tasks that it wakes are blocked again. So
        tasks see the same order of events as on a real clock. A checkpoint.

        Args:
          seconds: how many, 0 or more.

        Raises:
          RuntimeError: where a task runs on and on without waiting for a later time.
          ValueError: where ``seconds`` is negative, infinite or NaN.
        """
        if not 0 <= seconds < math.inf:
            raise ValueError("`seconds` must be 0 or more, and finite")
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
                f"a task runs on and on: for {self._patience:g} s of real time there was always "
                "one that could go on, so virtual time cannot pass. Does it sleep for no time in "
                "a loop?"
            )

    async def set_tempo(
        self, bpm: float | None, *, at_beat: int | None = None, over: int = 0
    ) -> int:
        """Commit a change of tempo, and return the beat at which it begins.

        A tempo of 0 has the grid stand still, and None has it go on. See
        `backbeat_trio.Metronome.change_tempo`.

        Raises:
          TempoRefused: where the beat is past or too soon.
          ValueError: where the tempo is out of range.
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
    """Run a metronome that ticks on demand, on a bus of its own.

    What the body raises leaves as itself. Entering and leaving are checkpoints.

    Args:
      clock: the clock of this Trio run; it must neither run nor jump by itself.
      tempo_bpm: beats per minute, 0.1 to 6,000.
      beats_per_bar: the length of a bar.
      patience: how long all tasks may wait while time stands still, or run while it should pass,
        in seconds of real time.

    Raises:
      RuntimeError: where ``patience`` is over; the text has the lines at which tasks wait. A
        thread of `trio.to_thread` and a file that a task waits for are waited for in any case.
      ValueError: where ``clock`` is not the clock of this Trio run, or moves by itself.
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
    """All claims that were heard, in order. Made by `open_recorder` or ``backbeat_claims``."""

    def __init__(self) -> None:
        self.claims: list[StatusClaim] = []
        """What was heard so far."""
        self._awaited: dict[tuple[str, ClaimState], trio.Event] = {}

    def of(self, task_id: str) -> list[StatusClaim]:
        """Return the claims of one operation."""
        return [claim for claim in self.claims if claim.task_id == task_id]

    async def wait_for(self, task_id: str, state: ClaimState) -> StatusClaim:
        """Wait for a claim of one operation in some state; a checkpoint where it must wait."""
        while True:
            for claim in self.of(task_id):
                if claim.state == state:
                    return claim
            # Other claims do not wake it: a test that waits in vain would seem to be busy.
            await self._awaited.setdefault((task_id, state), trio.Event()).wait()

    async def _record(self, claims: AsyncIterator[StatusClaim]) -> None:
        async for claim in claims:
            self.claims.append(claim)
            awaited = self._awaited.pop((claim.task_id, claim.state), None)
            if awaited is not None:
                awaited.set()


@asynccontextmanager
async def open_recorder(bb: Session, agent_id: str = "*") -> AsyncGenerator[ClaimRecorder, None]:
    """Record the claims that a session hears, for the length of a block.

    What the body raises leaves as itself. Leaving is a checkpoint.
    """
    recorder = ClaimRecorder()
    async with bb.open_claims(agent_id) as claims, _open_background() as nursery:
        nursery.start_soon(recorder._record, claims)
        yield recorder


_VIRTUAL: Final = {"backbeat_session", "backbeat_metronome"}
_PATIENCE_SETTING: Final = "backbeat_patience"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the setting of the fixtures' patience."""
    parser.addini(
        _PATIENCE_SETTING,
        "how long virtual time may lead a test nowhere before it fails, in seconds of real time",
        default=str(PATIENCE),
    )


def _clocks(item: pytest.Item) -> dict[str, trio.abc.Clock]:
    # Those that other fixtures ask for are among them.
    values: dict[str, Any] = getattr(item, "funcargs", {})
    return {name: value for name, value in values.items() if isinstance(value, trio.abc.Clock)}


def pytest_itemcollected(item: pytest.Item) -> None:
    """Run tests that use a fixture of virtual time on that fixture's clock."""
    # pytest-trio only looks for a clock among the arguments of the test itself. What it runs a test
    # with is an argument of its marker, though.
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
            "brings virtual time, which does not wait for a server. For a session on the server "
            "use `open_session(nats_url=nats_server.url)`"
        )
    return result


def _patience(request: pytest.FixtureRequest) -> float:
    return float(request.config.getini(_PATIENCE_SETTING))


@_fixture
async def backbeat_session(
    autojump_clock: trio.testing.MockClock, request: pytest.FixtureRequest
) -> AsyncGenerator[Session, None]:
    """Give a session in virtual time that jumps: 60 beats a minute, 8 beats a bar, from beat 0."""
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
    """Give a metronome that ticks on demand, in virtual time that stands still otherwise."""
    async with open_metronome(mock_clock, patience=_patience(request)) as metronome:
        yield metronome


@_fixture
async def nats_server() -> AsyncGenerator[NatsServer, None]:
    """Give a real nats-server of the test's own, on a free loopback port."""
    async with NatsServer() as server:
        yield server
