"""What the talkers of both families share: a decoder whose head gives the code 0 of a frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sgl_diffusion.ar.decoding import Decoding, Record
from sgl_diffusion.ar.kv import KvShape, KvSlab, Slot
from sgl_diffusion.ar.talker import Opening
from sgl_diffusion.ar.tokenwise import tokenwise


class CodeDecoder:
    def __init__(self, model: Any, never: Tensor, rows: int, record: Record | None = None) -> None:
        """Codes that are true in `never` are not said."""
        self.model = model
        self.kv = KvSlab(KvShape.of(model.model), rows)
        self._few = tokenwise(model.model, record)
        self._decoding = Decoding(self.kv, self._next, record)
        self._never = never

    def inputs(self, vectors: Tensor) -> Tensor:
        """Words and codes, summed, as the decoder takes them."""
        return vectors

    @torch.inference_mode()
    def prefill(self, slot: Slot, opening: Opening) -> tuple[Tensor, Tensor]:
        mask = self.kv.prefill(slot, len(opening.vectors))
        states = self._forward(opening.vectors[None], opening.positions[:, None], mask)[:, -1]
        return self._scores(self.model.codec_head(states))[0], states[0]

    @torch.inference_mode()
    def decode(
        self, vectors: Tensor, positions: Tensor, writing: Sequence[bool]
    ) -> tuple[Tensor, Tensor]:
        logits, states = self._decoding.step(vectors, positions, writing)
        return self._scores(logits), states

    def _next(self, vectors: Tensor, positions: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        places = positions[None, :, None].expand(3, -1, -1)
        if self._few is None:
            states = self._forward(vectors[:, None], places, mask)[:, -1]
        else:
            states = self._few(self.inputs(vectors[:, None]), places, self.kv, mask)[:, -1]
        return self.model.codec_head(states), states

    def _forward(self, vectors: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        output = self.model.model(
            inputs_embeds=self.inputs(vectors),
            position_ids=positions,
            attention_mask=mask,
            past_key_values=self.kv,
            use_cache=True,
        )
        states: Tensor = output.last_hidden_state
        return states

    def _scores(self, logits: Tensor) -> Tensor:
        return logits.float().cpu().masked_fill(self._never, float("-inf"))
