"""Imports point downwards only, and what is costly is imported on use."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import backbeat_trio

PACKAGE = Path(backbeat_trio.__file__).parent

LAYERS = {
    "_errors": 0,
    "_wire": 0,
    "_timeline": 1,
    "_steering": 1,
    "_drift": 1,
    "_grid": 1,
    "_follower": 1,
    "_tempo": 1,
    "_operations": 1,
    "_config": 1,
    "server": 1,
    "_clock": 2,
    "_transport": 2,
    "_ledger": 2,
    "_nats": 3,
    "_nats_client": 3,
    "_services": 3,
    "_health": 3,
    "_listener": 3,
    "_emitter": 3,
    "_jetstream": 3,
    "_leader": 3,
    "_standby": 3,
    "_metronome": 3,
    "_session": 4,
    "_lifecycle": 4,
    "testing": 5,
    "_demo": 6,
    "_cli": 6,
    "__main__": 6,
}
# Within a layer, who may import whom.
BESIDE = {
    ("_config", "_timeline"),
    ("_transport", "_clock"),
    ("_nats", "_nats_client"),
    ("_tempo", "_timeline"),
    ("_grid", "_steering"),
    ("_grid", "_timeline"),
    ("_follower", "_drift"),
    ("_follower", "_grid"),
    ("_follower", "_steering"),
    ("_follower", "_timeline"),
    ("_listener", "_services"),
    ("_emitter", "_services"),
    ("_jetstream", "_nats"),
    ("_standby", "_leader"),
    ("_standby", "_listener"),
    ("_metronome", "_leader"),
    ("_metronome", "_listener"),
    ("_metronome", "_standby"),
    ("_lifecycle", "_session"),
    ("_cli", "_demo"),
    ("__main__", "_cli"),
}
PURE = {
    *("_wire", "_timeline", "_steering", "_drift", "_grid", "_follower", "_tempo", "_operations"),
    "_config",
}


def imports(module: str) -> tuple[set[str], set[str]]:
    """Return the modules of the package that a module imports, and the names from elsewhere."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    own, foreign = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            own.add(node.module or "")
        elif isinstance(node, ast.ImportFrom):
            foreign.add(str(node.module).split(".")[0])
        elif isinstance(node, ast.Import):
            foreign.update(name.name.split(".")[0] for name in node.names)
    return own, foreign


def test_every_module_has_its_layer() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == {*LAYERS, "__init__"}


def test_imports_point_downwards() -> None:
    for module, layer in LAYERS.items():
        for name in imports(module)[0]:
            assert LAYERS[name] < layer or (module, name) in BESIDE, f"{module} imports {name}"


def test_the_pure_core_knows_nothing_of_trio() -> None:
    for module in PURE:
        foreign = imports(module)[1]
        assert not foreign & {"trio", "trio_util", "anyio", "asyncio", "nats", "time"}, module


def test_only_one_module_knows_asyncio() -> None:
    for module in LAYERS:
        if module not in {"_nats_client", "_jetstream"}:
            assert not imports(module)[1] & {"asyncio", "anyio", "nats"}, module


def test_only_the_command_line_runs_trio() -> None:
    for module in LAYERS:
        text = (PACKAGE / f"{module}.py").read_text()
        assert ("trio.run(" in text) <= (module in {"_cli", "testing"}), module


def test_costly_things_are_imported_on_use() -> None:
    code = "import sys, backbeat_trio; print(*sorted(m.split('.')[0] for m in sys.modules))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"nats", "anyio", "rich", "asyncio", "argparse", "pytest"} & set(loaded)


def test_the_map_of_layers_is_true() -> None:
    documentation = backbeat_trio.__doc__ or ""
    for module, layer in LAYERS.items():
        (line,) = [line for line in documentation.splitlines() if f"`{module}`" in line]
        assert line.startswith(f"{layer} ")
