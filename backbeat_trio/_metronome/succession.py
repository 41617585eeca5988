"""The term with which a metronome takes the lead: it continues a grid, or begins another one.

Pure: local time and the wall clock's are passed in.
"""

from __future__ import annotations

from typing import Final

from msgspec.structs import replace

from .._grid.changes import reschedule
from .._grid.recall import Agreement, limit
from .._grid.steering import Steering
from .._grid.timeline import Timeline
from .._wire import MAX_NS, Record, Segment
from .term import Term

# By how much the wall clocks of two machines may differ.
_WALL_NS: Final = 2_000_000_000


def expected_ns(record: Record, wall_ns: int) -> int | None:
    """Compute the present cluster time from the record and the wall clock; None if it has none."""
    if record.written_ms is None:
        return None
    written_ns = record.written_ns
    if written_ns is None:
        written_ns = Timeline(record.segments).time_of(record.high_water)
    return written_ns + max(0, wall_ns - record.written_ms * 1_000_000)


def join_record(known: Term, record: Record | None, now_ns: int) -> Term | None:
    """Return a term with the changes in the record; None if that is missing or of another grid."""
    if record is None:
        return None
    committed, now = Timeline(record.segments), known.steering.cluster_at(now_ns)
    apart = committed.time_of(record.high_water) - now
    if not (
        committed.continues(known.timeline, apart) or known.timeline.continues(committed, apart)
    ):
        return None
    bar = known.beats_per_bar
    # A segment that had a frame was announced by it.
    beaten = [s.seq for s in record.segments if s.beat0 <= record.high_water]
    announced_seq = max([min(record.announced_seq, record.segments[-1].seq), *beaten])
    timeline = reschedule(
        known.timeline,
        committed,
        now,
        announced_seq=announced_seq,
        beats_per_bar=bar,
        epoch=known.epoch,
    )
    return replace(
        known,
        timeline=timeline,
        # Another leader may have published frames that were not heard here. Do not repeat them, and
        # publish none of a beat before the first segment that is left.
        sent=max(
            known.sent,
            timeline.segments[0].beat0 - 1,
            min(record.high_water, timeline.index_at(now) + bar),
        ),
        milli_bpm=timeline.segments[0].milli_bpm or record.milli_bpm,
        incarnation=record.incarnation,
        announced_seq=max(known.announced_seq, announced_seq),
    )


def continue_remembered(
    agreement: Agreement, record: Record | None, fresh: Term, now_ns: int, *, former: Term | None
) -> Term:
    """Return a term that continues the grid that the agents remember.

    Args:
      agreement: what their answers agree on.
      record: the record of that grid; None if there is none.
      fresh: a new term, of the next epoch.
      now_ns: now, in local time.
      former: this metronome's last term as leader; None if it has not led.

    """
    steering = Steering()
    steering.step(agreement.offset_ns, at_ns=now_ns)
    cluster_ns = now_ns + agreement.offset_ns
    if record is not None:
        own = None
        if former is not None and former.incarnation == record.incarnation:
            # This metronome may have changed the tempo while it had no record.
            own = former.timeline
        agreement = limit(agreement, record, cluster_ns, own)
    timeline = agreement.timeline.since(cluster_ns)
    known = replace(
        fresh,
        timeline=timeline,
        steering=steering,
        beats_per_bar=agreement.beats_per_bar,
        sent=agreement.last_beat,
        milli_bpm=timeline.segments[0].milli_bpm or fresh.milli_bpm,
        incarnation=agreement.incarnation or fresh.incarnation,
        announced_seq=timeline.segments[-1].seq,
        uncertainty_ns=agreement.uncertainty_ns,
    )
    return join_record(known, record, now_ns) or known


def begin(fresh: Term, milli: int, now_ns: int) -> Term:
    """Return the term of a first grid, at a tempo in thousandths of a beat per minute."""
    origin = fresh.timeline.segments[0].t0_ns
    segment = Segment(fresh.epoch, 0, 0, origin, milli)
    return replace(fresh, timeline=Timeline((segment,)), steering=Steering(origin - now_ns))


def begin_beyond(record: Record, fresh: Term, now_ns: int, wall_ns: int) -> Term:
    """Return the term of a new grid after that of a record, because nobody knows its time.

    No beat may come twice: neither those since the last write of the record, nor those that agents
    have counted on their own. Only the wall clocks tell how many these are.
    """
    origin = fresh.timeline.segments[0].t0_ns
    committed, bar = Timeline(record.segments), record.beats_per_bar
    expected = expected_ns(record, wall_ns) or committed.time_of(record.high_water)
    passed = committed.index_at(expected + _WALL_NS)
    beat0 = (max(record.high_water, passed) // bar + 2) * bar
    begun = [segment for segment in record.segments if segment.beat0 <= beat0]
    milli = (begun or record.segments)[-1].milli_bpm
    timeline = Timeline((Segment(fresh.epoch, 0, beat0, origin, milli),))
    for segment in record.segments:
        if segment.beat0 > beat0:
            changed = timeline.change(segment.milli_bpm, segment.beat0, epoch=fresh.epoch)
            if changed.segments[-1].t0_ns > MAX_NS:
                break
            timeline = changed
    return replace(
        fresh,
        timeline=timeline,
        steering=Steering(origin - now_ns),
        sent=beat0 - 1,
        beats_per_bar=bar,
        milli_bpm=milli or record.milli_bpm,
    )
