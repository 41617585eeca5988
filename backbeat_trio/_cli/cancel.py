"""``backbeat cancel``: cancel an operation of an agent."""

from __future__ import annotations

import click

from .._session.lifecycle import session
from .._wire import encode
from .connection import ConnectedCommand, Connection, settings, takes_connection
from .parameters import name, operation_id, reason as reason_text


@click.command("cancel", cls=ConnectedCommand)
@click.argument("agent", type=name)
@click.argument("operation", type=operation_id)
@click.option(
    "--reason",
    type=reason_text,
    required=True,
    metavar="TEXT",
    help="Why: the operation fails for this reason, and its last claim says it.",
)
@click.option("-j", "--json", "as_json", is_flag=True, help="As JSON.")
@takes_connection()
async def cancel_operation(
    connection: Connection, agent: str, operation: str, reason: str, as_json: bool
) -> int:
    """Cancel the operation of AGENT whose id is OPERATION.

    The agent must have opened it with cancellable=True. It is cancelled when this ends with exit
    code 0, and its clean-up may go on. 'backbeat claims AGENT' shows the ids of operations, and how
    they end.
    """
    # No beat is needed, so there is no wait for a metronome.
    async with session(settings(connection), require_connection=True, lock_timeout=0.0) as bb:
        await bb.cancel_remote(agent, operation, reason)
    if as_json:
        click.echo(encode({"agent_id": agent, "operation_id": operation, "reason": reason}))
    else:
        shown = "".join(letter if letter.isprintable() else "?" for letter in operation)
        click.echo(f"cancelled {shown} of {agent}")
    return 0
