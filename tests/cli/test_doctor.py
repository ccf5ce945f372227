"""`sglang doctor` on this machine, in environments that are really broken, and its judgements."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sgl_diffusion.base.config import ServeOptions
from sgl_diffusion.cli import doctor
from sgl_diffusion.cli.checks import compute, probe, software, storage
from sgl_diffusion.cli.checks.probe import Probed
from tests.cli.test_commands import no_rights
from tests.loader.tiny_hub import TinyHub, serving

ROOT = Path(__file__).parents[2]
Checks = dict[str, dict[str, str]]

GPU = {"name": "H100", "capability": [9, 0], "free": 70 * 2**30, "total": 80 * 2**30}
HEALTHY: dict[str, dict[str, Any]] = {
    "torch": {"version": "2.13.0", "cuda": None, "gpus": []},
    "native": {"absent": "", "path": "/x.so", "isa": "avx2", "cuda": False},
    "triton": {"version": "3.6.0"},
    "codecs": {"version": "18", "video": True, "silent": []},
    "memory": {"free": 8 * 2**30},
    "threads": {"files": ["/lib/libgomp.so.1"]},
}


def probed(**changes: dict[str, Any]) -> Probed:
    return Probed({name: {**facts, **changes.get(name, {})} for name, facts in HEALTHY.items()})


def run(
    *args: str, before: Callable[[], None] | None = None, **environment: str
) -> tuple[int, Checks]:
    done = subprocess.run(
        [sys.executable, "-m", "sgl_diffusion.cli", "doctor", "--json", *args],
        capture_output=True,
        text=True,
        timeout=200,
        preexec_fn=before,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **environment},
    )
    assert "Traceback" not in done.stderr, done.stderr
    found = json.loads(done.stdout)
    assert found["ok"] == (done.returncode == 0)
    return done.returncode, {check["name"]: check for check in found["checks"]}


def failing(checks: Checks) -> set[str]:
    return {name for name, check in checks.items() if check["status"] == "failed"}


def another_openmp(folder: Path) -> str:
    """A copy of torch's runtime with a name of its own, or the loader would take it for the same;
    "" where torch brings none."""
    import torch

    bundled = Path(torch.__file__).parent / "lib" / "libgomp.so.1"
    if not bundled.exists():
        return ""
    copy = folder / "libgomp-second.so"
    copy.write_bytes(bundled.read_bytes().replace(b"libgomp.so.1\0", b"libgomp.so.9\0"))
    return str(copy)


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def closed(tmp_path: Path) -> Path:
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o500)
    return folder


def test_a_machine_that_works(tmp_path: Path) -> None:
    status, checks = run("--data-dir", str(tmp_path), "--port", "0", "--min-free-gb", "0")
    assert status == 0 and not failing(checks)
    for name in ("python", "packages", "torch", "native library", "codecs", "data folder", "port"):
        assert checks[name]["status"] == "ok", checks[name]
    assert str(tmp_path) in checks["data folder"]["found"]
    assert "OpenMP" in checks["threads"]["found"]


def test_everything_that_can_be_broken_at_once(tmp_path: Path, taken: int, closed: Path) -> None:
    """A library of garbage, a broken PyAV, a second OpenMP, a port that is taken, a folder that
    may not be written, a file with a wrong option: each is named, with its own way out."""
    (tmp_path / "garbage.so").write_bytes(b"\x7fELF garbage")
    (tmp_path / "broken" / "av").mkdir(parents=True)
    (tmp_path / "broken" / "av" / "__init__.py").write_text("raise ImportError('libav is gone')")
    (tmp_path / "server.yaml").write_text("prot: 31000\n")
    second = another_openmp(tmp_path)
    status, checks = run(
        "--data-dir", str(closed / "data"), "--port", str(taken),
        "--config", str(tmp_path / "server.yaml"),
        before=no_rights,
        PYTHONPATH=f"{tmp_path / 'broken'}:{ROOT}",
        SGLD_LIBRARY=str(tmp_path / "garbage.so"),
        LD_PRELOAD=second,
    )  # fmt: skip
    assert status == 3
    assert failing(checks) == {"native library", "codecs", "data folder", "port", "options"}
    assert "garbage.so" in checks["native library"]["found"]
    assert "SGLD_LIBRARY" in checks["native library"]["fix"]
    assert "libav is gone" in checks["codecs"]["found"]
    assert "Permission denied" in checks["data folder"]["found"]
    assert f"process {os.getpid()}" in checks["port"]["found"]
    assert f"--port {taken + 1}" in checks["port"]["fix"]
    assert "'prot'" in checks["options"]["found"] and "'port'" in checks["options"]["fix"]
    if second:
        assert checks["threads"]["status"] == "warning"
        assert "2 OpenMP libraries" in checks["threads"]["found"]


@pytest.mark.parametrize(
    ("code", "word"),
    [
        ("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')", "not installed"),
        ("raise OSError('libtorch_cpu.so: cannot open shared object file')", "libtorch_cpu.so"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "killed by SIGILL"),
    ],
)
def test_a_torch_that_does_not_load(tmp_path: Path, code: str, word: str) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(code)
    status, checks = run(
        "--data-dir", str(tmp_path / "data"), "--port", "0",
        PYTHONPATH=f"{tmp_path}:{ROOT}", HF_HUB_OFFLINE="perhaps",
    )  # fmt: skip
    assert status == 3 and {"torch", "environment"} <= failing(checks)
    assert word in checks["torch"]["found"] and "torch" in checks["torch"]["fix"]
    assert checks["native library"]["fix"] == "Mend torch first."
    assert "HF_HUB_OFFLINE='perhaps'" in checks["environment"]["found"]
    assert "hub" not in checks and checks["port"]["status"] == "ok"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Without the process that loads torch; the flags of a machine that works."""
    monkeypatch.setattr(probe, "run", probed)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    return ["--data-dir", str(tmp_path), "--port", "0", "--min-free-gb", "0"]


