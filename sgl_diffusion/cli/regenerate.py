"""`sglang regenerate FILE`: the picture or video once more, from the settings that it carries."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgl_diffusion.base import log
from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.errors import ModelNotFoundError, RequestError
from sgl_diffusion.base.lora import LoraUse, settings_to_begin_with
from sgl_diffusion.base.options import option
from sgl_diffusion.cli.args import Parser, UsageError, merge, parser_for
from sgl_diffusion.cli.generate import engine_of, produce
from sgl_diffusion.cli.target import Target
from sgl_diffusion.loader.hub import local_model
from sgl_diffusion.recipes import demo

if TYPE_CHECKING:
    from sgl_diffusion.client.types import Generation

DESCRIPTION = """Make a picture or video again from the settings that the file carries. On the same
machine, with the same model and precision, a single output has the same pixels; whether it has is
told for PNG files. Adapters that a server had set for everybody are not in its files; those of a
request are, and where they are on this machine say --lora-path and --lora-nickname.
"""

# Of the wishes, what a file does not carry, or not in the same form.
_OTHERS = frozenset({"images", "mask", "num_outputs", "partial_images", "prompt", "seed", "loras"})
_NO_ADAPTERS: dict[str, Any] = {"lora_path": (), "lora_nickname": ()}


@dataclass(frozen=True, kw_only=True)
class RegenerateOptions(EngineOptions):
    """`sglang regenerate`."""

    model_path: str | None = option(
        None, "Folder in diffusers format or hub id. Default: the model that the file names."
    )
    image: tuple[str, ...] = option(
        (), "Picture that the file was made from, where there was one. Repeatable."
    )
    mask: str | None = option(None, "Its mask, where there was one.")
    output_path: str = option("outputs", "Folder, or file name with .png .jpg .webp or .mp4.")
    output_compression: int | None = option(None, "Quality of JPEG, WebP and MP4, 0 to 100.")
    metadata: bool = option(True, "Write the settings into the files.")
    log_level: str = option("warning", "debug, info, warning or error.")


def parser() -> Parser:
    made = parser_for(RegenerateOptions, "sglang regenerate", DESCRIPTION)
    made.usage = "sglang regenerate FILE [options]"
    made.add_argument("file", metavar="FILE", help="PNG, JPEG, WebP or MP4 of this program.")
    return made


def main(argv: list[str]) -> int:
    flags = vars(parser().parse_strict(argv))
    path = Path(flags.pop("file")).expanduser()
    options = merge(RegenerateOptions, flags).value
    log.set_up(options.log_level)
    for given in (str(path), *options.image, *filter(None, [options.mask])):
        if not Path(given).is_file():  # known before the model is loaded
            raise UsageError(f"There is no file {given}.")
    from sgl_diffusion.server.metadata import read_settings

    settings = read_settings(path)
    _check_pictures(path, settings, options)
    target = Target.of(options.output_path, options.output_compression)
    wishes = {**_wishes(settings), "num_frames": target.frames(settings.get("num_frames"))}
    wishes |= {"images": options.image, "mask": options.mask}
    wishes["loras"] = loras = _adapters(path, settings, options)
    if loras:
        options = dataclasses.replace(options, **_NO_ADAPTERS)  # they are the job's own
    model = _model(path, settings, options)
    engine = engine_of(dataclasses.replace(options, model_path=model))
    result = produce(engine, settings["prompt"], wishes, target, metadata=options.metadata)
    if path.suffix.lower() == ".png":
        print(_compared(path, result), file=sys.stderr)
    return 0


def _check_pictures(path: Path, settings: dict[str, Any], options: RegenerateOptions) -> None:
    count = settings.get("images", 0)
    if len(options.image) != count:
        raise UsageError(
            f"{path} was made from {count or 'no'} picture{'s' * (count != 1)}, "
            f"and {len(options.image) or 'none'} given.",
            hint="Name each with --image, in the same order." if count else "Leave --image out.",
        )
    if (options.mask is not None) != settings.get("mask", False):
        without = "with a mask" if options.mask is None else "without a mask"
        raise UsageError(
            f"{path} was made {without}.",
            hint="Name it with --mask." if options.mask is None else "Leave --mask out.",
        )


def _model(path: Path, settings: dict[str, Any], options: RegenerateOptions) -> str | None:
    """The model to load; None for the one that comes along."""
    if options.model_path is None and settings["model"] == demo.NAME:
        return None
    model = options.model_path or str(settings["model"])
    try:
        local_model(model)
    except ModelNotFoundError:
        if options.model_path is not None:
            raise
        raise UsageError(
            f"{path} was made with {model!r}, which is no folder here and no name on the hub.",
            hint="Name the model with --model-path.",
        ) from None
    return model


def _wishes(settings: dict[str, Any]) -> dict[str, Any]:
    from sgl_diffusion.base.params import SamplingParams

    names = {field.name for field in dataclasses.fields(SamplingParams)} - _OTHERS
    wishes = {name: value for name, value in settings.items() if name in names}
    return {**wishes, "seed": settings.get("seed")}


def _adapters(
    path: Path, settings: dict[str, Any], options: RegenerateOptions
) -> tuple[LoraUse, ...]:
    """Those of the file; of one that comes from no hub it has the nickname only."""
    import msgspec

    try:
        uses = msgspec.convert(settings.get("loras", []), tuple[LoraUse, ...])
    except msgspec.ValidationError:
        raise RequestError("The adapters in the file cannot be read.") from None
    given = settings_to_begin_with(options.lora_path, options.lora_nickname)
    here = {one.nickname: one.path for one in given}
    for use in uses:
        if use.path is None and use.nickname not in here:
            raise UsageError(
                f"{path} was made with the adapter {use.nickname!r} and does not say where it is.",
                hint="Name it with --lora-path and --lora-nickname.",
            )
    return tuple(dataclasses.replace(u, path=here.get(u.nickname, u.path)) for u in uses)


def _compared(path: Path, result: Generation) -> str:
    """Whether the pixels are those of a lossless file."""
    from PIL import Image

    with Image.open(path) as picture:
        before = picture.convert("RGB").tobytes()
    if before == result.clips[0][0].tobytes():
        return f"same pixels as {path}"
    return (
        f"not the same pixels as {path}: another model, --lora-path, precision, machine or version "
        "made it"
    )
