"""Adapters on the served Wan model, through the engine, against diffusers with PEFT."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sgl_diffusion import ops
from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.base.lora import LoraSetting, LoraUse
from sgl_diffusion.engine.lora import control
from sgl_diffusion.engine.lora.control import LoraControl, lora_control
from sgl_diffusion.engine.pipeline import Pipeline
from sgl_diffusion.loader.adapters.read import read_adapter
from sgl_diffusion.recipes.registry import open_pipeline
from tests.checkpoints.tiny_wan import Build
from tests.engine.bench import Bench
from tests.engine.lora.adapters import LAYERS, prepare
from tests.loader.tiny_hub import COMMIT, TinyHub, serving
from tests.oracles import wan as oracle

CALL = {"width": 48, "height": 32, "num_frames": 5, "num_inference_steps": 4}
PROMPT, NEGATIVE = "a red fox in the snow", "blurry"


def write(
    folder: Path,
    name: str,
    seed: int,
    rank: int,
    size: float = 0.4,
    layers: Mapping[str, tuple[int, int]] = LAYERS,
) -> Path:
    """An adapter on every layer, in PEFT's names, with an alpha that is no whole number."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer, (out, width) in layers.items():
        down = torch.randn(rank, width, generator=generator) / width**0.5
        up = size * torch.randn(out, rank, generator=generator)
        tensors[f"transformer.{layer}.lora_A.weight"] = down
        tensors[f"transformer.{layer}.lora_B.weight"] = up
    config = {"r": rank, "lora_alpha": 0.6 * rank, "target_modules": list(layers)}
    metadata = {f"transformer.{key}": value for key, value in config.items()}
    path = folder / f"{name}.safetensors"
    save_file(tensors, path, {"format": "pt", "lora_adapter_metadata": json.dumps(metadata)})
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {"a": write(folder, "a", 1, 4), "b": write(folder, "b", 2, 8)}


@pytest.fixture(scope="module")
def pipeline(tiny_wan_a: Path) -> Pipeline:
    opened = open_pipeline(EngineOptions(model_path=str(tiny_wan_a)), lambda note: None)
    assert isinstance(opened, Pipeline)
    return opened


@pytest.fixture(scope="module")
def theirs(tiny_wan_a: Path, files: dict[str, Path]) -> Any:
    pipe = oracle.pipeline(tiny_wan_a)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a second adapter is what we want
        for name, path in files.items():
            pipe.load_lora_weights(str(path), adapter_name=name)
    return pipe


def want(theirs: Any, strengths: dict[str, float], guidance: float) -> torch.Tensor:
    if strengths:
        theirs.enable_lora()
        theirs.set_adapters(list(strengths), list(strengths.values()))
    else:
        theirs.disable_lora()
    call = {**CALL, "negative_prompt": NEGATIVE, "guidance_scale": guidance}
    return oracle.latents(theirs, PROMPT, seed=3, **call)


class Engine:
    def __init__(self, pipeline: Pipeline, files: dict[str, Path], rows: int = 8) -> None:
        self.bench = Bench(pipeline, max_rows=rows)
        control = lora_control(
            pipeline, self.bench.runner, EngineOptions(), None, lambda note: None
        )
        self.control: LoraControl = control
        assert control.manager is not None
        self.manager = control.manager
        pipeline.card = dataclasses.replace(pipeline.card, lora_targets=control.targets)
        self.files = files
        settings = [LoraSetting(nickname=name, path=str(path)) for name, path in files.items()]
        prepare(self.manager, *settings)

    def add(self, name: str, seed: int = 3, guidance: float = 5.0, **strengths: float) -> None:
        uses = tuple(LoraUse(nickname=n, strength=s) for n, s in strengths.items())
        call = {**CALL, "negative_prompt": NEGATIVE, "guidance_scale": guidance, "loras": uses}
        job = self.bench.add(name, prompt=PROMPT, seed=seed, **call)
        job.blend = self.control.blend(uses)

    def latents(self) -> dict[str, torch.Tensor]:
        self.bench.run()
        assert not self.bench.errors
        return {name: rows[0] for name, rows in self.bench.latents.items()}

    def choose(self, mode: str, **strengths: float) -> None:
        self.manager.replace(
            [LoraSetting(nickname=name, strength=value) for name, value in strengths.items()], mode
        )


@pytest.mark.parametrize("guidance", [5.0, 1.0])
@pytest.mark.parametrize(
    "strengths", [{"a": 1.0}, {"a": -0.6}, {"a": 0.5, "b": 0.7}], ids=["a", "negative", "both"]
)
def test_merged_and_per_request_equal_diffusers(
    pipeline: Pipeline,
    theirs: Any,
    files: dict[str, Path],
    strengths: dict[str, float],
    guidance: float,
) -> None:
    wanted, base = want(theirs, strengths, guidance), want(theirs, {}, guidance)
    assert (wanted - base).abs().max() > 0.05, "the adapter shows"
    engine = Engine(pipeline, files)
    engine.add("own", guidance=guidance, **strengths)
    found = {"own": engine.latents()["own"]}
    for mode in ("merge", "dynamic"):
        engine.choose(mode, **strengths)
        engine.add(mode, guidance=guidance)
        found[mode] = engine.latents()[mode]
    engine.manager.unmerge("all")
    engine.add("base", guidance=guidance)
    for name, latents in found.items():
        assert (latents - wanted).abs().max() <= 1e-4, name
    assert (engine.latents()["base"] - base).abs().max() <= 1e-4


