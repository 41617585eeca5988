"""``backbeat claims``: what agents say, a line each."""

from __future__ import annotations

import argparse

from .._session.lifecycle import session
from .._wire import StatusClaim, encode
from .connection import settings


async def show_claims(options: argparse.Namespace) -> int:
    """Show claims as they come, all or so many."""
    if options.count == 0:
        return 0
    async with (
        session(settings(options), require_connection=True) as bb,
        bb.open_claims(options.agent_id) as claims,
    ):
        number = 0
        async for claim in claims:
            print(encode(claim).decode() if options.json else format_claim(claim), flush=True)
            number += 1
            if number == options.count:
                break
    return 0


def format_claim(claim: StatusClaim) -> str:
    """Write a claim as a line for people. What agents write is shown without control characters."""
    fields = (claim.agent_id, claim.task_id, claim.notes)
    agent, task, notes = ("".join(c if c.isprintable() else "?" for c in text) for text in fields)
    return (
        f"{claim.beat_index:>8} {agent:<24} {task:<32} {claim.state:<9} "
        f"left={claim.beats_left:<4} {claim.progress:>4.0%} {notes}"
    )
