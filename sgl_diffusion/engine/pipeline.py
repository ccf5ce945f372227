"""What the engine asks of a served model: the two contracts that recipes fulfil.

Shapes: B rows of a batch, C channels, T latent frames, h x w latent rows and columns,
F frames, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch

from sgl_diffusion.base.footprint import Footprint
from sgl_diffusion.base.params import ModelCard, ResolvedParams
from sgl_diffusion.components.samplers import Solver
from sgl_diffusion.loader.rules import Rules

if TYPE_CHECKING:
    from PIL.Image import Image

    from sgl_diffusion.engine.beginning import Origin

Condition = Any  # what a recipe made of one prompt; the engine only hands it back
Context = Any  # conditions of a batch, side by side

# From velocities [B,...] with and without the prompt, in fp32, and a broadcastable scale.
Combine = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@runtime_checkable
class Pipeline(Protocol):
    """A model our own runtime denoises, one step of one batch at a time."""

    card: ModelCard
    device: torch.device
    # A recipe's special guidance. None: `without + scale * (with_prompt - without)`, which is
    # computed in one pass with the solver's update.
    combine: Combine | None

    def blocks(self) -> list[torch.nn.Module]:
        """Modules that run one after the other inside every long forward pass."""

    def solver(self, params: ResolvedParams) -> Solver:
        """Timesteps and update table of one job, beginning at `params.start_step`."""

    def encode(self, prompt: str, params: ResolvedParams, pictures: Sequence[Image]) -> Condition:
        """One prompt, made ready for the transformer; it does not depend on the step. Without
        pictures it depends on the prompt and `params.max_sequence_length` only, and on
        `params.guidance_scale` where the pipeline `EmbedsGuidance`.

        `pictures` are the job's input pictures, RGB in their own sizes, where the card says that
        edits are native; else there are none.
        """

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels [1,3,F,H,W] in -1..1 to clean latents, of the shape and scale of `noise`: the mode
        of the VAE's posterior, normalised."""

    def text_bucket(self, condition: Condition) -> int:
        """Conditions can share a batch when this number is equal."""

    def noise(self, params: ResolvedParams, seed: int) -> torch.Tensor:
        """First latents [1,C,T,h,w] of one row, from a generator of its own."""

    def expert(self, timestep: float) -> int:
        """Which transformer works at this timestep."""

    def collate(self, conditions: list[Condition]) -> Context:
        """Conditions of the rows of a batch, in order."""

    def velocity(
        self, latents: torch.Tensor, timesteps: torch.Tensor, context: Context, expert: int
    ) -> torch.Tensor:
        """The transformer: latents [B,C,T,h,w] at timesteps [B] to velocities of that shape."""

    def decode(self, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        """Final latents [1,C,T,h,w] of one row to uint8 frames [f,H,W,3], chunk by chunk."""


@runtime_checkable
class PacksSizes(Protocol):
    """A pipeline whose rows can share a forward pass although their sizes differ."""

    def velocity_packed(
        self,
        latents: Sequence[torch.Tensor],
        timesteps: torch.Tensor,
        context: Context,
        expert: int,
    ) -> list[torch.Tensor]:
        """`velocity` of latents [1,C,T,h,w] of each row, at timesteps [B]."""


@runtime_checkable
class KeepsPicture(Protocol):
    """A pipeline whose edits keep a part of a picture as it is, like the first frame of a clip."""

    def origin(self, condition: Condition, params: ResolvedParams) -> Origin | None:
        """What is kept of the picture that a condition was made with."""


@runtime_checkable
class EmbedsGuidance(Protocol):
    """A pipeline whose conditions hold the guidance scale."""

    embeds_guidance: bool


@runtime_checkable
class Counted(Protocol):
    """A pipeline of which it was counted what jobs take, before its weights were read; how much
    room there is for them is known afterwards."""

    counted: Footprint


@dataclass(frozen=True)
class Adaptable:
    """A component that adapters can change.

    `rules` lead from the names of diffusers to its own; `diffusers_class` says which names those
    are.
    """

    module: torch.nn.Module
    rules: Rules
    diffusers_class: str


@runtime_checkable
class AdaptablePipeline(Protocol):
    """A pipeline whose components take adapters; its card's `lora_targets` names them."""

    def adaptables(self) -> Mapping[str, Adaptable]:
        """By the component's name in diffusers: transformer, transformer_2, text_encoder."""


# Takes the index of a partial picture, the row, the step, and uint8 frames [1,H,W,3].
OnPartial = Callable[[int, int, int, torch.Tensor], None]


@runtime_checkable
class WholePipeline(Protocol):
    """A model that only runs from end to end (the diffusers fallback)."""

    card: ModelCard

    def run(
        self, params: ResolvedParams, on_step: Callable[[int, int], None], on_partial: OnPartial
    ) -> list[torch.Tensor]:
        """One uint8 clip [F,H,W,3] per seed; `on_step(step, total)` may raise to stop."""


OpenPipeline = Callable[[Callable[[str], None]], "Pipeline | WholePipeline"]
