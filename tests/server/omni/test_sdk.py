"""The official OpenAI SDK, unchanged, against a real socket."""

from __future__ import annotations

import asyncio
import base64
import io
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from tests.server.omni.conftest import OmniApi, data_url

pytestmark = pytest.mark.timeout(400)

FOX: Any = [{"role": "user", "content": "a red fox"}]
SPEECH: Any = {"talker_max_new_tokens": 12}


@pytest.fixture
def sdk(omni: OmniApi) -> Iterator[openai.OpenAI]:
    """The strict client refuses answers that do not have the documented types."""
    with openai.OpenAI(
        base_url=f"{omni.url}/v1", api_key="none", max_retries=0, _strict_response_validation=True
    ) as client:
        yield client


def test_models(sdk: openai.OpenAI) -> None:
    assert [model.id for model in sdk.models.list()] == ["qwen3-omni"]
    assert sdk.models.retrieve("qwen3-omni").object == "model"
    with pytest.raises(openai.NotFoundError) as told:
        sdk.models.retrieve("gpt")
    assert told.value.code == "model_not_found" and told.value.param == "model"


def test_chat_and_stream(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.create(
        model="qwen3-omni", messages=FOX, max_completion_tokens=9, temperature=0
    )
    assert answer.usage is not None and answer.usage.completion_tokens == 9
    stream = sdk.chat.completions.create(
        model="qwen3-omni",
        messages=FOX,
        max_tokens=9,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == answer.choices[0].message.content
    assert chunks[-1].usage == answer.usage and not chunks[-1].choices


def test_media_and_extensions(sdk: openai.OpenAI, clips: dict[str, Path]) -> None:
    sound = base64.b64encode(clips["audio"].read_bytes()).decode()
    parts: Any = [
        {"type": "text", "text": "what is it"},
        {"type": "image_url", "image_url": {"url": data_url(clips["image"], "image/png")}},
        {"type": "input_audio", "input_audio": {"data": sound, "format": "wav"}},
    ]
    one = sdk.chat.completions.create(
        model="qwen3-omni", messages=[{"role": "user", "content": parts}], max_tokens=5, seed=1
    )
    other = sdk.chat.completions.create(
        model="qwen3-omni",
        messages=[{"role": "user", "content": "what is it"}],
        max_tokens=5,
        seed=1,
        extra_body={"images": [str(clips["image"])], "audios": [str(clips["audio"])]},
    )
    assert one.choices[0].message.content == other.choices[0].message.content


def test_spoken_answers(sdk: openai.OpenAI) -> None:
    asked: Any = {
        "model": "qwen3-omni",
        "messages": FOX,
        "max_tokens": 9,
        "seed": 4,
        "modalities": ["text", "audio"],
        "extra_body": SPEECH,
    }
    answer = sdk.chat.completions.create(**asked, audio={"voice": "ethan", "format": "wav"})
    audio = answer.choices[0].message.audio
    assert audio is not None and audio.transcript == answer.choices[0].message.content
    with wave.open(io.BytesIO(base64.b64decode(audio.data))) as file:
        frames = file.readframes(file.getnframes())
    stream = sdk.chat.completions.create(
        **asked, audio={"voice": "ethan", "format": "pcm16"}, stream=True
    )
    pieces = [getattr(chunk.choices[0].delta, "audio", None) for chunk in stream]
    data = [getattr(piece, "data", None) for piece in pieces]
    streamed = b"".join(base64.b64decode(piece) for piece in data if piece)
    difference = np.frombuffer(streamed, "<i2").astype(int) - np.frombuffer(frames, "<i2")
    assert np.abs(difference).max() <= 4


def test_speech(sdk: openai.OpenAI, tmp_path: Path) -> None:
    said: Any = {"model": "qwen3-omni", "voice": "chelsie", "input": "a cat"}
    more = {"seed": 1, "max_new_tokens": 16}
    whole = sdk.audio.speech.create(**said, response_format="pcm", extra_body=more)
    assert whole.response.headers["content-type"] == "audio/pcm"
    with sdk.audio.speech.with_streaming_response.create(
        **said, response_format="pcm", stream_format="audio", extra_body=more
    ) as answer:
        pieces = list(answer.iter_bytes())
    assert b"".join(pieces) == whole.content and len(whole.content) > 30_000
    with sdk.audio.speech.with_streaming_response.create(
        **said, response_format="mp3", extra_body=more
    ) as answer:
        answer.stream_to_file(tmp_path / "cat.mp3")
    assert (tmp_path / "cat.mp3").stat().st_size > 1000
    with pytest.raises(openai.BadRequestError) as told:
        sdk.audio.speech.create(**{**said, "voice": "nobody"})
    assert told.value.code == "voice_not_found" and told.value.request_id


def test_transcriptions(sdk: openai.OpenAI, clips: dict[str, Path]) -> None:
    with clips["audio"].open("rb") as file:
        told = sdk.audio.transcriptions.create(
            model="qwen3-omni", file=file, extra_body={"max_new_tokens": 6}
        )
        file.seek(0)
        verbose = sdk.audio.transcriptions.create(
            model="qwen3-omni",
            file=file,
            response_format="verbose_json",
            language="en",
            extra_body={"max_new_tokens": 6},
        )
        file.seek(0)
        events = list(
            sdk.audio.transcriptions.create(
                model="qwen3-omni", file=file, stream=True, extra_body={"max_new_tokens": 6}
            )
        )
    assert events[-1].type == "transcript.text.done" and events[-1].text == told.text
    assert verbose.language == "en" and verbose.duration == 2.0
    assert verbose.usage is not None and verbose.usage.seconds == 2.0


def test_an_error_within_a_stream_is_raised(
    omni: OmniApi, sdk: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sgl_diffusion.base.errors import EngineError
    from sgl_diffusion.server.omni import chat

    async def events(*_: Any) -> Any:
        yield b'data: {"id": "x", "choices": [], "created": 1, "model": "m", "object": "c"}\n\n'
        raise EngineError("The worker met an internal error.")

    monkeypatch.setattr(chat, "events", events)
    loose = openai.OpenAI(base_url=f"{omni.url}/v1", api_key="none", max_retries=0)
    with loose, pytest.raises(openai.APIError) as told:
        list(loose.chat.completions.create(model="qwen3-omni", messages=FOX, stream=True))
    assert told.value.code == "engine_error"


def test_the_asynchronous_client(omni: OmniApi) -> None:
    async def story() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{omni.url}/v1", api_key="none") as client:

            async def ask(text: str) -> str:
                answer = await client.chat.completions.create(
                    model="qwen3-omni",
                    messages=[{"role": "user", "content": text}],
                    max_tokens=6,
                    temperature=0,
                )
                return answer.choices[0].message.content or ""

            return list(await asyncio.gather(*(ask(t) for t in ("a cat", "a dog", "a cat"))))

    one, other, again = asyncio.run(story())
    assert one == again != other
