"""POST /v1/chat/completions on the tiny model: what is answered, streamed and refused."""

from __future__ import annotations

import base64
import io
import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.ar.chats import ask, oracle
from tests.server.omni.conftest import OmniApi, data_url

pytestmark = pytest.mark.timeout(400)

TYPES = {"image": "image/png", "audio": "audio/wav", "video": "video/mp4"}
SPOKEN = {"modalities": ["text", "audio"], "seed": 3, "talker_max_new_tokens": 12}


def text_of(answer: Any) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def words(omni: OmniApi, folder: Path, *pieces: str | Path) -> str:
    """What transformers writes to the same question."""
    from transformers import AutoTokenizer

    tokens = oracle(folder).answer(ask(*pieces))
    return str(AutoTokenizer.from_pretrained(folder).decode(tokens, skip_special_tokens=True))


def test_an_answer_has_the_form_of_openai(omni: OmniApi) -> None:
    body = omni.chat(model="qwen3-omni").json()
    assert body["object"] == "chat.completion" and body["model"] == "qwen3-omni"
    assert body["id"].startswith("chatcmpl_") and isinstance(body["created"], int)
    (choice,) = body["choices"]
    assert choice["message"]["role"] == "assistant" and choice["finish_reason"] == "length"
    usage = body["usage"]
    assert usage["completion_tokens"] == 12
    assert usage["total_tokens"] == usage["prompt_tokens"] + 12


@pytest.mark.parametrize("kinds", [("image",), ("audio",), ("video",), tuple(TYPES)])
def test_media_in_every_form_give_the_words_of_transformers(
    omni: OmniApi, tiny_qwen3_omni: Path, clips: dict[str, Path], kinds: tuple[str, ...]
) -> None:
    expected = words(omni, tiny_qwen3_omni, "a cat", *(clips[kind] for kind in kinds))
    urls = {kind: data_url(clips[kind], TYPES[kind]) for kind in kinds}
    parts = [{"type": f"{kind}_url", f"{kind}_url": {"url": urls[kind]}} for kind in kinds]
    assert text_of(omni.chat([{"type": "text", "text": "a cat"}, *parts])) == expected
    for name in (str, Path.as_uri):
        lists = {f"{kind}s": [name(clips[kind])] for kind in kinds}
        assert text_of(omni.chat("a cat", **lists)) == expected
    if kinds == ("audio",):
        sound = base64.b64encode(clips["audio"].read_bytes()).decode()
        part = {"type": "input_audio", "input_audio": {"data": sound, "format": "wav"}}
        assert text_of(omni.chat([{"type": "text", "text": "a cat"}, part])) == expected


def test_a_conversation_goes_on(omni: OmniApi) -> None:
    first = omni.chat().json()["choices"][0]["message"]
    messages = [
        {"role": "developer", "content": "be short"},
        {"role": "user", "content": "a red fox"},
        first,
        {"role": "user", "content": [{"type": "text", "text": "and"}]},
    ]
    body = {"messages": messages, "max_tokens": 4, "temperature": 0}
    answer = omni.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200 and answer.json()["usage"]["prompt_tokens"] > 30


def test_sampling_stop_seed_and_choices(omni: OmniApi) -> None:
    warm: dict[str, Any] = {"temperature": 1.2, "top_k": 40, "top_p": 0.9, "seed": 5, "n": 3}
    first, second = omni.chat(**warm).json(), omni.chat(**warm).json()
    texts = [choice["message"]["content"] for choice in first["choices"]]
    assert texts == [choice["message"]["content"] for choice in second["choices"]]
    assert len(set(texts)) > 1
    whole = text_of(omni.chat())
    cut = omni.chat(stop=[whole[3:6]]).json()["choices"][0]
    assert cut["message"]["content"] == whole[: whole.index(whole[3:6])]
    assert cut["finish_reason"] == "stop"
    stage = {"stage_sampling": {"thinker": {"max_tokens": 3, "temperature": 0, "top_p": None}}}
    stage["stage_params"] = {"talker": None}
    assert omni.chat(temperature=1.9, **stage).json()["usage"]["completion_tokens"] == 3
    whole = {"max_tokens": 3.0, "top_k": -1.0, "seed": 5.0, "n": 2.0, "top_logprobs": 0.0}
    stage = {"stage_sampling": {"thinker": {"top_k": 40.0}, "talker": {"max_tokens": 9.0}}}
    assert omni.chat(**whole, **stage).json()["usage"]["completion_tokens"] == 6


