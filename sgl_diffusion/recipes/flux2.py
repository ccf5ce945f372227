"""FLUX.2 dev and klein, from a repository in diffusers format.

Special to FLUX.2: the transformer reads three layers of a language model, padding included; the
noise schedule depends on the size and on the number of steps; up to ten pictures are more tokens.
dev takes `guidance_scale` as an input; klein is guided in a second pass, unless it is distilled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.params import ModelCard, ResolvedParams, SamplingDefaults
from sgl_diffusion.components.samplers import Spacing
from sgl_diffusion.components.text_mistral3 import TextMistral3
from sgl_diffusion.components.text_qwen3 import TextQwen3
from sgl_diffusion.components.vae_flux2 import VaeFlux2
from sgl_diffusion.engine.pictures import to_pixels
from sgl_diffusion.loader.index import ModelIndex
from sgl_diffusion.models.flux2 import Flux2Context, Flux2Params, Flux2Transformer
from sgl_diffusion.models.flux2_weights import RULES
from sgl_diffusion.recipes.common import Plan, reason_against, scheduler_config, transformer_config
from sgl_diffusion.recipes.image import PackedRecipe, cropped, reference_bucket, shrunk

if TYPE_CHECKING:
    from PIL.Image import Image

# With a true_cfg_scale of their own, guidance_scale is an input of the transformer, or nothing.
DEV = SamplingDefaults(
    width=1024, height=1024, num_inference_steps=50, guidance_scale=4.0, true_cfg_scale=1.0
)
KLEIN = SamplingDefaults(
    width=1024, height=1024, num_inference_steps=4, guidance_scale=1.0, true_cfg_scale=1.0
)
KLEIN_BASE = SamplingDefaults(width=1024, height=1024, num_inference_steps=50, guidance_scale=4.0)
_DEV_LAYERS, _KLEIN_LAYERS = (10, 20, 30), (9, 18, 27)
_MOST_PICTURES = 10


def not_supported(index: ModelIndex) -> str | None:
    """Why this file cannot serve the checkpoint; None if it can."""
    return reason_against(index, Flux2Params, Spacing(mu=1.0, even=True))


def open_pipeline(index: ModelIndex, options: EngineOptions, name: str) -> Flux2:
    """Load every component in its precision and assemble the pipeline."""
    params = Flux2Params.from_config(transformer_config(index))
    plan = Plan.of(options, head_dim=params.attention_head_dim)
    transformer = plan.load_dit(Flux2Transformer, params, RULES, index)
    klein = index.pipeline == "Flux2KleinPipeline"
    reader = TextQwen3 if klein else TextMistral3
    text = reader.load(index, dtype=plan.text, device=plan.device)
    vae = VaeFlux2.load(index, dtype=plan.vae, device=plan.device)
    distilled = bool(index.options.get("is_distilled"))
    card = plan.card(
        index,
        name,
        DEV if not klein else KLEIN if distilled else KLEIN_BASE,
        family="flux2",
        tasks=("T2I", "TI2I"),
        size_multiple=vae.spatial_factor,
        edits="native",
        max_images=_MOST_PICTURES,
        masks=True,
        previews=True,
        lora_targets=("transformer",),
    )
    return Flux2(card, plan, transformer, vae, scheduler_config(index), text)


class Flux2(PackedRecipe[Flux2Context]):
    diffusers_class = "Flux2Transformer2DModel"
    rules = RULES
    embeds_guidance = True

    def __init__(
        self,
        card: ModelCard,
        plan: Plan,
        transformer: Flux2Transformer,
        vae: VaeFlux2,
        scheduler: dict[str, Any],
        text: TextQwen3 | TextMistral3,
    ) -> None:
        super().__init__(card, plan, transformer, vae, scheduler)
        self._text = text

    def text_blocks(self) -> list[nn.Module]:
        return self._text.blocks()

    def spacing(self, params: ResolvedParams) -> Spacing:
        return Spacing(mu=_mu(self.tokens(params), params.num_inference_steps), even=True)

    def encode(
        self, prompt: str, params: ResolvedParams, pictures: Sequence[Image]
    ) -> Flux2Context:
        length = params.max_sequence_length
        if isinstance(self._text, TextQwen3):
            text = self._text.encode(
                prompt, length, layers=_KLEIN_LAYERS, thinking=False, padded=True
            )
        else:
            text = self._text.encode(prompt, length, layers=_DEV_LAYERS)
        references = [self._reference(picture) for picture in pictures]
        return self._transformer.prepare(text, params.guidance_scale, references)

    def _reference(self, picture: Image) -> Tensor:
        """Smaller ones keep their size; all are cut to what the VAE can encode."""
        fitted = cropped(shrunk(picture), self.card.size_multiple)
        return self.encode_images(to_pixels(fitted, *fitted.size).to(self.device))

    def text_bucket(self, condition: Flux2Context) -> int:
        return reference_bucket(condition.text.shape[1], condition.grids)


def _mu(tokens: int, steps: int) -> float:
    """The shift of the schedule: between lines fitted at 10 and at 200 steps; large pictures
    follow the second alone."""
    at_200 = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return at_200
    at_10 = 8.73809524e-05 * tokens + 1.89833333
    return at_200 + (at_200 - at_10) / 190 * (steps - 200)
