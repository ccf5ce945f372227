"""Health, models, metrics, request ids."""

from __future__ import annotations

import asyncio
import re

import pytest

from sgl_diffusion.base import errors as base_errors
from sgl_diffusion.orchestrator.messages import Metric
from sgl_diffusion.server import errors
from sgl_diffusion.server.metrics import render


def test_healthy(api):
    for path in ("/health", "/readyz"):
        answer = api.get(path)
        assert answer.status_code == 200
        assert answer.json()["status"] == "ok" and answer.json()["running"] is True
    for path in ("/livez", "/liveness"):
        assert api.get(path).json() == {"status": "ok"}


@pytest.mark.parametrize("state", ["loading", "restarting", "failed", "stopped"])
def test_not_ready(api, state):
    api.client.state = state
    for path in ("/health", "/readyz"):
        answer = api.get(path)
        assert answer.status_code == 503 and answer.headers["retry-after"]
        body = answer.json()
        assert body["status"] == state and body["running"] is False
        assert body["reason"] == "loading weights" == body["error"]["message"]
        assert body["error"]["code"] == "not_ready"
    assert api.get("/livez").status_code == 200


def test_only_changes_of_readiness_are_logged(api, caplog):
    caplog.set_level("INFO", logger="sgl_diffusion")
    for state in ("loading", "loading", "loading", "ready", "ready"):
        api.client.state = state
        for path in ("/readyz", "/health", "/livez"):
            api.get(path)
    api.get("/nothing")
    told = [(record.message, record.fields.get("state")) for record in caplog.records]
    assert told == [("readiness", "loading"), ("readiness", "ready"), ("request", None)]


def test_pollers_may_ask_for_the_head_only(api):
    for path in ("/health", "/readyz", "/livez", "/liveness"):
        answer = api.request("HEAD", path)
        assert (answer.status_code, answer.content) == (200, b"")


def test_models(api):
    listed = api.get("/v1/models").json()
    assert listed["object"] == "list" and len(listed["data"]) == 1
    model = listed["data"][0]
    assert (model["id"], model["object"]) == ("tiny", "model")
    assert isinstance(model["created"], int) and model["root"] == "/models/tiny-wan"
    assert api.get("/v1/models/tiny").json() == model
    assert api.get("/v1/models/%2Fmodels%2Ftiny-wan").json() == model


def test_served_model_name(make_api):
    api = make_api(served_model_name="org/name", model_path="/somewhere")
    for name in ("org%2Fname", "org/name", "/somewhere"):
        assert api.get(f"/v1/models/{name}").json()["id"] == "org/name"
    answer = api.post("/v1/images/generations", json={"prompt": "x", "model": "org/name"})
    assert answer.json()["model"] == "org/name"


def test_sglang_info(api):
    info = api.get("/models").json()
    peers = (
        "model_path num_gpus task_type supported_task_types dit_precision vae_precision "
        "vae_decode_precision pipeline_name pipeline_class"
    )
    assert set(peers.split()) <= set(info)
    assert info["task_type"] == "T2V" and info["pipeline_class"] == "WanPipeline"


def test_info_in_the_words_of_sglang(api):
    info = api.get("/model_info").json()
    defaults, frames = info["defaults"], api.get("/models").json()["defaults"]
    assert f"{defaults['width']}x{defaults['height']}" == frames["size"]
    assert {"negative_prompt", "max_sequence_length", "fps"} <= set(defaults)
    assert defaults["num_inference_steps"] == frames["num_inference_steps"]
    assert (info["size_multiple"], info["frame_multiple"], info["max_images"]) == (16, 4, 1)
    assert (info["edits"], info["masks"], info["previews"]) == ("image-to-image", True, True)
    assert (
        info.items()
        >= {
            "model_path": "/models/tiny-wan",
            "is_generation": True,
            "model_type": "diffusion",
            "architectures": ["WanPipeline"],
            "has_image_understanding": False,
            "has_audio_understanding": False,
            "task_type": "T2V",
            "supported_task_types": ["T2V", "T2I"],
            "output_types": ["video", "image"],
            "is_image_gen": True,
            "family": "wan",
        }.items()
    )
    assert api.get("/v1/model_info").json() == {"model_path": "/models/tiny-wan"}
    server = api.get("/server_info").json()
    assert (server["served_model_name"], server["tp_size"], server["dp_size"]) == ("tiny", 1, 1)
    assert server["model_path"] == "/models/tiny-wan" and server["version"]


def test_stats(api):
    stats = api.get("/stats").json()
    assert stats["status"] == "ready" and stats["model_path"] == "/models/tiny-wan"
    assert isinstance(stats["uptime_s"], int) and stats["restarts"] == 0
    assert {"name": "running", "labels": {}, "value": 1} in stats["samples"]
    api.client.loaded = False
    api.client.state = "loading"
    assert api.get("/stats").json()["status"] == "loading"


