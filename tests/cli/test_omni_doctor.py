"""`sgl-omni doctor` on this machine, with models that are whole and models that are not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from sgl_diffusion.base.omni import OmniServeOptions
from sgl_diffusion.cli.checks import omni
from sgl_diffusion.cli.checks.probe import Probed
from sgl_diffusion.cli.checks.types import Check

ROOT = Path(__file__).parents[2]
PROBED = Probed({"memory": {"free": 2**30}, "torch": {"gpus": []}})


def checked(folder: Path, probed: Probed = PROBED, **changes: Any) -> dict[str, Check]:
    options = OmniServeOptions(model_path=str(folder), **changes)
    return {check.name: check for check in omni.checks(probed, options)}


@pytest.fixture
def copied(tiny_qwen25_omni: Path, tmp_path: Path) -> Path:
    """Its files are of the copy alone."""
    return Path(shutil.copytree(tiny_qwen25_omni, tmp_path / "model"))


@pytest.mark.slow
def test_a_machine_and_a_model_that_work(tiny_qwen3_omni: Path) -> None:
    argv = ("--model-path", str(tiny_qwen3_omni), "--port", "0", "--process", "talker,code2wav")
    done = subprocess.run(
        [sys.executable, "-m", "sgl_diffusion.cli.omni", "doctor", "--json", *argv],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert found["model"]["found"].startswith("qwen3-omni in ")
    assert found["options"]["found"].endswith("processes: 2")
    assert {"torch", "codecs", "weights", "port", "hub cache"} <= set(found)


def _without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")


def _another(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


@pytest.mark.parametrize(
    ("breaks", "word", "fix"),
    [
        (_without("config.json"), "config.json", "download"),
        (_without("preprocessor_config.json"), "preprocessor_config.json", "Download"),
        (_without("spk_dict.pt"), "spk_dict.pt", "--no-speech"),
        (_without("model.safetensors"), "", "Convert"),
        (_pointer, "Git LFS", "git lfs pull"),
        (_another, "llama", "qwen3-omni, qwen2.5-omni"),
    ],
)
def test_a_model_that_is_not_whole(
    copied: Path, breaks: Callable[[Path], None], word: str, fix: str
) -> None:
    assert all(check.status == "ok" for check in checked(copied).values())
    breaks(copied)
    wrong = [check for check in checked(copied).values() if check.status == "failed"]
    assert len(wrong) == 1 and word in wrong[0].found and fix in wrong[0].fix


def test_what_does_not_fit_is_told(tiny_qwen3_omni: Path) -> None:
    little = Probed({"memory": {"free": 1000}, "torch": {"gpus": []}})
    assert checked(tiny_qwen3_omni)["weights"].status == "ok"
    told = checked(tiny_qwen3_omni, little)["weights"]
    assert told.status == "warning" and "--no-speech" in told.fix
    gpu = {"name": "H100", "capability": [9, 0], "free": 70 * 2**30, "total": 80 * 2**30}
    there = Probed({"memory": {"free": 1000}, "torch": {"gpus": [gpu]}})
    assert "GPU memory free: 70.0 GiB" in checked(tiny_qwen3_omni, there)["weights"].found


def test_weights_count_as_they_are_loaded(tiny_omni: Path) -> None:
    """In the precision asked for, without what is left out; Qwen2.5's sound is always made in
    fp32."""
    with safe_open(tiny_omni / "model.safetensors", framework="np") as file:
        sizes = {key: file.get_tensor(key).size for key in file.keys()}
    thinker = sum(size for key, size in sizes.items() if key.startswith("thinker."))
    decoder = sum(size for key, size in sizes.items() if key.startswith("token2wav."))
    rest = sum(sizes.values()) - thinker - decoder
    assert thinker and rest

    def enough(free: int, **changes: Any) -> str:
        probed = Probed({"memory": {"free": free}, "torch": {"gpus": []}})
        return checked(tiny_omni, probed, **changes)["weights"].status

    for precision, each in (("auto", 4), ("fp32", 4), ("bf16", 2), ("fp16", 2)):
        silent = each * thinker
        spoken = each * (thinker + rest) + 4 * decoder
        for needed, speech in ((silent, False), (spoken, True)):
            options = {"precision": precision, "speech": speech}
            assert enough(needed, **options) == "ok"
            assert enough(needed - 1, **options) == "warning"
    assert "GiB in bf16" in checked(tiny_omni, precision="bf16")["weights"].found


def test_no_model_is_named(tmp_path: Path) -> None:
    (check,) = omni.checks(PROBED, OmniServeOptions())
    assert check.status == "failed" and "--model-path" in check.fix
    assert checked(Path("Qwen/Qwen3-Omni-30B-A3B-Instruct"))["model"].status == "ok"
    assert checked(tmp_path / "nothing" / "here")["model"].status == "failed"
