"""What is refused before a model is opened: every pair of options that one alone would not be."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from sgl_diffusion.apps.diffusion import diffusion_app
from sgl_diffusion.attention.select import AUTO, BACKENDS
from sgl_diffusion.base.config import ATTENTION_BACKENDS, EngineOptions
from sgl_diffusion.base.errors import ConfigError, ModelNotFoundError, SetupError
from sgl_diffusion.engine.exclusions import NARROW_ON_CUDA, NO_LSE, ONLY_CUDA, check_options
from sgl_diffusion.engine.parallel.ranks import open_layouts

WHOLE = {"backend": "diffusers"}
COMPILED = {"enable_torch_compile": True}
GRAPHS = {"cuda_graphs": "on"}
AWAY = {"dit_layerwise_offload": True}
SMALL = {"quantization": "fp8"}
RANKS = {"num_gpus": 2}
MERGED = {"lora_path": ("org/x",), "lora_merge_mode": "merge"}

PAIRS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (SMALL, AWAY, "--quantization fp8 and --dit-layerwise-offload exclude each other"),
    (COMPILED, RANKS, "--enable-torch-compile cannot be followed: several ranks"),
    (COMPILED, AWAY, "--enable-torch-compile cannot be followed: .* come and go"),
    (COMPILED, WHOLE, "--enable-torch-compile cannot be followed: .* through diffusers"),
    (GRAPHS, {"device": "cpu"}, "--cuda-graphs on cannot be followed: .* on the CPU"),
    (GRAPHS, RANKS, "--cuda-graphs on cannot be followed: several ranks"),
    (GRAPHS, AWAY, "--cuda-graphs on cannot be followed: .* come and go"),
    (GRAPHS, COMPILED, "--cuda-graphs on cannot be followed: its blocks are compiled"),
    (GRAPHS, WHOLE, "--cuda-graphs on cannot be followed: .* through diffusers"),
    (WHOLE, RANKS, "2 ranks cannot run one model: .* through diffusers"),
    (WHOLE, AWAY, "--dit-layerwise-offload: the model runs through diffusers"),
    (WHOLE, {"text_encoder_cpu_offload": True}, "--text-encoder-cpu-offload: the model"),
    (WHOLE, {"vae_cpu_offload": True}, "--vae-cpu-offload: the model runs through"),
    (WHOLE, SMALL, "--quantization: the model runs through diffusers"),
    (WHOLE, {"vae_precision": "fp32"}, "vae_precision cannot be chosen"),
    (WHOLE, {"text_encoder_precision": "bf16"}, "text_encoder_precision cannot be chosen"),
    (WHOLE, {"attention_backend": "sdpa"}, "attention_backend cannot be chosen"),
    (WHOLE, {"vae_tile_size": 64}, "vae_tile_size cannot be chosen"),
    (WHOLE, {"transformer_path": __file__}, "transformer_path cannot be chosen"),
    (MERGED, AWAY, "cannot be merged here: .* are away"),
    (MERGED, SMALL, "cannot be merged here: .* are fp8"),
    ({"attention_backend": "triton"}, {"device": "cpu"}, "--attention-backend triton .* on cuda"),
    ({"attention_backend": "native", "device": "cuda"}, {"dit_precision": "fp32"}, "native .* GPU"),
    ({"attention_backend": "flash"}, {"dit_precision": "fp32"}, "flash .* in bf16 and fp16"),
    ({"attention_backend": "sdpa"}, {"num_gpus": 2, "ring_degree": 2}, "sdpa .* no log-sum-exp"),
]


@pytest.mark.parametrize(("one", "other", "text"), PAIRS, ids=lambda value: str(value)[:40])
def test_what_cannot_be_together_is_refused_and_each_alone_is_not(
    one: dict[str, Any], other: dict[str, Any], text: str
) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        check_options(EngineOptions(**one, **other))
    assert caught.value.exit_code == 2 and caught.value.hint
    with pytest.raises(ConfigError, match=text):
        diffusion_app(EngineOptions(**one, **other))
    check_options(EngineOptions(**one))
    check_options(EngineOptions(**other))


@pytest.mark.parametrize(
    "options",
    [
        {"num_gpus": 2, "dp_size": 2, **COMPILED},
        {"num_gpus": 2, "dp_size": 2, **GRAPHS},
        {"num_gpus": 2, "dp_size": 2, **WHOLE},
        {"num_gpus": 2, "attention_backend": "sdpa"},
        {"memory_budget": "0.5", **SMALL, "text_encoder_cpu_offload": True},
        {**MERGED, "lora_merge_mode": "dynamic", **SMALL},
        {**AWAY, "lora_merge_mode": "merge"},
    ],
    ids=str,
)
def test_what_can_be_together_is_not_refused(options: dict[str, Any]) -> None:
    check_options(EngineOptions(**options))


def test_values_that_cannot_be_meant(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="2 ranks cannot be shared by 3 replicas"):
        check_options(EngineOptions(num_gpus=2, dp_size=3))
    with pytest.raises(ConfigError, match="2 ranks cannot be arranged as ulysses 3"):
        check_options(EngineOptions(num_gpus=2, ulysses_degree=3))
    with pytest.raises(ConfigError, match="Several machines need --dist-init-addr"):
        check_options(EngineOptions(num_gpus=2, nnodes=2))
    for option in ("revision", "variant"):
        with pytest.raises(ConfigError, match=f"--{option} is about a repository"):
            check_options(EngineOptions(**{option: "x"}))  # type: ignore[arg-type]
        check_options(EngineOptions(model_path="a/b", **{option: "x"}))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="memory_budget is 'lots'"):
        check_options(EngineOptions(memory_budget="lots"))
    with pytest.raises(ConfigError, match="--lora-alpha is about an adapter"):
        check_options(EngineOptions(lora_alpha=(1.0,)))
    with pytest.raises(ConfigError, match="names 'x' twice"):
        check_options(EngineOptions(lora_path=("a/a", "b/b"), lora_nickname=("x", "x")))
    with pytest.raises(ModelNotFoundError, match="no file or folder"):
        check_options(EngineOptions(transformer_path=str(tmp_path / "none")))
    pickled = tmp_path / "weights.ckpt"
    pickled.touch()
    with pytest.raises(SetupError, match="pickle format"):
        check_options(EngineOptions(transformer_2_path=str(pickled)))


def test_attention_that_cannot_be_in_a_ring_is_put_in_none() -> None:
    options = EngineOptions(num_gpus=4)
    assert any(layout.ring > 1 for layout in open_layouts(options, 4))
    chosen = open_layouts(dataclasses.replace(options, attention_backend="sdpa"), 4)
    assert {layout.ring for layout in chosen} == {1} and len(chosen) == 2, "with cfg 1 and cfg 2"


def test_the_attention_backends_say_the_same_of_themselves() -> None:
    assert sorted(ATTENTION_BACKENDS) == sorted([AUTO, *BACKENDS])
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for name in BACKENDS:
        backend = BACKENDS.get(name)
        on_cpu = backend.supports(cpu, 64, torch.float32, False) or ""
        assert ("runs on cuda, not on cpu" in on_cpu) == (name in ONLY_CUDA)
        wide = backend.supports(cuda, 64, torch.float32, False) or ""
        assert ("fp16" in wide and "float32" in wide) == (name in NARROW_ON_CUDA)
    for name in NO_LSE:
        assert "log-sum-exp" in (BACKENDS.get(name).supports(cuda, 64, torch.bfloat16, True) or "")
    assert BACKENDS.get("native").supports(cpu, 64, torch.float32, True) is None
