"""FLUX.1: names of Black Forest Labs' code (kohya, ai-toolkit, ComfyUI) and of XLabs' trainer."""

from __future__ import annotations

from sgl_diffusion.loader.adapters.names import Family, Layer, table

# Also those of FLUX.2, where they have the same meaning.
ENCODER_PREFIXES = {
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_2",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.t5xxl.transformer.": "text_encoder_2",
}

_BLOCK, _SINGLE = "transformer_blocks.{i}", "single_transformer_blocks.{i}"
IMAGE_QKV = tuple(f"{_BLOCK}.attn.to_{part}" for part in "qkv")
TEXT_QKV = tuple(f"{_BLOCK}.attn.add_{part}_proj" for part in "qkv")
_SINGLE_QKV = tuple(f"{_SINGLE}.attn.to_{part}" for part in "qkv")

_LAYERS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "double_blocks.{i}.img_attn.proj": f"{_BLOCK}.attn.to_out.0",
    "double_blocks.{i}.txt_attn.proj": f"{_BLOCK}.attn.to_add_out",
    "double_blocks.{i}.img_mlp.0": f"{_BLOCK}.ff.net.0.proj",
    "double_blocks.{i}.img_mlp.2": f"{_BLOCK}.ff.net.2",
    "double_blocks.{i}.txt_mlp.0": f"{_BLOCK}.ff_context.net.0.proj",
    "double_blocks.{i}.txt_mlp.2": f"{_BLOCK}.ff_context.net.2",
    "double_blocks.{i}.img_mod.lin": f"{_BLOCK}.norm1.linear",
    "double_blocks.{i}.txt_mod.lin": f"{_BLOCK}.norm1_context.linear",
    "single_blocks.{i}.linear2": f"{_SINGLE}.proj_out",
    "single_blocks.{i}.modulation.lin": f"{_SINGLE}.norm.linear",
}

_XLABS = {
    "double_blocks.{i}.processor.proj_lora1": f"{_BLOCK}.attn.to_out.0",
    "double_blocks.{i}.processor.proj_lora2": f"{_BLOCK}.attn.to_add_out",
    "single_blocks.{i}.processor.proj_lora": f"{_SINGLE}.proj_out",
}

FLUX = Family(
    "FLUX.1",
    (
        *table(_LAYERS),
        Layer("double_blocks.{i}.img_attn.qkv", IMAGE_QKV, (1, 1, 1)),
        Layer("double_blocks.{i}.txt_attn.qkv", TEXT_QKV, (1, 1, 1)),
        # The hidden width of the mlp is four times that of the model.
        Layer("single_blocks.{i}.linear1", (*_SINGLE_QKV, f"{_SINGLE}.proj_mlp"), (1, 1, 1, 4)),
        # Shift before scale here, scale before shift in diffusers.
        Layer("final_layer.adaLN_modulation.1", ("norm_out.linear",), swap="halves"),
        *table(_XLABS),
        Layer("double_blocks.{i}.processor.qkv_lora1", IMAGE_QKV, (1, 1, 1)),
        Layer("double_blocks.{i}.processor.qkv_lora2", TEXT_QKV, (1, 1, 1)),
        Layer("single_blocks.{i}.processor.qkv_lora", _SINGLE_QKV, (1, 1, 1)),
    ),
    native="BFL",
    prefixes=ENCODER_PREFIXES,
)
