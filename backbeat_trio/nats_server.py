"""Run a real nats-server on a free loopback port, for demonstrations and tests."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final, final
from urllib.parse import urlsplit

import msgspec
import trio

_READY: Final = 10.0
_STOP: Final = 5.0


def find_nats_server() -> str:
    """Return the path of the nats-server program.

    The program of the ``server`` extra is preferred to one on the search path.

    Raises:
      FileNotFoundError: if there is no such program.
    """
    path = shutil.which("nats-server", path=sysconfig.get_path("scripts"))
    path = path or shutil.which("nats-server")
    if path is None:
        raise FileNotFoundError("no nats-server: install the extra backbeat-trio[server]")
    return path


@final
class NatsServer:
    """A nats-server process on 127.0.0.1, with its files in a temporary folder.

    As an asynchronous context manager it starts the server, and stops it at the end of the block.

    Args:
      arguments: further arguments for the program, such as ``("--user", "u", "--pass", "p")``.
      config: the text of a configuration file. The address and the port are set by arguments.

    Raises:
      FileNotFoundError: if there is no nats-server program.

    """

    def __init__(self, arguments: Sequence[str] = (), *, config: str = "") -> None:
        self._program = find_nats_server()
        self._arguments = list(arguments)
        self._config = config
        self._folder = tempfile.TemporaryDirectory(prefix="backbeat-nats-")
        self._process: subprocess.Popen[bytes] | None = None
        self.port: int = 0
        """The port on which the server listens, 0 before the first start. It stays the same."""

    @property
    def url(self) -> str:
        """The address, ``nats://127.0.0.1:<port>``."""
        return f"nats://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """The process id of the server, once it was started."""
        assert self._process is not None, "the server was not started"
        return self._process.pid

    @property
    def log(self) -> str:
        """The text that the server has logged so far."""
        path = Path(self._folder.name, "log")
        return path.read_text(errors="replace") if path.exists() else ""

    async def start(self) -> None:
        """Start the server, and wait until it accepts clients. A checkpoint.

        A server that was started before gets the same port. If the start fails or is cancelled, no
        process is left.

        Raises:
          RuntimeError: if the server does not start within 10 seconds, with its log in the text; if
            it is already running; or if time is virtual, because a process takes real time.
        """
        if self._process is not None and self._process.poll() is None:
            raise RuntimeError(f"this nats-server is already running: {self.url}")
        # Imported here because only tests need it.
        from trio.testing import MockClock

        clock = trio.lowlevel.current_clock()
        if isinstance(clock, MockClock) and not clock.rate:
            raise RuntimeError("a nats-server needs a real clock, and this is virtual time")
        folder = Path(self._folder.name)
        command = [self._program, "-a", "127.0.0.1", "-p", str(self.port or -1), "-l"]
        command += [str(folder / "log"), "--ports_file_dir", str(folder), "-sd", str(folder / "js")]
        if self._config:
            path = folder / "server.conf"
            path.write_text(self._config)
            command += ["-c", str(path)]
        # The server gets its own process session, so that Ctrl-C in a terminal does not stop it.
        self._process = process = subprocess.Popen(  # noqa: ASYNC220 - it takes a millisecond
            [*command, *self._arguments], stdin=subprocess.DEVNULL, start_new_session=True
        )
        ports = folder / f"{Path(self._program).name}_{process.pid}.ports"
        try:
            # On a busy machine the server may be ready by now, and then nothing below waits.
            await trio.lowlevel.checkpoint()
            with trio.move_on_after(_READY):
                while process.poll() is None:
                    if ports.exists() and (text := ports.read_bytes()):
                        self.port = urlsplit(msgspec.json.decode(text)["nats"][0]).port or 0
                        return
                    await trio.sleep(0.005)
        except BaseException:
            self.kill()
            raise
        self.kill()
        raise RuntimeError(f"nats-server did not start: {self.log or process.returncode}")

    def kill(self) -> None:
        """Kill the server at once, as ``kill -9`` does, and wait for its end. Not a checkpoint."""
        self._signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait(_STOP)

    def pause(self) -> None:
        """Suspend the process (``SIGSTOP``). Its connections stay open, but do not answer."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Continue a suspended process (``SIGCONT``)."""
        self._signal(signal.SIGCONT)

    def reload(self, config: str) -> None:
        """Write another configuration file, and have the server read it.

        Args:
          config: the text of the file. Use it only if the server was made with a ``config``.

        """
        Path(self._folder.name, "server.conf").write_text(config)
        self._signal(signal.SIGHUP)

    def close(self) -> None:
        """Stop the server, and remove its folder. Not a checkpoint: it waits for at most 5 s."""
        try:
            self.resume()
            self._signal(signal.SIGTERM)
            if self._process is not None:
                try:
                    self._process.wait(_STOP)
                except subprocess.TimeoutExpired:
                    self.kill()
        finally:
            self._folder.cleanup()

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    async def __aenter__(self) -> NatsServer:
        try:
            await self.start()
        except BaseException:
            self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()
