"""Prompts to hidden states of a Qwen3 language model, asked as the user of a chat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sgl_diffusion.components.pretrained import load_pretrained, load_tokenizer
from sgl_diffusion.loader.index import ModelIndex


class TextQwen3:
    """The tokenizer and the language model of one repository."""

    def __init__(self, tokenizer: Any, model: Any) -> None:
        self._tokenizer = tokenizer
        self._model = model

    @classmethod
    def load(cls, index: ModelIndex, *, dtype: torch.dtype, device: torch.device) -> TextQwen3:
        from transformers import Qwen3Model

        part = index.component("text_encoder")
        model = load_pretrained(Qwen3Model, part, dtype=dtype, device=device)
        return cls(load_tokenizer(index, chat=True), model)

    def blocks(self) -> list[nn.Module]:
        return list(self._model.layers)

    def encode(
        self,
        prompt: str,
        max_length: int,
        *,
        layers: Sequence[int],
        thinking: bool,
        padded: bool = False,
    ) -> Tensor:
        """[1, L, layers * width]: the states after these layers, side by side, of the prompt's
        tokens and those of the chat around it.

        A longer chat is cut to `max_length` tokens; a shorter one is filled up if `padded`.
        """
        chat = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=thinking,
        )
        return self.read(chat, max_length, layers=layers, padded=padded)

    @torch.inference_mode()
    def read(
        self, text: str, max_length: int, *, layers: Sequence[int], padded: bool = False
    ) -> Tensor:
        """The same of a text as it stands."""
        tokens = self._tokenizer(
            [text],
            max_length=max_length,
            truncation=True,
            padding="max_length" if padded else False,
            return_tensors="pt",
        ).to(self._model.device)
        output = self._model(
            tokens.input_ids, tokens.attention_mask, output_hidden_states=True, use_cache=False
        )
        return torch.cat([output.hidden_states[layer] for layer in layers], dim=-1)
