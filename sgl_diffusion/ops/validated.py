"""Which GPU implementations have been checked on which architecture, by which result file.

A GPU implementation without a row here is never picked automatically; naming it in `SGLD_OPS` still
runs it. A row is added together with the result file that the GPU check wrote for it under
`benchmarks/results/`.
"""

from __future__ import annotations

# (op, implementation, architecture) -> result file
VALIDATED: dict[tuple[str, str, str], str] = {}


def result_file(op: str, implementation: str, arch: str) -> str:
    """The result file of an implementation on an architecture ("sm_90"), or ""."""
    return VALIDATED.get((op, implementation, arch), "")
