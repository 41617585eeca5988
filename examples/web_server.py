"""A web server whose requests have budgets of beats: Starlette on Hypercorn's Trio worker.

It needs ``pip install starlette hypercorn httpx``. As a program it sends itself some requests, and
ends. This goes on serving: ``hypercorn --worker-class trio examples/web_server:app``
"""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial

import httpx
import trio
from hypercorn.config import Config
from hypercorn.trio import serve
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

import backbeat_trio as backbeat


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncGenerator[dict[str, backbeat.Session], None]:
    async with backbeat.session(nats_url="memory://web_server", tempo_bpm=300) as bb:
        # The server copies this into the state of every request.
        yield {"backbeat": bb}


class UseSession:
    """Let every request use the session that the lifespan has opened."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        # Requests run in tasks that the server starts, outside of the session's block.
        with backbeat.use_session(scope["state"]["backbeat"]):
            await self.app(scope, receive, send)


async def search(request: Request) -> PlainTextResponse:
    # Code that is called from a handler needs no request to find the session.
    bb = backbeat.current_session()
    async with bb.operation("search", beats=2, enforce=True) as op:  # cancelled after two beats
        op.advance(backbeat.Phase.EXECUTING, peers=1)
        await bb.sleep(float(request.query_params["beats"]))
    return PlainTextResponse(f"found by beat {bb.current_beat()}\n")


def beat(request: Request) -> PlainTextResponse:
    # A handler without `async` runs in a thread. It has the session, and asks it in Trio's thread.
    bb = backbeat.current_session()
    return PlainTextResponse(f"beat {trio.from_thread.run_sync(bb.current_beat)}\n")


async def too_late(request: Request, error: Exception) -> PlainTextResponse:
    return PlainTextResponse(f"{error}\n", status_code=504)


app = Starlette(
    routes=[Route("/search", search), Route("/beat", beat)],
    middleware=[Middleware(UseSession)],
    exception_handlers={backbeat.BeatBudgetExceeded: too_late},
    lifespan=lifespan,
)


async def main() -> None:
    config = Config()
    config.bind = ["127.0.0.1:0"]
    stop = trio.Event()
    async with trio.open_nursery() as nursery:
        # Hypercorn and Starlette type applications differently.
        server = partial(serve, app, config, shutdown_trigger=stop.wait)  # type: ignore[arg-type]
        (url,) = await nursery.start(server)
        async with httpx.AsyncClient(base_url=url) as client:
            for path in ("/beat", "/search?beats=1", "/search?beats=100"):
                response = await client.get(path)
                print(f"{path}: {response.status_code}, {response.text}", end="")
        stop.set()


if __name__ == "__main__":
    trio.run(main)
