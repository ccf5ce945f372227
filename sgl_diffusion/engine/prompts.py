"""Encoded prompts that are kept: the same prompt, most often the negative one, comes again.

A condition is kept under everything it depends on: the prompt, what the family reads of the
parameters, the weights in use, and the adapters of the job. With pictures it is one job's own.
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch

from sgl_diffusion.engine.counters import Counters
from sgl_diffusion.engine.job import Job
from sgl_diffusion.engine.pipeline import Condition, EmbedsGuidance, Pipeline

_CACHE = "prompt"


class PromptCache:
    """The conditions used last, up to `budget` bytes. Any thread may call it."""

    def __init__(self, pipeline: Pipeline, budget: int, counters: Counters) -> None:
        self._embeds_guidance = isinstance(pipeline, EmbedsGuidance)
        self._budget = budget
        self._counters = counters
        self._kept: OrderedDict[tuple[Any, ...], tuple[Condition, int]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, job: Job, prompt: str, encode: Callable[[], Condition]) -> Condition:
        """The condition of a prompt of this job; `encode` makes one."""
        if job.params.images or self._budget == 0:
            return encode()
        key = self._key(job, prompt)
        with self._lock:
            found = self._kept.get(key)
            self._counters.add(
                "cache_lookups_total", cache=_CACHE, result="miss" if found is None else "hit"
            )
            if found is not None:
                self._kept.move_to_end(key)
                return found[0]
        condition = encode()
        with self._lock:
            self._keep(key, condition)
        return condition

    def _key(self, job: Job, prompt: str) -> tuple[Any, ...]:
        """Adapters are told apart as they are loaded: a file may change under its name."""
        params = job.params
        scale = params.guidance_scale if self._embeds_guidance else None
        blend = None if job.blend is None else weakref.ref(job.blend)
        return prompt, params.max_sequence_length, scale, job.epoch, blend

    def _keep(self, key: tuple[Any, ...], condition: Condition) -> None:
        size = condition_bytes(condition)
        if size > self._budget or key in self._kept:
            return
        self._kept[key] = condition, size
        self._bytes += size
        while self._bytes > self._budget:
            _, (_, freed) = self._kept.popitem(last=False)
            self._bytes -= freed
        self._counters.set("cache_bytes", self._bytes, cache=_CACHE)


def condition_bytes(condition: Condition) -> int:
    """What its tensors take; memory that several of them share counts once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in tensors_in(condition)
    }
    return sum(storages.values())


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Those in a condition, or in whatever holds one."""
    if isinstance(value, torch.Tensor):
        yield value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)
