"""Noise schedules of flow matching: latents are (1-sigma)*clean + sigma*noise, sigma falls to 0."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]


def shift_sigmas(sigmas: Array, shift: float) -> Array:
    """Move the schedule towards noise, as larger videos need it."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def unipc_schedule(steps: int, shift: float, train_steps: int) -> tuple[Array, Array]:
    """Sigmas [steps+1] and timesteps [steps] of UniPC on a flow model.

    The model was trained on whole timesteps, so they are cut to integers; the first sigma stays
    below 1, where the logarithm of the signal would be infinite.
    """
    sigmas = shift_sigmas(np.linspace(1, 1 / train_steps, steps + 1)[:-1], shift)
    if abs(sigmas[0] - 1) < 1e-6:
        sigmas[0] -= 1e-6
    timesteps = np.trunc(sigmas * train_steps)
    return np.append(sigmas, 0.0).astype(np.float32), timesteps.astype(np.float32)


def euler_schedule(steps: int, shift: float, train_steps: int) -> tuple[Array, Array]:
    """Sigmas [steps+1] and timesteps [steps] of flow-matching Euler with a static shift.

    The smallest sigma is shifted once as the end of the training range and once more with all the
    others: published schedules were tuned with that.
    """
    smallest = shift_sigmas(np.array(1 / train_steps), shift)
    sigmas = shift_sigmas(np.linspace(1, smallest, steps), shift).astype(np.float32)
    return np.append(sigmas, np.float32(0)), sigmas * np.float32(train_steps)
