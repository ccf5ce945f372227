"""The choice of an attention backend by name."""

from __future__ import annotations

import torch
from torch import Tensor

from sgl_diffusion.attention.base import AttendRepeated, AttentionBackend
from sgl_diffusion.attention.flash import FlashBackend
from sgl_diffusion.attention.native import NativeBackend, TritonBackend
from sgl_diffusion.attention.packed import RowLengths, one_by_one
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


class ByLength:
    """What "auto" takes where a backend loses to sdpa in calls with few queries."""

    def __init__(self, long: AttentionBackend, short: AttentionBackend, least: int) -> None:
        self.name, self._long, self._short, self._least = long.name, long, short, least
        self.supports, self.unproven, self.slower = long.supports, long.unproven, long.slower

    def least_queries(self, device: torch.device, dtype: torch.dtype) -> int:
        return 0

    def repeated(self, device: torch.device) -> AttendRepeated | None:
        return self._short.repeated(device)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
        backend = self._long if q.shape[1] >= self._least else self._short
        return backend.forward(q, k, v, scale=scale)

    def forward_packed(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: RowLengths, *, scale: float | None = None
    ) -> Tensor:
        if min(lengths.queries) < self._least:
            return one_by_one(self.forward, q, k, v, lengths, scale)
        return self._long.forward_packed(q, k, v, lengths, scale=scale)


def select(
    name: str,
    *,
    device: torch.device,
    head_dim: int,
    dtype: torch.dtype,
    needs_lse: bool = False,
) -> AttentionBackend:
    """The backend called `name`, or with "auto" the first that supports the case and is fast.

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
            reason = backend.unproven(device) or (
                None if needs_lse else backend.slower(device, dtype)
            )
        if reason is None:
            passed_over = "".join(f"; not {other}: {why}" for other, why in reasons.items())
            least = 0 if name != AUTO or needs_lse else backend.least_queries(device, dtype)
            some = f" from {least} queries, else sdpa" if least else ""
            _log.info("attention backend %s%s%s", candidate, some, passed_over)
            return ByLength(backend, BACKENDS.get("sdpa"), least) if least else backend
        reasons[candidate] = reason
    raise ConfigError(
        "Attention cannot run: "
        + "; ".join(f"{other}: {why}" for other, why in reasons.items())
        + ".",
        hint=f"Use --attention-backend {AUTO}." if name != AUTO else "",
        param="attention_backend",
    )
