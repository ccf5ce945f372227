from __future__ import annotations

from pathlib import Path

from PIL import Image

from sgl_diffusion.base.blank import blank_pictures


def test_files_that_can_be_read_and_go() -> None:
    with blank_pictures(2) as paths:
        assert len(paths) == 2
        for path in paths:
            with Image.open(path) as picture:
                picture.load()
                assert (picture.format, picture.size) == ("PNG", (64, 64))
                assert picture.getextrema() == (128, 128)
    assert not any(Path(path).parent.exists() for path in paths)
    with blank_pictures(0) as none:
        assert none == ()
