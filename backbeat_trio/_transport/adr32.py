"""What a service tells of itself, as ADR-32 of NATS defines it. Pure.

The names of the fields, their types, and the texts in ``type`` are those of the ADR.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Final

from msgspec import Struct

_NAME: Final = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)
_NO_NAME: Final = re.compile(r"[^A-Za-z0-9_-]+", re.ASCII)
# The expression that https://semver.org suggests, without its groups.
_IDENTIFIER: Final = r"(?:0|[1-9]\d*|\d*[a-zA-Z-][0-9a-zA-Z-]*)"
_SEMVER: Final = re.compile(
    r"(?:0|[1-9]\d*)\.(?:0|[1-9]\d*)\.(?:0|[1-9]\d*)"
    rf"(?:-{_IDENTIFIER}(?:\.{_IDENTIFIER})*)?"
    r"(?:\+[0-9a-zA-Z-]+(?:\.[0-9a-zA-Z-]+)*)?",
    re.ASCII,
)


class Ping(Struct, frozen=True, tag_field="type", tag="io.nats.micro.v1.ping_response"):
    """The answer to ``$SRV.PING``."""

    name: str
    id: str
    version: str
    metadata: dict[str, str]


class EndpointInfo(Struct, frozen=True):
    """What ``$SRV.INFO`` tells of an endpoint."""

    name: str
    subject: str
    queue_group: str
    metadata: dict[str, str]


class Info(Struct, frozen=True, tag_field="type", tag="io.nats.micro.v1.info_response"):
    """The answer to ``$SRV.INFO``."""

    name: str
    id: str
    version: str
    metadata: dict[str, str]
    description: str
    endpoints: list[EndpointInfo]


class EndpointStats(Struct, frozen=True):
    """What ``$SRV.STATS`` tells of an endpoint; times are in nanoseconds."""

    name: str
    subject: str
    queue_group: str
    num_requests: int
    num_errors: int
    last_error: str
    processing_time: int
    average_processing_time: int


class Stats(Struct, frozen=True, tag_field="type", tag="io.nats.micro.v1.stats_response"):
    """The answer to ``$SRV.STATS``."""

    name: str
    id: str
    version: str
    metadata: dict[str, str]
    endpoints: list[EndpointStats]
    started: str


def timestamp(ns: int) -> str:
    """Return nanoseconds since 1970 as a time in UTC, as RFC 3339 writes it."""
    seconds, rest = divmod(ns, 1_000_000_000)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{rest:09}Z"


def endpoint_name(subject: str) -> str:
    """Return a name for the endpoint of a subject, which may contain wildcards."""
    return _NO_NAME.sub("-", subject).strip("-") or "default"


def check_name(parameter: str, value: object) -> str:
    """Return a name of a service or an endpoint; raise unless it is valid.

    Raises:
      TypeError: if it is not a string.
      ValueError: if it is empty, or has other characters than letters of ASCII, digits, ``-`` and
        ``_``.

    """
    text = check_text(parameter, value)
    if _NAME.fullmatch(text) is None:
        raise ValueError(
            f"`{parameter}` must be letters, digits, '-' and '_', and not {text[:100]!r}"
        )
    return text


def check_version(value: object) -> str:
    """Return a version; raise `ValueError` unless it is one of Semantic Versioning."""
    text = check_text("version", value)
    if _SEMVER.fullmatch(text) is None:
        raise ValueError(
            f"`version` must be a semantic version such as '1.2.0', and not {text[:100]!r}"
        )
    return text


def check_metadata(value: Mapping[str, str] | None) -> dict[str, str]:
    """Return a copy of metadata; raise `TypeError` unless it maps strings to strings."""
    metadata = dict(value or {})
    for key, text in metadata.items():
        check_text("metadata", key)
        check_text("metadata", text)
    return metadata


def check_text(parameter: str, value: object) -> str:
    """Return a text; raise unless it is a string that has UTF-8."""
    if not isinstance(value, str):
        raise TypeError(f"`{parameter}` must be a string, and not {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"`{parameter}` contains a character that has no UTF-8") from None
    return value
