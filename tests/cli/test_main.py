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

import backbeat_trio
from backbeat_trio.__main__ import main
from backbeat_trio._cli import main as cli

from .programs import parsed


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
        ["watch", "--interval", "0"],
        ["watch", "--wait", "-1"],
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
        ["tempo", "--at-beat", "8"],
        ["tempo", "--over", "8"],
        ["claims", "--count", "-1"],
        ["claims", "--since", "yesterday"],
        ["cancel", "agent", "operation"],
        ["cancel", "agent", "--reason", "x"],
        ["cancel", "a.b", "operation", "--reason", "x"],
        ["cancel", "*", "operation", "--reason", "x"],
        ["cancel", "agent", "", "--reason", "x"],
        ["cancel", "agent", "x" * 1001, "--reason", "x"],
        ["cancel", "agent", "operation", "--reason", ""],
        ["cancel", "agent", "operation", "--reason", "x" * 1001],
        ["cancel", "agent", "operation", "--reason", "\udcff"],
        ["demo", "--beats", "-1"],
        ["help", "dance"],
        ["help", "tempo", "pause"],
        ["dance"],
        ["--bogus"],
    ],
)
def test_arguments_that_are_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(arguments) == 2
    out, err = capsys.readouterr()
    assert not out
    usage, error = err.splitlines()
    assert usage.startswith("Usage: backbeat")
    assert error.startswith("backbeat")


def test_an_unknown_option_is_refused_by_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["status", "--bogus"]) == 2
    usage, error = capsys.readouterr().err.splitlines()
    assert usage == "Usage: backbeat status [OPTIONS]"
    assert error.startswith("backbeat status: ")
    assert "--bogus" in error
    assert error.endswith(" Try 'backbeat status --help'.")


def test_the_usage_above_an_error_is_one_line_also_on_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    assert cli.run(["exec", "true"]) == 2
    usage, error = capsys.readouterr().err.splitlines()
    assert usage == "Usage: backbeat exec --beats N [OPTIONS] -- COMMAND [ARGS]..."
    assert "--beats" in error


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"backbeat {backbeat_trio.__version__}\n"


def test_without_a_command_the_help_is_shown_and_the_exit_status_is_that_of_an_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.run([]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert cli.run(["--help"]) == cli.run(["help"]) == 0
    assert capsys.readouterr().out == 2 * err


@pytest.mark.parametrize("command", sorted(cli.cli.commands))
def test_help_of_each_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["help", command]) == 0
    by_command = capsys.readouterr().out
    assert by_command.startswith(f"Usage: backbeat {command} ")
    assert cli.run([command, "--help"]) == cli.run([command, "-h"]) == 0
    assert capsys.readouterr().out == 2 * by_command


@pytest.mark.parametrize("command", sorted(cli.cli.commands))
def test_help_fits_a_terminal_of_40_columns(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert cli.run([command, "--help"]) == cli.run(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    # No name of a variable is broken.
    assert [line for line in lines if len(line) > 40 and " " in line.strip()] == []


def test_each_command_of_the_list_is_the_one_of_that_name() -> None:
    root = cli.cli.make_context("backbeat", ["help"])
    for name in cli.cli.commands:
        found = cli.cli.resolve_command(root, [name])[1]
        assert found is not None
        assert (found.name, found.callback is None) == (name, False)


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
        *("backbeat_trio._cli", "click", "backbeat_trio._cli.status"),
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
            *("status", "-h"),
        ],
        capture_output=True,
        check=True,
        timeout=60,
        env=CLEAN | {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"},
    )
    assert done.stdout.startswith(b"Usage: ")


def test_ctrl_c_outside_of_a_run_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(arguments: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run", interrupted)
    assert main() == 128 + signal.SIGINT


def test_arguments_that_are_taken() -> None:
    assert parsed("claims", "*").params["agent"] == "*"
    assert parsed("tempo", "60", "--at-beat", str(2**53)).params["at_beat"] == 2**53
    assert parsed("pulse", "--beats-per-bar", "1000000").params["beats_per_bar"] == 1_000_000
    assert parsed("status", "--timeout", "1.5m").params["timeout"] == 90.0
    assert parsed("exec", "--beats", "2", "--signal", "9", "x").params["number"] == signal.SIGKILL
    assert parsed("exec", "--beats", "2", "-s", "sigint", "x").params["number"] == signal.SIGINT
    assert parsed("exec", "--beats", "2", "-k", "3", "x").params["kill_after"] == 3.0
    assert parsed("exec", "--beats", "2", "--", "x", "-s").params["argv"] == ("x", "-s")
    # Options after the command are the command's.
    assert parsed("exec", "--beats", "2", "x", "-s", "--help").params["argv"] == (
        "x",
        "-s",
        "--help",
    )


def test_a_program_of_the_same_name_gets_the_whole_package(tmp_path: Path) -> None:
    program = tmp_path / "backbeat"
    program.write_text(
        "import sys, backbeat_trio\n"
        "assert 'trio' not in sys.modules\n"
        "from backbeat_trio import testing\n"
        "assert not hasattr(backbeat_trio, 'nonsense')\n"
        "assert backbeat_trio.session.__module__ == 'backbeat_trio._session.lifecycle'\n"
        "from backbeat_trio import Session as first\n"
        "assert first is backbeat_trio.Session\n"
        "print(backbeat_trio.__version__)\n"
    )
    done = subprocess.run(
        [sys.executable, str(program)],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env=CLEAN,
    )
    assert (done.stdout, done.stderr) == (f"{backbeat_trio.__version__}\n", "")


def test_the_version_is_told_without_importing_trio() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "backbeat_trio", "--version"],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
        env=CLEAN,
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "click" in imported
    assert not imported & {"trio", "msgspec", "rich", "nats", "backbeat_trio._wire"}
