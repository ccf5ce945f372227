"""Our Wan transformer against diffusers' on the same weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sgl_diffusion import ops
from sgl_diffusion.attention import BACKENDS, AttentionContext
from sgl_diffusion.base.errors import ConfigError, SetupError
from sgl_diffusion.models.wan import TextContext, WanParams, WanTransformer
from sgl_diffusion.ops import library
from tests.checkpoints.random_wan import build_tiny_wan
from tests.fixtures_wan import load_transformer
from tests.isa import at_level

SHAPES = [(1, 4, 6), (5, 4, 4), (3, 2, 10), (1, 16, 2)]  # latent frames, rows, columns
Models = tuple[WanTransformer, Any, Path]


@pytest.fixture(scope="module", params=["tiny_wan_a", "tiny_wan_b"])
def models(request: pytest.FixtureRequest) -> Models:
    from diffusers import WanTransformer3DModel

    path: Path = request.getfixturevalue(request.param)
    theirs = WanTransformer3DModel.from_pretrained(path / "transformer").eval()
    return load_transformer(path), theirs, path


def inputs(shape: tuple[int, int, int], rows: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timesteps that differ per row, and zero-padded text."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(rows, 16, *shape, generator=generator)
    text = torch.randn(rows, 512, 32, generator=generator)
    text[:, 9:] = 0
    return latents, torch.tensor([999.0, 421.0, 7.0, 750.0])[:rows], text


@torch.no_grad()
def run_theirs(model: Any, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
    dtype = model.patch_embedding.weight.dtype
    output: Tensor = model(latents.to(dtype), timestep, text.to(dtype), return_dict=False)[0]
    return output


@torch.no_grad()
def run_ours(model: WanTransformer, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
    return model(latents, timestep, model.prepare(text))


def relative(error: Tensor, reference: Tensor) -> float:
    return float(error.double().square().mean().sqrt() / reference.double().square().mean().sqrt())


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_equals_diffusers(models: Models, shape: tuple[int, int, int]) -> None:
    ours, theirs, _ = models
    given = inputs(shape, rows=2)
    expected = run_theirs(theirs, *given)
    got = run_ours(ours, *given)
    assert got.shape == expected.shape
    assert float((got - expected).abs().max() / expected.abs().max()) < 2e-5


@pytest.mark.skipif(bool(library.absent()), reason=library.absent() or "built")
@pytest.mark.parametrize(("heads", "head_dim"), [(2, 64), (1, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("level", library.CPU_ISAS)
def test_native_attention_equals_diffusers(
    tmp_path: Path, heads: int, head_dim: int, dtype: torch.dtype, level: str
) -> None:
    with at_level(level):
        _compare_native_attention(tmp_path, heads, head_dim, dtype)


def _compare_native_attention(
    tmp_path: Path, heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    """With the kernels that ran counted; in bf16 as exact as with torch's own attention."""
    from diffusers import WanTransformer3DModel

    path = build_tiny_wan(tmp_path / "model", heads=heads, head_dim=head_dim)
    theirs = WanTransformer3DModel.from_pretrained(path / "transformer").eval()
    ours = load_transformer(path, dtype)
    latents, timestep, text = inputs((3, 8, 6), rows=2)
    given = (latents.bfloat16().float(), timestep, text.bfloat16().float())
    expected = run_theirs(theirs, *given)
    by_torch = relative(run_ours(ours, *given).float() - expected, expected)
    ours.attention = AttentionContext.on_one_rank(BACKENDS.get("native"))
    ops.reset_counts()
    error = relative(run_ours(ours, *given).float() - expected, expected)
    calls = {name: n for (op, name), n in ops.counts().items() if op == "attention"}
    assert calls == {"cpu": 2 * len(ours.blocks)}, "self and cross attention of every block"
    assert error <= (1e-5 if dtype == torch.float32 else 1.1 * by_torch)


