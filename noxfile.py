"""What is run on the project; ``nox --list`` says what each session does."""

from __future__ import annotations

import os
from pathlib import Path

import nox

PYPROJECT = nox.project.load_toml("pyproject.toml")
PYTHONS = nox.project.python_versions(PYPROJECT)

nox.needs_version = ">=2024.10"
nox.options.sessions = ["tests", "minimal", "oldest", "lint", "types"]
# Also on CI: nox skips a version that is not installed, and still succeeds. So all but `tests` and
# `oldest` run on the Python that runs nox, whatever its version.
nox.options.error_on_missing_interpreters = False
nox.options.error_on_external_run = True


def group(name: str) -> list[str]:
    return list(nox.project.dependency_groups(PYPROJECT, name))


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Run the tests on the built wheel, with branch coverage."""
    session.install(".[server,nkeys,testing]", *group("test"))
    # The wheel is tested, and not what lies in this folder.
    session.env["PYTHONSAFEPATH"] = "1"
    data = Path(session.create_tmp(), "coverage").absolute()
    session.env["COVERAGE_FILE"] = str(data)
    session.run("coverage", "erase")
    # Most tests wait for servers and beats, so a test for each core goes on at a time.
    spread = ["--numprocesses=auto", "--maxprocesses=4", "--dist=worksteal"]
    session.run("coverage", "run", "-m", "pytest", *(session.posargs or spread))
    if not session.posargs:
        session.run("coverage", "combine", "--quiet")
        # What only the random schedules reach is not measured.
        session.run("coverage", "report", "--fail-under=95")


@nox.session
def faults(session: nox.Session) -> None:
    """Try every fault as often as it takes to find what is rare, and print figures and targets."""
    session.install(".[server,nkeys,testing]", *group("test"))
    session.env["PYTHONSAFEPATH"] = "1"
    session.run("python", "-m", "pytest", "tests/test_faults.py", "--faults", *session.posargs)


@nox.session
def minimal(session: nox.Session) -> None:
    """Run what must work on the wheel without any extra."""
    session.install(".")
    session.env["PYTHONSAFEPATH"] = "1"
    session.run("python", "-W", "error", "examples/quickstart.py")
    session.run("backbeat", "demo", "--memory", "--beats", "8")


# On the oldest Python, as there are wheels of the oldest dependencies for it.
@nox.session(python=PYTHONS[0])
def oldest(session: nox.Session) -> None:
    """Run two agents on a server, with the oldest version of each dependency that is allowed."""
    bounds = PYPROJECT["project"]["dependencies"]
    session.install(".[server]", *(each.replace(">=", "==") for each in bounds))
    session.env["PYTHONSAFEPATH"] = "1"
    session.run("python", "-W", "error", "examples/nats_agents.py")


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and format."""
    session.install(*group("lint"))
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")


@nox.session
def types(session: nox.Session) -> None:
    """Check the types, and that all that is public has some."""
    session.install(".[server,nkeys,testing]", *group("test"), *group("types"), "nox")
    session.run("mypy")
    session.run("pyright", "--verifytypes", "backbeat_trio", "--ignoreexternal")
    # What users write must pass there, too.
    session.run("pyright", "examples", "tests/test_newcomer.py")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the site from `docs/`, the docstrings and the help of the commands, into `site/`."""
    session.install(".[health,http,metrics,otel,server,testing]", *group("docs"))
    session.run(
        "sphinx-build", "--fail-on-warning", "--keep-going", "docs", "site", *session.posargs
    )
    session.log("open site/index.html")


@nox.session
def bench(session: nox.Session) -> None:
    """Measure speed, memory, skew and views, and print them beside their targets.

    Arguments are for one of the programs: ``nox -s bench -- skew.py --quick``.
    """
    session.install(".[server,testing,dashboard]", *group("bench"))
    benchmarks = ["bench.py", "skew.py", "models.py", "dashboard.py"]
    programs = [session.posargs] if session.posargs else [[each] for each in benchmarks]
    for program, *arguments in programs:
        session.run("python", os.path.join("benchmarks", program), *arguments)


@nox.session
def simulate(session: nox.Session) -> None:
    """Simulate many agents, and print how well they agree beside the targets."""
    session.install(".", *group("simulate"))
    session.run("python", os.path.join("simulation", "simulate.py"), *session.posargs)


@nox.session
def schedules(session: nox.Session) -> None:
    """Run random schedules of faults in virtual time: ``nox -s schedules -- --count 10000``."""
    session.install(".")
    session.run("python", os.path.join("simulation", "schedules.py"), *session.posargs)
