"""Wrong requests in process: texts, routing, names of the server, limits.

The rows that list inputs and the answers they are owed are in tests/e2e/data/bad_inputs.yaml.
"""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from sgl_diffusion.base.config import LimitOptions
from sgl_diffusion.server import body as request_body

IMAGES = "/v1/images/generations"
VIDEOS = "/v1/videos"

JSON = {"content-type": "application/json"}


def check(api, answer, status, code, param=None):
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert set(body) == {"error", "detail"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code, body
    assert body["detail"] == error["message"] and len(error["message"]) < 600
    assert param is None or error["param"] == param
    assert answer.headers["x-request-id"] and answer.headers["x-content-type-options"] == "nosniff"
    assert not list((api.folder / "images").iterdir()) + list((api.folder / "videos").iterdir())
    ok = {"prompt": "x", "response_format": "b64_json"}
    assert api.post(IMAGES, json=ok).status_code == 200


def test_a_file_is_refused_by_name(api):
    files = [("prompt", (None, "x")), ("input_reference", ("../../x", b"\x89PNG" * 2**19))]
    answer = api.post(VIDEOS, files=files)
    check(api, answer, 400, "unsupported_parameter", "input_reference")
    assert "input_reference is not supported" in answer.json()["detail"]


def test_multipart_is_not_for_images(api):
    answer = api.post(IMAGES, files=[("prompt", (None, "x"))])
    check(api, answer, 415, "unsupported_media_type")


def test_too_many_form_fields(api):
    files = [("prompt", (None, "x")), *((f"f{i}", (None, "1")) for i in range(150))]
    check(api, api.post(VIDEOS, files=files), 400, "too_many_parts")


def test_a_body_without_a_length_is_counted(make_api):
    api = make_api(limits=LimitOptions(max_json_mb=1))

    async def endless():
        for _ in range(64):
            yield b" " * 2**16

    answer = api.post(IMAGES, content=endless(), headers=JSON)
    check(api, answer, 413, "body_too_large")


def test_an_answer_never_repeats_the_input(api):
    secret = "hunter2" * 50
    for body in (
        {"prompt": secret, "n": 0},
        {"prompt": "x", "size": secret},
        {"prompt": "x", "model": secret},
    ):
        assert "hunter2" not in api.post(IMAGES, json=body).text


def test_control_characters_in_a_prompt_are_fine(api):
    prompt = "a\x00b\x1b[31m\r\n2026-01-01 CRITICAL all lost"
    assert api.post(IMAGES, json={"prompt": prompt}).status_code == 200
    assert api.client.submitted[-1].prompt == prompt


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        ({"promt": 1}, "Did you mean 'prompt'?"),
        ({"num_steps_inference": 1}, "num_inference_steps"),
        ({"size": "1000x1000"}, "992 or 1008"),
        ({"output_format": "bmp"}, "'png', 'jpeg' or 'webp'"),
        ({"model": "other"}, "'tiny'"),
        ({"generator_device": "mps"}, 'Leave it out, or send "cpu", "cuda".'),
        ({"enable_teacache": True}, "takes no enable_teacache as it is served. Leave it out."),
        ({"num_frames": 5}, "It is one of POST /v1/videos."),
        ({"mask": "x"}, "It is one of POST /v1/images/edits."),
        ({"lora": [{"nickname": "a", "weight": 1}]}, "no parameter 'weight' in lora.0."),
        ({"lora": [{"nickname": "a"}] * 17}, "lora must have at most 16 items."),
        ({"extra_body": "x"}, "extra_body must be an object."),
        ({"seed": -1}, "9223372036854775807"),
    ],
)
def test_texts_help(api, extra, text):
    assert text in api.post(IMAGES, json={"prompt": "x", **extra}).json()["detail"]


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("GET", "/v1//videos", 404, "not_found"),
        ("GET", "/V1/videos", 404, "not_found"),
        ("GET", "/v1/models/other/model", 404, "model_not_found"),
    ],
)
def test_routing(api, method, path, status, code):
    answer = api.request(method, path)
    check(api, answer, status, code)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b'{"prompt":\n "x",}', "It breaks at line 2, column 6."),
        (b"{'prompt': 'x'}", "line 1, column 2."),
        (b'{"prompt": "\xe9"}', "The body is not UTF-8 text."),
    ],
)
def test_where_json_breaks(api, body, text):
    answer = api.post(IMAGES, content=body, headers=JSON)
    check(api, answer, 400, "invalid_json")
    assert text in answer.json()["detail"]


