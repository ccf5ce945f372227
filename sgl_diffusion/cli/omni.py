"""`sgl-omni`: serve a model that reads, hears, sees and speaks; show its configuration."""

from __future__ import annotations

import argparse
import sys

from sgl_diffusion.base import log
from sgl_diffusion.base.errors import ConfigError
from sgl_diffusion.base.omni import OmniServeOptions
from sgl_diffusion.cli.args import Parser, UsageError, merge, parser_for, read
from sgl_diffusion.cli.program import Command, Program
from sgl_diffusion.loader.hub import local_model

DESCRIPTION = "Serve a model of text, pictures, films and sound over an OpenAI-compatible HTTP API."


def parser() -> Parser:
    return parser_for(OmniServeOptions, "sgl-omni serve", DESCRIPTION)


def serve(argv: list[str]) -> int:
    options = read(OmniServeOptions, parser(), argv).value
    log.set_up(options.log_level)
    if not options.model_path:
        raise ConfigError(
            "There is no model to serve.",
            hint="Name one with --model-path, or as model_path in the file of --config.",
            param="model_path",
        )
    local_model(options.model_path)
    from sgl_diffusion.server.omni.run import serve as run

    return run(options)


def config_parser() -> Parser:
    made = parser_for(OmniServeOptions, "sgl-omni config show", "The value of each option.")
    made.add_argument(
        "--origin", action="store_true", default=argparse.SUPPRESS, help="And where it came from."
    )
    return made


def show_config(argv: list[str]) -> int:
    if argv[:1] in (["-h"], ["--help"]):
        print("usage: sgl-omni config show [--origin] [--config FILE] [options of sgl-omni serve]")
        return 0
    if argv[:1] != ["show"]:
        raise UsageError("Only `sgl-omni config show` exists.", hint="See sgl-omni config --help.")
    flags = vars(config_parser().parse_strict(argv[1:]))
    origin = flags.pop("origin", False)
    for line in merge(OmniServeOptions, flags).lines(origin=origin):
        print(line)
    return 0


PROGRAM = Program(
    "sgl-omni",
    {
        "serve": Command("serve an omni model over HTTP", "omni:serve", "omni:parser"),
        "config": Command(
            "show the options that a serve command would use",
            "omni:show_config",
            "omni:config_parser",
            words=("show",),
        ),
        "doctor": Command(
            "check this machine and the model, and say how to mend what is wrong",
            "omni_doctor:main",
            "omni_doctor:parser",
        ),
    },
)
main = PROGRAM.main


if __name__ == "__main__":
    sys.exit(main())
