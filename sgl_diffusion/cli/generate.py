"""`sglang generate`: one prompt, files on disk, no server."""

from __future__ import annotations

import dataclasses
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgl_diffusion.base import log
from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.options import option
from sgl_diffusion.base.paths import data_folder
from sgl_diffusion.cli.args import Parser, UsageError, edges_of, parser_for, read
from sgl_diffusion.cli.progress import Progress
from sgl_diffusion.cli.target import Target
from sgl_diffusion.engine.exclusions import check_options
from sgl_diffusion.loader.adapters.paths import check_there
from sgl_diffusion.loader.hub import local_model
from sgl_diffusion.recipes import demo

if TYPE_CHECKING:
    from sgl_diffusion.base.params import ModelCard
    from sgl_diffusion.client.types import Generation

DESCRIPTION = 'Make images or videos without a server: sglang generate "a red circle".'

_ENGINE = tuple(field.name for field in dataclasses.fields(EngineOptions))


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(EngineOptions):
    """`sglang generate`."""

    prompt: str | None = option(None, "What to make; also as the first word after generate.")
    negative_prompt: str | None = option(None, "What to keep away from.")
    image: tuple[str, ...] = option(
        (), "Picture to work on: PNG, JPEG or WebP. Repeatable where the model takes several."
    )
    mask: str | None = option(
        None, "Picture of the same size; its transparent or bright part is made anew."
    )
    strength: float | None = option(
        None, "How far to go from the picture, 0 to 1. Default: the model's."
    )
    output_path: str = option("outputs", "Folder, or file name with .png .jpg .webp or .mp4.")
    num_frames: int | None = option(None, "1 makes an image. Default: the model's.")
    size: str | None = option(None, "WIDTHxHEIGHT. Default: the model's.")
    width: int | None = option(None, "Wins over --size.")
    height: int | None = option(None, "Wins over --size.")
    fps: int | None = option(None, "Frames per second. Default: the model's.")
    num_inference_steps: int | None = option(None, "Denoise steps. Default: the model's.")
    guidance_scale: float | None = option(None, "Strength of the prompt. Default: the model's.")
    true_cfg_scale: float | None = option(None, "Guidance by the negative prompt, where apart.")
    guidance_scale_2: float | None = option(None, "Guidance of a second expert.")
    flow_shift: float | None = option(None, "Shift of the noise schedule. Default: the model's.")
    max_sequence_length: int | None = option(None, "Text tokens. Default: the model's.")
    guidance_start: float = option(0.0, "Share of the steps at which guidance begins.")
    guidance_stop: float = option(1.0, "Share of the steps at which it ends.")
    cfg_gate_step: float = option(
        1.0, "Share of the steps from which guidance adds what it added last."
    )
    enable_teacache: bool = option(False, "Let steps reuse what an earlier one computed.")
    teacache_threshold: float | None = option(
        None, "How far such steps may differ, 0.001 to 1. Default: 0.1."
    )
    seed: int | None = option(None, "Seed of the first output; the others count up. Default: 42.")
    num_outputs: int = option(1, "How many to make.")
    output_compression: int | None = option(None, "Quality of JPEG, WebP and MP4, 0 to 100.")
    metadata: bool = option(True, "Write the settings into the files.")
    log_level: str = option("warning", "debug, info, warning or error.")


def parser() -> Parser:
    return parser_for(GenerateOptions, "sglang generate", DESCRIPTION)


def main(argv: list[str]) -> int:
    options = read(GenerateOptions, parser(), with_prompt(argv)).value
    if options.prompt is None:
        raise UsageError("There is no prompt.", hint='For example: sglang generate "a red circle".')
    log.set_up(options.log_level)
    for given in (*options.image, *filter(None, [options.mask])):
        if not Path(given).is_file():  # known before the model is loaded
            raise UsageError(f"There is no file {given}.")
    for name in ("mask", "strength"):
        if getattr(options, name) is not None and not options.image:
            raise UsageError(f"--{name} needs a picture to work on.", hint="Name it with --image.")
    if options.model_path is not None:
        local_model(options.model_path)
    check_there(options.lora_path)
    engine = engine_of(options)
    target = Target.of(options.output_path, options.output_compression)
    wishes = _wishes(options, target)
    _check(options, wishes)
    produce(engine, options.prompt, wishes, target, metadata=options.metadata)
    return 0


def engine_of(options: EngineOptions) -> dict[str, Any]:
    """The options of the engine, which can be followed, with a data folder that can be used."""
    check_options(options)
    engine = {name: getattr(options, name) for name in _ENGINE}
    return {**engine, "data_dir": str(data_folder(options.data_dir))}


