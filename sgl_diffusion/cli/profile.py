"""`sglang profile`: one prompt, and where its time goes: a table, and a file for Perfetto."""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgl_diffusion.base import log
from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.errors import ConfigError
from sgl_diffusion.base.options import option
from sgl_diffusion.cli.args import Parser, UsageError, edges_of, parser_for, read
from sgl_diffusion.cli.generate import engine_of
from sgl_diffusion.loader.hub import local_model
from sgl_diffusion.recipes import demo

DESCRIPTION = "Show where the time of one image or video goes."

_WISHES = (
    "negative_prompt",
    "num_frames",
    "num_inference_steps",
    "guidance_scale",
    "seed",
    "num_outputs",
)


@dataclass(frozen=True, kw_only=True)
class ProfileOptions(EngineOptions):
    """`sglang profile`."""

    prompt: str | None = option(None, "What to make. Required.")
    output: str = option("trace.json", "File for ui.perfetto.dev; -o for short.")
    negative_prompt: str | None = option(None, "What to keep away from.")
    num_frames: int | None = option(None, "1 makes an image. Default: the model's.")
    size: str | None = option(None, "WIDTHxHEIGHT. Default: the model's.")
    num_inference_steps: int | None = option(None, "Denoise steps. Default: the model's.")
    guidance_scale: float | None = option(None, "Strength of the prompt. Default: the model's.")
    seed: int | None = option(None, "Seed of the first output. Default: 42.")
    num_outputs: int = option(1, "How many to make.")
    warm_up: int = option(1, "Runs before the one that is recorded.", least=0)
    log_level: str = option("warning", "debug, info, warning or error.")


def parser() -> Parser:
    made = parser_for(ProfileOptions, "sglang profile", DESCRIPTION)
    made.add_argument("-o", dest="output", metavar="FILE", help="The same as --output.")
    return made


def main(argv: list[str]) -> int:
    options = read(ProfileOptions, parser(), argv).value
    if options.prompt is None:
        raise UsageError("--prompt is missing.", hint='For example --prompt "a cat".')
    log.set_up(options.log_level)
    target = Path(options.output).expanduser()
    if not target.parent.is_dir():  # known before the model is loaded
        raise ConfigError(f"There is no folder {target.parent}.", param="output")
    width, height = edges_of(options.size)
    if options.model_path is not None:
        local_model(options.model_path)
    engine = engine_of(options)
    wishes = {name: getattr(options, name) for name in _WISHES}
    wishes |= {"width": width, "height": height}

    from sgl_diffusion.client.generator import DiffGenerator

    print(f"loading {options.model_path or demo.NAME}", file=sys.stderr)
    with DiffGenerator.from_pretrained(**engine) as generator:
        for _ in range(options.warm_up):
            generator.generate(options.prompt, **wishes)
        generator.start_profile()
        generator.generate(options.prompt, **wishes)
        trace = generator.stop_profile()
    try:
        target.write_text(json.dumps(trace))
    except OSError as error:
        raise ConfigError(f"Cannot write to {target}: {error.strerror}.") from None
    print("\n".join(table(trace["traceEvents"])))
    print(f"{target}: open it with https://ui.perfetto.dev")
    return 0


def table(events: list[dict[str, Any]]) -> list[str]:
    """A line per stage of the trace: how often, how long, which share of all."""
    stages: dict[str, list[float]] = {}
    for event in events:
        if event["ph"] == "X":
            stages.setdefault(event["name"], []).append(event["dur"] / 1000)
    whole = sum(sum(each) for each in stages.values())
    lines = [f"{'stage':<10}{'count':>7}{'total ms':>11}{'median':>10}{'longest':>10}{'share':>8}"]
    for name, each in stages.items():
        median, total = statistics.median(each), sum(each)
        lines.append(
            f"{name:<10}{len(each):>7}{total:>11.1f}{median:>10.2f}{max(each):>10.2f}"
            f"{total / whole:>8.0%}"
        )
    return lines
