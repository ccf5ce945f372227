"""Quantisation of a transformer from outside: which of its layers, and how they are put in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from sgl_diffusion.engine.offload.units import Place, blocks
from sgl_diffusion.layers.linear import Linear
from sgl_diffusion.layers.quantised import QuantisedLinear, can_be_quantised, quantised_bytes

# Layers with such a word in their names stay: what they compute scales and shifts all tokens.
_SENSITIVE = ("modulation", "norm")


def quantised_layers(model: nn.Module) -> Iterator[tuple[str, Linear]]:
    """The linear layers of the blocks. Embeddings, the last layers, modulation and norms stay."""
    for prefix, block in blocks(model):
        for path, layer in block.named_modules():
            sensitive = any(word in path for word in _SENSITIVE)
            if isinstance(layer, Linear) and can_be_quantised(layer) and not sensitive:
                yield f"{prefix}.{path}", layer


def saved_bytes(model: nn.Module) -> int:
    """By which the weights become smaller."""
    return sum(layer.weight.nbytes - quantised_bytes(layer) for _, layer in quantised_layers(model))


def quantise(model: nn.Module, weights: Mapping[nn.Module, Place], name: str) -> None:
    """Put in the layers of a model whose other parameters are there, weight by weight."""
    for path, layer in list(quantised_layers(model)):
        place = weights[layer]
        value = torch.empty(place.parameter.shape)
        place.home.read(value)
        quantised = QuantisedLinear(layer, value.to(place.parameter.device), name)
        owner, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(owner), leaf, quantised)