def test_every_parameter_shows_in_the_output(tiny_wan_a: Path) -> None:
    """So no bias, norm or table could be lost without failing the comparison above."""
    model = load_transformer(tiny_wan_a)
    given = inputs((2, 4, 6), rows=2)
    expected = run_ours(model, *given)
    for name, parameter in model.named_parameters():
        kept = parameter.clone()
        parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        change = (run_ours(model, *given) - expected).abs().max() / expected.abs().max()
        assert float(change) > 1e-3, name
        parameter.copy_(kept)


def test_a_row_does_not_know_its_neighbours(models: Models) -> None:
    ours = models[0]
    latents, timestep, text = inputs((3, 4, 6), rows=4)
    batch = run_ours(ours, latents, timestep, text)
    for i in range(4):
        alone = run_ours(ours, latents[i : i + 1], timestep[i : i + 1], text[i : i + 1])
        torch.testing.assert_close(batch[i : i + 1], alone, atol=1e-5, rtol=1e-5)


def test_each_token_may_have_its_own_timestep(models: Models) -> None:
    ours, theirs, _ = models
    latents, _, text = inputs((2, 4, 6), rows=2)
    timestep = torch.linspace(0, 999, 24).reshape(2, 12).floor()
    expected = run_theirs(theirs, latents, timestep, text)
    got = run_ours(ours, latents, timestep, text)
    assert float((got - expected).abs().max() / expected.abs().max()) < 2e-5


def folding(model: WanTransformer) -> None:
    """Let padding be one key, as pipelines on a CPU do."""
    sdpa = BACKENDS.get("sdpa")
    repeated = sdpa.repeated(torch.device("cpu"))
    assert repeated is not None
    model.attention = AttentionContext.on_one_rank(sdpa, repeated)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_padding_may_be_one_key(models: Models, dtype: torch.dtype) -> None:
    """Of texts of several lengths, one of them without padding; each alone, and as one batch."""
    ours, theirs = load_transformer(models[2], dtype), models[1]
    latents, timestep, text = inputs((3, 4, 6), rows=4)
    latents, text = latents.bfloat16().float(), text.bfloat16().float()
    text[1, 2:], text[2] = 0, text[0, 1]
    lengths = (9, 2, 512, 511)
    text[3] = text[0, 2]
    text[3, 511] = 0
    expected = run_theirs(theirs, latents, timestep, text)
    padded = relative(run_ours(ours, latents, timestep, text).float() - expected, expected)
    folding(ours)
    rows = zip(text.split(1), lengths, strict=True)
    with torch.no_grad():
        single = [ours.prepare(row[:, :length], length=512) for row, length in rows]
        assert [context.kv.shape[3] for context in single] == [10, 3, 512, 512]
        alone = [
            ours(*one, context)
            for *one, context in zip(latents.split(1), timestep.split(1), single, strict=True)
        ]
        got = torch.cat(alone).float()
        few = ours(latents[:2], timestep[:2], TextContext.cat(single[:2])).float()
        batch = ours(latents, timestep, TextContext.cat(single)).float()
    for result, part in ((got, slice(4)), (few, slice(2)), (batch, slice(4))):
        error = relative(result - expected[part], expected[part])
        assert error <= (1e-5 if dtype == torch.float32 else 1.1 * padded)


@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float32, 307), (torch.bfloat16, 138)], ids=["fp32", "bf16"]
)
def test_long_texts_keep_their_padding_as_keys(
    models: Models, dtype: torch.dtype, most: int
) -> None:
    """From where attention to fewer keys, with something added to scores, is not faster."""
    ours = load_transformer(models[2], dtype)
    folding(ours)
    latents, timestep, text = inputs((1, 4, 4), rows=2)
    with torch.no_grad():
        short = ours.prepare(text[:1, :7], length=512)
        for length, keys in ((most - 1, most), (most, 512)):
            long = ours.prepare(text[1:, :length], length=512)
            batch, alone = TextContext.cat([long, short]), TextContext.cat([long])
            for context in (batch, alone):
                assert context.kv.shape[3] == keys
                assert (context.repeats is None) == (keys == 512)
            got = ours(latents, timestep, batch)
            want = ours(latents[1:], timestep[1:], short)
            exact = 1e-5 if dtype == torch.float32 else 0.02
            assert relative(got[1:].float() - want.float(), want.float()) <= exact
        # Of texts with other lengths in all, each keeps its own.
        other = ours.prepare(text[1:, :300], length=400)
        assert TextContext.cat([other, short]).repeats is not None


