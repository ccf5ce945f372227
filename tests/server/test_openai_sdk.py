"""The official OpenAI SDK, unchanged, against a real socket."""

from __future__ import annotations

import base64
import io
import socket
import time

import av
import openai
import pytest
from PIL import Image

from sgl_diffusion.base import errors
from sgl_diffusion.server.keys import Keys
from tests.server.conftest import listening

# OpenAI retires its own video service; the calls stay the way to talk to servers like this one.
pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")


@pytest.fixture
def sdk(base_url):
    # The strict client refuses answers that do not have the documented types.
    with openai.OpenAI(
        base_url=f"{base_url}/v1", api_key="none", max_retries=0, _strict_response_validation=True
    ) as client:
        yield client


@pytest.fixture
def loose(base_url):
    """Sizes of videos outside OpenAI's four cannot pass the strict client."""
    with openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_images_generate(sdk):
    answer = sdk.images.generate(prompt="a cat", model="tiny", n=2, size="64x48", quality="high")
    assert len(answer.data) == 2 and answer.output_format == "png" and answer.quality == "high"
    for entry in answer.data:
        image = Image.open(io.BytesIO(base64.b64decode(entry.b64_json)))
        assert image.size == (64, 48)
        assert entry.url.startswith("/v1/images/")


def test_images_with_extensions(sdk, api):
    sdk.images.generate(
        prompt="x", extra_body={"seed": 5, "num_inference_steps": 2, "guidance_scale": 1.0}
    )
    params = api.client.submitted[-1]
    assert (params.seeds, params.num_inference_steps, params.guidance_scale) == ((5,), 2, 1.0)


def test_a_video_from_create_to_file(loose, tmp_path):
    video = loose.videos.create(
        prompt="a wave", seconds="2", size="64x48", extra_body={"fps": 8, "seed": 3}
    )
    assert video.status in ("queued", "in_progress") and video.seconds == "2"
    done = loose.videos.poll(video.id)
    assert done.status == "completed" and done.progress == 100
    assert [entry.id for entry in loose.videos.list()] == [video.id]
    path = tmp_path / "wave.mp4"
    loose.videos.download_content(video.id).write_to_file(path)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.frames) == (64, 48, 17)
        assert stream.average_rate == 8
    gone = loose.videos.delete(video.id)
    assert gone.deleted is True and gone.object == "video.deleted" and gone.id == video.id
    with pytest.raises(openai.NotFoundError):
        loose.videos.retrieve(video.id)


def test_strict_types_of_a_video(sdk):
    video = sdk.videos.create_and_poll(
        prompt="a wave", size="1280x720", extra_body={"num_frames": 1}
    )
    assert video.status == "completed" and video.object == "video"
    assert sdk.videos.list(limit=1, order="asc").data[0].id == video.id


def test_a_failed_video_does_not_raise(sdk, api):
    api.client.fail_with = errors.WorkerLostError("The worker died twice.")
    video = sdk.videos.create_and_poll(prompt="x", size="1280x720", extra_body={"num_frames": 1})
    assert video.status == "failed"
    assert (video.error.code, video.error.message) == ("worker_lost", "The worker died twice.")
    with pytest.raises(openai.ConflictError) as raised:
        sdk.videos.download_content(video.id)
    assert raised.value.code == "video_failed"


def test_pages_end(loose):
    made = [loose.videos.create(prompt="x", extra_body={"num_frames": 1}).id for _ in range(5)]
    listed = [video.id for video in loose.videos.list(limit=2)]
    assert listed == made[::-1]


def test_models(sdk):
    assert [model.id for model in sdk.models.list()] == ["tiny"]
    assert sdk.models.retrieve("tiny").owned_by == "sgl_diffusion"
    assert sdk.models.retrieve("/models/tiny-wan").id == "tiny"
    with pytest.raises(openai.NotFoundError) as raised:
        sdk.models.retrieve("org/name")
    assert raised.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("failure", "raises"),
    [
        (errors.RequestError("Wrong.", param="prompt"), openai.BadRequestError),
        (errors.BusyError("Full."), openai.RateLimitError),
        (errors.UnavailableError("No."), openai.InternalServerError),
        (errors.EngineError("Broken."), openai.InternalServerError),
    ],
)
def test_errors(sdk, api, failure, raises):
    api.client.fail_with = failure
    with pytest.raises(raises) as raised:
        sdk.images.generate(prompt="x")
    error = raised.value
    assert (error.code, error.param) == (failure.code, failure.param)
    assert error.request_id and failure.message in str(error)


