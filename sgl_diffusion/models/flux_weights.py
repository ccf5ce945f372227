"""From the parameter names of FLUX.1 checkpoints in diffusers format to those of models/flux.py."""

from __future__ import annotations

from sgl_diffusion.loader.rules import Rule, Rules

_DOUBLE = "transformer_blocks.{i}."
_SINGLE = "single_transformer_blocks.{i}."


def _stream(ours: str, suffix: str, qkv: tuple[str, str, str], out: str, norm: str) -> list[Rule]:
    """One stream of a double block; the checkpoint marks those of the text."""
    target = f"double_blocks.{{i}}.{ours}."
    return [
        Rule(f"{_DOUBLE}norm1{suffix}.linear", f"{target}modulation"),
        *(
            Rule(f"{_DOUBLE}attn.{name}", f"{target}to_qkv", segment=segment)
            for name, segment in zip(qkv, "qkv", strict=True)
        ),
        Rule(f"{_DOUBLE}attn.{norm}q", f"{target}norm_q"),
        Rule(f"{_DOUBLE}attn.{norm}k", f"{target}norm_k"),
        Rule(f"{_DOUBLE}attn.{out}", f"{target}to_out"),
        Rule(f"{_DOUBLE}ff{suffix}.net.0.proj", f"{target}mlp.linear_1"),
        Rule(f"{_DOUBLE}ff{suffix}.net.2", f"{target}mlp.linear_2"),
    ]


RULES = Rules(
    Rule("time_text_embed.timestep_embedder.{layer}", "time_embedder.{layer}"),
    Rule("time_text_embed.guidance_embedder.{layer}", "guidance_embedder.{layer}"),
    Rule("time_text_embed.text_embedder.{layer}", "text_embedder.{layer}"),
    *_stream("image", "", ("to_q", "to_k", "to_v"), "to_out.0", "norm_"),
    *_stream(
        "text",
        "_context",
        ("add_q_proj", "add_k_proj", "add_v_proj"),
        "to_add_out",
        "norm_added_",
    ),
    Rule(f"{_SINGLE}norm.linear", "single_blocks.{i}.modulation"),
    Rule(f"{_SINGLE}attn.to_q", "single_blocks.{i}.to_qkv_mlp", segment="q"),
    Rule(f"{_SINGLE}attn.to_k", "single_blocks.{i}.to_qkv_mlp", segment="k"),
    Rule(f"{_SINGLE}attn.to_v", "single_blocks.{i}.to_qkv_mlp", segment="v"),
    Rule(f"{_SINGLE}proj_mlp", "single_blocks.{i}.to_qkv_mlp", segment="mlp"),
    Rule(f"{_SINGLE}attn.norm_q", "single_blocks.{i}.norm_q"),
    Rule(f"{_SINGLE}attn.norm_k", "single_blocks.{i}.norm_k"),
    Rule(f"{_SINGLE}proj_out", "single_blocks.{i}.to_out"),
    Rule("norm_out.linear", "norm_out"),
)