def test_prepared_prompts_can_be_regrouped(models: Models) -> None:
    ours = models[0]
    latents, timestep, text = inputs((1, 4, 4), rows=3)
    with torch.no_grad():
        single = [ours.prepare(row) for row in text.split(1)]
        regrouped = TextContext.cat([single[2], single[0]])
        got = ours(latents[[2, 0]], timestep[[2, 0]], regrouped)
    expected = run_ours(ours, latents[[2, 0]], timestep[[2, 0]], text[[2, 0]])
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_bf16_is_as_exact_as_diffusers(models: Models) -> None:
    ours, theirs, path = models
    from diffusers import WanTransformer3DModel

    ours_bf16 = load_transformer(path, torch.bfloat16)
    theirs_bf16 = WanTransformer3DModel.from_pretrained(
        path / "transformer", dtype=torch.bfloat16
    ).eval()
    our_error = their_error = 0.0
    for seed in range(6):
        # Inputs are rounded beforehand: what is compared is the forward, not their rounding.
        latents, timestep, text = inputs((3, 8, 6), rows=2, seed=seed)
        given = (latents.bfloat16().float(), timestep, text.bfloat16().float())
        exact = run_theirs(theirs, *given)
        our_error += relative(run_ours(ours_bf16, *given).float() - exact, exact)
        their_error += relative(run_theirs(theirs_bf16, *given).float() - exact, exact)
    assert their_error > 0
    assert our_error <= 1.1 * their_error, (our_error / 6, their_error / 6)


def test_bf16_keeps_the_declared_parameters_in_fp32(tiny_wan_a: Path) -> None:
    model = load_transformer(tiny_wan_a, torch.bfloat16)
    assert model.dtype == torch.bfloat16
    kept = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert kept == {
        name
        for name, _ in model.named_parameters()
        if any(part in WanTransformer.KEEP_FP32 for part in name.split("."))
    }
    assert "blocks.0.scale_shift_table" in kept and "blocks.1.norm2.bias" in kept


def test_params_come_from_a_config() -> None:
    published = {
        "_class_name": "WanTransformer3DModel",
        "patch_size": [1, 2, 2],
        "num_attention_heads": 12,
        "attention_head_dim": 128,
        "out_channels": None,
        "qk_norm": "rms_norm_across_heads",
        "image_dim": None,
        "rope_max_seq_len": 1024,
    }
    params = WanParams.from_config(published)
    assert (params.width, params.out_channels, params.patch_size) == (1536, 16, (1, 2, 2))
    assert params.rope_widths == (44, 42, 42)


@pytest.mark.parametrize(
    "change",
    [{"num_layers": "two"}, {"num_layers": 0}, {"attention_head_dim": -3}, {"patch_size": 2},
     {"patch_size": [1, 0, 2]}, {"eps": None}],
)  # fmt: skip
def test_a_config_that_makes_no_sense_is_named(change: dict[str, Any]) -> None:
    with pytest.raises(SetupError, match=next(iter(change))):
        WanParams.from_config(change)


@pytest.mark.parametrize("change", [{"qk_norm": None}, {"qk_norm": "rms_norm"}])
def test_what_the_file_does_not_compute_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        WanParams.from_config(change)


@pytest.mark.parametrize("change", [{"cross_attn_norm": False}, {"patch_size": (2, 2, 2)}])
def test_other_configs_equal_diffusers(change: dict[str, Any], tmp_path: Path) -> None:
    from diffusers import WanTransformer3DModel

    config: dict[str, Callable | Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 24,
        "num_layers": 1,
        "ffn_dim": 40,
        "text_dim": 32,
        **change,
    }
    theirs = WanTransformer3DModel(**config).eval()
    theirs.save_pretrained(tmp_path / "transformer")
    given = inputs((4, 4, 6), rows=2)
    expected = run_theirs(theirs, *given)
    got = run_ours(load_transformer(tmp_path), *given)
    assert float((got - expected).abs().max() / expected.abs().max()) < 2e-5