def produce(
    engine: dict[str, Any], prompt: str, wishes: dict[str, Any], target: Target, *, metadata: bool
) -> Generation:
    """Load the model, make what is wished for and write it; a line for each file."""
    from sgl_diffusion.client.generator import DiffGenerator

    progress, started = Progress(sys.stderr), time.monotonic()
    progress.say(f"loading {engine['model_path'] or demo.NAME}")
    with DiffGenerator.from_pretrained(**engine) as generator:
        progress.say(f"loaded in {time.monotonic() - started:.1f} s on {generator.card.device}")
        if engine["model_path"] is None:
            progress.say(f"no --model-path: {demo.NOTE}")
        started = time.monotonic()
        try:
            result = generator.generate(prompt, on_progress=progress.show, **wishes)
        finally:
            progress.end()
    seconds, params = time.monotonic() - started, result.params
    model = generator.card.name if metadata else None
    for index, path in enumerate(target.write(result, model)):
        size = f"{params.width}x{params.height}"
        frames = f"{params.num_frames} frames  " if params.num_frames > 1 else ""
        print(f"{path}  {size}  {frames}seed {params.seeds[index]}  {seconds:.2f} s", flush=True)
    return result


def with_prompt(argv: list[str]) -> list[str]:
    """The flags, where the prompt may come first and without one."""
    if not argv or argv[0].startswith("-"):
        return argv
    if len(argv) > 1 and not argv[1].startswith("-"):
        raise UsageError(
            f"sglang generate does not expect {argv[1]!r} after the prompt {argv[0]!r}.",
            hint="A prompt of several words stands in quotation marks.",
        )
    if any(word.partition("=")[0] == "--prompt" for word in argv):
        raise UsageError(
            f"There are two prompts: {argv[0]!r}, and that of --prompt.",
            hint="A prompt of several words stands in quotation marks.",
        )
    return ["--prompt", *argv]


def _wishes(options: GenerateOptions, target: Target) -> dict[str, Any]:
    width, height = edges_of(options.size)
    width, height = options.width or width, options.height or height
    return {
        "negative_prompt": options.negative_prompt,
        "width": width,
        "height": height,
        "num_frames": target.frames(options.num_frames),
        "fps": options.fps,
        "num_inference_steps": options.num_inference_steps,
        "guidance_scale": options.guidance_scale,
        "true_cfg_scale": options.true_cfg_scale,
        "guidance_scale_2": options.guidance_scale_2,
        "images": options.image,
        "mask": options.mask,
        "strength": options.strength,
        "flow_shift": options.flow_shift,
        "max_sequence_length": options.max_sequence_length,
        "guidance_start": options.guidance_start,
        "guidance_stop": options.guidance_stop,
        "cfg_gate_step": options.cfg_gate_step,
        "enable_teacache": options.enable_teacache,
        "teacache_threshold": options.teacache_threshold,
        "seed": options.seed,
        "num_outputs": options.num_outputs,
    }


def _check(options: GenerateOptions, wishes: dict[str, Any]) -> None:
    """What no model would do: the rules of the one that was chosen are known when it is loaded."""
    from sgl_diffusion.base.params import SamplingParams

    assert options.prompt is not None
    card = _tolerant(options)
    wish = SamplingParams(prompt=options.prompt, **wishes)
    if wishes["images"]:
        from sgl_diffusion.client.pictures import size_of

        for path in (*wishes["images"], *filter(None, [wishes["mask"]])):
            size_of(path)
    card.resolve(wish, video=wishes["num_frames"] not in (None, 1))


def _tolerant(options: GenerateOptions) -> ModelCard:
    """A model that does whatever any model does; without --model-path, in the sizes of Wan."""
    from sgl_diffusion.base.params import ModelCard, SamplingDefaults

    own = options.model_path is None
    return ModelCard(
        name=options.model_path or demo.NAME,
        path="",
        family="",
        pipeline_class="",
        backend="native",
        tasks=("T2V",),
        defaults=SamplingDefaults(
            width=64,
            height=64,
            num_inference_steps=1,
            guidance_scale=1.0,
            max_sequence_length=2**20,
            true_cfg_scale=1.0,
            guidance_scale_2=1.0,
        ),
        size_multiple=16 if own else 2,
        frame_multiple=1,
        max_frames=241 if own else 10**5,
        edits="native" if options.strength is None else "image-to-image",
        max_images=2**10,
        masks=True,
        step_cache=True,
    )
