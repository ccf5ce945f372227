"""The parameters of one of our models under the names that diffusers has for them."""

from __future__ import annotations

from torch import nn

from sgl_diffusion.loader.adapters.match import Table
from sgl_diffusion.loader.rules import Rules


def table_of(module: nn.Module, rules: Rules) -> Table:
    """Names and shapes as `match` takes them; a fused parameter is one entry per segment."""
    table: dict[str, tuple[int, ...]] = {}
    for name, parameter in module.named_parameters():
        owner, _, leaf = name.rpartition(".")
        every = {"": slice(0, parameter.shape[0])}
        for segment, rows in getattr(module.get_submodule(owner), "segments", every).items():
            source = f"{rules.source(owner, segment)}.{leaf}".removeprefix(".")
            table[source] = (rows.stop - rows.start, *parameter.shape[1:])
    return table
