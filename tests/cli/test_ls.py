"""``backbeat ls``, ``get`` and ``tree``: what is listed, for people and for programs."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from helpers import backbeat, until

from backbeat_trio import Session, TransportBroken
from backbeat_trio._cli import main as cli
from backbeat_trio._cli.listening import complain, listen, seconds_to_listen
from backbeat_trio.testing import NatsServer, open_session

from .programs import Done, cluster, invoked
from .test_output import at_a_terminal

CLUSTER = "chorus-production"
# An escape sequence, markup of rich, an override of the direction, a line break and a lone tab.
HOSTILE = "evil\x1b[2J\x1b]0;owned\x07[red]x[/red]\N{RIGHT-TO-LEFT OVERRIDE}\n\tend"
UNSAFE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@asynccontextmanager
async def agent(url: str, name: str, **fields: Any) -> AsyncGenerator[Session, None]:
    options: dict[str, Any] = {"cluster_id": CLUSTER, "lock_timeout": 30.0} | fields
    async with open_session(nats_url=url, agent_id=name, **options) as bb:
        yield bb


def listed(output: str) -> dict[str, dict[str, Any]]:
    """Return what an array of JSON lists, by ids."""
    return {each.get("id") or each["agent_id"]: each for each in json.loads(output)}


async def test_operations_are_listed_filtered_and_sorted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with cluster(bpm=240) as url, agent(url, "one") as one, agent(url, "two") as two:
        one.start_operation("election", id="early", beats=10_000)
        one.start_operation("dht_store", id="late", beats=1)
        two.start_operation("election", id=HOSTILE, beats=100_000)
        await one.sleep(3)

        async def ls(*options: str) -> dict[str, dict[str, Any]]:
            done = await invoked(capsys, "ls", "operations", "-j", "-s", url, *options)
            assert done.status == 0, done.err
            return listed(done.out)

        async def ls_until(expected: list[str], *options: str) -> dict[str, dict[str, Any]]:
            # On a busy machine agents skip beats, and a claim may come after the listening.
            found: dict[str, dict[str, Any]] = {}
            with trio.fail_after(60):
                while list(found)[:2] != expected:
                    found = await ls(*options)
            return found

        found = await ls_until(["late", "early"], "--wait", "4")
        assert found["late"]["timing"] == "late"
        assert found["early"]["timing"] == "on_time"
        assert found["early"]["history"]
        (hostile,) = [id for id in found if id not in ("late", "early")]
        assert not UNSAFE.search(hostile)
        await ls_until(["late"], "--late")
        await ls_until(["early"], "--agent", "one", "--type", "election")
        await ls_until(["early"], "--sort", "id", "--limit", "1")
        assert list(await ls("--failed")) == []
        done = await invoked(capsys, "ls", "operations", "-s", url, "--since", "1h")
        assert (done.status, done.out) == (1, "")
        assert done.err == "backbeat: the server has no JetStream, so it stores no claims\n"
        # For people: a line each, without anything that a terminal would obey, in any encoding.
        where = ("ls", "operations", "-s", url, "--wait", "4")
        env = {"COLUMNS": "20", "PYTHONIOENCODING": "latin-1"}
        text = (await backbeat(*where, env=env)).stdout.decode("latin-1")
        assert not UNSAFE.search(text)
        head, *lines = text.splitlines()
        assert head.split()[:3] == ["AGENT", "OPERATION", "TYPE"]
        assert sum("[red]x[/red]" in line for line in lines) == 1
        assert len(lines) == 3
        status, shown = await at_a_terminal(*where, columns=50)
        assert status == 0
        plain = re.sub("\x1b\\[[0-9;]*m", "", shown)
        assert not UNSAFE.search(plain)
        assert max(map(len, plain.splitlines())) <= 50


async def test_one_operation_and_one_agent(capsys: pytest.CaptureFixture[str]) -> None:
    async with cluster(bpm=60) as url, agent(url, "one") as one:
        one.start_operation("crawl", id="a/b", beats=10_000)
        one.start_operation("crawl", id="late", beats=1)
        where = ("-s", url)
        done = await invoked(capsys, "get", "one", "a/b", "-j", *where)
        assert done.status == 0, done.err
        operation = json.loads(done.out)
        assert (operation["type"], operation["estimated"]) == ("crawl", 10_000)
        done = await invoked(capsys, "get", "one", "a/b", *where)
        fields = dict(re.split(r"  +", line, maxsplit=1) for line in done.out.splitlines())
        assert fields["type"] == "crawl"
        assert re.fullmatch(r"\d+/10000 \d%", fields["beats"])
        assert fields["history"].endswith(": started")
        done = await invoked(capsys, "get", "one", "-j", *where)
        details = json.loads(done.out)
        assert details["agent"]["live"] == 2
        assert {each["id"] for each in details["operations"]} == {"a/b", "late"}
        assert details["metadata"][0]["agent_id"] == "one"
        done = await invoked(capsys, "get", "one", *where)
        assert re.search("^agent +one$", done.out, re.MULTILINE)
        assert re.search("^a/b +crawl +started", done.out, re.MULTILINE)
        # Its budget has run out while the commands before listened.
        done = await invoked(capsys, "get", "one", "late", "-j", *where)
        assert json.loads(done.out)["timing"] == "late"
        for arguments in (("one", "other"), ("nobody",), ("nobody", "a/b")):
            done = await invoked(capsys, "get", *arguments, *where)
            assert (done.status, done.out) == (1, "")
            assert "backbeat: no claim " in done.err


async def test_the_tree_of_parts(capsys: pytest.CaptureFixture[str]) -> None:
    async with cluster(bpm=60) as url, agent(url, "one") as one, agent(url, "two") as two:
        two.start_operation("other", id="leaf", beats=10_000)
        headers: dict[str, str] = {}
        async with one.operation("crawl", id="root", beats=10_000):
            one.inject(headers)
            with two.extract(headers):
                async with two.operation("step", id=HOSTILE, beats=10_000):
                    two.inject(headers)
                    with one.extract(headers):
                        one.start_operation("fetch", id="leaf", beats=10_000)
                    done = await invoked(capsys, "tree", "one/leaf", "-j", "-s", url)
                    (tree,) = json.loads(done.out)
                    assert tree["name"] == "one/root"
                    (step,) = tree["children"]
                    assert [each["name"] for each in step["children"]] == ["one/leaf"]
                    done = await invoked(capsys, "tree", "leaf", "-s", url)
                    assert not UNSAFE.search(done.out)
                    roots = [line for line in done.out.splitlines() if line[0] in "ot"]
                    assert [line.split()[0] for line in roots] == ["one/root", "two/leaf"]
                    assert done.out.count("<--") == 2
                    assert sum("[red]x[/red]" in line for line in done.out.splitlines()) == 1
                    # By its id, and by what is shown of it.
                    done = await invoked(capsys, "get", "two", HOSTILE, "-j", "-s", url)
                    shown = json.loads(done.out)["id"]
                    assert not UNSAFE.search(shown)
                    done = await invoked(capsys, "get", "two", shown, "-s", url)
                    assert (done.status, bool(UNSAFE.search(done.out))) == (0, False)
        done = await invoked(capsys, "tree", "nowhere", "-s", url)
        assert (done.status, done.out) == (1, "")
        assert done.err.endswith("backbeat: no claim of an operation 'nowhere' came\n")


async def test_agents_metronomes_and_services(capsys: pytest.CaptureFixture[str]) -> None:
    async with (
        cluster(bpm=240) as url,
        agent(url, "busy", serve_info=True) as busy,
        agent(url, "resting", serve_info=True, health_beats=0),
        agent(url, "foreign", serve_info=True, cluster_id="other", lock_timeout=0.0),
        busy.open_service("pages", version="1.2.0", metadata={"evil": HOSTILE}),
    ):
        busy.start_operation("election", beats=10_000)

        async def ls(*options: str) -> Done:
            done = await invoked(capsys, "ls", *options, "-s", url)
            assert done.status == 0, done.err
            return done

        found: dict[str, dict[str, Any]] = {}
        while len(found) < 2 or not found["busy"]["live"]:
            # On a busy machine an answer may come after the others have been counted.
            found = listed((await ls("agents", "-j")).out)
        assert list(found) == ["busy", "resting"]
        # It publishes nothing, and answers when it is asked.
        assert found["resting"]["healthy"] is None
        assert (await ls("agents")).out.splitlines()[1].split()[0] == "busy"
        (metronome,) = json.loads((await ls("metronomes", "-j")).out)
        assert (metronome["leader_id"], metronome["role"]) == ("pulse-a", "leader")
        assert metronome["cluster_id"] == CLUSTER
        done = await ls("metronomes", "--cluster-id", "other")
        assert done.out.splitlines() == ["METRONOME  ROLE  EPOCH  VERSION  INSTANCE"]
        names: list[str] = []
        while len(names) < 5:
            names = [each["name"] for each in json.loads((await ls("services", "-j")).out)]
        assert names == [*3 * ["backbeat-agent"], "backbeat-metronome", "pages"]
        done = await ls("services", "--limit", "2")
        assert not UNSAFE.search(done.out)
        assert len(done.out.splitlines()) == 3
        assert re.fullmatch(r"backbeat: \d more are left out; see --limit\n", done.err)
        assert not UNSAFE.search((await ls("services")).out)


async def test_stored_claims_show_what_has_ended(capsys: pytest.CaptureFixture[str]) -> None:
    async with NatsServer(["-js"]) as server:
        options: dict[str, Any] = {"health_beats": 0, "lock_timeout": 0.0, "tempo_bpm": 6000}
        async with agent(server.url, "one", **options) as bb:
            await until(lambda: bb.health().connected)
            bb.start_operation("election", id="done", beats=4).complete()
            bb.start_operation("election", id="failed", beats=4).fail("no votes")
            await until(lambda: bb.statistics().claims_stored == 2)
        where = ("-s", server.url, "--timeout", "300ms", "--since", "1h", "--wait", "0")
        done = await invoked(capsys, "ls", "operations", "-j", *where)
        assert {id: each["outcome"] for id, each in listed(done.out).items()} == {
            "done": "done",
            "failed": "failed",
        }
        assert "no metronome is heard" in done.err
        done = await invoked(capsys, "ls", "operations", "-j", "--failed", *where)
        assert list(listed(done.out)) == ["failed"]
        done = await invoked(capsys, "get", "one", "failed", *where)
        assert "no votes" in done.out


@pytest.mark.parametrize(
    "arguments",
    [
        ["ls"],
        ["ls", "dances"],
        ["ls", "operations", "--late", "--silent"],
        ["ls", "operations", "--limit", "-1"],
        ["ls", "operations", "--sort", "beauty"],
        ["ls", "operations", "--agent", "a.b"],
        ["ls", "agents", "--failed"],
        ["ls", "agents", "--type", "x"],
        ["ls", "agents", "--since", "1h"],
        ["ls", "metronomes", "--late"],
        ["ls", "services", "--wait", "1"],
        ["get"],
        ["get", "a.b"],
        ["get", "a", ""],
        ["tree"],
        ["tree", "x" * 1001],
    ],
)
def test_arguments_that_are_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(arguments) == 2
    out, err = capsys.readouterr()
    assert not out
    assert len(err.splitlines()) == 2


async def test_without_a_server_or_a_permission_the_reason_is_given(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = """
    authorization { users: [
      { user: u, password: p,
        permissions: { subscribe: ["_INBOX.>", "backbeat.beat.*"], publish: ["backbeat.sync.*"] } }
    ] }
    """
    async with NatsServer(config=config) as server:
        login = ("-s", server.url, "--user", "u", "--password", "p", "--timeout", "300ms")
        for command in (("ls", "operations"), ("tree", "x"), ("ls", "services")):
            done = await invoked(capsys, *command, *login, "--cluster-id", "empty")
            assert (done.status, done.out) == (1, "")
            assert "permission denied" in done.err
    for command in (("ls", "operations"), ("ls", "metronomes"), ("get", "x"), ("tree", "x")):
        done = await invoked(capsys, *command, "-s", server.url, "--timeout", "300ms")
        assert (done.status, done.out) == (1, "")
        assert done.err.startswith("backbeat: no connection to ")


async def test_a_connection_that_was_lost_is_no_empty_cluster() -> None:
    with trio.fail_after(60):
        async with (
            NatsServer() as server,
            open_session(nats_url=server.url, lock_timeout=0.0) as bb,
        ):
            await until(lambda: bb.health().connected)
            complain(await listen(bb, wait=0.0))
            server.kill()
            await until(lambda: not bb.health().connected)
            heard = await listen(bb, wait=0.0)
            with pytest.raises(TransportBroken, match="the connection was lost meanwhile: "):
                complain(heard)


async def test_how_long_it_listens(autojump_clock: trio.testing.MockClock) -> None:
    async with open_session(tempo_bpm=120.0) as bb:
        health = bb.health()
        assert seconds_to_listen(health, None) == 1.25 * 0.5 + 0.25
        assert seconds_to_listen(health, None, 2) == 2.25 * 0.5 + 0.25
        assert seconds_to_listen(health, 1000.0) == 500.0
        await bb.set_tempo(0.1)
        await bb.downbeats().__anext__()
        assert seconds_to_listen(bb.health(), None) == 50.0
        await bb.pause()
        await trio.sleep(1200)
        assert seconds_to_listen(bb.health(), None) == 1.0
        assert seconds_to_listen(bb.health(), 0.0) == 0.0
