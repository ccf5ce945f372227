"""What a finished video job leaves on disk, and what the files say about themselves."""

from __future__ import annotations

import dataclasses
import io
import json

import av
import numpy as np
import pytest
from PIL import Image

from sgl_diffusion.server.media import encode_image
from sgl_diffusion.server.previews import sheet_frames, spritesheet, thumbnail

PATH = "/v1/videos"


def finished(api, **body):
    video = api.post(PATH, json={"prompt": "a wave", **body}).json()
    return api.wait_for(video["id"], "completed")


def grey_clip(frames, height=48, width=80):
    """Frame i has the grey level 3 * i."""
    levels = (np.arange(frames) * 3).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (frames, height, width, 3)).copy()


@pytest.mark.parametrize("frames", [1, 2, 5, 24, 25, 26, 81, 241])
def test_a_sheet_goes_from_the_first_frame_to_the_last(frames):
    chosen = sheet_frames(frames)
    assert len(chosen) == min(frames, 25)
    assert chosen[0] == 0 and chosen[-1] == frames - 1
    steps = np.diff(chosen)
    assert frames == 1 or (steps.min() >= 1 and steps.max() - steps.min() <= 1)


@pytest.mark.parametrize(
    ("frames", "rows", "columns"), [(1, 1, 1), (3, 1, 3), (7, 2, 5), (81, 5, 5)]
)
def test_spritesheet(frames, rows, columns):
    clip = grey_clip(frames)
    sheet = Image.open(io.BytesIO(spritesheet(clip)))
    assert sheet.format == "JPEG" and sheet.size == (80 * columns, 48 * rows)
    pixels = np.asarray(sheet.convert("L")).astype(int)
    for place, frame in enumerate(sheet_frames(frames)):
        middle = pixels[place // 5 * 48 + 24, place % 5 * 80 + 40]
        assert abs(middle - 3 * frame) <= 3


def test_previews_are_small():
    clip = grey_clip(9, 720, 1280)
    picture = Image.open(io.BytesIO(thumbnail(clip)))
    assert picture.format == "WEBP" and picture.size == (512, 288)
    assert abs(np.asarray(picture).astype(int).mean() - 3 * 4) <= 3  # the frame in the middle
    sheet = Image.open(io.BytesIO(spritesheet(clip)))
    assert sheet.size == (256 * 5, 144 * 2)


def test_variants_over_http(api):
    video = finished(api)
    kinds = {"video": "video/mp4", "thumbnail": "image/webp", "spritesheet": "image/jpeg"}
    for variant, media_type in kinds.items():
        answer = api.get(video["url"], params={"variant": variant})
        assert answer.status_code == 200 and answer.headers["content-type"] == media_type
    assert len(list((api.folder / "videos").iterdir())) == 3
    row = api.run(api.jobs.get(video["id"]))
    assert {entry["name"] for entry in row.files} == {
        path.name for path in (api.folder / "videos").iterdir()
    }
    api.request("DELETE", f"{PATH}/{video['id']}")
    assert not list((api.folder / "videos").iterdir())


def test_a_failure_in_the_middle_leaves_nothing(api, monkeypatch):
    def broken(_clip):
        raise OSError("no")

    monkeypatch.setattr("sgl_diffusion.server.outputs.spritesheet", broken)
    video = api.post(PATH, json={"prompt": "x"}).json()
    assert api.wait_for(video["id"], "failed")["error"]["code"] == "internal_error"
    assert not list((api.folder / "videos").iterdir())


def comment_of(data: bytes) -> str | None:
    with av.open(io.BytesIO(data)) as container:
        return container.metadata.get("comment")


def test_a_video_carries_its_settings(api):
    prompt = 'ein "Fluß" \U0001f30a\nzwei'
    video = finished(api, prompt=prompt, seed=7, num_frames=5, guidance_scale=2.5)
    settings = json.loads(comment_of(api.get(video["url"]).content))
    assert settings["prompt"] == prompt and settings["seed"] == 7 and settings["model"] == "tiny"
    assert (settings["num_frames"], settings["fps"], settings["guidance_scale"]) == (5, 16, 2.5)
    assert settings["software"].startswith("sgl_diffusion ")


def test_a_png_carries_its_settings(api):
    answer = api.post(
        "/v1/images/generations", json={"prompt": "x " * 9000, "n": 2, "seed": 4}
    ).json()
    for index in range(2):
        picture = Image.open(io.BytesIO(api.get(f"{answer['data'][0]['url'][:-1]}{index}").content))
        settings = json.loads(picture.text["sgl_diffusion"])
        assert settings["seed"] == 4 + index and settings["prompt"] == "x " * 9000


def test_settings_tell_adapters_but_no_paths_of_this_machine(api, tmp_path):
    api.client.model = dataclasses.replace(api.client.model, lora_targets=("transformer",))
    (tmp_path / "secret").mkdir()
    listed = [
        {"nickname": "ours", "path": str(tmp_path / "secret"), "weight_name": "a.safetensors"},
        {"nickname": "hub", "path": "org/ink", "revision": "v1", "strength": 0.5},
    ]
    video = finished(api, prompt="x", lora=listed)
    comment = comment_of(api.get(video["url"]).content)
    assert json.loads(comment)["loras"] == [
        {"nickname": "ours", "strength": 1.0, "weight_name": "a.safetensors"},
        {"nickname": "hub", "strength": 0.5, "path": "org/ink", "revision": "v1"},
    ]
    assert "secret" not in comment


def test_no_metadata(make_api):
    api = make_api(metadata=False)
    video = finished(api)
    assert comment_of(api.get(video["url"]).content) is None
    url = api.post("/v1/images/generations", json={"prompt": "x"}).json()["data"][0]["url"]
    assert not Image.open(io.BytesIO(api.get(url).content)).text


def test_settings_do_not_change_the_pixels():
    picture = grey_clip(1)[0]
    plain, marked = (
        np.asarray(Image.open(io.BytesIO(encode_image(picture, "png", 75, text))))
        for text in (None, "settings")
    )
    assert np.array_equal(plain, marked)
