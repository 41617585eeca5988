"""The crawler of the examples, tested as its author would: by the testing kit, in virtual time."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import asynccontextmanager

import crawler
import httpx
import pytest
import trio

import backbeat_trio as backbeat
from backbeat_trio.testing import ClaimRecorder, open_session

Answer = Callable[[httpx.Request], Coroutine[None, None, httpx.Response]]


@asynccontextmanager
async def client(answer: Answer) -> AsyncGenerator[httpx.AsyncClient, None]:
    """Give a client whose requests are answered in this process, so that time may be virtual."""
    transport = httpx.MockTransport(answer)
    async with httpx.AsyncClient(transport=transport, base_url="http://site", timeout=None) as it:
        yield it


async def test_it_visits_every_page_once(
    backbeat_session: backbeat.Session, backbeat_claims: ClaimRecorder
) -> None:
    pages = {"/": 'href="/a" href="/b"', "/a": 'href="/" href="/b"', "/b": 'href="/b"'}
    visited: list[str] = []

    async def answer(request: httpx.Request) -> httpx.Response:
        visited.append(request.url.path)
        return httpx.Response(200, text=pages[request.url.path])

    async with client(answer) as http:
        results = await crawler.crawl(http, "/")
    assert results == {"/": "2 links", "/a": "2 links", "/b": "1 links"}
    assert sorted(visited) == ["/", "/a", "/b"]
    for path in pages:
        assert (await backbeat_claims.wait_for(path, "done")).progress == 1.0
        notes = [claim.notes.partition(" (")[0] for claim in backbeat_claims.of(path)]
        assert notes == [
            "P2P fetch: started",
            "P2P fetch: connecting",
            "P2P fetch: executing",
            "P2P fetch: completed",
        ]


async def test_it_tries_again_after_a_pause(
    backbeat_session: backbeat.Session, backbeat_claims: ClaimRecorder
) -> None:
    answers = iter([503, 503, 200])
    asked: list[float] = []

    async def answer(request: httpx.Request) -> httpx.Response:
        asked.append(backbeat_session.current_position())
        return httpx.Response(next(answers))

    start = backbeat_session.current_position()
    async with client(answer) as http:
        assert await crawler.crawl(http, "/") == {"/": "0 links"}
    assert asked == pytest.approx([start, start + 0.5, start + 1.5])
    assert (await backbeat_claims.wait_for("/", "done")).progress == 1.0


async def test_it_gives_up_after_three_attempts(
    backbeat_session: backbeat.Session, backbeat_claims: ClaimRecorder
) -> None:
    asked: list[str] = []

    async def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.path)
        raise httpx.ConnectError("refused")

    async with client(answer) as http:
        assert await crawler.crawl(http, "/") == {"/": "ConnectError"}
    assert len(asked) == 3
    assert "ConnectError: refused" in (await backbeat_claims.wait_for("/", "failed")).notes


async def test_a_page_that_never_comes_costs_six_beats(
    backbeat_session: backbeat.Session, backbeat_claims: ClaimRecorder
) -> None:
    async def answer(request: httpx.Request) -> httpx.Response:
        await trio.sleep_forever()
        raise AssertionError

    start = trio.current_time()
    async with client(answer) as http:
        assert await crawler.crawl(http, "/") == {"/": "BeatBudgetExceeded"}
    # Two attempts of two beats, pauses of a half and a whole one, and a third attempt cut short.
    assert trio.current_time() == pytest.approx(start + 6.0)
    assert "BeatBudgetExceeded" in (await backbeat_claims.wait_for("/", "failed")).notes


async def test_a_slower_cluster_waits_longer(backbeat_session: backbeat.Session) -> None:
    async def answer(request: httpx.Request) -> httpx.Response:
        await trio.sleep(3)
        return httpx.Response(200)

    async with client(answer) as http:
        assert await crawler.crawl(http, "/") == {"/": "BeatBudgetExceeded"}
        # Two beats of two seconds each are enough.
        await backbeat_session.sleep_until(await backbeat_session.set_tempo(30))
        assert await crawler.crawl(http, "/") == {"/": "0 links"}


async def test_the_whole_crawl_has_a_budget(
    backbeat_session: backbeat.Session, backbeat_claims: ClaimRecorder
) -> None:
    async def answer(request: httpx.Request) -> httpx.Response:
        await trio.sleep(1.6)
        number = int(request.url.path[1:])
        return httpx.Response(200, text=f'href="/{number + 1}"')

    start = trio.current_time()
    async with client(answer) as http:
        results = await crawler.crawl(http, "/0")
    assert trio.current_time() == pytest.approx(start + 30.0)
    assert results == {f"/{n}": "1 links" for n in range(18)} | {"/18": "not finished"}
    notes = (await backbeat_claims.wait_for("/18", "failed")).notes
    assert "cancelled: the beat budget ran out" in notes


async def test_it_crawls_a_real_site(monkeypatch: pytest.MonkeyPatch) -> None:
    # All but the page that is too slow, so that the tempo can leave a slow machine enough time.
    pages = {**crawler.Site.pages, "/": ("/flaky", "/gone")}
    monkeypatch.setattr(crawler.Site, "pages", pages)
    monkeypatch.setattr(crawler.Site, "requests", Counter[str]())
    with crawler.site() as url:
        async with (
            open_session(tempo_bpm=30),
            httpx.AsyncClient(base_url=url, timeout=None) as http,
        ):
            results = await crawler.crawl(http, "/")
    assert results == {
        "/": "2 links",
        "/flaky": "2 links",
        "/gone": "HTTPStatusError",
        "/leaf": "0 links",
    }
    assert crawler.Site.requests["/flaky"] >= 2
    assert crawler.Site.requests["/gone"] >= 3
