"""What the denoise benchmark knows of each family: how our model and diffusers' are called.

Latents are [B, C, T, h, w] for both sides; a timestep counts from 0 (clean) to 1000 (noise).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import diffusers
import torch
from torch import Tensor, nn

from sgl_diffusion.loader.rules import Rules
from sgl_diffusion.models import flux, flux_weights, wan, wan_weights, z_image, z_image_weights

GUIDANCE = 5.0


class Family(Protocol):
    """`theirs` is the class of diffusers' transformer; `lists` the attributes that hold the blocks
    of ours and of theirs; a guided family makes two passes a step."""

    theirs: ClassVar[Any]
    rules: ClassVar[Rules]
    lists: ClassVar[tuple[tuple[str, ...], tuple[str, ...]]]
    guided: ClassVar[bool]

    def native(self, config: Mapping[str, Any]) -> nn.Module: ...

    def prepare(self, model: Any) -> Any:
        """What our model reads of the conditions, for the whole batch of a step."""
        ...

    def ends(self, context: Any) -> Any:
        """Of that, what a model without blocks reads."""
        ...

    def call(self, model: Any, latents: Tensor, timestep: Tensor, row: int) -> Tensor:
        """The velocity by diffusers' model of the pass `row` of a step."""
        ...


@dataclass
class Wan:
    theirs = diffusers.WanTransformer3DModel
    rules = wan_weights.RULES
    lists = (("blocks",), ("blocks",))
    guided = True

    text: Tensor

    @classmethod
    def of(cls, config: Mapping[str, Any], tokens: int, device: torch.device, dtype: Any) -> Wan:
        return cls(torch.randn(2, tokens, config["text_dim"], device=device).to(dtype))

    def native(self, config: Mapping[str, Any]) -> nn.Module:
        return wan.WanTransformer(wan.WanParams.from_config(config))

    def prepare(self, model: wan.WanTransformer) -> wan.TextContext:
        return model.prepare(self.text)

    def ends(self, context: wan.TextContext) -> wan.TextContext:
        return wan.TextContext(context.kv[:0])

    def call(self, model: Any, latents: Tensor, timestep: Tensor, row: int) -> Tensor:
        text = self.text[row : row + 1]
        result: Tensor = model(latents, timestep, text, return_dict=False)[0]
        return result


@dataclass
class Flux:
    theirs = diffusers.FluxTransformer2DModel
    rules = flux_weights.RULES
    lists = (
        ("double_blocks", "single_blocks"),
        ("transformer_blocks", "single_transformer_blocks"),
    )
    guided = False

    text: Tensor
    pooled: Tensor

    @classmethod
    def of(cls, config: Mapping[str, Any], tokens: int, device: torch.device, dtype: Any) -> Flux:
        text = torch.randn(1, tokens, config["joint_attention_dim"], device=device)
        pooled = torch.randn(1, config["pooled_projection_dim"], device=device)
        return cls(text.to(dtype), pooled.to(dtype))

    def native(self, config: Mapping[str, Any]) -> nn.Module:
        return flux.FluxTransformer(flux.FluxParams.from_config(config))

    def prepare(self, model: flux.FluxTransformer) -> flux.FluxContext:
        return model.prepare(self.text, self.pooled, GUIDANCE)

    def ends(self, context: flux.FluxContext) -> flux.FluxContext:
        return context

    def call(self, model: Any, latents: Tensor, timestep: Tensor, row: int) -> Tensor:
        channels, _, high, wide = latents.shape[1:]
        grid, device = (high // 2, wide // 2), latents.device
        packed = latents[:, :, 0].unflatten(3, (grid[1], 2)).unflatten(2, (grid[0], 2))
        packed = packed.permute(0, 2, 4, 1, 3, 5)
        ids = torch.zeros(*grid, 3, device=device)
        ids[..., 1] += torch.arange(grid[0], device=device)[:, None]
        ids[..., 2] += torch.arange(grid[1], device=device)
        result: Tensor = model(
            hidden_states=packed.flatten(3).flatten(1, 2),
            timestep=timestep.to(latents.dtype) / 1000,
            guidance=torch.full((1,), GUIDANCE, device=device, dtype=latents.dtype),
            pooled_projections=self.pooled,
            encoder_hidden_states=self.text,
            txt_ids=torch.zeros(self.text.shape[1], 3, device=device),
            img_ids=ids.flatten(0, 1),
            return_dict=False,
        )[0]
        result = result.unflatten(2, (channels, 2, 2)).unflatten(1, grid)
        return result.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)[:, :, None]


@dataclass
class ZImage:
    theirs = diffusers.ZImageTransformer2DModel
    rules = z_image_weights.RULES
    lists = (("noise_refiner", "layers"), ("noise_refiner", "context_refiner", "layers"))
    guided = False

    caption: Tensor

    @classmethod
    def of(cls, config: Mapping[str, Any], tokens: int, device: torch.device, dtype: Any) -> ZImage:
        return cls(torch.randn(1, tokens, config["cap_feat_dim"], device=device).to(dtype))

    def native(self, config: Mapping[str, Any]) -> nn.Module:
        return z_image.ZImageTransformer(z_image.ZImageParams.from_config(config))

    def prepare(self, model: z_image.ZImageTransformer) -> z_image.ZImageContext:
        return model.prepare(self.caption)

    def ends(self, context: z_image.ZImageContext) -> z_image.ZImageContext:
        return context

    def call(self, model: Any, latents: Tensor, timestep: Tensor, row: int) -> Tensor:
        time = (1000 - timestep) / 1000
        outputs = model(
            list(latents.unbind()), time, list(self.caption.unbind()), return_dict=False
        )
        return -torch.stack(list(outputs[0]))


FAMILIES: Mapping[str, Any] = {"wan": Wan, "flux": Flux, "z_image": ZImage}


@contextmanager
def empty(model: nn.Module, lists: tuple[str, ...]) -> Iterator[None]:
    """A model without its blocks."""
    kept = {name: getattr(model, name) for name in lists}
    for name in lists:
        setattr(model, name, nn.ModuleList())
    try:
        yield
    finally:
        for name, blocks in kept.items():
            setattr(model, name, blocks)
