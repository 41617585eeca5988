"""What an agent estimates of cluster time: offset and frequency, from pings.

Pure: times are passed in, as integers of nanoseconds; frequencies are integers of parts in 10**12.
Each name says whether it is of cluster time or of local time. Only the statistics are floats, of
differences small enough for them.
"""

from __future__ import annotations

import enum
import math
import operator
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple, final

from .steering import PARTS

# No clock is further off than this; beyond it cluster time would be slewed into nonsense.
_MAX_FREQUENCY: Final = PARTS // 10

# How many bursts the regression looks back on.
_BURSTS: Final = 64
# After so many bursts in a row that contradict the estimate it is the estimate that is wrong.
_OVERRULED: Final = 3
# After so many bursts with another leader, what was known before counts no more.
_CARRIED_POINTS: Final = 4
# What a burst must be off the line by to count as a jump: so many times what chance explains, and
# so many nanoseconds.
_SHIFT: Final = 8
_SHIFT_NS: Final = 1_000_000
# Standard deviations, as fractions: of a frequency that was measured, but before a clock jumped;
# of one of which nothing is known yet; of one that nobody would expect. And how a frequency
# wanders.
_KNOWN: Final = 10e-6
_UNKNOWN: Final = 500e-6
_ANYTHING: Final = 0.1
_WANDER: Final = 1e-6
# What the best of pings errs by, in nanoseconds: the stamps' own part of it.
_STAMP_NS: Final = 20_000.0
# An estimate is good while a standard deviation of its line is no more than this, and what the
# frequency may have wandered by no more than that: in nanoseconds, or as a part of the shortest way
# of a ping, by half of which the offset may be wrong anyhow.
_GOOD_NS: Final = 35_000.0
_WANDERED_NS: Final = 40_000.0
_GOOD_PART: Final = 1 / 128
# What a burst may be off by, beside what its own way and the estimate allow for.
_SLACK_NS: Final = 100_000.0

# A leader asks for patience when it is pinged more often than so for a second on end. It can answer
# several times as many, and ten thousand agents whose estimates are good ping less often.
_PINGS_A_SECOND: Final = 4000
_PATIENCE_NS: Final = 1_000_000_000
# Nobody is put off for longer than this.
REST_NS: Final = 64_000_000_000


class Ping(NamedTuple):
    """One request-reply exchange.

    Sent and answered are local time, received and replied cluster time, all in nanoseconds.
    """

    sent_ns: int
    received_ns: int
    replied_ns: int
    answered_ns: int

    @property
    def delay_ns(self) -> int:
        """The time on the way, there and back (RFC 5905, section 8: delta)."""
        return (self.answered_ns - self.sent_ns) - (self.replied_ns - self.received_ns)

    @property
    def offset_ns(self) -> int:
        """Cluster time minus local time (RFC 5905, section 8: theta), to half the delay."""
        return ((self.received_ns - self.sent_ns) + (self.replied_ns - self.answered_ns)) // 2

    @property
    def local_ns(self) -> int:
        """The local time that the offset was measured at: the middle of the exchange."""
        return (self.sent_ns + self.answered_ns) // 2


def best_ping(pings: Iterable[Ping]) -> Ping | None:
    """Return the ping of a burst that was shortest on its way.

    What claims to have left before it came, or to have been on its way for less than nothing, is
    passed over.
    """
    honest = [ping for ping in pings if ping.delay_ns >= 0 and ping.replied_ns >= ping.received_ns]
    return min(honest, key=lambda ping: ping.delay_ns, default=None)


class Verdict(enum.Enum):
    """What a burst of pings did to an estimate."""

    NOTHING = enum.auto()
    """There was no ping in it that could be believed."""
    TAKEN = enum.auto()
    OUTLYING = enum.auto()
    """It contradicted the estimate by more than its way explains, and was left out."""
    OVERRULED = enum.auto()
    """It was one of several in a row that did: the estimate begins anew with them."""


