"""How a fresh transformer begins: with a ruler, with ears for the text, and with what the text says
of the shape's place taken from every token's own. What is left says how far a token is from the
middle of the shape; the blocks that learn draw from there."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from examples.train_demo.ruler import Room, lay

# What the text encoder says in its first numbers, at every word.
SAID = ("across", "along", "size", "moves across", "moves along")
_TO_PLACE = 0.95  # how far "left" or "top" is from the centre on the ruler, of 128 pixels
_STILL = 8.0  # holds time back where nothing is said to move
_HELD = 0.53  # of that: a whole word lets it go entirely, however much noise there is beside it
_SPEED = 0.31  # how far time moves a shape, on the ruler
_LISTEN = 64  # neurons that hear that there is a word at all


@torch.no_grad()
def begin(transformer: Any) -> None:
    """The first two blocks stay as they are made here, and the others learn."""
    room = Room(transformer)
    first, second = transformer.blocks[0], transformer.blocks[1]
    embedder = transformer.condition_embedder
    nn.init.zeros_(embedder.time_proj.weight)
    nn.init.zeros_(embedder.time_proj.bias)
    _pass_on(embedder.text_embedder)
    for block in transformer.blocks:
        # What a layer finds is heard from the first step: the usual gates begin at a tenth of it.
        block.scale_shift_table.zero_()
        block.scale_shift_table[:, 2] = block.scale_shift_table[:, 5] = 0.5
        _listen(block.attn2)
    for block in (first, second):
        block.scale_shift_table[:, 5] = 1.0
        for layer in (block.attn2.to_out[0], block.ffn.net[2]):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    for layer in (first.attn2.to_q, first.attn2.to_k, first.attn2.to_v):
        nn.init.zeros_(layer.weight)  # the first block hears nothing
    second.scale_shift_table[:, 2] = 1.0
    lay(transformer, room)
    _subtract(second.attn2, room)
    _follow(second.ffn, room)
    _spread(second.ffn, room)
    for part in (transformer.patch_embedding, first, second):
        part.requires_grad_(False)
    _keep_from_time(embedder.time_proj, room)


def _pass_on(embedder: Any) -> None:
    """The first number of what comes out says that there is a word, the next ones are `SAID`."""
    first, last = embedder.linear_1, embedder.linear_2
    for layer, gain in ((first, 1.0), (last, 1.6)):
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    half = torch.randn(_LISTEN // 2, first.in_features) * first.in_features**-0.5
    first.weight[:_LISTEN] = torch.cat([half, -half])
    last.weight[: len(SAID) + 1] = 0.0
    last.weight[0, :_LISTEN] = 2.5 / _LISTEN
    for at in range(len(SAID)):
        for sign in (1.0, -1.0):
            neuron = _LISTEN + 2 * at + (sign < 0)
            first.weight[neuron] = 0.0
            first.weight[neuron, at] = sign
            last.weight[at + 1, neuron] = sign  # GELU(x) - GELU(-x) = x


def _listen(attention: Any) -> None:
    """Half of the heads hear every word from the first step, though 500 zeros pad the prompt; in
    the others a place can choose to hear nothing."""
    for layer in (attention.to_q, attention.to_k, attention.to_v):
        nn.init.orthogonal_(layer.weight)
        nn.init.zeros_(layer.bias)
    nn.init.orthogonal_(attention.to_out[0].weight, 0.5)
    head = attention.to_q.out_features // attention.heads
    hearing = slice(0, attention.to_q.out_features // 2, head)
    attention.to_k.weight[hearing] = 0.0
    attention.to_k.weight[hearing, 0] = 6.0
    attention.to_q.bias[hearing] = 5.0
    for norm in (attention.norm_q, attention.norm_k):
        nn.init.constant_(norm.weight, 2.0)


def _subtract(attention: Any, room: Room) -> None:
    """The first head says what is `SAID`, and nothing else speaks there."""
    out = attention.to_out[0].weight
    for at in range(len(SAID)):
        attention.to_v.weight[at] = 0.0
        attention.to_v.weight[at, at + 1] = 1.0
        out[:, at] = 0.0
        out[room.away + at, at] = -_TO_PLACE if at < 2 else 1.0


def _follow(ffn: Any, room: Room) -> None:
    """A moving shape passes the centre half way: time counts where the text says that way."""
    first, last = ffn.net[0].proj, ffn.net[2]
    for at in range(2):
        for way in (1.0, -1.0):
            for late in (1.0, -1.0):
                neuron = 4 * at + int(2 * (way < 0) + (late < 0))
                first.weight[neuron] = 0.0
                first.weight[neuron, room.time] = late
                first.weight[neuron, room.said + 1 + at] = way * _STILL
                first.bias[neuron] = -_STILL * _HELD
                last.weight[:, neuron] = 0.0
                last.weight[room.away + at, neuron] = -way * late * _SPEED


def _spread(ffn: Any, room: Room) -> None:
    """The other neurons see stripes of many widths and directions around the middle of the shape:
    sums of such stripes are what later layers draw with."""
    first, last = ffn.net[0].proj, ffn.net[2]
    stripes = first.out_features - 8
    wide = torch.empty(stripes, 1).uniform_(0.5, 3.0)
    first.weight[8:] = 0.0
    first.weight[8:, room.away : room.said + 1] = torch.randn(stripes, 3) * wide
    first.bias[8:] = torch.randn(stripes) * wide[:, 0]
    last.weight[room.own : room.flags, 8:] = torch.randn(room.flags - room.own, stripes) * (
        0.35 / math.sqrt(stripes)
    )


def _keep_from_time(layer: Any, room: Room) -> None:
    """What the ruler measures does not depend on how much noise there is."""
    kept = torch.ones(6, room.width)
    kept[:, room.own : room.end] = 0.0
    for parameter in (layer.weight, layer.bias):
        mask = kept.flatten().view(-1, *[1] * (parameter.dim() - 1))
        parameter.register_hook(lambda grad, mask=mask: grad * mask.to(grad.device))
