"""Pictures of the playground for docs/: `python -m tests.e2e.screenshots`.

A real server with the small model, and a real browser that a visitor's hand is played in.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.e2e.browser import CHROMIUM, SECONDS, done, kind
from tests.e2e.server import running_server

FOLDER = Path(__file__).parents[2] / "docs" / "playground"
STILLS = (
    "a large yellow star on a purple background",
    "a small red circle at the top left on a white background",
    "a green ring on a black background",
    "an orange cross on a blue background",
)
CLIP = "a pink square moving right on a green background"


def main() -> None:
    from playwright.sync_api import sync_playwright

    FOLDER.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        running_server(Path(folder) / "data") as server,
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            page = browser.new_page(viewport={"width": 1280, "height": 860}, color_scheme=scheme)
            page.set_default_timeout(SECONDS)
            page.goto(server.url)
            page.wait_for_selector("#size option", state="attached")
            if scheme == "light":
                make(page)
            else:
                page.click("#gallery li:nth-child(2) button")
                page.wait_for_selector("#view img")
            page.screenshot(path=str(FOLDER / f"{scheme}.png"))
        browser.close()
    sys.stdout.write(f"{FOLDER}\n")


def make(page: Any) -> None:
    """Some pictures, then a clip, which stays in view."""
    for made, prompt in enumerate((*STILLS, CLIP), 1):
        kind(page, "video" if prompt == CLIP else "image")
        page.fill("#prompt", prompt)
        page.click("#go")
        page.wait_for_selector(f"#gallery li:nth-child({made})")
        done(page)
    page.wait_for_timeout(800)  # the clip plays


if __name__ == "__main__":
    main()