def test_rows_with_other_adapters_or_none_share_a_batch(
    pipeline: Pipeline, files: dict[str, Path]
) -> None:
    jobs: dict[str, dict[str, float]] = {
        "plain": {},
        "a": {"a": 1.0},
        "weak": {"a": 0.3},
        "both": {"a": 0.5, "b": -1.0},
    }
    alone = {}
    for name, strengths in jobs.items():
        engine = Engine(pipeline, files)
        engine.add(name, **strengths)
        alone |= engine.latents()
    together = Engine(pipeline, files)
    for name, strengths in jobs.items():
        together.add(name, **strengths)
    found = together.latents()
    # Each joins when it is encoded, so only the last step of the first has all four.
    assert together.bench.count("denoise_forwards_total", rows="4") >= 1
    for name, latents in alone.items():
        assert (found[name] - latents).abs().max() <= 1e-5 * latents.abs().max(), name
    for name in ("a", "weak", "both"):
        assert (found[name] - found["plain"]).abs().max() > 0.01


def test_a_batch_without_adapters_pays_nothing(pipeline: Pipeline, files: dict[str, Path]) -> None:
    layers = list(pipeline.adaptables()["transformer"].module.modules())  # type: ignore[attr-defined]

    def hooks() -> int:
        return sum(len(layer._forward_hooks) for layer in layers)

    before = hooks()
    engine = Engine(pipeline, files)
    engine.add("a", a=1.0)
    ops.reset_counts()
    engine.latents()
    assert any(op == "lora_apply" for op, _ in ops.counts())
    ops.reset_counts()
    engine.add("plain")
    engine.latents()
    assert hooks() == before
    assert not any(op == "lora_apply" for op, _ in ops.counts())


def test_unmerged_is_the_same_picture_as_never_merged(
    pipeline: Pipeline, files: dict[str, Path]
) -> None:
    engine = Engine(pipeline, files)
    engine.add("before")
    before = engine.latents()["before"].clone()
    engine.choose("merge", a=1.0, b=0.4)
    engine.add("during")
    during = engine.latents()["during"]
    engine.choose("merge", b=1.5)
    engine.manager.unmerge("all")
    engine.add("after")
    assert torch.equal(engine.latents()["after"], before)
    assert not torch.equal(during, before)


def test_each_of_two_experts_has_its_own(tiny_wan_kind: Build, files: dict[str, Path]) -> None:
    folder = tiny_wan_kind("t2v-experts")
    theirs = oracle.pipeline(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, path in files.items():
            for second in (False, True):
                theirs.load_lora_weights(
                    str(path), adapter_name=name, load_into_transformer_2=second
                )
    opened = open_pipeline(EngineOptions(model_path=str(folder)), lambda note: None)
    assert isinstance(opened, Pipeline)
    engine = Engine(opened, files)
    scales = {"guidance_scale": 5.0, "guidance_scale_2": opened.card.defaults.guidance_scale_2}
    call = {**CALL, "negative_prompt": NEGATIVE, **scales}

    def wanted(first: str, second: str) -> torch.Tensor:
        theirs.transformer.set_adapters([first], [0.8])
        theirs.transformer_2.set_adapters([second], [0.8])
        return oracle.latents(theirs, PROMPT, seed=3, **call)

    different, same = wanted("a", "b"), wanted("a", "a")
    assert (different - same).abs().max() > 0.05, "the second expert has a part in it"
    engine.add("both", a=0.8)
    assert (engine.latents()["both"] - same).abs().max() <= 1e-4
    for mode in ("merge", "dynamic"):
        engine.manager.replace(
            [
                LoraSetting(nickname="a", strength=0.8, target="transformer"),
                LoraSetting(nickname="b", strength=0.8, target="transformer_2"),
            ],
            mode,
        )
        engine.add(mode)
        assert (engine.latents()[mode] - different).abs().max() <= 1e-4, mode


def test_changes_of_a_text_encoder_that_takes_none_are_named(
    pipeline: Pipeline, files: dict[str, Path], tmp_path: Path
) -> None:
    text = {
        "text_encoder.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight": torch.ones(1, 8),
        "text_encoder.encoder.block.0.layer.0.SelfAttention.q.lora_B.weight": torch.ones(8, 1),
    }
    both, only = tmp_path / "both.safetensors", tmp_path / "only.safetensors"
    save_file({**load_file(files["a"]), **text}, both)
    save_file(text, only)
    engine = Engine(pipeline, {"both": both})
    (listed,) = engine.manager.report()["loaded_adapters"]
    assert listed["unmatched"] == ["text_encoder.encoder.block.0.layer.0.SelfAttention.q"]
    with pytest.raises(RequestError, match="changes no layer"):
        prepare(engine.manager, LoraSetting(nickname="only", path=str(only)))


def test_a_revision_of_a_hub_repository(
    pipeline: Pipeline, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"one.safetensors": files["a"], "two.safetensors": files["b"]}
    repository = {name: path.read_bytes() for name, path in names.items()}
    monkeypatch.setattr(control, "read_adapter", partial(read_adapter, cache_dir=tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    engine = Engine(pipeline, {})
    wish = LoraSetting(nickname="a", path="org/two", weight_name="two.safetensors", local=False)
    with serving(TinyHub({"org/two": repository})) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        with pytest.raises(RequestError, match="no revision nope"):
            prepare(engine.manager, dataclasses.replace(wish, revision="nope"))
        prepare(engine.manager, dataclasses.replace(wish, revision=COMMIT))
        asked = {path for method, path, _ in hub.requests if method == "GET"}
    assert any(path.endswith(f"{COMMIT}/two.safetensors") for path in asked)
    (listed,) = engine.manager.report()["loaded_adapters"]
    assert (listed["path"], listed["rank"]) == ("org/two", 8)
