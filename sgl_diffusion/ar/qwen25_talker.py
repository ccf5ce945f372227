"""Qwen2.5's talker: one code a step, from the code before and the next word.

prompt with its states ──prefill──▶ code ──its vector + next word──decode──▶ code …
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sgl_diffusion.ar.kv import KvShape, KvSlab, Slot
from sgl_diffusion.ar.talker import DrawCode, Manner, Opening


class Qwen25Talker:
    groups = 1
    pace = 4
    usual = Manner(top_p=0.8, top_k=40)

    def __init__(self, model: Any, codes: int, rows: int) -> None:
        """The decoder of sound has vectors for the first `codes` of the talker's vocabulary."""
        self.model = model
        config = model.config
        self.kv = KvSlab(KvShape.of(model.model), rows)
        self._pad, self._begin = config.tts_codec_pad_token_id, config.tts_codec_start_token_id
        self.ends = frozenset({int(self._pad), int(config.tts_codec_end_token_id)})
        # As the library counts repetitions: over the prompt, too, which stands for these.
        self.seen: tuple[int, ...] = (
            int(config.tts_codec_mask_token_id),
            int(self._pad),
            int(self._begin),
        )
        self._never = torch.arange(int(config.vocab_size)) >= codes
        self._never[list(self.ends)] = False
        self._never[self._begin] = True

    def words(self, vectors: Tensor) -> Tensor:
        return vectors.to(self.kv.shape.dtype)

    @torch.inference_mode()
    def opening(self, arrays: Sequence[Tensor], shift: int, voice: str) -> Opening:
        """The prompt ends with the voice's token and the first word, to which the codes that begin
        a speech are added; `voice` is in that token."""
        told, silence, positions = arrays
        vectors = self.words(told).clone()
        steering = torch.tensor([self._pad, self._begin], device=vectors.device)
        vectors[-2:] += self.model.model.embed_tokens(steering)
        return Opening(vectors, positions, shift, self.words(silence))

    def trial(self) -> list[Tensor]:
        zeros = torch.zeros(3, int(self.model.config.embedding_size))
        return [zeros, zeros[0], torch.arange(len(zeros)).expand(3, -1)]

    @torch.inference_mode()
    def prefill(self, slot: Slot, opening: Opening) -> tuple[Tensor, Tensor]:
        mask = self.kv.prefill(slot, len(opening.vectors))
        states = self._forward(opening.vectors[None], opening.positions[:, None], mask)[:, -1]
        return self._logits(states)[0], states[0]

    @torch.inference_mode()
    def frames(
        self, states: Tensor, firsts: Sequence[int], draw: DrawCode
    ) -> tuple[Tensor, Tensor]:
        codes = torch.tensor(list(firsts), device=states.device)
        return codes[:, None], self.model.model.embed_tokens(codes)

    @torch.inference_mode()
    def decode(
        self, vectors: Tensor, positions: Tensor, writing: Sequence[bool]
    ) -> tuple[Tensor, Tensor]:
        mask = self.kv.decode(writing)
        states = self._forward(vectors[:, None], positions[None, :, None].expand(3, -1, -1), mask)
        return self._logits(states[:, -1]), states[:, -1]

    def _forward(self, vectors: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        output = self.model.model(
            inputs_embeds=self.model.thinker_to_talker_proj(vectors),
            position_ids=positions,
            attention_mask=mask,
            past_key_values=self.kv,
            use_cache=True,
        )
        states: Tensor = output.last_hidden_state
        return states

    def _logits(self, states: Tensor) -> Tensor:
        logits: Tensor = self.model.codec_head(states).float().cpu()
        return logits.masked_fill(self._never, float("-inf"))
