"""What is downloaded, as `sglang models` tells it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sgl_diffusion.cli.sglang import main
from sgl_diffusion.loader.cache import cached_models
from sgl_diffusion.loader.hub import resolve_model
from tests.loader.tiny_hub import TinyHub, serving

REPO = {
    "model_index.json": json.dumps({"_class_name": "WanPipeline"}).encode(),
    "transformer/diffusion_pytorch_model.safetensors": bytes(5000),
}
OTHER = {
    "model_index.json": json.dumps({"_class_name": "SanaPipeline"}).encode(),
    "vae/diffusion_pytorch_model.safetensors": bytes(3000),
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with two downloads, a broken one, and a repository in another format."""
    cache = tmp_path / "hub"
    with serving(TinyHub({"org/wan-tiny": REPO, "org/sana-tiny": OTHER})) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        for name in ("org/wan-tiny", "org/sana-tiny"):
            resolve_model(name, cache_dir=cache)
    for name, file in (("broken", "model_index.json"), ("words", "tokenizer.json")):
        folder = cache / f"models--org--{name}" / "snapshots" / "abc"
        folder.mkdir(parents=True)
        (folder / file).write_text("{")
    return cache


def test_downloads_are_found_with_their_class_and_size(cache: Path) -> None:
    found = {model.id: (model.pipeline, model.size) for model in cached_models(cache)}
    sizes = [sum(map(len, repo.values())) for repo in (OTHER, REPO)]
    assert found == {
        "org/sana-tiny": ("SanaPipeline", sizes[0]),
        "org/wan-tiny": ("WanPipeline", sizes[1]),
    }


def test_the_command_lists_recipes_and_downloads(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    assert main(["models"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    expected = (
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers WanPipeline T2V T2I TI2I "
        "832x480, 81 frames at 16 fps, 50 steps, guidance 5"
    )
    assert expected in lines
    assert "org/wan-tiny WanPipeline native 0.00 GB" in lines
    assert "org/sana-tiny SanaPipeline diffusers 0.00 GB" in lines
    assert main(["models", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {"model": "org/wan-tiny", "native": True}.items() <= told["cached"][1].items()
    dev = next(model for model in told["native"] if model["model"].endswith("FLUX.1-dev"))
    assert dev["defaults"]["guidance_scale"] == 3.5 and dev["tasks"] == ["T2I"]
