"""Opens a native model: whole, or with components that stay away because somebody asked for it or
the memory budget is too small for the whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import cast

import torch

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.device import pick_device
from sgl_diffusion.base.errors import OutOfMemoryError
from sgl_diffusion.base.footprint import Footprint
from sgl_diffusion.base.params import ModelCard
from sgl_diffusion.base.startup import spent_on
from sgl_diffusion.engine.footprint.budget import (
    TILES,
    counted_once,
    free_for_one,
    smallest_request,
    usual_request,
)
from sgl_diffusion.engine.offload.plan import (
    DIT,
    Choice,
    Part,
    asked,
    choose,
    flags,
    model_bytes,
    ways,
)
from sgl_diffusion.engine.offload.take_up import described, option_of, take_up
from sgl_diffusion.engine.pipeline import Counted, Pipeline
from sgl_diffusion.engine.quantise import saved_bytes
from sgl_diffusion.loader.absent import Absences, AbsentModule
from sgl_diffusion.loader.index import ModelIndex
from sgl_diffusion.recipes.fit import check_fits

Note = Callable[[str], None]
Recipe = Callable[[ModelIndex, EngineOptions, str], Pipeline]


def open_native(
    recipe: Recipe, index: ModelIndex, options: EngineOptions, name: str, note: Note
) -> Pipeline:
    """The model of `recipe`, with as much of it in the memory as there is to be."""
    device, forced = pick_device(options.device), asked(options)
    if options.pin_cpu_memory and device.type == "cpu":
        note("--pin-cpu-memory: the model runs on the CPU, so there is nothing to pin")
    # What jobs take on several ranks is not counted.
    planned = options.memory_budget is not None and options.num_gpus == options.dp_size
    quantised = options.quantization != "none"
    if not forced and not planned and not quantised:
        check_fits(index, options)
        return recipe(index, options, name)
    absences = Absences()
    pipeline = recipe(index.without_weights(absences), options, name)
    chosen = forced
    parts = [_part(absent, options) for absent in absences.modules]
    if planned:
        with spent_on("memory"):
            counted = counted_once(pipeline, options, note)
        chosen = _planned(pipeline.card, counted, parts, options, device).options
        if more := [option for option in chosen if option not in forced]:
            note(f"{flags(more)}: the whole model exceeds --memory-budget {options.memory_budget}")
        if not quantised:  # what was counted are steps of the layers before
            cast(Counted, pipeline).counted = counted
    else:
        _check_model(parts, forced, options, device)
    away = {part.name for part in absences.modules if option_of(part.name) in chosen}
    note("reading weights")
    pinned = options.pin_cpu_memory and device.type == "cuda"
    with spent_on("weights"):
        offload = take_up(absences, away, device, pinned=pinned, quantization=options.quantization)
    for part in offload:
        note(
            f"{part.component}: {part.away / 1e9:.2f} GB stay away, {part.resident / 1e9:.2f} GB "
            f"are loaded, {part.buffers / 1e9:.2f} GB for what is brought"
        )
    card = dataclasses.replace(pipeline.card, offload=offload)
    if quantised:
        card = dataclasses.replace(card, dit_precision=options.quantization)
    pipeline.card = card
    return pipeline


def _part(absent: AbsentModule, options: EngineOptions) -> Part:
    """What a component takes, as a whole and offloaded."""
    found, option = described(absent), option_of(absent.name)
    whole = found.away + found.resident
    if option == DIT and options.quantization != "none":
        smaller = whole - saved_bytes(absent.module)
        return Part(None, smaller, smaller)
    return Part(option, whole, found.resident + found.buffers)


def _check_model(
    parts: Sequence[Part], forced: tuple[str, ...], options: EngineOptions, device: torch.device
) -> None:
    """Refuse what does not fit even so."""
    most, need = free_for_one(options, device), model_bytes(parts, forced)
    if most is not None and need > most:
        raise OutOfMemoryError(
            f"The model takes {need / 1e9:.2f} GB of memory with these options, and "
            f"{device.type} has {most / 1e9:.2f} GB for it.",
            hint="Offload more components, use lower precisions or a smaller model.",
        )


def _planned(
    card: ModelCard,
    counted: Footprint,
    parts: Sequence[Part],
    options: EngineOptions,
    device: torch.device,
) -> Choice:
    """The cheapest way in which the usual request fits into the budget, else the smallest one."""
    most = free_for_one(options, device)
    assert most is not None, "a budget is a number"
    card = dataclasses.replace(card, min_images=0)  # what is asked here has no picture
    tiles = (options.vae_tile_size,) if options.vae_tile_size else (0, *TILES)

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
    # A small model may have nothing to offload that is larger than the buffers for it.
    least = f"with {flags(found.options)} {found.model / 1e9:.2f} GB, " if found.options else ""
    raise OutOfMemoryError(
        f"{card.pipeline_class} does not fit: its weights take {whole / 1e9:.2f} GB, {least}"
        f"the smallest picture {found.job / 1e9:.2f} GB, and "
        f"--memory-budget {options.memory_budget} leaves {most / 1e9:.2f} GB.",
        hint="Use a larger --memory-budget, lower precisions or a smaller model.",
    )


def _least(
    parts: Sequence[Part],
    forced: tuple[str, ...],
    tiles: tuple[int, ...],
    job: Callable[[int], float],
) -> Choice:
    return min(ways(parts, forced, tiles, job), key=lambda way: way.need)
