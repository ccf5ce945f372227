"""The settings that a file carries with it, so that it can be made again."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgl_diffusion import __version__
from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.server.media import SETTINGS_KEY, exif_comment

if TYPE_CHECKING:
    from sgl_diffusion.base.lora import LoraUse
    from sgl_diffusion.base.params import ResolvedParams

# Paths of this server, and how the job was treated there: no use to a reader of the file.
_PRIVATE = ("images", "mask", "priority", "seeds", "loras")


def settings_text(params: ResolvedParams, model: str, index: int = 0) -> str:
    """One JSON object: what was asked for output `index` of a job, complete and with its seed."""
    given = {name: value for name, value in asdict(params).items() if name not in _PRIVATE}
    settings = {
        "software": f"sgl_diffusion {__version__}",
        "model": model,
        **given,
        "loras": [_shown(use) for use in params.loras],
        **_pictures(params),
        "seed": params.seeds[index],
    }
    return json.dumps(settings, ensure_ascii=False)


def _shown(use: LoraUse) -> dict[str, Any]:
    """What of an adapter means the same elsewhere: not where it lies on this machine."""
    hidden = {"accepted", "local"} if use.local is False else {"accepted", "local", "path"}
    said = {name: value for name, value in asdict(use).items() if name not in hidden}
    return {name: value for name, value in said.items() if value is not None}


def _pictures(params: ResolvedParams) -> dict[str, Any]:
    """What somebody who makes the file again has to have at hand."""
    return {
        **({"images": len(params.images)} if params.images else {}),
        **({"mask": True} if params.mask is not None else {}),
    }


def read_settings(path: Path) -> dict[str, Any]:
    """What `settings_text` put into a file of ours."""
    try:
        text = _video_text(path) if path.suffix.lower() == ".mp4" else _image_text(path)
        settings = json.loads(text)
    except (OSError, ValueError):
        settings = None
    if not isinstance(settings, dict) or not {"software", "model", "prompt"} <= set(settings):
        raise RequestError(
            f"{path} carries no settings of this program.",
            hint="Files made with --no-metadata, or stored again by another program, have none.",
        )
    return settings


def _image_text(path: Path) -> str:
    from PIL import Image

    with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as picture:
        picture.load()  # a PNG may have its text after the pixels
        text = getattr(picture, "text", {}).get(SETTINGS_KEY)
        return exif_comment(picture.getexif()) if text is None else str(text)


def _video_text(path: Path) -> str:
    import av

    with av.open(str(path)) as container:
        return container.metadata.get("comment", "")
