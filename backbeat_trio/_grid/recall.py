"""What a recall comes to: the time and the grid that most of those who answer agree on.

Each answer is a measurement of cluster time, like a ping, and says by how much it may be wrong. The
true time lies in each honest answer's interval. So the instant that most intervals share is taken
(Marzullo's algorithm, as in RFC 5905, section 11.2.1), and only where these are more than half of
all: one liar among several agents changes nothing.

Pure: times are passed in.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Final, NamedTuple

from .._wire import RecallReply
from .estimate import Ping
from .timeline import Timeline

# By how much an answer may lie from what the record and the wall clock let expect.
_EXPECTED_NS: Final = 60_000_000_000


class Memory(NamedTuple):
    """One answer to a recall, and the exchange by which it came."""

    ping: Ping
    reply: RecallReply
    timeline: Timeline


class Agreement(NamedTuple):
    """What most of those who answered agree on."""

    offset_ns: int
    """Cluster time minus local time."""
    uncertainty_ns: int
    """What it may be wrong by."""
    timeline: Timeline
    incarnation: str
    """The identity of the grid; empty where nobody knows it."""
    epoch: int
    """The epoch that most of them follow, at least; -1 for that of a leader without a record."""
    last_beat: int
    """The last beat that any of them has delivered."""
    beats_per_bar: int
    alone: bool
    """Whether the grid has no record."""


def agree(
    memories: Sequence[Memory],
    now_ns: int,
    *,
    incarnation: str | None = None,
    expected_ns: int | None = None,
) -> Agreement | None:
    """Return what most of the answers agree on; None where they do not, or none can be believed.

    Args:
      memories: the answers, one of each agent.
      now_ns: now, in local time.
      incarnation: the identity of the record's grid: answers of another grid do not count. None
        where there is no record; then the grid that most answers are of counts.
      expected_ns: the cluster time that the record and the wall clock let expect; None for any.

    """
    believed = [
        m for m in memories if m.ping.delay_ns >= 0 and m.ping.replied_ns >= m.ping.received_ns
    ]
    if expected_ns is not None:
        believed = [
            m for m in believed if abs(now_ns + m.ping.offset_ns - expected_ns) <= _EXPECTED_NS
        ]
    if incarnation is None and believed:
        of = Counter(m.reply.incarnation or "" for m in believed)
        ((incarnation, count),) = of.most_common(1)
        if 2 * count <= len(believed):
            return None
    believed = [m for m in believed if (m.reply.incarnation or "") == incarnation]
    if not believed or incarnation is None:
        return None
    low, high, count = _most(
        [
            (m.ping.offset_ns - half, m.ping.offset_ns + half)
            for m in believed
            if (half := _half(m)) >= 0
        ]
    )
    if 2 * count <= len(believed):
        return None
    offset = (low + high) // 2
    agreed = [m for m in believed if abs(m.ping.offset_ns - offset) <= _half(m)]
    cluster = now_ns + offset
    # Of the same grid some may have heard of a change that others have not.
    timelines = Counter(m.timeline.since(cluster) for m in agreed)
    timeline = max(timelines, key=lambda t: (timelines[t], t.segments[-1].seq))
    furthest = timeline.index_at(cluster) + 1
    bars = Counter(m.reply.beats_per_bar for m in agreed)
    return Agreement(
        offset_ns=offset,
        uncertainty_ns=(high - low) // 2,
        timeline=timeline,
        incarnation=incarnation,
        # One that somebody made up must not be the last that there can be.
        epoch=statistics.median_high(
            -1 if m.reply.alone is True else m.reply.epoch for m in agreed
        ),
        last_beat=max(min(m.reply.last_beat, furthest) for m in agreed),
        beats_per_bar=bars.most_common(1)[0][0],
        alone=all(m.reply.alone is True for m in agreed),
    )


def _epoch(memory: Memory) -> int:
    return -1 if memory.reply.alone is True else memory.reply.epoch


def _half(memory: Memory) -> int:
    return memory.ping.delay_ns // 2 + 1 + memory.reply.uncertainty_ns


def _most(intervals: Sequence[tuple[int, int]]) -> tuple[int, int, int]:
    """Return the interval that most of these share, and how many of them do."""
    edges = sorted([(low, -1) for low, _ in intervals] + [(high, 1) for _, high in intervals])
    best, count, shared = 0, 0, (0, 0)
    for index, (edge, kind) in enumerate(edges):
        count -= kind
        if count > best:
            best, shared = count, (edge, edges[index + 1][0])
    return *shared, best
