"""``backbeat status``: the health of a connection to the cluster."""

from __future__ import annotations

import argparse
from typing import Any

import msgspec

from .._session.lifecycle import session
from .._wire import encode
from .connection import settings


async def show_status(options: argparse.Namespace) -> int:
    """Show the health of a session; return 1 where it is degraded."""
    async with session(settings(options)) as bb:
        await bb.sleep(options.wait)
        health = bb.health()
    values = msgspec.to_builtins(health)
    if options.json:
        print(encode(values).decode(), flush=True)
    else:
        from rich.console import Console
        from rich.table import Table

        table = Table(box=None, show_header=False)
        for name, value in values.items():
            table.add_row(name, _shown(name, value))
        Console().print(table)
    return 1 if health.local_degradation else 0


def _shown(name: str, value: Any) -> str:
    if name == "uncertainty" and value is not None:
        return f"{value * 1e3:.3g} ms"
    if name == "current_tempo":
        return f"{value:g} BPM"
    if name == "pending":
        changes = (f"{change['tempo_bpm']:g} BPM on beat {change['beat']}" for change in value)
        return ", ".join(changes)
    return ", ".join(value) if isinstance(value, tuple) else str(value)
