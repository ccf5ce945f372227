"""From the parameter names of SD3 checkpoints to those of models/sd3.py: diffusers' names, and the
authors' own, in which sd3_medium.safetensors and files of other tools are published."""

from __future__ import annotations

from sgl_diffusion.loader.rules import ALL, Rule, Rules

_THEIRS = "transformer_blocks.{i}."
_OURS = "blocks.{i}."


def _qkv(theirs: str, ours: str, names: tuple[str, str, str], norm: str) -> list[Rule]:
    return [
        *(
            Rule(f"{_THEIRS}{theirs}.{name}", f"{_OURS}{ours}.to_qkv", segment=segment)
            for name, segment in zip(names, "qkv", strict=True)
        ),
        Rule(f"{_THEIRS}{theirs}.{norm}q", f"{_OURS}{ours}.norm_q"),
        Rule(f"{_THEIRS}{theirs}.{norm}k", f"{_OURS}{ours}.norm_k"),
    ]


_SELF = ("to_q", "to_k", "to_v")
_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")


def _original_stream(theirs: str, ours: str) -> list[Rule]:
    source, target = f"joint_blocks.{{i}}.{theirs}.", f"{_OURS}{ours}."
    return [
        *_original_attention(f"{source}attn.", target),
        Rule(f"{source}mlp.fc1", f"{target}mlp.linear_1"),
        Rule(f"{source}mlp.fc2", f"{target}mlp.linear_2"),
    ]


def _original_attention(source: str, target: str) -> list[Rule]:
    return [
        Rule(f"{source}qkv", f"{target}to_qkv", segment=ALL),
        Rule(f"{source}ln_q", f"{target}norm_q"),
        Rule(f"{source}ln_k", f"{target}norm_k"),
        Rule(f"{source}proj", f"{target}to_out"),
    ]


ORIGINAL = Rules(
    Rule("", "position"),
    Rule("x_embedder.proj", "patch_embedding", flatten=True),
    Rule("t_embedder.mlp.0", "time_embedder.linear_1"),
    Rule("t_embedder.mlp.2", "time_embedder.linear_2"),
    Rule("y_embedder.mlp.0", "text_embedder.linear_1"),
    Rule("y_embedder.mlp.2", "text_embedder.linear_2"),
    Rule("joint_blocks.{i}.x_block.adaLN_modulation.1", f"{_OURS}image.modulation"),
    # Shift before scale; ours is scale before shift where nothing else is modulated.
    Rule(
        "joint_blocks.{i}.context_block.adaLN_modulation.1",
        f"{_OURS}text.modulation",
        swap="narrow",
    ),
    *_original_stream("x_block", "image"),
    *_original_stream("context_block", "text"),
    *_original_attention("joint_blocks.{i}.x_block.attn2.", f"{_OURS}attn2."),
    Rule("final_layer.adaLN_modulation.1", "norm_out", swap="halves"),
    Rule("final_layer.linear", "proj_out"),
)

RULES = Rules(
    # A convolution whose kernel equals its stride is a linear layer on patches.
    Rule("pos_embed.proj", "patch_embedding", flatten=True),
    Rule("pos_embed", "position"),
    Rule("time_text_embed.timestep_embedder.{layer}", "time_embedder.{layer}"),
    Rule("time_text_embed.text_embedder.{layer}", "text_embedder.{layer}"),
    Rule(f"{_THEIRS}norm1.linear", f"{_OURS}image.modulation"),
    Rule(f"{_THEIRS}norm1_context.linear", f"{_OURS}text.modulation"),
    *_qkv("attn", "image", _SELF, "norm_"),
    *_qkv("attn", "text", _ADDED, "norm_added_"),
    *_qkv("attn2", "attn2", _SELF, "norm_"),
    Rule(f"{_THEIRS}attn.to_out.0", f"{_OURS}image.to_out"),
    Rule(f"{_THEIRS}attn.to_add_out", f"{_OURS}text.to_out"),
    Rule(f"{_THEIRS}attn2.to_out.0", f"{_OURS}attn2.to_out"),
    Rule(f"{_THEIRS}ff.net.0.proj", f"{_OURS}image.mlp.linear_1"),
    Rule(f"{_THEIRS}ff.net.2", f"{_OURS}image.mlp.linear_2"),
    Rule(f"{_THEIRS}ff_context.net.0.proj", f"{_OURS}text.mlp.linear_1"),
    Rule(f"{_THEIRS}ff_context.net.2", f"{_OURS}text.mlp.linear_2"),
    Rule("norm_out.linear", "norm_out"),
    others=[ORIGINAL],
)
