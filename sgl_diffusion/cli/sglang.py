"""`sglang` and its commands; each is imported only when it runs."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from sgl_diffusion import __version__
from sgl_diffusion.base import env
from sgl_diffusion.base.errors import SglError
from sgl_diffusion.base.registry import suggest
from sgl_diffusion.cli.args import UsageError


@dataclass(frozen=True)
class Command:
    """`where` is the module in this room and the function in it that takes the arguments."""

    text: str
    where: str

    def run(self, argv: list[str]) -> int:
        module, _, function = self.where.partition(":")
        status: int = getattr(importlib.import_module(f"sgl_diffusion.cli.{module}"), function)(
            argv
        )
        return status


COMMANDS = {
    "serve": Command("serve a model over HTTP", "serve:main"),
    "generate": Command("make one image or video without a server", "generate:main"),
    "regenerate": Command("make a file again from the settings it carries", "regenerate:main"),
    "models": Command("list the models with a native recipe and what is downloaded", "models:main"),
    "config": Command("show the options that a serve command would use", "serve:show_config"),
    "doctor": Command("check this machine, and say how to mend what is wrong", "doctor:main"),
    "bench": Command("time the kernels on this machine", "bench:main"),
}
HELP = f"""usage: sglang COMMAND [options]

commands:
{chr(10).join(f"  {name:<12}{command.text}" for name, command in COMMANDS.items())}

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
    if name in COMMANDS:
        return COMMANDS[name].run(rest)
    what = "option" if name.startswith("-") else "command"
    raise UsageError(f"sglang has no {what} {name!r}.", hint=suggest(name, COMMANDS))
