"""The beat listener: it receives frames and pings the leader, and passes both to a `Follower`."""

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
from .._grid.timeline import NEVER, Timeline, beat_ns
from .._time.clock import BeatClock
from .._time.local import local_ns, seconds_of
from .._transport.protocol import Message, Transport
from .._wire import (
    RecallReply,
    RecallRequest,
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

# The time limit for an answer to a ping, in seconds: at least the first value, and at least this
# many round trips. It doubles after each ping without an answer, up to the second value, because
# the round trip may be longer than expected.
_PING_TIMEOUT: Final = 0.5
_PING_TIMEOUT_MAX: Final = 4.0
_PING_WAYS: Final = 4
# Bursts are at least this many seconds apart, even if many frames must be checked.
_ASK_EVERY: Final = 0.02
# For how long it counts that a leader has said that the id is shared.
_SHARED_NS: Final = 20_000_000_000
_SHARED_BEATS: Final = 5
_LOG_EVERY_NS: Final = 1_000_000_000
_LOGGED: Final = 64
# A recall that came before the lock is answered if the lock follows so soon. So many are kept.
_RECALL_NS: Final = 1_000_000_000
_RECALLS: Final = 16


class ListenerObserver:
    """The methods that a listener calls. Each does nothing unless it is overridden."""

    def on_stale(self, epoch: int) -> None:
        """React to a frame of a lower epoch than that of the leader."""

    def on_sign(self, *, alone: bool) -> None:
        """React to a frame or an answer of a leader; ``alone`` if that leader has no record."""

    def on_shared(self) -> None:
        """Take note that another live process has this agent's id."""

    def on_recall(self) -> None:
        """React to a recall, which a metronome sends if it finds no leader."""


@final
class BeatListener(FollowerObserver):
    """Follow the leader of a cluster over a transport, and steer a clock by it.

    Once it is locked, the listener also answers recalls: requests of metronomes that find no leader
    and ask what others know of the grid.

    Args:
      clock: the clock that is steered.
      transport: the transport; its `run` is called elsewhere.
      cluster_id: the cluster to follow.
      agent_id: the name of this agent in pings and answers.
      logger: the logger for locks, new leaders and whatever looks wrong.
      role: the role that is given in answers to recalls.
      answers_recalls: whether to subscribe to recalls and answer them.
      observer: its methods are called on each event.
      process: a name of this process that no other process has, if no other agent may have this id;
        empty if others may have it, too.

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
        process: str = "",
    ) -> None:
        self.follower: Follower = Follower(clock.grid, cluster_id=cluster_id, observer=self)
        self.locked = trio.Event()
        self.followed: trio.lowlevel.ParkingLot = trio.lowlevel.ParkingLot()
        """Tasks that park here are woken by the next frame that is believed, and by a lock."""
        self.recent_errors: deque[tuple[int, str]] = deque(maxlen=8)
        """What looked wrong lately, each text with the local time, in ns, at which it came up."""
        self._clock = clock
        self._transport = transport
        self._cluster_id = cluster_id
        self._request = encode(
            SyncRequest(cluster_id, agent_id, UNSET if role == "agent" else role, process or UNSET)
        )
        self._logger = logger
        self._logged_ns = -_LOG_EVERY_NS
        self._logged: deque[str] = deque(maxlen=_LOGGED)
        self._ask = AsyncBool(False)
        # The wait until the next burst.
        self._pause = trio.CancelScope()
        self._agent_id = agent_id
        self._role: Role = role
        self._answers_recalls = answers_recalls
        # The recalls that came before the lock.
        self._recalls: deque[Message] = deque(maxlen=_RECALLS)
        self._observer = observer or ListenerObserver()
        self._patience = _PING_TIMEOUT
        self._waiting = trio.CancelScope()
        # The epoch of the frame that the present burst asks about; None if it asks about none.
        self._asked_epoch: int | None = None
        self.way_ns: int = 0
        """The round trip of the last answer, in nanoseconds."""
        self._standbys: tuple[int, int] | None = None
        self._shared_ns: int | None = None

    @property
    def standbys(self) -> int | None:
        """The number of standbys in the present leader's last answer; None before there is one."""
        if self._standbys is None or self._standbys[0] != self.follower.epoch:
            return None
        return self._standbys[1]

    @property
    def shares_id(self) -> bool:
        """Whether another live process has this agent's id, as a leader has said lately."""
        if self._shared_ns is None:
            return False
        beats = _SHARED_BEATS * beat_ns(self._clock.segment().milli_bpm)
        return local_ns() - self._shared_ns <= max(_SHARED_NS, beats)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen and steer until cancelled. It counts as started once it has subscribed."""
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
                        raise ValueError("the beat of the frame is out of range")
                except (msgspec.DecodeError, ValueError):
                    self.follower.counts.frames_undecodable += 1
                    self.on_odd("a frame could not be decoded")
                    continue
                if frame.cluster_id == self._cluster_id:
                    self._observer.on_sign(alone=frame.alone is True)
                    if self._agent_id in (frame.contested or ()):
                        self.follower.hurry(local_ns())
                if self.follower.hear(frame, timeline, message.received_ns, local_ns()):
                    self._ask.value = True
                    if frame.epoch != self._asked_epoch:
                        # The leader whose answer is awaited may be gone. Then do not wait much
                        # longer, so that the new leader is asked.
                        soon = trio.current_time() + self._least_patience
                        self._waiting.deadline = min(self._waiting.deadline, soon)
                # The frame may have brought the next burst forward.
                self._pause.deadline = seconds_of(self.follower.next_burst_ns)

    @trio.lowlevel.enable_ki_protection
    async def _sync(self) -> None:
        follower = self.follower
        while True:
            await self._transport.wait_connected()
            self._ask.value = False
            begun, begun_ns, asked = trio.current_time(), local_ns(), follower.question
            self._asked_epoch = None if asked is None else asked.frame.epoch
            answers = await self._burst(follower.pings)
            follower.answer(answers, asked, local_ns(), begun_ns=begun_ns)
            if asked is None and follower.question is not None and not (answers or follower.locked):
                # The first frame came during the burst, so its leader may answer pings now.
                continue
            self._pause = trio.CancelScope(deadline=seconds_of(follower.next_burst_ns))
            with self._pause:
                await self._ask.wait_value(True)
            await trio.sleep_until(begun + _ASK_EVERY)

    @trio.lowlevel.enable_ki_protection
    async def _ask_again(self) -> None:
        # Ping as soon as the connection is back, because anything may have changed meanwhile.
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
                # If one ping has no answer, the next ones of the burst will hardly have any.
                counts.pings_failed += 1
                self._patience = min(2 * self._patience, _PING_TIMEOUT_MAX)
                break
            except msgspec.DecodeError:
                counts.pings_failed += 1
                self.on_odd("an answer to a ping could not be decoded")
                continue
            except ValueError as error:
                # The server accepts only smaller messages. Then frames alone steer the clock.
                counts.pings_failed += 1
                self.on_odd(f"no pings can be sent: {error}")
                break
            if reply.cluster_id == self._cluster_id:
                ping = Ping(answer.sent_ns, reply.received_ns, reply.sent_ns, answer.received_ns)
                answers.append((ping, reply))
                self.way_ns = max(0, ping.delay_ns)
                self._patience = self._least_patience
                self._observer.on_sign(alone=reply.alone is True)
                if reply.shared_id is True:
                    self._note_shared()
                if reply.standbys is not UNSET:
                    self._standbys = reply.epoch, reply.standbys
                if self.follower.is_enough(answers):
                    break
        return answers

    def _note_shared(self) -> None:
        known, self._shared_ns = self.shares_id, local_ns()
        if not known:
            self._observer.on_shared()

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
            if recall.cluster_id != self._cluster_id or not is_inbox(request.reply):
                continue
            if self._may_have_sent(recall):
                continue
            self._observer.on_recall()
            if self.follower.locked:
                self._answer_recall(request)
            else:
                self._recalls.append(request)

    def _may_have_sent(self, recall: RecallRequest) -> bool:
        # A metronome sends recalls only before it is locked. At any other time, and for an agent at
        # all times, a recall under this name is that of another process with the same name.
        unlocked = self._role == "standby" and not self.follower.locked
        return unlocked and recall.leader_id == self._agent_id

    def _answer_recall(self, request: Message) -> None:
        reply = self._remember(request.received_ns)
        with contextlib.suppress(TransportBroken, ValueError):
            self._transport.publish_nowait(request.reply, encode(reply))

    def _remember(self, received_ns: int) -> RecallReply:
        follower, grid, now = self.follower, self._clock.grid, local_ns()
        uncertainty = follower.uncertainty_ns(now)
        return RecallReply(
            cluster_id=self._cluster_id,
            agent_id=self._agent_id,
            role=self._role,
            epoch=follower.epoch,
            received_ns=grid.cluster_at(received_ns),
            sent_ns=grid.cluster_at(local_ns()),
            # A cluster time that only frames have measured is wrong by their time on the way.
            uncertainty_ns=MIN_STEP_NS if uncertainty is None else uncertainty,
            last_beat=grid.index_at(now),
            beats_per_bar=grid.beats_per_bar,
            incarnation=follower.incarnation or UNSET,
            alone=follower.is_alone or UNSET,
            **grid.timeline.since(grid.cluster_at(now)).wire_fields(),
        )

    # What the follower calls.

    def on_followed(self) -> None:
        """Wake the tasks that wait for a frame."""
        self.followed.unpark_all()

    def on_lock(self) -> None:
        """Log whose grid it is, wake those who wait for the lock, and answer waiting recalls."""
        follower = self.follower
        self._logger.info(
            "locked to the grid - leader=%s epoch=%d beat=%d",
            follower.leader_id,
            follower.epoch,
            self._clock.index(),
        )
        self.locked.set()
        while self._recalls:
            # Whoever asked may be about to begin another grid.
            request = self._recalls.popleft()
            if local_ns() - request.received_ns < _RECALL_NS:
                self._answer_recall(request)

    def on_leader(self) -> None:
        """Log who leads now."""
        follower = self.follower
        self._logger.info("another leader - leader=%s epoch=%d", follower.leader_id, follower.epoch)

    def on_stale(self, epoch: int) -> None:
        """Pass on the epoch of a frame of a lower epoch."""
        self._observer.on_stale(epoch)

    def on_odd(self, text: str) -> None:
        """Keep a text for `Session.health`, and log it if it is new, at most once a second."""
        # Any process can cause such texts, so neither a repeated nor a varied one fills the log.
        now = local_ns()
        others = [entry for entry in self.recent_errors if entry[1] != text]
        self.recent_errors = deque((*others, (now, text)), maxlen=self.recent_errors.maxlen)
        if text not in self._logged and now - self._logged_ns >= _LOG_EVERY_NS:
            self._logged_ns = now
            self._logged.append(text)
            self._logger.warning("%s", text)
