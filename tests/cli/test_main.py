"""The arguments, and how a command is run."""

from __future__ import annotations

import signal

import pytest

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
