"""Adapters for the tiny Wan model, made in memory, and a manager that reads them by path."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn

from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.base.lora import LoraUse
from sgl_diffusion.engine.lora.fit import Source
from sgl_diffusion.engine.lora.manager import Loras
from sgl_diffusion.engine.lora.rows import Blend, RowAdapters
from sgl_diffusion.engine.lora.state import StateFile
from sgl_diffusion.engine.pipeline import Adaptable
from sgl_diffusion.loader.adapters.types import Adapter, Delta, LowRank

# Names and sizes [out, in] of the layers of a tiny Wan of 64 channels, in diffusers' words.
LAYERS = {
    f"blocks.{i}.{name}": shape
    for i in range(2)
    for name, shape in {
        "attn1.to_q": (64, 64),
        "attn1.to_k": (64, 64),
        "attn1.to_v": (64, 64),
        "attn1.to_out.0": (64, 64),
        "attn2.to_q": (64, 64),
        "attn2.to_k": (64, 64),
        "attn2.to_v": (64, 64),
        "attn2.to_out.0": (64, 64),
        "ffn.net.0.proj": (128, 64),
        "ffn.net.2": (64, 128),
    }.items()
} | {"condition_embedder.text_embedder.linear_1": (64, 32)}


def low_rank(
    seed: int,
    rank: int = 4,
    names: Iterable[str] = LAYERS,
    dtype: torch.dtype = torch.float32,
    size: float = 0.3,
) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    modules: dict[str, tuple[Delta, ...]] = {}
    for name in names:
        out, width = LAYERS[name]
        down = torch.randn(rank, width, generator=generator) / width**0.5
        up = size * torch.randn(out, rank, generator=generator) / rank**0.5
        modules[name] = (LowRank(down.to(dtype), up.to(dtype), 0.75),)
    return Adapter("PEFT", f"{seed}", {"transformer": modules}, alpha=0.75 * rank)


class Shelf:
    """Adapters by path, and a count of how often each was read."""

    def __init__(self, **adapters: Adapter) -> None:
        self.adapters = adapters
        self.reads: list[str] = []

    def read(self, source: Source) -> Adapter:
        self.reads.append(source.path)
        if source.path not in self.adapters:
            raise RequestError("There is no such file.", code="invalid_lora")
        return self.adapters[source.path]

    def manager(
        self,
        *modules: nn.Module,
        rules: object,
        budget: int = 2**30,
        state: Path | None = None,
        in_use: Callable[[], Iterable[Blend]] = lambda: (),
        rows: RowAdapters | None = None,
    ) -> Loras:
        names = ("transformer", "transformer_2")
        components = {
            name: Adaptable(module, rules, "WanTransformer3DModel")  # type: ignore[arg-type]
            for name, module in zip(names, modules, strict=False)
        }
        return Loras(
            components,
            self.read,
            rows=rows or RowAdapters(torch.device("cpu")),
            budget=budget,
            state=StateFile(state, "tiny"),
            in_use=in_use,
        )


def prepare(manager: Loras, *settings: object) -> None:
    """Until everything is read."""
    while not manager.prepare(settings):  # type: ignore[arg-type]
        pass


def prepare_job(manager: Loras, *uses: LoraUse) -> list[LoraUse]:
    """The same for a job; what it is accepted with."""
    while (accepted := manager.prepare_job(uses)) is None:
        pass
    return accepted
