"""What is foretold is within 15 percent of what a process really takes, from a gigabyte on.

Each case runs one job in a fresh process. The peak is that of its resident memory (VmHWM) over what
it took before the job (VmRSS).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sgl_diffusion.loader.index import read_index
from tests.engine.footprint.large import VAES
from tests.own_process import found_by

PICTURE = {"width": 768, "height": 640, "num_frames": 1, "num_inference_steps": 1}
CLIP = {"width": 640, "height": 384, "num_frames": 9, "num_inference_steps": 1}

CASES: dict[str, dict[str, Any]] = {
    "tiny_flux_a": PICTURE,
    "tiny_flux2_klein": PICTURE,
    "tiny_qwen_image_a": PICTURE,
    "tiny_sd3_a": PICTURE,
    "tiny_wan_a": CLIP,
    "tiny_z_image_a": PICTURE,
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", sorted(CASES))
def test_a_gigabyte_is_foretold(
    family: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """With the channels of the published VAEs, where most families have their peak."""
    path = Path(shutil.copytree(request.getfixturevalue(family), tmp_path / "model"))
    part = read_index(path).component("vae")
    VAES[part.class_name](part.folder)
    wish = json.dumps(CASES[family])
    found = found_by("tests.engine.footprint.peak_of", str(path), "{}", wish)
    assert found["peak"] >= 10**9, found
    assert 0.85 <= found["foretold"] / found["peak"] <= 1.15, found
