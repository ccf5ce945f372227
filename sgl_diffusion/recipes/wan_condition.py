"""What a prompt and a picture become for Wan, and how a picture joins the latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sgl_diffusion.components.vae_wan import VaeWan
from sgl_diffusion.layers.embed import Grid
from sgl_diffusion.models.wan import TextContext


@dataclass(frozen=True)
class WanCondition:
    """Conditions of B rows: `texts` for each expert, and of a picture one of

    beside [B, m+C, T, h, w], a mask and clean latents that are channels of the input;
    first [B, C, 1, h, w], the clean latents of the first frame.
    """

    texts: tuple[TextContext, ...]
    beside: Tensor | None = None
    first: Tensor | None = None

    @staticmethod
    def cat(conditions: Sequence[WanCondition]) -> WanCondition:
        """Conditions of several rows of one kind as one batch."""
        by_expert = zip(*(condition.texts for condition in conditions), strict=True)
        return WanCondition(
            tuple(TextContext.cat(texts) for texts in by_expert),
            _cat([condition.beside for condition in conditions]),
            _cat([condition.first for condition in conditions]),
        )

    def dress(self, latents: Tensor, timesteps: Tensor, patch: Grid) -> tuple[Tensor, Tensor]:
        """Latents [B, C, T, h, w] and timesteps [B] as the transformer takes them: with a clean
        first frame each token has a timestep of its own."""
        if self.beside is not None:
            return torch.cat((latents, self.beside), dim=1), timesteps
        if self.first is None:
            return latents, timesteps
        latents = torch.cat((self.first, latents[:, :, 1:]), dim=2)
        frames, (height, width) = latents.shape[2] // patch[0], latents.shape[3:]
        per_frame = height // patch[1] * (width // patch[2])
        own = timesteps[:, None].repeat(1, frames * per_frame)
        own[:, :per_frame] = 0
        return latents, own


def _cat(parts: Sequence[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    assert len(present) in (0, len(parts)), "rows with and without a picture in one batch"
    return torch.cat(present) if present else None


def beside_latents(vae: VaeWan, pictures: Sequence[Tensor], frames: int) -> Tensor:
    """[1, m+C, T, h, w]: which frames are given, then the latents of a clip that has only those:
    the first picture [1, 3, 1, H, W] at the beginning, a second one at the end."""
    clip = pictures[0].new_zeros(1, 3, frames, *pictures[0].shape[3:])
    given = torch.zeros(frames)
    for place, picture in zip((0, frames - 1), pictures, strict=False):
        clip[:, :, place] = picture[:, :, 0]
        given[place] = 1
    latents = vae.encode(clip)
    # The first latent frame stands for one frame, every other one for as many as the mask's rows.
    given = torch.cat((given[:1].expand(vae.temporal_factor), given[1:]))
    mask = given.view(1, -1, vae.temporal_factor, 1, 1).transpose(1, 2).to(latents)
    mask = mask.expand(-1, -1, -1, *latents.shape[3:])
    return torch.cat((mask, latents), dim=1)
