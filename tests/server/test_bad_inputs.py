"""Wrong requests: each gets its status and code, in one envelope, and the next request works."""

from __future__ import annotations

import pytest

from sgl_diffusion.base.config import LimitOptions

IMAGES = "/v1/images/generations"
VIDEOS = "/v1/videos"

# body of POST /v1/images/generations beside the prompt, status, code, param
IMAGE_ROWS = [
    ({"promt": 1}, 400, "unknown_parameter", "promt"),
    ({"n": 0}, 400, "out_of_range", "n"),
    ({"n": -1}, 400, "out_of_range", "n"),
    ({"n": 11}, 400, "out_of_range", "n"),
    ({"n": 1e9}, 400, "invalid_type", "n"),
    ({"n": 10**30}, 400, "out_of_range", "n"),
    ({"n": True}, 400, "invalid_type", "n"),
    ({"n": "1"}, 400, "invalid_type", "n"),
    ({"prompt": None}, 400, "missing_parameter", "prompt"),
    ({"prompt": ""}, 400, "prompt_empty", "prompt"),
    ({"prompt": " \n"}, 400, "prompt_empty", "prompt"),
    ({"prompt": 5}, 400, "invalid_type", "prompt"),
    ({"prompt": ["x"]}, 400, "invalid_type", "prompt"),
    ({"prompt": "x" * 32_001}, 400, "prompt_too_long", "prompt"),
    ({"negative_prompt": "x" * 32_001}, 400, "prompt_too_long", "negative_prompt"),
    ({"size": "0x0"}, 400, "invalid_size", "size"),
    ({"size": "16x999999"}, 400, "invalid_size", "size"),
    ({"size": "1e3x1e3"}, 400, "invalid_size", "size"),
    ({"size": "١٠٢٤x1024"}, 400, "invalid_size", "size"),
    ({"size": "1024*1024"}, 400, "invalid_size", "size"),
    ({"size": "auto "}, 400, "invalid_size", "size"),
    ({"size": "1000x1000"}, 400, "invalid_size", "size"),
    ({"size": "8192x16"}, 400, "invalid_size", "size"),
    ({"width": 1000}, 400, "invalid_size", "width"),
    ({"width": 0}, 400, "out_of_range", "width"),
    ({"height": -16}, 400, "out_of_range", "height"),
    ({"num_inference_steps": 0}, 400, "out_of_range", "num_inference_steps"),
    ({"num_inference_steps": 100_000}, 400, "out_of_range", "num_inference_steps"),
    ({"guidance_scale": 1000}, 400, "out_of_range", "guidance_scale"),
    ({"guidance_scale": True}, 400, "invalid_type", "guidance_scale"),
    ({"max_sequence_length": 0}, 400, "out_of_range", "max_sequence_length"),
    ({"flow_shift": 0}, 400, "out_of_range", "flow_shift"),
    ({"seed": -1}, 400, "out_of_range", "seed"),
    ({"seed": 2**63}, 400, "out_of_range", "seed"),
    ({"seed": "1"}, 400, "invalid_type", "seed"),
    ({"seed": [1, 2]}, 400, "mismatched_lengths", "seed"),
    ({"seed": [True]}, 400, "invalid_type", "seed"),
    ({"response_format": "gif"}, 400, "invalid_value", "response_format"),
    ({"output_format": "bmp"}, 400, "invalid_value", "output_format"),
    ({"output_format": "jpg"}, 400, "invalid_value", "output_format"),
    ({"output_format": "gif"}, 400, "unsupported_parameter", "output_format"),
    ({"output_format": "svg"}, 400, "unsupported_parameter", "output_format"),
    ({"frame_count": 2}, 400, "unsupported_parameter", "frame_count"),
    ({"svg": {}}, 400, "unsupported_parameter", "svg"),
    ({"quality": "ultra"}, 400, "invalid_value", "quality"),
    (
        {"background": "transparent", "output_format": "jpeg"},
        400,
        "conflicting_parameters",
        "background",
    ),
    ({"background": "transparent"}, 400, "unsupported_parameter", "background"),
    ({"output_compression": -1}, 400, "out_of_range", "output_compression"),
    ({"output_compression": 101}, 400, "out_of_range", "output_compression"),
    ({"output_compression": "high"}, 400, "invalid_type", "output_compression"),
    ({"output_quality": "best"}, 400, "invalid_value", "output_quality"),
    ({"stream": False, "partial_images": 2}, 400, "conflicting_parameters", "partial_images"),
    ({"stream": True, "partial_images": 4}, 400, "out_of_range", "partial_images"),
    ({"true_cfg_scale": 4.0}, 400, "unsupported_parameter", "true_cfg_scale"),
    ({"partial_images": 2}, 400, "conflicting_parameters", "partial_images"),
    ({"model": "gpt-image-1"}, 404, "model_not_found", "model"),
    ({"model": 5}, 400, "invalid_type", "model"),
    ({"user": "x" * 513}, 400, "out_of_range", "user"),
    ({"generator_device": "cuda:99"}, 400, "unsupported_parameter", "generator_device"),
    ({"output_path": "/etc"}, 400, "unsupported_parameter", "output_path"),
    ({"perf_dump_path": "/etc/x"}, 400, "unsupported_parameter", "perf_dump_path"),
    ({"diffusers_kwargs": {"callback": 1}}, 400, "unsupported_parameter", "diffusers_kwargs"),
    ({"enable_teacache": True}, 400, "unsupported_parameter", "enable_teacache"),
    ({"enable_teacache": 0}, 400, "unsupported_parameter", "enable_teacache"),
    ({"cfg_gate_step": 0.5}, 400, "unsupported_parameter", "cfg_gate_step"),
    ({"true_cfg_scale": 4.0}, 400, "unsupported_parameter", "true_cfg_scale"),
    ({"extra_body": 5}, 400, "invalid_type", "extra_body"),
    ({"extra_body": {"promt": 5}}, 400, "unknown_parameter", "promt"),
    ({"seconds": "4"}, 400, "unknown_parameter", "seconds"),
]  # fmt: skip

