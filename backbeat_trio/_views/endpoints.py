"""What the dashboard's API takes and returns, and its description as an OpenAPI document."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from http import HTTPStatus
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta, Struct
from starlette.requests import Request

from .._version import __version__
from .._wire import Index, Name
from .access import COOKIE
from .snapshot import SeriesPoint

BASE: Final = "/api/v1"
JSON: Final = "application/json"
EVENTS: Final = "text/event-stream"
PROBLEM: Final = "application/problem+json"

_MAX_TOKEN: Final = 4096


class ProblemView(Struct, frozen=True):
    """Why a request was refused, as RFC 9457 has it.

    Attributes:
      title: the name of the status.
      status: the status.
      detail: why, for people.

    """

    title: str
    status: int
    detail: str


class AccessView(Struct, frozen=True):
    """What this client may do.

    Attributes:
      actions: whether the dashboard can change the cluster, which needs the token.
      token_to_read: whether reading needs the token, too.
      logged_in: whether this client has logged in.

    """

    actions: bool
    token_to_read: bool
    logged_in: bool


class SeriesView(Struct, frozen=True):
    """Figures over time.

    Attributes:
      points: the figures of the newest beats, oldest first.

    """

    points: tuple[SeriesPoint, ...]


class LoginBody(Struct, frozen=True, forbid_unknown_fields=True):
    """What logs in.

    Attributes:
      token: the dashboard's token.

    """

    token: Annotated[str, Meta(max_length=_MAX_TOKEN)]


class EmptyBody(Struct, frozen=True, forbid_unknown_fields=True):
    """A body without fields."""


class TempoBody(Struct, frozen=True, forbid_unknown_fields=True):
    """A change of the tempo.

    Attributes:
      bpm: the new tempo, in beats per minute.
      at_beat: the beat on which it changes; None is a downbeat soon.
      over_beats: how many beats the change takes; 0 is at once.

    """

    bpm: Annotated[float, Meta(ge=0.1, le=6000)]
    at_beat: Index | None = None
    over_beats: Index = 0


class PauseBody(Struct, frozen=True, forbid_unknown_fields=True):
    """A pause of the grid.

    Attributes:
      at_beat: the beat on which it begins; None is one soon.

    """

    at_beat: Index | None = None


class CancelBody(Struct, frozen=True, forbid_unknown_fields=True):
    """The cancelling of an operation.

    Attributes:
      reason: why, which its last claim says.

    """

    reason: Name


class ChangeView(Struct, frozen=True):
    """A change of the grid that is stored.

    Attributes:
      effective_beat: the beat on which it takes effect.

    """

    effective_beat: int


class Done(Struct, frozen=True):
    """An action that was carried out.

    Attributes:
      ok: always true.

    """

    ok: bool = True


class Endpoint(Struct, frozen=True):
    """One thing that the API offers.

    Attributes:
      method: ``"GET"`` or ``"POST"``.
      path: the path below the base, as Starlette writes it.
      summary: what it does.
      call: does it.
      returns: the type of the answer.
      takes: the type of the parameters of a GET, or of the body of a POST; None if there are none.
      access: ``"read"``, ``"act"`` or ``"all"``: which clients may use it.
      media: the media type of the answer.

    """

    method: str
    path: str
    summary: str
    call: Callable[[Request, Any], Awaitable[Any]]
    returns: Any
    takes: type[Struct] | None = None
    access: str = "read"
    media: str = JSON


def describe(endpoints: Sequence[Endpoint]) -> dict[str, Any]:
    """Return the OpenAPI document of some endpoints.

    Args:
      endpoints: what the API offers.

    """
    structs = [one.takes for one in endpoints if one.takes is not None]
    types = [*(one.returns for one in endpoints), *structs, ProblemView]
    schemas, components = msgspec.json.schema_components(
        types, ref_template="#/components/schemas/{name}"
    )
    schema_of = dict(zip(map(repr, types), schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for one in endpoints:
        operation: dict[str, Any] = {
            "summary": one.summary,
            "parameters": [
                {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
                for name in re.findall(r"{(\w+)", one.path)
            ],
            "responses": {
                "200": {
                    "description": one.summary,
                    "content": {one.media: {"schema": schema_of[repr(one.returns)]}},
                },
                "default": {
                    "description": "The request is refused, or cannot be carried out",
                    "content": {PROBLEM: {"schema": schema_of[repr(ProblemView)]}},
                },
            },
        }
        if one.access != "all":
            needed: list[dict[str, list[str]]] = [{"bearer": []}, {"cookie": []}]
            # Without the option that says so, reading needs no token.
            operation["security"] = needed if one.access == "act" else [{}, *needed]
        if one.takes is not None and one.method == "GET":
            fields = components[one.takes.__name__]["properties"]
            operation["parameters"] += [
                {"name": name, "in": "query", "schema": schema} for name, schema in fields.items()
            ]
        elif one.takes is not None:
            content = {JSON: {"schema": schema_of[repr(one.takes)]}}
            operation["requestBody"] = {"required": True, "content": content}
        path = BASE + re.sub(r":\w+}", "}", one.path)
        paths.setdefault(path, {})[one.method.lower()] = operation
    for one in endpoints:
        if one.takes is not None and one.method == "GET":
            # Its fields are parameters.
            components.pop(one.takes.__name__, None)
    return {
        "openapi": "3.1.0",
        "info": {"title": "backbeat dashboard", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "cookie": {"type": "apiKey", "in": "cookie", "name": COOKIE},
            },
        },
    }


def problem(status: int, detail: str) -> ProblemView:
    """Return the answer to a request that is refused."""
    return ProblemView(HTTPStatus(status).phrase, status, detail)
