"""A crawler that fetches pages under budgets of beats, tries again, and reports each page.

It needs ``pip install httpx``. It begins at the URL that is its argument, or at a site of its own.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any, ClassVar

import httpx
import trio

import backbeat_trio as backbeat

ATTEMPTS = 3


async def fetch(client: httpx.AsyncClient, path: str) -> str:
    bb = backbeat.current_session()
    attempt = 1
    while True:
        try:
            with bb.fail_after(2):
                response = await client.get(path)
            return response.raise_for_status().text
        except (httpx.HTTPError, backbeat.BeatBudgetExceeded):
            if attempt == ATTEMPTS:
                raise
        await bb.sleep(attempt / 2)
        attempt += 1


async def crawl(client: httpx.AsyncClient, start: str) -> dict[str, str]:
    """Visit all pages of a site, four at a time, and return what became of each."""
    bb = backbeat.current_session()
    results: dict[str, str] = {}
    limit = trio.CapacityLimiter(4)

    async def visit(path: str) -> None:
        results[path] = "not finished"
        try:
            async with limit, bb.operation("fetch", id=path, beats=6, enforce=True) as op:
                # Phases only go forward, so all attempts are made in this one.
                op.advance(backbeat.Phase.CONNECTING, peers=1)
                text = await fetch(client, path)
                op.advance(backbeat.Phase.EXECUTING)
                links = re.findall(r'href="(/[^"]*)"', text)
        except (httpx.HTTPError, backbeat.BeatBudgetExceeded) as error:
            results[path] = type(error).__name__
            return
        results[path] = f"{len(links)} links"
        for link in set(links).difference(results):
            results[link] = "not begun"
            nursery.start_soon(visit, link)

    with bb.move_on_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(visit, start)
    return results


class Site(BaseHTTPRequestHandler):
    """Pages with links, of which one fails the first time, one is too slow, and one is missing."""

    pages: ClassVar = {"/": ("/flaky", "/slow", "/gone"), "/flaky": ("/", "/leaf"), "/leaf": ()}
    requests: ClassVar = Counter[str]()

    def do_GET(self) -> None:
        self.requests[self.path] += 1
        if self.path == "/slow":
            Event().wait(60)
        elif self.path not in self.pages:
            self.send_error(404)
        elif self.path == "/flaky" and self.requests[self.path] == 1:
            self.send_error(503)
        else:
            self.send_response(200)
            self.end_headers()
            links = (f'<a href="{link}">{link}</a>' for link in self.pages[self.path])
            self.wfile.write("".join(links).encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def site() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        # So that a thread that is still busy does not keep the program from ending.
        server.daemon_threads = True
        server.block_on_close = False
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


async def main(url: str) -> None:
    # httpx's own timeout is in seconds, which would not stretch with the beats.
    async with (
        backbeat.session(nats_url="memory://crawler", tempo_bpm=300),
        httpx.AsyncClient(base_url=url, timeout=None) as client,
    ):
        for path, result in (await crawl(client, "/")).items():
            print(f"{path}: {result}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        backbeat.run(main, sys.argv[1])
    else:
        with site() as url:
            backbeat.run(main, url)
