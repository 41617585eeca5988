"""The rules that must hold in every schedule, checked while it runs and at its end.

The rules come from sections 2, 5 and 8 of the design, and not from the code. The docstring of each
method that checks a rule describes it, and its legitimate exceptions.

The segments tell to which grid a beat belongs, and not what a process says. All segments of one
message are of one grid, and the cluster times of two grids begin at different instants.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol, final

import msgspec
from faults import (
    Change,
    ClockJump,
    Command,
    Cut,
    HalfOpen,
    Kill,
    Lossy,
    Pause,
    Resume,
    Schedule,
    ServerRestart,
    Slow,
    Stop,
    Suspend,
    WallJump,
    end_of,
)
from processes import MS, SECOND, Process
from server import Connection, JetStream, Link

from backbeat_trio._grid.timeline import Timeline, beat_ns
from backbeat_trio._wire import BeatFrame, Segment, decode_claims, decode_frame, decode_record

if TYPE_CHECKING:
    from backbeat_trio import Beat, Session

# What two positions may differ by, besides what the ways explain.
TOLERANCE_NS: Final = 5 * MS
# What a way may differ by from its way back, so that agents never step by a quarter of a beat.
SMALL_ASYMMETRY_MS: Final = 40.0
# What a frame may take so that it tells of a change before that takes effect. A leader announces a
# change 250 ms before that, but only 200 ms if the store was slow. Ways are irregular, and an agent
# whose way differs from its way back is ahead by up to half of that.
FAR_MS: Final = 150.0
# How long a grid must be gone on a working connection before another one begins, with a margin for
# who would have answered.
ABSENT_NS: Final = 1_500 * MS
FAST_WAY_NS: Final = 300 * MS
# By how much an answer may lie from what the wall clock lets expect, with a margin for the clocks.
BELIEVED_NS: Final = 59 * SECOND
# How many turns of Trio's loop a process may make in a second, and how many seconds it may take to
# begin and to end.
TURNS: Final = 5_000
BEGIN_S: Final = 10.0
# Wall clocks that differ by no more than this tell by how much a grid must begin ahead.
WALL_S: Final = 1.5

RULES: Final = (
    *("epochs", "frames", "look", "beginning", "beats", "back", "granted", "resumed", "resume"),
    *("one leader", "one tempo", "one position", "calm", "claims", "hangs", "exceptions", "busy"),
)


class Violation(NamedTuple):
    """A rule that did not hold."""

    rule: str
    seconds: float
    """When, in true time."""
    text: str

    def __str__(self) -> str:
        return f"{self.rule} at {self.seconds:.3f} s: {self.text}"


class Answered(NamedTuple):
    """What became of a command."""

    command: Command
    asked_ns: int
    answered_ns: int
    beat: int | None
    """On which beat it takes effect; None where it was not granted."""
    refused: bool
    """Whether it was certainly not done."""
    text: str


class Lines:
    """Which segments are of one grid."""

    def __init__(self) -> None:
        self._above: dict[Segment, Segment] = {}
        self._known: set[tuple[Segment, ...]] = set()

    def of(self, segment: Segment) -> Segment:
        """Return the segment that stands for the grid of this one."""
        above = self._above
        while (next_ := above.get(segment, segment)) is not segment:
            segment = next_
        return segment

    def join(self, segments: tuple[Segment, ...]) -> Segment:
        """Take note that some are of one grid, and return what stands for it."""
        first = self.of(segments[0])
        if segments not in self._known:
            self._known.add(segments)
            for segment in segments[1:]:
                root = self.of(segment)
                if root != first:
                    self._above[root] = first
        return first


class _Seen(NamedTuple):
    """A beat as an agent had it."""

    at_ns: int
    beat: int
    tempo: float
    segment: Segment


class Agent(Protocol):
    """What is looked at of a process with a session."""

    process: Process
    view: AgentView
    completed: list[str]
    undelivered: int | None

    @property
    def locked(self) -> bool:
        """Whether its grid is the cluster's."""
        ...

    def timeline(self) -> Timeline:
        """Return what it knows of the grid."""
        ...

    def present(self) -> tuple[float, float]:
        """Return its position, and its tempo."""
        ...

    def follows(self) -> tuple[int | None, str | None]:
        """Return the epoch and the leader that it follows."""
        ...


class Pulse(Protocol):
    """What is looked at of a process with a metronome."""

    process: Process

    def leads(self) -> bool:
        """Tell whether it leads."""
        ...

    def position(self) -> float | None:
        """Return the leader's position in beats; None if it does not lead."""
        ...


