"""A real browser, and pages to open in it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Error, Page, Request, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """The system's Chromium, or playwright's own; the test is skipped where there is neither."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    with sync_playwright() as playwright:
        try:
            # Its sandbox needs what containers withhold; these pages are our own.
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except Error as error:
            pytest.skip(f"no browser: {str(error).splitlines()[0]}: apt install chromium")
        yield browser
        browser.close()


@dataclass
class Opened:
    """A page that is open, and what it has said and asked for since."""

    page: Page
    said: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def hear(self, message: ConsoleMessage) -> None:
        if "willReadFrequently" not in message.text:  # it is the tests that read the pixels back
            self.said.append(f"{message.type}: {message.text}")

    def see(self, request: Request) -> None:
        self.requests.append(request.url)

    def film(self, script: str, at: int = 0, argument: Any = None) -> Any:
        """What ``(film, argument) => …`` gives for one of the matrices of the page."""
        figure = self.page.locator(".film").nth(at)
        return figure.evaluate(f"(figure, argument) => ({script})(figure.film, argument)", argument)

    def to_step(self, step: int, at: int = 0) -> None:
        """Move the slider as a reader does: by its keys."""
        slider = self.page.locator(".film").nth(at).locator("input[type=range]")
        slider.press("Home")
        for _ in range(step):
            slider.press("ArrowRight")

    def facts(self, at: int = 0) -> dict[str, str]:
        """What is told of the chosen page, as it is read."""
        rows = self.page.locator(".film").nth(at).locator(".facts dl > div").all()
        return {row.locator("dt").inner_text(): row.locator("dd").inner_text() for row in rows}


Open = Callable[..., Opened]


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """``open_page(path, width=1200, **of_the_context)``: a page, opened from the disk and drawn.

    At the end it must have said nothing on the console and asked for nothing but itself.
    """
    contexts: list[BrowserContext] = []
    every: list[tuple[Path, Opened]] = []

    def open_it(path: Path, width: int = 1200, height: int = 900, **options: Any) -> Opened:
        options = {"viewport": {"width": width, "height": height}, "reduced_motion": "reduce"} | options
        context = browser.new_context(**options)
        contexts.append(context)
        opened = Opened(context.new_page())
        every.append((path, opened))
        opened.page.on("console", opened.hear)
        opened.page.on("pageerror", lambda error: opened.said.append(str(error)))
        context.on("request", opened.see)
        opened.page.goto(path.as_uri())
        if options.get("java_script_enabled", True):
            opened.page.wait_for_selector("html[data-ready]", state="attached")
        return opened

    yield open_it
    for context in contexts:
        context.close()
    for path, opened in every:
        assert opened.said == []
        assert opened.requests == [path.as_uri()]
