"""The same server with its stages apart: each speaks to the next through the orchestrator."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from sgl_diffusion.apps.omni import STAGES, make_worker, omni_app, placement
from sgl_diffusion.ar.worker import ChatWorker
from sgl_diffusion.base.errors import ConfigError
from sgl_diffusion.base.omni import OmniOptions
from tests.engine.outbox import RecordingOutbox
from tests.server.omni.conftest import OmniApi, data_url
from tests.server.omni.test_leaving import LONG, send

pytestmark = pytest.mark.timeout(600)
SPOKEN = {"modalities": ["text", "audio"], "audio": {"format": "wav"}, "seed": 3}


@pytest.fixture(scope="module")
def apart(
    tiny_qwen3_omni: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[OmniApi, list[ChatWorker]]]:
    before = {id(each) for each in gc.get_objects() if type(each) is ChatWorker}
    api = OmniApi(
        tiny_qwen3_omni,
        tmp_path_factory.mktemp("apart"),
        process=("encoders", "talker", "code2wav"),
    )
    workers = [
        each for each in gc.get_objects() if type(each) is ChatWorker and id(each) not in before
    ]
    yield api, workers
    api.close()


def parts_of(answer: httpx.Response) -> tuple[Any, ...]:
    body = answer.json()
    message = body["choices"][0]["message"]
    return message["content"], message.get("audio", {}).get("data"), body["usage"]


def test_stages_apart_answer_as_one_process_does(
    omni: OmniApi, apart: tuple[OmniApi, list[ChatWorker]], clips: dict[str, Path]
) -> None:
    api, workers = apart
    assert sorted(name for worker in workers for name in worker.parts) == sorted(STAGES)
    (thinking,) = (worker.parts["thinker"] for worker in workers if "thinker" in worker.parts)
    weights = dict(thinking.model.named_parameters())
    assert weights and not any("visual" in name or "tower" in name for name in weights), (
        "the encoders have a process of their own"
    )
    picture = {"type": "image_url", "image_url": {"url": data_url(clips["image"], "image/png")}}
    question = [{"type": "text", "text": "what is it"}, picture]
    for content, more in (("a red fox", {}), (question, {}), (question, SPOKEN)):
        told = parts_of(api.chat(content, max_tokens=6, talker_max_new_tokens=12, **more))
        assert told == parts_of(omni.chat(content, max_tokens=6, talker_max_new_tokens=12, **more))
    assert api.http.get("/v1/models").json()["data"][0]["voices"] == ["ethan", "chelsie"]

    def stages_that_talk() -> set[str]:
        lines = api.http.get("/metrics").text.splitlines()
        steps = [line for line in lines if line.startswith("sgld_talker_steps_total")]
        return {line.partition('stage="')[2].partition('"')[0] for line in steps}

    api.wait_until("the stage has told its metrics", stages_that_talk)
    assert stages_that_talk() == {"talker"}


def test_a_client_that_leaves_ends_every_stage_wherever_it_is(
    apart: tuple[OmniApi, list[ChatWorker]], monkeypatch: pytest.MonkeyPatch
) -> None:
    api, workers = apart
    for worker in workers:
        if "thinker" in worker.parts:
            monkeypatch.setattr(worker.parts["thinker"].batch, "_ends", frozenset())
        if "talker" in worker.parts:
            monkeypatch.setattr(worker.parts["talker"].talker, "ends", frozenset())
    body = {**LONG, "max_tokens": 4000, "modalities": ["text", "audio"], "stream": True}
    with send(api, "/v1/chat/completions", body) as connection:
        assert b"200 OK" in connection.recv(4096)
        api.wait_until("all at work", lambda: sum(bool(w.running()) for w in workers) >= 2)
    api.wait_until("cancelled", lambda: api.unfinished() == 0)
    api.wait_until("let go of", lambda: all(worker.running() == 0 for worker in workers))
    for worker in workers:
        assert all(part.running() == 0 for part in worker.parts.values())
    assert api.chat().status_code == 200


def test_placement_is_read_and_checked() -> None:
    def groups(*process: str, speech: bool = True) -> list[str]:
        app = omni_app(OmniOptions(model_path="m", process=process, speech=speech))
        return [stage.name for stage in app.stages]

    assert groups() == ["preprocess+encoders+thinker+talker+code2wav"]
    assert groups("code2wav, talker", "encoders") == [
        "preprocess+thinker", "encoders", "talker+code2wav",
    ]  # fmt: skip
    assert groups("talker", speech=False) == ["preprocess+encoders+thinker"]
    assert groups(*STAGES) == list(STAGES)
    apart = OmniOptions(model_path="m", device="cpu", process=("talker, code2wav@cuda:1",))
    assert [stage.config["options"]["device"] for stage in omni_app(apart).stages] == [
        "cpu", "cuda:1",
    ]  # fmt: skip
    for wrong, told in (
        (("talkr",), "talkr"),
        (("talker", "encoders,talker"), "twice"),
        (("talker,talker",), "twice"),
        (("talker@gpu",), "gpu"),
        (("talker@",), "device ''"),
    ):
        with pytest.raises(ConfigError, match=told):
            placement(OmniOptions(model_path="m", process=wrong))


def test_a_cpu_has_no_cuda_graphs(tiny_qwen3_omni: Path) -> None:
    """Said before anything starts where options tell, else by the process that looked."""
    options = OmniOptions(model_path=str(tiny_qwen3_omni), cuda_graphs=True)
    for wrong in (replace(options, device="cpu"), replace(options, process=("talker@cpu",))):
        with pytest.raises(ConfigError, match="no CUDA graphs on cpu"):
            omni_app(wrong)
    (stage,) = omni_app(options).stages
    config = {**stage.config, "options": {**stage.config["options"], "device": "cpu"}}
    with pytest.raises(ConfigError, match="no CUDA graphs on cpu"):
        make_worker(config, RecordingOutbox())