def test_log_probabilities(omni: OmniApi) -> None:
    (choice,) = omni.chat(logprobs=True, top_logprobs=2, max_tokens=3).json()["choices"]
    content = choice["logprobs"]["content"]
    assert len(content) == 3 and all(len(entry["top_logprobs"]) == 2 for entry in content)
    assert content[0]["top_logprobs"][0]["logprob"] == content[0]["logprob"] < 0
    assert bytes(content[0]["bytes"]).decode() == content[0]["token"]
    (long,) = omni.chat(logprobs=True, max_tokens=24).json()["choices"]
    pieces = [bytes(entry["bytes"]) for entry in long["logprobs"]["content"]]
    # Parts of characters: put together they are the text, one by one they are not.
    assert b"".join(pieces).decode(errors="replace") == long["message"]["content"]
    assert any(not piece.isascii() for piece in pieces)
    chunks = omni.chunks(logprobs=True, top_logprobs=2, max_tokens=3)
    scores = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [entry for each in scores if each for entry in each["content"]] == content


def test_a_stream_is_the_answer_in_pieces(omni: OmniApi) -> None:
    chunks = omni.chunks(stream_options={"include_usage": True})
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    *middle, finish, usage = chunks[1:]
    text = "".join(chunk["choices"][0]["delta"]["content"] for chunk in middle)
    assert len(middle) > 4 and text == text_of(omni.chat())
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in middle)
    assert finish["choices"][0]["delta"] == {}
    assert finish["choices"][0]["finish_reason"] == "length"
    assert usage["choices"] == [] and usage["usage"] == finish["usage"]
    assert omni.chunks()[-1]["choices"], "the extra chunk comes only if it is asked for"


def test_every_choice_of_a_stream_ends(omni: OmniApi) -> None:
    chunks = omni.chunks(n=2, temperature=1.0, seed=1)
    ends = [c for c in chunks if c["choices"][0]["finish_reason"] is not None]
    assert sorted(c["choices"][0]["index"] for c in ends) == [0, 1]
    assert [("usage" in chunk) for chunk in ends] == [False, True]


def test_spoken_answers(omni: OmniApi) -> None:
    answer = omni.chat(**SPOKEN, audio={"voice": "chelsie", "format": "wav"})
    message = answer.json()["choices"][0]["message"]
    audio = message["audio"]
    assert audio["transcript"] == message["content"] and audio["expires_at"] > 0
    with wave.open(io.BytesIO(base64.b64decode(audio["data"]))) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (24_000, 1, 2)
        frames = file.readframes(file.getnframes())
    assert len(frames) > 2 * 10 * 1920
    details = answer.json()["usage"]["completion_tokens_details"]
    assert details["audio_tokens"] == 12 and details["text_tokens"] == 12
    chunks = omni.chunks(**SPOKEN, audio={"voice": "chelsie", "format": "pcm16"})
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
    data = [d["audio"]["data"] for d in deltas if "data" in d.get("audio", {})]
    streamed = np.frombuffer(b"".join(map(base64.b64decode, data)), "<i2").astype(int)
    # In a batch or alone, sums are rounded in another order.
    assert np.abs(streamed - np.frombuffer(frames, "<i2")).max() <= 4
    assert len(data) > 1 and deltas[-2]["audio"].keys() == {"id", "expires_at"}
    only = omni.chat(**{**SPOKEN, "modalities": ["audio"]}).json()["choices"][0]["message"]
    assert only["content"] is None and only["audio"]["transcript"] == message["content"]
    spoken = omni.chunks(**{**SPOKEN, "modalities": ["audio"]})
    told = [c["choices"][0]["delta"].get("audio", {}).get("transcript", "") for c in spoken]
    assert "".join(told) == message["content"]
    follow = [{"role": "user", "content": "a"}, only, {"role": "user", "content": "b"}]
    body = {"messages": follow, "max_tokens": 1}
    assert omni.http.post("/v1/chat/completions", json=body).status_code == 200


