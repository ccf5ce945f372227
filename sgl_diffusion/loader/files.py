"""Which files hold the weights of a component, told by their names alone.

A repository may hold the same weights in several precisions; the plain name is the main one, and
the others, called variants, carry a word more: model.fp16.safetensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.errors import ModelNotFoundError, SetupError

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
DAMAGED = "Delete it and download it again."
_POINTER = b"version https://git-lfs"
_SHARD = re.compile(r"-\d{5}-of-\d{5}")


def variant_of(name: str) -> str | None:
    """The variant that a weight file or its index belongs to; None for the plain one."""
    stem = _SHARD.sub("", Path(name).name).replace(".index", "").removesuffix(".json")
    head, found, tail = stem.partition(".safetensors")
    return (head.partition(".")[2] or tail[1:] or None) if found else None


def check_variant(names: Iterable[str], variant: str | None, model: str) -> None:
    """Refuse a variant that no component has: the plain files would be taken in silence."""
    known = sorted({found for name in names if (found := variant_of(name))})
    if variant is not None and variant not in known:
        raise SetupError(
            f"{model} has no weights of the variant {variant!r}.",
            hint=f"It has {', '.join(known)}." if known else "Leave --variant out.",
            code="variant_not_found",
            param="variant",
        )


def other_weights(options: EngineOptions) -> dict[str, Path]:
    """What the operator names in the place of a transformer's own weights, by its component."""
    found = {}
    for name in ("transformer", "transformer_2"):
        param = f"{name}_path"
        path = getattr(options, param)
        if path is None:
            continue
        weights = found[name] = Path(path).expanduser()
        if not weights.exists():
            raise ModelNotFoundError(f"There is no file or folder {path}.", param=param)
        if weights.is_file() and weights.suffix in PICKLE_SUFFIXES:
            raise SetupError(
                f"{path} is in pickle format, which can run code.",
                hint="Convert it to safetensors.",
                code="pickle_refused",
                param=param,
            )
    return found


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The safetensors files that make up a component: one file, or the shards its index names.

    Those of the variant come first, then the plain ones, then any other variant.
    """
    indexes = sorted(folder.glob("*.safetensors.index*.json"))
    weights = sorted(folder.glob("*.safetensors"))
    named = [variant_of(file.name) for file in (*indexes, *weights)]
    others = {name for name in named if name not in (None, variant)}
    for wanted in ({variant}, {None}, others):
        found = [file for file in indexes if variant_of(file.name) in wanted]
        found = found or [file for file in weights if variant_of(file.name) in wanted]
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise SetupError(
                f"{folder} holds more than one set of weights: {names}.",
                hint="Choose one with --variant." if wanted is others else "",
            )
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


def damaged(file: Path) -> SetupError:
    """What is wrong with a weight file that cannot be opened as one."""
    if is_pointer(file):
        return SetupError(
            f"{file} is a pointer of Git LFS and not the weights themselves.",
            hint=f"Run `git lfs pull` in {file.parent}, or download the model from the hub.",
        )
    if file.is_file() and file.stat().st_size == 0:
        return SetupError(f"{file} is empty.", hint=DAMAGED)
    return SetupError(f"{file} is damaged or not a safetensors file.", hint=DAMAGED)


def is_pointer(file: Path) -> bool:
    """Whether a file is what git leaves where large files were not fetched."""
    try:
        with file.open("rb") as opened:
            return opened.read(len(_POINTER)) == _POINTER
    except OSError:
        return False


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise SetupError(f"{index} is not a safetensors index.", hint=DAMAGED) from None
    files = [index.parent / str(name) for name in names]
    for file in files:
        if file.parent != index.parent or not file.is_file():
            raise SetupError(
                f"{index} names the file {file.name}, which is not there.", hint=DAMAGED
            )
    return files
