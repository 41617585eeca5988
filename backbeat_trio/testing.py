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
what every agent on the same bus says. `nats_server` is a real server on a free loopback port; it
must not be mixed with virtual time, which would run away while a message is on its way.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, TypeVar, cast, final

import pytest
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


F = TypeVar("F", bound=Callable[..., AsyncGenerator[Any, None]])

_buses = itertools.count()


def _fixture(function: F) -> F:
    return cast(F, trio_fixture(function))


@asynccontextmanager
async def open_session(
    bus: MemoryBus | None = None,
    /,
    *,
    transport: Transport | None = None,
    logger: Logger | None = None,
    **overrides: Any,
) -> AsyncGenerator[Session, None]:
    """Open a session on an in-process bus, with settings that depend on no environment.

    Args:
      bus: the bus to be on, with whoever leads there; None is one of its own, with a metronome.
      transport: used in place of one over the bus.
      logger: as for `backbeat_trio.session`.
      **overrides: fields of `BackbeatConfig`.
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
    async with session(config, transport=transport, logger=logger) as bb:
        yield bb


@final
class ManualMetronome:
    """A metronome whose time stands still but for what a test asks of it.

    Made by `open_metronome` or the fixture ``backbeat_metronome``.
    """

    def __init__(self, clock: trio.testing.MockClock, bus: MemoryBus, metronome: Metronome) -> None:
        self._clock = clock
        self._metronome = metronome
        self.bus = bus
        """The bus that it leads on, for `open_session`."""

    @property
    def beat(self) -> int:
        """The index of the present beat."""
        return self._metronome.current_beat()

    async def tick(self, beats: int = 1) -> int:
        """Go to the beginning of the next beat, or of a later one, and let everybody react.

        The beats come one by one, and none is skipped.

        Args:
          beats: how many, 1 or more.

        Returns:
          The index of the beat that has begun.
        """
        for _ in range(beats):
            await self.pass_time(self._metronome.next_beat_time() - trio.current_time())
        return self.beat

    async def pass_time(self, seconds: float) -> None:
        """Let some seconds of virtual time pass, and let everybody react to it."""
        await trio.testing.wait_all_tasks_blocked()
        self._clock.jump(seconds)
        await trio.testing.wait_all_tasks_blocked()

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
    clock: trio.testing.MockClock, *, tempo_bpm: float = 60.0, beats_per_bar: int = 8
) -> AsyncGenerator[ManualMetronome, None]:
    """Run a metronome that ticks on demand, on a bus of its own.

    Args:
      clock: the clock of this Trio run; it must neither run nor jump by itself.
      tempo_bpm: beats per minute, 0.1 to 6,000.
      beats_per_bar: the length of a bar.
    """
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
    async with trio.open_nursery() as nursery:
        await nursery.start(transport.run)
        await nursery.start(metronome.run)
        yield ManualMetronome(clock, bus, metronome)
        nursery.cancel_scope.cancel()


@final
class ClaimRecorder:
    """All claims that were heard, in order. Made by `open_recorder` or ``backbeat_claims``."""

    def __init__(self) -> None:
        self.claims: list[StatusClaim] = []
        """What was heard so far."""
        self._heard = trio.lowlevel.ParkingLot()

    def of(self, task_id: str) -> list[StatusClaim]:
        """Return the claims of one operation."""
        return [claim for claim in self.claims if claim.task_id == task_id]

    async def wait_for(self, task_id: str, state: ClaimState) -> StatusClaim:
        """Wait for a claim of one operation in some state; a checkpoint where it must wait."""
        while True:
            for claim in self.of(task_id):
                if claim.state == state:
                    return claim
            await self._heard.park()

    async def _record(self, claims: AsyncIterator[StatusClaim]) -> None:
        async for claim in claims:
            self.claims.append(claim)
            self._heard.unpark_all()


@asynccontextmanager
async def open_recorder(bb: Session, agent_id: str = "*") -> AsyncGenerator[ClaimRecorder, None]:
    """Record the claims that a session hears, for the length of a block."""
    recorder = ClaimRecorder()
    async with bb.open_claims(agent_id) as claims, trio.open_nursery() as nursery:
        nursery.start_soon(recorder._record, claims)
        yield recorder
        nursery.cancel_scope.cancel()


_VIRTUAL: Final = {"backbeat_session", "backbeat_metronome"}


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
        values = getattr(item, "funcargs", {}).values()
        clocks = [value for value in values if isinstance(value, trio.abc.Clock)]
        return trio.run(function, clock=clock or clocks[0], instruments=instruments)

    item.add_marker(pytest.mark.trio(run=run))


@_fixture
async def backbeat_session(
    autojump_clock: trio.testing.MockClock,
) -> AsyncGenerator[Session, None]:
    """Give a session in virtual time that jumps: 60 beats a minute, 8 beats a bar, from beat 0."""
    async with open_session(tempo_bpm=60.0) as bb:
        yield bb


@_fixture
async def backbeat_claims(backbeat_session: Session) -> AsyncGenerator[ClaimRecorder, None]:
    """Record the claims of all agents on the bus of ``backbeat_session``."""
    async with open_recorder(backbeat_session) as recorder:
        yield recorder


@_fixture
async def backbeat_metronome(
    mock_clock: trio.testing.MockClock,
) -> AsyncGenerator[ManualMetronome, None]:
    """Give a metronome that ticks on demand, in virtual time that stands still otherwise."""
    async with open_metronome(mock_clock) as metronome:
        yield metronome


@_fixture
async def nats_server() -> AsyncGenerator[NatsServer, None]:
    """Give a real nats-server of the test's own, on a free loopback port."""
    async with NatsServer() as server:
        yield server
