"""Where the tokens of each model family are: what its blocks get and give, by position.

Image (or video) and text are both shared out, each by itself: no rank has a token that another one
has, so attention counts every key once. What all tokens read (modulation, cross-attended text)
stays whole. Rope tables are cut like the tokens they belong to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sgl_diffusion.attention.strategies.base import Lengths
from sgl_diffusion.distributed.shares import Shares, overlap, span
from sgl_diffusion.layers.embed import Rope, token_grid
from sgl_diffusion.layers.runs import Run
from sgl_diffusion.models.flux import FluxTransformer
from sgl_diffusion.models.flux2 import Flux2Transformer
from sgl_diffusion.models.qwen_image import QwenImageTransformer
from sgl_diffusion.models.sd3 import Sd3Transformer
from sgl_diffusion.models.wan import WanTransformer
from sgl_diffusion.models.z_image import PATCH as Z_IMAGE_PATCH
from sgl_diffusion.models.z_image import ZImageLayers, ZImageTransformer, filled
from sgl_diffusion.models.z_image_omni import ZImageOmniTransformer

Args = tuple[Any, ...]


class Part(Protocol):
    """Blocks that follow each other, with the tokens in the same places."""

    def enter(self, args: Args, shares: Shares) -> Args:
        """The arguments of the first block, whose tokens are whole."""

    def each(self, block: nn.Module, args: Args, shares: Shares) -> tuple[Args, list[Lengths]]:
        """The other arguments of any block, and the lengths of its attention calls in order."""

    def leave(self, output: Any, shares: Shares) -> Any:
        """What the last block gives, whole again as far as anybody reads it."""


@dataclass(frozen=True)
class Section:
    blocks: list[nn.Module]
    part: Part


class Family(Protocol):
    def heads(self, params: Any) -> int: ...

    def segments(self, model: Any, latents: Tensor, context: Any) -> tuple[int, ...]:
        """The lengths of the whole sequences that are shared out."""

    def sections(self, model: Any) -> list[Section]: ...

    def trunk(self, model: Any) -> list[nn.Module]:
        """The blocks that all tokens go through, one after the other."""


class _Heads:
    def heads(self, params: Any) -> int:
        return int(params.num_attention_heads)

    def trunk(self, model: Any) -> list[nn.Module]:
        return list(model.blocks)


def _everything(shares: Shares, *segments: int) -> Lengths:
    lengths = shares.lengths(*segments)
    return Lengths(lengths, lengths)


def _cut_rope(rope: Rope, shares: Shares, *segments: int) -> Rope:
    cos, sin = (shares.cut(table, *segments, dim=0) for table in rope)
    return cos, sin


class Wan(_Heads):
    def segments(self, model: WanTransformer, latents: Tensor, context: Any) -> tuple[int, ...]:
        return (math.prod(token_grid(latents, model.params.patch_size)),)

    def sections(self, model: WanTransformer) -> list[Section]:
        return [Section(list(model.blocks), _WanBlocks())]


class _WanBlocks:
    """x, modulation, kv, image_kv, rope, attention -> x"""

    def enter(self, args: Args, shares: Shares) -> Args:
        return (shares.cut(args[0], 0), *args[1:])

    def each(self, block: nn.Module, args: Args, shares: Shares) -> tuple[Args, list[Lengths]]:
        x, modulation, *texts, rope, attention = args
        if modulation.dim() == 4:  # one for each token
            modulation = shares.cut(modulation, 0)
        args = (x, modulation, *texts, _cut_rope(rope, shares, 0), attention)
        return args, [_everything(shares, 0)]

    def leave(self, output: Tensor, shares: Shares) -> Tensor:
        return shares.join(output, 0)


class Flux(_Heads):
    """FLUX.1 and FLUX.2; segments: text, image."""

    def segments(
        self, model: FluxTransformer | Flux2Transformer, latents: Tensor, context: Any
    ) -> tuple[int, ...]:
        side = 2 if isinstance(model, FluxTransformer) else 1
        image = latents.shape[3] * latents.shape[4] // side**2 + context.references.shape[1]
        return context.text.shape[1], image

    def trunk(self, model: FluxTransformer | Flux2Transformer) -> list[nn.Module]:
        return [*model.double_blocks, *model.single_blocks]

    def sections(self, model: FluxTransformer | Flux2Transformer) -> list[Section]:
        return [
            Section(list(model.double_blocks), _FluxDouble()),
            Section(list(model.single_blocks), _FluxSingle()),
        ]


class _FluxBlocks:
    """..., rope, attend"""

    def each(self, block: nn.Module, args: Args, shares: Shares) -> tuple[Args, list[Lengths]]:
        *first, rope, attend = args
        args = (*first, _cut_rope(rope, shares, 0, 1), attend)
        return args, [_everything(shares, 0, 1)]


class _FluxDouble(_FluxBlocks):
    """text, image, ... -> text, image"""

    def enter(self, args: Args, shares: Shares) -> Args:
        return (shares.cut(args[0], 0), shares.cut(args[1], 1), *args[2:])

    def leave(self, output: Any, shares: Shares) -> Any:
        return output


class _FluxSingle(_FluxBlocks):
    """[text, image], ... -> [text, image]; they come from the double blocks, shared out."""

    def enter(self, args: Args, shares: Shares) -> Args:
        return args

    def leave(self, output: Tensor, shares: Shares) -> Tensor:
        return shares.join(output, 0, 1)


class Sd3(_Heads):
    """Segments: image, text."""

    def segments(self, model: Sd3Transformer, latents: Tensor, context: Any) -> tuple[int, ...]:
        return math.prod(token_grid(latents, model.params.patch)), context.text.shape[1]

    def sections(self, model: Sd3Transformer) -> list[Section]:
        return [Section(list(model.blocks), _Sd3Blocks())]


class _Sd3Blocks:
    """image, text, signal, attend -> image, text"""

    def enter(self, args: Args, shares: Shares) -> Args:
        return (shares.cut(args[0], 0), shares.cut(args[1], 1), *args[2:])

    def each(self, block: Any, args: Args, shares: Shares) -> tuple[Args, list[Lengths]]:
        joint = _everything(shares, 0, 1)
        if not block.text.updates:
            joint = Lengths(shares.lengths(0), joint.keys)
        return args, [joint] if block.attn2 is None else [joint, _everything(shares, 0)]

    def leave(self, output: tuple[Tensor, Tensor], shares: Shares) -> tuple[Tensor, Tensor]:
        image, text = output
        return shares.join(image, 0), text


class QwenImage(_Heads):
    """Segments: image, text (padded to the longest row)."""

    def segments(
        self, model: QwenImageTransformer, latents: Tensor, context: Any
    ) -> tuple[int, ...]:
        image = latents.shape[3] * latents.shape[4] // 4 + context.references.shape[1]
        return image, context.text.shape[1]

    def sections(self, model: QwenImageTransformer) -> list[Section]:
        return [Section(list(model.blocks), _QwenBlocks())]


class _QwenBlocks:
    """image, text, signals, rope, runs, attend -> image, text"""

    def enter(self, args: Args, shares: Shares) -> Args:
        return (shares.cut(args[0], 0), shares.cut(args[1], 1), *args[2:])

    def each(self, block: nn.Module, args: Args, shares: Shares) -> tuple[Args, list[Lengths]]:
        image, text, signals, rope, runs, attend = args
        mine = shares.span(0)
        signals = [(_within(tokens, shares, mine), signal) for tokens, signal in signals]
        local, calls = _cut_runs(runs, shares)
        return (image, text, signals, _cut_rope(rope, shares, 0, 1), local, attend), calls

    def leave(self, output: tuple[Tensor, Tensor], shares: Shares) -> tuple[Tensor, Tensor]:
        image, text = output
        return shares.join(image, 0), text


def _within(tokens: slice, shares: Shares, mine: slice) -> slice:
    return overlap(slice(*tokens.indices(shares.segments[0])), mine)


class ZImage(_Heads):
    """Segments: image (filled up), caption (padded to the longest row)."""

    def heads(self, params: Any) -> int:
        return int(params.n_heads)

    def segments(self, model: ZImageLayers, latents: Tensor, context: Any) -> tuple[int, ...]:
        return filled(math.prod(token_grid(latents, Z_IMAGE_PATCH))), context.caption.shape[1]

    def trunk(self, model: ZImageLayers) -> list[nn.Module]:
        return list(model.layers)

    def sections(self, model: ZImageLayers) -> list[Section]:
        return [
            Section(list(model.noise_refiner), _ZImageBlocks(0)),
            Section(list(model.layers), _ZImageBlocks(0, 1)),
        ]


class ZImageOmni(ZImage):
    """Segments: the new image and the references, what is seen and the caption."""

    def segments(self, model: ZImageLayers, latents: Tensor, context: Any) -> tuple[int, ...]:
        image = filled(math.prod(token_grid(latents, Z_IMAGE_PATCH)))
        return image + context.references.shape[1], context.rest.shape[1]


class _ZImageBlocks:
    """x, signal, ropes, runs, attend -> x, where x holds the given segments."""

    def __init__(self, *segments: int) -> None:
        self._segments = segments

    def enter(self, args: Args, shares: Shares) -> Args:
        return (shares.cut(args[0], *self._segments), *args[1:])

    def each(self, block: nn.Module, args: Args, shares: Shares) -> tuple[Args, list[Lengths]]:
        x, signal, ropes, runs, attend = args
        if signal.dim() == 3:  # one for each token
            signal = shares.cut(signal, *self._segments)
        local, calls = _cut_runs(runs, shares)
        ropes = tuple((_cut_row(cos, shares), _cut_row(sin, shares)) for cos, sin in ropes)
        return (x, signal, ropes, local, attend), calls

    def leave(self, output: Tensor, shares: Shares) -> Tensor:
        return shares.join(output, *self._segments)


def _cut_runs(runs: Sequence[Run], shares: Shares) -> tuple[tuple[Run, ...], list[Lengths]]:
    """The runs as this rank has them, and what every rank has of each."""
    local, calls = [], []
    for run in runs:
        spans = [_row_spans(run.length, shares, rank) for rank in range(shares.group.size)]
        lengths = tuple(sum(part.stop - part.start for part in parts) for parts in spans)
        local.append(Run(run.rows, lengths[shares.group.index]))
        calls.append(Lengths(lengths, lengths))
    return tuple(local), calls


def _cut_row(table: Tensor, shares: Shares) -> Tensor:
    """This rank's part of a table for all tokens of a row that is not padded."""
    spans = _row_spans(len(table), shares, shares.group.index)
    return torch.cat([table[part] for part in spans])


def _row_spans(length: int, shares: Shares, rank: int) -> tuple[slice, slice]:
    """Which tokens of a row a rank has: of segment 0, which is whole in every row, and of the
    beginning of segment 1 that the row has. Of the latter a rank may have nothing."""
    first, second = shares.segments
    image, text = (span(size, shares.group.size, rank) for size in (first, second))
    return image, slice(min(first + text.start, length), min(first + text.stop, length))


FAMILIES: dict[type[nn.Module], Family] = {
    WanTransformer: Wan(),
    FluxTransformer: Flux(),
    Flux2Transformer: Flux(),
    Sd3Transformer: Sd3(),
    QwenImageTransformer: QwenImage(),
    ZImageTransformer: ZImage(),
    ZImageOmniTransformer: ZImageOmni(),
}
