"""Blocks of code in the documents, and how they are run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import trio
from helpers import CLEAN

ROOT: Final = Path(__file__).parent.parent.parent
SCRIPTS: Final = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
"""The variable by which a shell finds ``backbeat``, ``nats-server`` and ``python``."""


def blocks(text: str, language: str) -> list[str]:
    """Return the blocks of one language in a Markdown document, in their order."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


async def run(*command: str, cwd: Path = ROOT, env: Mapping[str, str] | None = None) -> str:
    """Run a program to its end, and return what it printed; it must succeed."""
    with trio.fail_after(300):
        done = await trio.run_process(
            list(command),
            capture_stdout=True,
            stderr=subprocess.STDOUT,
            check=False,
            cwd=cwd,
            env=CLEAN | dict(env or {}),
        )
    assert done.returncode == 0, done.stdout.decode()
    return done.stdout.decode()
