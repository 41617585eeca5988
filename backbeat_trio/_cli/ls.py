"""``backbeat ls``: lists of agents, operations, metronomes and services."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Final, Literal, TypeAlias, TypeVar, get_args

import click
import msgspec
from msgspec import Struct

from .._session.lifecycle import session
from .._transport.adr32 import Info
from .._views.shown import AgentView, Query, Sort, Timing, clean
from .._wire import MAX_INDEX
from .connection import ConnectedCommand, Connection, settings, takes_connection
from .listening import AGENT, METRONOME, Heard, announce, complain, listen, services_of
from .parameters import beats, duration, name
from .tables import AGENTS, OPERATIONS, show_table

Listed: TypeAlias = Literal["agents", "operations", "metronomes", "services"]

T = TypeVar("T")

_LIMIT: Final = 1000
# For how many beats to listen until such operations show: what has only been heard with its budget
# run out is late on its next beat, and silent is what was heard and then not for three beats.
_BEATS: Final[Mapping[Timing | None, float]] = {"late": 2.25, "silent": 4.5}


class MetronomeView(Struct, frozen=True):
    """A metronome, as it describes itself.

    Attributes:
      leader_id: its name.
      role: ``"leader"`` or ``"standby"``.
      epoch: the number of its present or last term of leadership.
      version: the version of the program.
      cluster_id: the cluster.
      id: what tells this process from all others.

    """

    leader_id: str
    role: str
    epoch: str
    version: str
    cluster_id: str
    id: str


METRONOMES: Final[Sequence[tuple[str, Callable[[MetronomeView], str]]]] = (
    ("METRONOME", lambda each: each.leader_id),
    ("ROLE", lambda each: each.role),
    ("EPOCH", lambda each: each.epoch),
    ("VERSION", lambda each: each.version),
    ("INSTANCE", lambda each: each.id),
)

SERVICES: Final[Sequence[tuple[str, Callable[[Info], str]]]] = (
    ("SERVICE", lambda each: each.name),
    ("VERSION", lambda each: each.version),
    ("INSTANCE", lambda each: each.id),
    ("SUBJECTS", lambda each: ", ".join(endpoint.subject for endpoint in each.endpoints)),
    ("DESCRIPTION", lambda each: each.description),
    ("METADATA", lambda each: " ".join(f"{key}={text}" for key, text in each.metadata.items())),
)

wait_option = click.option(
    "--wait",
    type=beats,
    metavar="BEATS",
    help="Listen for so many beats; by default one and a margin, and at most 50 s.",
)
since_option = click.option(
    "--since",
    type=duration,
    metavar="1h",
    help="Also look at operations that ended in this time, as far as their claims are stored.",
)


@click.command("ls", cls=ConnectedCommand)
@click.argument("what", type=click.Choice(get_args(Listed)))
@click.option("-j", "--json", "as_json", is_flag=True, help="As a JSON array.")
@wait_option
@since_option
@click.option("--agent", type=name, metavar="NAME", help="Only operations of this agent.")
@click.option("--type", "type_", metavar="TYPE", help="Only operations of this type.")
@click.option("--late", is_flag=True, help="Only those past their budget.")
@click.option("--slow", is_flag=True, help="Only those past their soft edge.")
@click.option("--silent", is_flag=True, help="Only those without a claim for three beats.")
@click.option("--failed", is_flag=True, help="Only operations that have failed.")
@click.option(
    "--sort",
    type=click.Choice(get_args(Sort)),
    metavar="KEY",
    help=f"The order, one of: {', '.join(get_args(Sort))}; by default most of the budget used "
    "first, and agents by their names.",
)
@click.option("--reverse", is_flag=True, help="The other way round.")
@click.option(
    "--limit",
    type=click.IntRange(0),
    default=_LIMIT,
    metavar="N",
    help=f"The most lines; by default {_LIMIT}.",
)
@takes_connection()
def list_what(
    connection: Connection,
    what: Listed,
    as_json: bool,
    wait: float | None,
    since: float | None,
    agent: str | None,
    type_: str | None,
    late: bool,
    slow: bool,
    silent: bool,
    failed: bool,
    sort: Sort | None,
    reverse: bool,
    limit: int,
) -> Coroutine[Any, Any, int]:
    """List what there is in the cluster: agents, operations, metronomes, or all services.

    Agents and operations are those that were heard or found while it listened. Operations publish a
    claim on each beat, so it listens for one beat and a margin, and for at most 50 s; for --late it
    takes two beats, and for --silent four. Agents at rest, metronomes and services answer at once.
    """
    ctx = click.get_current_context()
    timings = [each for each, given in _timings(late, slow, silent) if given]
    if len(timings) > 1:
        raise click.UsageError("Give only one of --late, --slow and --silent.", ctx)
    unfit: dict[str, object] = {}
    if what != "operations":
        unfit = {"--agent": agent, "--type": type_, "--failed": failed, "--since": since}
    if what in ("metronomes", "services"):
        unfit |= {"--wait": wait, "--sort": sort, "--reverse": reverse}
        unfit |= {f"--{each}": True for each in timings}
    for option, given in unfit.items():
        if given not in (None, False):
            raise click.UsageError(f"'{option}' is not for {what}.", ctx)
    query = Query(
        agent=agent or "",
        type=type_ or "",
        timing=timings[0] if timings else None,
        outcome="failed" if failed else None,
        sort=sort or ("agent" if what == "agents" else "used"),
        reverse=reverse,
        limit=limit,
    )
    if what in ("agents", "operations"):
        if wait is None:
            wait = _BEATS.get(query.timing)
        return _list_claims(connection, what, query, wait, since, as_json)
    return _list_services(connection, what, limit, as_json)


def _timings(late: bool, slow: bool, silent: bool) -> list[tuple[Timing, bool]]:
    return [("late", late), ("slow", slow), ("silent", silent)]


async def _list_claims(
    connection: Connection,
    what: Listed,
    query: Query,
    wait: float | None,
    since: float | None,
    as_json: bool,
) -> int:
    config = settings(connection)
    async with session(config, require_connection=True) as bb:
        announce(bb, wait)
        heard = await listen(
            bb, wait=wait, since=since, agent_id=query.agent or "*", services=what == "agents"
        )
    complain(heard)
    if what == "operations":
        page = heard.model.operations(query)
        _write(page.items, OPERATIONS, as_json)
        _count_rest(page.total - len(page.items))
        return 0
    everybody = list(heard.model.agents(msgspec.structs.replace(query, limit=MAX_INDEX)).items)
    if query.timing is None:
        known = {each.agent_id for each in everybody}
        everybody += _silent_agents(heard, config.cluster_id, known)
        if query.sort in ("agent", "id"):
            everybody.sort(key=lambda each: each.agent_id, reverse=query.reverse)
    _write(everybody[: query.limit], AGENTS, as_json)
    _count_rest(len(everybody) - query.limit)
    return 0


def _silent_agents(heard: Heard, cluster_id: str, known: set[str]) -> list[AgentView]:
    # Agents at rest publish their health every eight beats only, and answer at once.
    names = {info.metadata.get("agent_id", "") for info in heard.metadata(AGENT, cluster_id)}
    return [
        AgentView(each, "unknown", None, False, "", -1, 0, 0, 0, 0)
        for each in map(clean, names)
        if each and each not in known
    ]


async def _list_services(connection: Connection, what: Listed, limit: int, as_json: bool) -> int:
    config = settings(connection)
    # No beat is needed, so there is no wait for a metronome.
    async with session(config, require_connection=True, lock_timeout=0.0) as bb:
        found = await services_of(bb, METRONOME if what == "metronomes" else "")
    if what == "services":
        _write(found[:limit], SERVICES, as_json)
        _count_rest(len(found) - limit)
        return 0
    metronomes = sorted(
        (_metronome(info) for info in found if info.metadata.get("cluster") == config.cluster_id),
        key=lambda each: (each.role, each.leader_id, each.id),
    )
    _write(metronomes[:limit], METRONOMES, as_json)
    _count_rest(len(metronomes) - limit)
    return 0


def _metronome(info: Info) -> MetronomeView:
    told = info.metadata
    return MetronomeView(
        leader_id=clean(told.get("leader_id", "")),
        role=clean(told.get("role", "")),
        epoch=clean(told.get("epoch", "")),
        version=clean(told.get("version", info.version)),
        cluster_id=clean(told.get("cluster", "")),
        id=clean(info.id),
    )


def _write(
    rows: Sequence[T], columns: Sequence[tuple[str, Callable[[T], str]]], as_json: bool
) -> None:
    if as_json:
        click.echo(msgspec.json.encode(rows))
    else:
        show_table(columns, rows)


def _count_rest(number: int) -> None:
    if number > 0:
        click.echo(f"backbeat: {number} more are left out; see --limit", err=True)
