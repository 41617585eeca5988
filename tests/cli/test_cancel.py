"""``backbeat cancel``."""

from __future__ import annotations

import json
from typing import Any

import pytest
import trio
from helpers import backbeat, guarded, until

from backbeat_trio import OperationCancelled
from backbeat_trio.testing import NatsServer, open_session


@guarded(120)
async def test_cancel() -> None:
    async with NatsServer() as server:
        options: Any = {"nats_url": server.url, "cluster_id": "chorus-production"}
        command = ("cancel", "-s", server.url, "--reason", "the disk is full")
        done = await backbeat(*command, "agent", "job")
        assert (done.returncode, done.stdout) == (1, b"")
        assert done.stderr.decode() == (
            "backbeat: agent agent takes no requests: it is not running, or it has not opened a "
            "cancellable operation yet\n"
        )
        async with open_session(agent_id="agent", lock_timeout=0.0, **options) as bb:
            await until(lambda: bb.health().connected)
            for as_json in (False, True):
                with pytest.raises(OperationCancelled) as caught:
                    async with bb.operation("election", id="job\n1", cancellable=True):
                        bb.start_operation("election", id="no block").complete()
                        done = await backbeat(*command, "agent", "job 1")
                        assert (done.returncode, done.stdout) == (1, b"")
                        assert (
                            done.stderr == b"backbeat: agent agent has no live operation 'job 1'\n"
                        )
                        with trio.CancelScope(shield=True):
                            done = await backbeat(
                                *command, "agent", "job\n1", *(["-j"] if as_json else [])
                            )
                        await trio.sleep_forever()
                assert caught.value.reason == "the disk is full"
                assert caught.value.asked_by.startswith("backbeat-cancel-")
                assert (done.returncode, done.stderr) == (0, b"")
                if as_json:
                    assert json.loads(done.stdout) == {
                        "agent_id": "agent",
                        "operation_id": "job\n1",
                        "reason": "the disk is full",
                    }
                else:
                    assert done.stdout == b"cancelled job?1 of agent\n"
            async with bb.operation("election", id="plain"):
                done = await backbeat(*command, "agent", "plain")
            assert (done.returncode, done.stdout) == (1, b"")
            assert done.stderr.decode() == (
                "backbeat: agent agent refused to cancel operation 'plain': the operation was not "
                "opened with cancellable=True\n"
            )
            # That of another cluster is another agent, although it has the same id.
            async with bb.operation("election", id="job", cancellable=True):
                done = await backbeat(*command, "agent", "job", "--cluster-id", "another")
            assert (done.returncode, done.stdout) == (1, b"")
            assert b"did not say whether the operation was cancelled: no answer" in done.stderr


async def test_a_server_that_is_not_there() -> None:
    done = await backbeat(
        *("cancel", "agent", "job", "--reason", "x"), "-s", "nats://127.0.0.1:1", "--timeout", "1s"
    )
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.startswith(b"backbeat: ")