def test_a_path_that_is_nearly_right(api):
    answer = api.post("/v1/image/generations", json={"prompt": "x"})
    assert "Did you mean '/v1/images/generations'?" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", IMAGES, "POST"),
        ("DELETE", IMAGES, "POST"),
        ("OPTIONS", VIDEOS, "GET, POST"),
        ("PUT", f"{VIDEOS}/video_0123456789", "DELETE, GET"),
        ("POST", f"{VIDEOS}/video_0123456789/content", "GET, HEAD"),
        ("PATCH", "/health", "GET, HEAD"),
        ("POST", "/v1/models/a/b", "DELETE, GET"),
    ],
)
def test_a_wrong_method_is_told_all_right_ones(api, method, path, allowed):
    answer = api.request(method, path)
    check(api, answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == allowed
    assert f"Use {allowed}." in answer.json()["detail"]


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({"host": "evil.test"}, 403, "host_not_allowed"),
        ({"host": "127.0.0.1.evil.test"}, 403, "host_not_allowed"),
        ({"host": "[::1"}, 403, "host_not_allowed"),
        ({"origin": "https://evil.test"}, 403, "origin_not_allowed"),
        ({"origin": "null"}, 403, "origin_not_allowed"),
        ({"origin": "http://["}, 403, "origin_not_allowed"),
        ({"origin": "http://127.0.0.1:1"}, 403, "origin_not_allowed"),
    ],
)
@pytest.mark.parametrize("method", ["GET", "DELETE", "OPTIONS"])
def test_foreign_hosts_and_origins(api, method, headers, status, code):
    answer = api.request(method, "/v1/videos/video_0123456789", headers=headers)
    check(api, answer, status, code)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:30000", "[::1]:30000", "LOCALHOST:1"])
def test_own_hosts(api, host):
    assert api.get("/livez", headers={"host": host}).status_code == 200


def test_own_origin(api):
    headers = {"host": "localhost:30000", "origin": "http://localhost:30000"}
    assert api.get("/livez", headers=headers).status_code == 200


def test_a_lenient_server_warns_of_unknown_fields(make_api):
    api = make_api(lenient=True)
    ok = {"prompt": "x", "response_format": "b64_json"}
    body = {**ok, "promt": 1, "extra_body": {"a\r\nX: y": 2, "ü": 3}}
    answer = api.post(IMAGES, json=body)
    assert answer.status_code == 200
    warning = answer.headers["x-sgld-warning"]
    assert "unknown parameter ignored: promt" in warning and "aX: y" in warning and "?" in warning
    assert "x" not in answer.headers
    assert api.get("/v1/videos?limt=3").headers["x-sgld-warning"].endswith("limt")
    check(api, api.post(IMAGES, json={"prompt": "x", "n": 0}), 400, "out_of_range", "n")


@pytest.mark.parametrize(
    ("limits", "body", "code", "option"),
    [
        ({"max_json_mb": 1}, {"prompt": "x", "user": "y" * 2**20}, "body_too_large", "json-mb"),
        ({"max_field_kb": 1}, {"prompt": "x" * 2000}, "body_too_large", "field-kb"),
        ({"max_json_depth": 2}, {"prompt": "x", "lora": [[[]]]}, "json_too_deep", "json-depth"),
        ({"max_json_items": 3}, {"prompt": "x", "seed": [1] * 4}, "out_of_range", "json-items"),
    ],
)
def test_limits_are_options_that_refusals_name(make_api, limits, body, code, option):
    api = make_api(limits=LimitOptions(**limits))
    answer = api.post(IMAGES, json=body)
    assert answer.json()["error"]["code"] == code
    assert f"--max-{option}" in answer.json()["detail"]


def test_a_large_body_does_not_stop_the_others(api, monkeypatch):
    """While many megabytes are parsed, small requests are answered: parsing here ends only after
    one was."""
    large = b'{"prompt":"x","a":["data:' + b"A" * 8_000_000 + b'"]}'
    parsing, answered = threading.Event(), threading.Event()
    parse = request_body.parse_json

    def held(data: bytes, limits: LimitOptions) -> dict[str, Any]:
        parsing.set()
        assert answered.wait(60), "nothing was answered while a large body was parsed"
        return parse(data, limits)

    monkeypatch.setattr(request_body, "parse_json", held)

    async def both() -> None:
        slow = asyncio.create_task(api.http.post(IMAGES, content=large, headers=JSON))
        while not (parsing.is_set() or slow.done()):
            await asyncio.sleep(0.005)
        assert (await api.http.get("/livez")).status_code == 200 and not slow.done()
        answered.set()
        assert (await slow).json()["error"]["code"] == "unknown_parameter"

    api.run(both())
