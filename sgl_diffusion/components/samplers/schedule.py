"""Noise schedules of flow matching: latents are (1-sigma)*clean + sigma*noise, sigma falls to 0."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class Spacing:
    """What a family adds to the schedule of its scheduler config.

    `mu` is the shift that belongs to the size of the picture (`dynamic_mu`). `even`: the family
    asks for evenly spaced sigmas from 1 to 1/steps instead of those of the training range.
    """

    mu: float | None = None
    even: bool = False


def dynamic_mu(config: Mapping[str, Any], tokens: int) -> float:
    """The shift for a picture of so many tokens: on a line through the config's two points."""
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (most - base) / (high - low)
    return float(tokens * slope + (base - slope * low))


def euler_schedule(
    steps: int, shift: float, config: Mapping[str, Any], spacing: Spacing
) -> tuple[Array, Array]:
    """Sigmas [steps+1] and timesteps [steps] of flow-matching Euler.

    With a static shift and the training range, the smallest sigma is shifted once as the end of the
    range and once more with all the others: published schedules were tuned with that.
    """
    train_steps = int(config.get("num_train_timesteps", 1000))
    if spacing.even:
        sigmas = np.linspace(1, 1 / steps, steps)
    else:
        smallest = np.array(1 / train_steps)
        if not config.get("use_dynamic_shifting", False):
            smallest = shift_sigmas(smallest, shift)
        sigmas = np.linspace(1, smallest, steps)
    sigmas = shift_sigmas(sigmas, shift).astype(np.float32)
    terminal = config.get("shift_terminal")
    if terminal and sigmas[-1] < 1:  # a single step ends where it begins: nothing to stretch
        sigmas = 1 - (1 - sigmas) * ((1 - terminal) / (1 - sigmas[-1]))
    sigmas = sigmas.astype(np.float32)
    return np.append(sigmas, np.float32(0)), sigmas * np.float32(train_steps)
