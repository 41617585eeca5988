"""Run a schedule: metronomes, agents and a server, and the faults that happen to them.

Metronomes and sessions are the real ones. `Watch` checks what they do.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Awaitable, Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any, Final, NamedTuple, TypeAlias, final

import trio
from clients import SimulatedJournal, SimulatedStore, SimulatedTransport
from faults import (
    Change,
    ClockJump,
    Command,
    Cut,
    Fault,
    HalfOpen,
    Kill,
    Lossy,
    Node,
    Pause,
    Resume,
    Schedule,
    ServerRestart,
    Slow,
    Stop,
    StoreTrouble,
    Suspend,
    WallJump,
    end_of,
)
from invariants import BEGIN_S, AgentView, Answered, Violation, Watch
from processes import MS, SECOND, Machine, Process, StuckError, World
from server import Connection, Link, Server, Way

import backbeat_trio as backbeat
import backbeat_trio._transport.jetstream
import backbeat_trio._transport.nats
from backbeat_trio._grid.timeline import Timeline
from backbeat_trio._wire import beat_subject

CLUSTER_ID: Final = "simulated"
_SAMPLE_NS: Final = 100 * MS
_TURNS_NS: Final = SECOND
# When, after all has healed, somebody has a grid go on that stands still, and how often.
_RESUME_S: Final = (12.0, 14.5, 17.0)
# How long a position may be held at most, and when it is certain that it is not held any more.
_HELD_NS: Final = 3600 * SECOND
_PAST_NS: Final = 2 * SECOND
# How near the end of a schedule may be to a change of the tempo.
_NEAR_NS: Final = SECOND // 2
# What leaving may take.
_LEAVING_S: Final = 8.0
# How soon the command line tries again where JetStream does not answer.
_RETRY: Final = 1.0

Main: TypeAlias = Callable[["Cluster", Process], Awaitable[None]]


@final
class Log:
    """The logger of a process: what it says goes into the trace."""

    def __init__(self, cluster: Cluster, process: Process) -> None:
        self._cluster, self._process = cluster, process

    def debug(self, message: object, *args: object) -> None:
        """Drop what is said on every beat."""

    def info(self, message: object, *args: object) -> None:
        """Keep what is said."""
        if not self._process.dead:
            self._cluster.note(self._process, str(message) % args)

    warning = error = info


@final
class PulseProcess:
    """A process that runs a metronome, as ``backbeat pulse`` does."""

    def __init__(self, cluster: Cluster, process: Process) -> None:
        self.process: Process = process
        self._cluster = cluster
        self._metronome: backbeat.Metronome | None = None

    async def run(self) -> None:
        """Run until asked to leave."""
        cluster, process, schedule = self._cluster, self.process, self._cluster.schedule
        transport = cluster.transport(process)
        store = SimulatedStore(transport)
        async with trio.open_nursery() as nursery:

            async def leave() -> None:
                await process.leaving.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(leave)
            await nursery.start(transport.run)
            while True:
                await transport.wait_connected()
                try:
                    await store.open()
                    break
                except backbeat.TransportBroken:
                    await trio.sleep(_RETRY)
            self._metronome = backbeat.Metronome(
                transport,
                cluster_id=CLUSTER_ID,
                leader_id=process.name,
                tempo_bpm=schedule.bpm,
                beats_per_bar=schedule.beats_per_bar,
                store=store,
                logger=Log(cluster, process),
                serve_info=False,
            )
            await self._metronome.run()

    def leads(self) -> bool:
        """Tell whether it leads."""
        return self._metronome is not None and self._metronome.leads

    def position(self) -> float | None:
        """Return the leader's position in beats; None if it does not lead.

        It is that of the leader's own cluster time. The time until its next beat would not do: its
        local clock may run faster or slower than cluster time.
        """
        leader = None if self._metronome is None else self._metronome._leader
        if leader is None:
            return None
        return self.process.look(lambda: leader.timeline.position_at(leader.cluster_ns()))

    def time_until(self, position: float) -> int:
        """Return how long it takes until the grid is past a position, in ns.

        It is 0 if the grid is past it already, or is not going to reach it.
        """
        leader = None if self._metronome is None else self._metronome._leader
        if leader is None:
            return 0
        reached = leader.timeline.time_of(position)
        left = reached - self.process.look(leader.cluster_ns)
        return left + _PAST_NS if 0 < left < _HELD_NS else 0

    def changes_tempo(self) -> bool:
        """Tell whether it leads, and the tempo changes about now."""
        leader = None if self._metronome is None else self._metronome._leader
        if leader is None:
            return False
        now = self.process.look(leader.cluster_ns)
        return any(abs(segment.t0_ns - now) < _NEAR_NS for segment in leader.timeline.segments)


@final
class AgentProcess:
    """A process with a session, that starts operations, and asks for changes when told to."""

    def __init__(self, cluster: Cluster, process: Process) -> None:
        self.process: Process = process
        self.view: AgentView = AgentView(process.name)
        self.bb: backbeat.Session | None = None
        self.completed: list[str] = []
        """The operations that it has completed, by their ids."""
        self.undelivered: int | None = None
        """How many terminal claims it says were not delivered, once it has ended."""
        self._cluster = cluster
        self._commands, self._to_do = trio.open_memory_channel[Command](100)

    async def run(self) -> None:
        """Run until asked to leave."""
        cluster, process = self._cluster, self.process
        config = backbeat.BackbeatConfig(
            cluster_id=CLUSTER_ID,
            agent_id=process.name,
            node_id=process.name,
            nats_url="nats://simulated:4222",
            tempo_bpm=cluster.schedule.bpm,
            beats_per_bar=cluster.schedule.beats_per_bar,
            # Nobody asks for it, and it would be most of what the server has to do.
            serve_info=False,
        )
        async with backbeat.session(config, logger=Log(cluster, process)) as bb:
            self.bb = bb
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._hear_beats, bb)
                nursery.start_soon(self._operate, bb)
                nursery.start_soon(self._change, bb, nursery)
                await process.leaving.wait()
                nursery.cancel_scope.cancel()
        if not process.dead:
            self.undelivered = bb.statistics().claims_pending

    async def _hear_beats(self, bb: backbeat.Session) -> None:
        cluster, process = self._cluster, self.process
        async for beat in bb.beats():
            if not process.dead:
                cluster.watch.beat(self, bb, beat)
                cluster.note(process, f"beat {beat.index} {beat.skipped} {beat.tempo_bpm:g}")

    async def _operate(self, bb: backbeat.Session) -> None:
        process, number = self.process, 0
        while True:
            await trio.sleep(process.chance.uniform(1, 6))
            number += 1
            id = f"{process.name}-{process.number}-{number}"
            async with bb.operation("pubsub_sync", id=id, beats=2):
                await trio.sleep(process.chance.uniform(0, 2))
            if not process.dead:
                self.completed.append(id)

    async def _change(self, bb: backbeat.Session, nursery: trio.Nursery) -> None:
        async for command in self._to_do:
            nursery.start_soon(self._do, bb, command)

    async def _do(self, bb: backbeat.Session, command: Command) -> None:
        cluster, process = self._cluster, self.process
        asked, refused, text = process.world.now, False, ""
        beat: int | None = None
        try:
            if isinstance(command, Change):
                beat = await bb.set_tempo(command.bpm, over=command.over)
            elif isinstance(command, Pause):
                beat = await bb.pause()
            else:
                beat = await bb.resume()
        except backbeat.TempoRefused as error:
            # One that could not be committed in time may have been committed after all.
            refused, text = "committed" not in str(error), str(error)
        except backbeat.MetronomeUnavailable as error:
            text = str(error)
        finally:
            if process.dead:
                # The leader may do it all the same.
                beat, refused, text = None, False, "its process was killed"
            cluster.watch.answered.append(
                Answered(command, asked, process.world.now, beat, refused, text)
            )
        cluster.note(process, f"{command}: {text or beat}")

    def ask(self, command: Command) -> None:
        """Have it ask for a change."""
        self.process.call(self._commands.send_nowait, command)

    # What is seen of it from outside. These are the only places that look behind the public names.

    @property
    def locked(self) -> bool:
        """Whether its grid is the cluster's."""
        listener = None if self.bb is None else self.bb._runtime.listener
        return listener is not None and listener.follower.locked

    def timeline(self) -> Timeline:
        """Return what it knows of the grid, from the present segment on."""
        bb = self.bb
        assert bb is not None
        return bb._clock.grid.timeline.since(bb._clock.cluster_ns())

    def present(self) -> tuple[float, float]:
        """Return its position, and its tempo."""
        bb = self.bb
        assert bb is not None
        return self.process.look(lambda: (bb.current_position(), bb.tempo_bpm))

    def follows(self) -> tuple[int | None, str | None]:
        """Return the epoch and the leader that it follows."""
        bb = self.bb
        assert bb is not None
        health = self.process.look(bb.health)
        return health.epoch, health.leader_id


