"""Files over HTTP: ranges and conditions, in process and over a socket."""

from __future__ import annotations

import http.client
import os

import pytest

PATH = "/v1/videos"


@pytest.fixture
def video(api):
    made = api.post(PATH, json={"prompt": "a wave"}).json()
    return api.wait_for(made["id"], "completed")


@pytest.fixture
def whole(api, video):
    return api.get(video["url"]).content


def ask(api, video, **headers):
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return api.get(video["url"], headers=named)


@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=0-9", 0, 10),
        ("bytes=5-", 5, None),
        ("bytes=-7", -7, None),
        ("bytes=-999999999", 0, None),
        ("bytes=3-999999999999", 3, None),
        ("bytes= 2-4 ", 2, 5),
    ],
)
def test_one_range(api, video, whole, asked, start, end):
    answer = ask(api, video, range=asked)
    piece = whole[start:end]
    assert answer.content == piece
    assert answer.headers["content-length"] == str(len(piece))
    if len(piece) == len(whole):
        assert answer.status_code == 200
        return
    assert answer.status_code == 206
    first = start % len(whole)
    assert answer.headers["content-range"] == f"bytes {first}-{first + len(piece) - 1}/{len(whole)}"


@pytest.mark.parametrize(
    "asked",
    ["bytes=-", "bytes=a-b", "bytes=9-2", "items=0-1", "bytes", "bytes=0-1,4-5", "bytes=--1", "x",
     "bytes=1.5-2", "bytes=٣-٤", "bytes=" + "9" * 40 + "-"],
)  # fmt: skip
def test_other_ranges_get_the_whole_file(api, video, whole, asked):
    answer = ask(api, video, range=asked.encode())
    assert answer.status_code == 200 and answer.content == whole


@pytest.mark.parametrize("asked", ["bytes=-0", "bytes=99999999-", "bytes=99999999-999999999"])
def test_ranges_outside(api, video, whole, asked):
    answer = ask(api, video, range=asked)
    assert answer.status_code == 416
    assert answer.headers["content-range"] == f"bytes */{len(whole)}"
    assert answer.json()["error"]["code"] == "range_not_satisfiable"


def test_conditions(api, video, whole):
    first = ask(api, video)
    etag, modified = first.headers["etag"], first.headers["last-modified"]
    assert first.headers["accept-ranges"] == "bytes" and not etag.startswith("W/")
    for tag in (etag, f'"other", {etag}', "*", f"W/{etag}"):
        same = ask(api, video, if_none_match=tag)
        assert same.status_code == 304 and not same.content and same.headers["etag"] == etag
    assert ask(api, video, if_none_match='"other"', if_modified_since=modified).status_code == 200
    assert ask(api, video, if_modified_since=modified).status_code == 304
    assert ask(api, video, if_modified_since="Thu, 01 Jan 1998 00:00:00 GMT").status_code == 200
    assert ask(api, video, if_modified_since="yesterday").status_code == 200
    for tag in (etag, modified):
        assert ask(api, video, range="bytes=0-3", if_range=tag).status_code == 206
    for tag in ('"other"', f"W/{etag}", "Thu, 01 Jan 1998 00:00:00 GMT"):
        again = ask(api, video, range="bytes=0-3", if_range=tag)
        assert again.status_code == 200 and again.content == whole


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_head_says_what_get_does(api, video, whole, method):
    for headers, status, length in (
        ({}, 200, len(whole)),
        ({"range": "bytes=2-5"}, 206, 4),
    ):
        answer = api.request(method, video["url"], headers=headers)
        assert answer.status_code == status and answer.headers["content-length"] == str(length)
        assert len(answer.content) == (length if method == "GET" else 0)


def test_a_file_deleted_while_it_is_sent(base_url, api, video):
    """The reader gets all of it; the answer after that is 404."""
    path = api.folder / "videos" / f"{video['id']}.mp4"
    size = 32 * 2**20  # more than the sockets hold
    os.truncate(path, size)
    host = base_url.removeprefix("http://")
    slow = http.client.HTTPConnection(host, timeout=20)
    slow.request("GET", video["url"])
    answer = slow.getresponse()
    assert answer.status == 200 and len(answer.read(1000)) == 1000
    assert api.request("DELETE", f"{PATH}/{video['id']}").status_code == 200
    assert not path.exists()
    assert len(answer.read()) == size - 1000
    slow.close()
    assert api.get(video["url"]).status_code == 404


def test_open_files_are_closed(api, video, base_url):
    def opened() -> int:
        return sum(
            name.endswith(".mp4")
            for entry in os.listdir("/proc/self/fd")
            if (name := _target(entry)) is not None
        )

    for headers in ({}, {"range": "bytes=0-3"}, {"range": "bytes=-0"}, {"if-none-match": "*"}):
        api.get(video["url"], headers=headers)
    gone = http.client.HTTPConnection(base_url.removeprefix("http://"), timeout=20)
    os.truncate(api.folder / "videos" / f"{video['id']}.mp4", 32 * 2**20)
    gone.request("GET", video["url"])
    gone.getresponse().read(10)
    gone.close()  # in the middle
    api.until(lambda: opened() == 0)


def _target(entry: str) -> str | None:
    try:
        return os.readlink(f"/proc/self/fd/{entry}")
    except OSError:
        return None
