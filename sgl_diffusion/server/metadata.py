"""The settings that a file carries with it, so that it can be made again."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sgl_diffusion import __version__

if TYPE_CHECKING:
    from sgl_diffusion.base.lora import LoraUse
    from sgl_diffusion.base.params import ResolvedParams

# Paths of this server; a reader of the file has no use for them.
_PRIVATE = ("images", "mask", "seeds", "loras")


def settings_text(params: ResolvedParams, model: str, index: int = 0) -> str:
    """One JSON object: what was asked for output `index` of a job, complete and with its seed."""
    given = {name: value for name, value in asdict(params).items() if name not in _PRIVATE}
    settings = {
        "software": f"sgl_diffusion {__version__}",
        "model": model,
        **given,
        "loras": [_shown(use) for use in params.loras],
        "seed": params.seeds[index],
    }
    return json.dumps(settings, ensure_ascii=False)


def _shown(use: LoraUse) -> dict[str, Any]:
    """What of an adapter means the same elsewhere: not where it lies on this machine."""
    hidden = {"accepted", "local"} if use.local is False else {"accepted", "local", "path"}
    said = {name: value for name, value in asdict(use).items() if name not in hidden}
    return {name: value for name, value in said.items() if value is not None}
