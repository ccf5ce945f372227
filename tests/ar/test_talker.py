"""The codes of an answer are those of the model's own `generate`, of several answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sgl_diffusion.ar.qwen3_talker import Qwen3Talker
from sgl_diffusion.ar.talker import less_of_the_same

STEPS = 14


@pytest.fixture(scope="module")
def omni(qwen3_of_transformers: Any) -> Any:
    return qwen3_of_transformers


def conversation(folder: Path, text: str) -> list[int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    told: list[int] = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
    )
    return told


def truth(
    omni: Any, prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> tuple[list[int], Tensor]:
    """The text and the codes, [groups, frames]."""
    codes: list[Tensor] = []

    def record(given: Tensor, **_: Any) -> Tensor:
        codes.append(given)
        return torch.zeros(1, 1, 8)

    monkeypatch.setattr(omni.code2wav, "chunked_decode", record)
    text, _ = omni.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        speaker="Ethan",
        return_audio=True,
        thinker_max_new_tokens=8,
        thinker_do_sample=False,
        thinker_eos_token_id=omni.config.im_end_token_id,
        talker_max_new_tokens=STEPS,
        talker_do_sample=False,
    )
    return text[0, len(prompt) :].tolist(), codes[0][0]


@pytest.mark.filterwarnings("ignore")
def test_codes_are_those_of_generate(
    omni: Any, tiny_qwen3_omni: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [
        conversation(tiny_qwen3_omni, text) for text in ("a red fox", "the sea and a big boat")
    ]
    truths = [truth(omni, prompt, monkeypatch) for prompt in prompts]
    talker = Qwen3Talker(omni.talker, rows=2)
    embed = omni.thinker.get_input_embeddings()

    def vectors(*tokens: int) -> Tensor:
        found: Tensor = embed(torch.tensor(tokens)).detach()
        return found

    config = omni.config
    none = config.tts_pad_token_id
    logits, states, trailing, frames, silences = [], [], [], [], []
    for prompt, (text, _) in zip(prompts, truths, strict=True):
        start = max(i for i, token in enumerate(prompt) if token == config.im_start_token_id)
        role = prompt[start : start + 3]
        told = [
            vectors(*prompt[:start]),
            torch.zeros(start, dtype=torch.bool),
            torch.empty(0),
            vectors(*role, none, none, none, none, config.tts_bos_token_id, text[0]),
            vectors(none)[0],
            torch.arange(start + 9).expand(3, -1),
        ]
        opening = talker.opening(told, 0, "ethan")
        first, state = talker.prefill(talker.kv.take(), opening)
        logits.append(first)
        states.append(state)
        silences.append(opening.silence)
        said = vectors(*text[1:-1], config.tts_eos_token_id)
        trailing.append([*talker.words(said)])
        frames.append([])
    history: list[list[int]] = [[], []]
    for step in range(STEPS - 1):
        firsts = []
        for row, scores in enumerate(logits):
            firsts.append(int(less_of_the_same(scores, history[row], 1.05).argmax()))
            history[row].append(firsts[-1])
        codes, total = talker.frames(
            torch.stack(list(states)), firsts, lambda row, group, scores: int(scores.argmax())
        )
        for row in range(2):
            frames[row].append(codes[row])
        words = [
            rest[step] if step < len(rest) else silences[row] for row, rest in enumerate(trailing)
        ]
        at = torch.tensor([slot.length for slot in talker.kv.slots])
        logits, states = talker.decode(total + torch.stack(words), at, [True, True])
    for row, (_, expected) in enumerate(truths):
        count = expected.shape[1]
        assert count > 3
        assert torch.equal(torch.stack(frames[row][:count], dim=1), expected)
