"""The image routes, in process."""

from __future__ import annotations

import asyncio
import base64
import io

import numpy as np
import pytest
from PIL import Image

from sgl_diffusion.base import errors

PATH = "/v1/images/generations"


def open_image(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def test_default_answer_fills_both_and_is_png(api):
    answer = api.post(PATH, json={"prompt": "a cat"})
    assert answer.status_code == 200
    body = answer.json()
    assert body["id"].startswith("image_") and isinstance(body["created"], int)
    assert body["output_format"] == "png" and body["background"] == "opaque"
    assert body["size"] == "64x48" and body["seeds"] == [42]
    assert body["inference_time_s"] == 0.75
    assert "quality" not in body and body["usage"]["image_count"] == 1
    picture = open_image(base64.b64decode(body["data"][0]["b64_json"]))
    assert picture.format == "PNG" and picture.size == (64, 48)
    kept = api.get(body["data"][0]["url"])
    assert kept.status_code == 200 and kept.headers["content-type"] == "image/png"
    assert kept.content == base64.b64decode(body["data"][0]["b64_json"])


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_formats(api, kind):
    body = {"prompt": "x", "output_format": kind, "response_format": "b64_json"}
    data = api.post(PATH, json=body).json()["data"][0]
    assert data["url"] is None
    assert open_image(base64.b64decode(data["b64_json"])).format == kind.upper()
    assert not list((api.folder / "images").iterdir())


def test_url_only(api):
    data = api.post(PATH, json={"prompt": "x", "response_format": "url"}).json()["data"][0]
    assert data["b64_json"] is None and data["url"].startswith("/v1/images/image_")


def test_public_base_url(make_api):
    api = make_api(public_base_url="https://pictures.example/")
    data = api.post(PATH, json={"prompt": "x", "response_format": "url"}).json()["data"][0]
    assert data["url"].startswith("https://pictures.example/v1/images/image_")


def test_several_images_have_their_own_seeds_and_variants(api):
    body = api.post(PATH, json={"prompt": "x", "n": 3, "seed": 7}).json()
    assert body["seeds"] == [7, 8, 9] and len(body["data"]) == 3
    for index, entry in enumerate(body["data"]):
        assert entry["url"].endswith(f"/content?variant={index}")
        kept = np.asarray(open_image(api.get(entry["url"]).content))
        assert kept[0, 0, 0] == (7 + index) % 5
    listed = api.post(PATH, json={"prompt": "x", "n": 2, "seed": [5, 1]}).json()
    assert listed["seeds"] == [5, 1]


def test_every_field_reaches_the_client(api):
    wanted = {
        "prompt": "x",
        "negative_prompt": "y",
        "width": 32,
        "height": 80,
        "size": "1024x1024",
        "num_inference_steps": 2,
        "guidance_scale": 1,
        "flow_shift": 2.5,
        "max_sequence_length": 64,
        "seed": 3,
    }
    assert api.post(PATH, json=wanted).status_code == 200
    params = api.client.submitted[-1]
    for name in wanted.keys() - {"size", "seed"}:
        assert getattr(params, name) == wanted[name]
    assert params.seeds == (3,) and params.num_frames == 1


@pytest.mark.parametrize(
    "extra",
    [
        {"extra_body": {"seed": 9}},
        {"extra_body": {"seed": 1}, "seed": 9},
        {"extra_params": {"seed": 9}, "extra_json": None},
    ],
)
def test_nested_extras_and_the_top_level_wins(api, extra):
    assert api.post(PATH, json={"prompt": "x", **extra}).json()["seeds"] == [9]


def test_openai_and_sglang_defaults_are_accepted(api):
    body = {
        "prompt": "x", "model": "tiny", "n": 1, "size": "auto", "quality": "auto", "style": "vivid",
        "background": "auto", "moderation": "auto", "stream": False, "partial_images": 0,
        "user": "me", "safety_identifier": "me", "output_compression": None, "svg": None,
        "generator_device": "cuda", "enable_teacache": False, "enable_upscaling": False,
        "upscaling_scale": 4, "cfg_gate_step": 1.0, "output_quality": "default", "profile": False,
        "diffusers_kwargs": {}, "true_cfg_scale": None, "enhance_prompt": False,
    }  # fmt: skip
    answer = api.post(PATH, json=body)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("name", ["tiny", "/models/tiny-wan"])
def test_model_names(api, name):
    assert api.post(PATH, json={"prompt": "x", "model": name}).status_code == 200


def test_what_steps_are_to_do_reaches_the_engine(api):
    wish = {"guidance_start": 0.1, "guidance_stop": 0.9, "cfg_gate_step": 0.5, "priority": 7}
    assert api.post(PATH, json={"prompt": "x", **wish}).status_code == 200
    params = api.client.submitted[-1]
    assert {name: getattr(params, name) for name in wish} == wish


def test_quality_is_echoed_only_as_an_openai_word(api):
    assert api.post(PATH, json={"prompt": "x", "quality": "high"}).json()["quality"] == "high"
    assert "quality" not in api.post(PATH, json={"prompt": "x", "quality": "hd"}).json()


def test_compression_makes_files_smaller(api):
    def size(**more):
        body = {"prompt": "x", "output_format": "jpeg", "size": "256x256", **more}
        return len(api.post(PATH, json=body).json()["data"][0]["b64_json"])

    assert size(output_compression=5) < size() < size(output_compression=100)
    assert size(output_quality="low") < size(output_quality="maximum")
    assert size(**{"output-quality": "low"}) == size(output_quality="low") == size(quality="low")
    assert size(output_quality="low", output_compression=100) == size(output_compression=100)


def test_content_range_head_etag(api):
    url = api.post(PATH, json={"prompt": "x"}).json()["data"][0]["url"]
    whole = api.get(url)
    head = api.request("HEAD", url)
    assert head.status_code == 200 and head.content == b""
    assert head.headers["content-length"] == str(len(whole.content))
    part = api.get(url, headers={"range": "bytes=4-9"})
    assert part.status_code == 206 and part.content == whole.content[4:10]
    same = api.get(url, headers={"if-none-match": whole.headers["etag"]})
    assert same.status_code == 304 and same.content == b""


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/v1/images/image_0123456789/content", 404, "image_not_found"),
        ("/v1/images/video_0123456789/content", 404, "image_not_found"),
        ("/v1/images/..%2f..%2fetc%2fpasswd/content", 404, None),
        ("/v1/images/a%00b/content", 404, "image_not_found"),
        ("/v1/images/" + "a" * 60_000 + "/content", 404, "image_not_found"),
    ],
)
def test_unknown_images(api, path, status, code):
    answer = api.get(path)
    assert answer.status_code == status
    assert code is None or answer.json()["error"]["code"] == code


