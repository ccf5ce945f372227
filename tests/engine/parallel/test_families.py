"""Every native transformer over four ranks equals itself on one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sgl_diffusion.attention import BACKENDS, AttentionContext
from sgl_diffusion.distributed.layout import Layout
from sgl_diffusion.distributed.mesh import Mesh
from sgl_diffusion.engine.parallel.families import FAMILIES
from sgl_diffusion.engine.parallel.tokens import spread_tokens
from sgl_diffusion.models.flux import FluxContext, FluxParams, FluxTransformer
from sgl_diffusion.models.flux2 import Flux2Context, Flux2Params, Flux2Transformer
from sgl_diffusion.models.qwen_image import QwenImageContext, QwenImageParams, QwenImageTransformer
from sgl_diffusion.models.sd3 import Sd3Params, Sd3Transformer
from sgl_diffusion.models.wan import WanParams, WanTransformer
from sgl_diffusion.models.z_image import ZImageContext, ZImageParams, ZImageTransformer
from sgl_diffusion.models.z_image_omni import OmniContext, ZImageOmniTransformer
from tests.distributed.ranks import Group, Ranks

pytestmark = pytest.mark.timeout(600)  # four processes load torch, on a busy machine, too

Run = Callable[[], Tensor]  # a forward pass of the model it was made for
LAYOUTS = [Layout(1, 1, 4), Layout(1, 4, 1), Layout(1, 2, 2), Layout(2, 1, 2), Layout(2, 2, 1)]


def _drawn(model: nn.Module, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        norm = "norm" in name and parameter.dim() == 1 and name.endswith("weight")
        scale = 0.1 if parameter.dim() < 2 else parameter.shape[-1] ** -0.5
        parameter.data = scale * noise + norm
    return model.eval()


def _draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


TIMES = torch.tensor([999.0, 421.3, 7.0])


def wan(
    size: tuple[int, int, int], *, picture: bool = False, heads: int = 4, padded: bool = False
) -> tuple[nn.Module, Run]:
    extra = {"image_dim": 24, "added_kv_proj_dim": 64} if picture else {}
    params = WanParams(
        num_attention_heads=heads,
        attention_head_dim=16,
        ffn_dim=96,
        num_layers=2,
        text_dim=32,
        **extra,
    )
    model = _drawn(WanTransformer(params))
    length = None
    if padded:  # with one key for all of the padding
        sdpa, length = BACKENDS.get("sdpa"), 24
        model.attention = AttentionContext.on_one_rank(sdpa, sdpa.repeated(torch.device("cpu")))
    context = model.prepare(_draw(3, 9, 32), _draw(3, 5, 24) if picture else None, length)
    assert (context.repeats is not None) == padded
    return model, lambda: model(_draw(3, 16, *size), TIMES, context)


def wan_each_token_its_time(size: tuple[int, int, int]) -> tuple[nn.Module, Run]:
    model, _ = wan(size)
    tokens = size[0] * size[1] * size[2] // 4
    times = 999 * torch.rand(3, tokens, generator=torch.Generator().manual_seed(3))
    context = model.prepare(_draw(3, 9, 32))
    return model, lambda: model(_draw(3, 16, *size), times, context)


def flux(height: int, width: int, text: int, references: int = 0) -> tuple[nn.Module, Run]:
    model = _drawn(
        FluxTransformer(
            FluxParams(
                num_layers=2,
                num_single_layers=2,
                attention_head_dim=16,
                num_attention_heads=4,
                joint_attention_dim=32,
                pooled_projection_dim=24,
                guidance_embeds=True,
                axes_dims_rope=(4, 6, 6),
            )
        )
    )
    shown = [_draw(3, 16, 1, 6, 4 + 2 * i) for i in range(references)]
    context: FluxContext = model.prepare(_draw(3, text, 32), _draw(3, 24), 3.5, shown)
    return model, lambda: model(_draw(3, 16, 1, height, width), TIMES, context)


def flux2(height: int, width: int, text: int, references: int = 0) -> tuple[nn.Module, Run]:
    model = _drawn(
        Flux2Transformer(
            Flux2Params(
                in_channels=16,
                num_layers=2,
                num_single_layers=2,
                attention_head_dim=16,
                num_attention_heads=4,
                joint_attention_dim=32,
                axes_dims_rope=(4, 4, 4, 4),
            )
        )
    )
    shown = [_draw(3, 16, 1, 3, 2 + i) for i in range(references)]
    context: Flux2Context = model.prepare(_draw(3, text, 32), 3.5, shown)
    return model, lambda: model(_draw(3, 16, 1, height, width), TIMES, context)


def sd3(height: int, width: int, text: int) -> tuple[nn.Module, Run]:
    model = _drawn(
        Sd3Transformer(
            Sd3Params(
                num_layers=3,
                attention_head_dim=16,
                num_attention_heads=4,
                caption_projection_dim=64,
                joint_attention_dim=32,
                pooled_projection_dim=24,
                pos_embed_max_size=12,
                qk_norm="rms_norm",
                dual_attention_layers=(0,),
            )
        )
    )
    context = model.prepare(_draw(3, text, 32), _draw(3, 24))
    return model, lambda: model(_draw(3, 16, 1, height, width), TIMES, context)


def qwen(
    height: int, width: int, texts: tuple[int, ...], references: int = 0, clean: bool = False
) -> tuple[nn.Module, Run]:
    model = _drawn(
        QwenImageTransformer(
            QwenImageParams(
                num_layers=2,
                attention_head_dim=16,
                num_attention_heads=4,
                joint_attention_dim=32,
                axes_dims_rope=(4, 6, 6),
                zero_cond_t=clean,
            )
        )
    )
    shown = [_draw(1, 16, 1, 6, 4 + 2 * i) for i in range(references)]
    context = QwenImageContext.cat([model.prepare(_draw(1, n, 32, seed=n), shown) for n in texts])
    return model, lambda: model(_draw(len(texts), 16, 1, height, width), TIMES, context)


def z_image_params(**more: int) -> ZImageParams:
    return ZImageParams(
        in_channels=16,
        dim=64,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=4,
        cap_feat_dim=32,
        axes_dims=(4, 6, 6),
        **more,
    )


def z_image(height: int, width: int, captions: tuple[int, ...]) -> tuple[nn.Module, Run]:
    model = _drawn(ZImageTransformer(z_image_params()))
    context = ZImageContext.cat([model.prepare(_draw(1, n, 32, seed=n)) for n in captions])
    return model, lambda: model(_draw(len(captions), 16, 1, height, width), TIMES, context)


def z_image_omni(
    height: int, width: int, captions: tuple[int, ...], references: int = 0
) -> tuple[nn.Module, Run]:
    model = _drawn(ZImageOmniTransformer(z_image_params(siglip_feat_dim=24)))
    shown = [_draw(1, 16, 1, 6, 4 + 2 * i) for i in range(references)]
    seen = [_draw(3, 5, 24, seed=i) for i in range(references)]

    def prepared(length: int) -> OmniContext:
        lengths = [length] if not references else [3, *[2] * (references - 1), length, 2]
        texts = [_draw(1, count, 32, seed=count) for count in lengths]
        return model.prepare(texts, shown, seen)

    context = OmniContext.cat([prepared(length) for length in captions])
    return model, lambda: model(_draw(len(captions), 16, 1, height, width), TIMES, context)


CASES: dict[str, tuple[Callable[..., tuple[nn.Module, Run]], tuple[Any, ...]]] = {
    "wan": (wan, ((3, 4, 6),)),
    "wan, 15 tokens": (wan, ((5, 2, 6),)),
    "wan, six heads": (lambda size: wan(size, heads=6), ((3, 4, 6),)),
    "wan of a picture": (lambda size: wan(size, picture=True), ((3, 6, 6),)),
    "wan, padding as one key": (lambda size: wan(size, padded=True), ((3, 4, 6),)),
    "wan, a time for each token": (wan_each_token_its_time, ((3, 6, 6),)),
    "flux": (flux, (8, 6, 11)),
    "flux, references": (flux, (6, 6, 7, 2)),
    "flux2": (flux2, (5, 3, 13)),
    "flux2, references": (flux2, (3, 3, 6, 2)),
    "sd3": (sd3, (6, 10, 7)),
    "qwen": (qwen, (6, 6, (13, 13, 13))),
    "qwen, texts of three lengths": (qwen, (6, 10, (5, 13, 6))),
    "qwen, clean references": (qwen, (4, 6, (5, 5, 9), 2, True)),
    "z-image": (z_image, (10, 14, (40, 40, 40))),
    "z-image, captions of three lengths": (z_image, (6, 6, (5, 100, 40))),
    "z-image omni": (z_image_omni, (10, 14, (40, 41, 40))),
    "z-image omni, references": (z_image_omni, (6, 6, (5, 100, 40), 2)),
}
SHORT = {"wan": (wan, ((1, 2, 2),)), "flux": (flux, (6, 6, 3)), "qwen": (qwen, (2, 2, (5, 1, 2)))}


@torch.inference_mode()
def _differences(
    everyone: Group, layout: Layout, names: list[str], short: bool
) -> dict[str, tuple[float, int, int]]:
    """By case: how far apart the results are, relative to the largest value, and how many tokens
    the first block got, alone and on this rank."""
    mesh = Mesh.of(layout, everyone.index, seconds=20)
    native = BACKENDS.get("native")
    found = {}
    for name in names:
        make, args = (SHORT if short else CASES)[name]
        model, run = make(*args)
        model.attention = AttentionContext.on_one_rank(native, model.attention.repeated)
        block = FAMILIES[type(model)].sections(model)[0].blocks[0]
        seen: list[int] = []

        def look(_: nn.Module, args: tuple[Any, ...], seen: list[int] = seen) -> None:
            seen.append(args[0].shape[1])

        handle = block.register_forward_pre_hook(look)
        alone = run()
        handle.remove()
        spread_tokens(model, mesh, native)
        block.register_forward_pre_hook(look)
        for _ in range(2):
            together = run()
            difference = float((together - alone).abs().max() / alone.abs().max())
        found[name] = (difference, seen[0], seen[1])
    return found


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_equal_to_one_rank(four_ranks: Ranks, layout: Layout) -> None:
    results = four_ranks.run(_differences, layout, list(CASES), False)
    for name in CASES:
        for result in results:
            assert result[name][0] < 1e-5, (name, result[name])
        whole = results[0][name][1]
        assert sum(result[name][2] for result in results) == layout.cfg * whole, name


def test_a_sequence_with_few_tokens_stays_whole(four_ranks: Ranks) -> None:
    results = four_ranks.run(_differences, Layout(1, 2, 2), list(SHORT), True)
    assert all(difference == 0 for result in results for difference, *_ in result.values())
    assert all(whole == local for result in results for _, whole, local in result.values())


def test_every_family_has_a_case(four_ranks: Ranks) -> None:
    models = {type(make(*args)[0]) for make, args in CASES.values()}
    assert models == set(FAMILIES)
