"""What the recipes of image models share: everything but the prompt and the schedule."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

from torch import Tensor, nn

from sgl_diffusion.base.params import ModelCard, ResolvedParams
from sgl_diffusion.components.samplers import Solver, Spacing, dynamic_mu, make_solver
from sgl_diffusion.engine.pipeline import Adaptable, Combine
from sgl_diffusion.loader.rules import Rules
from sgl_diffusion.recipes.common import Plan

if TYPE_CHECKING:
    from PIL.Image import Image

_MEGAPIXEL = 1024 * 1024


class ImageVae(Protocol):
    def blocks(self) -> list[nn.Module]: ...

    def noise(self, width: int, height: int, seed: int) -> Tensor: ...

    def encode(self, pixels: Tensor) -> Tensor: ...

    def decode_chunks(self, latents: Tensor) -> Iterator[Tensor]: ...


class Context(Protocol):
    """What the blocks of a family read of conditions, of one row or of a batch."""

    @staticmethod
    def cat(contexts: Sequence[Any]) -> Any: ...


C = TypeVar("C", bound=Context)


class ImageRecipe(Generic[C]):
    """Implements `engine.pipeline.Pipeline` but for `encode` and `text_bucket`."""

    combine: Combine | None = None
    diffusers_class: ClassVar[str]
    rules: ClassVar[Rules]

    def __init__(
        self,
        card: ModelCard,
        plan: Plan,
        transformer: Any,
        vae: ImageVae,
        scheduler: dict[str, Any],
    ) -> None:
        self.card = card
        self.device = plan.device
        self._transformer = transformer
        self._vae = vae
        self._scheduler = scheduler

    def text_blocks(self) -> list[nn.Module]:
        """Modules that run one after the other in the text encoders."""
        return []

    def blocks(self) -> list[nn.Module]:
        return [*self._transformer.blocks, *self.text_blocks(), *self._vae.blocks()]

    def adaptables(self) -> dict[str, Adaptable]:
        return {"transformer": Adaptable(self._transformer, self.rules, self.diffusers_class)}

    def tokens(self, params: ResolvedParams) -> int:
        """How many tokens a picture of this size has."""
        return params.width * params.height // self.card.size_multiple**2

    def spacing(self, params: ResolvedParams) -> Spacing:
        """Even sigmas, shifted by the size of the picture: so do most families."""
        return Spacing(mu=dynamic_mu(self._scheduler, self.tokens(params)), even=True)

    def solver(self, params: ResolvedParams) -> Solver:
        steps, shift = params.num_inference_steps, params.flow_shift
        spacing = self.spacing(params)
        return make_solver(self._scheduler, steps, shift, spacing, start=params.start_step)

    def encode_images(self, pixels: Tensor) -> Tensor:
        return self._vae.encode(pixels)

    def noise(self, params: ResolvedParams, seed: int) -> Tensor:
        return self._vae.noise(params.width, params.height, seed).to(self.device)

    def expert(self, timestep: float) -> int:
        return 0

    def collate(self, conditions: list[C]) -> C:
        batch: C = conditions[0].cat(conditions)
        return batch

    def velocity(self, latents: Tensor, timesteps: Tensor, context: C, expert: int) -> Tensor:
        velocity: Tensor = self._transformer(latents, timesteps, context)
        return velocity

    def decode(self, latents: Tensor) -> Iterator[Tensor]:
        return self._vae.decode_chunks(latents[0])


class PackedRecipe(ImageRecipe[C]):
    """Of a transformer that takes pictures of different sizes in one pass."""

    def velocity_packed(
        self, latents: Sequence[Tensor], timesteps: Tensor, context: C, expert: int
    ) -> list[Tensor]:
        velocities: list[Tensor] = self._transformer.packed(latents, timesteps, context)
        return velocities


def reference_bucket(length: int, grids: Sequence[tuple[int, int]]) -> int:
    """References of other sizes are other batches, like texts of other lengths."""
    return hash((length, *grids))


def shrunk(picture: Image, area: int = _MEGAPIXEL) -> Image:
    """A reference picture of more than a megapixel, brought to that area; others stay."""
    from PIL import Image

    if picture.width * picture.height <= _MEGAPIXEL:
        return picture
    scale = math.sqrt(area / (picture.width * picture.height))
    size = int(picture.width * scale), int(picture.height * scale)
    return picture.resize(size, Image.Resampling.LANCZOS)


def cropped(picture: Image, unit: int) -> Image:
    """The middle of a picture, with edges that are multiples of `unit`."""
    width, height = (max(edge // unit, 1) * unit for edge in picture.size)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))
