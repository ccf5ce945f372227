"""From the parameter names of Qwen-Image checkpoints in diffusers format to those of
models/qwen_image.py."""

from __future__ import annotations

from sgl_diffusion.loader.rules import Rule, Rules

_THEIRS = "transformer_blocks.{i}."


def _stream(ours: str, prefix: str, qkv: tuple[str, str, str], out: str, norm: str) -> list[Rule]:
    target = f"blocks.{{i}}.{ours}."
    return [
        Rule(f"{_THEIRS}{prefix}_mod.1", f"{target}modulation"),
        *(
            Rule(f"{_THEIRS}attn.{name}", f"{target}to_qkv", segment=segment)
            for name, segment in zip(qkv, "qkv", strict=True)
        ),
        Rule(f"{_THEIRS}attn.{norm}q", f"{target}norm_q"),
        Rule(f"{_THEIRS}attn.{norm}k", f"{target}norm_k"),
        Rule(f"{_THEIRS}attn.{out}", f"{target}to_out"),
        Rule(f"{_THEIRS}{prefix}_mlp.net.0.proj", f"{target}mlp.linear_1"),
        Rule(f"{_THEIRS}{prefix}_mlp.net.2", f"{target}mlp.linear_2"),
    ]


RULES = Rules(
    Rule("time_text_embed.timestep_embedder.{layer}", "time_embedder.{layer}"),
    *_stream("image", "img", ("to_q", "to_k", "to_v"), "to_out.0", "norm_"),
    *_stream(
        "text", "txt", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "norm_added_"
    ),
    Rule("norm_out.linear", "norm_out"),
)
