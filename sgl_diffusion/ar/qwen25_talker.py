"""Qwen2.5's talker: one code a step, from the code before and the next word.

prompt with its states ──prefill──▶ code ──its vector + next word──decode──▶ code …
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sgl_diffusion.ar.code_decoder import CodeDecoder
from sgl_diffusion.ar.decoding import Record
from sgl_diffusion.ar.talker import DrawCode, Manner, Opening


class Qwen25Talker(CodeDecoder):
    groups = 1
    pace = 4
    usual = Manner(top_p=0.8, top_k=40)

    def __init__(self, model: Any, codes: int, rows: int, record: Record | None = None) -> None:
        """The decoder of sound has vectors for the first `codes` of the talker's vocabulary."""
        config = model.config
        self._pad, self._begin = config.tts_codec_pad_token_id, config.tts_codec_start_token_id
        self.ends = frozenset({int(self._pad), int(config.tts_codec_end_token_id)})
        # As the library counts repetitions: over the prompt, too, which stands for these.
        self.seen: tuple[int, ...] = (
            int(config.tts_codec_mask_token_id),
            int(self._pad),
            int(self._begin),
        )
        never = torch.arange(int(config.vocab_size)) >= codes
        never[list(self.ends)] = False
        never[self._begin] = True
        super().__init__(model, never, rows, record)

    def inputs(self, vectors: Tensor) -> Tensor:
        projected: Tensor = self.model.thinker_to_talker_proj(vectors)
        return projected

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
    def frames(
        self, states: Tensor, firsts: Sequence[int], draw: DrawCode
    ) -> tuple[Tensor, Tensor]:
        codes = torch.tensor(list(firsts), device=states.device)
        return codes[:, None], self.model.model.embed_tokens(codes)