@final
class AgentView:
    """What was seen of one agent."""

    def __init__(self, name: str) -> None:
        self.name: str = name
        self.seen: list[_Seen] = []
        self.position: tuple[Segment, float] | None = None
        """The last one, and on which grid."""
        self.moved_ns: int = 0
        """When the position was last seen to be another one than before, in true time."""


@final
class Watch:
    """Sees what happens in a cluster, and finds what must not.

    Args:
      schedule: what happens.
      jetstream: the record, and the stream of claims.
      links: the ways to the server, by the names of machines.

    """

    def __init__(self, schedule: Schedule, jetstream: JetStream, links: Mapping[str, Link]) -> None:
        self.violations: list[Violation] = []
        self.answered: list[Answered] = []
        self.lines: Lines = Lines()
        self.line: Segment | None = None
        """The grid of the frame that was published last."""
        self.frames: int = 0
        self.epochs_changed_ns: int = 0
        """When a record of another epoch was written last."""
        self._schedule = schedule
        self._jetstream = jetstream
        self._links = links
        self._told: Counter[str] = Counter()
        self._leaders: dict[tuple[int, Segment, int], Process] = {}
        self._holders: dict[tuple[int, int], str] = {}
        self._last_frames: dict[tuple[int, int], BeatFrame] = {}
        self._epoch = -1
        self._written_ns = 0
        # By how much the wall clock was wrong by which the record was written last, and that by
        # which the record of the grid of the last frame was written last.
        self._written_wall_ns = self._known_wall_ns = 0
        # The grid of the record, and the grid of the record before that grid's first one.
        self._recorded: Segment | None = None
        self._recorded_before: Segment | None = None
        # Since when the record has been one of which grid.
        self._grids: list[tuple[int, Segment]] = []
        self._wiped = any(isinstance(f, ServerRestart) and f.wiped for f in schedule.faults)
        self._walls_agree = not any(isinstance(f, WallJump) for f in schedule.faults) and all(
            abs(node.wall_s) < WALL_S / 2 for node in schedule.nodes
        )
        self._commands = [f for f in schedule.faults if isinstance(f, Command)]
        self._times_jump = any(isinstance(f, (ClockJump, Suspend)) for f in schedule.faults)
        beat_s = 60 / min(
            schedule.bpm, *(f.bpm for f in self._commands if isinstance(f, Change)), 60
        )
        self.settle_s: float = 10 + 4 * beat_s
        """How long it may take to notice that a position is off, and to correct it."""
        # How long it may take from when a change is asked for until it takes effect.
        self._pending_s = 3 + (schedule.beats_per_bar + 4) * beat_s
        self._unlike = {node.name: self._find_unlike(node.name) for node in schedule.nodes}

    def tell(self, rule: str, now_ns: int, text: str) -> None:
        """Take note of a violation; of one rule, the first few are enough."""
        self._told[rule] += 1
        if self._told[rule] <= 3:
            self.violations.append(Violation(rule, now_ns / SECOND, text))

    # Who heard everything.

    def _find_unlike(self, name: str) -> list[tuple[float, float]]:
        # When an agent may have missed something, or have to be moved.
        nodes = {node.name: node for node in self._schedule.nodes}
        pulses = [node for node in nodes.values() if node.leads]
        asymmetry = sum(abs(node.up_ms - node.down_ms) / 2 for node in (nodes[name], *pulses))
        farthest = nodes[name].down_ms + max((node.up_ms for node in pulses), default=0.0)
        if asymmetry > SMALL_ASYMMETRY_MS or (self._commands and farthest > FAR_MS):
            return [(0.0, math.inf)]
        times, outages = [], []
        for fault in self._schedule.faults:
            whose = getattr(fault, "node", None)
            leads = whose is not None and whose in nodes and nodes[whose].leads
            moved = isinstance(fault, (Suspend, ClockJump, Slow)) and (leads or whose == name)
            stopped = isinstance(fault, Stop) and whose == name
            away = isinstance(fault, ServerRestart) or (
                isinstance(fault, (Cut, HalfOpen, Lossy, Stop, Kill)) and (leads or whose == name)
            )
            end = end_of(fault, self._schedule)
            missed = away and any(
                fault.at - self._pending_s <= command.at <= end + 1 for command in self._commands
            )
            if away:
                outages.append((fault.at, end))
            if moved or stopped or missed:
                times.append((fault.at, end + self.settle_s))
        return [self._extend(*time, sorted(outages)) for time in times]

    def _extend(
        self, begin: float, end: float, outages: Iterable[tuple[float, float]]
    ) -> tuple[float, float]:
        # An agent measures by pings how far it is off. The time for that begins again after each
        # outage in which pings or their answers may be lost.
        for out, back in outages:
            if out <= end and begin <= back:
                end = max(end, back + self.settle_s)
        return begin, end

    def heard_all(self, name: str, since_ns: int, until_ns: int) -> bool:
        """Tell whether nothing happened to an agent by which it could have missed anything.

        It was never stopped, and neither it nor a metronome was cut off while a change was on its
        way; neither its clock nor that of a metronome jumped, nor did the ways of one of them
        change; and it had time to come back into line since. That time begins again after each
        outage in which it could not ping the leader.

        Ways that differ much from their ways back move agents with every change of the leader, and
        over long ways agents learn of a change when it has taken effect: those are left out.
        """
        since, until = since_ns / SECOND, until_ns / SECOND
        return not any(begin <= until and since <= end for begin, end in self._unlike[name])

    # What passes the server.

    def wrote(self, process: Process, data: bytes, life: int) -> None:
        """Check the record: in each epoch there is one holder, who is known by its nonce.

        A store that was emptied has another life, in which epochs may begin again.
        """
        record, now = decode_record(data), process.world.now
        line = self.lines.join(record.segments)
        if record.epoch > self._epoch:
            self.epochs_changed_ns = self._written_ns = now
        self._epoch = record.epoch
        if self._recorded is None or self.lines.of(self._recorded) != line:
            self._recorded, self._recorded_before = line, self._recorded
            self._grids.append((now, line))
        self._written_wall_ns = process.machine.wall_ns
        if self.line is not None and line == self.lines.of(self.line):
            self._known_wall_ns = self._written_wall_ns
        nonce = self._holders.setdefault((life, record.epoch), record.nonce)
        if nonce != record.nonce:
            self.tell("epochs", now, f"epoch {record.epoch} of the record has a second holder")

    def published(self, connection: Connection, data: bytes, agents: Iterable[Agent]) -> None:
        """Check a frame: who may publish it, and whether it may begin another grid.

        - *epochs*: in an epoch of a grid one process publishes frames and no other one.
        - *frames*: in its epoch a leader beats forward; only of a grid that stands still it tells
          the same again.
        - *look*: a metronome that has connected again publishes no frame of an epoch that was over
          when it connected, where JetStream answered (section 8, rule 5).
        - *beginning*: see `_check_beginning`.
        """
        process, now = connection.process, connection.process.world.now
        try:
            frame = decode_frame(data)
            timeline = Timeline.of(frame)
        except (msgspec.DecodeError, ValueError) as error:
            self.tell("frames", now, f"{process!r} publishes an invalid frame: {error}")
            return
        self.frames += 1
        line = self.lines.join(timeline.segments)
        self._leaders.setdefault((frame.epoch, timeline.segments[0], id(process)), process)
        last = self._last_frames.get((id(process), frame.epoch))
        # The same frame once more was doubled on its way.
        forward = last is None or frame.beat_index >= last.beat_index + bool(
            frame.segment.milli_bpm
        )
        if last is not None and not forward and frame != last:
            self.tell(
                "frames",
                now,
                f"{process!r} publishes beat {frame.beat_index} after {last.beat_index}"
                f" in epoch {frame.epoch}",
            )
        self._last_frames[id(process), frame.epoch] = frame
        if (
            frame.epoch < self._epoch
            and self._written_ns < connection.opened_ns
            and self._jetstream.well
            and self._jetstream.changed_ns < connection.opened_ns
        ):
            self.tell(
                "look",
                now,
                f"{process!r} publishes beat {frame.beat_index} of epoch {frame.epoch},"
                f" connected since {connection.opened_ns / SECOND:.3f} s, when epoch"
                f" {self._epoch} was {(now - self._written_ns) / SECOND:.3f} s old",
            )
        if self.line is not None and line != self.lines.of(self.line):
            self._check_beginning(process, frame, agents)
        if self.line is None or line != self.lines.of(self.line):
            self._known_wall_ns = self._written_wall_ns
        self.line = timeline.segments[0]

    def _check_beginning(self, process: Process, frame: BeatFrame, agents: Iterable[Agent]) -> None:
        """Check that another grid begins only where nobody remembers the last one.

        Whoever is locked to it remembers it and would have said so when asked. It does not count
        where its connection, or the way of the metronome that begins, was not whole for as long as
        one waits for an answer, where a way is long, or where its process stood still. Nor does it
        count where the wall clock by which it judges the answers differs by a minute from the one
        by which the record of that grid was written last: such answers are not believed (section 8,
        rule 2). The record may name a newer grid of which no frame was published, because the
        answers to the writes were lost. Then nobody remembers the grid that the record names.
        """
        now, line = process.world.now, self.line
        link = self._links[process.machine.name]
        assert line is not None
        if frame.segment.epoch != frame.epoch:
            # A leader of a grid that began before, and was not heard meanwhile.
            return
        if link.troubles or link.changed_ns > now - ABSENT_NS or link.way_ns > FAST_WAY_NS:
            return
        if abs(process.machine.wall_ns - self._known_wall_ns) > BELIEVED_NS:
            return
        before = self._recorded_before
        if before is not None and self.lines.of(before) != self.lines.of(line):
            return
        for agent in agents:
            if agent.locked and self._was_well(agent.process, now):
                known = agent.process.look(lambda agent=agent: agent.timeline().segments[0])  # type: ignore[misc]
                if self.lines.of(known) == self.lines.of(line):
                    self.tell(
                        "beginning",
                        now,
                        f"{process!r} begins another grid with beat {frame.beat_index} of epoch"
                        f" {frame.epoch}, although {agent.process!r} is locked to the last one",
                    )
                    return

    def _was_well(self, process: Process, now: int) -> bool:
        link, since = self._links[process.machine.name], now - ABSENT_NS
        connection = link.connection
        return (
            not (process.dead or process.ended or process.stopped)
            and process.moved_ns < since
            and connection is not None
            and connection.process is process
            and connection.opened_ns < since
            and not link.troubles
            and link.changed_ns < since
            and link.way_ns < FAST_WAY_NS
        )

    # What agents have.

    def beat(self, agent: Agent, bb: Session, beat: Beat) -> None:
        """Check a beat as an agent gets it.

        - On one grid no beat comes twice, whatever happens. On the next grid none does either, as
          that begins beyond everything that anybody can have counted: but for a store that was
          emptied, wall clocks that do not agree, clocks that jumped, and agents that were away
          while the tempo changed.
        - No beat is passed over on an agent that heard everything (`heard_all`).
        """
        process, view = agent.process, agent.view
        now = process.world.now
        if not agent.locked:
            return
        segments = agent.timeline().segments
        line = self.lines.join(segments)
        seen = _Seen(now, beat.index, beat.tempo_bpm, segments[0])
        if view.seen:
            last = view.seen[-1]
            same = self.lines.of(last.segment) == line
            if beat.index <= last.beat and (
                same
                or not (self._wiped or not self._walls_agree or self._times_jump or self._commands)
            ):
                grid = "" if same else ", on another grid"
                self.tell(
                    "beats", now, f"{process!r} gets beat {beat.index} after {last.beat}{grid}"
                )
            if (
                same
                and beat.index > last.beat + 1
                and self.heard_all(process.machine.name, last.at_ns, now)
            ):
                self.tell(
                    "beats",
                    now,
                    f"{process!r} gets beat {beat.index} after {last.beat}, although it heard all",
                )
        view.seen.append(seen)

    def sample(self, agent: Agent, bb: Session) -> None:
        """Check that a position never goes back on one grid, whatever happens."""
        now, view = agent.process.world.now, agent.view
        if not agent.locked:
            view.position = None
            return
        segments = agent.timeline().segments
        line = self.lines.join(segments)
        position = bb.current_position()
        if view.position is not None:
            before, last = view.position
            if self.lines.of(before) == line and position < last - 1e-9:
                self.tell(
                    "back", now, f"{agent.process!r} goes from {last:.6f} back to {position:.6f}"
                )
        if view.position is None or view.position[1] != position:
            view.moved_ns = now
        view.position = segments[0], position

    def turned(self, process: Process, turns: int) -> None:
        """Check that a process makes no more turns in a second than it has reason to."""
        if turns > TURNS:
            text = f"{process!r} made {turns:,} turns of its loop in a second"
            self.tell("busy", process.world.now, text)

    # At the end.

    def check_granted(self, agents: Iterable[Agent], now: int) -> None:
        """Check that what was granted happened.

        A change that was granted for a beat takes effect on that very beat, at each agent that
        heard everything from when it was asked for. The last change that was granted is in force at
        the end, wherever the beat has come. Changes that others may have replaced are left out, and
        so is what may have been lost with the store.
        """
        for answer in self.answered:
            command = answer.command
            if answer.beat is None or not isinstance(command, (Change, Pause)):
                continue
            wanted = command.bpm if isinstance(command, Change) else 0.0
            if isinstance(command, Change) and command.over:
                continue
            others = [other for other in self.answered if other is not answer and not other.refused]
            for agent in agents:
                self._check_change(agent, answer, wanted, others, now)

    def _grid_at(self, now: int) -> Segment | None:
        # The grid of the record at some time.
        grids = [self.lines.of(line) for since, line in self._grids if since <= now]
        return grids[-1] if grids else None

    def _check_change(
        self,
        agent: Agent,
        answer: Answered,
        wanted: float,
        others: list[Answered],
        now: int,
    ) -> None:
        seen, process = agent.view.seen, agent.process
        assert answer.beat is not None
        margin = round((15 + 16 * 60 / self._schedule.bpm) * SECOND)
        before = [s for s in seen if answer.asked_ns - margin <= s.at_ns <= answer.asked_ns]
        if not before or process.dead:
            return
        line = self.lines.of(before[-1].segment)
        if line != self._grid_at(answer.answered_ns):
            # The leader that granted it leads another grid, to which the agent has not moved yet.
            return
        of_grid = [s for s in seen if self.lines.of(s.segment) == line]
        there = [s for s in of_grid if s.beat == answer.beat]
        later = [s for s in of_grid if s.beat > answer.beat]
        came_ns = there[0].at_ns if there else later[0].at_ns if later else now
        if any(answer.asked_ns - margin <= o.asked_ns <= came_ns for o in others):
            return
        if not self.heard_all(process.machine.name, answer.asked_ns - margin, came_ns):
            return
        if there and abs(there[0].tempo - wanted) > 1e-6:
            self.tell(
                "granted",
                came_ns,
                f"{process!r} has {there[0].tempo:g} BPM on beat {answer.beat},"
                f" for which {wanted:g} was granted at {answer.answered_ns / SECOND:.3f} s",
            )
        early = [s for s in of_grid if s.beat == answer.beat - 1 and s.at_ns > answer.asked_ns]
        if early and early[0].tempo == wanted != before[-1].tempo:
            self.tell(
                "granted",
                early[0].at_ns,
                f"{process!r} has {wanted:g} BPM on beat {answer.beat - 1} already, one beat before"
                " the granted one",
            )
        if not there and later:
            self.tell(
                "granted",
                came_ns,
                f"{process!r} never had beat {answer.beat}, for which {wanted:g} BPM was granted"
                f" at {answer.answered_ns / SECOND:.3f} s",
            )

    def check_in_force(self, agents: Sequence[Agent], now: int) -> None:
        """Check that the last change of all that was granted is in force."""
        done = sorted(
            (answer for answer in self.answered if not answer.refused),
            key=lambda answer: answer.asked_ns,
        )
        if not done or self._wiped:
            return
        *others, last = done
        command = last.command
        if last.beat is None or not isinstance(command, Change):
            return
        if any(other.answered_ns > last.asked_ns for other in others):
            # The leader may have come to that one later.
            return
        for agent in agents:
            position, tempo = agent.present()
            # A ramp is over some beats later.
            if position > last.beat + command.over and abs(tempo - command.bpm) > 1e-6:
                self.tell(
                    "granted",
                    now,
                    f"{agent.process!r} has {tempo:g} BPM, but {command.bpm:g} from beat"
                    f" {last.beat} on was granted last",
                )
                return

    def check_resumed(self, agents: Sequence[Agent], now: int) -> None:
        """Check that no grid is paused that was to resume.

        If a resumption was granted and no pause was asked for since, the grid runs. If an answer
        was lost, it is not known what was done.
        """
        asked = [answer for answer in self.answered if isinstance(answer.command, (Pause, Resume))]
        asked.sort(key=lambda answer: answer.asked_ns)
        done = [answer for answer in asked if not answer.refused]
        if not done or self._wiped or not isinstance(done[-1].command, Resume):
            return
        *others, last = done
        if last.beat is None or any(other.answered_ns > last.asked_ns for other in others):
            return
        for agent in agents:
            if not agent.present()[1]:
                self.tell(
                    "resumed",
                    now,
                    f"{agent.process!r} is paused, although a resumption was granted at"
                    f" {last.answered_ns / SECOND:.3f} s",
                )
                return

    def check_agreement(self, agents: Sequence[Agent], pulses: Sequence[Pulse], now: int) -> None:
        """Check that all is well some time after everything has healed.

        - *one leader*: one metronome leads, and every agent is locked to it, in its epoch.
        - *one tempo*: all agents have the same tempo. The grid is not paused, because it was asked
          to resume, several times if that was refused (*resume*).
        - *one position*: all agents agree with the leader within `TOLERANCE_NS`, and what the ways
          explain: nobody can tell a longer way from a longer way back. An agent that was ahead
          when everything healed, and holds its position since, has the time that the grid takes to
          reach it.
        - *calm*: nobody has taken over lately.
        """
        leading = [pulse for pulse in pulses if pulse.leads()]
        if len(leading) != 1:
            names = ", ".join(repr(pulse.process) for pulse in leading) or "none"
            self.tell("one leader", now, f"one metronome should lead, not {len(leading)}: {names}")
            return
        leader = leading[0]
        for agent in agents:
            epoch, name = agent.follows()
            if name != leader.process.name:
                text = f"{agent.process!r} follows {name} of epoch {epoch}, not {leader.process!r}"
                self.tell("one leader", now, text)
                return
        if now - self.epochs_changed_ns < 5 * SECOND:
            self.tell("calm", now, "a metronome has taken over in the last five seconds")
        tempos = {agent.present()[1] for agent in agents}
        if not agents:
            return
        if not all(tempos):
            refused = [a.text for a in self.answered if isinstance(a.command, Resume)]
            self.tell("resume", now, f"the grid is paused: {'; '.join(refused[-3:])}")
            return
        if len(tempos) > 1:
            self.tell("one tempo", now, f"agents have {sorted(tempos)} BPM")
            return
        self._check_positions(agents, leader, tempos.pop(), now)

    def _check_positions(
        self, agents: Sequence[Agent], leader: Pulse, tempo: float, now: int
    ) -> None:
        own = leader.position()
        if own is None:
            return
        theirs = self._schedule.node(leader.process.machine.name)
        for agent in agents:
            node = self._schedule.node(agent.process.machine.name)
            assert node is not None
            assert theirs is not None
            ways_ms = abs((node.up_ms - node.down_ms) + (theirs.down_ms - theirs.up_ms)) / 2
            jitter_ms = 4 * (node.jitter_ms + theirs.jitter_ms)
            allowed = TOLERANCE_NS + round((ways_ms + jitter_ms) * MS)
            apart = (agent.present()[0] - own) * beat_ns(round(tempo * 1000))
            if abs(apart) > allowed:
                self.tell(
                    "one position",
                    now,
                    f"{agent.process!r} is {apart / MS:.3f} ms ahead of its leader; the network"
                    f" explains {allowed / MS:.3f} ms",
                )
                return

    def check_claims(self, agents: Iterable[Agent], now: int) -> None:
        """Check the stream: each terminal claim is stored once, or counted as undelivered.

        A stream that was emptied may store one again. Of a process that was killed, claims may be
        missing.
        """
        stored: Counter[tuple[int, str]] = Counter()
        for claim in self._jetstream.stored:
            for one in decode_claims(claim.data):
                stored[claim.life, one.task_id] += 1
        twice = [task for (_, task), times in stored.items() if times > 1]
        if twice:
            self.tell("claims", now, f"{', '.join(sorted(twice)[:3])} was stored more than once")
        known = {task for _, task in stored}
        for agent in agents:
            if agent.undelivered is None:
                continue
            missing = [task for task in agent.completed if task not in known]
            if len(missing) > agent.undelivered:
                self.tell(
                    "claims",
                    now,
                    f"{agent.process!r} counts {agent.undelivered} undelivered claims, but"
                    f" {len(missing)} are missing: {', '.join(missing[:3])}",
                )

    def check_epochs(self, now: int) -> None:
        """Check that in an epoch of a grid one process has published frames, and no other one."""
        leaders: dict[tuple[int, Segment], Process] = {}
        for (epoch, segment, _), process in self._leaders.items():
            other = leaders.setdefault((epoch, self.lines.of(segment)), process)
            if other is not process:
                self.tell("epochs", now, f"{other!r} and {process!r} both led in epoch {epoch}")
