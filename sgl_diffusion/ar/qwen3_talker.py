"""Qwen3's talker: the text of an answer to codes of sound, one frame of codes per step.

    prompt and first word ──prefill──▶ state, code 0 ─┐
                                                      ├─▶ code predictor: the other codes
    next word, or what stands for none  ──decode──────┘   of the frame; their sum and the
                                                          next word are the next input

Rows in step share the talker's pass and every pass of the code predictor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sgl_diffusion.ar.code_decoder import CodeDecoder
from sgl_diffusion.ar.decoding import Record
from sgl_diffusion.ar.kv import KvShape
from sgl_diffusion.ar.talker import DrawCode, Manner, Opening
from sgl_diffusion.ar.tokenwise import Tokenwise

_SILENT_TAIL = 1024


class Qwen3Talker(CodeDecoder):
    seen: tuple[int, ...] = ()
    pace = 1
    usual = Manner()

    def __init__(self, model: Any, rows: int, record: Record | None = None) -> None:
        self._config = model.config
        end = int(self._config.codec_eos_token_id)
        self.ends = frozenset({end})
        size = int(self._config.text_config.vocab_size)
        never = torch.zeros(size, dtype=torch.bool)
        never[size - _SILENT_TAIL :] = True
        never[end] = False
        super().__init__(model, never, rows, record)
        self.groups = int(self._config.num_code_groups)
        self._predict = Tokenwise(model.code_predictor.model)
        self._frame = _Frame(KvShape.of(model.code_predictor.model), rows, self.groups)

    @torch.inference_mode()
    def words(self, vectors: Tensor) -> Tensor:
        projected: Tensor = self.model.text_projection(vectors.to(self.kv.shape.dtype))
        return projected

    @torch.inference_mode()
    def opening(self, arrays: Sequence[Tensor], shift: int, voice: str) -> Opening:
        """What was asked, with the thinker's states `felt` where media are heard, then the role of
        the assistant, the steering and the first word."""
        asked, heard, felt, answered, none, positions = arrays
        question = self.words(asked)
        if bool(heard.any()):
            states = self.model.hidden_projection(felt.to(question.dtype))
            question[heard] = states.to(question.dtype)
        answer = self.words(answered)
        config = self._config
        steering = [
            config.codec_nothink_id,
            config.codec_think_bos_id,
            config.codec_think_eos_id,
            config.speaker_id[voice],
            config.codec_pad_id,
            config.codec_bos_id,
        ]
        answer[-len(steering) :] += self.model.model.codec_embedding(
            torch.tensor(steering, device=answer.device)
        )
        vectors = torch.cat([question, answer])
        return Opening(vectors, positions, shift, self.words(none[None])[0])

    def trial(self) -> list[Tensor]:
        asked, answered = 1, 9
        zeros = torch.zeros(answered + 1, int(self._config.thinker_hidden_size))
        positions = torch.arange(asked + answered).expand(3, -1)
        told = [zeros[:asked], torch.zeros(asked, dtype=torch.bool), zeros[:0]]
        return [*told, zeros[:answered], zeros[0], positions]

    @torch.inference_mode()
    def frames(
        self, states: Tensor, firsts: Sequence[int], draw: DrawCode
    ) -> tuple[Tensor, Tensor]:
        predictor, frame = self.model.code_predictor, self._frame
        first = torch.tensor(list(firsts), device=states.device)
        total = self.model.model.codec_embedding(first)
        codes = [first]
        inputs = torch.stack([states, total], dim=1)
        frame.begin()
        for group in range(self.groups - 1):
            places, mask = frame.next(len(codes[0]), inputs.shape[1])
            hidden = self._predict(inputs, places, frame, mask)[:, -1]
            logits = predictor.lm_head[group](hidden).float().cpu()
            drawn = [draw(row, group + 1, scores) for row, scores in enumerate(logits)]
            codes.append(torch.tensor(drawn, device=states.device))
            fresh = predictor.model.codec_embedding[group](codes[-1])
            total = total + fresh
            inputs = fresh[:, None]
        return torch.stack(codes, dim=1), total


class _Frame:
    """Keys and values of the code predictor while it makes one frame of every row."""

    def __init__(self, shape: KvShape, rows: int, groups: int) -> None:
        self._kept = torch.zeros(
            (shape.layers, 2, rows, shape.heads, groups, shape.width),
            dtype=shape.dtype,
            device=shape.device,
        )
        self._places = torch.arange(groups, device=shape.device)
        self._seen = self._places <= self._places[:, None]
        self.begin()

    def begin(self) -> None:
        self._start = self._end = 0

    def next(self, rows: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Make ready for `tokens` more; returns their positions and the mask."""
        self._start, self._end = self._end, self._end + tokens
        new = slice(self._start, self._end)
        return self._places[None, new], self._seen[new, : self._end].expand(rows, 1, -1, -1)

    def put(self, layer: int, fresh: Tensor) -> tuple[Tensor, Tensor]:
        here = self._kept[layer, :, : fresh.shape[1]]
        here[..., self._start : self._end, :] = fresh
        return here[0, :, :, : self._end], here[1, :, :, : self._end]
