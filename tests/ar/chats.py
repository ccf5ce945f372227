"""A chat worker on a tiny checkpoint, the media it is asked about, and the oracle beside it."""

from __future__ import annotations

import wave
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image

from sgl_diffusion.ar.decoding import Record
from sgl_diffusion.ar.prompt import Reader
from sgl_diffusion.ar.senses import Senses
from sgl_diffusion.ar.stages.part import ChatLimits, Setting
from sgl_diffusion.ar.thinker import load_thinker, places_of
from sgl_diffusion.ar.towers import Towers
from sgl_diffusion.ar.worker import ChatWorker
from sgl_diffusion.base.chat import ChatMessage, ChatParams, Part, TextSampling
from tests.engine.outbox import RecordingOutbox

CPU = torch.device("cpu")
LIMITS = ChatLimits(rows=8, length=4096, prefix_bytes=32 << 20, media_bytes=32 << 20)
GREEDY = TextSampling(temperature=0.0, max_tokens=12)


def open_worker(
    folder: Path, *, record: Record | None = None, **limits: int
) -> tuple[ChatWorker, RecordingOutbox]:
    outbox = RecordingOutbox()
    setting = Setting(
        folder=folder,
        name="tiny",
        limits=replace(LIMITS, **limits),
        device=CPU,
        dtype=torch.float32,
        record=record,
    )
    worker = ChatWorker(setting, outbox)
    worker.load()
    outbox.steps.clear()
    return worker, outbox


def ask(*pieces: str | Path, system: str = "", **changes: Any) -> ChatParams:
    """One question: text, and files known by their suffix."""
    parts = tuple(
        Part(text=piece)
        if isinstance(piece, str)
        else Part(kind=_KINDS[piece.suffix], path=str(piece))
        for piece in pieces
    )
    messages = (ChatMessage(role="user", parts=parts),)
    if system:
        messages = (ChatMessage(role="system", parts=(Part(text=system),)), *messages)
    sampling = {key: changes.pop(key) for key in list(changes) if hasattr(GREEDY, key)}
    return ChatParams(messages=messages, sampling=replace(GREEDY, **sampling), **changes)


_KINDS: dict[str, Any] = {".png": "image", ".wav": "audio", ".mp4": "video"}


def submit(worker: ChatWorker, job_id: str, params: ChatParams) -> None:
    worker.submit(job_id, {"params": asdict(params)})


def run(worker: ChatWorker) -> None:
    while worker.step():
        pass


def part(worker: ChatWorker, name: str) -> Any:
    """One stage, to look into."""
    return worker.parts[name]


def tokens_of(outbox: RecordingOutbox, job_id: str) -> list[int]:
    assert job_id not in outbox.errors, str(outbox.errors.get(job_id))
    tokens: list[int] = outbox.meta[job_id]["choices"][0]["tokens"]
    return tokens


def make_media(folder: Path) -> dict[str, Path]:
    generator = np.random.default_rng(0)
    paths = {kind: folder / f"a{suffix}" for suffix, kind in _KINDS.items()}
    pixels = generator.integers(0, 256, (70, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(paths["image"])
    beep = np.sin(np.arange(24_000 * 2) * 0.05) * 0.4 + generator.normal(0, 0.05, 48_000)
    with wave.open(str(paths["audio"]), "wb") as file:
        file.setparams((1, 2, 24_000, 0, "NONE", ""))
        file.writeframes((beep * 32767).clip(-32768, 32767).astype("<i2").tobytes())
    with av.open(str(paths["video"]), "w") as out:
        stream = out.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for index in range(16):
            picture = np.full((64, 96, 3), 12 * index, np.uint8)
            picture[:, 6 * index : 6 * index + 20] = (250, 40, 90)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode(None))
    return paths


class Oracle:
    """transformers' own `generate` on the same features."""

    def __init__(self, folder: Path) -> None:
        self.model = load_thinker(folder, dtype=torch.float32, device=CPU)
        self._reader = Reader.load(folder, places_of(self.model.config))
        self._senses = Senses.load(folder)

    @cache  # noqa: B019 - an oracle lives as long as the tests
    def answer(self, params: ChatParams) -> list[int]:
        inputs = self.inputs(params)
        output = self.model.generate(
            **inputs, do_sample=False, max_new_tokens=params.sampling.max_tokens
        )
        return list(output[0, inputs["input_ids"].shape[1] :].tolist())

    def inputs(self, params: ChatParams) -> dict[str, Any]:
        """What the model's `generate` takes for a request."""
        parts = [p for m in params.messages for p in m.parts if p.kind != "text"]
        media = [self._senses.sense(part) for part in parts]
        towers = Towers(self.model, 0)
        counts = [len(towers.feel(medium).vectors) for medium in media]
        prompt = self._reader.read(params.messages, media, counts)
        inputs: dict[str, Any] = {"input_ids": torch.tensor([prompt.tokens])}
        by_kind = {kind: [m for m in media if m.kind == kind] for kind in _KINDS.values()}
        if pictures := by_kind["image"]:
            inputs["pixel_values"] = torch.cat([m.features for m in pictures])
            inputs["image_grid_thw"] = torch.tensor([m.grid for m in pictures])
        if films := by_kind["video"]:
            inputs["pixel_values_videos"] = torch.cat([m.features for m in films])
            inputs["video_grid_thw"] = torch.tensor([m.grid for m in films])
            inputs["video_second_per_grid"] = torch.tensor([m.seconds for m in films])
        if sounds := by_kind["audio"]:
            longest = max(m.features.shape[1] for m in sounds)
            mask = torch.zeros(len(sounds), longest, dtype=torch.long)
            features = torch.zeros(len(sounds), sounds[0].features.shape[0], longest)
            for index, sound in enumerate(sounds):
                length = sound.features.shape[1]
                mask[index, :length] = 1
                features[index, :, :length] = sound.features
            inputs |= {"input_features": features, "feature_attention_mask": mask}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        return inputs


@cache
def oracle(folder: Path) -> Oracle:
    return Oracle(folder)
