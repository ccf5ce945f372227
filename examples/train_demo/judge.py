"""Judges the model by what it draws: unseen sentences, fixed seeds, the automatic eye.

    python -m examples.train_demo.judge [--model FOLDER] [--prompts 200] [--save]

The engine serves the model as `sglang serve` does. --save keeps the numbers, a contact sheet and
some clips in docs/.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from examples.train_demo import eye
from examples.train_demo.scenes import PLACES, REACH, Scene, draw_scene, sentence
from sgl_diffusion import DiffGenerator

ROOT = Path(__file__).parents[2]
_TRAINED = str(ROOT / "sgl_diffusion" / "demo")
BARS = {"colour": 0.95, "background": 0.95, "shape": 0.90, "motion": 0.85}
_SEED = 20261121


def judge(generator: DiffGenerator, count: int, clips: int) -> dict[str, Any]:
    """Shares of what the eye finds right, and what was drawn."""
    chance = random.Random(_SEED)
    right, asked, drawn = Counter[str](), Counter[str](), []
    for at in range(count):
        moving = at < clips
        scene = draw_scene(chance, moving=moving, kept=True)
        frames = 17 if scene.motion else 1
        made = generator.generate(sentence(scene), seed=1000 + at, num_frames=frames).frames
        pictures = torch.from_numpy(np.array(made)).permute(0, 3, 1, 2) / 255
        seen = eye.look(pictures[len(pictures) // 2])
        found = {
            "colour": seen.colour == scene.colour,
            "background": seen.background == scene.background,
            "shape": seen.shape == scene.shape,
        }
        if scene.motion is None:
            found["place"] = _place(seen.middle) == scene.place
        else:
            found["motion"] = eye.way(pictures) == scene.motion
        for name, is_right in found.items():
            asked[name] += 1
            right[name] += is_right
        drawn.append((scene, made, found))
    shares = {name: right[name] / asked[name] for name in asked}
    return {"shares": shares, "asked": dict(asked), "drawn": drawn}


def _place(middle: tuple[float, float]) -> str:
    across, along = (min(1, max(-1, round(at / REACH))) for at in middle)
    return next(name for name, where in PLACES.items() if where == (across, along))


def contact_sheet(drawn: list[tuple[Scene, Any, dict[str, bool]]], across: int = 12) -> Image.Image:
    stills = [made[0] for scene, made, _ in drawn if scene.motion is None][: across * 5]
    side = 96
    sheet = Image.new("RGB", (across * side, -(-len(stills) // across) * side))
    for at, still in enumerate(stills):
        small = Image.fromarray(still).resize((side, side), Image.Resampling.LANCZOS)
        sheet.paste(small, (at % across * side, at // across * side))
    return sheet


def save_clip(made: Any, path: Path) -> None:
    frames = [Image.fromarray(frame) for frame in made]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=62, loop=0, quality=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=_TRAINED, help="a folder; default: %(default)s")
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--clips", type=int, default=100)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    with DiffGenerator.from_pretrained(options.model) as generator:
        found = judge(generator, options.prompts, options.clips)
    for name, share in found["shares"].items():
        verdict = ""
        if name in BARS:
            verdict = f", bar {BARS[name]:.0%}: {'met' if share >= BARS[name] else 'MISSED'}"
        print(f"{name:12} {share:.1%} of {found['asked'][name]}{verdict}")
    if options.save:
        folder = ROOT / "docs" / "demo"
        folder.mkdir(exist_ok=True)
        contact_sheet(found["drawn"]).save(folder / "sheet.png", optimize=True)
        moving = [made for scene, made, _ in found["drawn"] if scene.motion][:4]
        for at, made in enumerate(moving):
            save_clip(made, folder / f"clip-{at}.webp")
    print(json.dumps({"benchmark": "demo", "shares": found["shares"], "asked": found["asked"]}))


if __name__ == "__main__":
    main()
