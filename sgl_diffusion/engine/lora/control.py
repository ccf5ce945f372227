"""The control messages about adapters, and how a worker makes its manager."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.errors import ConflictError, RequestError, SetupError
from sgl_diffusion.base.lora import LoraSetting, LoraUse
from sgl_diffusion.engine.exclusions import check_adapters
from sgl_diffusion.engine.lora.fit import Source
from sgl_diffusion.engine.lora.manager import Loras, ReadFile
from sgl_diffusion.engine.lora.rows import Blend
from sgl_diffusion.engine.lora.state import StateFile
from sgl_diffusion.engine.pipeline import Adaptable, AdaptablePipeline, Pipeline, WholePipeline
from sgl_diffusion.engine.steps import StepRunner
from sgl_diffusion.engine.whole import WholeRunner
from sgl_diffusion.loader.adapters.families.registry import family_of
from sgl_diffusion.loader.adapters.read import read_adapter
from sgl_diffusion.loader.adapters.types import TRANSFORMER, TRANSFORMER_2, Adapter
from sgl_diffusion.orchestrator.messages import Payload

T = TypeVar("T")

_GIB = 2**30


class LoraControl:
    """Answers `lora_*` messages; without a manager it says why there is none."""

    def __init__(self, manager: Loras | None, busy: Callable[[], bool], why_not: str = "") -> None:
        self.manager = manager
        self._busy = busy
        self._why_not = why_not
        self._actions: Mapping[str, Callable[[Loras, Payload], Payload | None]] = {
            "lora_prepare": self._prepare,
            "lora_set": self._set,
            "lora_merge": self._merge,
            "lora_unmerge": self._unmerge,
            "lora_delete": self._delete,
            "lora_list": lambda *_: None,
        }

    def run(self, action: str, payload: Payload) -> Payload:
        """Do it and report how things are now."""
        if action == "lora_list" and self.manager is None:
            return self.report()
        answer = self._actions[action](self._manager(), payload)
        return self.report() if answer is None else answer

    def knows(self, action: str) -> bool:
        return action in self._actions

    @property
    def targets(self) -> tuple[str, ...]:
        """The components that adapters can change."""
        return () if self.manager is None else self.manager.targets

    @property
    def epoch(self) -> int:
        """Another number for other weights."""
        return 0 if self.manager is None else self.manager.epoch

    def report(self) -> Payload:
        if self.manager is None:
            return {"loaded_adapters": [], "active": {}, "unmerged": {}, "targets": []}
        return self.manager.report()

    def blend(self, uses: Sequence[LoraUse]) -> Blend | None:
        """What a job gets that names these adapters."""
        if self.manager is None and not uses:
            return None
        return self._manager().blend(uses)

    def _manager(self) -> Loras:
        if self.manager is None:
            raise RequestError(self._why_not, code="lora_not_supported", param="lora")
        return self.manager

    def _prepare(self, manager: Loras, payload: Payload) -> Payload:
        """The report with `ready`, or just that it is not: ask again. The `uses` of a job come back
        as it is accepted with them."""
        if "uses" not in payload:
            ready = manager.prepare(_read(payload["settings"], list[LoraSetting]))
            return {"ready": ready, **(self.report() if ready else {})}
        accepted = manager.prepare_job(_read(payload["uses"], list[LoraUse]))
        if accepted is None:
            return {"ready": False}
        return {"ready": True, "uses": msgspec.to_builtins(accepted), **self.report()}

    def _set(self, manager: Loras, payload: Payload) -> None:
        self._check_idle()
        settings = _read(payload["settings"], list[LoraSetting])
        manager.replace(settings, _read(payload["merge_mode"], str))

    def _merge(self, manager: Loras, payload: Payload) -> None:
        self._check_idle()
        manager.merge(_read(payload["target"], str), _read(payload["strength"], float))

    def _unmerge(self, manager: Loras, payload: Payload) -> None:
        self._check_idle()
        manager.unmerge(_read(payload["target"], str))

    def _delete(self, manager: Loras, payload: Payload) -> None:
        manager.delete(_read(payload["nickname"], str))

    def _check_idle(self) -> None:
        if self._busy():
            raise ConflictError("Jobs are running; the weights change between jobs only.")


def lora_control(
    pipeline: Pipeline | WholePipeline,
    runner: StepRunner | WholeRunner,
    options: EngineOptions,
    state: Path | None,
    note: Callable[[str], None],
) -> LoraControl:
    """The adapters of a pipeline that was just opened, with those it begins with in use."""

    def busy() -> bool:
        return runner.running() > 0

    settings = check_adapters(options)
    components = dict(pipeline.adaptables()) if isinstance(pipeline, AdaptablePipeline) else {}
    if TRANSFORMER not in components:
        why = f"{pipeline.card.name} takes no adapters: it has neither a transformer nor a UNet."
        if settings:
            raise SetupError(why, hint="Leave --lora-path out.")
        return LoraControl(None, busy, why)
    budget = int(options.max_lora_memory * _GIB)
    manager = Loras(
        components,
        reader(components, budget),
        rows=runner.adapters,
        budget=budget,
        state=StateFile(state, pipeline.card.name),
        in_use=lambda: (job.blend for job in runner.jobs() if job.blend is not None),
    )
    if settings:
        note("loading adapters")
    beside = [Source(Path(path).stem, path) for path in pipeline.card.adapters]
    settings = by_name(settings, beside, renamed=bool(options.lora_nickname))
    manager.start(settings, options.lora_merge_mode, beside)
    return LoraControl(manager, busy)


def by_name(
    settings: Sequence[LoraSetting], beside: Sequence[Source], *, renamed: bool
) -> tuple[LoraSetting, ...]:
    """The name of an adapter that came with the model stands for its file, and is its nickname
    unless it was `renamed`. What the user has under that name goes first."""
    own = {source.nickname: source.path for source in beside}
    found = []
    for one in settings:
        if one.path is not None and one.path in own and not Path(one.path).exists():
            nickname = one.nickname if renamed else one.path
            one = dataclasses.replace(one, path=own[one.path], nickname=nickname)
        found.append(one)
    return tuple(found)


def reader(components: Mapping[str, Adaptable], most_bytes: int) -> ReadFile:
    """Reads the files of adapters for these components, but none that could not be kept."""
    transformer = components[TRANSFORMER]
    names = [
        name for name, module in transformer.module.named_modules() if hasattr(module, "weight")
    ]
    family = family_of(transformer.diffusers_class, names)
    experts = TRANSFORMER_2 in components

    def read(source: Source) -> Adapter:
        return read_adapter(
            source.path,
            family,
            weight_name=source.weight_name,
            revision=source.revision,
            experts=experts,
            alpha=source.alpha,
            local=source.local,
            most_bytes=most_bytes,
        )

    return read


def _read(value: Any, kind: type[T]) -> T:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError:
        raise RequestError("The message does not fit this version of the engine.") from None
