from __future__ import annotations

import os
import signal

import coverage
import pytest
from hypothesis import settings

pytest_plugins = ["backbeat_trio.testing", "pytester"]

# Deadlines of hypothesis are seconds of a real clock, which a loaded machine makes meaningless.
settings.register_profile("default", deadline=None)
settings.register_profile("thorough", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("backbeat")
    group.addoption("--faults", action="store_true", help="the faults as often as they should be")
    group.addoption(
        "--figures",
        metavar="FILE",
        help="where the figures of the faults go (--faults: benchmarks/results/faults.json)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "again(times): with --faults, run it so many times")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell has what it runs in the background ignore Ctrl-C, and so would every program that
        # a test starts.
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    mark = metafunc.definition.get_closest_marker("again")
    if mark is not None and metafunc.config.getoption("--faults"):
        metafunc.fixturenames.append("_round")
        metafunc.parametrize("_round", range(*mark.args))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    # The workers of pytest-xdist end without running what is registered with `atexit`, by which
    # coverage saves what it has measured.
    measured = coverage.Coverage.current()
    if measured is not None and hasattr(session.config, "workerinput"):
        measured.stop()
        measured.save()
