"""The `sgl-omni` command: usage, configuration, refusals before anything heavy starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sgl_diffusion.cli.omni import main


def said(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(list(argv))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "--help")[:2] == (0, said(capsys)[1])
    code, out, _ = said(capsys, "--version")
    assert code == 0 and out.startswith("sgl-omni (sgl_diffusion) ")
    code, _, err = said(capsys, "serv")
    assert code == 2 and "serve" in err


def test_a_file_may_name_the_model_and_flags_win(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "omni.yaml"
    file.write_text("model_path: a/b\nprecision: bf16\nmax_batch_rows: 4\nport: 9000\n")
    show = ("config", "show", "--origin", "--config", str(file), "--model-path", "c/d")
    code, out, _ = said(capsys, *show)
    lines = out.splitlines()
    assert code == 0 and "model_path = 'c/d'  (flag)" in lines
    assert (
        f"precision = 'bf16'  (file {file})" in lines and "host = '127.0.0.1'  (default)" in lines
    )
    _, plain, _ = said(capsys, *(word for word in show if word != "--origin"))
    assert "port = 9000" in plain.splitlines() and "(flag)" not in plain


@pytest.mark.parametrize(
    ("text", "word"),
    [("model_pth: x", "model-path"), ("port: many", "port must be int"), ("- a", "table")],
)
def test_files_that_are_wrong(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, word: str
) -> None:
    file = tmp_path / "omni.yaml"
    file.write_text(text)
    code, _, err = said(capsys, "config", "show", "--config", str(file))
    assert code == 2 and word in err


def test_serve_wants_a_model_and_a_key_for_the_world(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, _, err = said(capsys, "serve")
    assert code == 2 and "--model-path" in err
    code, _, err = said(capsys, "serve", "--model-path", str(tmp_path / "nothing"))
    assert code == 4
    (tmp_path / "config.json").write_text("{}")
    code, _, err = said(capsys, "serve", "--model-path", str(tmp_path), "--host", "0.0.0.0")
    assert code == 2 and "--insecure-no-auth" in err


def test_help_is_light() -> None:
    check = (
        "from sgl_diffusion.cli.omni import main\nimport sys\n"
        "try: main(['serve', '--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'fastapi', 'numpy', 'uvicorn', 'av') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]" and "--model-path" in done.stdout
