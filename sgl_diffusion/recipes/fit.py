"""Whether a model's weights fit into the memory, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.device import dtype_name, pick_device, pick_dtype
from sgl_diffusion.base.errors import OutOfMemoryError
from sgl_diffusion.base.memory import memory_budget
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
        option = _precision(name)
        if option is None or not part.folder.is_dir():
            continue
        precision = options.dit_precision if whole else getattr(options, option)
        sizes[name] = weight_count(part) * pick_dtype(precision, device).itemsize
    return sizes


def check_fits(index: ModelIndex, options: EngineOptions, *, whole: bool = False) -> None:
    """Refuse a model whose weights alone are larger than the memory it may take."""
    device = pick_device(options.device)
    most = memory_budget(options.memory_budget, device)
    sizes = weight_bytes(index, options, whole=whole)
    need = sum(sizes.values())
    if most is None or need <= most:
        return
    largest = sorted(sizes.items(), key=lambda item: -item[1])
    parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in largest)
    precision = dtype_name(pick_dtype(options.dit_precision, device))
    there = f"{device.type} has {most / 1e9:.1f} GB for it"
    if options.memory_budget is not None:
        there = f"--memory-budget {options.memory_budget} leaves {most / 1e9:.1f} GB"
    raise OutOfMemoryError(
        f"The weights of {index.pipeline} take {need / 1e9:.1f} GB ({parts}; the transformer in "
        f"{precision}), and {there}.",
        hint=_advice(_savings(sizes, options, whole=whole), need - most),
    )


def _savings(
    sizes: Mapping[str, int], options: EngineOptions, *, whole: bool
) -> list[tuple[str, int]]:
    """Options that make weights smaller, and by how much; what saves most comes first."""
    device = pick_device(options.device)
    found: dict[str, int] = {}
    for name, size in sizes.items():
        option = "dit_precision" if whole else _precision(name)
        if option and pick_dtype(getattr(options, option), device).itemsize == 4:
            flag = f"--{option.replace('_', '-')} bf16"
            found[flag] = found.get(flag, 0) + size // 2
    return sorted(found.items(), key=lambda item: -item[1])


def _advice(savings: Sequence[tuple[str, int]], missing: int) -> str:
    """As many of the savings as it takes."""
    chosen = []
    for flag, saved in savings:
        chosen.append(f"{flag} (-{saved / 1e9:.1f} GB)")
        missing -= saved
        if missing <= 0:
            return f"Try {', '.join(chosen)}."
    if chosen:
        return f"Not even {' and '.join(chosen)} would do: use a smaller model, or more memory."
    return "Use a smaller model, or a device with more memory."


def _precision(name: str) -> str | None:
    """The option that says in which precision a component is; None for what has no weights."""
    return next((_PRECISIONS[start] for start in _PRECISIONS if name.startswith(start)), None)
