"""``backbeat get`` and ``backbeat tree``: all that is known of an agent or an operation."""

from __future__ import annotations

from typing import Final

import click
import msgspec
from msgspec import Struct

from .._errors import OperationNotFound
from .._session.lifecycle import session
from .._views.model import ClusterModel
from .._views.shown import AgentView, OperationNode, OperationView, Query, clean
from .._wire import MAX_INDEX
from .connection import ConnectedCommand, Connection, settings, takes_connection
from .listening import AGENT, Heard, announce, complain, listen
from .ls import since_option, wait_option
from .parameters import name, operation_id
from .tables import OPERATIONS, format_budget, format_used, show_fields, show_table, show_trees

# The most operations of an agent, or of one id, that are shown.
_MANY: Final = 1000


class AgentDetails(Struct, frozen=True):
    """All that is known of an agent.

    Attributes:
      agent: what its claims say; None if none came.
      operations: its operations.
      metadata: what it says of itself when it is asked; empty if it does not answer.

    """

    agent: AgentView | None
    operations: tuple[OperationView, ...]
    metadata: tuple[dict[str, str], ...]


@click.command("get", cls=ConnectedCommand)
@click.argument("agent", type=name)
@click.argument("operation", type=operation_id, required=False)
@click.option("-j", "--json", "as_json", is_flag=True, help="As a JSON object.")
@wait_option
@since_option
@takes_connection()
async def get_one(
    connection: Connection,
    agent: str,
    operation: str | None,
    as_json: bool,
    wait: float | None,
    since: float | None,
) -> int:
    """Show all that is known of an OPERATION of AGENT, or of AGENT itself.

    The history of an operation has the phases that it passed while this listened. It ends as soon
    as the operation was heard, unless --wait says for how long to listen. If the budget of the
    operation has run out by then, it goes on until the next claim, which shows whether it is late.

    Exits 1 if there is no such operation or agent.
    """
    config = settings(connection)

    def is_found(model: ClusterModel) -> bool:
        found = None if operation is None else model.operation(agent, operation)
        if found is None:
            return False
        # Its first claim does not tell whether one is late whose budget has run out already.
        return not found.live or not found.at_least or found.timing == "late"

    claims = 1 if operation is None else 2
    async with session(config, require_connection=True) as bb:
        announce(bb, wait, claims)
        heard = await listen(
            bb,
            wait=wait,
            claims=claims,
            since=since,
            agent_id=agent,
            services=operation is None,
            until=is_found if wait is None and since is None else None,
        )
    complain(heard)
    if operation is None:
        return _show_agent(heard, config.cluster_id, agent, as_json)
    found = heard.model.operation(agent, operation)
    if found is None:
        raise OperationNotFound(
            f"no claim of an operation {clean(operation)!r} came from agent {agent}"
        )
    if as_json:
        click.echo(msgspec.json.encode(found))
    else:
        _show_operation(found)
    return 0


@click.command("tree", cls=ConnectedCommand)
@click.argument("id", type=operation_id)
@click.option("-j", "--json", "as_json", is_flag=True, help="As a JSON array of trees.")
@wait_option
@since_option
@takes_connection()
async def show_tree(
    connection: Connection, id: str, as_json: bool, wait: float | None, since: float | None
) -> int:
    """Draw the whole that the operation ID is a part of, with all of its parts.

    ID is the id of an operation, or AGENT/ID. If several agents have an operation of this id, each
    whole is drawn.

    Exits 1 if there is no such operation.
    """
    config = settings(connection)
    async with session(config, require_connection=True) as bb:
        announce(bb, wait)
        heard = await listen(bb, wait=wait, since=since)
    complain(heard)
    matching = _matching(heard.model, id)
    trees: dict[str, OperationNode] = {}
    for each in matching:
        root = heard.model.tree(each.agent_id, each.id)
        if root is not None:
            trees.setdefault(root.name, root)
    if not trees:
        raise OperationNotFound(f"no claim of an operation {clean(id)!r} came")
    if as_json:
        click.echo(msgspec.json.encode(list(trees.values())))
        return 0
    wanted = {(each.agent_id, each.id) for each in matching}
    show_trees(list(trees.values()), lambda each: (each.agent_id, each.id) in wanted)
    return 0


def _matching(model: ClusterModel, id: str) -> list[OperationView]:
    agent_id, slash, rest = id.partition("/")
    one = model.operation(agent_id, rest) if slash else None
    if one is not None:
        return [one]
    agents = model.agents(Query(sort="agent", limit=MAX_INDEX)).items
    found = (model.operation(agent.agent_id, id) for agent in agents)
    return [each for each in found if each is not None][:_MANY]


def _show_agent(heard: Heard, cluster_id: str, agent_id: str, as_json: bool) -> int:
    model = heard.model
    agents = model.agents(Query(agent=agent_id, limit=1)).items
    operations = model.operations(Query(agent=agent_id, limit=_MANY)).items
    told = tuple(
        info.metadata
        for info in heard.metadata(AGENT, cluster_id)
        if info.metadata.get("agent_id") == agent_id
    )
    if not agents and not told:
        raise OperationNotFound(f"no claim came from agent {agent_id}, and it does not answer")
    details = AgentDetails(agents[0] if agents else None, operations, told)
    if as_json:
        click.echo(msgspec.json.encode(details))
        return 0
    fields = [("agent", agent_id)]
    if details.agent is not None:
        one = details.agent
        fields += [
            ("state", one.state),
            ("last beat", str(one.last_beat)),
            ("operations", f"{one.live} live, {one.slow} slow, {one.late} late"),
            ("notes", one.notes),
        ]
    for metadata in told:
        fields += [(clean(key), text) for key, text in sorted(metadata.items())]
    show_fields(fields)
    if operations:
        click.echo()
        show_table(OPERATIONS[1:], operations)
    return 0


def _show_operation(one: OperationView) -> None:
    fields = [
        ("agent", one.agent_id),
        ("operation", one.id),
        ("type", one.type),
        ("phase", one.phase),
        ("outcome", one.outcome),
        ("timing", one.timing),
        ("beats", f"{format_budget(one)} {format_used(one)}".rstrip()),
        ("beats left", str(one.beats_left)),
        ("started", f"beat {one.start_beat}{' or before' if one.at_least else ''}"),
        ("last claim", f"beat {one.last_beat}"),
        ("soft edge", "passed" if one.soft else "not passed"),
        *((("peers", str(one.peers)),) if one.peers is not None else ()),
        *((("part of", one.parent),) if one.parent is not None else ()),
        *((("whole", one.correlation_id),) if one.correlation_id is not None else ()),
        ("notes", one.notes),
        *(("history", f"beat {change.beat}: {change.phase}") for change in one.history),
    ]
    show_fields(fields)
