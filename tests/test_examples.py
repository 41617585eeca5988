"""Every example, and every block of code in the documentation, runs as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import trio
from helpers import CLEAN

from backbeat_trio.testing import NatsServer

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))
README = (ROOT / "README.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


async def run(*command: str, cwd: Path = ROOT, env: dict[str, str] | None = None) -> str:
    with trio.fail_after(120):
        done = await trio.run_process(
            list(command),
            capture_stdout=True,
            stderr=subprocess.STDOUT,
            check=False,
            cwd=cwd,
            env=CLEAN | (env or {}),
        )
    assert done.returncode == 0, done.stdout.decode()
    return done.stdout.decode()


@pytest.mark.parametrize("name", EXAMPLES)
async def test_examples(name: str) -> None:
    output = await run(sys.executable, "-W", "error", str(ROOT / "examples" / name))
    assert output


def test_there_are_the_examples_that_the_readme_names() -> None:
    assert set(re.findall(r"examples/(\w+\.py)", README)) == set(EXAMPLES)


@pytest.mark.parametrize("code", blocks(README, "python"))
async def test_python_of_the_readme(code: str, tmp_path: Path) -> None:
    program = tmp_path / "agent.py"
    program.write_text(code)
    assert "started=True" in await run(sys.executable, "-W", "error", str(program), cwd=tmp_path)


async def test_the_commands_of_the_readme(tmp_path: Path) -> None:
    demo, tests, cluster = blocks(README, "sh")
    # Installing is the job of whoever runs these tests, and the second command is running them.
    assert demo == "pip install '.[server]' && backbeat demo\n"
    assert tests == "pip install nox && nox -s tests\n"
    scripts = str(Path(sys.executable).parent)
    path = {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    # For as few beats as show that it works: the whole of it is tested with the command line.
    output = await run("sh", "-c", f"{demo.strip().partition(' && ')[2]} --beats 6", env=path)
    assert "3 agents" in output
    # The third one with a server of the test's own, as the usual port may be taken.
    agent = tmp_path / "my_agent.py"
    agent.write_text(
        "import trio, backbeat_trio\n"
        "async def main():\n"
        "    async with backbeat_trio.session(require_connection=True) as bb:\n"
        "        print('locked', not bb.health().local_degradation)\n"
        "trio.run(main)\n"
    )
    async with NatsServer(["-js"]) as server:
        lines = cluster.replace("nats://127.0.0.1:4222", server.url).splitlines()
        assert lines[0] == "nats-server -js &"
        assert lines[1] == lines[2]
        assert lines[1].startswith("backbeat pulse ")
        script = "\n".join(
            [
                lines[1].replace("--bpm 120 &", "--bpm 600 2> one & one=$!"),
                "until grep -q leads one; do sleep 0.1; done",
                lines[2].replace("--bpm 120 &", "--bpm 600 2> two & two=$!"),
                "until grep -q locked two; do sleep 0.1; done",
                lines[3],
                "kill $one $two; wait",
            ]
        )
        assert "locked True" in await run("sh", "-c", script, cwd=tmp_path, env=path)


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
        assert done.returncode == 0
        for flag in re.findall(r"--?[a-z][a-z-]*", line.partition("   ")[0]):
            assert flag in done.stdout, (command, flag)


async def test_python_of_the_testing_guide(tmp_path: Path) -> None:
    conftest, *tests = blocks((ROOT / "docs" / "testing.md").read_text(), "python")
    (tmp_path / "conftest.py").write_text(conftest)
    for number, code in enumerate(tests):
        (tmp_path / f"test_guide_{number}.py").write_text(code)
    (tmp_path / "pytest.ini").write_text("[pytest]\ntrio_mode = true\n")
    output = await run(sys.executable, "-m", "pytest", "-q", cwd=tmp_path)
    assert f"{len(tests)} passed" in output


async def test_the_benchmark_runs(tmp_path: Path) -> None:
    # That it measures everything and says so; the figures of a loaded machine mean nothing.
    target = tmp_path / "bench.json"
    program = str(ROOT / "benchmarks" / "bench.py")
    # It has a module beside it.
    safe = {"PYTHONSAFEPATH": ""}
    await run(sys.executable, program, "--quick", "--json", str(target), env=safe)
    rows = msgspec.json.decode(target.read_bytes())["figures"]
    assert len(rows) == 14
    assert all(row["measured"] > 0 for row in rows)
