"""The dashboard's web server: hypercorn's connections, cut if a client does not read.

hypercorn shields what it sends from cancellation. So a client that stops reading keeps its
connection for ever, and keeps the server from ending. Here each connection has a stream that limits
the time of every send, and that the end of the server cuts.
"""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any, Final, final

import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState

from .._errors import BackbeatError

ASGIApp = Callable[
    [
        MutableMapping[str, Any],
        Callable[[], Awaitable[MutableMapping[str, Any]]],
        Callable[[MutableMapping[str, Any]], Awaitable[None]],
    ],
    Awaitable[None],
]

# The key in a request's state under which its connection lies.
CONNECTION: Final = "backbeat.connection"

_BACKLOG: Final = 100
# Connections beyond these are closed at once. Event streams have a lower limit of their own.
_MAX_CONNECTIONS: Final = 800
# What the system keeps of what a client has not read yet. By default it is up to some megabytes.
_SEND_BUFFER: Final = 256 * 1024
_KEEP_ALIVE: Final = 20.0
# How often it looks for clients that do not read, in seconds.
_LOOK: Final = 0.5

_logger = logging.getLogger("backbeat_trio")


@final
class Connection:
    """A client's connection, as hypercorn uses one.

    Args:
      stream: the connection itself.

    """

    def __init__(self, stream: trio.SocketStream) -> None:
        self.socket = stream.socket
        self.sending_since = math.inf
        """The time at which the present send began; ``inf`` if there is none."""
        self.stop_waiting: Callable[[], Awaitable[None]] | None = None
        """Ends the wait for another request."""
        self._stream = stream

    def send_now(self, data: bytes) -> int:
        """Send as much as can be sent without waiting. Not a checkpoint.

        Returns:
          How many bytes were sent; 0 if the client is gone, or something is being sent.

        """
        if self.sending_since < math.inf:
            return 0
        try:
            return os.write(self.socket.fileno(), data)
        except OSError:
            # If the client is gone, the next `send_all` says so.
            return 0

    async def send_all(self, data: bytes | memoryview) -> None:
        """Send all of some data.

        Raises:
          trio.BrokenResourceError: if the client is gone, or was cut off.

        """
        self.sending_since = trio.current_time()
        try:
            await self._stream.send_all(data)
        finally:
            self.sending_since = math.inf

    async def receive_some(self, max_bytes: int) -> bytes:
        """Receive some data, as a stream of Trio does."""
        data = b""
        try:
            data = await self._stream.receive_some(max_bytes)
        finally:
            if not data and self.stop_waiting is not None:
                # hypercorn would keep the connection until it has been idle for long.
                await self.stop_waiting()
        return data

    async def send_eof(self) -> None:
        """Say that nothing more is sent."""
        await self._stream.send_eof()

    async def aclose(self) -> None:
        """Close the connection."""
        await self._stream.aclose()

    def cut(self) -> None:
        """Cut the connection off, which ends what is sent or received. Not a checkpoint."""
        # The client may have closed it already.
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)


def bind(host: str, port: int) -> socket.socket:
    """Make the listening socket.

    Args:
      host: the name or address to listen on.
      port: the port; 0 is any free one.

    Raises:
      BackbeatError: if the address cannot be used.

    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise BackbeatError(f"cannot listen on {host}: {error.strerror or error}") from None
    try:
        listener.setblocking(False)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Connections take these over from the socket that listens.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise BackbeatError(
            f"cannot listen on {host}, port {port}: {error.strerror or error}"
        ) from None
    return listener


async def serve(
    app: ASGIApp,
    listener: socket.socket,
    *,
    send_timeout: float,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve an application until cancelled, which closes every connection at once. A checkpoint.

    Args:
      app: the application. The state of each request has its `Connection` under `CONNECTION`.
      listener: the socket of `bind`, which is closed at the end.
      send_timeout: how long a send may take, in seconds, until the client is cut off.
      task_status: is told when connections are accepted.

    """
    config = Config()
    config.keep_alive_timeout = _KEEP_ALIVE
    config.errorlog = _logger
    config.include_server_header = False
    wrapped, context = ASGIWrapper(app), WorkerContext(None)  # type: ignore[arg-type]
    connections: set[Connection] = set()

    async def handle(stream: trio.SocketStream) -> None:
        if len(connections) >= _MAX_CONNECTIONS:
            return
        connection = Connection(stream)
        connections.add(connection)
        try:
            state = ConnectionState({CONNECTION: connection})
            server = TCPServer(wrapped, config, context, state, connection)  # type: ignore[arg-type]
            connection.stop_waiting = server.idle_task.stop
            await server
        except Exception:
            # A client must not end the server, whatever it sends.
            _logger.exception("dashboard: a connection failed")
        finally:
            connections.discard(connection)

    async def cut_slow_ones() -> None:
        try:
            while True:
                await trio.sleep(min(_LOOK, send_timeout))
                begun = trio.current_time() - send_timeout
                for connection in connections:
                    if connection.sending_since < begun:
                        connection.cut()
        finally:
            # It is the end of the server, which must not wait for any client.
            for connection in connections:
                connection.cut()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(cut_slow_ones)
        listeners = [trio.SocketListener(trio.socket.from_stdlib_socket(listener))]
        task_status.started()
        await trio.serve_listeners(handle, listeners)
