"""`sgl-omni doctor`: whether `sgl-omni serve` with these options can work, and what to mend."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sgl_diffusion.apps.omni import placement
from sgl_diffusion.base.omni import OmniServeOptions
from sgl_diffusion.base.paths import data_folder
from sgl_diffusion.cli.args import Parser
from sgl_diffusion.cli.checks import compute, network, omni, probe, storage
from sgl_diffusion.cli.checks.types import Check, ok
from sgl_diffusion.cli.doctor import asks_keys, beginning, doctor_parser, report

DESCRIPTION = """Check this machine and the model for `sgl-omni serve`, with the options it would
get. Each line that is not ok says how to mend it; the exit code is 3 if the server would not start.
"""


def parser() -> Parser:
    return doctor_parser(OmniServeOptions, "sgl-omni doctor", DESCRIPTION)


def main(argv: list[str]) -> int:
    return report(vars(parser().parse_strict(argv)), examine)


def examine(flags: dict[str, Any]) -> Iterator[Check]:
    """Every check, as it is made."""
    variables, options = yield from beginning(OmniServeOptions, flags, configuration)
    probed = probe.run()
    yield from compute.checks(probed, options)
    yield from omni.checks(probed, options)
    yield storage.cache()
    yield network.port(options, keys=asks_keys(options))
    if variables.status == "ok":
        yield network.hub()


def configuration(options: OmniServeOptions) -> Check:
    """What the server reads before it starts: key files, folders, which stages share a process."""
    from sgl_diffusion.server.omni.settings import omni_settings

    folder = data_folder(options.data_dir) if options.data_dir else Path()
    omni_settings(options, folder)
    places = placement(options)
    return ok("options", f"they can be read; processes: {len(places)}")
