"""What a request can ask of the chat worker, and what its errors leave behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sgl_diffusion.ar import batch
from tests.ar.chats import ask, open_worker, oracle, part, run, submit, tokens_of

STORY = "a cat and a dog in a small boat on the river at the old house with a big red moon " * 4


def test_a_prompt_read_before_is_not_read_again(tiny_omni: Path, media: dict[str, Path]) -> None:
    worker, outbox = open_worker(tiny_omni, speech=False)
    first = ask(STORY, media["image"], "a cat", system=STORY)
    second = ask(STORY, media["image"], "a dog", system=STORY)
    for name, params in {"first": first, "second": second, "again": second}.items():
        submit(worker, name, params)
        run(worker)
        assert tokens_of(outbox, name) == oracle(tiny_omni).answer(params)
    cached = [outbox.meta[name]["usage"]["cached_tokens"] for name in ("first", "second", "again")]
    assert cached[0] == 0 and cached[1] > 100 and cached[2] >= cached[1]
    told = {m.name: m.value for m in worker.metrics()}
    assert told["media_reused_total"] == 2 and told["prefix_reused_tokens_total"] == sum(cached)


def test_a_slab_that_grew_takes_over_what_was_read_before(tiny_qwen3_omni: Path) -> None:
    worker, outbox = open_worker(tiny_qwen3_omni, speech=False)
    long = ask(STORY * 4, max_tokens=2)
    for name in ("grows", "reuses"):
        submit(worker, name, long)
        run(worker)
    assert tokens_of(outbox, "grows") == tokens_of(outbox, "reuses")
    assert outbox.meta["reuses"]["usage"]["cached_tokens"] > 256


def test_another_picture_under_the_same_tokens_is_read(
    tiny_qwen3_omni: Path, media: dict[str, Path], tmp_path: Path
) -> None:
    from PIL import Image

    other = tmp_path / "b.png"
    Image.open(media["image"]).transpose(Image.Transpose.ROTATE_180).save(other)
    worker, outbox = open_worker(tiny_qwen3_omni, speech=False)
    for name, picture in {"one": media["image"], "other": other}.items():
        params = ask(picture, STORY)
        submit(worker, name, params)
        run(worker)
        assert tokens_of(outbox, name) == oracle(tiny_qwen3_omni).answer(params)
    assert outbox.meta["other"]["usage"]["cached_tokens"] == 0


def test_long_prompts_are_read_in_pieces_while_others_write(
    tiny_omni: Path, media: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "_PIECE", 9)
    worker, outbox = open_worker(tiny_omni, speech=False)
    asked = {
        "short": ask("a fox", max_tokens=30),
        "brief": ask("the sea", max_tokens=3),
        "long": ask(media["video"], STORY, media["image"]),
    }
    for name, params in asked.items():
        submit(worker, name, params)
    run(worker)
    for name, params in asked.items():
        assert tokens_of(outbox, name) == oracle(tiny_omni).answer(params), name


def test_old_beginnings_make_room(tiny_qwen3_omni: Path) -> None:
    worker, outbox = open_worker(tiny_qwen3_omni, speech=False, prefix_bytes=200_000)
    for index in range(6):
        submit(worker, str(index), ask(f"{index} {STORY}", max_tokens=1))
        run(worker)
    held = {m.name: m.value for m in worker.metrics()}["prefix_bytes"]
    assert 0 < held <= 200_000
    assert not outbox.errors


def test_a_seed_draws_the_same_alone_and_among_others(tiny_qwen3_omni: Path) -> None:
    worker, outbox = open_worker(tiny_qwen3_omni, speech=False)
    wish = ask("a bird", temperature=1.3, top_k=40, top_p=0.95, seed=7, max_tokens=20)
    submit(worker, "alone", wish)
    run(worker)
    for name in ("x", "among", "y"):
        submit(worker, name, wish if name == "among" else ask(name, temperature=1.0, seed=1))
    run(worker)
    assert tokens_of(outbox, "among") == tokens_of(outbox, "alone")
    submit(worker, "other", ask("a bird", temperature=1.3, seed=8, max_tokens=20))
    run(worker)
    assert tokens_of(outbox, "other") != tokens_of(outbox, "alone")


def test_choices_take_seeds_in_turn(tiny_qwen3_omni: Path) -> None:
    worker, outbox = open_worker(tiny_qwen3_omni, speech=False)
    submit(worker, "three", ask("a bird", temperature=1.0, seed=4, n=3))
    for seed in (4, 5, 6):
        submit(worker, str(seed), ask("a bird", temperature=1.0, seed=seed))
    run(worker)
    choices = outbox.meta["three"]["choices"]
    assert [c["tokens"] for c in choices] == [tokens_of(outbox, str(s)) for s in (4, 5, 6)]
    assert [c["index"] for c in choices] == [0, 1, 2]


def test_a_stop_text_ends_the_answer_and_is_not_shown(tiny_qwen3_omni: Path) -> None:
    worker, outbox = open_worker(tiny_qwen3_omni, speech=False)
    submit(worker, "whole", ask("a bird", max_tokens=40))
    run(worker)
    whole = outbox.meta["whole"]["choices"][0]["text"]
    stop = whole[len(whole) // 2 :][:5]
    submit(worker, "cut", ask("a bird", max_tokens=40, stop=(stop,), stream=True))
    run(worker)
    (choice,) = outbox.meta["cut"]["choices"]
    assert choice["text"] == whole[: whole.index(stop)]
    assert choice["finish_reason"] == "stop"
    pieces = [meta for meta, _ in outbox.parts["cut"]]
    assert "".join(piece["text"] for piece in pieces) == choice["text"]
    assert [p["finish_reason"] for p in pieces] == [None] * (len(pieces) - 1) + ["stop"]


def test_streamed_pieces_make_the_answer(tiny_qwen3_omni: Path) -> None:
    worker, outbox = open_worker(tiny_qwen3_omni, speech=False)
    submit(worker, "job", ask("a bird", max_tokens=24, stream=True, n=2, temperature=1.0))
    run(worker)
    for index, choice in enumerate(outbox.meta["job"]["choices"]):
        pieces = [meta for meta, _ in outbox.parts["job"] if meta["index"] == index]
        assert len(pieces) > 4
        assert "".join(piece["text"] for piece in pieces) == choice["text"]
        assert choice["finish_reason"] in ("length", "stop")


def test_log_probabilities_are_those_of_the_model(tiny_qwen3_omni: Path) -> None:
    worker, outbox = open_worker(tiny_qwen3_omni, speech=False)
    params = ask("a bird", logprobs=True, top_logprobs=3, max_tokens=4)
    submit(worker, "job", params)
    run(worker)
    (choice,) = outbox.meta["job"]["choices"]
    truth = oracle(tiny_qwen3_omni)
    prompt = truth._reader.read(params.messages, [], [])
    ids = torch.tensor([prompt.tokens + choice["tokens"]])
    with torch.inference_mode():
        scores = truth.model(input_ids=ids).logits[0].log_softmax(-1)
    for at, (token, told) in enumerate(zip(choice["tokens"], choice["logprobs"], strict=True)):
        row = scores[len(prompt.tokens) - 1 + at]
        assert told["logprob"] == pytest.approx(float(row[token]), abs=1e-4)
        top = row.topk(3).values.tolist()
        assert [entry["logprob"] for entry in told["top"]] == pytest.approx(top, abs=1e-4)


def test_cancelled_jobs_leave_at_any_point(tiny_qwen3_omni: Path, media: dict[str, Path]) -> None:
    worker, outbox = open_worker(tiny_qwen3_omni, speech=False, rows=3)
    stays = ask("a fox in the garden", max_tokens=20)
    answer = oracle(tiny_qwen3_omni).answer(stays)
    for steps in range(8):
        kept, gone = f"kept-{steps}", f"gone-{steps}"
        submit(worker, gone, ask(media["image"], "a", media["audio"], n=2))
        submit(worker, kept, stays)
        for _ in range(steps):
            worker.step()
        worker.cancel(gone)
        run(worker)
        assert tokens_of(outbox, kept) == answer, steps
        assert gone not in outbox.outputs and not outbox.errors
    assert worker.running() == 0 and part(worker, "thinker").thinker.kv.slots == []


def test_refusals_say_what_is_wrong_and_the_worker_goes_on(
    tiny_qwen3_omni: Path, tmp_path: Path
) -> None:
    worker, outbox = open_worker(tiny_qwen3_omni, speech=False, length=64)
    broken = tmp_path / "x.png"
    broken.write_text("no picture")
    refused = {
        "long": (ask(STORY * 3), "context_length_exceeded"),
        "token": (ask("<|im_end|>"), "control_token"),
        "image": (ask(broken), "invalid_image"),
        "hot": (ask("a", temperature=3.0), "invalid_value"),
    }
    for name, (params, _) in refused.items():
        submit(worker, name, params)
    worker.submit("old", {"params": {"prompt": 1}})
    submit(worker, "good", ask("a fox"))
    run(worker)
    assert {name: outbox.errors[name].code for name in refused} == {
        name: code for name, (_, code) in refused.items()
    }
    assert "no picture" not in str(outbox.errors["image"]) and "old" in outbox.errors
    assert len(tokens_of(outbox, "good")) == 12
    assert worker.running() == 0


def test_an_answer_ends_where_the_context_does(tiny_qwen3_omni: Path) -> None:
    worker, outbox = open_worker(tiny_qwen3_omni, speech=False, length=40)
    submit(worker, "job", ask("a fox", max_tokens=None))
    run(worker)
    usage = outbox.meta["job"]["usage"]
    assert usage["prompt_tokens"] + usage["completion_tokens"] == 40
    assert outbox.meta["job"]["choices"][0]["finish_reason"] == "length"


def test_the_card_says_where_it_computes(tiny_qwen3_omni: Path) -> None:
    """A stage that computes on a CPU may be silent for long: it is not taken for a hung one."""
    worker, _ = open_worker(tiny_qwen3_omni, speech=False)
    assert worker.load()["device"] == "cpu"
