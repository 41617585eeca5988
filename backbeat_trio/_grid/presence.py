"""Who is there: whether anybody leads or remembers the grid, and what follows from that.

Nobody decides alone that nobody is there. The record decides who leads; this decides when to ask it
for the lead. A metronome that does not lead feeds in what it hears and asks what to do next.

Every patience is a multiple of the round trip that was measured. This process's own lateness
excuses the leader for as long again, but for no longer than one lease. Cases, from the top down:

==================================================  =========  ===================================
what is known                                       decision   because
==================================================  =========  ===================================
there is no connection                              wait       there is no connection
*following a grid*
the connection is new                               wait       the leader may not be back yet
whoever leads has no record, and this one has       take over  it leads without a record
the next frame is not late yet                      wait       the leader has time
it is late, and so was this process                 wait       the leader has time
it is late, or somebody recalls                     probe      a frame is missing, or: it is asked
the leader answers a probe                          wait       the leader has time
nobody is subscribed to the probes                  take over  its process is gone
no answer for a lease                               take over  it is silent
*joining a grid, or coming back to it*
somebody who leads was heard a moment ago           wait       somebody may lead
nobody who leads was heard                          recall     no leader is found
the holder of the record does not answer a probe    probe      the leader may be stopped
a standby answers                                   recall     a standby looks after the leader
...and nobody leads two leases later                go on      agents remember the grid
agents have answered, and all had the time to       go on      agents remember the grid
nobody has, and this metronome led before           go on      this metronome remembers the grid
nobody has, for long enough                         begin      nobody remembers a grid
==================================================  =========  ===================================

Pure: local time is passed in, as ``now_ns``.
"""

from __future__ import annotations

import enum
from typing import Final, NamedTuple, final

from .._wire import Role
from .timeline import NEVER

# How late a frame may be, beside the jitter of the frames.
LATE_NS: Final = 8_000_000
JITTERS: Final = 4
# How often a leader that owes a frame is asked.
PROBE_EVERY_NS: Final = 5_000_000
# How often everybody is asked: ever less often, as each of many agents answers.
_RECALL_MIN_NS: Final = 200_000_000
_RECALL_MAX_NS: Final = 2_000_000_000
# What a leader is given to come back to a server that was away.
_RECONNECT_NS: Final = 500_000_000
# For how long nobody must answer before a grid begins, and what agents have to answer in.
_ABSENT_NS: Final = 1_000_000_000
_ANSWER_NS: Final = 100_000_000
# Round trips that an answer may take, that a silence must last, and that a lease must hold.
_ANSWER_WAYS: Final = 3
_LEASE_WAYS: Final = 8
# For how many leases it is believed that a standby looks after the leader.
_LEASES: Final = 2


class Action(enum.Enum):
    """What a metronome that does not lead does next."""

    WAIT = "wait"
    PROBE = "probe"
    """Ask the leader of the epoch whether it lives."""
    RECALL = "recall"
    """Ask everybody who remembers the grid."""
    TAKE_OVER = "take over"
    """Ask the record for the lead, with the grid that is followed."""
    GO_ON = "go on"
    """Ask the record for the lead, with the grid that is remembered."""
    BEGIN = "begin"
    """Ask the record for the lead, with another incarnation of the grid."""


class Decision(NamedTuple):
    """What to do next, and why."""

    action: Action
    reason: str
    until_ns: int = NEVER
    """When to decide again at the latest, in local time."""


