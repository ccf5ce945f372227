"""Spoken answers of the chat worker: the sound that the whole model makes by itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sgl_diffusion.ar import speech
from sgl_diffusion.base.chat import ChatParams, Speech
from tests.ar.chats import ask, open_worker, oracle, part, run, submit, tokens_of

FRAMES = 12
GREEDY = Speech(voice="ethan", temperature=0.0, max_frames=FRAMES)
DRAWN = Speech(voice="chelsie", max_frames=FRAMES)


@pytest.fixture(scope="module")
def worker(tiny_qwen3_omni: Path) -> Any:
    return open_worker(tiny_qwen3_omni, rows=4)


def truth(model: Any, folder: Path, params: ChatParams) -> Tensor:
    """transformers' own text and sound, in its own order: all text first, then one decode."""
    assert params.sampling.max_tokens is not None
    # Without it the library cannot place sound in the talker's prompt.
    model.talker.config.audio_config = model.config.thinker_config.audio_config
    # It does not say the last token that it writes, nor make a frame of the last code.
    _, sound = model.generate(
        **oracle(folder).inputs(params),
        speaker="Ethan",
        return_audio=True,
        thinker_max_new_tokens=params.sampling.max_tokens + 1,
        thinker_do_sample=False,
        thinker_eos_token_id=model.config.im_end_token_id,
        talker_max_new_tokens=FRAMES + 1,
        talker_do_sample=False,
    )
    found: Tensor = sound.flatten()
    return found


def streamed(outbox: Any, job_id: str) -> Tensor:
    return torch.cat([arrays[0] for meta, arrays in outbox.parts[job_id] if "sound" in meta])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kinds", [(), ("image", "audio", "video")], ids=["text", "media"])
def test_sound_is_that_of_the_model(
    worker: Any,
    tiny_qwen3_omni: Path,
    qwen3_of_transformers: Any,
    media: dict[str, Path],
    kinds: tuple[str, ...],
) -> None:
    chat, outbox = worker
    params = ask("a red fox", *(media[kind] for kind in kinds), speech=GREEDY, max_tokens=7)
    name = f"whole {kinds}"
    submit(chat, name, params)
    run(chat)
    (sound,) = outbox.outputs[name]
    expected = truth(qwen3_of_transformers, tiny_qwen3_omni, params)
    assert sound.shape == expected.shape and float(expected.abs().max()) > 0.01
    torch.testing.assert_close(sound, expected, atol=1e-4, rtol=0)


def test_sound_goes_out_before_the_text_is_done(worker: Any) -> None:
    chat, outbox = worker
    whole = ask("the sea", speech=DRAWN, max_tokens=16, seed=5, temperature=1.0)
    submit(chat, "whole", whole)
    run(chat)
    for name in ("x", "stream", "y"):
        wish = whole if name == "stream" else ask(name, speech=DRAWN, max_tokens=9)
        submit(chat, name, replace(wish, stream=True))
    run(chat)
    parts = [meta for meta, _ in outbox.parts["stream"]]
    first_sound = next(i for i, meta in enumerate(parts) if "sound" in meta)
    last_text = max(i for i, meta in enumerate(parts) if "text" in meta)
    assert first_sound < last_text
    reasons = [meta["sound"]["finish_reason"] for meta in parts if "sound" in meta]
    assert len(reasons) > 1 and reasons == [None] * (len(reasons) - 1) + ["length"]
    assert tokens_of(outbox, "stream") == tokens_of(outbox, "whole")
    (sound,) = outbox.outputs["whole"]
    torch.testing.assert_close(streamed(outbox, "stream"), sound, atol=1e-4, rtol=0)
    meta = outbox.meta["whole"]
    assert meta["frames"] == FRAMES and meta["usage"]["completion_tokens"] == 16


def test_a_seed_gives_the_same_sound_and_another_seed_another(worker: Any) -> None:
    chat, outbox = worker
    for name, seed in {"one": 1, "again": 1, "two": 2}.items():
        submit(chat, name, ask("a bird", speech=DRAWN, max_tokens=4, seed=seed, script="a cat"))
        run(chat)
    sounds = {name: outbox.outputs[name][0] for name in ("one", "again", "two")}
    assert torch.equal(sounds["one"], sounds["again"])
    assert not torch.equal(sounds["one"], sounds["two"])


def test_a_script_is_the_answer_word_for_word(worker: Any) -> None:
    chat, outbox = worker
    text = "a cat, a dog and the big red moon"
    submit(chat, "script", ask("read", speech=DRAWN, script=text, stream=True))
    run(chat)
    (choice,) = outbox.meta["script"]["choices"]
    assert choice["text"] == text and choice["finish_reason"] == "stop"
    assert len(streamed(outbox, "script")) > (FRAMES - 1) * 1920
    submit(chat, "steered", ask("read", speech=DRAWN, script="a <|im_end|> b"))
    run(chat)
    assert outbox.errors["steered"].code == "control_token"


def test_speech_that_does_not_stop_ends_at_the_cap(
    worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat, outbox = worker
    monkeypatch.setattr(speech, "FRAMES_FREE", 3)
    monkeypatch.setattr(part(chat, "talker").talker, "ends", frozenset())
    endless = Speech(voice="ethan")
    submit(chat, "endless", ask("read", speech=endless, script="ab"))
    run(chat)
    assert outbox.meta["endless"]["frames"] == 3 + 2 * speech.FRAMES_PER_CHARACTER


def test_more_speech_than_rows_waits_its_turn_and_cancelled_speech_leaves(worker: Any) -> None:
    chat, outbox = worker
    names = [f"many{index}" for index in range(7)]
    for name in names:
        submit(chat, name, ask("read", speech=DRAWN, script="a cat on the river"))
    for _ in range(3):
        chat.step()
    for name in names[::2]:
        chat.cancel(name)
    run(chat)
    assert [name in outbox.outputs for name in names] == [i % 2 == 1 for i in range(7)]
    talking, sounding = part(chat, "talker"), part(chat, "code2wav")
    assert chat.running() == 0 and talking.talker.kv.slots == []
    assert not talking.batch.rows and not talking.batch.waiting and not talking._of
    assert not talking._jobs and not sounding._jobs and not sounding._waiting


def test_choices_are_spoken_apart(worker: Any) -> None:
    chat, outbox = worker
    submit(chat, "pair", ask("a bird", speech=DRAWN, max_tokens=6, temperature=1.0, n=2))
    run(chat)
    first, second = outbox.outputs["pair"]
    assert not torch.equal(first[:5000], second[:5000])
