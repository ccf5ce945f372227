"""What can be done with an adapter on this pipeline, asked before anything is changed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.engine.lora.fit import Fitted, listing
from sgl_diffusion.engine.lora.state import Mode
from sgl_diffusion.engine.pipeline import Adaptable
from sgl_diffusion.loader.absent import is_absent


def check_target(target: str, components: Collection[str]) -> None:
    if target != "all" and target not in components:
        raise RequestError(
            f"This model has no {target}.",
            hint=f"It has {listing(components)}.",
            code="invalid_target",
            param="target",
        )


def reached(target: str, fitted: Fitted, components: Collection[str]) -> list[str]:
    """The components that an adapter of a set goes to."""
    if target == "all":
        return list(fitted.places)
    check_target(target, components)
    if target not in fitted.places:
        raise RequestError(
            f"The adapter {fitted.source.nickname!r} changes nothing in {target}.",
            hint=f"It changes {listing(fitted.places)}.",
            code="invalid_target",
            param="target",
        )
    return [target]


def pick_mode(
    merge_mode: str, adapters: Iterable[Fitted], components: Mapping[str, Adaptable]
) -> Mode:
    """Merged where that is possible, unless dynamic is asked for."""
    problem = _not_mergeable(components)
    if merge_mode == "merge" and problem:
        raise RequestError(
            f"Adapters cannot be merged here: {problem}.",
            hint="Use merge_mode dynamic.",
            code="lora_not_supported",
            param="merge_mode",
        )
    if merge_mode == "merge" or (merge_mode == "auto" and not problem):
        return "merged"
    for fitted in adapters:
        check_applicable(fitted, "merge_mode", "Use merge_mode merge.")
    return "dynamic"


def check_applicable(fitted: Fitted, param: str, hint: str) -> None:
    """Whether it can be applied row by row."""
    if problems := fitted.not_applicable():
        raise RequestError(
            f"The adapter {fitted.source.nickname!r} can only be merged, because of "
            f"{listing(problems)}.",
            hint=hint,
            code="lora_merge_only",
            param=param,
        )


def _not_mergeable(components: Mapping[str, Adaptable]) -> str:
    for name, adaptable in components.items():
        if is_absent(adaptable.module):  # what is brought again would not be what was merged
            return f"the weights of {name} are away until they are needed (offload)"
        for parameter in adaptable.module.parameters():
            if not parameter.dtype.is_floating_point or parameter.dtype.itemsize < 2:
                return f"the weights of {name} are {parameter.dtype}"
    return ""
