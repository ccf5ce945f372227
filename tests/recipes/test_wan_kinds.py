"""Wan with two experts, from pictures and with a clean first frame, against diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from sgl_diffusion import ops
from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.engine.pipeline import Pipeline
from tests.checkpoints.tiny_wan import Build
from tests.engine.bench import Bench
from tests.recipes.parity import opened

PROMPT = "a red fox running on the beach"
NEGATIVE = "blurry, low quality"
TEXT = ["t2v-experts", "t2v-experts-64", "ti2v", "ti2v-64"]
PICTURE = ["i2v", "i2v-64", "i2v-experts", "i2v-experts-64", "ti2v", "ti2v-64"]


def pictures(folder: Path, count: int) -> tuple[str, ...]:
    generator = torch.Generator().manual_seed(0)
    files = []
    for number in range(count):
        small = torch.randint(0, 256, (6, 8, 3), generator=generator, dtype=torch.uint8)
        files.append(str(folder / f"{number}.png"))
        Image.fromarray(small.numpy()).resize((90, 70)).save(files[-1])
    return tuple(files)


def ours(path: Path, **wish: Any) -> tuple[Tensor, Tensor, Pipeline]:
    pipeline = opened(path)
    bench = Bench(pipeline)
    bench.add("job", prompt=PROMPT, seed=7, **wish)
    bench.run()
    assert not bench.errors
    return bench.latents["job"][0], bench.outbox.outputs["job"][0], pipeline


def theirs(path: Path, files: tuple[str, ...] = (), **call: Any) -> tuple[Tensor, Tensor]:
    """From latents and from pixels: what is kept of a picture is put in after the last step."""
    from diffusers import DiffusionPipeline, WanImageToVideoPipeline
    from transformers.utils import logging

    logging.disable_progress_bar()
    kind = WanImageToVideoPipeline if files else DiffusionPipeline
    absent = dict.fromkeys(("image_encoder", "image_processor", "transformer_2"))
    if not files:
        absent = {"transformer_2": None}
    absent = {name: part for name, part in absent.items() if not (path / name).exists()}
    pipe = kind.from_pretrained(path, dtype=torch.float32, **absent)
    pipe.set_progress_bar_config(disable=True)
    given = dict(zip(("image", "last_image"), map(Image.open, files), strict=False))
    results = [
        pipe(
            prompt=PROMPT,
            generator=torch.Generator().manual_seed(7),
            output_type=kind,
            **given,
            **call,
        ).frames
        for kind in ("latent", "np")
    ]
    return results[0], torch.from_numpy((results[1][0] * 255).round()).to(torch.uint8)


def compare(path: Path, files: tuple[str, ...], **call: Any) -> Pipeline:
    latents, frames, pipeline = ours(path, images=files, **call)
    expected, clip = theirs(path, files, **call)
    assert 0.2 < expected.std() < 5, "the comparison means something for latents of order 1"
    assert (latents - expected).abs().max() <= 1e-4
    assert frames.shape == clip.shape
    assert (frames.int() - clip.int()).abs().max() <= 1
    return pipeline


def size(kind: str, wide: bool) -> dict[str, int]:
    unit = 32 if "ti2v" in kind else 16
    return {"width": unit * (3 if wide else 2), "height": unit * 2}


@pytest.mark.parametrize(("frames", "guidance"), [(1, 4.0), (5, 1.0), (17, 4.0)])
@pytest.mark.parametrize("kind", TEXT)
def test_from_a_prompt(tiny_wan_kind: Build, kind: str, guidance: float, frames: int) -> None:
    call = {
        **size(kind, wide=guidance > 1),
        "num_frames": frames,
        "num_inference_steps": 3,
        "guidance_scale": guidance,
        "negative_prompt": NEGATIVE,
    }
    if "experts" in kind:
        call["guidance_scale_2"] = 3.0
    compare(tiny_wan_kind(kind), (), **call)


@pytest.mark.parametrize(("frames", "guidance"), [(1, 1.0), (5, 4.0), (17, 1.0)])
@pytest.mark.parametrize("kind", PICTURE)
def test_from_a_picture(
    tiny_wan_kind: Build, tmp_path: Path, kind: str, frames: int, guidance: float
) -> None:
    call = {
        **size(kind, wide=guidance > 1),
        "num_frames": frames,
        "num_inference_steps": 3,
        "guidance_scale": guidance,
        "negative_prompt": NEGATIVE,
    }
    if "experts" in kind:
        call["guidance_scale_2"] = 3.0
    ops.reset_counts()
    pipeline = compare(tiny_wan_kind(kind), pictures(tmp_path, 1), **call)
    assert pipeline.card.edits == "native" and "I2V" in pipeline.card.tasks
    assert {"qk_norm_rope", "gate_residual_norm_modulate"} <= {op for op, _ in ops.counts()}


@pytest.mark.parametrize("kind", ["flf2v", "i2v-experts"])
def test_from_the_first_and_the_last_picture(
    tiny_wan_kind: Build, tmp_path: Path, kind: str
) -> None:
    call = {**size(kind, wide=True), "num_frames": 9, "num_inference_steps": 2}
    compare(tiny_wan_kind(kind), pictures(tmp_path, 2), guidance_scale=1.0, **call)


def test_clips_with_and_without_a_picture_do_not_disturb_each_other(
    tiny_wan_kind: Build, tmp_path: Path
) -> None:
    path = tiny_wan_kind("ti2v")
    call = {**size("ti2v", wide=False), "num_frames": 5, "num_inference_steps": 3, "seed": 7}
    bench = Bench(opened(path))
    files = pictures(tmp_path, 1)
    bench.add("with", prompt=PROMPT, images=files, **call)
    bench.add("without", prompt=PROMPT, **call)
    bench.add("again", prompt=PROMPT, images=files, **call)
    bench.run()
    assert bench.count("denoise_forwards_total", rows="2") > 0
    alone = Bench(opened(path))
    alone.add("with", prompt=PROMPT, images=files, **call)
    alone.run()
    assert (bench.latents["with"][0] - alone.latents["with"][0]).abs().max() <= 1e-5
    assert torch.equal(bench.latents["again"][0], bench.latents["with"][0])
    assert (bench.latents["without"][0] - bench.latents["with"][0]).abs().max() > 0.1


def test_a_model_that_starts_from_pictures_asks_for_one(tiny_wan_kind: Build) -> None:
    with pytest.raises(RequestError, match="works on a picture"):
        ours(tiny_wan_kind("i2v"), width=32, height=32)


def test_defaults_tell_the_published_models_apart(tiny_wan_kind: Build) -> None:
    experts = opened(tiny_wan_kind("t2v-experts")).card.defaults
    assert (experts.num_inference_steps, experts.guidance_scale_2) == (40, 3.0)
    first_frame = opened(tiny_wan_kind("ti2v")).card.defaults
    assert (first_frame.fps, first_frame.num_frames, first_frame.height) == (24, 121, 704)
