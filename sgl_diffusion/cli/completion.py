"""`sglang completion SHELL`: a script by which bash, zsh or fish completes these commands.

Everything in it comes from the parsers, so it knows every option of this version.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sgl_diffusion.cli.args import Parser, UsageError
from sgl_diffusion.cli.shells import SHELLS

if TYPE_CHECKING:
    from sgl_diffusion.cli.program import Command

HELP = f"""usage: sglang completion {"|".join(SHELLS)}

Prints a script that completes sglang, sgl-diffusion and sgl-omni. For every new shell:

  bash   source <(sglang completion bash)      in ~/.bashrc
  zsh    source <(sglang completion zsh)       in ~/.zshrc, after compinit
  fish   sglang completion fish | source       in ~/.config/fish/config.fish
"""


@dataclass(frozen=True)
class Option:
    """One option: its flags, what it takes, and the first sentence of its help."""

    flags: tuple[str, ...]
    takes_value: bool
    choices: tuple[str, ...]
    is_path: bool
    text: str


@dataclass(frozen=True)
class Place:
    """What may follow some words: more words, options, files."""

    words: Mapping[str, str]
    options: tuple[Option, ...] = ()
    files: bool = False


# Keys are the words so far, with a space between: "", "serve", "config show".
Places = dict[str, Place]


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0 if argv else 2
    if argv[0] not in SHELLS or argv[1:]:
        raise UsageError(
            f"sglang completion knows no {' '.join(argv)!r}.", hint=f"Known: {', '.join(SHELLS)}."
        )
    print(SHELLS[argv[0]](programs()), end="")
    return 0


def programs() -> dict[tuple[str, ...], Places]:
    """Every program that is installed, by its names."""
    from sgl_diffusion.cli import omni, sglang

    return {
        ("sglang", "sgl-diffusion"): places_of(sglang.PROGRAM.commands),
        ("sgl-omni",): places_of(omni.PROGRAM.commands),
    }


def places_of(commands: Mapping[str, Command]) -> Places:
    places = {"": Place({name: command.text for name, command in commands.items()})}
    for name, command in commands.items():
        if command.words:
            places[name] = Place(dict.fromkeys(command.words, ""))
        for word in command.words or ("",):
            made = command.make_parser(word)
            if made is not None:
                key = f"{name} {word}".rstrip()
                places[key] = Place({}, tuple(options(made)), _takes_files(made))
    return places


def options(parser: Parser) -> Iterator[Option]:
    for action in parser._actions:
        if not action.option_strings:
            continue
        text = (action.help or "").partition(". ")[0].rstrip(".").replace("%%", "%")
        yield Option(
            flags=tuple(action.option_strings),
            takes_value=action.nargs != 0,
            choices=tuple(map(str, action.choices or ())),
            is_path=_is_path(action),
            text=text,
        )


def _is_path(action: argparse.Action) -> bool:
    names = ("path", "file", "dir", "config", "image", "mask", "output", "save", "profile")
    return action.dest.endswith(names) and not action.dest.startswith("max_")


def _takes_files(parser: Parser) -> bool:
    return any(action.dest == "file" and not action.option_strings for action in parser._actions)
