"""Every command of the README runs, word for word but for the port and the folders.

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

from tests.e2e.server import running_server

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(
    r"(?:<!-- not run: (?P<why>[^>]*?) -->\s*)?```bash\n(?P<script>.*?)```", re.DOTALL
)
REASONS = {"installs", "is the server", "is this suite", "needs a CUDA device"}


def blocks() -> list[tuple[str, str]]:
    text = (ROOT / "README.md").read_text()
    return [(match["why"] or "", match["script"]) for match in BLOCK.finditer(text)]


def test_the_readme_reaches_a_working_command_early() -> None:
    head = "\n".join((ROOT / "README.md").read_text().splitlines()[:40])
    assert "make serve" in head and "make test" in head


def test_what_is_not_run_says_why() -> None:
    assert {why for why, _ in blocks() if why} <= REASONS


def test_the_make_targets_of_the_readme_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z][\w-]*)", (ROOT / "README.md").read_text()))
    assert named and named <= targets


def test_every_other_command_runs(tmp_path: Path) -> None:
    scripts = [script for why, script in blocks() if not why]
    assert len(scripts) >= 3, "the README shows how to use the thing"
    bin_folder = str(Path(sys.executable).parent)
    with running_server(tmp_path / "data") as server:
        environment = {
            **os.environ,
            "PATH": f"{bin_folder}:{os.environ['PATH']}",
            "SGLD_DATA_DIR": str(tmp_path / "state"),
            "HOME": str(tmp_path),
        }
        for name in ("examples",):
            (tmp_path / name).symlink_to(ROOT / name)
        for script in scripts:
            here = script.replace("30000", str(server.port)).replace(".venv/bin/", "")
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", here],
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
                timeout=240,
            )
            assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
            if "curl" in script:
                assert '"error"' not in done.stdout, f"{script}\n{done.stdout}"


def test_the_guard_finds_the_blocks(tmp_path: Path) -> None:
    found = list(BLOCK.finditer("<!-- not run: installs -->\n```bash\nx\n```\n```bash\ny\n```"))
    assert [(m["why"], m["script"]) for m in found] == [("installs", "x\n"), (None, "y\n")]
