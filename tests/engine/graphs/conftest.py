"""The model whose passes are recorded."""

from __future__ import annotations

from pathlib import Path

import pytest

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.engine.pipeline import Pipeline
from sgl_diffusion.recipes.registry import open_pipeline


@pytest.fixture(scope="module")
def pipeline(tiny_wan_a: Path) -> Pipeline:
    # As on a GPU, padding is read as it is, so that passes do not depend on the lengths of texts.
    options = EngineOptions(model_path=str(tiny_wan_a), attention_backend="native")
    opened = open_pipeline(options, lambda note: None)
    assert isinstance(opened, Pipeline)
    return opened
