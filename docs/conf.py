"""How ``nox -s docs`` builds the site: Sphinx, with the theme Furo and pages in Markdown."""

from __future__ import annotations

from collections.abc import Iterator

import click
from sphinx.application import Sphinx

import backbeat_trio
from backbeat_trio._cli.main import cli

project = "backbeat-trio"
release = version = backbeat_trio.__version__
copyright = "the authors of backbeat-trio"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = project
html_copy_source = False
html_show_sphinx = False
myst_heading_anchors = 3

# The name in single quotes of a docstring is a link if the page of the API has it.
default_role = "py:obj"
autodoc_member_order = "bysource"
# The `Attributes:` of a docstring, and not a second time each attribute.
napoleon_use_ivar = True


def _helps() -> Iterator[str]:
    with click.Context(cli, info_name="backbeat", terminal_width=80) as parent:
        yield f"## backbeat\n\n```text\n{cli.get_help(parent)}\n```\n"
        for name in cli.list_commands(parent):
            _, command, _ = cli.resolve_command(parent, [name])
            assert command is not None
            with click.Context(command, info_name=name, parent=parent, terminal_width=80) as child:
                yield f"## backbeat {name}\n\n```text\n{command.get_help(child)}\n```\n"


def _add_helps(app: Sphinx, name: str, source: list[str]) -> None:
    if name == "cli":
        source[0] += "\n" + "\n".join(_helps())


def setup(app: Sphinx) -> None:
    """Append the help of each command to the page of the command line."""
    app.connect("source-read", _add_helps)
