"""Counted once: found again by the same model only, and not trusted when it is damaged."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.footprint import Footprint, Shown
from sgl_diffusion.engine.footprint import budget as module
from sgl_diffusion.engine.footprint import identity as naming
from sgl_diffusion.engine.footprint import kept as keeping
from sgl_diffusion.engine.footprint.budget import Budget
from sgl_diffusion.engine.footprint.identity import identity
from sgl_diffusion.engine.footprint.kept import FOLDER, Kept
from sgl_diffusion.engine.pipeline import Pipeline
from sgl_diffusion.recipes.registry import open_pipeline

COUNTED = Footprint(
    room=0,
    text=1.0,
    condition=2.5,
    shown=Shown(fixed=3.0, pixel=0.25),
    shown_kept=None,
    shown_step=0.0,
    step_row=4.0,
    step_cell=0.125,
    still_pixel=5.0,
    clip_pixel=6.0,
    clip_kept_pixel=7.0,
    row_cell=8.0,
    cell_pixels=64.0,
    frames_per_cell=4,
)


@pytest.fixture(scope="module")
def wan(tiny_wan_a: Path) -> Pipeline:
    return opened(tiny_wan_a)


def opened(path: Path, **options: str) -> Pipeline:
    chosen = EngineOptions(model_path=str(path), **options)  # type: ignore[arg-type]
    pipeline = open_pipeline(chosen, lambda note: None)
    assert isinstance(pipeline, Pipeline)
    return pipeline


def test_what_is_kept_is_found(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    assert kept.find("a") is None
    kept.keep("a", COUNTED)
    assert Kept(tmp_path).find("a") == COUNTED
    assert kept.find("b") is None
    (file,) = (tmp_path / FOLDER).iterdir()
    assert file.name == "a.json"


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: b"",
        lambda text: text[: len(text) // 2],
        lambda text: text.replace(b'"a"', b'"b"'),
        lambda text: text.replace(b"2.5", b'"much"'),
        lambda text: text.replace(b'"text"', b'"texts"'),
        lambda text: b"\xff" + text,
    ],
)
def test_what_is_damaged_is_not_trusted(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    kept.keep("a", COUNTED)
    file = tmp_path / FOLDER / "a.json"
    text = file.read_bytes()
    assert damage(text) != text
    file.write_bytes(damage(text))
    assert kept.find("a") is None
    kept.keep("a", COUNTED)
    assert kept.find("a") == COUNTED


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / FOLDER).touch()
    kept = Kept(tmp_path)
    kept.keep("a", COUNTED)
    assert kept.find("a") is None


def test_the_oldest_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "_MOST", 2)
    kept = Kept(tmp_path)
    for age, name in enumerate("abc"):
        kept.keep(name, COUNTED)
        os.utime(tmp_path / FOLDER / f"{name}.json", (1000 + age, 1000 + age))
    kept.keep("d", COUNTED)
    assert [kept.find(name) is not None for name in "abcd"] == [False, False, True, True]


def test_a_second_start_does_not_count(
    wan: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[Pipeline] = []

    def measure(pipeline: Pipeline) -> Footprint:
        counted.append(pipeline)
        return dataclasses.replace(COUNTED, shown=None)

    monkeypatch.setattr(module, "measure", measure)
    monkeypatch.setattr(module, "taken", lambda device: 0)
    found = []
    for options in ({"data_dir": str(tmp_path)}, {"data_dir": str(tmp_path)}, {}):
        budget = Budget(EngineOptions(**options, memory_budget="4g"), torch.device("cpu"))
        found.append(budget.footprint(wan, lambda note: None))
    assert len(counted) == 2  # the first, and the one without a folder
    assert found[0] is not None and found[0].room > 0 and found[0] == found[1] == found[2]


def test_the_same_model_has_the_same_identity(wan: Pipeline, tiny_wan_a: Path) -> None:
    assert identity(wan) == identity(wan) == identity(opened(tiny_wan_a))


def test_every_difference_is_seen(
    wan: Pipeline, tiny_wan_a: Path, tiny_wan_b: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other: Any = copy.copy(wan)
    other.card = dataclasses.replace(wan.card, max_edge=wan.card.max_edge - 8)
    different = [
        opened(tiny_wan_a, dit_precision="bf16"),
        opened(tiny_wan_a, vae_precision="bf16"),
        opened(tiny_wan_b),
        other,
    ]
    names = {identity(pipeline) for pipeline in (wan, *different)}
    for name, value in (("SGLD_OPS", "norm_modulate=torch"), ("SGLD_CPU_ISA", "scalar")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            names.add(identity(wan))
    with monkeypatch.context() as patch:
        patch.setattr(naming, "version", lambda library: "0.1")
        names.add(identity(wan))
    assert len(names) == 8


def test_functions_and_what_they_hold_are_seen() -> None:
    class Scaled(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)
            self.combine = lambda x: scale * x

    first, second = (naming._Walk().of(Scaled(scale)) for scale in (1.0, 2.0))
    assert first != second
    assert first == naming._Walk().of(Scaled(1.0))
