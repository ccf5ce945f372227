"""Streams safetensors files into a module that was built on the meta device.

All headers are checked against the module before anything is allocated, then one tensor at a time
is copied from the mapped file, so the peak is the module itself. Weights in pickle formats are
never opened: they run code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sgl_diffusion.base.errors import SetupError
from sgl_diffusion.loader.rules import Rules

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_SHARD = re.compile(r"-\d{5}-of-\d{5}")
_FLOATS = ("F64", "F32", "F16", "BF16")
_SHOWN = 8
_DAMAGED = "Delete it and download it again."


@dataclass(frozen=True)
class _Copy:
    """One tensor of a file and the parameter rows it fills."""

    file: Path
    key: str
    parameter: str
    rows: slice
    shape: tuple[int, ...]


def load_weights(
    module: nn.Module,
    folder: Path,
    rules: Rules | None = None,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> None:
    """Fill `module`, built under `torch.device("meta")`, with the weights in `folder`.

    Parameters become `dtype`, but fp32 where a part of their name is in the class's `KEEP_FP32`.
    """
    copies = _plan(module, weight_files(folder), rules or Rules(), folder)
    keep = set(getattr(module, "KEEP_FP32", ()))
    for name, old in list(module.named_parameters()):
        kept = torch.float32 if keep & set(name.split(".")) else dtype
        empty = torch.empty(old.shape, dtype=kept, device=device)
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, nn.Parameter(empty, requires_grad=False))
    assert not any(buffer.is_meta for buffer in module.buffers()), "a buffer has no value"
    with ExitStack() as stack:
        handles = {file: stack.enter_context(_opened(file)) for file in {c.file for c in copies}}
        for copy in copies:
            rows = module.get_parameter(copy.parameter).data[copy.rows]
            rows.copy_(_tensor(handles[copy.file], copy).view(copy.shape))
    module.eval()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up a component: one file, or the shards its index names."""
    indexes = sorted(folder.glob("*.safetensors.index*.json"))
    weights = sorted(folder.glob("*.safetensors"))
    for variant in (False, True):
        found = [file for file in indexes if is_variant(file.name) == variant]
        found = found or [file for file in weights if is_variant(file.name) == variant]
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise SetupError(f"{folder} holds more than one set of weights: {names}.")
        if found:
            return _shards(found[0]) if found[0] in indexes else found
    pickles = sorted(p.name for p in folder.glob("*") if p.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise SetupError(
            f"{folder} holds its weights only in pickle format ({pickles[0]}), which can run code.",
            hint="Convert them to safetensors.",
            code="pickle_refused",
        )
    raise SetupError(
        f"{folder} holds no safetensors weights.", hint="Check that the download is complete."
    )


def is_variant(name: str) -> bool:
    """Whether this is, or indexes, a file with a precision in its name: model.fp16.safetensors.

    A repository may hold the same weights in several precisions; the plain name is the main one.
    """
    stem = _SHARD.sub("", Path(name).name).replace(".index", "").removesuffix(".json")
    head, found, tail = stem.partition(".safetensors")
    return bool(found) and ("." in head or bool(tail))


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise SetupError(f"{index} is not a safetensors index.", hint=_DAMAGED) from None
    files = [index.parent / str(name) for name in names]
    for file in files:
        if file.parent != index.parent or not file.is_file():
            raise SetupError(
                f"{index} names the file {file.name}, which is not there.", hint=_DAMAGED
            )
    return files


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        handle = safe_open(file, framework="pt")
    except (SafetensorError, OSError):
        raise SetupError(f"{file} is damaged or not a safetensors file.", hint=_DAMAGED) from None
    with handle as opened:
        yield opened


def _tensor(handle: Any, copy: _Copy) -> Tensor:
    try:
        tensor: Tensor = handle.get_tensor(copy.key)
    except SafetensorError:
        raise SetupError(f"{copy.file} is damaged at {copy.key}.", hint=_DAMAGED) from None
    return tensor


def _plan(module: nn.Module, files: list[Path], rules: Rules, folder: Path) -> list[_Copy]:
    """What to copy where; every key that does not fit is reported at once."""
    parameters = dict(module.named_parameters())
    wanted = {(name, segment) for name in parameters for segment in _segments(module, name)}
    copies: dict[tuple[str, str], _Copy] = {}
    problems: dict[str, list[str]] = {"unexpected": [], "wrong shape": [], "wrong type": []}
    for file in files:
        with _opened(file) as handle:
            for key in handle.keys():
                owner, _, leaf = key.rpartition(".")
                target = rules.target(owner)
                if target is None:
                    continue
                name = f"{target.module}.{leaf}".removeprefix(".")
                if (name, target.segment) not in wanted or (name, target.segment) in copies:
                    problems["unexpected"].append(key)
                    continue
                header = handle.get_slice(key)
                shape = tuple(header.get_shape())
                rows = _segments(module, name)[target.segment]
                slot = tuple(parameters[name][rows].shape)
                fits = _flat(shape) if target.flatten else shape
                if fits != slot:
                    problems["wrong shape"].append(f"{key} {list(shape)} for {list(slot)}")
                if header.get_dtype() not in _FLOATS:
                    problems["wrong type"].append(f"{key} {header.get_dtype()}")
                copies[name, target.segment] = _Copy(file, key, name, rows, slot)
    missing = sorted(wanted - set(copies))
    problems["missing"] = [_source_key(rules, *slot) for slot in missing]
    if any(problems.values()):
        text = "; ".join(f"{what}: {_some(keys)}" for what, keys in problems.items() if keys)
        raise SetupError(
            f"The weights in {folder} do not fit {type(module).__name__}: {text}.",
            hint="Check that config.json and the weights belong together.",
            code="bad_checkpoint",
        )
    return list(copies.values())


def _segments(module: nn.Module, name: str) -> dict[str, slice]:
    """The row ranges of a parameter that a checkpoint may hold apart."""
    owner = module.get_submodule(name.rpartition(".")[0])
    return dict(getattr(owner, "segments", {"": slice(None)}))


def _flat(shape: tuple[int, ...]) -> tuple[int, ...]:
    """[out, ...] as [out, in]; a bias stays as it is."""
    return shape if len(shape) < 2 else (shape[0], int(torch.Size(shape[1:]).numel()))


def _source_key(rules: Rules, name: str, segment: str) -> str:
    owner, _, leaf = name.rpartition(".")
    return f"{rules.source(owner, segment)}.{leaf}".removeprefix(".")


def _some(keys: list[str]) -> str:
    rest = len(keys) - _SHOWN
    return ", ".join(keys[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
