"""Pictures to token states with the vision half of CLIP, as Wan 2.1 reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sgl_diffusion.components.pretrained import load_preparation, load_pretrained
from sgl_diffusion.loader.index import ModelIndex

if TYPE_CHECKING:
    from PIL.Image import Image


class VisionClip:
    """What prepares pictures, and the encoder, of one repository."""

    def __init__(self, preparation: Any, model: Any) -> None:
        self._preparation = preparation
        self._model = model

    @classmethod
    def load(cls, index: ModelIndex, *, dtype: torch.dtype, device: torch.device) -> VisionClip:
        from transformers import CLIPVisionModel
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        part = index.component("image_encoder")
        model = load_pretrained(CLIPVisionModel, part, dtype=dtype, device=device)
        return cls(load_preparation(CLIPImageProcessorPil, index, "image_processor"), model)

    def blocks(self) -> list[nn.Module]:
        return [module for module in self._model.modules() if type(module).__name__ == _LAYER]

    @torch.inference_mode()
    def encode(self, pictures: Sequence[Image]) -> Tensor:
        """[1, I, width]: the states of the layer before the last, one picture after the other."""
        inputs = self._preparation(images=list(pictures), return_tensors="pt")
        pixels = inputs["pixel_values"].to(self._model.device, self._model.dtype)
        states = self._model(pixels, output_hidden_states=True).hidden_states[-2]
        return states.flatten(0, 1)[None]


_LAYER = "CLIPEncoderLayer"
