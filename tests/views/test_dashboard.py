"""The dashboard's server: who is let in, its API, its event streams, and clients that misbehave."""

from __future__ import annotations

import gzip
import json
import re
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import trio
import trio.testing
from helpers import guarded, until

from backbeat_trio import Phase, Session, StatusClaim
from backbeat_trio._views.access import Access, Problem
from backbeat_trio._views.dashboard import CONTENT_SECURITY_POLICY, Dashboard, serve_dashboard
from backbeat_trio._views.endpoints import BASE, ProblemView
from backbeat_trio._views.events import EventStreams
from backbeat_trio._views.files import Files
from backbeat_trio._views.model import ClusterModel, GridView, OperationView, Page, Totals
from backbeat_trio._views.server import bind, serve
from backbeat_trio._views.snapshot import Series, Snapshot
from backbeat_trio.testing import open_session

TOKEN = "a-token-of-some-length"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
LONG = 1_000_000


def grid(beat: int = 100, **fields: Any) -> GridView:
    given: dict[str, Any] = {"cluster_id": "c", "tempo_bpm": 60.0, "paused": False}
    given |= {"grid": "locked", "connected": True}
    return GridView(
        position=float(beat), beat=beat, bar=beat // 8, beats_per_bar=8, **given | fields
    )


def claim(id: str, beat: int = 100, **fields: Any) -> StatusClaim:
    given: dict[str, Any] = {
        "agent_id": "agent",
        "state": "executing",
        "beats_left": 8,
        "progress": 0.0,
        "notes": "P2P search: started (peers: 0, node: n)",
        "cluster_id": "c",
        "operation_type": "search",
        "phase": "started",
        "estimated_beats": 8,
    }
    return StatusClaim(task_id=id, beat_index=beat, **given | fields)


def filled(*ids: str) -> ClusterModel:
    model = ClusterModel()
    model.set_grid(grid(), trio.current_time())
    model.take([claim(id) for id in ids], trio.current_time())
    return model


class Watch:
    """A clock that is set by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def access(**fields: Any) -> Access:
    return Access(**{"clock": trio.current_time} | fields)


@asynccontextmanager
async def client_of(
    bb: Session, gate: Access | None = None, **fields: Any
) -> AsyncGenerator[httpx.AsyncClient, None]:
    """A client that calls the application itself."""
    dashboard = Dashboard(bb, gate or access(), **fields)
    transport = httpx.ASGITransport(app=dashboard)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8080") as client:
        yield client


@asynccontextmanager
async def served(
    gate: Access | None = None,
) -> AsyncGenerator[tuple[Session, Dashboard, int], None]:
    """A dashboard on a port, with the session whose cluster it shows."""
    async with (
        open_session(tempo_bpm=600.0, agent_id="agent") as bb,
        trio.open_nursery() as nursery,
    ):
        listener = bind("127.0.0.1", 0)
        dashboard = await nursery.start(serve_dashboard, bb, gate or access(), listener)
        yield bb, dashboard, listener.getsockname()[1]
        nursery.cancel_scope.cancel()


def problem(response: httpx.Response, status: int) -> str:
    """Return why a request was refused."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    found = msgspec.json.decode(response.content, type=ProblemView)
    assert found.status == status
    assert found.title
    return found.detail


# Who is let in.


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST.:1234", 200),
        ("127.0.0.1:8080", 200),
        ("[::1]:8080", 200),
        ("dash.example", 200),
        ("10.1.2.3:8080", 421),
        ("evil.example", 421),
        ("localhost.evil.example", 421),
        ("evil.example#localhost", 400),
        ("localhost@evil.example", 400),
        ("", 400),
        ("localhost:port", 400),
        ("x" * LONG, 421),
    ],
)
async def test_only_known_hosts_are_answered(
    backbeat_session: Session, host: str, status: int
) -> None:
    async with client_of(backbeat_session, access(hosts=["dash.example"])) as client:
        for path in ("/api/v1/access", "/"):
            response = await client.get(path, headers={"Host": host})
            assert response.status_code == status or (path == "/" and status == 200)
        # They tell nothing, and are sent to an address.
        response = await client.get("/healthz", headers={"Host": host})
        assert response.status_code == 200


