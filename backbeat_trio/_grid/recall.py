"""The result of a recall: the cluster time and the grid on which a majority of the answers agree.

If there is no majority, the record and the wall clock decide which answer is used.

Each answer is a measurement of cluster time, like a ping, and gives an interval in which the true
time lies if the answer is right. `agree` takes the instant that most intervals share (Marzullo's
algorithm, as in RFC 5905, section 11.2.1), if these are more than half of all answers. So one wrong
answer among several changes nothing. Of two agents one may be wrong without knowing it, for example
after its machine was suspended. Then the time that the record and the wall clock let expect tells
which of them to believe, because any answer is better than another incarnation of the grid.

Pure: times are passed in.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Final, NamedTuple

from .._wire import MAX_NS, RecallReply, Record
from .estimate import Ping
from .timeline import Timeline

# An answer is dropped if it differs by more from the time computed from the record and wall clock.
_EXPECTED_NS: Final = 60_000_000_000
# By how much the cluster times of two processes may differ, beyond what each knows to be uncertain.
BEHIND_NS: Final = 50_000_000


class Memory(NamedTuple):
    """One answer to a recall, with the time stamps of its exchange."""

    ping: Ping
    reply: RecallReply
    timeline: Timeline


class Agreement(NamedTuple):
    """What a majority of the answers agree on."""

    offset_ns: int
    """Cluster time minus local time, in nanoseconds."""
    uncertainty_ns: int
    """By how much the offset may be wrong, in nanoseconds."""
    timeline: Timeline
    incarnation: str
    """The identity of the grid; empty if no answer names it."""
    epoch: int
    """The median of their epochs; -1 stands for the epoch of a leader without a record."""
    last_beat: int
    """The highest beat index that any of them has delivered."""
    beats_per_bar: int


def agree(
    memories: Sequence[Memory],
    now_ns: int,
    *,
    incarnation: str | None = None,
    expected_ns: int | None = None,
    written_ns: int | None = None,
) -> Agreement | None:
    """Return what a majority of the answers agree on, or None if no answer can be believed.

    If there is no majority, the answer that is nearest to the expected time counts, together with
    those that agree with it. If no time is expected, the result is then None.

    Args:
      memories: the answers, one of each agent.
      now_ns: now, in local time.
      incarnation: the identity of the grid in the record; answers of another grid do not count.
        None if there is no record. Then only the grid of the majority of the answers counts.
      expected_ns: the cluster time now, computed from the record and the wall clock; answers that
        differ from it by more than a minute do not count. None if nothing is expected.
      written_ns: the cluster time at which the record was written. It is later than that now, so
        answers that cannot be right then do not count. None if that is not known.

    """
    believed = [
        m
        for m in memories
        if m.ping.delay_ns >= 0 and m.ping.replied_ns >= m.ping.received_ns and _half(m) >= 0
    ]
    if expected_ns is not None:
        believed = [
            m for m in believed if abs(now_ns + m.ping.offset_ns - expected_ns) <= _EXPECTED_NS
        ]
    if written_ns is not None:
        least = written_ns - BEHIND_NS - now_ns
        believed = [m for m in believed if m.ping.offset_ns + _half(m) >= least]
    if incarnation is None and believed:
        of = Counter(m.reply.incarnation or "" for m in believed)
        ((incarnation, count),) = of.most_common(1)
        if 2 * count <= len(believed):
            return None
    believed = [m for m in believed if (m.reply.incarnation or "") == incarnation]
    if not believed or incarnation is None:
        return None
    low, high, count = _most([_interval(m) for m in believed])
    if 2 * count <= len(believed):
        if expected_ns is None:
            return None
        expected = expected_ns - now_ns
        low, high = _interval(min(believed, key=lambda m: abs(m.ping.offset_ns - expected)))
    if written_ns is not None:
        # An answer that says that it may be wrong by much could still be right.
        low = max(low, written_ns - BEHIND_NS - now_ns)
    offset = (low + high) // 2
    agreed = [m for m in believed if abs(m.ping.offset_ns - offset) <= _half(m)]
    cluster = now_ns + offset
    # Some agents may know a change of this grid that others have not heard of yet.
    timelines = Counter(m.timeline.since(cluster) for m in agreed)
    timeline = max(timelines, key=lambda t: (timelines[t], t.segments[-1].seq))
    furthest = timeline.index_at(cluster) + 1
    bars = Counter(m.reply.beats_per_bar for m in agreed)
    return Agreement(
        offset_ns=offset,
        # No message can carry more.
        uncertainty_ns=min((high - low) // 2, MAX_NS),
        timeline=timeline,
        incarnation=incarnation,
        # The median, so that one made-up epoch does not use up all higher ones.
        epoch=statistics.median_high(
            -1 if m.reply.alone is True else m.reply.epoch for m in agreed
        ),
        last_beat=max(min(m.reply.last_beat, furthest) for m in agreed),
        beats_per_bar=bars.most_common(1)[0][0],
    )


def limit(
    agreement: Agreement, record: Record, cluster_ns: int, own: Timeline | None = None
) -> Agreement:
    """Return an agreement without what contradicts the record of its grid.

    The answers tell what time it is. What the grid is comes from the record, because an agent may
    lie. All that the segments of the answers still tell is which changes the agents have heard of.

    Args:
      agreement: what a majority of the answers agree on.
      record: the record, of the same incarnation.
      cluster_ns: now, in cluster time.
      own: what this metronome itself knows of the grid; None if it knows nothing.

    """
    committed = Timeline(record.segments)
    known = {*committed.segments, *(own.segments if own is not None else ())}
    heard = tuple(segment for segment in agreement.timeline.segments if segment in known)
    timeline = Timeline(heard or committed.segments[:1])
    furthest = max(timeline.index_at(cluster_ns), committed.index_at(cluster_ns)) + 1
    return agreement._replace(
        timeline=timeline,
        last_beat=min(agreement.last_beat, furthest),
        beats_per_bar=record.beats_per_bar,
    )


def _half(memory: Memory) -> int:
    return memory.ping.delay_ns // 2 + 1 + memory.reply.uncertainty_ns


def _interval(memory: Memory) -> tuple[int, int]:
    offset, half = memory.ping.offset_ns, _half(memory)
    return offset - half, offset + half


def _most(intervals: Sequence[tuple[int, int]]) -> tuple[int, int, int]:
    """Return the ends of the interval that most intervals share, and how many share it."""
    edges = sorted([(low, -1) for low, _ in intervals] + [(high, 1) for _, high in intervals])
    best, count, shared = 0, 0, (0, 0)
    for index, (edge, kind) in enumerate(edges):
        count -= kind
        if count > best:
            best, shared = count, (edge, edges[index + 1][0])
    return *shared, best
