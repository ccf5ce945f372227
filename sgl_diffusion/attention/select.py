"""The choice of an attention backend by name."""

from __future__ import annotations

import torch

from sgl_diffusion.attention.base import AttentionBackend
from sgl_diffusion.attention.flash import FlashBackend
from sgl_diffusion.attention.native import NativeBackend, TritonBackend
from sgl_diffusion.attention.sdpa import SdpaBackend
from sgl_diffusion.base.errors import ConfigError
from sgl_diffusion.base.log import get_logger
from sgl_diffusion.base.registry import Registry, suggest

AUTO = "auto"

# "auto" tries them in this order.
BACKENDS: Registry[AttentionBackend] = Registry(
    "attention backend",
    {
        "flash": FlashBackend(),
        "native": NativeBackend(),
        "triton": TritonBackend(),
        "sdpa": SdpaBackend(),
    },
)

_log = get_logger(__name__)


def select(
    name: str,
    *,
    device: torch.device,
    head_dim: int,
    dtype: torch.dtype,
    needs_lse: bool = False,
) -> AttentionBackend:
    """The backend called `name`, or with "auto" the first that supports the case.

    A backend asked for by name works or raises; only "auto" may pass one over, and says so in one
    log line.
    """
    if name != AUTO and name not in BACKENDS:
        raise ConfigError(
            f"There is no attention backend {name!r}.",
            hint=suggest(name, [AUTO, *BACKENDS]),
            param="attention_backend",
        )
    reasons: dict[str, str] = {}
    for candidate in BACKENDS if name == AUTO else [name]:
        backend = BACKENDS.get(candidate)
        reason = backend.supports(device, head_dim, dtype, needs_lse)
        if reason is None and name == AUTO:
            reason = backend.unproven(device) or (None if needs_lse else backend.slower(device))
        if reason is None:
            passed_over = "".join(f"; not {other}: {why}" for other, why in reasons.items())
            _log.info("attention backend %s%s", candidate, passed_over)
            return backend
        reasons[candidate] = reason
    raise ConfigError(
        "Attention cannot run: "
        + "; ".join(f"{other}: {why}" for other, why in reasons.items())
        + ".",
        hint=f"Use --attention-backend {AUTO}." if name != AUTO else "",
        param="attention_backend",
    )
