"""Cases of the ops that multiply: attention, LoRA, and a linear layer in fp32."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from sgl_diffusion import ops
from sgl_diffusion.bench.case import EAGER, FLOP, Bar, Case, Place, Spec, error_of
from sgl_diffusion.bench.timing import Work
from sgl_diffusion.ops import LoraDelta

CHECKED_ROWS = 64
RATIOS = {16: 0.08, 64: 0.16, 128: 0.57}  # |update| / |weight| (rms) of an adapter of a rank
RATIO = 0.1  # of other ranks
SCALE, DEVIATION = 0.5, 0.02  # of an adapter, of a weight
LORA_BARS = {
    "peft": {16: Bar(5, 10), 64: Bar(3, 5), 128: Bar(3, 5)},
    "addmm": {16: Bar(1.3, 1.8), 64: Bar(1.0, 1.3)},
}

Merge = Callable[[Tensor, LoraDelta], Tensor]


def attention(place: Place, sizes: tuple[int, ...]) -> Case:
    queries, keys, heads, head_dim = sizes
    q, k, v = (place.normal(1, n, heads, head_dim) for n in (queries, keys, keys))

    def sdpa() -> Tensor:
        a, b, c = (x.transpose(1, 2) for x in (q, k, v))
        return functional.scaled_dot_product_attention(a, b, c).transpose(1, 2)

    rows, wide_k, wide_v = (x.double().transpose(1, 2) for x in (q[:, :CHECKED_ROWS], k, v))
    scores = (rows @ wide_k.transpose(-1, -2)) * head_dim**-0.5
    on_cpu = place.device == "cpu"
    bars = {
        (torch.bfloat16, 128): Bar(3, 4.3),
        (torch.bfloat16, 64): Bar(2.5, 3.5),
        (torch.float32, 128): Bar(1.3, 2),
        (torch.float32, 64): Bar(1.3, 2),
    }
    bar = bars.get((place.dtype, head_dim)) if on_cpu and queries == keys else None
    exact = (scores.softmax(-1) @ wide_v).transpose(1, 2)
    results = {"ours": ops.attention(q, k, v), "sdpa": sdpa()}
    return Case(
        ours=lambda: ops.attention(q, k, v),
        peers={"sdpa": sdpa},
        amount=4 * heads * queries * keys * head_dim,
        unit=FLOP,
        copied=q,
        errors={name: error_of(x[:, :CHECKED_ROWS], exact) for name, x in results.items()},
        bars={"sdpa": bar} if bar else {},
    )


def _adapted(place: Place, out: int, width: int, rank: int) -> tuple[Tensor, LoraDelta]:
    """A weight like a trained one, and an adapter whose update is a usual share of it."""
    weight = (place.wide(out, width) * DEVIATION).to(place.dtype)
    size = DEVIATION * RATIOS.get(rank, RATIO) / SCALE / rank**0.5
    up = (place.wide(out, rank) * size).to(place.dtype)
    return weight, LoraDelta(place.normal(rank, width), up, SCALE)


def peft_merge(weight: Tensor, delta: LoraDelta) -> Tensor:
    """PEFT's `LoraLayer.merge` without `safe_merge`: on a CPU its product is in fp32."""
    if weight.device.type == "cpu":
        update = (delta.up.float() @ delta.down.float()) * delta.scale
    else:
        update = (delta.up @ delta.down) * delta.scale
    weight += update.to(delta.up.dtype)
    return weight


def addmm_merge(weight: Tensor, delta: LoraDelta) -> Tensor:
    return torch.addmm(weight, delta.up, delta.down, alpha=delta.scale, out=weight)


def _merge(weight: Tensor, delta: LoraDelta) -> Tensor:
    ops.lora_merge_([weight], [[delta]])
    return weight


