"""``backbeat watch`` at a pseudo-terminal, beside a real server, a metronome and a session."""

from __future__ import annotations

import os
import pty
import signal
import termios
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from emulator import emulated_shell
from helpers import backbeat, guarded, leading_at, until

from backbeat_trio import Phase, Session
from backbeat_trio._views.terminal import Terminal, open_tty
from backbeat_trio.testing import CLUSTER_ID, NatsServer, open_session

LEAVES = b"\x1b[?25h\x1b[?1049l"


@asynccontextmanager
async def cluster() -> AsyncGenerator[tuple[Session, NatsServer], None]:
    async with (
        NatsServer() as server,
        leading_at(server.url, tempo_bpm=240.0),
        open_session(nats_url=server.url, agent_id="agent-1", lock_timeout=60.0) as bb,
    ):
        yield bb, server


def command(server: NatsServer) -> str:
    return f"backbeat watch -s {server.url} --cluster-id {CLUSTER_ID}"


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@guarded(300)
async def test_a_session_is_watched_and_the_terminal_is_restored(tmp_path: Path) -> None:
    async with cluster() as (bb, server), emulated_shell(120, 40, tmp_path) as terminal:
        before = terminal.modes
        operation = bb.start_operation("election", id="leader-2025", beats=10_000)
        bb.start_operation("dht_store", id="store-1", beats=1)
        await terminal.run(command(server))
        await terminal.shows("leader pulse-a", "leader-2025", "1 late", "lateness", "uncertainty")
        assert terminal.modes != before
        assert terminal.cursor_hidden
        # The pulse moves, and nobody presses a key.
        drawn: set[str] = set()

        def moved() -> bool:
            drawn.add(terminal.lines[0])
            return len(drawn) > 3

        await terminal.until(moved)
        # A text that is found while it is typed.
        await terminal.type("/leader")
        await terminal.until(lambda: "store-1" not in "\n".join(terminal.lines))
        await terminal.shows("leader-2025", "find: leader_")
        # Enter twice: keep the filter, and open the history.
        await terminal.type("\r\r")
        await terminal.shows("history of leader-2025", "began      beat")
        operation.advance(Phase.EXECUTING)
        await terminal.until(lambda: any(line.endswith("  executing") for line in terminal.lines))
        await terminal.type("?")
        await terminal.shows("What the words mean", "no claim for three beats")
        await terminal.type("\x1b")
        await terminal.shows("[1 operations]", '"leader"')
        await terminal.type("\x1b")
        await terminal.shows("store-1")
        late = next(row for row, line in enumerate(terminal.lines) if "store-1" in line)
        assert {"red", "default"} <= terminal.colors(late) | {"default"}
        # An arrow, and a smaller window.
        await terminal.type("\x1b[B")
        await terminal.until(lambda: any(line.startswith("» on time") for line in terminal.lines))
        terminal.resize(40, 10)
        await terminal.until(lambda: terminal.lines[-1] == "? help  / find  t timing  s sort")
        await terminal.type("q")
        await terminal.shows("status-0")
        assert terminal.received.count(LEAVES) == 1
        assert terminal.modes == before
        assert not terminal.cursor_hidden


@guarded(300)
async def test_it_is_suspended_and_resumed_and_signals_restore_the_terminal(
    tmp_path: Path,
) -> None:
    async with cluster() as (_, server), emulated_shell(100, 24, tmp_path) as terminal:
        before = terminal.modes
        await terminal.type(f"{command(server)}\n")
        await terminal.shows("leader pulse-a")
        for suspend in ("\x1a", ""):
            if suspend:
                await terminal.type(suspend)
            else:
                os.kill(terminal.pid, signal.SIGTSTP)
            await terminal.shows("Stopped")
            assert terminal.modes == before
            assert not terminal.cursor_hidden
            # What the shell has written meanwhile is drawn over.
            await terminal.type("echo still $((40 + 2))\n")
            await terminal.shows("still 42")
            await terminal.type("fg\n")
            await terminal.until(lambda: "still 42" not in "\n".join(terminal.lines))
            await terminal.shows("leader pulse-a")
            assert terminal.modes != before
        # Killed while it is suspended.
        await terminal.type("\x1a")
        await terminal.shows("Stopped")
        await terminal.type("kill %1\n")
        await terminal.until(lambda: not is_running(terminal.pid))
        await terminal.type("\n")
        await terminal.shows("Exit 143")
        assert terminal.modes == before
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            await terminal.run(command(server))
            await terminal.shows("leader pulse-a")
            if number == signal.SIGINT:
                await terminal.type("\x03")
            else:
                os.kill(terminal.pid, number)
            await terminal.shows(f"status-{128 + number}")
            assert terminal.modes == before
            assert not terminal.cursor_hidden


