"""Every block of code in ``docs/`` runs, or is a message of the wire contract."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import msgspec
import pytest
import trio
import trio.testing
from blocks import ROOT, SCRIPTS, blocks, run
from helpers import free_ports, until

import backbeat_trio
from backbeat_trio import BackbeatConfig, OperationCancelled, Request, _wire
from backbeat_trio.testing import NatsServer, open_session

DOCS: Final = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
AGENT: Final = blocks((ROOT / "README.md").read_text(), "python")[0]
MESSAGES: Final = blocks(DOCS["design.md"] + DOCS["wire.md"], "json")
LOOKING, CHECKING, EXAMINING, COMPLETION, CANCELLING, CHANGES = blocks(DOCS["operating.md"], "sh")


def test_no_block_is_left_out() -> None:
    found = {
        (name, language)
        for name, text in DOCS.items()
        for language in re.findall(r"^```(\w+)$", text, re.MULTILINE)
    }
    assert found == {
        ("agents.md", "python"),
        ("ci.md", "python"),
        ("ci.md", "sh"),
        ("design.md", "json"),
        ("tutorial.md", "python"),
        ("tutorial.md", "sh"),
        ("wire.md", "json"),
        ("operating.md", "sh"),
        ("regions.md", "sh"),
        ("security.md", "sh"),
        ("testing.md", "python"),
        # Run by `tests/test_calls_guide.py`.
        ("calls.md", "python"),
        # Run by `tests/session/test_run.py`.
        ("operating.md", "python"),
        # Run by `tests/session/test_web_server.py`.
        ("web.md", "python"),
        ("web.md", "sh"),
        # Run by `tests/test_observability_guide.py`.
        ("observability.md", "python"),
        ("observability.md", "yaml"),
    }
    # Run by `tests/cli/test_completion.py`.
    assert "_BACKBEAT_COMPLETE" in COMPLETION
    assert len(blocks(DOCS["regions.md"], "sh")) == 1


def test_every_page_is_in_the_index() -> None:
    trees = re.findall(r"^```{toctree}\n(.*?)^```", DOCS["index.md"], re.DOTALL | re.MULTILINE)
    pages = [
        f"{line}.md" for tree in trees for line in tree.splitlines() if not line.startswith(":")
    ]
    assert sorted([*pages, "index.md"]) == sorted(DOCS)


def test_every_public_name_is_on_the_page_of_the_api() -> None:
    directives = re.findall(
        r"^\.\. auto(?:function|class|exception):: (\w+)", DOCS["api.md"], re.MULTILINE
    )
    public = [
        name
        for name, value in vars(backbeat_trio).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    ]
    assert sorted(directives) == sorted(public)


def test_every_setting_is_in_a_table() -> None:
    fields = {field.name: field for field in msgspec.structs.fields(BackbeatConfig)}
    rows = re.findall(
        r"^\| `CHORUS_BACKBEAT_(\w+)` \| (?:`(.*?)`)?", DOCS["operating.md"], re.MULTILINE
    )
    table = {name.lower(): default for name, default in rows}
    _, _, logins = DOCS["security.md"].partition("`CHORUS_BACKBEAT_...` |")
    for line in logins.partition("\n\n")[0].splitlines():
        names = re.findall(r"`(\w+)`", line.partition("| `--")[0])
        table |= {name: "" for name in names if name not in table}
    assert set(table) == set(fields)
    for name, default in table.items():
        # What has no default by itself is described in words.
        if default and "<" not in default:
            env = {f"CHORUS_BACKBEAT_{name.upper()}": default}
            assert getattr(BackbeatConfig.from_env(env), name) == fields[name].default, name


def structs() -> Iterator[type[msgspec.Struct]]:
    for found in vars(_wire).values():
        if isinstance(found, type) and issubclass(found, msgspec.Struct):
            yield found


@pytest.mark.parametrize("block", MESSAGES)
def test_messages_of_the_wire_contract(block: str) -> None:
    plain = msgspec.json.decode(block)
    again: list[Any] = []
    for kind in structs():
        try:
            message = msgspec.json.decode(block, type=kind)
        except msgspec.ValidationError:
            continue
        again.append(msgspec.json.decode(msgspec.json.encode(message)))
    # To the letter, with no field more and none less.
    assert plain in again


async def test_python_of_the_testing_guide(tmp_path: Path) -> None:
    conftest, *tests = blocks(DOCS["testing.md"], "python")
    (tmp_path / "conftest.py").write_text(conftest)
    for number, code in enumerate(tests):
        (tmp_path / f"test_guide_{number}.py").write_text(code)
    (tmp_path / "pytest.ini").write_text("[pytest]\ntrio_mode = true\n")
    output = await run(sys.executable, "-m", "pytest", "-q", cwd=tmp_path)
    assert f"{len(tests)} passed" in output


async def test_the_changes_of_the_operating_guide(tmp_path: Path) -> None:
    shown, tempo, ramp, pause, resume = CHANGES.splitlines()
    async with NatsServer(["-js"]) as server:
        script = "\n".join(
            [
                "backbeat pulse --bpm 600 2> log & pulse=$!",
                "until grep -q leads log; do sleep 0.1; done",
                "set -e",
                shown,
                tempo,
                ramp,
                pause,
                # As the guide says, it is refused until the pause has begun.
                f"until {resume}; do sleep 0.5; done",
                "kill $pulse",
            ]
        )
        env = SCRIPTS | {"CHORUS_BACKBEAT_NATS_URL": server.url}
        await run("sh", "-c", script, cwd=tmp_path, env=env)


async def test_the_tutorial(tmp_path: Path) -> None:
    first, tempo, claims, test = blocks(DOCS["tutorial.md"], "python")
    install, memory, cluster, changes, resume = blocks(DOCS["tutorial.md"], "sh")
    assert install == "pip install '.[server]'\n"
    for name, program in {
        "first": first,
        "tempo": tempo,
        "claims": claims,
        "test_it": test,
    }.items():
        (tmp_path / f"{name}.py").write_text(program)
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["backbeat_trio.testing"]\n')
    (tmp_path / "pytest.ini").write_text("[pytest]\ntrio_mode = true\n")
    (port,) = free_ports(1)
    script = "\n".join(
        [
            # Also if it takes too long, and is terminated.
            "trap 'kill $server $a $b 2> /dev/null' EXIT; trap 'exit 1' TERM",
            "set -e",
            memory,
            "python tempo.py",
            "python claims.py",
            # The usual port may be taken.
            cluster.replace("-a 127.0.0.1 &", f"-a 127.0.0.1 -p {port} 2> nats.log &\nserver=$!")
            .replace(":4222", f":{port}")
            .replace(
                "pulse-a &",
                "pulse-a 2> a.log &\na=$!\nuntil grep -q leads a.log; do sleep 0.1; done",
            )
            .replace(
                "pulse-b &",
                "pulse-b 2> b.log &\nb=$!\nuntil grep -q stand b.log; do sleep 0.1; done",
            ),
            "python first.py",
            changes,
            f"until {resume.strip()}; do sleep 0.5; done",
            "python -m pytest -q",
        ]
    )
    output = await run("sh", "-c", script, cwd=tmp_path, env=SCRIPTS)
    assert output.count("cancelled after three beats: True") == 2
    assert (seconds := re.search(r"six beats took (\d\.\d) s", output))
    # It would be 3 s without the change of tempo, and is 4 s or more with it.
    assert float(seconds[1]) > 3.5
    assert "search-1: executing, 2 beats left" in output
    assert "search-1: completed, 0 beats left" in output
    assert re.search(r"healthy: this session follows the beats of pulse-[ab]", output)
    assert "1 passed" in output


def defined(name: str, index: int) -> dict[str, Any]:
    """Return what a block of Python of a page defines."""
    names: dict[str, Any] = {}
    exec(blocks(DOCS[name], "python")[index], names)
    return names


async def test_the_budgets_of_ai_agents(autojump_clock: trio.testing.MockClock) -> None:
    run_task = defined("agents.md", 0)["run_task"]
    next_step = defined("agents.md", 1)["next_step"]
    use_tool = defined("agents.md", 2)["use_tool"]
    prompts: list[str] = []

    async def ask_model(prompt: str) -> str:
        prompts.append(prompt)
        return "search"

    async def search(request: Request) -> bytes:
        return request.data + b"!"

    async with (
        open_session(tempo_bpm=2.0) as bb,
        bb.open_service("tools", version="1.0.0") as service,
        trio.open_nursery() as nursery,
    ):
        await nursery.start(service.serve, "tools.search", search)

        async def research(notes: list[bytes]) -> None:
            await bb.sleep(5)
            await next_step(bb, ask_model, ["Find out what it costs."])
            notes.append(await use_tool(bb, b"price"))
            await trio.sleep_forever()

        async def write_report(
            notes: list[bytes], *, complete: bool
        ) -> tuple[list[bytes], bool, int]:
            return notes, complete, bb.current_beat()

        assert await run_task(bb, research, write_report) == ([b"price!"], False, 9)
        nursery.cancel_scope.cancel()
    assert "4 beats left, about 2 minutes at 2 BPM. If that" in prompts[0]


async def test_one_factor_for_a_slow_ci(tmp_path: Path) -> None:
    (test,) = blocks(DOCS["ci.md"], "python")
    twice, command = blocks(DOCS["ci.md"], "sh")
    fixture = """
