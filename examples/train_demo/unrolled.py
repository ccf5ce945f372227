"""The library's Wan VAE over all frames of a clip at once, for training.

The library works through a clip in pieces and carries frames from piece to piece. Over the whole
clip the same sums are convolutions that are causal in time: with the three frames of each as
channels they are flat convolutions, whose gradients a CPU computes several times faster.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def unroll(vae: Any) -> None:
    """Change `vae` so that `encode` and `decode` below may use it; its weights stay its own."""
    from diffusers.models.autoencoders import autoencoder_kl_wan as library

    for module in vae.modules():
        if isinstance(module, library.WanCausalConv3d):
            module.forward = types.MethodType(_causal, module)
        elif isinstance(module, library.WanResample):
            module.forward = types.MethodType(_resample, module)


def encode(vae: Any, clips: Tensor) -> tuple[Tensor, Tensor]:
    """Clips [B, 3, F, H, W] in -1..1 to mean and log-variance of latents [B, C, T, h, w]."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import patchify

    moments = vae.quant_conv(vae.encoder(patchify(clips, vae.config.patch_size)))
    mean, variance = moments.chunk(2, dim=1)
    return mean, variance


def decode(vae: Any, latents: Tensor) -> Tensor:
    from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

    out: Tensor = unpatchify(vae.decoder(vae.post_quant_conv(latents)), vae.config.patch_size)
    return out


def _causal(self: nn.Conv3d, x: Tensor, cache_x: None = None) -> Tensor:
    taps, tall, wide = self.kernel_size
    if self.stride[0] == 1:
        x = F.pad(x, (0, 0, 0, 0, taps - 1, 0))
    batch, channels, frames, height, width = x.shape
    out_frames = (frames - taps) // self.stride[0] + 1
    spaced = [x[:, :, k : k + frames - taps + 1 : self.stride[0]] for k in range(taps)]
    weights = [self.weight[:, :, k] for k in range(taps)]
    if taps == 3 and out_frames == 1 and self.stride[0] == 1:
        spaced, weights = spaced[2:], weights[2:]  # before a single frame there are zeros
    flat = (
        torch.cat(spaced, dim=1).transpose(1, 2).reshape(-1, len(spaced) * channels, height, width)
    )
    out = F.conv2d(flat, torch.cat(weights, dim=1), self.bias, padding=(tall // 2, wide // 2))
    return out.unflatten(0, (batch, out_frames)).transpose(1, 2)


def _resample(self: Any, x: Tensor, feat_cache: None = None, feat_idx: Any = None) -> Tensor:
    if self.mode == "upsample3d" and x.shape[2] > 1:
        pairs = self.time_conv(x[:, :, 1:]).unflatten(1, (2, -1))  # the first frame stays one
        x = torch.cat([x[:, :, :1], pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)], dim=2)
    batch = len(x)
    x = self.resample(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (batch, -1)).transpose(1, 2)
    if self.mode == "downsample3d" and x.shape[2] > 1:
        x = torch.cat([x[:, :, :1], self.time_conv(x)], dim=2)
    return x
