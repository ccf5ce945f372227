"""The footprint of the jobs of a loaded model: its units of work, counted at a size or two.

Every tensor of a forward pass grows with a few numbers only: cells of the latents, rows, pixels. So
a peak is a line in them; what does not grow, such as a copy of some weights, is little beside it.
"""

from __future__ import annotations

import dataclasses
import math

from PIL import Image

from sgl_diffusion.base.footprint import Footprint, Shown
from sgl_diffusion.base.params import ResolvedParams, SamplingParams
from sgl_diffusion.engine.beginning import first_state
from sgl_diffusion.engine.contexts import Contexts
from sgl_diffusion.engine.denoise import denoise, shape_key
from sgl_diffusion.engine.footprint.counting import Counting
from sgl_diffusion.engine.job import Job
from sgl_diffusion.engine.pipeline import Condition, Pipeline

_EDGES = (512, 1024)  # of the trials, in pixels, or the nearest that the model takes
_CELLS = 3  # latent frames after which the chunks of a clip are alike
_PICTURE = 1024  # edge of the pictures that prompts are tried with: larger ones are made smaller
_HISTORY = 4  # tensors of a row's state, its latents among them; all in fp32


def measure(pipeline: Pipeline) -> Footprint:
    """What jobs take, with no room yet."""
    card, trials = pipeline.card, _Trials(pipeline)
    small, large = (trials.params(edge, 1) for edge in trials.edges())
    clip = trials.params(small.width, _CELLS) if card.makes_video else small
    text, condition_bytes, plain = trials.text(small)
    channels, *latents = trials.latents(small)
    cells, more_cells = math.prod(latents), math.prod(trials.latents(large)[1:])
    near = trials.shown(small) if card.edits == "native" else None
    conditions = [plain, plain]
    if near and card.makes_video and card.min_images:  # the picture is a part of what steps work on
        conditions = [near[2], trials.shown(large)[2]]
    step, batch = trials.step(small, conditions[0]), 2 if small.guided else 1
    step_cell = (trials.step(large, conditions[1]) - step) / (more_cells - cells) / batch
    still, left = trials.decode(small)
    chunk, chunk_left = trials.decode(clip) if card.makes_video else (still, left)
    shown = shown_kept = None
    shown_step = 0.0
    if near:
        sizes = (small, clip if card.makes_video else large)
        found, many = [near, trials.shown(sizes[1])], trials.pictures
        shown = _shown(sizes, [peak / many for peak, _, _ in found])
        shown_kept = _shown(sizes, [(left - condition_bytes) / many for _, left, _ in found])
        shown_step = max(trials.step(small, near[2]) - step, 0) / batch / many
    pixels = _pixels(small)
    return Footprint(
        room=0,
        text=text,
        condition=condition_bytes,
        shown=shown,
        shown_kept=shown_kept,
        shown_step=shown_step,
        step_row=max(step / batch - cells * step_cell, 0.0),
        step_cell=step_cell,
        still_pixel=still / pixels,
        clip_pixel=chunk / pixels,
        clip_kept_pixel=chunk_left / pixels,
        row_cell=4.0 * _HISTORY * channels,
        cell_pixels=pixels / cells,
        frames_per_cell=card.frame_multiple if card.makes_video else 1,
    )


class _Trials:
    """Units of work of small jobs, counted: the peak, and what stayed."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._counting = Counting()
        self.pictures = max(pipeline.card.min_images, 1)  # in a prompt that has any
        # Wishes are resolved here without them.
        self._card = dataclasses.replace(pipeline.card, min_images=0)

    def edges(self) -> list[int]:
        unit, most = self._card.size_multiple, self._card.max_edge
        large = min(-(-_EDGES[1] // unit), most // unit)
        small = max(min(-(-_EDGES[0] // unit), large // 2), 1)
        return [small * unit, large * unit]

    def params(self, edge: int, cells: int) -> ResolvedParams:
        """Two steps of a square job with `cells` latent frames and a prompt that is too long."""
        frames = 1 + (cells - 1) * self._card.frame_multiple
        words = " ".join(["cat"] * self._card.defaults.max_sequence_length)
        wish = SamplingParams(
            prompt=words, width=edge, height=edge, num_frames=frames, num_inference_steps=2
        )
        return self._card.resolve(wish, video=frames > 1)

    def latents(self, params: ResolvedParams) -> tuple[int, ...]:
        """Channels, frames, rows, columns."""
        with self._counting.of():
            return tuple(self._pipeline.noise(params, 0).shape[1:])

    def text(self, params: ResolvedParams) -> tuple[int, int, Condition]:
        with self._counting.of() as count:
            condition = self._pipeline.encode(params.prompt, params, [])
            return count.peak, count.left, condition

    def shown(self, params: ResolvedParams) -> tuple[int, int, Condition]:
        """A prompt with as many `pictures` as it needs."""
        picture = Image.new("RGB", (_PICTURE, _PICTURE))
        with self._counting.of() as count:
            condition = self._pipeline.encode(params.prompt, params, [picture] * self.pictures)
            return count.peak, count.left, condition

    def step(self, params: ResolvedParams, condition: Condition) -> int:
        """The peak of one of one row."""
        pipeline = self._pipeline
        job = Job("trial", params)
        job.solver = pipeline.solver(params)
        job.condition, job.negative = condition, condition if params.guided else None
        (row,) = job.rows
        with self._counting.of():
            row.state = first_state(None, pipeline.noise(params, row.seed), job.solver)
        key = shape_key(pipeline, row)
        with self._counting.of() as count:
            denoise(pipeline, key, [row], Contexts(pipeline).of(key, (row,)))
            return count.peak

    def decode(self, params: ResolvedParams) -> tuple[int, int]:
        """The peak of all chunks, and what is kept between two of them."""
        with self._counting.of():
            latents = self._pipeline.noise(params, 0)
        left = 0
        with self._counting.of() as count:
            for _ in self._pipeline.decode(latents):
                left = count.left
            return count.peak, left


def _shown(sizes: tuple[ResolvedParams, ResolvedParams], heights: list[float]) -> Shown:
    """The line through what was counted at two sizes: of pictures, or of a still and a clip."""
    (small, large), (low, high) = sizes, heights
    pixels = _pixels(small)
    if large.num_frames > 1:
        each = max(high - low, 0) / pixels / (large.num_frames - small.num_frames)
        return Shown(pixel=max(low / pixels - each, 0.0), clip_pixel=each)
    each = max(high - low, 0) / (_pixels(large) - pixels)
    return Shown(fixed=max(low - pixels * each, 0.0), pixel=each)


def _pixels(params: ResolvedParams) -> int:
    return params.width * params.height
