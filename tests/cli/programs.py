"""Commands that run beside a test or in it, and a cluster for them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from typing import NamedTuple

import click
import pytest
import trio
from helpers import CLEAN

from backbeat_trio import BackbeatError
from backbeat_trio._cli.main import cli
from backbeat_trio.testing import NatsServer


def parsed(*arguments: str) -> click.Context:
    """Return what a command makes of its arguments, without running it."""
    root = cli.make_context("backbeat", list(arguments))
    name, command, rest = cli.resolve_command(root, list(arguments))
    assert command is not None
    return command.make_context(name, rest, parent=root)


class Done(NamedTuple):
    status: int
    out: str
    err: str


async def invoked(capsys: pytest.CaptureFixture[str], *arguments: str) -> Done:
    """Run a command in this process, which takes a tenth of the time of a program."""
    capsys.readouterr()
    status, error = 1, ""
    with trio.fail_after(60), cli.make_context("backbeat", list(arguments)) as ctx:
        try:
            status = await cli.invoke(ctx)
        except* BackbeatError as group:
            (failure,) = group.exceptions
            error = f"backbeat: {failure}\n"
    out, err = capsys.readouterr()
    return Done(status, out, err + error)


@asynccontextmanager
async def program(
    *arguments: str, env: Mapping[str, str] | None = None
) -> AsyncGenerator[trio.Process, None]:
    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", "backbeat_trio", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=CLEAN | dict(env or {}),
    )
    try:
        yield process
    finally:
        with trio.CancelScope(shield=True):
            if process.returncode is None:
                process.terminate()
            await process.wait()
            for stream in (process.stdout, process.stderr):
                assert stream is not None
                await stream.aclose()


async def line_with(stream: trio.abc.ReceiveStream | None, text: str) -> str:
    """Read until some text has come."""
    assert stream is not None
    heard = ""
    with trio.fail_after(60):
        while text not in heard:
            data = await stream.receive_some()
            assert data, heard
            heard += data.decode()
    return heard


@asynccontextmanager
async def cluster(bpm: float = 600) -> AsyncGenerator[str, None]:
    async with NatsServer() as server:
        pulse = program("pulse", "-s", server.url, "--bpm", str(bpm), "--id", "pulse-a")
        async with pulse as process:
            await line_with(process.stderr, "metronome leads")
            yield server.url
