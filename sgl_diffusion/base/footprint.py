"""What jobs take of the memory: numbers that a worker counted when it loaded its model.

Free of torch: a server tells from them, before anything is queued, whether a request fits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sgl_diffusion.base.errors import RequestError

if TYPE_CHECKING:
    from sgl_diffusion.base.params import ModelCard, ResolvedParams

_PIXEL = 3  # bytes of a finished one
_BLENDED = 30  # bytes of one while tiles are put together
_OVERLAP = 16 / 9  # tiles overlap by a quarter
_GATED = 5 / 4  # what a row keeps that remembers what guidance found, beside the four of its state
_COPIES = 3  # of the finished frames: chunks, the clip of them, and what the server is handed


@dataclass(frozen=True, kw_only=True)
class Shown:
    """Bytes of a picture in a prompt: `fixed`, for each pixel of a frame of the output, and for
    each pixel of all its frames."""

    fixed: float = 0.0
    pixel: float = 0.0
    clip_pixel: float = 0.0

    def of(self, params: ResolvedParams) -> float:
        pixels = _pixels(params)
        each = self.fixed + pixels * (self.pixel + params.num_frames * self.clip_pixel)
        return len(params.images) * each


@dataclass(frozen=True, kw_only=True)
class Offloaded:
    """A component whose blocks are away until they are needed: bytes of those, of the rest, and of
    the buffers that the blocks are brought to."""

    component: str
    away: int
    resident: int
    buffers: int


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes that one job takes beyond the loaded model.

    Units of work take them and give them back: `text` a prompt, and `shown` one with a picture in
    it; `step_row` and `step_cell` a denoise step, for each of its batch and each cell of their
    latents, where guidance makes two of a row, with `shown_step` for each picture in its prompt;
    `still_pixel` and `clip_pixel` one chunk of a decode. A picture that the VAE encodes takes no
    more than a still.

    In between a job keeps `condition` for each prompt, `shown_kept` for each picture in it and
    `row_cell` for each cell of its rows; a clip that is being decoded keeps `clip_kept_pixel`.
    """

    room: int  # bytes that jobs can take
    text: float
    condition: float
    shown: Shown | None  # None where pictures are no part of prompts
    shown_kept: Shown | None
    shown_step: float
    step_row: float
    step_cell: float
    still_pixel: float
    clip_pixel: float
    clip_kept_pixel: float
    row_cell: float
    cell_pixels: float  # pixels of a frame for each cell of a latent frame
    frames_per_cell: int
    tile_edge: int = 0  # of the tiles that frames are decoded in; 0: whole

    def cells(self, params: ResolvedParams) -> float:
        """Of the latents of one row."""
        frames = (params.num_frames - 1) // self.frames_per_cell + 1
        return frames * _pixels(params) / self.cell_pixels

    def encode_bytes(self, params: ResolvedParams) -> float:
        """What is done before the first step."""
        if not params.images:
            return self.text
        shown = 0.0 if self.shown is None else self.shown.of(params)
        own = self.shown is not None and params.mask is None
        return max(self.text, shown, 0.0 if own else self.still_pixel * _pixels(params))

    def step_bytes(self, params: ResolvedParams) -> float:
        """One denoise step of one row."""
        return self.row_bytes(self.cells(params), params.guided, len(params.images))

    def row_bytes(self, cells: float, guided: bool, pictures: int) -> float:
        """Of each row of a step: so many cells of latents, so many pictures in its prompts."""
        each = self.step_row + cells * self.step_cell + pictures * self.shown_step
        return (2 if guided else 1) * each

    def decode_bytes(self, params: ResolvedParams) -> float:
        """One chunk of one row, and what is kept for the next one."""
        pixel = self.still_pixel
        if params.num_frames > 1:
            pixel = max(self.clip_pixel, pixel if params.partial_images else 0.0)
        pixels = _pixels(params)
        if not 0 < self.tile_edge**2 < pixels:
            return pixel * pixels
        # One tile at work, all of them between two chunks, and the frames they are put together to.
        kept = self.decoding_kept(params)
        work = (pixel - kept / pixels) * self.tile_edge**2
        frames = min(params.num_frames, self.frames_per_cell)
        return kept + max(work, 0.0) + _BLENDED * pixels * frames

    def kept(self, params: ResolvedParams) -> float:
        """From the first step on, between any two units."""
        condition = self.condition
        if self.shown_kept is not None:
            condition += self.shown_kept.of(params)
        rows = len(params.seeds) * self.cells(params) * self.row_cell
        rows *= _GATED if params.gated else 1.0
        return (2 if params.guided else 1) * condition + rows

    def frames(self, params: ResolvedParams) -> float:
        """All finished ones."""
        return _PIXEL * _pixels(params) * params.num_frames * len(params.seeds)

    def decoding_kept(self, params: ResolvedParams) -> float:
        """Between two chunks of a row."""
        if params.num_frames == 1:
            return 0.0
        pixels = _pixels(params)
        overlap = _OVERLAP if 0 < self.tile_edge**2 < pixels else 1.0
        return self.clip_kept_pixel * pixels * overlap

    def job_bytes(self, params: ResolvedParams) -> float:
        """The least that a job can be run in: one row at a time, one unit at a time."""
        frames = self.frames(params)
        return self.kept(params) + max(
            self.encode_bytes(params),
            self.step_bytes(params),
            frames + self.decode_bytes(params),
            _COPIES * frames,
        )


