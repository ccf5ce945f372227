"""Stable Diffusion 3: names of Stability's code, which kohya and ComfyUI files use."""

from __future__ import annotations

from sgl_diffusion.loader.adapters.names import Family, Layer, table

_BLOCK, _NATIVE = "transformer_blocks.{i}", "joint_blocks.{i}"

_LAYERS = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
    f"{_NATIVE}.x_block.attn.proj": f"{_BLOCK}.attn.to_out.0",
    f"{_NATIVE}.x_block.attn2.proj": f"{_BLOCK}.attn2.to_out.0",
    f"{_NATIVE}.x_block.mlp.fc1": f"{_BLOCK}.ff.net.0.proj",
    f"{_NATIVE}.x_block.mlp.fc2": f"{_BLOCK}.ff.net.2",
    f"{_NATIVE}.x_block.adaLN_modulation.1": f"{_BLOCK}.norm1.linear",
    f"{_NATIVE}.context_block.attn.proj": f"{_BLOCK}.attn.to_add_out",
    f"{_NATIVE}.context_block.mlp.fc1": f"{_BLOCK}.ff_context.net.0.proj",
    f"{_NATIVE}.context_block.mlp.fc2": f"{_BLOCK}.ff_context.net.2",
}


def _qkv(source: str, module: str) -> Layer:
    return Layer(source, tuple(module.replace("?", part) for part in "qkv"), (1, 1, 1))


SD3 = Family(
    "Stable Diffusion 3",
    (
        *table(_LAYERS),
        _qkv(f"{_NATIVE}.x_block.attn.qkv", f"{_BLOCK}.attn.to_?"),
        _qkv(f"{_NATIVE}.x_block.attn2.qkv", f"{_BLOCK}.attn2.to_?"),
        _qkv(f"{_NATIVE}.context_block.attn.qkv", f"{_BLOCK}.attn.add_?_proj"),
        # The last block has only shift and scale here, and diffusers has them the other way round.
        Layer(
            f"{_NATIVE}.context_block.adaLN_modulation.1",
            (f"{_BLOCK}.norm1_context.linear",),
            swap="narrow",
        ),
        Layer("final_layer.adaLN_modulation.1", ("norm_out.linear",), swap="halves"),
    ),
    own=("context_embedder",),
    native="Stability",
    prefixes={
        "lora_te_": "text_encoder",
        "lora_te1_": "text_encoder",
        "lora_te2_": "text_encoder_2",
        "lora_te3_": "text_encoder_3",
        "text_encoders.clip_l.transformer.": "text_encoder",
        "text_encoders.clip_g.transformer.": "text_encoder_2",
        "text_encoders.t5xxl.transformer.": "text_encoder_3",
    },
)
