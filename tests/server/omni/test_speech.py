"""POST /v1/audio/speech, GET /v1/audio/voices, POST /v1/audio/transcriptions."""

from __future__ import annotations

import base64
import io
import wave
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sgl_diffusion.server.omni import sound
from tests.ar.chats import ask, oracle
from tests.server.omni.conftest import OmniApi, events_of

pytestmark = pytest.mark.timeout(400)

SHORT = {"seed": 2, "max_new_tokens": 20, "temperature": 0}


def speak(omni: OmniApi, text: str = "a cat on the river", **fields: Any) -> Any:
    return omni.http.post("/v1/audio/speech", json={"input": text, **SHORT, **fields})


def samples(data: bytes) -> np.ndarray:
    return np.frombuffer(data, "<i2").astype(int)


def test_a_whole_file(omni: OmniApi) -> None:
    answer = speak(omni, model="qwen3-omni", voice="default", instructions="slowly")
    assert answer.headers["content-type"] == "audio/wav"
    assert answer.headers["content-disposition"] == 'attachment; filename="speech.wav"'
    with wave.open(io.BytesIO(answer.content)) as file:
        assert file.getframerate() == 24_000 and file.getnframes() == len(answer.content[44:]) // 2
        assert 19 * 1920 < file.getnframes() < 20 * 1920
    assert answer.headers["x-completion-tokens"] == "20"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("mp3", "audio/mpeg"),
        ("flac", "audio/flac"),
        ("opus", "audio/ogg"),
        ("aac", "audio/aac"),
        ("pcm", "audio/pcm"),
    ],
)
def test_formats_have_their_types(omni: OmniApi, name: str, kind: str) -> None:
    answer = speak(omni, response_format=name)
    assert answer.headers["content-type"] == kind and answer.headers["x-audio-format"] == name
    assert len(answer.content) > 1000


def test_a_format_that_cannot_be_made_is_wav_where_that_is_allowed(
    omni: OmniApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sound, "can_make", lambda name: name != "mp3")
    refused = speak(omni, response_format="mp3")
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "unsupported_format"
    options = replace(omni.context.options, allow_codec_fallback=True)
    monkeypatch.setattr(omni.context, "options", options)
    for stream in (False, True):
        answer = speak(omni, response_format="mp3", stream=stream)
        assert answer.headers["content-type"] == "audio/wav"
        assert answer.headers["x-audio-format"] == "wav" and answer.content[:4] == b"RIFF"


def test_streamed_samples_are_those_of_the_file(omni: OmniApi) -> None:
    whole = samples(speak(omni, response_format="pcm").content)
    with omni.http.stream(
        "POST",
        "/v1/audio/speech",
        json={"input": "a cat on the river", **SHORT, "stream": True, "response_format": "pcm"},
    ) as answer:
        assert answer.headers["content-type"] == "audio/pcm" and "content-length" not in (
            answer.headers
        )
        pieces = list(answer.iter_raw())
    streamed = samples(b"".join(pieces))
    assert len(pieces) > 1 and np.array_equal(streamed, whole)
    events = events_of(speak(omni, response_format="pcm", stream_format="sse"))
    deltas, done = events[:-1], events[-1]
    assert {event["type"] for event in deltas} == {"speech.audio.delta"}
    told = b"".join(base64.b64decode(event["audio"]) for event in deltas)
    assert np.array_equal(samples(told), whole)
    assert done["type"] == "speech.audio.done" and done["usage"]["output_tokens"] == 20


def test_speed_and_voice_change_the_sound(omni: OmniApi) -> None:
    plain = speak(omni, response_format="pcm").content
    fast = speak(omni, response_format="pcm", speed=2).content
    assert len(fast) == pytest.approx(len(plain) / 2, rel=0.1)
    assert speak(omni, response_format="pcm", voice={"id": "Chelsie"}).content != plain
    assert speak(omni, response_format="pcm", voice="ETHAN").content == plain