def test_health_generate_makes_a_picture(api):
    answer = api.get("/health_generate")
    assert answer.status_code == 200 and answer.json()["status"] == "ok"
    made = api.client.submitted
    assert len(made) == 1 and (made[0].width, made[0].height) == (16, 16)
    assert made[0].num_inference_steps == 1 and made[0].num_frames == 1
    for _ in range(5):
        assert api.get("/health_generate").status_code == 200
    assert len(made) == 1  # the first answer counts for some seconds


def test_health_generate_asks_again(api, monkeypatch):
    monkeypatch.setattr("sgl_diffusion.server.probe.KEEP_SECONDS", 0.0)
    for count in (1, 2):
        api.get("/health_generate")
        assert len(api.client.submitted) == count


def test_probes_at_the_same_time_share_a_picture(api):
    api.client.step_seconds = 0.2

    async def ask_ten():
        return await asyncio.gather(*(api.http.get("/health_generate") for _ in range(10)))

    assert [answer.status_code for answer in api.run(ask_ten())] == [200] * 10
    assert len(api.client.submitted) == 1


def test_health_generate_of_a_sick_engine(api):
    api.client.fail_with = base_errors.OutOfMemoryError("It needs 9 GB.")
    answer = api.get("/health_generate")
    assert answer.status_code == 503 and answer.json()["status"] == "unhealthy"
    assert answer.json()["error"]["code"] == "out_of_memory"
    assert "9 GB" in answer.json()["reason"]


def test_health_generate_without_a_worker_or_room(api):
    api.client.refuse_with = base_errors.BusyError("Full.", retry_after=7)
    answer = api.get("/health_generate")
    assert answer.status_code == 429 and answer.headers["retry-after"] == "7"
    api.context.draining = True
    assert api.get("/health_generate").json()["error"]["code"] == "draining"


def test_health_generate_while_loading(api):
    api.client.loaded = False
    assert api.get("/health_generate").status_code == 503


def test_the_served_model_stays(api):
    answer = api.request("DELETE", "/v1/models/tiny")
    assert answer.status_code == 403 and answer.json()["error"]["type"] == "permission_error"
    assert api.request("DELETE", "/v1/models/other").status_code == 404


def test_loading_models_is_503(api):
    api.client.loaded = False
    paths = "/models /v1/models /v1/models/tiny /model_info /v1/model_info /server_info"
    for path in paths.split():
        assert api.get(path).status_code == 503


def test_metrics(api):
    text = api.get("/metrics")
    assert text.headers["content-type"].startswith("text/plain")
    lines = text.text.splitlines()
    assert 'sgld_denoise_forwards_total{rows="2"} 3.0' in lines
    assert 'sgld_denoise_forwards_total{rows="1"} 7.0' in lines
    assert "sgld_running 1.0" in lines
    assert 'sgld_queue_depth{kind="video"} 0.0' in lines
    for line in lines:
        assert re.fullmatch(r'#.*|[a-z_]+(\{[a-z_]+="[^"]*"\})? [0-9.e+]+', line), line


def test_metric_types():
    samples = [
        Metric("x_total", 1, {"a": "1"}),
        Metric("x_total", 2, {"b": "\n"}),
        Metric("wait_seconds_sum", 2.5),
        Metric("wait_seconds_count", 2),
        Metric("depth", 4, kind="gauge"),
    ]
    lines = render(samples).decode().splitlines()
    assert "# TYPE sgld_x_total counter" in lines and "# TYPE sgld_wait_seconds summary" in lines
    assert 'sgld_x_total{a="1"} 1.0' in lines and 'sgld_x_total{b="\\n"} 2.0' in lines
    assert "sgld_wait_seconds_sum 2.5" in lines and "sgld_wait_seconds_count 2.0" in lines
    assert "# TYPE sgld_depth gauge" in lines and "sgld_depth 4.0" in lines


def test_videos_are_counted(api):
    video = api.post("/v1/videos", json={"prompt": "x"}).json()
    api.wait_for(video["id"], "completed")
    assert (
        'sgld_job_total{code="",kind="video",outcome="completed"} 1.0' in api.get("/metrics").text
    )


@pytest.mark.parametrize("given", ["abc", "A.b-c_9", "x" * 64])
def test_request_id_is_echoed(api, given):
    assert api.get("/livez", headers={"x-request-id": given}).headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "x" * 65, "a b", "a;b", "\xe9"])
def test_other_request_ids_are_replaced(api, given):
    headers = {"x-request-id": given.encode("latin-1")}
    assert re.fullmatch(
        r"req_[0-9a-f]{24}", api.get("/livez", headers=headers).headers["x-request-id"]
    )


@pytest.mark.parametrize("name", sorted(base_errors._tree(base_errors.SglError)))
def test_every_error_class_has_a_status(name):
    kind = base_errors._tree(base_errors.SglError)[name]
    response = errors.to_response(kind("what", hint="how"))
    assert 400 <= response.status_code <= 503


def test_no_schema_pages(api):
    for path in ("/docs", "/redoc"):
        assert api.get(path).status_code == 404
