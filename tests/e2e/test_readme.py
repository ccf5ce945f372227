"""Every command of the README, the quickstart and docs/api.md runs, word for word but for the port
and the folders.

A ```bash block is one script. Blocks after `<!-- not run: reason -->` are left out, and the reasons
stand here: only what installs or what the suite itself is may carry one. `make` targets that set
up, serve or test are checked to exist and are run by CI itself.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.server import Server, running_server

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(
    r"(?:<!-- not run: (?P<why>[^>]*?) -->\s*)?```bash\n(?P<script>.*?)```", re.DOTALL
)
REASONS = {"installs", "is the server", "is this suite", "needs a CUDA device"}


def blocks(page: str = "README.md") -> list[tuple[str, str]]:
    text = (ROOT / page).read_text()
    return [(match["why"] or "", match["script"]) for match in BLOCK.finditer(text)]


def test_the_readme_reaches_a_working_command_early() -> None:
    head = "\n".join((ROOT / "README.md").read_text().splitlines()[:40])
    assert "make serve" in head and "make test" in head


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md", "docs/api.md"])
def test_what_is_not_run_says_why(page: str) -> None:
    assert {why for why, _ in blocks(page) if why} <= REASONS


def test_the_make_targets_of_the_readme_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z][\w-]*)", (ROOT / "README.md").read_text()))
    assert named and named <= targets


@pytest.mark.timeout(900)  # every command starts Python anew, and some load a model
def test_every_other_command_runs(tmp_path: Path) -> None:
    with running_server(tmp_path / "data") as server:
        run("README.md", server, tmp_path, least=3)
        run("docs/api.md", server, tmp_path, least=2)


@pytest.mark.slow
def test_every_command_of_the_quickstart_runs(tmp_path: Path) -> None:
    with running_server(tmp_path / "data") as server:
        run("docs/quickstart.md", server, tmp_path, least=2)


def run(page: str, server: Server, folder: Path, *, least: int) -> None:
    """Each block that may be run, in a home of its own."""
    scripts = [script for why, script in blocks(page) if not why]
    assert len(scripts) >= least, f"{page} shows how to use the thing"
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SGLD_DATA_DIR": str(folder / "state"),
        "HOME": str(folder),
    }
    examples = folder / "examples"
    if not examples.exists():
        examples.symlink_to(ROOT / "examples")
    for script in scripts:
        here = script.replace("30000", str(server.port)).replace(".venv/bin/", "")
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", here],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
        if "curl" in script:
            assert '"error":{' not in done.stdout, f"{script}\n{done.stdout}"


def test_the_guard_finds_the_blocks(tmp_path: Path) -> None:
    found = list(BLOCK.finditer("<!-- not run: installs -->\n```bash\nx\n```\n```bash\ny\n```"))
    assert [(m["why"], m["script"]) for m in found] == [("installs", "x\n"), (None, "y\n")]
