"""An agent's estimate of cluster time: its offset and frequency, measured by pings.

Pure: times are passed in, as integers of nanoseconds; frequencies are integers of parts in 10**12.
Each name says whether a time is cluster time or local time. Only the statistics use floats, for
differences that are small enough to be exact.
"""

from __future__ import annotations

import enum
import math
import operator
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple, final

from .steering import MIN_STEP_NS, PARTS

# The largest frequency that is used. No real clock is off by more.
_MAX_FREQUENCY: Final = PARTS // 10

# How many bursts the regression uses.
_BURSTS: Final = 64
# If this many bursts in a row contradict the estimate, the estimate is wrong.
_OVERRULED: Final = 3
# After this many bursts with a new leader, the offset to the leader before it no longer counts.
_CARRIED_POINTS: Final = 4
# A burst counts as a jump of a clock if it is off the line by more than this many times what chance
# explains plus this many nanoseconds.
_SHIFT: Final = 8
_SHIFT_NS: Final = 1_000_000
# Standard deviations of a frequency, as fractions: of one that was measured before a clock jumped
# or another leader took over; of one that was not measured yet; of a clock that is far from any
# usual rate. The last is how much a frequency changes by itself.
_KNOWN: Final = 10e-6
_UNKNOWN: Final = 500e-6
_ANYTHING: Final = 0.1
_WANDER: Final = 1e-6
# The error, in nanoseconds, that the time stamps add to the best ping.
_STAMP_NS: Final = 20_000.0
# An estimate is good while the standard deviation of its line is at most the first value, and the
# possible change of the frequency adds at most the second. Both are in nanoseconds. Either may also
# be as large as the third, a fraction of the shortest round trip: the offset may be wrong by half a
# round trip anyway.
_GOOD_NS: Final = 35_000.0
_WANDERED_NS: Final = 40_000.0
_GOOD_PART: Final = 1 / 128
# How much the last burst counts at least in the mean of how irregular round trips are.
_EXCESS_PART: Final = 1 / 16
# How far off a burst may be, in addition to its own round trip and the estimate's deviation.
_SLACK_NS: Final = 100_000.0

# Frames move cluster time back by much if they stay late for so many beats, and for so long.
_LATE_BEATS: Final = 2
_LATE_NS: Final = 1_000_000_000

# If more pings than this arrive for about a second, the leader asks the agents to wait. It can
# answer several times as many, and ten thousand agents whose estimates are good send fewer.
_PINGS_PER_SECOND: Final = 4000
_PATIENCE_NS: Final = 1_000_000_000
# The longest time, in nanoseconds, for which an agent does not ping its leader.
REST_NS: Final = 64_000_000_000


class Ping(NamedTuple):
    """The four time stamps of one request and its reply, in nanoseconds.

    ``sent_ns`` and ``answered_ns`` are local time; ``received_ns`` and ``replied_ns`` are cluster
    time, by the leader's clock.
    """

    sent_ns: int
    received_ns: int
    replied_ns: int
    answered_ns: int

    @property
    def delay_ns(self) -> int:
        """The round trip without the leader's own time, in ns (RFC 5905, section 8: delta)."""
        return (self.answered_ns - self.sent_ns) - (self.replied_ns - self.received_ns)

    @property
    def offset_ns(self) -> int:
        """Cluster time minus local time in ns, exact to half the delay (RFC 5905: theta)."""
        return ((self.received_ns - self.sent_ns) + (self.replied_ns - self.answered_ns)) // 2

    @property
    def local_ns(self) -> int:
        """The local time at which the offset was measured: the middle of the exchange."""
        return (self.sent_ns + self.answered_ns) // 2


def best_ping(pings: Iterable[Ping]) -> Ping | None:
    """Return the ping of a burst with the shortest round trip; None if there is no valid one.

    A ping is not valid if its delay is negative, or if the leader replied before it received it.
    """
    honest = [ping for ping in pings if ping.delay_ns >= 0 and ping.replied_ns >= ping.received_ns]
    return min(honest, key=lambda ping: ping.delay_ns, default=None)


