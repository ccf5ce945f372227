"""The settings that a file carries with it, so that it can be made again."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from sgl_diffusion import __version__

if TYPE_CHECKING:
    from sgl_diffusion.base.params import ResolvedParams

# Paths of this server, and how the job was treated there: no use to a reader of the file.
_PRIVATE = ("images", "mask", "priority", "seeds")


def settings_text(params: ResolvedParams, model: str, index: int = 0) -> str:
    """One JSON object: what was asked for output `index` of a job, complete and with its seed."""
    given = {name: value for name, value in asdict(params).items() if name not in _PRIVATE}
    settings = {
        "software": f"sgl_diffusion {__version__}",
        "model": model,
        **given,
        "seed": params.seeds[index],
    }
    return json.dumps(settings, ensure_ascii=False)