def test_lines_for_a_person(
    quick: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert doctor.main([*quick, "--min-free-gb", "1e9"]) == 3
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith(" ok, 0 with a warning, 1 failed")
    (place,) = (at for at, line in enumerate(lines) if line.startswith("disk"))
    assert "FAILED" in lines[place] and "-> Make room, or lower --min-free-gb." in lines[place + 1]


@pytest.mark.parametrize(
    ("flags", "name", "word"),
    [
        (["--host", "0.0.0.0"], "port", "without a key"),
        (["--host", "no.such.name.invalid", "--insecure-no-auth"], "port", "no address"),
        (["--api-key-file", "/nothing"], "options", "/nothing"),
        (["--model-path", "/no/such/model"], "options", "/no/such/model"),
        (["--cors-origins", "x"], "options", "not an origin"),
        (["--config", "/nothing.yaml"], "options", "/nothing.yaml"),
        (["--device", "cuda"], "gpu", "no NVIDIA driver"),
        (["--database-url", "postgresql://127.0.0.1:1/x"], "database", ""),
    ],
)
def test_what_serve_would_refuse(
    quick: list[str], capsys: pytest.CaptureFixture[str], flags: list[str], name: str, word: str
) -> None:
    assert doctor.main([*quick, *flags, "--json"]) == 3
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert failing(checks) == {name}
    assert word in checks[name]["found"] and checks[name]["fix"]


def test_a_folder_that_takes_no_byte(tmp_path: Path) -> None:
    """As on a full disk: a new file is possible, a line in it is not."""
    _, hard = before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        found = storage.data(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert found.status == "warning" and "cannot be used: File too large" in found.found
    assert "--data-dir" in found.fix and storage.data(tmp_path).status == "ok"


def test_shared_memory_counts_for_several_ranks(
    quick: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def names(*flags: str) -> set[str]:
        doctor.main([*quick, "--json", *flags])
        return {check["name"] for check in json.loads(capsys.readouterr().out)["checks"]}

    assert "shared memory" not in names() and "shared memory" in names("--num-gpus", "2")
    nothing = storage.shared_memory(tmp_path / "none")
    assert nothing.status == "warning" and "--shm-size" in nothing.fix


def test_a_server_that_runs_here_is_only_a_warning(
    quick: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from sgl_diffusion.orchestrator import datalock

    held = datalock.lock(tmp_path)
    try:
        assert doctor.main([*quick, "--json"]) == 0
    finally:
        os.close(held)
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert f"process {os.getpid()}" in checks["data folder"]["found"]


def test_the_hub_is_asked(
    quick: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with serving(TinyHub({})) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        doctor.main([*quick, "--json"])
        there = json.loads(capsys.readouterr().out)["checks"][-1]
    doctor.main([*quick, "--json"])
    gone = json.loads(capsys.readouterr().out)["checks"][-1]
    assert there["status"] == "ok" and there["found"] == f"{hub.url} answers, without a token"
    assert gone["status"] == "warning" and "cannot be reached" in gone["found"]


@pytest.mark.parametrize(
    ("facts", "status", "word"),
    [
        ({"torch": {"gpus": [GPU]}}, "ok", "H100 (sm_90, 70.0 of 80.0 GiB free)"),
        ({"torch": {"gpus": [{**GPU, "capability": [7, 5]}]}}, "warning", "sm_75"),
        ({}, "warning", "driver 535.1, but this torch is for CPUs only"),
        ({"torch": {"cuda": "13.0"}}, "warning", "torch for CUDA 13.0 finds no GPU"),
    ],
)
def test_gpus(tmp_path: Path, facts: dict[str, Any], status: str, word: str) -> None:
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX Module  535.1  date\n")
    check = compute.gpu(probed(**facts), "auto", tmp_path / "version")
    assert check.status == status and word in check.found
    wanted = compute.gpu(probed(**facts), "cuda", tmp_path / "version")
    assert (wanted.status == "failed") == ("gpus" not in facts.get("torch", {}))


@pytest.mark.parametrize(
    ("judge", "facts", "status"),
    [
        (compute.torch, {"torch": {"version": "2.9.1"}}, "failed"),
        (compute.native, {"native": {"absent": "it is not built", "exists": False}}, "warning"),
        (compute.native, {"native": {"absent": "it cannot load", "exists": True}}, "failed"),
        (compute.native, {"torch": {"gpus": [GPU]}}, "warning"),
        (compute.triton, {"torch": {"gpus": [GPU]}, "triton": {"version": None}}, "warning"),
        (compute.triton, {"triton": {"version": None}}, "ok"),
        (compute.codecs, {"codecs": {"video": False}}, "failed"),
        (compute.codecs, {"codecs": {"silent": ["opus"]}}, "warning"),
        (compute.memory, {"memory": {"free": 2**30}}, "warning"),
    ],
)
def test_judgements(judge: Callable[[Probed], Any], facts: dict[str, Any], status: str) -> None:
    assert judge(probed()).status == "ok"
    check = judge(probed(**facts))
    assert check.status == status and bool(check.fix) == (status != "ok")


def test_limits_and_versions() -> None:
    assert compute.open_files((4096, 4096), ServeOptions().max_connections).status == "ok"
    assert "ulimit -n 768" in compute.open_files((256, 4096), 512).fix
    assert software.python((3, 10, 9)).status == "failed"
    assert software.sqlite((3, 34, 0)).status == "failed"
    assert software.clock(0.0).status == "warning"
    assert software.packages("no-such-distribution").found.endswith(str(ROOT))
    wrong = software.packages("pytest")
    assert wrong.status == "ok" and "that pytest" in wrong.found


def test_a_probe_that_hangs_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    found = probe.run(2.0)
    assert not found.facts
    assert set(found.broken.values()) <= {"it did not answer within 2 s"}  # none if it never began
