"""The public surface is a list, and importing it is light."""

from __future__ import annotations

import subprocess
import sys

import pytest

import sgl_diffusion

PUBLIC = ["DiffGenerator", "__version__"]


def test_the_public_names_are_these() -> None:
    assert sorted(sgl_diffusion.__all__) == sorted(PUBLIC)
    for name in PUBLIC:
        assert getattr(sgl_diffusion, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = sgl_diffusion.nothing


@pytest.mark.parametrize(
    "statement",
    [
        "import sgl_diffusion",
        "import sgl_diffusion.server.app, sgl_diffusion.server.run",
        "import sgl_diffusion.client.client, sgl_diffusion.apps.diffusion",
        "import sgl_diffusion.server.omni.run, sgl_diffusion.client.chat, sgl_diffusion.ar.guarded",
        "from sgl_diffusion import DiffGenerator",
        "import sgl_diffusion.orchestrator.stage_process",
        "import sys; from sgl_diffusion.cli.sglang import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass",
    ],
)
def test_importing_stays_light(statement: str) -> None:
    """Neither torch nor the model libraries are imported before a worker needs them."""
    heavy = ("torch", "triton", "diffusers", "transformers")
    check = f"{statement}\nimport sys\nprint([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_needs_no_server_library() -> None:
    check = (
        "from sgl_diffusion.cli.sglang import main\nimport sys\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('fastapi', 'numpy', 'uvicorn', 'PIL', 'av') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
