"""Changes of the tempo, and pauses, which a session asks of the metronome."""

from __future__ import annotations

import msgspec
from msgspec import UNSET

from .._checks import check_integer
from .._errors import (
    MetronomeUnavailable,
    PermissionDenied,
    SessionClosed,
    TempoRefused,
    TransportBroken,
    TransportClosed,
)
from .._grid.changes import ASKED_NS
from .._grid.timeline import milli_bpm
from .._runtime.runtime import Runtime
from .._wire import (
    TempoRequest,
    decode_tempo_reply,
    encode,
    tempo_subject,
)


class TempoChanges:
    """The part of `Session` that changes the grid of the whole cluster."""

    _runtime: Runtime

    async def set_tempo(self, bpm: float, *, at_beat: int | None = None, over: int = 0) -> int:
        """Change the tempo of the whole cluster. A checkpoint.

        It asks the metronome that leads, and returns when the change is stored. The tempo changes
        some beats later, on the same beat for every agent.

        Args:
          bpm: the new tempo, in beats per minute, 0.1 to 6,000; exact to a thousandth.
          at_beat: the index of the beat on which the tempo changes. None is the next downbeat that
            is at least 2 beats and 250 ms ahead.
          over: how many beats the change takes; 0 is at once. The tempo gets there in up to 64
            equal steps, each on a whole beat.

        Returns:
          The index of the beat on which the change takes effect or begins.

        Raises:
          TypeError: if an argument is of the wrong type.
          ValueError: if ``bpm`` is out of range or NaN, or another argument is negative or more
            than 2**53.
          TempoRefused: if the leader refuses: the beat is past or too soon, the grid is paused, or
            the change cannot be stored. The text says which.
          MetronomeUnavailable: if no leader can be reached.
          PermissionDenied: if the server's permissions do not let this user ask for a change.
          SessionClosed: if the session was left.

        """
        milli = milli_bpm("bpm", bpm)
        return await self._change_grid(milli / 1000, at_beat, check_integer("over", over, 0))

    async def pause(self, *, at_beat: int | None = None) -> int:
        """Pause the grid of the whole cluster. A checkpoint.

        No beats pass until `resume`, so no budget in beats runs out, and `sleep` does not return.
        Time-outs in seconds go on. Like `set_tempo`, it asks the metronome that leads, and the
        pause begins some beats later.

        Args:
          at_beat: the index of the beat on which the pause begins. None is the next one that is at
            least 2 beats and 250 ms ahead.

        Returns:
          The index of the beat on which the pause begins.

        Raises:
          TypeError: if ``at_beat`` is not an integer.
          ValueError: if ``at_beat`` is negative or more than 2**53.
          TempoRefused: if the leader refuses, for the same reasons as in `set_tempo`.
          MetronomeUnavailable: if no leader can be reached.
          PermissionDenied: if the server's permissions do not let this user ask for a change.
          SessionClosed: if the session was left.

        """
        return await self._change_grid(0.0, at_beat)

    async def resume(self) -> int:
        """End a pause of the grid, at the tempo that it had before. A checkpoint.

        It asks the metronome that leads. Beats go on one to two seconds later, so that every agent
        hears of it in time. A pause that has not begun is taken back, if its beat is at least 2
        beats and 250 ms ahead.

        Returns:
          The index of the beat on which the grid is paused, or would have been.

        Raises:
          TempoRefused: if the grid is not paused, the pause begins too soon to take it back, or the
            change cannot be stored.
          MetronomeUnavailable: if no leader can be reached.
          PermissionDenied: if the server's permissions do not let this user ask for a change.
          SessionClosed: if the session was left.

        """
        return await self._change_grid(None, None)

    async def _change_grid(self, bpm: float | None, at_beat: int | None, over: int = 0) -> int:
        if at_beat is not None:
            at_beat = check_integer("at_beat", at_beat, 0)
        self._runtime.check_open()
        cluster_id, transport = self._runtime.config.cluster_id, self._runtime.transport
        if transport is None:
            raise MetronomeUnavailable("the session is disabled, so it has no metronome")
        request = encode(TempoRequest(cluster_id, bpm, at_beat, over or UNSET))
        try:
            answer = await transport.request(
                tempo_subject(cluster_id), request, timeout=ASKED_NS / 1e9
            )
            reply = decode_tempo_reply(answer.data)
        except TransportClosed:
            raise SessionClosed("the session has been closed") from None
        except PermissionDenied:
            raise
        except TransportBroken as error:
            raise MetronomeUnavailable(f"no metronome answered: {error}") from error
        except msgspec.DecodeError as error:
            raise MetronomeUnavailable(f"the metronome's answer is not readable: {error}") from None
        if not reply.ok or reply.effective_beat is None:
            raise TempoRefused(reply.error or "the metronome refused without a reason")
        return reply.effective_beat
