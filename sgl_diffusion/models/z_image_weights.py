"""From the parameter names of Z-Image checkpoints in diffusers format to those of
models/z_image.py."""

from __future__ import annotations

from sgl_diffusion.loader.rules import Rule, Rules


def _blocks(stack: str) -> list[Rule]:
    theirs = ours = f"{stack}.{{i}}."
    return [
        Rule(f"{theirs}adaLN_modulation.0", f"{ours}modulation"),
        *(Rule(f"{theirs}attention.to_{s}", f"{ours}to_qkv", segment=s) for s in "qkv"),
        Rule(f"{theirs}attention.norm_q", f"{ours}norm_q"),
        Rule(f"{theirs}attention.norm_k", f"{ours}norm_k"),
        Rule(f"{theirs}attention.to_out.0", f"{ours}to_out"),
        Rule(f"{theirs}feed_forward.w1", f"{ours}w13", segment="w1"),
        Rule(f"{theirs}feed_forward.w3", f"{ours}w13", segment="w3"),
        Rule(f"{theirs}feed_forward.w2", f"{ours}w2"),
    ]


RULES = Rules(
    Rule("all_x_embedder.2-1", "x_embedder"),
    Rule("all_final_layer.2-1.adaLN_modulation.1", "final_modulation"),
    Rule("all_final_layer.2-1.linear", "final_layer"),
    Rule("t_embedder.mlp.0", "t_embedder.linear_1"),
    Rule("t_embedder.mlp.2", "t_embedder.linear_2"),
    Rule("cap_embedder.0", "cap_norm"),
    Rule("cap_embedder.1", "cap_embedder"),
    *_blocks("noise_refiner"),
    *_blocks("context_refiner"),
    *_blocks("layers"),
)
