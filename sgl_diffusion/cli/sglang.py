"""`sglang`: serve, generate, models, config, bench. Subcommands are imported only when they run."""

from __future__ import annotations

from sgl_diffusion.cli.program import Command, Program


def _serve(argv: list[str]) -> int:
    from sgl_diffusion.cli import serve

    return serve.main(argv)


def _generate(argv: list[str]) -> int:
    from sgl_diffusion.cli import generate

    return generate.main(argv)


def _models(argv: list[str]) -> int:
    from sgl_diffusion.cli import models

    return models.main(argv)


def _config(argv: list[str]) -> int:
    from sgl_diffusion.cli import serve

    return serve.show_config(argv)


def _bench(argv: list[str]) -> int:
    from sgl_diffusion.cli import bench

    return bench.main(argv)


PROGRAM = Program(
    "sglang",
    {
        "serve": Command("serve a model over HTTP", _serve),
        "generate": Command("make one image or video without a server", _generate),
        "models": Command("list the models with a native recipe, and what is downloaded", _models),
        "config": Command("show the options that a serve command would use", _config),
        "bench": Command("time the kernels on this machine", _bench),
    },
)
main = PROGRAM.main
