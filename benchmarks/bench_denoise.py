"""One denoise step through the engine beside diffusers, eager and compiled, with random weights.

    python benchmarks/bench_denoise.py [--case NAME] [--busy] [--profile FILE] [--save]

Every step is forward passes, guidance and the solver's update on the blocks of a real model; the
peers run in turns in one process. A few blocks stand for all: what a step does only once (diffusers
embeds the text and makes its keys in every step) is measured without blocks and taken off, and the
ratios and bars are those of the blocks. Stages come from the profiler, FLOP from the shapes; the
limit is what the ratio would be if only the products took time, at the rate of a large one. --busy
counts processor time, for one thread beside other processes. On a GPU the cases are larger and the
attention of every peer is named; `gpu_check.py denoise` runs that.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import harness
from benchmarks.denoise_cases import CASES, CPU_CASES, Case, Step, relative
from benchmarks.denoise_stages import flop, stages
from sgl_diffusion.bench import machine
from sgl_diffusion.bench.timing import Clock, keep_freed_memory
from sgl_diffusion.bench.trace import Trace
from sgl_diffusion.engine.lora.rows import RowAdapters

REPEATS = 5
STATE = Path(__file__).parents[1] / "build" / "gpu-check" / "denoise.json"
OURS, EAGER, COMPILE, MATMUL = "ours", "diffusers", "diffusers compile", "matmul"

Row = dict[str, Any]
Works = dict[str, Callable[[], Any]]


def denoise(
    cases: tuple[Case, ...] = CASES, device: str = "cuda", state: Path | None = STATE
) -> list[Row]:
    """Rows G15 to G19 and G21. A case that is done is kept in `state`: an interrupted run goes on
    there."""
    done: dict[str, list[Row]] = {}
    if state is not None and state.exists():
        done = json.loads(state.read_text())
    for case in cases:
        if case.name in done:
            continue
        done[case.name] = case_rows(case, Clock(device, REPEATS, 0.0))
        if state is not None:
            state.parent.mkdir(parents=True, exist_ok=True)
            state.write_text(json.dumps(done))
    if state is not None:
        state.unlink(missing_ok=True)
    return [row for case in cases for row in done[case.name]]


def case_rows(
    case: Case, clock: Clock, *, compiled: bool = True, trace: Trace | None = None
) -> list[Row]:
    """Milliseconds a step by everyone, how far apart the latents are, and where our time goes."""
    torch._dynamo.reset()
    device = torch.device(clock.device)
    # On a CPU without bf16 instructions the small cases of the tests run, in fp32.
    dtype = torch.bfloat16 if device.type == "cuda" or case in CPU_CASES else torch.float32
    step = Step(case, device, dtype)
    with torch.inference_mode():
        return _rows(step, _works(step, compiled), clock, trace)


def _works(step: Step, compiled: bool) -> Works:
    def ours(backend: str, named: bool = False) -> Any:
        step.attend(backend)
        return step.ours(named=named)

    if step.device.type == "cpu":
        works: Works = {OURS: lambda: ours("auto"), EAGER: step.theirs}
        return works | ({COMPILE: lambda: step.theirs(compiled=True)} if compiled else {})
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def cudnn(compiled: bool) -> Any:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return step.theirs(compiled=compiled)

    return {
        "ours native": lambda: ours("native", named=True),
        "ours triton": lambda: ours("triton", named=True),
        "ours sdpa": lambda: ours("sdpa", named=True),
        "ours automatic": lambda: ours("auto"),
        EAGER: step.theirs,
        "diffusers cudnn": lambda: cudnn(False),
        "diffusers cudnn compile": lambda: cudnn(True),
    }


def _rows(step: Step, works: Works, clock: Clock, trace: Trace | None) -> list[Row]:
    case, first = step.case, next(iter(works))
    want = step.theirs()
    apart = {name: relative(work(), want) for name, work in works.items()}
    product, amount = machine.product(clock.device, step.dtype)
    seconds = clock.compare({**works, MATMUL: product})
    rate = amount / seconds.pop(MATMUL)
    with step.without_blocks():
        ends = clock.compare(works)
    blocks = {name: seconds[name] - ends[name] for name in works}
    linear, attention = flop(step.model, works[first])
    spent = stages(step.model, works[first], step.device)
    shape = f"{case.name}, {case.tokens} tokens, {case.whole}"
    rows: list[Row] = []
    for name in works:
        row: Row = {"op": "denoise step", "shape": shape, "by": name, "ms": seconds[name] * 1e3}
        row |= {"blocks_ms": blocks[name] * 1e3, "apart": apart[name]}
        row["vs"] = {other: blocks[other] / blocks[name] for other in works if other != name}
        rows.append(row)
    products = sum(value for stage, value in spent.items() if "product" in stage)
    rows[0] |= {
        "TFLOP/s": (linear + attention) / seconds[first] / 1e12,
        "share": (linear + attention) / seconds[first] / rate,
        "products": products / sum(spent.values()),
        "limits": {other: blocks[other] * rate / linear for other in works if other != first},
        "bars": _bars(case, rows[0]["vs"]),
        "stages_ms": spent,
    }
    others = {name: stages(step.peer, works[name], step.device) for name in works if name == EAGER}
    for row in rows:
        if row["by"] in others:
            row["stages_ms"] = others[row["by"]]
    rows.append(_engine_row(step, shape, clock))
    if trace is not None:
        trace.add(shape, works)
    return rows


def _bars(case: Case, ratios: dict[str, float]) -> dict[str, Row]:
    bars = {EAGER: case.eager, COMPILE: case.compiled}
    return {
        peer: {"must": bar.must, "aim": bar.aim, "met": ratios[peer] >= bar.must}
        for peer, bar in bars.items()
        if bar is not None and peer in ratios
    }


def _engine_row(step: Step, shape: str, clock: Clock) -> Row:
    """What the engine adds to a forward pass, and what adapters cost that nobody asked for."""
    result = step.velocity_like()
    adapters = RowAdapters(step.device)

    def off() -> None:
        with adapters.of([None]):
            pass

    seconds = clock.compare({"engine": lambda: step.ours(velocity=lambda *_: result), "lora": off})
    row: Row = {"op": "around the model", "shape": shape, "by": "engine"}
    return row | {"ms": seconds["engine"] * 1e3, "adapters off ms": seconds["lora"] * 1e3}


# ---- on a terminal ----


def lines(record: dict[str, Any]) -> list[str]:
    """The machine, then of every case its rows and the stages of ours beside diffusers'."""
    out = [", ".join(f"{key} {value}" for key, value in record["machine"].items())]
    for row in record["rows"]:
        if row["op"] != "denoise step":
            engine, off = row["ms"], row["adapters off ms"]
            out.append(f"  the engine around the model {engine:.2f} ms, adapters off {off:.4f} ms")
            continue
        if "bars" in row:
            out += ["", row["shape"]]
        ratios = " ".join(f"{other} {ratio:.2f}x" for other, ratio in row["vs"].items())
        out.append(f"  {row['by']:24}{row['ms']:10.1f} ms  {ratios}  apart {row['apart']:.1e}")
        for peer, bar in row.get("bars", {}).items():
            met = "met" if bar["met"] else "missed"
            out.append(f"    over {peer}: bar {bar['must']}x, aim {bar['aim']}x: {met}")
        if "bars" in row:
            limits = " ".join(f"{peer} {ratio:.2f}x" for peer, ratio in row["limits"].items())
            out.append(
                f"    {row['TFLOP/s']:.2f} TFLOP/s, {row['share']:.0%} of a large product; "
                f"{row['products']:.0%} in products; only products: {limits}"
            )
        whole = sum(row.get("stages_ms", {}).values())
        for stage, spent in row.get("stages_ms", {}).items():
            if spent >= 0.001 * whole:
                out.append(f"    {stage:28}{spent:10.1f} ms  {spent / whole:6.1%}")
    return out


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--case", action="append", help="only cases whose name has this in it")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--no-compile", action="store_true", help="without the compiled peer")
    parser.add_argument("--busy", action="store_true", help="processor time of one thread")
    parser.add_argument("--profile", type=Path, help="write a Chrome trace of a step of everyone")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/*.json")
    given = parser.parse_args()
    if given.threads or given.busy:
        torch.set_num_threads(1 if given.busy else given.threads)
    keep_freed_memory()
    clock = Clock(given.device, given.repeats, 0.0, processor=given.busy)
    trace = Trace(given.profile, given.device) if given.profile else None
    cases = CASES if given.device == "cuda" else CPU_CASES
    rows = []
    for case in cases:
        if given.case is None or any(name.lower() in case.name.lower() for name in given.case):
            print(case.name, file=sys.stderr, flush=True)
            rows += case_rows(case, clock, compiled=not given.no_compile, trace=trace)
    facts = harness.machine(given.device) | {"other_cores": round(clock.other_cores, 2)}
    facts["time"] = "of the processor" if given.busy else "of the clock"
    record = {"benchmark": "denoise", "machine": facts, "rows": rows}
    print("\n".join(lines(record)))
    if trace is not None:
        trace.save()
        print(f"wrote {trace.path}: open it in ui.perfetto.dev", file=sys.stderr)
    harness.finish(record, given.save, given.device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
