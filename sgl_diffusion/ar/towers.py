"""The towers that turn pictures, films and sound into vectors for the thinker."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sgl_diffusion.ar.senses import Sensed


@dataclass(frozen=True, eq=False)
class Felt:
    """One medium: [N, width], and for some vision towers the same of several of its layers."""

    kind: str
    vectors: Tensor
    deep: list[Tensor] = field(default_factory=list)

    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.vectors, *self.deep))


class Towers:
    """Keeps what it computed, up to a budget of bytes: a picture often comes again."""

    def __init__(self, model: Any, budget: int) -> None:
        self._model = model
        self._budget = budget
        self._kept: OrderedDict[bytes, Felt] = OrderedDict()
        self._bytes = 0
        self.reused = 0

    @torch.inference_mode()
    def feel(self, medium: Sensed) -> Felt:
        felt = self._kept.get(medium.digest)
        if felt is not None:
            self._kept.move_to_end(medium.digest)
            self.reused += 1
            return felt
        felt = self._hear(medium) if medium.kind == "audio" else self._see(medium)
        self._keep(medium.digest, felt)
        return felt

    def _hear(self, medium: Sensed) -> Felt:
        features = medium.features[None].to(self._model.device, self._model.dtype)
        mask = torch.ones(1, features.shape[2], dtype=torch.long, device=features.device)
        output = self._model.get_audio_features(features, feature_attention_mask=mask)
        return Felt("audio", output.last_hidden_state)

    def _see(self, medium: Sensed) -> Felt:
        patches = medium.features.to(self._model.device)
        grid = torch.tensor([medium.grid], device=patches.device)
        if medium.kind == "image":
            output = self._model.get_image_features(patches, grid)
        else:
            output = self._model.get_video_features(patches, grid)
        deep = getattr(output, "deepstack_features", None) or []
        return Felt(medium.kind, output.pooler_output[0], [layer[0] for layer in deep])

    def _keep(self, digest: bytes, felt: Felt) -> None:
        if felt.nbytes() > self._budget:
            return
        self._kept[digest] = felt
        self._bytes += felt.nbytes()
        while self._bytes > self._budget:
            _, old = self._kept.popitem(last=False)
            self._bytes -= old.nbytes()
