"""Every example, and every block of code and command of the README, runs as it stands."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import bench
import models
import msgspec
import picture
import pytest
import trio
from blocks import SCRIPTS, blocks, run
from helpers import free_ports

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))
README = (ROOT / "README.md").read_text()
(AGENT,) = blocks(README, "python")
DEMO, NOX, ALONE, CLUSTER = blocks(README, "sh")


@pytest.mark.parametrize("name", EXAMPLES)
async def test_examples(name: str) -> None:
    output = await run(sys.executable, "-W", "error", str(ROOT / "examples" / name))
    assert output


def test_there_are_the_examples_that_the_readme_names() -> None:
    assert set(re.findall(r"examples/(\w+\.py)", README)) == set(EXAMPLES)


def test_every_file_that_the_documents_link_to_exists() -> None:
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?://)([^)#]+)", document.read_text()):
            assert (document.parent / target).exists(), (document.name, target)


async def test_the_two_commands_of_the_readme() -> None:
    # Installing is the job of whoever runs these tests, and the second command is running them.
    assert DEMO == "pip install '.[server]' && backbeat demo\n"
    assert NOX == "pip install nox && nox -s tests\n"
    # For as few beats as show that it works: the whole of it is tested with the command line.
    output = await run("sh", "-c", f"{DEMO.strip().partition(' && ')[2]} --beats 6", env=SCRIPTS)
    assert "3 agents" in output


async def test_the_picture_of_the_demonstration_is_current() -> None:
    # `python tests/helpers/picture.py` makes it anew. In fewer beats than the usual ones the change
    # of the tempo may not take effect.
    made = await trio.to_thread.run_sync(picture.make_picture)
    assert picture.outline(made) == picture.outline(picture.PICTURE.read_text())
    assert "http" not in made.replace("http://www.w3.org/", "").replace("https://www.textua", "")


async def test_the_agent_of_the_readme_without_a_server(tmp_path: Path) -> None:
    (tmp_path / "my_agent.py").write_text(AGENT)
    command = ALONE.replace("python ", f"{shlex.quote(sys.executable)} -W error ")
    assert re.search(r"beat \d+ led by ", await run("sh", "-c", command, cwd=tmp_path))


async def test_the_agent_of_the_readme_on_a_server(tmp_path: Path) -> None:
    (tmp_path / "my_agent.py").write_text(AGENT)
    server, first, second, agent = CLUSTER.splitlines()
    assert server == "nats-server -js -a 127.0.0.1 &"
    assert first == second
    # The usual port may be taken, and the beats of the README last too long for a test.
    (port,) = free_ports(1)
    script = "\n".join(
        [
            f"{server.removesuffix(' &')} -p {port} -sd store 2> server & server=$!",
            "until grep -q 'Server is ready' server; do sleep 0.1; done",
            first.replace("--bpm 120 &", "--bpm 600 2> one & one=$!"),
            "until grep -q leads one; do sleep 0.1; done",
            second.replace("--bpm 120 &", "--bpm 600 2> two & two=$!"),
            "until grep -q locked two; do sleep 0.1; done",
            agent.replace("python ", f"{shlex.quote(sys.executable)} -W error "),
            "kill $one $two; wait $one $two; kill $server; wait",
        ]
    ).replace("127.0.0.1:4222", f"127.0.0.1:{port}")
    # Nobody but a metronome of the cluster has a name like this.
    leader = r"beat \d+ led by (?!None)\S+"
    assert re.search(leader, await run("sh", "-c", script, cwd=tmp_path, env=SCRIPTS))


def test_every_command_of_the_readme_exists() -> None:
    (text,) = blocks(README, "text")
    for line in text.splitlines():
        command = line.split()[1]
        done = subprocess.run(
            [sys.executable, "-m", "backbeat_trio", command, "--help"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (command, done.stderr)


@pytest.mark.parametrize("benchmark", [bench, models])
async def test_the_benchmark_runs(benchmark: Any, tmp_path: Path) -> None:
    # That it measures everything and says so; the figures of a loaded machine mean nothing.
    target = tmp_path / "bench.json"
    program = str(Path(benchmark.__file__))
    # It has a module beside it.
    safe = {"PYTHONSAFEPATH": ""}
    await run(sys.executable, program, "--quick", "--json", str(target), env=safe)
    rows = msgspec.json.decode(target.read_bytes())["figures"]
    assert len(rows) == len(benchmark.TARGETS)
    assert all(row["measured"] > 0 for row in rows)
