"""Streams safetensors files into a module that was built on the meta device.

Everything is read straight into the tensors of the module, or is there as pages of the file, so the
peak is the module itself.
Weights in pickle formats are never opened: they run code.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from sgl_diffusion.base.startup import spent_on
from sgl_diffusion.loader.copies import Copy, plan_copies, to_fill
from sgl_diffusion.loader.files import weight_files
from sgl_diffusion.loader.mapped import map_tensor
from sgl_diffusion.loader.reading import Piece, read_pieces
from sgl_diffusion.loader.rules import Rules

_STAGED_BYTES = 256 << 20  # on their way to another device at a time


def load_weights(
    module: nn.Module,
    source: Path,
    rules: Rules | None = None,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    variant: str | None = None,
) -> None:
    """Fill `module`, built under `torch.device("meta")`, with the weights in a folder or file.

    They become `dtype`, but fp32 where a part of their name is in the class's `KEEP_FP32`.
    """
    files = [source] if source.is_file() else weight_files(source, variant)
    with spent_on("weights"):
        _load(module, files, source, rules or Rules(), dtype, torch.device(device))


def _load(
    module: nn.Module,
    files: list[Path],
    source: Path,
    rules: Rules,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    copies = plan_copies(module, files, rules, source)
    wanted, empty = precisions(module, dtype), to_fill(module)
    mapped = _mapped(copies, empty, wanted) if device.type == "cpu" else {}
    copies = [copy for copy in copies if copy.name not in mapped]
    for name, old in empty.items():
        value = mapped.get(name)
        if value is None:
            value = torch.empty(old.shape, dtype=wanted[name], device=device)
        _put(module, name, value)
    assert not any(buffer.is_meta for buffer in module.buffers()), "a buffer has no value"
    filled = dict(module.state_dict())
    if device.type == "cpu":
        read_pieces([piece for copy in copies for piece in pieces_of(copy, filled[copy.name])])
    else:
        for batch in _batches(copies, filled):
            staged = {name: torch.empty_like(filled[name], device="cpu") for name in batch}
            taken = [copy for copy in copies if copy.name in staged]
            read_pieces([piece for copy in taken for piece in pieces_of(copy, staged[copy.name])])
            for name, value in staged.items():
                filled[name].copy_(value)
    module.eval()


def precisions(module: nn.Module, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Which dtype everything gets that is to be filled."""
    keep = set(getattr(module, "KEEP_FP32", ()))
    found = {}
    for name, old in to_fill(module).items():
        kept = torch.float32 if keep & set(name.split(".")) else dtype
        found[name] = kept if old.is_floating_point() else old.dtype
    return found


def _mapped(
    copies: Iterable[Copy], empty: dict[str, Tensor], wanted: dict[str, torch.dtype]
) -> dict[str, Tensor]:
    """What needs no reading, as the file has it whole, in its precision, and in the page cache."""
    found = {}
    for copy in copies:
        if copy.rows is None and not copy.swap and copy.dtype == wanted[copy.name]:
            value = map_tensor(copy.file, copy.begin, tuple(empty[copy.name].shape), copy.dtype)
            if value is not None:
                found[copy.name] = value
    return found


def _put(module: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    place = module.get_submodule(owner)
    if isinstance(getattr(place, leaf), nn.Parameter):
        value = nn.Parameter(value, requires_grad=False)
    setattr(place, leaf, value)


def _batches(copies: Iterable[Copy], filled: dict[str, Tensor]) -> Iterator[list[str]]:
    """Names of tensors that are staged together."""
    batch: list[str] = []
    size = 0
    for name in dict.fromkeys(copy.name for copy in copies):
        if batch and size + filled[name].nbytes > _STAGED_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(name)
        size += filled[name].nbytes
    if batch:
        yield batch


def pieces_of(copy: Copy, whole: Tensor) -> Iterator[Piece]:
    """What is read, and where to, for a copy into a tensor or some of its rows."""
    target = whole if copy.rows is None else whole[copy.rows]
    if not copy.swap:
        yield Piece(copy.file, copy.key, copy.begin, copy.dtype, target)
        return
    # The first rows of the file become the last of the tensor.
    half = len(target) // 2
    first, last = target[half:], target[:half]
    yield Piece(copy.file, copy.key, copy.begin, copy.dtype, first)
    begin = copy.begin + first.numel() * copy.dtype.itemsize
    yield Piece(copy.file, copy.key, begin, copy.dtype, last)
