"""Cancelling operations from outside: the agent that takes the requests, and whoever asks.

A request names one operation of one agent. The agent takes it only if that operation was opened as
cancellable, and then cancels the scope around its block. It answers at once, and does not wait
until the block has been left.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from contextlib import contextmanager
from typing import Final, final

import msgspec
import trio

from .._errors import (
    BackbeatError,
    CancelRefused,
    NoResponders,
    OperationCancelled,
    OperationNotFound,
    PermissionDenied,
    SessionClosed,
    TransportBroken,
    TransportClosed,
)
from .._runtime.operations import Operation, check_name
from .._runtime.runtime import Runtime
from .._transport.protocol import Message
from .._wire import (
    ControlReply,
    ControlRequest,
    control_subject,
    decode_control_reply,
    decode_control_request,
    encode,
    is_inbox,
    is_token,
)

# For how many seconds an answer is waited for.
_ANSWERED_WITHIN: Final = 5.0
# For how many seconds a cancellable operation waits until the server knows the subscription.
_CONFIRMED_WITHIN: Final = 2.0

_CANCEL: Final = "cancel"
_NOT_FOUND: Final = "not_found"
_NOT_CANCELLABLE: Final = "not_cancellable"
_UNKNOWN_ACTION: Final = "unknown_action"
_REFUSALS: Final = {
    _NOT_FOUND: "no such operation is live",
    _NOT_CANCELLABLE: "the operation was not opened with cancellable=True",
    _UNKNOWN_ACTION: "this agent does not know the action",
}


@final
class _Block:
    # The block of a cancellable operation, and the first request to cancel it.

    __slots__ = ("asked_by", "reason", "scope")

    def __init__(self) -> None:
        self.scope = trio.CancelScope()
        self.reason = self.asked_by = ""


@final
class Control:
    """Takes and makes requests to cancel operations.

    Args:
      runtime: what the session runs.

    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        # By the operation itself: its id may belong to a later one before its block has been left.
        self._blocks: dict[Operation, _Block] = {}
        self._wanted = trio.Event()
        self._listening = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Take requests until cancelled. It subscribes as soon as `listen` is called."""
        runtime, transport = self._runtime, self._runtime.transport
        task_status.started()
        await self._wanted.wait()
        if transport is None:
            return
        subject = control_subject(runtime.config.agent_id)
        async with transport.open_subscription(subject) as requests:
            self._listening.set()
            async for request in requests:
                self._take(request)

    async def listen(self) -> None:
        """Subscribe to requests, unless that is done. A checkpoint.

        The subscription is known to the server afterwards. If there is no connection, or the server
        does not confirm it within two seconds, it will be known as soon as the server can.
        """
        self._runtime.check_open()
        if self._runtime.transport is None:
            return
        self._wanted.set()
        with trio.move_on_after(_CONFIRMED_WITHIN):
            await self._listening.wait()

    @contextmanager
    def cancellable(self, operation: Operation) -> Generator[None, None, None]:
        """Run the block of an operation that may be cancelled by `Session.cancel_remote`.

        Raises:
          OperationCancelled: on leaving, if the block was cut by that. The operation has failed.

        """
        block = self._blocks[operation] = _Block()
        try:
            with block.scope:
                yield
        finally:
            del self._blocks[operation]
        if block.scope.cancelled_caught:
            if not operation.phase.final:
                operation.fail(block.reason)
            error = OperationCancelled(
                f"operation {operation.id!r} was cancelled by {block.asked_by}: {block.reason}"
            )
            error.reason, error.asked_by = block.reason, block.asked_by
            raise error from None

    def _take(self, message: Message) -> None:
        runtime, config = self._runtime, self._runtime.config
        try:
            request = decode_control_request(message.data)
        except msgspec.DecodeError:
            request = None
        if request is None or not is_inbox(message.reply):
            # Whoever cannot be answered would not know what was done.
            runtime.call_counts.controls_undecodable += 1
            return
        if request.cluster_id != config.cluster_id:
            # Another cluster on the same server may have an agent of the same id.
            return
        code = self._cancel(request) if request.action == _CANCEL else _UNKNOWN_ACTION
        error = None if code is None else _REFUSALS[code]
        reply = ControlReply(config.cluster_id, config.agent_id, code is None, code, error)
        transport = runtime.transport
        if transport is not None:
            with contextlib.suppress(TransportBroken, ValueError):
                transport.publish_nowait(message.reply, encode(reply))

    def _cancel(self, request: ControlRequest) -> str | None:
        # Returns the code of a refusal.
        runtime = self._runtime
        try:
            operation = runtime.operations.find(request.operation_id)
        except (OperationNotFound, SessionClosed):
            return _NOT_FOUND
        block = self._blocks.get(operation)
        if block is None:
            return _NOT_CANCELLABLE
        if not block.scope.cancel_called:
            block.reason, block.asked_by = request.reason, request.asked_by
            block.scope.cancel(request.reason)
            runtime.call_counts.operations_cancelled += 1
            runtime.logger.info(
                "operation %r is cancelled at the request of %r: %r",
                operation.id,
                request.asked_by,
                request.reason,
            )
        return None

    async def ask(self, agent_id: str, id: str, reason: str) -> None:
        """Ask an agent to cancel an operation; see `Session.cancel_remote`."""
        if not isinstance(agent_id, str):
            raise TypeError(f"`agent_id` must be a str, not {agent_id!r}")
        if not is_token(agent_id):
            raise ValueError(f"`agent_id` must be a subject token, not {agent_id!r}")
        check_name("id", id)
        check_name("reason", reason)
        config, transport = self._runtime.config, self._runtime.transport
        self._runtime.check_open()
        if transport is None:
            raise BackbeatError("no operation can be cancelled: the session is disabled")
        request = ControlRequest(config.cluster_id, _CANCEL, id, reason, config.agent_id)
        try:
            answer = await transport.request(
                control_subject(agent_id), encode(request), timeout=_ANSWERED_WITHIN
            )
            reply = decode_control_reply(answer.data)
        except TransportClosed:
            raise SessionClosed("the session has been closed") from None
        except PermissionDenied:
            raise
        except NoResponders:
            raise NoResponders(
                f"agent {agent_id} takes no requests: it is not running, or it has not opened a "
                "cancellable operation yet"
            ) from None
        except TransportBroken as error:
            raise TransportBroken(
                f"agent {agent_id} did not say whether the operation was cancelled: {error}"
            ) from error
        except msgspec.DecodeError as error:
            raise TransportBroken(f"the answer of agent {agent_id} is not valid: {error}") from None
        if reply.ok:
            return
        if reply.code == _NOT_FOUND:
            raise OperationNotFound(f"agent {agent_id} has no live operation {id!r}")
        refusal = reply.error or reply.code or "it gave no reason"
        raise CancelRefused(f"agent {agent_id} refused to cancel operation {id!r}: {refusal}")
