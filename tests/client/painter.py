"""A worker that paints: each clip has its seed as its colour, after the steps it was asked for."""

from __future__ import annotations

import dataclasses
from typing import Any

from sgl_diffusion.base.params import ModelCard, SamplingDefaults
from sgl_diffusion.orchestrator.messages import Payload
from sgl_diffusion.orchestrator.stage import Outbox
from sgl_diffusion.orchestrator.topology import App, StageSpec
from tests.orchestrator.small_worker import SmallWorker

CARD = ModelCard(
    name="painter",
    path="/nowhere",
    family="wan",
    pipeline_class="WanPipeline",
    backend="native",
    tasks=("T2I", "T2V"),
    defaults=SamplingDefaults(
        width=32, height=16, num_inference_steps=3, guidance_scale=5.0, num_frames=5
    ),
    edits="image-to-image",
    max_images=1,
)


class Painter(SmallWorker):
    def __init__(self, config: Payload, outbox: Outbox) -> None:
        super().__init__(config, outbox)
        self._mistake = config.get("mistake", 0)
        self._sleep = config.get("sleep", 0.0)

    def submit(self, job_id: str, payload: Payload) -> None:
        params: dict[str, Any] = payload["params"]
        shape = [params["num_frames"], params["height"], params["width"], 3]
        arrays = [["uint8", shape, seed % 256] for seed in params["seeds"]]
        small = {
            "steps": params["num_inference_steps"],
            "sleep": self._sleep,
            "arrays": arrays[self._mistake :],
        }
        if params["prompt"] == "fail":
            small |= {"at": 0, "wrong": True}
        super().submit(job_id, small)


def make_worker(config: Payload, outbox: Outbox) -> Painter:
    return Painter(config, outbox)


def painter_app(**config: Any) -> App:
    card = {"card": dataclasses.asdict(CARD)}
    entry = "tests.client.painter:make_worker"
    spec = StageSpec(name="paint", entry=entry, config={**card, **config})
    return App(name="painter", stages=(spec,))
