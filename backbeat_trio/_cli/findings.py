"""What ``backbeat doctor`` finds: one line a step, and what to do about it."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable
from typing import Final, Literal, TypeAlias

import click
import msgspec

Verdict: TypeAlias = Literal["ok", "warning", "failed", "not tried"]

_COLOURS: Final = {"ok": "green", "warning": "yellow", "failed": "red", "not tried": "cyan"}
_VERDICT_WIDTH: Final = 9
_NAME_WIDTH: Final = 20


class Finding(msgspec.Struct, frozen=True):
    """The result of one step.

    Attributes:
      step: what it belongs to, such as ``"connection"``.
      name: what was tried.
      verdict: ``"ok"``, ``"warning"``, ``"failed"`` or ``"not tried"``.
      text: what was found.
      mend: what to do about it, in one sentence; empty if there is nothing to do.

    """

    step: str
    name: str
    verdict: Verdict
    text: str
    mend: str = ""


Say: TypeAlias = Callable[[Finding], object]


class Diagnosis(msgspec.Struct, frozen=True):
    """All that was found.

    Attributes:
      ok: whether nothing failed.
      cluster_id: the cluster.
      findings: the results in the order in which they were found.

    """

    ok: bool
    cluster_id: str
    findings: tuple[Finding, ...]


class Printer:
    """Writes findings for people as they come, under a title for each step."""

    def __init__(self) -> None:
        self._step = ""
        terminal = sys.stdout is not None and sys.stdout.isatty()
        self._width = click.get_current_context().terminal_width if terminal else None

    def say(self, finding: Finding) -> None:
        """Write a finding, and what to do about it."""
        if finding.step != self._step:
            click.echo(f"{'' if not self._step else chr(10)}{finding.step}:")
            self._step = finding.step
        verdict = click.style(finding.verdict.ljust(_VERDICT_WIDTH), fg=_COLOURS[finding.verdict])
        head = f"  {' ' * _VERDICT_WIDTH}  {finding.name.ljust(_NAME_WIDTH)}  "
        lines = self._wrapped(finding.text, head)
        click.echo(f"  {verdict}{lines[0][2 + _VERDICT_WIDTH :]}")
        for line in lines[1:]:
            click.echo(line)
        if finding.mend:
            indent = " " * (2 + _VERDICT_WIDTH + 2)
            for line in self._wrapped(finding.mend, f"{indent}To mend: ", indent=indent):
                click.echo(line)

    def _wrapped(self, text: str, head: str, indent: str | None = None) -> list[str]:
        if self._width is None:
            return [f"{head}{text}"]
        narrow = self._width < len(head) + _NAME_WIDTH
        return textwrap.wrap(
            text,
            max(self._width, _NAME_WIDTH),
            initial_indent=head,
            subsequent_indent=" " * (4 if narrow else len(head)) if indent is None else indent,
            break_on_hyphens=False,
        ) or [head]
