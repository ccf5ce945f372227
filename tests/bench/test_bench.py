"""The cases of every op, their rows, and what is made of them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import harness, kernels_page, kernels_picture, measured_page
from benchmarks.measured_page import PAGE, ROOT
from sgl_diffusion import ops
from sgl_diffusion.base.errors import ConfigError
from sgl_diffusion.bench import run, table
from sgl_diffusion.bench.case import FLOP, Place
from sgl_diffusion.bench.names import SIZES
from sgl_diffusion.bench.timing import Clock

SMALL = {
    "attention": (40, 70, 2, 16),
    "attention_merge": (20, 2, 16),
    "norm_modulate": (20, 64),
    "gate_residual": (20, 64),
    "gate_residual_norm_modulate": (20, 64),
    "qk_norm_rope": (20, 2, 16),
    "gelu_tanh": (20, 64),
    "silu_mul": (20, 64),
    "cfg_combine_step": (4, 3, 5, 7),
    "quant_fp8_rowwise": (20, 64),
    "lora_merge_": (96, 64, 8),
    "lora_unmerge_": (96, 64, 8),
    "lora_apply": (20, 64, 96, 8),
    "linear": (20, 64, 96),
}
# The table of bars: peer, must, aim by op (and rank or head dim), in bf16 unless said.
BARS = {
    ("attention", "bf16", 128): {"sdpa": (3, 4.3)},
    ("attention", "bf16", 64): {"sdpa": (2.5, 3.5)},
    ("attention", "fp32", 128): {"sdpa": (1.3, 2)},
    ("attention", "fp32", 64): {"sdpa": (1.3, 2)},
    ("norm_modulate", "bf16", 0): {"eager": (3.5, 5), "compile": (2, 3)},
    ("gate_residual_norm_modulate", "bf16", 0): {"eager": (3.5, 5), "compile": (1.5, 2)},
    ("qk_norm_rope", "bf16", 0): {"eager": (12, 25), "compile": (5, 10)},
    ("gelu_tanh", "bf16", 0): {"eager": (4, 6), "compile": (4, 5.5)},
    ("silu_mul", "bf16", 0): {"eager": (1.8, 2.3), "compile": (1.3, 1.7)},
    ("lora_merge_", "bf16", 16): {"peft": (5, 10), "addmm": (1.3, 1.8)},
    ("lora_merge_", "bf16", 64): {"peft": (3, 5), "addmm": (1, 1.3)},
    ("lora_merge_", "bf16", 128): {"peft": (3, 5)},
    ("linear", "fp32", 0): {"F.linear": (1.8, 2.2)},
}


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes seconds a case, and its time is not the point here."""
    monkeypatch.setattr(torch, "compile", lambda chain, **_: chain)


def test_every_op_is_measured() -> None:
    assert set(SIZES) | {"qk_norm_rope_"} >= {name for name in ops.__all__ if name in ops.OPS}
    assert {spec.op for spec in run.SPECS} == set(SIZES) == set(SMALL)


def test_the_whole_table_has_the_bars() -> None:
    planned = run.plan(run.Options())
    found = {(one.spec.op, one.dtype) for one in planned}
    assert found == {(op, dtype) for op, dtype, _ in BARS} | {(op, "bf16") for op in SIZES} - {
        ("linear", "bf16")
    }
    shapes = {op: {one.sizes for one in planned if one.spec.op == op} for op in SIZES}
    assert {(4096, 1536), (4096, 3072), (4096, 5120)} == shapes["norm_modulate"]
    assert {heads for _, heads, _ in shapes["qk_norm_rope"]} == {12, 24, 40}
    assert {n for n, m, _, d in shapes["attention"] if n == m} == {1024, 2048, 4096, 8192}
    for (op, dtype, last), peers in BARS.items():
        spec = next(spec for spec in run.SPECS if spec.op == op and dtype in spec.dtypes)
        sizes = SMALL[op]
        if last:
            sizes = (*sizes[:-1], last)
        if op == "attention":
            sizes = (40, 40, *sizes[2:])
        case = run.Planned(spec, sizes, dtype).build("cpu")
        assert {n: (bar.must, bar.aim) for n, bar in case.bars.items()} == peers, (op, last)


@pytest.mark.parametrize("op", SIZES)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_row_of_each_op(op: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.machine, "MATRIX", {"cpu": 64})
    options = run.Options(ops=(op,), shapes=(SMALL[op],), dtype=dtype)
    (planned,) = run.plan(options)
    with torch.inference_mode():
        rows = run.measure(planned, Clock("cpu", repeats=1, span=1e-4))
    assert rows and {row["peer"] for row in rows} >= set(planned.build("cpu").peers)
    for row in rows:
        assert row["op"] == op and row["dtype"] == dtype and row["shape"] == planned.shape
        assert row["peer_ms"] > 0 and row["rate"] != 0 and row["limit"] > 0
        assert row["ratio"] == pytest.approx(row["peer_ms"] / row["ms"])
        assert row["share"] == pytest.approx(row["rate"] / row["limit"])
        assert (row["met"] is None) == (row["bar"] is None)
        if row["error"] is not None:
            assert row["error"] < (1e-2 if dtype == "bf16" else 1e-5), row
        assert not run.inaccurate(row) or dtype == "fp32", row


def test_a_peer_that_cannot_compile_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", lambda chain, **_: broken)
    (planned,) = run.plan(run.Options(ops=("norm_modulate",), shapes=((4, 8),)))
    rows = run.measure(planned, Clock("cpu", repeats=1, span=1e-4))
    assert {row["peer"]: row["ratio"] is None for row in rows} == {"eager": False, "compile": True}
    text = table.lines({"machine": {}, "limits": {}, "rows": rows})
    assert any("no compiler" in line for line in text)


