"""`sglang serve` with the engine of this folder, and with limits that make faults quick."""

from __future__ import annotations

import dataclasses
import sys

from sgl_diffusion.base import log
from sgl_diffusion.base.config import ServeOptions
from sgl_diffusion.base.errors import SglError
from sgl_diffusion.base.paths import data_folder
from sgl_diffusion.cli.args import parser_for, read
from sgl_diffusion.client.types import Limits
from sgl_diffusion.orchestrator.topology import App, StageSpec
from sgl_diffusion.server.run import serve


def main(argv: list[str]) -> int:
    parser = parser_for(ServeOptions, "faults", "A server that fails on demand.")
    options = read(ServeOptions, parser, argv).value
    log.set_up(options.log_level)
    options = dataclasses.replace(options, data_dir=str(data_folder(options.data_dir)))
    config = {
        "model": options.served_model_name,
        "broken_while": f"{options.data_dir}/broken",
        "hold_while": f"{options.data_dir}/hold",
    }
    stage = StageSpec(name="work", entry="tests.faults.engine:make_worker", config=config)
    limits = Limits(
        heartbeat=0.2,
        silence=options.worker_timeout,
        leave=2.0,
        term=0.3,
        backoff_first=0.05,
        backoff_most=0.5,
        steady=0.2,
    )
    return serve(options, App(name="faults", stages=(stage,)), limits)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except SglError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
