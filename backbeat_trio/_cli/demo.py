"""The demonstration: a server, a metronome and three agents, seen at work for some beats."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Final, Literal

import click
import trio

from .._errors import BeatBudgetExceeded
from .._runtime.operations import Phase
from .._session.lifecycle import session
from .._session.session import Session
from .._wire import HEALTH_TASK_ID, StatusClaim
from ..nats_server import NatsServer
from .parameters import tempo

if TYPE_CHECKING:
    from rich.table import Table

_CLUSTER: Final = "backbeat-demo"
_AGENTS: Final = ("alice", "bob", "carol")
# Type, estimate, and how many beats it really takes.
_WORK: Final = (
    ("election", 5, 4.0),
    ("dht_store", 3, 2.0),
    ("pubsub_sync", 2, 1.0),
    ("peer_discovery", 4, 3.0),
)
# Every so often one takes longer than it may.
_LATE_EVERY: Final = 7
_PATIENCE: Final = 10.0
# From so many columns on, the table has all of its columns.
_WIDE: Final = 80

_NEXT: Final = """\
What to try next, with a server of your own:
  nats-server -js -a 127.0.0.1 &
  backbeat pulse -s nats://127.0.0.1:4222 --bpm 120 &
  backbeat status -s nats://127.0.0.1:4222
  backbeat exec --server nats://127.0.0.1:4222 --beats 10 -- sleep 60
  backbeat tempo -s nats://127.0.0.1:4222 240
