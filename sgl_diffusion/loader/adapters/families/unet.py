"""The UNets of Stable Diffusion: the numbers of Stability's code, which files for SDXL use, where
diffusers has names."""

from __future__ import annotations

import re
from collections.abc import Collection

from sgl_diffusion.loader.adapters.names import Layer, template

UNET = "UNet2DConditionModel"

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def original_names(modules: Collection[str]) -> tuple[Layer, ...]:
    """Layers under their original names, for the modules of one UNet."""
    counted = [re.fullmatch(r"down_blocks\.0\.resnets\.(\d+)\.conv1", name) for name in modules]
    depth = sum(match is not None for match in counted)  # resnets of a block on the way down
    crossed = {name.split(".attentions.")[0] for name in modules if ".attentions." in name}
    names = ((_original(name, depth, crossed), name) for name in modules)
    # Transformer blocks are many and alike: one template for each of their layers.
    both = {_templates(source, module) for source, module in names if source}
    return tuple(Layer(source, (module,)) for source, module in sorted(both))


def _original(module: str, depth: int, crossed: Collection[str]) -> str:
    """The original's name of a module, or "" where it has none. `crossed` blocks have attention."""
    match = re.fullmatch(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(\w+)\.(\d+)\.(.+)", module)
    if match is None:
        return _OUTSIDE.get(module, "")
    way, block, kind, index, rest = match.groups()
    number = int(index)
    if kind == "resnets":
        rest = _RESNET.get(rest, "")
        if not rest:
            return ""
    if way is None:  # resnet, attention, resnet
        return f"middle_block.{2 * number if kind == 'resnets' else 1}.{rest}"
    if way == "down":
        first = 1 + int(block) * (depth + 1)
        if kind == "downsamplers":
            return f"input_blocks.{first + depth}.0.op"
        return f"input_blocks.{first + number}.{int(kind == 'attentions')}.{rest}"
    first = int(block) * (depth + 1)
    if kind == "upsamplers":
        last = 2 if f"up_blocks.{block}" in crossed else 1
        return f"output_blocks.{first + depth}.{last}.{rest}"
    return f"output_blocks.{first + number}.{int(kind == 'attentions')}.{rest}"


def _templates(source: str, module: str) -> tuple[str, str]:
    head, cut, tail = source.partition("transformer_blocks.")
    if not cut:
        return source, module
    tail = template(cut + tail)
    return head + tail, module.partition(cut)[0] + tail
