"""``backbeat exec``, by itself and side by side with ``timeout`` of coreutils."""

from __future__ import annotations

import os
import pty
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from helpers import CLEAN, backbeat

from backbeat_trio.testing import NatsServer, open_recorder, open_session

from .programs import cluster, line_with, program

BACKBEAT = [sys.executable, "-m", "backbeat_trio", "exec"]
# Ten beats a second, on a grid of its own.
ENV = CLEAN | {"CHORUS_BACKBEAT_TEMPO_BPM": "600", "CHORUS_BACKBEAT_NATS_URL": "memory://exec"}
BOTH = pytest.mark.parametrize("whose", ["backbeat", "timeout"])


def limited(whose: str, beats: float, *flags: str, kill_after: float = 0) -> list[str]:
    """Return how a command is run with a budget of so many tenths of a second."""
    # The two short options are those of `timeout`, too.
    kill = ["-k", str(kill_after / (1 if whose == "backbeat" else 10))]
    if whose == "backbeat":
        return [*BACKBEAT, *kill, *flags, f"--beats={beats}"]
    return ["timeout", *kill, *flags, str(beats / 10)]


async def ended(process: trio.Process) -> int:
    """Return the exit status that a shell would show."""
    with trio.fail_after(60):
        code = await process.wait()
    return 128 - code if code < 0 else code


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


@pytest.mark.parametrize(
    ("beats", "patience", "command", "status", "told"),
    [
        ("500", "100ms", ["sleep", "1"], 0, True),
        ("0", "100ms", ["sleep", "1"], 0, False),
        ("1", "600s", ["sleep", "60"], 124, True),
        ("500", "600s", ["true"], 0, False),
    ],
)
async def test_without_a_metronome_it_says_whose_beats_it_counts(
    beats: str, patience: str, command: list[str], status: int, told: bool
) -> None:
    async with NatsServer() as server:
        done = await backbeat(
            *("exec", "--server", server.url, "--timeout", patience, "--beats", beats, *command),
            env={"CHORUS_BACKBEAT_TEMPO_BPM": "90"},
        )
        assert done.returncode == status
        line = (
            "backbeat exec: no metronome: budgets are counted on a local grid, 0.666667 s a beat\n"
        )
        assert (line in done.stderr.decode()) is told


async def test_exec_is_an_operation_of_the_cluster() -> None:
    async with cluster() as url:
        async with (
            open_session(nats_url=url, cluster_id="chorus-production") as bb,
            open_recorder(bb) as claims,
        ):
            done = await backbeat(
                "exec", "--server", url, "--beats", "3", "--id", "late", "sleep", "60"
            )
            assert done.returncode == 124
            done = await backbeat("exec", "--server", url, "--beats", "50", "--id", "well", "true")
            assert done.returncode == 0
            done = await backbeat(
                "exec", "--server", url, "--beats", "50", "--id", "badly", "false"
            )
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
        "exec", "--server", "memory://exec", "--beats", "1000", "--", "sh", "-c", script
    ) as running:
        await line_with(running.stdout, "ready")
        running.send_signal(signal.SIGTERM)
        await line_with(running.stdout, "got it")
        assert await running.wait() == 9


async def test_exec_with_settings_that_cannot_work() -> None:
    done = await backbeat("exec", "--beats", "1", "--server", "http://x", "--", "true")
    assert done.returncode == 125
    assert "nats_url" in done.stderr.decode()


def script(text: str) -> list[str]:
    return ["sh", "-c", text]


