"""Frames to latents and back with the Wan VAE of diffusers; back, one latent frame at a time.

The decoder is causal in time: each of its convolutions needs the last frames of its own input,
which the library keeps in a list it is handed. Each clip has a list of its own here, so clips can
be decoded in turns.
"""

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


class VaeWan:
    """The VAE of one repository."""

    def __init__(self, model: Any) -> None:
        self._model = model
        config = model.config
        self.channels = int(config.z_dim)
        self.spatial_factor = int(config.scale_factor_spatial)
        self.temporal_factor = int(config.scale_factor_temporal)
        shape = (1, self.channels, 1, 1, 1)
        like = next(model.parameters())
        self._mean = like.new_tensor(config.latents_mean).view(shape)
        self._std = like.new_tensor(config.latents_std).view(shape)

    @classmethod
    def load(cls, index: ModelIndex, *, dtype: torch.dtype, device: torch.device) -> VaeWan:
        from diffusers import AutoencoderKLWan

        part = index.component("vae")
        model = load_vae(AutoencoderKLWan, part, dtype=dtype, device=device)
        use_onednn(model)
        use_last_tap(model)
        use_sums(model)
        return cls(model)

    def blocks(self) -> list[nn.Module]:
        encoder, decoder = self._model.encoder, self._model.decoder
        return [
            *encoder.down_blocks,
            encoder.mid_block,
            decoder.mid_block,
            *decoder.up_blocks,
        ]

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [1, 3, F, H, W] in -1..1 -> normalised latents [1, C, T, h, w] in fp32.

        They are the mode of the posterior: nothing is drawn, so a picture has one encoding.
        """
        assert pixels.dim() == 5 and pixels.shape[:2] == (1, 3), tuple(pixels.shape)
        latents = self._model.encode(pixels.to(self._mean)).latent_dist.mode()
        normalised: Tensor = (latents - self._mean) / self._std
        return normalised.float()

    def decode_chunks(self, latents: Tensor) -> Iterator[Tensor]:
        """Normalised latents [C, T, h, w] -> uint8 frames [f, H, W, 3] on the device, T chunks.

        The first chunk has one frame, the others `temporal_factor`.
        """
        assert latents.dim() == 4 and latents.shape[0] == self.channels, tuple(latents.shape)
        model = self._model
        # One place per convolution; spare places do no harm. A picture needs none.
        clip = latents.shape[1] > 1
        cache: list[Any] | None = [None for _ in model.decoder.modules()] if clip else None
        for position in range(latents.shape[1]):
            # The mode is left before each yield: the caller's code runs between the chunks.
            with torch.inference_mode():
                z = latents[None, :, position : position + 1].to(self._mean)
                z = model.post_quant_conv(z * self._std + self._mean)
                first = position == 0
                video = model.decoder(z, feat_cache=cache, feat_idx=[0], first_chunk=first)
                frames = to_frames(self._unpatchify(video))
            yield frames

    def _unpatchify(self, video: Tensor) -> Tensor:
        if self._model.config.patch_size is None:
            return video
        from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

        result: Tensor = unpatchify(video, patch_size=self._model.config.patch_size)
        return result
