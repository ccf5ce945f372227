"""Streams safetensors files into a module that was built on the meta device.

All headers are checked against the module before anything is allocated, then one tensor at a time
is copied from the mapped file, so the peak is the module itself. Weights in pickle formats are
never opened: they run code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sgl_diffusion.base.errors import SetupError
from sgl_diffusion.loader.absent import Piece, Stored, absent_parameter
from sgl_diffusion.loader.files import DAMAGED, damaged, weight_files
from sgl_diffusion.loader.ranges import RangeFile
from sgl_diffusion.loader.rules import ALL, Rules, Target

# Tools that keep a whole model in one file put the transformer under one of these, beside the rest.
_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
_BESIDE = ("vae.", "first_stage_model.", "text_encoders.", "cond_stage_model.", "conditioner.")
_FLOATS = ("F64", "F32", "F16", "BF16")
_SHOWN = 8
# Pages that are read through a mapping count as memory of the process until it is closed.
_MAPPED_BYTES = 64 << 20


@dataclass(frozen=True)
class _Copy:
    """One tensor of a file and the parameter rows it fills."""

    file: Path
    key: str
    parameter: str
    rows: slice
    shape: tuple[int, ...]
    swap: bool


@dataclass
class _Fit:
    """What one table of rules makes of the files: copies, and the keys that do not fit."""

    copies: list[_Copy]
    problems: dict[str, list[str]]

    @property
    def misfits(self) -> int:
        return sum(len(keys) for keys in self.problems.values())


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

    Parameters become `dtype`, but fp32 where a part of their name is in the class's `KEEP_FP32`.
    """
    files = [source] if source.is_file() else weight_files(source, variant)
    copies = _plan(module, files, rules or Rules(), source)
    for owner, leaf, shape, kept in _parameters(module, dtype):
        empty = torch.empty(shape, dtype=kept, device=device)
        setattr(owner, leaf, nn.Parameter(empty, requires_grad=False))
    assert not any(buffer.is_meta for buffer in module.buffers()), "a buffer has no value"
    for file in files:
        waiting = [copy for copy in copies if copy.file == file]
        while waiting:
            with _opened(file) as handle:
                read = 0
                while waiting and read < _MAPPED_BYTES:
                    read += _fill(module, waiting.pop(), handle)
    module.eval()


def leave_weights(
    module: nn.Module,
    source: Path,
    rules: Rules | None = None,
    *,
    dtype: torch.dtype,
    device: torch.device,
    variant: str | None = None,
) -> dict[str, Stored]:
    """As `load_weights`, but the parameters become absent ones; returns where they come from."""
    files = [source] if source.is_file() else weight_files(source, variant)
    copies = _plan(module, files, rules or Rules(), source)
    for owner, leaf, shape, kept in _parameters(module, dtype):
        setattr(owner, leaf, absent_parameter(shape, kept, device))
    assert not any(buffer.is_meta for buffer in module.buffers()), "a buffer has no value"
    opened = {file: RangeFile(file) for file in files}
    pieces: dict[str, tuple[Piece, ...]] = {}
    for copy in copies:
        piece = Piece(opened[copy.file], copy.key, copy.rows, copy.swap)
        pieces[copy.parameter] = (*pieces.get(copy.parameter, ()), piece)
    module.eval()
    return {name: Stored(found) for name, found in pieces.items()}


def _parameters(
    module: nn.Module, dtype: torch.dtype
) -> list[tuple[nn.Module, str, torch.Size, torch.dtype]]:
    """Owner, name, shape and dtype of every parameter as it is to be."""
    keep = set(getattr(module, "KEEP_FP32", ()))
    found = []
    for name, old in module.named_parameters():
        owner, _, leaf = name.rpartition(".")
        kept = torch.float32 if keep & set(name.split(".")) else dtype
        found.append((module.get_submodule(owner), leaf, old.shape, kept))
    return found