@final
class Estimate:
    """Offset and frequency of cluster time against local time, from bursts of pings.

    The best ping of each burst is a point; a line through the last ones, by weighted least squares,
    gives offset and frequency. A point counts for less the longer its way was and the older it is.
    What is known of the frequency beforehand enters as one more observation of it, so the first
    points, close together as they are, do not tell the frequency anything.
    """

    __slots__ = (
        "_best_ns",
        "_carried",
        "_contradictions",
        "_frequency",
        "_frequency_sd",
        "_mean_local",
        "_mean_offset",
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
        # Whether the first point is what was known with another leader.
        self._carried = False
        self._prior, self._prior_sd = 0.0, float(_UNKNOWN)
        self._best_ns = 0
        self._mean_local = self._mean_offset = 0
        self._frequency = 0.0
        self._frequency_sd = _UNKNOWN
        self._weight = 0.0

    @property
    def known(self) -> bool:
        """Whether there is anything to estimate from."""
        return bool(self._points)

    @property
    def frequency(self) -> int:
        """How much faster cluster time runs than local time, in parts in 10**12."""
        limit = _MAX_FREQUENCY
        return max(-limit, min(limit, round(self._frequency * PARTS)))

    @property
    def way_ns(self) -> int:
        """The shortest way of a ping, there and back."""
        return self._best_ns

    def offset_at(self, local_ns: int) -> int:
        """Return cluster time minus local time at an instant of local time."""
        return self._mean_offset + (local_ns - self._mean_local) * self.frequency // PARTS

    def uncertainty_at(self, local_ns: int) -> int:
        """Return what the offset may be wrong by at an instant, in nanoseconds.

        It is half the shortest way of a ping, which no statistics tell anything of, and two
        standard deviations of the line there; beyond the last point these grow with what is not
        known of the frequency and with its wandering (compare RFC 5905, section 11.2: root
        distance).
        """
        return self._best_ns // 2 + math.ceil(2 * self._deviation(local_ns))

    def is_good_at(self, local_ns: int) -> bool:
        """Tell whether another ping would hardly make the offset any better until an instant."""
        part = self._best_ns * _GOOD_PART
        return (
            self.known
            and self._line_deviation(local_ns) <= max(_GOOD_NS, part)
            and self._wandered(local_ns) <= max(_WANDERED_NS, part)
        )

    def expects(self, ping: Ping) -> bool:
        """Tell whether a ping is no more off the line than its own way and chance explain."""
        local = ping.local_ns
        allowed = (ping.delay_ns - self._best_ns) / 2 + 2 * (self._deviation(local) + _STAMP_NS)
        return abs(ping.offset_ns - self.offset_at(local)) <= allowed

    def add(self, burst: Sequence[Ping]) -> Verdict:
        """Take in a burst of pings."""
        best = best_ping(burst)
        if best is None:
            return Verdict.NOTHING
        if self._points:
            # Where somebody else answers too, with nonsense, the leader's own answers are used.
            best = best_ping(ping for ping in burst if self._agrees(ping)) or best
            if not self._agrees(best):
                return self._contradict(best)
            if self._note_shift(best):
                if len(self._shifts) < _OVERRULED:
                    return Verdict.OUTLYING
                self._contradictions, self._shifts = self._shifts, []
                return self._begin_with_contradictions()
        self._contradictions.clear()
        self._points.append(best)
        if self._carried and len(self._points) > _CARRIED_POINTS:
            # Where the ways to the two leaders differ it would hold the offset back for long.
            self._points.popleft()
            self._carried = False
        self._fit()
        return Verdict.TAKEN

    def _contradict(self, ping: Ping) -> Verdict:
        self._contradictions.append(ping)
        if len(self._contradictions) < _OVERRULED:
            return Verdict.OUTLYING
        first, *_, last = self._contradictions
        elapsed = max(1, last.local_ns - first.local_ns)
        if abs(last.offset_ns - first.offset_ns) > _ANYTHING * elapsed + last.delay_ns:
            # They do not agree with one another either.
            del self._contradictions[0]
            return Verdict.OUTLYING
        return self._begin_with_contradictions()

    def _note_shift(self, ping: Ping) -> bool:
        # A jump may be smaller than what the way could explain, and the way goes on as it was: then
        # several pings in a row lie off the line by the same, and far more than their ways differ.
        off = ping.offset_ns - self.offset_at(ping.local_ns)
        if self._carried:
            # What was known with another leader lay on another way.
            return False
        differ = abs(ping.delay_ns - self._best_ns) / 2
        spread = differ + self._deviation(ping.local_ns) + _STAMP_NS
        allowed = _SHIFT * spread + _SHIFT_NS
        if abs(off) <= allowed:
            self._shifts.clear()
            return False
        if self._shifts:
            # By the same: the way may have changed in between, and change back.
            before = self._shifts[-1]
            if abs(off - before.offset_ns + self.offset_at(before.local_ns)) > allowed:
                self._shifts.clear()
        self._shifts.append(ping)
        return True

    def _begin_with_contradictions(self) -> Verdict:
        first, *_, last = self._contradictions
        elapsed = max(1, last.local_ns - first.local_ns)
        slope = (last.offset_ns - first.offset_ns) / elapsed
        if abs(slope - self._frequency) * elapsed <= first.delay_ns + last.delay_ns:
            # One of the clocks jumped, and goes on as before.
            self._prior, self._prior_sd = self._frequency, max(self._frequency_sd, _KNOWN)
        else:
            self._prior, self._prior_sd = 0.0, _ANYTHING
        self._points.clear()
        self._carried = False
        self._points.extend(self._contradictions)
        self._contradictions.clear()
        self._fit()
        return Verdict.OVERRULED

    def begin_anew(self, ping: Ping) -> None:
        """Begin anew with another leader, who has an idea of its own of cluster time.

        Its rate hardly differs, and what was known of the offset counts as much as one ping that
        was on its way for so long. Moving the old points by what one burst says would give that
        burst's error the weight of them all.

        Args:
          ping: the best one that the other leader has answered.

        """
        local = ping.local_ns
        offset, half = self.offset_at(local), self.uncertainty_at(local) + round(_SLACK_NS)
        self._prior, self._prior_sd = self._frequency, max(self._frequency_sd, _KNOWN)
        self._points.clear()
        self._carried = False
        self._contradictions.clear()
        self._shifts.clear()
        if abs(ping.offset_ns - offset) <= half + ping.delay_ns / 2:
            cluster = local + offset
            self._points.append(Ping(local - half, cluster, cluster, local + half))
            self._carried = True
            self._fit()

    def _agrees(self, ping: Ping) -> bool:
        # The true offset lies within half the way of what was measured, now and before.
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
        for ping in points:
            age = newest - ping.local_ns
            deviation = _STAMP_NS + (ping.delay_ns - best) / 2 + _WANDER * age
            weights.append(1 / (deviation * deviation))
            xs.append(-float(age))
            ys.append(float(ping.offset_ns - offset0))
        self._weight = weight = math.fsum(weights)
        mean_x = math.fsum(map(operator.mul, weights, xs)) / weight
        mean_y = math.fsum(map(operator.mul, weights, ys)) / weight
        # What was known of the frequency beforehand is one more observation of it.
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
class PingRate:
    """How often a leader is pinged, and how long whoever pings it too often is to wait.

    Each ping takes its share of a second. Those that come faster are put off one after the other,
    so that the next ones come evenly.
    """

    __slots__ = ("_taken_ns",)

    def __init__(self) -> None:
        self._taken_ns = 0

    def add(self, now_ns: int) -> int:
        """Take in a ping; return how long who sent it is to wait, in nanoseconds, 0 for not."""
        taken = max(self._taken_ns, now_ns) + 1_000_000_000 // _PINGS_A_SECOND
        self._taken_ns = taken = min(taken, now_ns + REST_NS)
        ahead = taken - now_ns
        return ahead if ahead > _PATIENCE_NS else 0
