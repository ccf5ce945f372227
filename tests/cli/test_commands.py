"""The commands as a user runs them: a process each, exit codes and texts."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


def no_rights() -> None:
    """Root may write everywhere unless it gives up this right; others never have it."""
    for capability in (1, 2):  # to ignore the permissions of files and of folders
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # drop it from the bounding set


def sglang(
    *args: str, before: Callable[[], None] | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sgl_diffusion.cli", *args],
        capture_output=True,
        text=True,
        timeout=200,
        preexec_fn=before,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        check=False,
    )


@pytest.mark.parametrize(
    "args", [["--help"], ["serve", "--help"], ["generate", "--help"], ["--version"]]
)
def test_help_loads_nothing_heavy(args):
    code = (
        "import sys; from sgl_diffusion.cli.sglang import main\n"
        "try: status = main(sys.argv[1:])\n"
        "except SystemExit as end: status = end.code\n"
        "heavy = {'torch', 'numpy', 'fastapi', 'pydantic', 'uvicorn', 'PIL', 'av', 'asyncio'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "sglang" in done.stdout


def test_no_command_shows_the_help():
    done = sglang()
    assert done.returncode == 2 and "serve" in done.stdout


@pytest.mark.parametrize(
    ("args", "texts"),
    [
        (["srve"], ["no command 'srve'", "Did you mean 'serve'?"]),
        (["--portt"], ["no option '--portt'"]),
        (["serve", "--prt", "1"], ["no option --prt", "'--port'"]),
        (["serve", "--hosts=x"], ["no option --hosts", "'--host'"]),
        (["serve", "extra"], ["does not expect 'extra'"]),
        (["serve", "--port", "abc"], ["--port", "invalid int value"]),
        (["serve", "--port"], ["--port", "expected one argument"]),
        (["serve", "--port", "70000"], ["port is 70000"]),
        (["serve", "--device", "gpu"], ["--device", "choose from"]),
        (["serve", "--config", "/nothing.yaml"], ["Cannot read /nothing.yaml"]),
        (["serve", "--host", "0.0.0.0"], ["Refusing to listen on 0.0.0.0", "--api-key-file"]),
        (["serve", "--log-level", "loud"], ["no log level 'loud'"]),
        (["serve", "--public-base-url", "x"], ["public_base_url"]),
        (["serve", "--memory-budget", "lots"], ["memory_budget is 'lots'", "8g or 6000m"]),
        (["serve", "--max-lora-memory", "inf"], ["max_lora_memory is not a finite number"]),
        (["serve", "--attention-backend", "flsh"], ["--attention-backend", "choose from"]),
        (["serve", "--lora-nickname", "x"], ["--lora-nickname is about", "no --lora-path"]),
        (["generate", "x", "--memory-budget", "0"], ["memory_budget is '0'"]),
        (["serve", "--max-batch-rows", "0"], ["max_batch_rows is 0", "at least 1"]),
        (["generate"], ["There is no prompt"]),
        (["generate", "a", "cat"], ["'cat' after the prompt 'a'", "quotation marks"]),
        (["generate", "x", "--lora-path", "no.safetensors"], ["no adapter no.safetensors"]),
        (["serve", "--lora-path", "./no"], ["There is no adapter ./no", "--lora-path"]),
        (["generate", "--prompt", "x", "--size", "1024"], ["not WIDTHxHEIGHT"]),
        (["generate", "--prompt", "x", "--output-path", "a.gif"], ["unknown ending", ".webp"]),
        (["generate", "--prompt", "x", "--output-path", "a.png", "--num-frames=5"], ["5 frames"]),
        (["generate", "--prompt", "x", "--output-path", "/proc/x"], ["Cannot write to /proc/x"]),
        (["generate", "--prompt", "x", "--sed", "1"], ["'--seed'"]),
        (["generate", "--prompt", "x", "--size", "1000x64"], ["width 1000", "992 or 1008"]),
        (["generate", "--prompt", "x", "--num-frames", "0"], ["num_frames is 0"]),
        (["generate", "--prompt", "x", "--guidance-scale", "nan"], ["guidance_scale is not"]),
        (["generate", "--prompt", " "], ["The prompt is empty"]),
        (["generate", "--prompt", "x", "--image", __file__], ["no PNG, JPEG or WebP"]),
        (["config"], ["sglang config show"]),
    ],
)  # fmt: skip
def test_wrong_usage(args, texts, tmp_path):
    done = sglang(*args, SGLD_DATA_DIR=str(tmp_path), SGLD_DEBUG="0")
    assert done.returncode in (2, 3), done.stderr
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 3
    for text in texts:
        assert text in done.stderr


def test_debug_shows_the_traceback():
    assert "Traceback" in sglang("srve", SGLD_DEBUG="1").stderr


def test_a_bad_environment_value_is_an_error():
    done = sglang("srve", SGLD_DEBUG="maybe")
    assert done.returncode == 2 and done.stderr.startswith("error: ")


FILES = {
    "a.yaml": "port: 31000\nserved-model-name: cat\n",
    "a.toml": 'port = 31000\nserved_model_name = "cat"\n',
    "a.json": '{"port": 31000, "served_model_name": "cat"}',
}


@pytest.mark.parametrize("name", FILES)
def test_config_file_and_flags(tmp_path, name):
    path = tmp_path / name
    path.write_text(FILES[name])
    done = sglang("config", "show", "--origin", "--config", str(path), "--max-queue", "9")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert f"port = 31000  (file {path})" in lines
    assert f"served_model_name = 'cat'  (file {path})" in lines
    assert "max_queue = 9  (flag)" in lines and "host = '127.0.0.1'  (default)" in lines
    over = sglang("config", "show", "--config", str(path), "--port", "5")
    assert "port = 5  (flag)" in over.stdout


def test_the_environment_is_between_file_and_flags(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"log_level": "error"}')
    done = sglang("config", "show", "--config", str(path), SGLD_LOG_LEVEL="debug")
    assert "log_level = 'debug'  (SGLD_LOG_LEVEL)" in done.stdout
    done = sglang("config", "show", "--log-level", "warning", SGLD_LOG_LEVEL="debug")
    assert "log_level = 'warning'  (flag)" in done.stdout
    path.write_text('{"log_level": "error", "data_dir": "/from/file"}')
    done = sglang(
        "config", "show", "--config", str(path), SGLD_LOG_LEVEL="info", SGLD_DATA_DIR="/x"
    )
    assert "log_level = 'info'  (SGLD_LOG_LEVEL)" in done.stdout, "though it is the default"
    assert "data_dir = '/x'  (SGLD_DATA_DIR)" in done.stdout


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.yaml", "prot: 1\n", "Did you mean 'port'?"),
        ("a.yaml", "port: many\n", "port must be int"),
        ("a.yaml", "port: true\n", "port must be int, not True in file "),
        ("a.yaml", "max-queue: 0\n", "a.yaml; it must be at least 1."),
        ("a.yaml", "device: gpu\n", "Use one of: auto, cpu, cuda."),
        ("a.yaml", "- port\n", "must hold a table"),
        ("a.yaml", "a: [\n", "a.yaml cannot be parsed: line 2: expected"),
        ("a.toml", "port = \n", "cannot be parsed"),
        ("a.json", "{", "cannot be parsed"),
        ("a.ini", "x", "Use .yaml, .toml or .json."),
    ],
)
def test_bad_config_files(tmp_path, name, content, text):
    path = tmp_path / name
    path.write_text(content)
    done = sglang("serve", "--config", str(path))
    assert done.returncode == 2 and text in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("command", [["serve"], ["generate", "a cat"]])
@pytest.mark.parametrize("given", ["flags", "file"])
def test_options_that_exclude_each_other_end_it_before_anything_is_loaded(tmp_path, command, given):
    code = (
        "import sys; from sgl_diffusion.cli.sglang import main\n"
        "status = main(sys.argv[1:])\n"
        "assert 'torch' not in sys.modules and 'asyncio' not in sys.modules\n"
        "sys.exit(status)"
    )
    args = ["--quantization", "int8", "--dit-layerwise-offload"]
    if given == "file":
        path = tmp_path / "a.yaml"
        path.write_text("quantization: int8\ndit-layerwise-offload: true\n")
        args = ["--config", str(path)]
    done = subprocess.run(
        [sys.executable, "-c", code, *command, "--data-dir", str(tmp_path / "data"), *args],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "SGLD_DEBUG": "0"},
        timeout=200,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == "", "no address"
    assert not (tmp_path / "outputs").exists()
    assert done.stderr.startswith("error: --quantization int8 and --dit-layerwise-offload exclude")
    assert "Use one of them." in done.stderr and len(done.stderr.splitlines()) == 2


def test_closed_standard_streams_are_filled():
    code = (
        "import os; from sgl_diffusion.cli.sglang import main; main(['--version']);"
        "assert all(os.get_inheritable(fd) for fd in range(3))"
    )
    closed = ["sh", "-c", f'exec {sys.executable} -c "$0" <&- >&- 2>&-', code]
    assert subprocess.run(closed, check=False, env={"PYTHONPATH": str(ROOT)}).returncode == 0


def test_port_in_use(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = sglang("serve", "--port", str(port), "--data-dir", str(tmp_path))
    assert done.returncode == 98
    assert f"process {os.getpid()}" in done.stderr and f"--port {port + 1}" in done.stderr


def test_json_is_what_it_says(tmp_path):
    """A file is parsed by its name, so JSON in .yaml works and TOML in .json does not."""
    path = tmp_path / "a.yaml"
    path.write_text(json.dumps({"port": 7}))
    assert "port = 7" in sglang("config", "show", "--config", str(path)).stdout


@pytest.mark.parametrize("path", ["/proc/nothing", "/dev/null/x", "~no-such-user/x"])
def test_an_impossible_data_folder(path):
    done = sglang("serve", "--port", "0", "--data-dir", path)
    assert done.returncode == 3 and "--data-dir" in done.stderr
    assert path in done.stderr or "home directory" in done.stderr


@pytest.mark.parametrize("command", [["serve"], ["generate", "--prompt", "x"]])
def test_a_path_that_leads_nowhere_ends_at_once(tmp_path, command):
    """Before a worker is started or a port opened."""
    missing = tmp_path / "no-such-model"
    result = sglang(*command, "--model-path", str(missing))
    assert result.returncode == 4 and result.stdout == ""
    assert f"There is no folder {missing}." in result.stderr
    assert "worker" not in result.stderr


@pytest.mark.parametrize("name", ["mask", "strength"])
def test_what_needs_a_picture_says_so_before_loading(tmp_path, name):
    (tmp_path / "file").touch()
    value = {"mask": str(tmp_path / "file"), "strength": "0.5"}[name]
    result = sglang("generate", "--prompt", "x", f"--{name}", value)
    assert result.returncode == 2 and f"--{name} needs a picture" in result.stderr


def test_variables_of_options_that_a_command_lacks_do_not_disturb_it():
    done = sglang("models", "--json", SGLD_LOG_LEVEL="debug", SGLD_S3_BUCKET="b")
    assert done.returncode == 0, done.stderr
    shown = sglang("config", "show", SGLD_S3_BUCKET="films").stdout
    assert "s3_bucket = 'films'  (SGLD_S3_BUCKET)" in shown
    url = "postgresql://me:secret@db/jobs"
    shown = sglang("config", "show", SGLD_DATABASE_URL=url).stdout
    assert "database_url = 'postgresql://me:***@db/jobs'  (SGLD_DATABASE_URL)" in shown


def test_a_folder_that_may_not_be_written_is_told_before_loading(tmp_path):
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o500)
    done = sglang("generate", "x", "--output-path", str(folder), before=no_rights)
    assert done.returncode == 3 and f"Cannot write to {folder}: Permission denied." in done.stderr
    assert "--output-path" in done.stderr and "loading" not in done.stderr


def test_a_disk_that_is_full_is_told(tmp_path):
    """What was made cannot be kept, and nothing half is left of it."""
    from sgl_diffusion.base.errors import SetupError
    from sgl_diffusion.base.params import ResolvedParams
    from sgl_diffusion.cli.target import Target
    from sgl_diffusion.client.types import Generation

    params = ResolvedParams(
        prompt="x", negative_prompt="", width=64, height=64, num_frames=1, fps=1,
        num_inference_steps=1, guidance_scale=1.0, flow_shift=None, max_sequence_length=1,
        seeds=(1,),
    )  # fmt: skip
    noise = np.random.default_rng(1).integers(0, 256, (1, 64, 64, 3), np.uint8)
    made = Generation("x", params, [noise])
    target = Target.of(str(tmp_path / "a.png"), None)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(SetupError, match=r"Cannot write to .*a\.png: File too large") as caught:
            target.write(made, None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.exit_code == 3 and not list(tmp_path.iterdir())
    assert target.write(made, None) == [tmp_path / "a.png"]


def test_the_list_of_models_begins_with_the_one_that_is_here(capsys):
    from sgl_diffusion.cli import models

    assert models.main([]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("Without --model-path: shapes, the small model inside the package")
    assert "Wan-AI/Wan2.1-T2V-1.3B-Diffusers" in shown
