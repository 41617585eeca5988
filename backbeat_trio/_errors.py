"""The errors that this package raises, all below `BackbeatError`, and the `Logger` protocol."""

from __future__ import annotations

from typing import Any, Protocol

import trio


class BackbeatError(Exception):
    """The base class of the errors of this package.

    Invalid arguments raise `TypeError` or `ValueError`, as usual.
    """


class ConfigError(BackbeatError, ValueError):
    """A setting is not valid.

    It is raised before anything is connected. The text names the setting and its value.
    """

    field: str | None = None
    """The field of `BackbeatConfig` that is not valid; None if the error is not about a field."""
    problem: str = ""
    """The value of that field, unless it is a secret, and what is wrong with it."""


class SessionClosed(BackbeatError):
    """The session was used while its block was being left, or after that."""


class BeatBudgetExceeded(BackbeatError, trio.TooSlowError):
    """A block took longer than its budget in beats.

    `Session.fail_after`, `Session.fail_at` and the methods that use them raise it.
    """


class OperationNotFound(BackbeatError, LookupError):
    """No live operation has this id. It was never started, or it has already ended."""


class OperationExists(BackbeatError):
    """A live operation of this session already has this id."""


class InvalidTransition(BackbeatError):
    """An operation cannot go back to an earlier phase, or leave `COMPLETED` or `FAILED`."""


class TempoRefused(BackbeatError):
    """The leader of the metronomes refused a change of the tempo or a pause; the text says why."""


class MetronomeUnavailable(BackbeatError):
    """No metronome of this cluster answered: none is running, or none can be reached."""


class TransportError(BackbeatError):
    """The base class of the errors that a transport raises."""


class TransportClosed(TransportError):
    """The transport was used after it was closed."""


class TransportBroken(TransportError):
    """There is no connection, or it was lost. The request may have been carried out or not."""


class AuthenticationFailed(TransportBroken):
    """The server refused the credentials."""


class TLSFailed(TransportBroken):
    """The TLS connection failed: by the certificate, the host name, or a server without TLS."""


class NoResponders(TransportBroken):
    """No process is subscribed to the subject of the request."""


class PermissionDenied(TransportBroken):
    """The server's permissions refuse a request, or the subscription on which its answer comes."""


class ClaimsUnavailable(BackbeatError):
    """Stored claims cannot be read, as nothing stores them; the text says what is missing."""


class Logger(Protocol):
    """The methods that a session calls to log. A `logging.Logger` has them."""

    def debug(self, msg: object, /, *args: object) -> Any: ...
    def info(self, msg: object, /, *args: object) -> Any: ...
    def warning(self, msg: object, /, *args: object) -> Any: ...
    def error(self, msg: object, /, *args: object) -> Any: ...
