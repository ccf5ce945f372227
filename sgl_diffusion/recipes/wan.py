"""Wan 2.1 text-to-video, from a repository in diffusers format.

Special to Wan: prompts go to the transformer padded to 512 tokens with zeros and without a mask;
the text's keys and values do not depend on the step; guidance is on above 1; latents stay fp32; the
VAE runs in fp32 unless told otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from sgl_diffusion.attention import AttentionContext, select
from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.device import dtype_name, pick_device, pick_dtype
from sgl_diffusion.base.errors import ConfigError
from sgl_diffusion.base.params import ModelCard, ResolvedParams, SamplingDefaults
from sgl_diffusion.components.samplers import Solver, make_solver
from sgl_diffusion.components.text_umt5 import TextUmt5
from sgl_diffusion.components.vae_wan import VaeWan
from sgl_diffusion.engine.pipeline import Adaptable, Combine
from sgl_diffusion.loader.index import ModelIndex, read_config
from sgl_diffusion.loader.weights import load_weights
from sgl_diffusion.models.wan import TextContext, WanParams, WanTransformer
from sgl_diffusion.models.wan_weights import RULES

if TYPE_CHECKING:
    from PIL.Image import Image

DEFAULTS = SamplingDefaults(
    width=832, height=480, num_frames=81, fps=16, num_inference_steps=50, guidance_scale=5.0
)


def not_supported(index: ModelIndex) -> str | None:
    """Why this file cannot serve the checkpoint; None if it can."""
    if "transformer_2" in index.components:
        return "it has two experts"
    if index.options.get("expand_timesteps"):
        return "it has per-token timesteps"
    try:
        WanParams.from_config(read_config(index.component("transformer").folder))
        make_solver(_scheduler_config(index), 2)
    except ConfigError as error:
        return error.message.rstrip(".")
    return None


def open_pipeline(index: ModelIndex, options: EngineOptions, name: str) -> Wan:
    """Load every component in its precision and assemble the pipeline."""
    device = pick_device(options.device)
    dtype = pick_dtype(options.dit_precision, device)
    vae_dtype = pick_dtype(options.vae_precision, device, auto="fp32")
    text_dtype = pick_dtype(options.text_encoder_precision, device)
    folder = index.component("transformer").folder
    params = WanParams.from_config(read_config(folder))
    with torch.device("meta"):
        transformer = WanTransformer(params)
    load_weights(transformer, folder, RULES, dtype=dtype, device=device)
    backend = select(
        options.attention_backend, device=device, head_dim=params.attention_head_dim, dtype=dtype
    )
    transformer.attention = AttentionContext.on_one_rank(backend)
    text = TextUmt5.load(index, dtype=text_dtype, device=device)
    vae = VaeWan.load(index, dtype=vae_dtype, device=device)
    card = ModelCard(
        name=name,
        path=name,
        family="wan",
        pipeline_class=index.pipeline,
        backend="native",
        tasks=("T2V", "T2I", "TI2I"),
        defaults=DEFAULTS,
        device=device.type,
        dit_precision=dtype_name(dtype),
        vae_precision=dtype_name(vae_dtype),
        text_encoder_precision=dtype_name(text_dtype),
        attention_backend=backend.name,
        size_multiple=vae.spatial_factor * params.patch_size[1],
        frame_multiple=vae.temporal_factor,
        edits="image-to-image",
        max_images=1,
        masks=True,
        previews=True,
    )
    return Wan(card, device, transformer, text, vae, _scheduler_config(index))


class Wan:
    """Implements `engine.pipeline.Pipeline`."""

    combine: Combine | None = None

    def __init__(
        self,
        card: ModelCard,
        device: torch.device,
        transformer: WanTransformer,
        text: TextUmt5,
        vae: VaeWan,
        scheduler: dict[str, object],
    ) -> None:
        self.card = card
        self.device = device
        self._transformer = transformer
        self._text = text
        self._vae = vae
        self._scheduler = scheduler

    def blocks(self) -> list[torch.nn.Module]:
        return [*self._transformer.blocks, *self._text.blocks(), *self._vae.blocks()]

    def adaptables(self) -> dict[str, Adaptable]:
        return {"transformer": Adaptable(self._transformer, RULES, "WanTransformer3DModel")}

    def solver(self, params: ResolvedParams) -> Solver:
        steps, shift = params.num_inference_steps, params.flow_shift
        return make_solver(self._scheduler, steps, shift, start=params.start_step)

    def encode(self, prompt: str, params: ResolvedParams, pictures: Sequence[Image]) -> TextContext:
        text = self._text.encode([prompt], params.max_sequence_length)
        return self._transformer.prepare(text)

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        return self._vae.encode(pixels)

    def text_bucket(self, condition: TextContext) -> int:
        return condition.kv.shape[3]

    def noise(self, params: ResolvedParams, seed: int) -> torch.Tensor:
        vae = self._vae
        shape = (
            1,
            self._transformer.params.in_channels,
            (params.num_frames - 1) // vae.temporal_factor + 1,
            params.height // vae.spatial_factor,
            params.width // vae.spatial_factor,
        )
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator).to(self.device)

    def expert(self, timestep: float) -> int:
        return 0

    def collate(self, conditions: list[TextContext]) -> TextContext:
        return TextContext.cat(conditions)

    def velocity(
        self, latents: torch.Tensor, timesteps: torch.Tensor, context: TextContext, expert: int
    ) -> torch.Tensor:
        return self._transformer(latents, timesteps, context)

    def decode(self, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        return self._vae.decode_chunks(latents[0])


def _scheduler_config(index: ModelIndex) -> dict[str, object]:
    return read_config(index.component("scheduler").folder, "scheduler_config.json")
