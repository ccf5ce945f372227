"""One forward pass as a CUDA graph, with inputs and output that stay where they are.

Not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from sgl_diffusion.engine.graphs.arguments import rebuilt, tensors
from sgl_diffusion.layers.embed import holding_tables

Pass = Callable[[Tensor, Tensor, Any, int], Tensor]


class Graph(Protocol):
    size: int  # bytes

    def replay(self, latents: Tensor, timesteps: Tensor, context: Any) -> Tensor:
        """The output, which the next replay overwrites."""


class StaticInputs:
    """Copies of the arguments of a pass; those of another one are written into them."""

    def __init__(self, latents: Tensor, timesteps: Tensor, context: Any) -> None:
        self.latents, self.timesteps = latents.clone(), timesteps.clone()
        self.context = rebuilt(context, torch.clone)
        self._last = context  # what is in the copy; batches keep theirs from step to step

    @property
    def size(self) -> int:
        held = [self.latents, self.timesteps, *tensors(self.context)]
        return sum(x.nbytes for x in held)

    def write(self, latents: Tensor, timesteps: Tensor, context: Any) -> None:
        self.latents.copy_(latents)
        self.timesteps.copy_(timesteps)
        if context is not self._last:
            for mine, given in zip(tensors(self.context), tensors(context), strict=True):
                mine.copy_(given)
            self._last = context


class CapturedPass:
    """Captured on a stream of its own, in a memory pool of its own. Weights are read where they
    are, so adapters that are merged or taken out in place are in the next replay; so are those of
    single rows, which are copied to where they were when it was captured."""

    def __init__(
        self, run: Pass, latents: Tensor, timesteps: Tensor, context: Any, expert: int
    ) -> None:
        self._inputs = inputs = StaticInputs(latents, timesteps, context)
        given = inputs.latents, inputs.timesteps, inputs.context, expert
        self._run = run  # and with it whatever else it reads: the adapters of its rows
        before = torch.cuda.memory_reserved()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        # Tables that are cached elsewhere may be dropped there while the graph still reads them.
        with holding_tables() as self._tables:
            with torch.cuda.stream(stream):
                run(*given)  # workspaces of libraries on this stream
            stream.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            # Other threads may go on with their own streams.
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                self._output = run(*given)
        self.size = max(torch.cuda.memory_reserved() - before, 0) + inputs.size

    def replay(self, latents: Tensor, timesteps: Tensor, context: Any) -> Tensor:
        self._inputs.write(latents, timesteps, context)
        self._graph.replay()
        return self._output
