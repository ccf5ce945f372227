"""Where the model runs and in which precision: the names of the options, as torch objects.

torch is imported inside the functions: the server and the command line import this module, too.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sgl_diffusion.base.errors import ConfigError
from sgl_diffusion.base.registry import suggest

if TYPE_CHECKING:
    import torch

DRIVER_FILE = Path("/proc/driver/nvidia/version")
_TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def pick_device(name: str) -> torch.device:
    """`auto` (the first GPU if there is one), `cpu`, `cuda` or `cuda:1`."""
    import torch

    kind, _, index = name.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and (kind != "cuda" or not index.isdecimal())):
        raise ConfigError(
            f"There is no device {name!r}.", hint=suggest(name, ("auto", "cpu", "cuda"))
        )
    if kind == "cpu" or (kind == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        why = "this torch is built without CUDA"
        if torch.version.cuda is not None:
            why = "torch finds no usable GPU"
        raise ConfigError(f"Device {name!r} cannot be used: {why}.", hint="Use --device cpu.")
    device = torch.device("cuda", int(index or 0))
    if int(index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"Device {name!r} cannot be used: there are {torch.cuda.device_count()} GPUs.",
            hint=f"The last one is cuda:{torch.cuda.device_count() - 1}.",
        )
    return device


def nvidia_driver(file: Path = DRIVER_FILE) -> str | None:
    """The version of the driver; None where there is none."""
    try:
        words = file.read_text().split()
    except OSError:
        return None
    return next((word for word in words if word[0].isdigit() and "." in word), "of unknown version")


def unused_gpu(name: str, file: Path = DRIVER_FILE) -> str:
    """What to say where `auto` takes the CPU though there is a driver for a GPU; "" otherwise."""
    import torch

    driver = nvidia_driver(file)
    if name != "auto" or driver is None or torch.cuda.is_available():
        return ""
    why = "this torch is for CPUs only"
    if torch.version.cuda is not None:
        why = f"torch for CUDA {torch.version.cuda} finds no GPU"
    return (
        f"There is an NVIDIA driver {driver}, but {why}: running on the CPU. "
        "`sglang doctor` says how to mend it; --device cpu means it so."
    )


def pick_dtype(name: str, device: torch.device, *, auto: str = "") -> torch.dtype:
    """The dtype of a precision name.

    `auto` means what the component asks for (`auto="fp32"`), else fp32 on the CPU, bf16 on a GPU,
    and fp16 on a GPU that is older than bf16 (below sm_80).
    """
    import torch

    if name == "auto":
        name = auto
        if not name and device.type == "cpu":
            name = "fp32"
        elif not name:
            name = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    if name not in _TORCH_NAMES:
        raise ConfigError(
            f"There is no precision {name!r}.", hint=suggest(name, ("auto", *_TORCH_NAMES))
        )
    dtype: torch.dtype = getattr(torch, _TORCH_NAMES[name])
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """The precision name of a dtype: "bf16" for torch.bfloat16."""
    torch_name = str(dtype).removeprefix("torch.")
    for name, known in _TORCH_NAMES.items():
        if known == torch_name:
            return name
    raise AssertionError(f"{dtype} is no precision of this package")
