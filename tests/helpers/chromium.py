"""Headless Chromium for tests of pages."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def _program() -> str | None:
    return "/usr/bin/chromium" if Path("/usr/bin/chromium").exists() else shutil.which("chromium")


def unavailable_reason() -> str | None:
    """Returns the reason why no browser is available, or None."""
    return None if _program() else "Chromium is not installed (apt-get install chromium)"


@contextmanager
def chromium() -> Iterator[Any]:
    """Starts Playwright's Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=_program(), args=list(ARGUMENTS))
        try:
            yield browser
        finally:
            browser.close()


class Seen:
    """Page with the errors and the requests of its browser.

    Args:
        browser: Browser from ``chromium``.
        options: Options of Playwright's ``new_page``: viewport, color_scheme.
    """

    def __init__(self, browser: Any, **options: Any) -> None:
        self.page = browser.new_page(**options)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        self.page.on("request", lambda request: self.requests.append(request.url))

    def open(self, where: Path | str) -> "Seen":
        """Opens a file or URL, and waits until it is rendered."""
        self.page.goto(where.absolute().as_uri() if isinstance(where, Path) else where)
        self.until("document.querySelector('#loss .main-svg') !== null")
        return self

    def until(self, condition: str) -> None:
        """Waits until a JavaScript condition holds; Playwright's own wait violates the page's policy against eval."""
        limit = time.monotonic() + 30
        while not self.page.evaluate(condition):
            assert time.monotonic() < limit, condition
            self.page.wait_for_timeout(20)

    def traces(self, chart: str, kind: str | None = None) -> list[dict[str, Any]]:
        """Returns the traces of a chart from Plotly: name, x, y and meta."""
        drawn = self.page.evaluate(
            "id => document.getElementById(id).data.map(t => ({name: t.name, x: t.x, y: t.y, meta: t.meta}))", chart
        )
        return [trace for trace in drawn if kind is None or trace["meta"]["kind"] == kind]

    def text(self, selector: str) -> str:
        return self.page.inner_text(selector)
