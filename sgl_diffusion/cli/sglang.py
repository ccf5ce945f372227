"""`sglang`: serve, generate, profile, models, config, bench; a command is imported when it runs."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

from sgl_diffusion import __version__
from sgl_diffusion.base import env
from sgl_diffusion.base.errors import SglError
from sgl_diffusion.base.registry import suggest
from sgl_diffusion.cli.args import UsageError

COMMANDS = {
    "serve": "serve a model over HTTP",
    "generate": "make one image or video without a server",
    "profile": "show where the time of one image or video goes",
    "models": "list the models with a native recipe, and what is downloaded",
    "config": "show the options that a serve command would use",
    "bench": "time the kernels on this machine",
}
HELP = f"""usage: sglang COMMAND [options]

commands:
{chr(10).join(f"  {name:<10}{text}" for name, text in COMMANDS.items())}

  sglang COMMAND --help   the options of one command
  sglang --version        the version
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    return guarded(_run, sys.argv[1:] if argv is None else argv)


def guarded(run: Callable[[list[str]], int], argv: list[str]) -> int:
    """The exit code of `run`; what it raises becomes two lines for a person."""
    _fill_standard_streams()
    try:
        return run(argv)
    except SglError as error:
        _show(error)
        print(
            f"error: {error.message}",
            *([error.hint] if error.hint else []),
            sep="\n  ",
            file=sys.stderr,
        )
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 141
    except Exception as error:
        _show(error)
        print(
            f"error: internal error ({type(error).__name__}: {error}).\n"
            "  Set SGLD_DEBUG=1 to see where.",
            file=sys.stderr,
        )
        return 1


def _fill_standard_streams() -> None:
    """A closed stdin, stdout or stderr would become the next socket, and a worker's log with it."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def _show(error: Exception) -> None:
    try:
        debug = bool(env.get("SGLD_DEBUG"))
    except SglError:
        debug = False  # the variable itself is what is wrong; the error is shown anyway
    if debug:
        traceback.print_exception(error)


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        print(f"sglang (sgl_diffusion) {__version__}")
        return 0
    name, rest = argv[0], argv[1:]
    if name == "serve":
        from sgl_diffusion.cli import serve

        return serve.main(rest)
    if name == "generate":
        from sgl_diffusion.cli import generate

        return generate.main(rest)
    if name == "profile":
        from sgl_diffusion.cli import profile

        return profile.main(rest)
    if name == "models":
        from sgl_diffusion.cli import models

        return models.main(rest)
    if name == "config":
        from sgl_diffusion.cli import serve

        return serve.show_config(rest)
    if name == "bench":
        from sgl_diffusion.cli import bench

        return bench.main(rest)
    what = "option" if name.startswith("-") else "command"
    raise UsageError(f"sglang has no {what} {name!r}.", hint=suggest(name, COMMANDS))
