"""Prompts to hidden states of a Mistral 3 model, as FLUX.2 reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sgl_diffusion.components.pretrained import load_pretrained, load_tokenizer
from sgl_diffusion.loader.index import ModelIndex

_SYSTEM = (
    "You are an AI that reasons about image descriptions. You give structured responses focusing "
    "on object relationships, object\nattribution and actions without speculation."
)


class TextMistral3:
    """The tokenizer and the language half of one repository's model."""

    def __init__(self, tokenizer: Any, model: Any) -> None:
        self._tokenizer = tokenizer
        self._model = model

    @classmethod
    def load(cls, index: ModelIndex, *, dtype: torch.dtype, device: torch.device) -> TextMistral3:
        from transformers import Mistral3ForConditionalGeneration

        part = index.component("text_encoder")
        model = load_pretrained(Mistral3ForConditionalGeneration, part, dtype=dtype, device=device)
        return cls(load_tokenizer(index, chat=True), model)

    def blocks(self) -> list[nn.Module]:
        return list(self._model.model.language_model.layers)

    @torch.inference_mode()
    def encode(self, prompt: str, max_length: int, *, layers: Sequence[int]) -> Tensor:
        """[1, max_length, layers * width]: the states after these layers, side by side.

        The transformer reads the padding, too, so it is made as the model was trained with it. A
        longer chat is cut.
        """
        # The tokenizer's own word for a picture must not come from a user.
        said = (("system", _SYSTEM), ("user", prompt.replace("[IMG]", "")))
        messages = [
            {"role": role, "content": [{"type": "text", "text": text}]} for role, text in said
        ]
        tokens = self._tokenizer.apply_chat_template(
            [messages],
            add_generation_prompt=False,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            padding="max_length",
            truncation=True,
            max_length=max_length,
        ).to(self._model.device)
        output = self._model(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            output_hidden_states=True,
            use_cache=False,
            logits_to_keep=1,  # nobody reads them
        )
        return torch.cat([output.hidden_states[layer] for layer in layers], dim=-1)
