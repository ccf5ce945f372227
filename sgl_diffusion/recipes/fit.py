"""Whether a model's weights fit into the memory, before anything is loaded."""

from __future__ import annotations

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.device import dtype_name, pick_device, pick_dtype
from sgl_diffusion.base.errors import OutOfMemoryError
from sgl_diffusion.base.memory import free_memory
from sgl_diffusion.loader.index import ModelIndex
from sgl_diffusion.loader.sizes import weight_count

# By how the names of components begin: the option that says their precision.
_PRECISIONS = {
    "transformer": "dit_precision",
    "unet": "dit_precision",
    "vae": "vae_precision",
    "text_encoder": "text_encoder_precision",
    "image_encoder": "text_encoder_precision",
}


def weight_bytes(
    index: ModelIndex, options: EngineOptions, *, whole: bool = False
) -> dict[str, int]:
    """Bytes of each component with weights; `whole` is the fallback, which has one precision."""
    device = pick_device(options.device)
    sizes = {}
    for name, part in index.components.items():
        option = next((_PRECISIONS[start] for start in _PRECISIONS if name.startswith(start)), None)
        if option is None or not part.folder.is_dir():
            continue
        precision = options.dit_precision if whole else getattr(options, option)
        sizes[name] = weight_count(part) * pick_dtype(precision, device).itemsize
    return sizes


def check_fits(index: ModelIndex, options: EngineOptions, *, whole: bool = False) -> None:
    """Refuse a model whose weights alone are larger than the memory that is free."""
    device = pick_device(options.device)
    free = free_memory(device)
    sizes = weight_bytes(index, options, whole=whole)
    need = sum(sizes.values())
    if free is None or need <= free:
        return
    parts = ", ".join(
        f"{name} {size / 1e9:.1f}"
        for name, size in sorted(sizes.items(), key=lambda item: -item[1])
    )
    precision = dtype_name(pick_dtype(options.dit_precision, device))
    smaller = "lower precisions (--dit-precision bf16 --text-encoder-precision bf16)"
    raise OutOfMemoryError(
        f"The weights of {index.pipeline} take {need / 1e9:.1f} GB ({parts}; the transformer in "
        f"{precision}), and {device.type} has {free / 1e9:.1f} GB free.",
        hint=f"Use {smaller if precision == 'fp32' else 'a smaller model'}, or a device with more "
        "memory.",
    )
