"""The tables of layer names: each against the modules of its diffusers class, and against the
converters that turn checkpoints of the original implementation into those of diffusers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.loaders import single_file_utils as converters
from torch import Tensor

from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.loader.adapters.families.encoders import ENCODER
from sgl_diffusion.loader.adapters.families.registry import FAMILIES, family_of
from sgl_diffusion.loader.adapters.read import read_adapter
from tests.loader.adapters.tiny import CONFIGS, draw, linears, pair, write

State = dict[str, Tensor]


@pytest.mark.parametrize("name", CONFIGS)
def test_flat_names_reach_every_linear_layer(name: str) -> None:
    family = family_of(name, linears(name))
    for layer in linears(name):
        places = family.places(layer.replace(".", "_"), flat=True)
        assert [place.module for place in places] == [layer]


@pytest.mark.parametrize("name", CONFIGS)
def test_dotted_names_of_diffusers_stay(name: str) -> None:
    family = family_of(name)
    for layer in linears(name):
        assert [place.module for place in family.places(layer, flat=False)] == [layer]
        assert not family.is_native(layer)


def test_flat_names_that_are_no_layer_are_nowhere() -> None:
    for family in (*FAMILIES.values(), ENCODER, family_of("Unknown", ["a.0.b"])):
        assert family.places("a_b", flat=True) == ()
        assert family.places("blocks_x_self_attn_q", flat=True) == ()


# A size for each layer of a table: rows that divide into its parts, and few columns. The converter
# of FLUX.1 has the width 3072 written into it, SD3's last block is known by its shape.
def _size(layer: str, parts: int) -> tuple[int, int]:
    if layer.endswith("linear1") and parts == 7:
        return 7 * 3072, 4
    if layer.endswith("context_block.adaLN_modulation.1"):
        return (16, 8) if "joint_blocks.1." in layer else (48, 8)
    return 12 * parts, 8


def _native(name: str, without: tuple[str, ...] = ()) -> dict[str, tuple[int, int]]:
    layers = {}
    for layer in FAMILIES[name].layers:
        for i in range(2 if "{i}" in layer.source else 1):
            source = layer.source.replace("{i}", str(i))
            if not any(part in source for part in without):
                layers[source] = _size(source, sum(layer.rows))
    return layers


def _wan(state: State) -> State:
    return converters.convert_wan_transformer_to_diffusers(state)


def _flux(state: State) -> State:
    for i in range(2):
        for part in ("query", "key"):
            for block in (f"double_blocks.{i}.img_attn", f"double_blocks.{i}.txt_attn"):
                state[f"{block}.norm.{part}_norm.scale"] = torch.ones(1)
            state[f"single_blocks.{i}.norm.{part}_norm.scale"] = torch.ones(1)
    return converters.convert_flux_transformer_checkpoint_to_diffusers(state)


def _sd3(state: State) -> State:
    state["pos_embed"] = torch.ones(1)
    state["context_embedder.weight"] = torch.ones(8, 1)
    state["context_embedder.bias"] = torch.ones(8)
    return converters.convert_sd3_transformer_checkpoint_to_diffusers(state)


_LAST_TEXT = ("joint_blocks.1.context_block.attn.proj", "joint_blocks.1.context_block.mlp")
CASES: dict[str, tuple[Callable[[State], State], tuple[str, ...], bool]] = {
    # name: converter, parts of the layers it does not know, whether layers have a bias
    "WanTransformer3DModel": (_wan, ("modulation", "norm"), True),
    "FluxTransformer2DModel": (_flux, ("processor",), True),
    "Flux2Transformer2DModel": (
        converters.convert_flux2_transformer_checkpoint_to_diffusers,
        ("sformer",),
        False,
    ),
    "ZImageTransformer2DModel": (
        converters.convert_z_image_transformer_checkpoint_to_diffusers,
        (".to.",),
        False,
    ),
    "SD3Transformer2DModel": (_sd3, ("joint_blocks.1.x_block.attn2", *_LAST_TEXT), True),
    "LTX2VideoTransformer3DModel": (
        converters.convert_ltx2_transformer_to_diffusers,
        ("prompt_adaln",),  # a layer of LTX 2.3
        False,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_fused_layers_are_split_exactly(name: str, tmp_path: Path) -> None:
    """Merging into the original layout and converting that is converting and then merging."""
    convert, without, has_bias = CASES[name]
    layers = _native(name, without)
    file: State = {}
    before: State = {}
    after: State = {}
    for index, (layer, size) in enumerate(layers.items()):
        file |= (low := pair(f"diffusion_model.{layer}", size, rank=2, alpha=1.5))
        down, up, alpha = low.values()
        before[f"{layer}.weight"] = draw(*size, seed=index)
        after[f"{layer}.weight"] = before[f"{layer}.weight"] + alpha / 2 * (up @ down)
        if has_bias and "context_block.adaLN" not in layer:
            file[f"diffusion_model.{layer}.diff_b"] = draw(size[0], seed=index + 50)
            before[f"{layer}.bias"] = draw(size[0], seed=index + 100)
            after[f"{layer}.bias"] = (
                before[f"{layer}.bias"] + file[f"diffusion_model.{layer}.diff_b"]
            )
        elif has_bias:
            before[f"{layer}.bias"] = after[f"{layer}.bias"] = draw(size[0])
    path = write(tmp_path, file)
    adapter = read_adapter(str(path), family_of(name))
    assert not adapter.unmatched and not adapter.per_request == has_bias
    state, expected = convert(before), convert(after)
    for module, deltas in adapter.components["transformer"].items():
        for delta in deltas:
            weight = state[f"{module}.{delta.parameter}"]
            weight += delta.delta(weight)
    assert state.keys() == expected.keys()
    for key in state:
        torch.testing.assert_close(state[key], expected[key], rtol=1e-6, atol=1e-7, msg=key)


def test_wan_norms_and_tables_are_full_deltas(tmp_path: Path) -> None:
    """The names of the original implementation for what is no linear layer."""
    names = {
        "blocks.1.modulation": "blocks.1.scale_shift_table",
        "head.modulation": "scale_shift_table",
        "blocks.0.norm3": "blocks.0.norm2.weight",
        "blocks.0.self_attn.norm_q": "blocks.0.attn1.norm_q.weight",
        "blocks.0.cross_attn.norm_k_img": "blocks.0.attn2.norm_added_k.weight",
        "img_emb.proj.4": "condition_embedder.image_embedder.norm2.weight",
    }
    parameters = {key: f"{key}.weight" for key in names if "modulation" not in key}
    state = {parameters.get(key, key): draw(1, 2, 4, seed=i) for i, key in enumerate(names)}
    path = write(tmp_path, {f"diffusion_model.{key}.diff": draw(1, 2, 4) for key in names})
    adapter = read_adapter(str(path), family_of("WanTransformer3DModel"))
    found = {
        f"{module}.{delta.parameter}".removeprefix(".")
        for module, deltas in adapter.components["transformer"].items()
        for delta in deltas
    }
    assert found == set(names.values()) == set(_wan(state))


def test_rows_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, pair("diffusion_model.double_blocks.0.img_attn.qkv", (64, 8)))
    with pytest.raises(RequestError, match="64 rows, which are not 3 equal parts"):
        read_adapter(str(path), family_of("FluxTransformer2DModel"))


@pytest.mark.parametrize("kind", ["lokr", "hada", "dora"])
def test_other_kinds_are_split_exactly(kind: str, tmp_path: Path) -> None:
    layer, out, width = "diffusion_model.double_blocks.0.txt_attn.qkv", 24, 8
    base = draw(out, width, seed=9)
    if kind == "lokr":
        parts = {"lokr_w1": draw(2, 4), "lokr_w2_a": draw(12, 2), "lokr_w2_b": draw(2, 2)}
        delta = torch.kron(parts["lokr_w1"], parts["lokr_w2_a"] @ parts["lokr_w2_b"])
        parts["alpha"], delta = torch.tensor(3.0), 1.5 * delta
    elif kind == "hada":
        parts = {"hada_w1_a": draw(out, 2), "hada_w1_b": draw(2, width)}
        parts |= {"hada_w2_a": draw(out, 2, seed=1), "hada_w2_b": draw(2, width, seed=2)}
        a, b, c, d = parts.values()
        delta = (a @ b) * (c @ d)
    else:
        parts = {"lora_down.weight": draw(2, width), "lora_up.weight": draw(out, 2)}
        parts["dora_scale"] = draw(out, 1, seed=3).abs()
        new = base + parts["lora_up.weight"] @ parts["lora_down.weight"]
        delta = parts["dora_scale"] * new / new.norm(dim=1, keepdim=True) - base
    path = write(tmp_path, {f"{layer}.{part}": value for part, value in parts.items()})
    adapter = read_adapter(str(path), family_of("FluxTransformer2DModel"))
    modules = adapter.components["transformer"]
    names = [f"transformer_blocks.0.attn.add_{part}_proj" for part in "qkv"]
    assert list(modules) == names and not adapter.per_request
    whole = torch.cat(
        [modules[n][0].delta(rows) for n, rows in zip(names, base.chunk(3), strict=True)]
    )
    torch.testing.assert_close(whole, delta)


@pytest.mark.parametrize("kind", ["lokr", "hada", "dora"])
def test_other_kinds_have_their_halves_swapped(kind: str, tmp_path: Path) -> None:
    """The final modulation, of which diffusers has the scale before the shift."""
    layer, base = "final_layer.adaLN_modulation.1", draw(8, 4, seed=9)
    if kind == "lokr":
        parts = {"lokr_w1": draw(4, 2), "lokr_w2": draw(2, 2, seed=1)}
        new = base + torch.kron(parts["lokr_w1"], parts["lokr_w2"])
    elif kind == "hada":
        a, b, c, d = draw(8, 2), draw(2, 4), draw(8, 2, seed=1), draw(2, 4, seed=2)
        parts = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d}
        new = base + (a @ b) * (c @ d)
    else:
        parts = pair("", (8, 4), ("lora_down", "lora_up"), rank=2)
        parts = {key.removeprefix("."): value for key, value in parts.items()}
        new = base + parts["lora_up.weight"] @ parts["lora_down.weight"]
        parts["dora_scale"] = draw(8, 1, seed=3).abs()
        new *= parts["dora_scale"] / new.norm(dim=1, keepdim=True)
    path = write(tmp_path, {f"diffusion_model.{layer}.{part}": v for part, v in parts.items()})
    adapter = read_adapter(str(path), family_of("FluxTransformer2DModel"))
    (delta,) = adapter.components["transformer"]["norm_out.linear"]
    swapped = converters.swap_scale_shift(base, 0)
    torch.testing.assert_close(swapped + delta.delta(swapped), converters.swap_scale_shift(new, 0))
