"""Completion scripts of three shells from one description of the commands."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from shlex import quote
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sgl_diffusion.cli.completion import Option, Place, Places

# By their names: a function is called after the first, and serves all.
Programs = Mapping[tuple[str, ...], "Places"]


def function_of(name: str) -> str:
    return "_" + name.replace("-", "_")


def bash(programs: Programs) -> str:
    """One function per program: the words so far choose the words that may follow."""
    lines = ["# bash completion of sgl_diffusion; made by `sglang completion bash`."]
    for names, places in programs.items():
        function = function_of(names[0])
        lines += [
            f"{function}() {{",
            '    local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}"',
            '    local place="${COMP_WORDS[1]}"',
            '    [ "$COMP_CWORD" -gt 1 ] || place=""',
            '    case "$place" in',
            f"        {_two_words(places)})",
            '            [ "$COMP_CWORD" -gt 2 ] && place="$place ${COMP_WORDS[2]}" ;;',
            "    esac",
            "    COMPREPLY=()",
            '    case "$place $before" in',
            *_bash_values(places),
            "    esac",
            '    case "$place" in',
            *_bash_words(places),
            "    esac",
            "}",
            f"complete -F {function} {' '.join(names)}",
        ]
    return "\n".join(lines) + "\n"


def _two_words(places: Places) -> str:
    names = [name for name, place in places.items() if name and place.words]
    return "|".join(names)


def _bash_values(places: Places) -> Iterator[str]:
    for name, place in places.items():
        for option in filter(lambda one: one.takes_value, place.options):
            pattern = "|".join(quote(f"{name} {flag}") for flag in option.flags)
            yield f"        {pattern})"
            if option.choices:
                words = quote(" ".join(option.choices))
                yield f'            COMPREPLY=($(compgen -W {words} -- "$word")); return ;;'
            elif option.is_path:
                yield '            compopt -o filenames; COMPREPLY=($(compgen -f -- "$word"))'
                yield "            return ;;"
            else:
                yield "            return ;;"


def _bash_words(places: Places) -> Iterator[str]:
    for name, place in places.items():
        flags = [flag for option in place.options for flag in option.flags]
        words = quote(" ".join([*place.words, *flags]))
        yield f"        {quote(name)})"
        yield f'            COMPREPLY=($(compgen -W {words} -- "$word"))'
        if place.files:
            yield '            [ "${word:0:1}" = - ] ||'
            yield '                { compopt -o filenames; COMPREPLY=($(compgen -f -- "$word")); }'
        yield "            ;;"


def zsh(programs: Programs) -> str:
    """The same with descriptions."""
    lines = ["# zsh completion of sgl_diffusion; made by `sglang completion zsh`."]
    for names, places in programs.items():
        function = function_of(names[0])
        lines += [
            f"{function}() {{",
            '    local place="" before="${words[CURRENT-1]}"',
            "    local -a found",
            '    (( CURRENT > 2 )) && place="${words[2]}"',
            '    case "$place" in',
            f"        {_two_words(places)})",
            '            (( CURRENT > 3 )) && place="$place ${words[3]}" ;;',
            "    esac",
            '    case "$place $before" in',
            *_zsh_values(places),
            "    esac",
            '    case "$place" in',
            *_zsh_words(places),
            "    esac",
            "}",
            f"compdef {function} {' '.join(names)}",
        ]
    return "\n".join(lines) + "\n"


def _zsh_values(places: Places) -> Iterator[str]:
    for name, place in places.items():
        for option in filter(lambda one: one.takes_value, place.options):
            pattern = "|".join(quote(f"{name} {flag}") for flag in option.flags)
            yield f"        {pattern})"
            if option.choices:
                yield f"            compadd -- {' '.join(map(quote, option.choices))}; return ;;"
            else:
                yield f"            {'_files; ' if option.is_path else ''}return ;;"


def _zsh_words(places: Places) -> Iterator[str]:
    for name, place in places.items():
        yield f"        {quote(name)})"
        described = [*_described(place)]
        yield f"            found=({' '.join(quote(entry) for entry in described)})"
        yield "            _describe option found"
        if place.files:
            yield "            _files"
        yield "            ;;"


def _described(place: Place) -> Iterator[str]:
    """Entries of `_describe`: a word, a colon, what it means."""
    for word, text in place.words.items():
        yield f"{word}:{text}" if text else word
    for option in place.options:
        for flag in option.flags:
            yield f"{flag}:{option.text.replace(':', '')}"


def fish(programs: Programs) -> str:
    """One line per word and option, under the condition that its place has been reached."""
    lines = ["# fish completion of sgl_diffusion; made by `sglang completion fish`."]
    for (name, *others), places in programs.items():
        lines.append(f"complete -c {name} -f")
        lines += [f"complete -c {other} -w {name}" for other in others]
        for key, place in places.items():
            head = f"complete -c {name} -n {quote(_fish_reached(key, places))}"
            for word, text in place.words.items():
                lines.append(f"{head} -a {word}{_fish_text(text)}")
            if place.files:
                lines.append(f"{head} -F")
            lines += [f"{head}{_fish_option(option)}" for option in place.options]
    return "\n".join(lines) + "\n"


def _fish_reached(key: str, places: Places) -> str:
    if not key:
        return "__fish_use_subcommand"
    seen = " ".join(f"; and __fish_seen_subcommand_from {word}" for word in key.split())
    condition = seen.removeprefix("; and ")
    if following := " ".join(places[key].words):
        condition += f"; and not __fish_seen_subcommand_from {following}"
    return condition


def _fish_option(option: Option) -> str:
    flags = [
        f" -l {flag[2:]}" if flag.startswith("--") else f" -s {flag[1:]}" for flag in option.flags
    ]
    takes = ""
    if option.choices:
        takes = f" -x -a {quote(' '.join(option.choices))}"
    elif option.takes_value:
        takes = " -r -F" if option.is_path else " -x"
    return f"{''.join(flags)}{takes}{_fish_text(option.text)}"


def _fish_text(text: str) -> str:
    return f" -d {quote(text)}" if text else ""


SHELLS: dict[str, Callable[[Programs], str]] = {"bash": bash, "zsh": zsh, "fish": fish}
