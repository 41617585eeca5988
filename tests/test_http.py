"""HTTP requests that carry their caller's deadline: middleware, transport, and real servers."""

from __future__ import annotations

import functools
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, ParamSpec, Self

import httpx
import pytest
import trio
import trio.testing
from helpers import leading_at, until
from hypercorn.config import Config
from hypercorn.trio import serve
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.websockets import WebSocket

import backbeat_trio as backbeat
from backbeat_trio import Session, current_session
from backbeat_trio.http import BackbeatMiddleware, BackbeatTransport, Message, Receive, Send
from backbeat_trio.testing import ClaimRecorder, NatsServer, open_recorder, open_session

P = ParamSpec("P")

Clock = trio.testing.MockClock
Handler = Callable[[Request], Awaitable[Response]]
# Budgets in beats of a tenth of a second; a slow machine needs a later one to get anywhere.
GROWING = 10, 40, 160
SECONDS_5 = httpx.Timeout(5.0).as_dict()


def make_app(handler: Handler, bb: Session | None = None, **settings: Any) -> Starlette:
    middleware = [Middleware(BackbeatMiddleware, bb)]
    methods = ["GET", "HEAD"]
    return Starlette(
        routes=[Route("/", handler, methods=methods)], middleware=middleware, **settings
    )