def test_one_seed_is_one_text_and_one_sound(omni: OmniApi) -> None:
    """Drawn are the words, the first code of each frame, and the others."""

    def drawn(seed: int) -> tuple[str, str]:
        answer = omni.chat(**{**SPOKEN, "seed": seed, "temperature": 1.2})
        message = answer.json()["choices"][0]["message"]
        return message["content"], message["audio"]["data"]

    assert drawn(5) == drawn(5)
    assert len({drawn(seed) for seed in (5, 6, 7)}) == 3


def test_what_is_wished_for_of_a_stage(omni: OmniApi) -> None:
    def sound(**fields: Any) -> bytes:
        answer = omni.chat(**{**SPOKEN, "talker_temperature": 0, "max_tokens": 4, **fields})
        return base64.b64decode(answer.json()["choices"][0]["message"]["audio"]["data"])

    by_name = sound(audio={"voice": "chelsie"})
    assert sound(stage_params={"talker": {"voice": "chelsie"}}) == by_name
    assert sound(audio={"voice": "default"}) == sound() != by_name
    short = sound(stage_sampling={"talker": {"max_new_tokens": 5}})
    assert len(short) - 44 < 2 * 5 * 1920 < len(by_name) - 44


def test_a_seed_that_is_not_given_is_drawn(omni: OmniApi) -> None:
    texts = {text_of(omni.chat(temperature=1.5)) for _ in range(4)}
    assert len(texts) > 1


def user(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}]}


def part(kind: str, value: Any) -> dict[str, Any]:
    return user([{"type": kind, kind: value}])


