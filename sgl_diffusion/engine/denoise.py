"""One denoise step of a batch of rows: the place where batching, guidance and solver meet.

Rows of a batch share a shape key and nothing else: each has its own timestep, solver history, seed
and guidance scale. The caller decides who is in the batch; between two calls rows may come and go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sgl_diffusion.components.samplers import Solver, SolverState, advance, stack
from sgl_diffusion.engine.beginning import keep_origin
from sgl_diffusion.engine.graphs.capture import Pass
from sgl_diffusion.engine.job import Row
from sgl_diffusion.engine.parallel.branches import Branches
from sgl_diffusion.engine.pipeline import Context, PacksSizes, Pipeline


@dataclass(frozen=True)
class ShapeKey:
    """Rows with equal keys can share a forward pass."""

    latents: tuple[int, ...]
    text: int
    expert: int
    guided: bool  # with and without the prompt
    alone: bool = False  # a row that may reuse its steps shares none
    packed: bool = False  # rows and columns are not in `latents`: they may differ
    gated: bool = False  # with the prompt alone, and guidance as an earlier step found it


def shape_key(pipeline: Pipeline, row: Row) -> ShapeKey:
    """The key of the row's next step (the expert may change on the way)."""
    assert row.state is not None, "the job is not encoded"
    params, timesteps = row.job.params, _solver(row).timesteps
    expert = pipeline.expert(float(timesteps[row.step]))
    guided, gated = params.guided_at(row.step), False
    if guided and row.gap is not None and params.gated_at(row.step):
        # What one expert found tells nothing of the next.
        gated = pipeline.expert(float(timesteps[row.step - 1])) == expert
    return ShapeKey(
        latents=tuple(row.state.x.shape[1 : 3 if row.job.packs else None]),
        text=pipeline.text_bucket(row.job.condition),
        expert=expert,
        guided=guided and not gated,
        alone=params.enable_teacache,
        packed=row.job.packs,
        gated=gated,
    )


def denoise(pipeline: Pipeline, key: ShapeKey, rows: Sequence[Row], context: Context) -> None:
    """Advance every row by one step."""
    move(rows, next_states(pipeline, key, rows, context))


def move(rows: Sequence[Row], states: Sequence[SolverState]) -> None:
    """The step that leads to these states is done."""
    for row, state in zip(rows, states, strict=True):
        row.step += 1
        row.state = state


@torch.inference_mode()
def next_states(
    pipeline: Pipeline,
    key: ShapeKey,
    rows: Sequence[Row],
    context: Context,
    branches: Branches | None = None,
    run: Pass | None = None,
) -> list[SolverState]:
    """What a step makes of every row: one forward pass, one guidance, one solver update. The rows
    stay as they are, but for a gap to keep, so any thread may do it. `run` may stand for the
    pipeline's own pass over rows of one size."""
    run = run or pipeline.velocity
    device = pipeline.device
    states = [row.state for row in rows if row.state is not None]
    timesteps = _upload([_solver(row).timesteps[row.step] for row in rows], device)
    table = _upload([_solver(row).table[row.step] for row in rows], device)
    guidance = None
    if key.guided or key.gated:
        scales = [torch.tensor(row.job.params.cfg_scale(key.expert)) for row in rows]
        guidance = _upload(scales, device)
    if len({state.x.shape for state in states}) > 1:
        moved = _packed(pipeline, key, rows, timesteps, context, guidance, table)
    else:
        state = stack(states)
        if key.guided:
            branches = branches or Branches()
            velocity = branches.velocity(run, state.x, timesteps, context, key.expert)
        else:
            velocity = run(state.x, timesteps, context, key.expert)
        velocity = _both(key, rows, velocity)
        moved = _moved(pipeline, state, velocity, guidance, table).rows()
    return [_keep(row, state) for row, state in zip(rows, moved, strict=True)]


def _packed(
    pipeline: Pipeline,
    key: ShapeKey,
    rows: Sequence[Row],
    timesteps: Tensor,
    context: Context,
    guidance: Tensor | None,
    table: Tensor,
) -> list[SolverState]:
    """The step of rows of different sizes: one forward pass, then each row by itself."""
    assert isinstance(pipeline, PacksSizes) and key.packed, "these rows do not fit together"
    count = len(rows)
    latents = [row.state.x for row in rows if row.state is not None]
    if key.guided:
        latents, timesteps = 2 * latents, timesteps.repeat(2)
    found = pipeline.velocity_packed(latents, timesteps, context, key.expert)
    scales: Sequence[Tensor | None] = [None] * count if guidance is None else guidance.split(1)
    moved = []
    for place, (row, scale, line) in enumerate(zip(rows, scales, table.split(1), strict=True)):
        assert row.state is not None
        velocity = _both(key, [row], torch.cat(found[place::count]))
        moved.append(_moved(pipeline, row.state, velocity, scale, line))
    return moved


def _both(key: ShapeKey, rows: Sequence[Row], velocity: Tensor) -> Tensor:
    """The velocities of a guided step [2B, ...]: with the prompt and without it. Of a gated step
    the second half is as far from the first as it was when it was computed last."""
    if key.gated:
        gaps = [row.gap for row in rows if row.gap is not None]
        with_prompt = velocity.float()
        return torch.cat([with_prompt, with_prompt - torch.cat(gaps)])
    if key.guided:
        with_prompt, without = velocity.chunk(2)
        for place, row in enumerate(rows):
            if row.job.params.gated:
                row.gap = with_prompt[place, None].float() - without[place, None].float()
    return velocity


def _moved(
    pipeline: Pipeline,
    state: SolverState,
    velocity: Tensor,
    guidance: Tensor | None,
    table: Tensor,
) -> SolverState:
    """Guidance, of velocities [2B, ...] with and without prompt, and the solver's update."""
    if guidance is None:
        return advance(state, velocity, table)
    with_prompt, without = velocity.chunk(2)
    if pipeline.combine is None:
        return advance(state, with_prompt, table, unguided=without, guidance=guidance)
    # In fp32: a scale of 7.3 is 7.3125 in bf16, and guidance multiplies what was rounded off.
    scale = guidance.view(-1, *[1] * (velocity.dim() - 1))
    return advance(state, pipeline.combine(with_prompt.float(), without.float(), scale), table)


def _keep(row: Row, state: SolverState) -> SolverState:
    origin = row.job.origin
    if origin is None or row.noise is None:
        return state
    return keep_origin(origin, state, row.noise, _solver(row).sigma(row.step + 1))


def _solver(row: Row) -> Solver:
    assert row.job.solver is not None, "the job is not encoded"
    return row.job.solver


def _upload(rows: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Host values of the rows on the device, without making the host wait for it."""
    stacked = torch.stack(rows)
    if device.type == "cuda":
        stacked = stacked.pin_memory()
    return stacked.to(device, non_blocking=True)
