"""The parts of the thinker one by one: the slab, the writing of text, what is made of films."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from sgl_diffusion.ar.kv import KvShape, KvSlab
from sgl_diffusion.ar.media import read_film, read_sound
from sgl_diffusion.ar.prefix import BLOCK, block_keys
from sgl_diffusion.ar.senses import Senses
from sgl_diffusion.ar.writing import Writing
from sgl_diffusion.base.chat import Part
from sgl_diffusion.base.device import pick_dtype
from sgl_diffusion.base.omni import written_precision
from tests.ar.chats import CPU, make_media

SHAPE = KvShape(layers=2, heads=1, width=4, dtype=torch.float32, device=CPU)


def _fill(slab: KvSlab, index: int, values: torch.Tensor) -> None:
    slab.prefill(slab.slots[index], values.shape[3])
    for layer, (keys, rest) in enumerate(values):
        slab.update(keys[None], rest[None], layer)


def test_the_precision_is_that_of_the_checkpoint(tiny_omni: Path) -> None:
    config = json.loads((tiny_omni / "config.json").read_text())
    assert written_precision(config) == "fp32"
    told = written_precision({**config, "dtype": "bfloat16"})
    assert told == "bf16" and pick_dtype("auto", CPU, auto=told) == torch.bfloat16
    assert written_precision({"model_type": "qwen3_omni_moe"}) == ""


def test_rows_keep_their_values_when_others_leave_and_the_slab_grows() -> None:
    slab = KvSlab(SHAPE, 3)
    kept = {}
    for index, length in enumerate((5, 300, 7)):
        slot = slab.take()
        kept[slot] = torch.randn(2, 2, 1, length, 4)
        _fill(slab, index, kept[slot])
    gone = slab.slots[0]
    slab.leave(gone)
    for slot in slab.slots:
        assert torch.equal(slab.read(slot, 0, slot.length), kept[slot])
    mask = slab.decode([True, False])
    keys, _ = slab.update(torch.ones(2, 1, 1, 4), torch.ones(2, 1, 1, 4), 0)
    assert keys.shape == (2, 1, 301, 4) and mask.shape == (2, 1, 1, 301)
    assert [slot.length for slot in slab.slots] == [8, 300]
    assert mask.sum((1, 2, 3)).tolist() == [8, 301]
    assert torch.equal(keys[0, :, 7], torch.ones(1, 4))


def test_block_keys_know_all_that_came_before() -> None:
    tokens = list(range(3 * BLOCK + 5))
    keys = block_keys(tokens, {})
    assert len(keys) == 3
    changed = block_keys([9, *tokens[1:]], {})
    assert not set(keys) & set(changed)
    marked = block_keys(tokens, {BLOCK: b"a"})
    assert marked[0] == keys[0] and marked[1] != keys[1] and marked[2] != keys[2]


@pytest.mark.parametrize("text", ["a cat, a dög and 猫 🦊 in the river", "naïve — “ok”"])
def test_text_comes_out_whole_whatever_the_tokens_cut(tiny_qwen3_omni: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen3_omni)
    writing = Writing(tokenizer, ())
    pieces = [writing.add(token) for token in tokenizer(text).input_ids]
    assert "".join(pieces) + writing.finish() == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_what_may_become_a_stop_text_is_held_back(tiny_qwen3_omni: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen3_omni)
    writing = Writing(tokenizer, ("END",))
    pieces = [writing.add(token) for token in tokenizer("xEyENz").input_ids]
    assert pieces == ["x", "", "Ey", "", "", "ENz"]
    pieces = [writing.add(token) for token in tokenizer("qEND").input_ids]
    assert "".join(pieces) == "q" and writing.stopped and writing.text == "xEyENzq"


def test_a_film_is_frames_of_its_time_in_patches(tiny_qwen3_omni: Path, tmp_path: Path) -> None:
    video = make_media(tmp_path)["video"]
    frames, rate = read_film(video)
    assert (len(frames), rate) == (4, 2.0)
    film = Senses.load(tiny_qwen3_omni).sense(Part(kind="video", path=str(video)))
    assert film.grid == (2, 4, 6) and film.seconds == 1.0
    assert film.features.shape == (2 * 4 * 6, 3 * 2 * 16 * 16)
    # One patch as the vision tower reads it: channels, frames, rows, columns.
    first = film.features[0].view(3, 2, 16, 16)
    pixels = torch.stack([torch.from_numpy(np.array(frame)) for frame in frames[:2]])
    assert pixels.shape[1:3] == (64, 96), "no resize"
    expected = pixels[:, :16, :16].permute(3, 0, 1, 2) / 255
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None, None]
    torch.testing.assert_close(first, ((expected - mean) / std).float(), atol=1e-5, rtol=0)


def test_sound_is_heard_at_its_own_rate(tmp_path: Path) -> None:
    sound = read_sound(make_media(tmp_path)["audio"])
    assert abs(len(sound) - 32_000) < 50
    assert 0.3 < float(np.abs(sound).max()) <= 1.0
