"""Z-Image and Z-Image-Turbo, from a repository in diffusers format.

Special to Z-Image: the prompt is a chat whose last state but one the transformer reads; captions of
different length share a batch; guidance counts from 0 and adds to the velocity with the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.params import ModelCard, ResolvedParams, SamplingDefaults
from sgl_diffusion.components.samplers import Spacing
from sgl_diffusion.components.text_qwen3 import TextQwen3
from sgl_diffusion.components.vae_kl import VaeKl
from sgl_diffusion.loader.index import ModelIndex
from sgl_diffusion.models.z_image import ZImageContext, ZImageParams, ZImageTransformer
from sgl_diffusion.models.z_image_weights import RULES
from sgl_diffusion.recipes.common import Plan, reason_against, scheduler_config, transformer_config
from sgl_diffusion.recipes.image import PackedRecipe

if TYPE_CHECKING:
    from PIL.Image import Image

BASE = SamplingDefaults(width=1024, height=1024, num_inference_steps=50, guidance_scale=4.0)
TURBO = SamplingDefaults(width=1024, height=1024, num_inference_steps=8, guidance_scale=0.0)
TURBO_SHIFT = 3.0  # of its noise schedule; the base model has 6


def not_supported(index: ModelIndex) -> str | None:
    """Why this file cannot serve the checkpoint; None if it can."""
    if transformer_config(index).get("siglip_feat_dim") is not None:
        return "its transformer is that of Z-Image Omni"
    return reason_against(index, ZImageParams, Spacing(mu=1.0, even=True))


def open_pipeline(index: ModelIndex, options: EngineOptions, name: str) -> ZImage:
    """Load every component in its precision and assemble the pipeline."""
    able = {"tasks": ("T2I",), "edits": "image-to-image", "max_images": 1}
    return ZImage(*load_parts(index, options, name, ZImageTransformer, **able))


class Parts(NamedTuple):
    """What Z-Image has with and without eyes, in the order in which its recipes take it."""

    card: ModelCard
    plan: Plan
    transformer: Any
    vae: VaeKl
    scheduler: dict[str, Any]
    text: TextQwen3


def load_parts(
    index: ModelIndex, options: EngineOptions, name: str, kind: type[nn.Module], **able: Any
) -> Parts:
    """Load them, with a transformer of this kind; `able` says on the card what it can do."""
    params = ZImageParams.from_config(transformer_config(index))
    plan = Plan.of(options, head_dim=params.attention_head_dim)
    transformer = plan.load_dit(kind, params, RULES, index)
    text = TextQwen3.load(index, dtype=plan.text, device=plan.device)
    vae = VaeKl.load(index, dtype=plan.vae, device=plan.device)
    scheduler = scheduler_config(index)
    card = plan.card(
        index,
        name,
        _defaults(scheduler),
        family="z-image",
        size_multiple=2 * vae.spatial_factor,
        guidance_offset=1.0,
        masks=True,
        previews=True,
        lora_targets=("transformer",),
        **able,
    )
    return Parts(card, plan, transformer, vae, scheduler, text)


def _defaults(scheduler: Mapping[str, Any]) -> SamplingDefaults:
    turbo = float(scheduler.get("shift", TURBO_SHIFT)) <= TURBO_SHIFT
    return TURBO if turbo else BASE


class ZImage(PackedRecipe[ZImageContext]):
    diffusers_class = "ZImageTransformer2DModel"
    rules = RULES

    def __init__(
        self,
        card: ModelCard,
        plan: Plan,
        transformer: ZImageTransformer,
        vae: VaeKl,
        scheduler: dict[str, Any],
        text: TextQwen3,
    ) -> None:
        super().__init__(card, plan, transformer, vae, scheduler)
        self._text = text

    def text_blocks(self) -> list[nn.Module]:
        return self._text.blocks()

    def encode(
        self, prompt: str, params: ResolvedParams, pictures: Sequence[Image]
    ) -> ZImageContext:
        length = params.max_sequence_length
        states = self._text.encode(prompt, length, layers=[-2], thinking=True)
        return self._transformer.prepare(states)

    def text_bucket(self, condition: ZImageContext) -> int:
        """Captions of any length share a batch."""
        return 0
