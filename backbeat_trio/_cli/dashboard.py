"""``backbeat dashboard``: a page that shows the cluster, in a browser."""

from __future__ import annotations

import ipaddress
import os
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import click
import trio

from .._errors import BackbeatError, ConfigError
from .._session.lifecycle import session
from .connection import ConnectedCommand, Connection, settings, takes_connection
from .parameters import duration

_TOKEN: Final = "BACKBEAT_DASHBOARD_TOKEN"
_ANY_ADDRESS: Final = ("", "0.0.0.0", "::")  # noqa: S104 - the user asks for it


@click.command("dashboard", cls=ConnectedCommand)
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="The name or address to listen on."
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8080,
    show_default=True,
    help="The port; 0 is any free one.",
)
@click.option(
    "--token-file",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="File with the token for changing the tempo, pausing and cancelling. By default "
    f"{_TOKEN} has it; without a token the dashboard only shows.",
)
@click.option("--require-token", is_flag=True, help="Reading needs the token, too.")
@click.option(
    "--allow-host",
    multiple=True,
    metavar="NAME",
    help="Another name by which browsers may reach it; may be repeated.",
)
@click.option(
    "--interval",
    type=duration,
    default="250ms",
    show_default=True,
    metavar="250ms",
    help="Time between two updates of the page.",
)
@takes_connection()
async def run_dashboard(
    connection: Connection,
    host: str,
    port: int,
    token_file: str | None,
    require_token: bool,
    allow_host: tuple[str, ...],
    interval: float,
) -> int:
    """Show the cluster in a browser, until Ctrl-C.

    Only programs on this machine reach it, unless --host says otherwise. Changing the tempo,
    pausing, and cancelling operations need a token.
    """
    try:
        from .._views.access import Access
        from .._views.dashboard import serve_dashboard
        from .._views.server import bind
    except ModuleNotFoundError as error:
        raise BackbeatError(
            f"{error.name} is missing: pip install 'backbeat-trio[dashboard]'"
        ) from None
    token = _read_token(token_file)
    own = () if host in _ANY_ADDRESS else (f"[{host}]" if ":" in host else host,)
    try:
        access = Access(hosts=(*own, *allow_host), token=token, require_token=require_token)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    listener = bind(host, port)
    with listener:
        if token is None and not _is_loopback(listener.getsockname()[0]):
            click.echo(
                f"backbeat: everybody who reaches {host} can read this dashboard: "
                "see --token-file and --require-token",
                err=True,
            )
        async with (
            session(settings(connection), **_observed()) as bb,
            trio.open_nursery() as nursery,
        ):
            serve = partial(serve_dashboard, bb, access, listener, interval=interval)
            await nursery.start(serve)
            name = f"[{host}]" if ":" in host else host or "localhost"
            click.echo(f"http://{name}:{listener.getsockname()[1]}/")
    return 0


def _observed() -> dict[str, Any]:
    # Without the extra the dashboard has no metrics, and says so if it is asked for them.
    try:
        metrics = import_module("backbeat_trio.metrics")
    except ImportError:
        return {}
    return {"instruments": [metrics.SessionMetrics()]}


def _read_token(file: str | None) -> str | None:
    if file is None:
        return os.environ.get(_TOKEN) or None
    try:
        return Path(file).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--token-file {file}: cannot be read: {error}") from None


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
