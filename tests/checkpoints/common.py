"""What tiny checkpoints are made of: weights that hide nothing, tokenizers without a download."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sgl_diffusion.loader.index import INDEX_NAME

WORDS = """
a the of in on at and with cat dog bird fox tree forest garden river lake sea beach sky sun moon
street house castle car boat robot man woman red green blue yellow black white small big old new
photo painting drawing picture blurry low high quality running sleeping
""".split()


@torch.no_grad()
def draw_weights(model: nn.Module, generator: torch.Generator, **gains: float) -> None:
    """New values for every parameter, in the order of their names.

    Norms near 1, biases that matter, matrices that keep the variance of their input; `gains` scale
    parameters whose name ends with the key (dots written as __).
    """
    ends = {end.replace("__", "."): gain for end, gain in gains.items()}
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name and noise.dim() < 2 and name.endswith("weight"):
            value = 1 + 0.1 * noise
        elif noise.dim() < 2:
            value = 0.1 * noise
        elif any(word in name for word in ("shared", "embed_tokens", "relative_attention_bias")):
            value = noise
        else:
            value = noise / noise[0].numel() ** 0.5
        gain = next((gain for end, gain in ends.items() if name.endswith(end)), 1.0)
        parameter.copy_(gain * value)


def t5_tokenizer() -> Any:
    """Whole words where the list has them, else characters."""
    from transformers import T5TokenizerFast

    pieces = [(f"▁{word}", -4.0) for word in WORDS]
    pieces += [(character, -9.0) for character in ("▁", *string.printable.split()[0])]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5TokenizerFast(vocab=special + pieces, extra_ids=0)


def clip_tokenizer() -> Any:
    """Letters; the end of the text has the highest id, where old models pool."""
    from transformers import CLIPTokenizer

    letters = string.ascii_lowercase
    tokens = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77
    )


def save(pipeline: Any, folder: Path, shard: str = "20MB") -> Path:
    """Write a pipeline as repositories hold it."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    pipeline.save_pretrained(folder, safe_serialization=True, max_shard_size=shard)
    assert (folder / INDEX_NAME).is_file()
    return folder


_CHAT = """
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}
{%- endif %}"""


def qwen_tokenizer(*more: str) -> Any:
    """Words of the list with the space before them, else bytes; with the chat's special tokens."""
    from transformers import Qwen2Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocab = {symbol: index for index, symbol in enumerate(bytes_to_unicode().values())}
    merges = []
    for word in WORDS:
        built = "Ġ"
        for letter in word:
            merges.append((built, letter))
            built += letter
            vocab.setdefault(built, len(vocab))
    tokenizer = Qwen2Tokenizer(
        vocab=vocab, merges=list(dict.fromkeys(merges)), pad_token="<|endoftext|>"
    )
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>", *more]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = _CHAT
    return tokenizer
