"""`sglang doctor`: whether `sglang serve` with these options can work here, and what to mend."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, TypeVar

from sgl_diffusion import __version__
from sgl_diffusion.base import env
from sgl_diffusion.base.config import ServeOptions
from sgl_diffusion.base.errors import SetupError, SglError
from sgl_diffusion.base.omni import OmniServeOptions
from sgl_diffusion.cli.args import Parser, merge, parser_for
from sgl_diffusion.cli.checks import compute, network, probe, software, storage
from sgl_diffusion.cli.checks.types import Check, ok, refused

Options = TypeVar("Options", ServeOptions, OmniServeOptions)

DESCRIPTION = """Check this machine for `sglang serve`, with the options it would get. Each line
that is not ok says how to mend it; the exit code is 3 if the server would not start or do no work.
"""


def parser() -> Parser:
    return doctor_parser(ServeOptions, "sglang doctor", DESCRIPTION)


def doctor_parser(kind: type, program: str, description: str) -> Parser:
    made = parser_for(kind, program, description)
    made.add_argument(
        "--json", action="store_true", default=argparse.SUPPRESS, help="One JSON object."
    )
    return made


def main(argv: list[str]) -> int:
    return report(vars(parser().parse_strict(argv)), examine)


def report(flags: dict[str, Any], examine: Callable[[dict[str, Any]], Iterator[Check]]) -> int:
    """Make the checks of a program and tell them; returns the exit code."""
    as_json = flags.pop("json", False)
    checks = list(examine(flags)) if as_json else list(_shown(examine(flags)))
    good = all(check.status != "failed" for check in checks)
    if as_json:
        found = {
            "version": __version__,
            "ok": good,
            "checks": [dataclasses.asdict(check) for check in checks],
        }
        print(json.dumps(found, indent=2))
    else:
        count = [sum(check.status == status for check in checks) for status in STATUSES]
        print(f"\n{count[0]} ok, {count[1]} with a warning, {count[2]} failed")
    return 0 if good else SetupError.exit_code


STATUSES = ("ok", "warning", "failed")


def examine(flags: dict[str, Any]) -> Iterator[Check]:
    """Every check, as it is made."""
    variables, options = yield from beginning(ServeOptions, flags, configuration)
    yield from compute.checks(probe.run(), options)
    yield from storage.checks(options)
    yield network.port(options, keys=asks_keys(options))
    if variables.status == "ok":
        yield network.hub()


def beginning(
    kind: type[Options], flags: dict[str, Any], configuration: Callable[[Options], Check]
) -> Generator[Check, None, tuple[Check, Options]]:
    """What both programs check first; returns that of the environment, and the options. A file that
    cannot be read leaves the flags."""
    yield from software.checks()
    variables = environment()
    yield variables
    try:
        options = merge(kind, flags).value
        yield configuration(options)
    except SglError as error:
        yield refused("options", error)
        options = merge(kind, {**flags, "config": None}).value
    return variables, options


def environment() -> Check:
    """Every variable of the table can be read."""
    given = []
    for name, variable in env.TABLE.items():
        try:
            given += [name] if env.get(name) != variable.default else []
        except SglError as error:
            return refused("environment", error)
    return ok("environment", f"set: {', '.join(given)}" if given else "no variable is set")


def configuration(options: ServeOptions) -> Check:
    """What the server reads before it starts: key files, folders, the bucket, the model's path."""
    from sgl_diffusion.loader.hub import local_model
    from sgl_diffusion.server.settings import settings_of

    settings_of(dataclasses.replace(options, data_dir=options.data_dir or ""))
    if options.model_path is None:
        return ok("options", "they can be read; no --model-path: the small model is served")
    there = local_model(options.model_path) is not None
    kind = "a folder" if there else "a name on the hub"
    return ok("options", f"they can be read; {options.model_path} is {kind}")


def asks_keys(options: ServeOptions | OmniServeOptions) -> bool:
    from sgl_diffusion.server.settings import keys_of

    try:
        return keys_of(options, options.host).required
    except SglError:
        return False  # told above


def _shown(checks: Iterable[Check]) -> Iterator[Check]:
    for check in checks:
        mark = {"ok": "ok", "warning": "warning", "failed": "FAILED"}[check.status]
        print(f"{check.name:<15} {mark:<8} {check.found}", flush=True)
        if check.fix:
            print(f"{'':<15} {'':<8} -> {check.fix}", flush=True)
        yield check
