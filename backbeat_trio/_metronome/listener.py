"""The beat listener: hears frames and pings the leader, for a follower that makes sense of both."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final, final

import msgspec
import trio
from trio_util import AsyncBool

from .._errors import Logger, TransportBroken
from .._grid.estimate import Ping
from .._grid.follower import Answer, Follower, FollowerObserver
from .._grid.timeline import NEVER, Timeline
from .._time.clock import BeatClock
from .._time.local import local_ns
from .._transport.protocol import Transport
from .._wire import (
    SyncRequest,
    beat_subject,
    decode_frame,
    decode_sync_reply,
    encode,
    sync_subject,
)

_PING_TIMEOUT: Final = 0.5
# However much there is to ask about, there is a limit to asking.
_ASK_EVERY: Final = 0.02
_LOG_EVERY_NS: Final = 1_000_000_000


@final
class BeatListener(FollowerObserver):
    """Follows the leader of a cluster over a transport, and steers a clock by it.

    Args:
      clock: is steered.
      transport: run by somebody else.
      cluster_id: the cluster to follow.
      agent_id: the name that goes into pings.
      logger: where it says what it notices.
      on_stale: called with the epoch of a frame whose epoch is over; None is nobody.

    """

    def __init__(
        self,
        clock: BeatClock,
        transport: Transport,
        *,
        cluster_id: str,
        agent_id: str,
        logger: Logger,
        on_stale: Callable[[int], None] | None = None,
    ) -> None:
        self.follower: Follower = Follower(clock.grid, cluster_id=cluster_id, observer=self)
        self.locked = trio.Event()
        self.followed: trio.lowlevel.ParkingLot = trio.lowlevel.ParkingLot()
        """Where to wait for a frame that is followed, or a lock."""
        self.recent_errors: deque[tuple[int, str]] = deque(maxlen=8)
        """What looked odd, each with when it did, in local ns."""
        self._clock = clock
        self._transport = transport
        self._cluster_id = cluster_id
        self._request = encode(SyncRequest(cluster_id, agent_id))
        self._logger = logger
        self._logged_ns = -_LOG_EVERY_NS
        self._ask = AsyncBool(False)
        self._on_stale = on_stale

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen and steer until cancelled."""
        async with (
            self._transport.open_subscription(beat_subject(self._cluster_id)) as messages,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(self._sync)
            nursery.start_soon(self._ask_again)
            task_status.started()
            async for message in messages:
                try:
                    frame = decode_frame(message.data)
                    timeline = Timeline.of(frame)
                    if abs(timeline.time_of(frame.beat_index)) > NEVER // 2:
                        raise ValueError("a frame of a beat that does not come")
                except (msgspec.DecodeError, ValueError):
                    self.follower.counts.frames_undecodable += 1
                    self.on_odd("a frame that cannot be decoded")
                    continue
                if self.follower.hear(frame, timeline, message.received_ns, local_ns()):
                    self._ask.value = True

    @trio.lowlevel.enable_ki_protection
    async def _sync(self) -> None:
        follower = self.follower
        while True:
            await self._transport.wait_connected()
            self._ask.value = False
            begun, asked = trio.current_time(), follower.question
            answers = await self._burst(follower.pings)
            well = follower.answer(answers, asked, local_ns())
            with trio.move_on_after(follower.pause_ns(local_ns(), well=well) / 1e9):
                await self._ask.wait_value(True)
            await trio.sleep_until(begun + _ASK_EVERY)

    @trio.lowlevel.enable_ki_protection
    async def _ask_again(self) -> None:
        # Whatever has happened meanwhile, it is known a moment after the connection is back.
        while True:
            await self._transport.wait_connected(False)
            await self._transport.wait_connected()
            self._ask.value = True

    async def _burst(self, pings: int) -> list[Answer]:
        answers: list[Answer] = []
        counts = self.follower.counts
        for _ in range(pings):
            counts.pings += 1
            try:
                answer = await self._transport.request(
                    sync_subject(self._cluster_id), self._request, timeout=_PING_TIMEOUT
                )
                reply = decode_sync_reply(answer.data)
            except TransportBroken:
                # Whoever does not answer one ping will hardly answer the next ones of the burst.
                counts.pings_failed += 1
                break
            except msgspec.DecodeError:
                counts.pings_failed += 1
                self.on_odd("an answer to a ping that cannot be decoded")
                continue
            except ValueError as error:
                # A server that takes only small messages: then there are frames.
                counts.pings_failed += 1
                self.on_odd(f"no pings: {error}")
                break
            if reply.cluster_id == self._cluster_id:
                ping = Ping(answer.sent_ns, reply.received_ns, reply.sent_ns, answer.received_ns)
                answers.append((ping, reply))
        return answers

    # What the follower calls.

    def on_followed(self) -> None:
        """Wake whoever waits for a frame."""
        self.followed.unpark_all()

    def on_lock(self) -> None:
        """Say whose grid it is, and let whoever waits for a lock go on."""
        follower = self.follower
        self._logger.info(
            "locked to the grid - leader=%s epoch=%d beat=%d",
            follower.leader_id,
            follower.epoch,
            self._clock.index(),
        )
        self.locked.set()

    def on_leader(self) -> None:
        """Say who leads now."""
        follower = self.follower
        self._logger.info("another leader - leader=%s epoch=%d", follower.leader_id, follower.epoch)

    def on_stale(self, epoch: int) -> None:
        """Pass on the epoch of a frame whose epoch is over."""
        if self._on_stale is not None:
            self._on_stale(epoch)

    def on_odd(self, text: str) -> None:
        """Keep what looked odd for `Session.health`, and log it where it is new."""
        # Once, and not every time that it is seen; and not as often as somebody else likes.
        now = local_ns()
        others = [entry for entry in self.recent_errors if entry[1] != text]
        known = len(others) < len(self.recent_errors)
        self.recent_errors = deque((*others, (now, text)), maxlen=self.recent_errors.maxlen)
        if not known and now - self._logged_ns >= _LOG_EVERY_NS:
            self._logged_ns = now
            self._logger.warning("%s", text)
