"""Generate from Python, without a server: two images and a short clip.

python examples/generate.py [--model-path M] [--output-path outputs]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sgl_diffusion import DiffGenerator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-path", help="default: the small model inside the package")
    parser.add_argument("--output-path", type=Path, default=Path("outputs"))
    options = parser.parse_args()
    options.output_path.mkdir(parents=True, exist_ok=True)

    with DiffGenerator.from_pretrained(options.model_path) as generator:
        images = generator.generate(
            "a red star on a white background",
            num_frames=1,
            num_outputs=2,
            seed=7,
            width=128,
            height=128,
            on_progress=lambda job: print(f"{job.progress:3} %  {job.phase}"),
        )
        for seed, image in zip(images.params.seeds, images.images(), strict=True):
            path = options.output_path / f"star-{seed}.png"
            image.save(path)
            print(path)

        prompt = "a blue ring moving right on a yellow background"
        clip = generator.generate(prompt, num_frames=17, width=96, height=96)
        print(clip.frames.shape, clip.frames.dtype, clip.seconds)  # frames, height, width, RGB


if __name__ == "__main__":
    main()
