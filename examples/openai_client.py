"""The official OpenAI SDK, unchanged, against a running `make serve`: an image and a video on disk.

python examples/openai_client.py --base-url http://127.0.0.1:30000/v1 --output-path outputs
"""

from __future__ import annotations

import argparse
import base64
import warnings
from pathlib import Path

import openai

# OpenAI retires its own video service; these calls stay the way to talk to this server.
warnings.filterwarnings("ignore", message="The Sora API", category=DeprecationWarning)


def make_image(client: openai.OpenAI, folder: Path, size: str, extra: dict[str, object]) -> Path:
    answer = client.images.generate(
        prompt="a red star on a white background",
        size=size,
        response_format="b64_json",
        extra_body={"seed": 7, **extra},
    )
    assert answer.data and answer.data[0].b64_json
    path = folder / "star.png"
    path.write_bytes(base64.b64decode(answer.data[0].b64_json))
    return path


def make_video(client: openai.OpenAI, folder: Path, size: str, extra: dict[str, object]) -> Path:
    """create, list and poll, download: `create_and_poll` does the first steps in one call."""
    video = client.videos.create(
        prompt="a blue ring moving right on a yellow background",
        size=size,
        extra_body={"seed": 7, **extra},
    )
    print(f"{video.id}  {video.status}")
    assert video.id in [entry.id for entry in client.videos.list(limit=10).data]
    video = client.videos.poll(video.id)
    if video.status != "completed":
        raise SystemExit(f"the video failed: {video.error}")
    path = folder / "ring.mp4"
    client.videos.download_content(video.id).write_to_file(path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-url", default="http://127.0.0.1:30000/v1")
    parser.add_argument("--output-path", type=Path, default=Path("outputs"))
    parser.add_argument("--size", default="256x256")
    parser.add_argument("--num-inference-steps", type=int, help="default: the model's")
    parser.add_argument("--num-frames", type=int, default=17)
    options = parser.parse_args()
    options.output_path.mkdir(parents=True, exist_ok=True)
    steps = options.num_inference_steps
    extra: dict[str, object] = {} if steps is None else {"num_inference_steps": steps}
    with openai.OpenAI(base_url=options.base_url, api_key="not-needed") as client:
        print("model", ", ".join(model.id for model in client.models.list()))
        print(make_image(client, options.output_path, options.size, extra))
        extra["num_frames"] = options.num_frames
        print(make_video(client, options.output_path, options.size, extra))


if __name__ == "__main__":
    main()
