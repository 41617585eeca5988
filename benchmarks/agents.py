"""The cluster whose skew is measured: a metronome, agents and Link peers, each in its own process.

All processes of one machine read the same clock, `time.perf_counter_ns`, the common clock. The
positions of the agents are compared by it. The clock that an agent itself uses is the common clock
with added errors. So an agent knows cluster time from the network alone.

A process reports that it is ready, begins when it is told to, and reports what it saw. It ends when
its standard input ends. So it ends with the process that started it, however that one ends.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Final, final

import msgspec
import trio
from peers import Peer, Ready, open_peer, say

from backbeat_trio import BackbeatConfig, Session, session
from backbeat_trio._metronome.metronome import Metronome
from backbeat_trio._transport.nats import NatsTransport

CLUSTER_ID: Final = "skew-cluster"
# How often a position is read, and for how long a reading may take: what took longer was held up
# between its looks at the two clocks, and would count as skew.
PAUSE: Final = 0.025
BRACKET_NS: Final = 20_000
_TRIES: Final = 3
# Link counts beats for each peer from an origin of its own; only the phase in these is common.
QUANTUM: Final = 4.0


@final
class SkewedClock(trio.abc.Clock):
    """The common clock, with errors: off by some seconds, and fast by some parts in a million."""

    # Its seconds last about a second, so the timers of the kernel serve it.
    is_real = True

    def __init__(self, ppm: float = 0.0, seconds: float = 0.0) -> None:
        self._rate = 1 + ppm / 1e6
        self._origin = seconds

    def start_clock(self) -> None:
        """See `trio.abc.Clock.start_clock`."""

    def current_time(self) -> float:
        """See `trio.abc.Clock.current_time`."""
        return self._origin + time.perf_counter() * self._rate

    def deadline_to_sleep_time(self, deadline: float) -> float:
        """See `trio.abc.Clock.deadline_to_sleep_time`."""
        return (deadline - self.current_time()) / self._rate


class Began(msgspec.Struct):
    """What the metronome says: when its beat 0 began, by the common clock."""

    common_ns: int


class Positions(msgspec.Struct):
    """What an agent or a Link peer believed, in the course of time."""

    common_ns: list[int]
    """When the position was read, by the common clock."""
    position_ns: list[int]
    """The position times the length of a beat."""
    uncertainty_ns: list[int]
    """What the agent said that it may be wrong by."""
    left_out: int = 0
    """Readings that took too long."""
    peers: int = 1
    """How many others a Link peer sees at the end."""
    processor: float = 0.0
    """The share of a core that the process took."""


class Heard(msgspec.Struct):
    """When the beats of an iterator came, by the common clock."""

    indexes: list[int]
    common_ns: list[int]


async def wait_go() -> None:
    """Wait until whoever started this process has it begin, and end with that one."""
    await trio.lowlevel.wait_readable(sys.stdin)
    if not os.read(sys.stdin.fileno(), 16):
        os._exit(0)


def open_role(
    role: str, *arguments: object, ppm: float = 0.0, seconds: float = 0.0
) -> AbstractAsyncContextManager[Peer]:
    """Run a process of this file for the length of a block, its clock off by so much."""
    return open_peer(role, *map(str, (ppm, seconds, *arguments)), script=__file__)


async def read_positions(
    read_ns: Callable[[], int], read_uncertainty: Callable[[], int], seconds: float
) -> Positions:
    """Read a position and the common clock together, for some seconds."""
    seen = Positions([], [], [])
    begin, processor = time.perf_counter(), time.process_time()
    while (elapsed := time.perf_counter() - begin) < seconds:
        await trio.sleep(PAUSE)
        # After a pause the first reading is slow: its code has left the caches.
        read_ns()
        for _ in range(_TRIES):
            before = time.perf_counter_ns()
            position = read_ns()
            after = time.perf_counter_ns()
            if after - before <= BRACKET_NS:
                seen.common_ns.append((before + after) // 2)
                seen.position_ns.append(position)
                seen.uncertainty_ns.append(read_uncertainty())
                break
            seen.left_out += 1
    seen.processor = (time.process_time() - processor) / elapsed
    return seen


@asynccontextmanager
async def _join(url: str, number: str) -> AsyncGenerator[Session, None]:
    config = BackbeatConfig(
        cluster_id=CLUSTER_ID,
        agent_id=f"agent-{number}",
        node_id=f"node-{number}",
        nats_url=url,
        lock_timeout=30.0,
        require_connection=True,
    )
    async with session(config) as bb:
        if bb.health().epoch is None:
            raise RuntimeError("the agent found no metronome")
        say(Ready())
        await wait_go()
        yield bb


async def lead(url: str, bpm: str) -> None:
    """Be the metronome, as ``backbeat pulse`` is where the server has no JetStream.

    It is not that command only because nobody but the process itself knows when its beats begin.
    """
    transport = NatsTransport(BackbeatConfig(cluster_id=CLUSTER_ID, nats_url=url))
    metronome = Metronome(
        transport, cluster_id=CLUSTER_ID, leader_id="skew-leader", tempo_bpm=float(bpm)
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(transport.run)
        await transport.first_attempt()
        await nursery.start(metronome.run)
        # The first beat to come may become the present one between two looks.
        beat = metronome.current_beat() + 1
        first = metronome.next_beat_time() - beat * 60 / float(bpm)
        say(Ready())
        say(Began(round(first * 1e9)))
        await wait_go()


async def estimate(url: str, number: str, seconds: str) -> None:
    """Follow the metronome, and say where the grid is believed to be."""
    async with _join(url, number) as bb:
        beat_ns = 60e9 / bb.tempo_bpm

        def read_uncertainty() -> int:
            return round((bb.health().uncertainty or 0.0) * 1e9)

        seen = await read_positions(
            lambda: round(bb.current_position() * beat_ns), read_uncertainty, float(seconds)
        )
        say(seen)
        await wait_go()


async def follow(url: str, number: str, seconds: str, precise: str) -> None:
    """Follow the metronome, and say when its beats came."""
    async with _join(url, number) as bb:
        heard = Heard([], [])
        with trio.move_on_after(float(seconds)):
            async for beat in bb.beats(precise=precise == "precise"):
                heard.common_ns.append(time.perf_counter_ns())
                heard.indexes.append(beat.index)
        say(heard)
        await wait_go()


async def link(bpm: str, seconds: str) -> None:
    """Be a peer of Ableton Link, and say where its grid is believed to be."""
    peer = importlib.import_module("link").Link(float(bpm))
    peer.enabled = True
    try:
        say(Ready())
        await wait_go()
        clock, beat_ns = peer.clock(), 60e9 / float(bpm)

        def read_ns() -> int:
            position: float = peer.captureSessionState().beatAtTime(clock.micros(), QUANTUM)
            return round(position * beat_ns)

        seen = await read_positions(read_ns, lambda: 0, float(seconds))
        seen.peers = peer.numPeers()
        say(seen)
        await wait_go()
    finally:
        peer.enabled = False


_ROLES: Final[dict[str, Callable[..., Awaitable[None]]]] = {
    "lead": lead,
    "estimate": estimate,
    "follow": follow,
    "link": link,
}


def main() -> None:
    role, ppm, seconds, *arguments = sys.argv[1:]
    # Ctrl-C in a terminal is for whoever started this process, who ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    trio.run(partial(_ROLES[role], *arguments), clock=SkewedClock(float(ppm), float(seconds)))


if __name__ == "__main__":
    main()