async def ask(app: Any, headers: Mapping[str, str] | None = None) -> httpx.Response:
    """Send a request into an application of this process, from a task that has no deadline."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), timeout=None) as client:
        return await client.get("http://service/", headers=headers)


def injected(bb: Session) -> dict[str, str]:
    headers: dict[str, str] = {}
    bb.inject(headers)
    return headers


async def tell_deadline(request: Request) -> Response:
    return PlainTextResponse(repr(current_session().current_effective_deadline()))


# The middleware.


async def test_a_request_ends_on_its_callers_beat(backbeat_session: Session) -> None:
    ended: list[float] = []

    async def handler(request: Request) -> Response:
        try:
            await trio.sleep_forever()
        finally:
            ended.append(backbeat_session.current_position())
        raise AssertionError("unreachable")

    with backbeat_session.fail_after(3.125):
        headers = injected(backbeat_session)
    response = await ask(make_app(handler, backbeat_session), headers)
    assert ended == [3.125]
    assert response.status_code == 504
    assert response.text == "the caller's budget ran out before there was an answer\n"
    assert response.headers["content-type"] == "text/plain; charset=utf-8"


async def test_a_request_whose_budget_is_spent_is_not_begun(backbeat_session: Session) -> None:
    async def handler(request: Request) -> Response:
        raise AssertionError("called")

    with backbeat_session.fail_after(1):
        headers = injected(backbeat_session)
    await backbeat_session.sleep(1)
    response = await ask(make_app(handler, backbeat_session), headers)
    assert response.status_code == 408
    assert response.text == "the caller's budget was spent when the request arrived\n"
    assert backbeat_session.statistics().headers_expired == 1


async def test_a_request_without_a_deadline_has_none(backbeat_session: Session) -> None:
    headers = injected(backbeat_session)
    response = await ask(make_app(tell_deadline, backbeat_session), headers)
    assert (response.status_code, response.text) == (200, "inf")


async def test_a_response_without_a_body_has_not_begun(backbeat_session: Session) -> None:
    async def chunks() -> AsyncGenerator[bytes, None]:
        await trio.sleep_forever()
        yield b"never"

    async def handler(request: Request) -> Response:
        return StreamingResponse(chunks())

    with backbeat_session.fail_after(2):
        headers = injected(backbeat_session)
    response = await ask(make_app(handler, backbeat_session), headers)
    assert response.status_code == 504
    assert backbeat_session.current_position() == 2


async def converse(app: Any, scope: dict[str, Any]) -> list[Message]:
    """Call an application as a server does, and return what it has sent."""
    sent: list[Message] = []

    async def receive() -> Message:
        await trio.sleep_forever()
        raise AssertionError("unreachable")

    async def send(message: Message) -> None:
        sent.append(message)

    await app({"headers": []} | scope, receive, send)
    return sent


async def test_a_response_that_has_begun_ends_early(backbeat_session: Session) -> None:
    async def app(scope: object, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.early_hint", "links": []})
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"some", "more_body": True})
        await trio.sleep_forever()

    with backbeat_session.fail_after(2):
        headers = injected(backbeat_session)
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    sent = await converse(
        BackbeatMiddleware(app, backbeat_session), {"type": "http", "headers": raw}
    )
    kinds = [message["type"].rpartition(".")[2] for message in sent]
    assert kinds == ["early_hint", "start", "body"]
    assert sent[2]["more_body"]
    assert backbeat_session.current_position() == 2


async def test_the_server_sees_a_second_start(backbeat_session: Session) -> None:
    async def app(scope: object, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.start", "status": 201})

    sent = await converse(BackbeatMiddleware(app, backbeat_session), {"type": "http"})
    assert [message["status"] for message in sent] == [200, 201]


async def test_what_follows_a_complete_response_has_no_deadline(
    backbeat_session: Session,
) -> None:
    done: list[float] = []

    async def tidy() -> None:
        await backbeat_session.sleep(10)
        done.append(backbeat_session.current_position())

    async def handler(request: Request) -> Response:
        return PlainTextResponse("early", background=BackgroundTask(tidy))

    with backbeat_session.fail_after(2):
        headers = injected(backbeat_session)
    response = await ask(make_app(handler, backbeat_session), headers)
    assert response.text == "early"
    assert done == [10]


async def test_a_request_is_a_part_of_its_callers_operation(
    backbeat_session: Session, backbeat_claims: ClaimRecorder
) -> None:
    async def handler(request: Request) -> Response:
        async with backbeat_session.operation("part", id="part"):
            return PlainTextResponse(injected(backbeat_session)["traceparent"])

    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    async with backbeat_session.operation("whole", id="whole"):
        headers = injected(backbeat_session) | {"traceparent": trace}
    response = await ask(make_app(handler, backbeat_session), headers)
    assert response.text == trace
    claim = await backbeat_claims.wait_for("part", "done")
    assert claim.parent == "test-agent/whole"


async def test_a_soft_edge_of_the_caller_counts(backbeat_session: Session) -> None:
    async def handler(request: Request) -> Response:
        with current_session().extract(request.headers) as budget:
            with budget.graceful():
                await trio.sleep_forever()
            return PlainTextResponse(f"wound down at {current_session().current_position()}")
        return PlainTextResponse("cut")

    with backbeat_session.fail_after(4, soft_after=2.5):
        headers = injected(backbeat_session)
    response = await ask(make_app(handler, backbeat_session), headers)
    assert response.text == "wound down at 2.5"


@pytest.mark.parametrize(
    ("value", "counter"),
    [
        ("nonsense", "headers_garbled"),
        ("grid; nan; nan", "headers_garbled"),
        ("grid; -1; -1", "headers_garbled"),
        ("grid; 1e300; 1e300", "headers_absurd"),
        ("x" * 1_000_000, "headers_garbled"),
        ("grid; 5; 5, grid; 6; 6", "headers_garbled"),
    ],
)
async def test_hostile_headers_do_no_harm(
    backbeat_session: Session, value: str, counter: str
) -> None:
    response = await ask(make_app(tell_deadline, backbeat_session), {"BACKBEAT-deadline": value})
    assert (response.status_code, response.text) == (200, "inf")
    assert getattr(backbeat_session.statistics(), counter) == 1


async def test_a_web_socket_has_the_session_and_no_deadline(backbeat_session: Session) -> None:
    seen: list[object] = []

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        seen.append(current_session().current_effective_deadline())
        seen.append(injected(current_session())["Backbeat-Operation"])
        await WebSocket(scope, receive, send).close()

    async with backbeat_session.operation("whole", id="whole"):
        with backbeat_session.fail_after(1, soft_after=0.5):
            headers = injected(backbeat_session)
    assert {"Backbeat-Deadline", "Backbeat-Soft-Deadline"} < set(headers)
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await converse(BackbeatMiddleware(app, backbeat_session), {"type": "websocket", "headers": raw})
    assert seen == [math.inf, headers["Backbeat-Operation"]]


async def test_the_lifespan_needs_no_session() -> None:
    seen: list[str] = []

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])

    await converse(BackbeatMiddleware(app), {"type": "lifespan"})
    assert seen == ["lifespan"]


# Which session it uses.


async def tell_agent(request: Request) -> Response:
    return PlainTextResponse(current_session().config.agent_id)


async def test_it_uses_the_session_that_it_is_given_or_the_lifespans_or_the_current_one(
    autojump_clock: Clock,
) -> None:
    app = make_app(tell_agent)

    async def with_state(scope: Any, receive: Receive, send: Send) -> None:
        scope["state"] = {"backbeat": state}
        await app(scope, receive, send)

    async with open_session(agent_id="given") as given, open_session(agent_id="state") as state:
        async with open_session(agent_id="current"):
            assert (await ask(make_app(tell_agent, given))).text == "given"
            assert (await ask(with_state)).text == "state"
            assert (await ask(app)).text == "current"


async def test_it_says_how_to_give_it_a_session() -> None:
    with pytest.raises(RuntimeError) as caught:
        await converse(BackbeatMiddleware(make_app(tell_agent)), {"type": "http"})
    assert "`BackbeatMiddleware` uses" in caught.value.__notes__[0]


async def test_it_refuses_what_is_not_a_session() -> None:
    scope = {"type": "http", "state": {"backbeat": "yes"}}
    with pytest.raises(TypeError, match="must be a session"):
        await converse(BackbeatMiddleware(make_app(tell_agent)), scope)


async def test_a_session_that_was_left_is_refused(autojump_clock: Clock) -> None:
    async with open_session() as bb:
        pass
    with pytest.raises(backbeat.SessionClosed):
        await converse(BackbeatMiddleware(make_app(tell_agent), bb), {"type": "http"})


# The transport.


@asynccontextmanager
async def recording(**settings: Any) -> AsyncGenerator[tuple[httpx.AsyncClient, Any], None]:
    """Give a client, and the list of the requests that arrive from it."""
    arrived: list[httpx.Request] = []

    async def answer(request: httpx.Request) -> httpx.Response:
        arrived.append(request)
        return httpx.Response(200, content=await request.aread())

    transport = BackbeatTransport(httpx.MockTransport(answer))
    async with httpx.AsyncClient(transport=transport, **settings) as client:
        yield client, arrived


async def test_requests_carry_what_bounds_the_task(backbeat_session: Session) -> None:
    async with recording() as (client, arrived):
        with backbeat_session.fail_after(4, soft_after=3):
            expected = injected(backbeat_session)
            response = await client.post("http://service/", content=b"data")
        assert response.content == b"data"
        for name, value in expected.items():
            assert arrived[0].headers[name] == value
        # The same client in a task that has no deadline; old headers do not stay.
        await client.get("http://service/", headers={"backbeat-deadline": "old"})
        assert "Backbeat-Deadline" not in arrived[1].headers


async def test_the_request_itself_stays_as_it_was(backbeat_session: Session) -> None:
    async with recording() as (client, arrived):
        request = client.build_request("GET", "http://service/")
        before = request.headers.copy()
        with backbeat_session.fail_after(4):
            response = await client.send(request)
        assert response.request is request
        assert request.headers == before
        assert request.extensions["timeout"] == SECONDS_5
        assert "Backbeat-Deadline" in arrived[0].headers


async def test_a_redirection_tells_no_other_host(backbeat_session: Session) -> None:
    arrived: list[httpx.Request] = []

    async def answer(request: httpx.Request) -> httpx.Response:
        arrived.append(request)
        if request.url.host == "own":
            return httpx.Response(302, headers={"location": "http://other/"})
        return httpx.Response(200)

    mock = httpx.MockTransport(answer)
    mounts = {"http://own": BackbeatTransport(mock)}
    async with httpx.AsyncClient(transport=mock, mounts=mounts, follow_redirects=True) as client:
        with backbeat_session.fail_after(4):
            await client.get("http://own/")
    assert [request.url.host for request in arrived] == ["own", "other"]
    assert ["Backbeat-Deadline" in request.headers for request in arrived] == [True, False]


async def test_the_default_timeout_is_the_one_of_httpx() -> None:
    async with httpx.AsyncClient(transport=BackbeatTransport()) as client:
        assert client.timeout.as_dict() == SECONDS_5


async def test_httpx_timeouts_yield_to_a_deadline_unless_they_were_given(
    backbeat_session: Session,
) -> None:
    async with recording() as (client, arrived):
        await client.get("http://service/")
        with backbeat_session.fail_after(4):
            await client.get("http://service/")
            await client.get("http://service/", timeout=7.0)
            await client.get("http://service/", timeout=httpx.Timeout(5.0, connect=2.0))
        # A soft edge alone does not end anything.
        with backbeat_session.move_on_after(math.inf, soft_after=4):
            await client.get("http://service/")
    assert [request.extensions["timeout"] for request in arrived] == [
        SECONDS_5,
        httpx.Timeout(None).as_dict(),
        httpx.Timeout(7.0).as_dict(),
        httpx.Timeout(5.0, connect=2.0).as_dict(),
        SECONDS_5,
    ]


async def test_the_end_of_a_budget_passes_through(backbeat_session: Session) -> None:
    async def answer(request: httpx.Request) -> httpx.Response:
        await trio.sleep_forever()
        raise AssertionError("unreachable")

    transport = BackbeatTransport(httpx.MockTransport(answer), backbeat_session)
    async with httpx.AsyncClient(transport=transport) as client:
        with pytest.raises(backbeat.BeatBudgetExceeded):
            with backbeat_session.fail_after(2):
                await client.get("http://service/")
        assert backbeat_session.current_position() == 2
        with backbeat_session.move_on_after(9) as scope:
            scope.cancel()
            await client.get("http://service/")
        assert scope.cancelled_caught


async def test_without_a_session_it_says_what_to_do() -> None:
    async with recording() as (client, _):
        with pytest.raises(RuntimeError, match="no backbeat session is open"):
            await client.get("http://service/")


async def test_it_opens_and_closes_what_it_wraps() -> None:
    seen: list[str] = []

    class Wrapped(httpx.AsyncBaseTransport):
        async def __aenter__(self) -> Self:
            seen.append("opened")
            return self

        async def __aexit__(self, *exc_info: object) -> None:
            seen.append("left")

        async def aclose(self) -> None:
            seen.append("closed")

    async with BackbeatTransport(Wrapped()):
        pass
    await BackbeatTransport(Wrapped()).aclose()
    assert seen == ["opened", "left", "closed"]


# Real servers, on two hops.


def watched(test: Callable[P, Awaitable[None]]) -> Callable[P, Any]:
    """Have a test that hangs fail, without a deadline that its requests would carry."""

    async def watch() -> None:
        await trio.sleep(120)
        raise AssertionError("the test hangs")

    @functools.wraps(test)
    async def run(*args: P.args, **kwargs: P.kwargs) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            await test(*args, **kwargs)
            nursery.cancel_scope.cancel()

    return run


@asynccontextmanager
async def serving(app: Starlette) -> AsyncGenerator[str, None]:
    """Run an application on Hypercorn, and give its address."""
    config = Config()
    config.bind = ["127.0.0.1:0"]
    stop = trio.Event()
    async with trio.open_nursery() as nursery:
        # Hypercorn and Starlette type applications differently.
        server: Any = functools.partial(serve, app, config, shutdown_trigger=stop.wait)  # type: ignore[arg-type]
        (url,) = await nursery.start(server)
        yield url
        stop.set()


class Chain:
    """Services B and C, and the session of A, which calls B, which calls C."""

    def __init__(self, a: Session, b: Session, c: Session) -> None:
        self.a, self.b, self.c = a, b, c
        self.client: httpx.AsyncClient
        self.last_url = ""
        # What C has seen: it says so when a request comes in, and when one is cancelled.
        self.began = trio.Event()
        self.release = trio.Event()
        self.cancelled: list[float] = []

    async def first(self, request: Request) -> Response:
        """Serve B: pass the request on to C, within what is left of it."""
        async with self.b.operation("pass_on", id="pass_on"):
            answer = await self.client.get(self.last_url, params=request.query_params)
        deadline = self.b.current_effective_deadline()
        body = {"deadline": repr(deadline), "next": answer.json()}
        return JSONResponse(body, answer.status_code)

    async def last(self, request: Request) -> Response:
        """Serve C: say what bounds it, or wait until it is released."""
        self.began.set()
        if "wait" in request.query_params:
            try:
                await self.release.wait()
            except trio.Cancelled:
                self.cancelled.append(self.c.current_position())
                raise
        with self.c.extract(request.headers) as budget:
            soft, parent = budget.soft_deadline, injected(self.c).get("Backbeat-Operation", "")
        deadline = self.c.current_effective_deadline()
        return JSONResponse({"deadline": repr(deadline), "soft": repr(soft), "parent": parent})


@asynccontextmanager
async def open_chain() -> AsyncGenerator[Chain, None]:
    """Run two servers, each with a session of its own, on one grid of a real nats-server."""
    async with NatsServer() as nats, leading_at(nats.url, tempo_bpm=600.0):
        settings: dict[str, Any] = {"nats_url": nats.url, "lock_timeout": 60}
        async with (
            open_session(agent_id="c", **settings) as c,
            open_session(agent_id="b", **settings) as b,
            open_session(agent_id="a", **settings) as a,
        ):
            await until(lambda: all(bb.health().grid == "locked" for bb in (a, b, c)))
            chain = Chain(a, b, c)
            # As many connections as a request over two hops needs, so none may be lost.
            limits = httpx.Limits(max_connections=2)
            transport = BackbeatTransport(httpx.AsyncHTTPTransport(limits=limits))
            async with (
                httpx.AsyncClient(transport=transport, timeout=60) as chain.client,
                serving(make_app(chain.last, c)) as chain.last_url,
                serving(make_app(chain.first, b)) as url,
            ):
                chain.client.base_url = httpx.URL(url)
                yield chain


@watched
async def test_a_deadline_travels_over_two_hops() -> None:
    async with open_chain() as chain, open_recorder(chain.a) as claims:
        a, client = chain.a, chain.client
        async with a.operation("whole", id="whole"):
            with a.fail_after(900.125, soft_after=800.0625) as scope:
                answer = (await client.get("/")).raise_for_status().json()
        assert abs(float(answer["deadline"]) - scope.deadline) < 0.001
        assert abs(float(answer["next"]["deadline"]) - scope.deadline) < 0.001
        assert abs(float(answer["next"]["soft"]) - scope.soft_deadline) < 0.001
        assert "; b; pass_on; a/whole" in answer["next"]["parent"]
        assert (await claims.wait_for("pass_on", "done")).parent == "a/whole"
        # No deadline is no deadline, on every hop.
        answer = (await client.get("/")).raise_for_status().json()
        assert (answer["deadline"], answer["next"]["deadline"]) == ("inf", "inf")
        assert answer["next"]["soft"] == "inf"


@watched
async def test_each_hop_ends_when_its_caller_gives_up() -> None:
    async with open_chain() as chain:
        a, client = chain.a, chain.client
        for beats in GROWING:
            with pytest.raises(backbeat.BeatBudgetExceeded):
                with a.fail_after(beats) as scope:
                    await client.get("/", params={"wait": "1"})
            if chain.began.is_set():
                break
        await until(lambda: chain.cancelled)
        assert chain.cancelled[0] >= scope.deadline - 0.001
        # Neither servers nor connections have suffered from it.
        (await client.get("/")).raise_for_status()
        assert chain.c.statistics().headers_garbled == 0


@watched
async def test_a_pause_stretches_a_request() -> None:
    async with open_chain() as chain, trio.open_nursery() as nursery:
        a, client = chain.a, chain.client
        await a.pause()
        await until(lambda: not (a.tempo_bpm or chain.b.tempo_bpm or chain.c.tempo_bpm))

        async def release() -> None:
            await chain.began.wait()
            # Longer than the budget would last without the pause.
            await trio.sleep(1)
            chain.release.set()

        nursery.start_soon(release)
        with a.fail_after(2) as scope:
            answer = (await client.get("/", params={"wait": "1"})).raise_for_status().json()
        assert abs(float(answer["next"]["deadline"]) - scope.deadline) < 0.001
        assert not chain.cancelled


@watched
async def test_statuses_and_responses_that_are_cut_on_a_real_server() -> None:
    async def chunks() -> AsyncGenerator[bytes, None]:
        yield b"some"
        await trio.sleep_forever()

    async def handler(request: Request) -> Response:
        if "stream" in request.query_params:
            return StreamingResponse(chunks())
        if "wait" in request.query_params:
            await trio.sleep_forever()
        return PlainTextResponse("done")

    async with (
        open_session(tempo_bpm=600.0) as bb,
        serving(make_app(handler, bb)) as url,
        httpx.AsyncClient(base_url=url, timeout=60) as client,
    ):
        for beats in GROWING:
            with bb.fail_after(beats):
                headers = injected(bb)
            async with client.stream("GET", "/?stream=1", headers=headers) as response:
                if response.status_code == 200:
                    with pytest.raises(httpx.RemoteProtocolError):
                        await response.aread()
                    break
        assert response.status_code == 200
        assert (await client.get("/", headers=headers)).status_code == 408
        for method in ("GET", "HEAD"):
            with bb.fail_after(2):
                headers = injected(bb)
            response = await client.request(method, "/?wait=1", headers=headers)
            # On a slow machine it may arrive too late.
            assert response.status_code in (504, 408)
            assert bool(response.content) is (method == "GET")
        # The server itself refuses what is too large, and goes on.
        with pytest.raises(httpx.HTTPError):
            large = {"Backbeat-Deadline": "x" * 1_000_000}
            (await client.get("/", headers=large)).raise_for_status()
        for value in ("nan", "grid; 1e300; 1e300", "grid; -1; -1", "\x7f;;"):
            response = await client.get("/", headers={"Backbeat-Deadline": value})
            assert response.text == "done"
