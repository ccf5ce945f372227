"""`sglang bench quality`: pictures with and without what makes them faster or the model smaller."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from typing import Any

from sgl_diffusion.base import log
from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.options import option
from sgl_diffusion.cli.args import Parser, UsageError, edges_of, parser_for, read
from sgl_diffusion.cli.generate import engine_of

DESCRIPTION = (
    "Draw the same prompts and seeds with and without --quantization, --vae-tile-size, "
    "--enable-teacache or guidance in fewer steps, and compare the pictures. Exit status 1: the "
    "worst misses a bar."
)
_WISHES = ("num_frames", "num_inference_steps", "guidance_scale")
_LESS = (
    "enable_teacache",
    "teacache_threshold",
    "guidance_start",
    "guidance_stop",
    "cfg_gate_step",
)


@dataclass(frozen=True, kw_only=True)
class QualityOptions(EngineOptions):
    """`sglang bench quality`."""

    prompt: tuple[str, ...] = option((), "What to draw. Repeatable. Default: four prompts.")
    seeds: int = option(2, "Pictures of each prompt, with the seeds 0, 1 and so on.", least=1)
    size: str | None = option(None, "WIDTHxHEIGHT. Default: the model's.")
    num_frames: int = option(1, "Frames of each; 1 makes images.", least=1)
    num_inference_steps: int | None = option(None, "Denoise steps. Default: the model's.")
    guidance_scale: float | None = option(None, "Strength of the prompt. Default: the model's.")
    enable_teacache: bool = option(False, "Reuse steps that change little.")
    teacache_threshold: float | None = option(None, "How little. Default: the engine's.")
    guidance_start: float = option(0.0, "Share of the steps at which guidance begins.")
    guidance_stop: float = option(1.0, "Share of the steps at which it ends.")
    cfg_gate_step: float = option(
        1.0, "Share of the steps from which guidance adds what it added last."
    )
    min_psnr: float | None = option(None, "The least PSNR in dB that the worst may have.")
    min_ssim: float | None = option(None, "The least SSIM that the worst may have.")
    json: bool = option(False, "Print one JSON document, no table.")
    log_level: str = option("warning", "debug, info, warning or error.")


def parser() -> Parser:
    return parser_for(QualityOptions, "sglang bench quality", DESCRIPTION)


def main(argv: list[str]) -> int:
    options = read(QualityOptions, parser(), argv).value
    usual: dict[str, Any] = {name: getattr(QualityOptions, name) for name in _LESS}
    plain = dataclasses.replace(options, quantization="none", vae_tile_size=0, **usual)
    if plain == options:
        raise UsageError(
            "There is nothing to compare.",
            hint="Give --quantization int8 or fp8, --vae-tile-size, --enable-teacache, "
            "--cfg-gate-step, --guidance-start or --guidance-stop.",
        )
    log.set_up(options.log_level)
    width, height = edges_of(options.size)
    wishes: dict[str, Any] = {name: getattr(options, name) for name in _WISHES}
    wishes |= {"width": width, "height": height}
    less = {name: getattr(options, name) for name in _LESS}
    less = {name: value for name, value in less.items() if value != usual[name]}

    from sgl_diffusion.bench import quality

    record = quality.compare(
        quality.Arm(engine_of(plain), wishes),
        quality.Arm(engine_of(options), {**wishes, **less}),
        options.prompt or quality.PROMPTS,
        options.seeds,
        lambda line: print(line, file=sys.stderr, flush=True),
    )
    bars = {"psnr": options.min_psnr, "ssim": options.min_ssim}
    missed = quality.below(record, [(key, bar) for key, bar in bars.items() if bar is not None])
    record["missed"] = missed
    print(json.dumps(record) if options.json else "\n".join([*quality.lines(record), *missed]))
    return 1 if missed else 0
