"""FLUX.2: names of Black Forest Labs' code; its single blocks are fused in diffusers, too."""

from __future__ import annotations

from sgl_diffusion.loader.adapters.families.flux import IMAGE_QKV, TEXT_QKV
from sgl_diffusion.loader.adapters.names import Family, Layer, table

_BLOCK, _SINGLE = "transformer_blocks.{i}", "single_transformer_blocks.{i}"

_LAYERS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "double_blocks.{i}.img_attn.proj": f"{_BLOCK}.attn.to_out.0",
    "double_blocks.{i}.txt_attn.proj": f"{_BLOCK}.attn.to_add_out",
    "double_blocks.{i}.img_mlp.0": f"{_BLOCK}.ff.linear_in",
    "double_blocks.{i}.img_mlp.2": f"{_BLOCK}.ff.linear_out",
    "double_blocks.{i}.txt_mlp.0": f"{_BLOCK}.ff_context.linear_in",
    "double_blocks.{i}.txt_mlp.2": f"{_BLOCK}.ff_context.linear_out",
    "single_blocks.{i}.linear1": f"{_SINGLE}.attn.to_qkv_mlp_proj",
    "single_blocks.{i}.linear2": f"{_SINGLE}.attn.to_out",
}

# Some exports cut the first letters off.
_CUT = {
    f"sformer_blocks.{{i}}.{name}": f"{_BLOCK}.{name}"
    for name in (
        *(f"attn.to_{part}" for part in ("q", "k", "v", "out.0", "add_out")),
        *(f"attn.add_{part}_proj" for part in "qkv"),
        *(f"{stream}.linear_{end}" for stream in ("ff", "ff_context") for end in ("in", "out")),
    )
}

FLUX2 = Family(
    "FLUX.2",
    (
        *table(_LAYERS),
        Layer("double_blocks.{i}.img_attn.qkv", IMAGE_QKV, (1, 1, 1)),
        Layer("double_blocks.{i}.txt_attn.qkv", TEXT_QKV, (1, 1, 1)),
        # Shift before scale here, scale before shift in diffusers.
        Layer("final_layer.adaLN_modulation.1", ("norm_out.linear",), swap="halves"),
        *table(_CUT),
    ),
    native="BFL",
)
