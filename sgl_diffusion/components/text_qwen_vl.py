"""Prompts, with or without pictures, to hidden states of a Qwen2.5-VL model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sgl_diffusion.components.pretrained import load_preparation, load_pretrained, load_tokenizer
from sgl_diffusion.loader.index import ModelIndex

if TYPE_CHECKING:
    from PIL.Image import Image

PICTURE = "<|image_pad|>"


class TextQwenVl:
    """The tokenizer, the model, and for models that see, what prepares pictures for it."""

    def __init__(self, tokenizer: Any, model: Any, eyes: Any = None) -> None:
        self._tokenizer = tokenizer
        self._model = model
        self._eyes = eyes

    @classmethod
    def load(cls, index: ModelIndex, *, dtype: torch.dtype, device: torch.device) -> TextQwenVl:
        from transformers import Qwen2_5_VLForConditionalGeneration

        part = index.component("text_encoder")
        model = load_pretrained(
            Qwen2_5_VLForConditionalGeneration, part, dtype=dtype, device=device
        )
        eyes = None
        if "processor" in index.components:
            from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as preparation

            eyes = load_preparation(preparation.Qwen2VLImageProcessorPil, index, "processor")
        return cls(load_tokenizer(index), model, eyes)

    def blocks(self) -> list[nn.Module]:
        return list(self._model.model.language_model.layers)

    @torch.inference_mode()
    def encode(
        self, text: str, pictures: Sequence[Image] = (), *, max_length: int | None = None
    ) -> Tensor:
        """[1, L, width]: the last states of a whole text.

        Each picture takes the place of one `PICTURE`. A longer text is cut to `max_length` tokens.
        """
        seen = {}
        if pictures:
            assert self._eyes is not None and text.count(PICTURE) == len(pictures)
            seen = self._eyes(images=list(pictures), return_tensors="pt").to(self._model.device)
            text = self._with_places(text, seen["image_grid_thw"])
        tokens = self._tokenizer(
            [text], max_length=max_length, truncation=max_length is not None, return_tensors="pt"
        ).to(self._model.device)
        output = self._model(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            output_hidden_states=True,
            use_cache=False,
            logits_to_keep=1,  # nobody reads them
            **seen,
        )
        states: Tensor = output.hidden_states[-1]
        return states

    def _with_places(self, text: str, grids: Tensor) -> str:
        """One token for each merged patch of a picture."""
        merged = self._eyes.merge_size**2
        before, *behind = text.split(PICTURE)
        counts = [int(grid.prod()) // merged for grid in grids]
        return before + "".join(
            PICTURE * count + part for count, part in zip(counts, behind, strict=True)
        )
