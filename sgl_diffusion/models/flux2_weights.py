"""From the names of FLUX.2 checkpoints in diffusers format to those of models/flux2.py."""

from __future__ import annotations

from sgl_diffusion.loader.rules import Rule, Rules

_DOUBLE = "transformer_blocks.{i}."
_SINGLE = "single_transformer_blocks.{i}.attn."


def _stream(ours: str, suffix: str, qkv: tuple[str, str, str], out: str, norm: str) -> list[Rule]:
    """One stream of a double block; the checkpoint marks those of the text."""
    target = f"double_blocks.{{i}}.{ours}."
    return [
        *(
            Rule(f"{_DOUBLE}attn.{name}", f"{target}to_qkv", segment=segment)
            for name, segment in zip(qkv, "qkv", strict=True)
        ),
        Rule(f"{_DOUBLE}attn.{norm}q", f"{target}norm_q"),
        Rule(f"{_DOUBLE}attn.{norm}k", f"{target}norm_k"),
        Rule(f"{_DOUBLE}attn.{out}", f"{target}to_out"),
        Rule(f"{_DOUBLE}ff{suffix}.linear_in", f"{target}linear_in"),
        Rule(f"{_DOUBLE}ff{suffix}.linear_out", f"{target}linear_out"),
    ]


RULES = Rules(
    Rule("time_guidance_embed.timestep_embedder.{layer}", "time_embedder.{layer}"),
    Rule("time_guidance_embed.guidance_embedder.{layer}", "guidance_embedder.{layer}"),
    Rule("double_stream_modulation_img.linear", "image_modulation"),
    Rule("double_stream_modulation_txt.linear", "text_modulation"),
    Rule("single_stream_modulation.linear", "single_modulation"),
    *_stream("image", "", ("to_q", "to_k", "to_v"), "to_out.0", "norm_"),
    *_stream(
        "text",
        "_context",
        ("add_q_proj", "add_k_proj", "add_v_proj"),
        "to_add_out",
        "norm_added_",
    ),
    Rule(f"{_SINGLE}to_qkv_mlp_proj", "single_blocks.{i}.to_qkv_mlp"),
    Rule(f"{_SINGLE}norm_q", "single_blocks.{i}.norm_q"),
    Rule(f"{_SINGLE}norm_k", "single_blocks.{i}.norm_k"),
    Rule(f"{_SINGLE}to_out", "single_blocks.{i}.to_out"),
    Rule("norm_out.linear", "norm_out"),
)
