"""Which ids of agents are used by two live processes at the same time.

The leader learns it from pings, each of which names the agent and its process. A ping from another
process than before may come from a restart. So it only opens a contest: the leader names the id in
its frames, and whoever has that id pings at once. If the former process is heard again after the
other one, both are alive.

Pure: local time is passed in.
"""

from __future__ import annotations

from typing import Final, NamedTuple, final

# A process that was not heard for so long is forgotten; two pings are 80 s apart at most.
_REMEMBERED_NS: Final = 150_000_000_000
# A ping of a process that has ended may still be on its way for so long.
_LATE_NS: Final = 1_000_000_000
# A process in a contest counts as alive for so long after its last ping, and for so many beats.
_ALIVE_NS: Final = 10_000_000_000
_ALIVE_BEATS: Final = 4
# How many agents are remembered, how many contests there are, how many processes each has, and how
# many ids a frame names: anybody who may ping can make up ids.
_AGENTS: Final = 65_536
_CONTESTS: Final = 64
_PROCESSES: Final = 8
_NAMED: Final = 8


class _Heard(NamedTuple):
    process: str
    when_ns: int


@final
class _Contest:
    """An id that two processes have used, one after the other or at the same time.

    Each process that is new takes the place of those before it, as after a restart. Those that are
    heard again, a while after it was heard first, are alive beside it.
    """

    def __init__(self, former: str, newest: str, now_ns: int) -> None:
        self._known = {former: None}
        self._succeed(newest, now_ns)

    def _succeed(self, newest: str, now_ns: int) -> None:
        self._began_ns = now_ns
        self.heard = {newest: now_ns}
        self._known[newest] = None
        if len(self._known) > _PROCESSES:
            del self._known[next(iter(self._known))]

    def hear(self, process: str, now_ns: int) -> None:
        if process not in self._known:
            self._succeed(process, now_ns)
        elif process in self.heard or now_ns - self._began_ns >= _LATE_NS:
            self.heard[process] = now_ns

    def alive(self, now_ns: int, patience_ns: int) -> int:
        """Return how many processes are alive, and forget those that are not."""
        since = now_ns - patience_ns
        self.heard = {process: when for process, when in self.heard.items() if when >= since}
        return len(self.heard)

    def is_over(self, now_ns: int, patience_ns: int) -> bool:
        return self.alive(now_ns, patience_ns) < 2 and now_ns - self._began_ns > patience_ns


@final
class Namesakes:
    """Notices ids that two live processes use."""

    def __init__(self) -> None:
        # Both in the order in which they were heard: what is forgotten is at the front.
        self._last: dict[str, _Heard] = {}
        self._contests: dict[str, _Contest] = {}

    def hear(self, agent_id: str, process: str, now_ns: int, beat_ns: int) -> bool:
        """Take in a ping; return whether its agent's id is used by another live process, too.

        Args:
          agent_id: the agent that pings.
          process: its process, by a name that no other one has.
          now_ns: when the ping came, in local time.
          beat_ns: the length of a beat.

        """
        contest = self._contests.get(agent_id)
        if contest is not None:
            contest.hear(process, now_ns)
            return contest.alive(now_ns, _patience_ns(beat_ns)) >= 2
        last = self._last.pop(agent_id, None)
        self._last[agent_id] = _Heard(process, now_ns)
        if len(self._last) > _AGENTS:
            del self._last[next(iter(self._last))]
        if (
            last is not None
            and last.process != process
            and now_ns - last.when_ns <= _REMEMBERED_NS
            and len(self._contests) < _CONTESTS
        ):
            self._contests[agent_id] = _Contest(last.process, process, now_ns)
        return False

    def contested(self, now_ns: int, beat_ns: int) -> tuple[str, ...]:
        """Return ids that two processes have used lately, for the next frame.

        Args:
          now_ns: now, in local time.
          beat_ns: the length of a beat.

        """
        if not self._contests:
            return ()
        patience = _patience_ns(beat_ns)
        for agent_id, contest in list(self._contests.items()):
            if contest.is_over(now_ns, patience):
                del self._contests[agent_id]
                for process, when in contest.heard.items():
                    self._last[agent_id] = _Heard(process, when)
        named = tuple(self._contests)[:_NAMED]
        # The others come with the next frames.
        for agent_id in named if len(self._contests) > _NAMED else ():
            self._contests[agent_id] = self._contests.pop(agent_id)
        return named


def _patience_ns(beat_ns: int) -> int:
    return max(_ALIVE_NS, _ALIVE_BEATS * beat_ns)
