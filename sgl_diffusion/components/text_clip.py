"""Prompts to one vector each, and to token states, with the text half of CLIP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sgl_diffusion.components.pretrained import load_pretrained, load_tokenizer
from sgl_diffusion.loader.index import ModelIndex


@dataclass(frozen=True)
class ClipText:
    """`pooled` [n, width]; `states` [n, 77, width] of the layer before the last."""

    pooled: Tensor
    states: Tensor


class TextClip:
    """A tokenizer and an encoder; `projected` encoders map their pooled vector once more."""

    def __init__(self, tokenizer: Any, model: Any) -> None:
        self._tokenizer = tokenizer
        self._model = model

    @classmethod
    def load(
        cls,
        index: ModelIndex,
        *,
        dtype: torch.dtype,
        device: torch.device,
        encoder: str = "text_encoder",
        tokenizer: str = "tokenizer",
        projected: bool = False,
    ) -> TextClip:
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        kind = CLIPTextModelWithProjection if projected else CLIPTextModel
        part = index.component(encoder)
        model = load_pretrained(kind, part, dtype=dtype, device=device)
        return cls(load_tokenizer(index, tokenizer), model)

    @property
    def module(self) -> nn.Module:
        """The encoder, whose names are those of transformers."""
        model: nn.Module = self._model
        return model

    def blocks(self) -> list[nn.Module]:
        return [module for module in self._model.modules() if type(module).__name__ == _LAYER]

    @torch.inference_mode()
    def encode(self, prompts: list[str]) -> ClipText:
        """Prompts are padded, or cut, to the length the encoder was made for."""
        tokens = self._tokenizer(
            prompts,
            padding="max_length",
            max_length=self._model.config.max_position_embeddings,
            truncation=True,
            return_tensors="pt",
        )
        ids = tokens.input_ids.to(self._model.device)
        output = self._model(ids, output_hidden_states=True)
        pooled = output.text_embeds if "text_embeds" in output else output.pooler_output
        return ClipText(pooled, output.hidden_states[-2])


_LAYER = "CLIPEncoderLayer"
