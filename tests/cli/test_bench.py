"""`sglang bench kernels` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sgl_diffusion.bench.names import SIZES
from sgl_diffusion.cli import bench
from sgl_diffusion.cli.args import UsageError
from tests.cli.test_commands import sglang


def test_the_help_names_every_op_and_loads_no_torch() -> None:
    done = sglang("bench", "kernels", "--help", PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0 and all(op in done.stdout for op in SIZES)
    assert " torch\n" not in done.stderr and "sgl_diffusion.bench.names" in done.stderr
    assert "kernels" in sglang("bench", "--help").stdout
    assert sglang("bench").returncode == 2


def test_one_json_document_a_file_and_a_table(tmp_path: Path) -> None:
    saved, trace = tmp_path / "result.json", tmp_path / "trace.json"
    options = ["--op", "lora_apply", "--shapes", "8x32x48x4", "--repeats", "1", "--threads", "1"]
    files = ["--save", str(saved), "--profile", str(trace)]
    done = sglang("bench", "kernels", *options, *files, "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record == json.loads(saved.read_text()) and json.loads(trace.read_text())["traceEvents"]
    (row,) = record["rows"]
    assert row["op"] == "lora_apply" and row["shape"] == "8x32x48x4" and row["dtype"] == "bf16"
    assert record["machine"]["threads"] == 1


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["kernel"], "bench has no 'kernel'"),
        (["kernels", "--op", "softmax"], "softmax"),
        (["kernels", "--shapes", "4x"], "cannot be read"),
        (["kernels", "--repeats", "0"], "at least 1"),
        (["kernels", "--save", "/nowhere/x.json"], "no folder /nowhere"),
        (["kernels", "--quik"], "no option --quik"),
    ],
)
def test_a_wrong_command_line_is_an_error(argv: list[str], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        bench.main(argv)
