"""The parts of the small model, in the classes and the format of Wan 2.1: a text encoder with its
tokenizer, a VAE, a transformer with heads of 32."""

from __future__ import annotations

import copy
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.train_demo.beginning import begin
from examples.train_demo.scenes import VOCABULARY

TEXT_WIDTH = 128
CHANNELS = 16  # of a latent
PADDED = 512  # tokens, as the pipeline pads every prompt


def make_tokenizer() -> Any:
    """Whole words where the scenes know them, else letters; capitals are small letters here."""
    from tokenizers import normalizers
    from transformers import T5TokenizerFast

    letters = "".join(c for c in string.printable if not c.isspace() and not c.isupper())
    pieces = [(f"▁{word}", -4.0) for word in VOCABULARY]
    pieces += [(character, -9.0) for character in ("▁", *letters)]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    tokenizer = T5TokenizerFast(vocab=special + pieces, extra_ids=0)
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    return tokenizer


def make_text_encoder(tokens: int) -> Any:
    """Every head begins with places of its own to look at. Whether a colour is that of the shape or
    of the background is a matter of order, which the usual small beginnings are slow to find."""
    from transformers import UMT5Config, UMT5EncoderModel

    encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=tokens,
            d_model=TEXT_WIDTH,
            d_kv=32,
            d_ff=256,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )
    for block in encoder.encoder.block:
        bias = block.layer[0].SelfAttention.relative_attention_bias
        torch.nn.init.normal_(bias.weight, std=2.0)
    return encoder


def make_vae() -> Any:
    """An eighth of the sides, half of the frames. Few wide layers on patches of four by four learn
    several times faster here than more narrow ones on finer patches."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=32,
        z_dim=CHANNELS,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        in_channels=48,
        out_channels=48,
        patch_size=4,
        scale_factor_temporal=2,
        scale_factor_spatial=8,
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
    )


def make_transformer() -> Any:
    """Six blocks; how they begin is a page of its own."""
    from diffusers import WanTransformer3DModel

    transformer = WanTransformer3DModel(
        num_attention_heads=8,
        attention_head_dim=32,
        num_layers=6,
        ffn_dim=512,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=128,
    )
    begin(transformer)
    return transformer


@dataclass
class Parts:
    tokenizer: Any
    text_encoder: Any
    vae: Any
    transformer: Any

    @classmethod
    def fresh(cls, seed: int) -> Parts:
        torch.manual_seed(seed)
        tokenizer = make_tokenizer()
        return cls(tokenizer, make_text_encoder(len(tokenizer)), make_vae(), make_transformer())

    def save(self, folder: Path) -> None:
        """A repository as WanPipeline reads it, in bf16; the parts stay as they are."""
        from diffusers import UniPCMultistepScheduler, WanPipeline

        pipeline = WanPipeline(
            tokenizer=self.tokenizer,
            text_encoder=copy.deepcopy(self.text_encoder),
            vae=copy.deepcopy(self.vae),
            transformer=copy.deepcopy(self.transformer),
            scheduler=UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0
            ),
        )
        pipeline.to(torch.bfloat16).save_pretrained(folder, safe_serialization=True)


class Reader:
    """Sentences to what the transformer attends to.

    The pipeline pads every prompt with zeros to `PADDED` tokens. All zeros are one token here, with
    the logarithm of their number added to its score: the same sums with a tenth of the work.
    """

    def __init__(self, tokenizer: Any, text_encoder: Any) -> None:
        self._tokenizer, self._encoder = tokenizer, text_encoder

    def __call__(self, sentences: list[str]) -> tuple[Tensor, Tensor]:
        """Tokens [B, L + 1, width] and what is added to their scores, [B, 1, 1, L + 1]."""
        read = self._tokenizer(sentences, padding=True, return_tensors="pt")
        device = next(self._encoder.parameters()).device
        ids, mask = read["input_ids"].to(device), read["attention_mask"].to(device)
        hidden = self._encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        hidden = hidden * mask[..., None]
        tokens = torch.cat([hidden, hidden.new_zeros(len(sentences), 1, TEXT_WIDTH)], dim=1)
        score = torch.where(mask.bool(), 0.0, -torch.inf)
        zeros = (PADDED - mask.sum(dim=1, keepdim=True)).log()
        return tokens, torch.cat([score, zeros], dim=1)[:, None, None, :]


class Attention:
    """The processor of every attention while training. Sums of so few tokens are faster in plain
    steps than fused, backwards most of all. Attention to the text adds `scores`."""

    def __init__(self) -> None:
        self.scores: Tensor | None = None

    def __call__(
        self, attn: Any, hidden_states: Tensor, text: Tensor | None, _mask: None, turns: Any
    ) -> Tensor:
        source = hidden_states if text is None else text
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        key = attn.norm_k(attn.to_k(source)).unflatten(2, (attn.heads, -1))
        value = attn.to_v(source).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        if turns is not None:
            query, key = _turned(query, *turns), _turned(key, *turns)
        scale = query.shape[-1] ** -0.5
        weights = (query * scale).transpose(1, 2) @ key.permute(0, 2, 3, 1)
        if text is not None:
            assert self.scores is not None
            weights = weights + self.scores.to(weights.dtype)
        out = (weights.softmax(dim=-1).to(value.dtype) @ value).transpose(1, 2).flatten(2)
        done: Tensor = attn.to_out[1](attn.to_out[0](out))
        return done


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Every pair of neighbours turned by its angle; `cos` and `sin` hold each angle twice."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    turned = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)


def attend_plainly(transformer: Any) -> Attention:
    processor = Attention()
    for block in transformer.blocks:
        block.attn1.processor = block.attn2.processor = processor
    return processor
