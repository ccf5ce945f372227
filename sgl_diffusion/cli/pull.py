"""`sglang pull MODEL`: download a model before it is served, and check what arrived."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from sgl_diffusion.base import env, log
from sgl_diffusion.base.errors import ConfigError
from sgl_diffusion.base.omni import OMNI_MODELS
from sgl_diffusion.base.options import option
from sgl_diffusion.cli.args import Parser, UsageError, merge, parser_for
from sgl_diffusion.cli.progress import Progress
from sgl_diffusion.loader.hub import check_sums, local_model, resolve_model
from sgl_diffusion.recipes.catalog import NAMES

DESCRIPTION = """Download a model into the hub's cache, where serving it by this name finds it. A
download that broke off goes on with what is missing; checksums are compared at the end.
"""


@dataclass(frozen=True, kw_only=True)
class PullOptions:
    """`sglang pull`."""

    revision: str | None = option(None, "Branch, tag or commit of the repository.")
    variant: str | None = option(
        None, "Weights to take where the repository holds several, such as fp16."
    )
    check: bool = option(True, "Compare the checksums of what arrived.")


def parser() -> Parser:
    made = parser_for(PullOptions, "sglang pull", DESCRIPTION)
    made.usage = "sglang pull MODEL [options]"
    made.add_argument("model", metavar="MODEL", help="Name on the hub: OWNER/NAME.")
    return made


def main(argv: list[str]) -> int:
    flags = vars(parser().parse_strict(argv))
    model: str = flags.pop("model")
    options = merge(PullOptions, flags).value
    log.set_up("warning")
    if local_model(model) is not None:
        raise UsageError(f"{model} is a folder: it is here already.")
    if env.get("HF_HUB_OFFLINE"):
        raise ConfigError("A download needs the hub, and HF_HUB_OFFLINE is set.", hint="Unset it.")
    progress = Progress(sys.stderr)
    try:
        folder = resolve_model(
            model,
            options.revision,
            variant=options.variant,
            note=progress.say,
            report=progress.bytes_of(model),
            known=(*NAMES, *OMNI_MODELS),
        )
    finally:
        progress.end()
    if options.check:
        count = check_sums(model, folder, options.revision)
        progress.say(f"checksums of {count} file{'s' * (count != 1)} are right")
    print(folder)
    return 0
