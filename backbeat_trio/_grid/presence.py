"""The decisions of a metronome that does not lead: to wait, to ask, or to try to lead.

Such a metronome reports to `Presence` what it hears of a leader, of standbys and of agents, and
asks it what to do next. If the decision is to lead, the record's compare-and-set still decides
which metronome gets the lead.

Every waiting time grows with the measured round trip. If this process itself was late, the leader
is given as much more time, but at most one lease, and answers to probes and to a recall are awaited
for as much longer. The first row that applies gives the decision:

==================================================  =========  ===================================
what is known                                       decision   reason
==================================================  =========  ===================================
there is no connection                              wait       there is no connection
*following a grid*
the connection is new                               wait       the leader may not be back yet
the leader has no record, this metronome has one    take over  it leads without a record
the next frame is not late yet                      wait       the leader has time
it is late, and so was this process                 wait       the leader has time
it is late, or another metronome asks for a leader  probe      a frame is missing, or: it is asked
the leader answers a probe                          wait       the leader has time
no process is subscribed to the probes              take over  its process is gone
no answer for a lease                               take over  it is silent
*joining a grid, or coming back to it*
a leader was heard a moment ago                     wait       somebody may lead
no leader was heard                                 recall     no leader is found
the holder of the record does not answer a probe    probe      the leader may be stopped
a standby answers                                   recall     a standby looks after the leader
...and there is no leader two leases later          go on      agents remember the grid
agents answered, but the record is of a later time  recall     the agents' time is too early
agents answered, and all had enough time to         go on      agents remember the grid
no answer came, and this metronome led before       go on      this metronome remembers the grid
no answer came for long enough                      begin      nobody remembers a grid
==================================================  =========  ===================================

Pure: local time is passed in, as ``now_ns``.
"""

from __future__ import annotations

import enum
from typing import Final, NamedTuple, final

from .._wire import Role
from .timeline import NEVER

# A frame is late after this time, or this many times the jitter of the frames if that is longer.
LATE_NS: Final = 8_000_000
JITTERS: Final = 4
# The interval between probes of a leader whose frame is late.
PROBE_EVERY_NS: Final = 5_000_000
# The interval between recalls. It doubles each time, because every agent answers every recall.
_RECALL_MIN_NS: Final = 200_000_000
_RECALL_MAX_NS: Final = 2_000_000_000
# How long a leader may take to reconnect to a server that was away.
_RECONNECT_NS: Final = 500_000_000
# A new grid begins only after this time without an answer. Agents have the second time to answer.
_ABSENT_NS: Final = 1_000_000_000
_ANSWER_NS: Final = 100_000_000
# Each of the last three times is at least the first number of round trips, a lease the second.
_ANSWER_WAYS: Final = 3
_LEASE_WAYS: Final = 8
# For how many leases a standby's answer is trusted to mean that it watches the leader.
_LEASES: Final = 2


class Action(enum.Enum):
    """What a metronome that does not lead does next."""

    WAIT = "wait"
    """Do nothing before `Decision.until_ns`, unless something is heard."""
    PROBE = "probe"
    """Ask the leader of the epoch whether it is alive."""
    RECALL = "recall"
    """Ask all agents and metronomes what they know of the grid."""
    TAKE_OVER = "take over"
    """Try to take the lead in the record, and continue the grid that is followed."""
    GO_ON = "go on"
    """Try to take the lead in the record, and continue the grid that is remembered."""
    BEGIN = "begin"
    """Try to take the lead in the record, and begin another incarnation of the grid."""


class Decision(NamedTuple):
    """What to do next, and why."""

    action: Action
    reason: str
    """The reason in words, for the log."""
    until_ns: int = NEVER
    """The local time, in ns, at which to decide again at the latest."""