def test_variants(api):
    url = api.post(PATH, json={"prompt": "x"}).json()["data"][0]["url"]
    missing = api.get(url + "?variant=1")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "variant_not_available"
    assert api.get(url + "?variant=exe").status_code == 400


@pytest.mark.parametrize(
    ("error", "status", "headers"),
    [
        (errors.BusyError("Full.", retry_after=7), 429, {"retry-after": "7"}),
        (errors.BusyError("Full.", retry_after=900), 429, {"retry-after": "110"}),
        (errors.UnavailableError("No worker."), 503, {"retry-after": "5"}),
        (errors.WorkerLostError("It died."), 503, {"retry-after": "5"}),
        (errors.EngineError("Late.", code="deadline_exceeded"), 503, {"x-should-retry": "false"}),
        (errors.OutOfMemoryError("Too large."), 500, {"x-should-retry": "false"}),
        (errors.EngineError("Bad luck."), 500, {}),
    ],
)
def test_failures_of_the_job(api, error, status, headers):
    api.client.fail_with = error
    answer = api.post(PATH, json={"prompt": "x"})
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == error.code
    assert answer.json()["detail"] == error.message
    assert {name: answer.headers.get(name) for name in headers} == headers


def test_a_foreign_exception_says_nothing(api):
    api.client.refuse_with = RuntimeError("secret /etc/shadow")
    answer = api.post(PATH, json={"prompt": "x"}, headers={"x-request-id": "abc-1"})
    assert answer.status_code == 500 and "secret" not in answer.text
    assert answer.json()["error"]["type"] == "server_error"
    assert answer.headers["x-request-id"] == "abc-1"
    api.client.refuse_with = None
    assert api.post(PATH, json={"prompt": "x"}).status_code == 200


def test_not_ready_is_503(api):
    api.client.loaded = False
    answer = api.post(PATH, json={"prompt": "x"})
    assert answer.status_code == 503 and "retry-after" in answer.headers


def test_a_client_that_leaves_while_it_sends_is_no_error(base_url, api, caplog):
    caplog.set_level("INFO", "sgl_diffusion.server.middleware")

    async def leave() -> None:
        host, port = base_url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(
            b"POST /v1/images/generations HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            b'Content-Type: application/json\r\nContent-Length: 99\r\n\r\n{"prompt": '
        )
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.close()
        while not any("left" in found.message for found in caplog.records):
            await asyncio.sleep(0.01)

    api.run(leave())
    (record,) = (found for found in caplog.records if "left" in found.message)
    assert "the client left" in record.message and record.levelname == "INFO"


def test_a_client_that_leaves_frees_the_worker(api, base_url):
    api.client.gate.clear()

    async def leave() -> None:
        host, port = base_url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        body = b'{"prompt": "x"}'
        writer.write(
            b"POST /v1/images/generations HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        await writer.drain()
        while not api.client.handles:
            await asyncio.sleep(0.01)
        writer.close()
        while not api.client.cancelled:
            await asyncio.sleep(0.01)

    api.run(leave())
    assert not list((api.folder / "images").iterdir())
