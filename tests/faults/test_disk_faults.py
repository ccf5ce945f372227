"""A disk that is really full: a small file system of its own, with no floor kept free on it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image

from sgl_diffusion.base.errors import NotFoundError, UnavailableError
from sgl_diffusion.server.files import Files
from tests.faults.harness import FaultServer, check

VIDEOS = [f"video_{number:010}" for number in range(5)]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """16 MB that nobody else writes to."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    filler = folder / "filler"
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(folder).free)
    assert shutil.disk_usage(folder).free == 0
    return filler


def refused(answer: httpx.Response) -> None:
    assert answer.status_code == 503, answer.text
    assert answer.json()["error"]["code"] == "insufficient_storage"
    assert answer.headers["x-should-retry"] == "false"


def test_a_disk_without_a_byte_left(disk: Path) -> None:
    """What needs no disk goes on; the rest is refused as the fault of the disk, and leaves nothing
    behind; with room again all is well."""
    server = FaultServer(disk / "data", "--min-free-gb", "0")
    try:
        server.wait_worker()
        video_id = server.make()
        server.finished(video_id)
        filler = fill(disk)
        refused(server.image())
        assert server.image(response_format="b64_json").status_code == 200
        asked = {"prompt": "x" * 20_000, "size": "32x32", "num_frames": 5}
        refused(server.http.post("/v1/videos", json=asked))
        assert server.http.get(f"/v1/videos/{video_id}/content").status_code == 200
        assert server.http.get("/livez").status_code == 200
        filler.unlink()
        server.finished(server.make())
        check(server)
    finally:
        server.close()


def test_pictures_of_requests_on_a_full_disk(disk: Path) -> None:
    """Neither kept in part nor taken for lost."""
    files, picture = Files(disk / "data"), Image.effect_noise((256, 256), 90)
    files.write_input(VIDEOS[0], 0, picture)
    filler = fill(disk)
    for write in (
        lambda: files.write_input(VIDEOS[1], 0, picture),
        lambda: files.copy_inputs(VIDEOS[0], VIDEOS[2]),
    ):
        with pytest.raises(UnavailableError) as caught:
            write()
        assert caught.value.code == "insufficient_storage"
    assert not list(files.inputs.rglob("*.part"))
    assert not (files.inputs / VIDEOS[2]).exists()
    filler.unlink()
    files.copy_inputs(VIDEOS[0], VIDEOS[2])
    kept = (files.input(VIDEOS[0], 0), files.input(VIDEOS[2], 0))
    assert kept[0].read_bytes() == kept[1].read_bytes()
    with pytest.raises(NotFoundError):
        files.copy_inputs(VIDEOS[3], VIDEOS[4])
