"""Stable Diffusion 3 and 3.5, from a repository in diffusers format.

Special to SD3: two CLIP encoders, side by side in channels, then T5's tokens; a repository may come
without T5, whose tokens are zero then. Guidance is on above 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.params import ResolvedParams, SamplingDefaults
from sgl_diffusion.components.samplers import Spacing
from sgl_diffusion.components.text_clip import TextClip
from sgl_diffusion.components.text_t5 import TextT5
from sgl_diffusion.components.vae_kl import VaeKl
from sgl_diffusion.engine.pipeline import Adaptable
from sgl_diffusion.loader.index import ModelIndex
from sgl_diffusion.loader.rules import Rules
from sgl_diffusion.models.sd3 import Sd3Context, Sd3Params, Sd3Transformer
from sgl_diffusion.models.sd3_weights import RULES
from sgl_diffusion.recipes.common import Plan, reason_against, scheduler_config, transformer_config
from sgl_diffusion.recipes.image import PackedRecipe

if TYPE_CHECKING:
    from PIL.Image import Image

    from sgl_diffusion.base.params import ModelCard

DEFAULTS = SamplingDefaults(
    width=1024, height=1024, num_inference_steps=28, guidance_scale=7.0, max_sequence_length=256
)


def not_supported(index: ModelIndex) -> str | None:
    """Why this file cannot serve the checkpoint; None if it can."""
    return reason_against(index, Sd3Params, Spacing())


def open_pipeline(index: ModelIndex, options: EngineOptions, name: str) -> Sd3:
    """Load every component in its precision and assemble the pipeline."""
    params = Sd3Params.from_config(transformer_config(index))
    plan = Plan.of(options, head_dim=params.attention_head_dim)
    transformer = plan.load_dit(Sd3Transformer, params, RULES, index)
    clips = [
        TextClip.load(
            index,
            dtype=plan.text,
            device=plan.device,
            encoder=f"text_encoder{number}",
            tokenizer=f"tokenizer{number}",
            projected=True,
        )
        for number in ("", "_2")
    ]
    t5 = None
    if "text_encoder_3" in index.components:
        t5 = TextT5.load(
            index,
            dtype=plan.text,
            device=plan.device,
            encoder="text_encoder_3",
            tokenizer="tokenizer_3",
        )
    vae = VaeKl.load(index, dtype=plan.vae, device=plan.device)
    unit = vae.spatial_factor * params.patch_size
    largest = params.pos_embed_max_size * unit
    usual = min(largest, DEFAULTS.width)
    card = plan.card(
        index,
        name,
        replace(DEFAULTS, width=usual, height=usual),
        family="sd3",
        tasks=("T2I",),
        size_multiple=unit,
        max_edge=largest,
        edits="image-to-image",
        max_images=1,
        masks=True,
        previews=True,
        lora_targets=("transformer",),
    )
    return Sd3(card, plan, transformer, vae, scheduler_config(index), clips, t5)


class Sd3(PackedRecipe[Sd3Context]):
    diffusers_class = "SD3Transformer2DModel"
    rules = RULES

    def __init__(
        self,
        card: ModelCard,
        plan: Plan,
        transformer: Sd3Transformer,
        vae: VaeKl,
        scheduler: dict[str, Any],
        clips: Sequence[TextClip],
        t5: TextT5 | None,
    ) -> None:
        super().__init__(card, plan, transformer, vae, scheduler)
        self._clips = clips
        self._t5 = t5

    def text_blocks(self) -> list[nn.Module]:
        return [] if self._t5 is None else self._t5.blocks()

    def adaptables(self) -> dict[str, Adaptable]:
        result = super().adaptables()
        for number, clip in zip(("", "_2"), self._clips, strict=True):
            name = f"text_encoder{number}"
            result[name] = Adaptable(clip.module, Rules(), "CLIPTextModelWithProjection")
        if self._t5 is not None:
            result["text_encoder_3"] = Adaptable(self._t5.module, Rules(), "T5EncoderModel")
        return result

    def spacing(self, params: ResolvedParams) -> Spacing:
        """The schedule of the training range: no family else has it."""
        return Spacing()

    def encode(self, prompt: str, params: ResolvedParams, pictures: Sequence[Image]) -> Sd3Context:
        texts = [clip.encode([prompt]) for clip in self._clips]
        width = self._transformer.params.joint_attention_dim
        short = torch.cat([text.states for text in texts], dim=-1)
        if self._t5 is None:
            long = short.new_zeros(1, params.max_sequence_length, width)
        else:
            long = self._t5.encode([prompt], params.max_sequence_length)
        short = functional.pad(short, (0, width - short.shape[-1]))
        pooled = torch.cat([text.pooled for text in texts], dim=-1)
        return self._transformer.prepare(torch.cat((short, long), dim=1), pooled)

    def text_bucket(self, condition: Sd3Context) -> int:
        return condition.text.shape[1]
