"""Counts the memory that a piece of work would take, without doing it.

The work runs on tensors that have a shape and no numbers (`FakeTensorMode`), on the loaded model
itself. Every new block of memory is noted when an op makes it and when its last tensor is gone;
what libraries take inside of an op, and have given back when it returns, is known by a rule for
each kind of op (`workspace`).
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sgl_diffusion.layers.embed import forget_tables

_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
_BLOCK = 16  # channels that oneDNN keeps side by side in fp32


class Count(TorchDispatchMode):
    """Bytes of new blocks beyond those at the beginning: the `peak`, and what is `left` now."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self.left = 0
        self._blocks: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if _consists_of_others(func):  # in inference mode they come here whole
            with self:
                return func._op_dk(_COMPOSITE, *args, **kwargs)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for tensor in inputs:  # what was there before, such as a weight, is not ours to count
            self._know(tensor, 0)
        result = _run(func, args, kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._know(leaf, 0 if func.is_view else leaf.untyped_storage().nbytes())
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.peak = max(self.peak, self.left + workspace(func, inputs, outputs))
        return result

    def _know(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._blocks:
            return

        def gone(_: object) -> None:
            del self._blocks[key]
            self.left -= size

        self._blocks[key] = weakref.ref(storage, gone)
        self.left += size


class _Attention(TorchFunctionMode):
    """torch's attention on the CPU and on a GPU takes its result and little else; without numbers
    it would be taken apart into products with all scores."""

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is functional.scaled_dot_product_attention:
            query, _, value = args[:3]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return func(*args, **(kwargs or {}))


class Counting:
    """Where work is counted: `with counting.of() as count`. Tensors that are made there have no
    numbers, and go into further work of the same object only."""

    def __init__(self) -> None:
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)

    @contextmanager
    def of(self) -> Iterator[Count]:
        count = Count()
        # Tables that are kept for later jobs must be real ones.
        forget_tables()
        try:
            with torch.inference_mode(), self._fake, _Attention(), count:
                yield count
        finally:
            forget_tables()


def _consists_of_others(func: Any) -> bool:
    return func.namespace == "aten" and torch._C._dispatch_has_kernel_for_dispatch_key(
        func.name(), _COMPOSITE
    )


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func is torch.ops.aten.mkldnn_convolution.default:  # it has no rule for shapes
        x, weight, bias, padding, stride, dilation, groups = args
        return torch.ops.aten.convolution.default(
            x, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups
        )
    return func(*args, **kwargs)


def workspace(func: Any, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> int:
    """Bytes that an op takes on the CPU beyond its result and gives back before it returns."""
    rule = _RULES.get(func)
    return 0 if rule is None or not outputs else rule(inputs, outputs[0])


def _convolution(inputs: Sequence[Tensor], out: Tensor) -> int:
    """oneDNN computes in an order of its own: it copies the weights and an input of many channels,
    and when they are gone its result back, in half precision by way of one more copy."""
    x, weight = inputs[:2]
    ordered = _ordered(out)
    copies = weight.nbytes + (_ordered(x) if x.shape[1] >= _BLOCK else 0)
    back = out.nbytes * (1 if out.dtype == torch.float32 else 2)
    return ordered + max(copies, back) - out.nbytes


def _ordered(x: Tensor) -> int:
    if x.dtype != torch.float32:
        return x.nbytes
    channels = -(-x.shape[1] // _BLOCK) * _BLOCK
    return math.prod((x.shape[0], channels, *x.shape[2:])) * x.itemsize


_RULES: dict[Any, Callable[[Sequence[Tensor], Tensor], int]] = {
    torch.ops.aten.convolution.default: _convolution,
    torch.ops.aten.mkldnn_convolution.default: _convolution,
}
