"""Media to what the model's towers read: patches of pictures, spectra of sound.

The processors of the repositories need torchvision; these use the parts that do not.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgl_diffusion.ar.media import HEARING_RATE, read_film, read_picture, read_sound
from sgl_diffusion.base.chat import Part
from sgl_diffusion.base.errors import SetupError
from sgl_diffusion.loader.index import read_json


@dataclass(frozen=True, eq=False, kw_only=True)
class Medium:
    """One file, without what is in it. `grid` is (time, height, width) in patches, `seconds` the
    time between two rows of it, `frames` the length of a spectrum."""

    kind: str
    digest: bytes
    grid: tuple[int, int, int] = (0, 0, 0)
    seconds: float = 1.0
    frames: int = 0

    def told(self) -> dict[str, Any]:
        """What `medium_of` makes it of again."""
        return {each.name: getattr(self, each.name) for each in dataclasses.fields(Medium)}


def medium_of(told: Mapping[str, Any]) -> Medium:
    return Medium(**{**told, "grid": tuple(told["grid"])})


@dataclass(frozen=True, eq=False, kw_only=True)
class Sensed(Medium):
    """`features` are patches, [N, dim], or a spectrum, [mels, frames]."""

    features: Tensor


class Senses:
    def __init__(self, eyes: Any, ears: Any) -> None:
        self._eyes = eyes
        self._ears = ears

    @classmethod
    def load(cls, folder: Path) -> Senses:
        from transformers import WhisperFeatureExtractor
        from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as preparation

        values = read_json(folder / "preprocessor_config.json")
        try:
            eyes = preparation.Qwen2VLImageProcessorPil.from_dict(dict(values))
            ears = WhisperFeatureExtractor.from_dict(dict(values))
        except Exception as error:
            raise SetupError(
                f"{folder} cannot prepare media ({type(error).__name__}).",
                hint="Check that the download is complete.",
            ) from error
        return cls(eyes, ears)

    def sense(self, part: Part) -> Sensed:
        path = Path(part.path)
        match part.kind:
            case "image":
                return self._picture(path)
            case "audio":
                return self._sound(path)
            case "video":
                return self._film(path)
        raise AssertionError(f"{part.kind} is no medium")

    def _picture(self, path: Path) -> Sensed:
        seen = self._eyes(images=[read_picture(path)], return_tensors="pt")
        grid = seen["image_grid_thw"][0].tolist()
        return _sensed("image", seen["pixel_values"], (grid[0], grid[1], grid[2]))

    def _sound(self, path: Path) -> Sensed:
        heard = self._ears(
            [read_sound(path)],
            sampling_rate=HEARING_RATE,
            padding=True,
            truncation=False,
            return_attention_mask=True,
            return_tensors="pt",
        )
        length = int(heard["attention_mask"][0].sum())
        return _sensed("audio", heard["input_features"][0, :, :length])

    def _film(self, path: Path) -> Sensed:
        """A patch of a picture holds the picture as often as a patch of a film has frames, so the
        patches of frames, put in turns, are patches of the film."""
        frames, rate = read_film(path)
        seen = self._eyes(images=frames, return_tensors="pt")
        depth = self._eyes.temporal_patch_size
        _, height, width = seen["image_grid_thw"][0].tolist()
        side = self._eyes.patch_size
        assert len(frames) % depth == 0
        patches = seen["pixel_values"].view(-1, depth, height * width, 3, depth, side * side)
        turns = [patches[:, turn, :, :, turn] for turn in range(depth)]
        film = torch.stack(turns, dim=3).flatten(2).flatten(0, 1)
        return _sensed("video", film, (len(frames) // depth, height, width), depth / rate)


def _sensed(
    kind: str, features: Tensor, grid: tuple[int, int, int] = (0, 0, 0), seconds: float = 1.0
) -> Sensed:
    features = features.contiguous()
    digest = hashlib.blake2b(f"{kind}{grid}{seconds}".encode(), digest_size=16)
    digest.update(features.numpy().tobytes())
    return Sensed(
        kind=kind,
        digest=digest.digest(),
        grid=grid,
        seconds=seconds,
        frames=features.shape[1] if kind == "audio" else 0,
        features=features,
    )
