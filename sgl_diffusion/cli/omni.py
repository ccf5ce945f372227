"""`sgl-omni`: serve a model that reads, hears, sees and speaks; show its configuration."""

from __future__ import annotations

import sys

from sgl_diffusion.base import log
from sgl_diffusion.base.errors import ConfigError
from sgl_diffusion.base.omni import OmniServeOptions
from sgl_diffusion.cli.args import UsageError, parser_for, read
from sgl_diffusion.cli.program import Command, Program
from sgl_diffusion.loader.hub import local_model

DESCRIPTION = "Serve a model of text, pictures, films and sound over an OpenAI-compatible HTTP API."


def _serve(argv: list[str]) -> int:
    parser = parser_for(OmniServeOptions, "sgl-omni serve", DESCRIPTION)
    options = read(OmniServeOptions, parser, argv).value
    log.set_up(options.log_level)
    if not options.model_path:
        raise ConfigError(
            "There is no model to serve.",
            hint="Name one with --model-path, or as model_path in the file of --config.",
            param="model_path",
        )
    local_model(options.model_path)
    from sgl_diffusion.server.omni.run import serve

    return serve(options)


def _show_config(argv: list[str]) -> int:
    if argv[:1] in (["-h"], ["--help"]):
        print("usage: sgl-omni config show [--origin] [--config FILE] [options of sgl-omni serve]")
        return 0
    if argv[:1] != ["show"]:
        raise UsageError("Only `sgl-omni config show` exists.", hint="See sgl-omni config --help.")
    rest = [word for word in argv[1:] if word != "--origin"]
    parser = parser_for(OmniServeOptions, "sgl-omni config show", "The value of each option.")
    for line in read(OmniServeOptions, parser, rest).lines(origin=len(rest) < len(argv) - 1):
        print(line)
    return 0


PROGRAM = Program(
    "sgl-omni",
    {
        "serve": Command("serve an omni model over HTTP", _serve),
        "config": Command("show the options that a serve command would use", _show_config),
    },
)
main = PROGRAM.main


if __name__ == "__main__":
    sys.exit(main())
