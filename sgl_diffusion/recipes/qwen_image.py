"""Qwen-Image and Qwen-Image-Edit (one picture) and -Edit-Plus (several), in diffusers format.

Special to Qwen-Image: prompts stand in a chat whose beginning is dropped; guidance is
`true_cfg_scale`, and gives every token back the length it has with the prompt; edits show the
pictures to the language model and, encoded, to the transformer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.params import ModelCard, ResolvedParams, SamplingDefaults
from sgl_diffusion.components.samplers import Spacing
from sgl_diffusion.components.text_qwen_vl import PICTURE, TextQwenVl
from sgl_diffusion.components.vae_qwen import VaeQwen
from sgl_diffusion.engine.pictures import to_pixels
from sgl_diffusion.layers.embed import patchify, token_grid, unpatchify
from sgl_diffusion.loader.index import ModelIndex
from sgl_diffusion.models.qwen_image import (
    PATCH,
    QwenImageContext,
    QwenImageParams,
    QwenImageTransformer,
)
from sgl_diffusion.models.qwen_image_weights import RULES
from sgl_diffusion.recipes.common import Plan, reason_against, scheduler_config, transformer_config
from sgl_diffusion.recipes.image import PackedRecipe

if TYPE_CHECKING:
    from PIL.Image import Image

DEFAULTS = SamplingDefaults(
    width=1328,
    height=1328,
    num_inference_steps=50,
    guidance_scale=1.0,
    true_cfg_scale=4.0,
    negative_prompt=" ",
)
EDIT_DEFAULTS = SamplingDefaults(
    width=1024,
    height=1024,
    num_inference_steps=40,
    guidance_scale=1.0,
    true_cfg_scale=4.0,
    negative_prompt=" ",
)
EDIT, EDIT_PLUS = "QwenImageEditPipeline", "QwenImageEditPlusPipeline"

# The chat around a prompt, and how many tokens of its beginning the transformer does not see.
_CHAT = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
_DRAW = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:"
)
_ALTER = (
    "Describe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. "
    "Generate a new image that meets the user's requirements while maintaining consistency with "
    "the original input where appropriate."
)
_DROPPED = {_DRAW: 34, _ALTER: 64}
_MOST_TOKENS = 1024
_SEEN = f"<|vision_start|>{PICTURE}<|vision_end|>"

_AREA = 1024 * 1024  # of a reference picture
_SMALL_AREA = 384 * 384  # of one that the language model sees beside others


def not_supported(index: ModelIndex) -> str | None:
    """Why this file cannot serve the checkpoint; None if it can."""
    return reason_against(index, QwenImageParams, Spacing(mu=1.0, even=True))


def open_pipeline(index: ModelIndex, options: EngineOptions, name: str) -> QwenImage:
    """Load every component in its precision and assemble the pipeline."""
    params = QwenImageParams.from_config(transformer_config(index))
    plan = Plan.of(options, head_dim=params.attention_head_dim)
    transformer = plan.load_dit(QwenImageTransformer, params, RULES, index)
    text = TextQwenVl.load(index, dtype=plan.text, device=plan.device)
    vae = VaeQwen.load(index, dtype=plan.vae, device=plan.device)
    edits = index.pipeline in (EDIT, EDIT_PLUS)
    card = plan.card(
        index,
        name,
        EDIT_DEFAULTS if edits else DEFAULTS,
        family="qwen-image",
        tasks=("TI2I",) if edits else ("T2I",),
        size_multiple=2 * vae.spatial_factor,
        edits="native" if edits else "image-to-image",
        min_images=1 if edits else 0,
        max_images=4 if index.pipeline == EDIT_PLUS else 1,
        masks=True,
        previews=True,
        lora_targets=("transformer",),
    )
    return QwenImage(card, plan, transformer, vae, scheduler_config(index), text)


class QwenImage(PackedRecipe[QwenImageContext]):
    diffusers_class = "QwenImageTransformer2DModel"
    rules = RULES

    def __init__(
        self,
        card: ModelCard,
        plan: Plan,
        transformer: QwenImageTransformer,
        vae: VaeQwen,
        scheduler: dict[str, Any],
        text: TextQwenVl,
    ) -> None:
        super().__init__(card, plan, transformer, vae, scheduler)
        self._text = text

    def text_blocks(self) -> list[nn.Module]:
        return self._text.blocks()

    def encode(
        self, prompt: str, params: ResolvedParams, pictures: Sequence[Image]
    ) -> QwenImageContext:
        if not pictures:
            length = _MOST_TOKENS + _DROPPED[_DRAW]
            states = self._text.encode(_CHAT.format(_DRAW, prompt), max_length=length)
            states = states[:, _DROPPED[_DRAW] :][:, : params.max_sequence_length]
            return self._transformer.prepare(states)
        several = self.card.pipeline_class == EDIT_PLUS
        area = _SMALL_AREA if several else _AREA
        shown = [_resized(picture, area) for picture in pictures]
        places = [f"Picture {i}: {_SEEN}" if several else _SEEN for i in range(1, len(shown) + 1)]
        text = _CHAT.format(_ALTER, "".join(places) + prompt)
        states = self._text.encode(text, shown)[:, _DROPPED[_ALTER] :]
        return self._transformer.prepare(states, [self._reference(p) for p in pictures])

    def _reference(self, picture: Image) -> Tensor:
        width, height = _size(picture, _AREA)
        return self.encode_images(to_pixels(picture, width, height).to(self.device))

    def text_bucket(self, condition: QwenImageContext) -> int:
        """Texts of any length share a batch; references of other sizes do not."""
        return hash(condition.grids)

    def combine(self, with_prompt: Tensor, without: Tensor, scale: Tensor) -> Tensor:
        """Guidance that leaves every token the length it has with the prompt."""
        plain = patchify(with_prompt, PATCH)
        guided = patchify(without + scale * (with_prompt - without), PATCH)
        guided = guided * (plain.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))
        return unpatchify(guided, token_grid(without, PATCH), PATCH, channels="first")


def _size(picture: Image, area: int) -> tuple[int, int]:
    """The size with that area and the picture's aspect, in multiples of 32."""
    aspect = picture.width / picture.height
    width = math.sqrt(area * aspect)
    return round(width / 32) * 32, round(width / aspect / 32) * 32


def _resized(picture: Image, area: int) -> Image:
    from PIL import Image

    return picture.resize(_size(picture, area), Image.Resampling.LANCZOS)
