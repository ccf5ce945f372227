"""Partial pictures: after some of its steps, what a row's latents are on the way to. Of a clip that
is one latent frame from its middle, decoded alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sgl_diffusion.base.params import ResolvedParams

if TYPE_CHECKING:
    from torch import Tensor

    from sgl_diffusion.engine.job import Row


@dataclass(frozen=True)
class Preview:
    """`latents` are the clean latents as step number `step` of the row predicted them."""

    index: int
    step: int
    latents: Tensor


def preview_steps(params: ResolvedParams) -> list[int]:
    """After how many steps the partial pictures are made: evenly spread, never after the last. A
    short job has fewer of them than were asked for."""
    steps, count = params.num_inference_steps - params.start_step, params.partial_images
    spread = {(part * steps + (count + 1) // 2) // (count + 1) for part in range(1, count + 1)}
    return sorted(step for step in spread if 0 < step < steps)


def take_preview(row: Row) -> None:
    """Keep the present prediction of a row if a partial picture is due after its latest step."""
    if not row.job.params.partial_images:
        return
    due = preview_steps(row.job.params)
    if row.ran in due:
        assert row.state is not None
        x0 = row.state.x0
        middle = x0.shape[2] // 2
        latents = x0[:, :, middle : middle + 1]
        row.previews.append(Preview(due.index(row.ran), row.ran, latents))
