"""The steps of ``backbeat doctor`` that say what this user may do, role by role.

Whether a user may publish on a subject shows only when it publishes there. So what is published is
something that everybody who may hear it drops: an empty message, or an empty list of claims that no
stream takes. If there is nothing so harmless to publish or to listen to, it is not tried.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Literal, NamedTuple, TypeAlias

from .._config import BackbeatConfig
from .._transport.nats import NatsTransport
from .._wire import (
    MAX_INDEX,
    SyncRequest,
    beat_subject,
    control_subject,
    encode,
    lead_subject,
    recall_subject,
    status_subject,
    sync_subject,
    tempo_subject,
)
from .findings import Finding, Say

Role: TypeAlias = Literal["observer", "operator", "agent", "metronome"]

ROLES: Final[tuple[Role, ...]] = ("observer", "operator", "agent", "metronome")
"""The roles of ``docs/security.md``, from the least powerful to the most powerful."""

_STEP: Final = "permissions"
_LOOKING: Final = frozenset(ROLES)
_SEEING: Final[frozenset[Role]] = frozenset({"observer", "operator"})
# No stream takes a message that expects another one than itself.
_UNSTORED: Final = {"Nats-Expected-Stream": "-"}
# What moves the deadlines of others, or ends their work.
_POWERS: Final = (
    *("change the tempo", "cancel operations", "ask for a recall", "probe the leader"),
    "answer probes",
)


class Permission(NamedTuple):
    """Something that a user may be allowed to do.

    Attributes:
      name: what it is.
      verb: ``"publish to"`` or ``"subscribe to"``; empty if it is not tried.
      subject: the subject; empty if there is none.
      roles: who needs it.
      optional: who can do without it, and what for it is needed.
      data: what is published.
      headers: its headers.
      untried: why it is not tried.

    """

    name: str
    verb: Literal["publish to", "subscribe to", ""]
    subject: str
    roles: frozenset[Role]
    optional: tuple[frozenset[Role], str] = (frozenset(), "")
    data: bytes = b""
    headers: Mapping[str, str] | None = None
    untried: str = ""


class _Tried(NamedTuple):
    permission: Permission
    may: bool | None
    """Whether the server allows it; None if it was not tried."""


def permissions_of(config: BackbeatConfig, agent_id: str | None) -> list[Permission]:
    """Return all that there is to try.

    Args:
      config: the settings.
      agent_id: the agent whose claims the user should be able to publish; None if nobody has said.

    """
    cluster, metronome = config.cluster_id, frozenset[Role]({"metronome"})
    operator, agent = frozenset[Role]({"operator"}), frozenset[Role]({"agent"})
    # Nobody leads with this number, so nobody listens and nobody is kept from taking over.
    nobody = lead_subject(cluster, MAX_INDEX)
    ping = encode(SyncRequest(cluster, config.agent_id))
    stored = f"$JS.API.STREAM.MSG.GET.{config.claims_stream}"
    own = status_subject(agent_id or "<agent_id>")
    unknown = "" if agent_id else "name the agent by --agent-id to try it"
    return [
        Permission("hear beats", "subscribe to", beat_subject(cluster), _LOOKING),
        Permission("ask for the time", "publish to", sync_subject(cluster), _LOOKING, data=ping),
        Permission("hear claims", "subscribe to", status_subject("*"), _SEEING),
        Permission(
            *("read stored claims", "publish to", stored, frozenset()),
            optional=(frozenset({"observer"}), "to show operations that have ended"),
            data=b'{"seq":1}',
        ),
        Permission(
            *("publish claims", "" if unknown else "publish to", own, agent),
            data=b"[]",
            headers=_UNSTORED,
            untried=unknown,
        ),
        Permission(
            *("take cancellations", "" if unknown else "subscribe to"),
            control_subject(agent_id or "<agent_id>"),
            frozenset(),
            optional=(agent, "for operations that others may cancel"),
            untried=unknown,
        ),
        Permission("answer recalls", "subscribe to", recall_subject(cluster), agent | metronome),
        Permission(
            *("be found", "subscribe to", "$SRV.PING", frozenset()),
            optional=(agent | metronome, "to be listed by service tools"),
        ),
        Permission("change the tempo", "publish to", tempo_subject(cluster), operator),
        # No agent has this id.
        Permission("cancel operations", "publish to", control_subject(config.agent_id), operator),
        Permission("find services", "publish to", "$SRV.PING", operator),
        Permission("ask for a recall", "publish to", recall_subject(cluster), metronome),
        Permission("probe the leader", "publish to", nobody, metronome),
        Permission("answer probes", "subscribe to", nobody, metronome),
        Permission(
            *("publish beats", "", beat_subject(cluster), metronome),
            untried="every agent would hear it",
        ),
        Permission(
            *("answer pings", "", sync_subject(cluster), metronome),
            untried="who pings meanwhile would take this process for a metronome",
        ),
        Permission(
            *("take tempo changes", "", tempo_subject(cluster), metronome),
            untried="who asks meanwhile would take this process for a metronome",
        ),
        Permission(
            *("write the record", "", f"$KV.backbeat-{cluster}.metronome", metronome),
            untried="it would change who leads",
        ),
    ]


async def try_permissions(
    transport: NatsTransport,
    config: BackbeatConfig,
    say: Say,
    *,
    role: Role | None,
    agent_id: str | None,
) -> None:
    """Say what this user may do, and whether that is what its role needs. A checkpoint.

    Args:
      transport: a connection that nobody else uses.
      config: the settings.
      say: called with each finding.
      role: the role that this user should have; None finds out.
      agent_id: as for `permissions_of`.

    Raises:
      TransportBroken: if the connection is lost.

    """
    await transport.flush()
    _say_answers(transport, config, say)
    tried = [
        _Tried(each, await _is_allowed(transport, each) if each.verb else None)
        for each in permissions_of(config, agent_id)
    ]
    complete = [each for each in ROLES if not _missing(tried, each)]
    if "agent" in complete and agent_id is None and role is None:
        # Whoever may look on may do all of an agent that was tried.
        complete.remove("agent")
    nearest = min(
        ROLES,
        key=lambda each: (len(_missing(tried, each)), each != "agent" or agent_id is None),
    )
    chosen = role or (complete[-1] if complete else nearest)
    for permission, may in tried:
        say(_finding(permission, may, chosen))
    _say_role(chosen, _missing(tried, chosen), asked=role is not None, say=say)
    if all(may is not False for _, may in tried):
        text = "this user may do everything, so whoever has its login can move all deadlines"
        mend = "Give each role a user of its own, as in examples/nats-server.conf."
        say(Finding(_STEP, "powers", "warning", text, mend))
    else:
        _say_powers(tried, chosen, say)


def _with_article(role: Role) -> str:
    return f"{'an' if role[0] in 'ao' else 'a'} {role}"


def _say_answers(transport: NatsTransport, config: BackbeatConfig, say: Say) -> None:
    inbox = f"subscription to {config.inbox_prefix}.".lower()
    if any(what.startswith(inbox) for what, _ in transport.statistics().refused):
        text = f"this user may not subscribe to {config.inbox_prefix}.>"
        mend = "Set --inbox-prefix to the inbox in this user's permissions, as in docs/security.md."
        say(Finding(_STEP, "get answers", "failed", text, mend))
    else:
        text = f"this user may subscribe to {config.inbox_prefix}.>"
        say(Finding(_STEP, "get answers", "ok", text))


async def _is_allowed(transport: NatsTransport, permission: Permission) -> bool:
    if permission.verb == "subscribe to":
        async with transport.open_subscription(permission.subject, optional=True) as messages:
            return messages.refusal is None
    before = transport.statistics().permission_errors
    transport.publish_nowait(permission.subject, permission.data, headers=permission.headers)
    # What the server refuses it says before it answers this.
    await transport.flush()
    return transport.statistics().permission_errors == before


def _missing(tried: Sequence[_Tried], role: Role) -> list[str]:
    return [each.name for each, may in tried if role in each.roles and may is False]


def _finding(permission: Permission, may: bool | None, role: Role) -> Finding:
    name, subject = permission.name, permission.subject
    if may is None:
        return Finding(_STEP, name, "not tried", f"{subject}: {permission.untried}")
    if may:
        return Finding(_STEP, name, "ok", f"this user may {permission.verb} {subject}")
    text = f"this user may not {permission.verb} {subject}"
    article = _with_article(role)
    if role in permission.roles:
        mend = (
            f"Allow it in the server's permissions of this user, as docs/security.md has it for "
            f"{article}."
        )
        return Finding(_STEP, name, "failed", text, mend)
    roles, purpose = permission.optional
    if role in roles:
        return Finding(_STEP, name, "ok", f"{text}; {article} needs it only {purpose}")
    return Finding(_STEP, name, "ok", f"{text}, and {article} need not")


def _say_role(role: Role, missing: list[str], *, asked: bool, say: Say) -> None:
    article = _with_article(role)
    if not missing:
        say(Finding(_STEP, "role", "ok", f"this user may do what {article} does"))
        return
    names = ", ".join(missing)
    if asked:
        text = f"this user may not do all that {article} does: {names}"
        mend = f"Give it the permissions of {article}, or use the login of one."
    else:
        text = f"this user may do what no role does; of {article} it misses: {names}"
        mend = "Name the role that it should have by --role, and see docs/security.md, 'Roles'."
    say(Finding(_STEP, "role", "failed", text, mend))


def _say_powers(tried: Sequence[_Tried], role: Role, say: Say) -> None:
    beyond = [
        each.name for each, may in tried if may and each.name in _POWERS and role not in each.roles
    ]
    if beyond:
        article = _with_article(role)
        text = f"this user may also {', '.join(beyond)}, which {article} does not need"
        mend = "Take these permissions from it, unless it needs them for something else."
        say(Finding(_STEP, "powers", "warning", text, mend))
