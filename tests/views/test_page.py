"""The dashboard's page, in Debian's Chromium."""

from __future__ import annotations

import gzip
import json
import re
import struct
from collections.abc import Callable, Generator
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

pytest.importorskip("playwright", reason="playwright is not installed")
pytest.importorskip("starlette", reason="the extra `dashboard` is not installed")
pytest.importorskip("hypercorn", reason="the extra `dashboard` is not installed")

from page_browser import (
    PATIENCE,
    PICTURES,
    ROOT,
    TOKEN,
    Dashboard,
    find_chromium,
    open_browser,
    open_dashboard,
    take_pictures,
    wait_for_work,
)
from page_cluster import HOSTILE, LATE, OVERRIDE, SILENT, STUCK
from playwright.sync_api import Browser, Locator, Page, expect

if find_chromium() is None:
    pytest.skip("Chromium is not installed", allow_module_level=True)

expect.set_options(timeout=1000 * PATIENCE)

# Kept by the page's own world, and before any of its scripts runs.
WATCH = """
window.violations = [];
addEventListener("securitypolicyviolation", (event) => violations.push(event.violatedDirective));
"""
TIMES = """() => [
    performance.getEntriesByName("backbeat-useful")[0].startTime,
    performance.getEntriesByName(new URL("static/uplot.min.js", location))[0].startTime,
]"""
WCAG = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]


@pytest.fixture(scope="session")
def dashboard() -> Generator[Dashboard, None, None]:
    with open_dashboard("--hostile") as running:
        yield running


@pytest.fixture(scope="session")
def browser() -> Generator[Browser, None, None]:
    with open_browser() as running:
        yield running


