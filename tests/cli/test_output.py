"""What is written where: to a terminal, to a pipe, and where nothing more can be written."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import termios
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO

import pytest
import trio
from helpers import CLEAN, backbeat

from backbeat_trio.testing import open_session

from .programs import cluster, line_with, program

COMMAND = [sys.executable, "-m", "backbeat_trio"]
PYTHON = shlex.quote(sys.executable)
_END = b"\0"
TERMINAL = {
    name: value for name, value in CLEAN.items() if name not in {"COLUMNS", "LINES", "NO_COLOR"}
} | {"TERM": "xterm"}


@asynccontextmanager
async def terminal(columns: int) -> AsyncGenerator[tuple[trio.lowlevel.FdStream, int], None]:
    """Open a pseudo-terminal, and give what reads from it and the end of the program."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, columns))
    async with trio.lowlevel.FdStream(ours) as stream:
        try:
            yield stream, theirs
        finally:
            os.close(theirs)


async def at_a_terminal(
    *arguments: str, columns: int = 80, env: dict[str, str] | None = None
) -> tuple[int, str]:
    """Run a command that writes to a terminal, and return its exit status and what is shown."""
    shown = b""

    async def read(stream: trio.lowlevel.FdStream) -> None:
        nonlocal shown
        # A mark of our own says where the output ends, as the terminal stays open.
        while _END not in shown:
            shown += await stream.receive_some()

    with trio.fail_after(60):
        async with terminal(columns) as (stream, theirs), trio.open_nursery() as nursery:
            nursery.start_soon(read, stream)
            process = await trio.lowlevel.open_process(
                [*COMMAND, *arguments], stdout=theirs, stderr=theirs, env=TERMINAL | (env or {})
            )
            status = await process.wait()
            os.write(theirs, _END)
    return status, shown.removesuffix(_END).decode().replace("\r\n", "\n")


async def test_the_status_fits_a_terminal_of_40_columns() -> None:
    async with cluster() as url:
        status, shown = await at_a_terminal("status", "-s", url, columns=40)
        assert status == 0
        # The verdict is a sentence, and the terminal wraps it.
        _, *lines = re.sub("\x1b\\[[0-9;]*m", "", shown).splitlines()
        assert "Cluster:" in lines
        assert max(map(len, lines)) <= 40


async def test_colours_are_for_terminals_and_not_for_who_does_not_want_them() -> None:
    arguments = ("status", "-s", "memory://colours")
    _, shown = await at_a_terminal(*arguments)
    assert "\x1b[" in shown
    _, shown = await at_a_terminal(*arguments, env={"NO_COLOR": "1"})
    assert "\x1b" not in shown
    assert "healthy: " in shown
    done = await backbeat(*arguments)
    assert b"\x1b" not in done.stdout


async def test_output_to_a_pipe_is_neither_cut_nor_wrapped() -> None:
    name = "c" * 128
    done = await backbeat(
        *("status", "-s", "memory://pipe", "--cluster-id", name), env={"COLUMNS": "20"}
    )
    assert f"  name         {name}\n" in done.stdout.decode()
    async with cluster() as url:
        async with (
            program("claims", "-s", url, "--count", "1", "--failed") as claims,
            open_session(nats_url=url, agent_id="a" * 64, cluster_id="chorus-production") as bb,
        ):

            async def fail() -> None:
                while True:
                    bb.start_operation("x" * 200, id="i" * 300).fail("r" * 400)
                    await bb.sleep(1)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(fail)
                line = await line_with(claims.stdout, "\n")
                nursery.cancel_scope.cancel()
    assert line.count("\n") == 1
    for text in ("a" * 64, "i" * 300, "r" * 400, "x" * 200):
        assert text in line


