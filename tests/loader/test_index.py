"""model_index.json and component configs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sgl_diffusion.base.errors import ModelNotFoundError, SetupError
from sgl_diffusion.loader.index import Component, read_config, read_index


def write(folder: Path, **values: object) -> Path:
    (folder / "model_index.json").write_text(json.dumps(values))
    return folder


def test_components_options_and_absent_ones(tmp_path: Path) -> None:
    index = read_index(
        write(
            tmp_path,
            _class_name="WanPipeline",
            _diffusers_version="0.42.1",
            vae=["diffusers", "AutoencoderKLWan"],
            transformer_2=[None, None],
            boundary_ratio=None,
            expand_timesteps=False,
            sizes=[1, 2],
        )
    )
    assert index.pipeline == "WanPipeline"
    assert index.components == {"vae": Component(tmp_path / "vae", "diffusers", "AutoencoderKLWan")}
    assert index.options == {"boundary_ratio": None, "expand_timesteps": False, "sizes": [1, 2]}
    with pytest.raises(SetupError, match="has no transformer_2") as caught:
        index.component("transformer_2")
    assert "vae" in caught.value.hint


def test_a_real_index(tiny_wan_a: Path) -> None:
    index = read_index(tiny_wan_a)
    assert set(index.components) == {"vae", "text_encoder", "tokenizer", "transformer", "scheduler"}
    assert read_config(index.component("transformer").folder)["num_layers"] == 2


def test_a_folder_in_another_format(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no model_index\.json"):
        read_index(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", "\xff"])
def test_a_damaged_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "model_index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(SetupError):
        read_index(tmp_path)


def test_a_missing_config(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"config\.json is not there"):
        read_config(tmp_path)
