"""A row whose numbers break ends its own job, and no other, now or later.

What breaks is real: a word or a code whose vector in the loaded weights is not finite.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sgl_diffusion.ar.worker import ChatWorker
from sgl_diffusion.base.chat import ChatParams, Speech
from tests.ar.chats import ask, open_worker, oracle, part, run, submit, tokens_of

STORY = "a cat and a dog in a small boat on the river at the old house with a big red moon "


@contextmanager
def broken(module: Any, row: int) -> Iterator[None]:
    """One row of a table of vectors is no numbers meanwhile."""
    weight: Tensor = module.weight
    with torch.no_grad():
        before = weight[row].clone()
        weight[row] = float("nan")
        yield
        weight[row] = before


def fox(worker: ChatWorker) -> Any:
    """The word is broken."""
    thinker = part(worker, "thinker")
    (token,) = thinker._tokenizer.encode(" fox")
    return broken(thinker.model.get_input_embeddings(), token)


def say(worker: ChatWorker, text: str, asked: str = "read", **changes: Any) -> ChatParams:
    voice = part(worker, "talker")._voices[0]
    speech = Speech(voice=voice, temperature=0.0, max_frames=6)
    return ask(asked, speech=speech, script=text, **changes)


def nothing_left(worker: ChatWorker) -> bool:
    slabs = [part(worker, "thinker").thinker.kv]
    if part(worker, "talker").batch is not None:
        slabs.append(part(worker, "talker").talker.kv)
        assert part(worker, "talker")._of == {}
    parts = worker.parts.values()
    return worker.running() + sum(p.running() for p in parts) == 0 and not any(
        slab.slots for slab in slabs
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "drawn"])
def test_a_question_that_breaks_ends_alone(tiny_omni: Path, temperature: float) -> None:
    worker, outbox = open_worker(tiny_omni, speech=False, rows=3)
    wells = {"short": ask("the sea"), "long": ask(STORY, max_tokens=20)}
    sick = ask(f"{STORY * 3} fox", n=2, temperature=temperature)
    with fox(worker):
        submit(worker, "short", wells["short"])
        submit(worker, "sick", sick)
        submit(worker, "long", wells["long"])
        run(worker)
    error = outbox.errors.pop("sick")
    assert error.code == "numbers_broken" and "--precision" in error.hint
    for name, params in wells.items():  # in the places of the rows that broke
        submit(worker, f"{name} again", params)
    mended = replace(sick, n=1, sampling=wells["short"].sampling)
    submit(worker, "mended", mended)
    run(worker)
    assert not outbox.errors and nothing_left(worker)
    for name, params in wells.items():
        expected = oracle(tiny_omni).answer(params)
        assert tokens_of(outbox, name) == tokens_of(outbox, f"{name} again") == expected
    assert tokens_of(outbox, "mended") == oracle(tiny_omni).answer(mended)


def test_an_answer_that_breaks_on_its_way_keeps_its_pieces(tiny_qwen3_omni: Path) -> None:
    worker, outbox = open_worker(tiny_qwen3_omni, speech=False)
    asked = {name: ask(name, stream=True) for name in ("a bird", "the sea", "a dog")}
    answers = {name: oracle(tiny_qwen3_omni).answer(params) for name, params in asked.items()}
    thinker = part(worker, "thinker")
    read = {t for params in asked.values() for t in thinker._reader.tokens(params.messages)}
    read |= {*answers["the sea"], *answers["a dog"]}
    at, token = next((i, t) for i, t in enumerate(answers["a bird"]) if i and t not in read)
    with broken(thinker.model.get_input_embeddings(), token):
        for name, params in asked.items():
            submit(worker, name, params)
        run(worker)
    assert list(outbox.errors) == ["a bird"] and nothing_left(worker)
    # That token was written, and could not be read.
    said = "".join(meta["text"] for meta, _ in outbox.parts["a bird"])
    whole = thinker._tokenizer.decode(answers["a bird"][: at + 1])
    assert said and whole.startswith(said)
    for name in ("the sea", "a dog"):
        assert tokens_of(outbox, name) == answers[name]


def test_a_speech_that_breaks_ends_alone(tiny_omni: Path) -> None:
    worker, outbox = open_worker(tiny_omni, rows=3)
    wells = {"a cat": say(worker, "a cat"), "a boat": say(worker, "a boat", STORY)}

    def speak(prefix: str) -> None:
        for name, params in wells.items():
            submit(worker, f"{prefix} {name}", params)
        run(worker)

    speak("before")
    with fox(worker):
        submit(worker, "second word", say(worker, "a fox and", STORY))
        submit(worker, "first word", say(worker, " fox and more", n=2))
        speak("among")
    speak("after")
    assert {error.code for error in outbox.errors.values()} == {"numbers_broken"}
    assert set(outbox.errors) == {"first word", "second word"} and nothing_left(worker)
    for name in wells:
        (sound,) = outbox.outputs[f"before {name}"]
        assert len(sound) > 1000
        for when in ("among", "after"):
            torch.testing.assert_close(
                outbox.outputs[f"{when} {name}"][0], sound, atol=1e-4, rtol=0
            )


@pytest.mark.parametrize("stage", ["talker", "code2wav"])
def test_a_code_that_breaks_leaves_the_others_whole(
    tiny_qwen3_omni: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Within a frame, or in its sound: a code that one row draws, and the other does not."""
    worker, outbox = open_worker(tiny_qwen3_omni)
    talker, vocoder = part(worker, "talker"), part(worker, "code2wav")._vocoder
    codes: dict[str, list[Tensor]] = {}
    listen = talker._codes

    def heard(row: Any, fresh: Tensor) -> None:
        codes.setdefault(talker._of[row][0], []).append(fresh)
        listen(row, fresh)

    monkeypatch.setattr(talker.batch, "_on_codes", heard)
    asked = {text: say(worker, text) for text in ("a bird", "the sea")}
    for name, params in asked.items():
        submit(worker, f"{name} alone", params)
    run(worker)
    group = 1 if stage == "talker" else 0
    drawn = {name: torch.cat(codes[f"{name} alone"], dim=1)[group].tolist() for name in asked}
    code = next(code for code in drawn["a bird"] if code not in drawn["the sea"])
    inside = talker.talker.model.code_predictor.model.codec_embedding[0]
    with broken(inside if stage == "talker" else vocoder.model.code_embedding, code):
        for name, params in asked.items():
            submit(worker, name, params)
        run(worker)
    assert list(outbox.errors) == ["a bird"] and nothing_left(worker)
    assert outbox.errors["a bird"].code == "numbers_broken"
    sounds = [outbox.outputs[name][0] for name in ("the sea", "the sea alone")]
    torch.testing.assert_close(*sounds, atol=1e-4, rtol=0)
