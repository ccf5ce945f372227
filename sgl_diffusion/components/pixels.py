"""Between the numbers of a VAE, -1 to 1, and pixels."""

from __future__ import annotations

import torch
from torch import Tensor


def to_frames(video: Tensor) -> Tensor:
    """[1, 3, f, H, W] in -1..1 -> uint8 [f, H, W, 3]."""
    pixels = (video[0].float().clamp(-1, 1) / 2 + 0.5) * 255
    return pixels.round().to(torch.uint8).permute(1, 2, 3, 0).contiguous()
