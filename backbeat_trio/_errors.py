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

    It is raised before anything is connected. The text names the field or the variable, its value
    unless that is a secret, and which values are allowed.

    Attributes:
      field: the field of `BackbeatConfig` that is not valid, such as ``"tempo_bpm"``; None if the
        error is not about a field.
      problem: the value of that field, and what is wrong with it, for people to read.

    """

    field: str | None = None
    problem: str = ""


class SessionClosed(BackbeatError):
    """The session was used while its block was being left, or after that."""


class BeatBudgetExceeded(BackbeatError, trio.TooSlowError):
    """A block took longer than its budget in beats.

    `Session.fail_after`, `Session.fail_at`, `Session.execute_with_beat_budget`, and
    `Session.operation` with ``enforce=True`` raise it. The text names the budget and its beat. It
    is a `trio.TooSlowError`, as those of Trio's own time-outs are.
    """


class OperationNotFound(BackbeatError, LookupError):
    """No live operation has this id. It was never started, or it has already ended."""


class OperationExists(BackbeatError):
    """A live operation of this session already has this id."""


class InvalidTransition(BackbeatError):
    """An operation cannot go back to an earlier phase, or leave `COMPLETED` or `FAILED`.

    The text names the operation and both phases. If work is tried again, see `Operation.advance`.
    """


class OperationCancelled(BackbeatError):
    """The block of a cancellable operation was cancelled by `Session.cancel_remote`.

    Leaving the block raises it, so that the code after the block does not run as if all were well.

    Attributes:
      reason: why, in the words of whoever asked for it.
      asked_by: the agent id under which it was asked for. Nothing proves it.

    """

    reason: str = ""
    asked_by: str = ""


class CancelRefused(BackbeatError):
    """An agent refused to cancel one of its operations; the text says why."""


class TempoRefused(BackbeatError):
    """The metronome that leads refused a change of the tempo, a pause, or its end.

    The text has its reason: for example the beat is past, or too soon, in which case it names the
    earliest one. `Health.pending` and `Health.paused` show what is ordered already.
    """


class MetronomeUnavailable(BackbeatError):
    """No metronome of this cluster answered: none is running, or none can be reached.

    Check that ``backbeat pulse`` runs for the same ``cluster_id`` on the same servers, for example
    by ``backbeat status``. `Health.connected` says whether the connection is the cause, and
    `Health.grid` whether a metronome is heard at present.
    """


class TransportError(BackbeatError):
    """The base class of the errors that a transport raises."""


class TransportClosed(TransportError):
    """The transport was used after it was closed."""


class TransportBroken(TransportError):
    """There is no connection, or it was lost. The request may have been carried out or not."""


class AuthenticationFailed(TransportBroken):
    """The server refused the login.

    Check `BackbeatConfig.user` and ``password``, or ``token``, ``nkey`` or ``creds``. The text has
    the server's reason, and never a secret.
    """


class TLSFailed(TransportBroken):
    """The TLS connection failed, because of a certificate, a host name, or a server without TLS.

    Check that `BackbeatConfig.tls_ca` is the authority of the server's certificate, that the
    certificate names the host of ``nats_url``, and that the server has TLS. If it asks for a
    certificate of the client, ``tls_cert`` and ``tls_key`` must be set.
    """


class NoResponders(TransportBroken):
    """No process is subscribed to the subject of the request."""


class PermissionDenied(TransportBroken):
    """The server's permissions refuse a request, or the subscription on which its answer comes.

    The text names the subject. ``docs/security.md`` lists what each role needs.
    """


class ServiceError(BackbeatError):
    """A service answered a request with an error.

    `Session.request` raises it. A handler of `Service.serve` raises it to answer with an error. The
    codes of this package are 408 (the budget was spent when the request's turn came, or less was
    left than the service asks for), 413 (the answer is larger than a message can be), 499
    (cancelled by its caller), 500 (the handler crashed), 503 (the service is closing or has too
    much to do) and 504 (the budget ran out while the handler was running). Others are the
    handler's own.

    Args:
      code: a number from 0 to 999,999,999.
      description: what went wrong, for people to read.

    """

    def __init__(self, code: int, description: str) -> None:
        if type(code) is not int or not 0 <= code < 1_000_000_000:
            raise ValueError(f"`code` must be an integer from 0 to 999,999,999, not {code!r}")
        if type(description) is not str:
            raise TypeError(f"`description` must be a string, not {description!r}")
        super().__init__(code, description)
        self.code: int = code
        self.description: str = description

    def __str__(self) -> str:
        return f"{self.description} ({self.code})"


class ClaimsUnavailable(BackbeatError):
    """Stored claims cannot be read, because nothing stores them; the text says what is missing."""


class Logger(Protocol):
    """The methods that a session calls to log. A `logging.Logger` has them."""

    def debug(self, msg: object, /, *args: object) -> Any:
        """As `logging.Logger.debug`."""

    def info(self, msg: object, /, *args: object) -> Any:
        """As `logging.Logger.info`."""

    def warning(self, msg: object, /, *args: object) -> Any:
        """As `logging.Logger.warning`."""

    def error(self, msg: object, /, *args: object) -> Any:
        """As `logging.Logger.error`."""
