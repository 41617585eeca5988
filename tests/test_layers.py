"""Imports between folders point downwards only, and what is costly is imported on use."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import backbeat_trio

PACKAGE = Path(backbeat_trio.__file__).parent

# The folders, and the modules beside them, from the ground up.
ORDER = [
    "_version",
    "_errors",
    "_wire",
    "_checks",
    "nats_server",
    "_grid",
    "_config",
    "_time",
    "_transport",
    "_metronome",
    "_runtime",
    "_calls",
    "_session",
    "_views",
    "http",
    "metrics",
    "tracing",
    "serving",
    "testing",
    "_cli",
    "__main__",
]


def modules() -> Iterator[tuple[str, ...]]:
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[-1] != "__init__":
            yield parts


def source(module: tuple[str, ...]) -> str:
    return PACKAGE.joinpath(*module).with_suffix(".py").read_text()


def own_imports(module: tuple[str, ...]) -> set[tuple[str, ...]]:
    """Return the modules of the package that a module imports."""
    found = set()
    for node in ast.walk(ast.parse(source(module))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = (*module[: len(module) - node.level], *(node.module or "").split("."))
            for name in node.names:
                inner = PACKAGE.joinpath(*base, name.name).with_suffix(".py")
                found.add((*base, name.name) if inner.exists() else base)
    # The package itself, which holds the version.
    return found - {("",)}


def foreign_imports(module: tuple[str, ...]) -> set[str]:
    """Return the first names of what a module imports from elsewhere."""
    found = set()
    for node in ast.walk(ast.parse(source(module))):
        if isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module).split(".")[0])
        elif isinstance(node, ast.Import):
            found.update(name.name.split(".")[0] for name in node.names)
    return found


def test_every_module_has_its_place() -> None:
    assert {module[0] for module in modules()} == set(ORDER)
    assert all(len(module) <= 2 for module in modules())


def test_imports_point_downwards() -> None:
    for module in modules():
        for imported in own_imports(module):
            below = ORDER.index(imported[0]) <= ORDER.index(module[0])
            assert below, f"{module} imports {imported}"


def test_there_is_no_circle() -> None:
    tuple(TopologicalSorter({module: own_imports(module) for module in modules()}).static_order())


def test_each_folder_says_what_it_is() -> None:
    for folder in {module[0] for module in modules() if len(module) == 2}:
        text = PACKAGE.joinpath(folder, "__init__.py").read_text()
        assert ast.get_docstring(ast.parse(text)), folder
        assert len(ast.parse(text).body) == 1, folder


def test_the_pure_core_knows_nothing_of_trio() -> None:
    for module in modules():
        if ORDER.index(module[0]) <= ORDER.index("_config") and module[0] not in PURE_NOT:
            foreign = foreign_imports(module)
            assert not foreign & {"trio", "trio_util", "anyio", "asyncio", "nats", "time"}, module


# Errors are also Trio's; a server of one's own is a process that is waited for.
PURE_NOT = {"_errors", "nats_server"}


def test_only_the_connection_knows_asyncio() -> None:
    edge = {("_transport", name) for name in ("nats_client", "nats_loop", "nats_wire", "jetstream")}
    for module in set(modules()) - edge:
        foreign = foreign_imports(module)
        assert not foreign & {"anyio", "nats"}, module
        assert "asyncio" not in foreign or module == ("_transport", "nats_outgoing"), module


def test_only_the_command_line_and_run_start_trio() -> None:
    for module in modules():
        if "trio.run(" in source(module):
            assert module in {("_cli", "main"), ("_session", "run"), ("testing",)}, module


def test_costly_things_are_imported_on_use() -> None:
    code = "import sys, backbeat_trio; print(*sorted(m.split('.')[0] for m in sys.modules))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    costly = {"nats", "anyio", "rich", "asyncio", "click", "pytest", "httpx", "h11"}
    assert not (
        costly | {"prometheus_client", "opentelemetry", "h11", "starlette", "hypercorn"}
    ) & set(loaded)


def test_the_map_of_layers_is_true() -> None:
    named = re.findall(r"^`(\w+)`  ", backbeat_trio.__doc__ or "", re.MULTILINE)
    assert named == [name for name in ORDER if name != "__main__"]
