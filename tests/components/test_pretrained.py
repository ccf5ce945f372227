"""VAEs of diffusers, built without memory and filled from the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
)
from safetensors.torch import load_file, save_file

from sgl_diffusion.base.errors import SetupError
from sgl_diffusion.components.pretrained import load_vae
from sgl_diffusion.engine.footprint.usage import give_back, peak_since, taken
from sgl_diffusion.loader.index import Component

CPU = torch.device("cpu")
FILE = "diffusion_pytorch_model.safetensors"
SMALL = {"block_out_channels": (32, 64), "norm_num_groups": 8, "latent_channels": 4}
BLOCKS = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}
WAN = {"base_dim": 16, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
KINDS = [
    (AutoencoderKL, {**SMALL, **BLOCKS}),
    (AutoencoderKLFlux2, {**SMALL, **BLOCKS}),
    (AutoencoderKLWan, WAN),
    (AutoencoderKLQwenImage, WAN),
]


def part(folder: Path, kind: type[Any]) -> Component:
    return Component(folder, "diffusers", kind.__name__)


def load(folder: Path, kind: type[Any], dtype: torch.dtype = torch.float32) -> Any:
    return load_vae(kind, part(folder, kind), dtype=dtype, device=CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "config"), KINDS)
def test_as_the_library_loads_it(
    kind: type[Any], config: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    made = kind(**config)
    for name, buffer in made.named_buffers():
        buffer.copy_(torch.randint(1, 9, buffer.shape))
        assert not name.endswith("kernel")
    made.save_pretrained(tmp_path)
    mine, theirs = load(tmp_path, kind, dtype), kind.from_pretrained(tmp_path, dtype=dtype)
    assert mine.config.keys() >= {*config} and mine.dtype == dtype and not mine.training
    found, wanted = mine.state_dict(), theirs.state_dict()
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name
    assert not any(parameter.requires_grad for parameter in mine.parameters())


def test_the_first_names_of_attention(tmp_path: Path) -> None:
    AutoencoderKL(**SMALL, **BLOCKS).save_pretrained(tmp_path)
    now = load(tmp_path, AutoencoderKL).state_dict()
    old = load_file(tmp_path / FILE)
    for before, after in (("query", "to_q"), ("key", "to_k"), ("value", "to_v")):
        old = {key.replace(f".{after}.", f".{before}."): value for key, value in old.items()}
    old = {key.replace(".to_out.0.", ".proj_attn."): value for key, value in old.items()}
    assert old.keys() != now.keys()
    save_file(old, tmp_path / FILE)
    found = load(tmp_path, AutoencoderKL).state_dict()
    assert all(torch.equal(found[name], value) for name, value in now.items())


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    AutoencoderKL(**SMALL, **BLOCKS).save_pretrained(tmp_path)
    weights = load_file(tmp_path / FILE)
    del weights["decoder.mid_block.attentions.0.to_q.weight"]
    save_file({**weights, "stray": torch.zeros(1)}, tmp_path / FILE)
    with pytest.raises(SetupError) as caught:
        load(tmp_path, AutoencoderKL)
    missing = "missing: decoder.mid_block.attentions.0.to_q.weight"
    assert f"unexpected: stray; {missing}" in caught.value.message
    assert caught.value.code == "bad_checkpoint"
    config = json.loads((tmp_path / "config.json").read_text())
    config["down_block_types"] = ["NoBlock"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SetupError, match="cannot be loaded as AutoencoderKL"):
        load(tmp_path, AutoencoderKL)


def test_loading_takes_the_size_of_the_weights(tmp_path: Path) -> None:
    with torch.device("meta"):
        made = AutoencoderKL(**BLOCKS, block_out_channels=(256, 512), layers_per_block=2)
    made.to(torch.bfloat16).to_empty(device="cpu").save_pretrained(tmp_path)
    del made
    give_back()
    before, peak = taken(CPU), peak_since(CPU)
    loaded = load(tmp_path, AutoencoderKL)
    size = sum(parameter.nbytes for parameter in loaded.parameters())
    assert size > 100_000_000
    assert peak() - before <= 1.15 * size + (8 << 20)
