"""The torch truth of the LoRA ops: the sums in their fixed order, the codes of merged weights.

It gives the same bits as the native kernels (csrc/include/sgld/lora.h describes both), so a record
of one can be undone by the other. Slow on purpose: each rank is a pass over the weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from sgl_diffusion.ops.lora_types import LoraDelta

ROWS, PANEL, GROUP, CHAIN = 48, 128, 32, 32
BITS = (2, 3, 4)
SAMPLED_PANELS = 8

Merged = tuple[Tensor, Tensor, Tensor, int]  # codes, escapes, ends, checksum

_TINY = 2.0**-126
_INTS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def _flush(x: Tensor) -> Tensor:
    """Subnormal numbers as zero, as the matrix units of CPUs have it."""
    return torch.where(x.abs() < _TINY, 0.0, x)


def _fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c of fp32 values with one rounding; all fp64, the result too."""
    product = a * b  # exact
    total = product + c
    # The part that the sum lost decides a tie of the second rounding: keep it as an odd last bit.
    shifted = total - product
    lost = (product - (total - shifted)) + (c - shifted)
    bits = total.view(torch.int64)
    towards = torch.where((lost > 0) == (total > 0), 0, -1)
    odd = torch.where((lost != 0) & (bits & 1 == 0), bits + towards, bits) | (lost != 0).long()
    return _flush(odd.view(torch.float64).float()).double()


def update(deltas: Sequence[LoraDelta], rows: int, cols: int, device: torch.device) -> Tensor:
    """The sum of all adapters on a weight [rows, cols], fp32."""
    result = torch.zeros(rows, cols, dtype=torch.float64, device=device)
    reached = torch.zeros(rows, 1, dtype=torch.int64, device=device)
    for delta in deltas:
        # Whole blocks of rows: a kernel sees their other rows as zeros.
        first, last = delta.start // ROWS * ROWS, -(-delta.end // ROWS) * ROWS
        reached[first:last] += 1
    for delta in deltas:
        up, down = _flush(delta.up.float()).double(), _flush(delta.down.float()).double()
        total = torch.zeros(up.shape[0], cols, dtype=torch.float64, device=device)
        for begin in range(0, down.shape[0], CHAIN):
            chains = [torch.zeros_like(total), torch.zeros_like(total)]
            for k in range(begin, min(begin + CHAIN, down.shape[0])):
                chains[k % 2] = _fma(up[:, k : k + 1], down[k : k + 1], chains[k % 2])
            block = _flush(chains[0].float() + chains[1].float()).float()
            total = _flush(total.float() + block).double()
        scale = torch.tensor(delta.scale, dtype=torch.float32, device=device).double()
        at = result[delta.start : delta.end]
        alone = reached[delta.start : delta.end] == 1
        plain = (scale * total).float().double()
        at.copy_(torch.where(alone, plain, _fma(scale.expand_as(total), total, at)))
    return result.float()


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(_INTS[x.dtype]).long()


def _wrap(k: Tensor, dtype: torch.dtype) -> Tensor:
    """Differences of bit patterns in the arithmetic of their width."""
    return k.to(_INTS[dtype]).long()


def _recompute(merged: Tensor, delta: Tensor) -> Tensor:
    """The bits near those of the weight that was merged; of bf16 the lower half is cut off."""
    wide = merged.float() - delta
    if merged.dtype == torch.bfloat16:
        return wide.view(torch.int32).long() >> 16
    return _bits(wide.to(merged.dtype))


