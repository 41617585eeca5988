"""The small tree of errors: what was refused, what you closed, what broke; and what logs it."""

from __future__ import annotations

from typing import Any, Protocol

import trio


class BackbeatError(Exception):
    """Root of every error that this package raises on its own account."""


class ConfigError(BackbeatError, ValueError):
    """A setting was refused before anything was connected; the text names it and its value."""

    field: str | None = None
    """The field of `BackbeatConfig` that was refused, where it is one."""
    problem: str = ""
    """The value of that field, unless it is a secret, and what is wrong with it."""


class SessionClosed(BackbeatError):
    """The session was used after its block had been left, or while it was being left."""


class BeatBudgetExceeded(BackbeatError, trio.TooSlowError):
    """A budget of beats ran out, in ``fail_after``, ``fail_at`` or what is built on them."""


class OperationNotFound(BackbeatError, LookupError):
    """No live operation has this id: it was never started, or it has already ended."""


class OperationExists(BackbeatError):
    """An operation with this id is already live in this session."""


class InvalidTransition(BackbeatError):
    """An operation was asked to go back, or to leave a phase that is final."""


class TempoRefused(BackbeatError):
    """The metronome's leader will not make this tempo change; the text says why."""


class MetronomeUnavailable(BackbeatError):
    """No metronome answered: none is running for this cluster, or none can be reached."""


class TransportError(BackbeatError):
    """Root of what a transport raises."""


class TransportClosed(TransportError):
    """The transport was used after you closed it."""


class TransportBroken(TransportError):
    """The connection is not there or went away; what was asked for may or may not have happened."""


class AuthenticationFailed(TransportBroken):
    """The server refused the credentials."""


class TLSFailed(TransportBroken):
    """No trusted TLS connection could be made: certificate, host name, or a server without TLS."""


class NoResponders(TransportBroken):
    """Nobody is subscribed to the subject of a request."""


class PermissionDenied(TransportBroken):
    """The server's permissions refuse a request, or the subscription on which its answer comes."""


class Logger(Protocol):
    """What a session logs to; `logging.Logger` is one."""

    def debug(self, msg: object, /, *args: object) -> Any: ...
    def info(self, msg: object, /, *args: object) -> Any: ...
    def warning(self, msg: object, /, *args: object) -> Any: ...
    def error(self, msg: object, /, *args: object) -> Any: ...