# Leaves the group that it was started in, for one where the budget's signals do not go.
LEAVE = """
import os, time
try:
    os.setsid()
except PermissionError:
    os.setpgid(0, os.getpgid(int(open(f"/proc/{os.getppid()}/stat").read().split()[3])))
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("beats", "kill_after", "flags", "command"),
    [
        (100, 0, [], ["true"]),
        (100, 0, [], ["false"]),
        (100, 0, [], script("exit 124")),
        (100, 0, [], script("kill -KILL $$")),
        (100, 0, [], script("kill -USR1 $$")),
        (0, 0, [], ["true"]),
        (2, 0, [], ["sleep", "60"]),
        (2, 0, ["--preserve-status"], ["sleep", "60"]),
        (2, 0, ["--foreground"], ["sleep", "60"]),
        (2, 0, ["--foreground", "--preserve-status"], ["sleep", "60"]),
        (2, 0, ["-s", "KILL"], ["sleep", "60"]),
        (2, 0, ["--signal=KILL", "--foreground"], ["sleep", "60"]),
        (2, 0, ["--signal=INT", "--preserve-status"], ["sleep", "60"]),
        (2, 0, ["--signal=40", "--preserve-status"], ["sleep", "60"]),
        (2, 2, [], ["sleep", "60"]),
        (2, 2, [], script("trap '' TERM; while :; do sleep 1; done")),
        (2, 2, ["--preserve-status"], script("trap '' TERM; while :; do sleep 1; done")),
        (2, 2, ["--foreground"], script("trap '' TERM; while :; do sleep 1; done")),
        # No more than the budget is counted where --kill-after is 0.
        (2, 0, [], script("trap '' TERM; sleep 1; sleep 1; exit 3")),
        (2, 0, ["--preserve-status"], script("trap '' TERM; sleep 1; sleep 1; exit 3")),
        (2, 0, ["--preserve-status"], script("trap 'exit 7' TERM; sleep 60 & wait")),
        # What was stopped can end, and so can what has left its group.
        (2, 0, [], script("kill -STOP $$")),
        (2, 0, [], [sys.executable, "-c", LEAVE]),
        (2, 0, [], ["no-such-command"]),
        (2, 0, [], ["./no-such-command"]),
        (2, 0, [], ["/etc/passwd/x"]),
        (2, 0, [], ["/etc/passwd"]),
        (2, 0, [], ["/"]),
        (2, 0, [], [""]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("leads", [False, True], ids=["in a group", "leading a group"])
async def test_exit_status_is_that_of_timeout(
    beats: float, kill_after: float, flags: list[str], command: list[str], leads: bool
) -> None:
    seen = {}
    for whose in ("timeout", "backbeat"):
        argv = limited(whose, beats, *flags, kill_after=kill_after)
        with trio.fail_after(60):
            done = await trio.run_process(
                [*argv, *command],
                capture_stdout=True,
                capture_stderr=True,
                check=False,
                env=ENV,
                start_new_session=leads,
            )
        code = done.returncode
        seen[whose] = 128 - code if code < 0 else code
        assert b"Traceback" not in done.stderr
    assert seen["backbeat"] == seen["timeout"]


@BOTH
async def test_a_parent_that_ignores_sigchld(whose: str) -> None:
    ignoring = ["sh", "-c", """trap '' CHLD; exec "$@" """, "sh"]
    command = [*ignoring, *limited(whose, 100), "sh", "-c", "exit 3"]
    assert await ended(await trio.lowlevel.open_process(command, env=ENV)) == 3


@BOTH
async def test_descriptors_are_inherited(whose: str) -> None:
    command = ["bash", "-c", """exec "$@" <(echo hi)""", "bash", *limited(whose, 100), "cat"]
    with trio.fail_after(60):
        done = await trio.run_process(command, capture_stdout=True, env=ENV)
    assert done.stdout == b"hi\n"


@BOTH
@pytest.mark.parametrize("named", ["by path", "by name"])
async def test_a_script_that_names_no_interpreter(whose: str, named: str, tmp_path: Path) -> None:
    path = tmp_path / "a-script"
    path.write_text('echo "$0 $1"; exit 5\n')
    path.chmod(0o755)
    program = str(path) if named == "by path" else path.name
    env = ENV | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    with trio.fail_after(60):
        done = await trio.run_process(
            [*limited(whose, 100), program, "x y"], capture_stdout=True, check=False, env=env
        )
    assert (done.stdout.decode(), done.returncode) == (f"{path} x y\n", 5)


def at_a_terminal(command: list[str]) -> tuple[int, str]:
    """Run a command as the leader of a terminal, type two lines, and return status and output."""
    pid, terminal = pty.fork()
    if not pid:  # pragma: no cover
        os.execvpe(command[0], command, ENV)
    os.write(terminal, b"hello\n\x04")
    shown = b""
    try:
        while data := os.read(terminal, 1000):
            shown += data
    except OSError:
        # Linux says so when the last one has closed the terminal.
        pass
    finally:
        os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), shown.decode()


def directly(command: list[str]) -> list[str]:
    return command


def by_an_interactive_shell(command: list[str]) -> list[str]:
    # With job control, each command gets a group of its own, and that the terminal.
    return ["bash", "-c", """set -m; "$@"; exit $?""", "bash", *command]


def by_a_script(command: list[str]) -> list[str]:
    return ["sh", "-c", """"$@"; exit $?""", "sh", *command]


@BOTH
@pytest.mark.parametrize(
    ("how", "flags", "beats", "status"),
    [
        (directly, [], 300, 0),
        (by_an_interactive_shell, [], 300, 0),
        (by_a_script, ["--foreground"], 300, 0),
        # Its group is not the one that the terminal is given to, so it is stopped until it ends.
        (by_a_script, [], 5, 124),
    ],
)
async def test_reading_from_a_terminal(
    whose: str, how: Callable[[list[str]], list[str]], flags: list[str], beats: float, status: int
) -> None:
    command = how([*limited(whose, beats, *flags), "cat"])
    with trio.fail_after(60):
        code, shown = await trio.to_thread.run_sync(at_a_terminal, command)
    assert code == status, shown
    # The terminal's echo, and what the command has read.
    assert shown.count("hello") == (1 if status else 2)


@BOTH
@pytest.mark.parametrize("leads", [False, True], ids=["in a group", "leading a group"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_from_outside_begins_to_count_kill_after(
    whose: str, leads: bool, number: signal.Signals
) -> None:
    # A signal that comes while `timeout` itself still starts would end it.
    command = script("trap '' TERM INT; sleep 0.2; echo ready; while :; do sleep 1; done")
    process = await trio.lowlevel.open_process(
        [*limited(whose, 100_000, kill_after=3), *command],
        stdout=subprocess.PIPE,
        env=ENV,
        start_new_session=leads,
    )
    await line_with(process.stdout, "ready")
    process.send_signal(number)
    assert await ended(process) == 128 + signal.SIGKILL
    assert process.stdout is not None
    # All that the command had started is gone: nobody holds the pipe.
    with trio.fail_after(60):
        assert not await process.stdout.receive_some()
    await process.stdout.aclose()


@BOTH
@pytest.mark.parametrize("leads", [False, True], ids=["in a group", "leading a group"])
async def test_the_signal_of_the_budget_is_passed_on_too(whose: str, leads: bool) -> None:
    process = await trio.lowlevel.open_process(
        [
            *limited(whose, 100_000, "--signal=USR1"),
            *script("trap 'echo got it; exit 9' USR1; sleep 0.2; echo ready; sleep 60 & wait"),
        ],
        stdout=subprocess.PIPE,
        env=ENV,
        start_new_session=leads,
    )
    await line_with(process.stdout, "ready")
    process.send_signal(signal.SIGUSR1)
    assert await ended(process) == 9
    await line_with(process.stdout, "got it")
    assert process.stdout is not None
    await process.stdout.aclose()


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None,
    reason="only root, less the right to signal others, can start what it may not signal",
)
@pytest.mark.parametrize("leads", [False, True], ids=["in a group", "leading a group"])
@pytest.mark.parametrize("kill_after", [0, 1])
async def test_a_command_that_may_not_be_signalled(leads: bool, kill_after: float) -> None:
    without = ["setpriv", "--bounding-set=-kill", "--inh-caps=-kill"]
    other = ["setpriv", "--reuid=65534", "--clear-groups", "sh", "-c", "echo $$; exec sleep 2"]
    with trio.fail_after(60):
        done = await trio.run_process(
            [*without, *limited("backbeat", 2, kill_after=kill_after), *other],
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            env=ENV,
            start_new_session=leads,
        )
    pid = int(done.stdout)
    assert done.stderr.decode() == (
        f"backbeat exec: cannot signal setpriv (process {pid}), so waits for it to end: "
        "Operation not permitted\n"
    )
    assert done.returncode == 125
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_the_command_does_not_wait_for_a_server() -> None:
    async with NatsServer() as server:
        url = server.url
    async with program(
        *("exec", "--server", url, "--timeout", "600s", "--beats", "9", "--", "echo", "started"),
        env={"CHORUS_BACKBEAT_GRACE_PERIOD": "0.1"},
    ) as process:
        await line_with(process.stdout, "started")
        assert await ended(process) == 0
