"""Z-Image: the original code has a fused qkv and shorter names for a few layers."""

from __future__ import annotations

from sgl_diffusion.loader.adapters.names import Family, Layer, table

_STACKS = tuple(f"{name}.{{i}}" for name in ("layers", "noise_refiner", "context_refiner"))

# `to.q` and `out` are spellings of one trainer.
_SPELLINGS = {
    f"{stack}.attention.{source}": f"{stack}.attention.{module}"
    for stack in _STACKS
    for source, module in (("out", "to_out.0"), *((f"to.{p}", f"to_{p}") for p in "qkv"))
}

Z_IMAGE = Family(
    "Z-Image",
    (
        *(
            Layer(
                f"{stack}.attention.qkv",
                tuple(f"{stack}.attention.to_{part}" for part in "qkv"),
                (1, 1, 1),
            )
            for stack in _STACKS
        ),
        *table(_SPELLINGS),
        *table(
            {
                "x_embedder": "all_x_embedder.2-1",
                "final_layer.linear": "all_final_layer.2-1.linear",
                "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
            }
        ),
    ),
    own=(
        "t_embedder.mlp.0",
        "t_embedder.mlp.2",
        "cap_embedder.1",
        *(f"{stack}.feed_forward.w{i}" for stack in _STACKS for i in (1, 2, 3)),
        *(f"{stack}.adaLN_modulation.0" for stack in _STACKS),
    ),
    # One trainer writes qkv and out beside to_q, to_k, to_v and to_out.0.
    redundant=True,
)
