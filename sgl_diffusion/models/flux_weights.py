"""From the parameter names of FLUX.1 checkpoints to those of models/flux.py: diffusers' names, and
the authors' own, in which flux1-dev.safetensors and files of other tools are published."""

from __future__ import annotations

from sgl_diffusion.loader.rules import ALL, Rule, Rules

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


def _original_stream(theirs: str, ours: str) -> list[Rule]:
    source, target = f"double_blocks.{{i}}.{theirs}_", f"double_blocks.{{i}}.{ours}."
    return [
        Rule(f"{source}mod.lin", f"{target}modulation"),
        Rule(f"{source}attn.qkv", f"{target}to_qkv", segment=ALL),
        Rule(f"{source}attn.norm.query_norm", f"{target}norm_q"),
        Rule(f"{source}attn.norm.key_norm", f"{target}norm_k"),
        Rule(f"{source}attn.proj", f"{target}to_out"),
        Rule(f"{source}mlp.0", f"{target}mlp.linear_1"),
        Rule(f"{source}mlp.2", f"{target}mlp.linear_2"),
    ]


def _original_embedder(theirs: str, ours: str) -> list[Rule]:
    return [
        Rule(f"{theirs}.in_layer", f"{ours}.linear_1"),
        Rule(f"{theirs}.out_layer", f"{ours}.linear_2"),
    ]


ORIGINAL = Rules(
    Rule("img_in", "x_embedder"),
    Rule("txt_in", "context_embedder"),
    *_original_embedder("time_in", "time_embedder"),
    *_original_embedder("guidance_in", "guidance_embedder"),
    *_original_embedder("vector_in", "text_embedder"),
    *_original_stream("img", "image"),
    *_original_stream("txt", "text"),
    Rule("single_blocks.{i}.modulation.lin", "single_blocks.{i}.modulation"),
    Rule("single_blocks.{i}.linear1", "single_blocks.{i}.to_qkv_mlp", segment=ALL),
    Rule("single_blocks.{i}.norm.query_norm", "single_blocks.{i}.norm_q"),
    Rule("single_blocks.{i}.norm.key_norm", "single_blocks.{i}.norm_k"),
    Rule("single_blocks.{i}.linear2", "single_blocks.{i}.to_out"),
    # Shift before scale; ours is scale before shift.
    Rule("final_layer.adaLN_modulation.1", "norm_out", swap="halves"),
    Rule("final_layer.linear", "proj_out"),
    leaves={"scale": "weight"},
)

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
    others=[ORIGINAL],
)
