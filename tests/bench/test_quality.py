"""PSNR and SSIM of known cases, the comparison of real pictures, and its gate."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sgl_diffusion.bench.quality import EQUAL_PSNR, below, psnr, ssim
from sgl_diffusion.cli import bench
from sgl_diffusion.cli.args import UsageError


def frames(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(40, 200, (2, 24, 32, 3), dtype=np.uint8)


def test_known_distances() -> None:
    one = frames()
    assert psnr(one, one) == EQUAL_PSNR and ssim(one, one) == pytest.approx(1.0)
    # Ten more everywhere: a mean squared error of 100.
    assert psnr(one + 10, one) == pytest.approx(10 * np.log10(255**2 / 100))
    # Of flat pictures SSIM is the term of the means alone.
    flat, other = np.full_like(one, 100), np.full_like(one, 150)
    few = (0.01 * 255) ** 2
    assert ssim(flat, other) == pytest.approx((2 * 100 * 150 + few) / (100**2 + 150**2 + few))
    # Windows, counted by hand in another way.
    two = frames(1)
    assert ssim(one, two) == pytest.approx(_by_windows(one, two), rel=1e-9)
    assert ssim(one, 255 - one) < 0 < ssim(one, two) < 0.5


def _by_windows(one: np.ndarray, two: np.ndarray) -> float:
    few, more = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    found = []
    for a, b in zip(one.astype(float), two.astype(float), strict=True):
        for channel in range(3):
            for y in range(a.shape[0] - 6):
                for x in range(a.shape[1] - 6):
                    p, q = a[y : y + 7, x : x + 7, channel], b[y : y + 7, x : x + 7, channel]
                    both = ((p - p.mean()) * (q - q.mean())).mean()
                    top = (2 * p.mean() * q.mean() + few) * (2 * both + more)
                    low = (p.mean() ** 2 + q.mean() ** 2 + few) * (p.var() + q.var() + more)
                    found.append(top / low)
    return float(np.mean(found))


def test_the_gate_is_for_the_worst() -> None:
    record = {"worst": {"psnr": 30.0, "ssim": 0.9}}
    assert below(record, [("psnr", 30.0), ("ssim", 0.9)]) == []
    assert below(record, [("psnr", 30.1)]) == ["PSNR 30 is below 30.1"]


def test_nothing_to_compare() -> None:
    with pytest.raises(UsageError, match="nothing to compare"):
        bench.main(["quality", "--min-psnr", "30"])


def test_int8_beside_the_whole(
    tiny_flux_a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["quality", "--model-path", str(tiny_flux_a), "--quantization", "int8"]
    words += ["--size", "32x32", "--num-inference-steps", "2", "--prompt", "a cat", "--seeds", "1"]
    words += ["--data-dir", str(tmp_path), "--device", "cpu"]
    assert bench.main([*words, "--json", "--min-psnr", "20"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["changed"] == {"quantization": "int8"} and len(record["rows"]) == 1
    assert 20 < record["worst"]["psnr"] < EQUAL_PSNR and record["missed"] == []


@pytest.mark.slow
def test_a_missed_bar_is_status_1(
    tiny_flux_a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["quality", "--model-path", str(tiny_flux_a), "--enable-teacache"]
    words += ["--teacache-threshold", "1.0", "--size", "32x32", "--num-inference-steps", "4"]
    words += ["--prompt", "a cat", "--seeds", "2", "--data-dir", str(tmp_path), "--device", "cpu"]
    assert bench.main([*words, "--min-psnr", "98.9"]) == 1
    out = capsys.readouterr().out
    assert "is below 98.9" in out and "teacache_threshold 1.0" in out and "worst" in out
