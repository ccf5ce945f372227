"""From the tensors of one layer to its changes: which kind, which scale, and whether they fit."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.loader.adapters.config import Config
from sgl_diffusion.loader.adapters.keys import shown
from sgl_diffusion.loader.adapters.types import Delta, Dora, FullDelta, Hada, Kron, LowRank

_HADA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


def changes(
    layer: str, parts: Mapping[str, Tensor], config: Config, alpha: float | None
) -> tuple[list[Delta], float | None]:
    """The changes of one layer, and the alpha they were scaled by.

    An alpha that is given wins over that of the layer in the file, and that over the one of the
    configuration; without any the scale is 1.
    """
    if alpha is None:
        alpha = _alpha(layer, parts["alpha"]) if "alpha" in parts else config.alpha_of(layer)
    deltas: list[Delta] = []
    change = _change(layer, parts)
    if change is not None:
        # Two whole LoKr factors show no rank: LyCORIS has no scale then, PEFT that of its options.
        rank = change.rank if "alpha" in parts else change.rank or config.rank_of(layer)
        scale = config.scale(alpha, rank)
        change = _scaled(change, scale)
        if "up_bias" in parts:
            deltas.append(FullDelta(parts["up_bias"], "bias", scale))
        deltas.append(_with_magnitude(layer, change, parts.get("magnitude")))
    elif set(parts) & {"magnitude", "up_bias"}:
        raise _broken(layer, "it has a magnitude or a bias, but no pair of factors")
    if "diff" in parts:
        value = parts["diff"]
        deltas.append(FullDelta(value.flatten(1) if value.ndim > 3 else value))
    if "diff_b" in parts:
        deltas.append(FullDelta(parts["diff_b"], "bias"))
    for delta in deltas:
        if isinstance(delta, FullDelta) and not delta.value.is_floating_point():
            raise _broken(layer, f"its values are {delta.value.dtype}")
    return deltas, alpha if change is not None else None


def _scaled(change: LowRank | Hada | Kron, scale: float) -> LowRank | Hada | Kron:
    if isinstance(change, LowRank):
        return LowRank(change.down, change.up, scale)
    if isinstance(change, Hada):
        return Hada(change.w1_a, change.w1_b, change.w2_a, change.w2_b, scale)
    return Kron(change.w1, change.w2, scale)


def _change(layer: str, parts: Mapping[str, Tensor]) -> LowRank | Hada | Kron | None:
    found: list[LowRank | Hada | Kron] = []
    if set(parts) & {"down", "up"}:
        found.append(_low_rank(layer, parts))
    if set(parts) & set(_HADA):
        found.append(_hada(layer, parts))
    if any(part.startswith("lokr_") for part in parts):
        found.append(_kron(layer, parts))
    if len(found) > 1:
        raise _broken(layer, f"it is both {found[0].kind} and {found[1].kind}")
    for tensor in (tensor for change in found for tensor in change.tensors):
        if not tensor.is_floating_point():
            raise _broken(layer, f"its values are {tensor.dtype}")
    return found[0] if found else None


def _low_rank(layer: str, parts: Mapping[str, Tensor]) -> LowRank:
    down, up = (_need(layer, parts, part) for part in ("down", "up"))
    if down.ndim < 2 or up.ndim < 2:
        raise _broken(layer, f"down is {_size(down)} and up is {_size(up)}")
    # A convolution: the kernel is in the lower factor, the upper one has 1 x 1.
    lower, upper = down.flatten(1), up.flatten(1)
    if upper.shape[1] != lower.shape[0] or lower.shape[0] == 0:
        raise _broken(layer, f"down {_size(down)} and up {_size(up)} do not make a product")
    return LowRank(lower.contiguous(), upper.contiguous())


def _hada(layer: str, parts: Mapping[str, Tensor]) -> Hada:
    a1, b1, a2, b2 = (_need(layer, parts, part) for part in _HADA)
    sizes = [tuple(factor.shape) for factor in (a1, b1, a2, b2)]
    fits = all(len(size) == 2 for size in sizes) and (
        a1.shape[1] == b1.shape[0]
        and a2.shape[1] == b2.shape[0]
        and (a1.shape[0], b1.shape[1]) == (a2.shape[0], b2.shape[1])
    )
    if not fits:
        raise _broken(layer, "its four LoHa factors do not fit together")
    return Hada(a1, b1, a2, b2)


def _kron(layer: str, parts: Mapping[str, Tensor]) -> Kron:
    factors = []
    for name in ("lokr_w1", "lokr_w2"):
        whole = name in parts
        if whole == bool({f"{name}_a", f"{name}_b"} & set(parts)):
            raise _broken(layer, f"{name} is needed either whole or as the pair _a and _b")
        names = (name,) if whole else (f"{name}_a", f"{name}_b")
        factor = tuple(_need(layer, parts, part) for part in names)
        # The second factor of a convolution holds its kernel.
        factor = (*factor[:-1], factor[-1].flatten(1) if factor[-1].ndim > 2 else factor[-1])
        if any(f.ndim != 2 for f in factor) or (
            len(factor) == 2 and factor[0].shape[1] != factor[1].shape[0]
        ):
            raise _broken(layer, f"the factors of {name} do not make a product")
        factors.append(factor)
    return Kron(factors[0], factors[1])


def _with_magnitude(layer: str, change: LowRank | Hada | Kron, magnitude: Tensor | None) -> Delta:
    if magnitude is None:
        return change
    lengths = magnitude.flatten()
    by_column = magnitude.ndim == 2 and magnitude.shape[0] == 1 < magnitude.shape[1]
    rows, columns = change.shape
    if lengths.numel() != (columns if by_column else rows):
        raise _broken(layer, f"its magnitude {_size(magnitude)} is not of {rows} x {columns}")
    return Dora(change, lengths[None] if by_column else lengths[:, None])


def _alpha(layer: str, value: Tensor) -> float:
    if value.numel() != 1:
        raise _broken(layer, f"its alpha is {_size(value)}, not one number")
    return float(value.item())


def _need(layer: str, parts: Mapping[str, Tensor], part: str) -> Tensor:
    if part not in parts:
        raise _broken(layer, f"{part} is missing")
    return parts[part]


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "one number"


def _broken(layer: str, why: str) -> RequestError:
    return RequestError(
        f"The layer {shown(layer)} of the adapter cannot be used: {why}.",
        hint="The file is incomplete or damaged; export or download it again.",
        code="invalid_lora",
    )
