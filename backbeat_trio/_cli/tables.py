"""Tables and trees for people: rich at a terminal, and plain whole lines everywhere else."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from .._views.shown import AgentView, OperationNode, OperationView, clean

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.tree import Tree

# A width at which no line is broken or cut.
_UNLIMITED: Final = 1_000_000
_STYLES: Final = {
    "on_time": "green",
    "slow": "yellow",
    "late": "red",
    "silent": "magenta",
    "done": "dim",
    "failed": "red",
    "executing": "green",
    "waiting": "dim",
    "unknown": "dim",
}

T = TypeVar("T")


def show(renderable: RenderableType) -> None:
    """Write what rich makes of something to stdout, without colours unless that is a terminal."""
    from rich.console import Console

    terminal = sys.stdout is not None and sys.stdout.isatty()
    text = io.StringIO()
    console = Console(
        file=text,
        force_terminal=terminal,
        no_color=bool(os.environ.get("NO_COLOR")) or None,
        width=None if terminal else _UNLIMITED,
        # Nothing of what is shown is interpreted.
        markup=False,
        emoji=False,
        highlight=False,
    )
    console.print(renderable)
    lines = text.getvalue().splitlines()
    click.echo("\n".join(lines if terminal else map(str.rstrip, lines)))


def show_table(columns: Sequence[tuple[str, Callable[[T], str]]], rows: Sequence[T]) -> None:
    """Write a table.

    Args:
      columns: the title of each column, and what gives its text for a row. The text may come from
        anybody.
      rows: the rows.

    """
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title, _ in columns:
        table.add_column(title, no_wrap=True, overflow="ellipsis")
    for row in rows:
        texts = [clean(text(row)) for _, text in columns]
        table.add_row(*(Text(each, _STYLES.get(each, "")) for each in texts))
    show(table)


def format_budget(operation: OperationView) -> str:
    """Write how many beats of its estimate an operation has used."""
    at_least = "\N{GREATER-THAN OR EQUAL TO}" if operation.at_least else ""
    if operation.estimated is None:
        return f"{at_least}{operation.passed}"
    return f"{at_least}{operation.passed}/{operation.estimated}"


def format_used(operation: OperationView) -> str:
    """Write how much of its estimate an operation has used."""
    return "" if operation.used is None else f"{operation.used:.0%}"


OPERATIONS: Final[Sequence[tuple[str, Callable[[OperationView], str]]]] = (
    ("AGENT", lambda each: each.agent_id),
    ("OPERATION", lambda each: each.id),
    ("TYPE", lambda each: each.type),
    ("PHASE", lambda each: each.phase),
    ("TIMING", lambda each: each.timing),
    ("BEATS", format_budget),
    ("USED", format_used),
    ("PEERS", lambda each: "" if each.peers is None else str(each.peers)),
    ("LAST", lambda each: str(each.last_beat)),
)

AGENTS: Final[Sequence[tuple[str, Callable[[AgentView], str]]]] = (
    ("AGENT", lambda each: each.agent_id),
    ("STATE", lambda each: each.state),
    ("LIVE", lambda each: str(each.live)),
    ("SLOW", lambda each: str(each.slow)),
    ("LATE", lambda each: str(each.late)),
    ("SILENT", lambda each: str(each.silent_operations)),
    ("LAST", lambda each: str(each.last_beat) if each.last_beat >= 0 else ""),
    ("NOTES", lambda each: each.notes),
)


def show_trees(nodes: Sequence[OperationNode], chosen: Callable[[OperationView], bool]) -> None:
    """Draw operations with their parts.

    Args:
      nodes: the outermost operations.
      chosen: tells whether an operation is the one that was asked for, which is marked.

    """
    for node in nodes:
        show(_tree(node, chosen))


def _tree(node: OperationNode, chosen: Callable[[OperationView], bool]) -> Tree:
    from rich.tree import Tree

    root: Tree | None = None
    # Not by recursion: a chain of parts may be long.
    waiting: list[tuple[OperationNode, Any]] = [(node, None)]
    while waiting:
        each, above = waiting.pop()
        label = _label(each, chosen)
        drawn = Tree(label) if above is None else above.add(label)
        root = root or drawn
        waiting += [(child, drawn) for child in reversed(each.children)]
        if each.omitted:
            drawn.add(f"{each.omitted} more")
    assert root is not None
    return root


def _label(node: OperationNode, chosen: Callable[[OperationView], bool]) -> Any:
    from rich.text import Text

    operation = node.operation
    text = Text(no_wrap=True, overflow="ellipsis")
    if operation is None:
        return text.append(f"{clean(node.name)} (not heard)", "dim")
    marked = chosen(operation)
    text.append(clean(node.name), "bold" if marked else "")
    text.append(f"  {clean(operation.type)}  {clean(operation.phase)}  ")
    text.append(f"{operation.timing}  ", _STYLES[operation.timing])
    text.append(f"{format_budget(operation)} beats")
    if operation.used is not None:
        text.append(f", {format_used(operation)}")
    return text.append("  <--") if marked else text


def show_fields(fields: Sequence[tuple[str, str]]) -> None:
    """Write names with their values, a line each. The values may come from anybody."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for title, value in fields:
        value = clean(value)
        table.add_row(Text(title, "bold"), Text(value, _STYLES.get(value, "")))
    show(table)
