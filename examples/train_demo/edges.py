"""Lets a fresh transformer see where a picture ends.

Its attention knows how far tokens are from each other, and not where they are: in pure noise all
places look alike, and to find a border takes a small net very long. So the first block begins as a
detector: each of its four heads looks at the neighbour on one side, or at the token itself where
there is none, and the layers behind it tell the two apart. Later blocks make places of that.
"""

from __future__ import annotations

import math
from typing import Any

import torch

# Left, right, up, down, as steps in time, height and width.
_SIDES = ((0, 0, -1), (0, 0, 1), (0, -1, 0), (0, 1, 0))
_SHARP = 2.4
_COPIED = 48  # numbers of a neighbour that are compared


@torch.no_grad()
def see_edges(transformer: Any) -> None:
    block = transformer.blocks[0]
    width = transformer.patch_embedding.out_channels
    own = transformer.patch_embedding.weight[0].numel()
    if len(_SIDES) * _COPIED + own > width or _COPIED > own:
        raise ValueError(f"a width of {width} has no room for {len(_SIDES)} neighbours")
    patches = transformer.patch_embedding
    patches.bias.zero_()
    patches.weight.zero_()
    patches.weight[:own] = torch.linalg.qr(torch.randn(own, own))[0].view_as(patches.weight[:own])
    transformer.condition_embedder.time_proj.weight.mul_(0.1)
    transformer.condition_embedder.time_proj.bias.zero_()
    _look_aside(block.attn1, width, own)
    block.attn1.requires_grad_(False)
    block.attn2.to_out[0].weight.mul_(0.1)
    # What comes of a neighbour is as large as a token's own: the norm before doubled it.
    table = torch.zeros_like(block.scale_shift_table)
    table[:, 2], table[:, 5] = 0.5, 1.0
    block.scale_shift_table.copy_(table)
    _compare(block.ffn, width, own)


def _look_aside(attention: Any, width: int, own: int) -> None:
    for layer in (attention.to_q, attention.to_k, attention.to_v, attention.to_out[0]):
        layer.weight.zero_()
        layer.bias.zero_()
    head = width // attention.heads
    for at, steps in enumerate(_SIDES):
        begin = at * head
        for dim, angle in _angles(head, steps):
            attention.to_k.bias[begin + dim] = 1.0
            attention.to_q.bias[begin + dim] = math.cos(angle)
            attention.to_q.bias[begin + dim + 1] = math.sin(angle)
        for number in range(_COPIED):
            attention.to_v.weight[begin + number, number] = 1.0
            attention.to_out[0].weight[own + at * _COPIED + number, begin + number] = 1.0
    for norm in (attention.norm_q, attention.norm_k):
        norm.weight.fill_(_SHARP)


def _angles(head: int, steps: tuple[int, int, int]) -> list[tuple[int, float]]:
    """Dimensions that turn fastest with a place, and the turn of a token so many steps away."""
    side = 2 * (head // 6)
    found, begin = [], 0
    for size, step in zip((head - 2 * side, side, side), steps, strict=True):
        found += [(begin + 2 * k, step * 10000 ** (-2 * k / size)) for k in range(2)]
        begin += size
    return found


def _compare(ffn: Any, width: int, own: int) -> None:
    """Pairs of neurons for what differs between a token and its neighbour: together they are small
    only where the two are one, and speak in one direction for each side."""
    first, last = ffn.net[0].proj, ffn.net[2]
    first.bias.zero_()
    directions = torch.linalg.qr(torch.randn(width, len(_SIDES)))[0]
    for at in range(len(_SIDES)):
        for number in range(_COPIED):
            for sign in (0, 1):
                neuron = 2 * (at * _COPIED + number) + sign
                weight = torch.zeros(width)
                weight[own + at * _COPIED + number], weight[number] = 1.0, -1.0
                first.weight[neuron] = weight * (1 - 2 * sign)
                last.weight[:, neuron] = directions[:, at] * (4.0 / _COPIED)
