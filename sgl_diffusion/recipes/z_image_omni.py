"""Z-Image Omni: Z-Image that reads pictures, from a repository in diffusers format.

Special to it: the prompt is a chat cut into pieces at the pictures, each read by itself; a vision
model sees the pictures, and they are, encoded, more tokens. Without pictures it makes one from the
prompt alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.params import ModelCard, ResolvedParams
from sgl_diffusion.components.samplers import Spacing
from sgl_diffusion.components.text_qwen3 import TextQwen3
from sgl_diffusion.components.vae_kl import VaeKl
from sgl_diffusion.components.vision_siglip2 import VisionSiglip2
from sgl_diffusion.engine.pictures import to_pixels
from sgl_diffusion.loader.index import ModelIndex
from sgl_diffusion.models.z_image import ZImageParams
from sgl_diffusion.models.z_image_omni import OmniContext, ZImageOmniTransformer
from sgl_diffusion.models.z_image_weights import RULES
from sgl_diffusion.recipes.common import Plan, reason_against, transformer_config
from sgl_diffusion.recipes.image import ImageRecipe, cropped, shrunk
from sgl_diffusion.recipes.z_image import load_parts

if TYPE_CHECKING:
    from PIL.Image import Image

_MOST_PICTURES = 4
_LAST_BUT_ONE = -2  # the layer whose states the transformer reads

# The chat around a prompt, with places for the pictures and for the new one.
_ASK, _ANSWER = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
_SHOW, _SHOWN = "<|vision_start|>", "<|vision_end|>"


def not_supported(index: ModelIndex) -> str | None:
    """Why this file cannot serve the checkpoint; None if it can."""
    if transformer_config(index).get("siglip_feat_dim") is None:
        return "its transformer reads no pictures"
    return reason_against(index, ZImageParams, Spacing(mu=1.0, even=True))


def open_pipeline(index: ModelIndex, options: EngineOptions, name: str) -> ZImageOmni:
    """Load every component in its precision and assemble the pipeline."""
    able = {"tasks": ("T2I", "TI2I"), "edits": "native", "max_images": _MOST_PICTURES}
    parts = load_parts(index, options, name, ZImageOmniTransformer, **able)
    eyes = VisionSiglip2.load(index, dtype=parts.plan.text, device=parts.plan.device)
    return ZImageOmni(*parts, eyes)


class ZImageOmni(ImageRecipe[OmniContext]):
    diffusers_class = "ZImageTransformer2DModel"
    rules = RULES

    def __init__(
        self,
        card: ModelCard,
        plan: Plan,
        transformer: ZImageOmniTransformer,
        vae: VaeKl,
        scheduler: dict[str, Any],
        text: TextQwen3,
        eyes: VisionSiglip2,
    ) -> None:
        super().__init__(card, plan, transformer, vae, scheduler)
        self._text = text
        self._eyes = eyes

    def text_blocks(self) -> list[nn.Module]:
        return [*self._text.blocks(), *self._eyes.blocks()]

    def encode(self, prompt: str, params: ResolvedParams, pictures: Sequence[Image]) -> OmniContext:
        length, layers = params.max_sequence_length, [_LAST_BUT_ONE]
        texts = [self._text.read(t, length, layers=layers) for t in pieces(prompt, len(pictures))]
        # Large pictures are brought to the size of the new one.
        fitted = [shrunk(picture, params.width * params.height) for picture in pictures]
        shown = [cropped(picture, self.card.size_multiple) for picture in fitted]
        references = [
            self.encode_images(to_pixels(picture, *picture.size).to(self.device))
            for picture in shown
        ]
        seen = [self._eyes.encode(picture) for picture in fitted]
        return self._transformer.prepare(texts, references, seen)

    def text_bucket(self, condition: OmniContext) -> int:
        """Captions of any length share a batch; pictures of other sizes do not."""
        return hash(condition.grids)


def pieces(prompt: str, pictures: int) -> list[str]:
    """The chat, cut at each picture and at the new one; whole if there is none to read."""
    if pictures == 0:
        return [_ASK + prompt + _ANSWER]
    between = [_SHOWN + _SHOW] * (pictures - 1)
    return [_ASK + _SHOW, *between, _SHOWN + prompt + _ANSWER + _SHOW, _SHOWN + "<|im_end|>"]
