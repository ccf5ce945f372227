"""The chat page's files: all there, small, public, and bound to this server."""

from __future__ import annotations

import re

import pytest

from sgl_diffusion.server.omni import page
from tests.server.omni.conftest import OmniApi


def test_the_page_and_its_parts_come_with_types_and_a_policy(omni: OmniApi) -> None:
    answer = omni.http.get("/")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    for path in re.findall(r'(?:href|src)="(/[^"]+)"', answer.text):
        part = omni.http.get(path)
        assert part.status_code == 200 and "charset=utf-8" in part.headers["content-type"], path
        assert part.headers["content-security-policy"] == policy


def test_files_ask_for_nothing_that_is_not_served(omni: OmniApi) -> None:
    for path in sorted(page.PATHS):
        text = omni.http.get(path).text
        for name in re.findall(r'from "\./([\w.]+)"', text):
            assert f"/chat/{name}" in page.PATHS, (path, name)
        assert not re.search(r"https?://(?!www\.w3\.org)", text), path
        assert "<script>" not in text and " style=" not in text and " onclick" not in text, path


def test_the_whole_page_is_small(omni: OmniApi) -> None:
    assert sum(len(omni.http.get(path).content) for path in page.PATHS) < 60_000


def test_every_element_that_scripts_ask_for_is_on_the_page(omni: OmniApi) -> None:
    ids = set(re.findall(r' id="([\w-]+)"', omni.http.get("/").text))
    asked = set(re.findall(r'\$\("([\w-]+)"\)', omni.http.get("/chat/chat.js").text))
    assert asked and asked <= ids, asked - ids


@pytest.mark.parametrize("path", ["/chat/", "/chat/main.js", "/playground/main.js"])
def test_nothing_else_is_served(omni: OmniApi, path: str) -> None:
    assert omni.http.get(path).status_code == 404
