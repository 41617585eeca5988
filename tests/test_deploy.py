"""The files in ``examples/deploy`` start programs that exist; the package names its licenses."""

from __future__ import annotations

import configparser
import re
import shlex
import tomllib
from pathlib import Path, PurePosixPath
from typing import Any, Final

import pytest
import yaml
from blocks import ROOT

from backbeat_trio._cli.main import cli

DEPLOY: Final = ROOT / "examples" / "deploy"
PROJECT: Final = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: Final = PROJECT["optional-dependencies"]


def check_command(name: str, *arguments: str) -> None:
    """Raise if `backbeat` does not take these arguments."""
    with cli.make_context("backbeat", [name, *arguments]) as ctx:
        _, command, rest = cli.resolve_command(ctx, [name, *arguments])
        assert command is not None
        with command.make_context(name, rest, parent=ctx):
            pass


def unit(path: Path) -> configparser.ConfigParser:
    found = configparser.ConfigParser(interpolation=None)
    found.optionxform = str  # type: ignore[assignment, method-assign]
    found.read_string(path.read_text())
    return found


def test_the_page_names_every_file() -> None:
    page = (ROOT / "docs" / "deploy.md").read_text()
    linked = set(re.findall(r"\(\.\./examples/deploy/([^)]*)\)", page))
    assert linked == {path.name for path in DEPLOY.iterdir()}


def test_the_package_names_the_licenses_of_all_that_is_in_it() -> None:
    inside = {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "backbeat_trio").rglob("*LICENSE*")
    }
    assert inside
    assert set(PROJECT["license-files"]) == {"LICENSE"} | inside


@pytest.mark.parametrize("path", sorted(DEPLOY.glob("*.service")), ids=lambda path: path.name)
def test_units(path: Path) -> None:
    service = unit(path)["Service"]
    assert service["SuccessExitStatus"] == "143"
    # The host's name, and the folder of credentials.
    command = service["ExecStart"].replace("%l", "host").replace("${CREDENTIALS_DIRECTORY}", "/run")
    program, *arguments = shlex.split(command)
    if program.endswith("/backbeat"):
        check_command(*arguments)


def test_containers() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    for service in services.values():
        assert set(service.get("depends_on", ())) <= set(services)
        if service["image"] == "backbeat":
            assert (ROOT / service["build"]["dockerfile"]).samefile(DEPLOY / "Dockerfile")
            check_command(*service["command"])
    # Nothing is reachable from other machines.
    ports = [port for service in services.values() for port in service.get("ports", ())]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_the_image_has_extras_that_exist() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    (extras,) = re.findall(r"\[([\w,]+)\]", text)
    assert set(extras.split(",")) <= set(EXTRAS)


def test_the_image_gets_what_the_package_is_made_of_and_no_more() -> None:
    lines = re.findall(r"^COPY (.*)$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    copied = {source for line in lines for source in line.split()[:-1]}
    assert copied == {"pyproject.toml", "README.md", "LICENSE", "backbeat_trio"}


def test_kubernetes() -> None:
    documents = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    found: dict[str, Any] = {document["kind"]: document for document in documents}
    deployment, budget = found["Deployment"]["spec"], found["PodDisruptionBudget"]["spec"]
    template = deployment["template"]
    assert deployment["selector"]["matchLabels"] == template["metadata"]["labels"]
    assert budget["selector"] == deployment["selector"]
    assert deployment["replicas"] == 3
    # While nodes are drained, one leads and one stands by.
    assert budget["minAvailable"] == 2
    (container,) = template["spec"]["containers"]
    assert container["envFrom"] == [
        {"configMapRef": {"name": found["ConfigMap"]["metadata"]["name"]}}
    ]
    # It logs in to the server of the example.
    server = (ROOT / "examples" / "nats-server.conf").read_text()
    settings = found["ConfigMap"]["data"]
    user = re.escape(settings["CHORUS_BACKBEAT_USER"])
    assert re.search(rf"user: {user}, password: \S+, permissions: \$METRONOME", server)
    assert f'"{settings["CHORUS_BACKBEAT_INBOX_PREFIX"]}.>"' in server
    authority = PurePosixPath(settings["CHORUS_BACKBEAT_TLS_CA"])
    (mount,) = container["volumeMounts"]
    (volume,) = template["spec"]["volumes"]
    assert mount["name"] == volume["name"]
    assert authority.parent == PurePosixPath(mount["mountPath"])
    assert authority.name in {item["path"] for item in volume["secret"]["items"]}
    check_command(*(argument.replace("$(POD_NAME)", "pulse-1") for argument in container["args"]))
    address = container["args"][container["args"].index("--probes") + 1]
    (port,) = container["ports"]
    assert address == f"0.0.0.0:{port['containerPort']}"
    probes = {name: container[f"{name}Probe"]["httpGet"] for name in ("liveness", "readiness")}
    assert {probe["port"] for probe in probes.values()} == {port["name"]}
    assert probes["liveness"]["path"] == "/healthz"
    assert probes["readiness"]["path"] == "/readyz"
