"""Videos that begin with a picture: every way a client may send it."""

from __future__ import annotations

import base64
import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image

from sgl_diffusion.base import errors

PATH = "/v1/videos"


@pytest.fixture
def from_pictures(api):
    """A model that makes videos from pictures."""
    api.client.model = dataclasses.replace(api.client.model, edits="native", max_images=1)
    return api


def png(width=60, height=40, level=90) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (level, 20, 200)).save(buffer, format="png")
    return buffer.getvalue()


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


WAYS = {
    "file": {"files": [("prompt", (None, "x")), ("input_reference", ("a.png", png()))]},
    "raw file of the SDK": {
        "files": [
            ("prompt", (None, "x")),
            ("input_reference", ("upload", png(), "application/octet-stream")),
        ]
    },
    "data URL": {"json": {"prompt": "x", "input_reference": data_url(png())}},
    "object": {"json": {"prompt": "x", "input_reference": {"image_url": data_url(png())}}},
    "nested object": {
        "json": {"prompt": "x", "extra_body": {"input_reference": {"image_url": data_url(png())}}}
    },
    "field of a form": {
        "files": [("prompt", (None, "x")), ("input_reference[image_url]", (None, data_url(png())))]
    },
    "object as text": {
        "files": [
            ("prompt", (None, "x")),
            ("input_reference", (None, json.dumps({"image_url": data_url(png())}))),
        ]
    },
    "other name": {"json": {"prompt": "x", "reference_url": data_url(png())}},
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_send_a_picture(from_pictures, way):
    api = from_pictures
    answer = api.post(PATH, **WAYS[way])
    assert answer.status_code == 200, answer.text
    video = api.wait_for(answer.json()["id"], "completed")
    (path,) = api.client.submitted[-1].images
    assert path == str(api.folder / "inputs" / video["id"] / "0.png")
    with Image.open(path) as picture:
        assert picture.size == (60, 40) and picture.getpixel((5, 5)) == (90, 20, 200)
    api.request("DELETE", f"{PATH}/{video['id']}")
    assert not list((api.folder / "inputs").iterdir())


def test_the_size_follows_the_picture(from_pictures):
    api = from_pictures
    card = api.client.model
    tall = {"prompt": "x", "input_reference": data_url(png(32, 96))}
    video = api.post(PATH, json=tall).json()
    width, height = card.size_like(32, 96)
    assert video["size"] == f"{width}x{height}" and height > 2 * width
    assert api.post(PATH, json={**tall, "size": "64x48"}).json()["size"] == "64x48"


def test_a_url_is_fetched(from_pictures):
    """Loopback is no public address: the guard refuses it, and the job is never made."""
    api = from_pictures
    body = {"prompt": "x", "input_reference": {"image_url": "http://127.0.0.1:1/a.png"}}
    answer = api.post(PATH, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "url_not_allowed"
    assert answer.json()["error"]["param"] == "input_reference.image_url"
    assert not list((api.folder / "inputs").iterdir())


@pytest.mark.parametrize(
    ("given", "code", "param"),
    [
        ("file:///etc/passwd", "local_path_not_allowed", "input_reference"),
        ("cat.png", "unsupported_url_scheme", "input_reference"),
        ("/etc/passwd", "local_path_not_allowed", "input_reference"),
        ("data:text/html;base64,AAAA", "invalid_data_url", "input_reference"),
        ({"file_id": "file-1"}, "unsupported_parameter", "input_reference.file_id"),
        ({"image_url": 3}, "invalid_type", "input_reference"),
        ({"url": "https://x"}, "invalid_type", "input_reference"),
        ({}, "invalid_type", "input_reference"),
        (3, "file_expected", "input_reference"),
        (["a"], "file_expected", "input_reference"),
    ],
)
def test_wrong_references(from_pictures, given, code, param):
    answer = from_pictures.post(PATH, json={"prompt": "x", "input_reference": given})
    assert answer.status_code == 400, answer.text
    assert (answer.json()["error"]["code"], answer.json()["error"]["param"]) == (code, param)


def test_one_picture_has_one_name(from_pictures):
    url = data_url(png())
    body = {"prompt": "x", "input_reference": url, "reference_url": url}
    answer = from_pictures.post(PATH, json=body)
    assert answer.json()["error"]["code"] == "conflicting_parameters"


def test_other_models_say_so_and_read_nothing(api):
    for reference in (data_url(png()), "http://127.0.0.1/x", {"image_url": "/etc/passwd"}):
        answer = api.post(PATH, json={"prompt": "x", "input_reference": reference})
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "unsupported_parameter"
        assert answer.json()["error"]["param"] == "input_reference"
        assert "input_reference is not supported" in answer.json()["detail"]


def test_a_refused_job_leaves_no_picture(from_pictures, monkeypatch):
    async def full(_row, _origin):
        raise errors.BusyError("Full.")

    api = from_pictures
    monkeypatch.setattr(api.context.runner, "add", full)
    answer = api.post(PATH, json={"prompt": "x", "input_reference": data_url(png())})
    assert answer.status_code == 429
    assert not list((api.folder / "inputs").iterdir())


def test_a_remix_has_the_picture_of_its_source(from_pictures):
    api = from_pictures
    body = {"prompt": "x", "input_reference": data_url(png(level=130)), "size": "64x48"}
    source = api.post(PATH, json=body).json()
    api.wait_for(source["id"], "completed")
    remix = api.post(f"{PATH}/{source['id']}/remix", json={"prompt": "y"}).json()
    assert remix["size"] == "64x48"
    api.request("DELETE", f"{PATH}/{source['id']}")
    api.wait_for(remix["id"], "completed")
    (path,) = api.client.submitted[-1].images
    assert remix["id"] in path and np.asarray(Image.open(path))[0, 0, 0] == 130