class Result(NamedTuple):
    """What came of a schedule."""

    violations: tuple[Violation, ...]
    digest: str
    """Of all that happened."""
    trace: tuple[str, ...]
    frames: int
    turns: int


@final
class Cluster:
    """Runs one schedule.

    Args:
      schedule: what happens.
      keep: whether to keep the trace, and not its digest alone.
      mains: what the processes on some machines run in place of a metronome or an agent.

    """

    def __init__(
        self, schedule: Schedule, *, keep: bool = False, mains: Mapping[str, Main] | None = None
    ) -> None:
        self.schedule: Schedule = schedule
        self.world: World = World(schedule.seed)
        self.server: Server = Server(self.world)
        self.links: dict[str, Link] = {}
        self.watch: Watch = Watch(schedule, self.server.jetstream, self.links)
        self.agents: list[AgentProcess] = []
        self.pulses: list[PulseProcess] = []
        self._machines: dict[str, Machine] = {}
        self._processes: dict[str, Process] = {}
        self._all: list[Process] = []
        self._mains = dict(mains or {})
        self._trace: list[str] = []
        self._keep = keep
        self._digest = hashlib.blake2b(digest_size=16)
        self._turns: dict[int, int] = {}
        self.server.on_publish = self._on_publish
        self.server.jetstream.on_write = self._on_write

    def note(self, who: object, text: str) -> None:
        """Put something into the trace."""
        line = f"{self.world.now / SECOND:11.6f} {who!r}: {text}"
        self._digest.update(line.encode())
        if self._keep:
            self._trace.append(line)

    def transport(self, process: Process) -> SimulatedTransport:
        """Make a transport for a process."""
        return SimulatedTransport(process, self.server, self.links[process.machine.name])

    def _on_publish(self, connection: Connection, subject: str, data: bytes) -> None:
        if subject == beat_subject(CLUSTER_ID):
            self.note(connection.process, f"frame {data.decode()}")
            self.watch.published(connection, data, self.agents)

    def _on_write(self, process: Process, data: bytes, life: int) -> None:
        self.note(process, f"record {data.decode()}")
        self.watch.wrote(process, data, life)

    @contextmanager
    def _installed(self) -> Generator[None]:
        # A session imports these when it begins.
        nats: Any = backbeat_trio._transport.nats
        jetstream: Any = backbeat_trio._transport.jetstream
        kept = nats.NatsTransport, jetstream.ClaimStream

        def make(config: object) -> SimulatedTransport:
            assert self.world.current is not None
            return self.transport(self.world.current)

        nats.NatsTransport, jetstream.ClaimStream = make, SimulatedJournal
        try:
            yield
        finally:
            nats.NatsTransport, jetstream.ClaimStream = kept

    def run(self) -> Result:
        """Run it."""
        collecting = gc.isenabled()
        # What it finds, and when, is not the seed's to say.
        gc.disable()
        with self.world.patched(), self._installed():
            try:
                self._plan()
                self.world.run(self._end_ns)
                self.world.run(self.world.now + self._held_ns())
                while any(pulse.changes_tempo() for pulse in self.pulses):
                    # Agents that agree have different tempos for as long as they are apart. The
                    # next step of a ramp may come soon after this one.
                    self.world.run(self.world.now + 2 * _NEAR_NS)
                self._check()
                self._leave()
            except StuckError as error:
                self.watch.tell("busy", self.world.now, str(error))
            finally:
                self.world.current = None
                for process in self._all:
                    self._give_up(process)
                if collecting:
                    gc.enable()
        return Result(
            tuple(self.watch.violations),
            self._digest.hexdigest(),
            tuple(self._trace),
            self.watch.frames,
            sum(process.turns for process in self._all),
        )

    def _give_up(self, process: Process) -> None:
        try:
            process.kill()
        except StuckError as error:
            self.watch.tell("hangs", self.world.now, str(error))

    # Processes.

    @property
    def _end_ns(self) -> int:
        return round((self.schedule.seconds + self.schedule.quiet) * SECOND)

    def _at(self, seconds: float, function: Callable[..., None], *args: Any) -> None:
        self.world.at(round(seconds * SECOND), function, *args)

    def _plan(self) -> None:
        for node in self.schedule.nodes:
            self._machines[node.name] = Machine(
                self.world, node.name, ppm=node.ppm, wall_ns=round(node.wall_s * SECOND)
            )
            self.links[node.name] = Link(
                self.world,
                node.name,
                up_ns=round(node.up_ms * MS),
                down_ns=round(node.down_ms * MS),
                jitter_ns=round(node.jitter_ms * MS),
            )
            self._at(min(node.at, self.schedule.seconds), self._start, node, node.name)
        for fault in self.schedule.faults:
            if fault.at < self.schedule.seconds:
                self._at(fault.at, self._begin, fault)
        for seconds in _RESUME_S:
            self._at(self.schedule.seconds + seconds, self._resume, seconds == _RESUME_S[0])
        self.world.at(_SAMPLE_NS, self._sample)
        self.world.at(_TURNS_NS, self._count_turns)

    def _start(self, node: Node, name: str) -> None:
        number = sum(process.name == name for process in self._all)
        main = self._mains.get(node.name)
        made: list[PulseProcess | AgentProcess] = []

        async def run(process: Process) -> None:
            if main is not None:
                await main(self, process)
                return
            part = PulseProcess(self, process) if node.leads else AgentProcess(self, process)
            made.append(part)
            if isinstance(part, AgentProcess):
                self.agents.append(part)
            else:
                self.pulses.append(part)
            await part.run()

        process = Process(self.world, self._machines[node.name], name, run, number=number)
        self.note(process, "begins")
        self._processes[node.name] = process
        self._all.append(process)

    def _kill(self, process: Process) -> None:
        link = self.links[process.machine.name]
        process.dead = True
        if link.connection is not None and link.connection.process is process:
            link.connection.abandon()
            link.connection = None
        process.dead = False
        process.kill()
        process.machine.clock.resume(self.world.now)
        self.agents = [agent for agent in self.agents if agent.process is not process]
        self.pulses = [pulse for pulse in self.pulses if pulse.process is not process]

    # Faults.

    def _begin(self, fault: Fault) -> None:
        end = end_of(fault, self.schedule)
        self.note("fault", str(fault))
        if isinstance(fault, ServerRestart):
            if self.server.up:
                self.server.stop()
                self._at(end, self._start_server, fault)
        elif isinstance(fault, StoreTrouble):
            self.server.jetstream.begin(fault.kind, fault.late_s)
            self._at(end, self.server.jetstream.end, fault.kind, fault.late_s)
        elif isinstance(fault, (Change, Pause, Resume)):
            for agent in self.agents:
                if agent.process.machine.name == fault.node:
                    agent.ask(fault)
        elif fault.node in self._machines:
            self._befall(fault, self._machines[fault.node], end)

    def _start_server(self, fault: ServerRestart) -> None:
        self.note("server", "is back")
        self.server.start(wiped=fault.wiped)

    def _befall(self, fault: Fault, machine: Machine, end: float) -> None:
        link, process = self.links[machine.name], self._processes.get(machine.name)
        if isinstance(fault, WallJump):
            machine.wall_ns += round(fault.seconds * SECOND)
        elif isinstance(fault, Cut):
            link.cut()
            self._at(end, link.join)
        elif isinstance(fault, HalfOpen):
            up, down = fault.way != "down", fault.way != "up"
            link.tear(up=up, down=down)
            self._at(end, lambda: link.mend(up=up, down=down))
        elif isinstance(fault, (Slow, Lossy)):
            self._change_ways(link, fault, 1)
            self._at(end, self._change_ways, link, fault, -1)
        elif process is None:
            return
        elif isinstance(fault, ClockJump):
            machine.clock.jump(self.world.now, round(fault.seconds * SECOND))
            process.clock_jumped()
        elif isinstance(fault, (Stop, Suspend)):
            # A machine whose process is dead has nobody to stop, and nobody to go on for.
            if not (process.stopped or process.dead):
                process.stop()
                if isinstance(fault, Suspend):
                    machine.clock.suspend(self.world.now)
                self._at(end, self._go_on, process)
        elif isinstance(fault, Kill) and not process.dead:
            self._kill(process)
            node = self.schedule.node(machine.name)
            assert node is not None
            times = sum(other.machine is machine for other in self._all)
            self._at(end, self._start, node, f"{node.name}-{times}" if fault.renamed else node.name)

    def _go_on(self, process: Process) -> None:
        if not process.dead:
            process.machine.clock.resume(self.world.now)
            process.go_on()

    def _change_ways(self, link: Link, fault: Slow | Lossy, sign: int) -> None:
        link.note_trouble(sign)
        ways: tuple[Way, Way] = (link.up, link.down)
        if isinstance(fault, Slow):
            for way, extra in zip(ways, (fault.up_ms, fault.down_ms), strict=True):
                way.extra_ns += sign * round(extra * MS)
            return
        for way in ways:
            way.lost += sign * fault.lost
            way.doubled += sign * fault.doubled
            way.late += sign * fault.late

    # Watching.

    def _living(self) -> list[AgentProcess]:
        return [
            agent
            for agent in self.agents
            if agent.bb is not None and not (agent.process.ended or agent.process.stopped)
        ]

    def _sample(self) -> None:
        for agent in self._living():
            bb = agent.bb
            assert bb is not None
            agent.process.look(lambda agent=agent, bb=bb: self.watch.sample(agent, bb))  # type: ignore[misc]
        self.world.at(self.world.now + _SAMPLE_NS, self._sample)

    def _count_turns(self) -> None:
        for process in self._all:
            before = self._turns.get(id(process), 0)
            self._turns[id(process)] = process.turns
            if not process.dead:
                self.watch.turned(process, process.turns - before)
            if process.ended and not process.dead:
                self._check_end(process)
        for agent in self.agents:
            waited = self.world.now - max(agent.process.begun_ns, agent.process.moved_ns)
            if agent.bb is None and not agent.process.stopped and waited > BEGIN_S * SECOND:
                self.watch.tell("hangs", self.world.now, f"{agent.process!r} does not begin")
        self.world.at(self.world.now + _TURNS_NS, self._count_turns)

    def _check_end(self, process: Process) -> None:
        if process.error is not None:
            text = f"{process!r} ends with {process.error!r}"
            self.watch.tell("exceptions", self.world.now, text)
            process.error = None
        elif not process.leaving.is_set():
            self.watch.tell("exceptions", self.world.now, f"{process!r} ends by itself")
        process.leaving.set()

    def _resume(self, first: bool) -> None:
        agents = self._living()
        if first:
            self.watch.check_resumed(agents, self.world.now)
        still = [agent for agent in agents if not agent.present()[1]]
        if still:
            still[0].ask(Resume(self.world.now / SECOND, still[0].process.name))

    def _held_ns(self) -> int:
        """Return how long it takes until the grid reaches all agents that hold their positions.

        An agent that is ahead holds its position until the grid reaches it (section 5, rule 5).
        That may take longer than the quiet time, for example if the grid was paused or became
        slower. It only counts if the agent has held its position since everything healed.
        """
        healed = round((self.schedule.seconds + self.watch.settle_s) * SECOND)
        leading = [pulse for pulse in self.pulses if not pulse.process.ended and pulse.leads()]
        if len(leading) != 1:
            return 0
        return max(
            (
                leading[0].time_until(agent.present()[0])
                for agent in self._living()
                if agent.view.position is not None and agent.view.moved_ns < healed
            ),
            default=0,
        )

    def _check(self) -> None:
        now, agents = self.world.now, self._living()
        pulses = [pulse for pulse in self.pulses if not pulse.process.ended]
        self.watch.check_epochs(now)
        self.watch.check_agreement(agents, pulses, now)
        self.watch.check_in_force(agents, now)
        self.watch.check_granted(agents, now)

    def _leave(self) -> None:
        # Agents first, as they tell of what could not be delivered.
        agents = {id(agent.process) for agent in self.agents}
        for leaving in (True, False):
            chosen = [process for process in self._all if (id(process) in agents) == leaving]
            for process in chosen:
                process.leave()
            self.world.run(self.world.now + round(_LEAVING_S * SECOND))
            for process in chosen:
                if not (process.ended or process.dead):
                    text = f"{process!r} does not end within {_LEAVING_S:g} s"
                    self.watch.tell("hangs", self.world.now, text)
                elif process.error is not None and not process.dead:
                    self._check_end(process)
        self.watch.check_claims(self.agents, self.world.now)


def run(
    schedule: Schedule, *, keep: bool = False, mains: Mapping[str, Main] | None = None
) -> Result:
    """Run a schedule, and return what came of it."""
    return Cluster(schedule, keep=keep, mains=mains).run()
