"""Adapters that fit the model which is served by default."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open

from sgl_diffusion.recipes import demo
from tests.engine.lora.adapters import LAYERS
from tests.recipes.test_wan_lora import write


def served_layers() -> dict[str, tuple[int, int]]:
    """The layers of `LAYERS` with the shapes that they have in the served model."""
    (file,) = (demo.FOLDER / "transformer").glob("*.safetensors")
    with safe_open(file, "pt") as weights:
        return {name: tuple(weights.get_slice(f"{name}.weight").get_shape()) for name in LAYERS}


def write_served(folder: Path, name: str, seed: int, rank: int) -> Path:
    return write(folder, name, seed, rank, layers=served_layers())