async def test_the_address_of_the_socket_is_a_known_host(backbeat_session: Session) -> None:
    transport = httpx.ASGITransport(app=Dashboard(backbeat_session, access()))
    async with httpx.AsyncClient(transport=transport, base_url="http://10.1.2.3:8080") as client:
        assert (await client.get("/api/v1/access")).status_code == 200
    async with httpx.AsyncClient(transport=transport, base_url="http://evil.example") as client:
        assert (await client.get("/api/v1/access")).status_code == 421


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://localhost:8080"}, 200),
        ({"Origin": "http://localhost:8080", "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Origin": "https://dash.example"}, 200),
        ({"Origin": "http://localhost:8081"}, 403),
        ({"Origin": "http://localhost"}, 403),
        ({"Origin": "https://dash.example:444"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://localhost:8080.evil.example"}, 403),
        ({"Origin": "http://[::1"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, 403),
        ({"Sec-Fetch-Site": "none"}, 200),
    ],
)
async def test_pages_of_other_sites_are_refused(
    backbeat_session: Session, headers: dict[str, str], status: int
) -> None:
    gate = access(hosts=["dash.example"], token=TOKEN)
    async with client_of(backbeat_session, gate) as client:
        response = await client.get("/api/v1/access", headers=headers)
        assert response.status_code == status
        response = await client.post("/api/v1/login", json={"token": TOKEN}, headers=headers)
        assert response.status_code == status
        assert bool(response.headers.get("set-cookie")) is (status == 200)


async def test_a_link_from_another_site_opens_the_page(
    backbeat_session: Session, tmp_path: Path
) -> None:
    tmp_path.joinpath("index.html").write_text("<!doctype html>")
    headers = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    async with client_of(backbeat_session, files=Files(tmp_path)) as client:
        assert (await client.get("/", headers=headers)).status_code == 200
        headers["Sec-Fetch-Mode"] = "no-cors"
        problem(await client.get("/", headers=headers), 403)


ACTIONS: dict[str, dict[str, Any]] = {
    "tempo": {"bpm": 120},
    "pause": {},
    "resume": {},
    "operations/agent/x/cancel": {"reason": "why"},
}


@pytest.mark.parametrize("action", ACTIONS)
async def test_actions_need_a_token(backbeat_session: Session, action: str) -> None:
    path, body = f"/api/v1/{action}", ACTIONS[action]
    async with client_of(backbeat_session) as client:
        for headers in ({}, BEARER):
            assert "--token-file" in problem(
                await client.post(path, json=body, headers=headers), 403
            )
        problem(await client.post("/api/v1/login", json={"token": TOKEN}), 403)
    async with client_of(backbeat_session, access(token=TOKEN)) as client:
        missing = await client.post(path, json=body)
        problem(missing, 401)
        assert missing.headers["www-authenticate"] == "Bearer"
        for wrong in ("Bearer wrong", "Bearer ", "Basic eDp5", f"Bearer {TOKEN}x"):
            problem(await client.post(path, json=body, headers={"Authorization": wrong}), 401)
        # The token itself is not a cookie.
        headers = {"Cookie": f"backbeat_login={TOKEN}"}
        problem(await client.post(path, json=body, headers=headers), 401)
        problem(await client.get(path, headers=BEARER), 404 if "/cancel" in path else 405)


async def test_a_login_lasts_until_it_is_ended(backbeat_session: Session) -> None:
    watch = Watch()
    gate = access(token=TOKEN, require_token=True, clock=watch)
    async with client_of(backbeat_session, gate) as client:
        problem(await client.get("/api/v1/snapshot"), 401)
        problem(await client.get("/api/v1/events"), 401)
        problem(await client.get("/metrics"), 401)
        may = (await client.get("/api/v1/access")).json()
        assert may == {"actions": True, "token_to_read": True, "logged_in": False}
        assert (await client.get("/healthz")).status_code == 200
        problem(await client.post("/api/v1/login", json={"token": "wrong"}), 401)
        response = await client.post("/api/v1/login", json={"token": TOKEN})
        assert response.json() == {"ok": True}
        cookie = response.headers["set-cookie"]
        for part in ("SameSite=Strict", "HttpOnly", "Path=/"):
            assert part in cookie
        assert "Secure" not in cookie
        assert TOKEN not in cookie
        kept = dict(client.cookies)
        for _ in range(3):
            # It lasts for as long as it is used.
            watch.now += 11 * 3600
            assert (await client.get("/api/v1/snapshot")).status_code == 200
        assert (await client.get("/api/v1/access")).json()["logged_in"] is True
        response = await client.post("/api/v1/logout", json={})
        assert "Max-Age=0" in response.headers["set-cookie"]
        client.cookies.update(kept)
        problem(await client.get("/api/v1/snapshot"), 401)
        await client.post("/api/v1/login", json={"token": TOKEN})
        watch.now += 13 * 3600
        problem(await client.get("/api/v1/snapshot"), 401)


async def test_a_cookie_of_a_page_over_tls_is_secure(backbeat_session: Session) -> None:
    gate = access(token=TOKEN, hosts=["dash.example"])
    async with client_of(backbeat_session, gate) as client:
        headers = {"Host": "dash.example", "Origin": "https://dash.example"}
        response = await client.post("/api/v1/login", json={"token": TOKEN}, headers=headers)
        assert "; Secure" in response.headers["set-cookie"]


async def test_wrong_tokens_are_limited(backbeat_session: Session) -> None:
    watch = Watch()
    async with client_of(backbeat_session, access(token=TOKEN, clock=watch)) as client:
        await client.post("/api/v1/login", json={"token": TOKEN})
        for number in range(10):
            response = await client.post("/api/v1/login", json={"token": f"guess {number}"})
            problem(response, 401)
        refused = await client.post("/api/v1/login", json={"token": TOKEN})
        problem(refused, 429)
        # The header counts as well, and who has logged in already is not locked out.
        problem(await client.post("/api/v1/resume", json={}), 409)
        client.cookies.clear()
        problem(await client.post("/api/v1/resume", json={}, headers=BEARER), 429)
        watch.now += float(refused.headers["retry-after"])
        assert (await client.post("/api/v1/login", json={"token": TOKEN})).status_code == 200


def test_what_is_kept_of_logins_and_failures_is_bounded() -> None:
    gate = access(token=TOKEN, clock=Watch())

    def asks(number: int) -> dict[str, Any]:
        return {"headers": [], "client": (f"10.0.{number % 250}.1", 1), "scheme": "http"}

    first = gate.log_in(TOKEN, asks(0)).partition(";")[0]
    for number in range(500):
        gate.log_in(TOKEN, asks(number))
    assert len(gate._logins) == 100
    assert not gate.has_login({"headers": [(b"cookie", first.encode())]})
    for number in range(500):
        with pytest.raises(Problem):
            gate.log_in("wrong", asks(number))
    assert len(gate._failures) == 100


@pytest.mark.parametrize("token", ["", "short", "x" * 15])
def test_a_short_token_is_refused(token: str) -> None:
    with pytest.raises(ValueError, match="characters"):
        Access(token=token)
    with pytest.raises(ValueError, match="token"):
        Access(require_token=True)
    with pytest.raises(ValueError, match="host"):
        Access(hosts=["http://dash.example/"])


# The API.


async def test_every_answer_is_as_described(backbeat_session: Session) -> None:
    model = filled("one", "two")
    model.take([claim("part", parent="agent/one", correlation_id="agent/one")], trio.current_time())
    dashboard = Dashboard(backbeat_session, access(), model=model)
    dashboard.series.take(grid())
    transport = httpx.ASGITransport(app=dashboard)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        document = (await client.get("/api/v1/openapi.json")).json()
        described = {
            (method.upper(), re.sub(r"{\w+}", "*", path))
            for path, methods in document["paths"].items()
            for method in methods
        }
        routed = {
            (method, re.sub(r"{[\w:]+}", "*", route.path))
            for route in dashboard.routes
            if route.path.startswith(BASE)
            for method in route.methods or ()
        } - {("HEAD", "/")}
        assert described == {(method, path) for method, path in routed if method != "HEAD"}
        for one in dashboard.api.endpoints:
            if one.method != "GET" or one.path == "/events":
                continue
            path = BASE + one.path.replace("{agent}", "agent").replace("{id:path}", "part")
            response = await client.get(path)
            assert response.status_code == 200, path
            assert response.headers["content-type"] == "application/json"
            assert response.headers["cache-control"] == "no-store"
            found = msgspec.json.decode(response.content, type=one.returns)
            # Strict: nothing is told that the description does not have.
            assert msgspec.json.decode(msgspec.json.encode(found)) == response.json(), path
        # Every reference leads somewhere, and what is sent is described, too.
        text = json.dumps(document)
        names = set(re.findall(r'"#/components/schemas/([^"]+)"', text))
        assert names == set(document["components"]["schemas"])
        assert {"Snapshot", "TempoBody", "ProblemView", "Page_OperationView_"} <= names


async def test_queries_choose_what_is_shown(backbeat_session: Session) -> None:
    model = filled(*(f"op-{number}" for number in range(20)))
    model.take([claim("other", agent_id="b", operation_type="else")], trio.current_time())
    async with client_of(backbeat_session, model=model) as client:

        async def ids(query: str) -> list[str]:
            response = await client.get(f"/api/v1/operations?{query}")
            page = msgspec.json.decode(response.content, type=Page[OperationView])
            return [each.id for each in page.items]

        assert await ids("type=else") == ["other"]
        assert await ids("text=op-1&sort=id&limit=2&offset=1&reverse=true") == ["op-18", "op-17"]
        assert await ids("timing=late") == []
        response = await client.get("/api/v1/snapshot?limit=3&agents_limit=1&agents_offset=1")
        snapshot = msgspec.json.decode(response.content, type=Snapshot)
        assert len(snapshot.operations.items) == 3
        assert (snapshot.operations.total, snapshot.agents.total) == (21, 2)
        assert [each.agent_id for each in snapshot.agents.items] == ["b"]
        response = await client.get("/api/v1/operations/agent/op-1")
        assert response.json()["id"] == "op-1"
        detail = problem(await client.get(f"/api/v1/operations/agent/{'<b>' * 1000}"), 404)
        assert len(detail) < 300


@pytest.mark.parametrize(
    "query",
    [
        "limit=x",
        "limit=-1",
        "limit=1001",
        "limit=1.5",
        "offset=-1",
        f"offset={10**30}",
        "sort=nothing",
        "timing=soon",
        "outcome=",
        "reverse=perhaps",
        "nothing=1",
        "limit=1&limit=2",
        "text",
        "text=%ff",
        f"text={'x' * 50_000}",
        "&".join(f"a{number}=1" for number in range(1000)),
        "%s",
    ],
)
async def test_parameters_that_are_not_valid_are_refused(
    backbeat_session: Session, query: str
) -> None:
    async with client_of(backbeat_session, model=filled("x")) as client:
        for path in ("operations", "snapshot", "timeline", "events", "agents"):
            detail = problem(await client.get(f"/api/v1/{path}?{query}"), 400)
            assert len(detail) < 300
        problem(await client.get("/api/v1/timeline?bars=0"), 400)
        problem(await client.get("/api/v1/events?limit=201"), 400)


async def test_the_timeline_has_what_ran_in_its_bars(backbeat_session: Session) -> None:
    model = ClusterModel(keep_bars=100)
    model.set_grid(grid(10), trio.current_time())
    done = {"state": "done", "phase": "completed", "progress": 1.0, "beats_left": 0}
    model.take([claim("old", 8), claim("old", 10, **done)], trio.current_time())
    model.set_grid(grid(60), trio.current_time() + 50)
    claims = [claim("now", 58), claim("short", 40), claim("short", 44, **done), claim("next", 60)]
    model.take(claims, trio.current_time() + 50)
    async with client_of(backbeat_session, model=model) as client:
        timeline = (await client.get("/api/v1/timeline?bars=3")).json()
        assert (timeline["first_beat"], timeline["last_beat"], timeline["beat"]) == (40, 63, 60)
        assert [each["id"] for each in timeline["items"]] == ["next", "now", "short"]
        assert timeline["total"] == 3
        now = timeline["items"][1]
        assert (now["start_beat"], now["last_beat"], now["budget_beat"]) == (58, 58, 66)
        assert now["phases"] == [{"phase": "started", "beat": 58}]
        timeline = (await client.get("/api/v1/timeline?bars=64&limit=1&offset=3")).json()
        assert [each["id"] for each in timeline["items"]] == ["old"]


def test_the_series_keeps_the_newest_beats() -> None:
    series = Series(4)
    for beat in (1, 1, 2, 3, 4, 5):
        series.take(grid(beat, measured_bpm=60.06, uncertainty=0.001))
    assert [point.beat for point in series.newest()] == [2, 3, 4, 5]
    assert [point.beat for point in series.newest(1)] == [5]
    assert series.newest()[0].drift == pytest.approx(0.001)
    series.take(grid(3, tempo_bpm=0.0, measured_bpm=60.0))
    (point,) = series.newest()
    assert (point.beat, point.drift, point.skew) == (3, None, None)


@guarded(60)
async def test_actions_change_the_cluster() -> None:
    async with served(access(token=TOKEN)) as (bb, dashboard, port):
        url = f"http://localhost:{port}/api/v1"
        async with httpx.AsyncClient(headers=BEARER) as client:
            await client.post(f"{url}/tempo", json={"bpm": 1200})
            await until(lambda: bb.tempo_bpm == 1200)
            response = await client.post(f"{url}/tempo", json={"bpm": 600, "over_beats": 4})
            assert response.json()["effective_beat"] > 0
            refused = await client.post(f"{url}/tempo", json={"bpm": 60, "at_beat": 0})
            assert "past" in problem(refused, 409)
            problem(await client.post(f"{url}/tempo", json={"bpm": 7000}), 400)
            problem(await client.post(f"{url}/tempo", json={"bpm": 60, "more": 1}), 400)
            problem(await client.post(f"{url}/tempo", content=b"{"), 415)
            await until(lambda: bb.tempo_bpm == 600)
            await client.post(f"{url}/pause", json={})
            await until(lambda: bb.health().paused)
            assert (await client.post(f"{url}/resume", json={})).status_code == 200
            await until(lambda: not bb.health().paused)

            nobody = f"{url}/operations/agent/nobody/cancel"
            problem(await client.post(nobody, json={"reason": "why"}), 404)
            with pytest.raises(Exception, match="no longer needed"):
                async with bb.operation("search", id="a/b c", beats=5000, cancellable=True):
                    await until(lambda: dashboard.model.operation("agent", "a/b c"))
                    one = f"{url}/operations/agent/a%2Fb%20c"
                    assert (await client.get(one)).json()["outcome"] == "live"
                    problem(await client.post(f"{one}/cancel", json={"reason": ""}), 400)
                    response = await client.post(
                        f"{one}/cancel", json={"reason": "no longer needed"}
                    )
                    assert response.json() == {"ok": True}
                    await trio.sleep_forever()


async def test_bodies_are_checked(
    backbeat_session: Session, autojump_clock: trio.testing.MockClock
) -> None:
    async with client_of(backbeat_session, access(token=TOKEN)) as client:
        post = partial(client.post, "/api/v1/login")
        problem(await post(content=b"{}"), 415)
        problem(await post(data={"token": TOKEN}), 415)
        as_json = {"Content-Type": "application/json; charset=utf-8"}
        for body in (b"", b"{", b"[]", b"{}", b'{"token": 1}', b"\xff", b"[" * 10_000):
            problem(await post(content=body, headers=as_json), 400)
        problem(await post(content=b" " * LONG, headers=as_json), 413)

        async def slow() -> AsyncGenerator[bytes, None]:
            yield b"{"
            await trio.sleep(3600)

        begun = trio.current_time()
        problem(await post(content=slow(), headers=as_json), 408)
        assert trio.current_time() - begun < 20


async def test_errors_are_json(backbeat_session: Session) -> None:
    async with client_of(backbeat_session) as client:
        problem(await client.get("/nothing"), 404)
        problem(await client.get("/api/v1/nothing"), 404)
        problem(await client.delete("/api/v1/snapshot"), 405)
        problem(await client.get("/api/v1/login"), 405)
        problem(await client.get("/api/v1/grid"), 503)
        problem(await client.get("/api/v1/tree/agent/x"), 404)


async def test_a_fault_is_told_without_its_text(
    backbeat_session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> Totals:
        raise RuntimeError("secret")

    app = Dashboard(backbeat_session, access())
    monkeypatch.setattr(ClusterModel, "totals", lambda _: fail())
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        assert "secret" not in problem(await client.get("/api/v1/snapshot"), 500)


# Static files.


async def test_static_files(backbeat_session: Session, tmp_path: Path) -> None:
    script = b"// a comment\n" * 1000
    tmp_path.joinpath("index.html").write_bytes(b"<!doctype html>")
    tmp_path.joinpath("app.js").write_bytes(script)
    tmp_path.joinpath(".hidden").write_bytes(b"x")
    tmp_path.joinpath("lib").mkdir()
    tmp_path.joinpath("lib", "LICENSE").write_bytes(b"a licence")
    async with client_of(backbeat_session, files=Files(tmp_path)) as client:
        response = await client.get("/")
        assert response.headers["content-type"] == "text/html; charset=utf-8"
        assert response.headers["content-security-policy"] == CONTENT_SECURITY_POLICY
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"
        assert response.headers["cross-origin-opener-policy"] == "same-origin"
        assert response.headers["cross-origin-resource-policy"] == "same-origin"
        async with client.stream("GET", "/static/app.js") as raw:
            sent = b"".join([part async for part in raw.aiter_raw()])
            assert raw.headers["content-encoding"] == "gzip"
        assert len(sent) < len(script) / 10
        assert gzip.decompress(sent) == script
        plain = await client.get("/static/app.js", headers={"Accept-Encoding": "gzip;q=0, br"})
        assert plain.content == script
        assert "content-encoding" not in plain.headers
        assert plain.headers["content-type"] == "text/javascript; charset=utf-8"
        assert plain.headers["vary"] == "Accept-Encoding"
        assert plain.headers["etag"] != raw.headers["etag"]
        for tag, status in (
            (raw.headers["etag"], 304),
            ("W/" + raw.headers["etag"], 304),
            ("*", 304),
            (plain.headers["etag"], 200),
            ("other", 200),
        ):
            again = await client.get("/static/app.js", headers={"If-None-Match": f'"x", {tag}'})
            assert again.status_code == status, tag
            assert bool(again.content) is (status == 200)
        assert (await client.get("/static/lib/LICENSE")).text == "a licence"
        for path in (
            "/static/",
            "/static/lib",
            "/static/.hidden",
            "/static/../dashboard.py",
            "/static/..%2fdashboard.py",
            "/static/%2e%2e/dashboard.py",
            "/static//etc/passwd",
            "/static/app.js%00",
            "/static/" + "x" * 50_000,
        ):
            problem(await client.get(path), 404)


def test_a_wheel_without_the_page_still_serves(tmp_path: Path) -> None:
    assert Files(tmp_path / "missing")._files == {}


# Probes.


async def test_probes(backbeat_session: Session, autojump_clock: trio.testing.MockClock) -> None:
    dashboard = Dashboard(backbeat_session, access())
    transport = httpx.ASGITransport(app=dashboard)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        async with trio.open_nursery() as nursery:
            await nursery.start(dashboard.run)
            await trio.sleep(60)
            response = await client.get("/healthz")
            assert response.status_code == 200
            assert response.json()["tick_age"] < 1
            assert (await client.get("/readyz")).json()["ok"] is True
            nursery.cancel_scope.cancel()
        # Nothing ticks any more.
        await trio.sleep(60)
        assert (await client.get("/healthz")).status_code == 503


async def test_metrics_say_what_is_missing(backbeat_session: Session) -> None:
    async with client_of(backbeat_session) as client:
        response = await client.get("/metrics")
        assert response.status_code == 200 or "metrics" in response.json()["detail"].lower()


# Event streams, in virtual time.


class Reader:
    """A client of event streams, which reads what comes or stops reading."""

    def __init__(self) -> None:
        self.events: list[bytes] = []
        self.reads = True
        self.gone = trio.Event()

    async def receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        await trio.lowlevel.checkpoint()
        if not self.reads:
            await trio.sleep_forever()
        if message["type"] == "http.response.body":
            self.events.append(message["body"])


class Source:
    """A state that changes on demand, and counts how often it is encoded."""

    def __init__(self) -> None:
        self.state = 0
        self.encoded: list[str] = []
        self.streams: EventStreams[str] = EventStreams(self.encode, limit=3)

    def encode(self, query: str) -> tuple[object, bytes]:
        self.encoded.append(query)
        return self.state, f"{query}{self.state}".encode()


async def test_streams_send_the_newest_state(autojump_clock: trio.testing.MockClock) -> None:
    source, readers = Source(), [Reader() for _ in range(3)]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(source.streams.run)
        for reader, query in zip(readers, "aab", strict=True):
            nursery.start_soon(source.streams.stream, query, reader.receive, reader.send)
        await trio.sleep(0.1)
        assert readers[0].events == [b"retry: 2000\nid: 1\ndata: a0\n\n"]
        source.encoded.clear()
        for _ in range(5):
            # Faster than they are sent: only the newest one is.
            source.state += 1
            await trio.sleep(0.01)
        await trio.sleep(0.2)
        assert readers[0].events[1:] == readers[1].events[1:] == [b"id: 2\ndata: a5\n\n"]
        assert readers[2].events[1:] == [b"id: 2\ndata: b5\n\n"]
        # Once for both clients that ask for the same.
        assert sorted(source.encoded) == ["a", "b"]
        await trio.sleep(2.5)
        # Nothing changed, but figures move on.
        assert 4 <= len(readers[0].events) <= 6
        readers[0].gone.set()
        await trio.sleep(0.1)
        assert source.streams.streams == 2
        nursery.cancel_scope.cancel()


async def test_a_stream_without_news_sends_comments(
    autojump_clock: trio.testing.MockClock,
) -> None:
    source, reader = Source(), Reader()
    source.streams = EventStreams(source.encode, refresh=1e9, heartbeat=15)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(source.streams.run)
        nursery.start_soon(source.streams.stream, "a", reader.receive, reader.send)
        await trio.sleep(50)
        assert reader.events[1:] == [b":\n\n"] * 3
        nursery.cancel_scope.cancel()


async def test_a_slow_client_is_cut_and_holds_up_nobody(
    autojump_clock: trio.testing.MockClock,
) -> None:
    source, slow, quick = Source(), Reader(), Reader()
    ended = trio.Event()

    async def stream() -> None:
        await source.streams.stream("a", slow.receive, slow.send)
        ended.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(source.streams.run)
        nursery.start_soon(stream)
        nursery.start_soon(source.streams.stream, "a", quick.receive, quick.send)
        await trio.sleep(0.1)
        slow.reads = False
        for _ in range(16):
            source.state += 1
            await trio.sleep(0.25)
        assert len(quick.events) >= 16
        assert not ended.is_set()
        await trio.sleep(2)
        assert ended.is_set()
        assert len(slow.events) == 1
        assert source.streams.streams == 1
        nursery.cancel_scope.cancel()


async def test_streams_are_limited(autojump_clock: trio.testing.MockClock) -> None:
    source, readers = Source(), [Reader() for _ in range(3)]
    async with trio.open_nursery() as nursery:
        for reader in readers:
            nursery.start_soon(source.streams.stream, "a", reader.receive, reader.send)
        await trio.sleep(0.1)
        one_more = Reader()
        with pytest.raises(Problem) as refused:
            await source.streams.stream("a", one_more.receive, one_more.send)
        assert refused.value.status == 503
        assert not one_more.events
        for reader in readers:
            reader.gone.set()
        await trio.sleep(0.1)
        assert source.streams.streams == 0
        assert not source.streams._feeds


async def test_costly_states_leave_time_to_others(autojump_clock: trio.testing.MockClock) -> None:
    source = Source()

    def encode(query: str) -> tuple[object, bytes]:
        autojump_clock.jump(1.0)
        return source.encode(query)

    source.streams = EventStreams(encode, interval=0.25)
    readers = [Reader() for _ in range(4)]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(source.streams.run)
        for reader, query in zip(readers, "abcd", strict=True):
            nursery.start_soon(source.streams.stream, query, reader.receive, reader.send)
        await trio.sleep(0.1)
        source.encoded.clear()
        begun = trio.current_time()
        await trio.sleep(100)
        assert len(source.encoded) / (trio.current_time() - begun) < 0.4
        nursery.cancel_scope.cancel()


# The server, with clients that misbehave.


# In bytes; a state has about 80,000.
BUFFER = 32768


@asynccontextmanager
async def many_changes(send_timeout: float) -> AsyncGenerator[tuple[Dashboard, int], None]:
    """A dashboard whose streams send more than the system keeps for a client that does not read.

    The system would keep dozens of states, so its buffers are made small.
    """
    model = filled(*(f"{number}-{'x' * 150}" for number in range(200)))

    async def change() -> None:
        for beat in range(101, 10**9):
            model.set_grid(grid(beat), trio.current_time())
            await trio.sleep(0.01)

    async with open_session() as bb, trio.open_nursery() as nursery:
        dashboard = Dashboard(bb, access(), model=model, interval=0.01, send_timeout=3600)
        listener = bind("127.0.0.1", 0)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
        await nursery.start(partial(serve, dashboard, listener, send_timeout=send_timeout))
        nursery.start_soon(dashboard.streams.run)
        nursery.start_soon(change)
        yield dashboard, listener.getsockname()[1]
        nursery.cancel_scope.cancel()


async def ask(port: int, path: str = "/api/v1/events?limit=200") -> trio.SocketStream:
    connection = trio.socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
    await connection.connect(("127.0.0.1", port))
    stream = trio.SocketStream(connection)
    await stream.send_all(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    return stream


@guarded(120)
async def test_a_client_that_falls_behind_gets_whole_states() -> None:
    async with many_changes(send_timeout=60) as (dashboard, port):
        stream, heard = await ask(port), bytearray()

        async def take(end: bytes, size: int = 0) -> bytes:
            """Read so many bytes, and on to some that end them."""
            while (at := heard.find(end, size)) < 0:
                heard.extend(await stream.receive_some(65536))
            found = bytes(heard[:at])
            del heard[: at + len(end)]
            return found

        await take(b"\r\n\r\n")
        numbers: list[int] = []
        beats: list[int] = []
        (feed,) = dashboard.streams._feeds.values()

        def passed(number: int) -> bool:
            return feed.number >= number

        for _ in range(20):
            # The buffers hold less than that many states.
            await until(partial(passed, feed.number + 5))
            event = await take(b"\r\n", int(await take(b"\r\n"), 16))
            found = re.fullmatch(rb"(?:retry: 2000\n)?id: (\d+)\ndata: (.*)\n\n", event)
            assert found is not None
            snapshot = msgspec.json.decode(found[2], type=Snapshot)
            assert len(snapshot.operations.items) == 200
            assert snapshot.grid is not None
            numbers.append(int(found[1]))
            beats.append(snapshot.grid.beat)
        await stream.aclose()
        assert numbers == sorted(set(numbers))
        assert beats == sorted(beats)
        # It missed states, and no client is sent what it missed.
        assert numbers[-1] - numbers[0] > 2 * len(numbers)
        await until(lambda: dashboard.streams.streams == 0)


@guarded(120)
async def test_a_client_that_does_not_read_is_cut_off() -> None:
    async with many_changes(send_timeout=0.5) as (dashboard, port):
        slow, quick = await ask(port), await ask(port)
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def read() -> None:
                while await quick.receive_some():
                    pass

            await until(lambda: dashboard.streams.streams == 2)
            await until(lambda: dashboard.streams.streams == 1)
            nursery.cancel_scope.cancel()
        await slow.aclose()
        await quick.aclose()
        await until(lambda: dashboard.streams.streams == 0)


@guarded(120)
async def test_the_server_ends_while_a_client_does_not_read() -> None:
    # Sends would time out after an hour.
    async with many_changes(send_timeout=3600) as (dashboard, port):
        streams = [await ask(port) for _ in range(20)]
        await until(lambda: dashboard.streams.streams == 20)
        await until(lambda: sum(feed.number for feed in dashboard.streams._feeds.values()) > 50)
        begun = trio.current_time()
    # On an idle machine it takes a few hundredths of a second.
    assert trio.current_time() - begun < 30
    for stream in streams:
        await stream.aclose()


@guarded(120)
async def test_bad_requests_leave_nothing_behind() -> None:
    head = b"POST /api/v1/login HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    async with served(access(token=TOKEN)) as (_, dashboard, port):
        await until(lambda: dashboard.model.grid)
        before = trio.lowlevel.current_statistics().tasks_living

        async def send(data: bytes, more: bytes = b"", times: int = 0) -> bytes:
            """Send what is given, and return the first line of the answer."""
            stream = await trio.open_tcp_stream("127.0.0.1", port)
            answer = b""
            try:
                await stream.send_all(data)
                for _ in range(times):
                    await stream.send_all(more)
                    await trio.sleep(0)
                with trio.move_on_after(30):
                    answer = await stream.receive_some()
            except trio.BrokenResourceError:
                # It was cut off while it still sent.
                pass
            await stream.aclose()
            return answer.partition(b"\r\n")[0].strip()

        chunk = b" " * 65536
        huge = await send(head + b"Content-Length: 1000000000\r\n\r\n", chunk, 300)
        assert huge in (b"HTTP/1.1 413", b"")
        get = b"GET /api/v1/access HTTP/1.1\r\nHost: localhost\r\n"
        body = await send(get + b"Content-Length: 1000000000\r\n\r\n", chunk, 300)
        assert body in (b"HTTP/1.1 200", b"")
        events = b"GET /api/v1/events HTTP/1.1\r\nHost: localhost\r\n"
        assert await send(events + b"Content-Length: 1000000000\r\n\r\n", chunk, 50)
        path = await send(b"GET /api/v1/operations/agent/" + b"x" * LONG + b" HTTP/1.1\r\n\r\n")
        assert path in (b"HTTP/1.1 431", b"HTTP/1.1 400", b"")
        assert await send(b"nonsense\r\n\r\n") == b"HTTP/1.1 400"
        assert await send(b"GET /api/v1/access HTTP/1.1\r\n\r\n") == b"HTTP/1.1 400"
        assert await send(get + b"Host: localhost\r\n\r\n") == b"HTTP/1.1 400"
        socket = b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        key = b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        assert await send(get + socket + key) == b"HTTP/1.1 403"
        traversal = b"GET /static/../../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n"
        assert await send(traversal) == b"HTTP/1.1 404"
        assert await send(get + b"\r\n") == b"HTTP/1.1 200"
        await until(lambda: trio.lowlevel.current_statistics().tasks_living <= before)
        assert dashboard.streams.streams == 0


@guarded(120)
async def test_a_change_comes_on_the_stream() -> None:
    async with served() as (bb, dashboard, port):
        stream = await ask(port, "/api/v1/events?text=watched")
        heard = b""
        async with bb.operation("search", id="watched", beats=5000) as operation:
            while b'"phase":"started"' not in heard:
                heard += await stream.receive_some()
            operation.advance(Phase.EXECUTING)
            while b'"phase":"executing"' not in heard:
                heard += await stream.receive_some()
        while b'"outcome":"done"' not in heard:
            heard += await stream.receive_some()
        assert b"text/event-stream" in heard
        numbers = [int(number) for number in re.findall(rb"^id: (\d+)$", heard, re.MULTILINE)]
        assert numbers == sorted(set(numbers))
        events = [
            msgspec.json.decode(data, type=Snapshot)
            for data in re.findall(rb"^data: (.*}])?$", heard, re.MULTILINE)
        ]
        assert [each.version for each in events] == sorted({each.version for each in events})
        await stream.aclose()
        await until(lambda: dashboard.streams.streams == 0)


@guarded(120)
async def test_a_stream_ends_with_its_login() -> None:
    async with served(access(token=TOKEN, require_token=True)) as (_, dashboard, port):
        await until(lambda: dashboard.model.grid)

        async def listen(header: str) -> trio.SocketStream:
            stream = await trio.open_tcp_stream("127.0.0.1", port)
            request = f"GET /api/v1/events HTTP/1.1\r\nHost: localhost\r\n{header}\r\n\r\n"
            await stream.send_all(request.encode())
            assert (await stream.receive_some()).startswith(b"HTTP/1.1 200")
            return stream

        async with httpx.AsyncClient(base_url=f"http://localhost:{port}") as client:
            login = await client.post("/api/v1/login", json={"token": TOKEN})
            ending = await listen(f"Cookie: {login.headers['set-cookie'].partition(';')[0]}")
            # A program that sends the token itself needs no login.
            lasting = await listen(f"Authorization: {BEARER['Authorization']}")
            await client.post("/api/v1/logout", json={})
        while await ending.receive_some():
            pass
        await trio.sleep(1.5)
        assert dashboard.streams.streams == 1
        await ending.aclose()
        await lasting.aclose()


@guarded(120)
async def test_the_answer_to_head_is_headers_only() -> None:
    async with served() as (_, dashboard, port):
        await until(lambda: dashboard.model.grid)
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        for path in ("/", "/api/v1/grid", "/api/v1/events", "/healthz", "/api/v1/none"):
            request = f"HEAD {path} HTTP/1.1\r\nHost: localhost\r\n\r\n"
            await stream.send_all(request.encode())
        # Nothing follows the headers of one answer but those of the next one.
        heard = b""
        while heard.count(b"\r\n\r\n") < 5:
            heard += await stream.receive_some()
        answers = heard.split(b"\r\n\r\n")
        found = [answer.partition(b"\r\n")[0].strip() for answer in answers]
        assert found == [b"HTTP/1.1 200"] * 4 + [b"HTTP/1.1 404", b""]
        assert b"content-type: text/event-stream" in answers[2]
        await stream.aclose()


async def test_an_address_in_use_is_an_error() -> None:
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(Exception, match=f"cannot listen on 127.0.0.1, port {port}"):
            bind("127.0.0.1", port)
    with pytest.raises(Exception, match="cannot listen on no.such.host.invalid"):
        bind("no.such.host.invalid", 80)
