"""A forward pass as it was recorded: what a CUDA graph is, where there is no GPU.

Every call of an op is kept with its tensors, and a replay makes the same calls on the same tensors.
Whatever the host had decided or made while it was recorded is in all replays, as in a graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sgl_diffusion.engine.graphs.capture import Pass, StaticInputs


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, dict[str, Any], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host asks for a number"
        output = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, output))
        return output

    def replay(self) -> None:
        for func, args, kwargs, output in self._calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(output), tree_leaves(again), strict=True):
                # What is a view of an input, or an input, is as new already.
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Tape:
    """Stands for `CapturedPass`."""

    def __init__(
        self, run: Pass, latents: Tensor, timesteps: Tensor, context: Any, expert: int
    ) -> None:
        self._inputs = held = StaticInputs(latents, timesteps, context)
        given = held.latents, held.timesteps, held.context, expert
        run(*given)  # tables and the like are made before
        self._recorder = _Recorder()
        with self._recorder:
            self._output = run(*given)
        self.size = held.size

    def replay(self, latents: Tensor, timesteps: Tensor, context: Any) -> Tensor:
        self._inputs.write(latents, timesteps, context)
        self._recorder.replay()
        return self._output
