"""``backbeat dashboard``."""

from __future__ import annotations

import re
import signal
import sys
from pathlib import Path

import httpx
import trio
from helpers import CLEAN, backbeat, guarded

from backbeat_trio._cli.dashboard import _is_loopback

from .programs import line_with, program

TOKEN = "a-token-of-some-length"


@guarded(120)
async def test_the_command_serves_until_ctrl_c(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(f"{TOKEN}\n")
    arguments = ["dashboard", "-s", "memory://dashboard", "--port", "0", "--token-file", str(token)]
    async with program(*arguments) as process:
        line = await line_with(process.stdout, "\n")
        url = re.fullmatch(r"(http://127\.0\.0\.1:(\d+))/\n", line)
        assert url is not None, line
        async with httpx.AsyncClient(base_url=url[1], timeout=60) as client:
            assert (await client.get("/healthz")).status_code == 200
            headers = {"Authorization": f"Bearer {TOKEN}"}
            response = await client.post("/api/v1/resume", json={}, headers=headers)
            assert response.status_code == 409
            assert "not paused" in response.json()["detail"]
            stream = await trio.open_tcp_stream("127.0.0.1", int(url[2]))
            await stream.send_all(b"GET /api/v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert await stream.receive_some()
            process.send_signal(signal.SIGINT)
            assert await process.wait() == 130
        await stream.aclose()
        assert process.stderr is not None
        assert b"Traceback" not in await process.stderr.receive_some()


async def test_mistakes_of_the_command(tmp_path: Path) -> None:
    short = tmp_path / "short"
    short.write_text("x")
    start = ("dashboard", "-s", "memory://dashboard", "--port", "0")
    for arguments, text in (
        (("--token-file", str(short)), "characters"),
        (("--token-file", str(tmp_path / "none")), "cannot be read"),
        (("--host", "no.such.host.invalid"), "cannot listen"),
    ):
        result = await backbeat(*start, *arguments)
        assert result.returncode == 1, result
        assert text in result.stderr.decode()
        assert b"Traceback" not in result.stderr


async def test_the_command_names_a_missing_extra() -> None:
    code = (
        "import sys; sys.modules['starlette'] = None; "
        "from backbeat_trio.__main__ import main; sys.argv = ['backbeat', 'dashboard']; "
        "sys.exit(main())"
    )
    result = await trio.run_process(
        [sys.executable, "-c", code], capture_stderr=True, check=False, env=CLEAN
    )
    assert result.returncode == 1
    assert b"pip install 'backbeat-trio[dashboard]'" in result.stderr


def test_only_loopback_needs_no_warning() -> None:
    assert _is_loopback("127.0.0.1")
    assert _is_loopback("::1")
    assert not _is_loopback("0.0.0.0")
    assert not _is_loopback("fe80::1%eth0")
