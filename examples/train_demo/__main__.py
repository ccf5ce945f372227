"""Trains the small model that comes inside the package, and its two adapters, from nothing.

    python -m examples.train_demo [--out FOLDER] [--minutes 45] [--device cpu]

Everything is drawn by chance from one seed; nothing is downloaded. The time is shared between the
VAE, the transformer with its text encoder, and the adapters.
"""

from __future__ import annotations

import argparse
import random
import shutil
from pathlib import Path

import torch

from examples.train_demo.models import Parts
from examples.train_demo.pool import KINDS, Pool
from examples.train_demo.scenes import draw_scene
from examples.train_demo.schedule import Clock
from examples.train_demo.train_adapters import STYLES, save_adapter, train_adapter
from examples.train_demo.train_dit import train_dit
from examples.train_demo.train_vae import train_vae

_VAE, _DIT, _ADAPTER = 0.25, 0.62, 0.04  # of the time; the rest makes latents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/demo"))
    parser.add_argument("--minutes", type=float, default=45.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="of the scenes of a full training")
    options = parser.parse_args()
    train(options.out, options.minutes, torch.device(options.device), options.seed, options.share)


def train(out: Path, minutes: float, device: torch.device, seed: int, share: float) -> None:
    def note(line: str) -> None:
        print(line, flush=True)

    parts = Parts.fresh(seed)
    for module in (parts.vae, parts.transformer, parts.text_encoder):
        module.to(device)
    train_vae(parts.vae, Clock(_VAE * minutes, device), seed, note)
    chance = random.Random(seed)
    pool = Pool(
        parts.vae, KINDS, lambda c, moving: draw_scene(c, moving=moving), chance, device, share
    )
    note("latents are made")
    train_dit(parts, pool, Clock(_DIT * minutes, device), seed, note)
    shutil.rmtree(out, ignore_errors=True)
    adapters = {
        style: train_adapter(
            parts, style, Clock(_ADAPTER * minutes, device), seed, 0.1 * share, note
        )
        for style in STYLES
    }
    parts.save(out)
    for style, weights in adapters.items():
        save_adapter(weights, out / "adapters", style)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    note(f"{out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
