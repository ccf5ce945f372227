"""Which device a rank of a replica gets."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.errors import ConfigError
from sgl_diffusion.distributed.layout import ranks_each

if TYPE_CHECKING:
    import torch


def pick_rank_device(options: EngineOptions, replica: int, rank: int) -> torch.device:
    """A GPU of its own, or the CPU's cores shared among all."""
    import torch

    from sgl_diffusion.base.device import pick_device

    device = pick_device(options.device)
    processes = options.num_gpus // options.nnodes
    if device.type == "cpu":
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, min(torch.get_num_threads(), cores // processes)))
        return device
    if processes > torch.cuda.device_count():
        raise ConfigError(
            f"{processes} ranks are to run here, on {torch.cuda.device_count()} GPUs.",
            hint="Use fewer, or --device cpu.",
            param="num_gpus",
        )
    own = torch.device("cuda", replica * ranks_each(options) + rank)
    torch.cuda.set_device(own)
    return own
