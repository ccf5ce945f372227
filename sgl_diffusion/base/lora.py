"""What a caller may say about adapters (LoRA): in a request, or as lists for all jobs."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sgl_diffusion.base.errors import ConfigError, RequestError

TARGETS = ("all", "transformer", "transformer_2", "critic")
MERGE_MODES = ("auto", "merge", "dynamic")
MAX_STRENGTH = 100.0
MAX_ALPHA = 1e6
MAX_USES = 16

_NICKNAME = re.compile(r"[A-Za-z0-9][\w.+@ -]{0,127}", re.ASCII)
# No dots in a row and no slash in front: it becomes part of a path in the cache.
_REVISION = re.compile(r"(?=.{1,200}$)[\w+@-]+([./][\w+@-]+)*", re.ASCII)
_MAX_PATH_CHARS = 4096


@dataclass(frozen=True, kw_only=True)
class LoraFile:
    """Which adapter is meant: one known by its nickname, or a path and what else tells its file.

    `alpha` replaces the one of the file; `weight_name` is the file to take where the path holds
    several, `revision` the branch, tag or commit of a hub repository; `local` says that the path is
    one of this machine and no hub id, None that whoever reads it is to find out.
    """

    nickname: str
    path: str | None = None
    alpha: float | None = None
    weight_name: str | None = None
    revision: str | None = None
    local: bool | None = None


@dataclass(frozen=True, kw_only=True)
class LoraUse(LoraFile):
    """One adapter of one job. A job that was `accepted` has the file that it names, whatever its
    nickname has come to stand for since."""

    strength: float = 1.0
    accepted: bool = False


@dataclass(frozen=True, kw_only=True)
class LoraSetting(LoraFile):
    """One adapter of the set that all jobs have."""

    target: str = "all"
    strength: float = 1.0


def check_uses(uses: Sequence[LoraUse], param: str = "lora") -> None:
    """Raise RequestError for adapters of a request that cannot be meant."""
    if len(uses) > MAX_USES:
        raise RequestError(
            f"{param} names {len(uses)} adapters; the limit is {MAX_USES}.",
            code="out_of_range",
            param=param,
        )
    for use in uses:
        _check_file(use, param)
        _check_number("strength", use.strength, param)
    names = [use.nickname for use in uses]
    for name in names:
        if names.count(name) > 1:
            raise RequestError(f"{param} names {name!r} twice.", code="lora_twice", param=param)


def check_nickname(name: str, param: str = "lora_nickname") -> None:
    if not _NICKNAME.fullmatch(name):
        raise RequestError(
            "A nickname of an adapter has letters, digits and _ . + @ - or spaces, up to 128, and "
            "begins with a letter or digit.",
            param=param,
        )


def line_up_settings(
    *,
    lora_nickname: str | Sequence[str],
    lora_path: str | Sequence[str | None] | None = None,
    target: str | Sequence[str] = "all",
    strength: float | Sequence[float] = 1.0,
    lora_alpha: float | Sequence[float | None] | None = None,
    lora_weight_name: str | Sequence[str | None] | None = None,
    lora_revision: str | Sequence[str | None] | None = None,
) -> tuple[LoraSetting, ...]:
    """Settings from scalars and lists: lists have as many items as there are nicknames, and a
    single target or strength is everybody's."""
    names = [lora_nickname] if isinstance(lora_nickname, str) else list(lora_nickname)
    if not 1 <= len(names) <= MAX_USES:
        raise RequestError(
            f"lora_nickname has {len(names)} items; it must have 1 to {MAX_USES}.",
            code="out_of_range",
            param="lora_nickname",
        )
    count = len(names)
    paths = _items("lora_path", lora_path, count, shared=lora_path is None)
    alphas = _items("lora_alpha", lora_alpha, count, shared=lora_alpha is None)
    targets = _items("target", target, count, shared=True)
    strengths = _items("strength", strength, count, shared=True)
    files = _items("lora_weight_name", lora_weight_name, count, shared=lora_weight_name is None)
    revisions = _items("lora_revision", lora_revision, count, shared=lora_revision is None)
    settings = tuple(
        LoraSetting(
            nickname=names[i],
            path=paths[i],
            target=targets[i],
            strength=strengths[i],
            alpha=alphas[i],
            weight_name=files[i],
            revision=revisions[i],
        )
        for i in range(count)
    )
    for setting in settings:
        _check_setting(setting)
    _check_twice(settings)
    return settings


