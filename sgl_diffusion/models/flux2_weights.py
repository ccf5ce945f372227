"""From the names of FLUX.2 checkpoints to those of models/flux2.py: diffusers' names, and the
authors' own, in which single files are published."""

from __future__ import annotations

from sgl_diffusion.loader.rules import ALL, Rule, Rules

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


def _original_stream(theirs: str, ours: str) -> list[Rule]:
    source, target = f"double_blocks.{{i}}.{theirs}_", f"double_blocks.{{i}}.{ours}."
    return [
        Rule(f"{source}attn.qkv", f"{target}to_qkv", segment=ALL),
        Rule(f"{source}attn.norm.query_norm", f"{target}norm_q"),
        Rule(f"{source}attn.norm.key_norm", f"{target}norm_k"),
        Rule(f"{source}attn.proj", f"{target}to_out"),
        Rule(f"{source}mlp.0", f"{target}linear_in"),
        Rule(f"{source}mlp.2", f"{target}linear_out"),
    ]


ORIGINAL = Rules(
    Rule("img_in", "x_embedder"),
    Rule("txt_in", "context_embedder"),
    Rule("time_in.in_layer", "time_embedder.linear_1"),
    Rule("time_in.out_layer", "time_embedder.linear_2"),
    Rule("guidance_in.in_layer", "guidance_embedder.linear_1"),
    Rule("guidance_in.out_layer", "guidance_embedder.linear_2"),
    Rule("double_stream_modulation_img.lin", "image_modulation"),
    Rule("double_stream_modulation_txt.lin", "text_modulation"),
    Rule("single_stream_modulation.lin", "single_modulation"),
    *_original_stream("img", "image"),
    *_original_stream("txt", "text"),
    Rule("single_blocks.{i}.linear1", "single_blocks.{i}.to_qkv_mlp"),
    Rule("single_blocks.{i}.norm.query_norm", "single_blocks.{i}.norm_q"),
    Rule("single_blocks.{i}.norm.key_norm", "single_blocks.{i}.norm_k"),
    Rule("single_blocks.{i}.linear2", "single_blocks.{i}.to_out"),
    # Shift before scale; ours is scale before shift.
    Rule("final_layer.adaLN_modulation.1", "norm_out", swap="halves"),
    Rule("final_layer.linear", "proj_out"),
    leaves={"scale": "weight"},
)

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
    others=[ORIGINAL],
)
