"""What every program of ours does around its commands: help, version, errors for a person."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sgl_diffusion import __version__
from sgl_diffusion.base import env
from sgl_diffusion.base.errors import SglError
from sgl_diffusion.base.registry import suggest
from sgl_diffusion.cli.args import Parser, UsageError


@dataclass(frozen=True)
class Command:
    """`where` and `parser` are MODULE:FUNCTION of this room, imported when they are needed: what
    gets the arguments behind the name, and what makes the parser of them. `words` are those that
    have to come first; `parsers` has the parsers of those that have others."""

    text: str
    where: str
    parser: str = ""
    words: tuple[str, ...] = ()
    parsers: Mapping[str, str] = field(default_factory=dict)

    def run(self, argv: list[str]) -> int:
        status: int = self._found(self.where)(argv)
        return status

    def make_parser(self, word: str = "") -> Parser | None:
        """Of what comes after one of `words`."""
        where = self.parsers.get(word, self.parser)
        if not where:
            return None
        made: Parser = self._found(where)()
        return made

    def _found(self, where: str) -> Callable[..., Any]:
        name, _, function = where.partition(":")
        module = importlib.import_module(f"sgl_diffusion.cli.{name}")
        found: Callable[..., Any] = getattr(module, function)
        return found


@dataclass(frozen=True)
class Program:
    name: str
    commands: Mapping[str, Command]

    def main(self, argv: list[str] | None = None) -> int:
        """Run one command; returns the exit code."""
        return guarded(self._run, sys.argv[1:] if argv is None else argv)

    def help(self) -> str:
        lines = [f"  {name:<12}{command.text}\n" for name, command in self.commands.items()]
        rows = {f"{self.name} COMMAND --help": "the options of one command"}
        rows |= {f"{self.name} --version": "the version"}
        width = max(map(len, rows)) + 3
        notes = [f"  {row:<{width}}{text}\n" for row, text in rows.items()]
        return "".join(
            [f"usage: {self.name} COMMAND [options]\n\ncommands:\n", *lines, "\n", *notes]
        )

    def _run(self, argv: list[str]) -> int:
        if not argv or argv[0] in ("-h", "--help"):
            print(self.help(), end="")
            return 0 if argv else 2
        if argv[0] in ("-V", "--version"):
            print(f"{self.name} (sgl_diffusion) {__version__}")
            return 0
        command = self.commands.get(argv[0])
        if command is not None:
            return command.run(argv[1:])
        what = "option" if argv[0].startswith("-") else "command"
        raise UsageError(
            f"{self.name} has no {what} {argv[0]!r}.", hint=suggest(argv[0], self.commands)
        )


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
        print("interrupted", file=sys.stderr)
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
