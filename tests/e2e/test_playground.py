"""The playground in a real browser against a real server.

They run where a Chromium and playwright are installed (`pip install 'sgl-diffusion[browser]'`).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.server import Server, running_server

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here"),
]
SECONDS = 120_000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(tmp_path_factory.mktemp("page") / "data") as server:
        yield server


@pytest.fixture
def page(server: Server) -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    problems: list[str] = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": 1280, "height": 900})
        context.set_default_timeout(SECONDS)
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: _only_here(request.url, problems))
        page.on("dialog", lambda dialog: dialog.accept())
        page.goto(server.url)
        page.wait_for_selector("#size option", state="attached")
        page.fill("#prompt", "a red circle on a blue background")
        page.fill("#seed", "7")
        page.check("#lock")
        page.select_option("#size", "other")
        page.fill("#size-text", "64x64")
        yield page
        browser.close()
    assert problems == []


def _only_here(url: str, problems: list[str]) -> None:
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


def test_an_image_with_previews_and_a_gallery_that_stays(page: Any, server: Server) -> None:
    page.fill("#steps", "30")
    page.click("#go")
    page.wait_for_selector("#view img.coming")
    assert "seed 7" in done(page)
    assert page.evaluate("document.querySelector('#view img').naturalWidth") == 64
    page.reload()
    page.click("#gallery li:first-child button")
    page.wait_for_selector("#view img")
    page.click("#again")
    assert page.input_value("#prompt") == "a red circle on a blue background"
    assert page.input_value("#seed") == "7"
    page.click("#delete")
    until(page, "document.querySelectorAll('#gallery li').length === 0")
    assert server.http.get("/v1/images").json()["data"] == []


def test_a_video_plays(page: Any) -> None:
    kind(page, "video")
    page.select_option("#frames", "17")
    page.click("#go")
    done(page)
    until(page, "document.querySelector('#view video').readyState >= 2")
    assert page.evaluate("document.querySelector('#view video').videoWidth") == 64
    until(page, "document.querySelector('#view video').currentTime > 0.2")


def test_a_video_is_cancelled(page: Any, server: Server) -> None:
    """By the keyboard alone; what was there before is in view again, with what is done to it."""
    page.click("#go")
    done(page)
    before = page.get_attribute("#view img", "src")
    kind(page, "video")
    page.fill("#steps", "200")
    page.focus("#go")
    page.keyboard.press("Enter")
    page.wait_for_selector("#view .coming")
    assert page.is_hidden("#tools"), "they would be for what is not in view"
    assert page.evaluate("document.activeElement.id") == "cancel"
    page.keyboard.press("Enter")
    until(page, "document.getElementById('state').textContent === 'Cancelled.'")
    page.wait_for_selector("#go:not([disabled])")
    assert page.evaluate("document.activeElement.id") == "go"
    assert page.get_attribute("#view img", "src") == before and page.is_visible("#tools")
    videos = server.http.get("/v1/videos").json()["data"]
    assert all(video["status"] == "completed" for video in videos)


def test_an_edit_of_what_was_made_with_a_painted_mask(page: Any) -> None:
    page.click("#go")
    done(page)
    page.click("#as-input")
    page.wait_for_selector("#painting:not([hidden])")
    box = page.locator("#canvas").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2 + 20, box["y"] + box["height"] / 2)
    page.mouse.up()
    before = page.get_attribute("#view img", "src")
    page.click("#go")
    until(
        page,
        "before => { const image = document.querySelector('#view img:not(.coming)');"
        " return image !== null && image.src !== before }",
        before,
    )
    assert page.is_hidden("#problem")


def test_the_settings_of_what_was_made_come_back(page: Any) -> None:
    page.fill("#steps", "3")
    page.fill("#guidance", "2.5")
    page.click("#go")
    done(page)
    page.fill("#steps", "4")
    page.fill("#guidance", "1")
    page.click("summary:has-text('Negative')")
    page.fill("#negative", "blue")
    page.click("#again")
    values = [page.input_value(field) for field in ("#steps", "#guidance", "#negative", "#seed")]
    assert values == ["3", "2.5", "", "7"]
    page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    page.click("#copy-curl")  # a page of another machine, without https, has no clipboard
    until(page, "document.getElementById('copy-curl').textContent === 'Copied'")
    page.fill("#prompt", "")
    page.focus("#prompt")
    page.keyboard.press("Control+V")
    assert page.input_value("#prompt").startswith("curl http://127.0.0.1:")


def test_wrong_input_is_told_in_the_words_of_the_server(page: Any) -> None:
    page.fill("#size-text", "65x64")
    page.click("#go")
    page.wait_for_selector("#problem:not([hidden])")
    assert "multiple" in page.inner_text("#problem")
    page.wait_for_selector("#go:not([disabled])")


def test_dark_and_light(page: Any) -> None:
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    page.reload()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before


def test_a_key_is_asked_for_and_then_enough(page: Any, tmp_path: Path) -> None:
    key = "key-0123456789abcdef"
    (tmp_path / "keys").write_text(key)
    with running_server(tmp_path / "data", "--api-key-file", str(tmp_path / "keys")) as locked:
        page.goto(locked.url)
        page.wait_for_selector("#key-part[open]")
        page.fill("#key", key)
        page.press("#key", "Enter")
        page.wait_for_selector("#size option", state="attached")