@guarded(300)
async def test_the_view_goes_on_without_a_server_and_keeps_the_log_for_later(
    tmp_path: Path,
) -> None:
    async with cluster() as (_, server), emulated_shell(100, 24, tmp_path) as terminal:
        await terminal.run(f"NO_COLOR=1 {command(server)}")
        await terminal.shows("connected", "leader pulse-a")
        server.kill()
        await terminal.shows("not connected")
        lines = terminal.lines
        assert lines[0].startswith("beat ")
        assert lines[5].startswith("[1 operations]") or lines[6].startswith("[1 operations]")
        assert all(terminal.colors(row) <= {"default"} for row in range(24))
        await terminal.type("q")
        await terminal.shows("status-0")
        shown = "\n".join(terminal.lines)
        assert "WARNING" in shown, shown


@guarded(300)
async def test_without_a_terminal_there_is_a_summary(tmp_path: Path) -> None:
    async with cluster() as (bb, server):
        bb.start_operation("dht_store", id="store-1", beats=1)
        await bb.sleep(3)
        done = await backbeat("watch", "-s", server.url, "--cluster-id", CLUSTER_ID)
        assert (done.returncode, done.stderr) == (0, b"")
        text = done.stdout.decode()
        assert text.isascii()
        assert text.replace("\n", "").isprintable()
        assert f"cluster {CLUSTER_ID}: beat " in text
        assert "1 late" in text
        assert "late: store-1 of agent-1, dht_store, " in text
        await bb.pause()
        await until(lambda: bb.health().paused)
        async with emulated_shell(100, 24, tmp_path, {"TERM": "dumb"}) as terminal:
            await terminal.run(command(server))
            # It waits for no beat, as none comes.
            await terminal.shows(", paused", "status-0")
            assert b"\x1b" not in terminal.received


@asynccontextmanager
async def pseudo_terminal() -> AsyncGenerator[tuple[int, int], None]:
    ours, theirs = pty.openpty()
    try:
        yield ours, theirs
    finally:
        os.close(ours)
        os.close(theirs)


@guarded(60)
async def test_an_exception_restores_the_terminal() -> None:
    async with pseudo_terminal() as (ours, theirs):
        before, handlers = termios.tcgetattr(theirs), signal.getsignal(signal.SIGINT)
        with pytest.raises(ZeroDivisionError):
            async with Terminal(open_tty(theirs), "utf-8", lambda: None):
                assert termios.tcgetattr(theirs) != before
                assert signal.getsignal(signal.SIGINT) is not handlers
                raise ZeroDivisionError
        assert termios.tcgetattr(theirs) == before
        assert signal.getsignal(signal.SIGINT) is handlers
        sent = b""
        while not sent.endswith(LEAVES):
            sent += os.read(ours, 1000)


@guarded(60)
async def test_a_terminal_that_takes_nothing_more_holds_up_only_the_drawing() -> None:
    async with pseudo_terminal() as (_, theirs):
        before = termios.tcgetattr(theirs)
        async with (
            Terminal(open_tty(theirs), "utf-8", lambda: None) as terminal,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(terminal.write, "x" * 1_000_000)
            # The loop goes on, and the view can be left.
            for _ in range(3):
                await trio.sleep(0.05)
            nursery.cancel_scope.cancel()
        assert termios.tcgetattr(theirs) == before


@guarded(60)
async def test_the_end_of_the_terminal_ends_the_keys() -> None:
    ours, theirs = pty.openpty()
    async with Terminal(open_tty(theirs), "utf-8", lambda: None) as terminal:
        os.close(theirs)
        os.write(ours, b"a\x1b")
        keys = [
            key async for keys in terminal.read_keys() for key in keys if close_after(ours, key)
        ]
        assert keys == ["a", "escape"]
        assert terminal.ended_by == signal.SIGHUP
        # Nothing is sent, and nothing fails.
        await terminal.write("x")


def close_after(fd: int, key: str) -> bool:
    if key == "escape":
        os.close(fd)
    return True
