"""Which models an earlier download left in the hub's cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sgl_diffusion.base.errors import SetupError
from sgl_diffusion.loader.index import INDEX_NAME, read_index


@dataclass(frozen=True)
class CachedModel:
    """`size` is in bytes, over everything that is stored of the repository."""

    id: str
    pipeline: str
    folder: Path
    size: int


def hub_cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def cached_models(cache: Path) -> list[CachedModel]:
    """Models in diffusers format, by name; other repositories are left out."""
    found = []
    for repo in sorted(cache.glob("models--*")):
        indexes = sorted(
            repo.glob(f"snapshots/*/{INDEX_NAME}"), key=lambda file: file.lstat().st_mtime
        )
        if not indexes:
            continue
        try:
            pipeline = read_index(indexes[-1].parent).pipeline
        except SetupError:
            continue  # a broken download: serving it says what is wrong
        blobs = [file for file in repo.glob("blobs/*") if file.is_file()]
        if not blobs:  # a file system without links keeps the files themselves
            blobs = [file for file in repo.glob("snapshots/**/*") if file.is_file()]
        name = repo.name.removeprefix("models--").replace("--", "/")
        size = sum(file.stat().st_size for file in blobs)
        found.append(CachedModel(name, pipeline, indexes[-1].parent, size))
    return found