def test_an_impossible_wish_is_an_error() -> None:
    with pytest.raises(ConfigError, match="need the one op"):
        run.plan(run.Options(shapes=((4, 8),)))
    with pytest.raises(ConfigError, match="no shape of attention") as caught:
        run.plan(run.Options(ops=("attention",), shapes=((4, 8),)))
    assert caught.value.hint == "Write queriesxkeysxheadsxhead_dim."
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no GPU"):
            run.kernels(run.Options(device="cuda"), lambda line: None)


def test_the_trace_has_every_work(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    options = run.Options(ops=("lora_apply",), shapes=(SMALL["lora_apply"],), repeats=1)
    record = run.kernels(replace(options, profile=path), lambda line: None)
    assert [row["peer"] for row in record["rows"]] == ["eager"]
    names = {event.get("name", "") for event in json.loads(path.read_text())["traceEvents"]}
    for work in ("ours", "copy", "eager"):
        assert f"lora_apply 20x64x96x8 bf16: {work}" in names


def _record(**changes: object) -> dict[str, object]:
    facts = {"cpu": "a & b", "isa": "avx2", "threads": 2, "torch": "2", "date": "2026-01-01"}
    row = {
        "op": "attention", "shape": "8x8x2x64", "dtype": "bf16", "implementation": "cpu",
        "ms": 1.0, "peer": "sdpa", "peer_ms": 2.0, "ratio": 2.0, "rate": 1.0, "unit": FLOP,
        "limit": 2.0, "share": 0.5, "bar": 2.5, "aim": 3.5, "met": False,
        "error": 1e-3, "peer_error": 1e-3,
    }  # fmt: skip
    return {
        "machine": facts | {"other_cores": 0.0},
        "limits": {"matmul bf16 GFLOP/s": 2.0},
        "rows": [row, row | {"shape": "9x9x2x64", "ratio": 3.0, "met": True}, row | changes],
    }


def test_a_missed_bar_ends_with_its_reason() -> None:
    reasons = kernels_page.reasons("| `attention d64 bf16 over sdpa` | it is hard |\n")
    record = _record()
    lines = table.lines(record, lambda row: kernels_page.reason(row, reasons))
    assert sum(line.endswith("missed  1 GFLOP/s       50%  it is hard") for line in lines) == 2
    assert lines[-1] == "1 of 3 bars are met."
    assert kernels_page.reason(record["rows"][0], {}) == kernels_page.UNKNOWN


def test_an_error_above_the_peers_is_shown() -> None:
    record = _record(error=2e-3)
    assert [line for line in table.lines(record) if line.startswith("error: attention 8x8x2x64")]


def test_the_page_and_the_picture() -> None:
    record = _record(op="silu_mul", bar=None, met=None)
    text = kernels_page.block(record, "x.json")
    assert "| attention d64 bf16 | sdpa | 2.00, 3.00 | 2.5 | 3.5 | missed 1 of 2 | 50% |" in text
    assert "| silu_mul bf16 | sdpa | 2.00 |  |  |  | 50% |" in text
    svg = kernels_picture.picture(record)
    assert "a &amp; b" in svg and "prefers-color-scheme: dark" in svg
    assert len(re.findall(r'<rect class="missed"', svg)) == 1
    assert len(re.findall(r'<rect class="free"', svg)) == 1


def test_the_page_of_this_repository_is_that_of_its_result() -> None:
    page = PAGE.read_text()
    named = re.findall(r"`(benchmarks/results/cpu-[-\d]+-kernels\.json)`", page)
    (source,) = set(named)
    record = json.loads((ROOT / source).read_text())
    assert kernels_page.block(record, source) in page
    assert kernels_picture.PICTURE.read_text() == kernels_picture.picture(record)
    missed = {kernels_page.label(row) for row in record["rows"] if row["met"] is False}
    assert missed <= set(kernels_page.reasons(page)), "a missed bar has no reason"


def test_a_part_of_the_page_is_replaced_between_its_marks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, result = tmp_path / "measured.md", tmp_path / "results" / "a.json"
    page.write_text("before\n<!-- x: begin -->\nold\n<!-- x: end -->\nafter\n")
    monkeypatch.setattr(measured_page, "ROOT", tmp_path)
    monkeypatch.setattr(measured_page, "PAGE", page)
    measured_page.write("x", lambda record, source: f"{record['a']} {source}\n", {"a": 1}, result)
    assert page.read_text() == (
        "before\n<!-- x: begin -->\n1 results/a.json\n<!-- x: end -->\nafter\n"
    )
    with pytest.raises(AssertionError, match="lost its marks"):
        measured_page.write("y", lambda record, source: "", {}, result)


def test_a_record_is_the_last_line_and_kept_if_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    record = {"benchmark": "x", "machine": {"date": "2026-01-02"}, "rows": [1]}
    path = harness.finish(record, save=False)
    assert json.loads(capsys.readouterr().out) == record and not path.exists()
    assert harness.finish(record, save=True, where="h100") == tmp_path / "results" / (
        "h100-2026-01-02-x.json"
    )
    assert json.loads((tmp_path / "results" / "h100-2026-01-02-x.json").read_text()) == record
    assert capsys.readouterr().err == "saved h100-2026-01-02-x.json\n"


def test_a_place_makes_what_it_says() -> None:
    place = Place("cpu", torch.bfloat16)
    assert place.normal(2, 3).dtype == torch.bfloat16 and place.wide(2).dtype == torch.float32
