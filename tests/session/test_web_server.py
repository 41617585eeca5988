"""Requests of a web server use a session: Starlette on Hypercorn's Trio worker."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import trio
from helpers import CLEAN, guarded, until
from hypercorn.config import Config
from hypercorn.trio import serve
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

import backbeat_trio as backbeat
from backbeat_trio.testing import NatsServer, open_recorder, open_session

DOCS = Path(__file__).parent.parent.parent / "docs"


def python_of(name: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (DOCS / name).read_text(), re.DOTALL | re.MULTILINE)


class UseSession:
    def __init__(self, app: ASGIApp, name: str) -> None:
        self.app = app
        self.name = name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with backbeat.use_session(scope["state"][self.name]):
            await self.app(scope, receive, send)


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncGenerator[dict[str, backbeat.Session], None]:
    async with (
        open_session(agent_id="one", tempo_bpm=600) as one,
        open_session(agent_id="two", tempo_bpm=600) as two,
    ):
        yield {"one": one, "two": two}


async def name(request: Request) -> PlainTextResponse:
    return PlainTextResponse(backbeat.current_session().config.agent_id)


def name_in_a_thread(request: Request) -> PlainTextResponse:
    bb = backbeat.current_session()
    assert trio.from_thread.run_sync(bb.current_beat) >= 0
    return PlainTextResponse(bb.config.agent_id)


async def refusal(request: Request) -> PlainTextResponse:
    try:
        backbeat.current_session()
    except RuntimeError as error:
        return PlainTextResponse(str(error))
    return PlainTextResponse("there is one")  # pragma: no cover


async def cut(request: Request) -> PlainTextResponse:
    bb = backbeat.current_session()
    try:
        async with bb.operation("search", id="search", beats=1, enforce=True):
            await trio.sleep_forever()
    except backbeat.BeatBudgetExceeded as error:
        return PlainTextResponse(str(error), status_code=504)


@asynccontextmanager
async def serving(app: Starlette) -> AsyncGenerator[httpx.AsyncClient, None]:
    config = Config()
    config.bind = ["127.0.0.1:0"]
    stop = trio.Event()
    async with trio.open_nursery() as nursery:
        # Hypercorn and Starlette type applications differently.
        server: Any = partial(serve, app, config, shutdown_trigger=stop.wait)  # type: ignore[arg-type]
        (url,) = await nursery.start(server)
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            yield client
        stop.set()


@guarded(60)
async def test_requests_use_the_sessions_of_the_lifespan() -> None:
    routes = [
        Route("/name", name),
        Route("/thread", name_in_a_thread),
        Route("/cut", cut),
    ]
    app = Starlette(
        routes=[
            Route("/refusal", refusal),
            # Two parts of one application, each with a session of its own.
            Mount("/one", UseSession(Starlette(routes=routes), "one")),
            Mount("/two", UseSession(Starlette(routes=routes), "two")),
        ],
        lifespan=lifespan,
    )
    async with serving(app) as client:
        for part in ("one", "two", "one"):
            for path in ("name", "thread"):
                assert (await client.get(f"/{part}/{path}")).text == part
        response = await client.get("/one/cut")
        assert response.status_code == 504
        assert "ran out" in response.text
        # Without the middleware there is none, and the text says what to do.
        assert "use_session" in (await client.get("/refusal")).text


@guarded(60)
async def test_a_session_around_the_server_serves_its_requests() -> None:
    app = Starlette(routes=[Route("/name", name), Route("/thread", name_in_a_thread)])
    async with open_session(agent_id="around"), serving(app) as client:
        assert (await client.get("/name")).text == "around"
        assert (await client.get("/thread")).text == "around"


# The programs of the guide.


@asynccontextmanager
async def program(
    folder: Path, url: str, *command: str
) -> AsyncGenerator[tuple[trio.Process, httpx.AsyncClient], None]:
    """Run a web server on a port of the system's choice, and wait until it answers."""
    log = folder / "log"
    env = {"CHORUS_BACKBEAT_NATS_URL": url, "CHORUS_BACKBEAT_AGENT_ID": "web"}
    env |= {"CHORUS_BACKBEAT_CLUSTER_ID": "test-cluster", "CHORUS_BACKBEAT_LOCK_TIMEOUT": "0"}
    env |= {"CHORUS_BACKBEAT_TEMPO_BPM": "600"}
    with log.open("wb") as stream:
        process = await trio.lowlevel.open_process(
            [sys.executable, *command],
            stdout=stream,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=CLEAN | env,
        )

    def address() -> str | None:
        assert process.returncode is None, log.read_text()
        found = re.search(r"Running on (http://\S+)", log.read_text())
        return found and found[1]

    try:
        await until(address)
        async with httpx.AsyncClient(base_url=address() or "", timeout=60) as client:
            yield process, client
    finally:
        with trio.CancelScope(shield=True):
            process.kill()
            await process.wait()


@guarded(120)
async def test_the_application_of_the_guide(tmp_path: Path) -> None:
    app, _ = python_of("web.md")
    # A request that is still in progress when the server is stopped.
    app = app.replace("await bb.sleep(1)", "await bb.sleep(float(request.query_params['beats']))")
    app = app.replace("beats=2, enforce=True", "beats=2, id=request.query_params['id']")
    (tmp_path / "app.py").write_text(app)
    hypercorn = ["-m", "hypercorn", "--worker-class", "trio", "--bind", "127.0.0.1:0"]
    hypercorn += ["--graceful-timeout", "0", f"{tmp_path / 'app.py'}:app"]
    async with (
        NatsServer() as server,
        open_session(
            nats_url=server.url, agent_id="watcher", require_connection=True, lock_timeout=0
        ) as watcher,
        open_recorder(watcher, "web") as claims,
        program(tmp_path, server.url, *hypercorn) as (process, client),
        trio.open_nursery() as nursery,
    ):
        assert (await client.get("/search?id=quick&beats=1")).text == "found\n"
        await claims.wait_for("quick", "done")

        async def ask() -> None:
            with suppress(httpx.HTTPError):
                await client.get("/search?id=slow&beats=inf")

        nursery.start_soon(ask)
        await claims.wait_for("slow", "executing")
        process.send_signal(signal.SIGTERM)
        assert "cancelled" in (await claims.wait_for("slow", "failed")).notes
        assert await process.wait() == 0
        nursery.cancel_scope.cancel()


@guarded(120)
async def test_the_program_of_the_guide(tmp_path: Path) -> None:
    _, code = python_of("web.md")
    (tmp_path / "server.py").write_text(code)
    command = [str(tmp_path / "server.py"), "127.0.0.1:0"]
    async with program(tmp_path, "memory://web", *command) as (process, client):
        assert re.fullmatch(r"beat \d+\n", (await client.get("/beat")).text)
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 143
