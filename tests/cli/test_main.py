"""The arguments, and how a command is run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from helpers import CLEAN

from backbeat_trio.__main__ import main
from backbeat_trio._cli import main as cli


@pytest.mark.parametrize(
    "arguments",
    [
        ["pulse", "--bpm", "0"],
        ["pulse", "--bpm", "nan"],
        ["pulse", "--bpm", "fast"],
        ["pulse", "--id", "a.b"],
        ["pulse", "--beats-per-bar", "0"],
        ["pulse", "--beats-per-bar", "1000001"],
        ["pulse", "--replicas", "0"],
        ["pulse", "--replicas", "6"],
        ["pause", "--at-beat", str(2**53 + 1)],
        ["tempo", "60", "--at-beat", "9" * 5000],
        ["tempo", "60", "--over", str(2**53 + 1)],
        ["tempo", "6001"],
        ["tempo", "60", "--at-beat", "-1"],
        ["status", "--timeout", "soon"],
        ["status", "--timeout", "0s"],
        ["status", "--timeout", "0"],
        ["status", "--timeout", "9" * 400],
        ["status", "--wait", "nan"],
        ["status", "--cluster-id", "a b"],
        ["claims", "a.b"],
        ["exec", "--beats", "-1", "true"],
        ["exec", "--beats", "1", "--signal", "NONE", "true"],
        ["exec", "--beats", "1e17", "true"],
        ["exec", "--beats", "1", "--kill-after", "1e17", "true"],
        ["exec", "--beats", "1", "--signal", "999", "true"],
        ["exec", "--beats", "1", "--id", "", "true"],
        ["exec", "--beats", "1", "--id", "x" * 1001, "true"],
        ["exec", "--beats", "1", "--id", "\udcff", "true"],
        ["exec", "true"],
        [],
        ["dance"],
    ],
)
def test_arguments_that_are_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.run(arguments)
    assert caught.value.code == 2
    assert "backbeat" in capsys.readouterr().err


def test_an_unknown_option_is_refused_by_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.run(["status", "--bogus"])
    told = capsys.readouterr().err
    assert told.startswith("usage: backbeat status ")
    assert told.endswith("backbeat status: error: unrecognized arguments: --bogus\n")


INTERRUPT = """
import os, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
"""
SCRIPT = shutil.which("backbeat", path=sysconfig.get_path("scripts"))


@pytest.mark.parametrize(
    "module",
    [
        *("backbeat_trio._config", "msgspec", "trio", "backbeat_trio._session.session"),
        *("backbeat_trio._cli", "argparse", "backbeat_trio._cli.exec"),
    ],
)
@pytest.mark.parametrize(
    "program",
    [
        pytest.param([sys.executable, "-m", "backbeat_trio"], id="module"),
        pytest.param(
            [sys.executable, str(SCRIPT)],
            id="script",
            marks=pytest.mark.skipif(SCRIPT is None, reason="the package is not installed"),
        ),
    ],
)
def test_ctrl_c_while_it_is_imported_is_no_error(
    module: str, program: list[str], tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(INTERRUPT.format(module=module))
    done = subprocess.run(
        [*program, "status", "--help"],
        capture_output=True,
        check=False,
        timeout=60,
        env=CLEAN | {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"},
    )
    assert done.returncode in (-signal.SIGINT, 128 + signal.SIGINT)
    assert (done.stdout, done.stderr) == (b"", b"")


def test_ctrl_c_while_others_import_the_package_is_theirs(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(INTERRUPT.format(module="msgspec"))
    code = (
        "import signal\n"
        "try: import backbeat_trio\n"
        "except KeyboardInterrupt: print('theirs')\n"
        "import backbeat_trio\n"
        "print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        check=True,
        text=True,
        timeout=60,
        env=CLEAN | {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"},
    )
    assert done.stdout == "theirs\nTrue\n"


def test_ctrl_c_is_ignored_while_it_is_imported_where_it_was_ignored(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(INTERRUPT.format(module="msgspec"))
    done = subprocess.run(
        [
            "sh",
            "-c",
            """trap '' INT; exec "$@" """,
            "sh",
            sys.executable,
            "-m",
            "backbeat_trio",
            "-h",
        ],
        capture_output=True,
        check=True,
        timeout=60,
        env=CLEAN | {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"},
    )
    assert done.stdout.startswith(b"usage: ")


def test_ctrl_c_outside_of_a_run_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(arguments: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run", interrupted)
    assert main() == 128 + signal.SIGINT


def test_arguments_that_are_taken() -> None:
    parse = cli._parser().parse_args
    assert parse(["claims", "*"]).agent_id == "*"
    assert parse(["tempo", "60", "--at-beat", str(2**53)]).at_beat == 2**53
    assert parse(["pulse", "--beats-per-bar", "1000000"]).beats_per_bar == 1_000_000
    assert parse(["status", "--timeout", "1.5m"]).timeout == 90.0
    assert parse(["exec", "--beats", "2", "--signal", "9", "x"]).signal == signal.SIGKILL
    assert parse(["exec", "--beats", "2", "--", "x", "-s"]).argv[-2:] == ["x", "-s"]