def _fill(module: nn.Module, copy: _Copy, handle: Any) -> int:
    """Copy one tensor; returns its bytes in the file."""
    try:
        tensor: Tensor = handle.get_tensor(copy.key)
    except SafetensorError:
        raise SetupError(f"{copy.file} is damaged at {copy.key}.", hint=DAMAGED) from None
    value = tensor.view(copy.shape)
    if copy.swap:
        value = value.roll(len(value) // 2, 0)
    module.get_parameter(copy.parameter).data[copy.rows].copy_(value)
    return tensor.nbytes


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        handle = safe_open(file, framework="pt")
    except (SafetensorError, OSError):
        raise damaged(file) from None
    with handle as opened:
        yield opened


def _plan(module: nn.Module, files: list[Path], rules: Rules, source: Path) -> list[_Copy]:
    """What to copy where; every key that does not fit is reported at once."""
    best = _fit(module, files, rules)
    for other in rules.others if best.misfits else ():
        best = min(best, _fit(module, files, other), key=lambda fit: fit.misfits)
    if best.misfits:
        found = best.problems.items()
        text = "; ".join(f"{what}: {_some(keys)}" for what, keys in found if keys)
        raise SetupError(
            f"The weights in {source} do not fit {type(module).__name__}: {text}.",
            hint="Check that config.json and the weights belong together.",
            code="bad_checkpoint",
        )
    return best.copies


def _fit(module: nn.Module, files: list[Path], rules: Rules) -> _Fit:
    parameters = dict(module.named_parameters())
    missing = {(name, segment) for name in parameters for segment in _segments(module, name)}
    fit = _Fit([], {"unexpected": [], "wrong shape": [], "wrong type": []})
    for file in files:
        with _opened(file) as handle:
            keys = list(handle.keys())
            prefix = next((p for p in _PREFIXES if any(k.startswith(p) for k in keys)), "")
            for key in keys:
                if prefix and key.startswith(_BESIDE):
                    continue
                found = _target(rules, key.removeprefix(prefix))
                if found is None:
                    continue
                name, target = found
                slots = _slots(module, name, target) if name in parameters else set()
                if not slots or not slots <= missing:
                    fit.problems["unexpected"].append(key)
                    continue
                missing -= slots
                header = handle.get_slice(key)
                shape = tuple(header.get_shape())
                rows = slice(None)
                if target.segment != ALL:
                    rows = _segments(module, name)[target.segment]
                slot = tuple(parameters[name][rows].shape)
                fits = _flat(shape) if target.flatten else shape
                if fits != slot:
                    fit.problems["wrong shape"].append(f"{key} {list(shape)} for {list(slot)}")
                if header.get_dtype() not in _FLOATS:
                    fit.problems["wrong type"].append(f"{key} {header.get_dtype()}")
                swap = target.swap == "halves" or (
                    target.swap == "narrow" and _is_narrow(module, name)
                )
                fit.copies.append(_Copy(file, key, name, rows, slot, swap))
    named = [_source_key(rules, *slot) for slot in sorted(missing)]
    fit.problems["missing"] = list(dict.fromkeys(named))
    return fit


def _target(rules: Rules, key: str) -> tuple[str, Target] | None:
    """Our parameter for a key; None for one that is left in the file."""
    owner, _, leaf = key.rpartition(".")
    target = rules.target(owner)
    if target is None:
        return None
    return f"{target.module}.{rules.leaf(leaf)}".removeprefix("."), target


def _slots(module: nn.Module, name: str, target: Target) -> set[tuple[str, str]]:
    """What of a parameter a key fills; empty where there is no such segment."""
    segments = _segments(module, name)
    wanted = segments if target.segment == ALL else {target.segment} & set(segments)
    return {(name, segment) for segment in wanted}


def _segments(module: nn.Module, name: str) -> dict[str, slice]:
    """The row ranges of a parameter that a checkpoint may hold apart."""
    owner = module.get_submodule(name.rpartition(".")[0])
    return dict(getattr(owner, "segments", {"": slice(None)}))


def _is_narrow(module: nn.Module, name: str) -> bool:
    """Whether a layer has as many rows as a shift and a scale of its width."""
    weight = module.get_submodule(name.rpartition(".")[0]).weight
    assert isinstance(weight, Tensor)
    return weight.shape[0] == 2 * weight.shape[1]


def _flat(shape: tuple[int, ...]) -> tuple[int, ...]:
    """[out, ...] as [out, in]; a bias stays as it is."""
    return shape if len(shape) < 2 else (shape[0], int(torch.Size(shape[1:]).numel()))


def _source_key(rules: Rules, name: str, segment: str) -> str:
    owner, _, leaf = name.rpartition(".")
    return f"{rules.source(owner, segment)}.{leaf}".removeprefix(".")


def _some(keys: list[str]) -> str:
    rest = len(keys) - _SHOWN
    return ", ".join(keys[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
