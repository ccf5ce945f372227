"""Qwen-Image: the original names are those of diffusers; only flat ones need the list."""

from __future__ import annotations

from sgl_diffusion.loader.adapters.names import Family

_BLOCK = (
    *(f"attn.to_{part}" for part in ("q", "k", "v", "out.0", "add_out")),
    *(f"attn.add_{part}_proj" for part in "qkv"),
    *(f"{stream}_mlp.net.{end}" for stream in ("img", "txt") for end in ("0.proj", "2")),
    *(f"{stream}_mod.1" for stream in ("img", "txt")),
)

QWEN_IMAGE = Family(
    "Qwen-Image",
    own=(
        "img_in",
        "txt_in",
        "time_text_embed.timestep_embedder.linear_1",
        "time_text_embed.timestep_embedder.linear_2",
        "norm_out.linear",
        "proj_out",
        *(f"transformer_blocks.{{i}}.{name}" for name in _BLOCK),
    ),
)
