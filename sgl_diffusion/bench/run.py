"""Runs cases and makes their rows: one for an op, a shape, a dtype and a peer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sgl_diffusion import ops
from sgl_diffusion.base.errors import ConfigError
from sgl_diffusion.bench import machine, matrix, memory_bound
from sgl_diffusion.bench.case import BYTES, COMPILE, Case, Place, Spec
from sgl_diffusion.bench.names import DTYPES, SIZES
from sgl_diffusion.bench.timing import REPEATS, SPAN, Clock, Work, keep_freed_memory
from sgl_diffusion.bench.trace import Trace

SPECS = (*matrix.SPECS[:2], *memory_bound.SPECS, *matrix.SPECS[2:])
QUICK_REPEATS, QUICK_SPAN = 5, 0.01
COPY, MATMUL = "copy", "matmul"
SLACK = 1.1  # our error may be this many times that of the peer

Row = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What to measure. Without ops, shapes and dtype: the whole table."""

    ops: tuple[str, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()
    dtype: str = ""
    device: str = "cpu"
    threads: int = 0
    repeats: int = 0
    quick: bool = False
    profile: Path | None = None


@dataclass(frozen=True)
class Planned:
    spec: Spec
    sizes: tuple[int, ...]
    dtype: str

    @property
    def shape(self) -> str:
        return "x".join(map(str, self.sizes))

    def build(self, device: str) -> Case:
        return self.spec.build(Place(device, getattr(torch, DTYPES[self.dtype])), self.sizes)


def plan(options: Options) -> list[Planned]:
    """The cases that the options ask for, in the order of the table."""
    if options.shapes and len(options.ops) != 1:
        raise ConfigError("Shapes need the one op that they are of.", hint="Name it with --op.")
    for sizes in options.shapes:
        wanted = SIZES[options.ops[0]]
        if len(sizes) != len(wanted) or min(sizes) < 1:
            raise ConfigError(
                f"{'x'.join(map(str, sizes))} is no shape of {options.ops[0]}.",
                hint=f"Write {'x'.join(wanted)}.",
            )
    planned = []
    for op in options.ops or SIZES:
        specs = [spec for spec in SPECS if spec.op == op]
        if options.dtype:
            fit = [spec for spec in specs if options.dtype in spec.dtypes]
            specs = fit or specs[:1]
        elif options.shapes:
            specs = specs[:1]
        for spec in specs:
            shapes = options.shapes or (spec.shapes[:1] if options.quick else spec.shapes)
            for dtype in (options.dtype,) if options.dtype else spec.dtypes:
                planned += [Planned(spec, sizes, dtype) for sizes in shapes]
    return planned


def kernels(options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure; returns {"benchmark", "machine", "limits", "rows"}. `say` hears of the progress."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("torch sees no GPU.", hint="Use --device cpu.")
    planned = plan(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    keep_freed_memory()
    torch.manual_seed(0)
    repeats = options.repeats or (QUICK_REPEATS if options.quick else REPEATS)
    clock = Clock(options.device, repeats, QUICK_SPAN if options.quick else SPAN)
    limits: dict[str, float] = {}
    trace = Trace(options.profile, options.device) if options.profile else None
    rows: list[Row] = []
    with torch.inference_mode():
        for number, case in enumerate(planned, start=1):
            say(f"{number}/{len(planned)} {case.spec.op} {case.shape} {case.dtype}")
            rows += measure(case, clock, trace)
            row = rows[-1]
            name = COPY if row["unit"] == BYTES else f"{MATMUL} {row['dtype']}"
            name = f"{name} {row['unit']}"
            limits[name] = max(limits.get(name, 0.0), row["limit"])
    if trace is not None:
        trace.save()
        say(f"wrote {trace.path}: open it in ui.perfetto.dev")
    facts = machine.facts(options.device)
    facts["other_cores"] = round(max(0.0, clock.other_cores), 2)
    return {"benchmark": "kernels", "machine": facts, "limits": limits, "rows": rows}


def measure(planned: Planned, clock: Clock, trace: Trace | None = None) -> list[Row]:
    """The rows of one case, one a peer."""
    torch._dynamo.reset()
    case = planned.build(clock.device)
    implementation = case.implementation or _chosen(planned.spec.op, case.ours)
    missing = _cannot_compile(case)
    limit_name, limit_work, limit_amount = _limit(case, planned, clock.device)
    works = {"ours": case.ours, limit_name: limit_work, **case.peers}
    seconds = clock.compare(works)
    if trace is not None:
        trace.add(f"{planned.spec.op} {planned.shape} {planned.dtype}", works)
    if case.after_copy:
        seconds["ours"] -= seconds[COPY]
    rate = case.amount / seconds["ours"] / 1e9
    limit = limit_amount / seconds[limit_name] / 1e9
    rows = []
    for peer in [*case.peers, *missing]:
        bar = case.bars.get(peer)
        ratio = None if peer in missing else seconds[peer] / seconds["ours"]
        row: Row = {
            "op": planned.spec.op,
            "shape": planned.shape,
            "dtype": planned.dtype,
            "implementation": implementation,
            "ms": seconds["ours"] * 1e3,
            "peer": peer,
            "peer_ms": None if ratio is None else seconds[peer] * 1e3,
            "ratio": ratio,
            "rate": rate,
            "unit": case.unit,
            "limit": limit,
            "share": rate / limit,
            "bar": bar.must if bar else None,
            "aim": bar.aim if bar else None,
            "met": ratio >= bar.must if bar and ratio is not None else None,
            "error": case.errors.get("ours"),
            "peer_error": case.errors.get(peer),
            **case.extra,
        }
        rows.append(row)
    return rows


def _limit(case: Case, planned: Planned, device: str) -> tuple[str, Work, float]:
    """What the share is of, measured beside the case: a copy, or torch's product of matrices."""
    if case.unit == BYTES:
        return COPY, machine.copy_of(case.copied), 2.0 * case.copied.nbytes
    work, flop = machine.product(device, getattr(torch, DTYPES[planned.dtype]))
    return MATMUL, work, flop


def _chosen(op: str, work: Work) -> str:
    ops.reset_counts()
    work()
    return next(name for (counted, name) in ops.counts() if counted == op)


def _cannot_compile(case: Case) -> list[str]:
    """Drops the compiled peer where torch.compile does not work, for want of a C++ compiler."""
    if COMPILE in case.peers:
        try:
            case.peers[COMPILE]()
        except Exception:
            del case.peers[COMPILE]
            return [COMPILE]
    return []


def inaccurate(row: Row) -> bool:
    """Whether our error is above what the peer's own allows."""
    if row["dtype"] == "fp32" or row["error"] is None or row["peer_error"] is None:
        return False
    return bool(row["error"] > SLACK * row["peer_error"])
