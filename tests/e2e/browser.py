"""A real Chromium before the playground: pages, waiting, and what was made."""

from __future__ import annotations

import base64
import io
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from PIL import Image

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
SECONDS = 120_000
PROMPT = "a red circle on a blue background"


@contextmanager
def browser_page(url: str, **context: Any) -> Iterator[Any]:
    """The playground of a server, in a browser of its own; errors of the page, and requests to
    anybody else, fail the test."""
    sync_api = pytest.importorskip("playwright.sync_api")
    problems: list[str] = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        opened = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **context})
        opened.set_default_timeout(SECONDS)
        page = opened.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: only_here(request.url, problems))
        page.on("dialog", lambda dialog: dialog.accept())
        page.goto(url)
        yield page
        browser.close()
    assert problems == []


def filled(page: Any, size: str = "64x64") -> Any:
    """The form of a page that knows its model, ready to be sent."""
    page.wait_for_selector("#size option", state="attached")
    page.fill("#prompt", PROMPT)
    page.fill("#seed", "7")
    page.check("#lock")
    page.select_option("#size", "other")
    page.fill("#size-text", size)
    return page


def only_here(url: str, problems: list[str]) -> None:
    if not url.startswith(("http://127.0.0.1:", "data:", "blob:")):
        problems.append(f"asked for {url}")


def until(page: Any, script: str, *given: Any) -> None:
    """The page's policy forbids it to be asked in its own time: it is asked again and again."""
    deadline = time.monotonic() + SECONDS / 1000
    while not page.evaluate(script, *given):
        assert time.monotonic() < deadline, script
        page.wait_for_timeout(50)


def kind(page: Any, name: str) -> None:
    page.check(f"input[value={name}]", force=True)


def done(page: Any) -> str:
    until(page, "document.getElementById('state').textContent.startsWith('Done')")
    return str(page.inner_text("#state"))


def made(page: Any) -> np.ndarray:
    """Press the button and wait: the pixels of the picture that comes of it."""
    page.evaluate("document.getElementById('state').textContent = ''")
    page.click("#go")
    done(page)
    return pixels(page)


def pixels(page: Any) -> np.ndarray:
    source = page.get_attribute("#view img", "src")
    assert source.startswith("data:"), source[:40]
    return opened(io.BytesIO(base64.b64decode(source.partition(",")[2])))


def opened(file: Any) -> np.ndarray:
    with Image.open(file) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)
