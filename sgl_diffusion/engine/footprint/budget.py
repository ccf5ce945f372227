"""What a worker may take of the memory, and what its model leaves of that for jobs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.errors import OutOfMemoryError, RequestError
from sgl_diffusion.base.footprint import Footprint, check_memory
from sgl_diffusion.base.log import get_logger
from sgl_diffusion.base.memory import memory_budget
from sgl_diffusion.base.params import ModelCard, ResolvedParams, SamplingParams
from sgl_diffusion.engine.footprint.identity import identity
from sgl_diffusion.engine.footprint.kept import Kept
from sgl_diffusion.engine.footprint.trials import measure
from sgl_diffusion.engine.footprint.usage import give_back, taken
from sgl_diffusion.engine.pipeline import Counted, Pipeline

log = get_logger(__name__)

TILES = (512, 256)  # edges that are tried where a frame cannot be decoded whole


def free_for_one(options: EngineOptions, device: torch.device) -> int | None:
    """Bytes that one worker may still take; None where nobody knows."""
    free = memory_budget(options.memory_budget, device)
    shares = options.dp_size if device.type == "cpu" else 1  # replicas live side by side
    return None if free is None else free // shares


class Budget:
    """Made before the model is loaded: what is free then is for the model and its jobs."""

    def __init__(self, options: EngineOptions, device: torch.device) -> None:
        self._options = options
        self._device = device
        free = free_for_one(options, device)
        self._most = None if free is None else free + taken(device)

    def footprint(self, pipeline: Pipeline, note: Callable[[str], None]) -> Footprint | None:
        """What jobs take and have room for; None where nobody knows how much memory there is."""
        if self._most is None:
            return None
        try:
            counted = (
                pipeline.counted
                if isinstance(pipeline, Counted)
                else counted_once(pipeline, self._options, note)
            )
        except Exception:  # whether the model itself works is for the warm-up to find out
            log.exception("not counted: no request will be refused for its size")
            return None
        give_back()
        # Buffers come and go: those of all components may be there at once.
        buffers = sum(part.buffers for part in pipeline.card.offload)
        room = max(self._most - taken(self._device) - buffers, 0)
        edge = self._options.vae_tile_size
        footprint = dataclasses.replace(counted, room=room, tile_edge=edge)
        # What is asked here comes with no picture.
        card = dataclasses.replace(pipeline.card, min_images=0)
        if self._options.memory_budget is not None and not edge:
            footprint = _tiled(footprint, usual_request(card), note)
        card = dataclasses.replace(card, footprint=footprint)
        _check_smallest(card)
        try:
            check_memory(card, usual_request(card))
        except RequestError as error:
            log.warning("requests that name no size will be refused: %s", error)
        return footprint


def counted_once(
    pipeline: Pipeline, options: EngineOptions, note: Callable[[str], None]
) -> Footprint:
    """What jobs take, from an earlier start of this very model where there is a data folder."""
    kept = None if options.data_dir is None else Kept(Path(options.data_dir))
    name = "" if kept is None else identity(pipeline)
    found = None if kept is None else kept.find(name)
    if found is None:
        note("counting what requests will take of the memory")
        found = measure(pipeline)
        if kept is not None:
            kept.keep(name, found)
    return found


def _tiled(footprint: Footprint, usual: ResolvedParams, note: Callable[[str], None]) -> Footprint:
    """With tiles, if only with them a request that names no size fits."""
    if footprint.job_bytes(usual) <= footprint.room:
        return footprint
    for edge in TILES:
        tiled = dataclasses.replace(footprint, tile_edge=edge)
        if tiled.job_bytes(usual) <= footprint.room:
            note(f"frames are decoded in tiles of {edge} pixels: whole they exceed the budget")
            return tiled
    return footprint


def _check_smallest(card: ModelCard) -> None:
    footprint, least = card.footprint, smallest_request(card)
    assert footprint is not None
    if footprint.job_bytes(least) > footprint.room:
        raise OutOfMemoryError(
            f"The model is loaded, and {footprint.room / 1e9:.2f} GB are left for requests: the "
            f"smallest picture takes {footprint.job_bytes(least) / 1e9:.2f} GB.",
            hint="Use a larger --memory-budget, lower precisions or a smaller model.",
        )


def usual_request(card: ModelCard) -> ResolvedParams:
    """A request that says nothing but its prompt."""
    plain = dataclasses.replace(card, footprint=None)
    return plain.resolve(SamplingParams(prompt="a"), video=card.makes_video)


def smallest_request(card: ModelCard) -> ResolvedParams:
    edge = card.size_multiple
    return dataclasses.replace(usual_request(card), width=edge, height=edge, num_frames=1)
