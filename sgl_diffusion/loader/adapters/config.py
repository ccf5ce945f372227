"""What an adapter's training configuration says about its scale.

PEFT keeps it in adapter_config.json beside the file, diffusers in the header of the file.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.loader.adapters.keys import shown

HEADER_KEY = "lora_adapter_metadata"

_KINDS = ("LORA", "LOHA", "LOKR")
# Options under which the file is not a change of plain layers.
_REFUSED = (
    "modules_to_save",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "layer_replication",
    "fan_in_fan_out",
    "use_qalora",
    "target_parameters",
)
# These start from changed base weights, so that the file is no change of the original ones.
_OTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# The regular expressions PEFT would take that cannot run for long.
_PATTERN = re.compile(
    r"\^?(?:[\w.-]|\\\.|\.[*+]|\\d\+?|\[0-9\]\+?|\((?:[\w.-]|\\\.|\|)*\))*\$?", re.ASCII
)
_MOST_WILDCARDS = 3


_Patterns = tuple[tuple[re.Pattern[str], float], ...]


@dataclass(frozen=True)
class Config:
    """Alpha and rank of layers, by patterns of their names or for all, and the kind of scale."""

    alpha: float | None = None
    alphas: _Patterns = ()
    rank: float | None = None
    ranks: _Patterns = ()
    rank_stabilised: bool = False

    def alpha_of(self, layer: str) -> float | None:
        """The alpha of a layer; None where the file says nothing: then the scale is 1."""
        return _first(self.alphas, layer, self.alpha)

    def rank_of(self, layer: str) -> int:
        """The rank that a layer was trained with, for factors that do not show it; 0 if unknown."""
        return int(_first(self.ranks, layer, self.rank) or 0)

    def scale(self, alpha: float | None, rank: int) -> float:
        if alpha is None or rank == 0:
            return 1.0
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


def read_config(values: Mapping[str, Any]) -> Config:
    """From the values of a PEFT configuration."""
    kind = values.get("peft_type") or "LORA"
    if kind not in _KINDS:
        raise _refused(f"an adapter of type {shown(str(kind))}")
    for name in _REFUSED:
        if values.get(name):
            raise _refused(f"an adapter trained with {name}")
    start = values.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_OTHER_BASE):
        raise _refused(f"an adapter that starts from {shown(start)} weights")
    return Config(
        alpha=_optional(values, "lora_alpha" if "lora_alpha" in values else "alpha"),
        alphas=_patterns(values, "alpha_pattern"),
        rank=_optional(values, "r"),
        ranks=_patterns(values, "rank_pattern"),
        rank_stabilised=bool(values.get("use_rslora")),
    )


def read_header(metadata: Mapping[str, str]) -> dict[str, Config]:
    """The configuration of each component in a file's header; "" is one without a component."""
    text = metadata.get(HEADER_KEY)
    if text is None:
        return {}
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        raise _damaged(HEADER_KEY) from None
    if not isinstance(values, dict):
        raise _damaged(HEADER_KEY)
    components: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        component, _, option = name.rpartition(".")
        components.setdefault(component, {})[option] = value
    return {component: read_config(options) for component, options in components.items()}


def _first(patterns: _Patterns, layer: str, other: float | None) -> float | None:
    return next((value for pattern, value in patterns if pattern.fullmatch(layer)), other)


def _optional(values: Mapping[str, Any], name: str) -> float | None:
    return None if values.get(name) is None else _number(values[name], name)


def _patterns(values: Mapping[str, Any], name: str) -> _Patterns:
    patterns = values.get(name) or {}
    if not isinstance(patterns, Mapping):
        raise _damaged(name)
    return tuple((_compiled(str(k), name), _number(v, name)) for k, v in patterns.items())


def _compiled(pattern: str, name: str) -> re.Pattern[str]:
    wildcards = sum(pattern.count(sign) for sign in ("*", "+"))
    if len(pattern) > 500 or wildcards > _MOST_WILDCARDS or not _PATTERN.fullmatch(pattern):
        raise _refused(f"the {name} {shown(pattern)!r}")
    try:
        return re.compile(rf"(?:.*\.)?(?:{pattern})", re.ASCII)
    except re.error:
        raise _damaged(name) from None


def _number(value: object, name: str) -> float:
    number = float(value) if isinstance(value, int | float) else math.nan
    if not math.isfinite(number):
        raise _damaged(name)
    return number


def _refused(what: str) -> RequestError:
    return RequestError(
        f"{what[0].upper()}{what[1:]} is not supported.",
        hint="docs/lora.md lists the formats that are.",
        code="invalid_lora",
    )


def _damaged(name: str) -> RequestError:
    return RequestError(
        f"The adapter's configuration is damaged: {name} is not what it should be.",
        hint="Export the adapter again.",
        code="invalid_lora",
    )
