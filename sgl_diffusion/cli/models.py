"""`sglang models`: what is served natively, with which defaults, and what is downloaded."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sgl_diffusion.base.options import option
from sgl_diffusion.cli.args import Parser, parser_for, read
from sgl_diffusion.recipes import demo

if TYPE_CHECKING:
    from sgl_diffusion.base.params import SamplingDefaults
    from sgl_diffusion.loader.cache import CachedModel
    from sgl_diffusion.recipes.catalog import Entry

DESCRIPTION = "List the models with a native recipe, their defaults, and what is downloaded."


@dataclass(frozen=True, kw_only=True)
class ModelsOptions:
    """`sglang models`."""

    json: bool = option(False, "One JSON object instead of tables.")


def parser() -> Parser:
    return parser_for(ModelsOptions, "sglang models", DESCRIPTION)


def main(argv: list[str]) -> int:
    options = read(ModelsOptions, parser(), argv).value
    from sgl_diffusion.loader.cache import cached_models, hub_cache
    from sgl_diffusion.recipes.catalog import CATALOG
    from sgl_diffusion.recipes.registry import NATIVE

    folder = hub_cache()
    cached = cached_models(folder)
    if options.json:
        native = [_fields(entry) for entry in CATALOG]
        here = [{**_cached(model), "native": model.pipeline in NATIVE} for model in cached]
        print(json.dumps({"native": native, "cached": here, "cache": str(folder)}, indent=2))
        return 0
    rows = [("MODEL", "PIPELINE CLASS", "TASKS", "DEFAULTS")]
    for entry in CATALOG:
        tasks = " ".join(entry.tasks)
        rows.append((entry.model, entry.pipeline_class, tasks, described(entry.defaults)))
    print(f"Without --model-path: {demo.NAME}, {demo.NOTE}.")
    print("Native recipes; every other diffusers pipeline runs with --backend diffusers.\n")
    _table(rows)
    print(f"\nDownloaded to {folder}{':' if cached else ': nothing.'}")
    if cached:
        print()
        lines = [("MODEL", "PIPELINE CLASS", "BACKEND", "SIZE")]
        for model in cached:
            backend = "native" if model.pipeline in NATIVE else "diffusers"
            lines.append((model.id, model.pipeline, backend, f"{model.size / 1e9:.2f} GB"))
        _table(lines)
    return 0


def _fields(entry: Entry) -> dict[str, Any]:
    return {
        "model": entry.model,
        "family": entry.family,
        "pipeline_class": entry.pipeline_class,
        "tasks": list(entry.tasks),
        "defaults": dataclasses.asdict(entry.defaults),
    }


def _cached(model: CachedModel) -> dict[str, Any]:
    return {"model": model.id, "pipeline_class": model.pipeline, "bytes": model.size}


def described(defaults: SamplingDefaults) -> str:
    """Only what differs from doing nothing."""
    parts = [f"{defaults.width}x{defaults.height}"]
    if defaults.num_frames > 1:
        parts.append(f"{defaults.num_frames} frames at {defaults.fps} fps")
    parts.append(f"{defaults.num_inference_steps} steps")
    parts.append(f"guidance {defaults.guidance_scale:g}")
    if defaults.guidance_scale_2 is not None:
        parts.append(f"and {defaults.guidance_scale_2:g}")
    if defaults.true_cfg_scale is not None:
        parts.append(f"true_cfg {defaults.true_cfg_scale:g}")
    return ", ".join(parts).replace(", and", " and")


def _table(rows: list[tuple[str, str, str, str]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        print("  ".join([*cells, row[3]]))