VIDEO_ROWS = [
    ({"seconds": "0"}, "out_of_range", "seconds"),
    ({"seconds": "99999"}, "out_of_range", "seconds"),
    ({"seconds": "1000"}, "out_of_range", "seconds"),
    ({"seconds": "NaN"}, "out_of_range", "seconds"),
    ({"seconds": "4,5"}, "out_of_range", "seconds"),
    ({"seconds": "٤"}, "out_of_range", "seconds"),
    ({"seconds": True}, "invalid_type", "seconds"),
    ({"fps": 0}, "out_of_range", "fps"),
    ({"fps": 1000}, "out_of_range", "fps"),
    ({"fps": "16"}, "invalid_type", "fps"),
    ({"num_frames": 10**7}, "out_of_range", "num_frames"),
    ({"num_frames": 0}, "out_of_range", "num_frames"),
    ({"num_frames": 81, "seconds": "2"}, "conflicting_parameters", "num_frames"),
    ({"seed": [1, 2]}, "mismatched_lengths", "seed"),
    ({"n": 11}, "out_of_range", "n"),
    ({"size": "1000x1000"}, "invalid_size", "size"),
    ({"input_reference": "/etc/passwd"}, "unsupported_parameter", "input_reference"),
    ({"input_reference": {"image_url": "x"}}, "unsupported_parameter", "input_reference"),
    ({"enable_frame_interpolation": True}, "unsupported_parameter", "enable_frame_interpolation"),
    ({"x264_preset": "placebo"}, "invalid_value", "x264_preset"),
    ({"response_format": "url"}, "unknown_parameter", "response_format"),
]  # fmt: skip

JSON = {"content-type": "application/json"}
URLENCODED = {"content-type": "application/x-www-form-urlencoded"}
RAW_ROWS = [
    (b'{"prompt":', JSON, 400, "invalid_json"),
    (b"", JSON, 400, "invalid_json"),
    (b"\xff\xfe", JSON, 400, "invalid_json"),
    (b"null", JSON, 400, "body_not_object"),
    (b"[]", JSON, 400, "body_not_object"),
    (b'"x"', JSON, 400, "body_not_object"),
    (b"[" * 100_000, JSON, 400, "json_too_deep"),
    (b'{"x":' + b"[" * 20_000 + b"]" * 20_000 + b"}", JSON, 400, "json_too_deep"),
    (b'{"x":' + b"[" * 100 + b"]" * 100 + b"}", JSON, 400, "json_too_deep"),
    (b'{"prompt":"x","n":' + b"1" * 5_000 + b"}", JSON, 400, "invalid_json"),
    (b'{"prompt":"x","guidance_scale":NaN}', JSON, 400, "not_finite"),
    (b'{"prompt":"x","guidance_scale":1e400}', JSON, 400, "not_finite"),
    (b'{"prompt":"x","n":-Infinity}', JSON, 400, "not_finite"),
    (b'{"prompt":"\\ud800"}', JSON, 400, "invalid_unicode"),
    (b'{"prompt":"x","\\ud800":1}', JSON, 400, "invalid_unicode"),
    (b'{"x":[' + b"1," * 20_000 + b"1]}", JSON, 400, "out_of_range"),
    (b"prompt=x", URLENCODED, 415, "unsupported_media_type"),
    (b'{"prompt":"x"}', {}, 415, "unsupported_media_type"),
    (b'{"prompt":"x"}', JSON | {"content-encoding": "gzip"}, 415, "unsupported_content_encoding"),
    (b"x", JSON | {"content-length": str(10**9)}, 413, "body_too_large"),
]  # fmt: skip