class Verdict(enum.Enum):
    """What a burst of pings did to an estimate."""

    NOTHING = enum.auto()
    """The burst had no valid ping."""
    TAKEN = enum.auto()
    """The burst was added to the estimate."""
    OUTLYING = enum.auto()
    """The burst contradicted the estimate by more than its delay explains, and was left out."""
    OVERRULED = enum.auto()
    """Several bursts in a row contradicted the estimate, which was begun anew from them."""


@final
class Estimate:
    """Offset and frequency of cluster time against local time, from bursts of pings.

    The best ping of each burst is a point. A line through the last points, by weighted least
    squares, gives the offset and the frequency. A point has less weight the longer its round trip
    was and the older it is, and all have less weight if round trips are irregular. The expected
    frequency enters as one more observation. Therefore the first points hardly change the
    frequency: they are too close together to measure it.
    """

    __slots__ = (
        "_begun_anew",
        "_best_ns",
        "_carried",
        "_contradictions",
        "_excess_ns",
        "_frequency",
        "_frequency_sd",
        "_mean_local",
        "_mean_offset",
        "_pings",
        "_points",
        "_prior",
        "_prior_sd",
        "_shifts",
        "_weight",
    )

    def __init__(self) -> None:
        self._points: deque[Ping] = deque(maxlen=_BURSTS)
        self._contradictions: list[Ping] = []
        self._shifts: list[Ping] = []
        # Whether the first point stands for the offset to the leader before this one.
        self._carried = False
        # Whether the estimate was begun anew from contradictions, and no burst has agreed since.
        self._begun_anew = False
        self._prior, self._prior_sd = 0.0, float(_UNKNOWN)
        self._best_ns = 0
        self._mean_local = self._mean_offset = 0
        self._frequency = 0.0
        self._frequency_sd = _UNKNOWN
        self._weight = 0.0
        # By how much pings take longer than the shortest of their burst, on average over the last
        # bursts, and the number of pings so far.
        self._excess_ns = 0.0
        self._pings = 0

    @property
    def known(self) -> bool:
        """Whether there is at least one point, so that the estimate can be used."""
        return bool(self._points)

    @property
    def frequency(self) -> int:
        """How much faster cluster time runs than local time, in parts in 10**12."""
        limit = _MAX_FREQUENCY
        return max(-limit, min(limit, round(self._frequency * PARTS)))

    @property
    def way_ns(self) -> int:
        """The shortest round trip among the points, in nanoseconds."""
        return self._best_ns

    def offset_at(self, local_ns: int) -> int:
        """Return cluster time minus local time, in nanoseconds, at an instant of local time."""
        return self._mean_offset + (local_ns - self._mean_local) * self.frequency // PARTS

    def uncertainty_at(self, local_ns: int) -> int:
        """Return by how much the offset may be wrong at an instant of local time, in nanoseconds.

        It is the sum of half the shortest round trip, which statistics cannot reduce, and two
        standard deviations of the line. After the last point these grow with the uncertainty of
        the frequency and with its changes (compare RFC 5905, section 11.2: root distance).
        """
        return self._best_ns // 2 + math.ceil(2 * self._deviation(local_ns))

    def is_good_at(self, local_ns: int) -> bool:
        """Tell whether the estimate is so good until an instant that more pings would not help."""
        part = self._best_ns * _GOOD_PART
        return (
            self.known
            and self._line_deviation(local_ns) <= max(_GOOD_NS, part)
            and self._wandered(local_ns) <= max(_WANDERED_NS, part)
        )

    def expects(self, ping: Ping) -> bool:
        """Tell whether the round trip of a ping and chance explain how far it is off the line."""
        local = ping.local_ns
        allowed = (ping.delay_ns - self._best_ns) / 2 + 2 * (self._deviation(local) + _STAMP_NS)
        return abs(ping.offset_ns - self.offset_at(local)) <= allowed

    def add(self, burst: Sequence[Ping]) -> Verdict:
        """Add a burst of pings, and return what it did to the estimate."""
        best = best_ping(burst)
        if best is None:
            return Verdict.NOTHING
        if self._points:
            # If another process answers, too, with a wrong time, use the leader's own answers.
            best = best_ping(ping for ping in burst if self._agrees(ping)) or best
            if not self._agrees(best):
                return self._contradict(best)
            middle = (best.delay_ns + self._best_ns) / 2
            alone = sum(ping.delay_ns < middle for ping in burst) == 1
            if self._note_shift(best, alone=alone):
                if len(self._shifts) < _OVERRULED:
                    return Verdict.OUTLYING
                self._contradictions = self._shifts.copy()
                return self._begin_with_contradictions(self._shift_ns(best, self._best_ns))
        self._contradictions.clear()
        self._begun_anew = False
        self._note_excess(burst, best)
        self._points.append(best)
        if self._carried and len(self._points) > _CARRIED_POINTS:
            # If the routes to the two leaders differ, this point would bias the offset for long.
            self._points.popleft()
            self._carried = False
        self._fit()
        return Verdict.OVERRULED if self._drop_shortest() else Verdict.TAKEN

    def _note_excess(self, burst: Sequence[Ping], best: Ping) -> None:
        others = [p.delay_ns - best.delay_ns for p in burst if p is not best]
        excess = [other for other in others if other >= 0]
        if excess:
            self._pings += len(excess) + 1
            part = max((len(excess) + 1) / self._pings, _EXCESS_PART)
            self._excess_ns += part * (statistics.fmean(excess) - self._excess_ns)

    def _drop_shortest(self) -> bool:
        # A clock that stood still during a ping makes its round trip look short. If no other point
        # is nearly as short, that one outweighs all others, and their delays explain that they are
        # off. It is wrong if three later points agree with one another and not with it.
        points = self._points
        shortest = min(points, key=operator.attrgetter("delay_ns"))
        others = [point for point in points if point is not shortest]
        later = [point for point in others if point.local_ns > shortest.local_ns][-_OVERRULED:]
        if self._carried or len(later) < _OVERRULED:
            return False
        least = min(point.delay_ns for point in others)
        spread = (max(point.delay_ns for point in later) - least) / 2
        if (least - shortest.delay_ns) / 2 <= max(spread, _SHIFT_NS):
            return False
        index = points.index(shortest)
        del points[index]
        self._fit()
        chance = 2 * (spread + self._deviation(shortest.local_ns) + _STAMP_NS) + _SHIFT_NS
        if abs(self._off(shortest)) > chance:
            return True
        points.insert(index, shortest)
        self._fit()
        return False

    def _contradict(self, ping: Ping) -> Verdict:
        self._contradictions.append(ping)
        if len(self._contradictions) < _OVERRULED:
            return Verdict.OUTLYING
        first, *_, last = self._contradictions
        elapsed = max(1, last.local_ns - first.local_ns)
        if abs(last.offset_ns - first.offset_ns) > _ANYTHING * elapsed + last.delay_ns:
            # They contradict one another as well.
            del self._contradictions[0]
            return Verdict.OUTLYING
        return self._begin_with_contradictions(first.delay_ns + last.delay_ns)

    def _note_shift(self, ping: Ping, *, alone: bool) -> bool:
        # A clock may jump by less than the round trip, or run at another rate, so that each single
        # ping might be explained by its delay. It shows as several pings in a row that are off the
        # line, by the same amount or by amounts that grow evenly, while their delays differ by far
        # less.
        off, best_ns = self._off(ping), self._best_ns
        if self._carried:
            # The route to the leader before this one was another, so only this one's pings count.
            own = min(list(self._points)[1:], key=operator.attrgetter("delay_ns"), default=None)
            if own is None:
                return False
            off, best_ns = off - self._off(own), own.delay_ns
        allowed = chance = self._shift_ns(ping, best_ns)
        if alone and ping.delay_ns < best_ns and not self._carried:
            # If a clock stood still during a ping, its round trip looks shorter than all others,
            # also than those of its burst. It would outweigh the pings before and after it.
            # Therefore it is used only if the next one still agrees with the line.
            chance -= _SHIFT * (best_ns - ping.delay_ns) / 2
        if abs(off) <= chance:
            if self.expects(ping):
                self._points.extend(one for one in self._shifts if one.delay_ns < self._best_ns)
            self._shifts.clear()
            return False
        self._shifts.append(ping)
        # Other amounts are not due to a clock: the route may have changed, and changed back.
        while not self._are_on_one_line(self._shifts, allowed):
            del self._shifts[0]
        return True

    def _off(self, ping: Ping) -> int:
        return ping.offset_ns - self.offset_at(ping.local_ns)

    def _shift_ns(self, ping: Ping, best_ns: int) -> float:
        differ = abs(ping.delay_ns - best_ns) / 2
        spread = differ + self._deviation(ping.local_ns) + _STAMP_NS
        return _SHIFT * spread + _SHIFT_NS

    def _are_on_one_line(self, pings: Sequence[Ping], allowed_ns: float) -> bool:
        first, last = pings[0], pings[-1]
        elapsed, grown = max(1, last.local_ns - first.local_ns), self._off(last) - self._off(first)
        if abs(grown) > _ANYTHING * elapsed + allowed_ns:
            return False
        rest = (
            self._off(ping) - self._off(first) - grown * (ping.local_ns - first.local_ns) / elapsed
            for ping in pings
        )
        return all(abs(off) <= allowed_ns for off in rest)

    def _begin_with_contradictions(self, explained_ns: float) -> Verdict:
        first, *_, last = self._contradictions
        elapsed = max(1, last.local_ns - first.local_ns)
        slope = (last.offset_ns - first.offset_ns) / elapsed
        same_rate = abs(slope - self._frequency) * elapsed <= explained_ns
        if same_rate and not self._begun_anew:
            # One of the clocks jumped and then continued at the same rate.
            self._prior, self._prior_sd = self._frequency, max(self._frequency_sd, _KNOWN)
        else:
            # If that was assumed before and no burst has agreed since, it was wrong: a rate has
            # changed, by so little that the round trips hide it in so short a time.
            self._prior, self._prior_sd = 0.0, _ANYTHING
        self._begun_anew = True
        self._points.clear()
        self._carried = False
        self._points.extend(self._contradictions)
        self._contradictions.clear()
        self._shifts.clear()
        self._fit()
        return Verdict.OVERRULED

    def begin_anew(self, ping: Ping) -> None:
        """Begin anew with the pings of another leader, whose cluster time differs slightly.

        The frequency is kept. The offset so far becomes a single point, whose round trip is twice
        the uncertainty. Shifting all old points by the first burst of the new leader instead would
        give the error of that burst the weight of all of them.

        Args:
          ping: the best ping that the new leader has answered.

        """
        local = ping.local_ns
        offset, half = self.offset_at(local), self.uncertainty_at(local) + round(_SLACK_NS)
        self._prior, self._prior_sd = self._frequency, max(self._frequency_sd, _KNOWN)
        self._points.clear()
        self._carried = False
        self._contradictions.clear()
        self._shifts.clear()
        self._excess_ns, self._pings = 0.0, 0
        if abs(ping.offset_ns - offset) <= half + ping.delay_ns / 2:
            cluster = local + offset
            self._points.append(Ping(local - half, cluster, cluster, local + half))
            self._carried = True
            self._fit()

    def _agrees(self, ping: Ping) -> bool:
        # Each measurement, this one and those before, is wrong by at most half its delay.
        local = ping.local_ns
        allowed = (ping.delay_ns + self._best_ns) / 2 + 4 * self._deviation(local) + _SLACK_NS
        return abs(ping.offset_ns - self.offset_at(local)) <= allowed

    def _deviation(self, local_ns: int) -> float:
        if not self._points:
            return math.inf
        return self._line_deviation(local_ns) + self._wandered(local_ns)

    def _line_deviation(self, local_ns: int) -> float:
        away = local_ns - self._mean_local
        return math.sqrt(1 / self._weight + (away * self._frequency_sd) ** 2)

    def _wandered(self, local_ns: int) -> float:
        return _WANDER * max(0, local_ns - self._points[-1].local_ns)

    def _fit(self) -> None:
        points, newest = self._points, self._points[-1].local_ns
        offset0 = points[-1].offset_ns
        best = min(ping.delay_ns for ping in points)
        self._best_ns = best
        weights, xs, ys = [], [], []
        # The shortest of all round trips is longer than the shortest possible one, the less so the
        # more pings there were. If it takes so much more on one way, it is wrong by half of that.
        gap = self._excess_ns / math.sqrt(max(1, self._pings)) / 2
        for ping in points:
            age = newest - ping.local_ns
            deviation = _STAMP_NS + gap + (ping.delay_ns - best) / 2 + _WANDER * age
            weights.append(1 / (deviation * deviation))
            xs.append(-float(age))
            ys.append(float(ping.offset_ns - offset0))
        self._weight = weight = math.fsum(weights)
        mean_x = math.fsum(map(operator.mul, weights, xs)) / weight
        mean_y = math.fsum(map(operator.mul, weights, ys)) / weight
        # The expected frequency is one more observation.
        spread = 1 / self._prior_sd**2
        moment = self._prior * spread
        for w, x, y in zip(weights, xs, ys, strict=True):
            spread += w * (x - mean_x) ** 2
            moment += w * (x - mean_x) * (y - mean_y)
        self._frequency = moment / spread
        self._frequency_sd = 1 / math.sqrt(spread)
        self._mean_local = newest + round(mean_x)
        self._mean_offset = offset0 + round(mean_y + self._frequency * (round(mean_x) - mean_x))