"backbeat help COMMAND" explains each of them."""


async def work(bb: Session, number: int) -> None:
    """Run operations of the known types, one after the other, for ever."""
    while True:
        kind, estimate, needed = _WORK[number % len(_WORK)]
        if number % _LATE_EVERY == _LATE_EVERY - 1:
            needed = 2.0 * estimate
        with contextlib.suppress(BeatBudgetExceeded):
            async with bb.operation(kind, beats=estimate, enforce=True) as operation:
                for phase in (Phase.CONNECTING, Phase.NEGOTIATING, Phase.EXECUTING):
                    operation.advance(phase, peers=len(_AGENTS) - 1)
                    await bb.sleep(needed / 3)
        number += 1


async def _agent(url: str, name: str, number: str) -> int:
    """Run one agent, until it is terminated."""
    async with session(nats_url=url, agent_id=name, node_id=name, cluster_id=_CLUSTER) as bb:
        await work(bb, int(number))
    return 0


@asynccontextmanager
async def _program(*arguments: str) -> AsyncGenerator[trio.Process, None]:
    # A session of its own, as Ctrl-C is for the demonstration: it ends its programs in order.
    command = [sys.executable, "-m", "backbeat_trio", *arguments]
    process = await trio.lowlevel.open_process(
        command, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        yield process
    finally:
        with trio.CancelScope(shield=True):
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            with trio.move_on_after(_PATIENCE):
                await process.wait()
            if process.returncode is None:
                process.kill()
                await process.wait()


@asynccontextmanager
async def _cluster(bpm: float, stack: AsyncExitStack) -> AsyncGenerator[str, None]:
    async with (
        NatsServer() as server,
        _program(
            *("pulse", "-s", server.url, "--cluster-id", _CLUSTER),
            *("--bpm", str(bpm), "--id", "demo-pulse"),
        ),
        AsyncExitStack() as agents,
    ):
        for number, name in enumerate(_AGENTS):
            program = _program("demo", "--agent", server.url, name, str(number))
            await agents.enter_async_context(program)
        # The agents are ended by the observer, while it still listens to what they say last.
        stack.push_async_exit(agents.pop_all())
        yield server.url


@asynccontextmanager
async def _in_process(bpm: float, stack: AsyncExitStack) -> AsyncGenerator[str, None]:
    url = f"memory://backbeat-demo-{os.getpid()}"

    async def agent(name: str, number: int) -> None:
        async with session(
            nats_url=url, agent_id=name, node_id=name, cluster_id=_CLUSTER, tempo_bpm=bpm
        ) as bb:
            await work(bb, number)

    async def agents(task_status: trio.TaskStatus[None]) -> None:
        try:
            with scope:
                async with trio.open_nursery() as nursery:
                    for number, name in enumerate(_AGENTS):
                        nursery.start_soon(agent, name, number)
                    task_status.started()
        finally:
            # Also if it is the nursery around it that was cancelled.
            ended.set()

    async def stop(*_: object) -> None:
        scope.cancel()
        await ended.wait()

    scope, ended = trio.CancelScope(), trio.Event()
    async with trio.open_nursery() as outer:
        await outer.start(agents)
        stack.push_async_exit(stop)
        yield url
        scope.cancel()


class _Show:
    """What has been seen, as a live table on a terminal and as lines elsewhere."""

    def __init__(self, bb: Session, beats: int) -> None:
        self.bb = bb
        self.beats = beats
        self.claims = 0
        self.ended: Counter[tuple[str, Literal["done", "failed"]]] = Counter()
        self.agents: set[str] = set()
        self.all_there = trio.Event()
        self.tempos: list[str] = []
        self._first = 0
        self._live: dict[str, StatusClaim] = {}

    def begin(self) -> None:
        self._first = self.bb.current_beat()
        self.tempos.append(f"{self.bb.tempo_bpm:g}")

    def take(self, claim: StatusClaim) -> None:
        if claim.agent_id not in _AGENTS:
            return
        self.claims += 1
        self.agents.add(claim.agent_id)
        if self.agents.issuperset(_AGENTS):
            self.all_there.set()
        if claim.task_id == HEALTH_TASK_ID:
            return
        if claim.state == "done" or claim.state == "failed":
            self.ended[claim.task_id.rpartition("-")[0], claim.state] += 1
        self._live[claim.agent_id] = claim

    def table(self, width: int) -> Table:
        from rich.table import Table

        bb = self.bb
        table = Table(
            title=f"{_CLUSTER}   beat {bb.current_beat()}   bar {bb.current_bar()}   "
            f"{bb.tempo_bpm:g} BPM",
            caption=f"beat {bb.current_beat() - self._first} of {self.beats}, "
            f"{self.claims} claims heard",
        )
        wide = width >= _WIDE
        headings = ("agent", "operation", "state", "left", "progress", "notes")
        for heading in headings if wide else headings[:4]:
            table.add_column(heading)
        for agent, claim in sorted(self._live.items()):
            kind = claim.task_id if wide else claim.task_id.rpartition("-")[0]
            notes = claim.notes.partition(" (")[0] if claim.state != "failed" else claim.notes
            cells = (
                agent,
                kind,
                claim.state,
                str(claim.beats_left),
                f"{claim.progress:.0%}",
                notes,
            )
            table.add_row(*(cells if wide else cells[:4]))
        return table

    def line(self) -> str:
        bb = self.bb
        states = "  ".join(
            f"{agent}: {claim.task_id.rpartition('-')[0]} {claim.state} {claim.progress:.0%}"
            for agent, claim in sorted(self._live.items())
        )
        return f"beat {bb.current_beat():>4}  {bb.tempo_bpm:g} BPM  {states}"

    def summary(self) -> str:
        bb = self.bb
        tempos = " -> ".join(self.tempos)
        beats, agents = bb.current_beat() - self._first, len(self.agents)
        lines = [f"{beats} beats, {agents} agents, {self.claims} claims heard, tempo {tempos} BPM"]
        for kind, _, _ in _WORK:
            done, failed = self.ended[kind, "done"], self.ended[kind, "failed"]
            lines.append(f"  {kind:<16} {done:>3} done  {failed:>3} over budget")
        return "\n".join(lines)


async def _observe(show: _Show) -> None:
    from rich.console import Console
    from rich.live import Live

    bb, console = show.bb, Console()
    half = show.beats // 2
    show.begin()
    with contextlib.ExitStack() as stack:
        live = None
        if console.is_terminal:
            live = stack.enter_context(
                Live(show.table(console.width), console=console, auto_refresh=False)
            )

        def say(text: str) -> None:
            if live is None:
                click.echo(text)
            else:
                live.console.print(text, markup=False, highlight=False)

        say(
            "Step 2: each agent runs one operation after the other, and reports on every beat. One "
            f"operation in {_LATE_EVERY} takes too long, and is cut when its budget of beats has "
            "run out."
        )
        number = 0
        async for beat in bb.beats():
            number += 1 + beat.skipped
            if number >= half > 0:
                half = 0
                tempo = 2 * bb.tempo_bpm if bb.tempo_bpm <= 3000 else bb.tempo_bpm / 2
                changes = await bb.set_tempo(tempo)
                say(
                    f"Step 3: from beat {changes} on the tempo is {tempo:g} BPM, for everybody at "
                    "once. Budgets stay the same in beats, and change in seconds."
                )
            if show.tempos[-1] != f"{beat.tempo_bpm:g}":
                show.tempos.append(f"{beat.tempo_bpm:g}")
            if live is not None:
                live.update(show.table(console.width), refresh=True)
            else:
                click.echo(show.line())
            if number >= show.beats:
                return


async def _demo(*, memory: bool, beats: int, bpm: float) -> int:
    """Show a small cluster for some beats; return 0 where all of it was seen to work."""
    beats = max(beats, 1)
    async with AsyncExitStack() as outer:
        agents = await outer.enter_async_context(AsyncExitStack())
        place = _in_process if memory else _cluster
        where = "in this process" if memory else "and a nats-server, each a process"
        click.echo(
            f"Step 1: start a metronome at {bpm:g} beats a minute and three agents, "
            f"{', '.join(_AGENTS[:-1])} and {_AGENTS[-1]}, {where}."
        )
        url = await outer.enter_async_context(place(bpm, agents))
        async with session(
            nats_url=url,
            agent_id="observer",
            cluster_id=_CLUSTER,
            tempo_bpm=bpm,
            lock_timeout=_PATIENCE,
        ) as bb:
            show = _Show(bb, beats)

            async def listen(claims: AsyncIterator[StatusClaim]) -> None:
                async for claim in claims:
                    show.take(claim)

            async with bb.open_claims() as claims, trio.open_nursery() as nursery:
                nursery.start_soon(listen, claims)
                with trio.move_on_after(_PATIENCE):
                    await show.all_there.wait()
                await _observe(show)
                await agents.aclose()
                # What they said last is on its way.
                await bb.sleep(1)
                nursery.cancel_scope.cancel()
            locked = bb.health().connected and bb.health().leader_id is not None
    click.echo(f"Step 4: what was heard of it.\n{show.summary()}\n\n{_NEXT}")
    worked = locked and show.agents >= set(_AGENTS) and sum(show.ended.values()) > 0
    return 0 if worked else 1


@click.command("demo")
@click.option("--memory", is_flag=True, help="Run all of it in one process, without a server.")
@click.option(
    "--beats", type=click.IntRange(0), default=32, metavar="N", help="Beats to run; by default 32."
)
@click.option(
    "--bpm", type=tempo, default=180.0, metavar="N", help="Tempo to begin with; by default 180."
)
@click.option("--agent", nargs=3, hidden=True)
async def show_demo(
    memory: bool, beats: int, bpm: float, agent: tuple[str, str, str] | None
) -> int:
    """Show a small cluster at work, step by step, for about ten seconds.

    It starts a nats-server, a metronome and three agents, and ends them again.
    """
    if agent:
        return await _agent(*agent)
    return await _demo(memory=memory, beats=beats, bpm=bpm)
