"""The beat listener: hears frames and pings the leader, for a follower that makes sense of both."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import AsyncIterator
from typing import Final, final

import msgspec
import trio
from msgspec import UNSET
from trio_util import AsyncBool

from .._errors import Logger, NoResponders, TransportBroken
from .._grid.estimate import Ping
from .._grid.follower import Answer, Follower, FollowerObserver
from .._grid.steering import MIN_STEP_NS
from .._grid.timeline import NEVER, Timeline
from .._time.clock import BeatClock
from .._time.local import local_ns, seconds_of
from .._transport.protocol import Message, Transport
from .._wire import (
    RecallReply,
    Role,
    SyncRequest,
    beat_subject,
    decode_frame,
    decode_recall_request,
    decode_sync_reply,
    encode,
    is_inbox,
    recall_subject,
    sync_subject,
)

# How long an answer to a ping is waited for: so long at least, and ever longer where none comes,
# as the way may be longer than that.
_PING_TIMEOUT: Final = 0.5
_PING_TIMEOUT_MAX: Final = 4.0
_PING_WAYS: Final = 4
# However much there is to ask about, there is a limit to asking.
_ASK_EVERY: Final = 0.02
_LOG_EVERY_NS: Final = 1_000_000_000


class ListenerObserver:
    """Whom a listener calls. Each method does nothing unless it is overridden."""

    def on_stale(self, epoch: int) -> None:
        """Take note of a frame of an epoch that is over."""

    def on_sign(self, *, alone: bool) -> None:
        """Take note of a frame or an answer of somebody who leads, with a record or without."""

    def on_recall(self) -> None:
        """Take note that a metronome which finds no leader asks who is there."""


@final
class BeatListener(FollowerObserver):
    """Follows the leader of a cluster over a transport, and steers a clock by it.

    It also remembers: once it is locked it answers the recalls of metronomes that find no leader.

    Args:
      clock: is steered.
      transport: run by somebody else.
      cluster_id: the cluster to follow.
      agent_id: the name that goes into pings.
      logger: where it says what it notices.
      role: what it says it is, when it answers a recall.
      answers_recalls: whether it answers them, and subscribes to them at all.
      observer: is called when something has happened.

    """

    def __init__(
        self,
        clock: BeatClock,
        transport: Transport,
        *,
        cluster_id: str,
        agent_id: str,
        logger: Logger,
        role: Role = "agent",
        answers_recalls: bool = True,
        observer: ListenerObserver | None = None,
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
        self._request = encode(
            SyncRequest(cluster_id, agent_id, UNSET if role == "agent" else role)
        )
        self._logger = logger
        self._logged_ns = -_LOG_EVERY_NS
        self._ask = AsyncBool(False)
        # The time until the next burst.
        self._pause = trio.CancelScope()
        self._agent_id = agent_id
        self._role: Role = role
        self._answers_recalls = answers_recalls
        self._observer = observer or ListenerObserver()
        self._patience = _PING_TIMEOUT
        self._waiting = trio.CancelScope()
        self.way_ns: int = 0
        """The round trip of the last answer."""
        self._standbys: tuple[int, int] | None = None

    @property
    def standbys(self) -> int | None:
        """How many stand by, as the present leader told last; None where it has not."""
        if self._standbys is None or self._standbys[0] != self.follower.epoch:
            return None
        return self._standbys[1]

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen and steer until cancelled."""
        async with (
            self._transport.open_subscription(beat_subject(self._cluster_id)) as messages,
            trio.open_nursery() as nursery,
        ):
            if self._answers_recalls:
                await nursery.start(self._hear_recalls)
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
                if frame.cluster_id == self._cluster_id:
                    self._observer.on_sign(alone=frame.alone is True)
                if self.follower.hear(frame, timeline, message.received_ns, local_ns()):
                    self._ask.value = True
                    # Whoever is waited for may be gone: then another one is to be asked.
                    soon = trio.current_time() + self._least_patience
                    self._waiting.deadline = min(self._waiting.deadline, soon)
                # It may have come to be sooner.
                self._pause.deadline = seconds_of(self.follower.next_burst_ns)

    @trio.lowlevel.enable_ki_protection
    async def _sync(self) -> None:
        follower = self.follower
        while True:
            await self._transport.wait_connected()
            self._ask.value = False
            begun, asked = trio.current_time(), follower.question
            answers = await self._burst(follower.pings)
            follower.answer(answers, asked, local_ns())
            self._pause = trio.CancelScope(deadline=seconds_of(follower.next_burst_ns))
            with self._pause:
                await self._ask.wait_value(True)
            await trio.sleep_until(begun + _ASK_EVERY)

    @trio.lowlevel.enable_ki_protection
    async def _ask_again(self) -> None:
        # Whatever has happened meanwhile, it is known a moment after the connection is back.
        while True:
            await self._transport.wait_connected(False)
            await self._transport.wait_connected()
            self.follower.hurry(local_ns())
            self._ask.value = True

    async def _burst(self, pings: int) -> list[Answer]:
        answers: list[Answer] = []
        counts = self.follower.counts
        for _ in range(pings):
            counts.pings += 1
            self._waiting = trio.move_on_after(self._patience)
            try:
                with self._waiting:
                    answer = await self._transport.request(
                        sync_subject(self._cluster_id), self._request, timeout=_PING_TIMEOUT_MAX
                    )
                if self._waiting.cancelled_caught:
                    raise TransportBroken("no answer to a ping in time")
                reply = decode_sync_reply(answer.data)
            except NoResponders:
                counts.pings_failed += 1
                break
            except TransportBroken:
                # Whoever does not answer one ping will hardly answer the next ones of the burst.
                counts.pings_failed += 1
                self._patience = min(2 * self._patience, _PING_TIMEOUT_MAX)
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
                self.way_ns = max(0, ping.delay_ns)
                self._patience = self._least_patience
                self._observer.on_sign(alone=reply.alone is True)
                if reply.standbys is not UNSET:
                    self._standbys = reply.epoch, reply.standbys
                if self.follower.is_enough(answers):
                    break
        return answers

    @property
    def _least_patience(self) -> float:
        return min(max(_PING_WAYS * self.way_ns / 1e9, _PING_TIMEOUT), _PING_TIMEOUT_MAX)

    @trio.lowlevel.enable_ki_protection
    async def _hear_recalls(self, *, task_status: trio.TaskStatus[None]) -> None:
        subject = recall_subject(self._cluster_id)
        async with self._transport.open_subscription(subject) as recalls:
            task_status.started()
            await self._answer_recalls(recalls)

    async def _answer_recalls(self, recalls: AsyncIterator[Message]) -> None:
        async for request in recalls:
            try:
                recall = decode_recall_request(request.data)
            except msgspec.DecodeError:
                continue
            if recall.cluster_id != self._cluster_id or recall.leader_id == self._agent_id:
                continue
            if not is_inbox(request.reply):
                continue
            self._observer.on_recall()
            reply = self._remember(request.received_ns)
            if reply is not None:
                with contextlib.suppress(TransportBroken, ValueError):
                    self._transport.publish_nowait(request.reply, encode(reply))

    def _remember(self, received_ns: int) -> RecallReply | None:
        follower, grid, now = self.follower, self._clock.grid, local_ns()
        if not follower.locked:
            return None
        uncertainty = follower.uncertainty_ns(now)
        return RecallReply(
            cluster_id=self._cluster_id,
            agent_id=self._agent_id,
            role=self._role,
            epoch=follower.epoch,
            received_ns=grid.cluster_at(received_ns),
            sent_ns=grid.cluster_at(local_ns()),
            # What only frames have told is as good as their way.
            uncertainty_ns=MIN_STEP_NS if uncertainty is None else uncertainty,
            last_beat=grid.index_at(now),
            beats_per_bar=grid.beats_per_bar,
            incarnation=follower.incarnation or UNSET,
            alone=follower.is_alone or UNSET,
            **grid.timeline.since(grid.cluster_at(now)).wire_fields(),
        )

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
        self._observer.on_stale(epoch)

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
