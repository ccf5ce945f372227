"""Which adapters a worker knows by a nickname: the latest to be named, and those needed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set

from sgl_diffusion.engine.lora.fit import Source

MOST = 256


def latest(
    known: Mapping[str, Source], named: Iterable[Source], needed: Set[Source]
) -> dict[str, Source]:
    """`known`, the oldest first, with `named` as the latest and at most `MOST` in all. Those that
    are `needed` stay, whatever their number."""
    fresh = {source.nickname: source for source in named}
    kept = {name: source for name, source in known.items() if name not in fresh} | fresh
    over = len(kept) - MOST
    for name, source in list(kept.items()):
        if over <= 0:
            break
        if name not in fresh and source not in needed:
            del kept[name]
            over -= 1
    return kept
