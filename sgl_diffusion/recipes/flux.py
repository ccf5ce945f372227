"""FLUX.1 dev, schnell and Kontext, from a repository in diffusers format.

Special to FLUX.1: CLIP gives one vector, T5 the tokens; `guidance_scale` is an input of the
transformer (dev, Kontext) or nothing (schnell), while guidance with a second pass is
`true_cfg_scale`; the noise schedule depends on the size. Kontext reads pictures as more tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.params import ModelCard, ResolvedParams, SamplingDefaults
from sgl_diffusion.components.samplers import Spacing
from sgl_diffusion.components.text_clip import TextClip
from sgl_diffusion.components.text_t5 import TextT5
from sgl_diffusion.components.vae_kl import VaeKl
from sgl_diffusion.engine.pictures import to_pixels
from sgl_diffusion.engine.pipeline import Adaptable
from sgl_diffusion.loader.index import ModelIndex
from sgl_diffusion.loader.rules import Rules
from sgl_diffusion.models.flux import FluxContext, FluxParams, FluxTransformer
from sgl_diffusion.models.flux_weights import RULES
from sgl_diffusion.recipes.common import Plan, reason_against, scheduler_config, transformer_config
from sgl_diffusion.recipes.image import PackedRecipe, reference_bucket

if TYPE_CHECKING:
    from PIL.Image import Image

DEV = SamplingDefaults(
    width=1024, height=1024, num_inference_steps=28, guidance_scale=3.5, true_cfg_scale=1.0
)
SCHNELL = SamplingDefaults(
    width=1024,
    height=1024,
    num_inference_steps=4,
    guidance_scale=0.0,
    true_cfg_scale=1.0,
    max_sequence_length=256,
)
KONTEXT = "FluxKontextPipeline"

# The sizes that Kontext was trained with, as width and height; a picture takes the nearest aspect.
_TRAINED = [
    (672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184),
    (944, 1104), (1024, 1024), (1104, 944), (1184, 880), (1248, 832), (1328, 800), (1392, 752),
    (1456, 720), (1504, 688), (1568, 672),
]  # fmt: skip


def not_supported(index: ModelIndex) -> str | None:
    """Why this file cannot serve the checkpoint; None if it can."""
    return reason_against(index, FluxParams, Spacing(mu=1.0, even=True))


def open_pipeline(index: ModelIndex, options: EngineOptions, name: str) -> Flux:
    """Load every component in its precision and assemble the pipeline."""
    params = FluxParams.from_config(transformer_config(index))
    plan = Plan.of(options, head_dim=params.attention_head_dim)
    transformer = plan.load_dit(FluxTransformer, params, RULES, index)
    clip = TextClip.load(index, dtype=plan.text, device=plan.device)
    t5 = TextT5.load(index, dtype=plan.text, device=plan.device)
    vae = VaeKl.load(index, dtype=plan.vae, device=plan.device)
    kontext = index.pipeline == KONTEXT
    card = plan.card(
        index,
        name,
        DEV if params.guidance_embeds else SCHNELL,
        family="flux",
        tasks=("T2I", "TI2I") if kontext else ("T2I",),
        size_multiple=2 * vae.spatial_factor,
        edits="native" if kontext else "image-to-image",
        max_images=4 if kontext else 1,
        masks=True,
        previews=True,
        lora_targets=("transformer",),
    )
    return Flux(card, plan, transformer, vae, scheduler_config(index), clip, t5)


class Flux(PackedRecipe[FluxContext]):
    diffusers_class = "FluxTransformer2DModel"
    rules = RULES
    embeds_guidance = True

    def __init__(
        self,
        card: ModelCard,
        plan: Plan,
        transformer: FluxTransformer,
        vae: VaeKl,
        scheduler: dict[str, Any],
        clip: TextClip,
        t5: TextT5,
    ) -> None:
        super().__init__(card, plan, transformer, vae, scheduler)
        self._clip = clip
        self._t5 = t5

    def text_blocks(self) -> list[nn.Module]:
        return self._t5.blocks()

    def adaptables(self) -> dict[str, Adaptable]:
        return {
            **super().adaptables(),
            "text_encoder": Adaptable(self._clip.module, Rules(), "CLIPTextModel"),
            "text_encoder_2": Adaptable(self._t5.module, Rules(), "T5EncoderModel"),
        }

    def encode(self, prompt: str, params: ResolvedParams, pictures: Sequence[Image]) -> FluxContext:
        pooled = self._clip.encode([prompt]).pooled
        text = self._t5.encode([prompt], params.max_sequence_length)
        references = [self._reference(picture) for picture in pictures]
        return self._transformer.prepare(text, pooled, params.guidance_scale, references)

    def _reference(self, picture: Image) -> Tensor:
        aspect = picture.width / picture.height
        width, height = min(_TRAINED, key=lambda size: abs(aspect - size[0] / size[1]))
        return self.encode_images(to_pixels(picture, width, height).to(self.device))

    def text_bucket(self, condition: FluxContext) -> int:
        return reference_bucket(condition.text.shape[1], condition.grids)
