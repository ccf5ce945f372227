"""`sglang bench`: every op beside its peers on this machine; pictures with and without."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from sgl_diffusion.bench.names import DEVICES, DTYPES, SIZES
from sgl_diffusion.cli import quality
from sgl_diffusion.cli.args import Parser, UsageError

HELP = """usage: sglang bench kernels|quality [options]

  kernels   time every op beside torch's own ways to compute it
  quality   compare pictures with and without quantisation, reused steps or tiles
"""


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0 if argv else 2
    if argv[0] == "quality":
        return quality.main(argv[1:])
    if argv[0] != "kernels":
        raise UsageError(f"sglang bench has no {argv[0]!r}.", hint="Known: kernels, quality.")
    return kernels(argv[1:])


def parser() -> Parser:
    made = Parser(
        prog="sglang bench kernels",
        description="Time the ops beside their peers, in turns in one process, and show how far "
        "each is from what a copy or a matrix product reaches on this machine.",
    )
    shapes = "; ".join(f"{op} {'x'.join(sizes)}" for op, sizes in SIZES.items())
    made.add_argument(
        "--op", action="append", choices=list(SIZES), help="Only this op; may be repeated."
    )
    made.add_argument("--device", choices=DEVICES, default="cpu", help="Default: cpu.")
    made.add_argument("--dtype", choices=list(DTYPES), help="Default: what each bar is set for.")
    made.add_argument(
        "--shapes", metavar="SHAPE,...", help=f"Other shapes than the table's, of one op: {shapes}."
    )
    made.add_argument("--quick", action="store_true", help="One shape of each op, fewer repeats.")
    made.add_argument("--threads", type=int, help="CPU threads. Default: torch's own choice.")
    made.add_argument("--repeats", type=int, help="Turns of which the median is taken.")
    made.add_argument("--json", action="store_true", help="Print one JSON document, no table.")
    made.add_argument("--profile", metavar="FILE", type=Path, help="Write a Perfetto trace.")
    made.add_argument("--save", metavar="FILE", type=Path, help="Write the JSON document.")
    return made


def kernels(argv: list[str]) -> int:
    given = parser().parse_strict(argv)
    for name in ("threads", "repeats"):
        if getattr(given, name) is not None and getattr(given, name) < 1:
            raise UsageError(f"--{name} must be at least 1.")
    for name in ("profile", "save"):
        path: Path | None = getattr(given, name)
        if path is not None and not path.absolute().parent.is_dir():
            raise UsageError(f"--{name}: there is no folder {path.absolute().parent}.")
    shapes = _shapes(given.shapes) if given.shapes else ()

    from sgl_diffusion.bench import run, table

    options = run.Options(
        ops=tuple(given.op or ()),
        shapes=shapes,
        dtype=given.dtype or "",
        device=given.device,
        threads=given.threads or 0,
        repeats=given.repeats or 0,
        quick=given.quick,
        profile=given.profile,
    )
    record = run.kernels(options, lambda line: print(line, file=sys.stderr, flush=True))
    if given.save:
        given.save.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record) if given.json else "\n".join(table.lines(record)))
    return 0


def _shapes(text: str) -> tuple[tuple[int, ...], ...]:
    try:
        return tuple(tuple(int(size) for size in part.split("x")) for part in text.split(","))
    except ValueError:
        raise UsageError(
            f"--shapes {text!r} cannot be read.", hint="Write sizes as 4096x1536,1024x3072."
        ) from None