async def test_the_demonstration_at_a_terminal() -> None:
    arguments = ("demo", "--memory", "--beats", "8", "--bpm", "600")
    for columns in (40, 100):
        status, shown = await at_a_terminal(*arguments, columns=columns)
        assert status == 0, shown
        for text in ("Step 1: ", "Step 2: ", "Step 3: ", "Step 4: ", "What to try next"):
            assert text in shown
    status, shown = await at_a_terminal(*arguments, env={"NO_COLOR": "1", "TERM": "dumb"})
    assert status == 0, shown


async def test_claims_say_at_a_terminal_that_they_are_listened_to() -> None:
    async with cluster() as url:
        async with terminal(80) as (_, theirs):
            process = await trio.lowlevel.open_process(
                [*COMMAND, "claims", "agent-1", "-s", url],
                stdout=theirs,
                stderr=subprocess.PIPE,
                env=CLEAN,
            )
            told = await line_with(process.stderr, "\n")
            assert told == "backbeat: listening to agent-1; Ctrl-C ends it\n"
            process.send_signal(signal.SIGINT)
            with trio.fail_after(60):
                assert await process.wait() == 128 + signal.SIGINT
            assert process.stderr is not None
            assert await process.stderr.receive_some() == b""
            await process.stderr.aclose()
        # Into a pipe it does not say so.
        async with (
            program("claims", "-s", url, "--count", "1") as quiet,
            open_session(nats_url=url, agent_id="agent-1", cluster_id="chorus-production") as bb,
        ):
            with trio.fail_after(60):
                while quiet.returncode is None:
                    bb.start_operation("election").complete()
                    await bb.sleep(1)
            assert quiet.stderr is not None
            assert await quiet.stderr.receive_some() == b""


async def test_json_is_all_that_there_is_on_stdout() -> None:
    async with cluster() as url:
        for command in (["status", "-vv"], ["tempo", "-vv"], ["tempo", "300", "-v"], ["pause"]):
            done = await backbeat(*command, "-j", "-s", url)
            assert done.returncode == 0
            assert done.stdout.count(b"\n") == 1
            assert json.loads(done.stdout)


FULL = Path("/dev/full")


def write_to(output: int | IO[bytes], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command that writes its output to a file, and return what it wrote to stderr."""
    return subprocess.run(
        [*COMMAND, *arguments],
        stdout=output,
        stderr=subprocess.PIPE,
        check=False,
        text=True,
        timeout=60,
        env=CLEAN,
    )


@pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full")
@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["help", "exec"],
        ["status", "-s", "memory://full"],
        ["status", "-j", "-s", "memory://full"],
        ["tempo", "-s", "memory://full"],
        ["demo", "--memory", "--beats", "1", "--bpm", "600"],
    ],
    ids=" ".join,
)
def test_a_full_disk_is_one_line(arguments: list[str]) -> None:
    with FULL.open("wb") as full:
        done = write_to(full, *arguments)
    assert done.returncode == 1
    assert done.stderr == "backbeat: cannot write the output: No space left on device\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["help", "exec"],
        ["status", "-s", "memory://closed"],
        ["demo", "--memory", "--beats", "8", "--bpm", "600"],
    ],
    ids=" ".join,
)
def test_a_pipe_that_nobody_reads_is_no_error(arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = write_to(writing, *arguments)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_the_first_line_of_a_pipe() -> None:
    command = f"{PYTHON} -m backbeat_trio demo --memory --beats 8 --bpm 600 | head -1"
    done = subprocess.run(
        ["sh", "-c", command], check=True, capture_output=True, text=True, timeout=60, env=CLEAN
    )
    assert done.stdout.startswith("Step 1: ")
    assert done.stdout.count("\n") == 1
    assert not done.stderr


def test_without_any_stdout() -> None:
    command = f"exec {PYTHON} -m backbeat_trio status -s memory://none >&-"
    done = subprocess.run(
        ["sh", "-c", command], check=False, capture_output=True, text=True, timeout=60, env=CLEAN
    )
    assert (done.returncode, done.stderr) == (0, "")