def test_wrong_requests(sdk):
    with pytest.raises(openai.BadRequestError) as raised:
        sdk.images.generate(prompt="x", size="1000x1000")
    assert (raised.value.param, raised.value.code) == ("size", "invalid_size")
    with pytest.raises(openai.BadRequestError) as raised:
        sdk.videos.create(prompt="x", input_reference=b"\x89PNG")
    assert raised.value.param == "input_reference"
    with pytest.raises(openai.NotFoundError):
        sdk.videos.retrieve("../../etc/passwd")


def test_a_conflict_is_not_repeated(base_url, api):
    api.client.gate.clear()
    with openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=2) as client:
        video = client.videos.create(prompt="x")
        with pytest.raises(openai.ConflictError) as raised:
            client.videos.download_content(video.id)
        retries = raised.value.response.request.headers["x-stainless-retry-count"]
    assert raised.value.code == "video_not_ready" and retries == "0"


def test_keys(make_api):
    api = make_api(keys=Keys.of(["the-key"], ["the-admin-key"]))
    with listening(api) as url:
        for key, allowed in (("the-key", True), ("the-admin-key", True), ("another", False)):
            with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=2) as client:
                if allowed:
                    assert [model.id for model in client.models.list()] == ["tiny"]
                    continue
                with pytest.raises(openai.AuthenticationError) as raised:
                    client.models.list()
                assert raised.value.code == "invalid_api_key"
                retries = raised.value.response.request.headers["x-stainless-retry-count"]
                assert retries == "0"


def refused_first(api, times: int, error: Exception) -> list[int]:
    """The engine refuses the first `times` submissions; returns the list of all of them."""
    submit, seen = api.client.submit, []

    async def submit_later(*args, **options):
        seen.append(len(seen))
        if len(seen) <= times:
            raise error
        return await submit(*args, **options)

    api.client.submit = submit_later
    return seen


@pytest.mark.parametrize("kind", [errors.BusyError, errors.UnavailableError])
def test_what_may_be_repeated_is_repeated(base_url, api, kind):
    """After the time that the answer says, not after the SDK's own."""
    error = kind("Not now.")
    error.retry_after = 1
    seen = refused_first(api, 1, error)
    started = time.monotonic()
    with openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=2) as client:
        answer = client.images.generate(prompt="x", size="64x48")
    assert len(answer.data) == 1 and len(seen) == 2
    assert time.monotonic() - started >= 1


@pytest.mark.parametrize(
    "error",
    [errors.RequestError("Wrong."), errors.OutOfMemoryError("9 GB.")],
    ids=["400", "out of memory"],
)
def test_what_cannot_help_is_not_repeated(base_url, api, error):
    seen = refused_first(api, 5, error)
    with openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=2) as client:
        with pytest.raises(openai.APIStatusError) as raised:
            client.images.generate(prompt="x", size="64x48")
    assert raised.value.code == error.code and len(seen) == 1


def test_a_video_that_is_sent_twice_is_made_once(base_url, api):
    """With a key of the caller's, and in the SDK's own second try."""
    with openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0) as client:
        key = {"Idempotency-Key": "one-video"}
        made = {client.videos.create(prompt="x", extra_headers=key).id for _ in range(3)}
        with pytest.raises(openai.ConflictError) as raised:
            client.videos.create(prompt="y", extra_headers=key)
        assert raised.value.code == "idempotency_key_reused"
    assert len(made) == 1 and len(api.get("/v1/videos").json()["data"]) == 1


def test_no_server():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    url = f"http://127.0.0.1:{port}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        with pytest.raises(openai.APIConnectionError):
            client.models.list()