def lora_merge(place: Place, sizes: tuple[int, ...]) -> Case:
    """Merged with one sign and the other in turns, so that the weights stay what they are.

    Neither peer can be undone exactly; ours also writes the record that can.
    """
    out, width, rank = sizes
    base, delta = _adapted(place, out, width, rank)
    weight = base.clone()
    (record,) = ops.lora_merge_([weight], [[delta]])
    ops.lora_unmerge_([weight], [record])
    assert torch.equal(weight, base), "the unmerged weight is not the base"
    merges = {"ours": _merge, "peft": peft_merge, "addmm": addmm_merge}
    update = delta.up[:CHECKED_ROWS].double() @ delta.down.double()
    exact = base[:CHECKED_ROWS].double() + delta.scale * update
    deltas = itertools.cycle((delta, replace(delta, scale=-delta.scale)))

    def work(merge: Merge) -> Work:
        return lambda: merge(weight, next(deltas))

    bars = {name: of[rank] for name, of in LORA_BARS.items() if rank in of}
    return Case(
        ours=work(_merge),
        peers={"peft": work(peft_merge), "addmm": work(addmm_merge)},
        amount=2 * base.nbytes,
        copied=base,
        errors={
            name: error_of(merge(base.clone(), delta)[:CHECKED_ROWS], exact)
            for name, merge in merges.items()
        },
        bars=bars if place.device == "cpu" and place.dtype == torch.bfloat16 else {},
        extra={"bits_per_weight": record.bits_per_weight},
    )


def lora_unmerge(place: Place, sizes: tuple[int, ...]) -> Case:
    """The peer copies the base back, which needs a second copy of all weights."""
    base, delta = _adapted(place, *sizes)
    merged = base.clone()
    (record,) = ops.lora_merge_([merged], [[delta]])
    target = merged.clone()

    def restore() -> None:
        ops.lora_unmerge_([target.copy_(merged)], [record])

    return Case(
        ours=restore,
        peers={"copy back": lambda: target.copy_(base)},
        amount=2 * base.nbytes,
        copied=merged,
        after_copy=True,
        extra={"bits_per_weight": record.bits_per_weight},
    )


def lora_apply(place: Place, sizes: tuple[int, ...]) -> Case:
    """Two adapters, each on every second row of the batch, beside the base's result."""
    tokens, width, out, rank = sizes
    x, y = place.normal(2, tokens, width), place.normal(2, tokens, out)
    adapters = [[_adapted(place, out, width, rank)[1]] for _ in range(2)]
    index = torch.tensor([0, 1], device=place.device)

    def eager() -> Tensor:
        rows = []
        for i, (delta,) in enumerate(adapters):
            rows.append(y[i] + delta.scale * ((x[i] @ delta.down.T) @ delta.up.T))
        return torch.stack(rows)

    return Case(
        ours=lambda: ops.lora_apply(x, y, adapters, index),
        peers={EAGER: eager},
        amount=x.nbytes + 2 * y.nbytes,
        copied=y,
    )


def linear(place: Place, sizes: tuple[int, ...]) -> Case:
    """fp32 through oneDNN on plain weights: packed ones would not see a LoRA merged in place."""
    tokens, width, out = sizes
    x, weight, bias = place.normal(tokens, width), place.normal(out, width), place.normal(out)
    onednn = ops.OPS.get("linear").implementation("onednn").run
    barred = place.device == "cpu" and place.dtype == torch.float32
    if not barred:
        return _linear(lambda: ops.linear(x, weight, bias), x, weight, bias)
    case = _linear(lambda: onednn(x, weight, bias), x, weight, bias)
    case.implementation, case.bars = "onednn", {"F.linear": Bar(1.8, 2.2)}
    return case


def _linear(ours: Work, x: Tensor, weight: Tensor, bias: Tensor) -> Case:
    exact = functional.linear(x.double(), weight.double(), bias.double())
    peer = functional.linear(x, weight, bias)
    return Case(
        ours=ours,
        peers={"F.linear": lambda: functional.linear(x, weight, bias)},
        amount=2 * x.numel() * weight.shape[0],
        unit=FLOP,
        copied=x,
        errors={"ours": error_of(ours(), exact), "F.linear": error_of(peer, exact)},
    )


SELF = tuple((n, n, 12, d) for d in (128, 64) for n in (1024, 2048, 4096, 8192))
CROSS = tuple((4096, 512, 12, d) for d in (128, 64))  # queries over the keys of a text
WEIGHTS = ((8960, 1536), (3072, 12288))  # Wan 1.3B, FLUX
MERGES = tuple((*weight, rank) for weight in WEIGHTS for rank in (16, 64, 128))

SPECS = (
    Spec("attention", attention, SELF + CROSS),
    Spec("attention", attention, tuple(s for s in SELF if s[0] <= 2048), ("fp32",)),
    Spec("lora_merge_", lora_merge, MERGES),
    Spec("lora_unmerge_", lora_unmerge, MERGES[:3]),
    Spec("lora_apply", lora_apply, ((2048, 1536, 1536, 16),)),
    Spec("linear", linear, ((1024, 1536, 1536), (1560, 1536, 8960)), ("fp32",)),
)
