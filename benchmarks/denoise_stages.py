"""Where the time of a step goes: the profiler's own times, added up by stage.

Products are told apart by the layer that makes them, everything else by the name of its op.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sgl_diffusion.attention import AttentionContext

# The first pattern that the name of a layer ends with; of ours and of diffusers'.
LAYERS = (
    (
        r"modulation|norm\w*\.linear|adaLN_modulation\.\d|norm_out(\.linear)?|time_proj",
        "embeddings",
    ),
    (r"\w*embedder(\.\w+)*|x_embedder|\w*embedding|blocks\.\d+\.proj_mlp", "embeddings"),
    (r"attn2\.(to_q|to_k|to_v|to_kv)", "q product of the text"),
    (r"to_qkv|to_qkv_mlp|to_[qkv]|add_[qkv]_proj|proj_mlp", "qkv product"),
    (r"to_out(\.0)?|to_add_out|single_transformer_blocks\.\d+\.proj_out", "out product"),
    (r"(ffn|mlp|ff|ff_context|feed_forward)\.\S+|w13|w2", "MLP products"),
    (r".*", "embeddings"),
)
OPS = (
    (r"sgld::attention|aten::_?scaled_dot_product\w*|.*flash_attn.*", "attention"),
    (r"sgld::qk_norm_rope", "norm and rotation of q, k"),
    (r"sgld::(norm_modulate|gate_residual\w*)|aten::.*(layer|rms)_norm", "norms and updates"),
    (r"sgld::(gelu_tanh|silu_mul)|aten::(gelu|silu)_?", "activation"),
    (r"sgld::cfg_combine_step", "guidance and solver"),
    (r"aten::(copy_|_to_copy|cat|contiguous|clone|stack)", "copies"),
    (r"aten::(mul|add|sub|div|pow|sum|mean|rsqrt|neg)_?", "elementwise"),
)
REST = "rest"


def _stage(table: tuple[tuple[str, str], ...], name: str) -> str:
    for pattern, stage in table:
        if re.search(rf"(^|\.)({pattern})$", name):
            return stage
    return REST


@contextmanager
def _marked(model: nn.Module) -> Iterator[None]:
    """Products of a model's layers stand in the profile under the name of their stage."""
    handles = []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            mark = _Mark(f"stage: {_stage(LAYERS, name)}")
            handles.append(layer.register_forward_pre_hook(mark.begin))
            handles.append(layer.register_forward_hook(mark.end))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Mark:
    def __init__(self, label: str) -> None:
        self.label = label

    def begin(self, *_: Any) -> None:
        self.range = torch.profiler.record_function(self.label)
        self.range.__enter__()

    def end(self, *_: Any) -> None:
        self.range.__exit__(None, None, None)


def stages(model: nn.Module, work: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Milliseconds of one call of `work`, which runs `model`, by stage, the longest first."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    on_gpu = device.type == "cuda"
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with _marked(model), torch.profiler.profile(activities=activities) as recorder:
        work()
    spent: dict[str, float] = {}
    for event in recorder.events() or ():
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if on_gpu or event.device_type == torch.autograd.DeviceType.CPU:
            stage = _of(event)
            spent[stage] = spent.get(stage, 0.0) + own / 1e3
    return dict(sorted(spent.items(), key=lambda item: -item[1]))


def _of(event: Any) -> str:
    """The stage of an event: that of the layer around it, or that of the first op it is part of."""
    found, around = _stage(OPS, event.name), event
    while around is not None:
        if around.name.startswith("stage: "):
            return str(around.name.removeprefix("stage: "))
        if _stage(OPS, around.name) != REST:
            found = _stage(OPS, around.name)
        around = around.cpu_parent
    return found


def flop(model: Any, work: Callable[[], Any]) -> tuple[float, float]:
    """FLOP of the products of the layers, and of attention, in one call of `work`."""
    linear = attention = 0.0

    def count(layer: nn.Linear, inputs: tuple[Tensor, ...], result: Tensor) -> None:
        nonlocal linear
        linear += 2.0 * result.numel() * layer.in_features

    def counted(attend: Any) -> Any:
        def run(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Any:
            nonlocal attention
            attention += 4.0 * q.numel() * k.shape[1]
            return attend(q, k, v, **given)

        return run

    before = model.attention
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    model.attention = AttentionContext(counted(before.tokens), counted(before.local))
    try:
        work()
    finally:
        model.attention = before
        for handle in handles:
            handle.remove()
    return linear, attention
