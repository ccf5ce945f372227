"""From the parameter names of Z-Image checkpoints to those of models/z_image.py and
z_image_omni.py: diffusers' names, and those of the single files that other tools use."""

from __future__ import annotations

from collections.abc import Callable

from sgl_diffusion.loader.rules import ALL, Rule, Rules


def _attention(block: str) -> list[Rule]:
    return [
        *(Rule(f"{block}attention.to_{s}", f"{block}to_qkv", segment=s) for s in "qkv"),
        Rule(f"{block}attention.norm_q", f"{block}norm_q"),
        Rule(f"{block}attention.norm_k", f"{block}norm_k"),
        Rule(f"{block}attention.to_out.0", f"{block}to_out"),
    ]


def _original_attention(block: str) -> list[Rule]:
    return [
        Rule(f"{block}attention.qkv", f"{block}to_qkv", segment=ALL),
        Rule(f"{block}attention.q_norm", f"{block}norm_q"),
        Rule(f"{block}attention.k_norm", f"{block}norm_k"),
        Rule(f"{block}attention.out", f"{block}to_out"),
    ]


def _blocks(stack: str, attention: Callable[[str], list[Rule]]) -> list[Rule]:
    theirs = ours = f"{stack}.{{i}}."
    return [
        Rule(f"{theirs}adaLN_modulation.0", f"{ours}modulation"),
        *attention(ours),
        Rule(f"{theirs}feed_forward.w1", f"{ours}w13", segment="w1"),
        Rule(f"{theirs}feed_forward.w3", f"{ours}w13", segment="w3"),
        Rule(f"{theirs}feed_forward.w2", f"{ours}w2"),
    ]


def _rest(attention: Callable[[str], list[Rule]]) -> list[Rule]:
    return [
        Rule("t_embedder.mlp.0", "t_embedder.linear_1"),
        Rule("t_embedder.mlp.2", "t_embedder.linear_2"),
        Rule("cap_embedder.0", "cap_norm"),
        Rule("cap_embedder.1", "cap_embedder"),
        Rule("siglip_embedder.0", "siglip_norm"),
        Rule("siglip_embedder.1", "siglip_embedder"),
        *_blocks("siglip_refiner", attention),
        *_blocks("noise_refiner", attention),
        *_blocks("context_refiner", attention),
        *_blocks("layers", attention),
    ]


ORIGINAL = Rules(
    Rule("final_layer.adaLN_modulation.1", "final_modulation"),
    Rule("final_layer.linear", "final_layer"),
    *_rest(_original_attention),
    ignore=("norm_final",),
)

RULES = Rules(
    Rule("all_x_embedder.2-1", "x_embedder"),
    Rule("all_final_layer.2-1.adaLN_modulation.1", "final_modulation"),
    Rule("all_final_layer.2-1.linear", "final_layer"),
    *_rest(_attention),
    others=[ORIGINAL],
)