FORM = "multipart/form-data; boundary="
PART = b'--B\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nx'
NAMELESS = b"--B\r\nContent-Disposition: form-data\r\n\r\nx\r\n--B--\r\n"
FORM_ROWS = [
    (b"x", "multipart/form-data", 400, "invalid_multipart"),
    (b"x", FORM + "a" * 10_000, 400, "invalid_multipart"),
    (b"", FORM + "B", 400, "invalid_multipart"),
    (b"nonsense", FORM + "B", 400, "invalid_multipart"),
    (PART, FORM + "B", 400, "invalid_multipart"),
    (PART + b"\r\n--B--\r\n", FORM + "B; charset=none", 400, "invalid_multipart"),
    (NAMELESS, FORM + "B", 400, "invalid_multipart"),
    (b"--B--\r\n", FORM + "B", 400, "missing_parameter"),
]  # fmt: skip


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


@pytest.mark.parametrize(("extra", "status", "code", "param"), IMAGE_ROWS, ids=str)
def test_images(api, extra, status, code, param):
    check(api, api.post(IMAGES, json={"prompt": "a cat", **extra}), status, code, param)


@pytest.mark.parametrize(("extra", "code", "param"), VIDEO_ROWS, ids=str)
def test_videos(api, extra, code, param):
    answer = api.post(VIDEOS, json={"prompt": "a cat", **extra})
    check(api, answer, 400, code, param)
    assert api.get(VIDEOS).json()["data"] == []


@pytest.mark.parametrize("row", range(len(RAW_ROWS)))
@pytest.mark.parametrize("path", [IMAGES, VIDEOS])
def test_raw_bodies(api, path, row):
    content, headers, status, code = RAW_ROWS[row]
    check(api, api.post(path, content=content, headers=headers), status, code)


@pytest.mark.parametrize("row", range(len(FORM_ROWS)))
def test_forms(api, row):
    content, kind, status, code = FORM_ROWS[row]
    check(api, api.post(VIDEOS, content=content, headers={"content-type": kind}), status, code)


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("seconds", "NaN", "out_of_range"),
        ("guidance_scale", "nan", "not_finite"),
        ("guidance_scale", "1e999", "not_finite"),
        ("guidance_scale", "x", "invalid_type"),
        ("fps", "١٦", "invalid_type"),
        ("fps", " 16", "invalid_type"),
        ("fps", "1_6", "invalid_type"),
        ("fps", "", "invalid_type"),
        ("seed", "true", "invalid_type"),
        ("enable_teacache", "true", "unsupported_parameter"),
        ("extra_body", "{", "invalid_json"),
        ("extra_body", "[]", "body_not_object"),
        ("prompt[x]", "y", "invalid_value"),
        ("input_reference[image_url]", "http://127.0.0.1", "unsupported_parameter"),
    ],
)
def test_form_fields(api, name, value, code):
    files = [("prompt", (None, "x")), (name, (None, value))]
    check(api, api.post(VIDEOS, files=files), 400, code)


def test_form_field_given_twice(api):
    files = [("prompt", (None, "x")), ("fps", (None, "8")), ("fps", (None, "9"))]
    check(api, api.post(VIDEOS, files=files), 400, "invalid_value")


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
        ({"generator_device": "mps"}, "'cpu', 'cuda'"),
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
        ("GET", IMAGES, 405, "method_not_allowed"),
        ("PUT", VIDEOS, 405, "method_not_allowed"),
        ("PATCH", "/health", 405, "method_not_allowed"),
        ("GET", "/v1/models/other/model", 404, "model_not_found"),
    ],
)
def test_routing(api, method, path, status, code):
    answer = api.request(method, path)
    check(api, answer, status, code)
    assert status != 405 or answer.headers["allow"]


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
