"""Rules that map a checkpoint's module names to ours, for weights and for adapters alike.

A rule is a pair of templates: `blocks.{i}.attn1.to_q` matches one dotted part at `{i}`. A name no
rule matches is kept. With a segment, the checkpoint's module is a slice of the rows of our fused
module.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    source: str
    target: str
    segment: str = ""
    flatten: bool = False


@dataclass(frozen=True)
class Target:
    """Our module, which segment of it, and whether [out, ...] becomes [out, in]."""

    module: str
    segment: str = ""
    flatten: bool = False


class Rules:
    """A table of rules; `ignore` holds templates of modules that are left in the file."""

    def __init__(self, *rules: Rule, ignore: Iterable[str] = ()) -> None:
        self._rules = rules
        self._ignore = tuple(ignore)

    def target(self, module: str) -> Target | None:
        """Where a checkpoint's module goes; None for an ignored one."""
        if any(_pattern(template).fullmatch(module) for template in self._ignore):
            return None
        for rule in self._rules:
            if match := _pattern(rule.source).fullmatch(module):
                name = rule.target.format(**match.groupdict())
                return Target(name, rule.segment, rule.flatten)
        return Target(module)

    def source(self, module: str, segment: str = "") -> str:
        """The checkpoint's name for our module, the inverse of `target`."""
        for rule in self._rules:
            match = _pattern(rule.target).fullmatch(module)
            if match and rule.segment == segment:
                return rule.source.format(**match.groupdict())
        return module


@functools.cache
def _pattern(template: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", template)
    return re.compile(
        "".join(
            f"(?P<{part}>[^.]+)" if position % 2 else re.escape(part)
            for position, part in enumerate(parts)
        )
    )
