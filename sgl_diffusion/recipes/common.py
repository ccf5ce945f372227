"""What recipes have in common: precisions, transformers with their attention, the card."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from sgl_diffusion.attention import AttentionContext, select
from sgl_diffusion.attention.base import AttentionBackend
from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.device import dtype_name, pick_device, pick_dtype
from sgl_diffusion.base.errors import ConfigError
from sgl_diffusion.base.params import ModelCard, SamplingDefaults
from sgl_diffusion.components.samplers import Spacing, make_solver
from sgl_diffusion.loader.absent import load_or_leave
from sgl_diffusion.loader.index import ModelIndex, read_config
from sgl_diffusion.loader.rules import Rules

T = TypeVar("T", bound=nn.Module)


@dataclass(frozen=True)
class Plan:
    """Where a model runs, in which precisions, and with which attention."""

    device: torch.device
    dit: torch.dtype
    vae: torch.dtype
    text: torch.dtype
    attention: AttentionBackend

    @classmethod
    def of(cls, options: EngineOptions, *, head_dim: int, vae: str = "") -> Plan:
        """`vae` is the precision of the VAE where the operator leaves it open."""
        device = pick_device(options.device)
        dit = pick_dtype(options.dit_precision, device)
        return cls(
            device,
            dit,
            pick_dtype(options.vae_precision, device, auto=vae),
            pick_dtype(options.text_encoder_precision, device),
            select(options.attention_backend, device=device, head_dim=head_dim, dtype=dit),
        )

    def load_dit(
        self, kind: type[T], params: Any, rules: Rules, index: ModelIndex, name: str = "transformer"
    ) -> T:
        """A transformer with its weights and its attention."""
        with torch.device("meta"):
            model = kind(params)
        part = index.component(name)
        load_or_leave(model, part, rules, dtype=self.dit, device=self.device)
        repeated = self.attention.repeated(self.device)
        model.attention = AttentionContext.on_one_rank(self.attention, repeated)  # type: ignore[assignment]
        return model

    def card(
        self, index: ModelIndex, name: str, defaults: SamplingDefaults, **more: Any
    ) -> ModelCard:
        """The card of a model that runs so; `more` are the fields of the family."""
        return ModelCard(
            name=name,
            path=name,
            pipeline_class=index.pipeline,
            backend="native",
            defaults=defaults,
            device=self.device.type,
            dit_precision=dtype_name(self.dit),
            vae_precision=dtype_name(self.vae),
            text_encoder_precision=dtype_name(self.text),
            attention_backend=self.attention.name,
            step_cache=True,
            **more,
        )


def transformer_config(index: ModelIndex, name: str = "transformer") -> dict[str, Any]:
    return read_config(index.component(name).folder)


def scheduler_config(index: ModelIndex) -> dict[str, Any]:
    return read_config(index.component("scheduler").folder, "scheduler_config.json")


def reason_against(index: ModelIndex, params: Any, spacing: Spacing) -> str | None:
    """Why a recipe cannot serve a checkpoint: `params` is the class that reads the transformer's
    config, `spacing` an example of what the family asks of its scheduler."""
    try:
        params.from_config(transformer_config(index))
        make_solver(scheduler_config(index), 2, None, spacing)
    except ConfigError as error:
        return error.message.rstrip(".")
    return None
