"""The table of all ops on the CPU with their bars; with --save the page and the picture, too.

    python benchmarks/bench_kernels.py [--threads N] [--save [--busy]]

The cases are those of `sglang bench kernels`. A missed bar ends with its reason, which stands in
docs/measured.md. --save writes benchmarks/results/cpu-<date>-kernels.json, the table in
docs/measured.md and docs/kernels.svg, of a quiet machine only; --busy keeps others and says so.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import harness, kernels_page, kernels_picture
from sgl_diffusion.bench import run, table

QUIET = 0.1  # cores that other processes may use in a run that is kept


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one shape of each op")
    parser.add_argument("--save", action="store_true", help="keep the results")
    parser.add_argument("--busy", action="store_true", help="keep them from a busy machine, too")
    given = parser.parse_args()
    options = run.Options(threads=given.threads, repeats=given.repeats, quick=given.quick)
    record = run.kernels(options, lambda line: print(line, file=sys.stderr, flush=True))
    record["machine"]["commit"] = harness.commit()
    reasons = kernels_page.reasons()
    print("\n".join(table.lines(record, lambda row: kernels_page.reason(row, reasons))))
    others = record["machine"]["other_cores"]
    if given.save and others > QUIET and not given.busy:
        print(f"not saved: other processes used {others} cores", file=sys.stderr)
        return 1
    path = harness.finish(record, given.save)
    if given.save:
        kernels_page.write(record, path)
        kernels_picture.write(record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
