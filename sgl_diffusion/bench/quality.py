"""What a way to be faster or smaller costs in quality: the same prompts and seeds with and without.

PSNR and SSIM compare the finished frames.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import avg_pool2d

from sgl_diffusion.bench import machine
from sgl_diffusion.client.generator import DiffGenerator

PROMPTS = (
    "a red circle on a blue background",
    "a small green square moving to the right on a white background",
    "a red fox in the snow, early morning",
    "a city street at night, neon signs in the rain",
)
EQUAL_PSNR = 99.0  # dB, where nothing differs
_WINDOW = 7

Frames = NDArray[Any]  # uint8 [F, H, W, 3]
Say = Callable[[str], None]


def psnr(ours: Frames, theirs: Frames) -> float:
    """In dB, of values up to 255."""
    error = float(((ours.astype(np.float64) - theirs) ** 2).mean())
    return EQUAL_PSNR if error == 0 else min(EQUAL_PSNR, 10 * float(np.log10(255**2 / error)))


def ssim(ours: Frames, theirs: Frames) -> float:
    """Structural similarity, over windows of seven pixels."""
    a, b = (torch.from_numpy(x.astype(np.float64)).permute(0, 3, 1, 2) for x in (ours, theirs))

    def mean(x: torch.Tensor) -> torch.Tensor:
        return avg_pool2d(x, _WINDOW, stride=1)

    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2
    both = mean(a * b) - mean_a * mean_b
    one, two = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    index = (2 * mean_a * mean_b + one) * (2 * both + two)
    index /= (mean_a**2 + mean_b**2 + one) * (var_a + var_b + two)
    return float(index.mean())


@dataclass(frozen=True)
class Arm:
    """One of the two ways: options of the engine, and what is wished of every picture."""

    engine: dict[str, Any]
    wishes: dict[str, Any]


@dataclass(frozen=True)
class Drawn:
    frames: Frames
    denoise_seconds: float
    reused: int


def compare(
    plain: Arm, changed: Arm, prompts: Sequence[str], seeds: int, say: Say
) -> dict[str, Any]:
    """A row for each prompt and seed; the models are loaded one after the other."""
    tasks = [(prompt, seed) for prompt in prompts for seed in range(seeds)]
    arms = {"plain": plain, "changed": changed}
    drawn: dict[str, list[Drawn]] = {}
    facts: dict[str, Any] = {}
    name = ""
    for title, arm in arms.items():
        say(f"loading the model: {title}")
        with DiffGenerator.from_pretrained(**arm.engine) as generator:
            facts, name = machine.facts(generator.card.device), generator.card.name
            drawn[title] = [_draw(generator, *task, arm, say) for task in tasks]
    rows: list[dict[str, Any]] = [
        {
            "prompt": prompt,
            "seed": seed,
            "psnr": psnr(ours.frames, theirs.frames),
            "ssim": ssim(ours.frames, theirs.frames),
            "speedup": theirs.denoise_seconds / ours.denoise_seconds,
            "reused_steps": ours.reused,
        }
        for (prompt, seed), theirs, ours in zip(
            tasks, drawn["plain"], drawn["changed"], strict=True
        )
    ]
    return {
        "benchmark": "quality",
        "machine": facts,
        "model": name,
        "changed": _differences(plain, changed),
        "rows": rows,
        "median": {key: statistics.median(row[key] for row in rows) for key in ("psnr", "ssim")},
        "worst": {key: min(row[key] for row in rows) for key in ("psnr", "ssim")},
    }


def lines(record: dict[str, Any]) -> list[str]:
    """A table for a terminal."""
    facts = ", ".join(f"{key} {value}" for key, value in record["machine"].items())
    changed = ", ".join(f"{key} {value}" for key, value in record["changed"].items())
    out = [facts, f"{record['model']}: {changed}", ""]
    out.append(f"{'prompt':<40}{'seed':>5}{'PSNR dB':>9}{'SSIM':>8}{'steps x':>9}{'reused':>8}")
    for row in record["rows"]:
        out.append(
            f"{_short(row['prompt']):<40}{row['seed']:>5}{row['psnr']:>9.2f}{row['ssim']:>8.4f}"
            f"{row['speedup']:>9.2f}{row['reused_steps']:>8}"
        )
    for word in ("median", "worst"):
        found = record[word]
        out.append(f"{word:<45}{found['psnr']:>9.2f}{found['ssim']:>8.4f}")
    return out


def _draw(generator: DiffGenerator, prompt: str, seed: int, arm: Arm, say: Say) -> Drawn:
    made = generator.generate(prompt, seed=seed, **arm.wishes)
    say(f"{prompt} ({seed}): {made.seconds['denoise']:.1f} s")
    return Drawn(np.array(made.frames), made.seconds["denoise"], made.reused_steps)


def _differences(plain: Arm, changed: Arm) -> dict[str, Any]:
    before = {**plain.engine, **plain.wishes}
    after = {**changed.engine, **changed.wishes}
    return {key: value for key, value in after.items() if value != before.get(key)}


def _short(text: str, most: int = 38) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def below(record: dict[str, Any], bars: Iterable[tuple[str, float]]) -> list[str]:
    """Which bars the worst picture misses."""
    return [
        f"{key.upper()} {record['worst'][key]:.4g} is below {least:g}"
        for key, least in bars
        if record["worst"][key] < least
    ]
