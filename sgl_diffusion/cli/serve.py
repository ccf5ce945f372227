"""`sglang serve` and `sglang config show`."""

from __future__ import annotations

import argparse
import dataclasses

from sgl_diffusion.base import log
from sgl_diffusion.base.config import ServeOptions
from sgl_diffusion.base.paths import data_folder
from sgl_diffusion.cli.args import Parser, UsageError, merge, parser_for, read
from sgl_diffusion.engine.exclusions import check_options
from sgl_diffusion.loader.adapters.paths import check_there
from sgl_diffusion.loader.hub import local_model

DESCRIPTION = "Serve a diffusion model over an OpenAI-compatible HTTP API."


def parser() -> Parser:
    return parser_for(ServeOptions, "sglang serve", DESCRIPTION)


def main(argv: list[str]) -> int:
    options = read(ServeOptions, parser(), argv).value
    log.set_up(options.log_level)
    options = dataclasses.replace(options, data_dir=str(data_folder(options.data_dir)))
    if options.model_path is not None:
        local_model(options.model_path)
    check_there(options.lora_path)
    check_options(options)
    if options.node_rank > 0:
        from sgl_diffusion.client.node import follow

        return follow(options)
    from sgl_diffusion.server.run import serve

    return serve(options)


def config_parser() -> Parser:
    made = parser_for(ServeOptions, "sglang config show", "Each option and where it came from.")
    made.add_argument(
        "--origin",
        action="store_true",
        default=argparse.SUPPRESS,
        help="Accepted; it is always shown.",
    )
    return made


def show_config(argv: list[str]) -> int:
    if argv[:1] in (["-h"], ["--help"]):
        print("usage: sglang config show [--origin] [--config FILE] [options of sglang serve]")
        return 0
    if argv[:1] != ["show"]:
        raise UsageError("Only `sglang config show` exists.", hint="See sglang config --help.")
    flags = vars(config_parser().parse_strict(argv[1:]))
    flags.pop("origin", None)  # it is always shown
    for line in merge(ServeOptions, flags).lines():
        print(line)
    return 0
