"""``backbeat claims``: show the claims of agents, a line each."""

from __future__ import annotations

import sys

import click

from .._session.lifecycle import session
from .._wire import StatusClaim, encode
from .connection import ConnectedCommand, Connection, settings, takes_connection
from .parameters import agent as agent_or_all, duration


@click.command("claims", cls=ConnectedCommand)
@click.argument("agent", type=agent_or_all, default="*")
@click.option("-j", "--json", "as_json", is_flag=True, help="As JSON, one object a line.")
@click.option("--count", type=click.IntRange(0), metavar="N", help="End after so many claims.")
@click.option(
    "--since",
    type=duration,
    metavar="1h",
    help="First show the last claims of operations that ended in this time, oldest first.",
)
@click.option("--all-clusters", is_flag=True, help="Also show claims of other clusters.")
@click.option("--failed", is_flag=True, help="Show only claims with the state 'failed'.")
@takes_connection()
async def show_claims(
    connection: Connection,
    agent: str,
    as_json: bool,
    count: int | None,
    since: float | None,
    all_clusters: bool,
    failed: bool,
) -> int:
    """Show what AGENT or all agents report of their operations and their health, a line each.

    It shows the claims of the cluster as they come, until Ctrl-C.
    """
    if count == 0:
        return 0
    async with (
        session(settings(connection), require_connection=True) as bb,
        bb.open_claims(agent, since=since, all_clusters=all_clusters) as claims,
    ):
        if sys.stdout.isatty():
            whose = "all agents" if agent == "*" else agent
            click.echo(f"backbeat: listening to {whose}; Ctrl-C ends it", err=True)
        number = 0
        async for claim in claims:
            if failed and claim.state != "failed":
                continue
            click.echo(encode(claim) if as_json else format_claim(claim))
            number += 1
            if number == count:
                break
    return 0


def format_claim(claim: StatusClaim) -> str:
    """Write a claim as a line for people, with control characters of the agent's text replaced."""
    fields = (claim.agent_id, claim.task_id, claim.notes)
    agent, task, notes = ("".join(c if c.isprintable() else "?" for c in text) for text in fields)
    return (
        f"{claim.beat_index:>8} {agent:<24} {task:<32} {claim.state:<9} "
        f"left={claim.beats_left:<4} {claim.progress:>4.0%} {notes}"
    )
