"""What lies beside a model's components in its folder: its own defaults, and adapters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from sgl_diffusion import DiffGenerator
from sgl_diffusion.base.errors import SetupError
from sgl_diffusion.recipes.beside import own_adapters, own_defaults
from sgl_diffusion.recipes.wan_defaults import SMALL
from tests.recipes.test_wan_lora import write


def test_a_folder_says_its_own_defaults(tmp_path: Path) -> None:
    assert own_defaults(tmp_path, SMALL) is SMALL
    (tmp_path / "defaults.json").write_text('{"width": 96, "guidance_scale": 2}')
    own = own_defaults(tmp_path, SMALL)
    assert (own.width, own.height, own.guidance_scale) == (96, SMALL.height, 2.0)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"widht": 96}, "names 'widht'"),
        ({"width": "96"}, "another type"),
        ([], "not a JSON object"),
    ],
)
def test_defaults_that_cannot_be(tmp_path: Path, values: object, text: str) -> None:
    (tmp_path / "defaults.json").write_text(json.dumps(values))
    with pytest.raises(SetupError, match=text):
        own_defaults(tmp_path, SMALL)


def test_adapters_are_known_by_their_files(tmp_path: Path) -> None:
    assert own_adapters(tmp_path) == ()
    (tmp_path / "adapters").mkdir()
    for name in ("b.safetensors", "a.safetensors", "notes.txt"):
        (tmp_path / "adapters" / name).touch()
    assert [Path(path).stem for path in own_adapters(tmp_path)] == ["a", "b"]


def test_a_model_comes_with_its_defaults_and_adapters(tiny_wan_a: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_wan_a, folder)
    values = {"width": 48, "height": 32, "num_frames": 1, "num_inference_steps": 2}
    (folder / "defaults.json").write_text(json.dumps(values))
    (folder / "adapters").mkdir()
    write(folder / "adapters", "ink", 1, 4)
    with DiffGenerator.from_pretrained(str(folder)) as generator:
        (known,) = generator.list_loras()["loaded_adapters"]
        assert known["nickname"] == "ink" and not known["in_memory"]
        base = generator.generate("a fox").frames
        assert base.shape == (1, 32, 48, 3)
        own = generator.generate("a fox", loras=[{"nickname": "ink"}]).frames
        generator.set_lora("ink")
        merged = generator.generate("a fox").frames
        generator.unmerge_lora_weights()
        assert not np.array_equal(merged, base)
        assert np.abs(own.astype(int) - merged.astype(int)).max() <= 1
        assert np.array_equal(generator.generate("a fox").frames, base)