class Sight:
    """A page that shows the dashboard, and what went wrong in it."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.faults: list[str] = []
        self.hosts: set[str | None] = set()
        page.set_default_timeout(1000 * PATIENCE)
        page.add_init_script(WATCH)
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.on("dialog", lambda dialog: self.faults.append(dialog.message))
        page.on("request", lambda request: self.hosts.add(urlsplit(request.url).hostname))

    def open(self, url: str) -> None:
        self.page.goto(url)
        expect(self.page.locator("#facts")).to_contain_text("locked")

    def row(self, text: str) -> Locator:
        return self.page.locator("#operations tbody tr").filter(has_text=text)

    def check(self) -> None:
        """Check that nothing went wrong."""
        assert self.faults == []
        assert self.hosts == {"127.0.0.1"}
        assert self.page.evaluate("[window.violations, window.pwned ?? null]") == [[], None]


@pytest.fixture
def sight(dashboard: Dashboard, browser: Browser) -> Generator[Sight, None, None]:
    page = browser.new_page(viewport={"width": 1300, "height": 900}, reduced_motion="reduce")
    shown = Sight(page)
    try:
        shown.open(dashboard.url)
        yield shown
    finally:
        page.close()
    assert shown.faults == []


def test_first_line_says_which_operations_are_late_and_where(sight: Sight) -> None:
    page = sight.page
    expect(page.locator("h1")).to_contain_text("operations are late")
    expect(page.locator("#where")).to_contain_text("chorus-03")
    expect(page.locator("#where")).to_contain_text("chorus-05")
    facts = page.locator("#facts")
    expect(facts).to_contain_text("pulse-")
    expect(facts.locator("div", has_text="Standbys").locator("dd")).to_have_text("1")
    expect(page.locator("#link")).to_contain_text("Live")
    expect(page.locator("#tempo")).to_have_text(re.compile(r"(120|240) BPM"))
    late = sight.row(LATE)
    expect(late).to_contain_text("over")
    expect(late.locator("td .tag").first).to_have_text("late")
    expect(page.locator("#agents tbody tr").first).to_contain_text("chorus-0")
    # The beat moves on between the events of the server.
    before = page.locator("#beat").inner_text()
    expect(page.locator("#beat")).not_to_have_text(before)
    sight.check()


def test_first_line_says_that_permissions_refuse_the_claims(sight: Sight) -> None:
    page = sight.page
    snapshot = page.evaluate("fetch('api/v1/snapshot').then((answer) => answer.json())")
    assert snapshot["grid"]["claims_refused"] is False
    snapshot["grid"]["claims_refused"] = True
    body = f"data: {json.dumps(snapshot)}\n\n"
    page.route(
        "**/api/v1/events*",
        lambda route: route.fulfill(content_type="text/event-stream", body=body),
    )
    page.reload()
    expect(page.locator("#verdict")).to_have_text("Permissions keep all claims from here")
    expect(page.locator("#now")).to_have_attribute("data-tone", "late")
    assert sight.faults == []


def test_hostile_strings_are_shown_as_text(sight: Sight, dashboard: Dashboard) -> None:
    page = sight.page
    dashboard.claim()
    for name in HOSTILE:
        page.fill("[name=text]", name)
        link = sight.row(name).locator("a").first
        expect(link).to_have_text(name)
        link.click()
        expect(page.locator("#operation-title")).to_have_text(name)
        expect(page.locator("#operation-body .facts")).to_contain_text("<")
        page.keyboard.press("Escape")
    page.fill("[name=text]", "invoice")
    expect(sight.row("gnp.exe")).to_have_count(1)
    assert OVERRIDE[7] not in page.inner_text("body")
    # The phase, the type and the notes of this one are hostile as well.
    page.fill("[name=text]", "")
    page.select_option("[name=timing]", "silent")
    expect(sight.row(HOSTILE[1])).to_contain_text("silent")
    expect(page.locator("#agents tbody tr", has_text=SILENT)).to_contain_text("silent")
    sight.row(HOSTILE[1]).locator("a").click()
    expect(page.locator("#operation-body .notes")).to_contain_text("<img")
    assert len(page.inner_text("#operation-body .notes")) <= 200
    for details in page.locator("details").all():
        details.evaluate("(details) => { details.open = true; }")
    page.wait_for_selector("#timeline-table table", state="attached")
    assert page.locator("main img, main script, main b b, bdi b").count() == 0
    sight.check()


def test_filters_combine_and_can_be_shared(sight: Sight, browser: Browser) -> None:
    page = sight.page
    page.fill("[name=agent]", "chorus-05")
    expect(sight.row("chorus-03")).to_have_count(0)
    page.click(".count.late")
    expect(page.locator("#operations tbody tr")).to_have_count(1)
    expect(sight.row(STUCK)).to_have_count(1)
    assert "agent=chorus-05" in page.url
    assert page.get_attribute(".count.late", "aria-pressed") == "true"
    # The address has all of it.
    other = Sight(browser.new_page())
    try:
        other.open(page.url)
        expect(other.page.locator("#operations tbody tr")).to_have_count(1)
        assert other.page.input_value("[name=agent]") == "chorus-05"
    finally:
        other.page.close()
    page.click("text=Clear")
    expect(sight.row(LATE)).to_have_count(1)
    assert "?" not in page.url
    page.click("#operations th >> text=Operation")
    expect(page.locator("#operations th").first).to_have_attribute("aria-sort", "ascending")
    # The rows follow with the next state.
    page.wait_for_function(
        """() => {
            const links = document.querySelectorAll("#operations tbody th a");
            const names = Array.from(links, (link) => link.textContent);
            return names.length > 1 && names.every((name, at) => !at || names[at - 1] <= name);
        }"""
    )
    page.click("#agents-title")
    page.keyboard.press("n")
    expect(page.locator("#operations-pages")).to_contain_text("26\N{EN DASH}")
    page.select_option("[name=limit]", "100")
    expect(page.locator("#operations-pages")).to_be_hidden()
    page.fill("[name=text]", "no such operation")
    expect(page.locator("#operations-shown")).to_have_text("No operation matches the filters.")
    # The address of a page that the list does not have any more.
    sight.open(f"{page.url.partition('?')[0]}?offset=1000")
    expect(sight.row(LATE)).to_have_count(1)
    assert "offset" not in page.url
    sight.check()


def test_an_operation_that_is_not_known_is_reported_once(sight: Sight) -> None:
    page = sight.page
    page.evaluate("location.hash = 'chorus-03/nothing'")
    words = page.locator("#operation-body [role=alert]")
    expect(words).to_contain_text("not known here")
    alert = words.element_handle()
    assert alert is not None
    # Each answer has been shown before the page asks again.
    for _ in range(3):
        with page.expect_response("**/operations/chorus-03/nothing"):
            pass
    assert alert.evaluate("(alert) => alert.isConnected")


def test_keyboard_alone_does_it_and_rows_keep_focus_and_selection(sight: Sight) -> None:
    page = sight.page
    link = sight.row(LATE).locator("a")
    link.focus()
    version = page.locator("#beat").inner_text()
    link.evaluate("(link) => getSelection().selectAllChildren(link)")
    expect(page.locator("#beat")).not_to_have_text(version)
    page.wait_for_timeout(1000)
    assert link.evaluate("(link) => document.activeElement === link")
    assert page.evaluate("getSelection().toString()") == LATE
    page.keyboard.press("Enter")
    body = page.locator("#operation-body")
    expect(body).to_contain_text("chorus-03")
    expect(body.locator("tbody tr", has_text="executing")).to_have_count(1)
    page.keyboard.press("Escape")
    expect(page.locator("#operation-dialog")).to_be_hidden()
    assert "#" not in page.url
    page.keyboard.press("l")
    expect(page.locator("[name=timing]")).to_have_value("late")
    page.keyboard.press("a")
    page.keyboard.press("/")
    page.keyboard.type("f?")
    assert page.input_value("[name=text]") == "f?"
    expect(sight.row(LATE)).to_have_count(0)
    page.locator("#hold").focus()
    page.keyboard.press("f")
    expect(page.locator("#frozen")).to_be_visible()
    frozen = page.locator("#beat").inner_text()
    page.wait_for_timeout(1500)
    assert page.locator("#beat").inner_text() == frozen
    page.keyboard.press("f")
    expect(page.locator("#beat")).not_to_have_text(frozen)
    page.keyboard.press("t")
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    # Who dictates switches single keys off, which stays so.
    page.keyboard.press("?")
    page.locator("#keys-on").uncheck()
    page.keyboard.press("Escape")
    page.reload()
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    page.keyboard.press("?")
    expect(page.locator("#help-dialog")).to_be_hidden()
    sight.check()


def test_actions_need_the_token_and_say_what_they_did(sight: Sight) -> None:
    page = sight.page
    token, act = page.locator("#token-dialog"), page.locator("#act-dialog")

    page.click("#set-tempo")
    token.locator("input").fill("wrong")
    page.keyboard.press("Enter")
    expect(token.locator(".error")).to_have_text("the token is wrong")
    token.locator("input").fill(TOKEN)
    page.keyboard.press("Enter")
    expect(token).to_be_hidden()
    act.locator("[name=bpm]").fill("240")
    page.keyboard.press("Enter")
    expect(page.locator("#announce")).to_contain_text("The tempo changes at beat")
    expect(page.locator("#tempo")).to_have_text("240 BPM")

    # An operation that has parts, and that can be cancelled.
    sight.row(STUCK).first.locator("a").click()
    expect(page.locator(".tree")).to_contain_text("shard-1")
    page.click(".tree >> text=shard-2")
    expect(page.locator("#operation-title")).to_have_text("shard-2")
    page.click(f".tree >> text={STUCK}")
    expect(page.locator("#operation-title")).to_have_text(STUCK)
    page.click("text=Cancel this operation")
    expect(act).to_contain_text("This cannot be taken back.")
    act.locator("[name=reason]").fill("a <b>newer</b> index")
    act.locator(".main").click()
    expect(page.locator("#operation-body .notes")).to_contain_text("a <b>newer</b> index")
    expect(page.locator("#operation-body")).not_to_contain_text("Cancel this operation")
    page.keyboard.press("Escape")

    page.click("#pause")
    act.locator(".main").click()
    expect(page.locator("h1")).to_contain_text("The beat is paused")
    expect(page.locator("#announce")).to_contain_text("The beat is paused")
    page.click("#pause")
    expect(act).to_contain_text("Resume the beat?")
    act.locator(".main").click()
    expect(page.locator("h1")).not_to_contain_text("paused")
    # What only somebody who is signed in may read goes with the page.
    page.evaluate("window.former = true")
    page.click("#token")
    page.wait_for_function("() => !window.former")
    expect(page.locator("#facts")).to_contain_text("locked")
    expect(page.locator("#token")).to_have_text("Sign in")
    sight.check()


def test_lost_connection_is_shown_until_it_is_back(sight: Sight, dashboard: Dashboard) -> None:
    page = sight.page
    dashboard.stop()
    try:
        expect(page.locator("#link")).to_contain_text("Connection lost")
        expect(page.locator("#link")).to_contain_text("old")
        expect(page.locator("#announce")).to_contain_text("is lost")
    finally:
        dashboard.start()
    expect(page.locator("#link")).to_contain_text("Live")
    expect(page.locator("#announce")).to_contain_text("is back")
    expect(sight.row(LATE)).to_have_count(1)
    sight.check()


@pytest.mark.parametrize("theme", ["dark", "light"])
def test_axe_finds_nothing(sight: Sight, theme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page = sight.page
    wait_for_work(page)
    # One agent has all kinds of elements, and axe takes long for thousands of them.
    page.fill("[name=agent]", "chorus-03")
    expect(sight.row("chorus-05")).to_have_count(0)
    page.emulate_media(color_scheme="dark" if theme == "dark" else "light")

    def check(context: str | None = None) -> None:
        found: list[dict[str, Any]] = axe.run(page, context, options).response["violations"]
        told = [(each["id"], node["html"]) for each in found for node in each["nodes"]]
        assert told == []

    options = {"runOnly": {"type": "tag", "values": WCAG}, "resultTypes": ["violations"]}
    for details in page.locator("details").all():
        details.evaluate("(details) => { details.open = true; }")
    page.wait_for_selector("#timeline-table table")
    check()
    page.set_viewport_size({"width": 360, "height": 740})
    check()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    for opened, dialog in (("#help", "#help-dialog"), ("#token", "#token-dialog")):
        page.click(opened)
        expect(page.locator(dialog)).to_be_visible()
        check(dialog)
        page.keyboard.press("Escape")
    sight.row(LATE).locator("a").click()
    expect(page.locator("#operation-body table")).to_be_visible()
    check("#operation-dialog")
    assert sight.faults == []


def test_page_is_light_and_shows_first_what_matters(
    sight: Sight, record_property: Callable[[str, object], None]
) -> None:
    """The times are recorded only: they are seconds of a real clock, and the machine is busy."""
    folder = resources.files("backbeat_trio._views").joinpath("static")
    files = {item.name: item.read_bytes() for item in folder.iterdir()}
    assert b"MIT License" in files["uplot.LICENSE.txt"]
    sent = [body for name, body in files.items() if name.endswith((".html", ".css", ".js"))]
    assert sum(map(len, sent)) <= 120_000
    assert sum(len(gzip.compress(body, mtime=0)) for body in sent) <= 50_000
    useful = []
    for _ in range(3):
        sight.page.reload()
        sight.page.wait_for_selector("#series canvas")
        times = sight.page.evaluate(TIMES)
        assert times[0] <= times[1], "the library of the plot is loaded before the first figures"
        useful.append(times[0])
    record_property("useful_ms", min(useful))
    sight.check()


def test_pictures_in_the_docs_are_of_this_page(
    browser: Browser, dashboard: Dashboard, tmp_path: Path
) -> None:
    """They cannot be compared dot by dot, as the cluster does something else each time."""
    take_pictures(browser, dashboard.url, tmp_path)
    for name, (_, width, height) in PICTURES.items():
        for path in (tmp_path / name, ROOT / "docs" / name):
            picture = path.read_bytes()
            assert struct.unpack(">8x8xII", picture[:24]) == (width, height)
            assert 10_000 < len(picture) < 250_000
