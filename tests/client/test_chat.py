"""Chat through the client: the app, its stage in a process and in a thread."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sgl_diffusion.apps.omni import omni_app
from sgl_diffusion.base.chat import ChatMessage, ChatParams, Part, Speech, TextSampling
from sgl_diffusion.base.errors import CancelledError, RequestError, SetupError
from sgl_diffusion.base.omni import OmniOptions
from sgl_diffusion.client.chat import ChatClient, SoundPiece, TextPiece, _Told
from sgl_diffusion.orchestrator.job import JobOutput
from tests.orchestrator.play import children

BOTH = pytest.mark.parametrize("in_process", [False, True], ids=["process", "thread"])


def question(text: str, *, stream: bool = True, most: int = 16) -> ChatParams:
    message = ChatMessage(role="user", parts=(Part(text=text),))
    sampling = TextSampling(temperature=0.0, max_tokens=most)
    return ChatParams(messages=(message,), sampling=sampling, stream=stream)


def play(
    folder: Path, scenario: Callable[[ChatClient], Awaitable[None]], *, in_process: bool = True
) -> None:
    async def story() -> None:
        app = omni_app(OmniOptions(model_path=str(folder), device="cpu"))
        client = ChatClient(app, in_process=in_process)
        await client.start()
        try:
            await client.ready()
            await scenario(client)
        finally:
            await client.stop()

    asyncio.run(story())
    assert children() == []


@BOTH
def test_text_comes_as_it_is_written(tiny_qwen3_omni: Path, in_process: bool) -> None:
    async def scenario(client: ChatClient) -> None:
        card = client.card()
        assert card is not None and card.name == "qwen3-omni"
        assert card.inputs == ("text", "image", "video", "audio")
        handle = await client.submit(question("a cat on a tree"))
        pieces = [piece async for piece in handle.pieces()]
        answer = await handle.result()
        (choice,) = answer.choices
        texts = [piece.text for piece in pieces if isinstance(piece, TextPiece)]
        assert len(texts) == len(pieces) and "".join(texts) == choice.text
        assert pieces[-1].finish_reason == choice.finish_reason == "length"
        assert len(choice.tokens) == answer.usage.completion_tokens == 16
        late = await client.submit(question("a cat on a tree"))
        await late.result()
        kept = [piece async for piece in late.pieces()]
        assert kept == pieces, "what came before it was asked for is lost"

    play(tiny_qwen3_omni, scenario, in_process=in_process)


@BOTH
def test_sound_comes_as_it_is_made(tiny_qwen3_omni: Path, in_process: bool) -> None:
    async def scenario(client: ChatClient) -> None:
        card = client.card()
        assert card is not None and card.voices == ("ethan", "chelsie")
        assert card.sample_rate == 24_000
        speech = Speech(max_frames=12)
        wish = replace(question("a cat on a tree"), speech=speech)
        handle = await client.submit(wish)
        pieces = [piece async for piece in handle.pieces()]
        sounds = [piece for piece in pieces if isinstance(piece, SoundPiece)]
        texts = [piece for piece in pieces if isinstance(piece, TextPiece)]
        assert sounds[-1].finish_reason is not None and texts[-1].finish_reason == "length"
        whole = await (await client.submit(replace(wish, stream=False))).result()
        (sound,) = whole.sounds
        assert sound.dtype == np.float32 and len(sound) > 1000
        np.testing.assert_allclose(np.concatenate([p.samples for p in sounds]), sound, atol=1e-4)
        assert whole.usage.audio_tokens * 1920 > len(sound)
        with pytest.raises(RequestError) as told:
            await client.submit(replace(wish, speech=Speech(voice="nobody")))
        assert told.value.code == "voice_not_found"

    play(tiny_qwen3_omni, scenario, in_process=in_process)


def test_a_piece_that_was_told_is_not_told_again() -> None:
    told = _Told()

    def text(words: str, attempt: int) -> str | None:
        output = JobOutput([], {"index": 0, "text": words, "finish_reason": None})
        piece = told.fresh(output, attempt)
        assert piece is None or isinstance(piece, TextPiece)
        return None if piece is None else piece.text

    def sound(count: int, attempt: int) -> int:
        samples = np.zeros(count, np.float32)
        output = JobOutput([samples], {"sound": {"index": 0, "finish_reason": None}})
        piece = told.fresh(output, attempt)
        return len(piece.samples) if isinstance(piece, SoundPiece) else 0

    assert [text("a red", 1), text(" fox", 1), sound(100, 1)] == ["a red", " fox", 100]
    again = [text("a", 2), text(" red fo", 2), text("x runs", 2), sound(70, 2), sound(50, 2)]
    assert again == [None, None, " runs", 0, 20]


def test_questions_share_steps_and_do_not_mix(tiny_qwen25_omni: Path) -> None:
    async def scenario(client: ChatClient) -> None:
        texts = [f"{word} in the garden" for word in ("cat", "dog", "bird", "fox", "robot", "sun")]
        alone = []
        for text in texts:
            handle = await client.submit(question(text, stream=False))
            alone.append((await handle.result()).choices)
        handles = [await client.submit(question(text)) for text in texts]
        gone = await client.submit(question("a moon", most=4000))
        gone.cancel()
        together = [(await handle.result()).choices for handle in handles]
        assert together == alone and len({c[0].text for c in alone}) > 3
        with pytest.raises(CancelledError):
            await gone.result()
        sizes = [m.labels["rows"] for m in client.metrics() if m.name == "decode_steps_total"]
        assert max(map(int, sizes)) > 1

    play(tiny_qwen25_omni, scenario)


def test_what_cannot_be_asked_is_refused_at_the_door(tiny_qwen3_omni: Path) -> None:
    async def scenario(client: ChatClient) -> None:
        with pytest.raises(RequestError) as told:
            await client.submit(ChatParams(messages=()))
        assert told.value.param == "messages"
        strange = ChatMessage(role="robot", parts=(Part(text="a"),))
        with pytest.raises(RequestError) as told:
            await client.submit(ChatParams(messages=(strange,)))
        assert told.value.param == "messages.0.role"

    play(tiny_qwen3_omni, scenario)


def test_another_kind_of_model_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')

    async def scenario(client: ChatClient) -> None:
        raise AssertionError("it must not start")

    with pytest.raises(SetupError, match="bert") as told:
        play(tmp_path, scenario)
    assert told.value.code == "unsupported_model"