@final
class Arrivals:
    """The cluster time that the arrival of frames shows, while the leader answers no pings.

    A frame may take any time, but never arrives before it is published. So a frame that is early
    corrects the time at once. One that is much too late does so only if all that arrive in the next
    max(2 beats, 1 s) are: otherwise it was held up on its way.
    """

    def __init__(self) -> None:
        self._since_ns: int | None = None
        self._offset_ns = 0

    def add(self, offset_ns: int, late_ns: int, received_ns: int, beat_ns: int) -> int | None:
        """Add a frame, and return the offset to which to correct cluster time; None for none.

        Args:
          offset_ns: when it was due, in cluster time, minus when it arrived, in local time.
          late_ns: by how much it is late by the present estimate of cluster time.
          received_ns: when it arrived, in local time.
          beat_ns: the length of a beat.

        """
        if late_ns <= max(MIN_STEP_NS, beat_ns // 4):
            self._since_ns = None
            return offset_ns
        if self._since_ns is None:
            self._since_ns, self._offset_ns = received_ns, offset_ns
        self._offset_ns = max(self._offset_ns, offset_ns)
        if received_ns - self._since_ns < max(_LATE_BEATS * beat_ns, _LATE_NS):
            return None
        self._since_ns = None
        return self._offset_ns


@final
class PingRate:
    """A limit on the pings per second that a leader receives from all its agents together.

    Each ping takes up a share of a second. If pings come faster, each sender is asked to wait a
    little longer than the one before it, so that their next pings come evenly.
    """

    __slots__ = ("_taken_ns",)

    def __init__(self) -> None:
        self._taken_ns = 0

    def add(self, now_ns: int) -> int:
        """Count a ping, and return for how many nanoseconds its sender is to wait; 0 for none."""
        taken = max(self._taken_ns, now_ns) + 1_000_000_000 // _PINGS_PER_SECOND
        self._taken_ns = taken = min(taken, now_ns + REST_NS)
        ahead = taken - now_ns
        return ahead if ahead > _PATIENCE_NS else 0
