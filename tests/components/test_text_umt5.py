"""The text encoder against WanPipeline.encode_prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sgl_diffusion.base.errors import SetupError
from sgl_diffusion.components.text_umt5 import TextUmt5, clean_prompt
from sgl_diffusion.loader.index import read_index
from tests.oracles import wan as oracle

CPU = torch.device("cpu")
PROMPTS = [
    "a red cat on the beach",
    "",
    "  two &amp;amp; three\n\ttabs  ",
    "schÃ¶n: 猫が好き zyx-42!",
    "word " * 700,
]


@pytest.fixture(scope="module")
def encoder(tiny_wan_a: Path) -> TextUmt5:
    return TextUmt5.load(read_index(tiny_wan_a), dtype=torch.float32, device=CPU)


@pytest.fixture(scope="module")
def pipe(tiny_wan_a: Path) -> Any:
    return oracle.pipeline(tiny_wan_a)


@pytest.mark.parametrize("length", [512, 226])
def test_embeddings_equal_the_pipeline(encoder: TextUmt5, pipe: Any, length: int) -> None:
    expected, _ = pipe.encode_prompt(
        PROMPTS, do_classifier_free_guidance=False, max_sequence_length=length
    )
    got = encoder.encode(PROMPTS, length)
    assert got.shape == (len(PROMPTS), length, 32)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)


def test_rows_are_zero_behind_the_prompt(encoder: TextUmt5) -> None:
    short, empty = encoder.encode(["a cat", ""])
    assert torch.count_nonzero(short.abs().sum(-1)) == 3
    assert torch.count_nonzero(empty.abs().sum(-1)) == 1


def test_prompts_do_not_depend_on_each_other(encoder: TextUmt5) -> None:
    together = encoder.encode(PROMPTS)
    alone = torch.cat([encoder.encode([prompt]) for prompt in PROMPTS])
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=0)


def test_unknown_words_still_differ(encoder: TextUmt5) -> None:
    one, other = encoder.encode(["qwzx", "qwzy"])
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    "text", ["a  b", "&lt;b&gt;", "&amp;lt;", "naÃ¯ve", "“quotes”", "a\u3000b\u200bc", " "]
)
def test_prompts_are_cleaned_like_in_the_pipeline(text: str) -> None:
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    assert clean_prompt(text) == prompt_clean(text)


def test_a_folder_without_weights_is_an_error(tiny_wan_a: Path, tmp_path: Path) -> None:
    (tmp_path / "text_encoder").mkdir()
    for name in ("model_index.json", "text_encoder/config.json"):
        (tmp_path / name).write_bytes((tiny_wan_a / name).read_bytes())
    with pytest.raises(SetupError, match="no safetensors weights"):
        TextUmt5.load(read_index(tmp_path), dtype=torch.float32, device=CPU)
