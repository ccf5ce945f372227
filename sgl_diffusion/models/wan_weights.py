"""From the parameter names of Wan checkpoints in diffusers format to those of models/wan.py."""

from __future__ import annotations

from sgl_diffusion.loader.rules import Rule, Rules

RULES = Rules(
    # A convolution whose kernel equals its stride is a linear layer on patches.
    Rule("patch_embedding", "patch_embedding", flatten=True),
    Rule("condition_embedder.time_embedder.{layer}", "time_embedder.{layer}"),
    Rule("condition_embedder.time_proj", "time_proj"),
    Rule("condition_embedder.text_embedder.{layer}", "text_embedder.{layer}"),
    Rule("condition_embedder.image_embedder.ff.net.0.proj", "image_embedder.linear_1"),
    Rule("condition_embedder.image_embedder.ff.net.2", "image_embedder.linear_2"),
    Rule("condition_embedder.image_embedder.{norm}", "image_embedder.{norm}"),
    Rule("condition_embedder.image_embedder", "image_embedder"),
    Rule("blocks.{i}.attn1.to_q", "blocks.{i}.attn1.to_qkv", segment="q"),
    Rule("blocks.{i}.attn1.to_k", "blocks.{i}.attn1.to_qkv", segment="k"),
    Rule("blocks.{i}.attn1.to_v", "blocks.{i}.attn1.to_qkv", segment="v"),
    Rule("blocks.{i}.attn1.to_out.0", "blocks.{i}.attn1.to_out"),
    Rule("blocks.{i}.attn2.to_k", "blocks.{i}.attn2.to_kv", segment="k"),
    Rule("blocks.{i}.attn2.to_v", "blocks.{i}.attn2.to_kv", segment="v"),
    Rule("blocks.{i}.attn2.add_k_proj", "blocks.{i}.attn2.to_image_kv", segment="k"),
    Rule("blocks.{i}.attn2.add_v_proj", "blocks.{i}.attn2.to_image_kv", segment="v"),
    Rule("blocks.{i}.attn2.norm_added_k", "blocks.{i}.attn2.norm_image_k"),
    Rule("blocks.{i}.attn2.to_out.0", "blocks.{i}.attn2.to_out"),
    Rule("blocks.{i}.ffn.net.0.proj", "blocks.{i}.ffn.linear_1"),
    Rule("blocks.{i}.ffn.net.2", "blocks.{i}.ffn.linear_2"),
    # Some published files carry a norm of the image queries that no code reads.
    ignore=("blocks.{i}.attn2.norm_added_q",),
)
