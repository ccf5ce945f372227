"""The OpenAI SDK at the sizes of large models, on the small one: minutes on a small CPU."""

from __future__ import annotations

import base64
import io

import av
import openai
import pytest
from PIL import Image

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning"),
]


def test_pictures_and_clips_of_full_size(server, tmp_path):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="not-needed") as client:
        image = client.images.generate(prompt="a red fox", size="1024x1024", extra_body={"seed": 7})
        with Image.open(io.BytesIO(base64.b64decode(image.data[0].b64_json))) as picture:
            assert picture.format == "PNG" and picture.size == (1024, 1024)
        video = client.videos.create_and_poll(
            prompt="waves", size="1280x720", extra_body={"num_frames": 9, "num_inference_steps": 2}
        )
        assert video.status == "completed", video.error
        client.videos.download_content(video.id).write_to_file(tmp_path / "waves.mp4")
    with av.open(str(tmp_path / "waves.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.average_rate) == (1280, 720, 16)
        assert sum(1 for _ in container.decode(stream)) == 9