import pytest, trio

class Server:
    async def ping(self):
        return "pong"

@pytest.fixture
def start_server():
    async def start():
        await trio.sleep(1.5)  # more than two beats at 120 BPM
        return Server()
    return start

"""
    (tmp_path / "test_ci.py").write_text(fixture + test)
    (tmp_path / "pytest.ini").write_text("[pytest]\ntrio_mode = true\n")
    fast, slow = twice.splitlines()
    script = f"{fast} | tail -1; set -e; {slow}; {command}"
    output = await run("sh", "-c", script, cwd=tmp_path, env=SCRIPTS)
    assert re.search(r"1 failed.*1 passed.*built", output, re.DOTALL)


async def test_the_command_that_cancels_an_operation() -> None:
    async with NatsServer() as server:
        options: Any = {"nats_url": server.url, "cluster_id": "chorus-production"}
        async with open_session(agent_id="chorus-agent-42", lock_timeout=0.0, **options) as bb:
            await until(lambda: bb.health().connected)
            with pytest.raises(OperationCancelled) as caught:
                async with bb.operation("election", id="election-leader-2025", cancellable=True):
                    env = SCRIPTS | {"CHORUS_BACKBEAT_NATS_URL": server.url}
                    await run("sh", "-ec", CANCELLING, env=env)
                    await trio.sleep(60)
    assert caught.value.reason == "the disk is full"


async def test_the_commands_that_look_at_the_cluster(tmp_path: Path) -> None:
    async with NatsServer(["-js"]) as server:
        options: Any = {"nats_url": server.url, "cluster_id": "chorus-production"}
        env = SCRIPTS | {"CHORUS_BACKBEAT_NATS_URL": server.url}
        pulse = "backbeat pulse --bpm 600 2> log & pulse=$!"
        async with (
            open_session(agent_id="chorus-agent-42", serve_info=True, **options) as bb,
            bb.operation("election", id="election-leader-2025", beats=100_000),
        ):
            # Without a second metronome the check ends with a warning.
            check = "\n".join(f"{line} || test $? = 1" for line in CHECKING.splitlines())
            lines = [
                pulse,
                "trap 'kill $pulse' EXIT",
                "until grep -q leads log; do sleep 0.1; done",
            ]
            lines += ["set -e", LOOKING, check, EXAMINING, "cat backbeat.prom"]
            output = await run("sh", "-c", "\n".join(lines), cwd=tmp_path, env=env)
    assert "election-leader-2025" in output
    assert "\n0 failed, " in output
    assert 'backbeat_check_leader{cluster="chorus-production"} 1' in output


async def test_the_command_of_the_guide_to_regions() -> None:
    (command,) = blocks(DOCS["regions.md"], "sh")
    # Of so few agents, for so short a time, some figure may be beyond its target.
    small = f"{command.strip()} --agents 6 --seconds 40 --jobs 1 || test $? = 1"
    env = SCRIPTS | {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": ""}
    assert "two agents of two regions" in await run("sh", "-c", small, env=env)


async def test_the_steps_to_a_secured_cluster(tmp_path: Path) -> None:
    examples = tmp_path / "examples"
    examples.mkdir()
    shutil.copy(ROOT / "examples" / "nats-server.conf", examples)
    (tmp_path / "my_agent.py").write_text(AGENT)
    folder, certificates, passwords, server, metronome, agent, operator, nkey = blocks(
        DOCS["security.md"].partition("## Roles")[0], "sh"
    )
    assert server.endswith(") &\n")
    assert metronome.endswith("backbeat pulse --bpm 120 --id pulse-a &\n")
    # The usual port may be taken.
    (port,) = free_ports(1)
    script = "\n".join(
        [
            folder,
            certificates,
            passwords,
            server.replace("-a 127.0.0.1", f"-a 127.0.0.1 -p {port}").replace(
                ") &\n", ") 2> server.log & server=$!"
            ),
            "until grep -q 'Server is ready' server.log; do sleep 0.1; done",
            metronome.removesuffix("&\n") + "2> pulse.log & pulse=$!",
            "until grep -q leads pulse.log; do sleep 0.1; done",
            "openssl verify -x509_strict -CAfile ca.pem server.pem",
            "set -e",
            agent,
            operator,
            nkey,
            "kill $pulse; wait $pulse || kill $server",
            "wait; cat server.log",
        ]
    ).replace("localhost:4222", f"localhost:{port}")
    home = {"HOME": str(tmp_path)}
    output = await run("sh", "-c", script, cwd=tmp_path, env=SCRIPTS | home)
    assert "server.pem: OK" in output
    assert re.search(r"beat \d+ led by pulse-a$", output, re.MULTILINE)
    assert re.search(r"^U[A-Z0-9]{55}$", output, re.MULTILINE)
    assert "Violation" not in output
    for secret in (tmp_path / "grid").glob("*.password"):
        assert secret.stat().st_mode & 0o077 == 0
        assert secret.read_text().strip() not in (tmp_path / "grid" / "server.env").read_text()
