"""Files appear whole or not at all."""

from __future__ import annotations

import errno

import pytest

from sgl_diffusion.base.errors import EngineError, SetupError, UnavailableError
from sgl_diffusion.server.files import Files, write_file
from sgl_diffusion.server.ids import is_id, new_id


def test_a_file_in_the_place_of_a_folder(tmp_path):
    (tmp_path / "videos").touch()
    with pytest.raises(SetupError, match=r"videos cannot be made: File exists"):
        Files(tmp_path)


def test_a_failed_write_leaves_nothing(tmp_path):
    def broken(path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "full")

    with pytest.raises(UnavailableError) as raised:
        write_file(tmp_path / "x.mp4", broken)
    assert raised.value.code == "insufficient_storage" and not list(tmp_path.iterdir())

    def denied(path):
        raise OSError(errno.EIO, "secret detail")

    with pytest.raises(EngineError) as failed:
        write_file(tmp_path / "x.mp4", denied)
    assert "secret" not in str(failed.value) and not list(tmp_path.iterdir())


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")

    def write(part):
        part.write_text("new")
        assert path.read_text() == "old"

    write_file(path, write)
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_left_overs_are_swept(tmp_path):
    files = Files(tmp_path)
    (files.videos / ".video_0123456789.mp4.part").write_text("half")
    (files.videos / "video_0123456789.mp4").write_text("whole")
    Files(tmp_path)
    assert [path.name for path in files.videos.iterdir()] == ["video_0123456789.mp4"]
    assert files.videos.stat().st_mode & 0o777 == 0o700


def test_ids_sort_by_time_and_never_repeat():
    made = [new_id("video") for _ in range(2000)]
    assert len(set(made)) == len(made) and all(is_id(i, "video") for i in made)
    assert made[0][:14] <= made[-1][:14]


@pytest.mark.parametrize(
    "text", ["video_", "video_123", "video_" + "a" * 65, "image_0123456789", "video_../../etc",
             "video_0123456789\n", "video_０１２３４５６７８９", "VIDEO_0123456789"],
)  # fmt: skip
def test_not_ids(text):
    assert not is_id(text, "video")
