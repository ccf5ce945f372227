"""Rules that map a checkpoint's module names to ours, for weights and for adapters alike.

A rule is a pair of templates: `blocks.{i}.attn1.to_q` matches one dotted part at `{i}`. A name no
rule matches is kept. With a segment, the checkpoint's module is a slice of the rows of our fused
module; with `ALL`, it is fused like ours, with the segments in our order.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

ALL = "*"
Swap = Literal["", "halves", "narrow"]


@dataclass(frozen=True)
class Rule:
    """`flatten` makes [out, ...] to [out, in]; `swap` exchanges the halves of the rows, always or
    ("narrow") where they are a shift and a scale and nothing else."""

    source: str
    target: str
    segment: str = ""
    flatten: bool = False
    swap: Swap = ""


@dataclass(frozen=True)
class Target:
    """Our module, which segment of it, and what becomes of the tensor on the way."""

    module: str
    segment: str = ""
    flatten: bool = False
    swap: Swap = ""


class Rules:
    """A table of rules.

    `ignore` holds templates of modules that are left in the file, `leaves` other names of
    parameters, and `others` the tables of other namings that the same weights are published in.
    """

    def __init__(
        self,
        *rules: Rule,
        ignore: Iterable[str] = (),
        leaves: Mapping[str, str] | None = None,
        others: Iterable[Rules] = (),
    ) -> None:
        self._rules = rules
        self._ignore = tuple(ignore)
        self._leaves = dict(leaves or {})
        self.others = tuple(others)

    def target(self, module: str) -> Target | None:
        """Where a checkpoint's module goes; None for an ignored one."""
        if any(_pattern(template).fullmatch(module) for template in self._ignore):
            return None
        for rule in self._rules:
            if match := _pattern(rule.source).fullmatch(module):
                name = rule.target.format(**match.groupdict())
                return Target(name, rule.segment, rule.flatten, rule.swap)
        return Target(module)

    def source(self, module: str, segment: str = "") -> str:
        """The checkpoint's name for our module, the inverse of `target`."""
        for rule in self._rules:
            match = _pattern(rule.target).fullmatch(module)
            if match and rule.segment in (segment, ALL):
                return rule.source.format(**match.groupdict())
        return module

    def leaf(self, name: str) -> str:
        """Our name for a parameter of a module."""
        return self._leaves.get(name, name)


@functools.cache
def _pattern(template: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", template)
    return re.compile(
        "".join(
            f"(?P<{part}>[^.]+)" if position % 2 else re.escape(part)
            for position, part in enumerate(parts)
        )
    )