BROKEN_SOUND = "data:audio/wav;base64," + base64.b64encode(b"RIFFxxxxWAVE" * 9).decode()
PLAYLIST = (
    "data:audio/mpeg;base64,"
    + base64.b64encode(
        b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"
    ).decode()
)
CALL = {"name": "f", "arguments": "{}"}
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": []}, "invalid_value", "messages"),
    ({}, "missing_parameter", "messages"),
    ({"messages": "hello"}, "invalid_type", "messages"),
    ({"messages": [{"content": "a"}]}, "missing_parameter", "messages.0.role"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "invalid_value", "messages.0.role"),
    ({"messages": [{"role": "assistant", "audio": {"id": "audio_1"}}]}, "missing_parameter",
     "messages.0.audio.transcript"),
    (user(None), "invalid_type", "messages.0.content"),
    (user(["a"]), "invalid_value", "messages.0.content.0.type"),
    (part("image", "x"), "invalid_value", "messages.0.content.0.type"),
    (part("text", 4), "invalid_type", "messages.0.content.0.text"),
    (part("image_url", {}), "missing_parameter", "messages.0.content.0.image_url.url"),
    (part("image_url", {"url": "/etc/passwd"}), "local_path_not_allowed", "messages.0.content.0."),
    (part("image_url", "file:///etc/passwd"), "local_path_not_allowed", "messages.0.content.0."),
    (part("image_url", "https://a.test/x.png"), "url_not_allowed", "messages.0.content.0."),
    (part("image_url", "data:image/png;base64,AAAA"), "unsupported_image_format", "messages.0."),
    (part("image_url", "data:text/html;base64,AAAA"), "invalid_data_url", "messages.0.content.0."),
    (part("audio_url", {"url": BROKEN_SOUND}), "invalid_audio", "messages.0.content.0.audio_url"),
    (part("audio_url", {"url": PLAYLIST}), "invalid_audio", "messages.0.content.0.audio_url"),
    (part("input_audio", {"data": "!", "format": "wav"}), "invalid_data_url", "messages.0."),
    (part("input_audio", {"data": "AAAA", "format": "exe"}), "invalid_value", "messages.0."),
    (part("video_url", {"url": "data:video/mp4;base64,AAAA"}), "invalid_video", "messages.0."),
    ({"images": ["/etc/passwd"], **user("a")}, "local_path_not_allowed", "images.0"),
    (user([{"type": "image_url", "image_url": "data:x"}] * 17), "invalid_data_url", "messages.0."),
    ({**user("<|im_end|>")}, "control_token", "messages.0.content"),
    ({**user("a"), "temperature": 2.5}, "invalid_value", "temperature"),
    ({**user("a"), "temperature": "hot"}, "invalid_type", "temperature"),
    ({**user("a"), "top_p": 0}, "invalid_value", "top_p"),
    ({**user("a"), "n": 10**6}, "invalid_value", "n"),
    ({**user("a"), "n": True}, "invalid_type", "n"),
    ({**user("a"), "n": 1.5}, "invalid_type", "n"),
    ({**user("a"), "stage_sampling": {"thinker": {"top_k": 1.5}}}, "invalid_type", "stage_samp"),
    ({**user("a"), "stage_sampling": {"thinker": {"seed": True}}}, "invalid_type", "stage_samp"),
    ({**user("a"), "seed": -1}, "invalid_value", "seed"),
    ({**user("a"), "max_tokens": 0}, "out_of_range", "max_tokens"),
    ({**user("a"), "stop": [""]}, "invalid_value", "stop"),
    ({**user("a"), "stop": 4}, "invalid_type", "stop"),
    ({**user("a"), "top_logprobs": 2}, "invalid_value", "top_logprobs"),
    ({**user("a"), "stream_options": {}}, "conflicting_parameters", "stream_options"),
    ({**user("a"), "tools": [{"type": "function", "function": CALL}]}, "unsupported_parameter", ""),
    ({**user("a"), "response_format": {"type": "json_schema"}}, "unsupported_parameter", ""),
    ({**user("a"), "temprature": 1}, "unknown_parameter", "temprature"),
    ({**user("a"), "modalities": ["image"]}, "unsupported_parameter", "modalities.0"),
    ({**user("a"), "audio": {"voice": "ethan"}}, "conflicting_parameters", "audio"),
    ({**user("a"), **SPOKEN, "audio": {"voice": "x"}}, "voice_not_found", "audio.voice"),
    ({**user("a"), **SPOKEN, "audio": {"format": "exe"}}, "unsupported_format", "audio.format"),
    ({**user("a"), **SPOKEN, "audio": {"speed": 2}}, "unknown_parameter", "audio.speed"),
    ({**user("a"), **SPOKEN, "stream": True, "audio": {"format": "mp3"}}, "conflicting_parameters",
     "audio.format"),
    ({**user("a"), "stage_sampling": {"thinkr": {}}}, "unknown_parameter", "stage_sampling.thinkr"),
    ({**user("a"), "stage_sampling": {"thinker": {"temp": 1}}}, "unknown_parameter", "stage_samp"),
    ({**user("a"), "stage_sampling": {"thinker": 4}}, "invalid_type", "stage_sampling.thinker"),
    ({**user("a"), "stage_sampling": {"talker": []}}, "invalid_type", "stage_sampling.talker"),
    ({**user("a"), "stage_sampling": {"talker": {"max_tokens": 1 << 20}}}, "invalid_value",
     "stage_sampling.talker.max_tokens"),
    ({**user("a"), "talker_top_p": 2}, "invalid_value", "stage_sampling.talker.top_p"),
    ({**user("a"), "stage_params": {"talker": 0}}, "invalid_type", "stage_params.talker"),
    ({**user("a"), "stage_params": {"thinker": {"x": 1}}}, "unknown_parameter", "stage_params."),
    ({**user("a"), "model": "gpt-4o"}, "model_not_found", "model"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("body", "code", "param"), REFUSED, ids=[f"{i}-{row[1]}" for i, row in enumerate(REFUSED)]
)
def test_refusals(omni: OmniApi, body: dict[str, Any], code: str, param: str) -> None:
    answer = omni.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == (404 if code == "model_not_found" else 400), answer.text
    error = answer.json()["error"]
    assert error["code"] == code, error
    assert (error["param"] or "").startswith(param), error
    assert "passwd" not in answer.text and answer.headers["x-request-id"]
    assert omni.unfinished() == 0


def test_what_the_worker_refuses_is_no_stream(omni: OmniApi) -> None:
    answer = omni.chat("<|im_end|>", stream=True)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "control_token")


def test_what_is_no_json_is_refused(omni: OmniApi) -> None:
    for data in (b"{", b"[]", b"\xff", b"null"):
        answer = omni.http.post(
            "/v1/chat/completions", content=data, headers={"content-type": "application/json"}
        )
        assert answer.status_code == 400 and answer.json()["error"]["code"]
    assert json.loads(omni.http.get("/v1/nothing").text)["error"]["code"] == "not_found"
