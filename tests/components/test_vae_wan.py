"""Decoding chunk by chunk against the VAE's own decode."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sgl_diffusion.base.errors import SetupError
from sgl_diffusion.components.vae_wan import VaeWan
from sgl_diffusion.loader.index import read_index

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vae(tiny_wan_a: Path) -> VaeWan:
    return VaeWan.load(read_index(tiny_wan_a), dtype=torch.float32, device=CPU)


@pytest.fixture(scope="module")
def theirs(tiny_wan_a: Path) -> Any:
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan.from_pretrained(tiny_wan_a / "vae")


@torch.no_grad()
def whole(model: Any, latents: Tensor) -> Tensor:
    """Latents [C, T, h, w] decoded in one call and rounded to pixels as the pipeline does it."""
    mean = torch.tensor(model.config.latents_mean).view(-1, 1, 1, 1)
    std = torch.tensor(model.config.latents_std).view(-1, 1, 1, 1)
    video = model.decode((latents * std + mean)[None], return_dict=False)[0][0]
    return ((video / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 3, 0)


def latents(frames: int, seed: int = 0, channels: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(channels, frames, 6, 10, generator=generator)


def most_apart(a: Tensor, b: Tensor) -> int:
    assert a.shape == b.shape
    return int((a.int() - b.int()).abs().max())


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_chunks_make_the_whole_clip(vae: VaeWan, theirs: Any, frames: int) -> None:
    chunks = list(vae.decode_chunks(latents(frames)))
    assert [len(chunk) for chunk in chunks] == [1] + [4] * (frames - 1)
    assert most_apart(torch.cat(chunks), whole(theirs, latents(frames))) <= 1


@pytest.mark.parametrize("frames", [1, 5])
def test_encoding_equals_the_vaes_own_mode(vae: VaeWan, theirs: Any, frames: int) -> None:
    pixels = torch.rand(1, 3, frames, 48, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    mean = torch.tensor(theirs.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(theirs.config.latents_std).view(1, -1, 1, 1, 1)
    with torch.no_grad():
        expected = (theirs.encode(pixels).latent_dist.mode() - mean) / std
    encoded = vae.encode(pixels)
    assert encoded.shape == (1, 16, (frames - 1) // 4 + 1, 6, 8) and encoded.std() > 0.1
    assert (encoded - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_pictures_have_structure(vae: VaeWan) -> None:
    picture = torch.cat(list(vae.decode_chunks(latents(2)))).float()
    assert 10 < picture.std() < 70
    assert 60 < picture.mean() < 190
    assert ((picture == 0) | (picture == 255)).float().mean() < 0.02


def test_clips_may_be_decoded_in_turns(vae: VaeWan) -> None:
    clips = [latents(3, seed=1), latents(4, seed=2), latents(1, seed=3)]
    alone = [torch.cat(list(vae.decode_chunks(clip))) for clip in clips]
    turns = itertools.zip_longest(*(vae.decode_chunks(clip) for clip in clips))
    mixed = [torch.cat([c for c in chunks if c is not None]) for chunks in zip(*turns, strict=True)]
    for one, other in zip(alone, mixed, strict=True):
        assert torch.equal(one, other)


def test_a_clip_left_in_the_middle_disturbs_nobody(vae: VaeWan) -> None:
    expected = torch.cat(list(vae.decode_chunks(latents(2))))
    left = vae.decode_chunks(latents(3, seed=5))
    next(left)
    left.close()
    assert torch.equal(torch.cat(list(vae.decode_chunks(latents(2)))), expected)


def test_the_callers_code_does_not_run_in_inference_mode(vae: VaeWan) -> None:
    for _ in vae.decode_chunks(latents(2)):
        assert not torch.is_inference_mode_enabled()


def test_the_residual_vae_of_the_5b_model_decodes_too() -> None:
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    model = AutoencoderKLWan(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=4,
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.0, 1.5, 0.7, 2.0],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
    ).eval()
    given = latents(3, channels=4)
    chunks = torch.cat(list(VaeWan(model).decode_chunks(given)))
    assert chunks.shape == (9, 96, 160, 3)
    assert most_apart(chunks, whole(model, given)) <= 1


def test_a_missing_weight_is_an_error(tiny_wan_a: Path, tmp_path: Path) -> None:
    """The library would leave it at a random value and only warn."""
    (tmp_path / "vae").mkdir()
    for name in ("model_index.json", "vae/config.json"):
        (tmp_path / name).write_bytes((tiny_wan_a / name).read_bytes())
    file = "vae/diffusion_pytorch_model.safetensors"
    weights = load_file(tiny_wan_a / file)
    del weights["decoder.conv_out.bias"]
    save_file(weights, tmp_path / file)
    with pytest.raises(SetupError, match=r"decoder\.conv_out\.bias"):
        VaeWan.load(read_index(tmp_path), dtype=torch.float32, device=CPU)
