"""A ruler in the first two blocks of a transformer.

Attention with rotary positions knows how far tokens are from each other, and not where they are: in
pure noise all places look alike, and to find a border takes a small net very long. Here heads of
the first block look at the neighbour on one side, or at the token itself where there is none, and
the layers behind them tell the two apart: a number for each border. Heads of the second block sum
these with weights that fall off with distance: numbers that say where a token is.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

# Before, after, up, down, left, right: steps in time, height and width.
_SIDES = ((-1, 0, 0), (1, 0, 0), (0, -1, 0), (0, 1, 0), (0, 0, -1), (0, 0, 1))
_SEEN = (*_SIDES, (0, 0, 0))  # and a token itself, to be compared as the others are
# Of an axis, how wide the heads of the second block look, in tokens.
_NEAR, _FAR = 2.0, 6.0
_LONG = 3.0  # in time, where a clip of nine frames and one of 17 need about one measure
_WIDTHS = ((0, _LONG), (1, _NEAR), (2, _NEAR), (1, _FAR), (2, _FAR))
_COPIED = 21  # numbers of a neighbour that are compared
_STEEP = 20.0  # a difference as large as a twentieth of the usual is one
_DIFFER = 0.98  # what comes of the numbers of two tokens, and less for one
_SHARP = 15.0  # how much a neighbour's score is above the others'
_TOLD = 4.0  # how large what is found stands among a token's other numbers


class Room:
    """Which of a token's numbers hold what."""

    def __init__(self, transformer: Any) -> None:
        self.width = transformer.patch_embedding.out_channels
        self.own = transformer.patch_embedding.weight[0].numel()
        self.flags = self.own + len(_SEEN) * _COPIED
        self.borders = self.flags + len(_SIDES)  # two for each of `_WIDTHS`
        self.time = self.borders + 2 * len(_WIDTHS)  # from the first picture to the last
        self.away = self.time + 1  # across and along, from the middle
        self.said = self.away + 2  # three more that are kept for what a text says
        self.end = self.said + 3
        if self.end > self.width or _COPIED > self.own:
            raise ValueError(f"a width of {self.width} has no room for {len(_SIDES)} neighbours")


@torch.no_grad()
def lay(transformer: Any, room: Room) -> None:
    patches = transformer.patch_embedding
    patches.bias.zero_()
    patches.weight.zero_()
    turned = torch.linalg.qr(torch.randn(room.own, room.own))[0]
    patches.weight[: room.own] = turned.view_as(patches.weight[: room.own])
    first, second = transformer.blocks[0], transformer.blocks[1]
    for block in (first, second):
        attention = block.attn1
        for layer in (attention.to_q, attention.to_k, attention.to_v, attention.to_out[0]):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    _look_aside(first.attn1, room)
    _compare(first.ffn, room)
    _measure(second.attn1, room)


def _look_aside(attention: Any, room: Room) -> None:
    head = attention.to_q.out_features // attention.heads
    for at, steps in enumerate(_SEEN):
        begin = at * head
        for axis, step in enumerate(steps):
            # The second frequency tells a neighbour from tokens that are a whole turn away.
            for strength, frequency in zip((1.0, 3.0), (0, 1), strict=True):
                _score(attention, begin, axis, frequency, _SHARP * strength, step)
        for number in range(_COPIED):
            attention.to_v.weight[begin + number, number] = 1.0
            attention.to_out[0].weight[room.own + at * _COPIED + number, begin + number] = 1.0
    _keep_length(attention)


def _compare(ffn: Any, room: Room) -> None:
    """Four neurons for each number of a neighbour: together about one where it differs from the
    token's own, however much, and little where the two are one."""
    first, last = ffn.net[0].proj, ffn.net[2]
    if first.out_features < 4 * len(_SIDES) * _COPIED:
        raise ValueError(f"{first.out_features} neurons are too few to compare neighbours")
    # Nothing where there is a neighbour.
    last.bias[room.flags : room.borders] = -_TOLD * _DIFFER
    for at in range(len(_SIDES)):
        for number in range(_COPIED):
            weight = torch.zeros(first.in_features)
            weight[room.own + at * _COPIED + number] = _STEEP
            weight[room.own + len(_SIDES) * _COPIED + number] = -_STEEP
            for part, (sign, bias) in enumerate(((1, 0.0), (1, -1.0), (-1, 0.0), (-1, -1.0))):
                neuron = 4 * (at * _COPIED + number) + part
                first.weight[neuron], first.bias[neuron] = sign * weight, bias
                last.weight[:, neuron] = 0.0
                last.weight[room.flags + at, neuron] = (1 if bias == 0.0 else -1) * _TOLD / _COPIED


def _measure(attention: Any, room: Room) -> None:
    head = attention.to_q.out_features // attention.heads
    out = attention.to_out[0].weight
    for at, (axis, width) in enumerate(_WIDTHS):
        begin, turn = at * head, _turn(head, axis, 1)
        _score(attention, begin, axis, 1, (width * turn) ** -2, 0)
        for side in range(2):
            attention.to_v.weight[begin + side, room.flags + 2 * axis + side] = 1.0
            if axis > 0:
                out[room.borders + 2 * at + side, begin + side] = _TOLD / 4
            if width != _FAR:
                # Across is the last axis, and the first of what is said.
                where = room.time if axis == 0 else room.away + 2 - axis
                out[where, begin + side] = _TOLD / 2 * (1 - 2 * side)
    _keep_length(attention)


def _score(
    attention: Any, begin: int, axis: int, frequency: int, strength: float, step: int
) -> None:
    """Adds `strength` x cos(turn of the distance - `step`) to the scores of the head at `begin`."""
    head = attention.to_q.out_features // attention.heads
    dim = begin + _begin(head, axis) + 2 * frequency
    angle = step * _turn(head, axis, frequency)
    root = math.sqrt(strength * math.sqrt(head))
    attention.to_k.bias[dim] = root
    attention.to_q.bias[dim] = root * math.cos(angle)
    attention.to_q.bias[dim + 1] = root * math.sin(angle)


def _begin(head: int, axis: int) -> int:
    side = 2 * (head // 6)
    return (0, head - 2 * side, head - side)[axis]


def _turn(head: int, axis: int, frequency: int) -> float:
    """The angle by which one step along the axis turns a pair of dimensions."""
    side = 2 * (head // 6)
    return float(10000 ** (-2 * frequency / ((head - 2 * side) if axis == 0 else side)))


def _keep_length(attention: Any) -> None:
    """The norms of queries and keys, which take their length away, give it back."""
    for layer, norm in ((attention.to_q, attention.norm_q), (attention.to_k, attention.norm_k)):
        norm.weight.fill_(float(layer.bias.square().mean().sqrt()))
