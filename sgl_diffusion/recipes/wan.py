"""Wan 2.1 and 2.2, text and picture to video, from a repository in diffusers format.

Special to Wan: prompts go to the transformer padded to 512 tokens with zeros and without a mask;
the text's keys and values do not depend on the step; guidance is on above 1; latents stay fp32; the
VAE runs in fp32 unless told otherwise.

2.2 has two experts, one for the noisy steps and one for the rest, each with a guidance scale. A
picture comes in as channels beside the latents (I2V; 2.1 shows it to the text's attention, too), or
as a first frame that is clean from the start, with a timestep for each token (TI2V).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.params import ModelCard, ResolvedParams
from sgl_diffusion.components.samplers import Solver, Spacing, make_solver
from sgl_diffusion.components.text_umt5 import TextUmt5
from sgl_diffusion.components.vae_wan import VaeWan
from sgl_diffusion.components.vision_clip import VisionClip
from sgl_diffusion.engine.beginning import Origin
from sgl_diffusion.engine.pictures import to_pixels
from sgl_diffusion.engine.pipeline import Adaptable, Combine
from sgl_diffusion.loader.index import ModelIndex
from sgl_diffusion.models.wan import WanParams, WanTransformer
from sgl_diffusion.models.wan_weights import RULES
from sgl_diffusion.recipes.common import Plan, reason_against, scheduler_config, transformer_config
from sgl_diffusion.recipes.wan_condition import WanCondition, beside_latents
from sgl_diffusion.recipes.wan_defaults import defaults_of

if TYPE_CHECKING:
    from PIL.Image import Image

I2V = "WanImageToVideoPipeline"
_EXPERTS = ("transformer", "transformer_2")


def not_supported(index: ModelIndex) -> str | None:
    """Why this file cannot serve the checkpoint; None if it can."""
    if "transformer" not in index.components:
        return "it has no transformer for the noisy steps"
    return reason_against(index, WanParams, Spacing())


def open_pipeline(index: ModelIndex, options: EngineOptions, name: str) -> Wan:
    """Load every component in its precision and assemble the pipeline."""
    params = WanParams.from_config(transformer_config(index))
    plan = Plan.of(options, head_dim=params.attention_head_dim, vae="fp32")
    experts = {
        expert: plan.load_dit(
            WanTransformer,
            WanParams.from_config(transformer_config(index, expert)),
            RULES,
            index,
            expert,
        )
        for expert in _EXPERTS
        if expert in index.components
    }
    text = TextUmt5.load(index, dtype=plan.text, device=plan.device)
    vae = VaeWan.load(index, dtype=plan.vae, device=plan.device)
    eyes = None
    if params.image_dim is not None:
        eyes = VisionClip.load(index, dtype=plan.text, device=plan.device)
    from_picture = index.pipeline == I2V
    first_frame = bool(index.options.get("expand_timesteps"))
    native = from_picture or first_frame
    # Where the model has a place for the last picture, too.
    ends = from_picture and not first_frame and (eyes is None or params.pos_embed_seq_len)
    scheduler = scheduler_config(index)
    card = plan.card(
        index,
        name,
        defaults_of(index, params, scheduler),
        family="wan",
        tasks=_tasks(from_picture, first_frame),
        size_multiple=vae.spatial_factor * params.patch_size[1],
        frame_multiple=vae.temporal_factor,
        edits="native" if native else "image-to-image",
        # Where the text's attention sees both, one alone does not fit.
        min_images=0 if not from_picture else 2 if params.pos_embed_seq_len else 1,
        max_images=2 if ends else 1,
        masks=not native,
        previews=True,
        lora_targets=tuple(experts),
    )
    boundary = index.options.get("boundary_ratio")
    return Wan(card, plan, experts, text, vae, eyes, scheduler, boundary, first_frame)


def _tasks(from_picture: bool, first_frame: bool) -> tuple[str, ...]:
    if from_picture:
        return ("I2V",)
    return ("T2V", "I2V", "T2I") if first_frame else ("T2V", "T2I", "TI2I")


class Wan:
    """Implements `engine.pipeline.Pipeline`; expert 0 works at the noisy steps."""

    combine: Combine | None = None

    def __init__(
        self,
        card: ModelCard,
        plan: Plan,
        experts: dict[str, WanTransformer],
        text: TextUmt5,
        vae: VaeWan,
        eyes: VisionClip | None,
        scheduler: dict[str, object],
        boundary: float | None,
        first_frame: bool,
    ) -> None:
        self.card = card
        self.device = plan.device
        self._experts = experts
        self._text = text
        self._vae = vae
        self._eyes = eyes
        self._scheduler = scheduler
        self._boundary = boundary
        self._first_frame = first_frame

    def blocks(self) -> list[nn.Module]:
        layers = [block for expert in self._experts.values() for block in expert.blocks]
        eyes = [] if self._eyes is None else self._eyes.blocks()
        return [*layers, *self._text.blocks(), *eyes, *self._vae.blocks()]

    def adaptables(self) -> dict[str, Adaptable]:
        return {
            name: Adaptable(expert, RULES, "WanTransformer3DModel")
            for name, expert in self._experts.items()
        }

    def solver(self, params: ResolvedParams) -> Solver:
        steps, shift = params.num_inference_steps, params.flow_shift
        return make_solver(self._scheduler, steps, shift, start=params.start_step)

    def encode(
        self, prompt: str, params: ResolvedParams, pictures: Sequence[Image]
    ) -> WanCondition:
        length = params.max_sequence_length
        text = self._text.encode_tokens([prompt], length)
        seen = self._eyes.encode(pictures) if self._eyes is not None and pictures else None
        texts = tuple(expert.prepare(text, seen, length) for expert in self._experts.values())
        if not pictures:
            return WanCondition(texts)
        shown = [to_pixels(p, params.width, params.height).to(self.device) for p in pictures]
        if self._first_frame:
            return WanCondition(texts, first=self._vae.encode(shown[0]))
        return WanCondition(texts, beside=beside_latents(self._vae, shown, params.num_frames))

    def origin(self, condition: WanCondition, params: ResolvedParams) -> Origin | None:
        """A clip that begins with a picture keeps it."""
        if condition.first is None:
            return None
        frames = (params.num_frames - 1) // self._vae.temporal_factor + 1
        keep = torch.zeros(1, 1, frames, 1, 1, device=self.device)
        keep[:, :, 0] = 1
        return Origin(condition.first.expand(-1, -1, frames, -1, -1), keep)

    def encode_images(self, pixels: Tensor) -> Tensor:
        return self._vae.encode(pixels)

    def text_bucket(self, condition: WanCondition) -> int:
        """Clips that begin with a picture are batches of their own; texts whose padding is one key
        share theirs with those of any length."""
        text = condition.texts[0]
        length = text.kv.shape[3] if text.repeats is None else 0
        return 2 * length + (condition.first is not None)

    def noise(self, params: ResolvedParams, seed: int) -> Tensor:
        vae = self._vae
        shape = (
            1,
            vae.channels,
            (params.num_frames - 1) // vae.temporal_factor + 1,
            params.height // vae.spatial_factor,
            params.width // vae.spatial_factor,
        )
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator).to(self.device)

    def expert(self, timestep: float) -> int:
        if self._boundary is None or len(self._experts) == 1:
            return 0
        train_steps = self._scheduler.get("num_train_timesteps", 1000)
        assert isinstance(train_steps, int)
        return 0 if timestep >= self._boundary * train_steps else 1

    def collate(self, conditions: list[WanCondition]) -> WanCondition:
        return WanCondition.cat(conditions)

    def velocity(
        self, latents: Tensor, timesteps: Tensor, context: WanCondition, expert: int
    ) -> Tensor:
        transformer = list(self._experts.values())[expert]
        latents, timesteps = context.dress(latents, timesteps, transformer.params.patch_size)
        return transformer(latents, timesteps, context.texts[expert])

    def velocity_packed(
        self, latents: Sequence[Tensor], timesteps: Tensor, context: WanCondition, expert: int
    ) -> list[Tensor]:
        transformer = list(self._experts.values())[expert]
        return transformer.packed(latents, timesteps, context.texts[expert])

    def decode(self, latents: Tensor) -> Iterator[Tensor]:
        return self._vae.decode_chunks(latents[0])