def settings_to_begin_with(
    paths: Sequence[str],
    nicknames: Sequence[str] = (),
    strengths: Sequence[float] = (),
    *,
    alphas: Sequence[float] = (),
    weight_names: Sequence[str] = (),
    revisions: Sequence[str] = (),
) -> tuple[LoraSetting, ...]:
    """Settings from the flags of a command: --lora-path and those that go with it."""
    if not paths:
        for flag, given in (
            ("nickname", nicknames),
            ("scale", strengths),
            ("alpha", alphas),
            ("weight-name", weight_names),
            ("revision", revisions),
        ):
            if given:
                raise ConfigError(f"--lora-{flag} is about an adapter; there is no --lora-path.")
        return ()
    if not nicknames:
        nicknames = ["default", *(f"default_{n}" for n in range(2, len(paths) + 1))]
    try:
        return line_up_settings(
            lora_nickname=nicknames,
            lora_path=paths,
            strength=strengths[0] if len(strengths) == 1 else strengths or 1.0,
            lora_alpha=alphas or None,
            lora_weight_name=weight_names or None,
            lora_revision=revisions or None,
        )
    except RequestError as error:
        raise ConfigError(f"--lora-path: {error.message}", hint=error.hint) from None


def check_target(target: str) -> None:
    if target not in TARGETS:
        raise RequestError(
            "target is not a known one.",
            hint=f"Use one of: {', '.join(TARGETS)}.",
            code="invalid_target",
            param="target",
        )


def check_strength(strength: float, param: str = "strength") -> None:
    _check_number("strength", strength, param)


def _items(param: str, value: Any, count: int, *, shared: bool) -> list[Any]:
    if not isinstance(value, list | tuple):
        if shared or count == 1:
            return [value] * count
        value = [value]
    if len(value) != count:
        raise RequestError(
            f"Length mismatch: lora_nickname has {count} items, but {param} has {len(value)} "
            f"item{'' if len(value) == 1 else 's'}.",
            hint="Lists have one length"
            + ("; a single value counts for all." if shared else ", in the same order."),
            code="mismatched_lengths",
            param=param,
        )
    return list(value)


def _check_setting(setting: LoraSetting) -> None:
    _check_file(setting)
    check_target(setting.target)
    _check_number("strength", setting.strength, "strength")


def _check_file(file: LoraFile, param: str = "") -> None:
    """What is wrong is blamed on `param`, else on the argument of its own that each field has."""
    check_nickname(file.nickname, param or "lora_nickname")
    _check_alpha(file.alpha, param or "lora_alpha")
    _check_path(file.path, param or "lora_path")
    if file.weight_name is not None and not _is_path(file.weight_name):
        raise RequestError(
            "The weight name of an adapter is not the name of a file.",
            param=param or "lora_weight_name",
        )
    if file.revision is not None and not _REVISION.fullmatch(file.revision):
        raise RequestError(
            "The revision of an adapter is not a branch, tag or commit of a hub.",
            param=param or "lora_revision",
        )


def _check_alpha(alpha: float | None, param: str) -> None:
    if alpha is None:
        return
    if not math.isfinite(alpha):
        raise RequestError(
            "The alpha of an adapter is not a finite number.", code="not_finite", param=param
        )
    if not 0 < alpha <= MAX_ALPHA:
        raise RequestError(
            f"The alpha of an adapter must be more than 0 and at most {MAX_ALPHA:.0f}.",
            code="out_of_range",
            param=param,
        )


def _check_number(name: str, value: float, param: str) -> None:
    if not math.isfinite(value):
        raise RequestError(f"{name} is not a finite number.", code="not_finite", param=param)
    if abs(value) > MAX_STRENGTH:
        raise RequestError(
            f"{name} must be from {-MAX_STRENGTH:g} to {MAX_STRENGTH:g}.",
            code="out_of_range",
            param=param,
        )


def _check_path(path: str | None, param: str) -> None:
    if path is not None and not _is_path(path):
        raise RequestError(
            f"{param} is not a path or hub id.", code="lora_path_not_allowed", param=param
        )


def _is_path(text: str) -> bool:
    return bool(text.strip()) and "\0" not in text and len(text) <= _MAX_PATH_CHARS


def _check_twice(settings: Sequence[LoraSetting]) -> None:
    seen: set[tuple[str, str]] = set()
    for setting in settings:
        places = TARGETS[1:] if setting.target == "all" else (setting.target,)
        for place in places:
            if (setting.nickname, place) in seen:
                raise RequestError(
                    f"lora_nickname names {setting.nickname!r} twice for one target.",
                    code="lora_twice",
                    param="lora_nickname",
                )
            seen.add((setting.nickname, place))
