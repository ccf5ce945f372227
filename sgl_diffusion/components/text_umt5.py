"""Prompts to text embeddings with UMT5, as Wan reads them."""

from __future__ import annotations

import html
from typing import Any

import ftfy
import torch
from torch import Tensor, nn
from torch.nn import functional

from sgl_diffusion.components.pretrained import load_pretrained, load_tokenizer
from sgl_diffusion.loader.index import ModelIndex


class TextUmt5:
    """The tokenizer and the encoder of one repository."""

    def __init__(self, tokenizer: Any, model: Any) -> None:
        self._tokenizer = tokenizer
        self._model = model

    @classmethod
    def load(cls, index: ModelIndex, *, dtype: torch.dtype, device: torch.device) -> TextUmt5:
        from transformers import UMT5EncoderModel

        part = index.component("text_encoder")
        model = load_pretrained(UMT5EncoderModel, part, dtype=dtype, device=device)
        return cls(load_tokenizer(index), model)

    def blocks(self) -> list[nn.Module]:
        return list(self._model.encoder.block)

    def encode(self, prompts: list[str], max_length: int = 512) -> Tensor:
        """[n, max_length, width]: the last hidden states, zero behind the end of each prompt.

        A longer prompt is cut to `max_length` tokens.
        """
        states = self.encode_tokens(prompts, max_length)
        return functional.pad(states, (0, 0, 0, max_length - states.shape[1]))

    @torch.inference_mode()
    def encode_tokens(self, prompts: list[str], max_length: int = 512) -> Tensor:
        """The same as far as the longest prompt goes: [n, its tokens, width]. No token sees what is
        behind the end of its prompt, so nothing is computed for that."""
        tokens = self._tokenizer(
            [clean_prompt(prompt) for prompt in prompts],
            padding="longest",
            max_length=max_length,
            truncation=True,
            return_tensors="pt",
        )
        tokens = tokens.to(self._model.device)
        mask = tokens.attention_mask
        states: Tensor = self._model(tokens.input_ids, mask).last_hidden_state
        return states * mask.unsqueeze(-1).to(states.dtype)


def clean_prompt(text: str) -> str:
    """Text as the model was trained on it: mojibake repaired, HTML entities read, single spaces."""
    # Twice, because captions were often escaped twice.
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split())
