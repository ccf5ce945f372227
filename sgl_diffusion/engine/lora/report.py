"""What /v1/list_loras shows of the adapters."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from sgl_diffusion.engine.lora.cache import AdapterCache
from sgl_diffusion.engine.lora.fit import Fitted, Source
from sgl_diffusion.engine.lora.merged import SideData
from sgl_diffusion.engine.lora.state import Chosen, Sets


def describe(
    known: Mapping[str, Source],
    sets: Sets,
    cache: AdapterCache,
    in_use: Collection[Source],
    side_data: SideData,
    components: Collection[str],
) -> dict[str, Any]:
    active: dict[str, list[dict[str, Any]]] = {}
    unmerged: dict[str, list[dict[str, Any]]] = {}
    for component, chosen in sets.items():
        (active if chosen.on else unmerged)[component] = _members(component, chosen, cache)
    return {
        "loaded_adapters": [
            _adapter(source, cache.peek(source), source in in_use) for source in known.values()
        ],
        "active": active,
        "unmerged": unmerged,
        "targets": sorted(components),
        "memory": {
            "budget_bytes": cache.budget,
            "adapter_bytes": cache.nbytes,
            "unmerge_bytes": side_data.nbytes,
            "unmerge_bits_per_weight": round(side_data.bits_per_weight, 3),
            "copied_layers": side_data.copied_layers,
        },
    }


def _adapter(source: Source, fitted: Fitted | None, by_jobs: bool) -> dict[str, Any]:
    """One that had to make room in memory is known by name only, until it is used again."""
    fields: dict[str, Any] = {
        "nickname": source.nickname,
        "path": source.path,
        "weight_name": source.weight_name,
        "revision": source.revision,
        "in_memory": fitted is not None,
        "used_by_jobs": by_jobs,
    }
    if fitted is not None:
        adapter = fitted.adapter
        fields |= {
            "rank": adapter.rank,
            "alpha": adapter.alpha if source.alpha is None else source.alpha,
            "format": adapter.format,
            "kinds": list(adapter.kinds),
            "bytes": fitted.nbytes,
            "layers": adapter.layers,
            "num_lora_layers_with_weights": fitted.layers,
            "per_request": not fitted.not_applicable(),
            "unmatched": list(fitted.unmatched),
        }
    return fields


def _members(component: str, chosen: Chosen, cache: AdapterCache) -> list[dict[str, Any]]:
    members = []
    for source, strength in chosen.uses:
        fitted = cache.peek(source)
        places = fitted.places.get(component, ()) if fitted is not None else ()
        members.append(
            {
                "nickname": source.nickname,
                "path": source.path,
                "merged": chosen.on and chosen.mode == "merged",
                "mode": chosen.mode if chosen.on else "unmerged",
                "strength": strength,
                "num_lora_layers_with_weights": len({place.name for place in places}),
            }
        )
    return members
