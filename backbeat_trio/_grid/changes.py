"""Changes of the grid that may be asked for: another tempo, a ramp, a pause. Pure."""

from __future__ import annotations

from typing import Final

from .._errors import TempoRefused
from .._wire import MAX_INDEX, MAX_NS, MIN_MILLI_BPM
from .timeline import STILL_NS, Timeline

# A change must reach everybody before it takes effect.
_LEAD_BEATS: Final = 2
LEAD_NS: Final = 250_000_000
# For how long whoever asks for a change waits; the leader gives its own record 2 s.
ASKED_NS: Final = 2_500_000_000
# The steps of a ramp: they all ride in every frame.
_STEPS: Final = 64
# The most segments that may be pending, as all of them ride in every frame.
_PENDING: Final = 256


def propose(
    timeline: Timeline,
    cluster_ns: int,
    milli: int | None,
    at_beat: int | None = None,
    *,
    over: int = 0,
    former: int = 0,
    beats_per_bar: int,
    epoch: int,
    after_seq: int = -1,
) -> Timeline:
    """Return the timeline with a change in it.

    It takes effect at ``at_beat``, or else at the next downbeat (a pause: at the next beat), and
    never sooner than max(2 beats, 250 ms) from now. What is pending for earlier beats stays, and
    what is pending for that beat or later ones is replaced.

    Args:
      timeline: the present one.
      cluster_ns: now.
      milli: the tempo in thousandths of a beat a minute; 0 has the grid stand still, None has it go
        on with ``former``.
      at_beat: the beat at which to change.
      over: so many beats it takes to come from the present tempo to the new one, in equal steps of
        whole beats; not for a pause.
      former: the tempo before the grid stood still.
      beats_per_bar: the length of a bar.
      epoch: the term of leadership in which it is made.
      after_seq: a number that the new segments' are to be greater than.

    Raises:
      TempoRefused: where ``at_beat`` is past or too soon, and for what cannot be done to a grid
        that stands still, or to one that does not, or that frames have no room for.

    """
    timeline = timeline.since(cluster_ns)
    present = timeline.segments[0]
    if not present.milli_bpm:
        return _resume(timeline, cluster_ns, milli, former, epoch=epoch, after_seq=after_seq)
    earliest = max(timeline.after(cluster_ns) + _LEAD_BEATS, timeline.after(cluster_ns + LEAD_NS))
    index = timeline.index_at(cluster_ns)
    if milli is None:
        stops = [s.beat0 for s in timeline.segments if not s.milli_bpm]
        if not stops or stops[0] < earliest:
            raise TempoRefused("the grid does not stand still")
        # It was to stand still: it goes on as it is.
        milli, at_beat = timeline.segments[-2].milli_bpm, stops[0]
    elif at_beat is None:
        step = beats_per_bar if milli else 1
        at_beat = -(-earliest // step) * step
    elif at_beat <= index:
        raise TempoRefused(f"beat {at_beat} is past: the cluster is on beat {index}")
    elif at_beat < earliest:
        raise TempoRefused(f"beat {at_beat} is too soon: the first that can be kept is {earliest}")
    kept = tuple(s for s in timeline.segments[1:] if s.beat0 < at_beat)
    before = kept[-1] if kept else present
    if not before.milli_bpm:
        raise TempoRefused(f"the grid stands still from beat {before.beat0} on")
    if over and not milli:
        raise TempoRefused("a pause is no ramp")
    settled, seq = Timeline((present, *kept)), max(after_seq, timeline.segments[-1].seq)
    steps = min(over, _STEPS)
    if len(kept) + steps >= _PENDING:
        raise TempoRefused("too many changes are pending")
    for step in range(steps):
        way = (milli - before.milli_bpm) * (2 * step + 1) // (2 * steps)
        tempo = max(MIN_MILLI_BPM, before.milli_bpm + way)
        beat = at_beat + over * step // steps
        settled = settled.change(tempo, beat, epoch=epoch, after_seq=seq)
    settled = settled.change(milli, at_beat + over, epoch=epoch, after_seq=seq)
    last = settled.segments[-1]
    if last.beat0 > MAX_INDEX or last.t0_ns > MAX_NS:
        # Nobody could decode the frames that tell of it.
        raise TempoRefused(f"beat {last.beat0} is too far ahead")
    return settled


def _resume(
    timeline: Timeline,
    cluster_ns: int,
    milli: int | None,
    former: int,
    *,
    epoch: int,
    after_seq: int,
) -> Timeline:
    if milli is not None:
        raise TempoRefused("the grid stands still: have it go on first")
    if len(timeline.segments) > 1:
        raise TempoRefused("the grid is about to go on")
    # Everybody is told of a grid that stands still once a second.
    goes_on = timeline.next_beat(cluster_ns + STILL_NS)
    return timeline.resume(former, goes_on, epoch=epoch, after_seq=after_seq)


def reschedule(
    heard: Timeline,
    committed: Timeline,
    cluster_ns: int,
    *,
    announced_seq: int,
    beats_per_bar: int,
    epoch: int,
) -> Timeline:
    """Return the timeline to go on with after a leader that may not have announced its last change.

    What was announced is in force, or will be, whether it was heard here or not. What was committed
    and is far enough ahead stays as it is, too. What was never announced, and would have to have
    happened already, is put off.

    Args:
      heard: what was heard of the grid, here.
      committed: what the record says of it.
      cluster_ns: now.
      announced_seq: the last segment that was announced, as the record has it.
      beats_per_bar: the length of a bar.
      epoch: the term of leadership that begins.

    """
    known = max(heard.segments[-1].seq, announced_seq)
    if heard.segments[-1].seq >= committed.segments[-1].seq:
        return heard.since(cluster_ns)
    unannounced = [segment for segment in committed.segments if segment.seq > known]
    if not unannounced or unannounced[0].t0_ns >= cluster_ns + LEAD_NS:
        return committed.since(cluster_ns)
    announced = heard
    if announced_seq > heard.segments[-1].seq:
        kept = tuple(segment for segment in committed.segments if segment.seq <= known)
        announced = Timeline(kept) if kept else heard
    announced = announced.since(cluster_ns)
    present = announced.segments[0]
    first, last = unannounced[0], unannounced[-1]
    try:
        return propose(
            announced,
            cluster_ns,
            last.milli_bpm if present.milli_bpm else None,
            over=last.beat0 - first.beat0 if last.milli_bpm else 0,
            former=last.milli_bpm,
            beats_per_bar=beats_per_bar,
            epoch=epoch,
            after_seq=last.seq,
        )
    except TempoRefused:
        stop = announced.segments[-1]
        if stop.milli_bpm or not last.milli_bpm:
            return announced
        # It was not to stand still any more, and will for as long as it takes to tell so.
        goes_on = max(stop.t0_ns, cluster_ns) + 2 * STILL_NS
        return announced.resume(last.milli_bpm, goes_on, epoch=epoch, after_seq=last.seq)
