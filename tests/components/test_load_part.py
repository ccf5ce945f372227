"""A module out of a larger model, whose experts stand one by one in the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from transformers import Qwen3OmniMoeTalkerForConditionalGeneration as Talker

from sgl_diffusion.base.errors import SetupError
from sgl_diffusion.components.pretrained import load_part
from sgl_diffusion.engine.footprint.usage import give_back, peak_since, taken

CPU = torch.device("cpu")
GATE = "talker.model.layers.1.mlp.experts.2.gate_proj.weight"


def config_of(folder: Path, **text: int) -> Any:
    config = AutoConfig.from_pretrained(folder).talker_config
    for name, value in text.items():
        setattr(config.text_config, name, value)
    return config


def load(folder: Path, config: Any, dtype: torch.dtype = torch.float32) -> Any:
    return load_part(Talker, config, folder, "talker.", dtype=dtype, device=CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_the_whole_model_has_it(
    tiny_qwen3_omni: Path, qwen3_of_transformers: Any, dtype: torch.dtype
) -> None:
    wanted = qwen3_of_transformers.talker.state_dict()
    mine = load(tiny_qwen3_omni, config_of(tiny_qwen3_omni), dtype)
    found = mine.state_dict()
    assert found.keys() == wanted.keys() and any(key.endswith("gate_up_proj") for key in found)
    for name, value in wanted.items():
        assert torch.equal(found[name], value.to(dtype)), name
    assert not mine.training and not any(each.requires_grad for each in mine.parameters())


@pytest.fixture
def copied(tiny_qwen3_omni: Path, tmp_path: Path) -> Path:
    """The tiny checkpoint, of which a test may change what speaks."""
    config = json.loads((tiny_qwen3_omni / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = load_file(tiny_qwen3_omni / "model.safetensors")
    save_file(weights, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize("change", ["gone", "other", "named"])
def test_experts_that_do_not_fit_are_refused(copied: Path, change: str) -> None:
    weights = load_file(copied / "model.safetensors")
    expert = weights.pop(GATE)
    if change == "other":
        weights[GATE] = expert[:-1].clone()
    if change == "named":
        weights[GATE.replace(".2.", ".7.")] = expert
    save_file(weights, copied / "model.safetensors")
    with pytest.raises(SetupError) as told:
        load(copied, config_of(copied))
    assert told.value.code == "bad_checkpoint"


def test_loading_takes_the_size_of_the_weights(tiny_qwen3_omni: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "moe_intermediate_size": 512, "num_experts": 16}
    config = config_of(tiny_qwen3_omni, **sizes, num_hidden_layers=4)
    with torch.device("meta"):
        made = Talker(config)
    stored: dict[str, torch.Tensor] = {}
    for name, value in made.state_dict().items():
        numbers = torch.zeros(value.shape, dtype=torch.bfloat16)
        place, _, leaf = f"talker.{name}".rpartition(".")
        if leaf in ("gate_up_proj", "down_proj") and place.endswith(".experts"):
            kinds = ("gate", "up") if leaf == "gate_up_proj" else ("down",)
            for index, expert in enumerate(numbers):
                for kind, part in zip(kinds, expert.chunk(len(kinds)), strict=True):
                    stored[f"{place}.{index}.{kind}_proj.weight"] = part.clone()
        else:
            stored[f"talker.{name}"] = numbers
    save_file(stored, tmp_path / "model.safetensors")
    del stored
    give_back()
    before, peak = taken(CPU), peak_since(CPU)
    loaded = load(tmp_path, config)
    size = sum(parameter.nbytes for parameter in loaded.parameters())
    assert size > 200_000_000
    assert peak() - before <= 1.15 * size + (8 << 20)
