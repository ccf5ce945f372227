"""Flags from dataclasses: one flag per field, merged over a configuration file."""

from __future__ import annotations

import argparse
import dataclasses
import re
import types
import typing
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from sgl_diffusion.base import env
from sgl_diffusion.base.errors import ConfigError
from sgl_diffusion.base.options import Resolved, resolve
from sgl_diffusion.base.registry import suggest
from sgl_diffusion.cli.groups import grouped

C = TypeVar("C")

_SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")

# Options whose default the environment may change.
_VARIABLES = {
    "log_level": "SGLD_LOG_LEVEL",
    "data_dir": "SGLD_DATA_DIR",
    "database_url": "SGLD_DATABASE_URL",
    "s3_bucket": "SGLD_S3_BUCKET",
    "s3_endpoint_url": "SGLD_S3_ENDPOINT_URL",
    "s3_region": "SGLD_S3_REGION",
}


class UsageError(ConfigError):
    """A command line that cannot be read."""

    code = "usage"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises our errors and knows what was nearly meant."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message[0].upper()}{message[1:]}.", hint=f"See {self.prog} --help.")

    def parse_strict(self, argv: list[str]) -> argparse.Namespace:
        known, rest = self.parse_known_args(argv)
        if rest:
            flag = rest[0].partition("=")[0]
            if not flag.startswith("-"):
                raise UsageError(
                    f"{self.prog} does not expect {flag!r}.",
                    hint=f"See {self.prog} --help.",
                )
            close = suggest(flag, self._option_string_actions)
            hint = close if close.startswith("Did") else f"See {self.prog} --help."
            raise UsageError(f"{self.prog} has no option {flag}.", hint=hint)
        return known


def edges_of(text: str | None) -> tuple[int | None, int | None]:
    """Width and height out of WIDTHxHEIGHT."""
    if text is None:
        return None, None
    match = _SIZE.fullmatch(text)
    if match is None:
        raise UsageError(f"--size {text!r} is not WIDTHxHEIGHT.", hint="As in 512x512.")
    return int(match[1]), int(match[2])


def parser_for(kind: type[Any], prog: str, description: str) -> Parser:
    """A parser with `--config` and one flag per field of dataclass `kind`."""
    parser = Parser(
        prog=prog,
        usage=f"{prog} [options]",
        description=description,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML, TOML or JSON file with options.")
    hints = typing.get_type_hints(kind)
    for title, fields in grouped(kind):
        group = parser.add_argument_group(title)
        for field in fields:
            _add(group, field, hints[field.name])
    return parser


def _add(parser: argparse._ArgumentGroup, field: dataclasses.Field[Any], hint: Any) -> None:
    flag = "--" + field.name.replace("_", "-")
    text = field.metadata["help"]
    default = field.default
    if default is True:
        text += " On by default."
    elif default not in (None, (), "", False):
        text += f" Default: {default:g}." if isinstance(default, float) else f" Default: {default}."
    text = text.replace("%", "%%")
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    wanted = next(kind for kind in kinds if kind is not type(None))
    if wanted is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        return
    choices = field.metadata["choices"] or None
    if typing.get_origin(wanted) is tuple:
        each = typing.get_args(wanted)[0]
        metavar = each.__name__.upper()
        parser.add_argument(flag, type=each, action="append", metavar=metavar, help=text)
        return
    metavar = None if choices else wanted.__name__.upper()
    parser.add_argument(flag, type=wanted, choices=choices, metavar=metavar, help=text)


def read(kind: type[C], parser: Parser, argv: list[str]) -> Resolved[C]:
    """The options of a command line."""
    return merge(kind, vars(parser.parse_strict(argv)))


def merge(kind: type[C], flags: dict[str, Any]) -> Resolved[C]:
    """Defaults, then the configuration file, then the environment, then flags."""
    sources: list[tuple[str, dict[str, Any]]] = []
    config = flags.get("config")
    if config is not None:
        sources.append((f"file {config}", load_file(Path(config))))
    known = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for option, variable in _VARIABLES.items():
        if option in known and env.get(variable):
            sources.append((variable, {option: env.get(variable)}))
    given = {name: value for name, value in flags.items() if name != "config"}
    sources.append(("flag", given))
    return resolve(kind, sources)


_TABLE = "It holds options, such as `port: 30010` in YAML; `sglang config show` lists all."


def load_file(path: Path) -> dict[str, Any]:
    """The options in a YAML, TOML or JSON file, told apart by the ending of its name."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        hint = "Check the path that --config gives; without a file every option has its default."
        raise ConfigError(f"Cannot read {path}: {reason}.", hint=hint) from None
    try:
        values = _parse(path.suffix.lower(), text)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} cannot be parsed: {reason}.", hint=_TABLE) from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{path} must hold a table of options.", hint=_TABLE)
    return values


def _parse(suffix: str, text: str) -> Any:
    if suffix in (".yaml", ".yml"):
        import yaml

        try:
            return yaml.safe_load(text)
        except yaml.MarkedYAMLError as error:
            assert error.problem_mark is not None
            line = error.problem_mark.line + 1
            raise ValueError(f"line {line}: {error.problem}") from None
        except yaml.YAMLError as error:
            raise ValueError(str(error)) from None
    if suffix == ".toml":
        import tomllib

        return tomllib.loads(text)
    if suffix == ".json":
        import json

        return json.loads(text)
    raise ConfigError(
        f"Unknown kind of configuration file {suffix!r}.",
        hint="Use .yaml, .toml or .json.",
    )
