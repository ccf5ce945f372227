"""From what a user calls an adapter to its files: a file, a folder, or a hub id.

Only safetensors files are ever chosen. A model with two experts has an adapter for each: two files
that say high and low noise in their names, or one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sgl_diffusion.base.errors import RequestError, SetupError
from sgl_diffusion.loader.adapters.keys import shown, some
from sgl_diffusion.loader.adapters.paths import is_hub_id, is_on_disk, split_hub_id
from sgl_diffusion.loader.adapters.types import TRANSFORMER, TRANSFORMER_2
from sgl_diffusion.loader.hub import fetch_files

SUFFIX = ".safetensors"
CONFIG = "adapter_config.json"

# In the name of a single file the word noise is needed, too: "high" alone may mean quality.
_HIGH_NOISE = re.compile(r"hi(?:gh)?[ _-]?noise", re.IGNORECASE)
_LOW_NOISE = re.compile(r"lo(?:w)?[ _-]?noise", re.IGNORECASE)
_HIGH = re.compile(r"(?<![a-z])(?:high|hi(?=[ _-]?noise))", re.IGNORECASE)
_LOW = re.compile(r"(?<![a-z])(?:low|lo(?=[ _-]?noise))", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """The file of each expert that it is named after; "" is a file for the whole model."""

    files: Mapping[str, Path]

    def check_size(self, most: int) -> None:
        """Refuse files that would not fit into `most` bytes of memory."""
        try:
            size = sum(file.stat().st_size for file in self.files.values())
        except OSError:
            return  # who opens it will say why
        if size > most:
            raise RequestError(
                f"The adapter has {size / 2**20:.1f} MiB; all adapters together may take "
                f"{most / 2**20:.1f} MiB.",
                hint="Start the server with a larger --max-lora-memory.",
                code="lora_memory_full",
                param="lora_path",
            )


def locate(
    path: str,
    *,
    weight_name: str | None = None,
    revision: str | None = None,
    experts: bool = False,
    local: bool | None = None,
    cache_dir: Path | None = None,
) -> Source:
    """The files that a path or hub id (`org/name` or `org/name:file`) means.

    `weight_name` names the file in a folder or repository, or two with a comma between; without it
    there must be one, or one for each of two `experts`. `local` says which of both a path is that
    could be either; without it, a path that exists is one.
    """
    if local is None:
        local = not is_hub_id(path) or is_on_disk(path)
    if not local:
        repository, file = split_hub_id(path)
        if file and weight_name and file != weight_name:
            raise _invalid(f"{shown(path)} and the weight name {shown(weight_name)} differ.")
        return _fetch(repository, file or weight_name, revision, experts, cache_dir)
    place = _expanded(path)
    if place.is_dir():
        names = [file.name for file in place.iterdir() if file.is_file()]
        return _source(place, choose(names, weight_name, experts, path), experts)
    if place.suffix != SUFFIX:
        raise _invalid(
            f"{shown(path)} is not a {SUFFIX} file, nor a folder or hub id that holds one.",
            "Pickle files (.bin, .pt) can run code and are never opened; convert them.",
        )
    if not place.is_file():
        raise _invalid(f"There is no adapter file {shown(path)}.", "Check the path.")
    return _source(place.parent, [place.name], experts)


def choose(names: Sequence[str], weight_name: str | None, experts: bool, where: str) -> list[str]:
    """The one file, or the pair of two experts, among the names of a folder or repository."""
    if weight_name is not None:
        wanted = [name.strip() for name in weight_name.split(",")]
        for name in wanted:
            parts = PurePosixPath(name).parts
            if not name.endswith(SUFFIX) or ".." in parts or name.startswith(("/", "~")):
                raise _invalid(f"The weight name {shown(name)} is not a {SUFFIX} file.")
            if name not in names:
                found = [name for name in names if name.endswith(SUFFIX)]
                raise _invalid(
                    f"{shown(where)} has no file {shown(name)}.",
                    f"It has {some(sorted(found))}." if found else "It has no safetensors file.",
                )
        if len(wanted) > 1 and (not experts or _pair(wanted) is None):
            raise _invalid(
                "Two weight names are for a model with two experts, one file named after high "
                "noise and one after low noise."
            )
        return wanted
    found = sorted(name for name in names if name.endswith(SUFFIX) and "/" not in name)
    if not found:
        others = sorted(name for name in names if name.endswith((".bin", ".pt", ".ckpt", ".pth")))
        raise _invalid(
            f"{shown(where)} holds no {SUFFIX} file"
            + (f", only {some(others)}, which could run code." if others else "."),
            "Name the file with a weight name." if not others else "Convert it to safetensors.",
        )
    if len(found) > 1 and not (experts and _pair(found)):
        raise _invalid(
            f"{shown(where)} holds {len(found)} adapter files: {some(found, 10)}.",
            "Say which one with a weight name.",
            param="lora_weight_name",
        )
    return found


def expert_of(name: str) -> str:
    """The expert that a file of its own is named after, or ""."""
    high, low = bool(_HIGH_NOISE.search(name)), bool(_LOW_NOISE.search(name))
    if high == low:
        return ""
    return TRANSFORMER if high else TRANSFORMER_2


def _pair(names: Sequence[str]) -> dict[str, str] | None:
    """The high and low file of two, by their names."""
    if len(names) != 2:
        return None
    experts: dict[str, str] = {}
    for name in names:
        stem = PurePosixPath(name).name
        high, low = bool(_HIGH.search(stem)), bool(_LOW.search(stem))
        if high != low:
            experts[TRANSFORMER if high else TRANSFORMER_2] = name
    return experts if len(experts) == 2 else None


def _source(folder: Path, names: list[str], experts: bool) -> Source:
    if len(names) == 1:
        expert = expert_of(PurePosixPath(names[0]).name) if experts else ""
        return Source({expert: folder / names[0]})
    pair = _pair(names)
    assert pair is not None, "two files are a pair of experts"
    return Source({expert: folder / name for expert, name in sorted(pair.items())})


def _fetch(
    repository: str,
    weight_name: str | None,
    revision: str | None,
    experts: bool,
    cache_dir: Path | None,
) -> Source:
    chosen: list[str] = []

    def wanted(names: Sequence[str]) -> list[str]:
        chosen[:] = choose(names, weight_name, experts, repository)
        beside = {str(PurePosixPath(name).parent / CONFIG) for name in chosen}
        return [*chosen, *sorted(beside & set(names))]

    try:
        folder = fetch_files(repository, wanted, revision, cache_dir=cache_dir)
    except SetupError as error:
        raise RequestError(
            error.message, hint=error.hint, code="invalid_lora", param="lora_path"
        ) from None
    return _source(folder, chosen, experts)


def _expanded(path: str) -> Path:
    try:
        place = Path(path).expanduser()
        place.is_dir()  # a name that is too long shows here
    except (OSError, RuntimeError, ValueError):
        raise _invalid(f"{shown(path)} is not a path of this machine.") from None
    return place


def _invalid(message: str, hint: str = "", param: str = "lora_path") -> RequestError:
    return RequestError(message, hint=hint, code="invalid_lora", param=param)
