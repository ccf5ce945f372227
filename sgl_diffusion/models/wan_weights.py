"""From the parameter names of Wan checkpoints to those of models/wan.py: diffusers' names, and the
authors' own, in which files of ComfyUI and other tools are published."""

from __future__ import annotations

from sgl_diffusion.loader.rules import Rule, Rules

ORIGINAL = Rules(
    Rule("patch_embedding", "patch_embedding", flatten=True),
    Rule("time_embedding.0", "time_embedder.linear_1"),
    Rule("time_embedding.2", "time_embedder.linear_2"),
    Rule("time_projection.1", "time_proj"),
    Rule("text_embedding.0", "text_embedder.linear_1"),
    Rule("text_embedding.2", "text_embedder.linear_2"),
    Rule("img_emb.proj.0", "image_embedder.norm1"),
    Rule("img_emb.proj.1", "image_embedder.linear_1"),
    Rule("img_emb.proj.3", "image_embedder.linear_2"),
    Rule("img_emb.proj.4", "image_embedder.norm2"),
    Rule("img_emb", "image_embedder"),
    *(Rule(f"blocks.{{i}}.self_attn.{s}", "blocks.{i}.attn1.to_qkv", segment=s) for s in "qkv"),
    Rule("blocks.{i}.self_attn.norm_{which}", "blocks.{i}.attn1.norm_{which}"),
    Rule("blocks.{i}.self_attn.o", "blocks.{i}.attn1.to_out"),
    Rule("blocks.{i}.norm3", "blocks.{i}.norm2"),
    Rule("blocks.{i}.cross_attn.q", "blocks.{i}.attn2.to_q"),
    *(Rule(f"blocks.{{i}}.cross_attn.{s}", "blocks.{i}.attn2.to_kv", segment=s) for s in "kv"),
    Rule("blocks.{i}.cross_attn.k_img", "blocks.{i}.attn2.to_image_kv", segment="k"),
    Rule("blocks.{i}.cross_attn.v_img", "blocks.{i}.attn2.to_image_kv", segment="v"),
    Rule("blocks.{i}.cross_attn.norm_k_img", "blocks.{i}.attn2.norm_image_k"),
    Rule("blocks.{i}.cross_attn.norm_{which}", "blocks.{i}.attn2.norm_{which}"),
    Rule("blocks.{i}.cross_attn.o", "blocks.{i}.attn2.to_out"),
    Rule("blocks.{i}.ffn.0", "blocks.{i}.ffn.linear_1"),
    Rule("blocks.{i}.ffn.2", "blocks.{i}.ffn.linear_2"),
    Rule("head.head", "proj_out"),
    Rule("head", ""),
    leaves={"modulation": "scale_shift_table", "emb_pos": "pos_embed"},
)

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
    others=[ORIGINAL],
)
