"""Our solver tables against diffusers' schedulers, step by step."""

from __future__ import annotations

import math

import pytest
import torch

from sgl_diffusion.base.errors import ConfigError, RequestError
from sgl_diffusion.components.samplers import (
    UNSUPPORTED,
    Solver,
    SolverState,
    Spacing,
    advance,
    dynamic_mu,
    make_solver,
    stack,
)
from sgl_diffusion.components.samplers.solver import COLUMNS

WAN = {
    "_class_name": "UniPCMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
    "num_train_timesteps": 1000,
}
EULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
STEPS = (1, 2, 3, 4, 5, 8, 20, 50, 200)
SHAPE = (1, 3, 2, 4, 5)


def velocity_at(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A smooth, nonlinear stand-in for a model."""
    return torch.sin(1.7 * x + t / 300) - 0.6 * x


def oracle_path(config: dict, steps: int, shift: float | None) -> tuple[list, torch.Tensor]:
    import diffusers

    kind = getattr(diffusers, config["_class_name"])
    changed = {}
    if shift is not None:
        changed = {"flow_shift" if "flow_shift" in config else "shift": shift}
    scheduler = kind.from_config({**config, **changed})
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)  # as the pipelines do; timesteps may repeat
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(steps))
    path = []
    for t in scheduler.timesteps:
        x = scheduler.step(velocity_at(x, t.float()), t, x, return_dict=False)[0]
        path.append(x)
    return path, scheduler.timesteps.float()


def our_path(solver: Solver, noise: torch.Tensor) -> list[SolverState]:
    state = SolverState.start(noise)
    path = []
    for t, row in zip(solver.timesteps, solver.table, strict=True):
        state = advance(state, velocity_at(state.x, t), row[None])
        path.append(state)
    return path


@pytest.mark.parametrize("shift", [None, 1.0, 5.0, 16.0])
@pytest.mark.parametrize("config", [WAN, {**WAN, "solver_order": 1}, EULER], ids=str)
def test_every_step_equals_diffusers(config: dict, shift: float | None) -> None:
    for steps in STEPS:
        path, timesteps = oracle_path(config, steps, shift)
        solver = make_solver(config, steps, shift)
        torch.testing.assert_close(solver.timesteps, timesteps, atol=1e-4, rtol=0)
        noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(steps))
        for ours, theirs in zip(our_path(solver, noise), path, strict=True):
            torch.testing.assert_close(ours.x, theirs, atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("config", [WAN, {**WAN, "solver_order": 1}, EULER], ids=str)
@pytest.mark.parametrize("steps", [1, 2, 3, 9, 20])
def test_a_path_that_begins_later_equals_diffusers(config: dict, steps: int) -> None:
    import diffusers

    for start in {0, 1, steps // 2, steps - 1, steps}:
        scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
        scheduler.set_timesteps(steps)
        scheduler.set_begin_index(start)
        solver = make_solver(config, steps, start=start)
        assert solver.sigma(start) == pytest.approx(float(scheduler.sigmas[start]), abs=1e-6)
        theirs = torch.randn(SHAPE, generator=torch.Generator().manual_seed(steps))
        ours = SolverState.start(theirs)
        for i, t in enumerate(scheduler.timesteps[start:], start):
            theirs = scheduler.step(velocity_at(theirs, t.float()), t, theirs, return_dict=False)[0]
            ours = advance(ours, velocity_at(ours.x, solver.timesteps[i]), solver.table[i : i + 1])
            torch.testing.assert_close(ours.x, theirs, atol=3e-5, rtol=1e-5)


def test_unipc_timesteps_are_whole() -> None:
    assert make_solver(WAN, 2).timesteps.tolist() == [999.0, 750.0]


@pytest.mark.parametrize("config", [WAN, EULER], ids=["unipc", "euler"])
def test_the_last_step_returns_the_clean_prediction(config: dict) -> None:
    final = our_path(make_solver(config, 4), torch.randn(SHAPE))[-1]
    assert torch.equal(final.x, final.x0)


def test_rows_of_one_batch_may_differ_in_step_order_and_sampler() -> None:
    solvers = [make_solver(WAN, 3), make_solver(WAN, 9, 8.0), make_solver(EULER, 5)]
    noises = [torch.randn(SHAPE, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    alone = [our_path(s, n) for s, n in zip(solvers, noises, strict=True)]
    starts = (0, 5, 2)
    states = [
        path[start - 1] if start else SolverState.start(noise)
        for path, start, noise in zip(alone, starts, noises, strict=True)
    ]
    batch = stack(states)
    for step in range(3):
        now = [start + step for start in starts]
        t = torch.stack([s.timesteps[i] for s, i in zip(solvers, now, strict=True)])
        rows = torch.stack([s.table[i] for s, i in zip(solvers, now, strict=True)])
        batch = advance(batch, velocity_at(batch.x, t.view(-1, 1, 1, 1, 1)), rows)
        for single, path, i in zip(batch.rows(), alone, now, strict=True):
            torch.testing.assert_close(single.x, path[i].x, atol=1e-6, rtol=1e-6)


def test_advance_leaves_its_input_alone() -> None:
    state = SolverState.start(torch.randn(SHAPE))
    kept = [t.clone() for t in state]
    advance(state, torch.randn(SHAPE), make_solver(WAN, 4).table[:1])
    assert all(torch.equal(a, b) for a, b in zip(state, kept, strict=True))


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("terminal", [None, 0.02])
@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("steps", [2, 4, 28])
def test_schedules_of_the_image_families_equal_diffusers(
    kind: str, terminal: float | None, even: bool, dynamic: bool, steps: int
) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    config = {
        **EULER,
        "use_dynamic_shifting": dynamic,
        "time_shift_type": kind,
        "shift_terminal": terminal,
    }
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    sigmas = torch.linspace(1, 1 / steps, steps, dtype=torch.float64).numpy() if even else None
    mu = 0.83 if dynamic else None
    scheduler.set_timesteps(steps, sigmas=sigmas, mu=mu)
    solver = make_solver(config, steps, spacing=Spacing(mu=mu, even=even))
    torch.testing.assert_close(solver.timesteps, scheduler.timesteps, atol=2e-4, rtol=0)
    sigma = solver.table[:, COLUMNS.index("sigma")]
    torch.testing.assert_close(sigma, scheduler.sigmas[:-1], atol=2e-7, rtol=0)


def test_a_single_step_goes_all_the_way_whatever_the_last_sigma_is_to_be() -> None:
    (sigma,) = make_solver(
        {**EULER, "shift_terminal": 0.02}, 1, spacing=Spacing(mu=None, even=True)
    ).table[:, COLUMNS.index("sigma")]
    assert sigma == 1


def test_the_shift_of_a_size_lies_on_the_line_of_the_config() -> None:
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    for tokens in (15, 256, 1000, 4096, 9000):
        assert dynamic_mu({}, tokens) == pytest.approx(calculate_shift(tokens), rel=1e-12)
    own = {"base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192}
    expected = calculate_shift(6889, 256, 8192, 0.5, 0.9)
    assert dynamic_mu(own, 6889) == pytest.approx(expected, rel=1e-12)


def test_the_shift_of_a_request_is_that_of_the_size() -> None:
    """A request names the factor itself, the logarithm of which a size would give."""
    config = {**EULER, "use_dynamic_shifting": True}
    asked = make_solver(config, 4, math.exp(0.83), Spacing(even=True))
    sized = make_solver(config, 4, None, Spacing(mu=0.83, even=True))
    assert torch.equal(asked.table, sized.table)


def test_a_half_precision_velocity_is_combined_in_fp32() -> None:
    noise, velocity = torch.randn(SHAPE), torch.randn(SHAPE).bfloat16()
    row = make_solver(WAN, 4).table[:1]
    half = advance(SolverState.start(noise), velocity, row)
    full = advance(SolverState.start(noise), velocity.float(), row)
    assert half.x.dtype == torch.float32
    assert torch.equal(half.x, full.x)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"_class_name": "DDIMScheduler"}, "DDIMScheduler"),
        ({"prediction_type": "epsilon"}, "prediction_type='epsilon'"),
        ({"solver_order": 3}, "solver_order=3"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas=True"),
        ({"disable_corrector": [0]}, "disable_corrector=[0]"),
        ({"shift_terminal": 0.1}, "shift_terminal=0.1"),
        ({**EULER, "use_dynamic_shifting": True}, "size of the picture"),
        ({**EULER, "stochastic_sampling": True}, "stochastic_sampling=True"),
    ],
)
def test_what_is_not_supported_is_named(change: dict, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_solver({**WAN, **change}, 4)
    assert named in caught.value.message
    assert caught.value.code == UNSUPPORTED


def test_absent_options_mean_what_the_scheduler_class_means() -> None:
    with pytest.raises(ConfigError, match="prediction_type='epsilon'"):
        make_solver({"_class_name": "UniPCMultistepScheduler"}, 4)


@pytest.mark.parametrize(
    ("steps", "shift"), [(0, None), (-1, None), (1001, None), (4, 0.0), (4, float("nan"))]
)
def test_impossible_numbers_are_request_errors(steps: int, shift: float | None) -> None:
    with pytest.raises(RequestError):
        make_solver(WAN, steps, shift)
