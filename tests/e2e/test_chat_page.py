"""The chat page in a real browser against a real server with the tiny model.

They run where a Chromium and playwright are installed (`pip install 'sgl-diffusion[browser]'`).
"""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ar.chats import make_media
from tests.e2e.browser import CHROMIUM, SECONDS, only_here
from tests.e2e.server import Server
from tests.e2e.test_omni import OmniServer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here"),
]
SHOTS = os.environ.get("SCREENSHOTS")


@pytest.fixture(scope="module")
def server(tiny_qwen3_omni: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("chat") / "data"
    running = OmniServer(folder, "--model-path", str(tiny_qwen3_omni))
    try:
        yield running.wait_ready()
    finally:
        running.close()


@pytest.fixture
def page(server: Server) -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    problems: list[str] = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": 1180, "height": 800})
        context.set_default_timeout(SECONDS)
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: only_here(request.url, problems))
        page.goto(server.url)
        page.wait_for_selector("#voice option", state="attached")
        page.fill("#tokens", "24")
        page.fill("#seed", "7")
        yield page
        browser.close()
    assert problems == []


def until(page: Any, script: str) -> None:
    deadline = time.monotonic() + SECONDS / 1000
    while not page.evaluate(script):
        assert time.monotonic() < deadline, script
        page.wait_for_timeout(50)


def ask(page: Any, text: str) -> None:
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def answered(page: Any, count: int) -> None:
    until(page, f"document.querySelectorAll('.assistant .under').length === {count}")


def shoot(page: Any, name: str) -> None:
    if SHOTS:
        page.screenshot(path=str(Path(SHOTS) / f"{name}.png"))


def test_a_chat_in_text_goes_on_and_begins_anew(page: Any, server: Server) -> None:
    assert page.inner_text("#model") == "qwen3-omni"
    ask(page, "a red fox")
    answered(page, 1)
    said = page.inner_text(".assistant .said")
    body = {
        "messages": [{"role": "user", "content": "a red fox"}],
        "temperature": 0.7,
        "max_tokens": 24,
        "seed": 7,
    }
    told = server.http.post("/v1/chat/completions", json=body).json()
    expected = told["choices"][0]["message"]["content"]
    assert " ".join(said.split()) == " ".join(expected.split())
    ask(page, "and a boat")
    answered(page, 2)
    assert page.locator(".user .said").all_inner_texts() == ["a red fox", "and a boat"]
    wide = "[...document.querySelectorAll('.user .said')].map((said) => said.clientWidth)"
    assert all(width < 200 for width in page.evaluate(wide)), "as wide as what is said"
    shoot(page, "chat-text")
    page.click("#clear")
    assert page.locator("#talk li").count() == 0
    ask(page, "a red fox")
    answered(page, 1)
    assert page.inner_text(".assistant .said") == said


def test_a_spoken_answer_is_played_and_can_be_heard_again(page: Any) -> None:
    page.check("#speak")
    page.select_option("#voice", "chelsie")
    page.fill("#tokens", "6")
    ask(page, "a cat")
    answered(page, 1)
    length = "document.querySelector('.assistant audio')?.duration > 0.2"
    until(page, length)
    said, told = page.evaluate(
        "['said', 'under'].map((name) => document.querySelector(`.assistant .${name}`).clientWidth)"
    )
    assert said < told, "a short answer does not stretch"
    shoot(page, "chat-spoken")


def test_a_picture_goes_with_the_question(page: Any, tmp_path: Path) -> None:
    picture = make_media(tmp_path)["image"]
    page.set_input_files("#file", str(picture))
    page.wait_for_selector("#pieces button")
    ask(page, "what is it")
    answered(page, 1)
    source = page.get_attribute(".user img", "src")
    assert base64.b64decode(source.partition(",")[2]) == picture.read_bytes()
    shoot(page, "chat-picture")


def test_stopping_keeps_what_came_and_refusals_are_shown(page: Any) -> None:
    page.fill("#tokens", "4000")
    page.fill("#temperature", "1.5")
    ask(page, "a long story")
    until(page, "document.querySelector('.assistant .said')?.textContent.length > 20")
    page.click("#stop")
    answered(page, 1)
    assert "stopped" in page.inner_text(".assistant .under")
    page.fill("#temperature", "9")
    ask(page, "too hot")
    page.wait_for_selector("#problem:not([hidden])")
    assert "temperature" in page.inner_text("#problem")
    assert page.input_value("#prompt") == "too hot"
    assert page.locator(".user").count() == 1


def test_the_page_fits_a_small_screen_in_the_dark(page: Any) -> None:
    page.emulate_media(color_scheme="dark")
    page.set_viewport_size({"width": 390, "height": 800})
    ask(page, "the sea")
    answered(page, 1)
    assert page.evaluate("document.documentElement.scrollWidth <= 390")
    for text in ("and a boat", "and a cat", "and a dog", "and the moon", "and a fox"):
        count = page.locator(".assistant").count()
        ask(page, text)
        answered(page, count + 1)
    # A long chat scrolls in itself: what is last and where to write stay in sight.
    seen = "(({ top, bottom }) => 0 <= top && bottom <= innerHeight)"
    for what in ("#send", "#talk li:last-child"):
        box = f"document.querySelector('{what}').getBoundingClientRect()"
        assert page.evaluate(f"{seen}({box})"), what
    shoot(page, "chat-small")
