"""Prompts to text embeddings with T5, as FLUX.1 and Stable Diffusion 3 read them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sgl_diffusion.components.pretrained import load_pretrained, load_tokenizer
from sgl_diffusion.loader.index import ModelIndex


class TextT5:
    """The tokenizer and the encoder that a repository keeps under these names."""

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
        encoder: str = "text_encoder_2",
        tokenizer: str = "tokenizer_2",
    ) -> TextT5:
        from transformers import T5EncoderModel

        part = index.component(encoder)
        model = load_pretrained(T5EncoderModel, part, dtype=dtype, device=device)
        return cls(load_tokenizer(index, tokenizer), model)

    @property
    def module(self) -> nn.Module:
        """The encoder, whose names are those of transformers."""
        model: nn.Module = self._model
        return model

    def blocks(self) -> list[nn.Module]:
        return list(self._model.encoder.block)

    @torch.inference_mode()
    def encode(self, prompts: list[str], max_length: int) -> Tensor:
        """[n, max_length, width]: the last hidden states.

        The padding is neither masked nor zeroed: the models were trained on what T5 makes of it. A
        longer prompt is cut.
        """
        tokens = self._tokenizer(
            prompts,
            padding="max_length",
            max_length=max_length,
            truncation=True,
            return_tensors="pt",
        )
        states: Tensor = self._model(tokens.input_ids.to(self._model.device)).last_hidden_state
        return states
