"""Where components are while they do not work: on the device, or in the memory of the host."""

from __future__ import annotations

import torch

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.errors import ConfigError

OPTIONS = ("text_encoder_cpu_offload", "vae_cpu_offload", "dit_layerwise_offload", "pin_cpu_memory")


def check_offload(options: EngineOptions, device: torch.device) -> str:
    """What there is to say of the options that were given; raises if they cannot be followed."""
    asked = [name for name in OPTIONS if getattr(options, name)]
    if not asked:
        return ""
    flags = ", ".join("--" + name.replace("_", "-") for name in asked)
    if device.type == "cpu":
        return f"{flags}: the model runs on the CPU, so there is nothing to move"
    raise ConfigError(
        f"{flags}: this version keeps the whole model on the GPU.",
        hint="Leave these options out; --dit-precision bf16 and --num-gpus make it smaller.",
        param=asked[0],
    )
