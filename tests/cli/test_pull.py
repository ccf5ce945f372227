"""`sglang pull` as a user runs it, from a hub on loopback."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.test_commands import ROOT, sglang
from tests.loader.tiny_hub import TinyHub, serving

WEIGHTS = bytes(range(256)) * 4096
PLAIN, HALF = (f"transformer/diffusion_pytorch_model{kind}.safetensors" for kind in ("", ".fp16"))
REPO = {
    "model_index.json": json.dumps({"_class_name": "WanPipeline"}).encode(),
    "transformer/config.json": b"{}",
    PLAIN: WEIGHTS,
    HALF: WEIGHTS[::2],
}


@pytest.fixture
def hub() -> Iterator[TinyHub]:
    with serving(TinyHub({"org/wan-tiny": REPO, "org/gated": REPO})) as running:
        running.gated.add("org/gated")
        yield running


def pull(hub: TinyHub, home: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return sglang("pull", *args, HF_ENDPOINT=hub.url, HF_HOME=str(home), HF_HUB_OFFLINE="0")


def test_what_was_pulled_is_there_for_serve_and_models(hub: TinyHub, tmp_path: Path) -> None:
    done = pull(hub, tmp_path, "org/wan-tiny")
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert (folder / PLAIN).read_bytes() == WEIGHTS and not (folder / HALF).exists()
    assert "checksums of 1 file are right" in done.stderr and "\r" not in done.stderr
    listed = sglang("models", "--json", HF_HOME=str(tmp_path))
    assert json.loads(listed.stdout)["cached"][0]["model"] == "org/wan-tiny"
    hub.requests.clear()
    again = pull(hub, tmp_path, "org/wan-tiny", "--variant", "fp16", "--no-check")
    assert again.returncode == 0 and "checksums" not in again.stderr
    assert (folder / HALF).read_bytes() == WEIGHTS[::2]
    assert not hub.bytes_asked(PLAIN), "what is there is not fetched again"


def test_a_bar_on_a_terminal(hub: TinyHub, tmp_path: Path) -> None:
    here, there = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-m", "sgl_diffusion.cli", "pull", "org/wan-tiny"],
        stdout=subprocess.DEVNULL,
        stderr=there,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path),
            "HF_HUB_OFFLINE": "0",
        },
    )
    os.close(there)
    shown = b""
    while True:
        try:
            shown += os.read(here, 4096)
        except OSError:  # the last one has closed the terminal
            break
    os.close(here)
    assert child.wait(60) == 0, shown
    bars = shown.decode().split("\r\x1b[K")[1:]
    assert "[############################] 1.0 MB of 1.0 MB" in bars[-1]
    assert bars[-1].rstrip().endswith("checksums of 1 file are right")


@pytest.mark.parametrize(
    ("args", "status", "word"),
    [
        (["org/wan-tyni"], 4, "no public repository org/wan-tyni"),
        (["org/gated"], 4, "licence has to be accepted"),
        (["org/wan-tiny", "--revision", "v9"], 4, "no revision v9"),
        (["org/wan-tiny", "--variant", "int4"], 3, "no weights of the variant 'int4'"),
        (["."], 2, "is a folder"),
        ([], 2, "required: MODEL"),
    ],
)
def test_what_cannot_be_pulled(
    hub: TinyHub, tmp_path: Path, args: list[str], status: int, word: str
) -> None:
    done = pull(hub, tmp_path, *args)
    assert done.returncode == status and word in done.stderr and "Traceback" not in done.stderr


def test_damage_is_found_and_mended(hub: TinyHub, tmp_path: Path) -> None:
    folder = Path(pull(hub, tmp_path, "org/wan-tiny").stdout.strip())
    (folder / PLAIN).resolve().write_bytes(WEIGHTS[:-1] + b"x")
    done = pull(hub, tmp_path, "org/wan-tiny")
    assert done.returncode == 3 and f"{PLAIN} arrived damaged" in done.stderr
    assert pull(hub, tmp_path, "org/wan-tiny").returncode == 0
    assert (folder / PLAIN).read_bytes() == WEIGHTS


def test_offline(tmp_path: Path) -> None:
    done = sglang("pull", "org/wan-tiny", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert done.returncode == 2 and "HF_HUB_OFFLINE is set" in done.stderr
