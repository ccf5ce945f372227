"""Which files are the weights of a component."""

from __future__ import annotations

from pathlib import Path

import pytest

from sgl_diffusion.base.errors import SetupError
from sgl_diffusion.loader.files import variant_of, weight_files


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("model.safetensors", None),
        ("model-00001-of-00002.safetensors", None),
        ("model.safetensors.index.json", None),
        ("config.json", None),
        ("model.fp16.safetensors", "fp16"),
        ("model.fp16-00001-of-00002.safetensors", "fp16"),
        ("model-00001-of-00002.fp16.safetensors", "fp16"),
        ("model.safetensors.index.fp16.json", "fp16"),
        ("unet/diffusion_pytorch_model.non_ema.safetensors", "non_ema"),
    ],
)
def test_the_variant_in_a_name(name: str, variant: str | None) -> None:
    assert variant_of(name) == variant


def test_the_variant_that_was_asked_for_comes_first(tmp_path: Path) -> None:
    for name in ("model.safetensors", "model.fp16.safetensors", "model.bf16.safetensors"):
        (tmp_path / name).touch()
    for variant in ("fp16", "bf16"):
        assert [f.name for f in weight_files(tmp_path, variant)] == [f"model.{variant}.safetensors"]
    for variant in ("fp8", None):
        assert [f.name for f in weight_files(tmp_path, variant)] == ["model.safetensors"]
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(SetupError, match=r"model\.bf16.*model\.fp16") as caught:
        weight_files(tmp_path)
    assert "--variant" in caught.value.hint
