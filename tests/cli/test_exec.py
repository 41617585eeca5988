"""``backbeat exec``."""

from __future__ import annotations

import signal

import pytest
import trio

from backbeat_trio.testing import NatsServer, open_recorder, open_session

from .programs import backbeat, cluster, line_with, program


@pytest.mark.parametrize(
    ("options", "command", "status"),
    [
        (["--beats", "100"], ["true"], 0),
        (["--beats", "100"], ["sh", "-c", "exit 3"], 3),
        (["--beats", "100"], ["sh", "-c", "kill -KILL $$"], 137),
        (["--beats", "0"], ["true"], 0),
        (["--beats", "2"], ["sleep", "60"], 124),
        (["--beats", "2", "--foreground"], ["sleep", "60"], 124),
        (["--beats", "2", "--preserve-status"], ["sleep", "60"], 143),
        (["--beats", "2", "--preserve-status", "--signal", "INT"], ["sleep", "60"], 130),
        (["--beats", "2"], ["sh", "-c", "trap 'exit 7' TERM; sleep 60 & wait"], 124),
        (
            ["--beats", "2", "--kill-after", "1"],
            ["sh", "-c", "trap '' TERM; while :; do sleep 1; done"],
            137,
        ),
        (["--beats", "2"], ["no-such-command"], 127),
        (["--beats", "2"], ["/etc/passwd"], 126),
        (["--beats", "2"], [], 125),
    ],
)
async def test_exec(options: list[str], command: list[str], status: int) -> None:
    # Without a server, on the local grid; a metronome's makes no difference to any of this.
    env = {"CHORUS_BACKBEAT_TEMPO_BPM": "600", "CHORUS_BACKBEAT_NATS_URL": "memory://exec"}
    done = await backbeat("exec", *options, "--", *command, env=env)
    assert (done.returncode, done.stderr.decode()) == (status, done.stderr.decode())
    assert "no metronome" not in done.stderr.decode()


async def test_exec_without_a_metronome_says_whose_beats_it_counts() -> None:
    async with NatsServer() as server:
        for beats, told in (("50", True), ("0", False)):
            done = await backbeat(
                *("exec", "-s", server.url, "--timeout", "100ms", "--beats", beats, "--", "true"),
                env={"CHORUS_BACKBEAT_TEMPO_BPM": "90"},
            )
            assert done.returncode == 0
            line = (
                "backbeat exec: no metronome: "
                "budgets are counted on a local grid, 0.666667 s a beat\n"
            )
            assert (line in done.stderr.decode()) is told


async def test_exec_is_an_operation_of_the_cluster() -> None:
    async with cluster() as url:
        async with (
            open_session(nats_url=url, cluster_id="chorus-production") as bb,
            open_recorder(bb) as claims,
        ):
            done = await backbeat("exec", "-s", url, "--beats", "3", "--id", "late", "sleep", "60")
            assert done.returncode == 124
            done = await backbeat("exec", "-s", url, "--beats", "50", "--id", "well", "true")
            assert done.returncode == 0
            done = await backbeat("exec", "-s", url, "--beats", "50", "--id", "badly", "false")
            assert done.returncode == 1
            with trio.fail_after(60):
                failed = await claims.wait_for("late", "failed")
                assert "the budget of 3 beats ran out" in failed.notes
                await claims.wait_for("well", "done")
                assert "exit status 1" in (await claims.wait_for("badly", "failed")).notes
            assert {claim.state for claim in claims.of("late")} == {"executing", "failed"}


async def test_exec_passes_signals_on() -> None:
    script = "trap 'echo got it; exit 9' TERM; echo ready; sleep 60 & wait"
    async with program(
        "exec", "-s", "memory://exec", "--beats", "1000", "--", "sh", "-c", script
    ) as running:
        await line_with(running.stdout, "ready")
        running.send_signal(signal.SIGTERM)
        await line_with(running.stdout, "got it")
        assert await running.wait() == 9


async def test_exec_with_settings_that_cannot_work() -> None:
    done = await backbeat("exec", "--beats", "1", "-s", "http://x", "--", "true")
    assert done.returncode == 125
    assert "nats_url" in done.stderr.decode()
