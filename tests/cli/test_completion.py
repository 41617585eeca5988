"""Completion in a shell: commands, options and values."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import CLEAN, backbeat

ROOT = Path(__file__).parent.parent.parent
SHELLS = ("bash", "zsh", "fish")


async def completions(shell: str, *words: str, env: dict[str, str] | None = None) -> list[str]:
    """Return what a shell would offer for the last word."""
    asked = {
        "_BACKBEAT_COMPLETE": f"{shell}_complete",
        "COMP_WORDS": " ".join(("backbeat", *words)),
        "COMP_CWORD": words[-1] if shell == "fish" else str(len(words)),
    }
    done = await backbeat(env=asked | (env or {}))
    assert (done.returncode, done.stderr) == (0, b"")
    lines = done.stdout.decode().splitlines()
    if shell == "zsh":
        # Kind, value and help, each on a line.
        return lines[1::3]
    return [line.partition(",")[2].partition("\t")[0] for line in lines]


@pytest.mark.parametrize("shell", SHELLS)
async def test_commands_and_options_are_completed(shell: str) -> None:
    assert await completions(shell, "st") == ["status"]
    assert set(await completions(shell, "status", "--ti")) == {"--timeout"}
    assert {"--beats", "--kill-after", "--server"} <= set(await completions(shell, "exec", "--"))


async def test_values_are_completed(tmp_path: Path) -> None:
    folder = tmp_path / "nats" / "context"
    folder.mkdir(parents=True)
    for name in ("grid", "great", "other"):
        (folder / f"{name}.json").write_text(json.dumps({"url": "nats://x"}))
    env = {"XDG_CONFIG_HOME": str(tmp_path)}
    assert await completions("bash", "status", "--context", "gr", env=env) == ["great", "grid"]
    assert "USR1" in await completions("bash", "exec", "--signal", "usr")
    assert await completions("bash", "help", "pa") == ["pause"]
    assert await completions("bash", "ls", "me") == ["metronomes"]
    assert await completions("bash", "check", "--warn", "la") == ["lateness=", "late="]


@pytest.mark.parametrize("shell", SHELLS)
async def test_each_shell_gets_a_script(shell: str) -> None:
    done = await backbeat(env={"_BACKBEAT_COMPLETE": f"{shell}_source"})
    assert done.returncode == 0
    assert b"_BACKBEAT_COMPLETE=" + shell.encode() + b"_complete" in done.stdout


def test_the_commands_of_the_guide_turn_it_on(tmp_path: Path) -> None:
    guide = (ROOT / "docs" / "operating.md").read_text()
    (block,) = re.findall(r"^## Completion\n.*?^```sh\n(.*?)^```", guide, re.DOTALL | re.MULTILINE)
    program = tmp_path / "backbeat"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m backbeat_trio "$@"\n')
    program.chmod(0o755)
    env = CLEAN | {"PATH": f"{tmp_path}:{CLEAN['PATH']}", "HOME": str(tmp_path)}
    subprocess.run(["sh", "-ec", block], check=True, timeout=60, env=env)
    assert "zsh_source" in (tmp_path / ".zshrc").read_text()
    fish = tmp_path / ".config" / "fish" / "completions" / "backbeat.fish"
    assert "complete --no-files --command backbeat" in fish.read_text()
    # What a shell does when the tab key is pressed.
    typed = (
        ". ~/.bashrc\n"
        "COMP_WORDS=(backbeat pa); COMP_CWORD=1\n"
        "_backbeat_completion backbeat pa backbeat\n"
        'echo "${COMPREPLY[@]}"\n'
        "complete -p backbeat\n"
    )
    done = subprocess.run(
        ["bash", "-c", typed], check=True, capture_output=True, text=True, timeout=60, env=env
    )
    completed, registered = done.stdout.splitlines()
    assert completed == "pause"
    assert registered.endswith("-F _backbeat_completion backbeat")


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_fish_reads_its_script() -> None:
    script = subprocess.run(
        [sys.executable, "-m", "backbeat_trio"],
        check=True,
        capture_output=True,
        timeout=60,
        env=CLEAN | {"_BACKBEAT_COMPLETE": "fish_source"},
    ).stdout
    subprocess.run(["fish", "--no-execute"], input=script, check=True, timeout=60)