def check_memory(card: ModelCard, params: ResolvedParams) -> None:
    """Refuse a job that does not fit into the memory, and name what would."""
    footprint = card.footprint
    if footprint is None or footprint.job_bytes(params) <= footprint.room:
        return
    frames = f", {params.num_frames} frames" if params.num_frames > 1 else ""
    outputs = f", {len(params.seeds)} outputs" if len(params.seeds) > 1 else ""
    raise RequestError(
        f"{params.width}x{params.height}{frames}{outputs} needs about "
        f"{_gb(footprint.job_bytes(params))} beside the model, and {_gb(footprint.room)} "
        "are there.",
        hint=_what_fits(card, params),
        code="request_too_large",
        param="size",
    )


def _what_fits(card: ModelCard, params: ResolvedParams) -> str:
    """Single changes that are enough."""
    footprint, unit, per = card.footprint, card.size_multiple, card.frame_multiple
    assert footprint is not None
    outputs, longest = len(params.seeds), max(params.width, params.height)

    def fewer(count: int) -> ResolvedParams:
        return dataclasses.replace(params, seeds=params.seeds[:count])

    def smaller(units: int) -> ResolvedParams:
        scaled = (edge * units // longest for edge in (params.width, params.height))
        width, height = (max(edge, 1) * unit for edge in scaled)
        return dataclasses.replace(params, width=width, height=height)

    def shorter(cells: int) -> ResolvedParams:
        return dataclasses.replace(params, num_frames=1 + cells * per)

    changes = []
    if count := _largest(footprint, fewer, outputs - 1):
        changes.append(f"{count} output{'s' if count > 1 else ''}")
    if count := _largest(footprint, smaller, longest // unit - 1):
        changes.append(f"size {smaller(count).width}x{smaller(count).height}")
    if count := _largest(footprint, shorter, (params.num_frames - 1) // per - 1):
        changes.append(f"{shorter(count).num_frames} frames")
    if not changes:
        return "The operator can use lower precisions, a smaller model or a larger --memory-budget."
    return f"Ask for {', or '.join(changes)}."


def _largest(footprint: Footprint, change: Callable[[int], ResolvedParams], most: int) -> int:
    """The largest number up to `most` with which a job fits; 0 where none does."""
    low, high = 0, max(most, 0)
    while low < high:
        middle = (low + high + 1) // 2
        if footprint.job_bytes(change(middle)) <= footprint.room:
            low = middle
        else:
            high = middle - 1
    return low


def _pixels(params: ResolvedParams) -> int:
    return params.width * params.height


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
