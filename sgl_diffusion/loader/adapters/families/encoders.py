"""Text encoders of transformers: CLIP with the names of three conventions, and T5."""

from __future__ import annotations

from sgl_diffusion.loader.adapters.names import Family, table

_LAYER = "text_model.encoder.layers.{i}"
_T5 = "encoder.block.{i}.layer.{j}"

ENCODER = Family(
    "text encoder",
    table(
        {
            # What diffusers wrote before it used PEFT.
            f"{_LAYER}.self_attn.to_{part}_lora": f"{_LAYER}.self_attn.{part}_proj"
            for part in ("q", "k", "v", "out")
        }
    ),
    own=(
        *(f"{_LAYER}.self_attn.{part}_proj" for part in ("q", "k", "v", "out")),
        f"{_LAYER}.mlp.fc1",
        f"{_LAYER}.mlp.fc2",
        "text_projection",
        *(f"{_T5}.SelfAttention.{part}" for part in "qkvo"),
        *(f"{_T5}.DenseReluDense.{part}" for part in ("wi", "wi_0", "wi_1", "wo")),
    ),
    native="diffusers",
)