@final
class Presence:
    """What a metronome that does not lead knows of the others.

    Args:
      now_ns: now, in local time.
      connected: whether a connection stands.
      remembers: whether this metronome has led before, and remembers the grid.
      has_record: whether this metronome has a record to ask for the lead.

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
        # Following: the last frame, when the next one is late, and what excuses it.
        self._frame: int | None = None
        self._is_alone = False
        self._late_ns = self._excused_ns = 0
        self._is_fresh = True
        self._is_asked = False
        # Probing: since when, and what came of it.
        self._probing_ns: int | None = None
        self._is_refused = False
        self._is_held = False
        # Recalling: since when, when next, and who has answered when.
        self._recalling_ns: int | None = None
        self._recall_ns = 0
        self._pause_ns = _RECALL_MIN_NS
        self._agent_ns: int | None = None
        self._standby_ns: int | None = None
        self._believes_agents = True

    # What is known.

    def connection(self, now_ns: int, *, stands: bool) -> None:
        """Take note of a connection that was made or lost."""
        if stands:
            self._connected_ns, self._is_fresh = now_ns, True
            self._forget(now_ns)
        self._connected = stands

    def measured(self, way_ns: int) -> None:
        """Take note of the round trip to others, in nanoseconds."""
        self._way_ns = way_ns

    def follows(self, frame_ns: int, late_ns: int, lease_ns: int, *, alone: bool = False) -> None:
        """Take note of the grid that is followed, and of its last frame.

        Args:
          frame_ns: the instant at which the last frame was due; another one is a new frame.
          late_ns: when the next one is late, in local time.
          lease_ns: for how long a leader may be silent.
          alone: whether the leader has no record.

        """
        self._late_ns, self._lease_ns, self._is_alone = late_ns, lease_ns, alone
        if frame_ns != self._frame:
            if self._frame is not None:
                self._is_fresh = False
            self._frame, self._is_asked, self._excused_ns = frame_ns, False, 0
            self._probing_ns, self._is_refused = None, False

    def lost_time(self, now_ns: int, lost_ns: int) -> None:
        """Take note that this process itself was late: whoever leads is given as much again."""
        self._excused_ns = max(self._excused_ns, now_ns + min(lost_ns, self._lease_ns))

    def asked(self) -> None:
        """Take note that somebody who finds no leader asks who is there."""
        self._is_asked = True

    def led(self, now_ns: int) -> None:
        """Take note of a frame, or an answer to a ping or to a probe, of somebody who leads."""
        self._forget(now_ns)
        self._is_asked = False

    def holds(self, lease_ns: int, *, held: bool) -> None:
        """Take note, while joining, of whether the record names somebody who holds the lead."""
        self._is_held, self._lease_ns = held, lease_ns

    def refused(self) -> None:
        """Take note that nobody is subscribed to the probes of the one who leads, or did last."""
        self._is_refused = True

    def answered(self, role: Role, now_ns: int) -> None:
        """Take note of an answer to a recall.

        Anybody who may answer can say that it leads or stands by. Only frames, and answers to pings
        and probes, prove that somebody leads; what is said here is believed for two leases.
        """
        if role != "agent":
            self._standby_ns = now_ns
        if self._agent_ns is None:
            self._agent_ns = now_ns

    def disbelieved(self) -> None:
        """Take note that agents do not agree, or on nothing that can be believed."""
        self._believes_agents = False

    def _forget(self, now_ns: int) -> None:
        self._unled_ns = now_ns
        self._probing_ns, self._is_refused = None, False
        self._recalling_ns = self._agent_ns = self._standby_ns = None
        self._pause_ns, self._believes_agents = _RECALL_MIN_NS, True

    # What follows from it.

    def decide(self, now_ns: int) -> Decision:
        """Decide what to do next; an `Action.RECALL` counts as carried out."""
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
            self._recalling_ns = now_ns
            return self._recall(now_ns, "no leader is found", now_ns + absent_ns)
        if self._is_held and not self._is_refused and not self._is_silent(now_ns):
            return Decision(Action.PROBE, "the leader may be stopped")
        if self._is_stood_by(now_ns, absent_ns):
            return self._recall(now_ns, "a standby looks after the leader", NEVER)
        if self._agent_ns is not None and self._believes_agents:
            if now_ns < self._agent_ns + answer_ns:
                return Decision(Action.WAIT, "agents answer", self._agent_ns + answer_ns)
            return Decision(Action.GO_ON, "agents remember the grid")
        if now_ns < self._recalling_ns + absent_ns:
            return self._recall(now_ns, "no leader is found", self._recalling_ns + absent_ns)
        if self._remembers:
            return Decision(Action.GO_ON, "this metronome remembers the grid")
        return Decision(Action.BEGIN, "nobody remembers a grid")

    def _is_stood_by(self, now_ns: int, absent_ns: int) -> bool:
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
