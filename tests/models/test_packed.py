"""Pictures of different sizes in one pass give what each gives alone, in every family that can."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sgl_diffusion.attention import BACKENDS, AttentionContext
from sgl_diffusion.models.flux import FluxContext, FluxParams, FluxTransformer
from sgl_diffusion.models.flux2 import Flux2Context, Flux2Params, Flux2Transformer
from sgl_diffusion.models.qwen_image import QwenImageContext, QwenImageParams, QwenImageTransformer
from sgl_diffusion.models.sd3 import Sd3Context, Sd3Params, Sd3Transformer
from sgl_diffusion.models.wan import TextContext, WanParams, WanTransformer
from sgl_diffusion.models.z_image import ZImageContext, ZImageParams, ZImageTransformer

SIZES = [(8, 8), (4, 12), (16, 6), (8, 8)]
TIMES = torch.tensor([900.0, 421.3, 20.0, 7.0])
Contexts = tuple[nn.Module, list[Any], Any]


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape)


def flux() -> Contexts:
    params = FluxParams(
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(8, 12, 12),
    )
    model = started(FluxTransformer(params))
    return model, [model.prepare(draw(1, 11, 32), draw(1, 32), 3.5) for _ in SIZES], FluxContext.cat


def flux2() -> Contexts:
    params = Flux2Params(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(8, 8, 8, 8),
    )
    model = started(Flux2Transformer(params))
    return model, [model.prepare(draw(1, 11, 32), 3.5) for _ in SIZES], Flux2Context.cat


def qwen_image() -> Contexts:
    params = QwenImageParams(
        num_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(8, 12, 12),
    )
    model = started(QwenImageTransformer(params))
    texts = [model.prepare(draw(1, length, 32)) for length in (5, 9, 7, 9)]
    return model, texts, QwenImageContext.cat


def z_image() -> Contexts:
    params = ZImageParams(dim=64, n_layers=2, n_heads=2, cap_feat_dim=32, axes_dims=(8, 12, 12))
    model = started(ZImageTransformer(params))
    texts = [model.prepare(draw(1, length, 32)) for length in (5, 40, 7, 32)]
    return model, texts, ZImageContext.cat


def sd3() -> Contexts:
    """With a second attention in a block, and more places than any of the pictures fills."""
    params = Sd3Params(
        num_layers=3,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=64,
        pooled_projection_dim=32,
        pos_embed_max_size=11,
        dual_attention_layers=(0, 2),
        qk_norm="rms_norm",
    )
    model = started(Sd3Transformer(params))
    return model, [model.prepare(draw(1, 7, 32), draw(1, 32)) for _ in SIZES], Sd3Context.cat


def wan() -> Contexts:
    params = WanParams(
        num_attention_heads=2, attention_head_dim=32, text_dim=32, ffn_dim=64, num_layers=2
    )
    model = started(WanTransformer(params))
    texts = [model.prepare(draw(1, length, 32), length=16) for length in (5, 9, 7, 9)]
    return model, texts, TextContext.cat


def wan_padding_as_one_key() -> Contexts:
    model, _, cat = wan()
    sdpa = BACKENDS.get("sdpa")
    model.attention = AttentionContext.on_one_rank(sdpa, sdpa.repeated(torch.device("cpu")))  # type: ignore[assignment]
    texts = [model.prepare(draw(1, length, 32), length=24) for length in (5, 9, 7, 9)]  # type: ignore[operator]
    assert cat(texts).repeats is not None  # type: ignore[attr-defined]
    return model, texts, cat


def started(model: Any) -> Any:
    for parameter in model.parameters():
        nn.init.normal_(parameter, float(parameter.dim() == 1), 0.1)
    return model.eval()


@pytest.mark.parametrize("backend", ["sdpa", "native"])
@pytest.mark.parametrize(
    "family", [flux, flux2, sd3, qwen_image, z_image, wan, wan_padding_as_one_key]
)
def test_packed_equals_alone(family: Callable[[], Contexts], backend: str) -> None:
    torch.manual_seed(len(backend))
    with torch.inference_mode():
        model, contexts, cat = family()
        repeated = model.attention.repeated  # type: ignore[union-attr]
        model.attention = AttentionContext.on_one_rank(BACKENDS.get(backend), repeated)  # type: ignore[assignment]
        latents = [draw(1, 16, 1, *size) for size in SIZES]
        together = model.packed(latents, TIMES, cat(contexts))  # type: ignore[operator]
        for row, (x, context) in enumerate(zip(latents, contexts, strict=True)):
            alone = model(x, TIMES[row : row + 1], context)
            assert together[row].shape == alone.shape
            assert (together[row] - alone).abs().max() <= 1e-5 * alone.abs().max()
