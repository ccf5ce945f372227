"""The playground in a real browser against a real server.

They run where a Chromium and playwright are installed (`pip install 'sgl-diffusion[browser]'`).
"""

from __future__ import annotations

import base64
import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from tests.e2e.browser import CHROMIUM, browser_page, done, filled, kind, made, opened, until
from tests.e2e.server import Server, running_server

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here"),
]
KEY = "key-0123456789abcdef"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(tmp_path_factory.mktemp("page") / "data") as server:
        yield server


@pytest.fixture
def page(server: Server) -> Iterator[Any]:
    with browser_page(server.url) as page:
        yield filled(page)


def frames(file: Any) -> list[bytes]:
    with av.open(file) as container:
        return [frame.to_ndarray(format="rgb24").tobytes() for frame in container.decode(video=0)]


def test_an_image_with_previews_and_a_gallery_that_stays(page: Any, server: Server) -> None:
    page.fill("#steps", "30")
    page.click("#go")
    page.wait_for_selector("#view img.coming")
    until(page, "/^Step [0-9]+ of 30/.test(document.getElementById('state').textContent)")
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
    assert page.input_value("#prompt").startswith("curl -s http://127.0.0.1:")


def test_wrong_input_is_told_in_the_words_of_the_server(page: Any) -> None:
    page.fill("#size-text", "65x64")
    page.click("#go")
    page.wait_for_selector("#problem:not([hidden])")
    assert "multiple" in page.inner_text("#problem")
    page.wait_for_selector("#go:not([disabled])")
    assert page.evaluate("document.activeElement.id") == "size-text", "where it is mended"
    page.fill("#size-text", "64x64")
    for field, wrong in (
        ("#steps", "9999"), ("#guidance", "1e6"), ("#count", "99"), ("#seed", "-1"),
        ("#prompt", " "),
    ):  # fmt: skip
        before = page.input_value(field)
        page.fill(field, wrong)
        page.click("#go")
        page.wait_for_selector(f"{field}[aria-invalid]")
        assert page.inner_text("#problem")
        page.fill(field, before)
    page.click("#go")
    done(page)
    assert page.is_hidden("#problem") and page.locator("[aria-invalid]").count() == 0


def test_a_wrong_value_that_is_out_of_sight_holds_nothing_up(page: Any) -> None:
    """Browsers send no form with a wrong field, and have nowhere to say so if that is hidden."""
    page.fill("#size-text", "what")
    page.fill("#count", "99")
    page.select_option("#size", index=0)
    kind(page, "video")
    page.click("#go")
    done(page)


def test_adapters_change_the_picture_and_leave_no_trace(page: Any) -> None:
    page.fill("#size-text", "128x128")  # where the small model draws best
    page.fill("#prompt", "a large yellow circle on a white background")
    plain = made(page)
    for name in ("night", "outline"):
        page.check(f".adapter[data-nickname={name}] input[type=checkbox]")
        changed = made(page)
        assert np.abs(changed - plain).mean() > 2, name
        page.fill(f".adapter[data-nickname={name}] input[type=number]", "0.2")
        assert not np.array_equal(made(page), changed), "its strength counts"
        page.uncheck(f".adapter[data-nickname={name}] input[type=checkbox]")
    assert np.array_equal(made(page), plain)


def test_the_place_in_the_queue_and_the_time_that_is_left(tmp_path: Path) -> None:
    one = "--max-running-jobs", "1"
    with running_server(tmp_path / "data", *one) as server, browser_page(server.url) as page:
        server.finished(server.video(num_frames=5, num_inference_steps=2))  # it knows how long
        for _ in range(4):
            server.video(num_frames=17, num_inference_steps=200)
        kind(filled(page), "video")
        page.click("#go")
        until(
            page,
            "/^Waiting, [1-9] before it, about [0-9]+ s left$/"
            ".test(document.getElementById('state').textContent)",
        )
        page.click("#cancel")
        until(page, "document.getElementById('state').textContent === 'Cancelled.'")


DROP = """([name, type, data]) => {
  const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
  const dataTransfer = new DataTransfer();
  dataTransfer.items.add(new File([bytes], name, { type }));
  document.getElementById('drop').dispatchEvent(new DragEvent('drop', { dataTransfer }));
}"""


def test_a_picture_is_dropped(page: Any) -> None:
    page.click("#go")
    done(page)
    picture = page.get_attribute("#view img", "src").partition(",")[2]
    kind(page, "edit")
    page.click("#go")
    assert "Choose a picture" in page.inner_text("#problem")
    page.evaluate(DROP, ["a.txt", "text/plain", "bm8="])
    until(page, "document.getElementById('problem').textContent.includes('a.txt is no picture')")
    page.evaluate(DROP, ["a.png", "image/png", picture])
    page.wait_for_selector("#painting:not([hidden])")
    assert page.is_hidden("#problem")
    page.evaluate("document.getElementById('state').textContent = ''")
    page.click("#go")
    done(page)


def pasted(page: Any, button: str) -> str:
    page.click(button)
    until(page, f"document.querySelector('{button}').textContent === 'Copied'")
    return str(page.evaluate("navigator.clipboard.readText()"))


MASK = """() => import('/playground/paint.js').then((paint) => paint.mask()).then((blob) =>
  new Promise((done) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.readAsDataURL(blob);
  }))"""


