"""Trains the small model that comes inside the package, and its two adapters, from nothing.

    python -m examples.train_demo [--out FOLDER] [--device cpu]

Everything is drawn by chance from one seed; nothing is downloaded. First the VAE, then
the text encoder, then the transformer, then the adapters.
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
from examples.train_demo.schedule import Steps
from examples.train_demo.train_adapters import STYLES, save_adapter, train_adapter
from examples.train_demo.train_dit import train_dit
from examples.train_demo.train_text import train_text
from examples.train_demo.train_vae import train_vae, trained_vae

_BESIDE = Path(__file__).with_name("beside")  # its card and its defaults
# Steps of each part: less than 45 minutes on two cores that have nothing else to do.
_VAE, _TEXT, _DIT, _CLIPS, _ADAPTER = 1700, 600, 3100, 600, 150


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/demo"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="of the steps and scenes")
    parser.add_argument("--vae", type=Path, help="a VAE trained before, a folder")
    options = parser.parse_args()
    train(options.out, torch.device(options.device), options.seed, options.share, options.vae)


def train(out: Path, device: torch.device, seed: int, share: float, vae: Path | None) -> None:
    def note(line: str) -> None:
        print(line, flush=True)

    def steps(name: str, count: int) -> Steps:
        return Steps(name, max(1, int(count * share)), note)

    parts = Parts.fresh(seed)
    if vae is not None:
        parts.vae = trained_vae(vae)
    shutil.rmtree(out, ignore_errors=True)
    for module in (parts.vae, parts.transformer, parts.text_encoder):
        module.to(device)
    if vae is None:
        train_vae(parts.vae, steps("VAE", _VAE), seed, device)
        parts.vae.save_pretrained(out / "vae")
    train_text(parts.tokenizer, parts.text_encoder, steps("text encoder", _TEXT), seed, device)
    chance = random.Random(seed)
    pool = Pool(
        parts.vae, KINDS, lambda c, moving: draw_scene(c, moving=moving), chance, device, share
    )
    note("latents are made")
    train_dit(parts, pool, steps("transformer", _DIT), seed)
    train_dit(parts, pool, steps("transformer, clips", _CLIPS), seed + 1, late=True)
    parts.save(out)
    shutil.copytree(_BESIDE, out, dirs_exist_ok=True)
    for style in STYLES:
        count = steps(f"adapter {style}", _ADAPTER)
        weights = train_adapter(parts, style, count, seed, device, 0.1 * share)
        save_adapter(weights, out / "adapters", style)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    note(f"{out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
