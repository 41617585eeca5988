"""Every block of code in ``docs/`` runs, or is a message of the wire contract."""

from __future__ import annotations

import configparser
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
import trio
from blocks import ROOT, SCRIPTS, blocks, run
from helpers import free_ports, until

from backbeat_trio import BackbeatConfig, OperationCancelled, _wire
from backbeat_trio.testing import NatsServer, open_session

DOCS: Final = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
AGENT: Final = blocks((ROOT / "README.md").read_text(), "python")[0]
MESSAGES: Final = blocks(DOCS["design.md"], "json")
COMPLETION, CANCELLING, CHANGES = blocks(DOCS["operating.md"], "sh")


def test_no_block_is_left_out() -> None:
    found = {
        (name, language)
        for name, text in DOCS.items()
        for language in re.findall(r"^```(\w+)$", text, re.MULTILINE)
    }
    assert found == {
        ("design.md", "json"),
        ("operating.md", "ini"),
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
    }
    # Run by `tests/cli/test_completion.py`.
    assert "_BACKBEAT_COMPLETE" in COMPLETION
    assert len(blocks(DOCS["regions.md"], "sh")) == 1


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


async def test_the_unit_and_the_changes_of_the_operating_guide(tmp_path: Path) -> None:
    (text,) = blocks(DOCS["operating.md"], "ini")
    unit = configparser.ConfigParser()
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string(text.replace("%", "%%"))
    command = unit["Service"]["ExecStart"].replace("%l", "host")
    assert command.startswith("/opt/backbeat/bin/backbeat pulse --bpm 120 ")
    command = command.removeprefix("/opt/backbeat/bin/").replace("--bpm 120", "--bpm 600")
    shown, tempo, ramp, pause, resume = CHANGES.splitlines()
    async with NatsServer(["-js"]) as server:
        script = "\n".join(
            [
                f"{command} 2> log & pulse=$!",
                "until grep -q leads log; do sleep 0.1; done",
                "set -e",
                shown,
                tempo,
                ramp,
                pause,
                # As the guide says, it is refused until the pause has begun.
                f"until {resume}; do sleep 0.5; done",
                "set +e",
                "kill $pulse; wait $pulse; echo ended with $?",
            ]
        )
        env = SCRIPTS | {"CHORUS_BACKBEAT_NATS_URL": server.url}
        output = await run("sh", "-c", script, cwd=tmp_path, env=env)
    assert f"ended with {unit['Service']['SuccessExitStatus']}" in output


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
