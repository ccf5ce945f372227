"""Opens a native model: whole, or with components that stay away because somebody asked for it or
the memory budget is too small for the whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.device import pick_device
from sgl_diffusion.base.errors import OutOfMemoryError
from sgl_diffusion.engine.footprint.budget import (
    TILES,
    free_for_one,
    smallest_request,
    usual_request,
)
from sgl_diffusion.engine.footprint.trials import measure
from sgl_diffusion.engine.offload.plan import Choice, Part, choose, ways
from sgl_diffusion.engine.offload.take_up import asked, described, flags, option_of, take_up
from sgl_diffusion.engine.pipeline import Pipeline
from sgl_diffusion.loader.absent import Absences
from sgl_diffusion.loader.index import ModelIndex
from sgl_diffusion.recipes.fit import check_fits

Note = Callable[[str], None]
Recipe = Callable[[ModelIndex, EngineOptions, str], Pipeline]


def open_native(
    recipe: Recipe, index: ModelIndex, options: EngineOptions, name: str, note: Note
) -> Pipeline:
    """The model of `recipe`, with as much of it in the memory as there is to be."""
    device, forced = pick_device(options.device), asked(options)
    # What jobs take on several ranks is not counted.
    planned = options.memory_budget is not None and options.num_gpus == options.dp_size
    if not forced and not planned:
        check_fits(index, options)
        return recipe(index, options, name)
    absences = Absences()
    pipeline = recipe(index.without_weights(absences), options, name)
    chosen = forced
    if planned:
        note("counting what requests will take of the memory")
        pipeline.card = dataclasses.replace(pipeline.card, footprint=measure(pipeline))
        chosen = _planned(pipeline, absences, options, device).options
        if more := [option for option in chosen if option not in forced]:
            note(f"{flags(more)}: the whole model exceeds --memory-budget {options.memory_budget}")
    away = {part.name for part in absences.modules if option_of(part.name) in chosen}
    note("reading weights")
    pinned = options.pin_cpu_memory and device.type == "cuda"
    offload = take_up(absences, away, device, pinned=pinned)
    for part in offload:
        note(
            f"{part.component}: {part.away / 1e9:.2f} GB stay away, {part.resident / 1e9:.2f} GB "
            f"are loaded, {part.buffers / 1e9:.2f} GB for what is brought"
        )
    pipeline.card = dataclasses.replace(pipeline.card, offload=offload)
    return pipeline


def _planned(
    pipeline: Pipeline, absences: Absences, options: EngineOptions, device: torch.device
) -> Choice:
    """The cheapest way in which the usual request fits into the budget, else the smallest one."""
    most = free_for_one(options, device)
    assert most is not None, "a budget is a number"
    card = dataclasses.replace(pipeline.card, min_images=0)  # what is asked here has no picture
    counted = card.footprint
    assert counted is not None
    tiles = (options.vae_tile_size,) if options.vae_tile_size else (0, *TILES)
    parts = []
    for absent in absences.modules:
        split = described(absent)
        whole = split.away + split.resident
        parts.append(Part(option_of(absent.name), whole, split.resident + split.buffers))

    def usual(edge: int) -> float:
        tiled = dataclasses.replace(counted, tile_edge=edge)
        return tiled.job_bytes(usual_request(card))

    def smallest(edge: int) -> float:
        tiled = dataclasses.replace(counted, tile_edge=edge)
        return tiled.job_bytes(smallest_request(card))

    forced = asked(options)
    found = choose(parts, forced, tiles, usual, most) or _least(parts, forced, tiles, smallest)
    if found.need <= most:
        return found
    whole = sum(part.whole for part in parts)
    raise OutOfMemoryError(
        f"{pipeline.card.pipeline_class} does not fit: its weights take {whole / 1e9:.2f} GB, with "
        f"{flags(found.options)} {found.model / 1e9:.2f} GB, the smallest picture "
        f"{found.job / 1e9:.2f} GB, and --memory-budget {options.memory_budget} leaves "
        f"{most / 1e9:.2f} GB.",
        hint="Use a larger --memory-budget, lower precisions or a smaller model.",
    )


def _least(
    parts: list[Part], forced: tuple[str, ...], tiles: tuple[int, ...], job: Callable[[int], float]
) -> Choice:
    return min(ways(parts, forced, tiles, job), key=lambda way: way.need)
