"""`sgl-omni serve` as a process: the documented commands, a worker that dies, a gentle end."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.ar.chats import make_media
from tests.e2e.server import ROOT, Server

BLOCK = re.compile(r"(?:<!-- not run: ([^>]*?) -->\s*)?```bash\n(.*?)```", re.DOTALL)
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)
PAGE = (ROOT / "docs/omni.md").read_text()


pytestmark = pytest.mark.timeout(400)


class OmniServer(Server):
    module = "sgl_diffusion.cli.omni"

    def wait_until(self, what: str, check: Callable[[], Any], seconds: float = 300) -> Any:
        return super().wait_until(what, check, seconds)


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_media(tmp_path_factory.mktemp("media"))


# The flags of sglang-omni's quickstart, and what they need here beside them: a server for any
# address wants a key or the second flag, local files the last.
FLAGS = (
    *("--host", "0.0.0.0", "--insecure-no-auth"),
    *("--model-name", "qwen3-omni", "--log-level", "info"),
)
LOCAL_FILES = "--allowed-media-path"


@pytest.fixture(scope="module")
def server(
    tiny_qwen3_omni: Path, media: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("omni")
    (folder / "omni.yaml").write_text(f"model_path: {tiny_qwen3_omni}\nmodel_name: other\n")
    running = OmniServer(
        folder / "data",
        *("--config", str(folder / "omni.yaml"), *FLAGS),
        *(LOCAL_FILES, str(media["image"].parent)),
    )
    try:
        yield running.wait_ready()
    finally:
        running.close()


def run(script: str, folder: Path, port: int) -> str:
    """What a documented script prints; `sgl-omni` need not be installed."""
    command = f"{sys.executable} -m sgl_diffusion.cli.omni"
    here = script.replace("8000", str(port)).replace("sgl-omni ", f"{command} ")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", here],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    assert '"error"' not in done.stdout, f"{script}\n{done.stdout}"
    return done.stdout


def test_every_command_of_the_page_runs(
    server: Server, media: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fox.png").write_bytes(media["image"].read_bytes())
    scripts = [script for why, script in BLOCK.findall(PAGE) if not why]
    assert len(scripts) >= 5
    said = "".join(run(script, tmp_path, server.port) for script in scripts)
    assert "data: [DONE]" in said and '"running":true' in said
    assert '"id":"qwen3-omni"' in said, "the flag, not the file"
    made = tmp_path / "hello.mp3"
    assert made.stat().st_size > 1000
    made.unlink()
    (code,) = PYTHON.findall(PAGE)
    monkeypatch.chdir(tmp_path)
    exec(code.replace("8000", str(server.port)), {"openai": openai})
    assert made.stat().st_size > 1000


# The requests of sglang-omni's quickstart, in its words.
QUICKSTART: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "Hello, how are you?"}], "stream": False},
    {"messages": [{"role": "user", "content": "Describe this image"}], "images": ["image"]},
    {"messages": [{"role": "user", "content": "What is said?"}], "audios": ["audio"]},
    {"messages": [{"role": "user", "content": "What happens?"}], "videos": ["video"]},
    {
        "messages": [{"role": "user", "content": "Describe"}],
        "modalities": ["text", "audio"],
        "audio": {"format": "wav"},
        "images": ["image"],
    },
    {
        "messages": [{"role": "user", "content": "Tell a story"}],
        "stage_sampling": {"thinker": {"temperature": 0.7, "top_p": 0.9}},
    },
]


@pytest.mark.parametrize("index", range(len(QUICKSTART)))
def test_requests_of_the_quickstart(server: Server, media: dict[str, Path], index: int) -> None:
    body = {"model": "qwen3-omni", "max_tokens": 6, **QUICKSTART[index]}
    for name in ("images", "audios", "videos"):
        body[name] = [str(media[kind]) for kind in body.get(name, [])]
    answer = server.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"]


def test_the_server_holds_one_port_and_no_torch(server: Server) -> None:
    maps = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "libtorch" not in maps
    assert len(server.workers()) == 1