def test_voices(omni: OmniApi) -> None:
    assert omni.http.get("/v1/audio/voices").json()["voices"] == ["default", "ethan", "chelsie"]


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"input": "  "}, "input_empty", "input"),
        ({"input": "x" * 4097}, "out_of_range", "input"),
        ({"input": "<|im_end|>"}, "control_token", "input"),
        ({"input": 4}, "invalid_type", "input"),
        ({"speed": 0}, "out_of_range", "speed"),
        ({"speed": 4.1}, "out_of_range", "speed"),
        ({"voice": "nobody"}, "voice_not_found", "voice"),
        ({"voice": {"id": 4}}, "invalid_type", "voice"),
        ({"response_format": "exe"}, "unsupported_format", "response_format"),
        ({"stream_format": "ws"}, "invalid_value", "stream_format"),
        ({"ref_audio": "x"}, "unsupported_parameter", "ref_audio"),
        ({"temperature": 9}, "invalid_value", ""),
        ({"txet": "a"}, "unknown_parameter", "txet"),
        ({"model": "tts-1"}, "model_not_found", "model"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_refusals(
    omni: OmniApi, fields: dict[str, Any], code: str, param: str, stream: bool
) -> None:
    answer = speak(omni, **{"stream": stream, **fields})
    assert answer.status_code == (404 if code == "model_not_found" else 400)
    error = answer.json()["error"]
    assert error["code"] == code and (error["param"] or "").startswith(param)
    assert omni.unfinished() == 0


@pytest.fixture
def upload(clips: dict[str, Path]) -> Iterator[Any]:
    with clips["audio"].open("rb") as file:
        yield {"file": ("a.wav", file, "audio/wav")}


def transcribe(omni: OmniApi, files: Any, **fields: str) -> Any:
    data = {"model": "qwen3-omni", "max_new_tokens": "12", **fields}
    return omni.http.post("/v1/audio/transcriptions", files=files, data=data)


def test_a_transcription_is_what_the_model_hears(
    omni: OmniApi, tiny_qwen3_omni: Path, clips: dict[str, Path], upload: Any
) -> None:
    from transformers import AutoTokenizer

    asked = "Write down what is said, word for word, and nothing else. The language is en."
    tokens = oracle(tiny_qwen3_omni).answer(ask(clips["audio"], asked))
    expected = AutoTokenizer.from_pretrained(tiny_qwen3_omni).decode(
        tokens, skip_special_tokens=True
    )
    answer = transcribe(omni, upload, language="en")
    assert answer.json()["text"] == expected
    assert answer.json()["usage"]["output_tokens"] == 12


def test_transcriptions_come_as_text_and_as_events(omni: OmniApi, upload: Any) -> None:
    plain = transcribe(omni, upload, response_format="text")
    assert plain.headers["content-type"].startswith("text/plain")
    upload["file"][1].seek(0)
    events = events_of(transcribe(omni, upload, stream="true"))
    assert events[-1]["type"] == "transcript.text.done"
    assert f"{events[-1]['text']}\n" == plain.text
    assert "".join(event["delta"] for event in events[:-1]) == events[-1]["text"]


def test_transcriptions_refuse(omni: OmniApi, upload: Any) -> None:
    cases = [
        (upload, {"response_format": "srt"}, "invalid_value"),
        (upload, {"temperature": "3"}, "invalid_value"),
        (upload, {"langage": "en"}, "unknown_parameter"),
        ({"file": ("a.wav", b"RIFF nothing", "audio/wav")}, {}, "invalid_audio"),
        ({"file": ("a.wav", b"", "audio/wav")}, {}, "file_expected"),
    ]
    for files, fields, code in cases:
        upload["file"][1].seek(0)
        answer = transcribe(omni, files, **fields)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)
    missing = omni.http.post("/v1/audio/transcriptions", files={"model": (None, "qwen3-omni")})
    error = missing.json()["error"]
    assert (error["code"], error["param"]) == ("missing_parameter", "file")
    for other in ({"data": {"model": "qwen3-omni"}}, {"json": {"file": "x"}}):
        answer = omni.http.post("/v1/audio/transcriptions", **other)
        assert answer.status_code == 415
        assert "Send multipart/form-data and" in answer.json()["error"]["message"]