@pytest.mark.parametrize("what", ["image", "edit", "video"])
def test_what_is_copied_makes_the_same_again(
    page: Any, server: Server, tmp_path: Path, what: str
) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.fill("#prompt", 'it\'s "a red circle":true on a blue background')
    page.check(".adapter[data-nickname=night] input[type=checkbox]")
    wanted = made(page)
    if what == "edit":
        page.click("#as-input")
        page.wait_for_selector("#painting:not([hidden])")
        box = page.locator("#canvas").bounding_box()
        page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.evaluate("document.getElementById('strength').value = 0.9")
        Image.fromarray(wanted.astype(np.uint8)).save(tmp_path / "picture.png")
        painted = page.evaluate(MASK).partition(",")[2]
        (tmp_path / "mask.png").write_bytes(base64.b64decode(painted))
        page.fill("#seed", "8")
        wanted = made(page)
    elif what == "video":
        kind(page, "video")
        page.evaluate("document.getElementById('state').textContent = ''")
        page.click("#go")
        done(page)
        (newest,) = server.http.get("/v1/videos?limit=1").json()["data"]
        wanted = server.http.get(f"/v1/videos/{newest['id']}/content").content
    for button, program in (("#copy-curl", "bash"), ("#copy-python", sys.executable)):
        for old in (*tmp_path.glob("image-*"), *tmp_path.glob("video*")):
            old.unlink()
        text = pasted(page, button)
        ran = subprocess.run(
            [program, "-c", text], cwd=tmp_path, capture_output=True, text=True, timeout=120
        )
        assert ran.returncode == 0, f"{text}\n{ran.stderr}"
        if what == "video":
            assert frames(tmp_path / "video.mp4") == frames(io.BytesIO(wanted)), text
        else:
            assert np.array_equal(opened(tmp_path / "image-0.png"), wanted), text


ROLES = ("button", "textbox", "spinbutton", "combobox", "radio", "checkbox", "slider", "Canvas")


def test_every_control_has_a_name(page: Any) -> None:
    """What a screen reader says; and the whole page is done with the keyboard."""
    for name in ("image", "video", "edit"):
        kind(page, name)
        session = page.context.new_cdp_session(page)
        nodes = session.send("Accessibility.getFullAXTree")["nodes"]
        controls = [n for n in nodes if not n["ignored"] and n["role"]["value"] in ROLES]
        assert len(controls) > 12
        assert not [n for n in controls if not n["name"]["value"]]
    kind(page, "image")
    page.focus("#prompt")
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "go":
            break
    page.keyboard.press("Enter")
    done(page)


def test_a_small_screen(server: Server) -> None:
    with browser_page(server.url, viewport={"width": 360, "height": 740}) as page:
        filled(page).click("#go")
        done(page)
        for name in ("video", "edit"):
            kind(page, name)
            assert page.evaluate("document.documentElement.scrollWidth <= 360")


def test_a_model_that_begins_with_a_picture(
    tiny_wan_kind: Callable[[str], Path], tmp_path: Path
) -> None:
    """It makes nothing else, takes no mask and no strength, and the page knows."""
    folder = str(tiny_wan_kind("i2v"))
    with (
        running_server(tmp_path / "data", "--model-path", folder) as server,
        browser_page(server.url) as page,
    ):
        filled(page)
        for name in ("image", "edit"):
            assert page.is_disabled(f"input[value={name}]")
        page.click("#go")
        assert "Choose a picture to begin with" in page.inner_text("#problem")
        Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
        page.set_input_files("#picture", str(tmp_path / "a.png"))
        page.wait_for_selector("#painting:not([hidden])")
        assert page.is_hidden("#strength-part") and page.is_hidden("#unpaint")
        page.select_option("#frames", "5")
        page.fill("#steps", "2")
        page.click("#go")
        done(page)


def test_a_server_that_ends_is_told(tmp_path: Path) -> None:
    with running_server(tmp_path / "data") as server, browser_page(server.url) as page:
        filled(page).fill("#steps", "200")
        page.click("#go")
        until(page, "document.getElementById('state').textContent.startsWith('Step')")
        server.kill()
        until(page, "document.getElementById('problem').textContent.includes('broke off')")
        page.click("#go")
        until(page, "document.getElementById('problem').textContent.includes('still running')")


def test_dark_and_light(page: Any) -> None:
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    page.reload()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before


def test_a_key_is_asked_for_and_then_enough(page: Any, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(KEY)
    with running_server(tmp_path / "data", "--api-key-file", str(tmp_path / "keys")) as locked:
        page.goto(locked.url)
        page.wait_for_selector("#key-part[open]")
        page.fill("#key", "wrong")
        page.press("#key", "Enter")
        page.wait_for_selector("#problem:not([hidden])")
        page.fill("#key", KEY)
        page.press("#key", "Enter")
        filled(page)
        wanted = made(page)
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        text = pasted(page, "#copy-curl")
        assert KEY not in text
        ran = subprocess.run(
            ["bash", "-c", text], cwd=tmp_path, env={**os.environ, "API_KEY": KEY}, timeout=120
        )
        assert ran.returncode == 0
        assert np.array_equal(opened(tmp_path / "image-0.png"), wanted)
        page.reload()
        page.wait_for_selector("#gallery img")
