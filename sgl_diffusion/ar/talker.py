"""Qwen3's talker: the text of an answer to codes of sound, one frame of codes per step.

    prompt and first word ──prefill──▶ state, code 0 ─┐
                                                      ├─▶ code predictor: the other codes
    next word, or what stands for none  ──decode──────┘   of the frame; their sum and the
                                                          next word are the next input

Rows in step share the talker's pass and every pass of the code predictor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sgl_diffusion.ar.kv import KvShape, KvSlab, Slot

_SILENT_TAIL = 1024

# Draws the code of one group of one row: (row, group, logits).
DrawCode = Callable[[int, int, Tensor], int]


@dataclass(frozen=True)
class SpeechTokens:
    """The tokens that steer speech, by their ids in the vocabulary of the text."""

    begin: int
    end: int
    none: int

    @classmethod
    def of(cls, config: Any) -> SpeechTokens:
        return cls(config.tts_bos_token_id, config.tts_eos_token_id, config.tts_pad_token_id)


class Talker:
    def __init__(self, model: Any, text_embedding: Any, tokens: SpeechTokens, rows: int) -> None:
        """`text_embedding` is that of the thinker."""
        self.model = model
        self._config = model.config
        self._embed_text = text_embedding
        self._tokens = tokens
        self.kv = KvSlab(KvShape.of(model.model), rows)
        self.end = int(self._config.codec_eos_token_id)
        size = int(self._config.text_config.vocab_size)
        self._never = torch.zeros(size, dtype=torch.bool)
        self._never[size - _SILENT_TAIL :] = True
        self._never[self.end] = False
        self.groups = int(self._config.num_code_groups)

    def voices(self) -> dict[str, int]:
        return dict(self._config.speaker_id)

    @torch.inference_mode()
    def words(self, tokens: Sequence[int]) -> Tensor:
        """[n, width]: tokens of text as the talker takes them."""
        ids = torch.tensor(list(tokens), device=self.kv.shape.device)
        vectors: Tensor = self.model.text_projection(self._embed_text(ids))
        return vectors

    def no_word(self) -> Tensor:
        return self.words([self._tokens.none])[0]

    def last_word(self) -> Tensor:
        return self.words([self._tokens.end])[0]

    @torch.inference_mode()
    def opening(
        self,
        asked: Sequence[int],
        felt: Tensor,
        heard: Tensor,
        role: Sequence[int],
        first: int,
        voice: int,
    ) -> Tensor:
        """The prompt, [L, width]: what was asked, with the thinker's states `felt` at the media
        (`heard`, [len(asked)]), then the three tokens of the assistant's `role` and the first
        word."""
        question = self.words(asked)
        if bool(heard.any()):
            question[heard] = self.model.hidden_projection(felt).to(question.dtype)
        none, begin = self._tokens.none, self._tokens.begin
        answer = self.words([*role, none, none, none, none, begin, first])
        config = self._config
        steering = [
            config.codec_nothink_id,
            config.codec_think_bos_id,
            config.codec_think_eos_id,
            voice,
            config.codec_pad_id,
            config.codec_bos_id,
        ]
        answer[len(role) :] += self.model.model.codec_embedding(
            torch.tensor(steering, device=answer.device)
        )
        return torch.cat([question, answer])

    @torch.inference_mode()
    def prefill(self, slot: Slot, vectors: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the logits of code 0, fp32 on the CPU, and the state that they come from."""
        mask = self.kv.prefill(slot, len(vectors))
        states = self._forward(vectors[None], positions[:, None], mask)[:, -1]
        return self._logits(states)[0], states[0]

    @torch.inference_mode()
    def frames(
        self, states: Tensor, firsts: Sequence[int], draw: DrawCode
    ) -> tuple[Tensor, Tensor]:
        """The other codes of a frame, from [rows, width] and the codes 0: [rows, groups] and the
        sum of their vectors, [rows, width]."""
        from transformers import DynamicCache

        predictor = self.model.code_predictor
        first = torch.tensor(list(firsts), device=states.device)
        total = self.model.model.codec_embedding(first)
        codes = [first]
        inputs = torch.stack([states, total], dim=1)
        cache = DynamicCache(config=predictor.model.config)
        for group in range(self.groups - 1):
            hidden = predictor.model(
                inputs_embeds=inputs, past_key_values=cache, use_cache=True
            ).last_hidden_state[:, -1]
            logits = predictor.lm_head[group](hidden).float().cpu()
            drawn = [draw(row, group + 1, scores) for row, scores in enumerate(logits)]
            codes.append(torch.tensor(drawn, device=states.device))
            fresh = predictor.model.codec_embedding[group](codes[-1])
            total = total + fresh
            inputs = fresh[:, None]
        return torch.stack(codes, dim=1), total

    @torch.inference_mode()
    def decode(
        self, vectors: Tensor, positions: Tensor, writing: Sequence[bool]
    ) -> tuple[Tensor, Tensor]:
        """One step of every row in the slab: vectors [rows, width], positions [rows]. Returns
        logits of code 0, fp32 on the CPU, and states."""
        mask = self.kv.decode(writing)
        states = self._forward(vectors[:, None], positions[None, :, None].expand(3, -1, -1), mask)
        return self._logits(states[:, -1]), states[:, -1]

    def _forward(self, vectors: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        output = self.model.model(
            inputs_embeds=vectors,
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


def less_of_the_same(logits: Tensor, history: Sequence[int], penalty: float) -> Tensor:
    """Logits with those of codes that were drawn before made smaller."""
    if not history or penalty == 1.0:
        return logits
    seen = torch.tensor(sorted(set(history)))
    scores = logits[seen]
    changed = torch.where(scores < 0, scores * penalty, scores / penalty)
    return logits.scatter(0, seen, changed)
