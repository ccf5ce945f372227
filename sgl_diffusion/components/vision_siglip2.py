"""Pictures to patch states with SigLIP 2, as Z-Image Omni reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sgl_diffusion.components.pretrained import load_preparation, load_pretrained
from sgl_diffusion.loader.index import ModelIndex

if TYPE_CHECKING:
    from PIL.Image import Image


class VisionSiglip2:
    """What prepares pictures, and the encoder, of one repository."""

    def __init__(self, preparation: Any, model: Any) -> None:
        self._preparation = preparation
        self._model = model

    @classmethod
    def load(cls, index: ModelIndex, *, dtype: torch.dtype, device: torch.device) -> VisionSiglip2:
        from transformers import Siglip2VisionModel
        from transformers.models.siglip2 import image_processing_pil_siglip2 as preparation

        part = index.component("siglip")
        model = load_pretrained(Siglip2VisionModel, part, dtype=dtype, device=device)
        kind = preparation.Siglip2ImageProcessorPil
        return cls(load_preparation(kind, index, "siglip_processor"), model)

    def blocks(self) -> list[nn.Module]:
        return [module for module in self._model.modules() if type(module).__name__ == _LAYER]

    @torch.inference_mode()
    def encode(self, picture: Image) -> Tensor:
        """[y, x, width]: the last states of the patches, which keep the picture's aspect."""
        inputs = self._preparation(images=[picture], return_tensors="pt").to(self._model.device)
        height, width = inputs["spatial_shapes"][0].tolist()
        pixels = inputs["pixel_values"].to(self._model.dtype)
        rest = {name: inputs[name] for name in ("pixel_attention_mask", "spatial_shapes")}
        states = self._model(pixel_values=pixels, **rest).last_hidden_state
        patches: Tensor = states[0, : height * width]
        return patches.view(height, width, -1)


_LAYER = "Siglip2EncoderLayer"
