"""Latents to pictures and back with AutoencoderKL, the image VAE of FLUX.1, SD3 and Z-Image.

Latents carry a time axis of one, as everywhere in the engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sgl_diffusion.components.pixels import to_frames
from sgl_diffusion.components.pretrained import load_vae
from sgl_diffusion.loader.index import ModelIndex


class VaeKl:
    """The VAE of one repository; its latents are `(z - shift) * scaling`."""

    def __init__(self, model: Any) -> None:
        self._model = model
        config = model.config
        self.channels = int(config.latent_channels)
        self.spatial_factor = 2 ** (len(config.block_out_channels) - 1)
        self._scaling = float(config.scaling_factor)
        self._shift = float(config.shift_factor or 0.0)

    @classmethod
    def load(cls, index: ModelIndex, *, dtype: torch.dtype, device: torch.device) -> VaeKl:
        from diffusers import AutoencoderKL

        part = index.component("vae")
        return cls(load_vae(AutoencoderKL, part, dtype=dtype, device=device))

    def blocks(self) -> list[nn.Module]:
        encoder, decoder = self._model.encoder, self._model.decoder
        return [*encoder.down_blocks, encoder.mid_block, decoder.mid_block, *decoder.up_blocks]

    def noise(self, width: int, height: int, seed: int) -> Tensor:
        """The first latents [1, C, 1, h, w] of a picture of that size, drawn on the CPU."""
        shape = (1, self.channels, 1, height // self.spatial_factor, width // self.spatial_factor)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [1, 3, 1, H, W] in -1..1 to latents [1, C, 1, h, w]: the mode, not a sample."""
        picture = pixels[:, :, 0].to(self._model.dtype)
        # In this order: torch's group norm of channels-last pictures is off by 1e-3 on a CPU.
        picture = picture.contiguous()
        z = self._model.encode(picture).latent_dist.mode()
        return ((z - self._shift) * self._scaling)[:, :, None]

    def decode_chunks(self, latents: Tensor) -> Iterator[Tensor]:
        """Latents [C, 1, h, w] -> one chunk of uint8 frames [1, H, W, 3] on the device."""
        assert latents.shape[:2] == (self.channels, 1), tuple(latents.shape)
        # The mode is left before the yield: the caller's code runs then.
        with torch.inference_mode():
            z = latents[None, :, 0].to(self._model.dtype) / self._scaling + self._shift
            frames = to_frames(self._model.decode(z, return_dict=False)[0][:, :, None])
        yield frames
