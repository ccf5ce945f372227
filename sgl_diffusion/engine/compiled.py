"""Regional torch.compile: each kind of block of a transformer is compiled once, for all of them.

From outside, like everything that changes how a built model runs. All of it happens before the
first request, with sizes left open, and what comes out is compared with the blocks as they are. A
call of another form than those met then (sizes packed into one pass, a layer with the adapter of a
request on it) runs the block as it is, and is counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sgl_diffusion.base.blank import blank_pictures
from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.errors import SetupError
from sgl_diffusion.base.log import get_logger
from sgl_diffusion.base.params import ModelCard, SamplingParams
from sgl_diffusion.engine.contexts import Contexts
from sgl_diffusion.engine.counters import Counters
from sgl_diffusion.engine.denoise import ShapeKey, next_states, shape_key
from sgl_diffusion.engine.encoding import Encoding
from sgl_diffusion.engine.exclusions import (
    COME_AND_GO,
    DIFFUSERS,
    compile_obstacle,
    refuse_compile,
)
from sgl_diffusion.engine.inductor import CACHE_TAG, lower_storage_offsets
from sgl_diffusion.engine.job import Job, Row
from sgl_diffusion.engine.parallel.families import FAMILIES
from sgl_diffusion.engine.pipeline import Pipeline, WholePipeline
from sgl_diffusion.engine.prompts import PromptCache
from sgl_diffusion.engine.transformers import transformers

log = get_logger(__name__)

Backend = str | Callable[..., Any]  # as torch.compile takes it

# What generated code may differ by, of the length of the latents: in the order of sums, or where
# values are rounded to narrow types. Blocks of FLUX that write to a wrong place: 0.05 to 0.1.
_MOST_APART, _MOST_APART_ROUNDED = 1e-3, 0.03

# Forms of one kind of block in a process: several rows or one, texts of one length or of several,
# the last block of a family, all of it for every model that was opened.
_MOST_FORMS = 64
_EDGE = 16  # tokens along the edge of the pictures that are tried: enough for every backend
_PROMPTS = ("a cat", "a cat", "a cat under a tree by the sea")


def check_compile(options: EngineOptions, pipeline: Pipeline | WholePipeline) -> None:
    """Whoever asks for compiled blocks gets them, or is told why not."""
    refuse_compile(_obstacle(options, pipeline) if options.enable_torch_compile else "")


def _obstacle(options: EngineOptions, pipeline: Pipeline | WholePipeline) -> str:
    if not transformers(pipeline):
        return DIFFUSERS
    if any(part.component.startswith("transformer") for part in pipeline.card.offload):
        return COME_AND_GO
    return compile_obstacle(options)


class CompiledBlocks:
    """The blocks of some transformers. They are compiled within `warm_up` only."""

    def __init__(self, models: Sequence[nn.Module], backend: Backend = "inductor") -> None:
        self.counters = Counters()
        self._compiling = False
        self._as_they_are = False  # while results are made to compare with
        self._told: set[type[nn.Module]] = set()
        kinds: dict[type[nn.Module], Callable[..., Any]] = {}
        for model in models:
            for section in FAMILIES[type(model)].sections(model):
                for block in section.blocks:
                    kind = type(block)
                    if kind not in kinds:
                        # In one graph: what cannot be traced is told, not compiled in pieces.
                        kinds[kind] = torch.compile(
                            self._traced(kind), dynamic=True, fullgraph=True, backend=backend
                        )
                    block.forward = self._around(block, kinds[kind])

    def warm_up(self, pipeline: Pipeline) -> None:
        """Compile what the steps of its requests call, and see that it gives the same."""
        exact = pipeline.card.dit_precision == "fp32"
        most, apart = _MOST_APART if exact else _MOST_APART_ROUNDED, 0.0
        with self._compiling_now():
            for key, rows in _steps(pipeline):
                context = Contexts(pipeline).of(key, rows)
                found = next_states(pipeline, key, rows, context)
                self._as_they_are = True
                try:
                    wanted = next_states(pipeline, key, rows, context)
                finally:
                    self._as_they_are = False
                for want, state in zip(wanted, found, strict=True):
                    apart = max(apart, _apart(state.x, want.x, most))
        log.info("compiled blocks are within %.1g of the blocks as they are", apart)

    @contextmanager
    def _compiling_now(self) -> Iterator[None]:
        from torch._dynamo import config as tracing
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
        from torch._inductor import config as generating
        from torch.compiler import config as compiling
        from torch.fx.experimental import _config as shapes

        forms = {"recompile_limit": _MOST_FORMS, "accumulated_recompile_limit": 8 * _MOST_FORMS}
        lower_storage_offsets()
        self._compiling = True
        try:
            with (
                tracing.patch(forms),
                # No processes beside this one: nobody would watch over them.
                generating.patch(compile_threads=1),
                compiling.patch(cache_key_tag=CACHE_TAG),  # type: ignore[attr-defined]
                # Sizes that are equal by chance are not taken for one.
                shapes.patch(use_duck_shape=False),  # type: ignore[attr-defined]
            ):
                yield
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            log.exception("the blocks cannot be compiled")
            inner = getattr(error, "inner_exception", error)
            raise SetupError(
                f"--enable-torch-compile: torch.compile failed here ({type(inner).__name__}).",
                hint="On a CPU it needs a C++ compiler (g++, or what CXX names), on a GPU Triton "
                "and a C compiler; the worker's log holds the traceback. Without the option the "
                "blocks run as they are.",
                code="compile_failed",
                param="enable_torch_compile",
            ) from error
        finally:
            self._compiling = False
        self.counters.clear()

    def _traced(self, kind: type[nn.Module]) -> Callable[..., Any]:
        """The forward pass of a kind of block, which notices if it is not compiled."""

        def call(block: nn.Module, *args: Any) -> Any:
            if not torch.compiler.is_compiling():
                self._runs_eager(kind)
            return kind.forward(block, *args)

        return call

    def _around(self, block: nn.Module, compiled: Callable[..., Any]) -> Callable[..., Any]:
        forward = block.forward
        # Compiled code does not look whether there are hooks by now. Those of the block itself are
        # around all of this.
        inner = [module._forward_hooks for module in block.modules() if module is not block]

        def run(*args: Any) -> Any:
            if self._as_they_are:
                return forward(*args)
            self.counters.add("block_calls_total")
            if any(inner):
                self._runs_eager(type(block))
                return forward(*args)
            if self._compiling:
                return compiled(block, *args)
            with torch.compiler.set_stance("eager_on_recompile"):
                return compiled(block, *args)

        return run

    def _runs_eager(self, kind: type[nn.Module]) -> None:
        self.counters.add("eager_block_calls_total")
        if kind not in self._told:
            self._told.add(kind)
            log.info("%s also runs as it is: a call of a form that was not compiled", kind.__name__)


def _apart(found: Tensor, want: Tensor, most: float) -> float:
    """By how much they differ, which must be rounding."""
    apart = float((found - want).norm() / want.norm())
    if not apart <= most:  # nor is a result without numbers
        raise SetupError(
            f"--enable-torch-compile: compiled blocks give other results than the blocks as they "
            f"are (by {apart:.1g} of their length, {most:g} is rounding).",
            hint="This is an error of torch.compile for this model, device and version of torch. "
            "Leave the option out.",
            code="compile_wrong",
            param="enable_torch_compile",
        )
    return apart


def _steps(pipeline: Pipeline) -> Iterator[tuple[ShapeKey, tuple[Row, ...]]]:
    """Steps of every form that usual requests have: one row and several, prompts of one length and
    of two, with guidance and without."""
    for edge in _edges(pipeline.card):
        with blank_pictures(pipeline.card.min_images) as images:
            rows = [row for prompt in _PROMPTS for row in _rows(pipeline, prompt, edge, images)]
        first, second, other = rows
        for batch in ((first,), (first, second), (first, other)):
            keys = {shape_key(pipeline, row) for row in batch}
            if len(keys) > 1:  # texts of other lengths are other batches here
                continue
            for guided in {False, *(key.guided for key in keys)}:
                yield dataclasses.replace(*keys, guided=guided), batch


def _rows(pipeline: Pipeline, prompt: str, edge: int, images: tuple[str, ...]) -> list[Row]:
    wish = SamplingParams(
        prompt=prompt, width=edge, height=edge, num_inference_steps=1, images=images
    )
    job = Job("compiling", pipeline.card.resolve(wish, video=False))
    Encoding(pipeline, PromptCache(pipeline, 0, Counters())).encode(job).give(job)
    return job.rows


def _edges(card: ModelCard) -> set[int]:
    """A picture in which backends take the way of long sequences; and the usual one of a model that
    makes smaller ones."""
    unit = card.size_multiple
    most = card.max_edge // unit
    usual = min(card.defaults.width, card.defaults.height) // unit
    return {unit * max(min(edge, most), 1) for edge in (_EDGE, min(usual, _EDGE))}
