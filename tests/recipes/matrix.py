"""Every native pipeline class beside diffusers': what is compared, and both sides of a checkpoint.

A row of the table says what is compared for one class: two checkpoints that differ in heads, head
dim or layers; guidance on and off, with a negative prompt where the class takes one; a square and a
wide size; every number of pictures; clips of 1, 5 and 17 frames.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from sgl_diffusion.engine.pipeline import Pipeline
from tests.checkpoints import tiny_flux, tiny_flux2, tiny_qwen_image, tiny_wan
from tests.oracles import images as oracle
from tests.oracles.qwen_processor import Processor
from tests.recipes import parity
from tests.recipes.parity import NEGATIVE

Build = str | Callable[[Path], Path]  # a fixture, or what builds a checkpoint in a folder
PROMPTS = {"long": "a red fox sleeping in the garden, a small black car", "short": "a car"}


@dataclass(frozen=True)
class Row:
    """What is compared for one pipeline class."""

    pipeline_class: str
    checkpoints: tuple[Build, Build]
    on: dict[str, float]
    off: dict[str, float]
    pictures: tuple[int, ...] = (0,)
    frames: tuple[int, ...] = (1,)
    sizes: tuple[tuple[int, int], ...] = ((64, 64), (96, 64))
    call: dict[str, Any] = field(default_factory=dict)


def _wan(kind: str) -> Callable[[Path], Path]:
    return lambda folder: tiny_wan.build(folder, **tiny_wan.KINDS[kind])


def _qwen(kind: str, **more: Any) -> Callable[[Path], Path]:
    return lambda folder: tiny_qwen_image.build(folder, kind=kind, **more)


def _kontext(**more: Any) -> Callable[[Path], Path]:
    return lambda folder: tiny_flux.build(folder, kind="FluxKontextPipeline", **more)


def _flux2(**more: Any) -> Callable[[Path], Path]:
    return lambda folder: tiny_flux2.build(folder, **more)


def _guided(scale: float, off: float = 1.0) -> dict[str, dict[str, float]]:
    return {"on": {"guidance_scale": scale}, "off": {"guidance_scale": off}}


_TRUE: dict[str, dict[str, float]] = {"on": {"true_cfg_scale": 4.0}, "off": {"true_cfg_scale": 1.0}}
_EXPERTS = {
    "on": {"guidance_scale": 4.0, "guidance_scale_2": 3.0},
    "off": {"guidance_scale": 1.0, "guidance_scale_2": 1.0},
}
_CLIPS: dict[str, Any] = {"frames": (1, 5, 17), "sizes": ((32, 32), (48, 32))}
_LARGE_CLIPS: dict[str, Any] = {"frames": (1, 5, 17), "sizes": ((64, 64), (96, 64))}
_SHORT = {"max_sequence_length": 64}
_LONG = {"max_sequence_length": 160}  # the system message of FLUX.2 included
_TWO_BY_64 = {"heads": 2, "axes": (16, 24, 24), "layers": 3, "seed": 4}

ROWS = {
    "Wan 2.1": Row("WanPipeline", ("tiny_wan_a", "tiny_wan_b"), **_guided(5.0), **_CLIPS),
    "Wan 2.2": Row(
        "WanPipeline", (_wan("t2v-experts"), _wan("t2v-experts-64")), **_EXPERTS, **_CLIPS
    ),
    "Wan 2.2 5B": Row(
        "WanPipeline",
        (_wan("ti2v"), _wan("ti2v-64")),
        pictures=(0, 1),
        **_guided(4.0),
        **_LARGE_CLIPS,
    ),
    "Wan 2.1 I2V": Row(
        "WanImageToVideoPipeline",
        (_wan("i2v"), _wan("i2v-64")),
        pictures=(1,),
        **_guided(4.0),
        **_CLIPS,
    ),
    "Wan 2.1 FLF2V": Row(
        "WanImageToVideoPipeline",
        (_wan("flf2v"), _wan("flf2v-64")),
        pictures=(2,),
        frames=(5, 17),
        sizes=((32, 32), (48, 32)),
        **_guided(4.0),
    ),
    "Wan 2.2 I2V": Row(
        "WanImageToVideoPipeline",
        (_wan("i2v-experts"), _wan("i2v-experts-64")),
        pictures=(1,),
        **_EXPERTS,
        **_CLIPS,
    ),
    "FLUX.1": Row("FluxPipeline", ("tiny_flux_a", "tiny_flux_b"), call=_SHORT, **_TRUE),
    "FLUX.1 Kontext": Row(
        "FluxKontextPipeline",
        ("tiny_kontext", _kontext(heads=2, head_dim=64, axes=(16, 24, 24), single=3, seed=5)),
        pictures=(0, 1),
        call=_SHORT,
        **_TRUE,
    ),
    "FLUX.2 dev": Row(
        "Flux2Pipeline",
        ("tiny_flux2_dev", _flux2(heads=2, axes=(16, 16, 16, 16), single=3, seed=7)),
        pictures=(0, 1, 2),
        call=_LONG,
        **_guided(4.0),  # an input of the transformer
    ),
    "FLUX.2 klein": Row(
        "Flux2KleinPipeline",
        ("tiny_flux2_klein_base", "tiny_flux2_klein"),
        pictures=(0, 1, 2),
        call=_LONG,
        **_guided(4.0),
    ),
    "Qwen-Image": Row("QwenImagePipeline", ("tiny_qwen_image_a", "tiny_qwen_image_b"), **_TRUE),
    "Qwen-Image-Edit": Row(
        "QwenImageEditPipeline",
        (_qwen("QwenImageEditPipeline", seed=2), _qwen("QwenImageEditPipeline", **_TWO_BY_64)),
        pictures=(1,),
        **_TRUE,
    ),
    "Qwen-Image-Edit-Plus": Row(
        "QwenImageEditPlusPipeline",
        (
            _qwen("QwenImageEditPlusPipeline", zero_cond_t=True),
            _qwen("QwenImageEditPlusPipeline", **_TWO_BY_64),
        ),
        pictures=(1, 2),
        **_TRUE,
    ),
    "SD3": Row(
        "StableDiffusion3Pipeline", ("tiny_sd3_a", "tiny_sd3_b"), call=_SHORT, **_guided(7.0)
    ),
    "Z-Image": Row("ZImagePipeline", ("tiny_z_image_a", "tiny_z_image_b"), **_guided(4.0, off=0.0)),
    "Z-Image Omni": Row(
        "ZImageOmniPipeline",
        ("tiny_z_image_omni_a", "tiny_z_image_omni_b"),
        pictures=(0, 1, 2),
        **_guided(4.0, off=0.0),
    ),
}


def checkpoint(row: Row, index: int, request: pytest.FixtureRequest, folder: Path) -> Path:
    """One of the two of a row, built in the folder where no fixture has it."""
    build = row.checkpoints[index]
    path: Path = request.getfixturevalue(build) if isinstance(build, str) else build(folder)
    return path


class Sides:
    """One checkpoint, served by us and loaded by diffusers."""

    def __init__(self, row: Row, path: Path, folder: Path) -> None:
        self.row, self.folder = row, folder
        self.ours: Pipeline = parity.opened(path)
        index = json.loads((path / "model_index.json").read_text())
        assert index["_class_name"] == row.pipeline_class
        absent = {name: None for name, value in index.items() if value == [None, None]}
        editing = "processor" in index
        self.theirs = oracle.pipeline(path, **absent, **({"processor": None} if editing else {}))
        if editing:
            self.theirs.processor = Processor(path)
        if row.pipeline_class == "ZImageOmniPipeline":
            parity.keep_full_precision(self.theirs)
        self._path = path

    def expected(self, prompt: str, pictures: int, **call: Any) -> Tensor:
        """diffusers' final latents."""
        shown = [Image.open(file) for file in self.files(pictures)]
        pipe = self.theirs
        video = self.ours.card.makes_video
        if video and shown:
            from diffusers import WanImageToVideoPipeline

            if not isinstance(pipe, WanImageToVideoPipeline):
                pipe = WanImageToVideoPipeline(**pipe.components, **_plain(pipe))
            call |= dict(zip(("image", "last_image"), shown, strict=False))
        elif shown:
            several = self.row.pictures[-1] > 1
            call["image"] = shown if several else shown[0]
        taken = inspect.signature(type(pipe).__call__).parameters
        if "max_area" in taken:
            call["max_area"] = call["width"] * call["height"]
        call = {name: value for name, value in call.items() if name in taken}
        generator = torch.Generator().manual_seed(11)
        if not video:
            return oracle.run(pipe, prompt, seed=11, **call)[0]
        return pipe(prompt=prompt, generator=generator, output_type="latent", **call).frames

    def call(
        self, size: tuple[int, int], frames: int, guidance: dict[str, float]
    ) -> dict[str, Any]:
        call = {"width": size[0], "height": size[1], "num_inference_steps": 3, **self.row.call}
        taken = inspect.signature(type(self.theirs).__call__).parameters
        call |= {"negative_prompt": NEGATIVE} if "negative_prompt" in taken else {}
        return {**call, "num_frames": frames, **guidance}

    def files(self, count: int) -> tuple[str, ...]:
        return files_in(self.folder, count)


def files_in(folder: Path, count: int) -> tuple[str, ...]:
    """Pictures of different sizes."""
    files = []
    generator = torch.Generator().manual_seed(0)
    for number, size in enumerate([(130, 96), (80, 150)][:count]):
        small = torch.randint(0, 256, (8, 8, 3), generator=generator, dtype=torch.uint8)
        files.append(str(folder / f"{number}.png"))
        Image.fromarray(small.numpy()).resize(size).save(files[-1])
    return tuple(files)


def _plain(pipe: Any) -> dict[str, Any]:
    return {name: pipe.config[name] for name in ("boundary_ratio", "expand_timesteps")}
