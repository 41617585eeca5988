"""The views: what they cost while many operations report, and the processes that report.

A view runs as a process of its own, at a pseudo-terminal. Its processor time is that of the whole
process: it also holds the connection, decodes the claims and fills the model.
"""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import termios
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from statistics import median
from typing import Any, Final

import msgspec
import trio
from peers import TYPE, Ready, open_peer, open_process, say
from report import Figure, Outcome

import backbeat_trio as backbeat
from backbeat_trio import StatusClaim
from backbeat_trio._views.browse import Browser
from backbeat_trio._views.cells import UNICODE
from backbeat_trio._views.feed import grid_view
from backbeat_trio._views.model import ClusterModel
from backbeat_trio._views.reader import Reader
from backbeat_trio._views.terminal import Painter
from backbeat_trio._views.watch import draw
from backbeat_trio._wire import encode
from backbeat_trio.testing import CLUSTER_ID, NatsServer

AGENTS: Final = 10
SIZE: Final = (40, 120)
"""The rows and columns of the terminal."""
_TICKS: Final = os.sysconf("SC_CLK_TCK")
_TERMINAL: Final = {"TERM": "xterm-256color", "LC_ALL": "C.UTF-8"}


async def report(url: str, operations: str) -> None:
    """Run agents with so many live operations each, until standard input ends."""
    async with AsyncExitStack() as stack:
        for number in range(AGENTS):
            config = backbeat.BackbeatConfig(
                nats_url=url, cluster_id=CLUSTER_ID, agent_id=f"agent-{number}", lock_timeout=60.0
            )
            bb = await stack.enter_async_context(backbeat.session(config))
            for each in range(int(operations)):
                # Some are late soon, and their bars differ.
                bb.start_operation(TYPE, beats=5 + each % 100)
        say(Ready())
        await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)


class Held(msgspec.Struct):
    """What a process says that has taken in as much as a view keeps."""

    megabytes: float
    """The most memory that it has had."""
    frame: float
    """The processor seconds that reading and drawing a screen takes."""


async def hold(url: str, agents: str, operations: str) -> None:
    """Take in the claims of so many agents with so many live operations each, and draw them."""
    async with backbeat.session(nats_url=url) as bb:
        model = ClusterModel()
        begun = trio.current_time()
        model.set_grid(grid_view(bb), begun)
        cluster_id, beat = bb.config.cluster_id, bb.current_beat()
        for number in range(int(agents)):
            # Decoded, so that no two claims share a string.
            message = encode(_claims(f"agent-{number:05}", cluster_id, int(operations), beat))
            model.take(msgspec.json.decode(message, type=list[StatusClaim]), begun)
        totals = model.totals()
        assert (totals.agents, totals.live) == (int(agents), int(agents) * int(operations))
        browser, painter = Browser(), Painter(colors=True)
        frames: list[float] = []
        for key in ("1", "2", "3", "1", "s", "s", "s"):
            browser.press(key)
            # Each sees another version of the model, which has to be read.
            model.set_grid(grid_view(bb), begun)
            began = time.process_time()
            screen = draw(
                *(Reader(model), browser, SIZE[::-1], bb.current_position()),
                cluster_id=cluster_id,
                glyphs=UNICODE,
            )
            painter.paint(screen.lines)
            frames.append(time.process_time() - began)
        say(Held(megabytes(os.getpid()), median(frames)))


def _claims(agent: str, cluster_id: str, operations: int, beat: int) -> list[StatusClaim]:
    return [
        StatusClaim(
            *(agent, f"{TYPE}-{agent}-{number}", beat, "executing", 1000, 0.0),
            f"P2P {TYPE}: executing (peers: 3, node: node-of-{agent})",
            *(cluster_id, TYPE, "executing", 3, 1000),
        )
        for number in range(operations)
    ]


def processor_seconds(pid: int) -> float:
    """Return the processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def megabytes(pid: int) -> float:
    """Return the most memory that a process has had, in MB."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024 / 1e6


@asynccontextmanager
async def at_terminal(*arguments: str) -> AsyncGenerator[tuple[int, bytearray], None]:
    """Run a command at a pseudo-terminal, and give its process id and what it has drawn."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, SIZE)
    drawn = bytearray()

    async def read(stream: trio.lowlevel.FdStream) -> None:
        while True:
            drawn.extend(await stream.receive_some())

    async with trio.lowlevel.FdStream(ours) as stream, trio.open_nursery() as nursery:
        nursery.start_soon(read, stream)
        process = await trio.lowlevel.open_process(
            [sys.executable, "-m", "backbeat_trio", *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=subprocess.DEVNULL,
            env=os.environ | _TERMINAL,
        )
        try:
            yield process.pid, drawn
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()
            nursery.cancel_scope.cancel()
            os.close(theirs)


async def bench_watch(operations: int, seconds: float) -> Outcome:
    """Measure ``backbeat watch`` beside a program that only listens to the same claims."""
    values: dict[str, list[float]] = {"watch_share": [], "claims_share": []}
    pulse = [sys.executable, "-m", "backbeat_trio", "pulse", "--bpm", "60"]
    options = ("--cluster-id", CLUSTER_ID)
    async with (
        NatsServer() as server,
        open_process(*pulse, "--server", server.url, *options, stderr=subprocess.DEVNULL),
        open_peer("report", server.url, str(operations // AGENTS), script=__file__),
        at_terminal("watch", "-s", server.url, *options) as (watch, drawn),
        at_terminal("claims", "nobody", "-s", server.url, *options) as (claims, _),
    ):
        await _drawn(drawn, f"{operations:,} live")
        for _ in range(3):
            before = {pid: processor_seconds(pid) for pid in (watch, claims)}
            begun, drawn_before = time.perf_counter(), len(drawn)
            await trio.sleep(seconds)
            wall = time.perf_counter() - begun
            for name, pid in (("watch_share", watch), ("claims_share", claims)):
                values[name].append((processor_seconds(pid) - before[pid]) / wall)
        # The pulse is in the first line, and moves with each frame.
        frames = drawn.count(b"\x1b[1;1H", drawn_before) / wall
        rate = (len(drawn) - drawn_before) / wall / 1e3
        memory = megabytes(watch)
    note = (
        f"{frames:.1f} frames and {rate:.1f} kB a second, {memory:.0f} MB; "
        f"a session without claims {100 * median(values['claims_share']):.1f} %"
    )
    return [Figure("watch", 100 * median(values["watch_share"]), note)], values


async def bench_watch_memory(agents: int, operations: int) -> Outcome:
    """Measure the memory of a view that has as much as it keeps, and what a screen costs then."""
    command = [sys.executable, __file__, "hold", "memory://bench"]
    async with open_process(*command, str(agents), str(operations // agents)) as peer:
        held = await peer.read(Held)
    note = f"{agents:,} agents, {operations:,} operations; {held.frame * 1e3:.0f} ms a screen"
    return [Figure("watch_memory", held.megabytes, note)], {
        "megabytes": [held.megabytes],
        "screen_s": [held.frame],
    }


async def _drawn(drawn: bytearray, text: str) -> None:
    with trio.fail_after(120):
        while text.encode() not in drawn:  # noqa: ASYNC110 - it is what a process draws
            await trio.sleep(0.1)


_ROLES: Final[dict[str, Any]] = {"report": report, "hold": hold}

if __name__ == "__main__":
    trio.run(_ROLES[sys.argv[1]], *sys.argv[2:])
