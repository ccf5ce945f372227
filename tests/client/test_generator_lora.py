"""Adapters through `DiffGenerator` and `sglang generate`, on the tiny model."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from sgl_diffusion.base.errors import ConfigError, NotFoundError, RequestError
from sgl_diffusion.cli.sglang import main
from sgl_diffusion.cli.target import Target
from sgl_diffusion.client.generator import DiffGenerator
from tests.recipes.test_wan_lora import write

SMALL = {"num_frames": 1, "width": 32, "height": 32, "num_inference_steps": 2, "seed": 5}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("adapters"), "a", 1, 4)


def test_a_generator_takes_and_gives_back_adapters(tiny_wan_a: Path, file: Path) -> None:
    with DiffGenerator.from_pretrained(str(tiny_wan_a)) as generator:
        base = generator.generate("a fox", **SMALL).frames
        active = generator.set_lora("ink", str(file), strength=0.8)["active"]
        assert active["transformer"][0]["nickname"] == "ink"
        merged = generator.generate("a fox", **SMALL).frames
        assert not np.array_equal(merged, base)
        generator.unmerge_lora_weights()
        assert np.array_equal(generator.generate("a fox", **SMALL).frames, base)
        generator.merge_lora_weights(strength=0.8)
        assert np.array_equal(generator.generate("a fox", **SMALL).frames, merged)
        generator.unmerge_lora_weights()
        own = generator.generate("a fox", loras=[{"nickname": "ink", "strength": 0.8}], **SMALL)
        assert np.abs(own.frames.astype(int) - merged.astype(int)).max() <= 1
        assert [known["nickname"] for known in generator.list_loras()["loaded_adapters"]] == ["ink"]
        with pytest.raises(NotFoundError):
            generator.set_lora("pen")
        with pytest.raises(RequestError, match="merge_mode"):
            generator.set_lora("ink", merge_mode="magic")


def test_generate_begins_with_adapters(
    tiny_wan_a: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def made(*flags: str) -> str:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.png"
        command = ["generate", "--prompt", "a fox", "--model-path", str(tiny_wan_a)]
        command += ["--size", "32x32", "--num-inference-steps", "2", "--output-path", str(path)]
        assert main([*command, "--data-dir", str(tmp_path / "data"), *flags]) == 0
        return hashlib.sha256(path.read_bytes()).hexdigest()

    plain = made()
    ink = made("--lora-path", str(file), "--lora-nickname", "ink", "--lora-scale", "0.5")
    whole = made("--lora-path", str(file))
    assert ink not in (plain, whole)
    twice = str(2 * 0.6 * 4)  # the alpha of the file is 0.6 times its rank of 4
    assert made("--lora-path", str(file), "--lora-scale", "0.5", "--lora-alpha", twice) == whole
    command = ["generate", "--prompt", "a fox", "--model-path", str(tiny_wan_a)]
    code = ConfigError.exit_code
    assert main([*command, "--lora-scale", "0.5"]) == code
    assert "there is no --lora-path" in capsys.readouterr().err
    assert main([*command, "--lora-path", str(tmp_path / "nothing.safetensors")]) != 0
    assert "nothing.safetensors" in capsys.readouterr().err


def test_a_file_with_adapters_of_its_own_is_made_again(
    tiny_wan_a: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = [{"nickname": "ink", "path": str(file), "strength": 0.7}]
    made = tmp_path / "a.png"
    with DiffGenerator.from_pretrained(str(tiny_wan_a)) as generator:
        result = generator.generate("a fox", loras=own, **SMALL)
        Target.of(str(made), None).write(result, generator.card.name)
    again = ["regenerate", str(made), "--output-path", str(tmp_path / "b.png")]
    again += ["--data-dir", str(tmp_path / "data"), "--lora-nickname", "ink", "--lora-path"]
    assert main([*again, str(file)]) == 0
    assert f"same pixels as {made}" in capsys.readouterr().err
    other = write(tmp_path, "other", 5, 4)
    assert main([*again, str(other)]) == 0
    assert f"not the same pixels as {made}" in capsys.readouterr().err
