"""Which tensor of which file fills which part of a module.

The headers are checked against the module before anything is allocated, and every key that does not
fit is reported at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sgl_diffusion.base.errors import SetupError
from sgl_diffusion.loader.header import DTYPES, read_header
from sgl_diffusion.loader.rules import ALL, Rules, Target

# Tools that keep a whole model in one file put the transformer under one of these, beside the rest.
_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
_BESIDE = ("vae.", "first_stage_model.", "text_encoders.", "cond_stage_model.", "conditioner.")
_SHOWN = 8


@dataclass(frozen=True)
class Copy:
    """One tensor of a file, and what it fills: a tensor of the module, or the rows of one.

    `swap` exchanges the halves of the rows.
    """

    file: Path
    key: str
    begin: int
    dtype: torch.dtype
    name: str
    rows: slice | None
    swap: bool


@dataclass
class _Fit:
    """What one table of rules makes of the files: copies, and the keys that do not fit."""

    copies: list[Copy]
    problems: dict[str, list[str]]

    @property
    def misfits(self) -> int:
        return sum(len(keys) for keys in self.problems.values())


def to_fill(module: nn.Module) -> dict[str, Tensor]:
    """What files have to give: the parameters, and the buffers without a value."""
    kept = module.state_dict(keep_vars=True)
    buffers = ((name, value) for name, value in module.named_buffers() if name in kept)
    return {
        **dict(module.named_parameters()),
        **{name: value for name, value in buffers if value.is_meta},
    }


def plan_copies(module: nn.Module, files: list[Path], rules: Rules, source: Path) -> list[Copy]:
    """What to copy where; an error where the files and the module do not fit each other."""
    best = _fit(module, files, rules)
    for other in rules.others if best.misfits else ():
        best = min(best, _fit(module, files, other), key=lambda fit: fit.misfits)
    if best.misfits:
        found = best.problems.items()
        text = "; ".join(f"{what}: {_some(keys)}" for what, keys in found if keys)
        raise SetupError(
            f"The weights in {source} do not fit {type(module).__name__}: {text}.",
            hint="Check that config.json and the weights belong together and are complete.",
            code="bad_checkpoint",
        )
    return best.copies


def _fit(module: nn.Module, files: list[Path], rules: Rules) -> _Fit:
    wanted = to_fill(module)
    missing = {(name, segment) for name in wanted for segment in _segments(module, name)}
    fit = _Fit([], {"unexpected": [], "wrong shape": [], "wrong type": []})
    for file in files:
        stored = read_header(file)
        prefix = next((p for p in _PREFIXES if any(k.startswith(p) for k in stored)), "")
        for key, entry in stored.items():
            if prefix and key.startswith(_BESIDE):
                continue
            found = _target(rules, key.removeprefix(prefix))
            if found is None:
                continue
            name, target = found
            slots = _slots(module, name, target) if name in wanted else set()
            if not slots or not slots <= missing:
                fit.problems["unexpected"].append(key)
                continue
            missing -= slots
            rows = None if target.segment == ALL else _segments(module, name)[target.segment]
            if rows is not None and rows == slice(0, wanted[name].shape[0]):
                rows = None
            slot = wanted[name] if rows is None else wanted[name][rows]
            shape = _flat(entry.shape) if target.flatten else entry.shape
            if shape != tuple(slot.shape):
                shapes = f"{list(entry.shape)} for {list(slot.shape)}"
                fit.problems["wrong shape"].append(f"{key} {shapes}")
            dtype = DTYPES.get(entry.dtype)
            if dtype is None or not _goes_into(dtype, slot.dtype):
                fit.problems["wrong type"].append(f"{key} {entry.dtype}")
                continue
            swap = target.swap == "halves" or (target.swap == "narrow" and _is_narrow(module, name))
            fit.copies.append(Copy(file, key, entry.begin, dtype, name, rows, swap))
    named = [_source_key(rules, *slot) for slot in sorted(missing)]
    fit.problems["missing"] = list(dict.fromkeys(named))
    return fit


def _goes_into(stored: torch.dtype, wanted: torch.dtype) -> bool:
    return stored == wanted or (stored.is_floating_point and wanted.is_floating_point)


def _target(rules: Rules, key: str) -> tuple[str, Target] | None:
    """What a key fills; None for one that is left in the file."""
    owner, _, leaf = key.rpartition(".")
    target = rules.target(owner)
    if target is None:
        return None
    return f"{target.module}.{rules.leaf(leaf)}".removeprefix("."), target


def _slots(module: nn.Module, name: str, target: Target) -> set[tuple[str, str]]:
    """What of a tensor a key fills; empty where there is no such segment."""
    segments = _segments(module, name)
    wanted = segments if target.segment == ALL else {target.segment} & set(segments)
    return {(name, segment) for segment in wanted}


def _segments(module: nn.Module, name: str) -> dict[str, slice | None]:
    """The row ranges of a tensor that a checkpoint may hold apart."""
    owner = module.get_submodule(name.rpartition(".")[0])
    return dict(getattr(owner, "segments", {"": None}))


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
