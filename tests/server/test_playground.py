"""The playground's files: all there, small, public, and bound to this server."""

from __future__ import annotations

import re

import pytest

from sgl_diffusion.server import playground
from sgl_diffusion.server.keys import Keys


def test_the_page_and_its_parts_come_with_types_and_a_policy(api):
    page = api.get("/")
    assert page.status_code == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    for path in re.findall(r'(?:href|src)="(/[^"]+)"', page.text):
        part = api.get(path)
        assert part.status_code == 200 and "charset=utf-8" in part.headers["content-type"], path
        assert part.headers["content-security-policy"] == policy


def test_scripts_import_only_what_is_served(api):
    for path in sorted(playground.PATHS):
        text = api.get(path).text
        for name in re.findall(r'from "\./([\w.]+)"', text):
            assert f"/playground/{name}" in playground.PATHS, (path, name)
        assert not re.search(r"https?://(?!www\.w3\.org)", text), path
        assert "<script>" not in text and " style=" not in text and "onclick" not in text, path


def test_the_whole_page_is_small(api):
    assert sum(len(api.get(path).content) for path in playground.PATHS) < 100_000


def test_every_element_that_scripts_ask_for_is_on_the_page(api):
    ids = set(re.findall(r' id="([\w-]+)"', api.get("/").text))
    for path in sorted(playground.PATHS - {"/"}):
        asked = set(re.findall(r'\$\("([\w-]+)"\)', api.get(path).text))
        assert asked <= ids, (path, asked - ids)


def test_known_files_are_not_sent_again(api):
    first = api.get("/playground/main.js")
    again = api.get("/playground/main.js", headers={"if-none-match": first.headers["etag"]})
    assert again.status_code == 304 and not again.content


@pytest.mark.parametrize("path", ["/playground/", "/playground/none.js", "/playground/..%2fapp.py"])
def test_nothing_else_is_served(api, path):
    assert api.get(path).status_code == 404


def test_the_page_needs_no_key_and_everything_else_does(make_api):
    api = make_api(keys=Keys.of(["k" * 20]))
    assert api.get("/").status_code == 200
    assert api.get("/playground/main.js").status_code == 200
    assert api.get("/model_info").status_code == 401
    assert api.post("/").status_code == 401