def _codes(old: Tensor, k: Tensor, finite: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    most = (1 << bits) // 2 - 1
    fits = (k.abs() <= most) & finite
    return torch.where(fits, k + most, (1 << bits) - 1)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """[rows, cols] codes as int32 words: bit j of word p of a group is bit p of code j."""
    most = (1 << bits) // 2 - 1
    padded = functional.pad(codes, (0, -codes.shape[1] % GROUP), value=most)
    groups = padded.unflatten(1, (-1, 1, GROUP))
    planes = torch.arange(bits, device=codes.device)[:, None]
    places = torch.arange(GROUP, device=codes.device)
    words = ((groups >> planes & 1) << places).sum(-1)
    return words.flatten(1).to(torch.int32)


def _unpack(words: Tensor, bits: int, cols: int) -> Tensor:
    planes = torch.arange(bits, device=words.device)[:, None]
    places = torch.arange(GROUP, device=words.device)
    ones = words.long().unflatten(1, (-1, bits, 1)) >> places & 1
    return (ones << planes).sum(2).flatten(1)[:, :cols]


def _in_order(cells: Tensor) -> Tensor:
    """Cells [rows, cols] block by block, panel by panel, row by row; padded with zeros."""
    rows, cols = cells.shape
    padded = functional.pad(cells, (0, -cols % PANEL, 0, -rows % ROWS))
    return padded.unflatten(1, (-1, PANEL)).unflatten(0, (-1, ROWS)).transpose(1, 2)


def _checksum(bits: Tensor) -> int:
    places = torch.arange(bits.shape[1], device=bits.device) % GROUP * 2 + 1
    return int((bits * places).sum().item()) & 0xFFFFFFFF


def _choose_bits(k: Tensor, finite: Tensor, width: int) -> int:
    """The cheapest code by the panels that the kernels look at, too; 0 for a copy."""
    fitting = torch.where(finite, k.abs(), 1 << 20)
    padded = functional.pad(fitting, (0, -fitting.shape[1] % GROUP))
    rows, cols = padded.shape
    panels, blocks = -(-cols // PANEL), -(-rows // ROWS)
    count = min(SAMPLED_PANELS, panels * blocks)
    tiles = []
    for i in range(count):
        block, panel = divmod(i * panels * blocks // count, panels)
        tile = padded[block * ROWS :, panel * PANEL :][:ROWS, :PANEL]
        tiles.append(tile.flatten())
    sample = torch.cat(tiles)
    escaped = [int((sample > (1 << bits) // 2 - 1).sum().item()) for bits in BITS]
    return cheapest(escaped, sample.numel(), width)


def cheapest(escaped: Sequence[int], total: int, width: int) -> int:
    """The bits of the code that costs least, by its escapes among some weights; 0 for a copy."""
    best, least = 0, width / 2
    for bits, count in zip(BITS, escaped, strict=True):
        cost = bits + count / total * width
        if cost < least:
            best, least = bits, cost
    return best


def check_finite(deltas: Sequence[LoraDelta], index: int) -> None:
    for delta in deltas:
        finite = torch.tensor(delta.scale).isfinite() & delta.up.isfinite().all()
        if not bool(finite & delta.down.isfinite().all()):
            raise ValueError(f"lora_merge_: an adapter of weight {index} is not finite")


def merge(weight: Tensor, deltas: Sequence[LoraDelta]) -> Merged:
    """Merge one weight in place; the parts of its record."""
    rows, cols = weight.shape
    delta = update(deltas, rows, cols, weight.device)
    merged = (weight.float() + delta).to(weight.dtype)
    old = _bits(weight)
    k = _wrap(old - _recompute(merged, delta), weight.dtype)
    finite = weight.isfinite()
    width = 8 * weight.element_size()
    bits = _choose_bits(k, finite, width) if weight.numel() else 0
    if bits:
        codes = _codes(old, k, finite, bits, weight.dtype)
        order = _in_order(codes == (1 << bits) - 1)
        escapes = _in_order(weight)[order]
        counts = order.flatten(1).sum(1)
        words, checksum = _pack(codes, bits), _checksum(old)
    else:
        escapes = weight.flatten().clone()
        first = torch.arange(-(-rows // ROWS), device=weight.device) * ROWS
        counts = (rows - first).clamp(max=ROWS) * cols
        words = torch.empty(rows, 0, dtype=torch.int32, device=weight.device)
        checksum = 0
    ends = functional.pad(counts.cumsum(0), (1, 0))
    weight.copy_(merged)
    return words, escapes, ends, checksum


def unmerge(weight: Tensor, deltas: Sequence[LoraDelta], codes: Tensor, escapes: Tensor) -> int:
    """Restore one weight in place; the checksum of what was restored, 0 for a copy."""
    rows, cols = weight.shape
    if codes.shape[1] == 0:
        weight.copy_(escapes.view(rows, cols))
        return 0
    bits = codes.shape[1] // -(-cols // GROUP)
    code = _unpack(codes, bits, cols)
    delta = update(deltas, rows, cols, weight.device)
    old = _recompute(weight, delta) + code - ((1 << bits) // 2 - 1)
    restored = old.to(_INTS[weight.dtype]).view(weight.dtype)
    order = _in_order(code == (1 << bits) - 1)
    cells = _in_order(restored).clone()
    cells[order] = escapes
    restored = cells.transpose(1, 2).flatten(2).flatten(0, 1)[:rows, :cols]
    weight.copy_(restored)
    return _checksum(_bits(weight))


def apply(
    x: Tensor, y: Tensor, adapters: Sequence[Sequence[LoraDelta]], index: Tensor | None
) -> Tensor:
    """Each row's adapter added to y, fp32 inside, rounded once."""
    rows, result = x.flatten(0, -2).float(), y.flatten(0, -2).float().clone()
    for number, deltas in enumerate(adapters):
        # Every row, with a mask: no shape depends on the index.
        has = None if index is None else (index.flatten() == number)[:, None]
        for delta in deltas:
            own = (rows @ delta.down.float().T) @ delta.up.float().T
            at = result[:, delta.start : delta.end]
            total = at + delta.scale * own
            at.copy_(total if has is None else torch.where(has, total, at))
    return y.copy_(result.view(y.shape))
