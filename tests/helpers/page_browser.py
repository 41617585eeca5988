"""The dashboard's page in a real browser, and the pictures of it in ``docs``.

``python tests/helpers/page_browser.py`` makes the pictures anew, after a change of the page.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final, Literal

from playwright.sync_api import Browser, Page, sync_playwright

ROOT: Final = Path(__file__).parent.parent.parent
PROGRAM: Final = Path(__file__).parent / "page_cluster.py"
TOKEN: Final = "the-token-of-the-tests"
PATIENCE: Final = 60.0

PICTURES: Final[dict[str, tuple[Literal["dark", "light"], int, int]]] = {
    "dashboard-dark.png": ("dark", 1240, 800),
    "dashboard-light.png": ("light", 1240, 800),
    "dashboard-phone.png": ("dark", 360, 740),
}
"""The pictures: by their names the theme, the width and the height in pixels."""

_ENVIRONMENT: Final = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(("NATS_", "CHORUS_BACKBEAT_", "BACKBEAT_", "XDG_"))
}


def find_chromium() -> str | None:
    """Return the path of a Chromium that is installed; None is downloaded."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


def _line(process: subprocess.Popen[str]) -> str:
    # A program that fails closes its output, so this ends then, too.
    stdout: IO[str] | None = process.stdout
    assert stdout is not None
    line = stdout.readline().strip()
    if not line:
        raise RuntimeError(f"{process.args!r} ended with {process.wait(PATIENCE)}")
    return line


class Dashboard:
    """A cluster and its dashboard, each in a process of its own.

    Attributes:
      url: the address of the page.

    """

    def __init__(self, *arguments: str) -> None:
        self._cluster = subprocess.Popen(
            [sys.executable, str(PROGRAM), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=_ENVIRONMENT,
        )
        self._process: subprocess.Popen[str] | None = None
        try:
            self._nats = _line(self._cluster)
            self.url = ""
            self.start()
        except BaseException:
            self.close()
            raise

    def start(self) -> None:
        """Start the dashboard; after `stop` on the same port."""
        port = self.url.rstrip("/").rpartition(":")[2] or "0"
        command = [sys.executable, "-m", "backbeat_trio", "dashboard", "-s", self._nats]
        command += ["--cluster-id", "chorus-production", "--port", port]
        self._process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=_ENVIRONMENT | {"BACKBEAT_DASHBOARD_TOKEN": TOKEN},
        )
        self.url = _line(self._process)

    def stop(self) -> None:
        """End the dashboard, and leave the cluster as it is."""
        if self._process is not None:
            self._process.terminate()
            self._process.communicate(timeout=PATIENCE)

    def claim(self) -> None:
        """Have a claim published by an agent that falls silent after it."""
        assert self._cluster.stdin is not None
        self._cluster.stdin.write("claim\n")
        self._cluster.stdin.flush()

    def close(self) -> None:
        """End all of it."""
        self.stop()
        self._cluster.communicate(timeout=PATIENCE)


@contextmanager
def open_dashboard(*arguments: str) -> Generator[Dashboard, None, None]:
    """Run a cluster and its dashboard."""
    dashboard = Dashboard(*arguments)
    try:
        yield dashboard
    finally:
        dashboard.close()


@contextmanager
def open_browser() -> Generator[Browser, None, None]:
    """Run the browser."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium())
        try:
            yield browser
        finally:
            browser.close()


def wait_for_work(page: Page) -> None:
    """Wait until the page shows a cluster that has worked for some bars, and its plots."""
    page.wait_for_selector("#series canvas")
    page.wait_for_selector("#timeline .ran", state="attached")
    enough = (
        "() => Number(document.querySelector('.count.done b').textContent.replace(',', '')) > 60"
    )
    page.wait_for_function(enough)


def take_pictures(browser: Browser, url: str, folder: Path, *, calm: bool = False) -> None:
    """Write the pictures of the page into a folder; if `calm`, of a cluster on the beat."""
    for name, (theme, width, height) in PICTURES.items():
        page = browser.new_page(
            viewport={"width": width, "height": height},
            color_scheme=theme,
            reduced_motion="reduce",
        )
        try:
            page.set_default_timeout(1000 * PATIENCE)
            page.goto(url)
            wait_for_work(page)
            if calm:
                page.wait_for_function(
                    "() => document.title.startsWith('On the beat')", timeout=300_000
                )
            page.screenshot(path=folder / name)
        finally:
            page.close()


if __name__ == "__main__":
    with open_dashboard("--slow") as running, open_browser() as chromium:
        # So that the plots have something to show.
        time.sleep(40)
        take_pictures(chromium, running.url, ROOT / "docs", calm=True)
