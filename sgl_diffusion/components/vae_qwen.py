"""Pictures to latents and back with the Qwen-Image VAE of diffusers: Wan's, for one frame."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sgl_diffusion.components.causal_conv import use_last_tap
from sgl_diffusion.components.channel_norm import use_sums
from sgl_diffusion.components.conv3d import use_onednn
from sgl_diffusion.components.pixels import to_frames
from sgl_diffusion.components.pretrained import load_vae
from sgl_diffusion.loader.index import ModelIndex


class VaeQwen:
    """The VAE of one repository."""

    def __init__(self, model: Any) -> None:
        self._model = model
        config = model.config
        self.channels = int(config.z_dim)
        self.spatial_factor = 2 ** len(config.temperal_downsample)
        shape = (1, self.channels, 1, 1, 1)
        like = next(model.parameters())
        self._mean = like.new_tensor(config.latents_mean).view(shape)
        self._std = like.new_tensor(config.latents_std).view(shape)

    @classmethod
    def load(cls, index: ModelIndex, *, dtype: torch.dtype, device: torch.device) -> VaeQwen:
        from diffusers import AutoencoderKLQwenImage

        part = index.component("vae")
        model = load_vae(AutoencoderKLQwenImage, part, dtype=dtype, device=device)
        use_onednn(model)
        use_last_tap(model)
        use_sums(model)
        return cls(model)

    def blocks(self) -> list[nn.Module]:
        encoder, decoder = self._model.encoder, self._model.decoder
        return [*encoder.down_blocks, encoder.mid_block, decoder.mid_block, *decoder.up_blocks]

    def noise(self, width: int, height: int, seed: int) -> Tensor:
        """The first latents [1, C, 1, h, w] of a picture of that size, drawn on the CPU."""
        shape = (1, self.channels, 1, height // self.spatial_factor, width // self.spatial_factor)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [1, 3, 1, H, W] in -1..1 to normalised latents [1, C, 1, h, w]: the mode."""
        pixels = pixels.to(self._mean).contiguous()
        latents = self._model.encode(pixels).latent_dist.mode()
        return ((latents - self._mean) / self._std).float()

    def decode_chunks(self, latents: Tensor) -> Iterator[Tensor]:
        """Normalised latents [C, 1, h, w] -> one chunk of uint8 frames [1, H, W, 3]."""
        assert latents.shape[:2] == (self.channels, 1), tuple(latents.shape)
        # The mode is left before the yield: the caller's code runs then.
        with torch.inference_mode():
            z = latents[None].to(self._mean) * self._std + self._mean
            frames = to_frames(self._model.decode(z, return_dict=False)[0])
        yield frames