@final
class Presence:
    """What a metronome that does not lead knows of the leader, the standbys and the agents.

    Args:
      now_ns: now, in local time.
      connected: whether there is a connection to the server.
      remembers: whether this metronome has led before, and remembers the grid.
      has_record: whether this metronome has a record, in which it can take the lead.

    """

    def __init__(
        self,
        now_ns: int,
        *,
        connected: bool = True,
        remembers: bool = False,
        has_record: bool = True,
    ) -> None:
        self._remembers = remembers
        self._has_record = has_record
        self._connected = connected
        self._connected_ns = self._unled_ns = now_ns
        self._way_ns = 0
        self._lease_ns = _ABSENT_NS
        # Following: the last frame, when the next one is late, and until when this is excused.
        self._frame: int | None = None
        self._is_alone = False
        self._late_ns = self._excused_ns = 0
        self._is_fresh = True
        self._is_asked = False
        # Probing: since when, and with which result.
        self._probing_ns: int | None = None
        self._is_refused = False
        self._is_held = False
        # Recalling: since when, since when without anything else in between, when next, and when
        # agents and standbys have answered.
        self._recalling_ns: int | None = None
        self._asking_ns = 0
        self._recall_ns = 0
        self._pause_ns = _RECALL_MIN_NS
        self._agent_ns: int | None = None
        self._standby_ns: int | None = None
        self._believes_agents = True
        # When the agents' time will have reached that of the record.
        self._early_ns: int | None = None

    # What is known.

    def connection(self, now_ns: int, *, connected: bool) -> None:
        """Report that the connection to the server was made or lost."""
        if connected:
            self._connected_ns, self._is_fresh = now_ns, True
            self._forget(now_ns)
        self._connected = connected

    def measured(self, way_ns: int) -> None:
        """Report the measured round trip to other processes, in nanoseconds."""
        self._way_ns = way_ns

    def follows(self, frame_ns: int, late_ns: int, lease_ns: int, *, alone: bool = False) -> None:
        """Report the last frame of the grid that is followed.

        Args:
          frame_ns: the instant at which that frame was due; a different one means a new frame.
          late_ns: the local time at which the next frame is late.
          lease_ns: how long a leader may be silent before it is replaced.
          alone: whether the leader has no record.

        """
        self._late_ns, self._lease_ns, self._is_alone = late_ns, lease_ns, alone
        if frame_ns != self._frame:
            if self._frame is not None:
                self._is_fresh = False
            self._frame, self._is_asked, self._excused_ns = frame_ns, False, 0
            self._probing_ns, self._is_refused = None, False

    def lost_time(self, now_ns: int, lost_ns: int) -> None:
        """Report that this process itself was late by ``lost_ns``.

        The leader is given as much more time for its frame, at most one lease. Answers to probes
        and to a recall are awaited for as much longer.
        """
        if self._probing_ns is None:
            self._excused_ns = max(self._excused_ns, now_ns + min(lost_ns, self._lease_ns))
        else:
            self._probing_ns = min(now_ns, self._probing_ns + lost_ns)
        if self._recalling_ns is not None:
            self._recalling_ns = min(now_ns, self._recalling_ns + lost_ns)
            self._asking_ns = min(now_ns, self._asking_ns + lost_ns)

    def asked(self) -> None:
        """Report a recall: another metronome has not found a leader."""
        self._is_asked = True

    def led(self, now_ns: int) -> None:
        """Report a sign of life of a leader: a frame, or its answer to a ping or a probe."""
        self._forget(now_ns)
        self._is_asked = False

    def holds(self, lease_ns: int, *, held: bool) -> None:
        """Report whether the record names a leader, and its lease, before a grid is followed."""
        self._is_held, self._lease_ns = held, lease_ns

    def refused(self) -> None:
        """Report that no process is subscribed to the probes of the present or the last leader."""
        self._is_refused = True

    def answered(self, role: Role, now_ns: int) -> None:
        """Report an answer to a recall, and the role that its sender gives for itself.

        Any process that may answer can say that it leads or stands by, so that is believed for two
        leases only. Frames and answers to pings and probes prove that there is a leader.
        """
        if role != "agent":
            self._standby_ns = now_ns
        if self._agent_ns is None:
            self._agent_ns = now_ns

    def disbelieved(self) -> None:
        """Report that the agents' answers do not agree, or cannot be right."""
        self._believes_agents = False

    def early(self, until_ns: int) -> bool:
        """Report that the agents agree on a time that is earlier than that of the record.

        A clock that jumped ahead may have written the record. So the agents' time is awaited, but
        only once, because an agent can name any time.

        Args:
          until_ns: when it will have reached that of the record, in local time.

        Returns:
          Whether it is awaited.
        """
        if self._early_ns is not None:
            return False
        self._early_ns = until_ns
        return True

    def _forget(self, now_ns: int) -> None:
        self._unled_ns = now_ns
        self._probing_ns, self._is_refused = None, False
        self._recalling_ns = self._agent_ns = self._standby_ns = None
        self._pause_ns, self._believes_agents = _RECALL_MIN_NS, True
        self._early_ns = None

    # What follows from it.

    def decide(self, now_ns: int) -> Decision:
        """Decide what to do next. Carry out an `Action.RECALL`: it is counted as sent."""
        if not self._connected:
            return Decision(Action.WAIT, "there is no connection")
        if self._frame is not None:
            return self._decide_following(now_ns)
        return self._decide_joining(now_ns)

    def _decide_following(self, now_ns: int) -> Decision:
        back_ns = self._connected_ns + max(_RECONNECT_NS, _ANSWER_WAYS * self._way_ns)
        late_ns = max(self._late_ns, self._excused_ns)
        if self._is_fresh and now_ns < back_ns and (self._is_asked or now_ns >= late_ns):
            return Decision(Action.WAIT, "the leader may not be back yet", back_ns)
        if self._is_alone and self._has_record:
            if self._is_held and not self._is_refused and not self._is_silent(now_ns):
                return Decision(Action.PROBE, "the leader may be stopped")
            return Decision(Action.TAKE_OVER, "it leads without a record")
        if now_ns < late_ns and not self._is_asked:
            return Decision(Action.WAIT, "the leader has time", late_ns)
        if self._is_refused:
            return Decision(Action.TAKE_OVER, "its process is gone")
        if self._is_silent(now_ns):
            return Decision(Action.TAKE_OVER, "it is silent")
        return Decision(
            Action.PROBE, "a frame is missing" if now_ns >= late_ns else "somebody asks who leads"
        )

    def _is_silent(self, now_ns: int) -> bool:
        if self._probing_ns is None:
            self._probing_ns = now_ns
        return now_ns - self._probing_ns >= max(self._lease_ns, _LEASE_WAYS * self._way_ns)

    def _decide_joining(self, now_ns: int) -> Decision:
        answer_ns = max(_ANSWER_NS, _ANSWER_WAYS * self._way_ns)
        absent_ns = max(_ABSENT_NS, _ANSWER_WAYS * self._way_ns)
        if now_ns < self._unled_ns + answer_ns:
            return Decision(Action.WAIT, "somebody may lead", self._unled_ns + answer_ns)
        if self._recalling_ns is None:
            self._recalling_ns = self._asking_ns = now_ns
            return self._recall(now_ns, "no leader is found", now_ns + absent_ns)
        if self._is_held and not self._is_refused and not self._is_silent(now_ns):
            # Meanwhile nobody else is asked, and somebody may have come back when the lease ends.
            self._asking_ns = now_ns
            return Decision(Action.PROBE, "the leader may be stopped")
        if self._has_standby(now_ns, absent_ns):
            return self._recall(now_ns, "a standby looks after the leader", NEVER)
        if self._agent_ns is not None and self._believes_agents:
            if now_ns < self._agent_ns + answer_ns:
                return Decision(Action.WAIT, "agents answer", self._agent_ns + answer_ns)
            if self._early_ns is not None and now_ns < self._early_ns:
                return self._recall(now_ns, "the agents' time is too early", self._early_ns)
            return Decision(Action.GO_ON, "agents remember the grid")
        if now_ns < self._asking_ns + absent_ns:
            return self._recall(now_ns, "no leader is found", self._asking_ns + absent_ns)
        if self._remembers:
            return Decision(Action.GO_ON, "this metronome remembers the grid")
        return Decision(Action.BEGIN, "nobody remembers a grid")

    def _has_standby(self, now_ns: int, absent_ns: int) -> bool:
        if self._standby_ns is None or self._recalling_ns is None:
            return False
        lease_ns = max(self._lease_ns, _LEASE_WAYS * self._way_ns)
        in_time = now_ns < self._recalling_ns + _LEASES * lease_ns
        return in_time and now_ns < self._standby_ns + absent_ns

    def _recall(self, now_ns: int, why: str, until_ns: int) -> Decision:
        if now_ns < self._recall_ns:
            return Decision(Action.WAIT, why, min(self._recall_ns, until_ns))
        self._recall_ns = now_ns + self._pause_ns
        self._pause_ns = min(2 * self._pause_ns, _RECALL_MAX_NS)
        return Decision(Action.RECALL, why)
