"""The event loop of a connection: how it looks up host names, and where it logs."""

from __future__ import annotations

import asyncio
import functools
import logging
import socket
import threading
from concurrent.futures import Future
from typing import Any, Final, final

import nats.aio.client

_LOGGER: Final = logging.getLogger("backbeat_trio")
THREAD: Final = "backbeat-nats-"
"""The beginning of the name of each connection's thread."""

_Lookup = tuple[Any, ...]
_lookups: dict[_Lookup, Future[list[Any]]] = {}
_lookups_lock = threading.Lock()


def _look_up(what: _Lookup) -> Future[list[Any]]:
    # By default asyncio looks up names in threads for which the interpreter waits when it exits,
    # and each attempt to connect takes one more. A name server may need minutes. So all attempts
    # that look up the same name share one daemon thread.
    with _lookups_lock:
        future = _lookups.get(what)
        if future is None:
            future = Future()
            # A running future cannot be cancelled, so an attempt that gives up does not affect the
            # others.
            future.set_running_or_notify_cancel()
            threading.Thread(
                target=_finish_lookup, args=(what, future), name="backbeat-resolver", daemon=True
            ).start()
            _lookups[what] = future
    return future


def _finish_lookup(what: _Lookup, future: Future[list[Any]]) -> None:
    try:
        found = socket.getaddrinfo(*what)
    except Exception as error:  # noqa: BLE001 - it is raised where the name was needed
        outcome = functools.partial(future.set_exception, error)
    else:
        outcome = functools.partial(future.set_result, found)
    with _lookups_lock:
        del _lookups[what]
    outcome()


@final
class ConnectionLoop(asyncio.SelectorEventLoop):
    """An event loop that needs no executor, and logs to the package's own logger."""

    async def getaddrinfo(
        self,
        host: Any,
        port: Any,
        *,
        family: int = 0,
        type: int = 0,
        proto: int = 0,
        flags: int = 0,
    ) -> list[Any]:
        return await asyncio.wrap_future(_look_up((host, port, family, type, proto, flags)))

    def default_exception_handler(self, context: dict[str, Any]) -> None:
        # The text for a callback that failed shows its arguments, which may be secret.
        text = "Exception in callback" if "handle" in context else context.get("message")
        _LOGGER.debug("asyncio: %s", text, exc_info=context.get("exception"))


def _redirect(record: logging.LogRecord) -> bool:
    # If logging is not configured, Python writes warnings to stderr. Those of asyncio and nats-py
    # in the threads of connections follow from a lost connection, which is reported anyway.
    if record.levelno < logging.WARNING or not (record.threadName or "").startswith(THREAD):
        return True
    if "eof_received" in record.getMessage():
        # asyncio logs this whenever a TLS connection ends. It does not mean anything.
        return False
    _LOGGER.debug("%s: %s", record.name, record.getMessage(), exc_info=record.exc_info)
    return False


for _name in ("asyncio", nats.aio.client.__name__):
    logging.getLogger(_name).addFilter(_redirect)
