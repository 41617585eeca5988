"""Changes of the grid that an operator may ask for: another tempo, a ramp, a pause. Pure."""

from __future__ import annotations

from typing import Final

from .._errors import TempoRefused
from .._wire import MAX_INDEX, MAX_NS, MIN_MILLI_BPM
from .timeline import PAUSED_BEAT_NS, Timeline

# A change takes effect only after this many beats and this time, so that everybody hears of it.
LEAD_BEATS: Final = 2
LEAD_NS: Final = 250_000_000
# How long a client waits for the answer to its request; the leader waits 2 s for the record.
ASKED_NS: Final = 2_500_000_000
# The most steps of a ramp, and the most segments that may be pending: every frame carries them all.
_STEPS: Final = 64
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
    spare_ns: int = 0,
) -> Timeline:
    """Return the timeline with a change added.

    The change takes effect at ``at_beat``. Without ``at_beat`` a tempo takes effect at the next
    downbeat and a pause at the next beat. Either is at least max(2 beats, 250 ms) ahead. Changes
    that are pending for earlier beats stay. Those for that beat or later ones are replaced.

    Args:
      timeline: the present timeline.
      cluster_ns: now, in cluster time.
      milli: the tempo in thousandths of a beat per minute. 0 pauses the grid. None resumes it at
        the tempo ``former``, or takes back a pause that has not begun.
      at_beat: the index of the beat at which the change takes effect.
      over: how many beats the way from the present tempo to the new one takes, in equal steps of
        whole beats; 0 for none, and always 0 for a pause.
      former: the tempo before the pause, in thousandths of a beat per minute.
      beats_per_bar: the length of a bar, in beats.
      epoch: the term of leadership in which the change is made.
      after_seq: the new segments get numbers greater than this.
      spare_ns: by how much later than usual the change may take effect at the earliest, in
        nanoseconds; a pause does not end later.

    Raises:
      TempoRefused: if ``at_beat`` is past, too soon or too far ahead; if the grid is paused, or
        ``milli`` is None and it is not; or if too many changes are pending.

    """
    timeline = timeline.since(cluster_ns)
    present = timeline.segments[0]
    if not present.milli_bpm:
        return _resume(timeline, cluster_ns, milli, former, epoch=epoch, after_seq=after_seq)
    spared = cluster_ns + spare_ns
    earliest = max(timeline.after(spared) + LEAD_BEATS, timeline.after(spared + LEAD_NS))
    index = timeline.index_at(cluster_ns)
    if milli is None:
        stops = [s.beat0 for s in timeline.segments if not s.milli_bpm]
        if not stops or stops[0] < earliest:
            raise TempoRefused("the grid is not paused")
        # A pause that has not begun is taken back: the tempo before it stays.
        milli, at_beat = timeline.segments[-2].milli_bpm, stops[0]
    elif at_beat is None:
        step = beats_per_bar if milli else 1
        at_beat = -(-earliest // step) * step
    elif at_beat <= index:
        raise TempoRefused(f"beat {at_beat} is past: the cluster is on beat {index}")
    elif at_beat < earliest:
        raise TempoRefused(f"beat {at_beat} is too soon: the earliest possible is {earliest}")
    kept = tuple(s for s in timeline.segments[1:] if s.beat0 < at_beat)
    before = kept[-1] if kept else present
    if not before.milli_bpm:
        raise TempoRefused(f"the grid is paused from beat {before.beat0} on")
    if over and not milli:
        raise TempoRefused("a pause cannot be a ramp")
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
        # No message can carry such a segment.
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
        raise TempoRefused("the grid is paused: resume it first")
    if len(timeline.segments) > 1:
        raise TempoRefused("the grid is already about to resume")
    # Frames of a paused grid come once a second, and at least one must announce the resumption.
    resumed = timeline.next_beat(cluster_ns + PAUSED_BEAT_NS)
    return timeline.resume(former, resumed, epoch=epoch, after_seq=after_seq)


def reschedule(
    heard: Timeline,
    committed: Timeline,
    cluster_ns: int,
    *,
    announced_seq: int,
    beats_per_bar: int,
    epoch: int,
) -> Timeline:
    """Return the timeline with which a new leader continues the grid.

    The leader before it may have committed a change and died before it announced it. A change that
    was announced stays, even if this process has not heard of it. So does a change that was not
    announced and is still far enough ahead. Any other change that was not announced is postponed,
    because the agents do not know of it.

    Args:
      heard: the timeline of the frames that this process has heard.
      committed: the timeline in the record.
      cluster_ns: now, in cluster time.
      announced_seq: the number of the last announced segment, according to the record.
      beats_per_bar: the length of a bar, in beats.
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
        # The pause was announced, its end was not. So it lasts until the end can be announced.
        resumed = max(stop.t0_ns, cluster_ns) + 2 * PAUSED_BEAT_NS
        return announced.resume(last.milli_bpm, resumed, epoch=epoch, after_seq=last.seq)
