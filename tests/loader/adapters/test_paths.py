"""Which paths a client may name for an adapter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.loader.adapters.paths import check_lora_path, is_hub_id, split_hub_id


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("org/name", True),
        ("org/na.me-1:sub/file.safetensors", True),
        ("org/name:../file.safetensors", False),
        ("org/../name", False),
        ("../name", False),
        ("/etc/passwd", False),
        ("./org/name", False),
        ("org/name/file.safetensors", False),
        ("name", False),
        ("org/", False),
        ("org/name\n", False),
        ("", False),
    ],
)
def test_hub_ids(path: str, expected: bool) -> None:
    assert is_hub_id(path) == expected


def test_a_hub_id_may_name_a_file() -> None:
    assert split_hub_id("org/name") == ("org/name", None)
    assert split_hub_id("org/name:a/b.safetensors") == ("org/name", "a/b.safetensors")


def test_trusted_clients_name_any_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_lora_path("/etc/passwd", trusted=True)
    assert not check_lora_path("org/name", trusted=True)
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert check_lora_path("org/name", trusted=True)


def test_others_name_hub_ids_and_allowed_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed, outside = tmp_path / "allowed", tmp_path / "allowed-not"
    for folder in (allowed / "org" / "name", outside):
        folder.mkdir(parents=True)
    (allowed / "a.safetensors").touch()
    (allowed / "link.safetensors").symlink_to(outside)
    assert check_lora_path(str(allowed / "a.safetensors"), trusted=False, allowed=[allowed])
    assert check_lora_path(str(allowed / "missing"), trusted=False, allowed=[allowed])
    # What looks like a hub id is one, whatever lies in the server's own folder.
    monkeypatch.chdir(allowed)
    assert not check_lora_path("org/name", trusted=False, allowed=[allowed])
    monkeypatch.chdir(tmp_path)
    for path in (
        str(outside),
        str(allowed / ".." / "allowed-not"),
        str(allowed / "link.safetensors"),
        "/etc/passwd",
        "../../x",
        "~nobody-at-all/x",
        "a\0b",
        "x" * 10_000,
        "",
    ):
        with pytest.raises(RequestError) as caught:
            check_lora_path(path, trusted=False, allowed=[allowed], param="lora[0].path")
        assert caught.value.code == "lora_path_not_allowed"
        assert caught.value.param == "lora[0].path"


def test_the_server_can_ask_without_torch() -> None:
    code = "import sys, sgl_diffusion.loader.adapters.paths; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
